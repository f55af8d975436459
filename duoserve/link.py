"""The lane from host to device: the one scarce thing in this program.

A lane sends bytes of experts in the order it is told and says when they are there. *Demand* is sent at once,
in one piece. *Speculation* is sent in chunks, two in flight at most, so a demand never waits for more than
those two. The lane knows nothing of why: who asks, who is evicted and what is dropped is the cache's affair.

Here it is CUDA's copy engine. A simulated link (simulated.py) behaves alike: nothing above asks which it has.
"""

import time
import weakref
from collections import defaultdict, deque
from dataclasses import dataclass, field
from itertools import count, cycle
from typing import Any, Callable

import numpy as np
import torch

from .errors import UserError
from .machine import clear_cuda_error, cuda_runtimes, on_device, stream_wait_value, yield_processor

Key = tuple[int, int]                       # (layer, expert)
AHEAD = 64                                  # buffers for numbers on their way to the host, made at a time
BY_ADDRESS = 4                              # cudaMemcpyDefault: the addresses say which way
AT_LEAST = 0                                # CU_STREAM_WAIT_VALUE_GEQ
KERNEL_FAILED = 700                         # CUDA's errors from here on stay (illegal addresses and the like)
IN_FLIGHT = 2                               # chunks of speculation
USES = 256                                  # events; one that is used again too soon means a longer wait
UNWRITTEN = 2**32 - 1                       # as fp32 and as two 16-bit numbers NaNs, but none that CUDA gives
LOOKS = 64                                  # at a mailbox, until CUDA is asked, too
PACE = 0.1                                  # weight of the newest copy in the link's running mean
PCIE = 25e9                                 # bytes a second: what a GPU's link is taken to move, at least


class LinkError(Exception):
    """A transfer that failed."""


@dataclass(slots=True, eq=False)
class Transfer:
    """One expert on its way: `sent` of `size` bytes are enqueued, into `slot` once the first chunk is (-1
    before)."""

    key: Key
    size: int
    asked: float                            # when, on the lane's clock
    predicted: bool = False                 # moved on a guess
    slot: int = -1
    sent: int = 0
    skip: int = 0                           # the last bytes that need not be sent: the host sees to them
    loaded: Any = None                      # the lane's mark for "that is there": an event, or a time
    order: int = 0                          # the lane delivers in this order
    arrived: bool = False                   # the host has seen that it is there: nothing need wait
    used: bool = False                      # something was computed with it
    in_time: bool = False                   # all of it had arrived when its layer was routed
    counted: bool = False                   # it has been used, or moved in prefill: its next use is a hit
    held: bool = False                      # a guess that found no slot: it starts when it gets one
    spans: list = field(default_factory=list)   # (start, end, bytes) of each piece, for the timeline

    @property
    def missing(self) -> int:
        """Bytes still to be sent before it can be computed with."""
        return max(0, self.size - self.skip - self.sent)


class Mailbox:
    """Pinned memory, fp32 [n], where a kernel leaves numbers by itself; `device` is how it sees them there
    (None: it cannot). Each word tells whether it has been written (two numbers of 16 bits are, at once), so
    that no event is recorded, nor CUDA asked."""

    def __init__(self, n: int, device: torch.device):
        memory = torch.zeros(n + 1, pin_memory=device.type == "cuda")
        self.host = memory[:n]
        self.device = on_device(self.host, device)
        self.numbers, self.words = self.host.numpy(), memory.numpy().view(np.uint32)
        self.words[n] = UNWRITTEN           # (which it stays)

    def clear(self) -> None:
        self.words.fill(UNWRITTEN)

    def full(self) -> bool:
        """(The first that is not written is looked for once: what comes meanwhile is seen the next time.)"""
        return bool(self.words.argmax() == len(self.words) - 1)


