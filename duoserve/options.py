"""What a user may choose, checked once: of an engine (`EngineOptions`) and of how it samples
(`SamplingParams`).

Every mistake is a `UserError` that names the flag, or the argument if there is no such flag.
"""

import os
import sys
from dataclasses import dataclass, fields
from numbers import Integral, Real
from operator import index
from pathlib import Path
from typing import get_args

import torch

from .config import MixtralConfig
from .errors import UserError, note, parse_amount, parse_rate
from .policies import load_policy
from .predictor import check_exists

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
          "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "half": torch.float16}
KINDS = {Integral: "a whole number", Real: "a number"}
MOST_THREADS = 1024
DRIVER = "nvidia-smi shows the driver; CUDA 13 needs 580 or newer"
LARGEST = 1e30                              # beyond any sense, within a float32


def check_types(options) -> None:
    """`UserError` unless every field is of its type. (It may be from Python only: flags have been parsed.)"""
    for field in fields(options):
        value, kinds = getattr(options, field.name), get_args(field.type) or (field.type,)
        if not isinstance(value, kinds):
            names = (KINDS.get(kind, kind.__name__) for kind in kinds if kind is not type(None))
            raise UserError(f"{field.name}={value!r}: give {' or '.join(names)}")


def check_range(options, name: str, least: float, most: float, words: str) -> None:
    """`UserError` if a field is a number and not in this range."""
    value = getattr(options, name)
    if isinstance(value, Real) and not least <= value <= most:
        raise UserError(f"--{name.replace('_', '-')} {value}: {words}")


@dataclass
class EngineOptions:
    """`device`: 'cpu', 'cuda' or 'cuda:N' (None: a GPU if there is one); `dtype`: a torch dtype or its name
    (None: float32 on the CPU, bfloat16 on CUDA, float16 below compute capability 8.0); `policy`: a name, or a
    file that defines one; `cache_experts`: slots; `gpu_memory`: bytes, '4GiB' or '15%' of the packed model;
    `host_memory`: likewise, for the experts used most, the others being read from the disk (None: all are
    kept); `context`: prompt and new tokens (None: the model's, 4096 at most); `predictor`: a file, 'none', or
    None for the model's own; `compile`: None for yes on CUDA alone; `threads`: of torch in this process, for
    what is computed on the CPU (None: as many as gain something); `host_threads`: those that compute missing
    experts beside a GPU, or 'auto': all but one, if that helps. (On a CPU, where the number is the process's,
    one beside, which computes with as many as `threads` says; so does what is simulated.) `simulate_link`,
    `simulate_host`: bytes a second, or '25GB/s'.

    Afterwards `device`, `dtype` and the speeds are what torch, lane and host understand.
    """

    device: torch.device | str | None = None
    dtype: torch.dtype | str | None = None
    policy: str | Path = "duo"
    cache_experts: Integral | None = None
    gpu_memory: Integral | str | None = None
    host_memory: Integral | str | None = None
    context: Integral | None = None
    predictor: str | Path | None = None
    compile: bool | None = None
    threads: Integral | None = None
    host_threads: Real | str = "auto"
    simulate_link: Real | str | None = None
    simulate_host: Real | str | None = None

    def __post_init__(self):
        check_types(self)
        check_range(self, "cache_experts", 2, LARGEST, "two is the least that works")
        check_range(self, "threads", 1, MOST_THREADS, f"a whole number from 1 to {MOST_THREADS}")
        threads = str(self.host_threads)
        if threads != "auto":
            if not threads.isdecimal() or int(threads) > MOST_THREADS:
                raise UserError(f"--host-threads {threads}: auto, or a whole number up to {MOST_THREADS} "
                                "(0: never)")
            self.host_threads = int(threads)
        load_policy(self.policy)
        self.device = check_device(self.device)
        self.dtype = check_dtype(self.dtype, self.device)
        for flag, amount in (("--gpu-memory", self.gpu_memory), ("--host-memory", self.host_memory)):
            if amount is not None:
                parse_amount(amount, 10**12, flag)
        if self.predictor not in (None, "none"):
            check_exists(self.predictor)
        for name in ("simulate_link", "simulate_host"):
            if isinstance(rate := getattr(self, name), str):
                setattr(self, name, parse_rate(rate, f"--{name.replace('_', '-')}"))
            check_range(self, name, 1e3, 1e15, "not a speed; write it like 25GB/s")
        if self.simulate_host and (self.device.type != "cpu" or not self.simulate_link):
            raise UserError("--simulate-host: goes with --device cpu and --simulate-link; give both")

    def budget(self, model_bytes: int) -> int | None:
        """Bytes of the device that may be used; None: no bound but the number of slots."""
        if self.gpu_memory is not None:
            return parse_amount(self.gpu_memory, model_bytes, "--gpu-memory")
        if self.device.type == "cpu" or self.cache_experts is not None:
            return None
        return int(torch.cuda.mem_get_info(self.device)[0] * 0.92)  # what is free, less a margin


@dataclass
class SamplingParams:
    """`temperature` 0 is greedy; `top_k` (None: all) and `top_p` bound from how many of the likeliest tokens
    is drawn; another `seed`, another text."""

    max_new_tokens: Integral = 128
    temperature: Real = 0.8
    top_k: Integral | None = None
    top_p: Real = 0.95
    seed: Integral = 0

    def __post_init__(self):
        check_types(self)
        check_range(self, "max_new_tokens", 1, LARGEST, "at least 1")
        check_range(self, "temperature", 0, LARGEST, "0 (greedy) or more")
        check_range(self, "top_k", 1, LARGEST, "at least 1")
        check_range(self, "top_p", sys.float_info.min, 1, "above 0, at most 1")
        check_range(self, "seed", 0, 2**64 - 1, "a number from 0 to 2^64 - 1")


def check_device(device: torch.device | str | None) -> torch.device:
    asked = device or "cuda"                # (in torch's words 159 would be -97)
    if device is None and not torch.cuda.is_available() and os.path.exists("/dev/nvidiactl"):
        note(f"there is an NVIDIA GPU, but torch cannot use it ({DRIVER}); computing on the CPU")
    try:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise UserError(f"--device {device}: write cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not 0 <= (device.index or 0) < torch.cuda.device_count():
        raise UserError(f"--device {asked}: no such GPU here that torch can use ({DRIVER}); use --device cpu")
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
    """A list, an array or a tensor of whole numbers as plain ints; `wanted` says what should have been
    given."""
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


def check_ids(ids: list[int], config: MixtralConfig, context: int, most: int) -> None:
    """Are these tokens of the model, at least one and at `most` so many of the `context`?"""
    if not ids:
        raise UserError("the prompt is empty; give at least one token")
    if len(ids) > most:
        raise UserError(f"the prompt has {len(ids)} tokens and --context {context} leaves room for {most}; "
                        f"shorten it or raise --context (this model takes {config.max_position_embeddings})")
    bad = next((i for i in ids if not 0 <= i < config.vocab_size), None)
    if bad is not None:
        raise UserError(f"token id {bad} is outside the vocabulary of {config.vocab_size}")
