"""ExpertStore: the experts' bytes on the host, one contiguous block each, registered with CUDA if there is
one.

Threads read them while the engine captures its code. The memory is one anonymous map of exactly the size
needed. `pin_memory` would round every block up to a power of two (94 MB to 128 MiB); registering our own
pages with the driver pins them as they are. Where the memory does not hold all experts, those used least stay
in their files, and come through a small buffer when the lane asks for them.
"""

import mmap
import os
import weakref
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import torch

from .errors import UserError, format_bytes
from .files import read_into, reading
from .link import Key, LinkError
from .machine import pin, unpin
from .packed import PackedModel

REGION = 2**30                              # bytes registered at a time
READERS = 8                                 # threads that load experts


def stride_of(model: PackedModel) -> int:
    """An expert's bytes in memory: whole pages, as no copy may cross two registrations."""
    return -(-model.layout.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE


def most_used(keys: list[Key], popularity: np.ndarray | None) -> list[Key]:
    """By falling `popularity` [layers, experts]; if nothing is known, one expert of each layer in turn."""
    return sorted(keys, key=lambda key: key[1] if popularity is None else -popularity[key])


class ExpertStore:
    """`blocks[layer, expert]`, uint8 [nbytes], are the bytes of an expert in memory; `pinned` says whether
    CUDA can copy them directly. Both hold after `wait`.

    `kept` names those in memory. The others' files must stay as they are while the store lives.
    """

    def __init__(self, model: PackedModel, kept: list[Key], pin: bool = False, progress=None):
        self.model, self.nbytes, stride = model, model.layout.nbytes, stride_of(model)
        total = len(kept) * stride
        try:
            self.memory = mmap.mmap(-1, max(total, mmap.PAGESIZE))
        except OSError as error:
            raise UserError(f"{model.directory}: {format_bytes(total)} of host memory for its experts cannot "
                            f"be had ({error.strerror}); ask for less with --host-memory") from None
        self.bytes = np.frombuffer(self.memory, np.uint8, total).reshape(len(kept), stride)[:, :self.nbytes]
        self.stacked = torch.from_numpy(self.bytes)
        self.blocks = dict(zip(sorted(kept), self.stacked.unbind()))

        # Of the experts on the disk: the CRC so far, until it has been checked, and a stamp of their files.
        self.crc = {key: 0 for key in model.config.expert_keys if key not in self.blocks}
        self.stamps = {}
        self.bytes_read = 0                 # of theirs, since loading
        for layer in {layer for layer, _ in self.crc}:
            with reading(model.locate(f"layers.{layer}.experts.0")[0].path) as file:
                self.stamps[layer] = stamp(file)
        self.region = max(1, REGION // stride) * stride             # bytes; no copy may cross a multiple
        self.to_pin, self.pinned, self.reading = total if pin else 0, False, []     # bytes to pin

        def load(key):
            model.read_expert(*key, self.blocks[key].numpy())
            if progress:
                progress.add(self.nbytes)

        pool = ThreadPoolExecutor(READERS)
        try:
            for key in self.blocks:
                self.reading.append(pool.submit(load, key))
        except BaseException:               # (a Ctrl-C)
            self.stop()
            raise
        finally:
            pool.shutdown(wait=False)       # (its threads end when nothing is left)

    def wait(self) -> None:
        """Until all that is kept has been read, and is pinned. Raises `UserError` for the first damaged
        expert."""
        each = None
        try:
            for each in self.reading:
                each.result()
        finally:
            each = None                     # (it would hold an error that holds this frame, and so the store)
            self.stop()
        if self.to_pin and (addresses := pin(self.bytes.ctypes.data, self.to_pin, self.region)):
            self.pinned = True
            # (At the interpreter's exit, too. It holds the map, which must outlive that.)
            self.close = weakref.finalize(self, unpin, addresses, self.memory)
        self.to_pin = 0

    def stop(self) -> None:
        """Read no more than this. (Where `wait` was not called the store is of no use then.)"""
        for each in self.reading:
            each.cancel()
        wait(self.reading)
        self.reading = []

    def fetch(self, key: Key, start: int, into: torch.Tensor) -> None:
        """Copy an expert's bytes from `start` on into uint8 [n], from memory or from the disk.

        Of what comes from the disk the CRC is checked when it is first read to its end: by then its last
        chunk has not been handed on, so a damaged expert is never computed with, and loading need not read
        what it does not keep. From then on its file must stay as it was. Raises `LinkError`, naming the file.
        """
        if key in self.blocks:
            into.copy_(self.blocks[key][start:start + len(into)])
            return
        header, inside = self.model.locate(f"layers.{key[0]}.experts.{key[1]}")
        if start == 0 and key in self.crc:
            self.crc[key] = 0               # an earlier transfer may have been dropped half-way
        offset, crc = header.tensors[inside][2], self.crc.get(key)
        host = into if into.is_cpu else torch.empty_like(into, device="cpu")
        try:
            with reading(header.path) as file:
                if start == 0:              # the system reads ahead while we are still at the first chunk
                    os.posix_fadvise(file.fileno(), offset, self.nbytes, os.POSIX_FADV_WILLNEED)
                crc = read_into(file, offset + start, memoryview(host.numpy()), header.path, crc)
                if stamp(file) != self.stamps[key[0]]:
                    raise UserError(f"{header.path}: was changed while it was in use; start again")
            self.bytes_read += len(into)
            if crc is not None:
                self.crc[key] = crc
                if start + len(into) == self.nbytes:
                    header.check(inside, crc)
                    del self.crc[key]
        except UserError as error:
            raise LinkError(str(error)) from error
        into.copy_(host)                    # (nothing is done if they are the same)

    def where(self, key: Key, start: int, stop: int) -> tuple[int, int]:
        """Which bytes of an expert are the `start`-th to `stop`-th that are sent: from its end towards its
        beginning, as the host may do what is computed with its first ones. What lies on the disk, and is not
        for the host, is sent as it is read."""
        return (self.nbytes - stop, self.nbytes - start) if key in self.blocks else (start, stop)

    def pinned_block(self, key: Key) -> torch.Tensor | None:
        """An expert's bytes, if CUDA can copy them from where they are."""
        return self.blocks.get(key) if self.pinned else None


def stamp(file) -> tuple[int, ...]:
    """What changes when somebody writes to a file, or puts another in its place."""
    status = os.fstat(file.fileno())
    return status.st_ino, status.st_size, status.st_mtime_ns
