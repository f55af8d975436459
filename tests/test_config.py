"""config.json: real ones are read right, and whatever we do not implement is refused by name, in one line."""

import json

import pytest

from duoserve.config import MixtralConfig
from duoserve.errors import UserError

MIXTRAL_8X7B = {    # mistralai/Mixtral-8x7B-Instruct-v0.1
    "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
    "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": False,
    "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.36.0.dev0",
    "use_cache": True,
    "vocab_size": 32000}
MIXTRAL_8X22B = MIXTRAL_8X7B | {
    "hidden_size": 6144, "intermediate_size": 16384, "max_position_embeddings": 65536,
    "num_attention_heads": 48,
    "num_hidden_layers": 56, "rope_theta": 1000000, "vocab_size": 32768}
NAN, INFINITY = float("nan"), float("inf")      # `json` writes and reads both, as NaN and Infinity


def read(tmp_path, **changes) -> MixtralConfig:
    """Read 8x7B's config with changes; `...` leaves a key out."""
    config = {key: value for key, value in (MIXTRAL_8X7B | changes).items() if value is not ...}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return MixtralConfig.read(tmp_path)


def test_8x7b(tmp_path):
    config = read(tmp_path)
    assert config == MixtralConfig()
    assert config.head_dim == 128 and config.eos_token_ids == (2,) and config.rope_theta == 1e6
    assert MixtralConfig.read(tmp_path / "config.json") == config


def test_8x22b(tmp_path):
    config = read(tmp_path, **MIXTRAL_8X22B)
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (56, 6144, 16384)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (48, 8, 128)
    assert config.vocab_size == 32768 and config.rope_theta == 1e6 and type(config.rope_theta) is float


ACCEPTED = [
    ({"head_dim": 64}, {"head_dim": 64}),
    ({"head_dim": None}, {"head_dim": 128}),
    ({"hidden_size": 2048}, {"head_dim": 64}),
    ({"num_key_value_heads": 32}, {"num_key_value_heads": 32}),
    ({"num_key_value_heads": None}, {"num_key_value_heads": 32}),       # transformers: as many as query heads
    ({"num_key_value_heads": ...}, {"num_key_value_heads": 8}),
    ({"num_experts_per_tok": 8}, {"num_experts_per_tok": 8}),
    ({"eos_token_id": [2, 7]}, {"eos_token_ids": (2, 7)}),
    ({"eos_token_id": None}, {"eos_token_ids": (2,)}),
    ({"eos_token_id": ...}, {"eos_token_ids": (2,)}),
    ({"eos_token_id": 0}, {"eos_token_ids": (0,)}),
    ({"sliding_window": 4096}, {"sliding_window": 4096}),
    ({"sliding_window": ...}, {"sliding_window": None}),
    ({"tie_word_embeddings": True}, {"tie_word_embeddings": True}),
    ({"tie_word_embeddings": ...}, {"tie_word_embeddings": False}),
    ({"hidden_act": ...}, {}),
    ({"rope_theta": ...}, {"rope_theta": 1e6}),
    ({"rope_theta": None}, {"rope_theta": 1e6}),
    ({"rope_theta": 10000}, {"rope_theta": 1e4}),
    ({"rope_scaling": None}, {"rope_theta": 1e6}),
    ({"rope_scaling": {"type": "default"}}, {"rope_theta": 1e6}),
    ({"rope_theta": ..., "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
     {"rope_theta": 5e5}),
    ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
     {"rope_theta": 5e5}),
    ({"rope_theta": 1e4, "rope_parameters": {"rope_type": "default"}}, {"rope_theta": 1e4}),
    ({"rope_theta": 1e4, "rope_parameters": None}, {"rope_theta": 1e4}),
    ({"quantization_config": {"quant_method": "awq"}, "anything_else": [1]}, {}),
]


def test_accepted(tmp_path):
    for changes, want in ACCEPTED:
        config = read(tmp_path, **changes)
        for key, value in want.items():
            assert getattr(config, key) == value, (changes, key)


