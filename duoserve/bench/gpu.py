"""bench gpu: the engine at Mixtral's real shapes, on a real link, without Mixtral's weights.

The experts are random 4-bit bytes, different for each and really pinned; attention, router and head are
random too, and run. Only the routing of decode is made up, since random weights route like no language model:
the next token chooses an expert again with chance `--persistence`, and the lookahead finds a chosen expert
with chance `--lookahead-recall` (0.30 and 0.8 are near what is published for Mixtral). Every policy sees the
same routing, and must give the same tokens.

Peak memory is `max_memory_reserved` since the process began, so sizes run in ascending order, and the run
with all experts resident, which gives the floors, comes last.
"""

import gc
import json
import queue
import statistics
import sys
import threading
import time
from collections import defaultdict
from contextlib import ExitStack
from functools import cache, partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ..cache import WHOLE
from ..config import MixtralConfig
from ..engine import Engine
from ..errors import UserError, note, parse_amount, parse_rate
from ..experts import StreamedExperts
from ..machine import usable_cpus
from ..model import Layer, Router
from ..options import EngineOptions, check_device
from ..packed import ModelShapes
from ..predictor import Predictor
from ..scheduler import DecodeScheduler
from ..store import ExpertStore
from ..training import measure_affinity, train
from .flags import SHAPES, check_policies, table
from .replay import Costs, Replay, step_floor, synthetic_traces

LEARNED = 24                                # made-up sequences that duo's predictor is trained on


class RandomModel(ModelShapes):
    """Stands in for a `PackedModel`: its shapes, and random bytes that keep activations finite."""

    fingerprint, directory = "random", Path("random weights")

    def __init__(self, config: MixtralConfig, device: torch.device):
        super().__init__(config)
        self.device, self.left = device, len(config.expert_keys)
        self.blocks, self.lock = queue.SimpleQueue(), threading.Lock()
        for _ in range(2):
            self.blocks.put(None)           # memory to make an expert in, when it is needed

    def tokenizer(self):
        """A stand-in: every id is a token without text, and none ends the answer."""
        return SimpleNamespace(eos=(), sp=SimpleNamespace(vocab_size=lambda: 0), check=lambda size: None)

    def _fill(self, name: str, tensor: torch.Tensor) -> None:
        if tensor.dtype == torch.uint8:
            tensor.random_()
        elif name.endswith(".scale"):       # 4.6: a random nibble's standard deviation; 128 columns a group
            each = 1 / (4.6 * (128 * tensor.shape[-1]) ** 0.5)
            if ".o." in name or name.startswith("w2."):             # these add to the residual stream
                each /= (2 * self.config.num_hidden_layers) ** 0.5
            tensor.uniform_(0.8 * each, 1.2 * each)
        elif name.endswith(".zero"):
            tensor.uniform_(7, 8)
        elif "norm" in name:
            tensor.fill_(1)
        else:
            tensor.normal_(0, 1 if "embed" in name else tensor.shape[-1] ** -0.5)

    def resident(self) -> dict[str, torch.Tensor]:
        """What stays on the device, made there."""
        dtypes, out = {"16": torch.bfloat16, "u8": torch.uint8, "f16": torch.float16}, {}
        for name, (kind, shape) in self.shapes.items():
            out[name] = torch.empty(shape, dtype=dtypes[kind], device=self.device)
            self._fill(name, out[name])
        return out

    def read_expert(self, layer: int, expert: int, into: np.ndarray) -> None:
        """Made on the device and copied down; two at a time, as the memory plan has no room for more."""
        block, stream = self.blocks.get() or self._block()
        with torch.cuda.stream(stream):
            for name, view in self.layout.views(block).items():
                self._fill(name, view)
            torch.from_numpy(into).copy_(block)
        self.blocks.put((block, stream))
        with self.lock:
            self.left -= 1
            if not self.left:               # give the memory back before anything else needs it
                del block
                self.blocks = None
                release()

    def _block(self) -> tuple[torch.Tensor, torch.cuda.Stream | None]:
        stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        return torch.empty(self.layout.nbytes, dtype=torch.uint8, device=self.device), stream


