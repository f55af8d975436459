"""Missing experts computed on the host: the same bits whoever computes them, the split by the clock, and
faults."""

import gc
import itertools
import random
import re
import signal
import sys
import threading
import time
import weakref
from dataclasses import replace

import pytest
import torch
import torch._inductor
from models import answers, at_rest, by_table, load, same, SAMPLED, SHORT

import generate
from duoserve import engine as engine_module, loading
from duoserve.bench.replay import Costs, Replay, step_floor, synthetic_traces
from duoserve.cache import BLOCKS, HOST, LAUNCHED, WHOLE, GPUExpertCache
from duoserve.config import MixtralConfig
from duoserve.errors import UserError
from duoserve.history import History, Routing
from duoserve.host import FORGET, HOST_THREAD, Host, HostError, Job
from duoserve.hostcode import compiled_graph, run_rows
from duoserve.link import LinkError
from duoserve.options import EngineOptions
from duoserve.predictor import Forecast
from duoserve.quant import compiled
from duoserve.sampling import sample
from duoserve.scheduler import DecodeScheduler, ExpertScheduler
from duoserve.simulated import SimulatedHost, SimulatedLane, VirtualClock

SLOW = dict(simulate_link=8e6, simulate_host=8e6)                   # an expert takes about a millisecond
SPLIT = ExpertScheduler.for_host
ONE = Routing([1] + [0] * 7, [0], [1.0], [0.0] * 8, None)           # one token, which goes to expert 0


def anywhere(seed):
    """Any needed expert goes anywhere, also one that is there; or link and host divide it anyhow."""
    rng = random.Random(seed)

    def for_host(self, keys):
        some = {key: WHOLE for key in keys if self.cache.host.has(key) and rng.random() < 0.7}
        return some | {key: rng.randint(1, WHOLE) for key in list(some)[:1]}
    return for_host


def all_of_the_last_layer(self, keys):
    return dict.fromkeys(keys, WHOLE) if self.layer == 2 else {}


# The same bits


@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "float16"))
def test_the_same_bits_wherever_an_expert_is_computed(dtype, tiny, monkeypatch):
    want = answers(load(tiny, dtype=dtype, cache_experts=24))
    for seed, (policy, slots, split) in enumerate(itertools.product(
            ("duo", "cache", "on-demand"), (2, 9), (SPLIT, anywhere))):
        monkeypatch.setattr(ExpertScheduler, "for_host", split if split is SPLIT else split(seed))
        engine = load(tiny, dtype=dtype, policy=policy, cache_experts=slots, simulate_link=2e7,
                      simulate_host=2e7)
        assert same(answers(engine), want), (policy, slots, seed)
        assert engine.cache.counts.split or split is SPLIT


def test_the_same_bits_where_the_device_runs_ahead(tiny, monkeypatch):
    """By the table; only what it has not launched may be computed elsewhere."""
    want = answers(load(tiny, dtype="bfloat16", cache_experts=24))
    monkeypatch.setattr(ExpertScheduler, "for_host", anywhere(1))
    engine = load(tiny, dtype="bfloat16", cache_experts=12, **SLOW)
    by_table(engine)
    for engine.source.slots.always in (None, 2):                    # (2: as of a small model on a GPU)
        assert same(answers(engine), want)
        assert engine.cache.counts.host_experts + engine.cache.counts.split


def test_a_host_of_threads_without_a_simulated_link(tiny, monkeypatch):
    monkeypatch.setattr(ExpertScheduler, "for_host", anywhere(2))
    engine = load(tiny, cache_experts=4, host_threads=1)
    assert same(answers(engine), answers(load(tiny, cache_experts=24)))
    stats = engine.result.stats
    assert stats.host_experts > 0 and 0 < stats.host_busy_fraction <= 1


def test_what_lies_on_the_disk_goes_over_the_link(tiny, monkeypatch):
    monkeypatch.setattr(DecodeScheduler, "for_host",
                        lambda self, keys: {key: WHOLE for key in keys if self.cache.host.has(key)})
    engine = load(tiny, cache_experts=3, host_memory="30%", **SLOW)
    assert same(answers(engine), answers(load(tiny, cache_experts=24)))
    assert engine.result.stats.host_experts and engine.result.stats.misses


