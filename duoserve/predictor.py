"""The tiny per-layer predictor: which experts will a layer want, before its router has spoken?

The strongest hint needs no training: the *lookahead*, layer l's router applied to the residual stream as it is before
layer l-1's experts have run. Beside it stand the routing just seen, the same layer's for the last token, what this
sequence has used so far, and which experts follow which (affinity, from the traces). Each hint votes for its experts
with one weight a layer, and a small MLP corrects the sum: so little data goes a long way. A second such net, without
what only this token can tell, says how likely each expert is at its layer's next visit: eviction ranks by that.
(DuoServe-MoE, arXiv 2509.07379, has the history; the lookahead is mixtral-offloading's, arXiv 2312.17238.)
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

from .errors import UserError
from .files import TensorWriter, atomic
from .history import RECENT, History
from .trace import Trace

HIDDEN = 32
# Feature groups, each [experts] wide, in the order of `features`.
GROUPS = ("lookahead", "previous_layer", "affinity", "last_token", "recent", "share")
NETS = {"full": GROUPS, "history": GROUPS[1:], "next": GROUPS[3:]}      # the paper's inputs are "history"
USED = ("full", "next")                     # "history" is for the report alone


def margin(logits: np.ndarray, top_k: int) -> np.ndarray:
    """How far each logit lies above the middle between the last that is in the top_k and the first that is not."""
    ranked = np.sort(logits, -1)            # (with as many experts as top_k there is no line: take the last)
    return logits - (ranked[..., -top_k, None] + ranked[..., max(-top_k - 1, -ranked.shape[-1]), None]) / 2


def soft(z: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(z / 2))       # the logistic function, without overflow


class Predictor:
    """Trained weights, run with a few numpy lines: `weights[net] = (votes, w1, b1, w2, b2)`, each a row a layer."""

    def __init__(self, weights: dict[str, tuple[np.ndarray, ...]], affinity: np.ndarray, model: str):
        self.weights, self.affinity, self.model = weights, affinity, model

    def __call__(self, net: str, layer: int, x: np.ndarray) -> list[float]:
        """x [features] -> each expert's chance of being among the layer's top_k."""
        votes, w1, b1, w2, b2 = (w[layer] for w in self.weights[net])
        z = votes @ x.reshape(len(votes), -1) + np.maximum(x @ w1 + b1, 0) @ w2 + b2
        return soft(z).tolist()

    def scores(self, net: str, x: np.ndarray) -> np.ndarray:
        """All layers at once, for the report: x [samples, layers, features] -> logits [samples, layers, experts]."""
        votes, w1, b1, w2, b2 = self.weights[net]
        x = x[..., -w1.shape[1]:]
        h = np.maximum(np.einsum("sli,lih->slh", x, w1) + b1, 0)
        grouped = x.reshape(*x.shape[:2], votes.shape[1], -1)
        return np.einsum("slge,lg->sle", grouped, votes) + np.einsum("slh,lho->slo", h, w2) + b2

    def popularity(self) -> np.ndarray:
        """[layers, experts]: each expert's share of the traces' tokens, as the affinity table implies it."""
        layers, experts, _ = self.affinity.shape
        share = np.full((layers, experts), 1 / experts)
        for layer in [*range(layers)] * 8:                          # forgets where it began in a few rounds
            share[layer] = share[layer - 1] @ self.affinity[layer]
            share[layer] /= share[layer].sum()
        return share

    def save(self, path: Path) -> None:
        tensors = {f"{net}.{i}": torch.from_numpy(w) for net in USED for i, w in enumerate(self.weights[net])}
        tensors["affinity"] = torch.from_numpy(self.affinity)
        with atomic(Path(path)) as file:
            shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
            writer = TensorWriter(file, shapes, {"model": self.model, "version": "1"})
            for name, tensor in tensors.items():
                writer.write(name, tensor)
            writer.close()

    @classmethod
    def read(cls, path: Path, model: str, layers: int, experts: int) -> "Predictor":
        """`UserError` if it is missing, damaged, or another model's."""
        check_exists(path)
        try:
            with safe_open(path, "np") as file:
                meta = file.metadata() or {}
                weights = {net: tuple(file.get_tensor(f"{net}.{i}") for i in range(5)) for net in USED}
                affinity = file.get_tensor("affinity")
        except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
            raise UserError(f"{path}: not a predictor, or damaged ({error}); "
                            "train it again with train_predictor.py") from None
        if meta.get("model") != model or meta.get("version") != "1":
            raise UserError(f"{path}: a predictor of model {meta.get('model')}, not of this one ({model}); "
                            "train one on this model's traces with train_predictor.py")
        if affinity.shape != (layers, experts, experts) or any(
                votes.shape != (layers, len(NETS[net])) or w1.shape != (layers, experts * len(NETS[net]), HIDDEN)
                or b1.shape != (layers, HIDDEN)
                or w2.shape != (layers, HIDDEN, experts) or b2.shape != (layers, experts)
                for net, (votes, w1, b1, w2, b2) in weights.items()):
            raise UserError(f"{path}: its shapes do not fit this model; train it again with train_predictor.py")
        return cls(weights, affinity, model)


