"""The engine: the same bits whatever is predicted, cached or late; faults, Ctrl-C, sampling, streaming."""

import gc
import math
import os
import random
import re
import subprocess
import sys
import threading
import time
import tracemalloc
import weakref
from contextlib import suppress
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from models import (answers, at_rest, by_table, hostile, InterruptAt, LateLane, load, LONG, packed, put_lane,
                    same, SAMPLED, SHORT)

from duoserve import Engine, loading, store
from duoserve import engine as engine_module
from duoserve.cache import GPUExpertCache
from duoserve.experts import ExpertSlots
from duoserve.machine import can_compile, uncollected
from duoserve.model import key_sizes
from duoserve.options import SamplingParams
from duoserve.packed import PackedModel
from duoserve.quant import PackedLinear, compiled
from duoserve.sampling import sample
from duoserve.step import DecodeStep
from duoserve.store import ExpertStore
from duoserve.config import MixtralConfig
from duoserve.errors import UserError
from duoserve.link import LinkError, Mailbox
from duoserve.policies import POLICIES
from duoserve.simulated import SimulatedLane, WallClock
from duoserve.tokenizer import TextStream, Tokenizer


@pytest.fixture(scope="module")
def want(tiny):
    return answers(load(tiny, policy="cache", cache_experts=24))


# Results never depend on the schedule


@pytest.mark.parametrize("policy, slots", [*((policy, slots) for policy in POLICIES for slots in (2, 6)),
                                           ("duo", 3), ("duo", 24)])
def test_the_same_bits_under_every_policy_and_size(policy, slots, tiny, want):
    engine = load(tiny, policy=policy, cache_experts=slots)
    assert same(answers(engine), want)
    put_lane(engine, LateLane(engine, seed=slots))
    engine.cache.abandon()
    hostile(engine, seed=slots)
    assert same(answers(engine), want)
    if slots > 3:
        by_table(engine)
        assert same(answers(engine), want)


@pytest.mark.parametrize("slots, deepest", (
        (3, {1, "0 behind the last"}), (12, {1, 2, "1 behind the last"}), (24, {4, "1 behind the last"})))
def test_the_same_bits_by_the_table_in_16_bits(slots, deepest, tiny):
    """Where what a layer chose was there, the next one is enqueued before anybody thinks about it; with all
    experts there whole tokens are, to their end, before the host reads what they chose."""
    engine = load(tiny, dtype="bfloat16", cache_experts=slots)
    want = answers(engine)
    by_table(engine)
    step, ahead = engine.step, []           # layers that are enqueued when the first of them is settled
    launch, settle, waiting = step.launch, step.settle, []

    def settled(i, *rest):
        if waiting[0] == i:
            ahead.append(len(waiting) if i < 2 else f"{len(waiting) - 1} behind the last")
        waiting.remove(i)
        settle(i, *rest)

    def launched(i, *rest):
        if i == 0:
            waiting.clear()
        waiting.append(i)
        return launch(i, *rest)
    step.launch = launched
    step.settle = settled
    assert same(answers(engine), want)
    assert deepest <= set(ahead)
    engine.source.slots.always = 2          # as of a small model on a GPU
    assert same(answers(engine), want)


def test_pinned_memory_that_the_device_cannot_reach_is_copied(tiny, want, monkeypatch, capsys):
    monkeypatch.setattr("duoserve.link.on_device", lambda *_: None)
    engine = load(tiny, cache_experts=9)
    assert "decode is slower (use a process for each GPU)" in capsys.readouterr().err
    assert engine.step.mail == [None] * 3 and same(answers(engine), want)


def test_a_mailbox_is_cleared_before_the_device_writes_there(tiny, monkeypatch):
    """Or else a GPU's host would read what the token before left."""
    cleared, clear, fetch, fetched = set(), Mailbox.clear, SimulatedLane.fetch, []
    monkeypatch.setattr(Mailbox, "clear", lambda mail: cleared.add(mail) or clear(mail))

    def checked(self, values, mailbox=None):
        if mailbox is not None:
            cleared.remove(mailbox)
            fetched.append(mailbox.full())
        return fetch(self, values, mailbox)
    monkeypatch.setattr(SimulatedLane, "fetch", checked)
    engine = load(tiny, cache_experts=9)
    engine.generate(SHORT, max_new_tokens=3)
    by_table(engine)
    engine.generate(SHORT, max_new_tokens=3)
    assert len(fetched) == 2 * 2 * 3 and all(fetched)


def test_several_rows_go_through_one_of_a_few_pieces(tiny):
    """Filled up to the least of them that holds all: what they make of a row depends on no other row."""
    engine = load(tiny, cache_experts=24)
    engine.generate(SHORT, **SAMPLED)
    slots, runs, shape = engine.source.slots, [], (512, engine.config.hidden_size)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = [slots[slot](x[:n]) for slot in (3, 5) for n in (1, 2, 64, 65, 500, 512)]
        for matrix in slots.matrices:
            matrix.workspace = torch.full((2 * matrix.q[0].numel(),), torch.nan)
        slots.capture(lambda piece: lambda: (runs.append(piece.args[0]), piece()))
        slots[3](torch.full(shape, torch.nan))                      # (what is left of others does no harm)
        got = [slots[slot](x[:n]).clone() for slot in (3, 5) for n in (1, 2, 64, 65, 500, 512)]
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(got, expected))
    assert runs == [512] + 2 * [64, 64, 128, 512, 512]