def test_every_access_is_counted_once(tiny):
    engine = load(tiny, cache_experts=3, **SLOW)
    stats = engine.generate(SHORT, max_new_tokens=6).stats
    assert stats.hits + stats.prefetched_used + stats.misses + stats.host_experts == 5 * 3 * 2
    assert stats.host_experts > 0


def test_the_warm_up_is_given_what_a_decode_gives(tiny, monkeypatch):
    """A tensor of inference or not is a difference to compiled code: it would be compiled anew, in decode."""
    given, on_threads, submit = [], loading.on_threads, Host.submit

    def warm(compute, keys, x, *more):
        given.append(x)
        return on_threads(compute, keys, x, *more)

    def submitted(self, experts):
        submit(self, experts)
        given.extend(job.x for job in self.jobs.values())
    monkeypatch.setattr(loading, "on_threads", warm)
    monkeypatch.setattr(Host, "submit", submitted)
    load(tiny, cache_experts=3, **SLOW).generate(SHORT, max_new_tokens=3)
    assert len(given) > 1
    assert len({(x.is_inference(), x.dtype, x.shape, x.stride(), x.device) for x in given}) == 1


# Who computes what


def scheduler(transfer=4.0, host=3.0, there=(), policy=DecodeScheduler, block=0):
    """A policy with room for six experts, some of layer 0's being `there`; an expert is eight chunks."""
    clock = VirtualClock()
    lane = SimulatedLane(clock, 8 / transfer, 1)
    cache = GPUExpertCache(6, 8, lane)
    made = policy(cache, History(2, 8), Forecast(History(2, 8), None, 2), 4)
    cache.serve(made, SimulatedHost(clock, host, block))
    for e in there:
        cache.demand((0, e))
    lane.finish()
    return made, cache, clock


def split(n, **options):
    made, cache, _ = scheduler(**options)
    return [e for _, e in made.for_host([(0, e) for e in range(n)])]


def test_the_split_is_the_one_that_is_soonest_done():
    assert split(2, policy=ExpertScheduler) == [1]                  # one each: 4 and 3, not 6 or 8
    assert split(2) == [0, 1]               # to us the link's time is worth something: 6, not 4 + 0.6 x 4
    assert split(2, there=(0,)) == [1] and split(2, there=(0, 1)) == []
    assert split(2, host=1.0) == [0, 1] and split(2, host=99.0) == []
    assert split(1, host=5.0) == [0] and split(1, host=5.0, policy=ExpertScheduler) == []
    assert split(2, transfer=2e-4, host=1e-5) == []                 # over before anybody has thought


def test_an_expert_is_divided_so_that_both_are_done_at_once():
    """A block is an eighth of the bytes, and half a second of the link; a sixth of the host's time."""
    def division(n, **options):
        made, _, _ = scheduler(**{"block": 1, "policy": ExpertScheduler} | options)
        return {e: blocks for (_, e), blocks in made.for_host([(0, e) for e in range(n)]).items()}
    assert division(1, host=4.8) == {0: 3}                          # 2.5 and 2.4, not 4 or 4.8
    assert division(1, host=9.0) == {0: 2}                          # 3 and 3
    assert division(1, host=1.0) == {0: WHOLE}
    assert division(1, host=99.0) == {}
    assert division(3, host=4.0) == {1: 3, 2: WHOLE}                # 6.5 and 6, not 8 and 4
    assert division(2, host=4.0) == {1: WHOLE}                      # one each
    assert division(2, host=4.0, there=(0,)) == {1: 3}              # 2.5 and 2
    assert division(1, host=6.2, policy=DecodeScheduler) == {0: 3}  # (2, if the link had nothing else to do)
    assert division(1, host=6.2) == {0: 2}
    assert division(1, host=4.8, block=0) == {}


def test_the_rest_of_a_divided_expert_follows_when_the_link_has_nothing_better_to_do():
    made, cache, clock = scheduler(host=4.8, policy=ExpertScheduler, block=1)
    (_, place), = made.experts(0, ONE)
    slot = cache.slots[place]
    assert clock.now() == 2.5 and slot.transfer.sent == 5 and not cache.resident((0, 0))
    assert cache.launch(0, 8) == [LAUNCHED] * 8 and not cache.launched
    clock.wait_until(10.0)
    assert cache.resident((0, 0)) and slot.transfer.loaded == pytest.approx(4.0)
    assert cache.launch(0, 8)[0] == place
    cache.launched.clear()
    list(made.experts(0, ONE))
    assert (cache.counts.misses, cache.counts.hits, cache.counts.split) == (1, 1, 1)


