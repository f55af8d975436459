"""bench run: the engine itself, policies in turn, in real time."""

import statistics
from contextlib import closing
from dataclasses import asdict

from ..checkpoint import Progress
from ..engine import Engine
from ..errors import UserError, count
from ..policies import POLICIES
from .flags import check_policies, check_range, table


def run(args) -> dict:
    """Several rounds, in each every policy once; medians, and ratios within a round."""
    policies = args.policies or list(POLICIES)
    check_policies(policies)
    if args.cache_experts and len(args.cache_experts) > 1:
        raise UserError(f"--cache-experts {args.cache_experts}: bench run takes one size at a time")
    check_range("--rounds", args.rounds, 1, 1000)
    check_range("--max-new-tokens", args.max_new_tokens, 2, 1e6)
    engine = Engine.from_pretrained(
        args.model, device=args.device, gpu_memory=args.gpu_memory, host_memory=args.host_memory,
        cache_experts=args.cache_experts[0] if args.cache_experts else None, predictor=args.predictor,
        threads=args.threads, simulate_link=args.simulate_link, progress=Progress)
    rounds: list[dict] = []
    with closing(Progress(args.rounds * len(policies), "answers", write=count)) as bar:
        for _ in range(args.rounds):        # policies in turn within a round: a busy machine slows them all alike
            one = {}
            for engine.policy in policies:
                engine.cache.empty()
                one[engine.policy] = engine.generate(args.prompt, max_new_tokens=args.max_new_tokens, temperature=0).stats
                bar.add(1)
            if any(stats.tpot_s is None for stats in one.values()):
                raise UserError("--prompt: the model stops after a single token; give another prompt")
            rounds.append(one)
    reference, rows = policies[0], []
    for policy in policies:
        stats = [one[policy] for one in rounds]
        last, median = asdict(stats[-1]), lambda name: statistics.median(getattr(s, name) for s in stats)
        rows.append({"policy": policy, "cache_experts": last["cache_experts"], "ttft_s": median("ttft_s"),
                     "tpot_s": median("tpot_s"),
                     f"tpot_vs_{reference}": statistics.median(o[policy].tpot_s / o[reference].tpot_s for o in rounds),
                     **{key: last[key] for key in ("hits", "prefetched_used", "misses", "bytes_moved",
                                                   "peak_device_bytes")},
                     "link_busy_fraction": median("link_busy_fraction")})
    if not args.json:
        print(table([("policy", 15, "{policy}"), ("slots", 6, "{cache_experts}"), ("TTFT ms", 10, "{ttft_ms:.1f}"),
                     ("TPOT ms", 10, "{tpot_ms:.2f}"), (f"x {reference}", 14, "{ratio:.2f}"), ("hits", 7, "{hits}"),
                     ("used", 7, "{prefetched_used}"), ("misses", 8, "{misses}"),
                     ("link", 6, "{link_busy_fraction:.0%}")],
                    [r | {"ttft_ms": 1e3 * r["ttft_s"], "tpot_ms": 1e3 * r["tpot_s"], "ratio": r[f"tpot_vs_{reference}"]}
                     for r in rows]))
    return {"rounds": args.rounds, "rows": rows}
