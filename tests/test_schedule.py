"""What crosses the link, when, and who makes room for it: bookkeeping without a tensor, on a virtual clock.

An expert here is six chunks of one byte, and the link moves a byte a second.
"""

import os
import random
from collections import deque
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from duoserve.bench import replay
from duoserve.bench.replay import Costs, Replay, belady, row, synthetic_traces
from duoserve.cache import LAUNCHED, GPUExpertCache, Slot
from duoserve.config import MixtralConfig
from duoserve.errors import UserError
from duoserve.link import CudaLane, LinkError, Transfer, chunk_sizes
from duoserve.history import History, Routing
from duoserve.policies import POLICIES, load_policy, schedulers
from duoserve.predictor import Forecast
from duoserve.scheduler import ExpertScheduler
from duoserve.simulated import SimulatedLane, VirtualClock
from duoserve.trace import Trace

CHUNKS = 6
A, B, C, D = (0, 0), (0, 1), (0, 2), (1, 0)


class Lane(SimulatedLane):
    """The simulated lane, writing down each piece: (transfer, start, end, whether it was speculation)."""

    def __init__(self, clock):
        super().__init__(clock, 1, 1)
        self.pieces = []

    def send(self, transfer, nbytes):
        super().send(transfer, nbytes)
        guesses = self.clock.pump.__self__.queue                    # (the cache's)
        self.pieces.append((transfer, *transfer.spans[-1][:2], transfer in guesses))


class Victims:
    """A policy that evicts by `choose`, and remembers when it was asked and for whom."""

    known = {(layer, e) for layer in range(8) for e in range(16)}

    def __init__(self, clock, choose=lambda key, candidates, urgent: candidates[0]):
        self.clock, self.choose, self.calls = clock, choose, []

    def victim(self, key, candidates, urgent):
        self.calls.append((self.clock.now(), key, urgent))
        return self.choose(key, candidates, urgent)


def rig(slots, choose=None):
    clock = VirtualClock()
    cache = GPUExpertCache(slots, CHUNKS, Lane(clock))
    cache.serve(Victims(clock, choose) if choose else Victims(clock))
    return cache, clock


def use(cache, key):
    """What a layer does with one expert: demand it, wait for it, compute, release."""
    cache.needed.add(key)
    assert cache.demand(key)
    slot = cache.acquire(key)
    cache.release(key)
    return slot


def counts(cache):
    c = cache.counts
    return dict(hits=c.hits, prefetched_used=c.prefetched_used, misses=c.misses)


# The lane


class Arrival:
    """A CUDA event as the lane sees it."""

    def __init__(self):
        self.done = False

    def query(self):
        return self.done

    def elapsed_time(self, other):
        return 1.0


def test_only_after_its_last_piece_need_nobody_wait_for_a_transfer():
    lane, ends, transfer = CudaLane.__new__(CudaLane), [Arrival(), Arrival()], Transfer(A, 2, 0.0)
    lane.origin, lane.epoch, lane.busy, lane.pace, transfer.loaded = Arrival(), 0.0, 0.0, 0.0, ends[1]
    lane.now = lambda: 0.0
    lane.flying, lane.landed, lane.events = deque((Arrival(), end, transfer, 1) for end in ends), deque(), []
    lane.seconds_of = float
    for end, arrived in zip(ends, (False, True)):
        end.done = True
        lane.poll()
        assert transfer.arrived == arrived and lane.free == len(lane.flying)
    assert lane.busy == 0 and not transfer.spans                    # that is looked at when there is time
    lane.look()
    assert lane.busy == 2e-3 and len(transfer.spans) == 2 and ends == lane.events[1::2]


def test_a_replay_that_starts_with_full_slots():
    """They are filled before its clock counts; with room for all there is nothing to wait for."""
    trace, = synthetic_traces(MixtralConfig(num_hidden_layers=3), 0.3, 0.8, 1, 20, 5)
    empty, warm = (Replay(trace, 2, "duo", 24, COSTS, None, start).run() for start in ("empty", "warm"))
    assert warm.cache.counts.bytes_moved == 0 and warm.ttft < empty.ttft
    assert warm.decode_s == pytest.approx(empty.decode_s)


def test_what_is_launched_is_not_evicted_until_its_routing_is_known():
    cache, clock = rig(2)
    for key in (A, B):
        cache.demand(key)
    assert cache.launch(0, 3) == [-1, -1, -1]           # nothing has arrived yet
    clock.advance(100)
    there = cache.launch(0, 3)
    assert sorted(there) == [-1, 0, 1]
    cache.plan([C])
    assert cache.lane.pieces[-1][0].key != C and not cache.demand(C)
    cache.require([A])
    assert cache.demand(C) and cache.resident(A) and not cache.resident(B)
    assert cache.acquire(A) == LAUNCHED
    cache.release(A)
    assert cache.demand(B) and cache.acquire(B) != LAUNCHED


def test_a_chunk_starts_when_it_was_asked_for_or_the_lane_falls_free():
    """Even if it is pumped only much later: it models a host that polls while the GPU computes."""
    cache, clock = rig(2)
    clock.advance(5)
    cache.plan([A])
    clock.advance(100)
    cache.pump()
    assert [piece[1:3] for piece in cache.lane.pieces] == [(5 + i, 6 + i) for i in range(CHUNKS)]
    cache.plan([B])
    clock.advance(1.5)
    cache.demand(C)                         # two chunks of B are in flight: one under way, one behind it
    spans = [piece[1:3] for piece in cache.lane.pieces[CHUNKS:]]
    assert spans == [(105, 106), (106, 107), (107, 108), (108, 114)]


def test_demands_are_sent_whole_and_delivered_in_the_order_of_asking():
    cache, clock = rig(3)
    for key in (C, A, B):
        cache.demand(key)
        clock.advance(0.1)
    assert [piece[0].key for piece in cache.lane.pieces] == [C, A, B]
    assert [cache.slot_of[key].transfer.loaded for key in (C, A, B)] == [6, 12, 18]
    assert [cache.slot_of[key].transfer.order for key in (C, A, B)] == [1, 2, 3]
    cache.acquire(A)
    assert clock.now() == 12


def test_two_chunks_of_speculation_are_in_flight_and_no_more():
    cache, clock = rig(2)
    cache.plan([A, B])
    while cache.queue:
        for _ in range(3):                  # however often it is pumped
            cache.pump()
        in_flight = sum(end > clock.now() for _, _, end, _ in cache.lane.pieces)
        assert in_flight == min(2, 2 * CHUNKS - int(clock.now()))
        clock.advance(0.5)


