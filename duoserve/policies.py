"""The uniform baselines of the field, each the honest best version of its idea, on the same lane, slots and
kernels.

A uniform policy is one `ExpertScheduler` for both phases. What they share with ours: pinned memory, one copy
an expert, demands before guesses, every expert computed as soon as it is there. A file that defines one more
is a policy, too, wherever one is named.
"""

import runpy
from functools import cache
from pathlib import Path

import numpy as np

from .cache import Slot
from .errors import UserError, did_you_mean, note
from .history import Routing
from .link import Key
from .scheduler import DecodeScheduler, ExpertScheduler, PrefillScheduler, ranked


class OnDemand(ExpertScheduler):
    """Fetches when the routing is known and keeps nothing: the baseline of the paper (arXiv 2509.07379)."""

    def on_expert_done(self, key: Key) -> None:
        self.cache.drop(key)


class LayerPrefetch(ExpertScheduler):
    """Asks for the whole next layer; what finds no slot stays queued and is dropped when that layer is
    routed."""

    def on_routing(self, layer: int, routing: Routing) -> None:
        self.cache.plan([transfer.key for transfer in self.cache.queue if transfer.key in self.cache.needed])

    def plan_prefetch(self, layer: int, routing: Routing) -> None:
        following = (layer + 1) % self.layers
        self.cache.plan([(following, e) for e in range(self.experts_a_layer)])

    def victim(self, key: Key, candidates: list[Slot], urgent: bool) -> Slot | None:
        following = (self.layer + 1) % self.layers
        old = [slot for slot in candidates if slot.key[0] != following] or (candidates if urgent else [])
        return super().victim(key, old, urgent) if old else None


class Lru(ExpertScheduler):
    """One LRU over the whole pool, no prediction: `cache`."""


class LookaheadLru(ExpertScheduler):
    """Predicts the next layer's top_k by lookahead, keeps an LRU a layer, as mixtral-offloading does (arXiv
    2312.17238): evicts within a layer that holds its share, else the globally oldest."""

    def begin_step(self, lookahead: list[float] | None) -> None:
        self.predict(0, lookahead)

    def plan_prefetch(self, layer: int, routing: Routing) -> None:
        self.predict(layer + 1, routing.lookahead)

    def predict(self, layer: int, lookahead: list[float] | None) -> None:
        self.cache.plan([(layer, e) for e in ranked(lookahead)[:self.history.top_k]])

    def victim(self, key: Key, candidates: list[Slot], urgent: bool) -> Slot | None:
        share = max(1, len(self.cache.slots) // self.layers)
        own = [slot for slot in candidates if slot.key[0] == key[0]]
        full = sum(slot.key is not None and slot.key[0] == key[0] for slot in self.cache.slots) >= share
        return super().victim(key, own if own and full else candidates, urgent)


class Combined(LookaheadLru):
    """Predicts the next layer's top_k by lookahead, and for a guess always evicts somebody: whose share of
    this sequence's tokens is least, the further off its layer is the less. Nobody's, but what a good engineer
    would write in twelve lines, and ahead of what has been published."""

    def worth(self, key: Key) -> float:
        return self.history.share(*key) * 0.6 ** (self.distance(key[0]) / self.layers)

    def victim(self, key: Key, candidates: list[Slot], urgent: bool) -> Slot | None:
        return min(candidates, key=lambda slot: (self.worth(slot.key), self.last_used.get(slot.key, 0)))


class Score(Combined):
    """Evicts by a running mean of the router's scores, in which only the 2 top_k best of each time count:
    HybriMoE's cache (arXiv 2504.05897)."""

    def __init__(self, *of_request):
        super().__init__(*of_request)
        self.scores = np.zeros((self.layers, self.experts_a_layer))

    def on_routing(self, layer: int, routing: Routing) -> None:
        share = np.exp(np.asarray(routing.logits) - max(routing.logits))
        share /= share.sum()
        share[np.argsort(-share, kind="stable")[2 * len(routing.ids):]] = 0
        self.scores[layer] = (self.scores[layer] + share) / 2

    def worth(self, key: Key) -> float:
        return self.scores[key]


class Activation(ExpertScheduler):
    """Predicts the next layer's top_k by this sequence's counts and evicts by count, nearer layers weighing
    more, as MoE-Infinity does (arXiv 2401.14361)."""

    def plan_prefetch(self, layer: int, routing: Routing) -> None:
        following = (layer + 1) % self.layers
        counts = self.history.counts[following]
        best = sorted((e for e in range(self.experts_a_layer) if counts[e]), key=lambda e: -counts[e])
        self.cache.plan([(following, e) for e in best[:len(routing.ids)]])

    def worth(self, key: Key) -> float:
        return (self.history.share(*key) + 1e-6) * (1 - self.distance(key[0]) / (self.layers + 1))

    def victim(self, key: Key, candidates: list[Slot], urgent: bool) -> Slot | None:
        least = min(candidates, key=lambda slot: self.worth(slot.key))
        return least if urgent or self.worth(least.key) < self.worth(key) else None


# Name -> the schedulers of prefill and of decode. One for both is made once a request.
POLICIES = {"duo": (PrefillScheduler, DecodeScheduler), "on-demand": (OnDemand,) * 2,
            "layer-prefetch": (LayerPrefetch,) * 2, "cache": (Lru,) * 2, "lru": (LookaheadLru,) * 2,
            "activation": (Activation,) * 2, "score": (Score,) * 2, "combined": (Combined,) * 2}


def load_policy(policy: str | Path, flag: str = "--policy", more: tuple[str, ...] = ()) -> tuple[type, type]:
    """The schedulers of a policy, by its name or from a file that defines one subclass of `ExpertScheduler`;
    `UserError` if it is neither (`more`: names that are known elsewhere)."""
    if policy in POLICIES:
        return POLICIES[policy]
    path = Path(str(policy))
    if path.suffix != ".py":
        known, name = (*POLICIES, *more), str(policy)
        raise UserError(f"{flag} {name}: unknown{did_you_mean(name, known)}; choose from {', '.join(known)}, "
                        "or give a FILE.py")
    if not path.is_file():
        raise UserError(f"{flag} {path}: no such file")
    return (defined_in(str(path), path.stat().st_mtime_ns),) * 2


@cache
def defined_in(path: str, changed: int) -> type:
    """The policy in a file, which is run once for each time it was `changed`."""
    try:
        names = runpy.run_path(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (Exception, SystemExit) as error:
        raise UserError(f"{path}: does not run as a policy ({type(error).__name__}: {error})") from error
    own = [thing for thing in names.values() if isinstance(thing, type) and issubclass(thing, ExpertScheduler)
           and thing.__module__ == names["__name__"]]
    if len(own) != 1:
        raise UserError(f"{path}: defines {len(own)} subclasses of ExpertScheduler; it takes one")
    hooks = [name for name in vars(ExpertScheduler) if not name.startswith("_")]
    for name in vars(own[0]):
        if not name.startswith("_") and name not in hooks and (meant := did_you_mean(name, hooks)):
            note(f"{path}: {name} is no method that a policy is asked{meant}")
    return own[0]


def schedulers(policy: str, *of_request) -> tuple[ExpertScheduler, ExpertScheduler]:
    """-> a request's schedulers for prefill and for decode: (cache, history, forecast, tokens of its
    prompt)."""
    prefill, decode = load_policy(policy)
    first = prefill(*of_request)
    return first, first if decode is prefill else decode(*of_request)
