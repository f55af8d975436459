"""prompt -> text, streamed; the numbers that matter at the end."""

import json
import sys
from pathlib import Path

from duoserve.errors import Parser, UserError, check_sampling, human, run_main

WEIGHTS = Path(__file__).resolve().parent / "weights"


def parse_args():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT")
    prompt.add_argument("--prompt-file", metavar="F", help="a file, or - for standard input")
    add("--model", default=str(WEIGHTS / "demo"), help="a packed or Hugging Face directory (default: weights/demo)")
    add("--max-new-tokens", type=int, default=128, metavar="N")
    add("--context", type=int, metavar="N", help="sizes the KV cache (default: prompt and new tokens)")
    add("--temperature", type=float, default=0.8, metavar="T", help="0 is greedy")
    add("--top-k", type=int, metavar="K")
    add("--top-p", type=float, default=0.95, metavar="P")
    add("--seed", type=int, default=0)
    add("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    add("--dtype", help="float32, bfloat16 or float16 (default: float32 on the CPU, bfloat16 on CUDA)")
    add("--compile", action="store_true", default=None, help="torch.compile the kernels (default on CUDA)")
    add("--no-compile", dest="compile", action="store_false")
    add("--gpu-memory", metavar="SIZE|PERCENT",
        help="bounds what torch reserves; the CUDA context (about 0.5 GB) comes on top")
    add("--cache-experts", type=int, metavar="N", help="slots for experts, instead of by memory")
    add("--host-memory", metavar="SIZE|PERCENT",
        help="keep the most used experts in this much of it and read the others from the disk (default: keep all)")
    add("--policy", default="duo", help="duo, on-demand, layer-prefetch, cache, lru or activation")
    add("--predictor", metavar="FILE|none")
    add("--simulate-link", metavar="SIZE/s", help="a link of this speed where there is no GPU: 25GB/s")
    add("--trace-dir", type=Path, help="record what the routers do, for train_predictor.py")
    add("--timeline", type=Path, metavar="FILE.json|FILE.svg",
        help="both lanes of the run: .json for Perfetto, .svg a picture")
    add("--json", action="store_true", help="one JSON object on standard output")
    return parser.parse_args()


def read_prompt(args) -> str:
    if args.prompt is not None:
        return args.prompt
    try:
        if args.prompt_file == "-" and sys.stdin is None:
            raise UserError("--prompt-file -: standard input is closed")
        data = sys.stdin.buffer.read() if args.prompt_file == "-" else Path(args.prompt_file).read_bytes()
        return data.decode()
    except OSError as error:
        raise UserError(f"--prompt-file {args.prompt_file}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"--prompt-file {args.prompt_file}: is not UTF-8 text") from None


def needed_context(directory: Path, prompt: str, new_tokens: int) -> int:
    """Prompt and new tokens, as far as the model goes: what the KV cache has to hold. `UserError` if it cannot be."""
    from duoserve.config import MixtralConfig
    from duoserve.tokenizer import Tokenizer
    c = MixtralConfig.read(directory)
    tokens = len(Tokenizer(directory / "tokenizer.model", c.bos_token_id, c.eos_token_ids).encode(prompt))
    if tokens >= c.max_position_embeddings:     # said here, before gigabytes are loaded
        raise UserError(f"the prompt has {tokens} tokens; shorten it (--context is {c.max_position_embeddings} at most, "
                        "and an answer needs one)")
    return min(c.max_position_embeddings, max(2, tokens + new_tokens))


def closing_line(result) -> str:
    s = result.stats
    speed = f", {1 / s.tpot_s:.1f} tokens/s" if s.tpot_s else ""
    uses = s.hits + s.prefetched_used + s.misses
    found = f", {100 * (s.hits + s.prefetched_used) / uses:.0f} % of experts were there in time" if uses else ""
    link = f", link busy {100 * s.link_busy_fraction:.0f} %" if s.link_busy_fraction else ""
    first = "" if s.ttft_s is None else f"; first after {s.ttft_s:.2f} s"
    return (f"[{len(result.token_ids)} tokens ({result.finish_reason}){first}{speed}{found}; "
            f"{s.cache_experts} slots, {human(s.peak_device_bytes)} at peak{link}]")


def main() -> int:
    if sys.stdout:
        sys.stdout.reconfigure(errors="replace")    # a terminal that knows no UTF-8 still shows the rest
    args = parse_args()
    prompt = read_prompt(args)
    if not prompt.strip():                      # before gigabytes are loaded
        raise UserError("the prompt is empty; give some text")
    from duoserve import timeline
    from duoserve.checkpoint import Progress, ensure_packed
    from duoserve.engine import Engine
    from duoserve.trace import TraceRecorder, make_directory
    if args.timeline:
        timeline.check(args.timeline)           # before minutes are spent on a run that could not be kept
    check_sampling(args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.seed)
    if args.trace_dir:
        make_directory(args.trace_dir)
    directory = ensure_packed(args.model, WEIGHTS)
    if args.context is None:
        args.context = needed_context(directory, prompt, args.max_new_tokens)
    engine = Engine.from_pretrained(
        directory, device=args.device, dtype=args.dtype, policy=args.policy, cache_experts=args.cache_experts,
        gpu_memory=args.gpu_memory, host_memory=args.host_memory, context=args.context, predictor=args.predictor,
        simulate_link=args.simulate_link, compile=args.compile, progress=Progress)
    if args.trace_dir:
        c = engine.config
        engine.source.recorder = TraceRecorder(engine.context, c.num_hidden_layers, c.num_local_experts, engine.device)
    if args.timeline:
        timeline.watch(engine)
    status = 0
    try:
        for piece in engine.stream(prompt, max_new_tokens=args.max_new_tokens, temperature=args.temperature,
                                   top_k=args.top_k, top_p=args.top_p, seed=args.seed):
            if not args.json:
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        status = 130
        if engine.result is None:           # before there was anything to show
            raise
    result = engine.result
    if args.trace_dir and result.token_ids:
        engine.source.recorder.save(args.trace_dir, engine.passed, result.prompt_tokens, engine.packed.fingerprint)
    if args.json:
        print(json.dumps(result.asdict()))
    else:
        print(flush=True)
        print(closing_line(result), file=sys.stderr)
    if args.timeline:
        timeline.save(engine, args.timeline)
    return status


if __name__ == "__main__":
    run_main(main)
