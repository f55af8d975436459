"""`bench gpu` at a size that runs anywhere: its rows are true, and what cannot be measured is refused."""

import gc
import json
import weakref
from types import SimpleNamespace

import pytest
import torch

from duoserve.bench import __main__ as bench, gpu as bench_gpu, madeup, parts
from duoserve.bench.flags import SHAPES
from duoserve.bench.replay import synthetic_traces
from duoserve.errors import UserError
from duoserve.policies import POLICIES

TINY = ("--shape", "tiny", "--device", "cpu", "--prompts", "16", "64", "--new-tokens", "6",
        "--rounds", "1", "--simulate-link", "1GB/s", "--json")


@pytest.fixture
def gpu(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["bench", "gpu", *map(str, arguments)])
        bench.main()
        return json.loads(capsys.readouterr().out)
    return run


def test_every_policy_at_two_sizes_and_then_all_resident(gpu, hasty, tmp_path):
    result = gpu(*TINY, "--gpu-memory", "160%", "140%", "--append", tmp_path / "rows.jsonl")
    first, *rows, resident = result["rows"]
    assert first["link_GB_s"] == 1.0
    host = [r for r in rows if r["policy"] == "host"]               # microseconds of its parts, once a size
    assert len(host) == 2 and all(r["plan_us"] > 0 and r["enqueue_layers_us"] > 0 for r in host)
    rows = [r for r in rows if r not in host]
    assert [r["policy"] for r in rows] == [*POLICIES] * 2 and resident["policy"] == "resident"
    assert rows[0]["cache_experts"] < rows[-1]["cache_experts"] < resident["cache_experts"] == 48
    for r in rows:
        assert r["hits"] + r["prefetched_used"] + r["misses"] == 5 * 6 * 2          # steps x layers x top_k
        assert r["needed_per_token"] == (r["prefetched_used"] + r["misses"]) / 5
        assert 40 < r["prefill_experts"]["64"] + r["cache_experts"] <= 48       # (the slots were full)
        assert r["tpot_floor_ms"] > 0 and r["ttft_ms"]["16"] > 0
    assert resident["needed_per_token"] == 0
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert [json.loads(line).get("policy") for line in lines] == [r.get("policy") for r in result["rows"]]


def test_one_engine_at_a_time_and_the_first_policy_also_without_its_host(gpu, monkeypatch):
    build, built = bench_gpu.build, []

    def alone(*arguments, **options):
        gc.collect()
        assert not any(engine() for engine in built)
        built.append(weakref.ref(engine := build(*arguments, **options)))
        return engine
    monkeypatch.setattr(bench_gpu, "build", alone)
    rows = gpu(*TINY[:5], *TINY[6:], "--gpu-memory", "160%", "140%", "--policies", "duo", "--rounds", "2",
               "--no-predictor", "--host-threads", "1", "--simulate-link", "20MB/s", "--simulate-host",
               "20MB/s")["rows"]
    assert len(built) == 3
    assert [r.get("policy") for r in rows] == [None, *[*["duo", "duo alone"] * 2, "host"] * 2, "resident"]
    assert all((r["host_ms"] > 0) == (r["policy"] == "duo") for r in rows if "round" in r and r != rows[-1])


def test_a_policy_that_computes_something_else_is_found_out(gpu, monkeypatch):
    engine = bench_gpu.build

    def broken(*arguments, **options):
        built = engine(*arguments, **options)
        ready = built.source.ready

        def disturbed(layer, routing):
            for item in ready(layer, routing):
                yield item
            if built.policy == "lru" and built.source.decoding:
                built.step.weights.mul_(-9)
        built.source.ready = disturbed
        return built
    monkeypatch.setattr(bench_gpu, "build", broken)
    with pytest.raises(UserError, match="different tokens|not finite"):
        gpu(*TINY, "--gpu-memory", "160%", "--policies", "duo", "lru", "--no-resident", "--no-predictor")


def test_synthetic_routing_is_as_persistent_as_it_is_told(gpu):
    config = SHAPES["tiny"]
    for persistence, recall in ((0.36, 0.8), (0.7, 0.5)):
        trace, = synthetic_traces(config, persistence, recall, 1, 2, 1500)
        top, ahead = torch.from_numpy(trace.top(2).copy()), torch.from_numpy(trace.lookahead).topk(2).indices
        again = (top[1:, :, :, None] == top[:-1, :, None]).any(-1).float().mean()
        right = (top[:, :, :, None] == ahead[:, :, None]).any(-1).float().mean()
        assert abs(again - persistence) < 0.02 and abs(right - recall) < 0.02


@pytest.mark.parametrize("arguments, words", [
    (("--shape", "mixtral-7x8b"), "mixtral-8x22b"),
    (("--shape", "mixtral-8x7b", "--device", "cpu"), "--shape tiny"),
    (("--shape", "tiny", "--device", "cpu", "--policies", "best"), "--policies best"),
    (("--shape", "tiny", "--device", "cpu", "--persistence", "2"), "from 0 to 1"),
    (("--shape", "tiny", "--device", "cpu", "--gpu-memory", "1%"), "least that works")])
def test_mistakes(gpu, arguments, words):
    with pytest.raises(UserError, match=words):
        gpu(*arguments)


def test_the_host_beside_a_simulated_link():
    model = madeup.RandomModel(SHAPES["tiny"], torch.device("cpu"))
    options = SimpleNamespace(device="cpu", context=64, compile=False, simulate_link="10MB/s", host_threads=1,
                              simulate_host=None)
    engine = madeup.build(model, options, None, cache_experts=16)
    trace, = synthetic_traces(model.config, 0.5, 0.5, 1, 2, 4)
    madeup.request(engine, "duo", 8, 3, trace)
    speed = parts.host_speed(engine)
    assert speed["host_alone_ms"] > 0 and speed["host_beside_link_ms"] > 0 and speed["host_threads"] == 1
    assert speed["link_beside_GB_s"] == pytest.approx(0.01, rel=0.01)