@pytest.mark.compiles
@pytest.mark.parametrize("dtype, error", ((torch.float32, 1e-4), (torch.bfloat16, 2e-2)))
def test_compiled_code_reaches_every_slot(tiny, dtype, error, monkeypatch):
    """It is told of two, and may copy neither."""
    monkeypatch.setattr("duoserve.quant.SMALL_MATRIX", 0)           # (four rows at a time, as in a large one)
    model = PackedModel(tiny)
    c, keys = model.config, model.config.expert_keys[:5]
    memory = torch.empty(len(keys), model.layout.nbytes, dtype=torch.uint8)
    for key, block in zip(keys, memory):
        model.read_expert(*key, block.numpy())
    linear = partial(PackedLinear, largest_group=model.largest_group)
    eager, fused = (ExpertSlots(c, model.layout, memory, partial(linear, compile=compile), compile)
                    for compile in (False, True))
    x = torch.randn(5, c.hidden_size, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.inference_mode():
        for slot, n in product(range(len(keys)), (1, 5)):
            assert torch.allclose(eager[slot](x[:n]), fused[slot](x[:n]), rtol=error, atol=error)
        at, out = torch.tensor([4, 2]), torch.zeros(2, 2, c.hidden_size, dtype=dtype)
        for slots, y in zip((eager, fused), out):
            slots.run(at, x[:1], y)
    assert torch.allclose(*out, rtol=error, atol=error)


def test_compiling_that_is_switched_off_is_noticed(monkeypatch, capsys):
    """What may be compiled must be: it reaches beyond what it is told of."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    assert not can_compile(torch.device("cpu"))
    assert "torch.compile does not work here (it is switched off)" in capsys.readouterr().err


@pytest.mark.compiles
def test_every_thread_may_compile_as_many_shapes():
    """An expert on the host takes more than the eight that torch allows; each of its threads has a limit."""
    run, sizes, done = compiled(torch.square), range(2, 11), []
    run(torch.ones(12))                     # (torch 2.11 crashes without a GPU if a thread is the first)
    thread = threading.Thread(target=lambda: done.extend(len(run(torch.ones(n))) for n in sizes))
    thread.start()
    thread.join()
    assert done == [*sizes]


def test_a_processor_with_other_bits_is_refused(tiny, monkeypatch):
    """As of one that takes small numbers for zero."""
    product = PackedLinear.forward
    monkeypatch.setattr(PackedLinear, "forward", lambda self, x: 0 * product(self, x))
    load(tiny, dtype="float32")             # (in which no bits are promised)
    with pytest.raises(UserError, match="has not the bits of the CPU.*use --device cpu"):
        load(tiny, dtype="bfloat16")


@pytest.mark.parametrize("after", (1, 2, 5))
def test_an_interruption_of_what_was_enqueued_ahead_leaves_no_trace(after, tiny, want):
    engine = load(tiny, cache_experts=24)
    by_table(engine)
    source, calls = engine.source, iter(range(after))

    def interrupted(*launched):
        if next(calls, None) is None:
            del source.launched
            raise KeyboardInterrupt
        type(source).launched(source, *launched)
    source.launched = interrupted
    with pytest.raises(KeyboardInterrupt):
        engine.generate(SHORT, **SAMPLED)
    assert at_rest(engine.cache) and not engine.cache.launched
    assert same(answers(engine), want)


def test_compiled_code_knows_few_sizes_of_the_context():
    """Which one is read follows from the position alone, and none is more than four times too large."""
    assert key_sizes(64) == [64] and key_sizes(1024) == [1024] and key_sizes(1088) == [1024, 1088]
    sizes = key_sizes(32768)
    assert sizes == [1024, 4096, 16384, 32768]
    assert all(min(size for size in sizes if size > position) <= max(1024, 4 * (position + 1))
               for position in range(0, 32768, 7))


def test_a_row_of_the_table_whose_writing_was_interrupted_is_written_again(tiny, want):
    engine = load(tiny, cache_experts=24)
    by_table(engine)

    class Rows(list):
        def __setitem__(self, i, row):
            engine.step.row_values = engine.step.table.numpy()
            raise KeyboardInterrupt
    engine.step.row_values = Rows()
    with pytest.raises(KeyboardInterrupt):
        engine.generate(SHORT, **SAMPLED)
    assert same(answers(engine), want)


def test_loading_ends_with_full_slots(tiny, predictor):
    """With what the predictor's traces used most; what fits is not moved again."""
    engine = load(tiny, cache_experts=9)
    assert [slot.key for slot in engine.cache.slots] == [(layer, e) for e in range(3) for layer in range(3)]
    engine = load(tiny, cache_experts=9, predictor=predictor)
    popularity = engine.predictor.popularity()
    least = min(popularity[slot.key] for slot in engine.cache.slots)
    assert (popularity > least).sum() < 9 and all(slot.whole for slot in engine.cache.slots)
    assert load(tiny, cache_experts=24).generate(SHORT, **SAMPLED).stats.bytes_moved == 0


class Adversary:
    """A predictor that answers whatever `chances` makes of the hints, the opposite of likely included."""

    def __init__(self, chances):
        self.chances = chances

    def __call__(self, state, hints):
        return np.array([self.chances(margins) for margins in hints[0].tolist()])


ADVERSARIES = {"the least likely": lambda x: [float(v < sorted(x)[4]) for v in x], "all": lambda x: [1.0] * 8,
               "none": lambda x: [0.0] * 8, "nan": lambda x: [math.nan] * 8,
               "noise": lambda x, rng=random.Random(0): [rng.random() for _ in x]}


@pytest.mark.parametrize("who, slots", [
    *((who, slots) for who in ("trained", *ADVERSARIES) for slots in (2, 7)), ("trained", 24), ("all", 24)])
def test_the_same_bits_under_every_predictor(who, slots, tiny, predictor, want):
    engine = load(tiny, cache_experts=slots, predictor=predictor if who == "trained" else "none")
    if who != "trained":
        engine.predictor = Adversary(ADVERSARIES[who])
    put_lane(engine, LateLane(engine))
    assert same(answers(engine), want)
    assert engine.cache.counts.prefetched > 0 or slots == 24 or who in ("none", "nan")


@pytest.mark.parametrize("policy, link, chunk", [
    ("duo", "400MB/s", None), ("duo", "50MB/s", 1000), ("duo", "2GB/s", 10**9), ("duo", None, 777),
    ("layer-prefetch", "50MB/s", 1000), ("layer-prefetch", None, 777)])
def test_the_same_bits_over_every_link_and_chunk(policy, link, chunk, tiny, want):
    engine = load(tiny, cache_experts=6, policy=policy, simulate_link=link)
    engine.cache.lane.chunks = (chunk, chunk) if chunk else engine.cache.lane.chunks
    assert same(answers(engine), want)


def unpin(acquire):
    def acquire_and_let_go(cache, key):
        slot = acquire(cache, key)
        cache.slot_of[key].pinned = False
        cache.needed.discard(key)
        return slot
    return acquire_and_let_go


def keep_the_evicted(evict):
    def evict_and_keep(cache, slot):
        key = slot.key
        evict(cache, slot)
        cache.slot_of[key] = slot
    return evict_and_keep


@pytest.mark.parametrize("broken", ("nothing", "waits", "pins", "last chunk", "eviction"))
def test_a_broken_schedule_shows(broken, tiny, want, monkeypatch):
    """The comparison above is not vacuous: the late lane and the disturbance find what they are made for."""
    engine = load(tiny, cache_experts=5)
    lane = put_lane(engine, LateLane(engine))
    hostile(engine)
    if broken == "waits":
        monkeypatch.setattr(lane, "wait", lambda transfer: None)
    if broken == "pins":
        monkeypatch.setattr(GPUExpertCache, "acquire", unpin(GPUExpertCache.acquire))
    if broken == "last chunk":              # never sent, although the transfer counts as loaded
        move = lane.move
        lane.move = lambda transfer, start, stop: stop < transfer.size and move(transfer, start, stop)
    if broken == "eviction":                # an expert that lost its slot still counts as cached
        monkeypatch.setattr(GPUExpertCache, "_evict", keep_the_evicted(GPUExpertCache._evict))
    try:
        right = same(answers(engine), want)
    except Exception:
        right = False
    assert right == (broken == "nothing")


def test_logits_are_the_same_after_other_requests(tiny):
    engine = load(tiny, cache_experts=4)
    first = engine.logits(LONG)
    engine.generate(SHORT, max_new_tokens=30, temperature=1.5, seed=9)
    assert torch.equal(engine.logits(LONG), first)
    assert first.dtype == torch.float32 and first.shape == (len(LONG), engine.config.vocab_size)


# Faults and interruptions


class FaultyLane(SimulatedLane):
    """As fast as memcpy; `fails(transfer)` says which pieces do."""

    def __init__(self, engine, fails):
        lane = engine.cache.lane
        super().__init__(WallClock(), 0, lane.chunks[0], lane.copy)
        self.fails, self.failed = fails, 0

    def send(self, transfer, nbytes):
        if self.fails(transfer):
            self.failed += 1
            raise LinkError("the cable came off")
        super().send(transfer, nbytes)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_prefetch_that_fails_is_not_visible(policy, tiny, want):
    engine, rng = load(tiny, policy=policy, cache_experts=6), random.Random(1)
    lane = put_lane(engine, FaultyLane(
        engine, lambda transfer: transfer in engine.cache.queue and rng.random() < 0.3))
    assert same(answers(engine), want)
    assert lane.failed or policy in ("on-demand", "cache")


@pytest.mark.parametrize("policy, after",
                         [*((policy, 3) for policy in POLICIES), ("duo", 0), ("duo", 30), ("cache", 60)])
def test_a_demand_that_fails_ends_the_request_and_not_the_engine(policy, after, tiny, want):
    engine, demands = load(tiny, policy=policy, cache_experts=3), [0]

    def fails(transfer):
        demanded = transfer not in engine.cache.queue
        demands[0] += demanded
        return demanded and demands[0] > after

    healthy = engine.cache.lane
    put_lane(engine, FaultyLane(engine, fails))
    with pytest.raises(UserError, match="the cable came off"):
        for _ in range(20):
            engine.generate(SHORT, **SAMPLED)
    assert at_rest(engine.cache)
    assert engine.result.finish_reason == "interrupted"
    kept = set(engine.cache.slot_of)
    assert kept or after == 0 or policy == "on-demand"
    put_lane(engine, healthy)
    assert same(answers(engine), want)


@pytest.mark.parametrize("policy, n",
                         [("duo", 1), ("duo", 11), ("duo", 40), ("on-demand", 11), ("layer-prefetch", 40)])
def test_an_interruption_leaves_the_engine_usable(policy, n, tiny, want):
    engine = load(tiny, policy=policy, cache_experts=4)
    put_lane(engine, LateLane(engine))
    InterruptAt(engine, n)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(SHORT, **SAMPLED)
    assert at_rest(engine.cache)
    assert engine.result.finish_reason == "interrupted"
    assert engine.result.token_ids == want[1][:len(engine.result.token_ids)]
    assert bool(engine.result.token_ids) == (n == 40)
    assert same(answers(engine), want)


@pytest.mark.parametrize("ask", (lambda engine: engine.generate(SHORT, **SAMPLED),
                                 lambda engine: engine.logits(SHORT)))
@pytest.mark.parametrize("n", (1, 2, 9))
def test_an_interruption_while_bytes_are_sent(n, ask, tiny, want):
    engine, sends = load(tiny, cache_experts=4), [0]

    def fails(transfer):
        sends[0] += 1
        if sends[0] == n:
            raise KeyboardInterrupt
        return False

    put_lane(engine, FaultyLane(engine, fails))
    with pytest.raises(KeyboardInterrupt):
        ask(engine)
    assert at_rest(engine.cache)
    assert same(answers(engine), want)


def test_an_interrupted_request_never_touches_the_next(tiny, monkeypatch):
    """Its frames may be kept alive by a traceback, and freed in the middle of another request."""
    engine, complaints = load(tiny, cache_experts=3), []
    monkeypatch.setattr(sys, "unraisablehook", lambda problem: complaints.append(problem.exc_value))
    InterruptAt(engine, 12)
    with pytest.raises(KeyboardInterrupt) as interruption:
        engine.generate(SHORT, **SAMPLED)
    held = [interruption]
    del interruption
    pins = []

    def check(*_):
        if held and engine.source.decoding:
            held.clear()
            gc.collect()
        pins.append(sum(slot.pinned for slot in engine.cache.slots))

    engine.source.slots.expert.register_forward_pre_hook(check)
    engine.generate(LONG, **SAMPLED)
    assert not held and set(pins) == {1} and not complaints


def test_a_stream_that_is_closed_midway(tiny, want):
    engine = load(tiny, cache_experts=4)
    put_lane(engine, LateLane(engine))
    stream = engine.stream(SHORT, **SAMPLED)
    first = next(stream)
    stream.close()
    assert engine.result.finish_reason == "interrupted"
    assert engine.result.text == first and 0 < len(engine.result.token_ids) < 10
    assert at_rest(engine.cache)
    assert same(answers(engine), want) and at_rest(engine.cache)


# Sampling


def test_seeds(tiny):
    engine = load(tiny)
    one = engine.generate(SHORT, **SAMPLED).token_ids
    assert engine.generate(SHORT, **SAMPLED).token_ids == one
    assert any(engine.generate(SHORT, **SAMPLED | {"seed": seed}).token_ids != one for seed in range(4, 8))


def test_in_time_are_no_more_than_there_were(tiny):
    """Even if a request is interrupted between its routing and the use of an expert."""
    engine = load(tiny, cache_experts=24)
    engine.generate(SHORT, **SAMPLED)
    InterruptAt(engine, 22)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(SHORT, **SAMPLED)
    stats = engine.result.stats
    assert stats.in_time <= stats.hits + stats.prefetched_used


def test_an_answer_is_ones_own_whoever_asks_next(tiny):
    """Another thread may begin as soon as the engine is free again."""
    engine, want = load(tiny), load(tiny).generate(SHORT, **SAMPLED).token_ids
    stream = engine.stream

    def followed(*arguments, **options):
        result = yield from stream(*arguments, **options)
        list(stream(LONG, max_new_tokens=1))
        return result
    engine.stream = followed
    assert engine.generate(SHORT, **SAMPLED).token_ids == want and engine.result.prompt_tokens == len(LONG)


@pytest.mark.parametrize("options", (
    dict(cache_experts=9.5), dict(cache_experts="9"), dict(context=10.5), dict(gpu_memory=[1]),
    dict(host_memory=1.5), dict(simulate_link=[1]), dict(predictor=3), dict(compile="no"), dict(policy=None),
    dict(threads="2")))
def test_options_of_another_type_are_named_as_python_has_them(options, tiny):
    with pytest.raises(UserError, match=f"{next(iter(options))}="):
        load(tiny, **options)


def test_temperature_zero_is_greedy(tiny):
    engine = load(tiny)
    got = engine.generate(SHORT, max_new_tokens=8, temperature=0, seed=5).token_ids
    assert engine.logits(SHORT + got)[len(SHORT) - 1:-1].argmax(-1).tolist() == got
    for options in (dict(top_k=1), dict(top_p=1e-9), dict(temperature=1e-3)):
        assert engine.generate(SHORT, max_new_tokens=8, **options).token_ids == got, options


def test_a_temperature_of_hardly_anything(tiny):
    """Dividing by it would overflow."""
    engine = load(tiny)
    greedy = engine.generate(SHORT, max_new_tokens=4, temperature=0).token_ids
    assert engine.generate(SHORT, max_new_tokens=4, temperature=1e-42).token_ids == greedy


def drawn(probabilities, n=200, temperature=1.0, top_k=None, top_p=1.0):
    logits, generator = torch.tensor(probabilities).log(), torch.Generator().manual_seed(0)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    return [sample(logits, params, generator).item() for _ in range(n)]


@pytest.mark.parametrize("options, possible", [
    (dict(), {0, 1, 2, 3}), (dict(top_k=3), {0, 2, 3}), (dict(top_k=99), {0, 1, 2, 3}), (dict(top_k=1), {2}),
    (dict(top_p=0.5), {2, 0}), (dict(top_p=0.39), {2}), (dict(top_p=0.41), {2, 0}),
    (dict(top_p=0.75), {2, 0, 3}),
    (dict(top_k=2, top_p=0.9), {2, 0})])
def test_what_can_be_drawn(options, possible):
    """top_p keeps the smallest set that reaches it, of what top_k has left."""
    assert set(drawn([0.3, 0.1, 0.4, 0.2], **options)) == possible


def test_top_p_adds_whole_numbers(monkeypatch):
    """PyTorch's floating-point cumsum on CUDA is not deterministic: the same seed might give another text."""
    cumsum, seen = torch.Tensor.cumsum, []
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda p, dim: seen.append(p.dtype) or cumsum(p, dim))
    assert set(drawn([0.3, 0.1, 0.4, 0.2], top_p=0.75)) == {2, 0, 3} and set(seen) == {torch.int64}


