"""On a GPU: the same tokens whatever moves when, and nothing crosses the link that should not. Skipped without one."""

import pytest
import torch

from duoserve import Engine
from duoserve.engine import POLICIES
from models import packed

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
PROMPT = [1, *range(40, 70)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return packed(tmp_path_factory.mktemp("cuda"))


def engine(directory, **options):
    return Engine.from_pretrained(directory, device="cuda", **{"compile": False, "predictor": "none", **options})


def tokens(e):
    return e.generate(PROMPT, max_new_tokens=24, temperature=0.8).token_ids


def test_same_tokens_for_every_policy_and_cache_size(directory):
    runs = {(p, n): tokens(engine(directory, policy=p, cache_experts=n)) for p in POLICIES for n in (2, 5, 24)}
    assert len({tuple(run) for run in runs.values()}) == 1


def test_close_to_the_cpu(directory):
    gpu = engine(directory, dtype="float32").logits(PROMPT)
    cpu = Engine.from_pretrained(directory, device="cpu", predictor="none").logits(PROMPT)
    assert (gpu - cpu).abs().max() < 1e-3


def test_experts_are_pinned_and_released(directory):
    e = engine(directory)
    assert e.store.pinned and e.store.block(0, 0).is_pinned()
    e.store.close()
    assert not e.store.block(0, 0).is_pinned()


class Slow:
    """A lane wrapped so that one of its streams runs late: whoever does not wait reads or writes too early."""

    def __init__(self, e, copies: int = 0, computes: int = 0):
        lane = e.cache.lane
        send, wait = lane.send, lane.wait

        def slow_send(transfer, nbytes):
            with torch.cuda.stream(lane.stream):
                torch.cuda._sleep(copies)
            send(transfer, nbytes)

        def slow_wait(transfer):
            wait(transfer)
            torch.cuda._sleep(computes)     # the slot is read late, long after the host has moved on
        lane.send, lane.wait = slow_send, slow_wait


@pytest.mark.parametrize("delays", ({"copies": 2_000_000}, {"computes": 2_000_000}))
def test_both_event_waits_matter(directory, delays, monkeypatch):
    expected = tokens(engine(directory, cache_experts=3))
    slow = engine(directory, cache_experts=3)
    Slow(slow, **delays)
    assert tokens(slow) == expected
    broken = engine(directory, cache_experts=3)
    if "copies" in delays:
        monkeypatch.setattr(broken.cache.lane, "wait", lambda transfer: None)
    else:
        monkeypatch.setattr(broken.cache.lane, "used", lambda slot: None)
    Slow(broken, **delays)
    try:
        wrong = tokens(broken)
    except Exception:
        wrong = None                        # non-finite probabilities are as good a sign
    assert wrong != expected


def test_one_read_a_layer_and_nothing_else(directory):
    e = engine(directory)
    e.generate(PROMPT, max_new_tokens=2)
    token = torch.tensor([5], device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        e._pass(token, len(PROMPT) + 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_no_allocation_growth(directory):
    e = engine(directory, context=256)
    e.generate(PROMPT, max_new_tokens=20)
    before = torch.cuda.memory_reserved()
    e.generate(PROMPT, max_new_tokens=200)
    assert torch.cuda.memory_reserved() == before


def test_registration_that_fails_goes_on_through_a_staging_ring(directory, monkeypatch, capsys):
    expected = tokens(engine(directory))
    runtime = torch.cuda.cudart()

    class Refusing:
        def __getattr__(self, name):
            return (lambda *a: 1) if name == "cudaHostRegister" else getattr(runtime, name)
    monkeypatch.setattr(torch.cuda, "cudart", Refusing)
    e = engine(directory)
    assert not e.store.pinned and "pinned buffer" in capsys.readouterr().err
    assert tokens(e) == expected


@pytest.mark.parametrize("policy", ("duo", "layer-prefetch", "cache"))
def test_experts_on_the_disk_change_nothing(directory, policy):
    """Half in pinned memory and copied directly, half read into the staging ring; then all of them read."""
    expected = tokens(engine(directory, policy=policy))
    for kept in ("50%", "1B"):
        e = engine(directory, policy=policy, cache_experts=4, host_memory=kept)
        assert e.store.crc and e.store.pinned == (kept == "50%")
        assert tokens(e) == expected
