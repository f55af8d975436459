"""bench gpu: the engine at Mixtral's real shapes, on a real link, without Mixtral's weights.

The experts are random 4-bit bytes, different for each and really pinned; attention, router and head are random too, and
run. Only the routing of decode is made up, since random weights route like no language model: the next token chooses an
expert again with chance `--persistence`, and the lookahead finds a chosen expert with chance `--lookahead-recall`
(0.30 and 0.8 are near what is published for Mixtral). Every policy sees the same routing, and must give the same tokens.

Peak memory is `max_memory_reserved` since the process began; so sizes run in ascending order, and the run with
all experts resident, which the floors are taken from, comes last.
"""

import gc
import json
import queue
import statistics
import sys
import threading
import time
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ..config import MixtralConfig
from ..engine import Engine
from ..errors import UserError, parse_amount, parse_rate
from ..experts import StreamedExperts
from ..history import Routing
from ..options import EngineOptions, check_device
from ..packed import ModelShapes
from ..predictor import Predictor
from ..store import ExpertStore
from ..training import measure_affinity, train
from .flags import check_policies, check_range
from .replay import synthetic_traces

LEARNED = 24                                # made-up sequences that duo's predictor is trained on
SHAPES = {
    "mixtral-8x7b": MixtralConfig(),
    "mixtral-8x22b": MixtralConfig(hidden_size=6144, intermediate_size=16384, num_hidden_layers=56,
                                   num_attention_heads=48, max_position_embeddings=65536),
    "tiny": MixtralConfig(vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=6,
                          num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=4096),
}


class RandomModel(ModelShapes):
    """Stands in for a `PackedModel`: its shapes, and random bytes that keep activations finite."""

    fingerprint, directory = "random", Path("random weights")

    def __init__(self, config: MixtralConfig, device: torch.device):
        super().__init__(config)
        self.device = device
        self.blocks: queue.Queue | None = None                      # memory on the device in which to make experts
        self.lock = threading.Lock()
        self.left = config.num_hidden_layers * config.num_local_experts

    def tokenizer(self):
        """No text, no end: every id is a token that says nothing."""
        return SimpleNamespace(eos=(), sp=SimpleNamespace(vocab_size=lambda: 0), check=lambda vocab_size: None)

    def _fill(self, name: str, tensor: torch.Tensor, columns: int) -> None:
        if tensor.dtype == torch.uint8:
            tensor.random_()
        elif name.endswith(".scale"):       # a nibble spreads by 4.6; what writes to the residual stream writes little
            writes = ".o." in name or name.startswith("w2.")
            each = 1 / (4.6 * columns ** 0.5 * ((2 * self.config.num_hidden_layers) ** 0.5 if writes else 1))
            tensor.uniform_(0.8 * each, 1.2 * each)
        elif name.endswith(".zero"):
            tensor.uniform_(7, 8)
        elif "norm" in name:
            tensor.fill_(1)
        else:
            tensor.normal_(0, 1 if "embed" in name else tensor.shape[-1] ** -0.5)

    def resident(self) -> dict[str, torch.Tensor]:
        """Made on the device: nothing crosses the link."""
        dtypes, out = {"16": torch.bfloat16, "u8": torch.uint8, "f16": torch.float16}, {}
        for name, (kind, shape) in self.shapes.items():
            out[name] = torch.empty(shape, dtype=dtypes[kind], device=self.device)
            self._fill(name, out[name], shape[-1] * (1 if kind == "16" else 128))
        return out

    def read_expert(self, layer: int, expert: int, into: np.ndarray) -> None:
        """Made on the device and copied down; two at a time, so that no more memory is taken than is planned."""
        with self.lock:
            if self.blocks is None:
                self.blocks = queue.Queue()
                for _ in range(2):
                    self.blocks.put((torch.empty(self.layout.nbytes, dtype=torch.uint8, device=self.device),
                                     torch.cuda.Stream(self.device) if self.device.type == "cuda" else None))
        block, stream = self.blocks.get()
        with torch.cuda.stream(stream):
            for name, view in self.layout.views(block).items():
                self._fill(name, view, self.config.hidden_size if name.startswith("w13") else
                           self.config.intermediate_size)
            torch.from_numpy(into).copy_(block)
        self.blocks.put((block, stream))
        with self.lock:
            self.left -= 1
            if not self.left:               # all are made: give the memory back before anything else wants it
                del block
                self.blocks = None
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()