# Refused


def refused(tmp_path, changes, *words):
    """`changes` to 8x7B's config are refused in one line with these words and the file's name."""
    try:
        read(tmp_path, **changes)
    except UserError as error:
        message = str(error)
        assert "\n" not in message
        for word in (str(tmp_path / "config.json"), *words):
            assert word in message, changes
    else:
        pytest.fail(f"accepted: {changes}")


INTEGERS = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "num_local_experts", "num_experts_per_tok", "max_position_embeddings",
            "head_dim", "sliding_window", "bos_token_id", "eos_token_id"}
MAY_BE_ZERO = {"rms_norm_eps", "bos_token_id", "eos_token_id"}


def test_what_is_not_a_sensible_number_is_refused_by_its_key(tmp_path):
    for key in sorted(INTEGERS | {"rms_norm_eps", "rope_theta"}):
        for value in (True, "8", -1, NAN, INFINITY, -INFINITY, 10**400, {"a": 1},
                      *[2.5] * (key in INTEGERS), *[0] * (key not in MAY_BE_ZERO)):
            refused(tmp_path, {key: value}, key)


REFUSED = [
    ({"model_type": "mistral"}, ("model_type", "'mistral'")),
    ({"model_type": ...}, ("model_type",)),
    ({"model_type": ["mixtral"]}, ("model_type",)),
    ({"hidden_act": "gelu"}, ("hidden_act", "'gelu'")),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ("RoPE", "'linear'")),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ("RoPE", "'yarn'")),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}}, ("RoPE", "'yarn'")),
    # transformers takes rope_scaling where there are both
    ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 1e6}},
     ("RoPE", "'linear'")),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, ("partial_rotary_factor",)),
    ({"rope_parameters": "yarn"}, ("rope_parameters",)),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": "1e6"}}, ("rope_theta",)),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": True}}, ("rope_theta",)),
    ({"num_key_value_heads": 5}, ("num_attention_heads 32", "num_key_value_heads 5")),
    ({"num_key_value_heads": 64}, ("num_attention_heads 32", "num_key_value_heads 64")),
    ({"num_experts_per_tok": 9}, ("num_experts_per_tok 9", "num_local_experts 8")),
    ({"num_hidden_layers": 1024, "num_local_experts": 1024},
     ("num_hidden_layers 1024", "num_local_experts 1024")),
    ({"bos_token_id": 32000}, ("bos_token_id 32000", "vocab_size 32000")),
    ({"head_dim": 33}, ("head_dim 33",)),
    ({"hidden_size": 16}, ("head_dim",)),                           # which would be 16 // 32
    ({"eos_token_id": [2, "x"]}, ("eos_token_id", "'x'")),
    ({"eos_token_id": [2, True]}, ("eos_token_id",)),
    ({"tie_word_embeddings": "false"}, ("tie_word_embeddings", "'false'")),
]


def test_what_is_not_implemented_is_refused_by_name(tmp_path):
    for changes, words in REFUSED:
        refused(tmp_path, changes, *words)


def test_a_file_that_is_no_json_object(tmp_path):
    path = tmp_path / "config.json"
    for text in (b"", b"{", b"{'a': 1}", b"[" * 100_000, b"\xff\xfe{}", b"\x1f\x8b\x08\x00"):
        path.write_bytes(text)
        with pytest.raises(UserError, match="config.json"):
            MixtralConfig.read(tmp_path)
    for text in ("[]", "null", "3", '"mixtral"'):
        path.write_text(text)
        with pytest.raises(UserError, match="config.json: holds no JSON object"):
            MixtralConfig.read(tmp_path)


def test_missing(tmp_path):
    with pytest.raises(UserError, match="config.json: no such file"):
        MixtralConfig.read(tmp_path)
    with pytest.raises(UserError, match="nowhere: no such file"):
        MixtralConfig.read(tmp_path / "nowhere")


def test_unreadable(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/config.json"):        # a file where a directory should be
        MixtralConfig.read(tmp_path / "file" / "config.json")
