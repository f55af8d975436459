"""One token through the model, in pieces of fixed shape: each piece is one CUDA graph where there is CUDA.

A decode step is some twenty small kernels a layer, and launching them costs the host more than running them
costs the GPU. But the host reads each router before it knows which experts to fetch, so the step is split
there: piecewise CUDA graphs, each captured once and replayed as a whole.

The device does not wait for the host to read. A table on the device says which slot holds which expert, and
after each router the device computes those of the chosen experts that the table has; the host adds the
others, one by one, when they have come. Where all of a layer's experts are there, nothing can be missing, and
the next layer follows at once: the host reads the routings later, in their order. Where it has read that the
chosen ones were there, the next layer follows before it thinks about anything else. What passes from piece to
piece lies in buffers of its own.
"""

import gc
from contextlib import closing
from functools import partial
from typing import Callable

import torch
from torch import Tensor

from .cache import HOST, LAUNCHED
from .machine import on_device
from .model import Mixtral, combine_experts, key_sizes, padded, rope_table
from .quant import compiled


class DecodeStep:
    """`step(token, position, source)` -> logits of the next token. kv [N, 2, G, C, A]: the cache; `slots`:
    the experts.

    C is a multiple of PADDING, and what was never written is finite. Eager, a piece is run as it stands; with
    `compile` it is fused by torch.compile, and captured if the device is CUDA.
    """

    def __init__(self, model: Mixtral, slots, kv: Tensor, compile: bool):
        c, device = model.config, kv.device
        self.model, self.slots, self.kv = model, slots, kv
        D, K, E, layers = c.hidden_size, c.num_experts_per_tok, c.num_local_experts, c.num_hidden_layers
        new = partial(torch.zeros, device=device, dtype=kv.dtype)
        self.token, self.position = new(1, dtype=torch.long), new(1, dtype=torch.long)
        self.rope = new(2, 1, c.head_dim, dtype=torch.float32)
        self.h, self.x, self.expert_out = new(1, D), new(1, D), new(1, K, D)
        self.weights, self.logits = new(1, K, dtype=torch.float32), new(c.vocab_size, dtype=torch.float32)
        self.lookahead = new(E, dtype=torch.float32)                                # of layer 0
        # What the host reads of a layer: numbers (the last has no lookahead), and behind them x, whose
        # experts it may compute. Kernels write it straight to the host. And what that tells the device: the
        # layer's slots.
        sizes, cuda = [n * E + 2 * K for n in [3] * (layers - 1) + [2]], device.type == "cuda"
        self.here = [torch.zeros(n + D * kv.itemsize // 4, pin_memory=cuda) for n in sizes]
        self.report = [on_device(here, device) for here in self.here]
        if any(report is None for report in self.report):           # (then they have to be copied)
            self.here, self.report = [None] * layers, [torch.zeros_like(h, device=device) for h in self.here]
        self.numbers = [(report[:n], report[n:].view(kv.dtype)[None])
                        for n, report in zip(sizes, self.report)]
        self.table = [new(E, dtype=torch.long) for _ in range(layers)]
        self.chosen, self.slot = new(K, dtype=torch.long), new(1, dtype=torch.long)
        # Where the host puts the first numbers of w13's product, if the link brings the rest of an expert.
        self.given = torch.zeros(2 * c.intermediate_size, pin_memory=cuda)
        self.seen, self.given_rows = on_device(self.given, device), new(1, dtype=torch.long)
        self.capturing = compile and device.type == "cuda"
        self.sizes = key_sizes(kv.shape[3]) if compile else []
        self.run_layer = compiled(run_layer) if compile else run_layer
        if self.capturing:
            self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
            self.rows = torch.zeros(layers, E, dtype=torch.long, pin_memory=True)   # the table, on the host
            self.row_values = self.rows.numpy()
            self.known: list[list[int]] = [[0] * E for _ in range(layers)]          # ... as plain ints
        self.begin = self.capture(self._begin)
        self.layers: dict[int, list[Callable[[], None]]] = {}
        for keys in self.sizes:
            self.pieces(keys - 1)
        if self.capturing:
            self.present = self.capture(self._present)
            self.experts = [self.capture(partial(self._expert, rank)) for rank in range(K)]
            if self.seen is not None:       # (or no expert is divided)
                self.numbers_given = torch.zeros_like(self.given, device=device)
                self.divided = [self.capture(partial(self._divided, rank)) for rank in range(K)]
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
        layers = self.pieces(position)
        self.begin()
        source.begin_step(self.lookahead[None])
        # How many pieces are enqueued (the last of all is the end), and whether nothing that the newest of
        # them needs can be missing.
        ahead, whole = 0, True
        for i in range(len(layers) + 1):    # the one whose routing is read next
            while ahead <= len(layers) and (whole or ahead == i):
                whole, ahead = self.launch(ahead, layers, source), ahead + 1
            if i == len(layers):
                return self.logits
            if self.capturing:
                source.begin_layer(i)
            routing = source.read(i, self.numbers[i][0])
            if self.capturing and i + 1 == ahead and self.there(i, routing.ids):
                whole, ahead = self.launch(ahead, layers, source), ahead + 1
            self.settle(i, routing, source)

    def pieces(self, position: int) -> list[Callable[[], None]]:
        """The layers' pieces for a token at `position`, which alone says how many keys they read."""
        keys = next((size for size in self.sizes if size > position), padded(position + 1))
        if keys not in self.layers:
            self.layers[keys] = [self.capture(partial(self._layer, i, keys)) for i in range(len(self.table))]
        return self.layers[keys]

    def launch(self, i: int, layers: list[Callable[[], None]], source) -> bool:
        """Enqueue layer i by its piece, and those of its experts that are there; True if these are all. There
        is an end after the last one."""
        if i == len(layers):
            self.end()
            return False
        if not self.capturing:
            source.begin_layer(i)
            layers[i]()
            source.fetch(i, self.report[i], self.here[i])
            return False
        row = source.launch(i)
        if row != self.known[i]:            # (the old row's copy is over: what came after it is read)
            self.known[i] = []              # (should this be interrupted)
            self.row_values[i] = row
            source.put(self.rows[i], self.table[i])
            self.known[i] = row
        layers[i]()
        source.fetch(i, self.report[i], self.here[i])
        if any(slot != LAUNCHED for slot in row):
            source.mark()
            self.present()
            source.launched(i, row)
        return LAUNCHED not in row

    def there(self, i: int, experts: list[int]) -> bool:
        """Had the device all of these when layer i was enqueued?"""
        return all(self.known[i][e] != LAUNCHED for e in experts)

    def settle(self, i: int, routing, source) -> None:
        """Compute with the experts of layer i that were not there."""
        with closing(source.ready(i, routing)) as ready:
            for e, place in ready:
                rank = routing.ids.index(e)
                if place == HOST:
                    source.put(source.answer(i, e), self.expert_out[0, rank])
                elif place != LAUNCHED:
                    self.compute(place, rank, source.given(place))
        source.end_layer(i)

    def compute(self, slot: int, rank: int, given: int = 0) -> None:
        """The router's choice of this rank, from its slot; of w13's product so many numbers are given."""
        if not self.capturing:
            self.expert_out[:, rank] = self.slots[slot](self.x, self.given[:given].to(self.x.device))
            return
        self.slot.fill_(slot)
        if given:
            self.given_rows.fill_(given)
        (self.divided if given else self.experts)[rank]()

    def _begin(self) -> None:
        h = self.model.embed(self.token)
        self.h.copy_(h)
        self.lookahead.copy_(self.model.layers[0].gate(h)[0])
        self.rope.copy_(rope_table(self.model.config, self.position))
        self.weights.zero_(), self.expert_out.zero_()                  # layer 0 comes after no experts

    def _layer(self, i: int, keys: int) -> None:
        layers, (k, v) = self.model.layers, self.kv[i, :, :, :keys]
        following = layers[i + 1] if i + 1 < len(layers) else None
        self.run_layer(layers[i], following, self.expert_out, self.rope, k, v, self.position, self.table[i],
                       self.h, self.x, self.weights, *self.numbers[i], self.chosen)

    def _present(self) -> None:
        self.slots.run(self.chosen, self.x, self.expert_out[0])

    def _expert(self, rank: int, given: tuple[Tensor, Tensor] | None = None) -> None:
        self.slots.run(self.slot, self.x, self.expert_out[0, rank:rank + 1], given)

    def _divided(self, rank: int) -> None:
        torch.mul(self.seen, 1, out=self.numbers_given)             # (across the link, once)
        self._expert(rank, (self.numbers_given, self.given_rows))

    def _end(self) -> None:
        h = self.model.norm(combine_experts(self.h, self.weights, self.expert_out))
        self.logits.copy_(self.model.head(h)[0])


def run_layer(layer, following, expert_out, rope, k, v, position, table, h, x, weights, numbers, x_read,
              chosen):
    """What the experts of the layer before gave, then this layer up to its router's choice. Keys and values
    and the last six are written."""
    h_in = combine_experts(h, weights, expert_out)
    *out, ids = layer.step(h_in, rope, k, v, position, weights.shape[1], following)
    for buffer, value in zip((h, x, weights, numbers, chosen), (*out, table[ids[0]].clamp(min=0))):
        buffer.copy_(value)
    x_read.copy_(out[1])
