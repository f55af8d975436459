"""prompt -> text, streamed, or a conversation; the numbers that matter at the end."""

import json
import shlex
import sys
from contextlib import closing, suppress
from dataclasses import fields
from pathlib import Path

from duoserve.errors import (WEIGHTS, Parser, Progress, UserError, format_bytes, import_requirements,
                             reading_text, run_main)


def make_parser() -> Parser:
    parser = Parser(prog="python generate.py", description=__doc__, examples=(
        '--prompt "Once upon a time"', "--model weights/mixtral --gpu-memory 11GiB --chat --interactive"))
    add = parser.add_argument
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", "-p", metavar="TEXT",
                        help="the text to continue; on a terminal it is shown in front of what comes")
    prompt.add_argument("--prompt-file", "-f", metavar="F", help="it from a file, or - for standard input")
    parser.shared("--model -m", "--device", "--compile", "--threads -t", "--gpu-memory", "--host-memory",
                  "--host-threads", "--dtype", "--predictor", "--simulate-link", "--simulate-host", "--json")
    add("--chat", action="store_true",
        help="the prompt is a message to an instruct model: the [INST] template (default: text to continue)")
    add("--interactive", action="store_true",
        help="continue what is typed, and keep what was said: text, or with --chat a conversation. Ctrl-C "
             "stops an answer, an empty line continues it; exit, quit or Ctrl-D leaves (default: one answer)")
    add("--max-new-tokens", "-n", type=int, default=128, metavar="N",
        help="the longest an answer may be (default %(default)s)")
    add("--context", "-c", type=int, metavar="N", help="sizes the KV cache (default: prompt and new tokens; "
        "with --interactive what the model takes, 4096 at most)")
    add("--temperature", type=float, default=0.8, metavar="T", help="0 is greedy (default %(default)s)")
    add("--top-k", type=int, metavar="K", help="sample from the K likeliest tokens (default: from all)")
    add("--top-p", type=float, default=0.95, metavar="P",
        help="and of these from the likeliest that make up P (default %(default)s)")
    add("--seed", type=int, default=0, metavar="S", help="another seed, another text (default %(default)s)")
    add("--cache-experts", type=int, metavar="N",
        help="slots for experts (default: as many as fit; on a CPU a quarter of them)")
    add("--policy", default="duo", metavar="NAME",
        help="duo, on-demand, layer-prefetch, cache, lru, activation, score, combined, or a FILE.py of your "
             "own (default %(default)s)")
    add("--trace-dir", type=Path, metavar="DIR",
        help="record there what the routers do, for train_predictor.py (default: no)")
    add("--timeline", type=Path, metavar="FILE.json|FILE.svg",
        help="the lanes of the run: .json for Perfetto, .svg a picture, beside on-demand (default: none)")
    return parser


def parse_args():
    args, rest = make_parser().parse_known_args()
    if rest:
        words = f"unrecognized arguments: {' '.join(rest)}"
        if args.prompt_file:
            raise UserError(words)
        quoted = shlex.quote(" ".join([*[args.prompt] * (args.prompt is not None), *rest]))
        raise UserError(f"{words}; a prompt is given in quotes: --prompt {quoted}")
    if args.prompt is None and args.prompt_file is None and not args.interactive:
        raise UserError("no prompt: give --prompt or --prompt-file, or type it with --interactive")
    for flag, given in (("--json", args.json), ("--timeline", args.timeline),
                        ("--prompt-file -", args.prompt_file == "-")):
        if args.interactive and given:
            raise UserError(f"{flag}: not together with --interactive; leave out one of them")
    if args.interactive and None in (sys.stdin, sys.stdout):
        raise UserError("--interactive: standard input or output is closed; leave both open")
    return args


def read_prompt(args) -> str | None:
    path = args.prompt_file
    if path is None:
        return args.prompt
    if path == "-" and sys.stdin is None:
        raise UserError("--prompt-file -: standard input is closed")
    with reading_text(f"--prompt-file {path}"):
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        end = b"\r\n" if data.endswith(b"\r\n") else b"\n"         # an editor's
        return data.removesuffix(end).decode()


