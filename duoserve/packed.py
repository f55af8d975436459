"""A packed model directory: what is in it, how it is written so that it can be believed, how it is checked.

    config.json  tokenizer.model  outer.safetensors  layer-000.safetensors ...  manifest.json
    [predictor.safetensors]

`outer` holds embedding, final norm and head; a layer's file its attention (4-bit), norms, router, and each
expert as one block of bytes. Every tensor's CRC-32 stands in its file's header. A file appears under its name
only when it is whole, and the manifest last: a directory without one is an unfinished conversion, not a
model.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .config import MixtralConfig
from .errors import UserError
from .files import ALIGN, Header, read_into, reading
from .model import Expert, Mixtral
from .quant import PackedLinear, group_size
from .tokenizer import Tokenizer

MANIFEST = "manifest.json"
KINDS = {"16": (torch.float16, torch.bfloat16), "u8": (torch.uint8,), "f16": (torch.float16,)}


def unfit(path: Path, what: str, or_rather: str = "") -> UserError:
    """A packed file that cannot be used as it is; `or_rather` is a mend to try before another conversion."""
    return UserError(f"{path}: {what}; {or_rather}convert the model again")


def fingerprint(directory: Path, names: list[str]) -> str:
    """Hashes config, tokenizer and the headers (with their CRCs) of the tensor files: 16 hex digits."""
    digest = hashlib.sha256()
    for name in ("config.json", "tokenizer.model"):
        with reading(directory / name) as file:
            digest.update(hashlib.sha256(file.read()).digest())
    for name in names:
        digest.update(hashlib.sha256(Header(directory / name).raw).digest())
    return digest.hexdigest()[:16]


def tensor_files(config: MixtralConfig) -> list[str]:
    return ["outer.safetensors"] + [f"layer-{i:03d}.safetensors" for i in range(config.num_hidden_layers)]


def place(name: str) -> tuple[str, str]:
    """A tensor's file and its name there: `layers.3.router.weight` is `router.weight` in layer-003."""
    if not name.startswith("layers."):
        return "outer.safetensors", name
    _, i, inside = name.split(".", 2)
    return f"layer-{int(i):03d}.safetensors", inside