def test_time_to_the_first_token_counts_from_the_requests_arrival(tiny, monkeypatch):
    engine = load(tiny)
    encode, begin = Tokenizer.encode, Engine._begin
    slow = lambda f: lambda *args: (time.sleep(0.1), f(*args))[1]
    monkeypatch.setattr(Tokenizer, "encode", slow(encode))
    monkeypatch.setattr(Engine, "_begin", slow(begin))
    assert engine.generate("the quick dog", max_new_tokens=1).stats.ttft_s >= 0.2


def test_temperature_scales_the_odds():
    for temperature in (0.5, 1.0, 2.0):
        odds = [p ** (1 / temperature) for p in (0.8, 0.2)]
        share = drawn([0.8, 0.2], 1000, temperature).count(0) / 1000
        assert share == pytest.approx(odds[0] / sum(odds), abs=0.04)


# Where it ends


def test_it_stops_at_eos(tiny, tmp_path):
    """Neither the text nor the ids hold the EOS; any of several counts, also as the first token."""
    greedy = dict(max_new_tokens=8, temperature=0)
    tokens = load(tiny).generate(SHORT, **greedy).token_ids
    third, engine = tokens[2], load(packed(tmp_path, seed=7, eos_token_id=[2, tokens[2]]))
    assert third not in tokens[:2]
    result = engine.generate(SHORT, **greedy)
    assert result.finish_reason == "stop" and result.token_ids == tokens[:2]
    assert result.text == engine.tokenizer.decode(tokens[:2])
    result = engine.generate(SHORT + tokens[:2], **greedy)
    assert (result.finish_reason, result.token_ids, result.text) == ("stop", [], "")
    assert result.stats.tpot_s is None