def extend(tokenizer, before: list[int], text: str, chat: bool) -> list[int]:
    """The ids of what was said `before` (none at first) and of the text, or the message, that comes next."""
    text = text.removeprefix("\ufeff")      # a byte order mark is an editor's
    if not text.strip():
        raise UserError("the prompt is empty; give some text")
    return tokenizer.chat(text, before) if chat else [*before, *tokenizer.encode(text)[bool(before):]]


def answer(engine, ids: list[int], args, before: str = ""):
    """Stream `before` and what comes after `ids`, until Ctrl-C at most -> its `Generation`."""
    show = (lambda *_, **__: None) if args.json else print
    space = " " if args.chat else ""        # in front of an answer: the template's
    engine.result = None
    try:
        with closing(engine.stream(ids, args.params, resume=args.interactive)) as pieces:
            for i, piece in enumerate(pieces):
                show(piece if i else before + piece.removeprefix(space), end="", flush=True)
    except KeyboardInterrupt:
        if engine.result is None:           # before there was anything to show
            raise
    except UserError:
        if engine.result and engine.result.text:
            show(flush=True)                # the error begins on a line of its own
        raise
    show(flush=True)
    result = engine.result
    result.text = result.text.removeprefix(space)
    if args.trace_dir and len(tokens := engine.sequence.kv_tokens) >= result.prompt_tokens:
        engine.source.recorder.save(args.trace_dir, tokens, result.prompt_tokens, engine.packed.fingerprint)
    show(closing_line(result), file=sys.stderr)
    return result


class Conversation:
    """Turn after turn, until the input ends. An error in one is a line; the next may come."""

    def __init__(self, engine, args):
        self.engine, self.args = engine, args
        self.said: list[int] = []           # the tokens of all turns
        self.cut = False                    # the last answer was cut short

    def run(self, line: str | None) -> None:
        """`line` is the first, if it is given."""
        sys.stdin.reconfigure(errors="surrogateescape")             # invalid UTF-8 is an error later
        typed = sys.stdin.isatty()
        hello = "> " if typed and sys.stdout.isatty() else ""
        if typed:
            print("(exit, quit or Ctrl-D leaves; Ctrl-C stops an answer; an empty line continues it)",
                  file=sys.stderr)
        if hello:
            with suppress(ImportError):
                import readline             # noqa: F401 (gives `input` arrow keys and a history)
        while True:
            with suppress(KeyboardInterrupt):                       # one that comes while another is handled
                try:
                    if line is None and (line := input(hello)).strip() in ("exit", "quit"):
                        return
                    self.turn(line)
                except EOFError:
                    print(end="\n" if hello else "")
                    return
                except KeyboardInterrupt:
                    print("\n(exit, quit or Ctrl-D, the end of the input, leaves)", file=sys.stderr)
                except UserError as error:
                    print("error:", *str(error).split(), file=sys.stderr)
            line = None

    def turn(self, line: str) -> None:
        """Answer a line; after an empty one go on with an answer that was cut short."""
        engine, ids = self.engine, self.said
        if line.strip():
            ids = extend(engine.tokenizer, self.said, line, self.args.chat)
            alone = extend(engine.tokenizer, [], line, self.args.chat)
            if len(ids) >= engine.context > len(alone):
                self.start_anew()
                ids = alone
        elif not self.cut:
            return
        result = answer(engine, ids, self.args)
        if result.token_ids or result.finish_reason == "stop":      # else the line is forgotten
            self.said, self.cut = ids + result.token_ids, result.finish_reason != "stop"
        if len(self.said) >= engine.context:
            self.start_anew()

    def start_anew(self) -> None:
        self.said, self.cut = [], False
        context, most = self.engine.context, self.engine.config.max_position_embeddings
        mend = f"a larger --context holds more (up to {most})" if context < most else \
            "this model takes no more"
        print(f"[the context of {context} tokens is full, so this starts anew; {mend}]", file=sys.stderr)


