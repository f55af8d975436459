"""A Mixtral's shape, read from a Hugging Face `config.json` and checked before anything is allocated."""

from dataclasses import dataclass
from pathlib import Path

from .errors import UserError
from .files import read_json

LEAST = {"vocab_size": 2, "hidden_size": 2, "intermediate_size": 1, "num_hidden_layers": 1,
         "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 2, "num_local_experts": 1,
         "num_experts_per_tok": 1, "max_position_embeddings": 1, "rms_norm_eps": 0.0, "rope_theta": 1e-9,
         "sliding_window": 1, "bos_token_id": 0}                    # sensible values; a float's are floats


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
        return cls.from_dict(read_json(path), str(path))

    @classmethod
    def from_dict(cls, raw: dict, name: str = "config.json") -> "MixtralConfig":
        """Check a parsed `config.json`: whatever we do not implement is refused by name."""
        def number(key, value, least):
            kind, most = type(least), 1024 if key in ("num_hidden_layers", "num_local_experts") else 2**31 - 1
            if type(value) not in (int, float) or not least <= value <= most or value != kind(value):
                raise UserError(f"{name}: {key} is {value!r}, which is not a sensible {kind.__name__}")
            return kind(value)

        def refuse(*rules):
            for wrong, why in rules:
                if wrong:
                    raise UserError(f"{name}: {why}")

        refuse((not isinstance(raw, dict), "holds no JSON object"))
        given = {key: value for key, value in raw.items() if value is not None}         # null: left out
        kind, activation = given.get("model_type"), given.get("hidden_act", "silu")
        tied, eos = given.get("tie_word_embeddings", False), given.get("eos_token_id", 2)
        rope = given.get("rope_scaling", given.get("rope_parameters", {}))      # the older spelling wins
        refuse((kind != "mixtral", f"model_type is {kind!r}; duoserve runs 'mixtral' and nothing else"),
               (activation != "silu", f"hidden_act {activation!r} is not implemented (only 'silu')"),
               (not isinstance(tied, bool), f"tie_word_embeddings is {tied!r}, neither true nor false"),
               (not isinstance(rope, dict) or rope.get("partial_rotary_factor", 1) != 1,
                "rope_parameters must be an object, with partial_rotary_factor 1"))
        scaling = rope.get("rope_type", rope.get("type", "default"))
        refuse((scaling != "default", f"RoPE scaling {scaling!r} is not implemented (only 'default')"))
        if rope.get("rope_theta") is not None:
            given["rope_theta"] = rope["rope_theta"]
        values = {}
        for key, least in LEAST.items():
            default = getattr(cls, key)
            if key == "head_dim":
                default = values["hidden_size"] // values["num_attention_heads"]
            elif key == "num_key_value_heads" and key in raw:       # null: as many as query heads
                default = values["num_attention_heads"]
            if (value := given.get(key, default)) is not None:      # (no sliding_window is None)
                values[key] = number(key, value, least)
        stops = tuple(number("eos_token_id", token, 0) for token in (eos if isinstance(eos, list) else [eos]))
        c = cls(**values, tie_word_embeddings=tied, eos_token_ids=stops)
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