class MadeUpRouter(Router):
    """In decode it says what a made-up trace says of this token: `table [2, steps, experts]`, on the device,
    holds its own logits and the lookahead, `here [1]` is the step. Its product is computed all the same."""

    def forward(self, x, ahead: int = 0):
        logits = super().forward(x)         # (a compiler drops what is multiplied by zero)
        if len(x) > 1:
            return logits
        return torch.where(logits.isnan(), logits, self.table[ahead, self.here].to(x.dtype))


class MadeUpLayer(Layer):
    def gate(self, h):
        return self.router(self.ffn_norm(h), 1)


class MadeUpEngine(Engine):
    """Routes decode as a made-up trace says. (Random weights route like no language model.)"""

    def _open_store(self, progress, loading):
        store = super()._open_store(progress, loading)
        store.wait()                        # (random bytes are made on the device, before it is full)
        return store

    def _make_model(self, linear):
        model, c, device = super()._make_model(linear), self.config, self.device
        self.here = torch.zeros(1, dtype=torch.long, device=device)
        self.tables = torch.zeros(c.num_hidden_layers, 2, self.context, c.num_local_experts, device=device)
        for layer, steps in zip(model.layers, self.tables):
            layer.__class__, layer.router.__class__ = MadeUpLayer, MadeUpRouter
            layer.router.table, layer.router.here = steps, self.here
        return model

    @torch.inference_mode()
    def follow(self, trace) -> None:
        """From now on decode routes as in this trace."""
        steps = torch.from_numpy(np.stack((trace.logits, trace.lookahead), 1)[trace.prompt:])
        self.tables[:, :, :len(steps)] = steps.permute(2, 1, 0, 3)
        self.source.start_anew()


class CountingExperts(StreamedExperts):
    """Decode's steps are counted, so that the made-up routers know where they are.

    `totals` collects after each layer visit of decode how many experts have had to cross the link so far
    (misses and used prefetches), and how many the host has computed; `used` counts those that got a token in
    prefill.
    """

    def start_anew(self) -> None:
        self.totals, self.used, self.prefill_busy = [], 0, None
        self.here.fill_(-1)                 # (the table's last row is empty: for a prompt of one token)

    def begin(self, scheduler, start, tokens, decoding) -> None:
        super().begin(scheduler, start, tokens, decoding)
        if decoding:
            self.here.add_(1)
            if self.prefill_busy is None:   # what the lane had done when decode began
                self.lane.poll()
                self.lane.look()
                self.prefill_busy = self.lane.busy

    def read(self, layer, numbers, rows=None, x=None):
        routing = super().read(layer, numbers, rows, x)
        self.used += 0 if self.decoding else sum(n > 0 for n in routing.counts)
        return routing

    def end_layer(self, layer) -> None:
        super().end_layer(layer)
        if self.decoding:
            counts = self.cache.counts
            self.totals.append((counts.misses + counts.prefetched_used, counts.host_experts))


def release() -> None:
    """Give back what torch keeps of the device's memory and no tensor needs."""
    gc.collect()
    torch.cuda.empty_cache()                # (does nothing where CUDA is not used)


def build(model: RandomModel, args, store: ExpertStore | None, **memory) -> Engine:
    """An engine with made-up routing in decode; a later one takes over the first one's host memory."""
    release()
    options = EngineOptions(device=args.device, context=args.context, predictor="none", compile=args.compile,
                            simulate_link=args.simulate_link, host_threads=args.host_threads,
                            simulate_host=args.simulate_host, **memory)
    engine = MadeUpEngine(model, options, store=store)
    engine.source = CountingExperts(model.config, engine.source.slots, engine.cache)
    engine.source.here = engine.here
    if engine.host is not None:             # (for the first time it takes a minute to compile)
        engine.host.ready.wait()
    return engine


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


def request(engine: Engine, policy: str, tokens: int, new: int, trace, seed: int = 0):
    """Greedy decoding after a random prompt -> `Generation`."""
    engine.policy = policy
    engine.follow(trace)
    ids = np.random.default_rng(seed).integers(3, engine.config.vocab_size, tokens).tolist()
    return engine.generate(ids, max_new_tokens=new, temperature=0)


