"""prompt -> text, streamed, or a conversation; the numbers that matter at the end."""

import json
import shlex
import sys
from contextlib import closing, suppress
from dataclasses import fields
from pathlib import Path

from duoserve.errors import Parser, UserError, format_bytes, import_requirements, run_main

WEIGHTS = Path(__file__).resolve().parent / "weights"


def parse_args():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", "-p", metavar="TEXT", help="what to go on from")
    prompt.add_argument("--prompt-file", "-f", metavar="F", help="the same from a file, or - for standard input")
    add("--model", "-m", default=str(WEIGHTS / "demo"), metavar="DIR",
        help="a packed or Hugging Face directory (default: weights/demo)")
    add("--chat", action="store_true", help="the prompt is a message to an instruct model: the [INST] template "
        "(default: text to go on from)")
    add("--interactive", action="store_true",
        help="go on with what is typed, keeping what was said: text, or with --chat a conversation. Ctrl-C stops an "
             "answer, an empty line has it continued where it was cut off; exit, quit or Ctrl-D leaves (default: one "
             "answer)")
    add("--max-new-tokens", "-n", type=int, default=128, metavar="N", help="stop after so many (default %(default)s)")
    add("--context", "-c", type=int, metavar="N", help="sizes the KV cache (default: prompt and new tokens; "
        "with --interactive as far as the model goes, 4096 at most)")
    add("--temperature", type=float, default=0.8, metavar="T", help="0 is greedy (default %(default)s)")
    add("--top-k", type=int, metavar="K", help="sample from the K likeliest tokens (default: from all)")
    add("--top-p", type=float, default=0.95, metavar="P",
        help="and of these from the likeliest that make up P (default %(default)s)")
    add("--seed", type=int, default=0, metavar="S", help="another seed, another text (default %(default)s)")
    add("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    add("--dtype", help="float32, bfloat16 or float16 (default: float32 on the CPU, bfloat16 on CUDA)")
    add("--compile", action="store_true", default=None, help="torch.compile the kernels (default on CUDA)")
    add("--no-compile", dest="compile", action="store_false", help="eager kernels (default on the CPU)")
    add("--gpu-memory", metavar="SIZE|PERCENT",
        help="bounds what torch reserves; the CUDA context (about 0.5 GB) comes on top (default: what is free)")
    add("--cache-experts", type=int, metavar="N",
        help="slots for experts (default: as many as fit; on a CPU a quarter of them)")
    add("--host-memory", metavar="SIZE|PERCENT",
        help="keep the most used experts in this much of it and read the others from the disk (default: keep all)")
    add("--policy", default="duo", metavar="NAME",
        help="duo, on-demand, layer-prefetch, cache, lru, activation, score, combined, or a FILE.py of your own "
             "(default %(default)s)")
    add("--predictor", metavar="FILE|none", help="what duo predicts with (default: the model's own, if it has one)")
    add("--threads", "-t", type=int, metavar="N",
        help="that compute on the CPU (default: one for a small model, else one a core; or what OMP_NUM_THREADS says)")
    add("--simulate-link", metavar="SIZE/s", help="a link of this speed where there is no GPU: 25GB/s (default: none)")
    add("--trace-dir", type=Path, metavar="DIR",
        help="record there what the routers do, for train_predictor.py (default: no)")
    add("--timeline", type=Path, metavar="FILE.json|FILE.svg",
        help="both lanes of the run: .json for Perfetto, .svg a picture (default: none)")
    add("--json", action="store_true", help="one JSON object on standard output (default: the text, as it comes)")
    args, rest = parser.parse_known_args()
    if rest and not args.prompt_file:
        quoted = shlex.quote(" ".join([*[args.prompt] * (args.prompt is not None), *rest]))
        raise UserError(f"unrecognized arguments: {' '.join(rest)}; a prompt is given in quotes: --prompt {quoted}")
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if args.prompt is None and args.prompt_file is None and not args.interactive:
        raise UserError("nothing to go on from: give --prompt or --prompt-file, or type it with --interactive")
    for flag, given in (("--json", args.json), ("--timeline", args.timeline),
                        ("--prompt-file -", args.prompt_file == "-")):
        if args.interactive and given:
            raise UserError(f"{flag}: not together with --interactive; leave out one of them")
    if args.interactive and None in (sys.stdin, sys.stdout):
        raise UserError("--interactive: standard input or output is closed; leave both open")
    return args


def read_prompt(args) -> str | None:
    if args.prompt_file is None:
        return args.prompt
    try:
        if args.prompt_file == "-" and sys.stdin is None:
            raise UserError("--prompt-file -: standard input is closed")
        data = sys.stdin.buffer.read() if args.prompt_file == "-" else Path(args.prompt_file).read_bytes()
        return data.removesuffix(b"\r\n" if data.endswith(b"\r\n") else b"\n").decode()     # (an editor's)
    except OSError as error:
        raise UserError(f"--prompt-file {args.prompt_file}: cannot be read ({error.strerror}); name a text file, or - "
                        "for standard input") from None
    except UnicodeDecodeError:
        raise UserError(f"--prompt-file {args.prompt_file}: is not UTF-8 text; save it as such") from None


def extend(tokenizer, before: list[int], text: str, chat: bool) -> list[int]:
    """The ids of what was said `before` (none at first) with the text, or the message, that comes next."""
    text = text.removeprefix("\ufeff")     # a byte order mark is an editor's, not the writer's
    if not text.strip():
        raise UserError("the prompt is empty; give some text")
    return tokenizer.chat(text, before) if chat else [*before, *tokenizer.encode(text)[bool(before):]]


def answer(engine, ids: list[int], args):
    """Stream what comes after `ids`, as far as Ctrl-C lets it -> its `Generation`."""
    engine.result = None
    pieces = engine.stream(ids, args.params, resume=args.interactive)
    try:
        with closing(pieces):
            for i, piece in enumerate(pieces):
                if not args.json:           # the space in front of a chat's answer is the template's
                    print(piece.removeprefix(" ") if args.chat and not i else piece, end="", flush=True)
    except KeyboardInterrupt:
        if engine.result is None:           # before there was anything to show
            raise
    except UserError:
        if engine.result and engine.result.text and not args.json:
            print(flush=True)               # the error begins on a line of its own
        raise
    if not args.json:
        print(flush=True)
    result = engine.result
    result.text = result.text.removeprefix(" ") if args.chat else result.text
    if args.trace_dir and len(tokens := engine.sequence.kv_tokens) >= result.prompt_tokens:
        engine.source.recorder.save(args.trace_dir, tokens, result.prompt_tokens, engine.packed.fingerprint)
    if not args.json:
        print(closing_line(result, engine.config), file=sys.stderr)
    return result


def converse(engine, line: str | None, args) -> None:
    """Turn after turn, `line` the first, until the input ends. What goes wrong in one is a line; the next may come."""
    sys.stdin.reconfigure(errors="surrogateescape")     # what is typed and is no text will be told of as such
    hello = "> " if sys.stdin.isatty() and sys.stdout.isatty() else ""
    if sys.stdin.isatty():
        print("(exit, quit or Ctrl-D leaves; Ctrl-C stops an answer)", file=sys.stderr)
    if hello:
        with suppress(ImportError):
            import readline                 # noqa: F401 (`input` takes arrow keys and keeps a history with it)
    said, cut = [], False                   # the tokens of all turns, and whether the last answer was cut short
    while True:
        with suppress(KeyboardInterrupt):   # (one that comes while another is answered)
            try:
                if line is None and (line := input(hello)).strip() in ("exit", "quit"):
                    return
                ids = said
                if line.strip():
                    ids = extend(engine.tokenizer, said, line, args.chat)
                    if said and len(ids) >= engine.context > len(alone := extend(engine.tokenizer, [], line, args.chat)):
                        say_full(engine)
                        said, cut, ids = [], False, alone
                if line.strip() or cut:
                    result = answer(engine, ids, args)
                    if result.token_ids or result.finish_reason == "stop":  # else it is as if nothing had been said
                        said, cut = ids + result.token_ids, result.finish_reason != "stop"
                    if len(said) >= engine.context:
                        say_full(engine)
                        said, cut = [], False
            except EOFError:
                print(end="\n" if hello else "")
                return
            except KeyboardInterrupt:
                print("\n(exit, quit or Ctrl-D, the end of the input, leaves)", file=sys.stderr)
            except UserError as error:
                print("error:", *str(error).split(), file=sys.stderr)
        line = None


def say_full(engine) -> None:
    most = engine.config.max_position_embeddings
    mend = f"a larger --context holds more (up to {most})" if engine.context < most else "this model takes no more"
    print(f"[the context of {engine.context} tokens is full, so this starts anew; {mend}]", file=sys.stderr)


def closing_line(result, config) -> str:
    s = result.stats
    speed = f", {1 / s.tpot_s:.1f} tokens/s" if s.tpot_s else ""
    kept = f" ({s.prompt_tokens_kept} of {result.prompt_tokens} prompt tokens kept)" if s.prompt_tokens_kept else ""
    uses = s.hits + s.prefetched_used + s.misses
    found = f", {100 * s.in_time / uses:.0f} % of experts were there in time" if uses else ""
    first = "" if s.ttft_s is None else f"; first after {s.ttft_s:.2f} s"
    return (f"[{len(result.token_ids)} tokens ({result.finish_reason}){first}{kept}{speed}"
            f"{found}; {s.cache_experts} slots, {format_bytes(s.peak_device_bytes)} at peak; {what_bounded(s, config)}]")


def what_bounded(s, config) -> str:
    """What the speed of a request hung on, in words, and what would help."""
    busy = f"the link was busy {100 * s.link_busy_fraction:.0f} % of the time"
    disk = "; some experts came from the disk: more --host-memory would help" if s.bytes_from_disk else ""
    if not s.bytes_moved:
        return "every expert needed was there: computing set the speed, not the link"
    if not s.link_busy_fraction:
        return "no link to wait for here: computing set the speed"
    if s.link_busy_fraction < 0.5:
        return f"{busy}: computing set the speed"
    if s.cache_experts >= config.num_hidden_layers * config.num_local_experts:
        return f"{busy}, bringing experts for the first time: all fit, so a longer run will wait for it less{disk}"
    mend = "--policy duo" if s.policy == "on-demand" else "more --gpu-memory"      # (on-demand keeps nothing)
    return (f"{busy}: {mend} is what would help" if s.link_busy_fraction >= 0.8 else
            f"{busy}, computing took the rest: {mend} would help some") + disk


def main() -> int:
    if sys.stdout:
        sys.stdout.reconfigure(errors="replace")    # a terminal that knows no UTF-8 still shows the rest
    args = parse_args()
    prompt = read_prompt(args)
    if not (args.interactive or prompt.strip()):            # said before gigabytes are loaded
        raise UserError("the prompt is empty; give some text")
    import_requirements()
    from duoserve import timeline
    from duoserve.checkpoint import Progress, ensure_packed
    from duoserve.engine import Engine
    from duoserve.options import EngineOptions, SamplingParams
    from duoserve.packed import PackedModel
    from duoserve.trace import TraceRecorder, make_directory
    if args.timeline:
        timeline.check(args.timeline)           # before minutes are spent on a run that could not be kept
    chosen = lambda kind: kind(**{field.name: getattr(args, field.name) for field in fields(kind)})
    args.params, options = chosen(SamplingParams), chosen(EngineOptions)            # checked before a conversion
    if args.trace_dir:
        make_directory(args.trace_dir)
    packed = PackedModel(ensure_packed(args.model, WEIGHTS))
    if not args.interactive:
        ids, most = extend(packed.tokenizer(), [], prompt, args.chat), packed.config.max_position_embeddings
        if len(ids) >= min(args.context or most, most):
            raise UserError(f"the prompt has {len(ids)} tokens; shorten it" + (
                f" or raise --context {args.context}" if args.context and args.context < most else "") +
                f" (--context is {most} at most, and an answer needs one)")
        if args.context is None:            # what the KV cache has to hold, as far as the model goes
            options.context = min(most, max(2, len(ids) + args.max_new_tokens))
    engine = Engine(packed, options, progress=Progress)
    if args.trace_dir:
        engine.source.recorder = TraceRecorder(engine.config, engine.context, engine.device)
    if args.timeline:
        timeline.watch(engine)
    if args.interactive:
        converse(engine, prompt, args)
        return 0
    result = answer(engine, ids, args)
    if args.json:
        print(json.dumps(result.asdict()))
    if args.timeline:
        timeline.save(engine, args.timeline)
    return 130 if result.finish_reason == "interrupted" else 0


if __name__ == "__main__":
    run_main(main)
