"""A link and a host that are simulated: what is sent and computed is, if anything, but times are the model's.

On the wall's clock they let a CPU show what a GPU would do, and a GPU with a fast link what a slow one would;
on a virtual clock they are the replay of `bench schedule`. Their methods are those of `CudaLane` and `Host`,
and explained there.
"""

import math
import time
from collections import deque
from typing import Callable

import numpy as np
from torch import Tensor

from .cache import BLOCKS, WHOLE
from .host import Host
from .link import IN_FLIGHT, Key, Mailbox, Transfer


class Clock:
    """Time, for a simulated lane. Whoever waits stops at each moment at which a chunk falls due, and the lane
    is fed: what is sent, and what is evicted for it, is decided with what was known at that moment."""

    due = math.inf                          # when the lane will have room for the chunk that is next
    pump = staticmethod(lambda: None)       # what feeds the lane

    def wait_until(self, t: float) -> None:
        self.pump()
        while self.now() < self.due < t:
            self._pass(self.due)
            self.pump()
        self._pass(t)
        self.pump()


class WallClock(Clock):
    now = staticmethod(time.perf_counter)

    def _pass(self, t: float) -> None:
        while (left := t - time.perf_counter()) > 0:
            if left > 0.0005:
                time.sleep(left - 0.0004)   # sleep oversleeps: spin the rest


class VirtualClock(Clock):
    """Time that passes only when told: `advance` for the replay's compute, `wait_until` for its waits."""

    time = 0.0

    def now(self) -> float:
        return self.time

    def _pass(self, t: float) -> None:
        self.time = max(self.time, t)

    def advance(self, seconds: float) -> None:
        self.wait_until(self.time + seconds)


class SimulatedLane:
    """A link of `rate` bytes a second (0: as fast as memcpy). `copy(transfer, start, stop)` moves the bytes,
    if any: the start-th to stop-th in the order of sending.

    A chunk starts when the lane falls free or when it was asked for, whichever is later, even if it is sent
    after that: this models a host that feeds the lane while the accelerator computes.
    """

    def __init__(self, clock: Clock, rate: float, chunk: int,
                 copy: Callable[[Transfer, int, int], None] = lambda transfer, start, stop: None):
        self.clock, self.rate, self.chunks, self.copy = clock, rate, (chunk, chunk), copy
        self.now = clock.now
        self.ends = deque([0.0] * IN_FLIGHT, maxlen=IN_FLIGHT)      # of the latest chunks: when they are done
        self.busy = 0.0                     # seconds so far

    def fed_by(self, pump: Callable[[], None]) -> None:
        self.clock.pump = pump

    def begin_pass(self) -> None: ...

    def poll(self) -> None:
        self.clock.due = math.inf

    def look(self) -> None: ...

    def room(self, asked: float) -> bool:
        self.clock.due = max(asked, self.ends[0])
        return self.clock.due <= self.now()

    def send(self, transfer: Transfer, nbytes: int) -> None:
        self.copy(transfer, transfer.sent, transfer.sent + nbytes)
        start = max(transfer.asked, self.ends[-1])
        end = start + self.seconds_of(nbytes)
        self.ends.append(end)
        self.busy += end - start
        transfer.spans.append((start, end, nbytes))
        transfer.loaded = end               # before it counts as sent: an interruption may come in between
        transfer.sent += nbytes

    def free_at(self) -> float:
        return max(self.now(), self.ends[-1])

    def seconds_of(self, nbytes: int) -> float:
        return nbytes / self.rate if self.rate else 0.0

    def arrived(self, transfer: Transfer) -> bool:
        return transfer.loaded is not None and transfer.loaded <= self.now()

    def wait(self, transfer: Transfer) -> None:
        self.clock.wait_until(transfer.loaded)

    def used(self, slots: list[int]) -> None: ...

    def fetch(self, values: Tensor, mailbox: Mailbox | None = None) -> Tensor:
        return values

    def put(self, values: Tensor, into: Tensor) -> None:
        into.copy_(values)

    def wait_for(self, word: Tensor, value: int) -> bool:
        return False

    def read(self, fetched: Tensor, pause: Callable[[], None] | None = None) -> np.ndarray:
        self.clock.pump()
        return fetched.cpu().numpy()        # (on a GPU with a simulated link they are not there yet)

    def mark(self) -> float:
        return self.now()

    def seconds(self, mark: float) -> float:
        return mark

    def abandon(self) -> None: ...

    def finish(self) -> None:
        self.clock.wait_until(self.ends[-1])


class SimulatedHost:
    """A host that takes `each` seconds for an expert, one after the other, on a clock, and `part` for a block
    (or else what its share of the bytes would). A `worker` computes them; without one there are times alone:
    nothing is taken, and no answer is asked for."""

    def __init__(self, clock: Clock, each: float, block: int = 0, worker: Host | None = None,
                 part: float | None = None):
        self.clock, self.each, self.block, self.worker = clock, each, block, worker
        self.part = each * 2 / 3 / BLOCKS if part is None else part
        self.compiled, self.ready = (worker.compiled, worker.ready) if worker else (None, None)
        self.free, self.busy = 0.0, 0.0     # when it has done all; seconds so far
        self.due: dict[Key, float] = {}
        self.log: list | None = None        # (key, start, end) of what was computed, for the timeline

    def trouble(self) -> str | None:
        return self.worker.trouble()

    def has(self, key: Key) -> bool:
        return self.worker is None or self.worker.has(key)

    def free_at(self) -> float:
        return max(self.clock.now(), self.free)

    def seconds(self, blocks: int = WHOLE) -> float:
        return self.each if blocks == WHOLE else self.part * blocks

    def take(self, x: Tensor) -> None:
        self.worker.take(x)

    def submit(self, experts: dict[Key, int]) -> None:
        for key, blocks in experts.items():
            start = self.free_at()
            self.free = self.due[key] = start + self.seconds(blocks)
            self.busy += self.seconds(blocks)
            if self.log is not None:
                self.log.append((key, start, self.free))
        if self.worker:
            self.worker.submit(experts)

    def wait(self, key: Key) -> None:
        if self.worker:
            self.worker.wait(key)
        self.clock.wait_until(self.due.pop(key))

    def answer(self, key: Key) -> Tensor:
        return self.worker.answer(key)

    def pause(self) -> None: ...

    def collect(self) -> None:
        self.worker.collect()

    def abandon(self) -> None:
        self.due.clear()
        self.free = 0.0
        self.worker.abandon()
