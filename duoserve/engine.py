"""The engine ties it together: load, prefill, decode, sample, count.

What a token passes through: `Engine.stream` runs the model; the model asks `StreamedExperts` for each layer's
experts; that reads the router's choice, tells the scheduler, and yields slots as the scheduler finds them
ready.
"""

import time
import weakref
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Iterator

import torch
from torch import Tensor

from .cache import Counts
from .errors import WEIGHTS, UserError
from .history import History
from .host import HostError
from .link import LinkError
from .loading import LoadedModel, same_bits
from .machine import enough_memory
from .memory import LOGIT_ROWS
from .model import rope_table
from .options import EngineOptions, SamplingParams, as_ids, check_ids
from .packed import PackedModel
from .policies import schedulers
from .predictor import Forecast
from .results import Generation, result_of
from .sampling import sample
from .store import ExpertStore
from .tokenizer import TextStream


@dataclass(eq=False)
class Sequence:
    """One request: what was asked, what has come of it, and when (in seconds of `time.perf_counter`)."""

    prompt: list[int]
    kept: int                               # tokens of it whose keys and values were there before
    position: int                           # tokens whose keys and values are in the KV cache
    history: History
    arrived: float
    bytes_read: int                         # from the disk, before it began
    new: list[int] = field(default_factory=list)
    text: str = ""
    first: float | None = None              # when the first token came
    last: float | None = None
    finish_reason: str = "interrupted"      # until it ends in another way
    schedulers: tuple = ()                  # of prefill and of decode
    prefill: Counts = field(default_factory=Counts)
    decode: Counts = field(default_factory=Counts)

    @property
    def kv_tokens(self) -> list[int]:
        return (self.prompt + self.new)[:self.position]


class Claim:
    """A request's, to an engine."""


