"""Mixtral's shapes without its weights: random bytes, and decode routed as a made-up trace says.

The experts are random 4-bit bytes, different for each and really pinned; attention, router and head are
random too, and run. Only the routing of decode is made up, since random weights route like no language model:
the next token chooses an expert again with chance `--persistence`, and the lookahead finds a chosen expert
with chance `--lookahead-recall` (0.30 and 0.8 are near what is published for Mixtral).
"""

import gc
import queue
import threading
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from ..config import MixtralConfig
from ..engine import Engine
from ..experts import StreamedExperts
from ..model import Layer, Router
from ..options import EngineOptions
from ..packed import ModelShapes
from ..predictor import Predictor
from ..store import ExpertStore
from ..training import measure_affinity, train
from .replay import synthetic_traces

LEARNED = 24                                # made-up sequences that duo's predictor is trained on


class RandomModel(ModelShapes):
    """Stands in for a `PackedModel`: its shapes, and random bytes that keep activations finite."""

    fingerprint, directory = "random", Path("random weights")

    def __init__(self, config: MixtralConfig, device: torch.device):
        super().__init__(config)
        self.device, self.left = device, len(config.expert_keys)
        self.blocks, self.lock = queue.SimpleQueue(), threading.Lock()
        for _ in range(2):
            self.blocks.put(None)           # memory to make an expert in, when it is needed

    def tokenizer(self):
        """A stand-in: every id is a token without text, and none ends the answer."""
        return SimpleNamespace(eos=(), sp=SimpleNamespace(vocab_size=lambda: 0), check=lambda size: None)

    def _fill(self, name: str, tensor: torch.Tensor) -> None:
        if tensor.dtype == torch.uint8:
            tensor.random_()
        elif name.endswith(".scale"):       # 4.6: a random nibble's standard deviation; 128 columns a group
            each = 1 / (4.6 * (128 * tensor.shape[-1]) ** 0.5)
            if ".o." in name or name.startswith("w2."):             # these add to the residual stream
                each /= (2 * self.config.num_hidden_layers) ** 0.5
            tensor.uniform_(0.8 * each, 1.2 * each)
        elif name.endswith(".zero"):
            tensor.uniform_(7, 8)
        elif "norm" in name:
            tensor.fill_(1)
        else:
            tensor.normal_(0, 1 if "embed" in name else tensor.shape[-1] ** -0.5)

    def resident(self) -> dict[str, torch.Tensor]:
        """What stays on the device, made there."""
        dtypes, out = {"16": torch.bfloat16, "u8": torch.uint8, "f16": torch.float16}, {}
        for name, (kind, shape) in self.shapes.items():
            out[name] = torch.empty(shape, dtype=dtypes[kind], device=self.device)
            self._fill(name, out[name])
        return out

    def read_expert(self, layer: int, expert: int, into: np.ndarray) -> None:
        """Made on the device and copied down; two at a time, as the memory plan has no room for more."""
        block, stream = self.blocks.get() or self._block()
        with torch.cuda.stream(stream):
            for name, view in self.layout.views(block).items():
                self._fill(name, view)
            torch.from_numpy(into).copy_(block)
        self.blocks.put((block, stream))
        with self.lock:
            self.left -= 1
            if not self.left:               # give the memory back before anything else needs it
                del block
                self.blocks = None
                release()

    def _block(self) -> tuple[torch.Tensor, torch.cuda.Stream | None]:
        stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        return torch.empty(self.layout.nbytes, dtype=torch.uint8, device=self.device), stream


class MadeUpRouter(Router):
    """In decode it says what a made-up trace says of this token: `table [2, steps, experts]`, on the device,
    holds its own logits and the lookahead, `here [1]` is the step. Its product is computed all the same."""

    def forward(self, x, ahead: int = 0):
        logits = super().forward(x)         # (a compiler drops what is multiplied by zero)
        if len(x) > 1:
            return logits
        return torch.where(logits.isnan(), logits, self.table[ahead, self.here].to(x.dtype))


class MadeUpLayer(Layer):
    def gate(self, h):
        return self.router(self.ffn_norm(h), 1)