def test_the_rest_of_a_divided_expert_that_is_needed_again_is_a_miss():
    made, cache, clock = scheduler(host=4.8, policy=ExpertScheduler, block=1)
    list(made.experts(0, ONE))
    cache.host = None
    (_, place), = made.experts(0, ONE)
    assert cache.slots[place].transfer.skip == 0 and clock.now() == pytest.approx(4.0)
    assert (cache.counts.misses, cache.counts.hits, cache.counts.split) == (2, 0, 1)


def test_the_rest_of_a_divided_expert_gives_way():
    """To a guess that needs its slot, and to a plan that is worth more."""
    made, cache, clock = scheduler(host=4.8, policy=ExpertScheduler, block=1)
    list(made.experts(0, ONE))
    for e in range(1, 6):
        cache.demand((0, e))
        cache.slot_of[(0, e)].pinned = True
    cache.plan([(1, 0), (0, 0)])
    clock.wait_until(99.0)
    assert cache.resident((1, 0)) and (0, 0) not in cache.slot_of
    assert cache.counts.bytes_moved < 6 * 8 + 8                     # (else it would have been whole first)


def test_a_guess_that_is_partly_sent_is_divided_too():
    """Only what is missing of it counts; and where the host does all of that, nothing more is sent."""
    for sent, left in ((5, 3), (7, 1)):
        made, cache, clock = scheduler(host=1.2, policy=ExpertScheduler, block=1, there=(1,))
        cache.plan([(0, 0)])
        clock.wait_until(4 + (sent - 2) / 2)                        # (two chunks are in flight, for a second)
        assert cache.slot_of[(0, 0)].transfer.sent == sent
        assert made.for_host([(0, 0)]) == {(0, 0): left}            # 1 and 0.6; the whole would take it 1.2
        assert [e for e, _ in made.experts(0, ONE)] == [0]
        assert cache.counts.bytes_moved == 8 + sent and cache.slot_of[(0, 0)].transfer.order == 2
        assert len(cache.slot_of[(0, 0)].transfer.spans) == sent
        cache.host = None
        list(made.experts(0, ONE))
        assert (cache.counts.prefetched_used, cache.counts.misses, cache.counts.hits) == (1, 1, 0)


def test_a_guess_that_fails_when_it_is_divided_is_sent_again_without_what_the_host_does(monkeypatch):
    made, cache, clock = scheduler(host=4.8, policy=ExpertScheduler, block=1)
    cache.plan([(0, 0)])
    send, calls = cache.lane.send, itertools.count()

    def fails_once(*arguments):
        if not next(calls):
            raise LinkError("no")
        send(*arguments)
    monkeypatch.setattr(cache.lane, "send", fails_once)
    assert cache.demand((0, 0), 3) and cache.slot_of[(0, 0)].transfer.sent == 8 - 3


def test_a_plan_does_not_ask_again_for_what_is_being_divided():
    made, cache, clock = scheduler(host=4.8, policy=ExpertScheduler, block=1)
    made.plan_prefetch = lambda layer, routing: cache.plan([(0, 0), (1, 1)])
    list(made.experts(0, ONE))
    clock.wait_until(99.0)
    assert cache.resident((0, 0)) and cache.resident((1, 1)) and not any(slot.pinned for slot in cache.slots)
    assert sorted(slot.key for slot in cache.slots if slot.key) == [(0, 0), (1, 1)]


def test_what_is_worth_it_is_completed_though_no_slot_is_empty():
    made, cache, clock = scheduler(host=4.8, block=1, there=range(1, 6))
    favoured = replace(ONE, logits=[9.0] + [0.0] * 7)
    for _ in range(3):
        made.history.observe(0, favoured)
    list(made.experts(0, favoured))
    rest = cache.slot_of[(0, 0)].transfer
    assert rest.used and 0 < rest.missing and len(cache.slot_of) == 6
    made.replan()
    assert rest in cache.queue
    clock.wait_until(99.0)
    assert cache.resident((0, 0))


