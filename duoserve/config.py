"""A Mixtral's shape, read from a Hugging Face `config.json` and checked before anything is allocated."""

import json
from dataclasses import dataclass
from pathlib import Path

from .errors import UserError

LEAST = {"vocab_size": 2, "hidden_size": 2, "intermediate_size": 1, "num_hidden_layers": 1,
         "num_attention_heads": 1, "num_key_value_heads": 1, "num_local_experts": 1, "num_experts_per_tok": 1,
         "max_position_embeddings": 1, "bos_token_id": 0}       # sensible values, in the order they are read


@dataclass(frozen=True)
class MixtralConfig:
    """Names and defaults are those of Hugging Face's `MixtralConfig` (arXiv 2401.04088, table 1)."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128                     # need not be hidden_size / num_attention_heads
    num_local_experts: int = 8
    num_experts_per_tok: int = 2
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1e6
    sliding_window: int | None = None
    bos_token_id: int = 1
    eos_token_ids: tuple[int, ...] = (2,)
    tie_word_embeddings: bool = False

    @property
    def expert_keys(self) -> list[tuple[int, int]]:
        """(layer, expert) of every expert there is, in the order of a pass."""
        return [(layer, e) for layer in range(self.num_hidden_layers) for e in range(self.num_local_experts)]

    @classmethod
    def read(cls, path: str | Path) -> "MixtralConfig":
        """Read `config.json` (or the directory that holds it); `UserError` names what is wrong with it."""
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; a model directory needs its config.json") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read ({error})") from None
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: is not JSON ({error})") from None
        return cls.from_dict(raw, str(path))

    @classmethod
    def from_dict(cls, raw: dict, name: str = "config.json") -> "MixtralConfig":
        """Check a parsed `config.json`: whatever we do not implement is refused by name."""
        def number(key, value, least=1, kind=int):
            most = 1024 if key in ("num_hidden_layers", "num_local_experts") else 2**31 - 1
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most \
                    or value != kind(value):
                raise UserError(f"{name}: {key} is {value!r}, which is not a sensible {kind.__name__}")
            return kind(value)

        def given(key, default):            # null is as good as absent
            return default if raw.get(key) is None else raw[key]

        def refuse(*rules):
            for wrong, why in rules:
                if wrong:
                    raise UserError(f"{name}: {why}")

        refuse((not isinstance(raw, dict), "holds no JSON object"))
        kind, activation = raw.get("model_type"), raw.get("hidden_act", "silu")
        rope = given("rope_scaling", given("rope_parameters", {}))      # the older spelling wins
        refuse((kind != "mixtral", f"model_type is {kind!r}; duoserve runs 'mixtral' and nothing else"),
               (activation != "silu", f"hidden_act {activation!r} is not implemented (only 'silu')"),
               (not isinstance(rope, dict) or rope.get("partial_rotary_factor", 1) != 1,
                "rope_parameters must be an object, with partial_rotary_factor 1"))
        scaling = rope.get("rope_type", rope.get("type", "default"))
        tied = given("tie_word_embeddings", False)
        refuse((scaling != "default", f"RoPE scaling {scaling!r} is not implemented (only 'default')"),
               (not isinstance(tied, bool), f"tie_word_embeddings is {tied!r}, neither true nor false"))
        values = {"tie_word_embeddings": tied}
        for key, least in LEAST.items():
            many = key == "num_key_value_heads" and key in raw          # null: as many as query heads
            default = values["num_attention_heads"] if many else getattr(cls, key)
            values[key] = number(key, given(key, default), least)
        values["rms_norm_eps"] = number("rms_norm_eps", given("rms_norm_eps", cls.rms_norm_eps), 0, float)
        theta = given("rope_theta", cls.rope_theta) if rope.get("rope_theta") is None else rope["rope_theta"]
        values["rope_theta"] = number("rope_theta", theta, 1e-9, float)
        if raw.get("sliding_window") is not None:
            values["sliding_window"] = number("sliding_window", raw["sliding_window"])
        eos = given("eos_token_id", 2)
        eos = eos if isinstance(eos, list) else [eos]
        values["eos_token_ids"] = tuple(number("eos_token_id", token, 0) for token in eos)
        values["head_dim"] = number("head_dim", given(
            "head_dim", values["hidden_size"] // values["num_attention_heads"]), 2)
        c = cls(**values)
        refuse((c.num_attention_heads % c.num_key_value_heads, f"num_attention_heads {c.num_attention_heads} "
                f"is not a multiple of num_key_value_heads {c.num_key_value_heads}"),
               (c.num_experts_per_tok > c.num_local_experts, f"num_experts_per_tok {c.num_experts_per_tok} "
                f"exceeds num_local_experts {c.num_local_experts}"),
               (c.bos_token_id >= c.vocab_size, f"bos_token_id {c.bos_token_id} is outside vocab_size "
                f"{c.vocab_size}"),
               (len(c.expert_keys) > 2**16, f"num_hidden_layers {c.num_hidden_layers} "
                f"times num_local_experts {c.num_local_experts} is more than any Mixtral has"),
               (c.head_dim % 2, f"head_dim {c.head_dim} is odd; RoPE turns pairs"))
        return c