class SyntheticExperts(StreamedExperts):
    """Decode's routing is a made-up trace's; the link's and the compute's part of it are real.

    `needed` collects how many experts had to cross the link at each layer visit of decode: misses and used prefetches;
    `used` counts prefill's experts with a token.
    """

    def follow(self, trace) -> None:
        self.trace, self.t, self.needed, self.before, self.used = trace, trace.prompt - 1, [], 0, 0
        self.top, self.prefill_busy = trace.top(self.config.num_experts_per_tok), None

    def begin_step(self, lookahead) -> None:
        if not self.decoding:
            return super().begin_step(lookahead)
        if self.prefill_busy is None:       # what the lane had done when decode began
            self.lane.poll()
            self.prefill_busy, self.before = self.lane.busy, 0
        self.t += 1
        self.lane.read(lookahead[-1])       # its cost is real, its content is the trace's
        self.scheduler.begin_step(self.trace.lookahead[self.t, 0].tolist())

    def _read(self, layer, numbers):
        real = super()._read(layer, numbers)
        if not self.decoding:
            self.used += sum(n > 0 for n in real.counts)
            return real
        ids, following = self.top[self.t, layer].tolist(), layer + 1 < self.config.num_hidden_layers
        return Routing([int(e in ids) for e in range(self.config.num_local_experts)], ids, real.weights,
                       self.trace.logits[self.t, layer].tolist(),
                       self.trace.lookahead[self.t, layer + 1].tolist() if following else None)

    def _crossed(self) -> int:
        return self.cache.counts.misses + self.cache.counts.prefetched_used

    def end_layer(self, layer) -> None:
        super().end_layer(layer)
        if self.decoding:
            crossed = self._crossed()
            self.needed.append(crossed - self.before)
            self.before = crossed


def build(model: RandomModel, args, store: ExpertStore | None, **memory) -> Engine:
    """An engine with synthetic routing in decode; a later one takes over the first one's host memory."""
    gc.collect()
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
    options = EngineOptions(device=args.device, context=args.context, predictor="none", compile=args.compile,
                            simulate_link=args.simulate_link, **memory)
    engine = Engine(model, options, store=store)
    engine.source = SyntheticExperts(model.config, engine.source.slots, engine.cache)
    return engine


def bandwidth(engine: Engine, copies: int = 10) -> float:
    """Bytes a second from pinned memory into the slots: the best of ten copies of up to 1 GiB. Empties the cache."""
    host = torch.from_numpy(np.frombuffer(engine.store.memory, np.uint8))
    slots = engine.slots_memory.view(-1)
    n = min(len(slots), engine.store.region)
    best = 0.0
    for _ in range(copies):
        wait(engine.device)
        began = time.perf_counter()
        slots[:n].copy_(host[:n], non_blocking=True)
        wait(engine.device)
        best = max(best, n / (time.perf_counter() - began))
    return best


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def request(engine: Engine, policy: str, tokens: int, new: int, trace, seed: int = 0):
    """-> (Generation, seconds of the lane in prefill and in decode): from an empty cache, greedy."""
    engine.policy = policy
    engine.source.follow(trace)
    ids = np.random.default_rng(seed).integers(3, engine.config.vocab_size, tokens).tolist()
    result = engine.generate(ids, max_new_tokens=new, temperature=0)
    prefill = engine.source.prefill_busy
    busy = engine.cache.lane.busy
    return result, busy if prefill is None else prefill, 0.0 if prefill is None else busy - prefill


