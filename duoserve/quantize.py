"""How weights become four bits: the grid of each group, scale and zero, fitted by least squares (quant.py
says what they mean). Done once, when a model is converted."""

import torch
from torch import Tensor

from .errors import UserError
from .quant import pack


def quantize(weight: Tensor, group: int, name: str = "matrix",
             iterations: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """weight [N, columns] -> bytes [N, columns / 2], scale and zero [N, columns / group] in fp16.

    Alternating least squares: round to the grid, then fit the grid (w ~ scale * q - scale * zero) to what was
    rounded, and again; each half lowers the squared error. `UserError` if the weights do not fit fp16's
    range.
    """
    w = weight.float().unflatten(-1, (-1, group))
    low, high = w.amin(-1), w.amax(-1)
    largest = torch.maximum(high, -low)
    if not largest.max() <= 65504:
        raise UserError(f"{name}: its largest weight is {largest.max().item():g}, beyond fp16: it cannot be "
                        "packed")
    # A constant group is its exponent times its mantissa, exactly. A nearly constant one keeps zero in fp16.
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
        scale = (spread * w).sum(-1) / spread.square().sum(-1).clamp(min=1e-9)
        scale = torch.maximum(scale, least).half().float()
        zero = q_mean - mean / scale
    scale = torch.where(constant, torch.ldexp(torch.ones_like(low), exponent), scale).half()
    zero = torch.where(constant, -low / scale.float(), zero).half()
    return pack(grid(scale.float(), zero.float()).flatten(-2), group), scale, zero