def test_a_block_is_a_quarter_of_the_first_matrix(tiny):
    engine = load(tiny, cache_experts=3, **SLOW)
    offset, _, (rows, columns) = engine.packed.layout.fields["w13.q"]
    assert offset == 0 and engine.host.block * BLOCKS == rows * columns


def test_no_compiled_code_is_called_while_a_thread_traces(monkeypatch):
    """It would refuse; a request may come while the host's code is being compiled for the first time."""
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, *rest, **options: graph)
    call, example = compiled(torch.neg), [torch.zeros(1, 64, dtype=torch.bfloat16)]
    example += [torch.zeros(64, 8, dtype=torch.int32), torch.zeros(64, 2).half(), torch.zeros(64, 2).half()]
    thread = threading.Thread(target=lambda: [compiled_graph(run_rows, *example, torch.zeros(64))
                                              for _ in range(2)])
    call(torch.ones(4))
    thread.start()
    while thread.is_alive():
        assert call(torch.ones(4)).sum() == -4


def test_no_policy_divides_two_experts_at_once(tiny, monkeypatch):
    """There is one place for what the host gives of it."""
    monkeypatch.setattr(ExpertScheduler, "for_host", lambda self, keys: dict.fromkeys(keys, 1))
    engine = load(tiny, cache_experts=3, **SLOW)
    with pytest.raises(UserError, match="policy DecodeScheduler: its `for_host` divides more than one"):
        engine.generate(SHORT, **SAMPLED)


def test_what_the_link_and_the_host_have_to_do_already_counts():
    made, cache, clock = scheduler()
    for e in (4, 5):
        cache.demand((0, e))                                        # the link is busy for 8 s
    assert made.for_host([(0, 0), (0, 1)]) == {(0, 0): WHOLE, (0, 1): WHOLE}
    clock.wait_until(clock.now() + 8)
    cache.host.submit({(0, 6): WHOLE, (0, 7): WHOLE})               # now the host is, for 6
    assert made.for_host([(0, 0)]) == {}


def test_a_guess_that_is_nearly_there_goes_on_and_another_is_dropped():
    for moved, expected in ((7, []), (1, [0])):
        made, cache, clock = scheduler(host=2.0, policy=ExpertScheduler)
        cache.plan([(0, 0)])
        clock.wait_until(clock.now() + moved * 0.5 - 0.25)
        assert [e for _, e in made.for_host([(0, 0)])] == expected
        for e, place in made.experts(0, ONE):
            assert (place == HOST) == bool(expected)
        assert cache.counts.host_experts == len(expected)
        assert ((0, 0) in cache.slot_of) == (not expected) and not cache.needed
        assert (cache.counts.wasted > 0) == bool(expected)


def test_what_the_device_can_start_on_comes_before_what_the_host_computes():
    made, cache, clock = scheduler(there=(2,), policy=ExpertScheduler)
    began = clock.now()
    order = [(e, place == HOST) for e, place in
             made.experts(0, Routing([1, 1, 1] + [0] * 5, [0, 1, 2], [1.0] * 3, [0.0] * 8, None))]
    assert [e for e, _ in order] == [2, 0, 1] and [host for _, host in order] == [False, False, True]
    assert clock.now() - began == pytest.approx(4.0)                # both at once


# The replay


@pytest.fixture(scope="module")
def trace():
    return synthetic_traces(MixtralConfig(num_hidden_layers=4), 0.36, 0.8, 1, 20, 16)[0]


def replay(trace, policy="duo", **costs):
    return Replay(trace, 2, policy, 9, Costs(predict_ms=0.0, **costs), None, "warm").run()


def test_a_host_that_is_far_too_slow_changes_nothing(trace):
    alone, slow = replay(trace), replay(trace, host_expert_ms=1000.0)
    assert slow.decode_s == pytest.approx(alone.decode_s, rel=0.01) and not slow.cache.counts.host_experts


