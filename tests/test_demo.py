"""The demo in weights/demo is what its README says: small, whole, trained, with a predictor of its own.

And the fast training on a GPU computes what plain training would.
"""

import math
import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from duoserve import Engine
from duoserve.bench.replay import Costs, belady, row
from duoserve.config import MixtralConfig
from duoserve.policies import POLICIES
from duoserve.trace import read_traces

DEMO = Path(__file__).resolve().parents[1] / "weights" / "demo"
# The opening of Oscar Wilde's "The Happy Prince" (1888); none of his books was trained on.
UNSEEN = ("High above the city, on a tall column, stood the statue of the Happy Prince. He was gilded all "
          "over with thin leaves of fine gold, for eyes he had two bright sapphires, and a large red ruby "
          "glowed on his sword-hilt. He was very much admired indeed.")


@pytest.fixture(scope="module")
def engine():
    return Engine.from_pretrained(DEMO)


def test_size():
    files = [path for path in DEMO.iterdir() if path.suffix != ".svg"]
    assert sum(path.stat().st_size for path in files) <= 25e6
    assert max(path.stat().st_size for path in files) <= 15e6


def test_it_has_a_predictor_of_its_own(engine):
    assert engine.predictor is not None and engine.predictor.model == engine.packed.fingerprint


def test_it_has_learned_to_read(engine):
    ids = engine.tokenizer.encode(UNSEEN)
    nll = F.cross_entropy(engine.logits(ids)[:-1], torch.tensor(ids[1:]), reduction="sum").item()
    assert nll / math.log(2) / len(UNSEEN.encode()) < 1.6


def test_it_writes_the_same_whatever_the_policy(engine):
    texts = set()
    for engine.policy in POLICIES:
        texts.add(engine.generate("Once upon a time", max_new_tokens=8).text)
    engine.policy = "duo"
    assert len(texts) == 1 and len(texts.pop().split()) > 3


@pytest.mark.parametrize("transfer_ms, near, sizes", ((3.7, 1.05, (9, 22, 44, 53)), (1.7, 1.08, (9, 53))))
def test_what_the_readme_says_of_the_schedule(engine, transfer_ms, near, sizes):
    """On the recorded routing of a prompt by an author the demo never saw, at Mixtral-8x7B's costs."""
    traces = read_traces(Path(__file__).with_name("traces"), engine.packed.fingerprint)[:1]
    costs = Costs(0.3, 0.15, transfer_ms, 12, 0.0, None, None)
    bounds = {9: (1.1, 1.45), 22: (1.35, 1.45), 44: (2.0, 1.75), 53: (2.0, 1.75)}
    for slots in sizes:
        over_on_demand, over_belady = bounds[slots]
        rows = {policy: row(traces, 2, policy, slots, costs, engine.predictor) for policy in POLICIES}
        duo, ideal = rows.pop("duo"), belady(traces, 2, slots)
        assert duo["tpot_ms"] < min(r["tpot_ms"] for r in rows.values())
        assert rows["on-demand"]["tpot_ms"] > over_on_demand * duo["tpot_ms"]
        assert duo["tpot_ms"] < near * duo["floor_ms"]
        assert duo["needed_transfers_per_token"] < over_belady * ideal
        assert duo["moved_transfers_per_token"] < 1.25 * duo["needed_transfers_per_token"]
        assert duo["ttft_ms"] < 1.05 * 88 * transfer_ms


@pytest.fixture(scope="module")
def make_demo():
    pytest.importorskip("sentencepiece")
    return runpy.run_path(str(DEMO.with_name("make_demo.py")))


@pytest.fixture
def trainee(make_demo):
    torch.manual_seed(0)
    config = MixtralConfig(vocab_size=64, hidden_size=32, intermediate_size=24, num_hidden_layers=2,
                           num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    modules = make_demo["Trainee"](config), make_demo["DenseExperts"](config)
    for module in modules:
        make_demo["init_weights"](module, 2)
    return modules


def test_training_all_experts_at_once_changes_nothing(trainee):
    model, source = trainee
    tokens, answers = torch.randint(64, (2, 24)), []
    for model.dense in (False, True):
        logits = model.head(model(tokens, source))
        loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten()) + source.balance
        answers.append((logits.detach(),
                        *torch.autograd.grad(loss, [*model.parameters(), *source.parameters()])))
    for one, other in zip(*answers, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_share_of_the_tokens_is_hidden_in_training(make_demo, trainee):
    model, source = trainee
    named, shown = [(name, p) for module in trainee for name, p in module.named_parameters()], []
    optimizer = make_demo["Optimizer"](named, muon_lr=0, lr=0, weight_decay=0, outer_decay=0)
    trainer = make_demo["Trainer"](model, source, optimizer, torch.randint(1, 64, (4096,)).numpy(), 1024)
    model.embed.register_forward_pre_hook(lambda module, arguments: shown.append(arguments[0]))
    for share in (0, 0.25, 1):
        trainer.advance(128, 1.0, share)
        assert (shown.pop() == 0).float().mean() == pytest.approx(share, abs=0.06)


@pytest.mark.parametrize("dense", (False, True))
def test_dropout_is_of_training_alone(make_demo, trainee, dense):
    model, source = make_demo["Trainee"](trainee[0].config, dropout=0.5), trainee[1]
    model.load_state_dict(trainee[0].state_dict())
    trainee[0].dense = model.dense = dense
    tokens = torch.randint(64, (2, 24))
    with torch.no_grad():
        assert torch.equal(model(tokens, source), trainee[0](tokens, source))
    assert not torch.allclose(model(tokens, source), model(tokens, source))


def test_the_optimizer_is_muon_and_adamw(make_demo, trainee):
    named = [(name, p) for module in trainee for name, p in module.named_parameters()]
    ours = make_demo["Optimizer"](named, muon_lr=3e-3, lr=1e-3, weight_decay=0.1, outer_decay=20.0)
    ours.rate.fill_(0.5)
    copies = [p.detach().clone() for _, p in named]
    hidden = [p.dim() > 1 and not any(k in n for k in ("embed", "head", "router")) for n, p in named]
    matrices = [[m for m in c.view(-1, *c.shape[-2:])] if h else [] for c, h in zip(copies, hidden)]
    muon = torch.optim.Muon(sum(matrices, []), lr=1.5e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    outer = [any(k in name for k in ("embed", "head")) for name, _ in named]
    rest = [[c for c, *kind in zip(copies, hidden, outer) if kind == [False, o]] for o in (False, True)]
    adamw = torch.optim.AdamW([{"params": part, "weight_decay": decay}
                               for part, decay in zip(rest, (0.01, 20.0))], lr=5e-4, betas=(0.9, 0.95))
    for _ in range(3):
        grads = {p: torch.randn_like(p) for _, p in named}
        ours.step([grads[p] for p in ours.params])
        for (_, p), copy, parts in zip(named, copies, matrices):
            for part, grad in zip(parts or [copy], grads[p].view(-1, *p.shape[-2:]) if parts else [grads[p]]):
                part.grad = grad.clone()
        torch.nn.utils.clip_grad_norm_(sum(matrices + rest, []), 1.0)
        muon.step(), adamw.step()
    for (_, p), copy, is_matrix in zip(named, copies, hidden):
        # PyTorch's Muon computes in bf16.
        torch.testing.assert_close(p.detach(), copy, rtol=0, atol=2e-4 if is_matrix else 1e-6)
