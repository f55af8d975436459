"""What a user may choose, checked once: of an engine (`EngineOptions`) and of how it samples (`SamplingParams`).

Every mistake is a `UserError` that names the flag, or the argument if there is no such flag.
"""

import os
from dataclasses import dataclass
from numbers import Integral, Real
from operator import index
from pathlib import Path

import torch

from .config import MixtralConfig
from .errors import UserError, parse_amount, parse_rate
from .policies import load_policy
from .predictor import check_exists
from .store import usable_cpus

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SMALL_MATRIX = 2**22                        # weights; on one thread a row takes about 4 ms
MOST_THREADS = 1024
TORCH_THREADS = torch.get_num_threads()     # what it takes if it is not told


@dataclass
class EngineOptions:
    """`device`: 'cpu', 'cuda' or 'cuda:N' (None: a GPU if there is one); `dtype`: a torch dtype or its name (None:
    float32 on the CPU, bfloat16 on CUDA, float16 below compute capability 8.0); `policy`: a name, or a file that
    defines one; `cache_experts`: slots; `gpu_memory`: bytes, '4GiB' or '15%' of the packed model; `host_memory`:
    likewise, for the experts used most, the others being read from the disk (None: all are kept); `context`: prompt and
    new tokens (None: the model's, 4096 at most); `predictor`: a file, 'none', or None for the model's own; `compile`:
    None for yes on CUDA alone; `threads`: of torch in this process, for what is computed on the CPU (None: as many as
    gain something); `simulate_link`: bytes a second, or '25GB/s'.

    Afterwards `device`, `dtype` and `simulate_link` are what torch and the lane understand.
    """

    device: torch.device | str | None = None
    dtype: torch.dtype | str | None = None
    policy: str = "duo"
    cache_experts: int | None = None
    gpu_memory: int | str | None = None
    host_memory: int | str | None = None
    context: int | None = None
    predictor: str | Path | None = None
    compile: bool | None = None
    threads: int | None = None
    simulate_link: float | str | None = None

    def __post_init__(self):
        for name, kinds in (("cache_experts", Integral), ("context", Integral), ("threads", Integral),
                            ("gpu_memory", (Integral, str)), ("host_memory", (Integral, str)), ("compile", bool),
                            ("predictor", (str, Path)), ("simulate_link", (Real, str)), ("policy", (str, Path))):
            value = getattr(self, name)
            if not isinstance(value, kinds) and (value is not None or name == "policy"):    # (only from Python)
                words = " or ".join(k.__name__ for k in (kinds if isinstance(kinds, tuple) else (kinds,)))
                raise UserError(f"{name}={value!r}: give {words.replace('Integral', 'a whole number')}")
        load_policy(self.policy)
        self.device = check_device(self.device)
        self.dtype = check_dtype(self.dtype, self.device)
        if self.cache_experts is not None and self.cache_experts < 2:
            raise UserError(f"--cache-experts {self.cache_experts}: two is the least that works")
        if self.threads is not None and not 1 <= self.threads <= MOST_THREADS:
            raise UserError(f"--threads {self.threads}: a whole number from 1 to {MOST_THREADS}")
        for flag, amount in (("--gpu-memory", self.gpu_memory), ("--host-memory", self.host_memory)):
            if amount is not None:
                parse_amount(amount, 10**12, flag)
        if self.predictor not in (None, "none"):
            check_exists(self.predictor)
        if isinstance(self.simulate_link, str):
            self.simulate_link = parse_rate(self.simulate_link, "--simulate-link")
        if self.simulate_link is not None and not 1e3 <= self.simulate_link < 1e15:
            raise UserError(f"--simulate-link {self.simulate_link}: not a speed; write it like 25GB/s")

    def budget(self, model_bytes: int) -> int | None:
        """Bytes of the device that may be used; None: no bound but the number of slots."""
        if self.gpu_memory is not None:
            return parse_amount(self.gpu_memory, model_bytes, "--gpu-memory")
        if self.device.type == "cpu" or self.cache_experts is not None:
            return None
        return int(torch.cuda.mem_get_info(self.device)[0] * 0.92)  # what is free, less a margin


@dataclass
class SamplingParams:
    """`temperature` 0 is greedy; `top_k` (None: all) and `top_p` bound from how many of the likeliest tokens is drawn;
    another `seed`, another text."""

    max_new_tokens: int = 128
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float = 0.95
    seed: int = 0

    def __post_init__(self):
        for name, kind, least, below, words in (
                ("max_new_tokens", Integral, 1, float("inf"), "at least 1"),
                ("temperature", Real, 0, float("inf"), "0 (greedy) or more"),
                ("top_k", Integral, 1, float("inf"), "at least 1"),
                ("top_p", Real, 2**-1074, 1 + 2**-52, "above 0, at most 1"),
                ("seed", Integral, 0, 2**64, "a number from 0 to 2^64 - 1")):
            value = getattr(self, name)
            if name == "top_k" and value is None:
                continue
            if not isinstance(value, kind):                         # (only from Python: no flags)
                raise UserError(f"{name}={value!r}: give a {'whole ' if kind is Integral else ''}number")
            if not least <= value < below:
                raise UserError(f"--{name.replace('_', '-')} {value}: {words}")


def check_device(device: torch.device | str | None) -> torch.device:
    asked = device or "cuda"
    try:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise UserError(f"--device {device}: write cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not 0 <= (device.index or 0) < torch.cuda.device_count():
        raise UserError(f"--device {asked}: no such GPU here; use --device cpu")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {device}: only cpu and cuda are supported")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def check_dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    if dtype is None:
        if device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise UserError(f"--dtype {dtype}: choose one of {', '.join(DTYPES)}")
    return DTYPES[name]


def check_context(context: int, most: int) -> None:
    if not 2 <= context <= most:
        raise UserError(f"--context {context}: this model takes from 2 to {most} tokens")


def as_ids(ids, wanted: str) -> list[int]:
    """A list, an array or a tensor of whole numbers as plain ints; `wanted` says what should have been given."""
    items = ids.tolist() if hasattr(ids, "tolist") else ids
    if isinstance(items, (str, bytes, bytearray, dict)) or not hasattr(items, "__iter__"):
        raise UserError(f"{wanted}, not {type(ids).__name__}")
    out = []
    for i, item in enumerate(items):
        try:
            out.append(index(item))
        except TypeError:                   # (also for a float: it would be whole by accident only)
            raise UserError(f"{wanted}; what is at [{i}] is {item!r}, not a whole number") from None
    return out


def set_threads(threads: int | None, config: MixtralConfig) -> None:
    """How many threads torch computes with on the CPU; for None as many as gain something.

    A product of one row with a small matrix is over before a second thread has been woken. `OMP_NUM_THREADS` is obeyed.
    """
    if threads is None and "OMP_NUM_THREADS" not in os.environ:
        small = 2 * config.intermediate_size * config.hidden_size < SMALL_MATRIX
        threads = 1 if small else min(usable_cpus(), TORCH_THREADS)
    if threads and threads != torch.get_num_threads():
        torch.set_num_threads(threads)
