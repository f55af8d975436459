"""bench schedule: recorded routing through the real schedulers, cache and lane, on a virtual clock."""

import math
import statistics
from collections import defaultdict
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path

import numpy as np
import torch

from ..cache import BLOCKS, HOST, WHOLE, GPUExpertCache
from ..config import MixtralConfig
from ..errors import Progress, UserError, count, format_bytes, note, parse_amount, parse_rate
from ..history import History, Routing
from ..memory import plan_memory
from ..options import check_context
from ..packed import ModelShapes, PackedModel
from ..policies import POLICIES, schedulers
from ..predictor import Forecast, Predictor, open_predictor
from ..simulated import SimulatedHost, SimulatedLane, VirtualClock
from ..store import most_used
from ..trace import Trace, decoded_traces
from .flags import SHAPES, check_policies, table


LEGEND = """
TTFT, TPOT     ms to the first token, and for each after it
floor, /floor  TPOT if every layer took the longer of computing and its needed transfers; TPOT over that
needed, moved  experts a token used that had to cross the link; all that crossed it, wrong guesses too
/Belady        needed, over what the eviction that knows the future would need
link           how much of decode it was busy
on-host, host  accesses that the host computed; how much of decode it was busy"""


CHUNK = 1000                                # bytes of a replay's; and the share of an expert's bytes that its
FIRST_MATRIX = 2 / 3 * 16 / 17              # first matrix takes, without scales and zeros, in groups of 128
TOLD = "oracle", "host-only"                # ours, but for what it is told


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
    host_expert_ms: float | None = None     # None: the host computes nothing
    host_block_ms: float | None = None      # of one that is divided; None: by its share of the bytes

    def prefill(self, part: str, tokens: int) -> float:
        """The part, `attention` or `expert`, when so many tokens of a prompt go through it at once."""
        given = getattr(self, f"prefill_{part}_ms")
        return getattr(self, f"{part}_ms") * (1 + tokens / 128) if given is None else given


class Oracle(Forecast):
    """Knows the next layer's true experts; about later visits it knows no more than the others."""

    truth: np.ndarray                       # [layers][k] of the current token

    def estimate(self, state: int, lookahead: list[float] | None) -> np.ndarray:
        estimate = super().estimate(state, lookahead)
        if lookahead is not None:
            estimate[state] = [e in self.truth[state] for e in range(self.history.experts)]
        return estimate


