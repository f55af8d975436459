"""bench schedule: recorded routing through the real schedulers, cache and lane, on a virtual clock."""

import statistics
import sys
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from ..cache import GPUExpertCache
from ..checkpoint import Progress
from ..config import MixtralConfig
from ..errors import UserError, count, format_bytes, parse_amount, parse_rate
from ..history import History, Routing
from ..link import SimulatedLane, VirtualClock
from ..memory import plan_memory
from ..options import check_context
from ..packed import ModelShapes, PackedModel
from ..policies import POLICIES, schedulers
from ..predictor import Forecast, Predictor
from ..quant import ExpertLayout
from ..trace import Trace, read_traces
from .flags import check_policies, check_range, table


@dataclass
class Costs:
    """Milliseconds. A prefill's attention and experts grow with their tokens unless they are given."""

    attention_ms: float = 0.3
    expert_ms: float = 0.15
    expert_transfer_ms: float = 3.7         # Mixtral-8x7B's on PCIe 4
    chunks: int = 12
    predict_ms: float = 0.05
    prefill_attention_ms: float | None = None
    prefill_expert_ms: float | None = None

    def prefill_attention(self, tokens: int) -> float:
        given = self.prefill_attention_ms
        return self.attention_ms * (1 + tokens / 128) if given is None else given

    def prefill_expert(self, tokens: int) -> float:
        given = self.prefill_expert_ms
        return self.expert_ms * (1 + tokens / 128) if given is None else given


class Oracle(Forecast):
    """Told the next layer's true experts; of later visits it knows no more than the others."""

    truth: np.ndarray                       # [layers][k] of the current token

    def estimate(self, state: int, lookahead: list[float] | None) -> np.ndarray:
        estimate = super().estimate(state, lookahead)
        if lookahead is not None:
            estimate[state] = [e in self.truth[state] for e in range(self.history.experts)]
        return estimate


class Counted:
    """A trained predictor, each of whose runs takes the host some time."""

    def __init__(self, predictor: Predictor):
        self.predictor, self.runs = predictor, 0

    def __call__(self, *state):
        self.runs += 1
        return self.predictor(*state)


class Replay:
    """One trace through one policy with one cache, on a clock of its own."""

    def __init__(self, trace: Trace, top_k: int, policy: str, slots: int, costs: Costs, predictor: Predictor | None):
        self.trace, self.costs, self.k = trace, costs, top_k
        self.top = trace.top(top_k)
        _, self.layers, self.experts = trace.logits.shape
        self.clock = VirtualClock()
        lane = SimulatedLane(self.clock, costs.chunks / (costs.expert_transfer_ms / 1e3), 1)
        self.cache = GPUExpertCache(slots, costs.chunks, lane)      # an expert is `chunks` bytes long
        self.predictor, history = predictor and Counted(predictor), History(self.layers, self.experts)
        self.forecast = (Oracle if policy == "oracle" else Forecast)(history, self.predictor, top_k)
        self.prefill, self.decode = schedulers("duo" if policy == "oracle" else policy, self.cache, history,
                                               self.forecast, trace.prompt)
        self.floor = 0.0

    def run(self) -> "Replay":
        prompt, tokens = self.trace.prompt, len(self.trace.logits)
        self.begin(self.prefill)
        self.step(slice(0, prompt), None)
        self.ttft = self.clock.now()
        self.begin(self.decode)
        for t in range(prompt, tokens):
            self.step(slice(t, t + 1), self.trace.lookahead[t, 0].tolist())
        self.cache.plan([])
        self.decode_s, self.steps = self.clock.now() - self.ttft, tokens - prompt
        return self

    def begin(self, scheduler) -> None:
        """A phase."""
        self.scheduler, self.cache.lane.busy = scheduler, 0.0
        self.cache.serve(scheduler)

    def step(self, rows: slice, lookahead: list[float] | None) -> None:
        """A forward pass over these rows of the trace; in decode with its `lookahead` of layer 0."""
        costs, last, decoding, counts = self.costs, rows.stop - 1, lookahead is not None, self.cache.counts
        self.forecast.truth = self.top[last]
        runs = self.predictor and self.predictor.runs
        self.scheduler.begin_step(lookahead)
        for layer in range(self.layers):
            before = counts.misses + counts.prefetched_used
            self.scheduler.begin_layer(layer)
            self._pass(costs.attention_ms if decoding else costs.prefill_attention(rows.stop - rows.start))
            ids = self.top[rows, layer]
            ahead = self.trace.lookahead[last, layer + 1].tolist() if layer + 1 < self.layers else None
            routing = Routing(np.bincount(ids.ravel(), minlength=self.experts).tolist(), ids[-1].tolist(), [],
                              self.trace.logits[last, layer].tolist(), ahead)
            for e, _ in self.scheduler.experts(layer, routing):
                self._pass(costs.expert_ms if decoding else costs.prefill_expert(routing.counts[e]))
            if self.predictor and self.predictor.runs > runs:       # since the last layer visit
                self._pass(costs.predict_ms)
                runs = self.predictor.runs
            self.scheduler.end_layer(layer)
            if decoding:
                needed = counts.misses + counts.prefetched_used - before
                self.floor += max(costs.attention_ms + self.k * costs.expert_ms, needed * costs.expert_transfer_ms)

    def _pass(self, ms: float) -> None:
        self.clock.advance(ms / 1e3)