def test_it_stops_where_the_context_is_full(tiny):
    engine = load(tiny, context=12)
    result = engine.generate(SHORT, max_new_tokens=99, temperature=0)
    assert result.finish_reason == "length" and len(result.token_ids) == 7
    assert result.token_ids == load(tiny).generate(SHORT, max_new_tokens=7, temperature=0).token_ids
    assert len(engine.generate(SHORT * 2 + [5], max_new_tokens=99).token_ids) == 1
    with pytest.raises(UserError, match="--context"):
        engine.generate([5] * 12)
    assert engine.logits([5] * 12).shape[0] == 12
    with pytest.raises(UserError, match="--context"):
        engine.logits([5] * 13)


def test_one_token_has_no_tpot(tiny):
    result = load(tiny).generate(SHORT, max_new_tokens=1)
    assert result.stats.tpot_s is None and len(result.token_ids) == 1 and result.stats.ttft_s > 0


def test_text_gets_a_bos_and_ids_are_taken_as_they_are(tiny):
    engine = load(tiny)
    ids = engine.tokenizer.encode("the quick dog")
    assert ids[0] == 1
    text = engine.generate("the quick dog", max_new_tokens=4, temperature=0)
    assert text.prompt_tokens == len(ids)
    assert text.token_ids == engine.generate(ids, max_new_tokens=4, temperature=0).token_ids
    assert engine.generate(ids[1:], max_new_tokens=4, temperature=0).prompt_tokens == len(ids) - 1


