"""Four bits a weight: how a matrix is packed, and how compiled code multiplies it without unpacking it first.

A weight is `(q - zero) * scale` with q in 0..15, and one fp16 scale and zero for each group of up to 128
columns. Within a group of G columns, byte j holds column j in its low nibble and column j + G/2 in its high
one: both nibbles of a row of bytes are contiguous runs of columns, so unpacking needs no shuffle and fuses
into the product.

If a group had four columns: scale 0.5 and zero 2 make of q = 5, 0, 2, 15 the weights 1.5, -1, 0, 6.5. Byte 0
holds columns 0 and 2: 5 + 16 * 2 = 37, and byte 1 columns 1 and 3: 0 + 16 * 15 = 240. A row x meets the group
as ((5 x0 + 0 x1 + 2 x2 + 15 x3) - 2 (x0 + x1 + x2 + x3)) * 0.5.
"""

import threading
from functools import cache, partial, reduce
from math import prod
from typing import Callable

import torch
from torch import Tensor, nn

from .errors import UserError

SMALL_MATRIX = 2**22            # weights; with fewer, no second thread and little compiling is worth its time
UNPACK = 64 * 2**20             # weights unpacked at a time,
UNPACK_ROW = 2**17              # and for a product of one row on a CPU: they stay in its caches
# What the compiler is told: of everything, to choose no kernel by timing, to start no processes that compile
# for it (there is little to compile, and they take seconds to begin), and to believe that the C++ compiler
# knows the processor (else that is tried at each start; its newest extensions still are, which takes 0.1 s,
# and 5 with torch 2.11).
SAME_EVERYWHERE = {"deterministic": True, "triton.autotune_pointwise": False,
                   "assert_indirect_indexing": False, "compile_threads": 1, "cpp.vec_isa_ok": True}
# And of a product: not to store what comes between, as it does beyond 30 operations or 8 tensors.
IN_ONE_PASS = {"realize_opcount_threshold": 1000, "realize_acc_reads_threshold": 64}
# A word of which only a nibble is left, k places up and below bit 24, is q 16^k 2^-149 if its bits are read
# as an fp32 number. A GPU computes with so small numbers as fast and as exactly as with others: nothing need
# be converted, and what the nibble meets is made larger by 2^LIFT.
LIFT = 114
# While a thread traces what is to be compiled (hostcode.py), compiled code refuses to be called, by any.
COMPILER = threading.RLock()


def group_size(columns: int, largest: int = 128, name: str = "matrix") -> int:
    """The largest of 128, 64 and 32 up to `largest` that divides the columns."""
    for size in (128, 64, 32):
        if size <= largest and columns % size == 0:
            return size
    raise UserError(f"{name}: its input dimension {columns} is no multiple of 32: it cannot be packed in "
                    "4-bit groups")


