"""One row times a packed matrix in 16 bits: the same bits as in whole numbers, eager and compiled, in any
order."""

import numpy as np
import pytest
import torch

from duoserve import quant
from duoserve.quant import (LIFT, PackedLinear, compiled, dequantize, dots, exact_gemv, gemv, laid_out, pack,
                            silu_table, unpack, whole_numbers)
from duoserve.quantize import quantize
from models import load, needs_compiler
from products import (BF16, CASES, FP16, a_block_on_the_host, an_expert, matrices, of_several, on_the_host,
                      rows, same)


@np.errstate(over="ignore", under="ignore", invalid="ignore")
def reference(x, q, scale, zero):
    """In int64, and in fp32 one rounding at a time, with the exponents of `frexp`."""
    groups, f32 = scale.shape[1], np.float32
    x, zero = x.float().double().numpy().reshape(groups, -1), zero.float().numpy()
    e = np.frexp(np.abs(x).max(1))[1]
    few = np.abs(x).max(1) < 2.0 ** -100
    p = np.where(few[:, None], 0, np.rint(np.ldexp(x, (13 - e)[:, None]))).astype(np.int64)
    dot = np.einsum("ngi,gi->ng", unpack(q, x.shape[1]).numpy().astype(np.int64), p)
    assert np.abs(p).max() <= 8192 and np.abs(dot).max() < 2 ** 24
    total = p.sum(1)
    high = np.rint(total / 1024).astype(np.int64) * 1024
    rest = dot.astype(f32) - zero * high.astype(f32) - zero * (total - high).astype(f32)
    terms = np.ldexp(rest * scale.float().numpy(), np.where(few, 0, e - 13)).astype(f32)
    if not np.isfinite(terms).all():
        return None                         # beyond fp32: as everywhere, infinity or NaN
    e = np.frexp(np.abs(terms).max(1))[1]
    bits = 24 - int(np.ceil(np.log2(groups)))
    whole = np.rint(np.ldexp(terms.astype(np.float64), (bits - e)[:, None])).astype(np.int64).sum(1)
    assert np.abs(whole).max() <= 2 ** 24
    y = np.where(np.abs(terms).max(1) < 2.0 ** -100, 0, np.ldexp(whole.astype(np.float64), e - bits))
    return torch.from_numpy(y.astype(f32))[None]


@pytest.mark.parametrize("group, dtype", CASES)
def test_against_whole_numbers(group, dtype):
    compared = 0
    for weights, w in matrices(8, 7 * group, group).items():
        for name, x in rows(7 * group, group, dtype).items():
            expected = reference(x, *w)
            y = exact_gemv(x, *w)
            assert y.dtype == torch.float32
            assert expected is None or same(y, expected), (weights, name)
            compared += expected is not None
    assert compared > 70


@pytest.mark.compiles
@needs_compiler
@pytest.mark.parametrize("group, dtype, groups", [(128, FP16, 7), (64, BF16, 1), (32, BF16, 7)])
def test_compiled_as_eager(group, dtype, groups):
    for weights, w in matrices(8, groups * group, group).items():
        for name, x in rows(groups * group, group, dtype).items():
            assert same(compiled(exact_gemv)(x, *w), exact_gemv(x, *w)), (weights, name)


@pytest.mark.parametrize("group, dtype", CASES)
def test_the_order_does_not_matter(group, dtype):
    """Columns of each group turned around, and the groups too."""
    for weights, (q, scale, zero) in matrices(8, 7 * group, group).items():
        turned = pack(unpack(q, group).flatten(1).flip(1), group), scale.flip(1), zero.flip(1)
        for name, x in rows(7 * group, group, dtype).items():
            assert same(exact_gemv(x, q, scale, zero), exact_gemv(x.flip(1), *turned)), (weights, name)


@pytest.mark.parametrize("together", (1, 4))
@pytest.mark.parametrize("group, dtype", CASES)
def test_by_words(group, dtype, together):
    """What is compiled: on a CPU, where a nibble is converted, and on a GPU, where it is not."""
    for weights, (q, scale, zero) in matrices(8, 7 * group, group).items():
        for name, x in rows(7 * group, group, dtype).items():
            p, sums = whole_numbers(x, 7)
            for unconverted in (False, True):
                laid = laid_out(p, LIFT * unconverted)
                y = dots(laid, sums, q.view(torch.int32), scale, zero, None, unconverted, together)
                assert same(y, exact_gemv(x, q, scale, zero)), (weights, name, unconverted)