def closing_line(result) -> str:
    s = result.stats
    uses = s.hits + s.prefetched_used + s.misses + s.host_experts
    line = f"{len(result.token_ids)} tokens ({result.finish_reason})"
    line += "" if s.ttft_s is None else f"; first after {s.ttft_s:.2f} s"
    if s.prompt_tokens_kept:
        line += f" ({s.prompt_tokens_kept} of {result.prompt_tokens} prompt tokens kept)"
    line += f", {1 / s.tpot_s:.1f} tokens/s" if s.tpot_s else ""
    if uses and s.link_busy_fraction:
        line += f", {100 * s.in_time / uses:.0f} % of experts were there in time"
    return (f"[{line}; {s.cache_experts} slots, {format_bytes(s.peak_device_bytes)} at peak; "
            f"{what_bounded(s)}]")


def what_bounded(s) -> str:
    """What bounded the speed of a request, in words, and what would help."""
    busy = f"the link was busy {100 * s.link_busy_fraction:.0f} % of the time"
    if s.host_experts or s.split_experts:
        busy += f", the host {100 * s.host_busy_fraction:.0f} %"
    elif s.host_unused:
        busy += f" (the host computed nothing: {s.host_unused})"
    disk = "; some experts came from the disk: more --host-memory would help" if s.bytes_from_disk else ""
    if not s.bytes_moved and not s.host_experts:
        return "every expert needed was there: computing set the speed, not the link"
    if not s.link_busy_fraction:
        return "no link to wait for here: computing set the speed"
    if s.link_busy_fraction < 0.5:
        return f"{busy}: computing set the speed" + (disk and f", or the disk{disk}")
    mend = "--policy duo" if s.policy == "on-demand" else "more --gpu-memory"      # on-demand keeps nothing
    if s.link_busy_fraction >= 0.8:
        return f"{busy}: {mend} is what would help{disk}"
    return f"{busy}, computing took the rest: {mend} would help some{disk}"


def encode_prompt(packed, prompt: str, args, options) -> list[int]:
    """The prompt's ids; sets the context to what they and the answer need, unless --context was given."""
    ids, most = extend(packed.tokenizer(), [], prompt, args.chat), packed.config.max_position_embeddings
    if len(ids) >= min(args.context or most, most):
        larger = f" or raise --context {args.context}" if args.context and args.context < most else ""
        raise UserError(f"the prompt has {len(ids)} tokens; shorten it{larger} (--context is {most} at most, "
                        "and an answer needs room for one)")
    if args.context is None:
        options.context = min(most, max(2, len(ids) + args.max_new_tokens))
    return ids


def main() -> int:
    if sys.stdout:
        sys.stdout.reconfigure(errors="replace")                    # a terminal without UTF-8 shows the rest
    args = parse_args()
    prompt = read_prompt(args)
    if not (args.interactive or prompt.strip()):                    # before gigabytes are loaded
        raise UserError("the prompt is empty; give some text")
    import_requirements()
    from duoserve import timeline
    from duoserve.checkpoint import ensure_packed
    from duoserve.engine import Engine
    from duoserve.options import EngineOptions, SamplingParams
    from duoserve.packed import PackedModel
    from duoserve.trace import TraceRecorder, make_directory
    if args.timeline:
        timeline.check(args.timeline)       # before minutes are spent
    chosen = lambda kind: kind(**{field.name: getattr(args, field.name) for field in fields(kind)})
    args.params, options = chosen(SamplingParams), chosen(EngineOptions)
    if args.trace_dir:
        make_directory(args.trace_dir)
    packed = PackedModel(ensure_packed(args.model, WEIGHTS))
    ids = None if args.interactive else encode_prompt(packed, prompt, args, options)
    engine = Engine(packed, options, progress=Progress)
    if args.trace_dir:
        engine.source.recorder = TraceRecorder(engine.config, engine.context, engine.device)
    if args.timeline:
        timeline.watch(engine)
    if args.interactive:
        Conversation(engine, args).run(prompt)
        return 0
    shown = sys.stdout and sys.stdout.isatty() and not args.chat     # the text that is continued
    result = answer(engine, ids, args, prompt if shown else "")
    if args.json:
        print(json.dumps(result.asdict()))
    if args.timeline:
        timeline.draw(engine, args.timeline, ids, args.params)
    return 130 if result.finish_reason == "interrupted" else 0


if __name__ == "__main__":
    run_main(main)