def test_a_demand_waits_for_two_chunks_at_most():
    """Random plans, times and demands: between a demand and its first chunk the lane is never idle, and
    carries only earlier demands and at most two chunks of speculation."""
    most = 0
    for seed in range(150):
        rng = random.Random(seed)
        cache, clock = rig(rng.randint(2, 5), lambda key, candidates, urgent: rng.choice(candidates))
        for _ in range(30):
            clock.advance(rng.choice((0, 0.3, 1, 2.5, 7)))
            keys = rng.sample([(layer, e) for layer in range(2) for e in range(4)], 4)
            match rng.choice("ppddw"):
                case "p":
                    cache.plan(keys)
                case "w":
                    cache.pump()
                case "d":
                    asked = clock.now()
                    cache.pump()
                    if cache.resident(keys[0]):
                        continue
                    assert cache.demand(keys[0])
                    transfer, start, _, guess = cache.lane.pieces[-1]
                    assert transfer.key == keys[0] and not guess
                    ahead = [(b, e, guess) for _, b, e, guess in cache.lane.pieces[:-1] if e > asked]
                    assert sum(guess for *_, guess in ahead) <= 2
                    assert start - asked == pytest.approx(sum(e - max(b, asked) for b, e, _ in ahead))
                    most = max(most, sum(guess for *_, guess in ahead))
    assert most == 2


# The cache


def test_a_guess_no_longer_wanted_stops_at_its_chunks_end_and_leaves_its_slot_empty():
    cache, clock = rig(1)
    use(cache, A)                           # at 6 s
    cache.plan([B])
    clock.advance(2.5)
    cache.plan([])                          # chunks 0 and 1 have arrived, 2 is under way and 3 behind it
    assert [piece[0].key for piece in cache.lane.pieces[1:]] == [B] * 4
    clock.advance(100)
    cache.pump()
    assert len(cache.lane.pieces) == 5 and not cache.queue
    assert not cache.resident(A) and not cache.resident(B) and not cache.slot_of
    assert cache.slots[0].key is None and cache.slots[0].transfer is None
    assert cache.counts.wasted == pytest.approx(4 / CHUNKS)
    before = cache.counts.bytes_moved
    use(cache, A)
    assert cache.counts.bytes_moved - before == CHUNKS       # all of it again


def test_a_guess_that_stays_wanted_goes_on_where_it_was():
    cache, clock = rig(2)
    cache.plan([A, B])
    clock.advance(2.5)
    cache.plan([C, A])
    clock.advance(100)
    cache.pump()
    assert [piece[0].key for piece in cache.lane.pieces] == [A] * 4 + [C] * 6 + [A] * 2
    assert cache.resident(A) and cache.resident(C) and cache.counts.wasted == 0


def test_a_slot_is_taken_when_the_first_chunk_starts_and_not_before():
    cache, clock = rig(2)
    use(cache, A), use(cache, B)
    cache.plan([C, D])
    assert cache.scheduler.calls == [(12, C, False)]
    assert sorted(cache.slot_of) == [B, C]
    clock.advance(3.9)                      # C's last chunk is sent at 16 s: D's first is not due before 17
    cache.pump()
    assert len(cache.scheduler.calls) == 1 and B in cache.slot_of
    clock.advance(1.1)
    cache.pump()
    assert [call[1:] for call in cache.scheduler.calls] == [(C, False), (D, False)]


def test_a_guess_waits_if_no_slot_is_worth_less():
    cache, clock = rig(1, lambda key, candidates, urgent: candidates[0] if urgent else None)
    use(cache, A)
    cache.plan([B])
    clock.advance(50)
    cache.pump()
    assert cache.resident(A) and cache.counts.prefetched == 0 and cache.counts.bytes_moved == CHUNKS


def test_a_demand_may_take_the_slot_of_an_unfinished_guess_and_a_guess_may_not():
    offered = []
    cache, clock = rig(2, lambda key, candidates, urgent:
                       offered.append({slot.key for slot in candidates}) or candidates[0])
    cache.demand(A)
    cache.acquire(A)                        # pinned
    cache.plan([B])
    clock.advance(1)
    cache.plan([C, B])                      # a better guess without a slot does not evict the unfinished one
    clock.advance(2)
    cache.pump()
    assert B in cache.slot_of and C not in cache.slot_of and offered == []
    assert cache.demand(D)
    assert offered == [{B}] and sorted(cache.slot_of) == [A, D]
    assert all(transfer.key != B or transfer.sent == 0 for transfer in cache.queue)


def test_pinned_and_needed_experts_are_never_evicted():
    for seed in range(100):
        rng = random.Random(seed)

        def choose(key, candidates, urgent):
            assert not any(slot.pinned or slot.key in cache.needed for slot in candidates)
            return rng.choice(candidates)

        cache, clock = rig(rng.randint(2, 4), choose)
        keys, pinned = [(0, e) for e in range(8)], []
        for _ in range(40):
            clock.advance(rng.choice((0, 1, 5)))
            key = rng.choice(keys)
            match rng.choice("pdrx"):
                case "p":
                    cache.plan(rng.sample(keys, 3))
                case "d":
                    cache.needed.add(key)
                    if not cache.demand(key):
                        assert all(slot.pinned or slot.key in cache.needed for slot in cache.slots)
                        cache.needed.discard(key)
                    elif key not in pinned and len(pinned) < len(cache.slots):
                        assert cache.slots[cache.acquire(key)].key == key
                        pinned.append(key)
                case "r" if pinned:
                    cache.release(pinned.pop(rng.randrange(len(pinned))))
                case "x":
                    cache.drop(key)
            assert all(cache.resident(key) and cache.slot_of[key].pinned for key in pinned)
            assert len(cache.slot_of) == sum(slot.key is not None for slot in cache.slots)
            assert all(cache.slot_of[slot.key] is slot for slot in cache.slots if slot.key is not None)