@pytest.mark.parametrize("gemv", [gemv, exact_gemv])
def test_some_rows_of_several_matrices_at_a_time(gemv, monkeypatch):
    """As eager code takes them; the last are fewer."""
    q, scale, zero = (torch.stack(w) for w in zip(*matrices(28, 256, 64).values()))
    x = rows(256, 64, BF16)["gaussian"].to(BF16 if gemv is exact_gemv else torch.float32)
    whole = [gemv(x, *w) for w in zip(q, scale, zero)]
    monkeypatch.setattr(quant, "UNPACK_ROW", 8 * 256)
    assert [part.stop for part in quant.parts(28, 256, quant.UNPACK_ROW)] == [8, 16, 24, 28]
    for i, y in enumerate(whole):
        assert same(gemv(x, q, scale, zero, torch.tensor([i])), y)


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_a_processor_that_flushes_what_is_subnormal_to_zero(dtype):
    cases = [(w, x) for w in matrices(8, 256, 64).values() for x in rows(256, 64, dtype).values()]
    expert = an_expert(64)
    rest = [exact_gemv(x, *w) for w, x in cases], [expert(x) for x in rows(256, 64, dtype).values()]
    if not torch.set_flush_denormal(True):
        pytest.skip("this one cannot")
    try:
        flushed = [exact_gemv(x, *w) for w, x in cases], [expert(x) for x in rows(256, 64, dtype).values()]
    finally:
        torch.set_flush_denormal(False)
    assert all(same(a, b) for answers in zip(rest, flushed) for a, b in zip(*answers))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_what_is_not_finite_makes_all_of_it_nan(value, dtype):
    for w in matrices(8, 256, 64).values():
        for x in rows(256, 64, dtype).values():
            x[0, 100] = value
            assert exact_gemv(x, *w).isnan().all()


@pytest.mark.parametrize("columns, group", [(4096, 128), (4096, 64), (4096, 32), (14336, 128)])
def test_error_against_fp64(columns, group):
    g = torch.Generator().manual_seed(2)
    w = quantize(torch.randn(64, columns, generator=g), group, iterations=1)
    x = torch.randn(1, columns, generator=g)
    for dtype in (BF16, FP16):
        exact = x.to(dtype).double() @ dequantize(*w).double().T
        assert (exact_gemv(x.to(dtype), *w).double() - exact).norm() <= 5e-4 * exact.norm()


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_silu_of_every_number_of_16_bits(dtype):
    gate = torch.arange(65536).to(torch.int16).view(dtype).double()
    table, silu = silu_table(dtype, torch.device("cpu")).double(), torch.nn.functional.silu(gate)
    finite = gate.isfinite()
    assert torch.allclose(table[finite], silu[finite], rtol=2 ** -23, atol=2 ** -126)
    assert table[gate.isnan()].isnan().all()
    assert not (table.abs() < 2 ** -126)[table != 0].any()      # (some processors take these for zero)
    assert table[gate == torch.inf] == torch.inf and same(table[gate == -torch.inf], torch.tensor([-0.0]))


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_an_expert_of_one_row(dtype):
    """As step by step; close to what several rows make of it."""
    expert, x = an_expert(64), torch.randn(1, 256, generator=torch.Generator().manual_seed(3)).to(dtype)
    gate, up = reference(x, expert.w13.q, expert.w13.scale, expert.w13.zero).chunk(2, -1)
    h = torch.nn.functional.silu(gate.to(dtype).double()).float() * up
    expected = reference(h, expert.w2.q, expert.w2.scale, expert.w2.zero).to(dtype)
    y = expert(x)
    assert y.dtype == dtype and same(y, expected)
    several = expert(x.repeat(2, 1))[0].float()
    assert (y[0].float() - several).norm() <= (0.01 if dtype == BF16 else 2e-3) * several.norm()


@pytest.mark.compiles
@needs_compiler
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_a_compiled_expert(dtype):
    """As a decode step runs it, whole and one of several, and as a prompt does, matrix by matrix."""
    eager, fused = an_expert(32), an_expert(32, compile=True)
    inputs = [*rows(256, 32, dtype).values(), torch.full((1, 256), torch.nan, dtype=dtype)]
    for x in inputs:
        assert same(eager(x), fused(x))
        assert same(eager(x), of_several(eager, x)) and same(eager(x), of_several(eager, x, compile=True))


@pytest.mark.compiles
@needs_compiler
def test_the_host_s_code():
    """Compiled while torch has one thread, as in an engine on a GPU, and run on two. What comes of a single
    group, as w13's is here, no loop divides."""
    expert, threads = an_expert(64, hidden=64, ffn=192), torch.get_num_threads()
    inputs = [*rows(64, 64, BF16).values(), torch.full((1, 64), torch.nan, dtype=BF16),
              *torch.randn(100, 1, 64, generator=torch.Generator().manual_seed(5)).to(BF16)]
    try:
        torch.set_num_threads(1)
        on_the_host(expert, inputs[0]), a_block_on_the_host(expert, inputs[0])
        torch.set_num_threads(2)
        for x in inputs:
            assert same(expert(x), on_the_host(expert, x))
            assert same(expert.w13.exact(x)[0, :192], a_block_on_the_host(expert, x))
    finally:
        torch.set_num_threads(threads)


def test_one_row_of_fp32_is_the_plain_product():
    w, x = matrices(8, 256, 64)["plain"], torch.randn(1, 256, generator=torch.Generator().manual_seed(4))
    linear = PackedLinear(256, 8, largest_group=64)
    linear.q, linear.scale, linear.zero = w
    exact = x.double() @ dequantize(*w).double().T
    error = (exact_gemv(x, *w).double() - exact).norm()
    assert (linear(x).double() - exact).norm() < 1e-6 * exact.norm() < error


def test_tokens_do_not_depend_on_policy_or_slots(tiny):
    def run(**options):
        engine = load(tiny, dtype="bfloat16", **options)
        return engine.generate([1, *range(20, 40)], max_new_tokens=12, seed=3).token_ids
    expected = run()
    for policy, n in (("duo", 2), ("lru", 5), ("cache", 24)):
        assert run(policy=policy, cache_experts=n) == expected
