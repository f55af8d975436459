"""One token through the model, in pieces of fixed shape: each piece is one CUDA graph where there is CUDA.

A decode step is some twenty small kernels a layer, and launching them costs the host more than running them
costs the GPU. But the host reads each router before it knows which experts to fetch, so the step is split
there: piecewise CUDA graphs, each captured once and replayed as a whole.

The device does not wait for the host to read. A table in pinned memory says which slot holds which expert,
and after each router the device looks there and computes those of the chosen experts that it finds, all in
the same graph; the host adds the others, one by one, when they have come. Where all of a layer's experts are
there, nothing can be missing, and the next layer follows at once: the host reads the routings later, in their
order. Where it has read that the chosen ones were there, the next layer follows before it thinks about
anything else. What passes from piece to piece lies in buffers of its own.

Between two experts of 94 MB the host's own code falls out of its processor's caches, and a call that takes 5
us when repeated takes 50. So a layer is one launch: what else the two tell each other, they read and write
in pinned memory.
"""

from contextlib import closing
from functools import partial
from typing import Callable

import torch
from torch import Tensor

from .cache import HOST, LAUNCHED
from .errors import note
from .link import Mailbox
from .machine import on_device
from .model import Mixtral, combine_experts, key_sizes, padded, rope_table
from .quant import compiled, is_small


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
        # What the host reads of a layer: numbers, and behind them x, whose experts it may compute.
        n, cuda = 3 * E + 2 * K, device.type == "cuda"
        self.mail = [Mailbox(n + D * kv.itemsize // 4, device) for _ in range(layers)]
        self.report = [mail.device for mail in self.mail]
        self.x_here = [mail.host[n:].view(kv.dtype)[None] for mail in self.mail]
        # And what the device reads: each layer's slots; the slot of an expert that comes later, for each rank
        # (and how many numbers of w13's product are given, if the link brings only the rest); and these.
        shared = partial(torch.zeros, pin_memory=cuda)
        self.table, self.told = (shared(*shape, dtype=torch.long) for shape in ((layers, E), (K, 2)))
        self.given = shared(2 * c.intermediate_size) if cuda else slots.given
        seen = [on_device(tensor, device) for tensor in (self.table, self.told, self.given)]
        self.seen_table, self.seen_told, self.seen_given = seen
        reached = all(tensor is not None for tensor in (*seen, *self.report))
        if not reached:
            note(f"pinned memory of another GPU is used again, which {device} cannot reach: decode is slower "
                 "(use a process for each GPU)")
            self.report = [torch.zeros_like(mail.host, device=device) for mail in self.mail]
            self.mail = [None] * layers
        self.numbers = [(report[:n], report[n:].view(kv.dtype)[None]) for report in self.report]
        # (The last layer looks ahead to itself, as then all are one piece of code; nobody reads that.)
        self.routings = [numbers[:n - E * (i == layers - 1)] for i, (numbers, _) in enumerate(self.numbers)]
        self.row_values, self.told_values = self.table.numpy(), self.told.numpy()
        self.known: list[list[int]] = [[] for _ in range(layers)]                   # the table, as plain ints
        self.chosen, self.at = (new(n, dtype=torch.long) for n in (K, 2))           # slots
        self.capturing = compile and cuda and reached
        self.sizes = key_sizes(kv.shape[3]) if compile else []
        small = is_small(model.head.weight.numel())
        self.run_layer = compiled(run_layer, small) if compile else run_layer
        self.run_begin, self.run_end = run_begin, run_end
        if self.capturing:
            if not small:                   # (else, as on a CPU, not worth compiling)
                self.run_begin, self.run_end = compiled(run_begin), compiled(run_end)
            self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        self.begin = self.capture(self._begin)
        self.layers: dict[int, list[Callable[[], None]]] = {}
        for keys in self.sizes:
            self.pieces(keys - 1)
        if self.capturing:
            self.experts, self.divided = ([self.capture(partial(piece, rank)) for rank in range(K)]
                                          for piece in (self._expert, self._divided))
        self.end = self.capture(self._end)

    def capture(self, piece: Callable[[], None]) -> Callable[[], None]:
        """A piece -> what runs it. Nothing else may use the device meanwhile: this is part of loading, in
        which no other engine is collected, either."""
        if not self.capturing:
            return piece
        self.stream.wait_stream(torch.cuda.current_stream(self.kv.device))
        with torch.cuda.stream(self.stream):
            piece()                         # compiles, and whatever a library does when it is first called
            graph = torch.cuda.CUDAGraph()  # (torch.cuda.graph would empty the allocator's cache every time)
            graph.capture_begin(pool=self.pool)
            try:
                piece()
            finally:
                graph.capture_end()
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
            routing = source.read(i, self.routings[i], x=self.x_here[i])
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
        if self.mail[i] is not None:
            self.mail[i].clear()            # (what was there is read, or was a request's that is given up)
        if not self.capturing:
            source.begin_layer(i)
        elif (row := source.launch(i)) != self.known[i]:            # (the old one was done with a token ago)
            self.known[i] = []              # (should this be interrupted)
            self.row_values[i] = [max(slot, 0) for slot in row]
            self.known[i] = row
        layers[i]()
        source.fetch(i, self.report[i], self.mail[i])
        if not self.capturing:
            return False
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
                    source.answer(i, e, self.expert_out[0, rank])
                elif place != LAUNCHED:
                    self.compute(place, rank, source.given(place))
        source.end_layer(i)

    def compute(self, slot: int, rank: int, given: int = 0) -> None:
        """The router's choice of this rank, from its slot; of w13's product so many numbers are given."""
        if not self.capturing:
            self.expert_out[:, rank] = self.slots.compute(slot, self.x, given)
            return
        self.told_values[rank] = slot, given    # (the last one ran before what has been read of this layer)
        (self.divided if given else self.experts)[rank]()

    def _begin(self) -> None:
        self.run_begin(self.model, self.token, self.position, self.h, self.lookahead, self.rope)
        self.weights.zero_(), self.expert_out.zero_()                  # layer 0 comes after no experts

    def _layer(self, i: int, keys: int) -> None:
        layers, (k, v) = self.model.layers, self.kv[i, :, :, :keys]
        following = layers[min(i + 1, len(layers) - 1)]
        self.run_layer(layers[i], following, self.expert_out, self.rope, k, v, self.position,
                       self.h, self.x, self.weights, *self.numbers[i], self.chosen,
                       self.seen_table[i] if self.capturing else None)
        if self.capturing:                  # (what is not there is computed again, when it is)
            self.slots.run(self.chosen, self.x, self.expert_out[0])

    def _expert(self, rank: int) -> None:
        torch.mul(self.seen_told[rank], 1, out=self.at)             # (across the link, once)
        self.slots.run(self.at[:1], self.x, self.expert_out[0, rank:rank + 1], self.at[1:])

    def _divided(self, rank: int) -> None:
        torch.mul(self.seen_given, 1, out=self.slots.given)
        self._expert(rank)

    def _end(self) -> None:
        self.run_end(self.model, self.h, self.weights, self.expert_out, self.logits)


def run_begin(model, token, position, h, lookahead, rope):
    """The token's embedding, what layer 0's router says to that, and where it stands. The last three are
    written."""
    embedding = model.embed(token)
    h.copy_(embedding)
    lookahead.copy_(model.layers[0].gate(embedding)[0])
    rope.copy_(rope_table(model.config, position))


def run_layer(layer, following, expert_out, rope, k, v, position, h, x, weights, numbers, x_read, chosen,
              slots):
    """What the experts of the layer before gave, then this layer up to its router's choice, and in which of
    the layer's `slots` [E] that is. Keys and values and the six before `slots` are written."""
    h_in = combine_experts(h, weights, expert_out)
    *out, ids = layer.step(h_in, rope, k, v, position, weights.shape[1], following)
    for buffer, value in zip((h, x, weights, numbers), out):
        buffer.copy_(value)
    x_read.copy_(out[1])
    if slots is not None:
        chosen.copy_(slots[ids[0]])


def run_end(model, h, weights, expert_out, logits):
    """What the experts of the last layer gave -> the next token's logits, which are written."""
    logits.copy_(model.head(model.norm(combine_experts(h, weights, expert_out)))[0])
