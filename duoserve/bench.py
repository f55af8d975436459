"""python -m duoserve.bench schedule | run | gpu | quality: what a schedule is worth, on the virtual clock and for real.

`schedule` replays recorded routing through the real schedulers, cache and lane, without a model: transfers and
arithmetic cost what you say they do, so it is deterministic to the last digit. It is also how to plan: given only a
config.json it says whether a model fits and about how fast it will be, before 90 GB are downloaded.
`run` runs the engine itself, policies in turn; `gpu` does so at Mixtral's real shapes with random weights (bench_gpu.py).
`quality` says what the model is worth: bits per byte of a text.
"""

import argparse
import json
import math
import statistics
import sys
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

from .errors import (Parser, UserError, check_budget, check_context, count, human, import_requirements, parse_rate,
                     run_main, unknown)

import_requirements()
import numpy as np
import torch
import torch.nn.functional as F

from .cache import Counts, GPUExpertCache
from .checkpoint import Progress, ensure_packed
from .config import MixtralConfig
from .link import SimulatedLane, VirtualClock
from .memory import LOGIT_ROWS, plan_memory
from .history import History, Routing
from .packed import Outline, PackedModel
from .policies import POLICIES, schedulers
from .predictor import Forecast, Predictor
from .quant import ExpertLayout
from .trace import Trace, read_traces

WEIGHTS = Path(__file__).resolve().parents[1] / "weights"
DEMO = WEIGHTS / "demo"
LEAST_TEXT = 16                             # tokens that say anything at all
QUALITY = (
    "How well the packed model foretells a text: bits per byte, what a byte of it would take on average if the model "
    "compressed it. Lower is better. The text goes through in windows of --context tokens, each by itself after a BOS. "
    "To see what four bits cost, give the 16-bit model the same windows, in any program that tells its loss: bits per "
    "byte is the sum of the losses of all tokens / ln 2 / the bytes of the text. Texts differ far more than that: "
    "compare on the same file, with the same --context; perplexities only between models with the same tokenizer.")


@dataclass
class Costs:
    """Milliseconds. A prefill's attention and experts grow with their tokens unless they are given."""

    attention_ms: float
    expert_ms: float
    expert_transfer_ms: float
    chunks: int
    predict_ms: float
    prefill_attention_ms: float | None
    prefill_expert_ms: float | None

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


class Replay:
    """One trace through one policy with one cache, on a clock of its own."""

    def __init__(self, trace: Trace, top_k: int, policy: str, slots: int, costs: Costs, predictor: Predictor | None):
        self.trace, self.costs, self.k = trace, costs, top_k
        self.top = trace.top(top_k)
        _, self.layers, self.experts = trace.logits.shape
        self.clock = VirtualClock()
        lane = SimulatedLane(self.clock, costs.chunks / (costs.expert_transfer_ms / 1e3), 1)
        self.cache = GPUExpertCache(slots, costs.chunks, lane)      # an expert is `chunks` bytes long
        self.history = History(self.layers, self.experts)
        oracle = policy == "oracle"
        self.forecast = (Oracle if oracle else Forecast)(self.history, predictor, top_k)
        self.predict_ms = costs.predict_ms if predictor and policy in ("duo", "oracle") else 0.0
        self.scheduler, self.make_decode = schedulers("duo" if oracle else policy, self.cache, self.history,
                                                      trace.prompt, self.forecast)
        self.floor = 0.0

    def run(self) -> "Replay":
        prompt, tokens = self.trace.prompt, len(self.trace.logits)
        self.step(slice(0, prompt), None)
        self.ttft = self.clock.now()
        self.cache.counts, self.cache.decoding, self.cache.lane.busy = Counts(), True, 0.0
        self.scheduler = self.make_decode()
        for t in range(prompt, tokens):
            self.step(slice(t, t + 1), self.trace.lookahead[t, 0].tolist())
        self.cache.plan([])
        self.decode_s, self.steps = self.clock.now() - self.ttft, tokens - prompt
        return self

    def step(self, rows: slice, lookahead: list[float] | None) -> None:
        costs, last = self.costs, rows.stop - 1
        decode = lookahead is not None
        self.forecast.truth = self.top[last]
        self.scheduler.begin_step(lookahead)
        for layer in range(self.layers):
            before = self.cache.counts.misses + self.cache.counts.prefetched_used
            self.scheduler.begin_layer(layer)
            self.clock.advance((costs.attention_ms + self.predict_ms if decode
                                else costs.prefill_attention(rows.stop - rows.start)) / 1e3)
            ids = self.top[rows, layer]
            ahead = self.trace.lookahead[last, layer + 1].tolist() if layer + 1 < self.layers else None
            routing = Routing(np.bincount(ids.ravel(), minlength=self.experts).tolist(), ids[-1].tolist(), [],
                              self.trace.logits[last, layer].tolist(), ahead)
            self.history.observe(layer, routing)
            for e, _ in self.scheduler.experts(layer, routing):
                self.clock.advance((costs.expert_ms if decode else costs.prefill_expert(routing.counts[e])) / 1e3)
            self.scheduler.end_layer(layer)
            needed = self.cache.counts.misses + self.cache.counts.prefetched_used - before
            if decode:
                self.floor += max(costs.attention_ms + self.k * costs.expert_ms, needed * costs.expert_transfer_ms)


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
            "moved_transfers_per_token": total("decode_bytes") / costs.chunks / steps,
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


