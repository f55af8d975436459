"""Files that can be trusted: written whole or not at all, and read with errors that name them; and the
safetensors format, read without loading what is not asked for, written one tensor at a time.

Nothing is ever unpickled.
"""

import json
import os
import re
import zlib
from contextlib import contextmanager, suppress
from math import prod
from pathlib import Path
from typing import Iterable

import torch

from .errors import UserError

ALIGN = 256                                 # bytes: of a file's tensors, an expert's fields, the next expert
DTYPES = {"U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
          "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
          "BOOL": torch.bool}
CODES = {dtype: code for code, dtype in DTYPES.items()}
LONGEST_HEADER = 100 * 10**6                # bytes; the safetensors format's own limit
CHUNK = 16 * 2**20                          # bytes read at a time


@contextmanager
def atomic(path: Path):
    """A file that appears under its name only when it is whole and on the disk; a failure leaves nothing.

    What is read meanwhile is read under `reading`, so that the right file is named in an error.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); complete files stay") from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


@contextmanager
def reading(path: Path):
    """A file open for reading; an error of the system is a `UserError` that names it."""
    try:
        with open(path, "rb") as file:
            yield file
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def read_json(path: Path):
    """What a JSON file holds; `UserError` if it cannot be read or is none."""
    with reading(path) as file:
        try:
            return json.load(file)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: is not JSON ({error}); get or make it again") from None


class Header:
    """A safetensors file's header, checked: `tensors[name] = (dtype, shape, start, end)`, in bytes, and
    `crc[name]`, if there is a table of them (see `write_tensors`)."""

    def __init__(self, path: Path):
        self.path = path = Path(path)
        with reading(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, LONGEST_HEADER):
                raise UserError(f"{path}: damaged, truncated or not a safetensors file; get or make it again")
            self.raw = file.read(length)
        self.tensors, self.size = {}, size
        try:
            entries = json.loads(self.raw)
            self.metadata = {key: str(value) for key, value in entries.pop("__metadata__", {}).items()}
            for name, entry in entries.items():
                code, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
                if code not in DTYPES and re.fullmatch("[A-Z0-9_]{2,20}", code):
                    raise UserError(f"{path}: {name} is of type {code}, which is not read here; give the "
                                    "model in 16 bits, or in 4 by AWQ or GPTQ")
                dtype = DTYPES[code]
                if len(shape) > 8 or not all(type(n) is int and n >= 0 for n in (*shape, start, end)):
                    raise ValueError(f"{name} has no sensible size")
                if end - start != prod(shape) * dtype.itemsize:
                    raise ValueError(f"{name}'s size does not match its shape")
                start, end = start + 8 + length, end + 8 + length
                if end > size:
                    raise UserError(f"{path}: truncated: {name} ends at byte {end} of {size}; get it again")
                self.tensors[name] = dtype, shape, start, end
            table = self.metadata.get("crc32", "").split()
            self.crc = dict(zip(self.tensors, table)) if len(table) == len(self.tensors) else {}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path}: its safetensors header is damaged ({error!r}); "
                            "get or make it again") from None

    def expect(self, name: str, shape: tuple[int, ...], dtypes: Iterable[torch.dtype], described: str):
        """`UserError` unless a tensor is there, in the shape that it has by the file `described`, and of one
        of these types."""
        if name not in self.tensors:
            raise UserError(f"{self.path}: {name} is not in it; get or make it again")
        dtype, found = self.tensors[name][:2]
        if found != shape:
            raise UserError(f"{self.path}: {name} has shape {list(found)}, by {described} {list(shape)}; one "
                            "of the two belongs to another model")
        if dtype not in dtypes:
            wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
            raise UserError(f"{self.path}: {name} is {dtype}; {wanted} is expected")

    def read(self, name: str) -> torch.Tensor:
        """One tensor, onto the host; checked, if its CRC is known."""
        dtype, shape, start, end = self.tensors[name]
        data = torch.empty(end - start, dtype=torch.uint8)
        with reading(self.path) as file:
            crc = read_into(file, start, memoryview(data.numpy()), self.path, 0 if self.crc else None)
        if self.crc:
            self.check(name, crc)
        return data.view(dtype).view(shape)

    def check(self, name: str, crc: int) -> None:
        """`UserError` unless a tensor's CRC-32 is the one that was written down."""
        if f"{crc:08x}" != self.crc[name]:
            raise UserError(f"{self.path}: {name.replace('.', ' ')} is corrupted (its CRC-32 does not "
                            "match); get or make it again")


def read_into(file, start: int, buffer: memoryview, path: Path, crc: int | None = 0) -> int | None:
    """Fill `buffer` from the file at `start` -> `crc` continued over it (None: no CRC). Thread-safe."""
    done = 0
    while done < len(buffer):
        n = os.preadv(file.fileno(), [buffer[done:done + CHUNK]], start + done)
        if not n:
            raise UserError(f"{path}: truncated while it was read; get or make it again")
        if crc is not None:
            crc = zlib.crc32(buffer[done:done + n], crc)
        done += n
    return crc


def write_tensors(path: Path, shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]],
                  metadata: dict[str, str], tensors: Iterable[tuple[str, torch.Tensor]],
                  progress=lambda nbytes: None) -> None:
    """Write a safetensors file whose header also holds each tensor's CRC-32. The `tensors` come one at a
    time, as announced in `shapes`, so that only the current one need be in memory.

    The header comes first in the file but its CRCs are known last; so it is written twice, equally long.
    """
    entries, crc, start = {}, {}, 0
    for name, (dtype, shape) in shapes.items():
        end = start + prod(shape) * dtype.itemsize
        entries[name] = {"dtype": CODES[dtype], "shape": shape, "data_offsets": (start, end)}
        start = end

    def write_header() -> None:
        table = " ".join(f"{crc.get(name, 0):08x}" for name in entries)
        text = json.dumps({"__metadata__": metadata | {"crc32": table}} | entries).encode()
        text += b" " * (-(len(text) + 8) % ALIGN)
        file.seek(0)
        file.write(len(text).to_bytes(8, "little") + text)

    with atomic(path) as file:
        write_header()
        for name, tensor in tensors:
            data = tensor.contiguous().cpu().view(-1).view(torch.uint8).numpy()
            crc[name] = zlib.crc32(data)
            file.write(data)
            progress(data.nbytes)
        write_header()