def check_exists(path: str | Path) -> None:
    if not Path(path).exists():
        raise UserError(f"{path}: no such predictor; train one with train_predictor.py, or say --predictor none")


class Forecast:
    """What a scheduler asks: chances for the layer that comes next, and for a layer's next visit.

    Without a predictor the lookahead alone, and the last token's routing, stand in for one.
    """

    def __init__(self, history: History, predictor: Predictor | None, top_k: int):
        self.history, self.predictor, self.top_k = history, predictor, top_k
        self.remembered: dict[int, tuple] = {}                      # by layer: after how many tokens, what `_own` said

    def next_layer(self, layer: int, lookahead: list[float]) -> list[float]:
        """Chances [experts] for the layer whose lookahead this is."""
        ahead = margin(np.asarray(lookahead, np.float32), self.top_k)
        if self.predictor is None:
            return soft(1.5 * ahead).tolist()
        h, before = self.history, layer - 1                         # (layer 0 comes after the last layer)
        ids = h.ids[before]
        return self.predictor("full", layer, np.concatenate((
            ahead, self._own(before % h.layers)[0], self.predictor.affinity[layer][ids].sum(0) / max(1, len(ids)),
            *self._own(layer))))

    def next_visit(self, layer: int) -> list[float]:
        """Chances [experts] for a layer's next visit, from what its last one showed."""
        if self.predictor is None:
            last, recent, _ = self._own(layer)
            return (0.5 * soft(0.5 * last) + 0.5 * recent).tolist()
        return self.predictor("next", layer, np.concatenate(self._own(layer)))

    def _own(self, layer: int) -> tuple[np.ndarray, ...]:
        h, (tokens, own) = self.history, self.remembered.get(layer, (None, None))
        if tokens != h.tokens[layer]:
            tokens = h.tokens[layer]
            own = margin(h.logits[layer], self.top_k), h.recent[layer], h.counts[layer] / max(1, tokens)
            self.remembered[layer] = tokens, own
        return own