class Replay:
    """One trace through one policy with one cache, on a clock of its own."""

    def __init__(self, trace: Trace, top_k: int, policy: str, slots: int, costs: Costs,
                 predictor: Predictor | None, start: str = "empty"):
        self.trace, self.costs, self.k = trace, costs, top_k
        self.top = trace.top(top_k)
        _, self.layers, self.experts = trace.logits.shape
        self.clock = VirtualClock()
        nbytes = CHUNK * costs.chunks       # of an expert
        lane = SimulatedLane(self.clock, nbytes / (costs.expert_transfer_ms / 1e3), CHUNK)
        self.cache = GPUExpertCache(slots, nbytes, lane)
        self.runs = 0                       # of the predictor, each of which takes the host some time

        def counted(*state):
            self.runs += 1
            return predictor(*state)

        history, kind = History(self.layers, self.experts), Oracle if policy == "oracle" else Forecast
        self.forecast = kind(history, predictor and counted, top_k)
        self.prefill, self.decode = schedulers("duo" if policy in TOLD else policy, self.cache, history,
                                               self.forecast, trace.prompt)
        each, part = costs.host_expert_ms, costs.host_block_ms
        if part is not None:
            part /= 1e3
        self.host = None if each is None else \
            SimulatedHost(self.clock, each / 1e3, int(nbytes * FIRST_MATRIX / BLOCKS), part=part)
        if policy == "host-only":
            self.decode.for_host = lambda keys: {key: WHOLE for key in keys if not self.cache.resident(key)}
        self.floor = 0.0
        if start == "warm":                 # as an engine does when it is loaded, before the clock counts
            self.cache.fill(most_used(self.prefill.keys, predictor and predictor.popularity()))
        self.began = self.clock.now()

    def run(self) -> "Replay":
        prompt, tokens = self.trace.prompt, len(self.trace.logits)
        self.begin(self.prefill)
        self.step(slice(0, prompt), False)
        self.ttft = self.clock.now() - self.began
        self.begin(self.decode, self.host)
        for t in range(prompt, tokens):
            self.step(slice(t, t + 1), True)
        self.cache.plan([])
        self.decode_s, self.steps = self.clock.now() - self.began - self.ttft, tokens - prompt
        return self

    def begin(self, scheduler, host=None) -> None:
        """Begin a phase."""
        self.scheduler, self.cache.lane.busy = scheduler, 0.0
        self.cache.serve(scheduler, host)

    def step(self, rows: slice, decoding: bool) -> None:
        """A forward pass over these rows of the trace."""
        costs, counts = self.costs, self.cache.counts
        tokens, last = rows.stop - rows.start, rows.stop - 1
        self.forecast.truth = self.top[last]
        runs = self.runs
        lookahead = [*self.trace.lookahead[last].tolist(), None]    # (after the last layer there is none)
        self.scheduler.begin_step(lookahead[0] if decoding else None)
        on_host, needed = counts.host_experts, []                   # experts that crossed the link, by layer
        for layer in range(self.layers):
            before = counts.misses + counts.prefetched_used
            self.scheduler.begin_layer(layer)
            self._pass(costs.attention_ms if decoding else costs.prefill("attention", tokens))
            ids = self.top[rows, layer]
            routing = Routing(np.bincount(ids.ravel(), minlength=self.experts).tolist(), ids[-1].tolist(), [],
                              self.trace.logits[last, layer].tolist(), lookahead[layer + 1])
            for e, place in self.scheduler.experts(layer, routing):
                if place != HOST:
                    self._pass(costs.expert_ms if decoding else costs.prefill("expert", routing.counts[e]))
            if self.runs > runs:            # since the last layer visit
                self._pass(costs.predict_ms)
                runs = self.runs
            self.scheduler.end_layer(layer)
            needed.append(counts.misses + counts.prefetched_used - before)
        if decoding and self.host is not None:
            self.floor += step_floor(costs, self.layers, self.k, counts.host_experts - on_host, sum(needed))
        elif decoding:
            compute = costs.attention_ms + self.k * costs.expert_ms
            for moved in needed:
                self.floor += max(compute, moved * costs.expert_transfer_ms)

    def _pass(self, ms: float) -> None:
        self.clock.advance(ms / 1e3)


def step_floor(costs: Costs, layers: int, top_k: int, on_host: int, moved: int) -> float:
    """Milliseconds that a decode step takes at least, however link and host share what is missing."""
    missing = on_host + moved
    compute = layers * costs.attention_ms + (layers * top_k - on_host) * costs.expert_ms
    return max(compute, min(max((missing - n) * costs.expert_transfer_ms, n * costs.host_expert_ms)
                            for n in range(missing + 1)))


def belady(traces: list[Trace], top_k: int, slots: int) -> float:
    """Transfers a decode step if every eviction knew the future: the least for a cache of this size."""
    moved = steps = 0
    for trace in traces:
        visits = [[(layer, e) for e in ids] for row in trace.top(top_k)[trace.prompt:].tolist()
                  for layer, ids in enumerate(row)]
        uses = defaultdict(lambda: [len(visits)])                   # an expert's visits, the next one last
        for i, visit in reversed([*enumerate(visits)]):
            for key in visit:
                uses[key].append(i)
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


def row(traces: list[Trace], top_k: int, policy: str, slots: int, costs: Costs,
        predictor: Predictor | None, start: str = "empty") -> dict:
    """One line of the table: a policy at a cache size, over all traces."""
    runs = [Replay(trace, top_k, policy, slots, costs, predictor, start).run() for trace in traces]
    steps, decode_s = sum(run.steps for run in runs), sum(run.decode_s for run in runs)
    total = lambda name: sum(getattr(run.cache.counts, name) for run in runs)
    hits, used, misses = map(total, ("hits", "prefetched_used", "misses"))
    return {"policy": policy, "cache_experts": slots,
            "ttft_ms": 1e3 * statistics.mean(run.ttft for run in runs), "tpot_ms": 1e3 * decode_s / steps,
            "hits": hits, "prefetched_used": used, "misses": misses,
            "needed_transfers_per_token": (misses + used) / steps,
            "moved_transfers_per_token": total("bytes_moved") / runs[0].cache.expert_bytes / steps,
            "host_experts": total("host_experts"),
            "host_busy": sum(run.host.busy for run in runs if run.host) / decode_s if decode_s else 0.0,
            "link_busy": min(1.0, sum(run.cache.lane.busy for run in runs) / decode_s) if decode_s else 0.0,
            "floor_ms": sum(run.floor for run in runs) / steps}


