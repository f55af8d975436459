"""The dual phase: which expert crosses the link next, and who makes room for it.

Prefill needs nearly every expert of every layer and knows it in advance: its bytes stream in a fixed order,
through layer boundaries, while attention and the experts that have arrived are computed. Decode needs 2 of 8
and learns which only when it reads the router: it fetches what is missing first, and predicts the rest of the
time (DuoServe-MoE, arXiv 2509.07379). Both share one cache, which is the hand-over between them.
"""

import math
from itertools import islice, product
from typing import Iterator

import numpy as np

from .cache import BLOCKS, HOST, WHOLE, GPUExpertCache, Slot
from .errors import UserError
from .history import History, Routing
from .link import Key
from .predictor import DISCOUNT, Forecast, worth

RING = 4                                    # slots that prefill streams through; decode keeps the rest
LIKELY = 0.5                                # chance from which on a guess is worth the link's time
HORIZON = 4                                 # layers that prefill looks ahead
BEYOND = 4                                  # guesses that decode makes beyond the next layer; each has to be
MARGIN = 2                                  # worth this many times what it evicts, as making it takes time
BUSY = 0.97                                 # share of the time at which the link counts as fully used
THOUGHT = 3e-4                              # seconds to predict; a transfer that is shorter is not predicted
REST = 0.5                                  # what the rest of an expert is worth, by the byte, of a whole one
LINK_WORTH = 0.6                            # what a second of the link is worth: it could bring guesses
CERTAIN = 64                                # tokens from which on a prompt is taken to need every expert


def ranked(scores: list[float] | None) -> list[int]:
    """Experts by falling score; none where there are no scores."""
    return sorted(range(len(scores or ())), key=lambda e: -scores[e])