def common_prefix_len(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


class Engine(LoadedModel):
    """A loaded model. One request at a time; the cache stays warm between requests. `result` is the last
    request's. Its tensors are of inference mode: whoever changes one does so in `torch.inference_mode()`."""

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, progress=None, **options) -> "Engine":
        """Load a packed directory, or a Hugging Face one (converted once, into `weights/`); see
        `EngineOptions`."""
        from .checkpoint import ensure_packed
        chosen = EngineOptions(**options)   # checked before a conversion that takes its time
        return cls(PackedModel(ensure_packed(directory, WEIGHTS)), chosen, progress=progress)

    def __init__(self, packed: PackedModel, options: EngineOptions, *, progress=None,
                 store: ExpertStore | None = None):
        """A model that is open already. `progress(total, label)` makes a progress display; `store`: a former
        engine's, of the same model. Raises `UserError` for whatever a user can mend."""
        began = time.perf_counter()
        self.claims: list[weakref.ref] = [] # the request that holds the engine first, then who asks
        self.sequence: Sequence | None = None                       # the request under way, or the last one
        self.result: Generation | None = None
        self.kv_written = 0                 # positions of the KV cache that hold anything
        self.load_s = 0.0
        super().__init__(packed, options, progress, store)
        self.load_s = time.perf_counter() - began

    def _warm_up(self) -> None:
        """Run once what a prompt runs, so that what the first time takes (threads, libraries, compiling)
        counts as loading, never as time to first token: a layer's attention and an expert, with one row and
        with several; and what is compiled: a prompt, its sampling, and a step."""
        c, layer, compiled = self.config, self.model.layers[0], self.compiled
        for rows in (1, 2) * (2 if compiled else 1):        # (torch may compile at a second call, too)
            h = torch.zeros(1, rows, c.hidden_size, dtype=self.dtype, device=self.device)
            layer.gate(layer.attend(h, rope_table(c, torch.arange(rows, device=self.device)), None, 0))
            self.slots[0](h[0])
        if self.dtype != torch.float32 and not same_bits(layer.attention.o, self.dtype):
            mend = "--no-compile or --device cpu" if compiled else "--device cpu"
            raise UserError(f"what is computed on {self.device} has not the bits of the CPU (small numbers "
                            f"may be taken for zero); use {mend}")
        if not compiled:
            return
        prompt = [c.bos_token_id] * min(8, self.context - 1)
        self.generate(prompt, max_new_tokens=1)
        for size in self.step.sizes:        # (the last token there is room for)
            self._decode(torch.tensor(prompt[:1], device=self.device), min(size, self.context) - 1)
        self._rest()
        self.sequence = None                # (nobody recorded it)

    @contextmanager
    def _held(self):
        """The engine is this request's alone, from here to the end of the `with`; another one meanwhile is
        refused.

        A request whose frames are gone holds nothing, however it ended (a second Ctrl-C may come at any
        line): so the claims are weak references. Appending is atomic: of two threads one is the first.
        """
        claim = Claim()
        mine = weakref.ref(claim)
        self.claims.append(mine)
        try:
            if next((other for other in list(self.claims) if other() is not None), mine) is not mine:
                raise UserError("the engine is busy with another request: finish it or close its stream "
                                "first (or load another Engine)")
            with enough_memory():
                yield
        finally:
            self.claims.remove(mine)

    def _begin(self, prompt: list[int], arrived: float, resume: bool) -> Sequence:
        """A new request. With `resume` it keeps what it has in common with the one before; the history goes
        on where that is all of it, and is a new one otherwise. The cache keeps its experts."""
        c, before = self.config, self.sequence.kv_tokens if self.sequence else []
        kept = common_prefix_len(before, prompt[:-1]) if resume else 0              # (one token must be run)
        history = self.sequence.history if 0 < kept == len(before) else \
            History(c.num_hidden_layers, c.num_local_experts)
        # First note what the KV cache will hold, then overwrite it: an interruption may come in between.
        self.sequence = sequence = Sequence(prompt, kept, kept, history, arrived, self.store.bytes_read)
        self.cache.abandon()                # (what an interruption may have left)
        self.kv[:, :, :, kept:self.kv_written].zero_()              # (a masked NaN would still be a NaN)
        self.kv_written = kept
        forecast = Forecast(history, self.predictor, c.num_experts_per_tok)
        sequence.schedulers = schedulers(self.policy, self.cache, history, forecast, len(prompt) - kept)
        for worker in filter(None, (self.cache.lane, self.host)):
            worker.busy = 0.0
        sequence.prefill = self.cache.serve(sequence.schedulers[0])
        return sequence

    @contextmanager
    def _guarded(self):
        """After any failure in here the engine can be used again."""
        try:
            yield
        except BaseException as error:
            self.cache.abandon()
            history = self.sequence.history
            self.sequence.history = History(history.layers, history.experts)    # (that had half a pass)
            if isinstance(error, LinkError):
                raise UserError(f"an expert could not be copied to {self.device} ({error}); the request is "
                                "dropped, the engine can be used again") from error
            if isinstance(error, HostError):
                raise UserError(f"the host could not compute an expert ({error}); the request is dropped, "
                                "the engine can be used again; --host-threads 0 does without") from error
            raise

    def _prefill(self, tokens: Tensor, start: int) -> Tensor:
        """tokens [T] at positions start.. -> normed hidden states [T, D]."""
        with self._guarded():
            self._begin_pass(0, start, len(tokens))
            return self.model(tokens[None], self.source, self.kv, start)[0]

    def _decode(self, token: Tensor, position: int) -> Tensor:
        """token [1] at `position` -> logits [vocab] of the next."""
        with self._guarded():
            self._begin_pass(1, position, 1)
            return self.step(token, position, self.source)

    def _begin_pass(self, phase: int, position: int, tokens: int) -> None:
        self.kv_written = max(self.kv_written, position + tokens)
        self.source.begin(self.sequence.schedulers[phase], position, tokens, decoding=bool(phase))

    def _fetch(self, values: Tensor) -> Tensor:
        """values [n] of the device -> in fp32 on the host; all that led to them has been computed without a
        failure."""
        cache = self.cache
        with self._guarded():
            fetched = cache.read(cache.lane.fetch(values.float()))
            if cache.host is not None:
                cache.host.collect()
            return torch.tensor(fetched)

    def _rest(self) -> None:
        """Nothing more is guessed, and every time is known. (The host is let go: it feeds the lane, which
        feeds from the cache, and its thread would live until such circles are collected.)"""
        cache = self.cache
        cache.plan([])
        cache.lane.finish()
        if cache.host is not None:
            cache.host.abandon()            # (it may have answers that an interruption left)
        cache.host = None

    @torch.inference_mode()
    def logits(self, token_ids: list[int], *, decode: bool = False) -> Tensor:
        """Teacher-forced through the prefill path (or with `decode`, from the second token on, as new tokens
        are), ids taken as they are -> float32 [tokens, vocab] on the host."""
        ids = as_ids(token_ids, "`logits` takes a list of token ids")
        check_ids(ids, self.config, self.context, self.context)
        tokens = torch.tensor(ids, device=self.device)
        with self._held():
            self._begin(ids, time.perf_counter(), resume=False)
            try:
                hidden = self._prefill(tokens[:1] if decode else tokens, 0)
                out = [self.model.head(rows).float().cpu() for rows in hidden.split(LOGIT_ROWS)]
                if decode:
                    self.cache.serve(self.sequence.schedulers[1], self._decoding_host())
                    out += (self._fetch(self._decode(tokens[i:i + 1], i))[None]
                            for i in range(1, len(ids)))
                return torch.cat(out)
            finally:
                self._rest()

    def generate(self, prompt: str | list[int], params: SamplingParams | None = None,
                 **options) -> Generation:
        """As `stream`, all at once."""
        with closing(self.stream(prompt, params, **options)) as pieces:
            while True:
                try:
                    next(pieces)
                except StopIteration as end:                        # (`self.result` may be another's by now)
                    return end.value

    @torch.inference_mode()
    def stream(self, prompt: str | list[int], params: SamplingParams | None = None, *, resume: bool = False,
               **sampling) -> Iterator[str]:
        """Yields pieces of text as they are certain; `engine.result` is the `Generation`, also if
        interrupted, and the generator returns it.

        Text gets BOS, ids are taken as they are; `sampling`: the fields of `SamplingParams`, if `params` are
        not given. Stops at EOS, at `max_new_tokens`, or where the context is full. With `resume` the prompt,
        a whole conversation, is prefilled only from where it differs from the request before. From its first
        piece to its end the stream holds the engine: finish it or `close()` it (leaving a `for` loop over it
        does so, unless it has a name besides). Raises `UserError` for a bad prompt or option, and if the
        engine is held by another request.
        """
        arrived, params = time.perf_counter(), params or SamplingParams(**sampling)
        if isinstance(prompt, str) and not prompt.strip():
            raise UserError("the prompt is empty; give some text")
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else \
            as_ids(prompt, "the prompt must be text or a list of token ids")
        check_ids(ids, self.config, self.context, self.context - 1)
        tokens, n = torch.tensor(ids, device=self.device), len(ids)
        with self._held():
            self.result = None
            generator = torch.Generator(self.device).manual_seed(int(params.seed))
            sequence, piece = self._begin(ids, arrived, resume), TextStream(self.tokenizer)
            try:
                logits = self.model.head(self._prefill(tokens[sequence.kept:], sequence.kept)[-1:])[0].float()
                sequence.position = n
                host = self._decoding_host()
                sequence.decode = self.cache.serve(sequence.schedulers[1], host)    # what prefill left is its
                while True:
                    token = sample(logits, params, generator).view(1)
                    token_id = int(self._fetch(token))                              # (exact below 2^24)
                    now = time.perf_counter()
                    sequence.first = sequence.first or now
                    if token_id < 0:
                        dtype = str(self.dtype).removeprefix("torch.")
                        raise UserError(f"the model's logits are not finite in {dtype}; use --dtype bfloat16 "
                                        "or float32, or convert the model again")
                    if token_id in self.tokenizer.eos:
                        sequence.finish_reason = "stop"
                        break
                    sequence.last = now
                    sequence.new.append(token_id)
                    if text := piece.push(token_id):
                        sequence.text += text
                        yield text
                    if len(sequence.new) >= params.max_new_tokens or n + len(sequence.new) >= self.context:
                        sequence.finish_reason = "length"
                        break
                    logits = self._decode(token, sequence.position)
                    sequence.position += 1
                if text := piece.close():
                    sequence.text += text
                    yield text
            finally:                        # also when the consumer stops early, or on Ctrl-C
                try:
                    self._rest()
                finally:                    # (a second Ctrl-C)
                    self.result = result_of(self, sequence)
            return self.result