@dataclass(frozen=True)
class ExpertLayout:
    """Where an expert's six tensors lie in its one contiguous block of `nbytes` bytes."""

    fields: dict[str, tuple[int, torch.dtype, tuple[int, int]]]     # name -> (offset, dtype, shape)
    nbytes: int

    @classmethod
    def of(cls, expert: nn.Module) -> "ExpertLayout":
        """The layout of a packed `Expert`, which may be on torch's meta device."""
        fields, offset = {}, 0
        for name, tensor in expert.state_dict().items():
            fields[name] = offset, tensor.dtype, tuple(tensor.shape)
            offset += -(-tensor.nbytes // ALIGN) * ALIGN
        return cls(fields, offset)

    def views(self, block: Tensor) -> dict[str, Tensor]:
        """block [.., nbytes] uint8 -> the six tensors [.., rows, columns], as views."""
        def view(offset: int, dtype: torch.dtype, shape: tuple[int, int]) -> Tensor:
            return block[..., offset:offset + prod(shape) * dtype.itemsize].view(dtype).unflatten(-1, shape)

        return {name: view(*field) for name, field in self.fields.items()}

    def bind(self, expert: nn.Module, block: Tensor) -> nn.Module:
        """Point a packed `Expert`'s tensors into a block."""
        for name, view in self.views(block).items():
            matrix, part = name.split(".")
            setattr(getattr(expert, matrix), part, view)
        return expert


class ModelShapes:
    """What a configuration alone says of a packed model: `layout` of an expert, bytes, and `shapes`: name ->
    (kind, shape) of all that stays on the device, as `Mixtral` has it, what lies outside the layers first;
    kind is '16' (16 bits, as they came), 'u8' or 'f16'."""

    def __init__(self, config: MixtralConfig, largest_group: int = 128):
        self.config = c = config
        self.largest_group = largest_group
        for matrix, columns in (("w1 and w3", c.hidden_size), ("w2", c.intermediate_size),
                                ("attention's output", c.num_attention_heads * c.head_dim)):
            group_size(columns, largest_group, matrix)              # (an error names the matrix)
        linear = partial(PackedLinear, largest_group=largest_group)
        with torch.device("meta"):          # (shapes alone: nothing is allocated)
            self.layout = ExpertLayout.of(Expert(c, linear))
            state = Mixtral(c, linear).state_dict()
        if c.tie_word_embeddings:           # the head is the embedding
            del state["head.weight"]
        kinds = {torch.float32: "16", torch.uint8: "u8", torch.float16: "f16"}
        self.shapes = {name: (kinds[state[name].dtype], tuple(state[name].shape))
                       for name in sorted(state, key=lambda name: name.startswith("layers."))}
        self.nbytes = self.resident_bytes() + len(config.expert_keys) * self.layout.nbytes

    def resident_bytes(self, size: int = 2) -> int:
        """Of all but the experts, with `size` bytes for what came in 16 bits."""
        each = {"16": size, "u8": 1, "f16": 2}
        return sum(prod(shape) * each[kind] for kind, shape in self.shapes.values())

    def all_shapes(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """`shapes`, and those of the experts' blocks."""
        block = "u8", (self.layout.nbytes,)
        return self.shapes | {f"layers.{i}.experts.{e}": block for i, e in self.config.expert_keys}


def check_directory(directory: Path) -> None:
    if directory.is_file():
        of_one = directory.suffix in (".json", ".safetensors", ".model")
        raise UserError(f"{directory}: is a file; what is read is a directory, packed or with safetensors "
                        "(in 16 bits, or in 4 by AWQ or GPTQ)" + f": give {directory.parent}" * of_one)
    if not directory.is_dir():
        raise UserError(f"{directory}: no such model directory on this machine; nothing is downloaded")


class PackedModel(ModelShapes):
    """An opened packed directory. Opening reads headers only; every mismatch is a `UserError` naming the
    file."""

    def __init__(self, directory: str | Path):
        self.directory = directory = Path(directory)
        check_directory(directory)
        path = directory / MANIFEST
        try:
            self.manifest = json.loads(path.read_bytes())
            largest_group, version = self.manifest["group_size"], self.manifest["version"]
            self.fingerprint = self.manifest["fingerprint"]
        except FileNotFoundError:
            raise UserError(f"{directory}: no {MANIFEST}, so this is not a (complete) packed model; "
                            "convert one with python -m duoserve.checkpoint") from None
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise unfit(path, f"damaged ({error!r})") from None
        if version != 1 or largest_group not in (32, 64, 128):
            raise unfit(path, f"version {version}, group size {largest_group}: not made by this duoserve")
        super().__init__(MixtralConfig.read(directory), largest_group)
        self.headers: dict[str, Header] = {}
        for file in tensor_files(self.config):
            if not (directory / file).exists():
                raise unfit(directory / file, "no such file", "copy it from where the others came from, or ")
            self.headers[file] = header = Header(directory / file)
            if not header.crc:
                raise unfit(header.path, "holds no CRC table")
        made = fingerprint(directory, list(self.headers))
        if made != self.fingerprint:
            raise unfit(path, f"fingerprint {self.fingerprint} does not match the files, which make {made}: "
                              "a file was changed or comes from another model")
        for name, (kind, shape) in self.all_shapes().items():
            header, inside = self.locate(name)
            header.expect(inside, shape, KINDS[kind], "config.json")

    def locate(self, name: str) -> tuple[Header, str]:
        """The header of a tensor's file, and its name there."""
        file, inside = place(name)
        return self.headers[file], inside

    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self.directory / "tokenizer.model", self.config)

    def resident(self) -> dict[str, torch.Tensor]:
        """What stays on the device, by `Mixtral`'s names, on the host, checked."""
        located = {name: self.locate(name) for name in self.shapes}
        return {name: header.read(inside) for name, (header, inside) in located.items()}

    def read_expert(self, layer: int, expert: int, into: np.ndarray) -> None:
        """Read and check one expert's block into uint8 [layout.nbytes]; safe from several threads."""
        header, inside = self.locate(f"layers.{layer}.experts.{expert}")
        with reading(header.path) as file:
            crc = read_into(file, header.tensors[inside][2], memoryview(into), header.path)
        header.check(inside, crc)
