"""python -m duoserve.bench schedule | run | gpu | quality: what a schedule is worth, on the virtual clock and for real.

`schedule` replays recorded routing through the real schedulers, cache and lane, without a model: transfers and
arithmetic cost what you say they do, so it is deterministic to the last digit. It is also how to plan: given only a
config.json it says whether a model fits and about how fast it will be, before 90 GB are downloaded.
`run` runs the engine itself, policies in turn; `gpu` does so at Mixtral's real shapes with random weights.
`quality` says what the model is worth: bits per byte of a text.
"""

import argparse
import json

from ..errors import Parser, UserError, import_requirements, run_main

import_requirements()
from ..policies import POLICIES
from . import gpu, live, quality, replay
from .flags import DEMO, int_or_word, take_directory


def parse_args():
    parser = Parser(prog="python -m duoserve.bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    helped = {"schedule": "on a virtual clock: how fast recorded routing would run",
              "run": "the engine itself, policies in turn, on this machine",
              "gpu": "the same at Mixtral's shapes, with random weights; on a GPU",
              "quality": "what a model is worth: bits per byte of a text of yours"}
    parsers = {name: commands.add_parser(name, help=text, description=quality.QUALITY if name == "quality" else text)
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
            add("--attention-ms", type=float, default=replay.Costs.attention_ms, metavar="A",
                help="milliseconds to compute a layer without its experts (default %(default)s)")
            add("--expert-ms", type=float, default=replay.Costs.expert_ms, metavar="B",
                help="ms to compute an expert (default %(default)s)")
            link = parsers[name].add_mutually_exclusive_group().add_argument
            link("--expert-transfer-ms", type=float, metavar="T",
                 help="ms to move an expert (default with traces: 3.7, Mixtral-8x7B on PCIe 4)")
            link("--link", metavar="SIZE/s",
                 help="instead: the model's own experts at this speed (default with a config alone: 25GB/s)")
            add("--chunks", type=int, default=replay.Costs.chunks, metavar="N",
                help="pieces an expert is moved in (default %(default)s)")
            add("--predict-ms", type=float, default=replay.Costs.predict_ms, metavar="X",
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
    add("--decode", action="store_true", help="token by token, as new ones are (default: as a prompt)")
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
        take_directory(args)
    if args.command in ("schedule", "run"):
        for word in args.cache_experts or []:
            if isinstance(word, str):
                raise UserError(f"--cache-experts {word}: not a whole number")
    return args


def main() -> int:
    args = parse_args()
    result = {"schedule": replay.schedule, "run": live.run, "gpu": gpu.gpu, "quality": quality.quality}[args.command](args)
    if args.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    run_main(main)