def measure(engine: Engine, policy: str, args, traces, round_: int, start: str) -> dict:
    """One policy once: TTFT at each prompt length, and TPOT after that of `args.decode_after`. Each prompt
    finds the slots `empty`, or `warm`: with what the predictor's traces used most."""
    row: dict = {"policy": policy, "round": round_, "cache_experts": engine.plan.slots, "ttft_ms": {},
                 "prefill_experts": {}}
    new = min(args.new_tokens, 8) if policy == "layer-prefetch" else args.new_tokens
    source, cache = engine.source, engine.cache
    for tokens in args.prompts:
        engine.fill_slots() if start == "warm" else cache.empty()
        already = sum(slot.whole for slot in cache.slots)
        last = tokens == args.decode_after
        result = request(engine, policy, tokens, new if last else 1, traces[round_ % len(traces)], round_)
        stats, steps = result.stats, len(result.token_ids) - 1
        row["ttft_ms"][str(tokens)] = 1e3 * stats.ttft_s
        row["prefill_experts"][str(tokens)] = max(0, source.used - already)
        if last:
            decode_s, decode_busy = stats.tpot_s * steps, cache.lane.busy - source.prefill_busy
            host = engine.host if stats.host_unused is None else None
            visits = np.diff([(0, 0), *source.totals], axis=0)
            needed, hosted = visits.T.reshape(2, steps, -1).tolist()                # [steps][layers]
            row |= {"host_experts": stats.host_experts, "split_experts": stats.split_experts,
                    "host_busy": host.busy / decode_s if host else 0.0,
                    "host_ms": 1e3 * host.seconds() if host else 0.0,
                    "host_block_ms": 1e3 * host.seconds(1) if host else 0.0,
                    "link_ms": 1e3 * cache.transfer_s(),
                    "hosted": hosted, "tpot_ms": 1e3 * stats.tpot_s, "new_tokens": steps + 1,
                    "hits": stats.hits, "prefetched_used": stats.prefetched_used, "misses": stats.misses,
                    "needed_per_token": sum(map(sum, needed)) / steps,
                    "moved_per_token": cache.counts.bytes_moved / engine.plan.expert / steps,
                    "prefill_link_busy": min(1.0, source.prefill_busy / stats.ttft_s),
                    "decode_link_busy": min(1.0, decode_busy / decode_s),
                    "tokens": result.token_ids, "needed": needed,
                    "end_to_end_ms": 1e3 * (stats.ttft_s + decode_s)}
    if engine.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(engine.device)
        row |= {"peak_bytes": engine.peak_bytes(), "device_used_bytes": total - free}
    return row | {"planned_bytes": engine.plan.total}


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
    scale and zero)."""
    c, step, device = engine.config, engine.step, engine.device
    slots, out = engine.source.slots, step.expert_out[0, :1]
    none = slots.count.zero_()
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


def add_floors(rows: list[dict], config: MixtralConfig, expert_ms: float, resident: dict | None,
               args) -> None:
    """What each row could have been: layer by layer the link's time for what had to cross it, or the compute
    (taken as nothing, if it was not measured), whichever is longer; with a host as in `bench schedule`. And
    what a replay says."""
    layers, k = config.num_hidden_layers, config.num_experts_per_tok
    layer_ms = resident["tpot_ms"] / layers if resident else 0.0
    for row in rows:
        row["ttft_over_floor"] = {}
        for tokens, used in row["prefill_experts"].items():
            compute = resident["ttft_ms"][tokens] if resident else 0.0
            row["ttft_over_floor"][tokens] = row["ttft_ms"][tokens] / (max(compute, used * expert_ms) or 1)
        needed, hosted = row.pop("needed"), row.pop("hosted")
        costs = Costs(layer_ms * 0.6, layer_ms * 0.4 / k, row["link_ms"] or expert_ms, predict_ms=0.0,
                      host_expert_ms=row["host_ms"] or None, host_block_ms=row["host_block_ms"] or None)
        if row["host_ms"]:
            floor = statistics.mean(step_floor(costs, layers, k, sum(on_host), sum(moved))
                                    for on_host, moved in zip(hosted, needed))
        else:
            floor = sum(max(layer_ms, n * expert_ms) for step in needed for n in step) / len(needed)
        row["replay_ms"] = 0.0
        if resident and "persistence" in row:
            traces, predictor = made_up(config, row["persistence"], row["lookahead_recall"], args.rounds,
                                        args.new_tokens, args.predictor)
            run = Replay(traces[row["round"] % len(traces)], k, row["policy"].removesuffix(" alone"),
                         row["cache_experts"], costs, predictor, args.start).run()
            row["replay_ms"] = 1e3 * run.decode_s / run.steps
        row["tpot_floor_ms"], row["tpot_over_floor"] = floor, row["tpot_ms"] / (floor or row["tpot_ms"])


@cache
def made_up(config: MixtralConfig, persistence: float, recall: float, rounds: int, new: int, predict: bool):
    """-> a trace for each round, and a predictor trained on others of the same kind."""
    k, sequences = config.num_experts_per_tok, rounds + predict * LEARNED
    traces = synthetic_traces(config, persistence, recall, sequences, 2, new)
    traces, others = traces[:rounds], traces[rounds:]
    return traces, Predictor(train(others, k), measure_affinity(others, k), "random") if predict else None


def gpu(args) -> dict:
    """`bench gpu`: -> all rows as plain data. --append has them as soon as they are measured."""
    device = check_device(args.device)
    cuda = device.type == "cuda"
    if not cuda and args.shape != "tiny":
        raise UserError(f"--shape {args.shape}: needs a GPU; --shape tiny runs anywhere")
    check_policies(args.policies)
    config = SHAPES[args.shape]
    model, total = RandomModel(config, device), len(config.expert_keys)
    args.decode_after = args.prompts[len(args.prompts) // 2]
    args.context = max(*args.prompts, args.decode_after + args.new_tokens) + 8
    if not cuda:                            # there is no link to measure
        args.simulate_link = args.simulate_link or "100MB/s"
    rows: list[dict] = []

    def keep(row: dict) -> None:
        rows.append(row)
        if args.append:
            with open(args.append, "a") as file:
                shown = {key: v for key, v in row.items() if key not in ("tokens", "needed", "hosted")}
                file.write(json.dumps(shown) + "\n")
        print("  ".join(f"{key} {round(v, 3) if isinstance(v, float) else v}" for key, v in row.items()
                        if isinstance(v, (str, int, float))), file=sys.stderr, flush=True)

    if args.append:
        open(args.append, "a").close()      # fails before minutes are spent
    engine = store = resident = None
    sizes = args.gpu_memory or ["15%"]
    for size in sorted(sizes, key=lambda size: parse_amount(size, model.nbytes, "--gpu-memory")):
        by_count = args.shape == "tiny" and not args.gpu_memory
        memory = {"cache_experts": total // 4} if by_count else {"gpu_memory": size}
        engine = host = None                # before the next: the device has room for one, the cores too
        engine = build(model, args, store, **memory)
        if store is None:
            store = engine.store
            link = args.simulate_link
            rate = parse_rate(link, "--simulate-link") if link else bandwidth(engine)
            keep({"load_s": engine.load_s, "link_GB_s": rate / 1e9, "pinned": store.pinned,
                  "expert_transfer_ms": 1e3 * model.layout.nbytes / rate, "gpu_memory": size,
                  "slots": engine.plan.slots})
        warm_up, = synthetic_traces(config, 0.5, 0.5, 1, 2, 8)
        for tokens in args.prompts:         # libraries choose kernels, and take memory, by length
            request(engine, args.policies[0], tokens, 4, warm_up)
        for persistence, recall in product(args.persistence, args.lookahead_recall):
            traces, engine.predictor = made_up(config, persistence, recall, args.rounds, args.new_tokens,
                                               args.predictor)
            for round_ in range(args.rounds):
                said: dict[str, list[int]] = {}
                host, alone = engine.host, [f"{args.policies[0]} alone"] if engine.host else []
                for policy in [*args.policies, *alone]:
                    engine.host = None if policy in alone else host
                    row = measure(engine, policy.removesuffix(" alone"), args, traces, round_, args.start)
                    engine.host = host
                    keep(row | {"policy": policy, "gpu_memory": size, "persistence": persistence,
                                "lookahead_recall": recall})
                    for other, tokens in said.items():
                        if any(a != b for a, b in zip(tokens, row["tokens"])):
                            raise UserError(f"{policy} and {other} gave different tokens: one is broken")
                    said[policy] = row["tokens"]
            keep({"policy": "host", "gpu_memory": size} | host_us(engine, args.policies[0], args, traces[0]))
            if cuda and engine.host is not None and engine.host.trouble() is None:
                keep({"policy": "host's experts", "gpu_memory": size} | host_speed(engine))
    if args.resident:
        engine = host = None
        try:
            engine = build(model, args, store, cache_experts=total)
        except UserError as error:          # (a small GPU)
            note(f"no floors: {error}")
        else:
            measure(engine, "cache", args, traces, 0, "warm")
            runs = [measure(engine, "duo", args, traces, i, "warm") for i in range(3)]
            ttft = {n: statistics.median(run["ttft_ms"][n] for run in runs) for n in runs[0]["ttft_ms"]}
            tpot = statistics.median(run["tpot_ms"] for run in runs)
            resident = runs[0] | {"policy": "resident", "tpot_ms": tpot, "ttft_ms": ttft}
            keep(resident)
            if cuda:
                keep({"policy": "kernels"} | kernels(engine))
    measured = [row for row in rows if "needed" in row]
    add_floors(measured, config, rows[0]["expert_transfer_ms"], resident, args)
    for row in rows:
        row.pop("tokens", None)
    result = {"shape": args.shape, "device": torch.cuda.get_device_name(device) if cuda else "cpu",
              "torch": torch.__version__, "model_bytes": model.nbytes, "expert_bytes": model.layout.nbytes,
              "rows": rows}
    if not args.json:
        print_gpu(result, args)
    return result


def print_gpu(result: dict, args) -> None:
    """Medians of the rounds, TPOT with its least and greatest; `/floor` is that of the longest prompt's TTFT,
    then that of TPOT; `x first` is against the first policy."""
    first, longest = result["rows"][0], str(max(args.prompts))
    print(f"{result['device']}, torch {result['torch']}: {args.shape}, {result['model_bytes'] / 1e9:.3g} GB "
          f"in 4 bits; link {first['link_GB_s']:.1f} GB/s, {first['expert_transfer_ms']:.3g} ms an expert; "
          f"{args.new_tokens} tokens after {args.decode_after}; medians of {args.rounds} rounds, times in ms")
    groups, lines, best = defaultdict(list), [], {}
    for row in result["rows"]:
        if "tpot_ms" in row:
            setting = row["cache_experts"], row.get("persistence", ""), row.get("lookahead_recall", "")
            groups[setting, row["policy"]].append(row)
    for (setting, policy), rows in groups.items():
        median = lambda value: statistics.median(map(value, rows))
        over = lambda value: f"{median(value):.3f}" if args.resident else "-"
        tpots = [row["tpot_ms"] for row in rows]
        tpot, peak = statistics.median(tpots), max(row.get("peak_bytes", 0) for row in rows)
        line = dict(zip(("slots", "again", "ahead"), setting)) | {
            "policy": policy, "tpot": tpot, "range": f"{min(tpots):.2f} .. {max(tpots):.2f}",
            "ttft_over": over(lambda row: row["ttft_over_floor"][longest]),
            "tpot_over": over(lambda row: row["tpot_over_floor"]),
            "ratio": tpot / best.setdefault(setting, tpot),
            "link": median(lambda row: row["decode_link_busy"]), "host": median(lambda row: row["host_busy"]),
            "replay": median(lambda row: row["replay_ms"]), "peak": f"{peak / 1e9:.2f}" if peak else ""}
        lines.append(line | {f"ttft {n}": median(lambda row: row["ttft_ms"][str(n)]) for n in args.prompts})
    print(table([("policy", 15, "{policy}"), ("slots", 6, "{slots}"), ("again", 6, "{again}"),
                 ("ahead", 6, "{ahead}"), *((f"TTFT {n}", 10, f"{{ttft {n}:.1f}}") for n in args.prompts),
                 ("/floor", 8, "{ttft_over}"), ("TPOT", 9, "{tpot:.2f}"), ("least .. most", 18, "{range}"),
                 ("/floor", 8, "{tpot_over}"), ("replay", 8, "{replay:.2f}"), ("x first", 8, "{ratio:.2f}"),
                 ("link", 6, "{link:.0%}"), ("host", 6, "{host:.0%}"), ("peak GB", 9, "{peak}")], lines))
