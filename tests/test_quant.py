"""Four bits a weight: what is lost, what is not, the layout of bytes, and products without unpacking."""

import re

import pytest
import torch

from duoserve.errors import UserError
from duoserve.quant import PackedLinear, dequantize, dequantize_into, gemv, group_size, pack, unpack
from duoserve.quantize import quantize
from models import needs_compiler, on_a_gpu
from products import CASES, matrices, same

GROUPS = (128, 64, 32)


def gaussian(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("group, most", [(128, 0.0945), (64, 0.087), (32, 0.078)])
@pytest.mark.parametrize("size", [1e-2, 1.0])
def test_error_on_gaussian_weights(group, most, size):
    w = gaussian(256, 1024) * size
    assert (dequantize(*quantize(w, group)) - w).norm() / w.norm() <= most


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", GROUPS)
def test_a_constant_group_survives_exactly(dtype, group):
    values = [0.0, 1.0, -1.0, 0.1, -0.37, 3.14159, -447.0, 0.0123, 1e-3, 17 / 3]
    if dtype == torch.float16:
        values += [65504.0, -65504.0, 2.0 ** -14]
    w = torch.tensor(values).to(dtype)[:, None].repeat(1, 2 * group)
    w[:, group:] = 0.5
    assert torch.equal(dequantize(*quantize(w, group)), w.float())


@pytest.mark.parametrize("group", GROUPS)
def test_weights_on_a_grid_survive_exactly(group):
    q = torch.randint(0, 16, (64, 256), generator=torch.Generator().manual_seed(1))
    q[:, ::16], q[:, 1::16] = 0, 15
    w = (q - 8) * 2.0 ** -6
    assert torch.equal(dequantize(*quantize(w, group)), w)


def test_a_nearly_constant_group_stays_close():
    w = torch.full((4, 128), 5.0)
    w[:, 7] += torch.tensor([1e-3, 1e-2, -1e-3, 1e-5])
    scale, zero = quantize(w, 128)[1:]
    assert scale.isfinite().all() and zero.isfinite().all()
    assert (dequantize(*quantize(w, 128)) - w).abs().max() < 0.011


@pytest.mark.parametrize("value", [7e4, -7e4, float("inf"), float("-inf"), float("nan")])
def test_what_does_not_fit_fp16_is_refused_by_name(value):
    w = gaussian(4, 128)
    w[2, 3] = value
    with pytest.raises(UserError, match=r"shard\.safetensors: some\.weight.*fp16"):
        quantize(w, 128, "shard.safetensors: some.weight")


@pytest.mark.parametrize("group", GROUPS)
def test_byte_j_holds_columns_j_and_j_plus_half_a_group(group):
    q = torch.randint(0, 16, (3, 2 * group), generator=torch.Generator().manual_seed(2))
    packed = pack(q, group)
    assert packed.dtype == torch.uint8 and packed.shape == (3, group)
    for row in range(3):
        for g in range(2):
            for j in range(group // 2):
                byte = packed[row, g * group // 2 + j].item()
                assert byte & 15 == q[row, g * group + j] and byte >> 4 == q[row, g * group + j + group // 2]
    assert torch.equal(unpack(packed, group).flatten(-2), q.to(torch.uint8))


def test_a_weight_is_q_minus_zero_times_scale():
    q, scale, zero = quantize(gaussian(8, 256), 64)
    assert scale.dtype == zero.dtype == torch.float16 and scale.shape == zero.shape == (8, 4)
    by_hand = (unpack(q, 64).float() - zero.float()[..., None]) * scale.float()[..., None]
    assert torch.equal(dequantize(q, scale, zero), by_hand.flatten(1))


def test_blocks_of_rows_quantise_alike():
    w = gaussian(96, 256).bfloat16()
    blocks = [quantize(block, 64) for block in w.split(40)]
    assert all(torch.equal(whole, torch.cat(part)) for whole, part in zip(quantize(w, 64), zip(*blocks)))


@pytest.mark.parametrize("columns, largest, group",
                         [(4096, 128, 128), (192, 128, 64), (96, 128, 32), (4096, 32, 32)])
def test_group_size_is_the_largest_that_divides(columns, largest, group):
    assert group_size(columns, largest) == group


def test_columns_that_no_group_divides_are_refused_by_name():
    with pytest.raises(UserError, match="attention.o.*100"):
        group_size(100, 128, "attention.o")


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("dtype, tolerance",
                         [(torch.float32, 2e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_one_row_and_many_rows_are_the_same_product(group, dtype, tolerance):
    w, x = quantize(gaussian(80, 256), group), gaussian(5, 256, seed=3).to(dtype)
    exact = x.double() @ dequantize(*w).double().T
    linear = PackedLinear(256, 80)
    linear.q, linear.scale, linear.zero = w
    for y in (linear(x), torch.cat([linear(row[None]) for row in x])):
        assert y.dtype == dtype and (y.double() - exact).abs().max() <= tolerance * exact.abs().max()


def test_packed_linear_takes_any_leading_shape_and_splits_large_matrices(monkeypatch):
    linear = PackedLinear(128, 72)
    linear.q, linear.scale, linear.zero = quantize(gaussian(72, 128), 128)
    x = gaussian(6, 128, seed=4)
    whole = linear(x)
    assert linear(x.view(2, 3, 128)).shape == (2, 3, 72) and linear(x[:1].view(1, 1, 128)).shape == (1, 1, 72)
    monkeypatch.setattr("duoserve.quant.UNPACK", 128 * 10)
    assert torch.allclose(linear(x), whole, atol=1e-5)
    assert torch.allclose(whole, x @ dequantize(linear.q, linear.scale, linear.zero).T, atol=1e-4)


def test_unpacking_into_a_workspace_that_all_matrices_share(monkeypatch):
    monkeypatch.setattr("duoserve.quant.UNPACK", 256 * 10)            # (parts of whole eights of rows)
    matrices, calls = [PackedLinear(256, rows) for rows in (24, 40)], []
    for seed, linear in enumerate(matrices):
        linear.q, linear.scale, linear.zero = quantize(gaussian(len(linear.q), 256, seed=seed), 128)
    x = gaussian(5, 256, seed=4)
    expected = [linear(x) for linear in matrices]
    workspace = torch.full((256 * 16,), torch.nan)
    for linear in matrices:
        linear.workspace = workspace
        linear.capture(lambda piece: lambda: (calls.append(1), piece()))
    for _ in range(2):
        assert all(torch.equal(linear(x), y) for linear, y in zip(matrices, expected))
    assert len(calls) == 2 * (3 + 3)
    one = matrices[0](x[:1])                # a single row goes its own way
    assert len(calls) == 12 and torch.allclose(one, expected[0][:1], atol=1e-4)


@pytest.mark.parametrize("group, dtype", [*CASES, (128, torch.float32)])
@pytest.mark.parametrize("device", ("cpu", pytest.param("cuda", marks=on_a_gpu)))
def test_what_is_compiled_unpacks_the_same_weights(group, dtype, device, monkeypatch):
    """Part by part; of one matrix, and of one of several. (On the CPU as eager code: that is sooner over.)"""
    monkeypatch.setattr("duoserve.quant.UNPACK", 7 * group * 10)    # (parts of sixteen rows)
    names, kinds = zip(*matrices(40, 7 * group, group).items())
    linear = PackedLinear(7 * group, 40, largest_group=group, compile=True)
    if device == "cpu":
        linear.dequantize_into = dequantize_into
    x = torch.zeros(1, dtype=dtype, device=device)
    for at, (name, w) in enumerate(zip(names, kinds)):
        for several in (False, True):
            linear.q, linear.scale, linear.zero = (
                tensor.to(device) for tensor in (map(torch.stack, zip(*kinds)) if several else w))
            linear.at = torch.tensor([at], device=device) if several else None
            weights = [linear.unpacked(i, part, x) for i, part in enumerate(linear.parts())]
            assert len(weights) == 3 and same(torch.cat(weights).cpu(), dequantize(*w).to(dtype)), name


@pytest.mark.compiles
@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_one_row_product_does_not_unpack_the_matrix(dtype):
    from torch._inductor.utils import run_and_get_code
    rows, columns = 512, 1024
    w, x = quantize(gaussian(rows, columns), 128, iterations=1), gaussian(1, columns, seed=5).to(dtype)
    torch._dynamo.reset()                   # so that the product behind the wall is compiled here too
    y, code = run_and_get_code(torch.compile(gemv, dynamic=False), x, *w)
    assert len(code) == 2 and torch.allclose(y, gemv(x, *w), rtol=1e-4, atol=1e-3)
    buffers = [eval(shape) for shape in re.findall(r"empty_strided\w*\((\([\d, ]*\))", "".join(code))]
    assert buffers, "the generated code allocates nothing: is it read rightly?"
    assert max(torch.Size(shape).numel() for shape in buffers) < rows * columns / 64, buffers