def synthetic_traces(config: MixtralConfig, persistence: float, recall: float, sequences: int = 4,
                     prompt: int = 256, new: int = 48) -> list[Trace]:
    """Made-up routing: the next token chooses an expert again with chance `persistence`, and the lookahead
    finds a chosen expert with chance `recall`; otherwise uniform, which is least favourable to caching."""
    layers, experts, k = config.num_hidden_layers, config.num_local_experts, config.num_experts_per_tok
    rng = np.random.default_rng(0)
    keep = max(0.0, (persistence - k / experts) / (1 - k / experts)) if k < experts else 1.0

    def others(chosen):                     # all but the chosen, in random order
        return [e for e in rng.permutation(experts).tolist() if e not in chosen]

    def logits(chosen):
        z = rng.normal(0, 0.3, experts).astype(np.float32)
        z[chosen] += 3.0
        return z

    traces = []
    for _ in range(sequences):
        z, ahead = np.zeros((2, prompt + new, layers, experts), np.float32)
        last: list = [[] for _ in range(layers)]
        for t in range(prompt + new):
            for layer in range(layers):
                kept = [e for e in last[layer] if rng.random() < keep]
                last[layer] = chosen = (kept + others(kept))[:k]
                right = [e for e in chosen if rng.random() < recall]
                wrong = others(chosen)[:k - len(right)]
                z[t, layer], ahead[t, layer] = logits(chosen), logits(right + wrong)
        traces.append(Trace(z, ahead, prompt, "synthetic"))
    return traces


def schedule(args) -> dict:
    """`bench schedule`: -> the table as plain data."""
    told = TOLD if args.host_expert_ms is not None else TOLD[:1]
    policies = args.policies or [*POLICIES, *told]
    check_policies(policies, told)
    if args.host_block_ms is not None and args.host_expert_ms is None:
        raise UserError("--host-block-ms: there is no host; add --host-expert-ms")
    alone = args.model_config               # without a model
    shape = SHAPES.get(alone)
    model = ModelShapes(shape or MixtralConfig.read(alone)) if alone else PackedModel(args.model)
    config, nbytes = model.config, model.layout.nbytes
    k, total = config.num_experts_per_tok, len(config.expert_keys)
    context = min(2048, config.max_position_embeddings) if args.context is None else args.context
    check_context(context, config.max_position_embeddings)
    traces = routing(args, model)
    named, file = args.predictor or ("none" if alone else None), Path(args.model, "predictor.safetensors")
    predictor = open_predictor(named, file, traces[0].model, config)
    if predictor is None and named is None:
        note(f"no {file}; duo predicts by lookahead alone")
    costs = Costs(**{field.name: getattr(args, field.name) for field in fields(Costs)})
    if args.expert_transfer_ms is None:
        rate = parse_rate(args.link or "25GB/s", "--link")
        own = args.link or not args.traces  # otherwise the traces stand for Mixtral-8x7B's
        costs.expert_transfer_ms = 1e3 * nbytes / rate if own else Costs.expert_transfer_ms
    shares = 0.10, 0.25, 0.40, 0.50, 0.60
    sizes = args.cache_experts or sorted({max(2, round(total * share)) for share in shares})
    if max(sizes) > total:
        note(f"--cache-experts {max(sizes)} is more than the model's {total} experts; using {total}")
    sizes = list(dict.fromkeys(min(n, total) for n in sizes))
    if args.gpu_memory:
        sizes = slots_in(args.gpu_memory, model, context, sizes if args.cache_experts else [None])
    by_size = [flag for flag, given in (("--link", args.link), ("--gpu-memory", args.gpu_memory)) if given]
    if args.traces and by_size and nbytes < 10e6:
        note(f"with {' and '.join(by_size)} the figures are for experts of this model's size "
             f"({format_bytes(nbytes)}), not of Mixtral's")
    rows, failed = [], None
    with closing(Progress(len(sizes) * len(policies), "rows", write=count)) as bar:
        for n, policy in product(sizes, policies):
            try:
                rows.append(row(traces, k, policy, n, costs, predictor, args.start))
            except Exception as error:      # (in somebody's own policy: the table shows the others first)
                if args.json:
                    raise
                failed = failed or error
            bar.add(1)
    least = {str(n): belady(traces, k, n) for n in sizes}
    result = {"costs": asdict(costs), "belady_transfers_per_token": least, "rows": rows}
    if not args.json and rows:
        print_schedule(result)
    if failed:
        raise failed
    return result


