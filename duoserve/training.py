"""How the predictor is trained, offline, from traces; predictor.py says what it is.

A sample is a decoded token. It is seen in all states, that is at each of the moments at which a scheduler
asks, and the targets are what the router of the next layer chooses, and when each other expert is used next.
Little data is enough: the MLP's first half is the same in all states, a hint's vote is one number for all
experts of a layer, and the less data there is, the more the MLP is regularised.
"""

from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import Progress, count
from .history import RECENT
from .predictor import DISCOUNT, HIDDEN, HINTS, Predictor, margin, worth
from .trace import Trace

BATCH = 64                                  # tokens a step, each in all states
EPOCHS, LEAST_STEPS = 10, 500
HELD = 4                                    # every fourth sequence is held out, to choose the net's share
SHARES = 0.8, 0.6, 0.4, 0.2, 0.0            # of the net in the forecast; 1.0 finds no more than 0.8
Weights = tuple[Tensor, ...]                # as in `Predictor.weights`


def chosen(trace: Trace, top_k: int) -> np.ndarray:
    """[tokens, layers, experts] float32: 1 for each layer's top_k, else 0."""
    use = np.zeros(trace.logits.shape, np.float32)
    np.put_along_axis(use, trace.top(top_k), 1.0, -1)
    return use


def worths(use: np.ndarray) -> np.ndarray:
    """`use` [tokens, layers, experts] -> what each expert is worth at each token: DISCOUNT ** (visits of its
    layer until it is chosen, 0 if it is now). After its end a sequence keeps its rates."""
    rate = (use.sum(0) + use[0].mean(-1, keepdims=True)) / (len(use) + 1)
    value, after = np.empty_like(use), worth(rate, rate)
    for t in reversed(range(len(use))):
        value[t] = after = np.where(use[t], 1, DISCOUNT * after)
    return value