# Streaming


def test_the_pieces_are_the_text(tiny):
    engine = load(tiny)
    for seed in range(6):
        pieces = list(engine.stream(SHORT, max_new_tokens=20, temperature=1.5, seed=seed))
        assert "".join(pieces) == engine.result.text == engine.tokenizer.decode(engine.result.token_ids)
        assert all(pieces)


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return Tokenizer(tiny / "tokenizer.model", MixtralConfig())


def bytes_of(tokenizer, data: bytes) -> list[int]:
    return [tokenizer.sp.piece_to_id(f"<0x{b:02X}>") for b in data]


def test_a_character_is_never_split(tokenizer):
    stream = TextStream(tokenizer)
    pieces = [stream.push(i) for i in bytes_of(tokenizer, "a😀é".encode())]
    assert pieces == ["a", "", "", "", "😀", "", "é"] and stream.close() == ""


@pytest.mark.parametrize("data, text", [
    (b"\xff", "\ufffd"), (b"\xf0\x9f\x98", "\ufffd"), (b"\xf0\x9fA", "\ufffdA"),
    (b"\x80\x80", "\ufffd\ufffd"), (b"\xc3\xc3\xa9", "\ufffdé"), (b"\xed\xa0\x80", "\ufffd\ufffd\ufffd"),
    ("😀".encode() + b"\xe2\x82", "😀\ufffd")])
def test_bytes_that_never_make_a_character(data, text, tokenizer):
    assert tokenizer.decode(bytes_of(tokenizer, data)) == text == data.decode(errors="replace")


def test_a_character_cut_short_by_a_word(tokenizer):
    the = tokenizer.sp.piece_to_id("▁the")
    stream = TextStream(tokenizer)
    assert [stream.push(i) for i in [*bytes_of(tokenizer, b"\xf0\x9f"), the]] == ["", "", "\ufffd the"]


def test_any_bytes_stream_to_what_they_decode_to(tokenizer):
    rng = random.Random(0)
    for _ in range(300):
        pieces = b"a", "é".encode(), "€".encode(), "😀".encode(), b"\xf0", b"\x9f", b"\xe2", b"\xff"
        data = b"".join(rng.choices(pieces, k=8))
        stream, out = TextStream(tokenizer), ""
        for i in bytes_of(tokenizer, data):
            out += stream.push(i)
            assert data.decode(errors="replace").startswith(out)
        assert out + stream.close() == data.decode(errors="replace")


# Memory


