"""Traces: what the routers did in a whole request, on disk.

A trace is one sequence's router logits and lookahead logits; the predictor is trained on traces, and the
bench replays them. The format is in bench/README.md.
"""

import uuid
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

from .config import MixtralConfig
from .errors import UserError
from .files import Header, atomic
from .packed import ModelShapes


def make_directory(directory: Path) -> Path:
    """Make the directory for traces."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--trace-dir {directory}: cannot be made ({error.strerror})") from None
    return directory


class TraceRecorder:
    """Keeps the logits of a request on the device, in memory taken beforehand, and writes them at its end."""

    def __init__(self, config: MixtralConfig, context: int, device):
        shape = context, config.num_hidden_layers, config.num_local_experts
        self.router = torch.zeros(shape, dtype=torch.float16, device=device)
        self.lookahead = torch.zeros_like(self.router)

    def save(self, directory: Path, token_ids: list[int], prompt_tokens: int, model: str) -> Path:
        """Write a new file; it appears when it is complete."""
        n, path = len(token_ids), make_directory(directory) / f"trace-{uuid.uuid4().hex[:12]}.safetensors"
        data = save({"router_logits": self.router[:n].cpu(), "lookahead_logits": self.lookahead[:n].cpu(),
                     "token_ids": torch.tensor(token_ids)},
                    {"prompt_tokens": str(prompt_tokens), "model": model, "version": "1"})
        with atomic(path) as file:
            file.write(data)
        return path


class Trace:
    """A recorded sequence: `logits` and `lookahead` [tokens, layers, experts] fp32, of which `prompt`
    tokens are prefill."""

    def __init__(self, logits: np.ndarray, lookahead: np.ndarray, prompt: int, model: str):
        self.logits, self.lookahead, self.prompt, self.model = logits, lookahead, prompt, model

    @classmethod
    def read(cls, path: Path) -> "Trace":
        header = Header(path)
        meta, read = header.metadata, header.read
        if "router_logits" not in header.tensors:
            raise UserError(f"{path}: is not a trace; name the directory that generate.py --trace-dir made")
        if meta.get("version") != "1":
            raise UserError(f"{path}: trace version {meta.get('version')}, not 1; record it again")
        try:
            logits, lookahead = (read(f"{name}_logits").float().numpy() for name in ("router", "lookahead"))
            prompt, tokens = int(meta["prompt_tokens"]), len(read("token_ids"))
            trace = cls(logits, lookahead, prompt, meta["model"])
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise UserError(f"{path}: not a trace ({error!r}); record it again") from None
        fits = logits.ndim == 3 and lookahead.shape == logits.shape and 1 <= prompt <= tokens == len(logits)
        if not fits or not (np.isfinite(logits).all() and np.isfinite(lookahead).all()):
            raise UserError(f"{path}: its tensors do not fit together; delete it or record it again")
        return trace

    def top(self, k: int) -> np.ndarray:
        """The experts chosen, in rank order: [tokens, layers, k]."""
        return np.argsort(-self.logits, axis=-1, kind="stable")[..., :k]


def read_traces(directory: str | Path, model: str | None = None,
                shape: tuple[int, int] | None = None) -> list[Trace]:
    """Every trace of a directory, sorted by name; all of one model: the one with this fingerprint and shape
    (layers, experts), where they are given."""
    directory = Path(directory)
    paths = sorted(directory.glob("*.safetensors")) if directory.is_dir() else None
    if not paths:
        raise UserError(f"{directory}: {'no such directory' if paths is None else 'holds no traces'}; "
                        "record some with generate.py --trace-dir")
    if (directory / "config.json").exists():
        raise UserError(f"{directory}: holds a model, not traces; record some with generate.py --trace-dir")
    traces = [Trace.read(path) for path in paths]
    model, shape = model or traces[0].model, shape or traces[0].logits.shape[1:]
    for path, trace in zip(paths, traces):
        (layers, experts), made_by = trace.logits.shape[1:], trace.model
        if made_by != model or (layers, experts) != shape:
            raise UserError(f"{path}: a trace of model {made_by} ({layers} layers of {experts} experts), not "
                            f"of {model}; keep each model's traces in a directory of their own")
    return traces


def decoded_traces(directory: str | Path, model: ModelShapes, least: int = 1) -> list[Trace]:
    """Those of a model's traces that hold decoded tokens; `UserError` if there are too few."""
    shape = model.config.num_hidden_layers, model.config.num_local_experts
    traces = read_traces(directory, getattr(model, "fingerprint", None), shape)
    traces = [trace for trace in traces if len(trace.logits) > trace.prompt]
    if len(traces) < least:
        raise UserError(f"{directory}: {len(traces)} sequences with decoded tokens are too few; at least "
                        f"{least} are needed, a hundred are better")
    return traces