def measure(engine: Engine, policy: str, args, traces, round_: int, cold: bool = True) -> dict:
    """One policy once: TTFT at each prompt length, then `--new-tokens` after the last one timed."""
    row: dict = {"policy": policy, "round": round_, "cache_experts": engine.plan.slots, "ttft_ms": {},
                 "prefill_experts": {}}
    trace = traces[round_ % len(traces)]
    new = min(args.new_tokens, 8) if policy == "layer-prefetch" else args.new_tokens
    for tokens in args.prompts:
        if cold:
            engine.cache.empty()
        last = tokens == args.decode_after
        result, prefill, decode = request(engine, policy, tokens, new if last else 1, trace, round_)
        row["ttft_ms"][str(tokens)] = 1e3 * result.stats.ttft_s
        row["prefill_experts"][str(tokens)] = engine.source.used if cold else 0
        if last:
            stats, steps = result.stats, len(result.token_ids) - 1
            row |= {"tpot_ms": 1e3 * stats.tpot_s, "new_tokens": steps + 1, "hits": stats.hits,
                    "prefetched_used": stats.prefetched_used, "misses": stats.misses,
                    "needed_per_token": sum(engine.source.needed) / steps,
                    "moved_per_token": engine.cache.counts.bytes_moved / engine.plan.expert / steps,
                    "prefill_link_busy": min(1.0, prefill / stats.ttft_s),
                    "decode_link_busy": min(1.0, decode / (stats.tpot_s * steps)), "tokens": result.token_ids,
                    "needed": engine.source.needed,
                    "end_to_end_ms": 1e3 * (stats.ttft_s + stats.tpot_s * steps)}
    if engine.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(engine.device)
        row |= {"peak_bytes": engine.peak_bytes(), "device_used_bytes": total - free}
    return row | {"planned_bytes": engine.plan.total}