def routing(args, model: ModelShapes) -> list[Trace]:
    """The traces to replay: recorded ones, or with a config alone made-up ones."""
    if args.traces:
        return decoded_traces(args.traces, model)
    if not args.model_config:
        raise UserError("bench schedule needs a directory of traces or --model-config FILE")
    note(f"synthetic routing (persistence {args.persistence}, lookahead recall {args.lookahead_recall}, "
         "otherwise uniform): a plan, not a measurement")
    return synthetic_traces(model.config, args.persistence, args.lookahead_recall)


def slots_in(gpu_memory: str, model: ModelShapes, context: int, wanted: list[int | None]) -> list[int]:
    """How many experts fit beside weights, KV cache and workspace (None), or those wanted, which must fit:
    the engine's own plan, without its files."""
    budget = parse_amount(gpu_memory, model.nbytes, "--gpu-memory")
    plans = [plan_memory(model, torch.bfloat16, context, True, True, budget, n) for n in wanted]
    plan, b = max(plans, key=lambda plan: plan.slots), format_bytes
    experts = model.nbytes - model.resident_bytes()
    note(f"4-bit model {b(model.nbytes)} ({b(experts)} of experts in host memory); of {b(budget)} on the GPU,"
         f" {b(plan.resident)} resident weights, {b(plan.kv)} KV cache for {context} tokens,"
         f" {b(plan.workspace)} workspace, {plan.slots} slots of {b(plan.expert)};"
         " the CUDA context is on top")
    return [plan.slots for plan in plans]


def print_schedule(result: dict) -> None:
    print("attention {attention_ms:g} ms, expert {expert_ms:g} ms, transfer {expert_transfer_ms:.3g} ms, "
          "{chunks} chunks an expert, {predict_ms:g} ms where the trained predictor runs"
          .format(**result["costs"]))
    rows = []
    for r in result["rows"]:
        ideal = result["belady_transfers_per_token"][str(r["cache_experts"])]
        tpot, floor, needed = r["tpot_ms"], r["floor_ms"], r["needed_transfers_per_token"]
        all_uses = r["hits"] + r["prefetched_used"] + r["misses"] + r["host_experts"]
        rows.append(r | {"speed": 1e3 / tpot if tpot else math.inf, "over": tpot / floor if floor else 1,
                         "ideal": needed / ideal if ideal else 1,
                         "on_host": r["host_experts"] / max(1, all_uses)})
    print(table([("policy", 15, "{policy}"), ("slots", 6, "{cache_experts}"), ("TTFT", 9, "{ttft_ms:.1f}"),
                 ("TPOT", 9, "{tpot_ms:.2f}"), ("tok/s", 7, "{speed:.1f}"), ("floor", 9, "{floor_ms:.2f}"),
                 ("/floor", 8, "{over:.3f}"), ("needed", 8, "{needed_transfers_per_token:.2f}"),
                 ("moved", 8, "{moved_transfers_per_token:.2f}"), ("/Belady", 9, "{ideal:.2f}"),
                 ("link", 6, "{link_busy:.0%}"), ("on-host", 8, "{on_host:.0%}"),
                 ("host", 6, "{host_busy:.0%}")], rows))
    print(LEGEND)
