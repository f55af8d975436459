"""Traces: what the routers did in a whole request, on disk.

A trace is one sequence's router logits and lookahead logits, nothing else; the predictor is trained on them, the
bench replays them. The format is in the README.
"""

import uuid
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from .config import MixtralConfig
from .errors import UserError
from .files import atomic


def make_directory(directory: str | Path) -> Path:
    """Make the directory that traces go to, before the work whose record it is to hold."""
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--trace-dir {directory}: cannot be made ({error.strerror})") from None
    return directory


class TraceRecorder:
    """Keeps the logits of a request on the device, in memory taken beforehand, and writes them at its end."""

    def __init__(self, config: MixtralConfig, context: int, device):
        self.router = torch.zeros(context, config.num_hidden_layers, config.num_local_experts, dtype=torch.float16,
                                  device=device)
        self.lookahead = torch.zeros_like(self.router)

    def save(self, directory: Path, token_ids: list[int], prompt_tokens: int, model: str) -> Path:
        """A new file, whatever others there are; complete or not there."""
        n, path = len(token_ids), make_directory(directory) / f"trace-{uuid.uuid4().hex[:12]}.safetensors"
        data = save({"router_logits": self.router[:n].cpu(), "lookahead_logits": self.lookahead[:n].cpu(),
                     "token_ids": torch.tensor(token_ids)},
                    {"prompt_tokens": str(prompt_tokens), "model": model, "version": "1"})
        with atomic(path) as file:
            file.write(data)
        return path


class Trace:
    """A recorded sequence: `logits` and `lookahead [tokens, layers, experts]` fp32, `prompt` tokens of it prefill."""

    def __init__(self, logits: np.ndarray, lookahead: np.ndarray, prompt: int, model: str):
        self.logits, self.lookahead, self.prompt, self.model = logits, lookahead, prompt, model

    @classmethod
    def read(cls, path: Path) -> "Trace":
        try:
            with safe_open(path, "np") as file:
                meta = file.metadata() or {}
                if "router_logits" not in file.keys():
                    raise UserError(f"{path}: is not a trace (it has no router_logits); name the directory that "
                                    "generate.py --trace-dir made")
                if meta.get("version") != "1":
                    raise UserError(f"{path}: trace version {meta.get('version')}, this reads version 1; "
                                    "record it again")
                trace = cls(file.get_tensor("router_logits").astype(np.float32),
                            file.get_tensor("lookahead_logits").astype(np.float32), int(meta["prompt_tokens"]),
                            meta["model"])
                tokens = len(file.get_tensor("token_ids"))
        except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
            raise UserError(f"{path}: not a trace, or truncated ({error}); delete it or record it again") from None
        if trace.logits.ndim != 3 or trace.lookahead.shape != trace.logits.shape or tokens != len(trace.logits) \
                or not 1 <= trace.prompt <= tokens \
                or not (np.isfinite(trace.logits).all() and np.isfinite(trace.lookahead).all()):
            raise UserError(f"{path}: its tensors do not fit together; delete it or record it again")
        return trace

    def top(self, k: int) -> np.ndarray:
        """The experts chosen, in rank order: [tokens, layers, k]."""
        return np.argsort(-self.logits, axis=-1, kind="stable")[..., :k]


def read_traces(directory: str | Path, model: str | None = None, shape: tuple[int, int] | None = None) -> list[Trace]:
    """Every trace of a directory, in the order of their names; all of one model: that with fingerprint `model` and
    `shape` (layers, experts), where they are given."""
    directory = Path(directory)
    paths = sorted(directory.glob("*.safetensors")) if directory.is_dir() else None
    if not paths:
        raise UserError(f"{directory}: {'no such directory' if paths is None else 'holds no traces'}; "
                        "record some with generate.py --trace-dir")
    if (directory / "config.json").exists():
        raise UserError(f"{directory}: holds a model, not traces; record some with generate.py --trace-dir")
    traces = [Trace.read(path) for path in paths]
    for path, trace in zip(paths, traces):
        if trace.logits.shape[1:] != (shape or traces[0].logits.shape[1:]):
            raise UserError(f"{path}: a trace of {trace.logits.shape[1]} layers of {trace.logits.shape[2]} experts, of "
                            "another shape than the others' or the model's")
        if trace.model != (model or traces[0].model):
            raise UserError(f"{path}: a trace of model {trace.model}, not of {model or traces[0].model}; "
                            "keep each model's traces in a directory of their own")
    return traces
