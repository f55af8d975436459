"""Where the time of `bench gpu` goes: the link, the host's share of a layer, an expert there, kernels."""

import statistics
import threading
import time
from collections import defaultdict
from contextlib import ExitStack
from functools import partial

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ..cache import WHOLE
from ..config import MixtralConfig
from ..engine import Engine
from ..machine import uncollected, usable_cpus
from ..scheduler import DecodeScheduler
from .madeup import request


@torch.inference_mode()
def bandwidth(engine: Engine) -> float:
    """Bytes a second from pinned memory into the slots, the best of ten copies; empties the cache."""
    slots = engine.slots_memory.view(-1)
    n = min(len(slots), engine.store.region)
    host = torch.from_numpy(np.frombuffer(engine.store.memory, np.uint8))[:n]
    seconds = []
    for _ in range(10):
        wait(engine.device)
        began = time.perf_counter()
        slots[:n].copy_(host, non_blocking=True)
        wait(engine.device)
        seconds.append(time.perf_counter() - began)
    engine.cache.abandon()
    engine.cache.empty()
    return n / min(seconds)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def host_us(engine: Engine, policy: str, args, trace) -> dict:
    """Microseconds of the host, a layer of decode: each part without the parts that it calls. What is left
    when all are done is the rest of the loop."""
    seconds, inside, undo = defaultdict(float), [], ExitStack()

    def timed(name: str, owner, method: str) -> None:
        def run(*arguments):
            began = time.perf_counter()
            inside.append(0.0)
            try:
                return function(*arguments)
            finally:
                took = time.perf_counter() - began
                seconds[name] += took - inside.pop()
                if inside:
                    inside[-1] += took
        function = getattr(owner, method)
        setattr(owner, method, run)
        undo.callback(setattr, owner, method, function)

    lane, cache, step = engine.cache.lane, engine.cache, engine.step
    for part in (("enqueue_layers", step, "launch"), ("enqueue_experts", step, "compute"),
                 ("wait_for_routers", lane, "read"), ("hand_over_bytes", lane, "send"),
                 ("take_note", lane, "look"), ("demand", cache, "demand"), ("plan", cache, "plan"),
                 ("think", DecodeScheduler, "update_values"), ("evict", DecodeScheduler, "victim")):
        timed(*part)
    timed("all", engine, "_decode")
    with undo:
        steps = len(request(engine, policy, args.prompts[0], args.new_tokens, trace).token_ids) - 1
    layers = engine.config.num_hidden_layers * steps
    return {f"{name}_us": 1e6 * s / layers for name, s in seconds.items()}