def trace_features(trace: Trace, top_k: int, affinity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features [decode tokens, layers, 6 x experts] and targets [.., experts] of a trace, as `Forecast` sees them."""
    tokens, layers, experts = trace.logits.shape
    chosen = np.zeros(trace.logits.shape, np.float32)
    top = trace.top(top_k)
    np.put_along_axis(chosen, top, 1.0, -1)
    p = trace.prompt
    recent = np.empty((tokens - p, layers, experts), np.float32)
    now = chosen[:p].mean(0)
    for t in range(p, tokens):
        recent[t - p] = now
        now = RECENT * now + (1 - RECENT) * chosen[t]
    share = np.cumsum(chosen, 0)[p - 1:tokens - 1] / np.arange(p, tokens)[:, None, None]
    log = margin(trace.logits, top_k)
    # The layer before is this token's; before layer 0 comes the last token's last layer.
    before, before_top = np.roll(log, 1, 1)[p:], np.roll(top, 1, 1)[p:]
    before[:, 0], before_top[:, 0] = log[p - 1:tokens - 1, -1], top[p - 1:tokens - 1, -1]
    followed = affinity[np.arange(layers)[:, None], before_top].mean(-2)
    x = np.concatenate((margin(trace.lookahead, top_k)[p:], before, followed, log[p - 1:tokens - 1], recent, share), -1)
    return x.astype(np.float32), chosen[p:]


def all_features(traces: list[Trace], top_k: int, affinity: np.ndarray) -> tuple[np.ndarray, ...]:
    """`trace_features` of several traces, one after the other."""
    return tuple(map(np.concatenate, zip(*(trace_features(trace, top_k, affinity) for trace in traces))))


def measure_affinity(traces: list[Trace], top_k: int) -> np.ndarray:
    """[layers, experts, experts]: how often expert j of layer l is chosen, given expert i of the layer before."""
    layers, experts = traces[0].logits.shape[1:]
    seen = np.full((layers, experts, experts), top_k / experts, np.float32)     # one pseudo-observation
    for trace in traces:
        chosen = np.zeros(trace.logits.shape, np.float32)
        np.put_along_axis(chosen, trace.top(top_k), 1.0, -1)
        before = np.roll(chosen, 1, 1)
        before[1:, 0], before[0, 0] = chosen[:-1, -1], 0
        seen += np.einsum("tli,tlj->lij", before, chosen)
    return seen / (seen.sum(-1, keepdims=True) / top_k)


def mean_recall(scores: np.ndarray, chosen: np.ndarray, top_k: int) -> np.ndarray:
    """[layers]: the share of the true top_k (`chosen` [samples, layers, experts], 0 or 1) among the top_k by score."""
    best = np.argsort(-scores, -1, kind="stable")[..., :top_k]
    return np.take_along_axis(chosen, best, -1).mean((0, 2))


def train_nets(x: np.ndarray, y: np.ndarray, seed: int = 0, epochs: int = 12,
               progress=None) -> dict[str, tuple[np.ndarray, ...]]:
    """Votes and an MLP a layer for each net, all layers at once: x [samples, layers, features], y [.., experts].

    `progress(total, label)` makes a progress display; it counts steps.
    """
    weights, experts, batch = {}, y.shape[-1], 256
    steps = max(400, epochs * len(x) // batch)
    bar = progress(len(NETS) * steps, "training steps") if progress else None
    targets = torch.from_numpy(np.ascontiguousarray(y.swapaxes(0, 1)))
    for net, groups in NETS.items():
        first = GROUPS.index(groups[0]) * experts
        raw = torch.from_numpy(np.ascontiguousarray(x[..., first:].swapaxes(0, 1)))         # [layers, samples, in]
        layers, samples, wide = raw.shape
        mean, std = raw.mean(1, keepdim=True), raw.std(1, keepdim=True).clamp(min=1e-3)
        scale = std.view(layers, len(groups), experts).mean(-1)     # a hint's, one for all experts
        generator = torch.Generator().manual_seed(seed)
        w1 = torch.randn(layers, wide, HIDDEN, generator=generator) / wide ** 0.5
        w2, votes = torch.zeros(layers, HIDDEN, experts), torch.zeros(layers, len(groups))
        b1, b2 = torch.zeros(layers, 1, HIDDEN), torch.full((layers, 1, experts), -1.0)
        for p in (votes, w1, b1, w2, b2):
            p.requires_grad_()
        rates = 8e-3, 8e-2
        # The MLP is held back the more, the less there is to learn from; the votes are few enough to go free.
        optimizer = torch.optim.AdamW([{"params": [w1, w2, b1, b2], "weight_decay": min(10, 2000 / samples)},
                                       {"params": [votes], "weight_decay": 0.0}])
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps)
        for _ in range(steps):
            pick = torch.randint(samples, (batch,), generator=generator)
            part = raw[:, pick]
            voted = (part.unflatten(-1, (len(groups), experts)) * (votes / scale)[:, None, :, None]).sum(2)
            z = voted + (((part - mean) / std) @ w1 + b1).relu() @ w2 + b2
            loss = F.binary_cross_entropy_with_logits(z, targets[:, pick])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if bar:
                bar.add(1)
        with torch.no_grad():               # fold the normalisation into the weights
            w1 = w1 / std.transpose(1, 2)
            b1 = b1 - mean @ w1
            weights[net] = tuple(w.detach().numpy() for w in (votes / scale, w1, b1[:, 0], w2, b2[:, 0]))
    if bar:
        bar.close()
    return weights