def kernels(engine: Engine) -> dict:
    """Microseconds of the pieces of a decode step, of their kernels alone and run one after the other, and the memory
    bandwidth that this makes."""
    def timed(pieces, rounds: int = 5) -> float:
        for piece in pieces:
            piece()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(rounds):
            for piece in pieces:
                piece()
        end.record()
        end.synchronize()
        return 1e3 * begin.elapsed_time(end) / rounds / len(pieces)

    def busy(pieces) -> float:
        """What their kernels alone take, without the launching of graphs and what lies between."""
        wait(engine.device)
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            for piece in pieces:
                piece()
            wait(engine.device)
        return sum(event.time_range.elapsed_us() for event in seen.events()
                   if event.device_type == DeviceType.CUDA) / len(pieces)

    c, step = engine.config, engine.step
    out = {"layer_kernels_us": busy(step.layers), "expert_kernels_us": busy([ranks[0] for ranks in step.experts[:64]]),
           "layer_us": timed(step.layers), "end_us": timed([step.end]),
           "expert_us": timed([ranks[0] for ranks in step.experts[:64]])}
    out["expert_TB_s"] = engine.plan.expert / out["expert_us"] / 1e6
    matrices = ((2 * c.intermediate_size, c.hidden_size), (c.hidden_size, c.intermediate_size))
    total, spread = 0.0, max(2, 2**28 // engine.plan.expert)        # more than the caches hold
    for rows, columns in matrices:          # torch's own product on the same shapes (group 128, bf16 scale and zero)
        packs = [torch.ops.aten._convert_weight_to_int4pack(
            torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, device=engine.device), 8) for _ in range(spread)]
        scales = torch.rand(columns // 128, rows, 2, dtype=torch.bfloat16, device=engine.device)
        x = torch.randn(1, columns, dtype=torch.bfloat16, device=engine.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for pack in packs:
                torch.ops.aten._weight_int4pack_mm(x, pack, 128, scales)
        total += timed([graph.replay]) / spread
    return out | {"int4pack_mm_expert_us": total, "int4pack_mm_TB_s": engine.plan.expert / total / 1e6}


def floors(rows: list[dict], layers: int, expert_s: float, resident: dict | None) -> None:
    """Fill in what each row could have been: the link's time for what had to cross it, or the compute, layer by layer
    (nothing, if it was not measured)."""
    layer_s = resident["tpot_ms"] / 1e3 / layers if resident else 0.0
    for row in rows:
        row["ttft_over_floor"] = {}
        for tokens, used in row["prefill_experts"].items():
            compute = resident["ttft_ms"][tokens] if resident else 0.0
            row["ttft_over_floor"][tokens] = row["ttft_ms"][tokens] / (max(compute, 1e3 * used * expert_s) or 1)
        steps = len(row["needed"]) / layers
        row["tpot_floor_ms"] = 1e3 * sum(max(layer_s, n * expert_s) for n in row.pop("needed")) / steps
        row["tpot_over_floor"] = row["tpot_ms"] / (row["tpot_floor_ms"] or row["tpot_ms"])


@cache
def made_up(config: MixtralConfig, persistence: float, recall: float, rounds: int, new: int, predict: bool):
    """-> a trace for each round, and a predictor trained on others of the same kind."""
    k, traces = config.num_experts_per_tok, synthetic_traces(config, persistence, recall, rounds + predict * LEARNED, 2, new)
    traces, others = traces[:rounds], traces[rounds:]
    return traces, Predictor(train(others, k), measure_affinity(others, k), "random") if predict else None


def gpu(args) -> dict:
    """`bench gpu`: -> all rows as plain data. Each is also appended to --append as it is measured, as a line of JSON."""
    if args.shape not in SHAPES:
        raise UserError(f"--shape {args.shape}: choose one of {', '.join(SHAPES)}")
    device = args.device = check_device(args.device)
    if device.type == "cpu" and args.shape != "tiny":
        raise UserError(f"--shape {args.shape}: needs a GPU; --shape tiny runs anywhere")
    check_policies(args.policies)
    for value in (*args.persistence, *args.lookahead_recall):
        check_range("--persistence and --lookahead-recall", value, 0, 1)
    for tokens in args.prompts:
        check_range("--prompts", tokens, 1, 1e6)
    check_range("--rounds", args.rounds, 1, 1000)
    check_range("--new-tokens", args.new_tokens, 2, 1e6)
    config = SHAPES[args.shape]
    args.decode_after = args.prompts[len(args.prompts) // 2]
    args.context = max(max(args.prompts), args.decode_after + args.new_tokens) + 8
    model = RandomModel(config, device)
    layers, experts = config.num_hidden_layers, config.num_local_experts
    if device.type == "cpu":                # there is no link to measure, and memory is no question
        args.simulate_link = args.simulate_link or "100MB/s"
    result: dict = {"shape": args.shape, "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
                    "torch": torch.__version__, "model_bytes": model.nbytes, "expert_bytes": model.layout.nbytes, "rows": []}

    def keep(row: dict) -> None:
        result["rows"].append(row)
        if args.append:
            with open(args.append, "a") as file:
                file.write(json.dumps({key: v for key, v in row.items() if key not in ("tokens", "needed")}) + "\n")
        print("  ".join(f"{key} {round(v, 3) if isinstance(v, float) else v}" for key, v in row.items()
                        if isinstance(v, (str, int, float))), file=sys.stderr, flush=True)

    if args.append:
        open(args.append, "a").close()      # before minutes are spent on what could not be kept
    engine = store = None
    sizes = sorted(args.gpu_memory or ["15%"], key=lambda size: parse_amount(size, model.nbytes, "--gpu-memory"))
    for size in sizes:
        wanted = {"gpu_memory": size} if args.gpu_memory or args.shape != "tiny" else {"cache_experts": layers * experts // 4}
        engine = None                       # the device holds one at a time, the host's memory goes from one to the next
        engine = build(model, args, store, **wanted)
        if store is None:
            store = engine.store
            rate = parse_rate(args.simulate_link, "--simulate-link") if args.simulate_link else bandwidth(engine)
            engine.cache.abandon()
            engine.cache.empty()
            keep({"load_s": engine.load_s, "link_GB_s": rate / 1e9, "pinned": store.pinned,
                  "expert_transfer_ms": 1e3 * model.layout.nbytes / rate, "gpu_memory": size, "slots": engine.plan.slots})
        warm = synthetic_traces(config, 0.5, 0.5, 1, 2, 8)[0]       # each length once: libraries choose, memory is taken
        for tokens in args.prompts:
            request(engine, args.policies[0], tokens, 4, warm)
        for persistence in args.persistence:
            for recall in args.lookahead_recall:
                traces, engine.predictor = made_up(config, persistence, recall, args.rounds, args.new_tokens, args.predictor)
                for round_ in range(args.rounds):
                    said_by: dict = {}
                    for policy in args.policies:
                        row = measure(engine, policy, args, traces, round_)
                        row |= {"gpu_memory": size, "persistence": persistence, "lookahead_recall": recall}
                        keep(row)
                        for other, tokens in said_by.items():
                            n = min(len(tokens), len(row["tokens"]))
                            if tokens[:n] != row["tokens"][:n]:
                                raise UserError(f"{policy} and {other} gave different tokens: one of them is broken")
                        said_by[policy] = row["tokens"]
    resident = None
    if args.resident:
        engine = None
        engine = build(model, args, store, cache_experts=layers * experts)
        measure(engine, "cache", args, traces, 0)                   # fills the slots
        fill(engine)
        runs = [measure(engine, "duo", args, traces, i, cold=False) for i in range(3)]
        resident = runs[0] | {"policy": "resident", "tpot_ms": statistics.median(run["tpot_ms"] for run in runs),
                              "ttft_ms": {n: statistics.median(run["ttft_ms"][n] for run in runs)
                                          for n in runs[0]["ttft_ms"]}}
        keep(resident)
        if device.type == "cuda":
            keep({"policy": "kernels"} | kernels(engine))
    floors([row for row in result["rows"] if "needed" in row], layers,
           result["rows"][0]["expert_transfer_ms"] / 1e3, resident)
    for row in result["rows"]:
        row.pop("tokens", None)
    if not args.json:
        print_table(result, args)
    return result


def print_table(result: dict, args) -> None:
    """Medians of the rounds, TPOT with its least and greatest; `/floor` is that of the longest prompt's TTFT, then that
    of TPOT."""
    first, longest = result["rows"][0], str(args.prompts[-1])
    print(f"{result['device']}, torch {result['torch']}: {args.shape}, {result['model_bytes'] / 1e9:.3g} GB in 4 bits; link "
          f"{first['link_GB_s']:.1f} GB/s, {first['expert_transfer_ms']:.3g} ms an expert; {args.new_tokens} tokens after "
          f"{args.decode_after}; medians of {args.rounds} rounds, times in ms")
    print(f"{'policy':15}{'slots':>6}{'again':>6}{'ahead':>6}" + "".join(f"{f'TTFT {n}':>10}" for n in args.prompts) +
          f"{'/floor':>8}{'TPOT':>9}{'least .. most':>18}{'/floor':>8}{'x first':>8}{'link':>6}{'peak GB':>9}")
    groups: dict = {}
    for row in result["rows"]:
        if "tpot_ms" in row:
            key = row["cache_experts"], row.get("persistence", ""), row.get("lookahead_recall", ""), row["policy"]
            groups.setdefault(key, []).append(row)
    best: dict = {}                         # each setting's first policy
    for (slots, again, ahead, policy), rows in groups.items():
        def median(value, rows=rows):
            return statistics.median(map(value, rows))
        tpots = sorted(row["tpot_ms"] for row in rows)
        tpot = statistics.median(tpots)
        reference = best.setdefault((slots, again, ahead), tpot)
        peak = max(row.get("peak_bytes", 0) for row in rows)
        over = lambda value: f"{median(value):8.3f}" if args.resident else f"{'-':>8}"
        print(f"{policy:15}{slots:6}{again:>6}{ahead:>6}" +
              "".join(f"{median(lambda r: r['ttft_ms'][str(n)]):10.1f}" for n in args.prompts) +
              over(lambda r: r["ttft_over_floor"][longest]) + f"{tpot:9.2f}{f'{tpots[0]:.2f} .. {tpots[-1]:.2f}':>18}" +
              over(lambda r: r["tpot_over_floor"]) +
              f"{tpot / reference:8.2f}{100 * median(lambda r: r['decode_link_busy']):5.0f}%" +
              (f"{peak / 1e9:9.2f}" if peak else f"{'':9}"))


def fill(engine: Engine) -> None:
    """Bring every expert into its slot."""
    cache = engine.cache
    for layer in range(engine.config.num_hidden_layers):
        for e in range(engine.config.num_local_experts):
            cache.demand((layer, e))
    cache.lane.finish()