def belady(traces: list[Trace], top_k: int, slots: int) -> float:
    """Transfers a decode step if every eviction knew the future: the least a cache of this size can do."""
    moved = steps = 0
    for trace in traces:
        visits = [[(layer, e) for e in ids] for row in trace.top(top_k)[trace.prompt:].tolist()
                  for layer, ids in enumerate(row)]
        uses: dict = {}
        for i, visit in enumerate(visits):
            for key in visit:
                uses.setdefault(key, []).append(i)
        for queue in uses.values():
            queue.append(len(visits))
            queue.reverse()
        held = set()
        for visit in visits:
            for key in visit:
                if key not in held:
                    moved += 1
                    if len(held) >= slots:
                        idle = [k for k in held if k not in visit] or list(held)
                        held.remove(max(idle, key=lambda k: uses[k][-1]))
                    held.add(key)
            for key in visit:
                uses[key].pop()
        steps += len(trace.logits) - trace.prompt
    return moved / steps


def row(traces: list[Trace], top_k: int, policy: str, slots: int, costs: Costs, predictor: Predictor | None) -> dict:
    """One line of the table: a policy at a cache size, over all traces."""
    runs = [Replay(trace, top_k, policy, slots, costs, predictor).run() for trace in traces]
    steps, total = sum(r.steps for r in runs), lambda name: sum(getattr(r.cache.counts, name) for r in runs)
    decode_s = sum(r.decode_s for r in runs)
    return {"policy": policy, "cache_experts": slots, "ttft_ms": 1e3 * statistics.mean(r.ttft for r in runs),
            "tpot_ms": 1e3 * decode_s / steps, "hits": total("hits"), "prefetched_used": total("prefetched_used"),
            "misses": total("misses"),
            "needed_transfers_per_token": (total("misses") + total("prefetched_used")) / steps,
            "moved_transfers_per_token": total("bytes_moved") / costs.chunks / steps,
            "link_busy": min(1.0, sum(r.cache.lane.busy for r in runs) / decode_s) if decode_s else 0.0,
            "floor_ms": sum(r.floor for r in runs) / steps}


