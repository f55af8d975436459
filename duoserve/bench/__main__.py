"""python -m duoserve.bench schedule | run | gpu | quality: what a schedule is worth, simulated and for real.

`schedule` replays recorded routing through the real schedulers, cache and lane, without a model, on a virtual
clock: transfers and arithmetic cost what you say, so the figures are exact. It is also how to plan: from a
config.json alone it says whether a model fits and about how fast it will be, before 90 GB are downloaded.
`run` runs the engine itself, policies in turn; `gpu` does so at Mixtral's real shapes with random weights.
`quality` says how well a model predicts: bits per byte of a text.
"""

import argparse
import json

from ..errors import DEMO, Parser, UserError, import_requirements, run_main

import_requirements()
from ..policies import POLICIES
from . import gpu, live, quality, replay
from .flags import check_lists, number

MILLISECONDS = (                            # the defaults are those of `replay.Costs`
    ("--attention-ms", "A", "to compute a layer without its experts (default %(default)s)"),
    ("--expert-ms", "B", "to compute an expert (default %(default)s)"),
    ("--host-expert-ms", "H", "for an expert on the host (default: it computes none)"),
    ("--host-block-ms", "H", "for a sixth of one that is divided (default: by its share of the bytes)"),
    ("--predict-ms", "X", "more for a layer visit with the trained predictor (default %(default)s)"),
    ("--prefill-attention-ms", "A", "for a prompt (default: --attention-ms x (1 + tokens / 128))"),
    ("--prefill-expert-ms", "B", "for a prompt (default: --expert-ms x (1 + its tokens / 128))"))
PERSISTENCE = "made-up routing: the chance that the next token chooses an expert again (default 0.30)"
RECALL = "made-up routing: the chance that the lookahead finds a chosen expert (default 0.8)"


def schedule_flags(parser: Parser) -> None:
    add, share = parser.add_argument, number(float, 0, 1)
    add("traces", nargs="?", metavar="TRACES_DIR", help="made by generate.py --trace-dir")
    parser.shared("--predictor", "--json")
    add("--model", default=DEMO, metavar="DIR", help="a packed directory (default: weights/demo)")
    add("--model-config", metavar="FILE",
        help="instead of --model: a config.json, mixtral-8x7b or mixtral-8x22b; without traces, routing is "
        "made up (default: none)")
    add("--policies", nargs="+", metavar="P", help=f"default: all ({', '.join([*POLICIES, 'oracle'])}; with "
        "--host-expert-ms also host-only, which sends every miss there)")
    add("--cache-experts", nargs="+", metavar="N",
        help="slots for experts (default: for 10, 25, 40, 50 and 60 %% of them)")
    add("--gpu-memory", metavar="SIZE|PERCENT",
        help="as many slots as fit into this, or check that those of --cache-experts do (default: see there)")
    add("--context", type=int, metavar="N",
        help="tokens of KV cache in a --gpu-memory plan (default: 2048, or what the model takes)")
    for flag, metavar, words in MILLISECONDS:
        add(flag, type=number(float, 0, 1e6), metavar=metavar, help=f"milliseconds {words}",
            default=getattr(replay.Costs, flag[2:].replace("-", "_")))
    link = parser.add_mutually_exclusive_group().add_argument
    link("--expert-transfer-ms", type=number(float, 1e-6, 1e6), metavar="T",
         help="milliseconds to move an expert (default with traces: 3.7, Mixtral-8x7B on PCIe 4)")
    link("--link", metavar="SIZE/s",
         help="instead: the model's own experts at this speed (default with a config alone: 25GB/s)")
    add("--chunks", type=number(int, 1, 10_000), default=replay.Costs.chunks, metavar="N",
        help="pieces that an expert is moved in (default %(default)s)")
    add("--start", choices=("empty", "warm"), default="empty",
        help="what a prompt finds in the slots: nothing (default), or what an engine loads")
    add("--persistence", type=share, default=0.30, metavar="P", help=PERSISTENCE)
    add("--lookahead-recall", type=share, default=0.8, metavar="R", help=RECALL)


def run_flags(parser: Parser) -> None:
    add = parser.add_argument
    parser.shared("--model", "--predictor", "--gpu-memory", "--host-memory", "--device", "--host-threads",
                  "--threads", "--simulate-link", "--simulate-host", "--json")
    add("--policies", nargs="+", metavar="P", help=f"default: all ({', '.join(POLICIES)})")
    add("--cache-experts", nargs="+", metavar="N",
        help="slots for experts (default: as many as fit; on a CPU a quarter)")
    add("--prompt", default="Once upon a time there was a king who had three daughters, and the youngest",
        metavar="TEXT", help="default: '%(default)s'")
    add("--max-new-tokens", type=number(int, 2, 1e6), default=64, metavar="N", help="default %(default)s")
    add("--rounds", type=number(int, 1, 1000), default=3, metavar="N",
        help="the medians are over these (default %(default)s)")