def test_counting():
    cache, clock = rig(3)
    cache.demand(D)                         # prefill moves it,
    cache.serve(cache.scheduler)            # and decode begins
    cache.demand(A)                         # (a miss, not yet used)
    assert counts(cache) == dict(hits=0, prefetched_used=0, misses=0)
    cache.acquire(A), cache.release(A)
    assert counts(cache) == dict(hits=0, prefetched_used=0, misses=1)
    use(cache, A)
    assert counts(cache) == dict(hits=1, prefetched_used=0, misses=1)
    cache.plan([B])
    clock.advance(2)
    use(cache, B)                           # under way, late: still a prefetch that was used
    assert counts(cache) == dict(hits=1, prefetched_used=1, misses=1)
    use(cache, B)                           # only its first use
    assert counts(cache) == dict(hits=2, prefetched_used=1, misses=1)
    assert (cache.counts.prefetched, cache.counts.wasted) == (1, 0)


def test_counting_a_prefetch_that_was_dropped_or_never_began():
    cache, clock = rig(1)
    cache.plan([B])
    clock.advance(2.5)
    cache.plan([])                          # four chunks of it have moved
    use(cache, B)
    assert counts(cache) == dict(hits=0, prefetched_used=0, misses=1)
    assert (cache.counts.prefetched, cache.counts.wasted) == (1, pytest.approx(4 / CHUNKS))
    cache.acquire(B)
    cache.plan([C])                         # no slot: it does not begin
    cache.release(B)
    assert cache.counts.prefetched == 1
    cache.lane.ends.extend([clock.now() + 50] * 2)           # the link is busy: the guess is still queued
    use(cache, C)                           # when the router asks for it
    assert counts(cache) == dict(hits=1, prefetched_used=0, misses=2) and cache.counts.prefetched == 1


def test_counting_a_prefetch_evicted_before_its_use():
    cache, clock = rig(1)
    cache.plan([A])
    clock.advance(100)
    use(cache, B)
    assert counts(cache) == dict(hits=0, prefetched_used=0, misses=1)
    assert (cache.counts.prefetched, cache.counts.wasted) == (1, 1)
    assert cache.counts.bytes_moved == 2 * CHUNKS


def test_in_time_is_what_had_arrived_when_the_router_spoke():
    cache, clock = rig(4)
    cache.require([D])
    use(cache, D)
    cache.serve(cache.scheduler)
    cache.plan([A, B])
    clock.advance(CHUNKS + 2)               # A is here, B under way, C was never asked for
    cache.require([A, B, C, D])
    for key in (A, B, C, D):
        use(cache, key)
    assert counts(cache) == dict(hits=1, prefetched_used=2, misses=1) and cache.counts.in_time == 2


def test_a_demand_for_a_slot_half_filled_and_no_longer_queued_fills_that_slot():
    cache, clock = rig(3)
    use(cache, C)
    cache.plan([A])
    clock.advance(1)
    assert 0 < cache.slot_of[A].transfer.sent < CHUNKS
    cache.queue.clear()
    slot = use(cache, A)
    assert cache.slots[slot].key == A
    assert {piece[0].slot for piece in cache.lane.pieces if piece[0].key == A} == {slot}
    assert sum(end - start for transfer, start, end, _ in cache.lane.pieces if transfer.key == A) == CHUNKS
    assert cache.resident(C)


class Failing(Lane):
    """Refuses the pieces whose numbers are in `fail`."""

    fail: set = set()
    attempts = 0

    def send(self, transfer, nbytes):
        self.attempts += 1
        if self.attempts in self.fail:
            raise LinkError("no")
        super().send(transfer, nbytes)


def test_a_guess_that_fails_is_forgotten_and_moves_again_when_demanded():
    cache, clock = rig(2)
    cache.lane = Failing(clock)
    cache.lane.fail = {3}
    cache.plan([A])
    clock.advance(100)
    cache.pump()
    assert not cache.slot_of and not cache.queue
    use(cache, A)
    assert cache.resident(A) and counts(cache) == dict(hits=0, prefetched_used=0, misses=1)


def test_a_prefetch_that_fails_in_the_demands_hands_is_tried_again():
    cache, clock = rig(2)
    cache.lane = Failing(clock)
    cache.plan([A])                         # two chunks are under way
    cache.lane.fail = {3}
    use(cache, A)
    assert cache.lane.pieces[-1][0].size == CHUNKS
    assert cache.lane.pieces[-1][2] - cache.lane.pieces[-1][1] == CHUNKS
    assert cache.resident(A)


def test_abandon_leaves_what_is_loaded_and_no_pin_or_request():
    cache, clock = rig(3)
    use(cache, A)
    cache.needed.add(B)
    cache.demand(B), cache.acquire(B)
    cache.plan([C, D])
    clock.advance(1)
    cache.abandon()
    assert cache.resident(A) and cache.resident(B) and sorted(cache.slot_of) == [A, B]
    assert not cache.queue and not cache.needed and not any(slot.pinned for slot in cache.slots)


def test_abandon_after_an_interruption_in_the_middle_of_sending():
    cache, clock = rig(2)
    cache.plan([A])                         # two chunks are under way when it is demanded, and Ctrl-C comes
    cache.lane.send = lambda transfer, nbytes: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        cache.demand(A)
    cache.abandon()
    assert not cache.slot_of and all(slot.key is None for slot in cache.slots)


def test_a_guess_with_no_slot_to_take_is_not_asked_about_again_until_there_may_be_one():
    cache, _ = rig(1, lambda key, candidates, urgent: candidates[0] if urgent else None)
    use(cache, A)
    cache.plan([B])
    asked = len(cache.scheduler.calls)
    for _ in range(5):
        cache.pump()
    assert asked > 0 and len(cache.scheduler.calls) == asked and cache.resident(A)
    cache.plan([B])                         # a new plan may be worth more
    assert len(cache.scheduler.calls) > asked
    cache.drop(A)
    cache.pump()
    assert B in cache.slot_of

    cache, _ = rig(1)                       # pinned, and then released
    cache.needed.add(A)
    assert cache.demand(A)
    cache.acquire(A)
    cache.plan([B])
    assert B not in cache.slot_of
    cache.release(A)
    cache.pump()
    assert B in cache.slot_of

    worth = {A: 2, B: 1}                    # what a slot is worth may change from layer to layer
    cache, clock = rig(1)
    s = ExpertScheduler(cache, History(2, 8), None, 1)
    s.victim = lambda key, candidates, urgent: (
        candidates[0] if urgent or worth[key] > worth[candidates[0].key] else None)
    cache.serve(s)
    use(cache, A)
    cache.plan([B])
    assert B not in cache.slot_of
    worth[A] = 0
    s.begin_layer(1)
    cache.pump()
    assert B in cache.slot_of

    cache, clock = rig(1)                   # the slot is another guess's, until that is whole
    cache.plan([B])
    clock.advance(2)
    cache.plan([C, B])
    assert C not in cache.slot_of and not cache.resident(B)
    for _ in range(CHUNKS):
        clock.advance(1)
        cache.pump()
    assert C in cache.slot_of


