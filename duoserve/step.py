"""One token through the model, in pieces of fixed shape: each piece is one CUDA graph where there is CUDA.

A decode step is some twenty small kernels a layer, and launching them costs the host more than running them
costs the GPU. But the host reads each router before it knows which slots to compute with, so the step is
split there: piecewise CUDA graphs, each captured once and replayed as a whole. There is one piece a layer, up
to the router's choice, and one for each slot and rank, since a graph's addresses are fixed. What passes from
piece to piece lies in buffers of its own, and all that changes from token to token is read from the device.
"""

import gc
from contextlib import closing
from functools import partial
from typing import Callable

import torch
from torch import Tensor

from .model import Expert, Mixtral, combine_experts, padded, rope_table
from .quant import compiled


class DecodeStep:
    """`step(token, position, source)` -> logits of the next token. kv [N, 2, G, C, A]: the cache; `slots`:
    the experts.

    C is a multiple of PADDING, and what was never written is finite. Eager, a piece is run as it stands; with
    `compile` it is fused by torch.compile, and captured if the device is CUDA.
    """

    def __init__(self, model: Mixtral, slots: list[Expert], kv: Tensor, compile: bool):
        c, device = model.config, kv.device
        self.model, self.slots, self.kv = model, slots, kv
        D, K = c.hidden_size, c.num_experts_per_tok
        new = partial(torch.zeros, device=device, dtype=kv.dtype)
        self.token, self.position = new(1, dtype=torch.long), new(1, dtype=torch.long)
        self.rope = new(2, 1, c.head_dim, dtype=torch.float32)
        self.h, self.x, self.expert_out = new(1, D), new(1, D), new(1, K, D)
        self.weights, self.logits = new(1, K, dtype=torch.float32), new(c.vocab_size, dtype=torch.float32)
        self.lookahead = new(c.num_local_experts, dtype=torch.float32)      # of layer 0
        E = c.num_local_experts             # what the host reads of a layer, and of the last one
        self.numbers = [new(n * E + 2 * K, dtype=torch.float32) for n in (3, 2)]
        self.keys = self.context = kv.shape[3]
        self.capturing = compile and device.type == "cuda"
        self.whole = compile                # compiled code reads the whole context: one shape at any position
        self.run_layer, self.run_expert = map(compiled if compile else lambda f: f, (run_layer, run_expert))
        if self.capturing:
            self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        self.begin = self.capture(self._begin)
        self.layers = [self.capture(partial(self._layer, i)) for i in range(c.num_hidden_layers)]
        self.experts = [[self.capture(partial(self._expert, slot, k)) for k in range(K)] for slot in slots]
        self.end = self.capture(self._end)

    def capture(self, piece: Callable[[], None]) -> Callable[[], None]:
        """A piece -> what runs it. Nothing else may use the device meanwhile: this is part of loading."""
        if not self.capturing:
            return piece
        self.stream.wait_stream(torch.cuda.current_stream(self.kv.device))
        with torch.cuda.stream(self.stream):
            piece()                         # compiles, and whatever a library does when it is first called
            graph = torch.cuda.CUDAGraph()  # (torch.cuda.graph would empty the allocator's cache every time)
            collecting = gc.isenabled()
            gc.disable()                    # an engine that is collected in here would synchronize: an error
            graph.capture_begin(pool=self.pool)
            try:
                piece()
            finally:
                graph.capture_end()
                if collecting:
                    gc.enable()
        torch.cuda.current_stream(self.kv.device).wait_stream(self.stream)
        return graph.replay

    def __call__(self, token: Tensor, position: int, source) -> Tensor:
        """token [1] on the device, at `position` -> logits [vocab] in fp32, overwritten by the next call."""
        self.token.copy_(token)
        self.position.fill_(position)
        self.keys = self.context if self.whole else padded(position + 1)
        self.begin()
        source.begin_step(self.lookahead[None])
        for i, run in enumerate(self.layers):
            source.begin_layer(i)
            run()
            routing = source.route(i, self.numbers[i + 1 == len(self.layers)])
            with closing(source.ready(i, routing)) as ready:
                for e, slot in ready:
                    self.experts[slot][routing.ids.index(e)]()
            source.end_layer(i)
        self.end()
        return self.logits

    def _begin(self) -> None:
        h = self.model.embed(self.token)
        self.h.copy_(h)
        self.lookahead.copy_(self.model.layers[0].gate(h)[0])
        self.rope.copy_(rope_table(self.model.config, self.position))
        self.weights.zero_(), self.expert_out.zero_()                  # layer 0 comes after no experts

    def _layer(self, i: int) -> None:
        layers, (k, v) = self.model.layers, self.kv[i, :, :, :self.keys]
        following = layers[i + 1] if i + 1 < len(layers) else None
        self.run_layer(layers[i], following, self.expert_out, self.rope, k, v, self.position,
                       self.h, self.x, self.weights, self.numbers[following is None])

    def _expert(self, slot: Expert, rank: int) -> None:
        self.run_expert(slot, self.x, self.expert_out[:, rank])

    def _end(self) -> None:
        h = self.model.norm(combine_experts(self.h, self.weights, self.expert_out))
        self.logits.copy_(self.model.head(h)[0])


def run_layer(layer, following, expert_out, rope, k, v, position, h, x, weights, numbers):
    """What the experts of the layer before gave, then this layer up to its router's choice. Keys and values
    and the last four are written."""
    h_in = combine_experts(h, weights, expert_out)
    out = layer.step(h_in, rope, k, v, position, weights.shape[1], following)
    for buffer, value in zip((h, x, weights, numbers), out):
        buffer.copy_(value)


def run_expert(expert, x, answer):
    answer.copy_(expert(x))