class ExpertScheduler:
    """What the engine asks of a policy; this base fetches what the router asked for, and keeps it.

    `duo` makes one for each phase of a request; of any other policy one serves both. `tokens` are those of
    the prompt. It is given to the cache (`GPUExpertCache.serve`) before it is used. Each layer calls
    `begin_layer`; `on_routing`, when the history has seen the routing; `victim`, for what is missing;
    `plan_prefetch`; `on_expert_done` for each expert; `end_layer`.
    """

    link_worth = 0.0

    def __init__(self, cache: GPUExpertCache, history: History, forecast: Forecast, tokens: int):
        self.cache, self.history, self.forecast, self.tokens = cache, history, forecast, tokens
        self.layers, self.experts_a_layer = history.layers, history.experts
        self.keys = [(layer, e) for layer in range(self.layers) for e in range(self.experts_a_layer)]
        self.known = set(self.keys)
        self.layer = 0
        self.uses = 0                       # counted for policies that care how long ago the last one was
        self.last_used: dict[Key, int] = {}

    def begin_step(self, lookahead: list[float] | None) -> None:
        """Once a forward pass: layer 0's lookahead, raw logits [experts]; None in prefill."""

    def begin_layer(self, layer: int) -> None:
        """Before a layer's routing is known. (The lane is fed while it is awaited.)"""
        self.layer = layer
        self.cache.reconsider()             # (what a slot is worth may depend on the layer)

    def end_layer(self, layer: int) -> None:
        """All of a layer's experts are computed, or enqueued to be. (The device waits for the next layer.)"""

    def experts(self, layer: int, routing: Routing) -> Iterator[tuple[int, int]]:
        """Yields (expert, place) of each expert with a token as it is ready. The place is a slot, pinned
        until resumed or closed; LAUNCHED where the device has been told to compute it already; or HOST, where
        what is computed from here on finds the host's answer."""
        cache, remaining = self.cache, [(layer, e) for e, n in enumerate(routing.counts) if n]
        for_host: dict[Key, int] = {}
        if cache.host is not None:          # (what is launched is computed whatever we say)
            for_host = self.for_host([key for key in remaining if key not in cache.launched])
        on_host = [key for key, blocks in for_host.items() if blocks == WHOLE]
        if len(for_host) > len(on_host) + 1:
            raise UserError(f"policy {type(self).__name__}: its `for_host` divides more than one expert")
        remaining = [key for key in remaining if key not in on_host]
        self.history.observe(layer, routing)
        cache.require(remaining, on_host)
        self.on_routing(layer, routing)
        planned = False
        try:
            while True:
                for key in self.to_demand(remaining):               # as many as fit, before any guess
                    cache.demand(key, cache.host.block * for_host[key] if key in for_host else 0)
                if not planned:             # (the demands first: a thread that wakes takes the interpreter)
                    if for_host:
                        cache.host.submit(for_host)
                    self.plan_prefetch(layer, routing)
                    planned = True
                if not remaining:
                    break
                # The lane delivers in the order of asking, so the oldest transfer is the next to be ready.
                ready = list(filter(cache.ready, remaining))
                if not ready:
                    raise UserError(f"policy {type(self).__name__}: its `victim` gives up no slot for an "
                                    "expert that is needed now")
                key = min(ready, key=lambda key: cache.slot_of[key].transfer.order)
                if key in for_host:
                    cache.host.wait(key)
                slot = cache.acquire(key)
                try:
                    yield key[1], slot
                finally:
                    cache.release(key)
                remaining.remove(key)
                self._done(key)
            for key in on_host:             # (last: what the device can be told is told meanwhile)
                cache.host.wait(key)
                yield key[1], HOST
                self._done(key)
        finally:
            cache.needed.difference_update(remaining)

    def _done(self, key: Key) -> None:
        self.uses += 1
        self.last_used[key] = self.uses
        self.on_expert_done(key)

    def for_host(self, keys: list[Key]) -> dict[Key, int]:
        """What the host does of the experts that a layer needs: the WHOLE of some, and of one perhaps some
        blocks, while the link brings the rest of it. Of all ways to divide what is missing between the two:
        the one that is soonest done, link time being worth something in itself."""
        cache, lane, host = self.cache, self.cache.lane, self.cache.host
        absent = [key for key in keys if not cache.resident(key)]
        if not any(map(host.has, absent)) or cache.transfer_s() <= THOUGHT:
            return {}
        now, each, block = lane.now(), host.seconds(), host.seconds(1)
        link_free, host_free = lane.free_at() - now, host.free_at() - now
        left, link_block = [cache.missing_s(key) for key in absent], lane.seconds_of(host.block)
        least, best = math.inf, ((), None, 0)       # the cost; what the host does of each, and of one of them
        for way in product(*((0, WHOLE) if host.has(key) else (0,) for key in absent)):
            on_host, last = way.count(WHOLE), None
            link_s, link_done, host_done = 0.0, 0.0, host_free + on_host * each
            for i, n in enumerate(way):
                if not n:
                    link_s, last = link_s + left[i], i
                    link_done = link_free + link_s
            cost = max(link_done, host_done if on_host else 0.0) + self.link_worth * link_s
            if cost < least:
                least, best = cost, (way, last, 0)
            if last is not None and host.block and host.has(absent[last]):
                most = min(BLOCKS, math.ceil(left[last] / link_block))
                both = min(most, int((link_done - host_done) / (link_block + block)))       # they end at once
                for n in range(max(1, both), min(most, both + 1) + 1):
                    saved = min(left[last], n * link_block)
                    cost = max(link_done - saved, host_done + n * block) + self.link_worth * (link_s - saved)
                    if cost < least:
                        least, best = cost, (way, last, n)
        way, last, blocks = best
        divided = {absent[last]: blocks} if blocks else {}
        return divided | {key: n for key, n in zip(absent, way) if n}

    def on_routing(self, layer: int, routing: Routing) -> None:
        """A layer's routing is known, and nothing has been demanded yet."""

    def plan_prefetch(self, layer: int, routing: Routing) -> None:
        """The demands are enqueued: plan what the lane shall do after them."""

    def to_demand(self, remaining: list[Key]) -> list[Key]:
        """Which of the experts that the layer needs and that are not computed yet to ask the lane for now."""
        return remaining

    def on_expert_done(self, key: Key) -> None:
        """An expert has been computed and its slot released."""

    def victim(self, key: Key, candidates: list[Slot], urgent: bool) -> Slot | None:
        """Which slot to give up for `key`; None to leave things as they are (not if `key` is needed now).

        No candidate is pinned, needed by the layer under way, or (unless `urgent`) still being filled for its
        first use; it may hold a guess that has not been used yet."""
        return min(candidates, key=lambda slot: self.last_used.get(slot.key, 0))

    def all_here(self) -> bool:
        """Every expert has a slot: it is there, or has begun to come."""
        return len(self.cache.slot_of) == len(self.keys)

    def distance(self, layer: int) -> int:
        """Layer visits from now until `layer` is next visited: 1 is the next layer, `layers` this one."""
        return (layer - self.layer - 1) % self.layers + 1