def check_range(flag: str, value: float, low: float, high: float, least_open: bool = False) -> None:
    if not low <= value <= high or (least_open and value == low):
        raise UserError(f"{flag} {value:g}: expected a number from {low:g} to {high:g}")


def check_policies(policies: list[str], known: tuple[str, ...] = POLICIES) -> None:
    for policy in policies:
        if policy not in known:
            raise unknown("--policies", policy, known)


def empty(engine) -> None:
    """Every run starts with an empty cache."""
    for key in list(engine.cache.where):
        engine.cache.drop(key)


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
    check_policies(policies, (*POLICIES, "oracle"))
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
        transfer = 3.7 if args.traces and not args.link else 1e3 * layout.nbytes / rate
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
              f"({human(layout.nbytes)}), not of Mixtral's", file=sys.stderr)
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
    model = Outline(config)
    budget = check_budget(gpu_memory, model.nbytes, torch.device("cpu"), None)
    plans = [plan_memory(model, torch.bfloat16, context, True, True, budget, n) for n in wanted]
    plan = max(plans, key=lambda plan: plan.slots)
    print(f"note: 4-bit model {human(model.nbytes)} ({human(model.nbytes - model.resident_bytes())} of experts in host memory); of "
          f"{human(budget)} on the GPU, {human(plan.resident)} resident weights, {human(plan.kv)} KV cache for {context} tokens, "
          f"{human(plan.workspace)} workspace, {plan.slots} slots of {human(plan.expert)}; the CUDA context is on top",
          file=sys.stderr)
    return [plan.slots for plan in plans]


def print_schedule(result: dict) -> None:
    c = result["costs"]
    print(f"attention {c['attention_ms']:g} ms, expert {c['expert_ms']:g} ms, transfer {c['expert_transfer_ms']:.3g} "
          f"ms, {c['chunks']} chunks an expert; times in ms, transfers a token")
    print(f"{'policy':15}{'slots':>6}{'TTFT':>9}{'TPOT':>9}{'tok/s':>7}{'floor':>9}{'/floor':>8}{'needed':>8}"
          f"{'moved':>8}{'/Belady':>9}{'link':>6}")
    for r in result["rows"]:
        ideal = result["belady_transfers_per_token"][str(r["cache_experts"])]
        speed, over = (1e3 / r["tpot_ms"], r["tpot_ms"] / r["floor_ms"]) if r["floor_ms"] else (float("inf"), 1)
        print(f"{r['policy']:15}{r['cache_experts']:6}{r['ttft_ms']:9.1f}{r['tpot_ms']:9.2f}{speed:7.1f}"
              f"{r['floor_ms']:9.2f}{over:8.3f}{r['needed_transfers_per_token']:8.2f}"
              f"{r['moved_transfers_per_token']:8.2f}{r['needed_transfers_per_token'] / ideal if ideal else 1:9.2f}"
              f"{100 * r['link_busy']:5.0f}%")