def synthetic_traces(config: MixtralConfig, persistence: float, recall: float, sequences: int = 4, prompt: int = 256,
                     new: int = 48) -> list[Trace]:
    """Routing where there is none to replay: an expert is chosen again by the next token with chance `persistence`, and
    the lookahead finds a chosen expert with chance `recall`; otherwise uniform, the least favourable to caching."""
    layers, experts, k = config.num_hidden_layers, config.num_local_experts, config.num_experts_per_tok
    rng = np.random.default_rng(0)
    keep = max(0.0, (persistence - k / experts) / (1 - k / experts)) if k < experts else 1.0

    def choose(kept):                       # fill up to k distinct experts
        others = [e for e in rng.permutation(experts).tolist() if e not in kept]
        return kept + others[:k - len(kept)]

    def logits(chosen):
        z = rng.normal(0, 0.3, experts).astype(np.float32)
        z[chosen] += 3.0
        return z

    traces = []
    for _ in range(sequences):
        z, ahead = (np.zeros((prompt + new, layers, experts), np.float32) for _ in range(2))
        last: list = [[] for _ in range(layers)]
        for t in range(prompt + new):
            for layer in range(layers):
                last[layer] = choose([e for e in last[layer] if rng.random() < keep])
                right = [e for e in last[layer] if rng.random() < recall]
                wrong = [e for e in rng.permutation(experts).tolist() if e not in last[layer]]
                z[t, layer], ahead[t, layer] = logits(last[layer]), logits(right + wrong[:k - len(right)])
        traces.append(Trace(z, ahead, prompt, "synthetic"))
    return traces


def schedule(args) -> dict:
    """`bench schedule`: -> the table as plain data."""
    packed = predictor = None
    if args.model_config:
        config = MixtralConfig.read(args.model_config)
    else:
        packed = PackedModel(args.model)
        config = packed.config
    k, total = config.num_experts_per_tok, config.num_hidden_layers * config.num_local_experts
    layout = packed.layout if packed else ExpertLayout.of(config)
    policies = args.policies or [*POLICIES, "oracle"]
    check_policies(policies, ("oracle",))
    context = min(2048, config.max_position_embeddings) if args.context is None else args.context
    check_context(context, config.max_position_embeddings)
    if args.traces:
        traces = read_traces(args.traces, packed.fingerprint if packed else None,
                             (config.num_hidden_layers, config.num_local_experts))
        traces = [trace for trace in traces if len(trace.logits) > trace.prompt]
        if not traces:
            raise UserError(f"{args.traces}: no trace has a decode step; record some with more --max-new-tokens")
    elif args.model_config:
        check_range("--persistence", args.persistence, 0, 1)
        check_range("--lookahead-recall", args.lookahead_recall, 0, 1)
        traces = synthetic_traces(config, args.persistence, args.lookahead_recall)
        print(f"note: synthetic routing (persistence {args.persistence}, lookahead recall {args.lookahead_recall}, "
              "otherwise uniform): a plan, not a measurement", file=sys.stderr)
    else:
        raise UserError("bench schedule needs a directory of traces or --model-config FILE")
    if args.predictor not in (None, "none") or (packed and args.predictor is None):
        path = Path(args.predictor or packed.directory / "predictor.safetensors")
        if args.predictor or path.exists():
            predictor = Predictor.read(path, traces[0].model, config.num_hidden_layers, config.num_local_experts)
        else:
            print(f"note: no {path}; duo predicts by lookahead alone", file=sys.stderr)
    transfer = args.expert_transfer_ms
    for flag in ("attention_ms", "expert_ms", "expert_transfer_ms", "predict_ms", "prefill_attention_ms",
                 "prefill_expert_ms"):
        if getattr(args, flag) is not None:
            check_range("--" + flag.replace("_", "-"), getattr(args, flag), 0, 1e6, flag == "expert_transfer_ms")
    if transfer is None:                    # replayed routing stands for Mixtral-8x7B's unless a link is named
        rate = parse_rate(args.link or "25GB/s", "--link")
        transfer = Costs.expert_transfer_ms if args.traces and not args.link else 1e3 * layout.nbytes / rate
    check_range("--chunks", args.chunks, 1, 10_000)
    costs = Costs(args.attention_ms, args.expert_ms, transfer, args.chunks, args.predict_ms, args.prefill_attention_ms,
                  args.prefill_expert_ms)
    sizes = args.cache_experts or sorted({max(2, round(total * share)) for share in (0.10, 0.25, 0.40, 0.50, 0.60)})
    for n in sizes:
        if n < 2:
            raise UserError(f"--cache-experts {n}: two is the least that works")
        if n > total:
            print(f"note: --cache-experts {n} is more than the model's {total} experts; using {total}", file=sys.stderr)
    sizes = list(dict.fromkeys(min(n, total) for n in sizes))
    if args.gpu_memory:
        sizes = slots_in(args.gpu_memory, config, context, sizes if args.cache_experts else [None])
    by_size = [flag for flag, given in (("--link", args.link), ("--gpu-memory", args.gpu_memory)) if given]
    if args.traces and by_size and layout.nbytes < 10e6:
        print(f"note: with {' and '.join(by_size)} the figures are for experts of this model's size "
              f"({format_bytes(layout.nbytes)}), not of Mixtral's", file=sys.stderr)
    rows = []
    with closing(Progress(len(sizes) * len(policies), "rows", write=count)) as bar:
        for n in sizes:
            for policy in policies:
                rows.append(row(traces, k, policy, n, costs, predictor))
                bar.add(1)
    result = {"costs": asdict(costs), "belady_transfers_per_token": {str(n): belady(traces, k, n) for n in sizes},
              "rows": rows}
    if not args.json:
        print_schedule(result)
    return result


