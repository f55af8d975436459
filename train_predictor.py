"""traces/ -> <model>/predictor.safetensors, and a report: what each hint is worth on unseen sequences."""

import json
import time
from hashlib import sha256
from pathlib import Path

from duoserve.errors import DEMO, Parser, UserError, import_requirements, note, run_main

import_requirements()
import numpy as np

from duoserve.bench.flags import table
from duoserve.bench.replay import Costs, row
from duoserve.packed import PackedModel
from duoserve.predictor import Predictor
from duoserve.trace import decoded_traces
from duoserve.training import measure_affinity, recalls, train

LEAST = 8                                   # sequences: six to train on, two to test
REPLAYED = 8                                # of the test sequences, for the figure in milliseconds


def shared(a: str, b: str) -> int:
    """How many traces, by their content, two directories have in common."""
    contents = lambda d: {sha256(path.read_bytes()).digest() for path in Path(d).glob("*.safetensors")}
    return len(contents(a) & contents(b))


def make_parser() -> Parser:
    parser = Parser(prog="python train_predictor.py", description=__doc__, examples=(
        "tests/traces --out predictor.safetensors", "traces/ --model weights/mixtral"))
    add = parser.add_argument
    add("traces", metavar="TRACES_DIR", help="made by generate.py --trace-dir")
    add("--model", default=DEMO, metavar="DIR", help="a packed directory (default: weights/demo)")
    add("--out", type=Path, metavar="FILE",
        help="what to write (default: predictor.safetensors in the model's directory)")
    add("--test", metavar="DIR", help="traces to test on (default: a fifth of TRACES_DIR)")
    parser.shared("--json")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    began = time.perf_counter()
    model = PackedModel(args.model)
    out = args.out or model.directory / "predictor.safetensors"
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: its directory does not exist")
    k = model.config.num_experts_per_tok
    slots = max(2, len(model.config.expert_keys) // 4)
    traces = decoded_traces(args.traces, model, LEAST)
    order = np.random.RandomState(0).permutation(len(traces))
    held = 0 if args.test else max(2, round(0.2 * len(traces)))     # of sequences: tokens of one are alike
    test, seen = ([traces[i] for i in part] for part in (order[:held], order[held:]))
    if args.test:
        test = decoded_traces(args.test, model)
        if n := shared(args.traces, args.test):
            note(f"{n} of the traces in --test {args.test} are also trained on: the report is better than "
                 "the predictor; test on others")
    if not args.out and out.exists():
        note(f"replaces {out} (--out FILE writes elsewhere)")
    affinity = measure_affinity(seen, k)
    predictor = Predictor(train(seen, k), affinity, model.fingerprint)
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
        return
    print(f"{len(seen)} sequences to train on, {len(test)} to test; {seconds:.1f} s")
    print(f"share of the true top {k} among {k} predicted, for the next layer, and for visits after it:")
    columns = recall | {"next visit": visits}
    rows = [*enumerate(zip(*columns.values())), ("all", [found.mean() for found in columns.values()])]
    lines = [dict(zip(columns, found), layer=layer) for layer, found in rows]
    print(table([("layer", 11, "{layer}"), *((name, 12, f"{{{name}:.3f}}") for name in columns)], lines))
    share = recall["full"].mean()
    print(f"without a cache, of {k} experts prefetched a layer {k * share:.2f} would be used")
    print(f"a token with {slots} slots, replayed on {len(replayed)} test sequences at bench schedule's "
          f"costs: {tpot['full']:.1f} ms, by the lookahead alone {tpot['lookahead']:.1f} ms\n{out}")


if __name__ == "__main__":
    run_main(main)