@dataclass
class Samples:
    """What is known about each decoded token, and what it then chose; all float32.

    The hints `before` and `after` it was routed [tokens, HINTS, layers, experts]; the margins of its
    lookahead, `ahead` [tokens, layers, experts]; what was chosen, and what each expert was worth, for it and
    for the token after it: `now` and `then` [tokens, 2, layers, experts], NaN where there is none.
    """

    before: Tensor
    after: Tensor
    ahead: Tensor
    now: Tensor
    then: Tensor

    @classmethod
    def of(cls, traces: list[Trace], top_k: int) -> "Samples":
        parts = zip(*(cls._of(trace, top_k) for trace in traces))
        return cls(*(torch.from_numpy(np.concatenate(part).astype(np.float32)) for part in parts))

    @staticmethod
    def _of(trace: Trace, top_k: int) -> tuple[np.ndarray, ...]:
        tokens, p, use = len(trace.logits), trace.prompt, chosen(trace, top_k)
        recent = np.zeros_like(use)
        recent[p - 1] = use[:p].mean(0)                             # a prompt's use is its average
        for t in range(p, tokens):
            recent[t] = RECENT * recent[t - 1] + (1 - RECENT) * use[t]
        share = np.cumsum(use, 0) / np.arange(1, tokens + 1)[:, None, None]
        hints = np.stack((margin(trace.logits, top_k), recent, share), 1)[p - 1:]
        outcome = np.stack((use, worths(use)), 1)[p:]
        then = np.concatenate((outcome[1:], np.full_like(outcome[:1], np.nan)))
        return hints[:-1], hints[1:], margin(trace.lookahead, top_k)[p:], outcome, then

    def blind(self) -> "Samples":
        """The same without a lookahead: in its place are the router's logits for the token before."""
        return replace(self, ahead=self.before[:, 0])

    def known(self) -> Tensor:
        """The tokens after which the sequence goes on."""
        return (~self.then[:, 0, 0, 0].isnan()).nonzero()[:, 0]

    def at(self, pick: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Some of the tokens in all states: the hints of `Forecast.hints` [states, tokens, HINTS, layers,
        experts]; what each layer's next visit chooses, and all experts' worth, [states, tokens, layers,
        experts]."""
        layers = self.ahead.shape[1]
        here = torch.arange(layers)
        passed = (here < torch.arange(layers + 1)[:, None])[:, None, None, :, None]     # by state and layer
        hints = torch.where(passed, self.after[pick], self.before[pick])
        hints[here, :, 0, here] = self.ahead[pick].transpose(0, 1)
        return hints, *torch.where(passed, self.then[pick], self.now[pick]).unbind(2)


def logits(weights: Weights, hints: Tensor) -> Tensor:
    """What `Predictor` computes before the sigmoid, for many tokens in all states; shapes as in `at`."""
    _, w1, b1, w2, _ = weights
    z = (hints[:, :, 0].flatten(2) @ w1 + b1[:, None]).relu() @ w2
    return z.view_as(hints[:, :, 0]) + voted(weights, hints)


def voted(weights: Weights, hints: Tensor) -> Tensor:
    """The same without the MLP."""
    votes, *_, b2 = weights
    return torch.einsum("sthle,shl->stle", hints, votes) + b2.view(len(b2), 1, *hints.shape[3:])


def coming(z: Tensor) -> Tensor:
    """Of [states, tokens, layers, experts] each state's next layer, [tokens, states, experts]: layer 0 first,
    and layer 0 again in the last state."""
    states, _, layers, _ = z.shape
    state = torch.arange(states)
    return z[state, :, state % layers].transpose(0, 1)


def fit(samples: Samples, progress=lambda steps: None) -> tuple[Weights, Weights]:
    """-> the net's weights, and plain ones: no MLP, and for the next layer the lookahead's vote alone."""
    known, (_, layers, experts) = samples.known(), samples.ahead.shape
    states, wide = layers + 1, layers * experts
    state, here = torch.arange(states), torch.arange(layers)
    mean, std = samples.after.mean(0), samples.after.std(0).clamp(min=1e-3)
    scale = std.mean(-1)                    # one for all of a layer's experts
    mean, std = mean[0].flatten(), std[0].flatten()
    generator = torch.Generator().manual_seed(0)
    w1 = torch.randn(wide, HIDDEN, generator=generator) / wide ** 0.5
    b1, w2, b2 = torch.zeros(states, HIDDEN), torch.zeros(states, HIDDEN, wide), torch.zeros(states, wide)
    votes = torch.zeros(2, states, HINTS, layers)                   # the net's, and the plain ones
    base = torch.full((2, states, layers), -1.0)
    heard = torch.ones_like(votes)
    heard[1, here, 1:, here] = 0.0
    for p in (w1, b1, w2, b2, votes, base):
        p.requires_grad_()
    optimizer = torch.optim.AdamW([{"params": [w1, b1, w2, b2], "weight_decay": min(10, 2000 / len(known))},
                                   {"params": [votes, base], "weight_decay": 0.0}])     # these are few
    total = steps(len(samples.now))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, (8e-3, 0.3), total_steps=total)
    bce = F.binary_cross_entropy_with_logits

    def folded() -> tuple[Weights, Weights]:
        """The normalisation of the hints, folded into the weights."""
        (v, v_plain), (bias, bias_plain) = votes * heard / scale, base.repeat_interleave(experts, -1)
        first = w1 / std[:, None], b1 - (mean / std) @ w1
        return (v, *first, w2, bias + b2), (v_plain, *first, torch.zeros_like(w2), bias_plain)

    for _ in range(total):
        hints, use, target = samples.at(known[torch.randint(len(known), (BATCH,), generator=generator)])
        target[state, :, state % layers] = use[state, :, state % layers]
        net, plain = folded()
        # The next layer counts as much as all others: it decides what to prefetch.
        loss = sum(bce(z, target) + bce(coming(z), coming(use))
                   for z in (logits(net, hints), voted(plain, hints)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress(1)
    with torch.no_grad():
        return tuple(tuple(w.clone() for w in weights) for weights in folded())


def blend(net: Weights, plain: Weights, next_share: float, share: float) -> Weights:
    """The net's logits x a share + the plain ones x the rest; one share for the next layer, one for the
    others. The logits are linear in votes, w2 and b2, so this costs nothing at run time."""
    states, _, layers = net[0].shape
    shares = torch.full((states, layers), float(share))
    shares[torch.arange(states), torch.arange(states) % layers] = next_share
    wide = shares.repeat_interleave(net[4].shape[1] // layers, 1)
    mix = lambda i, part: net[i] * part + plain[i] * (1 - part)
    return mix(0, shares[:, None]), net[1], net[2], mix(3, wide[:, None]), mix(4, wide)


def predicted_logits(weights: Weights, samples: Samples) -> Tensor:
    """Logits of the next layer, each lookahead known: [tokens, layers, experts]."""
    parts = torch.arange(len(samples.now)).split(4 * BATCH)
    return torch.cat([coming(logits(weights, samples.at(pick)[0]))[:, :-1] for pick in parts])


def train(traces: list[Trace], top_k: int) -> tuple[np.ndarray, ...]:
    """-> `Predictor.weights`.

    A net that has seen little can be worse than the lookahead alone, and cross-entropy does not show it. So a
    net trained on three quarters of the sequences is blended with the plain weights, by the shares that find
    most on the rest; and then the net trained on all of them, by the same shares.
    """
    held, rest = traces[::HELD], [trace for i, trace in enumerate(traces) if i % HELD] or traces
    held, rest, everything = (Samples.of(part, top_k) for part in (held, rest, traces))
    total = steps(len(rest.now)) + steps(len(everything.now))
    with closing(Progress(total, "training steps", count)) as bar:
        parts = fit(rest, bar.add)
        found = {share: recall(blend(*parts, share, share), held, top_k) for share in SHARES}
        best = [max(SHARES, key=lambda share: found[share][i].mean()) for i in range(2)]
        weights = blend(*fit(everything, bar.add), *best)
    return tuple(w.contiguous().numpy() for w in weights)


def steps(tokens: int) -> int:
    return max(LEAST_STEPS, EPOCHS * tokens // BATCH)


def mean_recall(scores, use, top_k: int) -> np.ndarray:
    """[layers]: the share of the true top_k (`use` [samples, layers, experts], 0 or 1) in that by score."""
    best = np.argsort(-np.asarray(scores), -1, kind="stable")[..., :top_k]
    return np.take_along_axis(np.asarray(use), best, -1).mean((0, 2))


def recall(weights: Weights, samples: Samples, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """[layers] each: of the next layer, and of the next visits of all others, over all states."""
    found = []
    for pick in samples.known().split(4 * BATCH):
        hints, use, _ = samples.at(pick)
        best = logits(weights, hints).topk(top_k, -1).indices
        found.append(use.gather(-1, best).mean(-1))                 # [states, tokens, layers]
    found = torch.cat(found, 1).mean(1).numpy()
    states, layers = found.shape
    others = np.arange(states)[:, None] % layers != np.arange(layers)
    return found[:-1].diagonal(), (found * others).sum(0) / others.sum(0)


def recalls(traces: list[Trace], seen: list[Trace], predictor: Predictor,
            top_k: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """What each hint alone, and the net, find on `traces`: recall by name [layers], and of the next visits.

    `popularity` counts `seen`, the traces trained on; `history` is a net without the lookahead, trained for
    this report alone.
    """
    samples, weights = Samples.of(traces, top_k), tuple(map(torch.from_numpy, predictor.weights))
    history, _ = fit(Samples.of(seen, top_k).blind())
    use = [chosen(trace, top_k) for trace in traces]
    decoded = lambda parts: np.concatenate([part[trace.prompt:] for part, trace in zip(parts, traces)])
    scores = {"popularity": sum(chosen(t, top_k)[t.prompt:].sum(0) for t in seen),
              "previous": decoded([np.roll(u, 1, 0) for u in use]),
              "affinity": np.einsum("tli,lij->tlj", decoded(map(layer_before, use)), predictor.affinity),
              "lookahead": samples.ahead, "history": predicted_logits(history, samples.blind()),
              "full": predicted_logits(weights, samples)}
    truth = samples.now[:, 0].numpy()
    by_name = {name: mean_recall(np.broadcast_to(z, truth.shape), truth, top_k) for name, z in scores.items()}
    return by_name, recall(weights, samples, top_k)[1]


def layer_before(use: np.ndarray) -> np.ndarray:
    """[tokens, layers, experts]: what the layer before chose; for layer 0, the last token's last layer."""
    before = np.roll(use, 1, 1)
    before[1:, 0], before[0, 0] = use[:-1, -1], 0
    return before


def measure_affinity(traces: list[Trace], top_k: int) -> np.ndarray:
    """[layers, experts, experts]: how often expert j of a layer follows expert i of the layer before."""
    layers, experts = traces[0].logits.shape[1:]
    seen = np.full((layers, experts, experts), top_k / experts, np.float32)     # one pseudo-observation
    for trace in traces:
        use = chosen(trace, top_k)
        seen += np.einsum("tli,tlj->lij", layer_before(use), use)
    return seen / (seen.sum(-1, keepdims=True) / top_k)