def run(args) -> dict:
    """`bench run`: the engine itself, policies in turn, several rounds; medians, and ratios within a round."""
    from .engine import Engine
    policies = args.policies or list(POLICIES)
    check_policies(policies)
    if args.cache_experts and len(args.cache_experts) > 1:
        raise UserError(f"--cache-experts {args.cache_experts}: bench run takes one size at a time")
    check_range("--rounds", args.rounds, 1, 1000)
    check_range("--max-new-tokens", args.max_new_tokens, 2, 1e6)
    engine = Engine.from_pretrained(args.model, device=args.device, gpu_memory=args.gpu_memory,
                                    host_memory=args.host_memory,
                                    cache_experts=args.cache_experts[0] if args.cache_experts else None,
                                    predictor=args.predictor, threads=args.threads,
                                    simulate_link=args.simulate_link, progress=Progress)
    rounds: list[dict] = []
    with closing(Progress(args.rounds * len(policies), "answers", write=count)) as bar:
        for _ in range(args.rounds):        # policies in turn within a round: a busy machine slows them all alike
            one = {}
            for engine.policy in policies:
                empty(engine)
                one[engine.policy] = engine.generate(args.prompt, max_new_tokens=args.max_new_tokens, temperature=0).stats
                bar.add(1)
            if any(stats.tpot_s is None for stats in one.values()):
                raise UserError("--prompt: the model stops after a single token; give another prompt")
            rounds.append(one)
    reference = policies[0]
    rows = []
    for policy in policies:
        stats = [one[policy] for one in rounds]
        last = asdict(stats[-1])
        rows.append({"policy": policy, "cache_experts": last["cache_experts"],
                     "ttft_s": statistics.median(s.ttft_s for s in stats),
                     "tpot_s": statistics.median(s.tpot_s for s in stats),
                     f"tpot_vs_{reference}": statistics.median(o[policy].tpot_s / o[reference].tpot_s for o in rounds),
                     **{key: last[key] for key in ("hits", "prefetched_used", "misses", "bytes_moved",
                                                   "peak_device_bytes")},
                     "link_busy_fraction": statistics.median(s.link_busy_fraction for s in stats)})
    if not args.json:
        print(f"{'policy':15}{'slots':>6}{'TTFT ms':>10}{'TPOT ms':>10}{'x ' + reference:>14}{'hits':>7}{'used':>7}"
              f"{'misses':>8}{'link':>6}")
        for r in rows:
            print(f"{r['policy']:15}{r['cache_experts']:6}{1e3 * r['ttft_s']:10.1f}{1e3 * r['tpot_s']:10.2f}"
                  f"{r[f'tpot_vs_{reference}']:14.2f}{r['hits']:7}{r['prefetched_used']:7}{r['misses']:8}"
                  f"{100 * r['link_busy_fraction']:5.0f}%")
    return {"rounds": args.rounds, "rows": rows}


def read_text(path: str) -> str:
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a text file") from None
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise UserError(f"{path}: is not UTF-8 text; give a text file")
    if not text.strip():
        raise UserError(f"{path}: is empty; give a text of some pages")
    return text


def quality(args) -> dict:
    """`bench quality`: every token of a text predicted once, in windows that know nothing of what was before them."""
    from .engine import Engine
    text, packed = read_text(args.file), PackedModel(ensure_packed(args.model, WEIGHTS))
    bos, *ids = packed.tokenizer().encode(text)
    if len(ids) < LEAST_TEXT:
        raise UserError(f"{args.file}: {len(ids)} tokens are too short a text to tell anything; give some pages")
    context = min(2048, packed.config.max_position_embeddings) if args.context is None else args.context
    engine = Engine(packed, device=args.device, dtype=args.dtype, gpu_memory=args.gpu_memory, context=context,
                    predictor="none", progress=Progress)
    nats, starts, nbytes = 0.0, range(0, len(ids), context), len(text.encode())
    with closing(Progress(len(ids), "tokens", write=count)) as bar:
        for window in (ids[start:start + context] for start in starts):
            logits = engine.logits([bos, *window[:-1]])
            for rows, want in zip(logits.split(LOGIT_ROWS), torch.tensor(window).split(LOGIT_ROWS)):
                nats += F.cross_entropy(rows, want, reduction="sum").item()
            bar.add(len(window))
    result = {"bits_per_byte": nats / math.log(2) / nbytes, "perplexity": math.exp(nats / len(ids)),
              "tokens": len(ids), "bytes": nbytes, "windows": len(starts), "context": context}
    if len(ids) < 1000:
        print(f"note: {len(ids)} tokens are few; from 10,000 on two figures can be compared", file=sys.stderr)
    if not args.json:
        print(f"{result['bits_per_byte']:.4f} bits per byte, perplexity {result['perplexity']:.3f} per token "
              f"({len(ids):,} tokens, {human(nbytes)}, {len(starts)} windows of {context})")
    return result