def chunk_sizes(expert_bytes: int, rate: float) -> tuple[int, int]:
    """Bytes of one chunk of speculation, beside a host that computes and without: 8 MiB, or a sixth of a
    small expert; and a third of that (2.75 MiB), as the main thread then has time for more of them. But never
    less than a link of `rate` bytes a second (0: as fast as memcpy) moves in 100 us, some of which it takes
    to hand over a chunk."""
    most, least = min(8 * 2**20, -(-expert_bytes // 6)), int(rate * 1e-4) if rate else expert_bytes
    beside, alone = (min(expert_bytes, max(size, least)) for size in (most, most * 11 // 32))
    return beside, alone


class CudaLane:
    """A side stream, and a wait each way: compute waits for a load, a load for the slot's last use.

    CUDA takes a wait on an event that was never recorded as done. So `loaded` is set only once a chunk is
    enqueued. A slot's first chunk waits for the event that `used` recorded, unless it is known that this is
    over: something that was fetched after it has been read. (So the events can be used again and again.)
    """

    def __init__(self, slots: torch.Tensor, chunks: tuple[int, int], store):
        """`slots` [N, expert bytes] on the device; `chunks` are `chunk_sizes`; `store` has what goes there:
        `where(key, start, stop)`, which bytes of it these are in the order of sending; `pinned_block(key)`,
        the expert in pinned memory or None; and `fetch(key, start, into)`, which copies its bytes from
        wherever they are."""
        self.device, self.chunks = slots.device, chunks
        self.store = weakref.proxy(store)   # (a lane that outlives its engine keeps no pinned memory)
        self.slots = [slot.data_ptr() for slot in slots]
        if not cuda_runtimes():
            raise UserError("this torch has no CUDA runtime library (libcudart) of its own; install one from "
                            "pytorch.org, or use --device cpu")
        self.memcpy = cuda_runtimes()[0].cudaMemcpyAsync
        # Streams are handed around, as asking which one is current takes longer than handing a chunk to it.
        self.stream = torch.cuda.Stream(self.device)
        self.begin_pass()
        self.fetches = self.known = 0       # asked for so far; and read
        self.uses = cycle(torch.cuda.Event() for _ in range(USES))
        self.last_use: list[tuple] = [(-1, None)] * len(slots)      # so many had been asked for; its event
        self.flying: deque = deque()        # (start, end, transfer, bytes) of each copy under way,
        self.landed: deque = deque()        # and of those that are over, until there is time to look at them
        self.events: list = []              # with a time, to be used again
        self.ring: list = []                # if needed: two pinned buffers, each with its last copy's event
        self.seen: dict[int, torch.Tensor | None] = {}              # address -> what `put` takes from there
        self.buffers = defaultdict(list)    # size -> free pinned buffers, for numbers on their way
        self.busy = 0.0
        self.pace, self.free = 1 / PCIE, 0.0                        # seconds a byte, lately; when all is sent
        self.origin = torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(self.device)
        self.origin.record()
        self.origin.synchronize()
        self.epoch = time.perf_counter()
        self.now = time.perf_counter

    def copy(self, transfer: Transfer, start: int, stop: int) -> None:
        """Enqueue those bytes of an expert. What is not pinned goes through the ring: copied directly it
        would block the host."""
        start, stop = self.store.where(transfer.key, start, stop)
        slot, block = self.slots[transfer.slot], self.store.pinned_block(transfer.key)
        if block is not None:
            self.enqueue(slot + start, block.data_ptr() + start, stop - start, self.stream)
            return
        size = max(self.chunks)
        if not self.ring:
            self.ring = [(torch.empty(size, dtype=torch.uint8, pin_memory=True), torch.cuda.Event())
                         for _ in range(2)]
        for begin in range(start, stop, size):
            nbytes = min(size, stop - begin)
            buffer, free = self.ring[0]
            free.synchronize()              # its last copy is done (an event never recorded counts as done)
            self.store.fetch(transfer.key, begin, buffer[:nbytes])
            self.enqueue(slot + begin, buffer.data_ptr(), nbytes, self.stream)
            free.record(self.stream)
            self.ring.reverse()

    def enqueue(self, to: int, source: int, nbytes: int, stream: torch.cuda.Stream) -> None:
        """A copy between two addresses on a stream. Called directly, it takes the host 7 us; a `Tensor.copy_`
        takes up to 54, most of them to make the stream current and two views (H100's host)."""
        code = self.memcpy(to, source, nbytes, BY_ADDRESS, stream.cuda_stream)
        if code:
            clear_cuda_error()
            if code >= KERNEL_FAILED:       # an earlier one: this process can use the GPU no more
                raise UserError(f"a computation on {self.device} has failed (CUDA error {code}); start again")
            raise LinkError(f"cudaMemcpyAsync: error {code}")

    def fed_by(self, pump: Callable[[], None]) -> None:
        """`pump` sends what is due: called whenever the host waits."""
        self.pump = pump

    def begin_pass(self) -> None:
        """What is computed from here on runs on the stream that is current now."""
        self.compute = torch.cuda.current_stream(self.device)

    def poll(self) -> None:
        """Take note of the pieces that have arrived. `pump` asks once, so it sends no more than may be in
        flight."""
        while self.flying and self.flying[0][1].query():
            _, end, transfer, _ = self.flying[0]
            transfer.arrived = end is transfer.loaded               # (first: an interruption may come here)
            self.landed.append(self.flying.popleft())
            self.free = self.now() + self.seconds_of(sum(entry[3] for entry in self.flying))

    def look(self) -> None:
        """Work out when what has arrived was sent, and how busy the lane was: for while the host has nothing
        else to do."""
        while self.landed:
            start, end, transfer, nbytes = self.landed.popleft()
            begin = self.epoch + self.origin.elapsed_time(start) / 1e3
            seconds = start.elapsed_time(end) / 1e3
            self.busy += seconds
            self.pace += PACE * (seconds / nbytes - self.pace)
            transfer.spans.append((begin, begin + seconds, nbytes))
            self.events += start, end       # (once it has arrived nobody waits for it)

    def room(self, asked: float) -> bool:
        """Is a chunk asked for then due to be sent by now?"""
        return len(self.flying) < IN_FLIGHT

    def send(self, transfer: Transfer, nbytes: int) -> None:
        """Enqueue the next bytes of a transfer. Raises `LinkError` if that fails."""
        fetches, use = self.last_use[transfer.slot]
        if transfer.sent == 0 and fetches >= self.known:
            self.stream.wait_event(use)
        start, end = self.timed_event(), self.timed_event()
        start.record(self.stream)
        try:
            self.copy(transfer, transfer.sent, transfer.sent + nbytes)
        except RuntimeError as error:       # (no pinned memory for the ring)
            raise LinkError(str(error)) from error
        end.record(self.stream)
        self.flying.append((start, end, transfer, nbytes))
        self.free = self.free_at() + self.seconds_of(nbytes)
        # Before it counts as sent: an interruption may come in between.
        transfer.loaded, transfer.arrived = end, False
        transfer.sent += nbytes

    def free_at(self) -> float:
        """When all that is enqueued has been sent."""
        return max(self.now(), self.free)

    def seconds_of(self, nbytes: int) -> float:
        """How long the link takes for so many."""
        return nbytes * self.pace

    def timed_event(self) -> torch.cuda.Event:
        return self.events.pop() if self.events else torch.cuda.Event(enable_timing=True)

    def arrived(self, transfer: Transfer) -> bool:
        """Is what was sent of it there, as far as the host has seen?"""
        return transfer.arrived

    def wait(self, transfer: Transfer) -> None:
        """What is computed from here on finds the expert in its slot."""
        if not transfer.arrived:
            self.compute.wait_event(transfer.loaded)

    def used(self, slots: list[int]) -> None:
        """What was computed up to here is the last use of these slots, until the next call: they may be
        overwritten after it."""
        use = next(self.uses)
        use.record(self.compute)
        for slot in slots:
            self.last_use[slot] = self.fetches, use

    def fetch(self, values: torch.Tensor, mailbox: Mailbox | None = None) -> tuple:
        """Begin to copy a few numbers from the device to the host, for `read`: values [n], contiguous fp32.
        (The device leaves them in a `mailbox` by itself.)"""
        self.fetches += 1
        if mailbox is not None:
            return mailbox.numbers, mailbox.full, self.fetches, None
        free = self.buffers[len(values)]
        if not free:                        # (while the engine warms up: pinning takes its time)
            free += ((row, torch.cuda.Event()) for row in torch.empty(AHEAD, len(values), pin_memory=True))
        row, copied = free.pop()
        self.enqueue(row.data_ptr(), values.data_ptr(), row.nbytes, self.compute)
        copied.record(self.compute)
        return row.numpy(), copied.query, self.fetches, (row, copied)

    def put(self, values: torch.Tensor, into: torch.Tensor) -> None:
        """Copy a few numbers from the host's pinned memory to the device, after what is enqueued so far; they
        may not change until that is done. Both are contiguous, of one dtype and shape.

        By a kernel: a copy of 8 kB that comes after other work waits for all experts on their way, 1.5 ms
        instead of 19 us (H200)."""
        if values.data_ptr() not in self.seen:
            self.seen[values.data_ptr()] = on_device(values, self.device)
        seen = self.seen[values.data_ptr()]
        if seen is not None:
            torch.mul(seen, 1, out=into)
        else:
            self.enqueue(into.data_ptr(), values.data_ptr(), into.nbytes, self.compute)

    def wait_for(self, word: torch.Tensor, value: int) -> bool:
        """Tell the device to go on only when the host has written `value`, or more, into `word` [1], int32 in
        pinned memory. False if it cannot be told: then the host has to wait before it tells it anything."""
        wait = stream_wait_value()          # (not every system has it: a code other than 0)
        return wait is not None and wait(self.compute.cuda_stream, word.data_ptr(), value, AT_LEAST) == 0

    def read(self, fetched: tuple, pause: Callable[[], None] = yield_processor) -> np.ndarray:
        """The numbers, on the host, until others are fetched; the lane is fed meanwhile, with a `pause` in
        between."""
        numbers, arrived, fetches, buffer = fetched
        for looks in count(1):
            if arrived() or looks % LOOKS == 0 and self.compute.query():        # (raises what has failed)
                break
            self.pump()
            self.look()
            pause()
        self.known = fetches
        if buffer is not None:
            self.buffers[len(numbers)].append(buffer)
        return numbers

    def mark(self) -> torch.cuda.Event:
        """This moment of the computation; `seconds` says when it was, on the lane's clock."""
        return self.compute.record_event(torch.cuda.Event(enable_timing=True))

    def seconds(self, mark: torch.cuda.Event) -> float:
        mark.synchronize()
        return self.epoch + self.origin.elapsed_time(mark) / 1e3

    def abandon(self) -> None:
        """After a failure or an interruption: what is sent from here on comes after all that is enqueued to
        be computed, as nobody may know which slots that reads."""
        self.stream.wait_stream(self.compute)

    def finish(self) -> None:
        """Wait for all that is enqueued, so that every time is known."""
        self.stream.synchronize()
        self.poll()
        self.look()