def pack(q: Tensor, group: int) -> Tensor:
    """q [N, columns] in 0..15 -> bytes [N, columns / 2]."""
    low, high = q.to(torch.uint8).unflatten(-1, (-1, 2, group // 2)).unbind(-2)
    return (low | high << 4).flatten(-2)


def unpack(q: Tensor, group: int) -> Tensor:
    """bytes [N, columns / 2] -> [N, columns / group, group] in 0..15."""
    q = q.unflatten(-1, (-1, group // 2))
    return torch.stack((q & 15, q >> 4), -2).flatten(-2)


def dequantize(q: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """bytes [N, columns / 2], scale and zero [N, groups] -> weights [N, columns] in fp32."""
    group = 2 * q.shape[-1] // scale.shape[-1]
    return ((unpack(q, group) - zero.float()[..., None]) * scale.float()[..., None]).flatten(-2)


def dequantize_into(q: Tensor, scale: Tensor, zero: Tensor, at: Tensor | None, out: Tensor,
                    dtype: torch.dtype | None = None) -> None:
    """The weights into out [N, columns]. With a 16-bit dtype two at a time: q is in int16, two bytes each,
    and out [N, columns / 2] in int32, two weights each. (One at a time takes a GPU up to twice as long.)"""
    q, scale, zero = (w if at is None else w[at][0] for w in (q, scale, zero))
    if dtype is None:
        out.copy_(dequantize(q, scale, zero))
        return
    shift = torch.arange(0, 8, 4, dtype=torch.int32, device=q.device)[:, None]
    words = q.unflatten(-1, (scale.shape[-1], 1, -1)).int() >> shift        # [N, groups, half, words]
    scale, zero = (w.float()[..., None, None] for w in (scale, zero))
    even, odd = (((words >> k & 15) - zero) * scale for k in (0, 8))        # of a word's two bytes
    even, odd = (weight.to(dtype).view(torch.int16).int() for weight in (even, odd))
    out.copy_((even & 65535 | odd << 16).flatten(1))


def parts(rows: int, columns: int, most: int | None = None) -> list[slice]:
    """The rows of a matrix that are unpacked at a time: in equal parts, which is one shape to compile; in
    eights, so that none begins where compiled code would copy it first."""
    each = -(-rows // -(-rows * columns // (most or UNPACK)) // 8) * 8
    return [slice(i, min(i + each, rows)) for i in range(0, rows, each)]


def is_small(weights: int) -> bool:
    """Is what is computed with so many weights over too soon to be worth a longer start?"""
    return weights < SMALL_MATRIX


@cache
def compiled(function, small: bool = False, **more):
    """Fused by torch.compile, once a process. Shapes are the matrices', a few a model, and never those of a
    prompt.

    No kernel is chosen by timing: which one is fastest, and so the last bits of a sum, would change from one
    process to the next; and what is written in place would be copied for the trial, beyond the memory plan.
    """
    # On a GPU a kernel may be set up while the one before it ends (programmatic dependent launch: a layer has
    # 29; each waits for the one before it to be over, and only then lets the next begin, if there is anything
    # that it reads, as all of these do). What is `small` does without: it takes a piece of C to be compiled
    # for each kind of arguments, seconds of a first start.
    options = {**SAME_EVERYWHERE, "triton.enable_pdl": not small, **more}
    # (Whole, or not at all: as eager code it could not reach the slots that it is not told of, experts.py.)
    run = torch.compile(function, dynamic=False, fullgraph=True, options=options)

    def alone(*arguments):
        if torch.compiler.is_dynamo_compiling():                    # it becomes a part of what is compiled
            return function(*arguments)
        with COMPILER:                      # (from torch 2.13 on each thread has a limit of its own)
            torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
            return run(*arguments)
    return alone


# One row meets a packed matrix, in compiled code in one pass over its bytes. Scale and zero meet each group's
# dot product and sum of x, not each weight: a third of the arithmetic.
#
# In a 16-bit dtype the answer has the same bits wherever it is computed, in whatever order: by bytes or
# words, with fused multiply-adds or without. Each group of x is rounded to whole numbers p, |p| <= 8192,
# times a power of two; its dot product is then at most 15 x 8192 x 128 < 2^24, and fp32 adds whole numbers
# of that size exactly. What the groups of a row give is rounded to whole numbers once more before it is
# added up. In between stand single operations, which round alike everywhere. Powers of two are made from
# bits and multiplied by; and where processors differ in flushing small numbers to zero, these count as
# zero.


def power(e: Tensor) -> Tensor:
    """2^e in fp32, for int32 e: zero below 2^-126, and 2^127 at most."""
    return ((e + 127).clamp(0, 254) << 23).view(torch.float32)


def exponent(largest: Tensor) -> Tensor:
    """The least e with fp32 `largest` < 2^e; for what is below 2^-100 one so high that all beside it is
    zero."""
    e = (largest.view(torch.int32) >> 23 & 255) - 126
    return torch.where(e > -100, e, 1000)


def exact_gemv(x: Tensor, q: Tensor, scale: Tensor, zero: Tensor, at: Tensor | None = None,
               fused: bool = False) -> Tensor:
    """x [B, columns] -> [B, N] in fp32, the same bits everywhere; all NaN where anything in x is not finite.

    With `at [B]` q, scale and zero hold several matrices: the one for each row. (x may then be one for all.)
    `fused`: the matrix is met by compiled code, also where this itself is not compiled.
    """
    return product(*whole_numbers(x, scale.shape[-1]), q, scale, zero, at, fused)


def whole_numbers(x: Tensor, groups: int) -> tuple[Tensor, list[Tensor]]:
    """x [B, columns] -> p [B, groups, G], the sums of its groups in two halves, and what one is worth."""
    x = x.float().unflatten(-1, (groups, -1))
    e = exponent(x.abs().amax(-1))
    p = (x * power(13 - e)[..., None]).round()
    total = p.sum(-1)                               # in two halves of 11 bits each, as an fp16 zero has: its
    high = (total * 2**-10).round() * 2**10         # products with them are exact
    return p, [high, total - high, power(e - 13)]


def gemv(x: Tensor, q: Tensor, scale: Tensor, zero: Tensor, at: Tensor | None = None,
         fused: bool = False) -> Tensor:
    """x [1, columns] -> [1, N] in its dtype: exact in 16 bits, in fp32 as it comes."""
    if x.dtype != torch.float32:
        return exact_gemv(x, q, scale, zero, at, fused).to(x.dtype)
    x = x.unflatten(-1, (scale.shape[-1], -1))
    return product(x, [x.sum(-1)], q, scale, zero, at, fused)


def product(x: Tensor, sums: list[Tensor], q: Tensor, scale: Tensor, zero: Tensor,
            at: Tensor | None, fused: bool) -> Tensor:
    """x [B, groups, G] -> [B, N]; `sums` are the groups', or their halves and the size of what x counts.
    Compiled code never has a weight in memory but packed; eager code unpacks some rows at a time."""
    if fused or torch.compiler.is_compiling():
        unconverted = q.is_cuda and len(sums) > 1   # (x is then whole numbers, and may be made larger)
        return fused_dots(laid_out(x, LIFT if unconverted else 0), sums, q, scale, zero, at, unconverted)
    q, scale, zero = (w[None] if at is None else w[at] for w in (q, scale, zero))
    some = parts(q.shape[1], 2 * q.shape[2], None if q.is_cuda else UNPACK_ROW)
    dot = [(unpack(q[:, part], x.shape[-1]) * x[:, None]).sum(-1) for part in some]
    return scaled(torch.cat(dot, 1), sums, scale, zero)


def laid_out(x: Tensor, lift: int = 0) -> Tensor:
    """x [B, groups, G] -> for each nibble of a word of four bytes what it meets, times 2^lift: [B, nibble,
    groups, words].

    So that a weight costs a mask and a product (and a conversion, if it is to be a whole number), a nibble is
    left where it lies: k places up it is 16^k times too large, and x is made as much smaller.
    """
    places = place(torch.arange(8, dtype=torch.int32, device=x.device))
    parts = x.unflatten(-1, (2, -1, 4)).permute(0, 4, 2, 1, 3).flatten(1, 2)
    return parts * power(lift - 4 * places)[:, None, None]


def place(nibble):
    """Where a word's nibble stands when it is multiplied: below bit 24, so the last two move down."""
    return nibble % 6 + nibble // 6 * 4


def dots(laid: Tensor, sums: list[Tensor], q: Tensor, scale: Tensor, zero: Tensor, at: Tensor | None,
         unconverted: bool = False, together: int = 4) -> Tensor:
    """`product` of what was laid out, in fp32: [B, N]; to be compiled. q is in words, of four bytes;
    `unconverted`: these are read as fp32 numbers, and x was laid out with LIFT. x is read once for so many
    rows `together`."""
    q, scale, zero = (w[None] if at is None else w[at] for w in (q, scale, zero))
    met = laid[:, None].unbind(2)                                   # by each of a word's nibbles
    w = q.view(len(q), together, -1, *met[0].shape[2:])     # [B, together, N / together, groups, words]
    dot = torch.cat([reduce(torch.add, map(torch.mul, nibbles(rows, unconverted), met)).sum(-1)
                     for rows in w.unbind(1)], 1)
    return scaled(dot * 2.0 ** (149 - LIFT) if unconverted else dot, sums, scale, zero)


def scaled(dot: Tensor, sums: list[Tensor], scale: Tensor, zero: Tensor) -> Tensor:
    """The groups' dot products, scales and zeros, [B, N, groups] each -> [B, N]."""
    scale, zero = scale.float(), zero.float()
    sums = [s[:, None] for s in sums]
    if len(sums) == 1:
        return ((dot - zero * sums[0]) * scale).sum(-1)
    high, low, size = sums
    terms = (dot - zero * high - zero * low) * scale * size
    e = exponent(terms.abs().amax(-1))
    bits = 24 - (terms.shape[-1] - 1).bit_length()  # of each term, so that their sum has 24 at most
    y = (terms * power(bits - e)[..., None]).round().sum(-1)
    return torch.where(y == 0, 0, y) * power(e - bits)      # (never -0: its sign would depend on the order)


def nibbles(w: Tensor, unconverted: bool) -> list[Tensor]:
    """Words -> their eight nibbles, each in its `place`, as whole numbers or as fp32 numbers of the same
    bits."""
    masked = [(w if k == i else w >> 4 * (i - k)) & 15 << 4 * k for i, k in enumerate(map(place, range(8)))]
    return [nibble.view(torch.float32) for nibble in masked] if unconverted else masked


@torch.library.custom_op("duoserve::dots", mutates_args=())
def fused_dots(laid: Tensor, sums: list[Tensor], q: Tensor, scale: Tensor, zero: Tensor, at: Tensor | None,
               unconverted: bool) -> Tensor:
    """Compiled by itself: a wall in larger compiled code. Else the compiler would pull what makes x into the
    product, and do it again for every row of the matrix."""
    small = is_small(2 * q.shape[-2] * q.shape[-1])         # (row by row it takes half as long to compile)
    q = q.view(torch.int32)                 # (here: compiled code may copy what it is to view so)
    run = compiled(dots, small, **IN_ONE_PASS)
    return run(laid, sums, q, scale, zero, at, unconverted, 1 if small else 4)


@fused_dots.register_fake
def _(laid, sums, q, scale, zero, at, unconverted):
    return laid.new_empty(len(laid if at is None else at), scale.shape[-2])


@cache
def silu_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """SiLU in fp32 of all numbers of 16 bits, in the order of these bits: no two devices' `exp` agree."""
    gate = torch.arange(65536, dtype=torch.int32, device="cpu").to(torch.int16).view(dtype)
    gate = gate.double().clamp(min=-1e4)
    silu = gate / (1 + torch.exp(-gate))    # (of -infinity -0; NaN and infinity stay what they are)
    return torch.where(silu.abs() < 2**-126, 0 * silu, silu).float().to(device)


def exact_swiglu(y: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """y [B, 2F], w13's exact answer -> silu(gate) * up [B, F] in fp32, by the table of a 16-bit dtype."""
    gate, up = y.chunk(2, -1)
    return table[gate.to(dtype).view(torch.int16).int() & 65535] * up      # (bits: no compiler skips this)


class PackedLinear(nn.Module):
    """A linear layer without bias on packed weights: its own, or the `at`-th of several, if its tensors are
    [several, rows, ..]. Then `at` is an int, or for compiled code a tensor [1], read on the device."""

    def __init__(self, columns: int, rows: int, bias: bool = False, largest_group: int = 128,
                 compile: bool = False):
        super().__init__()
        group = group_size(columns, largest_group)
        self.fused = compile
        self.small = is_small(rows * columns)
        self.dequantize_into = compiled(dequantize_into, self.small) if compile else dequantize_into
        self.at: int | Tensor | None = None
        self.workspace: Tensor | None = None                        # to unpack into; or else new memory
        self.graphs: list[Callable[[], None]] = []
        self.register_buffer("q", torch.empty(rows, columns // 2, dtype=torch.uint8))
        self.register_buffer("scale", torch.empty(rows, columns // group, dtype=torch.float16))
        self.register_buffer("zero", torch.empty(rows, columns // group, dtype=torch.float16))

    def matrix(self, part: slice | None = None) -> tuple:
        """-> q, scale and zero, of these rows or of all, and `at` if these still are several."""
        tensors = self.q, self.scale, self.zero
        if part is not None:
            tensors = tuple(tensor[..., part, :] for tensor in tensors)
        if isinstance(self.at, int):
            return *(tensor[self.at] for tensor in tensors), None
        return *tensors, self.at

    def forward(self, x: Tensor) -> Tensor:
        """x [.., columns] -> [.., rows]; which kernel runs depends on the number of rows of x alone."""
        flat = x.reshape(-1, x.shape[-1])
        if len(flat) == 1:
            return gemv(flat, *self.matrix(), self.fused).view(*x.shape[:-1], -1)
        y = x.new_empty(len(flat), self.q.shape[-2])
        for i, part in enumerate(self.parts()):     # (each part's weights are given back before the next)
            torch.mm(flat, self.unpacked(i, part, x).T, out=y[:, part])
        return y.view(*x.shape[:-1], -1)

    def exact(self, x: Tensor) -> Tensor:
        """x [1, columns] in 16 bits or fp32 -> [1, rows] in fp32, the same bits everywhere."""
        return exact_gemv(x, *self.matrix(), self.fused)

    def parts(self) -> list[slice]:
        return parts(self.q.shape[-2], 2 * self.q.shape[-1])

    def unpacked(self, i: int, part: slice, like: Tensor) -> Tensor:
        """Weights of the i-th part, [rows, columns]; valid until any matrix's next are asked for."""
        weights = self.room(part, like)
        if self.graphs:
            self.graphs[i]()
        else:
            self.unpack_into(part, weights)
        return weights

    def unpack_into(self, part: slice, out: Tensor) -> None:
        if self.fused and out.dtype.itemsize == 2:
            q, *others = self.matrix(part)
            self.dequantize_into(q.view(torch.int16), *others, out.view(torch.int32), out.dtype)
        else:
            self.dequantize_into(*self.matrix(part), out)

    def room(self, part: slice, like: Tensor) -> Tensor:
        shape = part.stop - part.start, 2 * self.q.shape[-1]
        return like.new_empty(shape) if self.workspace is None else self.workspace[:prod(shape)].view(shape)

    def capture(self, graph: Callable) -> None:
        """From now on unpack into the workspace through what `graph` makes of a call: one launch."""
        self.graphs = [graph(partial(self.unpack_into, part, self.room(part, self.workspace)))
                       for part in self.parts()]