class MadeUpEngine(Engine):
    """Routes decode as a made-up trace says. (Random weights route like no language model.)"""

    def _open_store(self, progress, loading):
        store = super()._open_store(progress, loading)
        store.wait()                        # (random bytes are made on the device, before it is full)
        return store

    def _make_model(self, linear):
        model, c, device = super()._make_model(linear), self.config, self.device
        self.here = torch.zeros(1, dtype=torch.long, device=device)
        self.tables = torch.zeros(c.num_hidden_layers, 2, self.context, c.num_local_experts, device=device)
        for layer, steps in zip(model.layers, self.tables):
            layer.__class__, layer.router.__class__ = MadeUpLayer, MadeUpRouter
            layer.router.table, layer.router.here = steps, self.here
        return model

    @torch.inference_mode()
    def follow(self, trace) -> None:
        """From now on decode routes as in this trace."""
        steps = torch.from_numpy(np.stack((trace.logits, trace.lookahead), 1)[trace.prompt:])
        self.tables[:, :, :len(steps)] = steps.permute(2, 1, 0, 3)
        self.source.start_anew()


class CountingExperts(StreamedExperts):
    """Decode's steps are counted, so that the made-up routers know where they are.

    `totals` collects after each layer visit of decode how many experts have had to cross the link so far
    (misses and used prefetches), and how many the host has computed; `used` counts those that got a token in
    prefill.
    """

    def start_anew(self) -> None:
        self.totals, self.used, self.prefill_busy = [], 0, None
        self.here.fill_(-1)                 # (the table's last row is empty: for a prompt of one token)

    def begin(self, scheduler, start, tokens, decoding) -> None:
        super().begin(scheduler, start, tokens, decoding)
        if decoding:
            self.here.add_(1)
            if self.prefill_busy is None:   # what the lane had done when decode began
                self.lane.poll()
                self.lane.look()
                self.prefill_busy = self.lane.busy

    def read(self, layer, numbers, rows=None, x=None):
        routing = super().read(layer, numbers, rows, x)
        self.used += 0 if self.decoding else sum(n > 0 for n in routing.counts)
        return routing

    def end_layer(self, layer) -> None:
        super().end_layer(layer)
        if self.decoding:
            counts = self.cache.counts
            self.totals.append((counts.misses + counts.prefetched_used, counts.host_experts))


def release() -> None:
    """Give back what torch keeps of the device's memory and no tensor needs."""
    gc.collect()
    torch.cuda.empty_cache()                # (does nothing where CUDA is not used)


def build(model: RandomModel, args, store: ExpertStore | None, **memory) -> Engine:
    """An engine with made-up routing in decode; a later one takes over the first one's host memory."""
    release()
    options = EngineOptions(device=args.device, context=args.context, predictor="none", compile=args.compile,
                            simulate_link=args.simulate_link, host_threads=args.host_threads,
                            simulate_host=args.simulate_host, **memory)
    engine = MadeUpEngine(model, options, store=store)
    engine.source = CountingExperts(model.config, engine.source.slots, engine.cache)
    engine.source.here = engine.here
    if engine.host is not None:             # (for the first time it takes a minute to compile)
        engine.host.ready.wait()
    return engine


def request(engine: Engine, policy: str, tokens: int, new: int, trace, seed: int = 0):
    """Greedy decoding after a random prompt -> `Generation`."""
    engine.policy = policy
    engine.follow(trace)
    ids = np.random.default_rng(seed).integers(3, engine.config.vocab_size, tokens).tolist()
    return engine.generate(ids, max_new_tokens=new, temperature=0)


@cache
def made_up(config: MixtralConfig, persistence: float, recall: float, rounds: int, new: int, predict: bool):
    """-> a trace for each round, and a predictor trained on others of the same kind."""
    k, sequences = config.num_experts_per_tok, rounds + predict * LEARNED
    traces = synthetic_traces(config, persistence, recall, sequences, 2, new)
    traces, others = traces[:rounds], traces[rounds:]
    return traces, Predictor(train(others, k), measure_affinity(others, k), "random") if predict else None
