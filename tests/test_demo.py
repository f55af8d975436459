"""The demo in weights/demo is what its README says: small, whole, trained, with a predictor of its own."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from duoserve import Engine
from duoserve.bench import Costs, belady, row
from duoserve.policies import POLICIES
from duoserve.trace import read_traces

DEMO = Path(__file__).resolve().parents[1] / "weights" / "demo"
# The opening of Oscar Wilde's "The Happy Prince" (1888); none of his books was trained on.
UNSEEN = ("High above the city, on a tall column, stood the statue of the Happy Prince. He was gilded all over with "
          "thin leaves of fine gold, for eyes he had two bright sapphires, and a large red ruby glowed on his "
          "sword-hilt. He was very much admired indeed.")


@pytest.fixture(scope="module")
def engine():
    return Engine.from_pretrained(DEMO)


def test_size():
    files = [path for path in DEMO.iterdir() if path.suffix != ".svg"]
    assert sum(path.stat().st_size for path in files) <= 25e6 and max(path.stat().st_size for path in files) <= 15e6


def test_it_has_a_predictor_of_its_own(engine):
    assert engine.predictor is not None and engine.predictor.model == engine.packed.fingerprint


def test_it_has_learned_to_read(engine):
    ids = engine.tokenizer.encode(UNSEEN)
    nll = F.cross_entropy(engine.logits(ids)[:-1], torch.tensor(ids[1:]), reduction="sum").item()
    assert nll / math.log(2) / len(UNSEEN.encode()) < 1.9


def test_it_writes_the_same_whatever_the_policy(engine):
    texts = set()
    for engine.policy in POLICIES:
        texts.add(engine.generate("Once upon a time", max_new_tokens=24).text)
    engine.policy = "duo"
    assert len(texts) == 1 and len(texts.pop().split()) > 8


@pytest.mark.parametrize("transfer_ms, near", ((3.7, 1.05), (1.7, 1.08)))
def test_what_the_readme_says_of_the_schedule(engine, transfer_ms, near):
    """On recorded routing of prompts by authors the demo never saw, at Mixtral-8x7B's costs."""
    traces = read_traces(Path(__file__).with_name("traces"), engine.packed.fingerprint)[::3]
    costs = Costs(0.3, 0.15, transfer_ms, 12, 0.0, None, None)
    for slots, over_on_demand, over_belady in ((5, 1.1, 1.45), (12, 1.35, 1.45), (24, 2.0, 1.75), (29, 2.0, 1.75)):
        rows = {policy: row(traces, 2, policy, slots, costs, engine.predictor) for policy in POLICIES}
        duo, ideal = rows.pop("duo"), belady(traces, 2, slots)
        assert duo["tpot_ms"] < min(r["tpot_ms"] for r in rows.values())
        assert rows["on-demand"]["tpot_ms"] > over_on_demand * duo["tpot_ms"]
        assert duo["tpot_ms"] < near * duo["floor_ms"]
        assert duo["needed_transfers_per_token"] < over_belady * ideal
        assert duo["moved_transfers_per_token"] < 1.25 * duo["needed_transfers_per_token"]
        assert duo["ttft_ms"] < 1.05 * 48 * transfer_ms
