"""The code that the host computes an expert with: generated from the same product, and timed, while the
engine loads."""

import math
import statistics
import time
from typing import Callable

import torch
from torch import Tensor

from .cache import BLOCKS, WHOLE
from .link import Key
from .packed import ExpertLayout
from .quant import (COMPILER, IN_ONE_PASS, SAME_EVERYWHERE, dots, exact_swiglu, laid_out, silu_table,
                    whole_numbers)

TRIALS = 9                                  # experts computed to see how long one takes,
PAUSE = 3e-3                                # and seconds between two: a thread that has slept starts late
# The generated code runs without holding the interpreter, on as many threads as its caller has set. (What is
# compiled for one thread would be wrong on several: each does what no loop divides.)
HOST_CODE = {**SAME_EVERYWHERE, **IN_ONE_PASS, "cpp_wrapper": True, "cpp.dynamic_threads": True,
             "cpp.threads": 2, "cpp.enable_floating_point_contract_flag": "fast"}


def stored(values: Tensor) -> Tensor:
    """The same. It tells the compiler to compute them once and store them: without it, what makes x would be
    done again for every row of the matrix that x meets."""
    values = values.contiguous()
    return values.as_strided(values.shape, values.stride())


def stored_gemv(x: Tensor, q: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """`quant.exact_gemv`, all of it in one piece of generated code."""
    p, sums = whole_numbers(x, scale.shape[-1])
    return dots(stored(laid_out(stored(p))), list(map(stored, sums)), q, scale, zero, None)


def run_expert(x: Tensor, table: Tensor, q13, scale13, zero13, q2, scale2, zero2, out: Tensor) -> None:
    """x [1, D] in a 16-bit dtype -> out [D]. q are words, of four bytes."""
    h = exact_swiglu(stored(stored_gemv(x, q13, scale13, zero13)), table, x.dtype)
    out.copy_(stored_gemv(stored(h), q2, scale2, zero2)[0])


def run_rows(x: Tensor, q13, scale13, zero13, out: Tensor) -> None:
    """x [1, D] and some rows of the first matrix -> out [rows], fp32."""
    out.copy_(stored_gemv(x, q13, scale13, zero13)[0])


def compiled_graph(function: Callable[..., None], *example: Tensor) -> Callable[..., None]:
    """`run_expert` or `run_rows` for tensors like these.

    The 94 MB of each expert push the interpreter's code and data out of the processor's caches, so Python is
    slow here. Hence a single call, and of the compiled graph itself: `torch.compile` would inspect all
    arguments first. `example`: as the function takes them; only shapes and dtypes count.
    """
    import torch._inductor                  # (these two take seconds)
    from torch.fx.experimental.proxy_tensor import make_fx
    with torch.inference_mode(False), torch.no_grad(), COMPILER:
        like = [torch.empty_like(tensor) for tensor in example]     # (inference tensors cannot be traced)
        graph = make_fx(function, tracing_mode="fake")(*like)
        return torch._inductor.compile(graph, like, options=HOST_CODE)


def compiled_experts(layout: ExpertLayout, store: dict[Key, Tensor], dtype: torch.dtype) -> Callable:
    """-> `Host`'s `compute`, of an expert in the store's memory."""
    table = silu_table(dtype, torch.device("cpu"))
    matrices = {key: [w.view(torch.int32) if w.dtype == torch.uint8 else w
                      for w in layout.views(block).values()] for key, block in store.items()}
    example = next(iter(matrices.values()))
    row = torch.zeros(len(example[-1]), dtype=dtype)
    run = compiled_graph(run_expert, row[None], table, *example, row)
    # One graph for each number of blocks: a second call would need the interpreter once more.
    rows = {blocks: len(example[0]) * blocks // BLOCKS for blocks in range(1, WHOLE)}
    first = {key: {blocks: [w[:n] for w in several[:3]] for blocks, n in rows.items()}
             for key, several in matrices.items()}
    run_first = {blocks: compiled_graph(run_rows, row[None], *(w[:n] for w in example[:3]), torch.zeros(n))
                 for blocks, n in rows.items()}

    def compute(key: Key, blocks: int, x: Tensor, out: Tensor) -> None:
        if blocks == WHOLE:
            run(x, table, *matrices[key], out)
        else:
            run_first[blocks](x, *first[key][blocks], out[:rows[blocks]])
    return compute


def on_threads(compute, keys: list[Key], x: Tensor, into: Tensor, counts: set[int]) -> dict:
    """Set how many threads this one computes with: the fastest of these counts. -> `threads`, and the seconds
    of an expert, `each`, and of a `block`."""
    took, out = dict.fromkeys(counts, math.inf), torch.empty_like(x[0])

    def median(blocks: int, out: Tensor) -> float:
        return statistics.median(seconds(compute, keys[i % len(keys)], blocks, x, out) for i in range(TRIALS))
    for n in 2 * sorted(counts):            # (twice, as somebody may disturb one of them)
        torch.set_num_threads(n)
        took[n] = min(took[n], median(WHOLE, out))
    best = min(took, key=took.get)
    torch.set_num_threads(best)
    return {"threads": best, "each": took[best], "block": median(BLOCKS, into) / BLOCKS}


def seconds(function, *arguments) -> float:
    """How long that takes after a pause, as there are between the experts of a decode."""
    time.sleep(PAUSE)
    began = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - began
