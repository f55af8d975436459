"""The engine ties it together: load, prefill, decode, sample, count.

What a token passes through: `Engine.stream` runs the model; the model asks `StreamedExperts` for each layer's experts;
that reads the router's choice, tells the scheduler, and yields slots as the scheduler finds them ready.
"""

import os
import sys
import time
import weakref
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Iterator

import torch
from torch import Tensor

from .cache import Counts, GPUExpertCache
from .config import MixtralConfig
from .errors import (UserError, as_ids, check_budget, check_context, check_device, check_dtype, check_sampling, human,
                     parse_amount, parse_rate, unknown)
from .link import CudaLane, LinkError, SimulatedLane, WallClock, chunk_size
from .memory import LOGIT_ROWS, plan_memory
from .model import Expert, Mixtral, pack_routing, padded
from .history import History, Routing
from .packed import PackedModel
from .policies import POLICIES, schedulers
from .predictor import Forecast, Predictor, check_exists
from .quant import PackedLinear
from .step import DecodeStep
from .store import ExpertStore, choose_kept, usable_cpus
from .tokenizer import TextStream
from .trace import TraceRecorder

SMALL_MATRIX = 2**22                        # weights; on one thread a row takes about 4 ms
MOST_THREADS = 1024
TORCH_THREADS = torch.get_num_threads()     # what it takes if it is not told


@dataclass
class Stats:
    """One request's numbers. Seconds and bytes; the accesses are those of decode (`cache.Counts`)."""

    load_s: float
    ttft_s: float | None                    # None if interrupted before
    tpot_s: float | None                    # None for a single token
    policy: str
    cache_experts: int
    hits: int
    misses: int
    prefetched: int
    prefetched_used: int
    in_time: int                            # of hits and used prefetches: all of it had arrived when the router spoke
    bytes_moved: int
    peak_device_bytes: int
    link_busy_fraction: float
    bytes_from_disk: int                    # of those moved (with --host-memory)
    prompt_tokens_kept: int                 # whose keys and values were there from the request before: not prefilled


@dataclass
class Generation:
    """What a request gave: `token_ids` are the new tokens only, without the EOS; `finish_reason` is 'stop' (EOS),
    'length' or 'interrupted'."""

    text: str
    token_ids: list[int]
    prompt_tokens: int
    finish_reason: str
    stats: Stats

    def asdict(self) -> dict:
        return {"text": self.text, "token_ids": self.token_ids, "prompt_tokens": self.prompt_tokens,
                "new_tokens": len(self.token_ids), "finish_reason": self.finish_reason, "stats": asdict(self.stats)}


def check_options(*, device=None, dtype=None, policy="duo", cache_experts=None, gpu_memory=None, host_memory=None,
                  predictor=None, threads=None, simulate_link=None, **_) -> tuple[torch.device, torch.dtype, float | None]:
    """What can be said of `Engine`'s options without the model -> device, dtype, speed of the simulated link."""
    if policy not in POLICIES:
        raise unknown("--policy", policy, POLICIES)
    device = check_device(device)
    dtype = check_dtype(dtype, device)
    if cache_experts is not None and cache_experts < 2:
        raise UserError(f"--cache-experts {cache_experts}: two is the least that works")
    if threads is not None and not (isinstance(threads, int) and 1 <= threads <= MOST_THREADS):
        raise UserError(f"--threads {threads}: a whole number from 1 to {MOST_THREADS}")
    for flag, amount in (("--gpu-memory", gpu_memory), ("--host-memory", host_memory)):
        if amount is not None:
            parse_amount(amount, 10**12, flag)
    if predictor not in (None, "none"):
        check_exists(predictor)
    if isinstance(simulate_link, str):
        simulate_link = parse_rate(simulate_link, "--simulate-link")
    if simulate_link is not None and not 1e3 <= simulate_link < 1e15:
        raise UserError(f"--simulate-link {simulate_link}: not a speed; write it like 25GB/s")
    return device, dtype, simulate_link


def set_threads(threads: int | None, config: MixtralConfig) -> None:
    """How many threads torch computes with on the CPU; for None as many as gain something.

    A product of one row with a small matrix is over before a second thread has been woken. `OMP_NUM_THREADS` is obeyed.
    """
    if threads is None and "OMP_NUM_THREADS" not in os.environ:
        small = 2 * config.intermediate_size * config.hidden_size < SMALL_MATRIX
        threads = 1 if small else min(usable_cpus(), TORCH_THREADS)
    if threads and threads != torch.get_num_threads():
        torch.set_num_threads(threads)


