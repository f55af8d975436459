"""Small random Mixtrals in Hugging Face's layout, the same on every machine, for the tests and their references."""

import json
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from safetensors.torch import save_file
from torch import Tensor

TEXT = "the quick brown fox jumps over the lazy dog and then the other dogs run home to the old house on the hill"
DEFAULTS = dict(vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
                num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=256,
                rms_norm_eps=1e-5, rope_theta=10000.0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False)

# Name -> arguments of `write_hf`, each the least model that shows one thing; `make_reference.py` wrote down what
# transformers answers. Seeds are such that no greedy step is close and that no EOS comes.
SHAPES: dict[str, dict] = {
    "mha": dict(seed=101, num_key_value_heads=4, intermediate_size=128),
    "gqa4": dict(seed=201, num_attention_heads=8, hidden_size=96, head_dim=16, intermediate_size=160),
    "gqa8": dict(seed=301, num_attention_heads=8, num_key_value_heads=1, head_dim=24),
    "wide": dict(seed=402, hidden_size=128, intermediate_size=256),
    "six_experts": dict(seed=501, num_local_experts=6, num_experts_per_tok=3, dtype=torch.float16),
    "nine_layers": dict(seed=606, num_hidden_layers=9, rope_theta=1e6, eos_token_id=[2, 7]),
    "rope_parameters": dict(seed=701, rope_parameters={"rope_theta": 500.0, "rope_type": "default"}),
    "sliding_window": dict(seed=801, sliding_window=8),
    "tied": dict(seed=905, tie_word_embeddings=True),
}


@cache
def tokenizer_model(*control: str) -> bytes:
    """A sentencepiece BPE of 320 pieces: unk, bos, eos, `control` symbols, the 256 bytes, and what the text offers."""
    out = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT]), model_writer=out, model_type="bpe", vocab_size=320, byte_fallback=True,
        normalization_rule_name="identity", unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2,
        control_symbols=list(control))
    return out.getvalue()


def grid_matrix(rng: np.random.RandomState, rows: int, columns: int) -> np.ndarray:
    """[rows, columns] of (q - 8) * 2**-k, q in 0..15 with both ends in every 32 columns: packing loses nothing."""
    q = rng.randint(0, 16, (rows, columns // 32, 32))
    low, high = np.split(rng.rand(rows, columns // 32, 32).argsort(-1)[..., :2], 2, -1)
    np.put_along_axis(q, low, 0, -1)
    np.put_along_axis(q, high, 15, -1)
    k = round(np.log2(4.9 * columns ** 0.5))        # 4.9 is q's deviation, the forced ends included
    return (q.reshape(rows, columns) - 8) * 2.0 ** -k


def write_hf(path: Path, *, seed: int = 0, grid: bool = False, dtype: torch.dtype = torch.bfloat16, shards: int = 1,
             **config_overrides) -> dict[str, Tensor]:
    """Write a random Hugging Face Mixtral directory; `config_overrides` are keys of its config.json.

    Weights come from numpy's `RandomState`, whose stream never changes (NEP 19). With `grid`, every matrix that gets
    packed is exactly representable in 4 bits, at any group size. Returns the state dict by Hugging Face's names.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    config = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_act": "silu",
              "torch_dtype": str(dtype).removeprefix("torch.")} | DEFAULTS | config_overrides
    if "rope_parameters" in config_overrides and "rope_theta" not in config_overrides:
        del config["rope_theta"]                    # one spelling or the other
    (path / "config.json").write_text(json.dumps(config, indent=2))
    (path / "tokenizer.model").write_bytes(tokenizer_model())

    rng, state = np.random.RandomState(seed), {}
    D, F = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or D // heads

    def put(name: str, array: np.ndarray) -> None:
        state[name] = torch.from_numpy(array).to(dtype)

    def matrix(name: str, rows: int, columns: int) -> None:
        put(name, grid_matrix(rng, rows, columns) if grid else rng.randn(rows, columns) / columns ** 0.5)

    def norm(name: str) -> None:
        put(name, 1 + 0.1 * rng.randn(D))

    put("model.embed_tokens.weight", 0.25 * rng.randn(config["vocab_size"], D))
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        norm(f"{layer}.input_layernorm.weight")
        for name, n in (("q", heads), ("k", config["num_key_value_heads"]), ("v", config["num_key_value_heads"])):
            matrix(f"{layer}.self_attn.{name}_proj.weight", n * head_dim, D)
        matrix(f"{layer}.self_attn.o_proj.weight", D, heads * head_dim)
        norm(f"{layer}.post_attention_layernorm.weight")
        put(f"{layer}.block_sparse_moe.gate.weight", 2 * rng.randn(config["num_local_experts"], D) / D ** 0.5)
        for e in range(config["num_local_experts"]):
            expert = f"{layer}.block_sparse_moe.experts.{e}"
            matrix(f"{expert}.w1.weight", F, D)
            matrix(f"{expert}.w2.weight", D, F)
            matrix(f"{expert}.w3.weight", F, D)
    norm("model.norm.weight")
    if not config["tie_word_embeddings"]:
        put("lm_head.weight", 3 * rng.randn(config["vocab_size"], D) / D ** 0.5)

    names = list(state)
    if shards == 1:
        save_file(state, path / "model.safetensors", {"format": "pt"})
        return state
    where = {}                                      # in contiguous runs, so that layers and experts straddle files
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = names[i * len(names) // shards:(i + 1) * len(names) // shards]
        save_file({name: state[name] for name in part}, path / file, {"format": "pt"})
        where |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in state.values())
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": where}))
    return state


def packed(path: Path, *, group_size: int = 128, **arguments) -> Path:
    """`write_hf` into path/hf, converted into path/packed, which is returned."""
    from duoserve.checkpoint import convert
    write_hf(path / "hf", **arguments)
    convert(path / "hf", path / "packed", group_size=group_size, progress=False)
    return path / "packed"
