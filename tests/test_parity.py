"""The model computes what transformers computes: the answers in tests/reference, made by make_reference.py.

The references' weights lie on a 4-bit grid, so packing loses nothing and only the arithmetic is compared.
"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from models import AllExperts, build, logits_of, packed, SHAPES, write_hf
from safetensors.torch import load_file

import duoserve.model
from duoserve.config import MixtralConfig
from duoserve.model import Mixtral
from duoserve.policies import POLICIES

TOLERANCE = 1e-4    # of logits with a deviation of about 3


def test_of_equal_logits_the_first_are_chosen():
    logits = torch.tensor([[1.0, 2, 2, 2, 0], [3, 3, 3, 3, 3], [0, 0, 1, 0, 1]])
    ids, weights = duoserve.model.route(logits, 2)
    assert ids.tolist() == [[1, 2], [0, 1], [2, 4]] and weights.tolist() == [[0.5, 0.5]] * 3


def new_kv(config: MixtralConfig) -> torch.Tensor:
    """[N, 2, G, C, A], full of NaN, so that reading a position before it is written shows."""
    shape = config.num_hidden_layers, 2, config.num_key_value_heads, 64, config.head_dim
    return torch.full(shape, torch.nan)


@pytest.fixture(scope="session")
def directories(tmp_path_factory):
    """`directories(name)`: that shape's packed directory, made once."""
    made = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = packed(tmp_path_factory.mktemp(name), grid=True, **SHAPES[name])
        return made[name]
    return get


@pytest.fixture(scope="session")
def models(directories):
    """`models(name)`: the `Mixtral` and its experts, built once."""
    made = {}

    def get(name: str) -> tuple[Mixtral, AllExperts]:
        if name not in made:
            made[name] = build(directories(name))
        return made[name]
    return get


def reference(name: str) -> dict:
    """`prompt` and `greedy` as lists, `logits` and `router_logits` as tensors."""
    tensors = load_file(Path(__file__).parent / "reference" / f"{name}.safetensors")
    return {key: tensor.tolist() if key in ("prompt", "greedy") else tensor
            for key, tensor in tensors.items()}


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


# The model by itself


@pytest.mark.parametrize("name", SHAPES)
def test_one_pass(name, models):
    model, source = models(name)
    want = reference(name)
    close(logits_of(model, source, want["prompt"]), want["logits"], TOLERANCE)
    close(torch.stack(source.logits, 1), want["router_logits"], TOLERANCE)


@pytest.mark.parametrize("name", SHAPES)
def test_greedy_with_a_cache(name, models):
    model, source = models(name)
    want, kv = reference(name), new_kv(model.config)
    ids = want["prompt"]
    tokens = [logits_of(model, source, ids, kv)[-1].argmax().item()]
    while len(tokens) < 10:                 # (through the engine it is all of them, below)
        start = len(ids) + len(tokens) - 1
        tokens.append(logits_of(model, source, tokens[-1:], kv, start)[0].argmax().item())
    assert tokens == want["greedy"][:10]


@pytest.mark.parametrize("name", SHAPES)
def test_steps_equal_one_pass(name, models):
    """Decode from an empty cache, and after a prefill of 13 tokens, against one pass without a cache."""
    model, source = models(name)
    ids = reference(name)["prompt"]
    whole = logits_of(model, source, ids)
    for first, end in ((0, 10), (13, len(ids))):
        kv = new_kv(model.config)
        parts = [logits_of(model, source, ids[:first], kv)] if first else []
        parts += [logits_of(model, source, [ids[i]], kv, i) for i in range(first, end)]
        close(torch.cat(parts), whole[:end], 1e-5 * whole.abs().max().item())