def parse_args():
    parser = Parser(prog="python -m duoserve.bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    helped = {"schedule": "on a virtual clock: how fast recorded routing would run",
              "run": "the engine itself, policies in turn, on this machine",
              "gpu": "the same at Mixtral's shapes, with random weights; on a GPU",
              "quality": "what a model is worth: bits per byte of a text of yours"}
    parsers = {name: commands.add_parser(name, help=text, description=QUALITY if name == "quality" else text)
               for name, text in helped.items()}
    for name in ("schedule", "run"):
        add = parsers[name].add_argument
        add("--model", default=DEMO, help="a packed directory (default: weights/demo)")
        add("--predictor", metavar="FILE|none", help="what duo predicts with (default: the model's own, if it has one)")
        add("--policies", nargs="+", metavar="P",
            help=f"default: all ({', '.join([*POLICIES, *['oracle'] * (name == 'schedule')])})")
        add("--cache-experts", type=int_or_word, nargs="+", metavar="N", help="slots for experts (default: " + (
            "for 10, 25, 40, 50 and 60 %% of them)" if name == "schedule" else "as many as fit; on a CPU a quarter)"))
        add("--gpu-memory", metavar="SIZE|PERCENT", help="as many slots as fit into this much, or see that those of "
            "--cache-experts do (default: " + (
            "see --cache-experts)" if name == "schedule" else "what is free on the GPU)"))
        add("--json", action="store_true", help="one JSON object on standard output (default: a table)")
        if name == "schedule":
            add("traces", nargs="?", metavar="TRACES_DIR", help="made by generate.py --trace-dir")
            add("--model-config", metavar="FILE", help="a config.json instead of --model; without traces the routing "
                "is made up (default: none)")
            add("--context", type=int, metavar="N",
                help="tokens of KV cache in a --gpu-memory plan (default: 2048, or what the model takes)")
            add("--attention-ms", type=float, default=0.3, metavar="A",
                help="milliseconds to compute a layer without its experts (default %(default)s)")
            add("--expert-ms", type=float, default=0.15, metavar="B",
                help="ms to compute an expert (default %(default)s)")
            link = parsers[name].add_mutually_exclusive_group().add_argument
            link("--expert-transfer-ms", type=float, metavar="T",
                 help="ms to move an expert (default with traces: 3.7, Mixtral-8x7B on PCIe 4)")
            link("--link", metavar="SIZE/s",
                 help="instead: the model's own experts at this speed (default with a config alone: 25GB/s)")
            add("--chunks", type=int, default=12, metavar="N",
                help="pieces an expert is moved in (default %(default)s)")
            add("--predict-ms", type=float, default=0.05, metavar="X",
                help="ms that a layer visit takes longer where the trained predictor runs (default %(default)s)")
            add("--prefill-attention-ms", type=float, metavar="A",
                help="of a prompt (default: --attention-ms x (1 + tokens / 128))")
            add("--prefill-expert-ms", type=float, metavar="B",
                help="of a prompt (default: --expert-ms x (1 + its tokens / 128))")
            add("--persistence", type=float, default=0.30, metavar="P",
                help="made-up routing: the chance that the next token chooses an expert again (default %(default)s)")
            add("--lookahead-recall", type=float, default=0.8, metavar="R",
                help="made-up routing: the chance that the lookahead finds a chosen expert (default %(default)s)")
        else:
            add("--prompt", default="Once upon a time there was a king who had three daughters, and the youngest",
                metavar="TEXT", help="default: '%(default)s'")
            add("--max-new-tokens", type=int, default=64, metavar="N", help="default %(default)s")
            add("--rounds", type=int, default=3, metavar="N", help="the medians are over these (default %(default)s)")
            add("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
            add("--host-memory", metavar="SIZE|PERCENT",
                help="keep the most used experts in this much of it, the others on the disk (default: keep all)")
            add("--threads", type=int, metavar="N", help="that compute on the CPU (default: as many as gain something)")
            add("--simulate-link", metavar="SIZE/s", help="a link of this speed where there is no GPU (default: none)")
    add = parsers["quality"].add_argument
    add("file", metavar="FILE", help="UTF-8 text, some pages at least")
    add("--model", default=DEMO, help="a packed or Hugging Face directory (default: weights/demo)")
    add("--context", type=int, metavar="N", help="tokens of a window (default 2048, or what the model takes)")
    add("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    add("--dtype", help="float32, bfloat16 or float16 (default: float32 on the CPU, bfloat16 on CUDA)")
    add("--gpu-memory", metavar="SIZE|PERCENT", help="for weights, cache and all (default: what is free on the GPU)")
    add("--json", action="store_true", help="one JSON object on standard output (default: a line)")
    add = parsers["gpu"].add_argument
    add("--shape", default="mixtral-8x7b",
        help="mixtral-8x7b, mixtral-8x22b or tiny, which runs anywhere (default %(default)s)")
    add("--gpu-memory", nargs="+", metavar="SIZE|PERCENT", help="default 15%%; several run in ascending order")
    add("--policies", nargs="+", default=list(POLICIES), metavar="P", help=f"default: all ({', '.join(POLICIES)})")
    add("--prompts", type=int, nargs="+", default=[128, 512, 2048], metavar="TOKENS",
        help="lengths to prefill; decode follows the middle one (default 128 512 2048)")
    add("--new-tokens", type=int, default=64, metavar="N",
        help="decoded by each policy (default %(default)s; layer-prefetch: 8)")
    add("--rounds", type=int, default=3, metavar="N", help="each with routing of its own (default %(default)s)")
    add("--persistence", type=float, nargs="+", default=[0.30], metavar="P",
        help="the chance that the next token chooses an expert again (default 0.30)")
    add("--lookahead-recall", type=float, nargs="+", default=[0.8], metavar="R",
        help="the chance that the lookahead finds a chosen expert (default 0.8)")
    add("--predictor", action=argparse.BooleanOptionalAction, default=True,
        help="train duo's on routing made up alike (default: yes)")
    add("--resident", action=argparse.BooleanOptionalAction, default=True,
        help="at the end, all experts on the device: what the floors are taken from (default: yes)")
    add("--compile", action=argparse.BooleanOptionalAction, default=None,
        help="torch.compile the kernels (default: on CUDA)")
    add("--device", help="cuda or cuda:N; cpu for --shape tiny (default: a GPU if there is one)")
    add("--simulate-link", metavar="SIZE/s", help="a link of this speed instead of the real one (default: none)")
    add("--append", metavar="FILE",
        help="also write each row there as it is measured, a line of JSON each (default: nowhere)")
    add("--json", action="store_true", help="one JSON object on standard output (default: rows as they are measured)")
    args = parser.parse_args()
    if args.command is None:
        raise UserError(f"no command given: choose one of {', '.join(helped)}; --help says what they do")
    if args.command == "schedule":
        take_traces(args)
    if args.command in ("schedule", "run"):
        for word in args.cache_experts or []:
            if isinstance(word, str):
                raise UserError(f"--cache-experts {word}: not a whole number")
    return args


def int_or_word(word: str) -> int | str:
    try:
        return int(word)
    except ValueError:
        return word


def take_traces(args) -> None:
    """`--policies lru tests/traces`: argparse gives the directory to the list before it, where no policy is called so."""
    for words, known in ((args.policies, (*POLICIES, "oracle")), (args.cache_experts, ())):
        if args.traces is None and words and len(words) > 1 and isinstance(word := words[-1], str) \
                and word not in known and (Path(word).is_dir() or "/" in word and not word.endswith(".py")):
            args.traces = words.pop()


def main() -> int:
    args = parse_args()
    if args.command == "gpu":
        from .bench_gpu import gpu
        result = gpu(args)
    else:
        result = {"schedule": schedule, "run": run, "quality": quality}[args.command](args)
    if args.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    run_main(main)