# The schedulers


def routing(experts, chosen, lookahead=None):
    """`chosen`: the experts of each token; the last token's is what a scheduler is told."""
    return Routing([sum(e in ids for ids in chosen) for e in range(experts)], list(chosen[-1]), [],
                   [float(e in chosen[-1]) for e in range(experts)], lookahead)


class Schedule:
    """A scheduler with its clock; `visit` runs one layer of `attention` and `expert` seconds."""

    def __init__(self, policy, slots, layers=3, experts=8, tokens=1, top_k=2, attention=1.0, expert=0.5):
        self.cache, self.clock = rig(slots)
        self.history, self.layers, self.experts = History(layers, experts), layers, experts
        self.attention, self.expert, self.routed = attention, expert, {}    # `routed`: when each layer was
        forecast = Forecast(self.history, None, top_k)
        self.scheduler, self.after = schedulers(policy, self.cache, self.history, forecast, tokens)
        self.cache.serve(self.scheduler)
        self.decoding = False

    def decode(self):
        self.decoding, self.scheduler = True, self.after
        self.cache.serve(self.scheduler)

    def visit(self, layer, chosen, lookahead=None):
        """-> [(expert, slot)] in the order they came."""
        self.scheduler.begin_layer(layer)
        self.clock.advance(self.attention)
        self.routed[layer] = self.clock.now()
        got = []
        for e, slot in self.scheduler.experts(layer, routing(self.experts, chosen, lookahead)):
            key = (layer, e)
            assert self.cache.slots[slot].key == key and self.cache.slots[slot].pinned
            assert self.cache.slot_of[key].transfer.loaded <= self.clock.now()
            self.clock.advance(self.expert)
            self.cache.pump()
            got.append((e, slot))
        self.scheduler.end_layer(layer)
        return got

    def step(self, chosen, lookahead=None):
        """`chosen[layer]`: the tokens' experts. `lookahead[layer]` likewise as logits."""
        self.scheduler.begin_step(lookahead[0] if lookahead and self.decoding else None)
        ahead = lookahead[1:self.layers] + [None] if lookahead else [None] * self.layers
        return [self.visit(layer, chosen[layer], ahead[layer]) for layer in range(self.layers)]


@pytest.mark.parametrize("slots", (2, 3, 5, 24))
@pytest.mark.parametrize("policy", POLICIES)
def test_every_expert_with_a_token_comes_once_and_is_pinned_while_it_does(policy, slots):
    """Also with fewer slots than a layer's experts, and than top_k."""
    rng = random.Random(slots)
    for tokens in (1, 3, 100):
        s = Schedule(policy, slots, tokens=tokens, top_k=4)
        for step, n in enumerate((tokens, 1, 1, 1, 1)):
            chosen = [[rng.sample(range(8), 4) for _ in range(n)] for _ in range(3)]
            lookahead = [[rng.gauss(0, 1) for _ in range(8)] for _ in range(3)]
            for got, ids in zip(s.step(chosen, lookahead), chosen):
                assert sorted(e for e, _ in got) == sorted({e for token in ids for e in token})
            assert not s.cache.needed and not any(slot.pinned for slot in s.cache.slots)
            if step == 0:
                s.decode()


@pytest.mark.parametrize("policy", POLICIES)
def test_closing_the_iterator_midway_leaves_no_pin_and_nothing_needed(policy):
    s = Schedule(policy, 4)
    s.scheduler.begin_layer(0)
    experts = s.scheduler.experts(0, routing(8, [(0, 1, 2)]))
    next(experts), next(experts)
    experts.close()
    assert not s.cache.needed and not any(slot.pinned for slot in s.cache.slots)


@pytest.mark.parametrize("policy", POLICIES)
def test_what_is_here_is_computed_while_the_rest_travels(policy):
    s = Schedule(policy, 6)
    s.decode()
    s.visit(0, [(3, 5)])
    s.cache.plan([])
    if policy != "on-demand":               # (it keeps nothing)
        assert [e for e, _ in s.visit(0, [(2, 5)])] == [5, 2]


def test_demands_come_before_guesses():
    """The router asks for two absent experts: no speculation is sent before both are."""
    for policy in POLICIES:
        s = Schedule(policy, 6, attention=0.0)
        s.decode()
        s.scheduler.begin_step([0.0] * 8)
        s.cache.plan([])
        first = len(s.cache.lane.pieces)
        s.visit(0, [(3, 5)], [5.0, 5.0] + [0.0] * 6)
        assert [piece[0].key for piece in s.cache.lane.pieces[first:first + 2]] == [(0, 3), (0, 5)], policy


def guessed(s, layer, since):
    """The experts of a layer that crossed the link as guesses."""
    return [key[0] for key in moved(s, since) if isinstance(key, list) and key[0][0] == layer]


def moved(s, since=0):
    """What crossed the link, demands as they are and guesses in brackets."""
    keys = [[piece[0].key] if piece[3] else piece[0].key for piece in s.cache.lane.pieces[since:]]
    return [key for i, key in enumerate(keys) if key not in keys[:i]]


AHEAD = [float(e in (2, 6)) for e in range(8)]


def test_on_demand_keeps_nothing():
    s = Schedule("on-demand", 6)
    s.step([[(0, 1)]] * 3)
    assert moved(s) == [(layer, e) for layer in range(3) for e in range(2)] and not s.cache.slot_of


def test_layer_prefetch_asks_for_the_whole_next_layer():
    s = Schedule("layer-prefetch", 24, attention=8.0 * CHUNKS)
    s.visit(0, [(0, 1)], AHEAD)
    first = len(s.cache.lane.pieces)
    s.visit(1, [(0, 1)], AHEAD)
    assert moved(s, first - 2)[:-1] == [[(1, e)] for e in range(8)]
    # What is still queued when that layer's router has chosen is dropped.
    s = Schedule("layer-prefetch", 24, attention=1.0)
    s.visit(0, [(0, 1)])
    first = len(s.cache.lane.pieces)
    s.visit(1, [(6, 7)])
    assert {key for key in s.cache.slot_of if key[0] == 1} == {(1, 6), (1, 7)}


