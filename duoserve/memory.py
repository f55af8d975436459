"""The memory plan: what the device will hold, all of it taken once, and which experts the host will.

On the device resident weights, KV cache and workspace come first; what is left of `--gpu-memory` is slots.
"""

from dataclasses import dataclass

import numpy as np
import torch

from .errors import UserError, format_bytes, rounded_up
from .link import Key
from .machine import available_memory
from .model import ATTENTION_ROWS, EXPERT_ROWS, key_sizes, padded
from .packed import ModelShapes, PackedModel
from .quant import parts
from .store import most_used, stride_of

LOGIT_ROWS = 64                             # rows of logits made at a time when all are wanted
# Measured on an H200, with 6 to 256 slots: what cuBLAS takes and rounding loses; a CUDA graph.
LIBRARIES, GRAPH = 40 * 2**20, 32 * 2**10


@dataclass
class MemoryPlan:
    """Bytes on the device, all taken once before anything else, and how many slots that leaves."""

    resident: int
    kv: int
    workspace: int
    expert: int
    slots: int

    @property
    def total(self) -> int:
        return self.resident + self.kv + self.workspace + self.slots * self.expert


def plan_memory(packed: ModelShapes, dtype: torch.dtype, context: int, compiled: bool, cuda: bool,
                budget: int | None, cache_experts: int | None) -> MemoryPlan:
    """Turn a budget in bytes (None: unlimited) into slots, or check the slots wanted; `UserError` names the
    least."""
    c, size, total = packed.config, dtype.itemsize, len(packed.config.expert_keys)
    resident = packed.resident_bytes(size)
    kv = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * padded(context) * size
    # Unpacking: fused it leaves the matrix alone, eager also its nibbles and two fp32 copies. Beside it stand
    # a prompt's hidden states and per-rank outputs, a row block's activations and mask, a block of logits.
    expert = [packed.layout.fields[f"{name}.q"][2] for name in ("w13", "w2")]
    attention = [packed.shapes[f"layers.0.attention.{name}.q"][1] for name in ("qkv", "o")]
    unpacked = max(parts(rows, 2 * half)[0].stop * 2 * half for rows, half in expert + attention)
    unpacked *= size if compiled else size + 9
    prompt = context * c.hidden_size * (4 + 2 * c.num_experts_per_tok) * size
    # (A row block: gate and up, silu; what it reads and gives, twice, as captured code has its own copy.)
    rows = EXPERT_ROWS * (3 * c.intermediate_size + 4 * c.hidden_size) * size
    block = rows + LOGIT_ROWS * c.vocab_size * (size + 4)
    shared = c.num_attention_heads // c.num_key_value_heads
    mask = 0 if context <= ATTENTION_ROWS else ATTENTION_ROWS * shared * context * (1 + size)
    trace = 4 * context * c.num_hidden_layers * c.num_local_experts             # (if it is recorded)
    workspace = unpacked + prompt + block + mask + trace + (LIBRARIES if cuda else 0)
    if cuda and compiled:                   # (a layer's decode, and what unpacks its attention)
        sizes = len(key_sizes(padded(context)))
        workspace += GRAPH * (3 + sizes) * (c.num_hidden_layers + c.num_experts_per_tok)
        workspace += max(0, rows - prompt)  # (the row block's trial, beside its capture, before any prompt)
    plan = MemoryPlan(resident, kv, workspace, packed.layout.nbytes, 2)
    if budget is not None and plan.total > budget:
        raise UserError(f"--gpu-memory {format_bytes(budget)} is too small: {rounded_up(plan.total)} is the "
                        f"least that works ({format_bytes(resident)} resident weights, {format_bytes(kv)} KV "
                        f"cache for --context {context}, {format_bytes(plan.workspace)} workspace, two "
                        f"experts of {format_bytes(plan.expert)})")
    fit = total if budget is None else 2 + (budget - plan.total) // plan.expert
    if cache_experts is not None and cache_experts > fit and fit < total:
        raise UserError(f"--cache-experts {cache_experts}: --gpu-memory {format_bytes(budget)} leaves room "
                        f"for {fit}")
    plan.slots = min(total, fit if cache_experts is None else cache_experts)
    return plan


def choose_kept(model: PackedModel, host_memory: int | None, popularity: np.ndarray | None,
                beside: int) -> list[Key]:
    """Which experts to keep in memory: all, or as many as `host_memory` bytes hold of those used most.

    Those are the first of the `most_used`. `UserError`, before anything is read, if that much and the
    `beside` bytes of other things are not available.
    """
    stride = stride_of(model)
    keys = most_used(model.config.expert_keys, popularity)
    kept = keys if host_memory is None else keys[:host_memory // stride]
    need, available = len(kept) * stride + beside, available_memory()
    if available is not None and need > available:
        room = int(0.9 * (available - beside)) // 1000
        size = f"{room // 1000}MB" if room >= 10**4 else f"{room}kB"
        mend = f"--host-memory {size} keeps what is used most there and reads the rest from the disk"
        wanted = f"--host-memory {format_bytes(host_memory)}" if host_memory else \
            "the model" if beside else "its experts"
        raise UserError(f"{model.directory}: {wanted} would take {format_bytes(need)} of host memory and "
                        f"{format_bytes(available)} are available; {mend if room > 0 else 'free some'}")
    return kept