def held() -> tuple[int, int, int]:
    """The number of tensors, their bytes, and the bytes that Python has allocated while it is traced."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    return len(tensors), sum(tensor.nbytes for tensor in tensors), tracemalloc.get_traced_memory()[0]


def test_many_requests_and_a_long_answer_leave_nothing_behind(tmp_path):
    small = packed(tmp_path, seed=7, num_hidden_layers=1, hidden_size=32, intermediate_size=32,
                   num_attention_heads=2, max_position_embeddings=320, eos_token_id=[])
    engine = load(small, cache_experts=5)

    def ask(n):
        for seed in range(n):
            engine.generate(SHORT, max_new_tokens=2, seed=seed, resume=seed % 2)
        return held()

    ask(5)
    gc.freeze()                             # what exists by now need not be counted each time
    tracemalloc.start()
    try:
        first, then, midway = ask(100), ask(100), []                # (torch 2.11 fills its stores slowly)
        for _ in engine.stream(SHORT, max_new_tokens=200, seed=1):
            if engine.sequence.history.tokens[0] >= 80 * (len(midway) + 1):
                midway.append(held())
        assert len(engine.result.token_ids) == 200
        last = ask(2)
    finally:
        tracemalloc.stop()
        gc.unfreeze()
    assert first[:2] == then[:2] == last[:2] and midway[0][:2] == midway[1][:2]
    assert then[2] - first[2] < 25_000 and last[2] - then[2] < 20_000   # (250 bytes a request would show)
    assert midway[1][2] - midway[0][2] < 80 * 100      # the text and the ids of the answer itself
    assert len(engine.cache.slot_of) <= 5 and at_rest(engine.cache)


def test_gpu_memory_becomes_slots(tiny):
    whole = load(tiny, cache_experts=24)
    assert whole.plan.slots == 24 and whole.peak_bytes() == whole.plan.total
    plan = load(tiny, gpu_memory=whole.plan.total).plan
    assert plan.slots == 24
    expert = plan.expert
    assert load(tiny, gpu_memory=whole.plan.total - 1).plan.slots == 23
    assert load(tiny, gpu_memory=f"{whole.plan.total - 10 * expert}").plan.slots == 14
    share = 100 * (whole.plan.total - 5 * expert) / whole.packed.nbytes
    assert load(tiny, gpu_memory=f"{share + 1e-6}%").plan.slots == 19
    assert load(tiny, gpu_memory="1GiB").plan.slots == 24
    assert load(tiny, gpu_memory="1GiB", cache_experts=6).plan.slots == 6
    assert load(tiny, context=64, gpu_memory=whole.plan.total - 10 * expert).plan.slots > 14
    assert load(tiny).plan.slots == 6       # a quarter, on the CPU


def test_too_little_memory_names_the_least_that_works(tiny):
    for context in (50, 100, 150, 200, 256):        # whichever way it is rounded
        with pytest.raises(UserError, match="--gpu-memory") as refusal:
            load(tiny, gpu_memory="1MB", context=context)
        least = re.search(r" ([\d.]+MB) is the least that works", str(refusal.value))[1]
        assert load(tiny, gpu_memory=least, context=context).generate(SHORT, max_new_tokens=2).token_ids
    with pytest.raises(UserError, match="--gpu-memory"):
        load(tiny, gpu_memory=int(0.98 * load(tiny, cache_experts=2).plan.total))
    with pytest.raises(UserError, match="--cache-experts 24.*--gpu-memory"):
        load(tiny, gpu_memory=least, cache_experts=24)


# What a user can get wrong


def test_bad_options_of_an_engine(tiny):
    """Values that only Python can give; test_cli.py goes through the others."""
    for options, flag in (
            (dict(cache_experts=-3), "--cache-experts"), (dict(gpu_memory=0), "--gpu-memory"),
            (dict(dtype=torch.int8), "--dtype"), (dict(simulate_link=-1), "--simulate-link"),
            (dict(simulate_link=math.nan), "--simulate-link"), (dict(context=257), "--context"),
            (dict(predictor="/no/such/file", policy="lru"), "/no/such/file"),
            (dict(device="gpu0"), "--device")):
        with pytest.raises(UserError, match=flag):
            Engine.from_pretrained(tiny, **{"device": "cpu", "predictor": "none"} | options)


def test_bad_requests_leave_the_engine_as_it_was(tiny):
    engine = load(tiny)
    want = engine.generate(SHORT, max_new_tokens=2).token_ids
    for options, flag in (
            (dict(max_new_tokens=0), "--max-new-tokens"), (dict(temperature=-1), "--temperature"),
            (dict(temperature=math.nan), "--temperature"), (dict(temperature=math.inf), "--temperature"),
            (dict(top_p=0), "--top-p"), (dict(top_p=1.1), "--top-p"), (dict(top_p=math.nan), "--top-p"),
            (dict(top_k=0), "--top-k"), (dict(seed=2**70), "--seed"), (dict(seed=-2**70), "--seed")):
        with pytest.raises(UserError, match=flag):
            engine.generate(SHORT, **{"max_new_tokens": 2} | options)
    for prompt in ("", "  \n", [], [320], [-1]):
        with pytest.raises(UserError, match="prompt|token id"):
            engine.generate(prompt)
    assert engine.generate(SHORT, max_new_tokens=2).token_ids == want


def test_a_request_holds_the_engine_until_it_is_finished_or_closed(tiny):
    """A suspended stream too: another request is refused at once, and the first is not harmed."""
    engine = load(tiny, cache_experts=4)
    want = list(engine.stream(SHORT, **SAMPLED))
    stream = engine.stream(SHORT, **SAMPLED)
    pieces = [next(stream)]
    for ask in (lambda: engine.generate(LONG), lambda: next(engine.stream(LONG)),
                lambda: engine.logits(SHORT)):
        with pytest.raises(UserError, match="busy with another request"):
            ask()
    assert pieces + list(stream) == want and engine.result.finish_reason == "length"
    for _ in engine.stream(SHORT, **SAMPLED):
        break                               # leaving the loop closes the stream
    assert engine.result.finish_reason == "interrupted"
    engine.stream(SHORT)                    # a stream that has not begun does not hold the engine
    assert list(engine.stream(SHORT, **SAMPLED)) == want


def test_threads_on_one_engine_get_the_right_answer_or_a_clear_refusal(tiny):
    engine, answers, errors = load(tiny, cache_experts=4, simulate_link="50MB/s"), [], []
    want = {seed: engine.generate(SHORT, **SAMPLED | {"seed": seed}).token_ids for seed in range(4)}

    def ask(seed):
        for _ in range(6):
            try:
                answers.append((seed, engine.generate(SHORT, **SAMPLED | {"seed": seed}).token_ids))
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in want]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) + len(errors) == 24 and answers
    assert all(tokens == want[seed] for seed, tokens in answers)
    assert all(isinstance(error, UserError) and "busy" in str(error) for error in errors)


def test_time_per_token_does_not_count_the_eos(tiny, monkeypatch):
    engine, steps = load(tiny, cache_experts=24), []
    sample = engine_module.sample
    eos = min(engine.tokenizer.eos)

    def slow(logits, *rest):
        steps.append(1)
        time.sleep(0.03 if len(steps) < 4 else 0.5)
        return torch.tensor(eos) if len(steps) == 4 else sample(logits, *rest)
    monkeypatch.setattr(engine_module, "sample", slow)
    result = engine.generate(SHORT, max_new_tokens=20, temperature=0)
    assert result.finish_reason == "stop" and len(result.token_ids) == 3 and 0.03 <= result.stats.tpot_s < 0.2


@pytest.mark.compiles
def test_nothing_is_compiled_after_loading_whatever_the_context_and_the_first_sample(tiny, monkeypatch):
    torch._dynamo.reset()                   # (what other tests have compiled)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    monkeypatch.setattr(engine_module, "sample", lambda *_: torch.tensor(2))            # the end, at once
    monkeypatch.setattr("duoserve.step.key_sizes", lambda context: [64, context])
    engine = load(tiny, cache_experts=4, context=100, compile=True)
    assert 2 in engine.tokenizer.eos
    monkeypatch.setattr(engine_module, "sample", sample)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 0 < graphs - before <= 12 and engine.step.sizes == [64, 128]     # (each takes half a second)
    assert len(engine.generate([1, *[40] * 61], max_new_tokens=4, temperature=0).token_ids) > 2
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("large", (False, True))
def test_a_small_model_does_without_what_makes_a_start_long(tiny, large, monkeypatch):
    told = {}

    def compile(function, options, **_):    # (the code stays as it is)
        told[function.__name__] = options["triton.enable_pdl"]
        return function
    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(loading, "can_compile", lambda device: True)
    monkeypatch.setattr("duoserve.quant.SMALL_MATRIX", 0 if large else 2**22)
    compiled.cache_clear()
    load(tiny, cache_experts=2, context=100, compile=True, dtype="bfloat16")
    compiled.cache_clear()
    assert told == dict.fromkeys(("dots", "dequantize_into", "run_experts", "run_layer"), large)


COMPILE = """
import torch
from torch._inductor import async_compile, config, cpu_vec_isa
from duoserve.machine import can_compile
def refuse(*_): raise RuntimeError("this takes seconds")
tried = []
cpu_vec_isa.VecISA.check_build = lambda isa, code: tried.append(code) or True
async_compile.AsyncCompile.pool = async_compile.AsyncCompile.process_pool = refuse
with config.patch(compile_threads=7):
    assert can_compile(torch.device("cpu")) and cpu_vec_isa.VecISA._avx_code not in tried