def can_compile(device: torch.device) -> bool:
    """Compile and run one line; where that fails (no compiler, no Triton) say so once and go on eager."""
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device))
        return True
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        print(f"note: torch.compile does not work here ({reason[0][:100]}); going on without it", file=sys.stderr)
        return False


@contextmanager
def enough_memory():
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError("the GPU is out of memory; leave more free with a smaller --gpu-memory") from error


def in_common(a: list[int], b: list[int]) -> int:
    """How many tokens two sequences have in common, from their start."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def sample(logits: Tensor, temperature: float, top_k: int | None, top_p: float, generator: torch.Generator) -> Tensor:
    """logits [vocab] fp32 -> one token id, on the same device; -1 if they are not finite. Temperature 0 is greedy."""
    finite = logits.isfinite().all()
    if temperature == 0:
        return torch.where(finite, logits.argmax(), -1)
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, len(logits))).values[-1], -torch.inf)
    ranked, ids = ((logits - logits.max()) / temperature).sort(descending=True, stable=True)
    p = ranked.softmax(-1)
    if top_p < 1:                           # keep the smallest set that reaches top_p, added up in whole numbers:
        parts = (p * 2**40).long()          # a GPU adds in no fixed order, and the same seed gives the same text
        p[parts.cumsum(-1) - parts >= top_p * 2**40] = 0
    token = ids.gather(0, torch.multinomial(p.nan_to_num(1.0), 1, generator=generator))   # (NaN would end the process)
    return torch.where(finite, token, -1)


class Request:
    """One that holds the engine."""


class StreamedExperts:
    """The model's `ExpertSource`: between its tensors and the scheduler's plain ints."""

    def __init__(self, slots: list[Expert], cache: GPUExpertCache, top_k: int):
        self.slots, self.cache, self.lane, self.top_k = slots, cache, cache.lane, top_k
        self.recorder: TraceRecorder | None = None
        self.spans: list | None = None      # (name, layer, start mark, end mark), for the timeline

    def begin(self, scheduler, history: History, start: int, tokens: int) -> None:
        """Before each pass: who schedules it, and which positions it covers."""
        self.scheduler, self.history, self.rows = scheduler, history, slice(start, start + tokens)

    def begin_step(self, lookahead: Tensor) -> None:
        self._record("lookahead", 0, lookahead)
        decoding = self.cache.decoding
        self.scheduler.begin_step(self.lane.read(lookahead[-1].float()) if decoding else None)

    def begin_layer(self, layer: int) -> None:
        if self.spans is not None:
            self.mark = self.lane.mark()
        self.scheduler.begin_layer(layer)

    def read(self, layer, logits, ids, weights, lookahead) -> Routing:
        self._record("router", layer, logits)
        if lookahead is not None:
            self._record("lookahead", layer + 1, lookahead)
        return self._hear(layer, pack_routing(logits, ids, weights, lookahead))

    def hear(self, layer: int, numbers: Tensor) -> Routing:
        """One token's routing, packed on the device: what `DecodeStep` has instead of `read`."""
        if self.recorder is not None:
            logits, *ahead = numbers[self.history.experts + 2 * self.top_k:].split(self.history.experts)
            self._record("router", layer, logits)
            for row in ahead:
                self._record("lookahead", layer + 1, row)
        return self._hear(layer, numbers)

    def _hear(self, layer: int, numbers: Tensor) -> Routing:
        routing = self._routing(layer, numbers)
        self._span("attention", layer)
        self.history.observe(layer, routing)
        return routing

    def _routing(self, layer: int, numbers: Tensor) -> Routing:
        return Routing.unpack(self.lane.read(numbers), self.history.experts, self.top_k)

    def ready(self, layer: int, routing: Routing) -> Iterator[tuple[int, int]]:
        """(expert, slot) of every expert with a token, as the scheduler has it ready."""
        with closing(self.scheduler.experts(layer, routing)) as ready:
            for e, slot in ready:
                if self.spans is not None:
                    self.mark = self.lane.mark()
                yield e, slot
                self._span(f"expert {e}", layer)

    def experts(self, layer: int, routing: Routing) -> Iterator[tuple[int, Expert]]:
        with closing(self.ready(layer, routing)) as ready:
            for e, slot in ready:
                yield e, self.slots[slot]

    def end_layer(self, layer: int) -> None:
        self.scheduler.end_layer(layer)

    def _span(self, name: str, layer: int) -> None:
        if self.spans is not None:
            self.spans.append((name, layer, self.mark, self.lane.mark()))

    def _record(self, kind: str, layer: int, rows: Tensor) -> None:
        if self.recorder is not None:
            getattr(self.recorder, kind)[self.rows, layer] = rows.to(torch.float16)


