"""ExpertStore: every expert's bytes in host memory, one contiguous block each, registered with CUDA if there is one.

The memory is one anonymous map of exactly the size needed. `pin_memory` would round every block up to a power of two
(94 MB to 128 MiB); registering our own pages with the driver pins them as they are.
"""

import ctypes
import mmap
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from .errors import UserError, human
from .packed import PackedModel

REGION = 2**30                              # bytes registered at a time


class ExpertStore:
    """`block(layer, expert)` is that expert's bytes on the host; `pinned` says whether CUDA can copy them directly."""

    def __init__(self, model: PackedModel, pin: bool = False, progress=None, threads: int = 8):
        layers, experts, nbytes = model.config.num_hidden_layers, model.config.num_local_experts, model.layout.nbytes
        stride = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE        # pages: no copy may cross two registrations
        total = layers * experts * stride
        available = available_memory()
        if available is not None and total > available:
            raise UserError(f"{model.directory}: its experts take {human(total)} of host memory and {human(available)} "
                            "are available; free some or use a machine with more")
        self.memory = mmap.mmap(-1, total)
        self.bytes = np.frombuffer(self.memory, np.uint8).reshape(layers, experts, stride)[..., :nbytes]
        self.tensor = torch.from_numpy(self.bytes)

        def load(key):
            model.read_expert(*key, self.bytes[key])
            if progress:
                progress.add(nbytes)

        pool = ThreadPoolExecutor(threads)
        try:
            for _ in pool.map(load, [(i, e) for i in range(layers) for e in range(experts)]):
                pass                        # the first corrupted expert ends the loading
        finally:
            pool.shutdown(cancel_futures=True)
        self.region = max(1, REGION // stride) * stride             # bytes: no copy may cross a multiple of it
        self.pinned = pin and self._register(total, self.region)

    def block(self, layer: int, expert: int) -> torch.Tensor:
        """uint8 [nbytes], on the host."""
        return self.tensor[layer, expert]

    def copier(self, slots: torch.Tensor, chunk: int):
        """-> copy(transfer, start, stop): those bytes of an expert into its row of slots [N, nbytes].

        On the current stream. Unpinned memory goes through two pinned buffers: a direct copy would block the host.
        """
        if self.pinned or slots.device.type == "cpu":
            rows, blocks = slots.unbind(), [layer.unbind() for layer in self.tensor]        # made once: this is hot

            def copy(transfer, start, stop):
                layer, expert = transfer.key
                rows[transfer.slot][start:stop].copy_(blocks[layer][expert][start:stop], non_blocking=True)
            return copy
        ring = [(torch.empty(chunk, dtype=torch.uint8, pin_memory=True), torch.cuda.Event()) for _ in range(2)]

        def staged(transfer, start, stop):
            for begin in range(start, stop, chunk):
                end = min(begin + chunk, stop)
                buffer, free = ring[0]
                free.synchronize()          # its last copy is done (at first: never recorded, which counts as done)
                buffer[:end - begin].copy_(self.block(*transfer.key)[begin:end])
                slots[transfer.slot, begin:end].copy_(buffer[:end - begin], non_blocking=True)
                free.record()
                ring.reverse()
        return staged

    def _register(self, total: int, region: int) -> bool:
        """Pin our pages, region by region; on failure undo it and say what that costs."""
        runtime, base, done = torch.cuda.cudart(), self.bytes.ctypes.data, []
        for start in range(0, total, region):
            code = runtime.cudaHostRegister(base + start, min(region, total - start), 0)
            if int(code) != 0:
                for address in done:
                    runtime.cudaHostUnregister(address)
                clear_cuda_error()
                print(f"note: the driver will not pin {human(total)} of host memory (cudaHostRegister: {code}); "
                      "transfers go through a small pinned buffer: slower, with hardly any overlap", file=sys.stderr)
                return False
            done.append(base + start)

        def release(memory, regions=done):  # holding the map: it must outlive its registration
            torch.cuda.synchronize()
            for address in regions:
                runtime.cudaHostUnregister(address)

        self.close = weakref.finalize(self, release, self.memory)      # also at interpreter exit
        return True


def clear_cuda_error() -> None:
    """A failed runtime call leaves its code behind, and the next, unrelated kernel launch would raise it."""
    with open("/proc/self/maps") as maps:
        paths = {line.split()[-1] for line in maps if "libcudart" in line}
    for path in paths:
        ctypes.CDLL(path).cudaGetLastError()


def available_memory() -> int | None:
    """Bytes of host memory that can be had without swapping; None where the system does not say."""
    try:
        with open("/proc/meminfo") as info:
            return next(int(line.split()[1]) * 1024 for line in info if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