def slots_in(gpu_memory: str, config: MixtralConfig, context: int, wanted: list[int | None]) -> list[int]:
    """How many experts fit beside weights, KV cache and workspace (None), or those wanted, which must: the engine's own
    plan, without its files."""
    model = ModelShapes(config)
    budget = parse_amount(gpu_memory, model.nbytes, "--gpu-memory")
    plans = [plan_memory(model, torch.bfloat16, context, True, True, budget, n) for n in wanted]
    plan = max(plans, key=lambda plan: plan.slots)
    size = {name: format_bytes(n) for name, n in (
        ("model", model.nbytes), ("experts", model.nbytes - model.resident_bytes()), ("budget", budget),
        ("resident", plan.resident), ("kv", plan.kv), ("workspace", plan.workspace), ("expert", plan.expert))}
    print("note: 4-bit model {model} ({experts} of experts in host memory); of {budget} on the GPU, {resident} resident "
          "weights, {kv} KV cache for {context} tokens, {workspace} workspace, {slots} slots of {expert}; the CUDA context "
          "is on top".format(context=context, slots=plan.slots, **size), file=sys.stderr)
    return [plan.slots for plan in plans]


def print_schedule(result: dict) -> None:
    c = result["costs"]
    print(f"attention {c['attention_ms']:g} ms, expert {c['expert_ms']:g} ms, transfer {c['expert_transfer_ms']:.3g} "
          f"ms, {c['chunks']} chunks an expert, {c['predict_ms']:g} ms where the trained predictor runs; times in ms, "
          "transfers a token")
    rows = []
    for r in result["rows"]:
        ideal, tpot, floor = result["belady_transfers_per_token"][str(r["cache_experts"])], r["tpot_ms"], r["floor_ms"]
        rows.append(r | {"speed": 1e3 / tpot if tpot else float("inf"), "over": tpot / floor if floor else 1,
                         "ideal": r["needed_transfers_per_token"] / ideal if ideal else 1})
    print(table([("policy", 15, "{policy}"), ("slots", 6, "{cache_experts}"), ("TTFT", 9, "{ttft_ms:.1f}"),
                 ("TPOT", 9, "{tpot_ms:.2f}"), ("tok/s", 7, "{speed:.1f}"), ("floor", 9, "{floor_ms:.2f}"),
                 ("/floor", 8, "{over:.3f}"), ("needed", 8, "{needed_transfers_per_token:.2f}"),
                 ("moved", 8, "{moved_transfers_per_token:.2f}"), ("/Belady", 9, "{ideal:.2f}"),
                 ("link", 6, "{link_busy:.0%}")], rows))