class Engine:
    """A loaded model. One request at a time; the cache stays warm between requests."""

    result: Generation | None = None        # of the last `stream` or `generate`, also if it was interrupted
    load_s = 0.0
    written = 0                             # positions of the KV cache that hold anything
    passed: list[int] = []                  # the tokens whose keys and values are in the KV cache, from position 0

    @classmethod
    def from_pretrained(cls, directory: str | Path, **options) -> "Engine":
        """Load a packed directory, or a Hugging Face one (converted once, into `weights/`); options as in `Engine`."""
        from .checkpoint import ensure_packed
        check_options(**options)            # before a conversion that takes its time
        beside = Path(__file__).resolve().parents[1] / "weights"
        return cls(PackedModel(ensure_packed(Path(directory), beside)), **options)

    def __init__(self, packed: PackedModel, *, device: str | torch.device | None = None,
                 dtype: torch.dtype | str | None = None, policy: str = "duo", cache_experts: int | None = None,
                 gpu_memory: int | str | None = None, host_memory: int | str | None = None, context: int | None = None,
                 predictor: str | Path | None = None, threads: int | None = None,
                 simulate_link: float | str | None = None, compile: bool | None = None, progress=None,
                 store: ExpertStore | None = None):
        """A model that is open already.

        `gpu_memory`: bytes, '4GiB' or '15%' of the packed model; `host_memory`: likewise, for the experts used most,
        the others being read from the disk (None: all are kept); `context`: prompt and new tokens, at most the model's;
        `predictor`: a file, 'none', or None for the model's own; `threads`: of torch in this process, for what is computed
        on the CPU (None: as many as gain something); `simulate_link`: bytes a second, or '25GB/s';
        `progress(total, label)`: makes a progress display; `store`: a former engine's, of the same model. Raises
        `UserError` for whatever a user can mend.
        """
        began = time.perf_counter()
        self.claims: list[weakref.ref] = []                         # the request that holds the engine, and who asks
        device, dtype, simulate_link = check_options(
            device=device, dtype=dtype, policy=policy, cache_experts=cache_experts, gpu_memory=gpu_memory,
            host_memory=host_memory, predictor=predictor, threads=threads, simulate_link=simulate_link)
        set_threads(threads, packed.config)
        if device.type == "cuda":           # events are recorded on the current device's streams
            torch.cuda.set_device(device)
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8")    # 8 MiB a stream, not Hopper's 32
            os.environ.setdefault("CUBLASLT_WORKSPACE_SIZE", "8192")            # (in KiB)
        self.device, self.dtype, self.packed, self.config, self.policy = device, dtype, packed, packed.config, policy
        c = packed.config
        limit = c.max_position_embeddings
        if context is not None:
            check_context(context, limit)
        self.context = context or min(limit, 4096)
        total = c.num_hidden_layers * c.num_local_experts
        if cache_experts is not None and cache_experts > total:
            print(f"note: --cache-experts {cache_experts} is more than the model's {total} experts; using {total}",
                  file=sys.stderr)
            cache_experts = total
        if cache_experts is None and gpu_memory is None and device.type == "cpu":
            cache_experts = max(2, total // 4)
        compiled = (device.type == "cuda" if compile is None else compile) and can_compile(device)
        budget = check_budget(gpu_memory, packed.nbytes, device, cache_experts)
        host_bytes = None if host_memory is None else parse_amount(host_memory, packed.nbytes, "--host-memory")
        self.plan = plan_memory(packed, dtype, self.context, compiled, device.type == "cuda", budget, cache_experts)
        if device.type == "cuda" and self.plan.total > (free := torch.cuda.mem_get_info(device)[0]):
            raise UserError(f"--gpu-memory: {human(self.plan.total)} are planned and {human(free)} are free on "
                            f"{device}; ask for less (--gpu-memory, --cache-experts or --context)")
        self.tokenizer = packed.tokenizer()
        self.tokenizer.check(c.vocab_size)
        self.predictor = self._load_predictor(predictor)
        kept = [] if store else choose_kept(packed, host_bytes, self.predictor and self.predictor.popularity(),
                                            self.plan.total if device.type == "cpu" else 0)
        if host_bytes is not None and not store:
            rest = "; the others are read from the disk" if len(kept) < total else ""
            print(f"note: {len(kept)} of {total} experts are kept in memory{rest}", file=sys.stderr)

        with enough_memory():
            self._load(kept, compiled, simulate_link, progress, store)
        self.load_s = time.perf_counter() - began

    def _load(self, kept, compiled: bool, simulate_link: float | None, progress, store: ExpertStore | None) -> None:
        """Take all that the device will hold, once, the largest first; read the experts in memory; compile."""
        c, packed, device, dtype = self.config, self.packed, self.device, self.dtype
        experts = torch.empty(self.plan.slots, packed.layout.nbytes, dtype=torch.uint8, device=device)
        self.slots_memory = experts
        self.kv = torch.zeros(c.num_hidden_layers, 2, c.num_key_value_heads, padded(self.context), c.head_dim,
                              dtype=dtype, device=device)
        linear = partial(PackedLinear, largest_group=packed.largest_group, compile=compiled)
        with torch.device("meta"):
            self.model = Mixtral(c, linear)
            slots = [Expert(c, linear) for _ in range(self.plan.slots)]
        state = {name: tensor.to(device, dtype if packed.shapes[name][0] == "16" else None)
                 for name, tensor in packed.resident().items()}
        if c.tie_word_embeddings:
            state["head.weight"] = state["embed.weight"]
        self.model.load_state_dict(state, assign=True)
        self.model.requires_grad_(False)
        for slot, block in zip(slots, experts):
            packed.layout.bind(slot, block)
        bar = progress(len(kept) * packed.layout.nbytes, "loading") if progress else None
        self.store = store or ExpertStore(packed, kept, pin=device.type == "cuda", progress=bar)
        if bar:
            bar.close()
        chunk = chunk_size(packed.layout.nbytes)
        copy = self.store.copier(experts, chunk)
        lane = CudaLane(device, chunk, self.plan.slots, copy) if device.type == "cuda" and not simulate_link else \
            SimulatedLane(WallClock(), simulate_link or 0, chunk, copy)
        self.cache = GPUExpertCache(self.plan.slots, packed.layout.nbytes, lane)
        self.source = StreamedExperts(slots, self.cache, c.num_experts_per_tok)
        with torch.inference_mode():
            self.step = DecodeStep(self.model, slots, self.kv, compiled)
            if self.step.capturing:         # what a prompt unpacks lies at fixed addresses too
                matrices = [m for owner in (self.model, *slots) for m in owner.modules() if isinstance(m, PackedLinear)]
                largest = max(2 * m.q[m.parts()[0]].numel() for m in matrices)
                workspace = torch.empty(largest, dtype=dtype, device=device)
                for matrix in matrices:
                    matrix.capture(workspace, self.step.capture)
            if compiled:                    # compiling counts as loading, never as time to first token
                self._warm_up(slots[0])

    def _warm_up(self, expert: Expert) -> None:
        """Run once what a prompt runs: each matrix by one row and by several; then a prompt, its sampling, and a step."""
        c, attention = self.config, self.model.layers[0].attention
        for rows in (1, 2):
            for module, columns in ((expert, c.hidden_size), (attention.qkv, c.hidden_size),
                                    (attention.o, c.num_attention_heads * c.head_dim)):
                module(torch.zeros(rows, columns, dtype=self.dtype, device=self.device))
        prompt = [c.bos_token_id] * min(8, self.context - 1)
        self.generate(prompt, max_new_tokens=1)
        self._decode(torch.tensor(prompt[:1], device=self.device), len(prompt))     # (whatever the sample said)
        self.cache.plan([])
        self.cache.lane.finish()
        self.passed = []                    # (nobody recorded it)

    def _load_predictor(self, named: str | Path | None) -> Predictor | None:
        path = self.packed.directory / "predictor.safetensors" if named is None else named
        if path == "none":
            return None
        if named is None and not path.exists():
            if self.policy == "duo":
                print(f"note: no {path}; predicting by lookahead alone (train_predictor.py makes one)",
                      file=sys.stderr)
            return None
        c = self.config
        return Predictor.read(path, self.packed.fingerprint, c.num_hidden_layers, c.num_local_experts)

    def _begin(self, tokens: int, kept: int = 0) -> None:
        """A new request, `tokens` to prefill after `kept` of the one before: fresh counts; the cache keeps its experts.

        The history goes on where all of the one before is kept, and is a new one otherwise.
        """
        c = self.config
        if not 0 < kept == len(self.passed):
            self.history = History(c.num_hidden_layers, c.num_local_experts)
        self.passed = self.passed[:kept]    # what follows will be overwritten (said first: an interruption may follow)
        self.cache.abandon()                # (what an interruption may have left)
        self.kv[:, :, :, kept:self.written].zero_()                 # masked is times zero, which NaN comes through
        self.written = kept
        forecast = Forecast(self.history, self.predictor, c.num_experts_per_tok)
        self.cache.counts, self.cache.decoding = Counts(), False
        self.cache.lane.busy, self.read_before = 0.0, self.store.bytes_read
        self.scheduler, self.make_decode_scheduler = schedulers(self.policy, self.cache, self.history, tokens, forecast)

    @contextmanager
    def _running(self, position: int, tokens: int):
        """Around each pass, over these positions. After any failure the engine can be used again."""
        self.written = max(self.written, position + tokens)
        try:
            self.source.begin(self.scheduler, self.history, position, tokens)
            with enough_memory():
                yield
        except BaseException as error:
            self.cache.abandon()
            self.history = History(self.history.layers, self.history.experts)       # this pass is in it, half of it
            if isinstance(error, LinkError):
                raise UserError(f"an expert could not be copied to {self.device} ({error}); the request is dropped, "
                                "the engine can be used again") from error
            raise

    def _prefill(self, tokens: Tensor, start: int) -> Tensor:
        """tokens [T] at positions start.. -> logits [vocab] of the next."""
        with self._running(start, len(tokens)):
            return self.model.head(self.model(tokens[None], self.source, self.kv, start)[0, -1:])[0].float()

    def _decode(self, token: Tensor, position: int) -> Tensor:
        """token [1] at `position` -> logits [vocab] of the next."""
        with self._running(position, 1):
            return self.step(token, position, self.source)

    @contextmanager
    def _held(self):
        """The engine is this request's alone, from here to the end of the `with`; another one meanwhile is refused.

        A request whose frames are gone holds nothing, however it ended (a second Ctrl-C may come at any line): so the
        claims are weak references. Appending is atomic: of two threads one is the first.
        """
        request = Request()
        claim = weakref.ref(request)
        self.claims.append(claim)
        try:
            if next(other for other in self.claims if other() is not None) is not claim:
                raise UserError("the engine is busy with another request: finish it or close its stream first "
                                "(or load another Engine)")
            yield
        finally:
            self.claims.remove(claim)

    @torch.inference_mode()
    def logits(self, token_ids: list[int]) -> Tensor:
        """Teacher-forced through the prefill path, ids taken as they are -> float32 [tokens, vocab] on the host."""
        ids = self._check_ids(as_ids(token_ids, "`logits` takes a list of token ids"), self.context)
        with self._held():
            self._begin(len(ids))
            try:
                with self._running(0, len(ids)):
                    hidden = self.model(ids[None], self.source, self.kv)[0]
                    return torch.cat([self.model.head(rows).float().cpu() for rows in hidden.split(LOGIT_ROWS)])
            finally:
                self.cache.plan([])
                self.cache.lane.finish()

    def generate(self, prompt: str | list[int], **options) -> Generation:
        """As `stream`, all at once."""
        with closing(self.stream(prompt, **options)) as pieces:
            for _ in pieces:
                pass
        return self.result

    @torch.inference_mode()
    def stream(self, prompt: str | list[int], *, max_new_tokens: int = 128, temperature: float = 0.8,
               top_k: int | None = None, top_p: float = 0.95, seed: int = 0, resume: bool = False) -> Iterator[str]:
        """Yields pieces of text as they are certain; `engine.result` is the `Generation` so far, also if interrupted.

        Text gets BOS, ids are taken as they are. Stops at EOS, at `max_new_tokens`, or where the context is full.
        With `resume` the prompt, a whole conversation, is prefilled only from where it differs from the request before.
        From its first piece to its end the stream holds the engine: finish it, or `close()` it (a `for` loop that is
        left does so). Raises `UserError` for a bad prompt or option, and if the engine is held by another request.
        """
        began = last = time.perf_counter()
        check_sampling(max_new_tokens, temperature, top_k, top_p, seed)
        if isinstance(prompt, str) and not prompt.strip():
            raise UserError("the prompt is empty; give some text")
        prompt_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else \
            as_ids(prompt, "the prompt must be text or a list of token ids")
        ids = self._check_ids(prompt_ids, self.context - 1)
        with self._held():
            self.result = None
            n, generator = len(ids), torch.Generator(self.device).manual_seed(int(seed))
            kept = in_common(self.passed, prompt_ids[:-1]) if resume else 0         # (one token at least must pass)
            self._begin(n - kept, kept)
            out, text, piece, reason, position = [], "", TextStream(self.tokenizer), "interrupted", kept
            first = None

            def result() -> Generation:
                wall, counts = max(last - began, (first or began) - began, 1e-9), self.cache.counts
                tpot = (last - first) / (len(out) - 1) if len(out) > 1 else None
                return Generation(text, out, n, reason, Stats(
                    self.load_s, first and first - began, tpot, self.policy, self.plan.slots, counts.hits,
                    counts.misses, counts.prefetched, counts.prefetched_used, counts.in_time, counts.bytes_moved,
                    self.peak_bytes(), min(1.0, self.cache.lane.busy / wall), self.store.bytes_read - self.read_before,
                    kept))

            try:
                logits = self._prefill(ids[kept:], kept)
                position = n
                self.cache.decoding, self.scheduler = True, self.make_decode_scheduler()
                while True:                 # (what prefill left is decode's)
                    token = sample(logits, temperature, top_k, top_p, generator).view(1)
                    tid = int(self.cache.lane.read(token.float())[0])       # exact: ids stay below 2^24
                    now = time.perf_counter()
                    first = now if position == n else first
                    if tid < 0:
                        raise UserError(f"the model's logits are not finite in "
                                        f"{str(self.dtype).removeprefix('torch.')}; use --dtype bfloat16 or float32, "
                                        "or convert the model again")
                    if tid in self.tokenizer.eos:
                        reason = "stop"
                        break
                    last = now
                    out.append(tid)
                    if new := piece.push(tid):
                        text += new
                        yield new
                    if len(out) >= max_new_tokens or n + len(out) >= self.context:
                        reason = "length"
                        break
                    logits = self._decode(token, position)
                    position += 1
                if new := piece.close():
                    text += new
                    yield new
            finally:                        # also when the consumer stops early, or on Ctrl-C
                try:
                    self.cache.plan([])
                    self.cache.lane.finish()
                finally:                    # (a second Ctrl-C)
                    self.passed = (prompt_ids + out)[:position]             # what went through the model, for traces
                    self.result = result()

    def peak_bytes(self) -> int:
        """The most device memory ever held: reserved by torch on CUDA, by the plan on the CPU."""
        return torch.cuda.max_memory_reserved(self.device) if self.device.type == "cuda" else self.plan.total

    def _check_ids(self, ids: list[int], most: int) -> Tensor:
        if not ids:
            raise UserError("the prompt is empty; give at least one token")
        if len(ids) > most:
            raise UserError(f"the prompt has {len(ids)} tokens and --context {self.context} leaves room for {most}; "
                            f"shorten it or raise --context (this model takes {self.config.max_position_embeddings})")
        bad = next((i for i in ids if not 0 <= i < self.config.vocab_size), None)
        if bad is not None:
            raise UserError(f"token id {bad} is outside the vocabulary of {self.config.vocab_size}")
        return torch.tensor(ids, device=self.device)
