"""Write down what transformers answers to each of `models.SHAPES`: tests/reference/<name>.safetensors.

    pip install transformers        # the tests themselves do not need it
    python tests/make_reference.py [NAME ...]

Each file holds `prompt` [tokens], `logits` [tokens, vocab] in fp32 (teacher-forced), `router_logits` [tokens,
layers, experts], and `greedy` [32], the tokens that follow. The weights lie on a 4-bit grid, so a packed
model and transformers' float32 one compute the same function and differ only in the order of summation.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from models import SHAPES, write_hf
from safetensors.torch import save_file
from transformers import MixtralForCausalLM

MARGIN = 1e-3       # the two best logits of a greedy step differ by more: rounding cannot change a token
NEW_TOKENS = 32


def theta_of(arguments: dict) -> float:
    """The RoPE base that the shape means, whichever way it is spelled."""
    return arguments.get("rope_parameters", arguments).get("rope_theta", 10000.0)


def check_config(name: str, arguments: dict, model) -> None:
    """transformers must have read what the shape says: it sometimes renames keys and ignores unknown ones."""
    config = model.config
    for key, value in arguments.items():
        if key not in ("seed", "dtype", "rope_theta", "rope_parameters"):
            assert getattr(config, key) == value, (
                f"{name}: transformers reads {key} as {getattr(config, key)}")
    head_dim = arguments.get("head_dim") or config.hidden_size // config.num_attention_heads
    want = 1 / theta_of(arguments) ** (torch.arange(0, head_dim, 2) / head_dim)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, want)
    assert config._attn_implementation == "eager" and model.dtype == torch.float32


@torch.inference_mode()
def reference(name: str, arguments: dict) -> dict[str, torch.Tensor]:
    """One shape's tensors, and the assertions that make them fit to compare with."""
    with tempfile.TemporaryDirectory() as directory:
        state = write_hf(Path(directory), grid=True, **arguments)
        model = MixtralForCausalLM.from_pretrained(directory, dtype=torch.float32,
                                                   attn_implementation="eager").eval()
    check_config(name, arguments, model)
    for key in ("model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(dict(model.named_parameters())[key], state[key].float()), key
    rng = np.random.RandomState(1000 + arguments["seed"])
    prompt = [1] + rng.randint(3, model.config.vocab_size, 20 + rng.randint(0, 12)).tolist()
    gates = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_pre_hook(
            lambda gate, x: gates.append(x[0].view(-1, gate.weight.shape[1]) @ gate.weight.T))
    logits = model(torch.tensor([prompt]), use_cache=False).logits[0]
    router_logits = torch.stack(gates, 1)

    tokens, margins, eos = list(prompt), [], arguments.get("eos_token_id", 2)
    for _ in range(NEW_TOKENS):             # the whole sequence each time: no cache that could be wrong
        gates.clear()
        best = model(torch.tensor([tokens]), use_cache=False).logits[0, -1].topk(2)
        margins.append((best.values[0] - best.values[1]).item())
        tokens.append(best.indices[0].item())
    greedy = tokens[len(prompt):]
    assert min(margins) > MARGIN, (
        f"{name}: a greedy step is decided by {min(margins):.1e}; choose another seed")
    assert not set(greedy) & set(eos if isinstance(eos, list) else [eos]), (
        f"{name}: EOS comes; choose another seed")
    assert len(set(greedy)) >= 12, (
        f"{name}: greedy goes round in a circle of {len(set(greedy))}; choose another seed")
    # Of prompt and answer.
    top = torch.stack(gates, 1).topk(model.config.num_experts_per_tok + 1, -1).values
    router_margin = (top[..., -2] - top[..., -1]).min().item()
    assert router_margin > MARGIN / 10, (
        f"{name}: a router nearly ties, {router_margin:.1e}; choose another seed")
    print(f"{name}: {len(prompt)} tokens, least margin {min(margins):.4f}, router's {router_margin:.5f}, "
          f"{len(set(greedy))} different tokens, logits' deviation {logits.std():.2f}")
    return {"prompt": torch.tensor(prompt), "logits": logits.contiguous(), "greedy": torch.tensor(greedy),
            "router_logits": router_logits}


if __name__ == "__main__":
    torch.set_num_threads(1)                            # as fast for such matrices
    transformers.utils.logging.disable_progress_bar()
    folder = Path(__file__).parent / "reference"
    folder.mkdir(exist_ok=True)
    for name in sys.argv[1:] or SHAPES:
        save_file(reference(name, SHAPES[name]), folder / f"{name}.safetensors",
                  {"transformers": transformers.__version__})
