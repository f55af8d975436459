"""The tiny predictor: which experts will each layer want, before its routing is known?

The strongest hint needs no training: the *lookahead*, layer l's router applied to the residual stream as it
is before layer l-1's experts have run. It is known of the layer that comes next. Of every other layer it is
known what its router said last: for this token if it has run already, else for the one before; and what
this sequence used of late, and in all. Each hint votes for its own expert. A small MLP that hears all
routers at once corrects the sum, as what one layer chose says much about the others. Of the layer that
comes next it tells each expert's *chance*, for prefetching; of all others what the expert is *worth*, for
eviction: the sooner it is used, the more.

What is known of which layer depends on how many have been routed. That is the *state*, and each state has its
own votes and its own second half of the MLP. In state 0 a token begins; layer 0's lookahead is known. In
the last one all layers are routed, and there is no lookahead yet. (DuoServe-MoE, arXiv 2509.07379,
predicts from what earlier layers chose; the lookahead is mixtral-offloading's, arXiv 2312.17238. How all
this is trained is in training.py.)
"""

from pathlib import Path

import numpy as np
import torch

from .errors import UserError
from .files import Header, write_tensors
from .history import History

HIDDEN = 96
HINTS = 3                                   # of each expert: margin of its logit, recent use, share of tokens
TENSORS = "votes", "w1", "b1", "w2", "b2", "affinity"
DISCOUNT = 0.75                             # what an expert in a slot is worth if its use is a token away
VERSION = "2"                               # of the file: 1 had nets for each layer by itself
AGAIN = "train it again with train_predictor.py"


def margin(logits: np.ndarray, top_k: int) -> np.ndarray:
    """How far each logit lies above the middle between the last that is in the top_k and the first that is
    not."""
    ranked = np.sort(logits, -1)            # (with as many experts as top_k there is no line: take the last)
    return logits - (ranked[..., -top_k, None] + ranked[..., max(-top_k - 1, -ranked.shape[-1]), None]) / 2


def sigmoid(z: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(z / 2))       # the logistic function, without overflow


def worth(chance, rate):
    """What an expert is worth at its layer's next visit: 1 if it is chosen, DISCOUNT if it is at the one
    after that, and so on. With this chance it is; else at every later visit with chance `rate`: a geometric
    series."""
    return chance + (1 - chance) * rate * DISCOUNT / (1 - DISCOUNT * (1 - rate))


class Predictor:
    """Trained weights, run with a few numpy lines.

    `weights`, float32, w1 shared and the others with a row for each state: votes [states, HINTS, layers], w1
    [layers * experts, HIDDEN], b1 [states, HIDDEN], w2 [states, HIDDEN, layers * experts], b2 [states, layers
    * experts]. `affinity [layers, experts, experts]`: how often expert j of a layer is chosen, given expert i
    of the layer before, in the traces.
    """

    def __init__(self, weights: tuple[np.ndarray, ...], affinity: np.ndarray, model: str):
        self.weights, self.affinity, self.model = weights, affinity, model

    def __call__(self, state: int, hints: np.ndarray) -> np.ndarray:
        """hints [HINTS, layers, experts] -> [layers, experts]: chances for the layer that comes next (state %
        layers), for the others what each expert is `worth` at its layer's next visit."""
        votes, w1, b1, w2, b2 = self.weights
        # (einsum stays in this thread; `@` would wake all of BLAS's for a product that one does in 5 us)
        z = np.maximum(np.einsum("i,ij->j", hints[0].ravel(), w1) + b1[state], 0)
        z = np.einsum("i,ij->j", z, w2[state]) + b2[state]
        return sigmoid(z.reshape(hints[0].shape) + (hints * votes[state][..., None]).sum(0))

    def popularity(self) -> np.ndarray:
        """[layers, experts]: each expert's share of the traces' tokens, as the affinity table implies it."""
        layers, experts, _ = self.affinity.shape
        share = np.full((layers, experts), 1 / experts)
        for layer in [*range(layers)] * 8:                          # forgets where it began in a few rounds
            share[layer] = share[layer - 1] @ self.affinity[layer]
            share[layer] /= share[layer].sum()
        return share

    def save(self, path: Path) -> None:
        tensors = dict(zip(TENSORS, map(torch.from_numpy, (*self.weights, self.affinity))))
        shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        write_tensors(Path(path), shapes, {"model": self.model, "version": VERSION}, tensors.items())

    @classmethod
    def read(cls, path: Path, model: str, layers: int, experts: int) -> "Predictor":
        """`UserError` if it is missing, damaged, another version's or another model's."""
        check_exists(path)
        header = Header(path)
        version, made_for = header.metadata.get("version", VERSION), header.metadata.get("model")
        if version != VERSION:
            raise UserError(f"{path}: predictor version {version}, this reads version {VERSION}; {AGAIN}, or "
                            "say --predictor none")
        if made_for != model:
            raise UserError(f"{path}: a predictor of model {made_for}, not of this one ({model}); train one "
                            "on this model's traces with train_predictor.py")
        states, wide = layers + 1, layers * experts
        shapes = ((states, HINTS, layers), (wide, HIDDEN), (states, HIDDEN), (states, HIDDEN, wide),
                  (states, wide), (layers, experts, experts))
        if any(header.tensors.get(name, ())[:2] != (torch.float32, shape)
               for name, shape in zip(TENSORS, shapes)):
            raise UserError(f"{path}: its shapes do not fit this model; {AGAIN}")
        *weights, affinity = (header.read(name).numpy() for name in TENSORS)
        return cls(tuple(weights), affinity, model)


