"""bench gpu: the engine at Mixtral's real shapes, on a real link, without Mixtral's weights.

(What stands in for those, and for the routing, is in madeup.py; what is measured of the parts, in parts.py.)
Every policy sees the same routing, and must give the same tokens.

Peak memory is `max_memory_reserved` since the process began, so sizes run in ascending order, and the run
with all experts resident, which gives the floors, comes last.
"""

import json
import statistics
import sys
from collections import defaultdict
from itertools import product

import numpy as np
import torch

from ..config import MixtralConfig
from ..engine import Engine
from ..errors import UserError, note, parse_amount, parse_rate
from ..options import check_device
from ..store import ExpertStore
from .flags import SHAPES, check_policies, table
from .madeup import RandomModel, build, made_up, request
from .parts import bandwidth, host_speed, host_us, kernels
from .replay import Costs, Replay, step_floor, synthetic_traces


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


class Rows(list):
    """What has been measured; `append` also prints it on standard error and adds it to `--append`'s file."""

    def __init__(self, path: str | None):
        self.path = path
        if path:
            open(path, "a").close()         # fails before minutes are spent

    def append(self, row: dict) -> None:
        super().append(row)
        if self.path:
            with open(self.path, "a") as file:
                shown = {key: v for key, v in row.items() if key not in ("tokens", "needed", "hosted")}
                file.write(json.dumps(shown) + "\n")
        print("  ".join(f"{key} {round(v, 3) if isinstance(v, float) else v}" for key, v in row.items()
                        if isinstance(v, (str, int, float))), file=sys.stderr, flush=True)


def compare(engine: Engine, args, size: str, rows: Rows) -> None:
    """All policies with this engine, in turn within a round (each round has its own trace); the first of them
    also without the host. And the parts of the first."""
    first, host = args.policies[0], engine.host
    for persistence, recall in product(args.persistence, args.lookahead_recall):
        traces, engine.predictor = made_up(engine.config, persistence, recall, args.rounds, args.new_tokens,
                                           args.predictor)
        for round_ in range(args.rounds):
            said: dict[str, list[int]] = {}
            for policy in [*args.policies, *[f"{first} alone"] * (host is not None)]:
                name = policy.removesuffix(" alone")
                engine.host = host if name == policy else None
                row = measure(engine, name, args, traces, round_, args.start)
                rows.append(row | {"policy": policy, "gpu_memory": size, "persistence": persistence,
                                   "lookahead_recall": recall})
                for other, tokens in said.items():
                    if any(a != b for a, b in zip(tokens, row["tokens"])):
                        raise UserError(f"{policy} and {other} gave different tokens: one is broken")
                said[policy] = row["tokens"]
        engine.host = host
        rows.append({"policy": "host", "gpu_memory": size} | host_us(engine, first, args, traces[0]))
        if engine.device.type == "cuda" and host is not None and host.trouble() is None:
            rows.append({"policy": "host's experts", "gpu_memory": size} | host_speed(engine))


def all_resident(model: RandomModel, args, store: ExpertStore, rows: Rows) -> dict | None:
    """What the floors are made of: a run with every expert on the device. None if it does not fit."""
    config = model.config
    try:
        engine = build(model, args, store, cache_experts=len(config.expert_keys))
    except UserError as error:              # (a small GPU)
        note(f"no floors: {error}")
        return None
    settings = args.persistence[-1], args.lookahead_recall[-1]
    traces, _ = made_up(config, *settings, args.rounds, args.new_tokens, args.predictor)
    measure(engine, "cache", args, traces, 0, "warm")
    runs = [measure(engine, "duo", args, traces, i, "warm") for i in range(3)]
    ttft = {n: statistics.median(run["ttft_ms"][n] for run in runs) for n in runs[0]["ttft_ms"]}
    tpot = statistics.median(run["tpot_ms"] for run in runs)
    resident = runs[0] | {"policy": "resident", "tpot_ms": tpot, "ttft_ms": ttft}
    rows.append(resident)
    if engine.device.type == "cuda":
        rows.append({"policy": "kernels"} | kernels(engine))
    return resident


def gpu(args) -> dict:
    """`bench gpu`: -> all rows as plain data."""
    device = check_device(args.device)
    cuda = device.type == "cuda"
    if not cuda and args.shape != "tiny":
        raise UserError(f"--shape {args.shape}: needs a GPU; --shape tiny runs anywhere")
    check_policies(args.policies)
    config = SHAPES[args.shape]
    model = RandomModel(config, device)
    args.decode_after = args.prompts[len(args.prompts) // 2]
    args.context = max(*args.prompts, args.decode_after + args.new_tokens) + 8
    if not cuda:                            # there is no link to measure
        args.simulate_link = args.simulate_link or "100MB/s"
    rows, store = Rows(args.append), None
    sizes = args.gpu_memory or ["15%"]
    for size in sorted(sizes, key=lambda size: parse_amount(size, model.nbytes, "--gpu-memory")):
        by_count = args.shape == "tiny" and not args.gpu_memory
        memory = {"cache_experts": len(config.expert_keys) // 4} if by_count else {"gpu_memory": size}
        engine = None                       # before the next: the device has room for one, the cores too
        engine = build(model, args, store, **memory)
        if store is None:
            store, link = engine.store, args.simulate_link
            rate = parse_rate(link, "--simulate-link") if link else bandwidth(engine)
            rows.append({"load_s": engine.load_s, "link_GB_s": rate / 1e9, "pinned": store.pinned,
                         "expert_transfer_ms": 1e3 * model.layout.nbytes / rate, "gpu_memory": size,
                         "slots": engine.plan.slots})
        warm_up, = synthetic_traces(config, 0.5, 0.5, 1, 2, 8)
        for tokens in args.prompts:         # libraries choose kernels, and take memory, by length
            request(engine, args.policies[0], tokens, 4, warm_up)
        compare(engine, args, size, rows)
    engine = None
    resident = all_resident(model, args, store, rows) if args.resident else None
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