@torch.inference_mode()
def host_speed(engine: Engine) -> dict:
    """Milliseconds of an expert on the host, alone and while the link works, and GB/s of the link then;
    microseconds until its thread has begun; beside it torch's own 4-bit product, on as many threads."""
    host, cache, c, out = engine.host, engine.cache, engine.config, {}
    keys, x = list(engine.store.blocks), torch.zeros(1, c.hidden_size, dtype=engine.dtype)
    waits = []
    for name in ("alone", "beside_link"):
        took, (busy, moved) = [], (cache.lane.busy, cache.counts.bytes_moved)
        for i in range(40):
            if name != "alone" and cache.lane.free_at() - cache.lane.now() < 2e-3:
                key = keys[(7 * i) % len(keys)]
                cache.drop(key)             # (its slot is poisoned by nothing: nobody computes)
                cache.demand(key)
            key = keys[i % len(keys)]
            host.take(x)
            host.submit({key: WHOLE})
            job = host.jobs[key]
            while host.jobs:                # as in decode, while a routing is awaited
                cache.pump()
                host.pause()
            took.append(job.ended - job.begun)
            waits.append(job.begun - job.asked)
            host.answer(key)
        cache.lane.finish()
        out[f"host_{name}_ms"] = 1e3 * statistics.median(took)
        if name != "alone" and cache.lane.busy > busy:
            out["link_beside_GB_s"] = (cache.counts.bytes_moved - moved) / (cache.lane.busy - busy) / 1e9
    waits.sort()
    out |= {"begins_us": 1e6 * statistics.median(waits), "begins_99_us": 1e6 * waits[len(waits) * 99 // 100]}
    out["cores"] = usable_cpus()
    thread = threading.Thread(target=host_int4, args=(c, host.state["threads"], out))
    thread.start()
    thread.join()
    return out


def host_int4(c: MixtralConfig, threads: int, out: dict) -> None:
    torch.set_num_threads(threads)
    shapes = (2 * c.intermediate_size, c.hidden_size), (c.hidden_size, c.intermediate_size)
    experts = [[(torch.randn(1, columns, dtype=torch.bfloat16),
                 torch._convert_weight_to_int4pack_for_cpu(
                     torch.randint(0, 16, (rows, columns), dtype=torch.int32), 2),
                 torch.rand(columns // 128, rows, 2, dtype=torch.bfloat16)) for rows, columns in shapes]
               for _ in range(4)]
    took = []
    for i in range(24):
        began = time.perf_counter()
        for x, packed, scales in experts[i % 4]:
            torch._weight_int4pack_mm_for_cpu(x, packed, 128, scales)
        took.append(time.perf_counter() - began)
    out |= {"host_threads": threads, "host_int4pack_ms": 1e3 * statistics.median(took)}


@torch.inference_mode()
def kernels(engine: Engine) -> dict:
    """Microseconds of the pieces of a decode step (a layer's with two experts), and the memory bandwidth that
    an expert's product makes of it; beside it torch's own 4-bit product on the same shapes (group 128, bf16
    scale and zero). (Where a small model computes two experts for one, `expert` is both.)"""
    c, step, device = engine.config, engine.step, engine.device
    slots, out = engine.source.slots, step.expert_out[0, :1]
    none = slots.count.zero_()
    with uncollected():
        experts = [step.capture(partial(slots.run, torch.full((1,), slot, device=device), step.x, out, none))
                   for slot in range(min(64, engine.plan.slots))]
    layers = step.layers[step.sizes[0]]
    out = {"layer_kernels_us": kernel_us(layers, device),
           "expert_kernels_us": kernel_us(experts, device), "layer_us": elapsed_us(layers),
           "end_us": elapsed_us([step.end]), "expert_us": elapsed_us(experts), "int4pack_mm_expert_us": 0.0}
    copies = max(2, 2**28 // engine.plan.expert)                    # more than the GPU's own caches hold
    for rows, columns in ((2 * c.intermediate_size, c.hidden_size), (c.hidden_size, c.intermediate_size)):
        packs = [torch.ops.aten._convert_weight_to_int4pack(
            torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, device=device), 8)
            for _ in range(copies)]
        scales = torch.rand(columns // 128, rows, 2, dtype=torch.bfloat16, device=device)
        x = torch.randn(1, columns, dtype=torch.bfloat16, device=device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for pack in packs:
                torch.ops.aten._weight_int4pack_mm(x, pack, 128, scales)
        out["int4pack_mm_expert_us"] += elapsed_us([graph.replay]) / copies
    for name in ("expert", "int4pack_mm_expert"):
        out[f"{name}_TB_s"] = engine.plan.expert / out[f"{name}_us"] / 1e6
    return out


def elapsed_us(pieces, rounds: int = 5) -> float:
    """Microseconds a piece, run one after the other."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for i in range(rounds + 1):
        if i == 1:                          # the first round is to warm up
            begin.record()
        for piece in pieces:
            piece()
    end.record()
    end.synchronize()
    return 1e3 * begin.elapsed_time(end) / rounds / len(pieces)


def kernel_us(pieces, device: torch.device) -> float:
    """Microseconds a piece, of its kernels alone: neither launches nor gaps."""
    wait(device)
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for piece in pieces:
            piece()
        wait(device)
    return sum(event.time_range.elapsed_us() for event in seen.events()
               if event.device_type == DeviceType.CUDA) / len(pieces)