def open_predictor(named: str | Path | None, own: Path, model: str, config) -> Predictor | None:
    """The predictor that is named; for None the model's `own`, if there is one; for "none" none."""
    if named == "none" or named is None and not own.exists():
        return None
    return Predictor.read(Path(named or own), model, config.num_hidden_layers, config.num_local_experts)


def check_exists(path: str | Path) -> None:
    if not Path(path).exists():
        raise UserError(f"{path}: no such predictor; train one with train_predictor.py, or say --predictor "
                        "none")


class Forecast:
    """What a scheduler asks. Without a `predictor` the lookahead, and the last token's routing, stand in for
    one; what is far off is then hardly known."""

    def __init__(self, history: History, predictor: Predictor | None, top_k: int):
        self.history, self.predictor, self.top_k = history, predictor, top_k
        self.known = np.empty((HINTS, history.layers, history.experts), np.float32)
        self.seen = [-1] * history.layers   # tokens of each layer that its hints know of

    def estimate(self, state: int, lookahead: list[float] | None) -> np.ndarray:
        """[layers, experts], when `state` layers of this token are routed: for the layer that comes next
        (state % layers), whose lookahead this is (None: not known yet), chances of being in the top_k; for
        the others `worth`."""
        hints = self.hints(state, lookahead)
        if self.predictor is not None:
            return self.predictor(state, hints)
        chance = 0.5 * sigmoid(0.5 * hints[0]) + 0.5 * hints[1]
        estimate, coming = worth(chance, self.history.rates()), state % self.history.layers
        estimate[coming] = chance[coming] if lookahead is None else sigmoid(1.5 * hints[0, coming])
        return estimate

    def hints(self, state: int, lookahead: list[float] | None) -> np.ndarray:
        """[HINTS, layers, experts] float32, those of `training.Samples.at`; until it is called again."""
        h, hints = self.history, self.known
        for layer, tokens in enumerate(h.tokens):
            if self.seen[layer] != tokens:
                hints[0, layer] = margin(np.array(h.logits[layer], np.float32), self.top_k)
                hints[1, layer], hints[2, layer] = h.recent[layer], np.array(h.counts[layer]) / max(1, tokens)
                self.seen[layer] = tokens
        if lookahead is not None:
            hints[0, state] = margin(np.array(lookahead, np.float32), self.top_k)
            self.seen[state] = -1           # (not what its router said)
        return hints