@pytest.mark.parametrize("name", ("gqa4", "sliding_window"))
def test_row_blocks(name, models, monkeypatch):
    """A prompt longer than a block of rows gives what one block gives. (These are shorter than 512 rows.)
    In whichever order the attention's kernel lays out its answer."""
    model, source = models(name)
    ids = reference(name)["prompt"]
    whole = logits_of(model, source, ids)
    monkeypatch.setattr(duoserve.model, "ATTENTION_ROWS", 7)
    monkeypatch.setattr(duoserve.model, "EXPERT_ROWS", 3)
    close(logits_of(model, source, ids, new_kv(model.config)), whole, 1e-5 * whole.abs().max().item())
    attend = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention",
                        lambda *q, **how: attend(*q, **how).transpose(1, 2).contiguous().transpose(1, 2))
    close(logits_of(model, source, ids, new_kv(model.config)), whole, 1e-5 * whole.abs().max().item())


@pytest.mark.parametrize("name, changes", [
    ("rope_parameters", {"rope_theta": 10000.0}), ("nine_layers", {"rope_theta": 10000.0}),
    ("sliding_window", {"sliding_window": None}), ("sliding_window", {"sliding_window": 9}),
    ("mha", {"rms_norm_eps": 1e-2}), ("six_experts", {"num_experts_per_tok": 2}),
])
def test_references_can_tell(name, changes, directories):
    """A setting that is misread is far outside the tolerance: the comparison above is not vacuous."""
    want = reference(name)
    got = logits_of(*build(directories(name), **changes), want["prompt"])
    assert (got - want["logits"]).abs().max() > 50 * TOLERANCE


def test_lookahead(directories):
    """It is what each router would say if the attention and the experts before it added nothing."""
    model, source = build(directories("nine_layers"))
    ids = reference("nine_layers")["prompt"]
    logits_of(model, source, ids)
    for i, layer in enumerate(model.layers):
        want, before = source.lookahead[i], source.logits[i]
        layer.attention.o.scale.zero_()
        for e in range(model.config.num_local_experts if i else 0):
            source.table[i - 1, e].w2.scale.zero_()
        logits_of(model, source, ids)
        close(source.logits[i], want, TOLERANCE)
        assert (source.logits[i] - before).abs().max() > 0.1
    assert source.lookahead[-1] is None and len(source.lookahead) == 10


def test_both_spellings_of_rope_are_one_model(tmp_path):
    """Top-level `rope_theta`, and transformers 5's `rope_parameters`, whose theta wins over the former."""
    write_hf(tmp_path, num_hidden_layers=1, rope_theta=500.0)
    want = MixtralConfig.read(tmp_path)
    for arguments in ({"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}},
                      {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}, "rope_theta": 1e4},
                      {"rope_parameters": {"rope_type": "default"}, "rope_theta": 500.0}):
        write_hf(tmp_path, num_hidden_layers=1, **arguments)
        assert MixtralConfig.read(tmp_path) == want


# Through the engine


def engine_for(directory: Path, **arguments):
    from duoserve import Engine
    return Engine.from_pretrained(directory, device="cpu", dtype="float32", **arguments)


@pytest.mark.parametrize("name", SHAPES)
def test_engine(name, directories):
    engine, want = engine_for(directories(name)), reference(name)
    logits = engine.logits(want["prompt"])
    assert logits.dtype == torch.float32 and logits.device.type == "cpu"
    close(logits, want["logits"], TOLERANCE)
    answer = engine.generate(want["prompt"], max_new_tokens=32, temperature=0)
    assert list(answer.token_ids) == want["greedy"]
    assert answer.finish_reason == "length"


@pytest.mark.parametrize("policy, cache_experts", [         # fewer than top_k, a few, all
    *((policy, 2) for policy in POLICIES), ("duo", 5), ("duo", 18)])
def test_engine_under_every_policy(policy, cache_experts, directories):
    """The answers are those of transformers, whatever decides which experts are cached."""
    want = reference("six_experts")
    engine = engine_for(directories("six_experts"), policy=policy, cache_experts=cache_experts)
    close(engine.logits(want["prompt"]), want["logits"], TOLERANCE)
    answer = engine.generate(want["prompt"], max_new_tokens=12, temperature=0)
    assert answer.token_ids == want["greedy"][:12]


def test_engine_takes_a_torch_dtype(directories):
    from duoserve import Engine
    want = reference("mha")
    engine = Engine.from_pretrained(directories("mha"), device="cpu", dtype=torch.float32)
    close(engine.logits(want["prompt"]), want["logits"], TOLERANCE)