def test_link_and_host_together_are_faster_than_either(trace):
    both, link, host = (replay(trace, host_expert_ms=2.0), replay(trace),
                        replay(trace, "host-only", host_expert_ms=2.0))
    assert both.decode_s < 0.75 * link.decode_s and both.decode_s < 0.97 * host.decode_s
    counts = host.cache.counts
    assert counts.misses == 0 and counts.host_experts > both.cache.counts.host_experts > 0
    for run in (both, host):
        c = run.cache.counts
        assert c.hits + c.prefetched_used + c.misses + c.host_experts == run.steps * 4 * 2
        assert run.floor / 1e3 <= run.decode_s


def test_the_floor_is_the_best_division_of_what_was_missing():
    costs = Costs(0.3, 0.1, 4.0, host_expert_ms=2.0)
    assert step_floor(costs, 4, 2, 3, 3) == 8.0                     # two over the link, four on the host
    assert step_floor(costs, 4, 2, 0, 0) == pytest.approx(4 * 0.3 + 8 * 0.1)


# Interruptions and faults


def test_ctrl_c_while_the_host_computes_leaves_no_trace(tiny, monkeypatch):
    engine = load(tiny, cache_experts=3, **SLOW)
    want = answers(engine)
    wait, calls = SimulatedHost.wait, itertools.count()

    def interrupted(self, key):
        if next(calls) == 4:
            raise KeyboardInterrupt
        wait(self, key)
    monkeypatch.setattr(SimulatedHost, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(SHORT, **SAMPLED)
    assert at_rest(engine.cache) and not engine.host.worker.jobs and not engine.host.due
    assert same(answers(engine), want)


def test_an_answer_of_a_request_that_was_interrupted_is_never_used(tiny, monkeypatch):
    """The thread is still at it when the next request asks for the same experts."""
    monkeypatch.setattr(ExpertScheduler, "for_host", anywhere(3))
    engine = load(tiny, cache_experts=3, **SLOW)
    want, worker = answers(engine), engine.host.worker
    wait, calls = Host.wait, itertools.count()

    def interrupted(self, key):
        if next(calls) == 2:
            while self.done[0] < self.number:
                time.sleep(1e-4)
            x = torch.full_like(self.x, torch.nan)
            self.queue.put(Job(self.number, key, WHOLE, x, self.answers[key], self.now()))
            raise KeyboardInterrupt         # as if it was computed only now, into the same row
        wait(self, key)
    monkeypatch.setattr(Host, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(SHORT, **SAMPLED)
    assert same(answers(engine), want) and not worker.jobs


def test_ctrl_c_at_any_moment_of_a_wait_leaves_the_thread_at_work():
    def compute(key, blocks, x, out):
        time.sleep(6e-4)
    host, rng = a_host(compute, {"each": 1e-3, "threads": 1}), random.Random(5)
    before, interrupted = signal.signal(signal.SIGALRM, signal.default_int_handler), 0
    try:
        for _ in range(600):
            host.take(torch.ones(1, 4))
            host.submit({(0, 0): WHOLE})
            job = host.jobs[(0, 0)]
            try:
                try:
                    signal.setitimer(signal.ITIMER_REAL, rng.uniform(5e-5, 7e-4))
                    host.wait((0, 0))
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                interrupted += 1
            host.abandon()
            until = time.monotonic() + 5
            while not job.ended and time.monotonic() < until:
                time.sleep(1e-4)
            assert job.ended, interrupted
    finally:
        signal.signal(signal.SIGALRM, before)
    assert interrupted > 100


def test_a_host_that_fails_ends_the_request_and_not_the_engine(tiny, monkeypatch):
    monkeypatch.setattr(ExpertScheduler, "for_host", anywhere(4))
    engine = load(tiny, cache_experts=3, **SLOW)
    want, submit = answers(engine), Host.submit

    def broken(self, keys):
        self.x = self.x[1:]                 # of the wrong width
        submit(self, keys)
    with monkeypatch.context() as patch:
        patch.setattr(Host, "submit", broken)
        with pytest.raises(UserError, match="host could not compute.*--host-threads 0"):
            engine.generate(SHORT, **SAMPLED)
    assert at_rest(engine.cache) and same(answers(engine), want)


def a_host(compute, costs):
    host = Host(4, torch.float32, False, {(0, 0)}, lambda: (compute, lambda: costs), 0, torch.zeros(16))
    assert host.ready.wait(10)
    return host


def adding(key, blocks, x, out):
    time.sleep(0.02)
    out.copy_(x[0] + 1)


def test_a_host_that_cannot_be_prepared_is_not_used():
    def prepare():
        raise RuntimeError("no compiler")
    host = Host(4, torch.float32, False, {(0, 0)}, prepare, 0, torch.zeros(16))
    assert host.compiled.wait(10) and host.ready.wait(10) and host.trouble() == "RuntimeError: no compiler"


def why_unused(engine) -> str:
    result = engine.generate(SHORT, max_new_tokens=2)
    assert result.stats.host_experts == 0
    return generate.closing_line(result).partition("the host computed nothing: ")[2]


def test_a_host_that_computes_nothing_is_explained(tiny, monkeypatch):
    engine = load(tiny, cache_experts=3, **SLOW)
    engine.generate(SHORT, max_new_tokens=2)
    assert engine.result.stats.host_unused is None
    state = engine.host.worker.state
    each = state.pop("each")
    assert "still being compiled" in why_unused(engine)
    state["error"] = RuntimeError("no compiler")
    assert "RuntimeError: no compiler" in why_unused(engine)
    state["each"] = each
    with monkeypatch.context() as patch:    # as where nobody asked for it
        patch.setattr(engine, "options", replace(engine.options, simulate_host=None))
        patch.setattr(engine.host, "each", 0.25)
        assert re.search(r"an expert takes 250.0 ms there, \d+.\d over the link", why_unused(engine))
    fast = load(tiny, cache_experts=3, simulate_link=1e12, simulate_host=1e12)
    fast.cache.lane.busy = 1e9              # (or the line would say that computing set the speed)
    assert fast.generate(SHORT, max_new_tokens=2).stats.host_unused.startswith("an expert crosses")


def test_a_thread_that_is_gone_is_an_error_and_no_hang():
    host = a_host(adding, {"each": 0.02, "threads": 1})
    host.queue.put(None)
    host.thread.join(5)
    host.take(torch.ones(1, 4))
    host.submit({(0, 0): WHOLE})
    with pytest.raises(HostError, match="gone"):
        host.wait((0, 0))


def test_where_the_device_can_wait_for_an_answer_we_do_not():
    """It is told for which number, and reads that when the answer lies where it copies it from."""
    host, told = a_host(adding, {"each": 0.02, "threads": 1}), []
    host.wait_for = lambda word, number: told.append(number) or True
    for n in (1, 2):
        host.take(torch.full((1, 4), float(n)))
        host.submit({(0, 0): WHOLE})
        host.wait((0, 0))
        answer = host.answer((0, 0))
        assert host.done[0] == n - 1 and (0, 0) in host.jobs
        while host.jobs:                    # (as whoever awaits the device)
            host.pause()
        assert answer.tolist() == [n + 1.0] * 4 and host.done[0] == told[-1] == n
    assert host.busy > 0.035


def test_nothing_makes_the_device_wait_in_vain():
    """A job that is dropped, one that fails, and a thread that ends."""
    def compute(key, blocks, x, out):
        time.sleep(0.005)
        raise ValueError("no")
    host = a_host(compute, {"each": 0.02, "threads": 1})
    host.wait_for = lambda word, number: True
    until = time.monotonic() + 10
    for n in (1, 2):
        host.take(torch.ones(1, 4))
        host.submit({(0, 0): WHOLE})
        host.wait((0, 0))
        if n == 1:
            host.abandon()
        while host.done[0] < n:
            assert time.monotonic() < until
    with pytest.raises(HostError, match="ValueError: no"):
        host.take(torch.ones(1, 4))
    host.abandon()
    host.queue.put(None)
    host.thread.join(5)
    assert host.done[0] > 10**9
    host.submit({(0, 0): WHOLE})
    host.wait((0, 0))
    with pytest.raises(HostError, match="gone"):
        host.collect()


def test_a_failure_that_shows_late_gives_no_wrong_token(tiny, monkeypatch):
    """Where the device waits, a token is sampled before anybody looks at what became of its last layer."""
    monkeypatch.setattr(ExpertScheduler, "for_host", all_of_the_last_layer)
    engine = load(tiny, cache_experts=3, host_threads=1)
    want, host = answers(engine), engine.host
    with monkeypatch.context() as patch:
        def waited(key):                    # as the device does; all is well so far
            while host.done[0] < host.jobs[key].number:
                time.sleep(1e-4)
            host.answers[key].fill_(7)
        patch.setattr(host, "wait", waited)
        patch.setattr(host, "submit", lambda keys: [
            Host.submit(host, keys), setattr(host.jobs[list(keys)[-1]], "error", ValueError("late"))])
        for run in (lambda: engine.generate(SHORT, **SAMPLED), lambda: engine.logits(SHORT, decode=True)):
            with pytest.raises(UserError, match="ValueError: late"):
                run()
        assert len(engine.result.token_ids) == 1 and engine.result.finish_reason == "interrupted"
    assert same(answers(engine), want)


def test_an_interruption_before_the_answers_are_collected_is_not_the_next_request_s(tiny, monkeypatch):
    """Where the device waits, the last layer's are still to be collected when the next token is sampled."""
    monkeypatch.setattr(ExpertScheduler, "for_host", all_of_the_last_layer)
    engine = load(tiny, cache_experts=3, host_threads=1)
    want, host = answers(engine), engine.host
    with monkeypatch.context() as patch:
        patch.setattr(host, "wait", lambda key: host.jobs[key].done.get(timeout=10))
        patch.setattr(host, "pause", lambda: None)
        calls = itertools.count()

        def interrupted(*arguments):
            if next(calls) == 1:
                for job in host.jobs.values():
                    job.error = ValueError("of the request before")
                raise KeyboardInterrupt
            return sample(*arguments)
        patch.setattr(engine_module, "sample", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.generate(SHORT, **SAMPLED)
    assert not host.jobs and same(answers(engine), want)


def test_a_lane_that_takes_its_time_is_not_the_host_s_cost():
    host = a_host(lambda key, blocks, x, out: time.sleep(1e-3), {"each": 0.002, "threads": 1})
    host.pump = lambda: time.sleep(0.01)
    for _ in range(10):
        host.take(torch.ones(1, 4))
        host.submit({(0, 0): WHOLE})
        host.wait((0, 0))
        host.answer((0, 0))
    assert host.seconds() < 0.0035


def test_the_thread_ends_with_an_engine_that_has_answered_without_a_collection(tiny):
    engine = load(tiny, cache_experts=3, **SLOW)
    engine.generate(SHORT, max_new_tokens=3)
    thread = engine.host.worker.thread
    gc.disable()
    try:
        del engine
        thread.join(5)
        assert not thread.is_alive()
    finally:
        gc.enable()


def test_a_host_that_is_much_slower_than_the_link_has_to_be_asked_for(tiny, monkeypatch):
    for slower, asked, used in ((2.4, False, True), (2.6, False, False), (2.6, True, True)):
        engine = load(tiny, cache_experts=7, **SLOW)
        engine.host.each = slower * engine.cache.transfer_s()
        if not asked:
            monkeypatch.setattr(engine, "options", replace(engine.options, simulate_host=None))
        assert (engine._decoding_host() is not None) == used == (engine.host_unused is None), slower


def test_one_processor_is_enough_for_a_simulated_host(tiny, monkeypatch):
    monkeypatch.setattr(loading, "usable_cpus", lambda: 1)
    assert load(tiny, cache_experts=3, **SLOW).generate(SHORT, max_new_tokens=4).stats.host_experts


def test_the_interpreter_switches_as_before_when_no_host_is_left():
    gc.collect()                            # (other tests' engines)
    for thread in threading.enumerate():
        if thread.name == HOST_THREAD:
            thread.join(5)
    usual = sys.getswitchinterval()
    one, two = a_host(adding, {"each": 0.02, "threads": 1}), a_host(adding, {"each": 0.02, "threads": 1})
    assert sys.getswitchinterval() < usual
    one.close()
    assert sys.getswitchinterval() < usual
    two.close()
    assert sys.getswitchinterval() == usual


def test_what_was_begun_for_nobody_still_takes_its_time():
    host = a_host(adding, {"each": 0.02, "threads": 1})
    host.take(torch.ones(1, 4))
    host.submit({(0, 0): WHOLE})
    while not host.jobs[(0, 0)].begun:
        time.sleep(1e-4)
    host.abandon()
    assert host.free_at() > host.now() + 0.01
    host.abandon()                          # (nothing is under way that it knows of)
    assert host.free_at() <= host.now()


def test_the_thread_ends_with_its_engine_also_at_work(tiny):
    host = a_host(adding, {"each": 0.02, "threads": 1})
    host.take(torch.ones(1, 4))
    host.submit({(0, 0): WHOLE})
    thread, gone = host.thread, weakref.ref(host)
    del host
    gc.collect()
    thread.join(5)
    assert gone() is None and not thread.is_alive()
    engine = load(tiny, **SLOW)
    thread = engine.host.worker.thread
    assert thread in threading.enumerate()
    del engine
    gc.collect()
    thread.join(5)
    assert not thread.is_alive()


def test_what_was_seen_of_late_is_followed_and_forgotten(monkeypatch):
    host = a_host(adding, {"each": 0.001, "threads": 1})
    assert host.seconds() == 0.001
    for _ in range(3):                      # each takes twenty times as long; one alone counts as three times
        host.take(torch.ones(1, 4))
        host.submit({(0, 0): WHOLE})
        host.wait((0, 0))
        assert host.answer((0, 0)).tolist() == [2.0] * 4
    assert 0.001 < host.seconds() < 0.003
    later = host.now() + 10 * FORGET
    monkeypatch.setattr(host, "now", lambda: later)
    assert host.seconds() == pytest.approx(0.001, rel=0.01) and host.busy >= 0.06


def test_a_thread_that_wakes_late_is_the_host_s_affair():
    """Each time, however little it is asked for: it is no part of what an expert takes."""
    host = a_host(lambda key, blocks, x, out: time.sleep(1e-3), {"each": 0.004, "block": 0.001, "threads": 1})
    for _ in range(5):
        host.take(torch.ones(1, 4))
        asked = host.now()
        host.submit({(0, 0): 1})
        host.jobs[(0, 0)].asked -= 0.025    # (an outlier; and nobody was before it)
        host.last = 0.0
        assert host.free >= asked + 0.0009
        host.wait((0, 0))
    assert 0.001 < host.seconds(1) < 0.003 and host.seconds(2) == pytest.approx(2 * host.seconds(1), rel=0.01)
    host.free = 0.0
    assert 3e-5 < host.free_at() - host.now() < 0.01


def test_how_late_a_thread_begins_counts_from_when_its_row_was_there():
    """As who decides what it is asked for does so then."""
    host = a_host(adding, {"each": 0.001, "threads": 1})
    host.take(torch.ones(1, 4))
    time.sleep(0.01)
    host.submit({(0, 0): WHOLE})
    job = host.jobs[0, 0]
    host.wait((0, 0))
    assert job.begun - job.asked >= 0.01


def test_what_blocks_take_says_nothing_of_an_expert():
    """A call has its own cost, so they take longer than their share."""
    host = a_host(lambda key, blocks, x, out: time.sleep(5e-3), {"each": 0.004, "block": 0.001, "threads": 1})
    for _ in range(5):
        host.take(torch.ones(1, 4))
        host.submit({(0, 0): 2})
        host.wait((0, 0))
    assert host.seconds() == 0.004 and host.seconds(2) > 0.0025


# What may be asked for


@pytest.mark.parametrize("options, culprit", [
    (dict(host_threads="many"), "--host-threads many"), (dict(host_threads=-1), "--host-threads -1"),
    (dict(host_threads=1.5), "--host-threads 1.5"), (dict(host_threads=5000), "--host-threads 5000"),
    (dict(simulate_host="fast", simulate_link="1GB/s"), "--simulate-host.*fast"),
    (dict(simulate_host=1, simulate_link="1GB/s"), "--simulate-host 1"),
    (dict(simulate_host="1GB/s"), "--simulate-host")])
def test_what_cannot_be_is_refused(options, culprit):
    with pytest.raises(UserError, match=culprit):
        EngineOptions(device="cpu", **options)


def test_on_a_cpu_nobody_computes_elsewhere_unless_asked(tiny):
    assert load(tiny).host is None and load(tiny, host_threads=0, **SLOW).host is None
    assert isinstance(load(tiny, **SLOW).host, SimulatedHost)
