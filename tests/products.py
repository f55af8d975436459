"""Matrices and rows to try products with, the worst that there can be among them."""

from functools import partial
from types import SimpleNamespace

import torch

from duoserve.experts import run_experts
from duoserve.hostcode import compiled_graph, run_expert, run_rows
from duoserve.model import Expert
from duoserve.quant import PackedLinear, compiled, pack, silu_table

BF16, FP16 = torch.bfloat16, torch.float16
CASES = [(128, BF16), (128, FP16), (64, FP16), (64, BF16), (32, BF16), (32, FP16)]


def same(a, b):
    """Bit for bit; a NaN is a NaN."""
    a, b = a.float(), b.float()
    return ((a.view(torch.int32) == b.view(torch.int32)) | a.isnan() & b.isnan()).all()


def matrices(rows, columns, group, seed=0):
    """Name -> bytes, scale, zero."""
    g, shape = torch.Generator().manual_seed(seed), (rows, columns // group)
    q = pack(torch.randint(0, 16, (rows, columns), generator=g), group)
    scale, zero = torch.rand(shape, generator=g) * 0.01 + 0.001, torch.rand(shape, generator=g) * 15
    chance, sign = torch.rand(shape, generator=g), torch.randint(0, 2, shape, generator=g) * 2 - 1
    made = {"plain": (q, scale, zero), "all 15": (q | 255, scale, zero),
            "all 15 less 15": (q | 255, scale, zero * 0 + 15),
            "all 0": (q & 0, scale, zero), "scale subnormal": (q, scale * 0 + 6e-8, zero),
            "scale huge": (q, scale * 0 + 60000, zero), "zero far outside": (q, scale, sign * 20000.0),
            "scales of all sizes": (q, 10.0 ** (12 * chance - 7.2), sign * 65504 * chance)}
    return {name: (q, scale.half(), zero.half()) for name, (q, scale, zero) in made.items()}


def rows(columns, group, dtype, seed=1):
    """Name -> x [1, columns], finite."""
    g = torch.Generator().manual_seed(seed)
    x, chance = torch.randn(1, columns, generator=g), torch.rand(1, columns, generator=g)
    sign, columns = torch.randint(0, 2, x.shape, generator=g) * 2 - 1, torch.arange(columns)
    low, high = (-133, 127) if dtype == BF16 else (-24, 15)
    made = {"gaussian": x, "at the bound": x * 0 + 1.9921875, "at the bound, of both signs": sign * 1.9921875,
            "of all sizes": sign * 2.0 ** (low + (high - low) * chance).floor(),
            "huge": x.clamp(-1, 1) * torch.finfo(dtype).max, "subnormal": x * torch.finfo(dtype).tiny / 4,
            "a group of zeros": x * (columns >= group), "zero": x * 0,
            "of whole numbers": (4 * x).round()}
    if dtype == BF16:
        made |= {"groups about 2^-100": sign * 2.0 ** (columns // group % 7 - 103.0),
                 "of 2^-100": sign * 2.0 ** -100}
    return {name: x.to(dtype) for name, x in made.items()}


def an_expert(group, compile=False, hidden=256, ffn=192):
    linear = partial(PackedLinear, largest_group=group, compile=compile)
    expert = Expert(SimpleNamespace(hidden_size=hidden, intermediate_size=ffn), linear)
    for seed, matrix in enumerate((expert.w13, expert.w2)):
        rows, half = matrix.q.shape
        matrix.q, matrix.scale, matrix.zero = matrices(rows, 2 * half, group, seed)["plain"]
    return expert


def of_several(expert, x, compile=False):
    """The last of two experts that lie one after the other, chosen by a number on the device: as a decode
    step runs it."""
    matrices = [[torch.stack((tensor.flip(0), tensor)) for tensor in (matrix.q, matrix.scale, matrix.zero)]
                for matrix in (expert.w13, expert.w2)]
    at, out = torch.tensor([1, 0, 1], device=x.device), x.new_zeros(3, x.shape[1])
    run = compiled(run_experts) if compile else run_experts
    run(*matrices, silu_table(x.dtype, x.device), at, x, out, None)
    assert torch.equal(out[0], out[2]) or out.isnan().any()
    return out[2:]


@torch.inference_mode()
def on_the_host(expert, x):
    """The same, in the code of the host's thread."""
    w13, w2 = ((matrix.q.view(torch.int32), matrix.scale, matrix.zero) for matrix in (expert.w13, expert.w2))
    out = torch.empty_like(x)
    run_compiled(run_expert, x, silu_table(x.dtype, x.device), *w13, *w2, out[0])
    return out


def a_block_on_the_host(expert, x):
    """The first half of w13's product, likewise."""
    half = [w.chunk(2)[0] for w in (expert.w13.q.view(torch.int32), expert.w13.scale, expert.w13.zero)]
    out = torch.empty(len(half[0]))
    run_compiled(run_rows, x, *half, out)
    return out


def run_compiled(function, x, *arguments):
    """... once for all rows of a dtype and a length."""
    key = function, x.dtype, x.shape
    if key not in run_compiled.graphs:
        run_compiled.graphs[key] = compiled_graph(function, x, *arguments)
    run_compiled.graphs[key](x, *arguments)


run_compiled.graphs = {}
