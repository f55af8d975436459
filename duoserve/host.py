"""The host computes an expert where its bytes lie, in a thread of its own, while the link brings others.

In a 16-bit dtype a row has the same bits wherever it is computed (`quant.py`), so a scheduler may let the
clock decide which of a layer's missing experts cross the link and which are computed here. (A simulated host
behaves alike: one whose answers come when it would be done, or, for the replay, times alone.)
"""

import math
import queue
import sys
import threading
import time
import weakref
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import cycle
from typing import Callable

import numpy as np
import torch
from torch import Tensor

from .cache import WHOLE
from .link import Key
from .machine import HOST_THREAD, yield_processor

ANSWERS = 256                               # buffers for answers on their way to the device
LAST = 2**31 - 1                            # number of a job that never comes
MOMENT = 2e-5                               # seconds that the thread just asked has the interpreter to itself
PATIENCE = 1e-4                             # seconds between two looks at the lane while an answer is awaited
SWITCH = 2e-5                               # seconds until a thread that waits for the interpreter gets it
USUAL: list[float] = []                     # what it was before there was a host
FOLLOWING = 0.1                             # weight of the newest in a running mean
FORGET = 2.0                                # seconds in which the mean forgets most of what it has seen


class HostError(Exception):
    """An expert that the host could not compute."""


@dataclass(slots=True, eq=False)
class Job:
    """One expert, or so many `blocks` of it, for the row `x` [1, D] of one request, the `number`-th; `answer`
    holds what came of it once it has `ended`. (`done` wakes who waits. No `threading.Event`: a Ctrl-C in its
    `wait` may leave it locked.)"""

    number: int
    key: Key
    blocks: int
    x: Tensor
    answer: Tensor
    asked: float                            # when x was there
    done: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)
    dropped: bool = False                   # its request has ended
    begun: float = 0.0
    ended: float = 0.0
    error: BaseException | None = None


