"""traces/ -> <model>/predictor.safetensors, with a report of what each hint is worth on sequences it never saw."""

import json
import sys
import time
from functools import partial
from hashlib import sha256
from pathlib import Path

from duoserve.errors import Parser, UserError, count, import_requirements, run_main

import_requirements()
import numpy as np

from duoserve.bench.replay import Costs, row
from duoserve.checkpoint import Progress
from duoserve.packed import PackedModel
from duoserve.predictor import Predictor
from duoserve.trace import Trace, read_traces
from duoserve.training import measure_affinity, recalls, train

WEIGHTS = Path(__file__).resolve().parent / "weights"
LEAST = 8                                   # sequences: six to train on, two to test
REPLAYED = 8                                # of the test sequences, for the figure in milliseconds


def decoded(directory: str, model: PackedModel, least: int = LEAST) -> list[Trace]:
    """The traces of a directory that hold decoded tokens; `UserError` if there are too few."""
    shape = model.config.num_hidden_layers, model.config.num_local_experts
    traces = [t for t in read_traces(directory, model.fingerprint, shape) if len(t.logits) > t.prompt]
    if len(traces) < least:
        raise UserError(f"{directory}: {len(traces)} sequences with decoded tokens are too few to train on and to test; "
                        f"at least {least} are needed, a hundred are better")
    return traces


def shared(a: str, b: str) -> int:
    """How many traces, by what is in them, two directories have in common."""
    one, other = ({sha256(path.read_bytes()).digest() for path in Path(d).glob("*.safetensors")} for d in (a, b))
    return len(one & other)


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("traces", metavar="TRACES_DIR", help="made by generate.py --trace-dir")
    parser.add_argument("--model", default=str(WEIGHTS / "demo"), help="a packed directory (default: weights/demo)")
    parser.add_argument("--out", type=Path, metavar="FILE",
                        help="what to write (default: predictor.safetensors in the model's directory)")
    parser.add_argument("--test", metavar="DIR", help="traces to test on (default: a fifth of TRACES_DIR)")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output (default: a table)")
    args = parser.parse_args()
    began = time.perf_counter()
    model = PackedModel(args.model)
    out = args.out or model.directory / "predictor.safetensors"
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: its directory does not exist")
    k = model.config.num_experts_per_tok
    slots = max(2, model.config.num_hidden_layers * model.config.num_local_experts // 4)
    traces = decoded(args.traces, model)
    order = np.random.RandomState(0).permutation(len(traces))
    held = 0 if args.test else max(2, round(0.2 * len(traces)))    # split by sequence: tokens of one are too alike
    test, seen = ([traces[i] for i in order[part]] for part in (slice(held), slice(held, None)))
    test = decoded(args.test, model, 1) if args.test else test
    if args.test and (n := shared(args.traces, args.test)):
        print(f"note: {n} of the traces in --test {args.test} are also trained on: the report is better than the "
              "predictor; test on others", file=sys.stderr)
    if not args.out and out.exists():
        print(f"note: replaces {out} (--out FILE writes elsewhere)", file=sys.stderr)
    affinity = measure_affinity(seen, k)
    predictor = Predictor(train(seen, k, partial(Progress, write=count)), affinity, model.fingerprint)
    predictor.save(out)
    recall, visits = recalls(test, seen, predictor, k)
    replayed = test[:REPLAYED]
    tpot = {name: row(replayed, k, "duo", slots, Costs(), p)["tpot_ms"]
            for name, p in (("lookahead", None), ("full", predictor))}
    seconds = time.perf_counter() - began
    if args.json:
        print(json.dumps({"recall": {name: float(r.mean()) for name, r in recall.items()},
                          "next_visit_recall": float(visits.mean()), "tpot_ms": tpot, "cache_experts": slots,
                          "replayed_sequences": len(replayed), "train_sequences": len(seen),
                          "test_sequences": len(test), "seconds": seconds, "out": str(out)}))
        return 0
    print(f"{len(seen)} sequences to train on, {len(test)} to test; {seconds:.1f} s")
    print(f"share of the true top {k} among {k} predicted, for the layer that comes next, and for the next visits "
          "of the others:")
    columns = recall | {"next visit": visits}
    print(f"{'layer':>11}" + "".join(f"{name:>12}" for name in columns))
    for layer in range(len(visits)):
        print(f"{layer:11}" + "".join(f"{r[layer]:12.3f}" for r in columns.values()))
    print(f"{'all':>11}" + "".join(f"{r.mean():12.3f}" for r in columns.values()))
    share = recall["full"].mean()
    print(f"of the {k} experts prefetched a layer, {k * share:.2f} would be used and {k * (1 - share):.2f} wasted, "
          "if none were in the cache")
    print(f"a token with {slots} slots, replayed on {len(replayed)} test sequences at bench schedule's costs: "
          f"{tpot['full']:.1f} ms, by the lookahead alone {tpot['lookahead']:.1f} ms\n{out}")
    return 0


if __name__ == "__main__":
    run_main(main)
