"""What this machine has and allows: processors, host memory, a compiler, memory on the GPU."""

import ctypes
import gc
import os
import threading
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Callable

import torch

from .config import MixtralConfig
from .errors import UserError, format_bytes, note
from .quant import COMPILER, SAME_EVERYWHERE, is_small

SYSTEM = ctypes.CDLL(None)
HOST_THREAD = "duoserve-host"               # the name of those that compute experts
TORCH_THREADS = torch.get_num_threads()     # what torch takes if it is not told
PAUSES: list[bool] = []                     # of each `uncollected` under way: did Python collect before it?


def usable_cpus() -> int:
    """How many CPUs this process may keep busy: its affinity, and no more than a container's quota."""
    cpus = len(os.sched_getaffinity(0))
    with suppress(OSError, ValueError):                             # (no quota is written as "max")
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
        cpus = min(cpus, max(1, round(quota / period)))
    return cpus


def set_threads(threads: int | None, config: MixtralConfig) -> None:
    """How many threads torch computes with on the CPU; for None as many as gain something.

    A product of one row with a small matrix is over before a second thread wakes. `OMP_NUM_THREADS` is
    obeyed.
    """
    if threads is None and "OMP_NUM_THREADS" not in os.environ:
        small = is_small(2 * config.intermediate_size * config.hidden_size)
        threads = 1 if small else min(usable_cpus(), TORCH_THREADS)
    if threads and threads != torch.get_num_threads():
        torch.set_num_threads(threads)


def yield_processor() -> None:
    """Whoever else wants the processor or the interpreter has it. (`time.sleep(0)` would sleep for 60 us, and
    `os.sched_yield` keeps the interpreter before Python 3.12.)"""
    SYSTEM.sched_yield()


def available_memory() -> int | None:
    """Bytes of host memory free without swapping, in the machine and in its container; None: unknown."""
    found = []
    with suppress(OSError, StopIteration):
        with open("/proc/meminfo") as info:
            kib = next(int(line.split()[1]) for line in info if line.startswith("MemAvailable"))
            found.append(kib * 1024)
    with suppress(OSError, StopIteration, ValueError):              # (no limit is written as "max")
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        with open("/sys/fs/cgroup/memory.stat") as info:
            found.append(limit - next(int(line.split()[1]) for line in info if line.startswith("anon ")))
    return min(found, default=None)


def can_compile(device: torch.device) -> bool:
    """Compile and run one line; where that fails (no compiler, no Triton) say so: the run goes on eager."""
    try:
        with COMPILER:
            torch._dynamo.config.run_gc_after_compile = False       # (see `uncollected`)
            run = torch.compile(lambda x: x * 2 + torch.compiler.is_compiling(), options=SAME_EVERYWHERE)
            if run(torch.ones(8, device=device))[0] != 3:
                raise RuntimeError("it is switched off")
        return True
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        note(f"torch.compile does not work here ({reason[0][:100]}); going on without it")
        return False


@contextmanager
def enough_memory():
    """Running out of GPU memory is something a user can mend."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError("the GPU is out of memory; leave more free with a smaller --gpu-memory") from error


@contextmanager
def uncollected():
    """What is garbage now is collected (a former engine has to go before there is room for the next), and
    nothing more in here: a compiler brings along several 100,000 objects, and to look at them again and again
    takes a sixth of loading; and an engine that is collected while CUDA captures a graph would synchronize,
    which is an error. Several threads may be in here at once."""
    was = gc.isenabled() or True in PAUSES
    try:
        PAUSES.append(was)
        gc.collect()
        gc.disable()
        yield
    finally:
        with suppress(ValueError):          # (a Ctrl-C came first)
            PAUSES.remove(was)
        if was and not PAUSES:
            gc.enable()


@cache
def cuda_runtimes() -> list[ctypes.CDLL]:
    """CUDA's runtime library as torch has loaded it: for what torch has no call for, or a slow one."""
    with open("/proc/self/maps") as maps:
        paths = {line.split(maxsplit=5)[5].strip() for line in maps if "libcudart" in line}
    libraries, pointer = [ctypes.CDLL(path) for path in sorted(paths)], ctypes.c_void_p
    for library in libraries:
        library.cudaMemcpyAsync.argtypes = pointer, pointer, ctypes.c_size_t, ctypes.c_int, pointer
    return libraries


def on_device(pinned: torch.Tensor, device: torch.device) -> torch.Tensor | None:
    """The same memory, as the device's kernels see it: they reach across the link for it. None if torch makes
    a copy instead (it takes the memory for another GPU's). On the CPU there is nothing to do."""
    if device.type == "cpu":
        return pinned
    view = SimpleNamespace(memory=pinned, __cuda_array_interface__={
        "shape": (pinned.nbytes,), "typestr": "|u1", "data": (pinned.data_ptr(), False), "version": 3})
    seen = torch.as_tensor(view, device=device).view(pinned.dtype).view(pinned.shape)
    return seen if seen.data_ptr() == pinned.data_ptr() else None


@cache
def stream_wait_value() -> Callable[..., int] | None:
    """The driver's `cuStreamWaitValue32`, for which the runtime has no call; None if there is no driver."""
    with suppress(OSError, AttributeError):
        wait = ctypes.CDLL("libcuda.so.1").cuStreamWaitValue32_v2
        wait.argtypes = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint
        return wait


def clear_cuda_error() -> None:
    """A failed runtime call leaves its code behind, and the next, unrelated kernel launch would raise it."""
    for library in cuda_runtimes():
        library.cudaGetLastError()


def pin(base: int, nbytes: int, region: int) -> list[int]:
    """Register host memory with CUDA, in parts of `region` bytes, so that it is copied from where it is. ->
    where these begin; none if the driver refuses, which is said."""
    runtime, done = torch.cuda.cudart(), []
    for start in range(base, base + nbytes, region):
        code = runtime.cudaHostRegister(start, min(region, base + nbytes - start), 0)
        if int(code) != 0:
            for address in done:
                runtime.cudaHostUnregister(address)
            clear_cuda_error()
            note(f"the driver will not pin {format_bytes(nbytes)} of host memory (cudaHostRegister: {code}); "
                 "transfers go through a small pinned buffer: slower, with hardly any overlap")
            return []
        done.append(start)
    return done


def unpin(addresses: list[int], memory) -> None:
    """Take back what `pin` did with parts of `memory`, when nothing is copied from there any more."""
    if threading.current_thread().name == HOST_THREAD:  # (it collects garbage, too; the GPU may await it)
        return threading.Thread(target=unpin, args=(addresses, memory)).start()
    torch.cuda.synchronize()
    for address in addresses:
        torch.cuda.cudart().cudaHostUnregister(address)
