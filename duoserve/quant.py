"""Four bits a weight: how a matrix is packed, and how it is multiplied without unpacking it first.

A weight is `(q - zero) * scale` with q in 0..15, and one fp16 scale and zero for each group of up to 128 columns.
Within a group of G columns, byte j holds column j in its low nibble and column j + G/2 in its high one: both
nibbles of a row of bytes are contiguous runs of columns, so unpacking needs no shuffle and fuses into the product.
"""

from dataclasses import dataclass
from functools import cache, partial
from math import prod
from typing import Callable

import torch
from torch import Tensor, nn

from .config import MixtralConfig
from .errors import UserError
from .files import ALIGN

UNPACK = 64 * 2**20             # weights unpacked at a time for a product of several rows: bounds the workspace


def group_size(columns: int, largest: int = 128, name: str = "matrix") -> int:
    """The largest of 128, 64 and 32 up to `largest` that divides the columns."""
    for size in (128, 64, 32):
        if size <= largest and columns % size == 0:
            return size
    raise UserError(f"{name}: its input dimension {columns} is no multiple of 32: it cannot be packed in 4-bit groups")


def pack(q: Tensor, group: int) -> Tensor:
    """q [N, columns] in 0..15 -> bytes [N, columns / 2]."""
    low, high = q.to(torch.uint8).unflatten(-1, (-1, 2, group // 2)).unbind(-2)
    return (low | high << 4).flatten(-2)


def unpack(q: Tensor, group: int) -> Tensor:
    """bytes [N, columns / 2] -> [N, columns / group, group] in 0..15."""
    q = q.unflatten(-1, (-1, group // 2))
    return torch.cat((q & 15, q >> 4), -1)


def quantize(weight: Tensor, group: int, name: str = "matrix", iterations: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """weight [N, columns] -> bytes [N, columns / 2], scale and zero [N, columns / group] in fp16.

    Alternating least squares: round to the grid, then fit the grid (w ~ scale * q - scale * zero) to what was
    rounded, and again; each half lowers the squared error. `UserError` if the weights do not fit fp16's range.
    """
    w = weight.float().unflatten(-1, (-1, group))
    low, high = w.amin(-1), w.amax(-1)
    largest = torch.maximum(high, -low)
    if not largest.max() <= 65504:
        raise UserError(f"{name}: its largest weight is {largest.max().item():g}, beyond fp16: it cannot be packed")
    # A constant group is its exponent times its mantissa, exactly; a nearly constant one keeps zero within fp16.
    constant = low == high
    exponent = torch.frexp(low)[1].clamp(-24, 15)
    least = (largest / 32768).clamp(min=2.0 ** -24)
    mean = w.mean(-1)

    def grid(scale, zero):
        return (w / scale[..., None] + zero[..., None]).round_().clamp_(0, 15)

    scale = torch.maximum((high - low) / 15, least)
    zero = -low / scale
    for _ in range(iterations):
        q = grid(scale, zero)
        q_mean = q.mean(-1)
        spread = q - q_mean[..., None]
        scale = torch.maximum((spread * w).sum(-1) / spread.square().sum(-1).clamp(min=1e-9), least).half().float()
        zero = q_mean - mean / scale
    scale = torch.where(constant, torch.ldexp(torch.ones_like(low), exponent), scale).half()
    zero = torch.where(constant, -low / scale.float(), zero).half()
    return pack(grid(scale.float(), zero.float()).flatten(-2), group), scale, zero


def dequantize(q: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """bytes [N, columns / 2], scale and zero [N, groups] -> weights [N, columns] in fp32."""
    group = 2 * q.shape[-1] // scale.shape[-1]
    return ((unpack(q, group) - zero.float()[..., None]) * scale.float()[..., None]).flatten(-2)


def gemv(x: Tensor, q: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """x [1, columns] -> [1, N] in one pass over the bytes.

    Scale and zero meet each group's dot product and sum of x, not each weight: a third of the arithmetic.
    """
    groups = scale.shape[-1]
    parts = x.float().view(groups, 2, -1)                           # [groups, low or high half, G / 2]
    q = q.unflatten(-1, (groups, -1))                               # [N, groups, G / 2]
    dot = ((q & 15) * parts[:, 0]).sum(-1) + ((q >> 4) * parts[:, 1]).sum(-1)
    y = ((dot - zero.float() * parts.sum((1, 2))) * scale.float()).sum(-1)
    return y.to(x.dtype)[None]


def dequantize_into(q: Tensor, scale: Tensor, zero: Tensor, out: Tensor) -> None:
    out.copy_(dequantize(q, scale, zero))


def parts(rows: int, columns: int) -> list[slice]:
    """The rows of a matrix that are unpacked at a time: in equal parts, which is one shape to compile."""
    each = -(-rows // -(-rows * columns // UNPACK))
    return [slice(i, i + each) for i in range(0, rows, each)]


@cache
def compiled(function):
    """Fused by torch.compile, once a process. Shapes are the matrices', a few a model, and never those of a prompt.

    No kernel is chosen by timing: which one is fastest, and so the last bits of a sum, would change from one process to
    the next; and what is written in place would be copied for the trial, beyond the memory plan.
    """
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(function, dynamic=False, options={"deterministic": True, "triton.autotune_pointwise": False})


def fused_gemv(x: Tensor, q: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """`gemv` for the compiler: the same products, told so that a weight costs a mask, a conversion and a product.

    Four bytes are read as one word, and a nibble is left where it lies in it: k places up it is 16^k times too large,
    and x, which is laid out as the words meet it, was made as much smaller.
    """
    groups = scale.shape[-1]
    parts = x.float().view(groups, 2, -1, 4).permute(0, 3, 1, 2).flatten(1, 2)      # [groups, nibble, word]
    smaller = torch.exp2(-4.0 * torch.arange(8, device=x.device).clamp(max=6))
    return dot_words(parts * smaller[:, None], parts.sum((1, 2)), q, scale, zero).to(x.dtype)[None]


@torch.library.custom_op("duoserve::dot_words", mutates_args=())
def dot_words(parts: Tensor, sums: Tensor, q: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Compiled by itself: a wall in larger compiled code. Else the compiler would pull what makes x into the product,
    and do it again for every row of the matrix."""
    return compiled(_dot_words)(parts, sums, q, scale, zero)


@dot_words.register_fake
def _(parts, sums, q, scale, zero):
    return parts.new_empty(len(q))


def _dot_words(parts, sums, q, scale, zero):
    w = q.view(torch.int32).unflatten(-1, (len(sums), -1)).unflatten(0, (4, -1))
    dot = torch.cat([                       # four rows at a time: what is read of x is read once for the four
        sum(nibble * parts[:, k] for k, nibble in enumerate(nibbles(rows))).sum(-1) for rows in w])
    return ((dot - zero.float() * sums) * scale.float()).sum(-1)


def nibbles(w: Tensor) -> list[Tensor]:
    """Words -> their nibbles, each in its place but the last, which moves one down, out of the sign bit."""
    return [w & 15 << 4 * k for k in range(7)] + [w >> 4 & 15 << 24]


class PackedLinear(nn.Module):
    """A linear layer without bias on packed weights. Its three tensors may be views of a slot's bytes."""

    def __init__(self, columns: int, rows: int, bias: bool = False, largest_group: int = 128, compile: bool = False,
                 device=None):
        super().__init__()
        group = group_size(columns, largest_group)
        self.gemv = compiled(fused_gemv) if compile else gemv
        self.dequantize_into = compiled(dequantize_into) if compile else dequantize_into
        self.graphs: list[tuple[Tensor, Callable[[], None]]] = []
        self.register_buffer("q", torch.empty(rows, columns // 2, dtype=torch.uint8, device=device))
        self.register_buffer("scale", torch.empty(rows, columns // group, dtype=torch.float16, device=device))
        self.register_buffer("zero", torch.empty(rows, columns // group, dtype=torch.float16, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """x [.., columns] -> [.., rows]; which kernel runs depends on the number of rows of x alone."""
        flat = x.reshape(-1, x.shape[-1])
        if len(flat) == 1:
            return self.gemv(flat, self.q, self.scale, self.zero).view(*x.shape[:-1], -1)
        y = x.new_empty(len(flat), len(self.q))
        for i, part in enumerate(self.parts()):     # (one's unpacked weights are given back before the next's are made)
            torch.mm(flat, self.unpacked(i, part, x).T, out=y[:, part])
        return y.view(*x.shape[:-1], -1)

    def parts(self) -> list[slice]:
        return parts(len(self.q), 2 * self.q.shape[1])

    def unpacked(self, i: int, part: slice, like: Tensor) -> Tensor:
        """Weights of the i-th part, [rows, columns]; valid until any matrix's next are asked for."""
        if self.graphs:
            weights, replay = self.graphs[i]
            replay()
        else:
            q = self.q[part]
            weights = like.new_empty(len(q), 2 * q.shape[1])
            self.dequantize_into(q, self.scale[part], self.zero[part], weights)
        return weights

    def capture(self, workspace: Tensor, graph: Callable) -> None:
        """From now on unpack into `workspace`, through what `graph` makes of a call: the host has less to do."""
        for part in self.parts():
            q = self.q[part]
            weights = workspace[:2 * q.numel()].view(len(q), -1)
            unpack = partial(self.dequantize_into, q, self.scale[part], self.zero[part], weights)
            self.graphs.append((weights, graph(unpack)))


@dataclass(frozen=True)
class ExpertLayout:
    """Where an expert's six tensors lie in its one contiguous block of `nbytes` bytes."""

    fields: dict[str, tuple[int, torch.dtype, tuple[int, int]]]     # name -> (offset, dtype, shape)
    nbytes: int

    @classmethod
    def of(cls, config: MixtralConfig, largest_group: int = 128) -> "ExpertLayout":
        fields, offset = {}, 0
        for name, rows, columns in (("w13", 2 * config.intermediate_size, config.hidden_size),
                                    ("w2", config.hidden_size, config.intermediate_size)):
            groups = columns // group_size(columns, largest_group, f"expert matrix {name}")
            for part, dtype, shape in (("q", torch.uint8, (rows, columns // 2)),
                                       ("scale", torch.float16, (rows, groups)),
                                       ("zero", torch.float16, (rows, groups))):
                fields[f"{name}.{part}"] = offset, dtype, shape
                offset += -(-prod(shape) * dtype.itemsize // ALIGN) * ALIGN
        return cls(fields, offset)

    def views(self, block: Tensor) -> dict[str, Tensor]:
        """block [nbytes] uint8 -> the six tensors, as views."""
        return {name: block[offset:offset + prod(shape) * dtype.itemsize].view(dtype).view(shape)
                for name, (offset, dtype, shape) in self.fields.items()}

    def bind(self, expert: nn.Module, block: Tensor) -> nn.Module:
        """Point a packed `Expert`'s tensors into a block."""
        for name, view in self.views(block).items():
            matrix, part = name.split(".")
            setattr(getattr(expert, matrix), part, view)
        return expert
