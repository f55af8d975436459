"""What the routers of one request have done so far: plain numbers, read by the predictor, by eviction and by
policies."""

from dataclasses import dataclass
from operator import add

import numpy as np

RECENT = 0.7                                # decay of the recent-use average, per token


@dataclass(slots=True)
class Routing:
    """What one layer's router decided, as plain Python: all that the host needs to know of a pass.

    `counts[e]`: tokens of this pass that go to expert e. The rest is of the pass's last token: `ids[k]` and
    `weights[k]` of its experts in rank order, `logits[e]`, and `lookahead[e]`: what the *next* layer's router
    says to the residual stream as it is before this layer's experts have run (None at the last layer).
    """

    counts: list[int]
    ids: list[int]
    weights: list[float]
    logits: list[float]
    lookahead: list[float] | None

    @classmethod
    def unpack(cls, values: list[float], experts: int, top_k: int) -> "Routing":
        a, b, c = experts, experts + top_k, experts + 2 * top_k
        counts, ids = [int(n) for n in values[:a]], [int(e) for e in values[a:b]]
        return cls(counts, ids, values[b:c], values[c:c + experts], values[c + experts:] or None)


class History:
    """One request's routing so far; fed after every router, read by predictor, eviction and policies.

    Everything about a layer ahead of the current one is known up to the previous token only. `counts
    [layers][experts]`: tokens of this request; `logits`, `recent [layers][experts]`: the router's logits for
    the last token, and the decaying average of use; `ids [layers]`: the last token's experts. Plain lists, as
    a layer is noted between its router and its experts, where numpy would take ten times as long.
    """

    def __init__(self, layers: int, experts: int):
        self.layers, self.experts, self.top_k = layers, experts, 1
        self.tokens = [0] * layers
        self.counts, self.recent, self.logits = ([[0.0] * experts for _ in range(layers)] for _ in range(3))
        self.ids: list[list[int]] = [[] for _ in range(layers)]

    def observe(self, layer: int, routing: Routing) -> None:
        tokens = sum(routing.counts) // max(1, len(routing.ids))
        keep = RECENT if tokens == 1 and self.tokens[layer] else 0.0     # a prompt's use is its average
        each = (1 - keep) / tokens
        self.recent[layer] = [keep * share + each * n for share, n in zip(self.recent[layer], routing.counts)]
        self.counts[layer] = list(map(add, self.counts[layer], routing.counts))
        self.tokens[layer] += tokens
        self.logits[layer] = routing.logits
        self.ids[layer] = routing.ids
        self.top_k = len(routing.ids)

    def share(self, layer: int, expert: int) -> float:
        """Of this request's tokens, those that chose an expert."""
        return self.counts[layer][expert] / max(1, self.tokens[layer])

    def rates(self, layers: int | slice = slice(None)) -> np.ndarray:
        """How often this request's tokens choose each expert of a layer, or of some; a few tokens say little,
        so four even ones are added."""
        tokens = np.array(self.tokens[layers])[..., None]
        return (np.array(self.counts[layers]) + 4 * self.top_k / self.experts) / (tokens + 4)