class PrefillScheduler(ExpertScheduler):
    """Streams the experts ahead of the computation, in the order they will be needed, through a ring of
    slots."""

    def __init__(self, *of_request):
        super().__init__(*of_request)
        self.certain = self.tokens >= CERTAIN
        self.done: set[Key] = set()         # computed in this pass, or found not to be needed
        self.ahead: list[Key] = []          # asked for by us and not done yet
        self.order = list(self.keys)        # of asking

    def begin_layer(self, layer: int) -> None:
        super().begin_layer(layer)
        self.run_ahead()

    def on_routing(self, layer: int, routing: Routing) -> None:
        self.done.update((layer, e) for e, n in enumerate(routing.counts) if not n)
        if not self.certain:
            self.cache.plan([key for key in self.ahead if key not in self.done])        # the rest is dropped

    def plan_prefetch(self, layer: int, routing: Routing) -> None:
        if routing.lookahead and not self.certain:                  # few tokens: the likely experts first
            i = (layer + 1) * self.experts_a_layer
            self.order[i:i + self.experts_a_layer] = sorted(
                self.order[i:i + self.experts_a_layer], key=lambda key: -routing.lookahead[key[1]])
        self.run_ahead()

    def to_demand(self, remaining: list[Key]) -> list[Key]:
        """No more than the ring holds: asking for all eight at once would only push out what decode will
        want."""
        here = [key for key in remaining if key in self.cache.slot_of]
        absent = [key for key in remaining if key not in self.cache.slot_of]
        return here + absent[:max(0, RING - len(here))]

    def on_expert_done(self, key: Key) -> None:
        self.done.add(key)
        self.run_ahead()

    def run_ahead(self) -> None:
        """Keep the ring full: what is next in order and not here is asked for, whole if it is certain to be
        needed."""
        cache = self.cache
        if self.certain and self.all_here():
            return
        ring = min(RING, len(cache.slots))
        self.ahead = [key for key in self.ahead if key not in self.done]
        here = self.layer * self.experts_a_layer                    # (the ring holds only a few layers)
        for key in self.order[here:here + HORIZON * self.experts_a_layer]:
            if len(self.ahead) >= ring:
                break
            if key in self.done or key in self.ahead or cache.resident(key):
                continue
            if self.certain and not cache.demand(key):
                break
            self.ahead.append(key)
        if not self.certain:
            cache.plan([key for key in self.ahead if not cache.resident(key)])

    def victim(self, key: Key, candidates: list[Slot], urgent: bool) -> Slot | None:
        """Of what this pass is done with, what the prompt used least; else what it will need last."""
        done = [slot for slot in candidates if slot.key in self.done]
        if done:
            return min(done, key=lambda slot: self.history.counts[slot.key[0]][slot.key[1]])
        last = max(candidates, key=lambda slot: slot.key)
        return last if last.key > key or (urgent and key in self.cache.needed) else None


