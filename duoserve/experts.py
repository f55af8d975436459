"""What stands between the model's tensors and the scheduler's plain ints: it reads each router's choice to
the host, and turns the slots that the scheduler finds ready into experts that compute."""

from contextlib import closing
from typing import Iterator

from torch import Tensor

from .cache import GPUExpertCache
from .config import MixtralConfig
from .history import Routing
from .model import Expert
from .scheduler import ExpertScheduler
from .trace import TraceRecorder


class StreamedExperts:
    """The model's `ExpertSource`, and `DecodeStep`'s."""

    def __init__(self, config: MixtralConfig, slots: list[Expert], cache: GPUExpertCache):
        self.config, self.slots, self.cache, self.lane = config, slots, cache, cache.lane
        self.recorder: TraceRecorder | None = None
        self.spans: list | None = None      # (name, layer, start mark, end mark), for the timeline

    def begin(self, scheduler: ExpertScheduler, start: int, tokens: int, decoding: bool) -> None:
        """Before each pass: who schedules it, and which positions it covers."""
        self.scheduler, self.rows, self.decoding = scheduler, slice(start, start + tokens), decoding
        self.lane.begin_pass()

    def begin_step(self, lookahead: Tensor) -> None:
        """lookahead [T, E]: layer 0's."""
        self._record("lookahead", 0, lookahead)
        self.scheduler.begin_step(self.lane.read(lookahead[-1].float()) if self.decoding else None)

    def begin_layer(self, layer: int) -> None:
        if self.spans is not None:
            self.mark = self.lane.mark()
        self.scheduler.begin_layer(layer)

    def route(self, layer: int, numbers: Tensor, rows: tuple[Tensor, Tensor | None] | None = None) -> Routing:
        """As `ExpertSource.route`; without `rows` those of a single token, which are among its numbers."""
        if self.recorder is not None:
            E, K = self.config.num_local_experts, self.config.num_experts_per_tok
            logits, *lookahead = rows or numbers[E + 2 * K:].split(E)
            self._record("router", layer, logits)
            for ahead in lookahead:
                self._record("lookahead", layer + 1, ahead)
        routing = self._read(layer, numbers)
        self._span("attention", layer)
        return routing

    def _read(self, layer: int, numbers: Tensor) -> Routing:
        c = self.config
        return Routing.unpack(self.lane.read(numbers), c.num_local_experts, c.num_experts_per_tok)

    def ready(self, layer: int, routing: Routing) -> Iterator[tuple[int, int]]:
        """(expert, slot) of every expert with a token, as the scheduler has it ready."""
        with closing(self.scheduler.experts(layer, routing)) as ready:
            for e, slot in ready:
                if self.spans is not None:
                    self.mark = self.lane.mark()
                yield e, slot
                self._span(f"expert {e}", layer)

    def experts(self, layer: int, routing: Routing) -> Iterator[tuple[int, Expert]]:
        """The same, as experts to compute with."""
        with closing(self.ready(layer, routing)) as ready:
            for e, slot in ready:
                yield e, self.slots[slot]

    def end_layer(self, layer: int) -> None:
        self.scheduler.end_layer(layer)

    def _span(self, name: str, layer: int) -> None:
        if self.spans is not None:
            self.spans.append((name, layer, self.mark, self.lane.mark()))

    def _record(self, kind: str, layer: int, rows: Tensor | None) -> None:
        if self.recorder is not None and rows is not None:
            getattr(self.recorder, kind)[self.rows, layer] = rows.to(self.recorder.router.dtype)
