"""What stands between the model's tensors and the scheduler's plain ints: it reads each router's choice to
the host, and turns the slots that the scheduler finds ready into experts that compute."""

from contextlib import closing
from functools import partial
from typing import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .cache import BLOCKS, HOST, LAUNCHED, GPUExpertCache
from .config import MixtralConfig
from .history import Routing
from .link import Mailbox
from .model import EXPERT_ROWS, Expert
from .packed import ExpertLayout
from .quant import compiled, exact_gemv, exact_swiglu, gemv, silu_table
from .scheduler import ExpertScheduler
from .trace import TraceRecorder

ROWS = 64                                   # on a GPU, a prompt's rows meet an expert in multiples of this


class ExpertSlots:
    """The slots' memory, uint8 [slots, expert bytes], and the one `Expert` that computes with any of them.

    Which slot is a number. Eager code takes views of the slot's bytes; compiled code reads the number
    on the device, so that one piece of code, and one CUDA graph, serves all slots, however many there are.
    It checks no index, so it is told of two slots, by which it reaches all; and it may not copy them. How
    many there are is then nothing to compile for; and it counts in 32 bits within each, which it would not if
    it knew of more than 2^31 numbers (66 instead of 56 us an expert).
    """

    def __init__(self, config: MixtralConfig, layout: ExpertLayout, memory: Tensor, linear, compile: bool):
        with torch.device("meta"):
            self.expert = layout.bind(Expert(config, linear), memory[:2] if compile else memory)
        self.matrices = self.expert.w13, self.expert.w2
        # On a GPU a second expert of a small model is computed sooner than code for a single one is compiled.
        # So always as many are computed as a token has, and those that nobody asked for are dropped.
        small = self.expert.w13.small
        self.always = config.num_experts_per_tok if small and memory.is_cuda else None
        self.slot = torch.zeros(1, dtype=torch.long, device=memory.device) if compile else None
        for matrix in self.matrices:
            matrix.at = self.slot
        self.compiled = compiled(run_experts, small) if compile else run_experts
        # Numbers of w13's product that may be given; and how many are, where a slot is chosen.
        self.given = memory.new_zeros(self.expert.w13.q.shape[-2], dtype=torch.float32)
        self.count, self.no_count = memory.new_zeros(2, 1, dtype=torch.long)
        self.pieces: list[Callable[[], None]] = []

    def __getitem__(self, slot: int) -> Callable[[Tensor], Tensor]:
        return partial(self.compute, slot)

    def compute(self, slot: int, x: Tensor, given: int = 0) -> Tensor:
        """As `Expert.forward`, with so many of the numbers `given`."""
        self.choose(slot)
        if len(x) == 1 and self.slot is not None and x.dtype != torch.float32:
            out = torch.empty_like(x)
            self.run(self.slot, x, out, self.count.fill_(given))
            return out
        if not self.pieces or len(x) == 1:
            return self.expert(x, self.given[:given] if given else None)
        self.x[:len(x)] = x
        self.pieces[-(-len(x) // ROWS) - 1]()
        return self.y[:len(x)]

    def capture(self, graph: Callable) -> None:
        """From now on several rows go through what `graph` makes of a call: one launch instead of ten. So
        they are filled up to one of a few numbers, each of which has its graph. (What is left of other rows
        is computed with them: a row's answer depends on none but itself.)"""
        w2 = self.expert.w2
        self.x, self.y = w2.workspace.new_zeros(2, EXPERT_ROWS, w2.q.shape[-2])
        sizes = range(EXPERT_ROWS, 0, -ROWS)                        # the largest first: all share its memory
        self.pieces = [graph(partial(self._rows, n)) for n in sizes][::-1]

    def _rows(self, n: int) -> None:
        self.y[:n] = self.expert(self.x[:n])

    def choose(self, slot: int) -> None:
        if self.slot is not None:
            self.slot.fill_(slot)
        else:
            for matrix in self.matrices:
                matrix.at = slot

    def first_rows(self, slot: int, blocks: int, x: Tensor, out: Tensor) -> None:
        """x [1, D] -> so many blocks of out [2F], `given` to `Expert.forward`."""
        self.choose(slot)
        w13, each = self.expert.w13, len(out) // BLOCKS
        product = gemv if x.dtype == torch.float32 else exact_gemv
        for i in range(0, blocks * each, each):
            out[i:i + each] = product(x, *w13.matrix(slice(i, i + each)), w13.fused)[0]

    def run(self, at: Tensor, x: Tensor, out: Tensor, count: Tensor | None = None) -> None:
        """x [1, D] through the experts in the slots `at [n]`, read on the device, into out [n, D]; so many
        numbers of the first product are `given`, if a count [1] is."""
        w13, w2 = ([matrix.q, matrix.scale, matrix.zero] for matrix in self.matrices)
        table = None if x.dtype == torch.float32 else silu_table(x.dtype, x.device)
        n = self.always or len(at)
        if self.always and count is None:
            count = self.no_count
        every = out if n == len(at) else out.new_empty(n, out.shape[1])
        self.compiled(w13, w2, table, at.expand(n).contiguous(), x, every,
                      None if count is None else (self.given, count))
        if every is not out:
            out.copy_(every[:1])


def run_experts(w13, w2, table: Tensor | None, at: Tensor, x: Tensor, out: Tensor, given) -> None:
    if table is not None:
        y = beside(exact_gemv(x, *w13, at), given)
        out.copy_(exact_gemv(exact_swiglu(y, table, x.dtype), *w2, at))
        return
    for i in range(len(at)):                # (a product's bits may depend on how many there are)
        gate, up = beside(gemv(x, *w13, at[i:i + 1]), given).chunk(2, -1)
        out[i:i + 1].copy_(gemv(F.silu(gate) * up, *w2, at[i:i + 1]))


def beside(y: Tensor, given: tuple[Tensor, Tensor] | None) -> Tensor:
    """y [n, 2F], of which the first numbers may be given."""
    if given is None:
        return y
    numbers, n = given
    return torch.where(torch.arange(len(numbers), device=y.device) < n, numbers, y)


class StreamedExperts:
    """The model's `ExpertSource`, and `DecodeStep`'s. `slots[slot]` computes with the expert in a slot."""

    def __init__(self, config: MixtralConfig, slots: ExpertSlots, cache: GPUExpertCache):
        self.config, self.slots, self.cache, self.lane = config, slots, cache, cache.lane
        self.recorder: TraceRecorder | None = None
        self.spans: list | None = None      # (name, layer, start mark, end mark), for the timeline

    def begin(self, scheduler: ExpertScheduler, start: int, tokens: int, decoding: bool) -> None:
        """Before each pass: who schedules it, and which positions it covers."""
        self.scheduler, self.rows, self.decoding = scheduler, slice(start, start + tokens), decoding
        self.fetched = []                   # what is on its way to the host
        self.lane.begin_pass()

    def begin_step(self, lookahead: Tensor) -> None:
        """lookahead [T, E]: layer 0's."""
        self._record("lookahead", 0, lookahead)
        if self.decoding:
            self.fetched.append(self.lane.fetch(lookahead[-1]))

    def begin_layer(self, layer: int) -> None:
        if layer == 0:
            self.scheduler.begin_step(self.lane.read(self.fetched.pop(0)).tolist() if self.decoding else None)
        self.mark()
        self.scheduler.begin_layer(layer)

    def launch(self, layer: int) -> list[int]:
        """A layer is about to be enqueued before the host knows its routing: the slots that it may use."""
        self.mark()
        return self.cache.launch(layer, self.config.num_local_experts)

    def launched(self, layer: int, row: list[int]) -> None:
        """It is enqueued, with its experts that are there."""
        if slots := [slot for slot in row if slot != LAUNCHED]:
            self.lane.used(slots)

    def fetch(self, layer: int, numbers: Tensor, mailbox: Mailbox | None = None) -> None:
        """A layer's routing is on its way to the host: numbers as in `ExpertSource.route`, and in decode
        behind them the bytes of what its experts are to be given. (Those that are there are computed in the
        same piece, and so belong to its span.)"""
        self.fetched.append(self.lane.fetch(numbers, mailbox))
        self._span("attention", layer)

    def read(self, layer: int, numbers: Tensor, rows: tuple[Tensor, Tensor | None] | None = None,
             x: Tensor | None = None) -> Routing:
        """The oldest routing on its way. Without `rows` those of a single token, from its numbers, and `x` is
        what its experts are given, on the host."""
        E, K = self.config.num_local_experts, self.config.num_experts_per_tok
        if self.recorder is not None:
            logits, *lookahead = rows or numbers[E + 2 * K:].split(E)
            self._record("router", layer, logits)
            for ahead in lookahead:
                self._record("lookahead", layer + 1, ahead)
        read, n = self.cache.read(self.fetched.pop(0)), len(numbers)
        if self.cache.host is not None:
            self.cache.host.take(x)
        return Routing.unpack(read[:n].tolist(), E, K)

    def route(self, layer: int, numbers: Tensor, rows: tuple[Tensor, Tensor | None]) -> Routing:
        self.fetch(layer, numbers)
        return self.read(layer, numbers, rows)

    def ready(self, layer: int, routing: Routing) -> Iterator[tuple[int, int]]:
        """(expert, place) of every expert with a token, as the scheduler has it ready."""
        with closing(self.scheduler.experts(layer, routing)) as ready:
            for e, place in ready:
                self.mark()
                yield e, place
                if place not in (LAUNCHED, HOST):
                    self._span(f"expert {e}", layer)

    def given(self, slot: int) -> int:
        """How many numbers of its first product the host computes of the expert in a slot."""
        return self.cache.slots[slot].transfer.skip // (self.config.hidden_size // 2)

    def answer(self, layer: int, expert: int, into: Tensor) -> None:
        """What the host made of an expert goes to the device, into [D]."""
        self.lane.put(self.cache.host.answer((layer, expert)), into)

    def experts(self, layer: int, routing: Routing) -> Iterator[tuple[int, Callable[[Tensor], Tensor]]]:
        """The same, as experts to compute with."""
        with closing(self.ready(layer, routing)) as ready:
            for e, slot in ready:
                yield e, self.slots[slot]

    def end_layer(self, layer: int) -> None:
        self.scheduler.end_layer(layer)

    def mark(self) -> None:
        """What comes now is the next span."""
        if self.spans is not None:
            self.marked = self.lane.mark()

    def _span(self, name: str, layer: int) -> None:
        if self.spans is not None:
            self.spans.append((name, layer, self.marked, self.lane.mark()))

    def _record(self, kind: str, layer: int, rows: Tensor | None) -> None:
        if self.recorder is not None and rows is not None:
            getattr(self.recorder, kind)[self.rows, layer] = rows.to(self.recorder.router.dtype)