class DecodeScheduler(ExpertScheduler):
    """Fetches what is missing, then what the forecast says of the next layer, then, if the link has time to
    spare, of those after it; evicts what is likeliest to lie idle longest."""

    link_worth = LINK_WORTH

    def __init__(self, *of_request):
        super().__init__(*of_request)
        # What is known: how many layers of this token are routed, and the next one's lookahead. What follows,
        # once somebody asks: the next layer's `chance [experts]`, and `value [layers][experts]`. If nothing
        # has to be guessed or evicted, nobody does, and the host goes straight on.
        self.state, self.lookahead = self.layers, None
        self.thinks = True
        self.chance: list[float] = []
        self.value: list[list[float]] | None = None
        steps = np.arange(1, self.layers + 1) / self.layers
        self.discount = np.tile(DISCOUNT ** steps, 2)[:, None]      # of a use 1, 2 .. layers away

    def begin_step(self, lookahead: list[float] | None) -> None:
        self.layer = -1
        if lookahead is not None:
            self.state, self.lookahead = 0, lookahead
        self.replan()

    def on_routing(self, layer: int, routing: Routing) -> None:
        self.state, self.lookahead = layer + 1, routing.lookahead

    def plan_prefetch(self, layer: int, routing: Routing) -> None:
        """What is missing is under way by now. Thinking takes longer than a layer whose experts are there. So
        where the lookahead's favourites are there, or the device is at the next layer already, what was
        thought before will do; what is absent of the favourites is asked for first."""
        cache = self.cache
        if self.all_here():
            return
        likely = ranked(routing.lookahead)[:len(routing.ids)]
        absent = [(layer + 1, e) for e in likely if not cache.resident((layer + 1, e))]
        rest = [guess.key for guess in cache.queue if guess.key[0] != layer]
        if self.value is None or not likely or absent and not cache.enqueued(layer + 1):
            self.replan()
        elif absent or len(rest) < len(cache.queue):
            cache.plan(absent + rest)

    def replan(self) -> None:
        """Guess at the next layer's experts, best first; then at what is worth most of the layers beyond, as
        far as slots are empty or the link has time to spare: a guess takes no slot that is worth more."""
        cache, layer, wanted = self.cache, (self.layer + 1) % self.layers, []
        self.value = None
        self.thinks = cache.transfer_s() > THOUGHT
        if not self.thinks:
            return cache.plan([])
        if not all(cache.resident((layer, e)) for e in range(self.experts_a_layer)):
            self.update_values()
            wanted = [(layer, e) for e in ranked(self.chance) if self.chance[e] >= LIKELY]
        beyond = BEYOND if self.forecast.predictor and cache.link_use() < BUSY else 0
        rests = [transfer for transfer in cache.queue if transfer.used]             # the host did the others
        more = max(len(cache.slots) - len(cache.slot_of) + len(rests), beyond)
        if more:
            if self.value is None:
                self.update_values()
            for rest in rests:              # it is had for less
                self.values[rest.key] *= REST * rest.size / rest.missing
            here, coming = cache.slot_of, {transfer.key for transfer in cache.queue}
            best = map(self.keys.__getitem__, np.argsort(-self.values, axis=None, kind="stable").tolist())
            absent = (key for key in best if (key not in here or key in coming) and key[0] != layer)
            wanted += islice(absent, more)
        cache.plan(wanted)

    def update_values(self) -> None:
        """Every expert's value: 1 if it is used now, DISCOUNT if a token from now, and so on: what is
        expected."""
        estimate, coming = self.forecast.estimate(self.state, self.lookahead), self.state % self.layers
        self.chance = estimate[coming].tolist()
        estimate[coming] = worth(estimate[coming], self.history.rates(coming))
        first = self.distance(0) - 1        # layers are visited in turn, so their distances are too
        self.values = self.discount[first:first + self.layers] * estimate
        self.value = self.values.tolist()   # (for one after the other)

    def worth(self, key: Key) -> float:
        if self.value is None:
            self.update_values()
        return self.value[key[0]][key[1]]

    def victim(self, key: Key, candidates: list[Slot], urgent: bool) -> Slot | None:
        if not self.thinks:
            return super().victim(key, candidates, urgent)
        worth, value = self.worth(key), self.value
        values = [value[layer][e] for layer, e in [slot.key for slot in candidates]]        # (this is hot)
        least, margin = min(values), 1 if self.distance(key[0]) == 1 else MARGIN
        return candidates[values.index(least)] if urgent or margin * least < worth else None