def test_cache_guesses_nothing_and_evicts_the_oldest():
    s = Schedule("cache", 4)
    s.visit(0, [(0, 1)], AHEAD), s.visit(1, [(2, 3)], AHEAD), s.visit(0, [(0, 7)])
    assert moved(s) == [(0, 0), (0, 1), (1, 2), (1, 3), (0, 7)]
    assert set(s.cache.slot_of) == {(0, 0), (1, 2), (1, 3), (0, 7)}


@pytest.mark.parametrize("phase", ("prefill", "decode"))
@pytest.mark.parametrize("policy, slots", [("lru", 6), ("combined", 9), ("score", 9)])
def test_who_guesses_by_lookahead(policy, slots, phase):
    s = Schedule(policy, slots, attention=100.0)
    if phase == "decode":
        s.step([[(0, 1)]] * 3)
        s.decode()
    first = len(s.cache.lane.pieces)
    s.visit(0, [(0, 1)], AHEAD)
    s.visit(1, [(2, 6)], AHEAD)
    assert guessed(s, 1, first) == [(1, 2), (1, 6)]


def test_lru_keeps_each_layers_share():
    s = Schedule("lru", 6)                  # two slots a layer: a layer that has them gives up one of its own
    s.step([[(0, 1)]] * 3)
    s.visit(1, [(1, 5)])
    assert set(s.cache.slot_of) == {(0, 0), (0, 1), (1, 1), (1, 5), (2, 0), (2, 1)}


def test_activation_guesses_and_evicts_by_this_sequences_counts():
    s = Schedule("activation", 6, attention=100.0)
    for ids in ((4, 5), (4, 5), (4, 6)):
        s.step([[ids]] * 3)
    first = len(s.cache.lane.pieces)
    s.cache.drop((1, 4)), s.cache.drop((1, 5))
    s.visit(0, [(4, 5)], AHEAD), s.visit(1, [(4, 5)])
    assert guessed(s, 1, first) == [(1, 4), (1, 5)]
    assert (1, 6) not in s.cache.slot_of      # used once, while the others were used again and again


def test_combined_evicts_whom_this_sequence_used_least_and_who_is_furthest_off():
    s = Schedule("combined", 6)
    for ids in ((4, 5), (4, 5), (4, 6)):
        s.step([[ids]] * 3)
    keys = [(layer, e) for layer in range(3) for e in (4, 5, 6)]
    worth = lambda key: s.scheduler.worth(key)
    s.scheduler.layer = 0
    for layer, away in ((1, 1), (2, 2), (0, 3)):
        for e, n in ((4, 3), (5, 2), (6, 1), (7, 0)):
            assert worth((layer, e)) == pytest.approx(n / 3 * 0.6 ** (away / 3))
    slots = [Slot(i, key) for i, key in enumerate(keys)]
    # Even for a guess that is worth nothing.
    assert s.scheduler.victim((1, 0), slots, False).key == (0, 6)
    s.scheduler.last_used |= {(0, 1): 7, (0, 2): 3, (0, 3): 9}
    # Of equals, the one unused for longest.
    assert s.scheduler.victim((1, 0), [Slot(i, (0, i)) for i in (1, 2, 3)], True).key == (0, 2)


def test_score_keeps_a_running_mean_of_the_best_scores():
    """HybriMoE's rule, written out: S = (S + share) / 2, the share being 0 beyond the 2 top_k best."""
    s = Schedule("score", 6)
    logits = [3.0, 2.0, 1.0, 0.5, 0.0, -1.0, -2.0, -3.0]
    share = np.exp(logits) / np.exp(logits).sum()
    for k in (1, 2):
        list(s.scheduler.experts(1, Routing([1, 1] + [0] * 6, [0, 1], [], logits, None)))
        want = [share[e] * (1 - 0.5 ** k) if e < 4 else 0 for e in range(8)]
        np.testing.assert_allclose([s.scheduler.worth((1, e)) for e in range(8)], want)
        assert s.scheduler.worth((0, 0)) == 0
    slots = [Slot(0, (1, 0)), Slot(1, (1, 3)), Slot(2, (1, 2))]
    assert s.scheduler.victim((0, 0), slots, False).key == (1, 3)


OWN = """
from duoserve.scheduler import DecodeScheduler, ExpertScheduler

class NewestFirst(ExpertScheduler):
    def victim(self, key, candidates, urgent):
        return max(candidates, key=lambda slot: self.last_used.get(slot.key, 0))
"""


