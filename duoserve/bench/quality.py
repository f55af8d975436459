"""How well the packed model predicts a text: bits per byte, what a byte of it would take on average if the
model compressed it. Lower is better. The text goes through in windows of --context tokens, each by itself
after a BOS. To see what four bits cost, give the 16-bit model the same windows in any program that reports
its loss: bits per byte is the sum of the losses of all tokens / ln 2 / the bytes of the text. Texts differ
far more than models: compare on the same file, with the same --context; and compare perplexities only
between models with the same tokenizer. With --decode the text takes the path of new tokens, which rounds
otherwise than a prompt's, and is slower.
"""

import math
from contextlib import closing
from pathlib import Path

import torch
import torch.nn.functional as F

from ..checkpoint import ensure_packed
from ..engine import Engine
from ..errors import WEIGHTS, Progress, UserError, count, format_bytes, note, reading_text
from ..memory import LOGIT_ROWS
from ..options import EngineOptions
from ..packed import PackedModel

LEAST_TEXT = 16                             # tokens; fewer say nothing


def quality(args) -> dict:
    """`bench quality`: every token of a text predicted once, in windows independent of each other."""
    with reading_text(args.file):
        text = Path(args.file).read_bytes().decode("utf-8-sig")
    if not text.strip() or "\0" in text:
        raise UserError(f"{args.file}: is empty, or not UTF-8 text; give a text of some pages")
    packed = PackedModel(ensure_packed(args.model, WEIGHTS))
    bos, *ids = packed.tokenizer().encode(text)
    if len(ids) < LEAST_TEXT:
        raise UserError(f"{args.file}: {len(ids)} tokens are too short a text; give some pages")
    most, context = packed.config.max_position_embeddings, args.context
    context = min(2048, most) if context is None else context
    options = EngineOptions(device=args.device, dtype=args.dtype, gpu_memory=args.gpu_memory,
                            context=context, predictor="none")
    engine = Engine(packed, options, progress=Progress)
    nats, starts, nbytes = 0.0, range(0, len(ids), context), len(text.encode())
    with closing(Progress(len(ids), "tokens", write=count)) as bar:
        for window in (ids[start:start + context] for start in starts):
            logits = engine.logits([bos, *window[:-1]], decode=args.decode)
            for rows, want in zip(logits.split(LOGIT_ROWS), torch.tensor(window).split(LOGIT_ROWS)):
                nats += F.cross_entropy(rows, want, reduction="sum").item()
            bar.add(len(window))
    result = {"bits_per_byte": nats / math.log(2) / nbytes, "perplexity": math.exp(nats / len(ids)),
              "tokens": len(ids), "bytes": nbytes, "windows": len(starts), "context": context}
    if len(ids) < 1000:
        note(f"{len(ids)} tokens are few; from 10,000 on two figures can be compared")
    if not args.json:
        print(f"{result['bits_per_byte']:.4f} bits per byte, perplexity {result['perplexity']:.3f} per token "
              f"({len(ids):,} tokens, {format_bytes(nbytes)}, {len(starts)} windows of {context})")
    return result