class Host:
    """A thread that computes experts of these `keys`. It first calls `prepare()`, which gives `compute(key,
    blocks, x [1, D], out)` and `measure()`; the event `compiled` is set then, and `ready` when it has called
    `measure()`, which gives what `on_threads` finds. A `block` takes so many bytes of an expert (0: it is not
    to be divided), and goes `into` [2F], fp32. `pump` feeds the lane; `wait_for` is the lane's."""

    def __init__(self, width: int, dtype: torch.dtype, pin: bool, keys, prepare: Callable[[], tuple],
                 block: int, into: Tensor, pump: Callable[[], None] = lambda: None,
                 wait_for: Callable[[Tensor, int], bool] = lambda word, value: False):
        if sys.getswitchinterval() > 2 * SWITCH:
            USUAL.append(sys.getswitchinterval())
            sys.setswitchinterval(SWITCH)
        self.keys, self.block, self.into = keys, block, into
        self.pump, self.wait_for, self.now = pump, wait_for, time.perf_counter
        self.jobs: dict[Key, Job] = {}      # not seen to be done
        self.answers: dict[Key, Tensor] = {}
        self.done = torch.zeros(1, dtype=torch.int32, pin_memory=pin)           # the number of the last one
        self.number = 0                     # of the last that was asked for
        self.late: dict[str, tuple[float, float]] = {}              # seconds that each thing took, and when
        self.last = 0.0                     # when the latest was done
        self.wakes = 0.0                    # seconds from `take` until its thread, if it sleeps, has begun
        self.free, self.busy = 0.0, 0.0
        self.log: list | None = None
        self.rows = cycle(torch.empty(ANSWERS, width, dtype=dtype, pin_memory=pin).unbind())
        self.queue: queue.SimpleQueue = queue.SimpleQueue()
        self.compiled, self.ready = threading.Event(), threading.Event()
        self.state: dict = {}               # `each`, `block` and `threads`, or the `error`
        self.thread = threading.Thread(target=work, daemon=True, name=HOST_THREAD, args=(
            self.queue, self.done.numpy(), prepare, self.compiled, self.ready, self.state))
        self.thread.start()
        self.close = weakref.finalize(self, stop, self.queue, self.thread, self.ready)

    def trouble(self) -> str | None:
        """Why it can compute nothing yet, or at all; None if it can."""
        if "each" in self.state:
            return None
        error = self.state.get("error")
        return "its code is still being compiled" if error is None else f"{type(error).__name__}: {error}"

    def has(self, key: Key) -> bool:
        """May it compute this expert?"""
        return key in self.keys

    def free_at(self) -> float:
        return max(self.now() + self.wakes, self.free)

    def seconds(self, blocks: int = WHOLE) -> float:
        """How long so much of an expert takes.

        A host that has become slow is used less, so nobody would notice that it is fast again. Therefore
        what was seen of late fades, and what was measured at first comes back."""
        thing, n = self.timed(blocks)
        first = self.state[thing]
        seen, when = self.late.get(thing, (first, 0.0))
        return n * (first + math.exp((when - self.now()) / FORGET) * (seen - first))

    def timed(self, blocks: int) -> tuple[str, int]:
        """What is timed, as it is called in `state`, and how many of it these are. (Blocks and whole experts
        each by themselves: a call has its own cost.)"""
        return ("each", 1) if blocks == WHOLE else ("block", blocks)

    def take(self, x: Tensor) -> None:
        """The row [1, D] that the layer's experts are to be computed for. It may not change before they
        are, or nobody wants them any more."""
        self.collect()
        self.x, self.taken = x, self.now()

    def submit(self, experts: dict[Key, int]) -> None:
        """Begin to compute these experts of a layer, or so many of their blocks, in this order."""
        for key, blocks in experts.items():
            self.free = max(self.taken + self.wakes, self.free) + self.seconds(blocks)
            self.number += 1
            answer = self.into
            if blocks == WHOLE:
                answer = self.answers[key] = next(self.rows)
            self.jobs[key] = job = Job(self.number, key, blocks, self.x, answer, self.taken)
            self.queue.put(job)
        time.sleep(MOMENT)                  # (its thread needs the interpreter to begin)

    def wait(self, key: Key) -> None:
        """What is computed from here on finds an expert's answer: the device waits for it, or we do, and the
        lane is fed meanwhile."""
        job = self.jobs.get(key)            # (or it has been seen to be done)
        if job is not None and (job.ended or not self.wait_for(self.done, job.number)):
            while key in self.jobs:
                self.pause()
                self.pump()

    def pause(self) -> None:
        """The device waits for our answer, so until that is there our threads shall have all processors; who
        awaits the device then is to know at once."""
        job = next(iter(self.jobs.values()), None)
        if job is None:
            yield_processor()
        elif job.ended or "gone" in self.state:
            self.collect()
        else:
            with suppress(queue.Empty):
                job.done.get(timeout=PATIENCE)

    def answer(self, key: Key) -> Tensor:
        """Where it is, [D], for a while; the device may copy it from there. (What comes of blocks lies where
        the worker was told to put it.)"""
        return self.answers.pop(key)

    def collect(self) -> None:
        """The device has done what it was told so far, so what it waited for is there. Raises `HostError` if
        something is not."""
        for job in list(self.jobs.values()):
            if job.error is not None:
                raise HostError(f"{type(job.error).__name__}: {job.error}") from job.error
            if "gone" in self.state and not job.ended:              # (a Ctrl-C in `is_alive` may spoil it)
                raise HostError("its thread is gone")
            if not job.ended:               # (its turn comes)
                break
            mean, took = self.seconds(job.blocks), job.ended - job.begun
            self.busy += took
            # (An outlier counts less.)
            if job.asked >= self.last:
                self.wakes += FOLLOWING * (min(job.begun - job.asked, 3 * self.wakes + PATIENCE) - self.wakes)
            thing, n = self.timed(job.blocks)
            mean += FOLLOWING * (min(took, 3 * mean) - mean)
            self.late[thing], self.last = (mean / n, self.now()), job.ended
            del self.jobs[job.key]
            if not self.jobs:
                self.free = job.ended
            if self.log is not None:
                self.log.append((job.key, job.begun, job.ended))

    def abandon(self) -> None:
        """After a failure or an interruption: nobody wants the answers that are under way."""
        for job in self.jobs.values():
            job.dropped = True
        begun = any(job.begun and not job.ended for job in self.jobs.values())      # (which it finishes)
        self.free = self.now() + self.seconds() if begun else 0.0
        self.jobs.clear()
        self.answers.clear()


@torch.inference_mode()
def work(jobs: queue.SimpleQueue, done: np.ndarray, prepare, compiled: threading.Event,
         ready: threading.Event, state: dict) -> None:
    """The thread's life. It knows nothing of the `Host`, which may be gone. Whatever comes, nobody may wait
    for `done [1]` in vain: a GPU that does cannot be interrupted."""
    try:
        compute, measure = prepare()
        compiled.set()
        state |= measure()
    except BaseException as error:          # (a compiler that fails, say)
        state["error"] = error
    finally:
        compiled.set()
        ready.set()
    try:
        while "error" not in state and (job := jobs.get()) is not None:
            if not job.dropped:
                job.begun = time.perf_counter()
                try:
                    compute(job.key, job.blocks, job.x, job.answer)
                except BaseException as error:
                    job.error = error
            job.ended = time.perf_counter()
            done[0] = job.number
            job.done.put(None)
            del job
    finally:
        state["gone"] = True
        done[0] = LAST
    if USUAL and [thread.name for thread in threading.enumerate()].count(HOST_THREAD) == 1:     # (this one)
        sys.setswitchinterval(USUAL.pop())
        USUAL.clear()


def stop(jobs: queue.SimpleQueue, thread: threading.Thread, ready: threading.Event) -> None:
    """The engine is gone, or the interpreter ends: nothing may be computed after that. (What is being
    compiled is left alone.)"""
    jobs.put(None)
    if ready.is_set() and thread is not threading.current_thread():
        thread.join(1)