def test_a_policy_in_a_file_of_ones_own(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    s = Schedule(str(tmp_path / "own.py"), 4)
    s.visit(0, [(0, 1)]), s.visit(1, [(2, 3)]), s.visit(0, [(0, 7)])
    assert set(s.cache.slot_of) == {(0, 0), (0, 1), (1, 2), (0, 7)} and s.after is s.scheduler
    trace = skewed_traces(0, sequences=1)[0]
    assert row([trace], 2, str(tmp_path / "own.py"), 12, COSTS, None)["tpot_ms"] > 0


@pytest.mark.parametrize("text, words", [
    ("x = 1", "defines 0 subclasses"), (OWN + OWN.replace("Newest", "Oldest"), "defines 2 subclasses"),
    ("import nothing_like_it", "does not run"), ("class :", "does not run"),
    ("raise SystemExit(3)", "does not run"),
    (None, "no such file")])
def test_a_policy_file_that_is_none(text, words, tmp_path):
    path = tmp_path / "own.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=words) as error:
        load_policy(str(path))
    assert str(path) in str(error.value)


@pytest.mark.parametrize("transfer_ms, thinks", [(3.7, True), (0.05, False)])
def test_nothing_is_predicted_where_a_transfer_takes_less_time_than_predicting(transfer_ms, thinks):
    trace = skewed_traces(0, sequences=1)[0]
    r = Replay(trace, 2, "duo", 12, replace(COSTS, expert_transfer_ms=transfer_ms),
               lambda *_: np.full((6, 8), 0.5)).run()
    assert (r.runs > 20) == thinks and (r.cache.counts.prefetched > 20) == thinks


def test_what_is_planned_twice_takes_one_slot_and_what_is_no_expert_is_refused():
    s = Schedule("cache", 4)
    s.decode()
    s.cache.plan([(1, 2), (1, 2)])
    s.clock.advance(100)
    assert len(s.cache.slot_of) == sum(slot.key is not None for slot in s.cache.slots) == 1
    for key in ((0, 99), (77, 0), 3):
        with pytest.raises(UserError, match="policy .*: it plans .* no .layer, expert. of this model"):
            s.cache.plan([key])


def test_where_the_lookahead_s_favourites_are_there_nobody_thinks(monkeypatch):
    """What was guessed before stands then, but for the layer that has been routed."""
    trace, shares = skewed_traces(0, sequences=1)[0], []
    for slots in (12, 40):
        r = Replay(trace, 2, "duo", slots, COSTS, lambda *_: np.full((6, 8), 0.5))
        duo, plan, thought, visits = r.decode, r.cache.plan, [], []
        plan_prefetch, replan = duo.plan_prefetch, duo.replan

        def planned(layer, routing):
            thought.clear()
            plan_prefetch(layer, routing)
            ahead = sorted(range(8), key=lambda e: -(routing.lookahead or [0] * 8)[e])[:2]
            urgent = layer < 5 and not all(r.cache.resident((layer + 1, e)) for e in ahead)
            assert thought or not urgent
            visits.append(len(thought))

        def checked(keys):
            if not thought and r.scheduler is duo:
                assert all(key[0] != duo.layer for key in keys)
            plan(keys)
        monkeypatch.setattr(r.cache, "plan", checked)
        monkeypatch.setattr(duo, "plan_prefetch", planned)
        monkeypatch.setattr(duo, "replan", lambda: (thought.append(1), replan()))
        r.run()
        shares.append(sum(visits) / len(visits))
    assert shares[0] > 0.5 > shares[1] > 0


def test_where_the_device_is_at_the_next_layer_its_favourites_are_fetched_without_a_thought(monkeypatch):
    r = Replay(skewed_traces(0, sequences=1)[0], 2, "duo", 12, COSTS, lambda *_: np.full((6, 8), 0.5)).run()
    duo, cache, thought = r.decode, r.cache, []
    monkeypatch.setattr(duo, "replan", lambda: thought.append(1))
    absent = [e for e in range(8) if (2, e) not in cache.slot_of][:2]
    routing = Routing([0] * 8, [0, 1], [0.5, 0.5], [0.0] * 8, [float(e in absent) for e in range(8)])
    duo.update_values()
    duo.plan_prefetch(1, routing)
    assert thought
    cache.plan([(1, e) for e in range(8)] + [(3, e) for e in range(8)])
    left = [guess.key for guess in cache.queue if guess.key[0] == 3]
    cache.launched, thought[:] = {(3, 0)}, []                       # (not the next one)
    duo.plan_prefetch(1, routing)
    assert thought.pop()
    cache.launched = {(2, 0)}
    duo.plan_prefetch(1, routing)
    assert not thought and [guess.key for guess in cache.queue] == [(2, e) for e in absent] + left and left


def test_the_replay_charges_for_the_predictor_where_it_runs():
    """In each layer visit in which it does (most of them, with few slots), and not in the floor: with every
    expert there it never runs."""
    trace = skewed_traces(0, sequences=1)[0]
    visits = (len(trace.logits) - trace.prompt) * 6
    for slots, least, most in ((12, 0.7 * visits, 1.05 * visits), (48, 0, 0)):
        runs = [Replay(trace, 2, "duo", slots, replace(COSTS, attention_ms=20.0, predict_ms=ms),
                       lambda *_: np.full((6, 8), 0.5)).run() for ms in (0.0, 1.0)]
        assert least <= (runs[1].decode_s - runs[0].decode_s) * 1e3 <= most + 1e-6
        assert runs[1].floor == pytest.approx(runs[0].floor)


def test_chunks_are_no_smaller_than_what_it_costs_to_hand_them_over():
    assert chunk_sizes(93_600_000, 25e9) == (8 * 2**20, 11 * 2**18)
    assert chunk_sizes(20_000_000, 25e9) == (3_333_334, 2_500_000)
    for rate in (25e9, 0):
        assert chunk_sizes(250_000, rate) == (250_000, 250_000)
    assert chunk_sizes(250_000, 0.15e9) == (41_667, 15_000)


def test_a_main_thread_without_a_host_beside_it_hands_over_smaller_chunks():
    cache, clock = rig(2)
    cache.lane.chunks = 3, 1
    for key, host in ((A, object()), (B, None)):
        cache.serve(cache.scheduler, host)
        cache.plan([key])
        clock.advance(CHUNKS)
    assert [end - start for _, start, end, _ in cache.lane.pieces] == [3, 3, 1, 1, 1, 1, 1, 1]


def test_a_policy_file_that_changes_is_run_again_and_one_that_gives_up_nothing_is_named(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(OWN)
    first = load_policy(path)
    assert load_policy(path) == first
    path.write_text(OWN.replace("return max(", "return None and max("))
    os.utime(path, ns=(1, 1))
    s = Schedule(path, 2)
    s.visit(0, [(0, 1)])
    with pytest.raises(UserError, match="NewestFirst: its `victim` gives up no slot"):
        s.visit(1, [(2, 3)])


def test_a_good_lookahead_hides_the_transfer():
    """With duo, and computing slower than the link, the next layer's experts are there in time."""
    s = Schedule("duo", 6, attention=2 * CHUNKS + 2.0)      # (two chunks of another guess may be in flight)
    s.decode()
    ids = [[(0, 1)], [(2, 3)], [(4, 5)]]
    ahead = [[8.0 * (e in chosen[0]) for e in range(8)] for chosen in ids]
    s.step(ids, ahead)
    assert counts(s.cache) == dict(hits=0, prefetched_used=6, misses=0)
    assert s.clock.now() == 3 * (2 * CHUNKS + 2 + 2 * 0.5)


def test_duo_gives_up_what_is_least_likely_and_nothing_for_a_guess_worth_less():
    s = Schedule("duo", 3)
    s.decode()
    for layer in range(3):
        use(s.cache, (layer, 0))
    estimate = np.array([[0.9] * 8, [0.2] + [0.9] * 7, [0.9] * 8])
    s.scheduler.layer, s.scheduler.state, s.scheduler.forecast.estimate = 0, 1, lambda *_: estimate.copy()
    s.scheduler.update_values()
    victim = lambda key, urgent: getattr(s.scheduler.victim(key, s.cache.slots, urgent), "key", None)
    assert victim((1, 3), False) == victim((1, 3), True) == (1, 0)
    estimate[1] = [0.9] * 3 + [0.1] * 5
    s.scheduler.update_values()
    assert victim((1, 3), False) is None
    assert victim((1, 3), True) == (0, 0)               # as likely as the others, and furthest off
    estimate[:] = [[0.5] + [0.9] * 7, [0.9] * 8, [0.3] + [0.9] * 7]
    s.scheduler.update_values()
    assert victim((1, 3), False) == (2, 0)
    # Beyond the next layer a guess must be worth twice as much.
    assert victim((0, 3), False) == (2, 0)
    estimate[2, 0] = estimate[0, 0] = 0.6
    s.scheduler.update_values()
    assert victim((1, 3), False) == (0, 0) and victim((0, 3), False) is None


@pytest.mark.parametrize("misled", (False, True))
def test_a_short_prompt_drops_what_its_router_left_out(misled):
    """Once the router has chosen, an expert without a token gets at most the chunk behind the current one."""
    s = Schedule("duo", 8, layers=4, tokens=3, attention=5.5)
    lookahead = [[float((e in (2, 4, 6)) != misled) for e in range(8)]] * 4
    s.step([[(2, 4), (4, 6), (6, 2)]] * 4, lookahead)
    left_out = [piece for piece in s.cache.lane.pieces if piece[0].key[1] not in (2, 4, 6)]
    assert left_out
    for transfer, start, _, guess in left_out:
        assert guess and start <= s.routed[transfer.key[0]] + 1
    assert s.cache.counts.bytes_moved == 4 * 3 * CHUNKS + len(left_out)
    assert len(left_out) <= (36 if misled else 10)     # of 4 x 5 experts' 120 chunks


def test_what_prefill_moved_is_a_hit():
    """Also an expert fetched ahead for which the prompt then had no token: here the first of each layer."""
    s = Schedule("duo", 24, tokens=100, attention=100.0)
    s.step([[(1 + t % 7, 1 + (t + 1) % 7) for t in range(100)]] * 3)
    s.decode()
    assert all(s.cache.resident((layer, 0)) for layer in range(3))
    s.step([[(0, 7)]] * 3)
    assert counts(s.cache) == dict(hits=6, prefetched_used=0, misses=0)


def test_prefill_leaves_what_the_prompt_used_most():
    """Of twelve slots four are a ring, and the rest keep the most used experts of the three layers."""
    s = Schedule("duo", 12, tokens=100)
    rng = random.Random(0)
    chosen = [[(layer, rng.choice([e for e in range(8) if e != layer])) for _ in range(100)]
              for layer in range(3)]
    s.step(chosen)
    assert all(s.cache.resident((layer, layer)) for layer in range(3))


# Replay, on a virtual clock


def skewed_traces(seed, layers=6, experts=8, k=2, skew=1.0, persistence=0.4, recall=0.8, sequences=2,
                  prompt=80, new=24):
    """Routing with favourites: popularity exp(skew * normal), and choices that often persist."""
    rng = np.random.default_rng(seed)
    traces = []
    for _ in range(sequences):
        taste = rng.normal(0, skew, (layers, experts))
        z, ahead = (np.zeros((prompt + new, layers, experts), np.float32) for _ in range(2))
        for t in range(prompt + new):
            for layer in range(layers):
                z[t, layer] = taste[layer] + rng.gumbel(size=experts)
                if t and rng.random() < persistence:
                    z[t, layer] = z[t - 1, layer] + rng.normal(0, 0.3, experts)
                noise = rng.normal(0, 0.5, experts) if rng.random() < recall else rng.normal(0, 3, experts)
                ahead[t, layer] = z[t, layer] + noise
        traces.append(Trace(z, ahead, prompt, "synthetic"))
    return traces


COSTS = Costs(0.3, 0.15, 3.7, 12, 0.0, None, None)


def test_replay_is_deterministic():
    traces = skewed_traces(0)
    for policy in (*POLICIES, "oracle"):
        assert row(traces, 2, policy, 12, COSTS, None) == row(traces, 2, policy, 12, COSTS, None)


class NervousClock(VirtualClock):
    """Also pumps at random moments."""

    def wait_until(self, t):
        for _ in range(self.rng.randrange(4)):
            super().wait_until(self.time + self.rng.random() * (t - self.time))
        super().wait_until(t)


@pytest.mark.parametrize("policy", (*POLICIES, "oracle"))
def test_what_happens_does_not_depend_on_how_often_it_is_pumped(policy, monkeypatch):
    """To the last digit: what is sent and evicted is decided when it is due, by what is then known."""
    traces = skewed_traces(0, layers=5, recall=0.7, sequences=1, new=16)
    costs = replace(COSTS, attention_ms=2.0, expert_ms=0.6)         # several chunks fall due in one of these
    for slots in (3, 9, 20):
        rows = [row(traces, 2, policy, slots, costs, None)]
        for seed in range(3):
            NervousClock.rng = random.Random(seed)
            with monkeypatch.context() as patch:
                patch.setattr(replay, "VirtualClock", NervousClock)
                rows.append(row(traces, 2, policy, slots, costs, None))
        assert all(r == rows[0] for r in rows)


def test_the_cache_does_the_same_however_often_it_is_pumped():
    """Random plans and demands, under a policy that often gives up no slot for a guess."""
    def least(key, candidates, urgent):
        slot = min(candidates, key=lambda slot: slot.key[1])
        return slot if urgent or slot.key[1] < key[1] else None

    for seed in range(60):
        pieces = []
        for kind in (VirtualClock, NervousClock):
            rng, clock = random.Random(seed), kind()
            clock.rng = random.Random(seed)
            cache = GPUExpertCache(rng.randint(2, 3), CHUNKS, Lane(clock))
            cache.scheduler = Victims(clock, least)
            for _ in range(20):
                keys = rng.sample([(0, e) for e in range(6)], 3)
                if rng.random() < 0.4:
                    use(cache, keys[0])
                else:
                    cache.plan(keys)
                clock.advance(rng.choice((1.7, 4.1, 12.3, 20.9)))
            pieces.append([(transfer.key, *rest) for transfer, *rest in cache.lane.pieces])
        assert pieces[0] == pieces[1], seed


def test_a_guess_that_waits_for_a_slot_starts_when_it_gets_one():
    cache, clock = rig(1)
    cache.needed.add(A)
    cache.demand(A), cache.acquire(A)       # at 6 s, and pinned
    cache.plan([B])
    clock.advance(4)
    cache.release(A)
    clock.advance(1)
    assert [piece[1:3] for piece in cache.lane.pieces[1:3]] == [(10, 11), (11, 12)]


ROUTING = {"even": lambda: synthetic_traces(MixtralConfig(num_hidden_layers=8), 0.36, 0.8, 2, 80, 24),
           "persistent": lambda: synthetic_traces(MixtralConfig(num_hidden_layers=8), 0.6, 0.9, 2, 80, 24),
           "skewed": lambda: skewed_traces(3, layers=8, skew=1.0, persistence=0.2, recall=0.95, new=24)}


@pytest.mark.parametrize("kind", ROUTING)
def test_duo_is_near_its_floor_and_no_slower_than_any_baseline(kind):
    """Within 5 % of the floor and 2 % of the best baseline, whatever the cache.

    This is without a predictor. Where routing has a single regularity, as here, a baseline made for it can be
    ahead: `combined` by 1.2 % at 8 slots where each expert has its own rate, `score` by 1.9 % at 20 where
    there is nothing but persistence. (Giving each more weight in duo's rule of thumb lost more elsewhere.)
    One size is left out: 16 slots, top_k for each of 8 layers, where an LRU holds exactly the last token's
    experts.
    """
    traces, slow = ROUTING[kind](), []
    for slots in (2, 8, 20, 64):
        rows = {policy: row(traces, 2, policy, slots, COSTS, None) for policy in POLICIES}
        duo = rows.pop("duo")
        best = min(rows.values(), key=lambda r: r["tpot_ms"])
        to_floor, to_best = duo["tpot_ms"] / duo["floor_ms"], duo["tpot_ms"] / best["tpot_ms"]
        if to_floor > 1.05 or to_best > 1.02:
            slow.append(f"{slots} slots: {to_floor:.3f} x floor, {to_best:.3f} x {best['policy']}")
    assert not slow


@pytest.mark.parametrize("attention, expert, slots", [
    *((a, e, n) for a in (0.1, 1.0, 2.0, 3.0) for e in (0.05, 0.3) for n in (4, 5, 12)),
    *((a, e, n) for a in (0.1, 1.0, 1.5) for e in (0.05, 0.3) for n in (2, 3))])
def test_prefill_is_as_fast_as_the_slower_of_compute_and_link(attention, expert, slots):
    """In units of a transfer: up to 3 of attention hide behind four slots, up to 1.5 behind two."""
    trace = skewed_traces(1, layers=12, skew=0.0, sequences=1, prompt=128, new=1)[0]
    costs = replace(COSTS, prefill_attention_ms=attention * 3.7, prefill_expert_ms=expert * 3.7)
    replay = Replay(trace, 2, "duo", slots, costs, None).run()
    link = 12 * 8 * 3.7e-3
    compute = 12 * (attention + 8 * expert) * 3.7e-3
    assert replay.ttft <= 1.05 * max(link, compute)


@pytest.mark.parametrize("slots, attention", [(2, 1.5), (3, 1.5), (4, 3), (12, 3)])
def test_the_link_never_rests_while_a_prompt_streams(slots, attention):
    """From the first byte to the last, through layer boundaries, while attention and experts are computed."""
    s = Schedule("duo", slots, layers=6, tokens=100, attention=attention * CHUNKS, expert=0.3 * CHUNKS)
    s.step([[(t % 8, (t + 1) % 8) for t in range(100)]] * 6)
    pieces = s.cache.lane.pieces
    rest = sum(b[1] - a[2] for a, b in zip(pieces, pieces[1:]))
    assert len(pieces) == 6 * 8 and rest < 0.02 * pieces[-1][2]


def transfers_needed(trace, k, policy, slots):
    """misses and used prefetches a decode step, starting from an empty cache."""
    r = Replay(trace, k, policy, slots, COSTS, None)
    r.begin(r.prefill)
    r.step(slice(0, trace.prompt), None)
    r.cache.plan([])
    r.cache.empty()
    r.begin(r.decode)
    for t in range(trace.prompt, len(trace.logits)):
        r.step(slice(t, t + 1), trace.lookahead[t, 0].tolist())
    c = r.cache.counts
    visits = (len(trace.logits) - trace.prompt) * r.layers
    assert c.hits + c.misses + c.prefetched_used == k * visits
    return (c.misses + c.prefetched_used) * r.layers / visits


def test_no_policy_needs_fewer_transfers_than_belady():
    for seed, slots in ((0, 2), (1, 7), (2, 15), (3, 30), (4, 48)):
        trace = skewed_traces(seed, sequences=1, prompt=4, new=20)[0]
        least = belady([trace], 2, slots)
        for policy in (*POLICIES, "oracle"):
            assert transfers_needed(trace, 2, policy, slots) >= least - 1e-9, policy


def brute_force(trace, k, slots):
    """The fewest loads over every choice of what to keep after each visit."""
    visits = [frozenset((layer, e) for e in ids)
              for row in trace.top(k)[trace.prompt:].tolist() for layer, ids in enumerate(row)]
    cost = {frozenset(): 0}
    for visit in visits:
        after = {}
        for held, moved in cost.items():
            moved += len(visit - held)
            others = sorted(held - visit)
            room = slots - len(visit)
            for kept in combinations(others, min(room, len(others))):
                state = visit | frozenset(kept)
                after[state] = min(moved, after.get(state, moved))
        cost = after
    return min(cost.values())


@pytest.mark.parametrize("k, slots", [(1, 2), (1, 3), (2, 2), (2, 3), (2, 4)])
def test_belady_is_the_optimum(k, slots):
    for seed in range(6):
        trace = skewed_traces(seed, layers=2, experts=4, sequences=1, prompt=1, new=7)[0]
        assert belady([trace], k, slots) * 7 == pytest.approx(brute_force(trace, k, slots))


def test_synthetic_routing_is_what_it_says():
    config = MixtralConfig(num_hidden_layers=4)
    traces = synthetic_traces(config, 0.36, 0.8, sequences=4, prompt=200, new=200)
    top = np.concatenate([trace.top(2) for trace in traces])
    ahead = np.concatenate([np.argsort(-trace.lookahead, -1)[..., :2] for trace in traces])
    again = (top[1:, :, :, None] == top[:-1, :, None]).any(-1).mean()
    found = (top[..., None] == ahead[:, :, None]).any(-1).mean()
    assert abs(again - 0.36) < 0.03 and abs(found - 0.8) < 0.03