"""


@pytest.mark.compiles
def test_compiling_starts_no_processes_and_believes_in_the_compiler(tmp_path):
    """Both would take seconds of each start. (In a new interpreter: torch remembers what it has tried.)"""
    run = subprocess.run([sys.executable, "-c", COMPILE], cwd=Path(loading.__file__).parents[1], text=True,
                         capture_output=True, env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)})
    assert run.returncode == 0, run.stderr


@pytest.mark.compiles
def test_compiled_with_the_smallest_context(tiny):
    before = torch._dynamo.utils.counters["graph_break"].copy()
    engine = load(tiny, cache_experts=4, context=2, compile=True)
    assert len(engine.generate([1], max_new_tokens=5, temperature=0).token_ids) == 1
    assert torch._dynamo.utils.counters["graph_break"] == before    # each piece is compiled as a whole


def test_without_a_place_for_compiled_code_nothing_is_compiled(tiny, tmp_path, monkeypatch, capsys):
    torch._dynamo.reset()                   # (and what it imports is there, if this test is the only one)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file/cache"))
    engine = load(tiny, compile=True)
    assert not engine.compiled and "torch.compile does not work here" in capsys.readouterr().err
    assert engine.generate(SHORT, max_new_tokens=2).token_ids


def test_experts_are_read_while_the_rest_is_made_ready(tiny, monkeypatch):
    ready, read, make = threading.Event(), PackedModel.read_expert, DecodeStep.__init__

    def late(*arguments):
        assert ready.wait(60)
        time.sleep(0.01)                    # (then it is waited for)
        read(*arguments)

    def making(*arguments):
        make(*arguments)
        ready.set()
    monkeypatch.setattr(PackedModel, "read_expert", late)
    monkeypatch.setattr(DecodeStep, "__init__", making)
    engine = load(tiny, policy="cache", cache_experts=24)
    monkeypatch.setattr(PackedModel, "read_expert", read)
    assert same(answers(engine), answers(load(tiny, policy="cache", cache_experts=24)))


@pytest.mark.parametrize("when", ("compiling", "asking for the tenth", "taking memory"))
def test_loading_that_is_interrupted_reads_no_more(when, tiny, monkeypatch):
    read = []

    def slow(*arguments):
        read.append(arguments)
        time.sleep(0.05)

    def interrupted(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(PackedModel, "read_expert", slow)
    if when == "compiling":
        monkeypatch.setattr(DecodeStep, "__init__", interrupted)
    elif when == "asking for the tenth":
        submit, left = store.ThreadPoolExecutor.submit, iter(range(9))
        monkeypatch.setattr(store.ThreadPoolExecutor, "submit", lambda *arguments: (
            interrupted() if next(left, None) is None else submit(*arguments)))
    else:
        monkeypatch.setattr(store.mmap, "mmap", interrupted)
    threads, closed = threading.active_count(), []
    bar = SimpleNamespace(add=lambda n: None, close=lambda: closed.append(1))
    with pytest.raises(KeyboardInterrupt):
        load(tiny, progress=lambda total, label: bar)
    n = len(read)
    time.sleep(0.1)
    assert n == len(read) < 24 and threading.active_count() <= threads and closed


def test_a_damaged_expert_among_others_leaves_nothing_behind(tiny, monkeypatch):
    read, maps = PackedModel.read_expert, weakref.WeakSet()

    def damaged(self, layer, expert, into):
        time.sleep(0.01)
        if (layer, expert) == (1, 3):
            raise UserError("expert 3 is damaged")
        read(self, layer, expert, into)

    class Store(ExpertStore):
        def __init__(self, *arguments, **more):
            maps.add(self)
            super().__init__(*arguments, **more)
    monkeypatch.setattr(PackedModel, "read_expert", damaged)
    monkeypatch.setattr(loading, "ExpertStore", Store)
    gc.collect()
    gc.disable()
    try:
        with suppress(UserError):
            load(tiny)
            pytest.fail("nobody noticed")
        assert len(maps) == 0
    finally:
        gc.enable()


@pytest.mark.parametrize("on", (True, False))
def test_loading_collects_no_garbage_and_leaves_the_collector_as_it_was(on, tiny):
    seen = []

    def progress(total, label):
        seen.append(gc.isenabled())
        if len(seen) > 1:
            raise UserError("no more")
    was = gc.isenabled()
    (gc.enable if on else gc.disable)()
    try:
        load(tiny, progress=progress)
        assert gc.isenabled() == on
        with pytest.raises(UserError, match="no more"):
            load(tiny, progress=progress)
        assert gc.isenabled() == on and seen == [False, False]
        one, other = uncollected(), uncollected()                   # in two threads, say
        one.__enter__(), other.__enter__()
        one.__exit__(None, None, None)
        assert not gc.isenabled()
        other.__exit__(None, None, None)
        assert gc.isenabled() == on
    finally:
        (gc.enable if was else gc.disable)()


def test_an_engine_that_was_dropped_is_gone_before_the_next_makes_its_plan(tiny, monkeypatch):
    alive, plan = [], Engine._make_plan

    def planned(self):
        alive.append(sum(store() is not None for store in stores))
        return plan(self)
    monkeypatch.setattr(Engine, "_make_plan", planned)
    stores = []
    for _ in range(4):
        engine = load(tiny, cache_experts=6)
        engine.generate(SHORT, max_new_tokens=2)
        stores.append(weakref.ref(engine.store))
        del engine
    assert alive == [0, 0, 0, 0]


@pytest.mark.parametrize("damage", (b"[" * 200_000, b"[]", b"{}", b"\xff"))
def test_a_damaged_manifest_is_named(tiny, tmp_path, damage):
    for path in tiny.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "manifest.json").write_bytes(damage)
    with pytest.raises(UserError, match="manifest.json"):
        load(tmp_path)


@pytest.mark.parametrize("temperature", (0, 0.8))
@pytest.mark.parametrize("value", (math.nan, math.inf))
@torch.inference_mode()
def test_logits_that_are_not_finite_are_said_to_be(temperature, value, tiny):
    engine = load(tiny)
    weight = engine.model.norm.weight
    kept = weight.clone()
    weight[3] = value
    with pytest.raises(UserError, match="not finite in float32"):
        engine.generate(SHORT, max_new_tokens=3, temperature=temperature)
    weight.copy_(kept)
    want = load(tiny).generate(SHORT, max_new_tokens=3)
    assert engine.generate(SHORT, max_new_tokens=3).token_ids == want.token_ids


@torch.inference_mode()
def test_a_request_that_went_wrong_leaves_nothing_behind(tiny):
    """Its keys and values may be NaN, and later requests must not see them through the attention mask."""
    engine, want = load(tiny), load(tiny).generate(SHORT, max_new_tokens=4).token_ids
    row = engine.model.embed.weight[LONG[40]]
    kept = row.clone()
    row.fill_(math.nan)
    with pytest.raises(UserError, match="not finite"):
        engine.generate(LONG, max_new_tokens=3)
    engine.logits(LONG)
    row.copy_(kept)
    assert engine.generate(SHORT, max_new_tokens=4).token_ids == want


def interruptions(engine, lines, counts):
    """One request for each n in `lines`, interrupted at the n-th executed line of cache and link in calls for
    which `counts(frame)` is true; yields whether the interruption came."""
    files = {sys.modules[f"duoserve.{name}"].__file__ for name in ("cache", "link")}

    def interrupt_at(countdown):
        def trace(frame, event, _):
            nonlocal countdown
            if event == "call" and not (frame.f_code.co_filename in files and counts(frame)):
                return None
            countdown -= event == "line"
            if countdown == 0:
                raise KeyboardInterrupt
            return trace
        return trace

    for line in lines:
        came = False
        sys.settrace(interrupt_at(line))
        try:
            engine.generate(SHORT, **SAMPLED)
        except KeyboardInterrupt:
            came = True
        finally:
            sys.settrace(None)
        yield came


def test_an_interruption_while_a_token_is_read_leaves_a_result(tiny):
    """There the engine is between two passes, and only its clean-up at the end puts things right."""
    engine, want = load(tiny, cache_experts=4, simulate_link="50MB/s"), load(tiny).generate(SHORT, **SAMPLED)

    def passing(frame):
        return frame is not None and (frame.f_code.co_name in ("_prefill", "_decode", "_begin")
                                      or passing(frame.f_back))

    interrupted = 0
    for came in interruptions(engine, range(1, 84, 4), lambda frame: not passing(frame)):
        interrupted += came
        tokens = engine.result.token_ids
        assert tokens == want.token_ids[:len(tokens)]
    assert interrupted > 12 and engine.generate(SHORT, **SAMPLED).token_ids == want.token_ids


@pytest.mark.parametrize("policy", ("duo", "lru"))
def test_an_interruption_at_any_line_leaves_an_engine_that_works(policy, tiny):
    engine = load(tiny, policy=policy, cache_experts=4, simulate_link="1GB/s")
    want = load(tiny).generate(SHORT, **SAMPLED)
    for _ in interruptions(engine, range(1, 220, 9),
                           lambda frame: frame.f_code.co_name in ("_take", "_evict", "send")):
        assert engine.generate(SHORT, **SAMPLED).token_ids == want.token_ids


def lines_met(ask, interrupt=None):
    """Call `ask()` and list each line of engine, step and model when it is first executed, before and after
    the first decode step separately; Ctrl-C comes at the line `interrupt`."""
    files = [sys.modules[f"duoserve.{name}"].__file__ for name in ("engine", "step", "model")]
    met, decoding = {}, False

    def trace(frame, event, _):
        nonlocal decoding
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            decoding = decoding or frame.f_code.co_filename == files[1]
            key = frame.f_code.co_filename, frame.f_lineno, decoding
            if key not in met:
                met[key] = True
                if key == interrupt:
                    raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        ask()
    finally:
        sys.settrace(None)
    return list(met)


def test_an_interruption_at_any_line_never_changes_what_comes_next(tmp_path):
    """Every third line of engine, step and model: of a resumed request's start, prefill and decode."""
    directory = packed(tmp_path, seed=7, num_hidden_layers=1, eos_token_id=[])
    engine, untouched = load(directory, cache_experts=3), load(directory, cache_experts=3)
    options = dict(max_new_tokens=2, temperature=0.9, seed=3, resume=True)
    ask = lambda engine, i: engine.generate(said[i], **options).token_ids
    said = [SHORT, [*SHORT[:3], 9, 90, 19, 8]]              # the second keeps three tokens of the first
    said.append(SHORT + ask(untouched, 0) + [7, 70])                # and the third goes on from it
    want = [ask(untouched, i) for i in (0, 1, 2)]
    ask(engine, 0)
    points = lines_met(lambda: ask(engine, 1))
    assert len(points) > 200 and len({(file, decoding) for file, _, decoding in points}) == 5
    for n, point in enumerate(points[::3]):
        ask(engine, 0)
        with pytest.raises(KeyboardInterrupt):
            lines_met(lambda: ask(engine, 1), point)
        for i in ((1, 2), (2, 1))[n % 2]:                       # the same once more, or another one
            assert ask(engine, i) == want[i], point