def gpu_flags(parser: Parser) -> None:
    add, share = parser.add_argument, number(float, 0, 1)
    parser.shared("--device", "--host-threads", "--compile", "--simulate-link", "--simulate-host", "--json")
    add("--shape", default="mixtral-8x7b", choices=gpu.SHAPES, metavar="NAME",
        help="mixtral-8x7b, mixtral-8x22b or tiny, which runs anywhere (default %(default)s)")
    add("--gpu-memory", nargs="+", metavar="SIZE|PERCENT",
        help="default 15%%; several run in ascending order")
    add("--policies", nargs="+", default=[*POLICIES], metavar="P",
        help=f"default: all ({', '.join(POLICIES)})")
    add("--prompts", type=number(int, 1, 1e6), nargs="+", default=[128, 512, 2048], metavar="TOKENS",
        help="lengths to prefill; decode follows the middle one (default 128 512 2048)")
    add("--new-tokens", type=number(int, 2, 1e6), default=64, metavar="N",
        help="decoded by each policy (default %(default)s; layer-prefetch: 8)")
    add("--rounds", type=number(int, 1, 1000), default=3, metavar="N",
        help="each with routing of its own (default %(default)s)")
    add("--start", choices=("warm", "empty"), default="warm",
        help="what each prompt finds in the slots: what an engine loads (default), or nothing")
    add("--persistence", type=share, nargs="+", default=[0.30], metavar="P", help=PERSISTENCE)
    add("--lookahead-recall", type=share, nargs="+", default=[0.8], metavar="R", help=RECALL)
    for flag, words in (("--predictor", "train duo's on routing made up alike"),
                        ("--resident", "at the end, all experts on the device, for the floors")):
        add(flag, action=argparse.BooleanOptionalAction, default=True, help=f"{words} (default: yes)")
    add("--append", metavar="FILE",
        help="also write each row there as it is measured, as a line of JSON (default: nowhere)")


def quality_flags(parser: Parser) -> None:
    parser.description = quality.__doc__
    parser.add_argument("file", metavar="FILE", help="UTF-8 text, some pages at least")
    parser.shared("--model", "--device", "--dtype", "--gpu-memory", "--json")
    parser.add_argument("--context", type=int, metavar="N",
                        help="tokens of a window (default 2048, or what the model takes)")
    parser.add_argument("--decode", action="store_true",
                        help="token by token, as new ones are (default: as a prompt)")


COMMANDS = {                                # name: its flags, what it calls, what it is, two examples
    "schedule": (schedule_flags, replay.schedule, "on a virtual clock: how fast recorded routing would run",
                 "tests/traces --policies duo cache --cache-experts 22 44",
                 "--model-config mixtral-8x7b --gpu-memory 11GiB --link 25GB/s --policies duo"),
    "run": (run_flags, live.run, "the engine itself, policies in turn, on this machine",
            "--simulate-link 0.15GB/s", "--policies duo cache --cache-experts 9 --rounds 1"),
    "gpu": (gpu_flags, gpu.gpu, "the same at Mixtral's shapes, with random weights; on a GPU",
            "--gpu-memory 15% 50% --rounds 1", "--shape tiny --device cpu --policies duo cache --rounds 1"),
    "quality": (quality_flags, quality.quality, "how well a model predicts: bits per byte of a text of yours",
                "some-book.txt --model weights/mixtral", "README.md")}


def make_parser() -> Parser:
    parser = Parser(prog="python -m duoserve.bench", description=__doc__, examples=(
        "schedule tests/traces --policies duo cache", "run --simulate-link 0.15GB/s --rounds 1"))
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, (add_flags, _, words, *examples) in COMMANDS.items():
        add_flags(commands.add_parser(name, help=words, description=words, examples=examples))
    return parser


def main() -> None:
    args = make_parser().parse_args()
    if args.command is None:
        raise UserError(f"no command given: choose one of {', '.join(COMMANDS)}; --help says what they do")
    if args.command in ("schedule", "run"):
        check_lists(args)
    result = COMMANDS[args.command][1](args)
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    run_main(main)
