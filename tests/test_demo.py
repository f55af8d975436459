"""The demo in weights/demo is what its README says: small, whole, trained, with a predictor of its own."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from duoserve import Engine
from duoserve.policies import POLICIES

DEMO = Path(__file__).resolve().parents[1] / "weights" / "demo"
# The opening of Oscar Wilde's "The Happy Prince" (1888); none of his books was trained on.
UNSEEN = ("High above the city, on a tall column, stood the statue of the Happy Prince. He was gilded all over with thin "
          "leaves of fine gold, for eyes he had two bright sapphires, and a large red ruby glowed on his sword-hilt. He was "
          "very much admired indeed.")


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
