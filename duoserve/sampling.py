"""From logits to the next token."""

import torch
from torch import Tensor

from .options import SamplingParams


def sample(logits: Tensor, params: SamplingParams, generator: torch.Generator) -> Tensor:
    """logits [vocab] fp32 -> one token id, on the same device; -1 if they are not finite."""
    finite = logits.isfinite().all()
    if params.temperature == 0:
        return torch.where(finite, logits.argmax(), -1)
    if params.top_k:
        least = logits.topk(min(params.top_k, len(logits))).values[-1]
        logits = logits.masked_fill(logits < least, -torch.inf)
    ranked, ids = ((logits - logits.max()) / params.temperature).sort(descending=True, stable=True)
    p = ranked.softmax(-1)
    if params.top_p < 1:                    # the smallest set that reaches top_p, summed in whole numbers:
        parts = (p * 2**40).long()          # a GPU adds in no fixed order, and one seed must give one text
        p[parts.cumsum(-1) - parts >= params.top_p * 2**40] = 0
    p = p.nan_to_num(1.0)                   # (NaN would end the process)
    token = ids.gather(0, torch.multinomial(p, 1, generator=generator))
    return torch.where(finite, token, -1)
