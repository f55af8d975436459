"""A Mixtral's shape, read from a Hugging Face `config.json` and checked before anything is allocated."""

import json
from dataclasses import dataclass
from pathlib import Path

from .errors import UserError


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
        if not isinstance(raw, dict):
            raise UserError(f"{name}: holds no JSON object")
        kind = raw.get("model_type")
        if kind != "mixtral":
            raise UserError(f"{name}: model_type is {kind!r}; duoserve runs 'mixtral' and nothing else")
        if raw.get("hidden_act", "silu") != "silu":
            raise UserError(f"{name}: hidden_act {raw['hidden_act']!r} is not implemented (only 'silu')")
        rope = raw.get("rope_scaling")              # the older spelling wins where both stand, as in transformers
        rope = (raw.get("rope_parameters") if rope is None else rope)
        rope = {} if rope is None else rope
        if not isinstance(rope, dict) or rope.get("partial_rotary_factor", 1) != 1:
            raise UserError(f"{name}: rope_parameters must be an object, with partial_rotary_factor 1")
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type != "default":
            raise UserError(f"{name}: RoPE scaling {rope_type!r} is not implemented (only 'default')")

        def number(key, kind, value, least):
            most = 1024 if key in ("num_hidden_layers", "num_local_experts") else 2**31 - 1
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most \
                    or value != kind(value):
                raise UserError(f"{name}: {key} is {value!r}, which is not a sensible {kind.__name__}")
            return kind(value)

        values = {}
        for key, least in (("vocab_size", 2), ("hidden_size", 2), ("intermediate_size", 1), ("num_hidden_layers", 1),
                           ("num_attention_heads", 1), ("num_key_value_heads", 1), ("num_local_experts", 1),
                           ("num_experts_per_tok", 1), ("max_position_embeddings", 1), ("bos_token_id", 0)):
            value = raw.get(key)
            if key == "num_key_value_heads" and key in raw and value is None:
                value = values["num_attention_heads"]       # null: as many as query heads
            values[key] = number(key, int, getattr(cls, key) if value is None else value, least)
        theta = rope.get("rope_theta")
        for key, value, least in (("rms_norm_eps", raw.get("rms_norm_eps"), 0),
                                  ("rope_theta", raw.get("rope_theta") if theta is None else theta, 1e-9)):
            values[key] = number(key, float, getattr(cls, key) if value is None else value, least)
        if raw.get("sliding_window") is not None:
            values["sliding_window"] = number("sliding_window", int, raw["sliding_window"], 1)
        eos = raw.get("eos_token_id")
        eos = [2] if eos is None else eos if isinstance(eos, list) else [eos]
        values["eos_token_ids"] = tuple(number("eos_token_id", int, e, 0) for e in eos)
        tied = raw.get("tie_word_embeddings")
        if tied not in (None, True, False) or isinstance(tied, (int, float)) and not isinstance(tied, bool):
            raise UserError(f"{name}: tie_word_embeddings is {tied!r}, neither true nor false")
        values["tie_word_embeddings"] = bool(tied)
        head_dim = raw.get("head_dim")
        if head_dim is None:
            head_dim = values["hidden_size"] // values["num_attention_heads"]
        values["head_dim"] = number("head_dim", int, head_dim, 2)
        config = cls(**values)
        if config.num_attention_heads % config.num_key_value_heads:
            raise UserError(f"{name}: num_attention_heads {config.num_attention_heads} is not a multiple of "
                            f"num_key_value_heads {config.num_key_value_heads}")
        if config.num_experts_per_tok > config.num_local_experts:
            raise UserError(f"{name}: num_experts_per_tok {config.num_experts_per_tok} exceeds "
                            f"num_local_experts {config.num_local_experts}")
        if config.bos_token_id >= config.vocab_size:
            raise UserError(f"{name}: bos_token_id {config.bos_token_id} is outside vocab_size {config.vocab_size}")
        if config.num_hidden_layers * config.num_local_experts > 2**16:
            raise UserError(f"{name}: num_hidden_layers {config.num_hidden_layers} times num_local_experts "
                            f"{config.num_local_experts} is more than is believed here")
        if config.head_dim % 2:
            raise UserError(f"{name}: head_dim {config.head_dim} is odd; RoPE turns pairs")
        return config
