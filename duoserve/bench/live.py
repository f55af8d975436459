"""bench run: the engine itself, policies in turn, in real time."""

import statistics
from contextlib import closing

from ..engine import Engine
from ..errors import Progress, UserError, count
from ..policies import POLICIES
from .flags import check_policies, table


def run(args) -> dict:
    """Several rounds, in each every policy once, which must give the same tokens; medians, and the median of
    the ratios within a round (so it may differ a little from the ratio of the medians)."""
    policies, sizes = args.policies or list(POLICIES), args.cache_experts or [None]
    check_policies(policies)
    if len(sizes) > 1:
        raise UserError(f"--cache-experts {' '.join(map(str, sizes))}: bench run takes one size at a time")
    engine = Engine.from_pretrained(
        args.model, device=args.device, gpu_memory=args.gpu_memory, host_memory=args.host_memory,
        cache_experts=sizes[0], predictor=args.predictor, threads=args.threads,
        host_threads=args.host_threads, simulate_link=args.simulate_link, simulate_host=args.simulate_host,
        progress=Progress)
    stats: dict[str, list] = {policy: [] for policy in policies}    # of each round
    said = None
    with closing(Progress(args.rounds * len(policies), "answers", write=count)) as bar:
        for _ in range(args.rounds):        # in turn within a round: a busy machine slows all policies alike
            for engine.policy in policies:
                engine.cache.empty()
                result = engine.generate(args.prompt, max_new_tokens=args.max_new_tokens, temperature=0)
                if result.stats.tpot_s is None:
                    raise UserError("--prompt: the model stops after a single token; give another prompt")
                said = said or result.token_ids
                if result.token_ids != said:
                    raise UserError(f"{engine.policy} and {policies[0]} gave different tokens: one is broken")
                stats[engine.policy].append(result.stats)
                bar.add(1)
    first, rows = policies[0], []
    for policy, own in stats.items():
        median = lambda name: statistics.median(getattr(s, name) for s in own)
        ratio = statistics.median(s.tpot_s / t.tpot_s for s, t in zip(own, stats[first]))
        last = {name: getattr(own[-1], name) for name in ("hits", "prefetched_used", "misses", "host_experts",
                                                          "bytes_moved", "peak_device_bytes")}
        rows.append({"policy": policy, "cache_experts": own[-1].cache_experts, "ttft_s": median("ttft_s"),
                     "tpot_s": median("tpot_s"), f"tpot_vs_{first}": ratio, **last,
                     "link_busy_fraction": median("link_busy_fraction"),
                     "host_busy_fraction": median("host_busy_fraction")})
    if not args.json:
        lines = [row | {"ttft_ms": 1e3 * row["ttft_s"], "tpot_ms": 1e3 * row["tpot_s"],
                        "ratio": row[f"tpot_vs_{first}"]} for row in rows]
        print(table([("policy", 15, "{policy}"), ("slots", 6, "{cache_experts}"),
                     ("TTFT ms", 10, "{ttft_ms:.1f}"), ("TPOT ms", 10, "{tpot_ms:.2f}"),
                     (f"x {first}", 14, "{ratio:.2f}"), ("hits", 7, "{hits}"),
                     ("used", 7, "{prefetched_used}"), ("misses", 8, "{misses}"),
                     ("host", 7, "{host_experts}"), ("link", 6, "{link_busy_fraction:.0%}"),
                     ("host", 6, "{host_busy_fraction:.0%}")], lines))
    return {"rounds": args.rounds, "rows": rows}
