"""From a Hugging Face Mixtral to a packed directory, and back.

    python -m duoserve.checkpoint SRC DST [--group-size 128]    # safetensors -> 4 bits
    python -m duoserve.checkpoint SRC DST --to-hf               # 4 bits -> safetensors in float32

A conversion streams: one matrix is read, packed block of rows by block of rows and written into its layer's file, so
the model is never in memory. Each file says what it was made from, so an interrupted conversion goes on where it was.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import threading
import time
import zlib
from contextlib import closing, contextmanager, suppress
from math import prod
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from .config import MixtralConfig
from .errors import Parser, UserError, human, run_main
from .packed import MANIFEST, Header, PackedModel, TensorWriter, atomic, fingerprint, tensor_files
from .quant import ExpertLayout, dequantize, group_size as group_of, quantize

BLOCK = 16 * 2**20              # weights packed or unpacked at a time: each fp32 temporary stays below 64 MB
SAMPLE = 2**16                  # bytes of each source tensor that its fingerprint hashes
FIELDS = ("q", "scale", "zero")

Shapes = dict[str, tuple[int, ...]]                                 # Hugging Face's name -> shape
Tensors = dict[str, tuple[torch.dtype, tuple[int, ...]]]            # packed name -> dtype and shape


class Progress:
    """One rewritten line on standard error, where that is a terminal and the work takes more than two seconds."""

    def __init__(self, total: int, label: str, shown: bool = True):
        self.total, self.label, self.done, self.start = total, label, 0, time.monotonic()
        self.shown, self.next, self.lock = shown and sys.stderr.isatty(), self.start + 2, threading.Lock()

    def add(self, nbytes: int) -> None:
        with self.lock:                                             # loading adds from several threads
            self.done, now = self.done + nbytes, time.monotonic()
            if self.shown and now >= self.next and self.done:
                rate = self.done / (now - self.start)
                minutes, seconds = divmod(round(max(0, self.total - self.done) / rate), 60)
                print(f"\r{self.label}: {human(self.done)} of {human(self.total)}, {human(rate)}/s, "
                      f"{minutes}:{seconds:02d} left\033[K", end="", file=sys.stderr, flush=True)
                self.next = now + 0.2

    def close(self) -> None:
        if self.next > self.start + 2:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


@contextmanager
def os_errors():
    """What the system refuses (a directory not ours to read, a disk that fails) as a `UserError` naming the file."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from error


def hugging_face(c: MixtralConfig) -> dict[str, dict[str, Shapes]]:
    """Packed file -> tensor or matrix in it -> the Hugging Face tensors it is made of, with their shapes.

    What ends in `.weight` is one tensor of 16 bits; anything else is one or more matrices, packed, row on row.
    """
    D, F, A = c.hidden_size, c.intermediate_size, c.head_dim
    q, kv = c.num_attention_heads * A, c.num_key_value_heads * A
    outer, *layers = tensor_files(c)
    files = {outer: {"embed.weight": {"model.embed_tokens.weight": (c.vocab_size, D)},
                     "norm.weight": {"model.norm.weight": (D,)}}}
    if not c.tie_word_embeddings:                                   # a tied head is the embedding, even if it is there
        files[outer]["head.weight"] = {"lm_head.weight": (c.vocab_size, D)}
    for i, file in enumerate(layers):
        layer, attention, moe = (f"model.layers.{i}.{part}" for part in ("", "self_attn.", "block_sparse_moe."))
        files[file] = {
            "attention_norm.weight": {f"{layer}input_layernorm.weight": (D,)},
            "attention.qkv": {f"{attention}{x}_proj.weight": (rows, D) for x, rows in (("q", q), ("k", kv), ("v", kv))},
            "attention.o": {f"{attention}o_proj.weight": (D, q)},
            "ffn_norm.weight": {f"{layer}post_attention_layernorm.weight": (D,)},
            "router.weight": {f"{moe}gate.weight": (c.num_local_experts, D)}}
        for e in range(c.num_local_experts):
            files[file] |= {f"experts.{e}.w13": {f"{moe}experts.{e}.{w}.weight": (F, D) for w in ("w1", "w3")},
                            f"experts.{e}.w2": {f"{moe}experts.{e}.w2.weight": (D, F)}}
    return files


class HuggingFaceSource:
    """Safetensors of 16 or 32 bits, in one file or in shards with an index; checked whole before any of it is read.

    The seam for other layouts: a source has `directory`, `config`, `fingerprint`, `dtype`, `plain` and `pack`.
    """

    def __init__(self, directory: Path, config: MixtralConfig):
        self.directory, self.config = directory, config
        index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
        if single.exists():                                         # before an index, as transformers does
            header = Header(single)
            self.headers, files = {single.name: header}, dict.fromkeys(header.tensors, single.name)
            index = single
        else:
            files = self._read_index(index)
            self.headers = {name: Header(directory / name) for name in sorted(set(files.values()))}
        self.where, expected = {}, {}
        for parts in hugging_face(config).values():
            for shapes in parts.values():
                expected |= shapes
        for name, shape in expected.items():
            if name not in files:
                raise UserError(f"{index}: {name} is missing; get the complete model")
            header = self.headers[files[name]]
            if name not in header.tensors:
                raise UserError(f"{header.path}: {name} is not in it, though {index.name} says so; get the model again")
            dtype, found = header.tensors[name][:2]
            if found != shape:
                raise UserError(f"{header.path}: {name} has shape {list(found)}, by config.json {list(shape)}")
            if dtype not in (torch.float16, torch.bfloat16, torch.float32):
                raise UserError(f"{header.path}: {name} is {dtype}; float16, bfloat16 or float32 is expected")
            self.where[name] = header
        for name in files:                                          # a bias, a layer too many: not left out in silence
            if name.startswith("model.layers.") and name not in expected and not name.endswith("rotary_emb.inv_freq"):
                raise UserError(f"{index}: {name} has no place in the Mixtral that config.json describes")
        self.fingerprint = self._fingerprint()

    def _read_index(self, index: Path) -> dict[str, str]:
        """Tensor -> shard, no shard being outside the directory (links inside it may lead anywhere)."""
        try:
            files = json.loads(index.read_bytes())["weight_map"]
            if not files or not all(isinstance(file, str) for file in files.values()):
                raise ValueError("weight_map names no files")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{index}: cannot be used ({error!r}); get it again") from None
        for file in set(files.values()):
            if not file or "\0" in file or PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
                raise UserError(f"{index}: the file {file!r} that it names is outside {self.directory}; get it again")
            if not (self.directory / file).is_file():
                raise UserError(f"{self.directory / file}: missing, though {index.name} names it; get it too")
        return files

    def _fingerprint(self) -> str:
        """Hashes config, tokenizer, headers, and a sample of every tensor: two fine-tunes differ in nothing else."""
        digest = hashlib.sha256()
        for name in ("config.json", "tokenizer.model"):
            digest.update(hashlib.sha256((self.directory / name).read_bytes()).digest())
        for name, header in self.headers.items():
            digest.update(hashlib.sha256(header.raw + f"{name} {header.size}".encode()).digest())
            with open(header.path, "rb") as file:
                for _, _, start, end in header.tensors.values():
                    file.seek(max(start, (start + end - SAMPLE) // 2))
                    digest.update(file.read(min(SAMPLE, end - start)))
        return digest.hexdigest()[:16]

    def _read(self, name: str) -> Tensor:
        header = self.where[name]
        with open(header.path, "rb") as file:
            return header.read(name, file)

    def dtype(self, name: str) -> torch.dtype:
        """What `plain` gives: the checkpoint's own 16-bit dtype; float32 becomes float16."""
        dtype = self.where[name].tensors[name][0]
        return torch.float16 if dtype == torch.float32 else dtype

    def plain(self, name: str) -> Tensor:
        """A tensor that stays in 16 bits."""
        tensor = self._read(name).to(self.dtype(name))
        if not tensor.isfinite().all():
            raise UserError(f"{self.where[name].path}: {name} holds numbers that are infinite, NaN or beyond float16")
        return tensor

    def pack(self, name: str, q: Tensor, scale: Tensor, zero: Tensor) -> None:
        """Pack a matrix [N, columns] into q [N, columns / 2], scale and zero [N, groups], on the host."""
        weight, device = self._read(name), "cuda" if torch.cuda.is_available() else "cpu"
        group, step = weight.shape[1] // scale.shape[1], max(1, BLOCK // weight.shape[1])
        for block, *into in zip(*(t.split(step) for t in (weight, q, scale, zero))):
            for view, made in zip(into, quantize(block.to(device), group, f"{self.where[name].path}: {name}")):
                view.copy_(made)


@os_errors()
def open_source(directory: str | Path) -> HuggingFaceSource:
    """What `directory` holds, ready to be read; `UserError` says why it cannot be."""
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory}: no such model directory")
    names = sorted(path.name for path in directory.iterdir())
    if MANIFEST in names:
        raise UserError(f"{directory}: is packed already; --to-hf turns it back")
    if "outer.safetensors" in names or "layer-000.safetensors" in names:
        raise UserError(f"{directory}: is an unfinished conversion; run it again from the model it was made of")
    pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
    if pickled and not any(name.endswith(".safetensors") for name in names):
        raise UserError(f"{directory}: holds {pickled[0]} but no safetensors; nothing is ever unpickled: "
                        "save the model as safetensors")
    config = MixtralConfig.read(directory)
    quantization = json.loads((directory / "config.json").read_bytes()).get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise UserError(f"{directory / 'config.json'}: quantization_config: weights quantised by {method!r} cannot be "
                        "read; give the 16-bit model they were made of")
    if not {"model.safetensors", "model.safetensors.index.json"} & set(names):
        raise UserError(f"{directory}: no weights in it (neither model.safetensors nor model.safetensors.index.json)")
    if "tokenizer.model" not in names:
        only = "only tokenizer.json; " if "tokenizer.json" in names else ""
        raise UserError(f"{directory}: no tokenizer.model; {only}copy the sentencepiece file of the same model there")
    return HuggingFaceSource(directory, config)


def remove_leftovers(directory: Path, name: str = "*") -> None:
    """Delete what `atomic` and `to_hf` left of `name` in processes that were killed; those alive keep theirs."""
    for path in directory.glob(f".{name}.*.part"):
        pid = re.search(r"\.(\d{1,9})\.part$", path.name)
        try:
            if not pid or int(pid[1]) != os.getpid() and os.kill(int(pid[1]), 0) is None:
                continue
        except PermissionError:                                     # alive, and somebody else's
            continue
        except ProcessLookupError:
            pass
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def check_space(path: Path, need: int) -> None:
    free = shutil.disk_usage(path).free
    if free < need:
        raise UserError(f"{path}: {human(need)} are needed on this disk and {human(free)} are free")


def write_json(path: Path, value: dict) -> None:
    with atomic(path) as file:
        file.write(json.dumps(value, indent=2).encode() + b"\n")


def copy_config(src: Path, dst: Path, **changes) -> None:
    """config.json without its quantisation, and the tokenizer."""
    config = json.loads((src / "config.json").read_bytes())
    config.pop("quantization_config", None)
    write_json(dst / "config.json", config | changes)
    with atomic(dst / "tokenizer.model") as file:
        file.write((src / "tokenizer.model").read_bytes())


def packed_tensors(source: HuggingFaceSource, largest: int) -> dict[str, Tensors]:
    """Packed file -> the tensors in it, in order: what `PackedModel` expects."""
    block, files = ExpertLayout.of(source.config, largest).nbytes, {}
    for file, parts in hugging_face(source.config).items():
        files[file] = tensors = {}
        for part, shapes in parts.items():
            shape = next(iter(shapes.values()))
            if part.endswith(".weight"):
                tensors[part] = source.dtype(*shapes), shape
            elif part.startswith("experts."):
                tensors[part.rsplit(".", 1)[0]] = torch.uint8, (block,)
            else:
                rows = sum(rows for rows, _ in shapes.values())
                groups = shape[1] // group_of(shape[1], largest, f"{file}: {part}")
                tensors |= {f"{part}.q": (torch.uint8, (rows, shape[1] // 2)),
                            f"{part}.scale": (torch.float16, (rows, groups)),
                            f"{part}.zero": (torch.float16, (rows, groups))}
    return files


def check_destination(dst: Path, files: dict[str, Tensors], stamp: dict[str, str]) -> dict[str, Header]:
    """Make `dst`, or see that it is empty or holds this very conversion: the headers that can be read of its files."""
    dst.mkdir(parents=True, exist_ok=True)
    found = {path.name for path in dst.iterdir() if not path.name.startswith(".")}
    foreign = found - set(files) - {"config.json", "tokenizer.model", "predictor.safetensors"}
    if found and (not found & set(files) or foreign and MANIFEST not in found):
        raise UserError(f"{dst}: holds {min(foreign or found)} already; name a new or an empty directory")
    headers = {}
    for file in sorted(found & set(files)):
        with suppress(UserError):                                   # what is damaged will be made again
            headers[file] = header = Header(dst / file)
            if not stamp.items() <= header.metadata.items():
                break
    else:
        return headers
    raise UserError(f"{dst / file}: was made from another model or with another group size; name another directory")


def intact(header: Header, tensors: Tensors, progress: Progress) -> bool:
    """Whether a packed file is whole: its tensors, its size and their CRCs are what they should be."""
    table = str(header.metadata.get("crc32")).split()
    if ({name: entry[:2] for name, entry in header.tensors.items()} != tensors or len(table) != len(tensors)
            or header.size != max(end for *_, end in header.tensors.values())):
        return False
    with open(header.path, "rb") as file:
        for name, crc in zip(header.tensors, table):
            data = header.read(name, file).view(-1).view(torch.uint8).numpy()
            progress.add(len(data))
            if crc != f"{zlib.crc32(data):08x}":
                return False
    return True


def triples(views: dict[str, Tensor], matrix: str, shapes: Shapes):
    """For each Hugging Face tensor: its name, and its rows of the packed matrix's q, scale and zero."""
    rows = [rows for rows, _ in shapes.values()]
    return zip(shapes, *(views[f"{matrix}.{field}"].split(rows) for field in FIELDS))


def write_packed(path: Path, source: HuggingFaceSource, parts: dict[str, Shapes], tensors: Tensors,
                 layout: ExpertLayout, stamp: dict[str, str], progress: Progress) -> None:
    """One packed file: `parts` as in `hugging_face`, `tensors` as in `packed_tensors`."""
    block = torch.zeros(layout.nbytes, dtype=torch.uint8)           # an expert's, used for each; padding stays zero
    views = layout.views(block) | {name.removeprefix("attention."): torch.empty(shape, dtype=dtype)
                                   for name, (dtype, shape) in tensors.items() if name.startswith("attention.")}
    with atomic(path) as file:
        writer = TensorWriter(file, tensors, stamp)
        for part, shapes in parts.items():
            unit, matrix = part.rsplit(".", 1)
            if matrix == "weight":
                ready = {part: source.plain(*shapes)}
            else:
                for name, *into in triples(views, matrix, shapes):
                    source.pack(name, *into)
                if unit == "attention":
                    ready = {f"{part}.{field}": views[f"{matrix}.{field}"] for field in FIELDS}
                else:                                               # an expert is ready with its second matrix
                    ready = {unit: block} if matrix == "w2" else {}
            for name, tensor in ready.items():
                writer.write(name, tensor)
                progress.add(tensor.nbytes)
        writer.close()


@os_errors()
def convert(src: str | Path, dst: str | Path, group_size: int = 128, progress: bool = True) -> None:
    """Pack the model in `src` into `dst`, or go on with that: what is complete there is checked and kept."""
    if group_size not in (128, 64, 32):
        raise UserError(f"group size {group_size}: it can be 128, 64 or 32")
    source, dst = open_source(src), Path(dst)
    parts, files = hugging_face(source.config), packed_tensors(source, group_size)
    layout, stamp = ExpertLayout.of(source.config, group_size), {"source": f"{source.fingerprint}-{group_size}"}
    size = {file: sum(prod(shape) * dtype.itemsize for dtype, shape in files[file].values()) for file in files}
    headers = check_destination(dst, files, stamp)
    remove_leftovers(dst)
    with closing(Progress(sum(size[file] for file in headers), f"{dst}: checking", progress)) as bar:
        todo = [file for file in files if file not in headers or not intact(headers[file], files[file], bar)]
    if not todo:
        with suppress(UserError):
            PackedModel(dst)
            print(f"{dst}: holds this model already, complete and undamaged", file=sys.stderr)
            return
    check_space(dst, sum(size[file] for file in todo))
    (dst / MANIFEST).unlink(missing_ok=True)
    with closing(Progress(sum(size[file] for file in todo), f"{dst}: packing", progress)) as bar:
        for file in todo:
            write_packed(dst / file, source, parts[file], files[file], layout, stamp, bar)
    copy_config(source.directory, dst)
    write_json(dst / MANIFEST, {"format": "duoserve", "version": 1, "group_size": group_size,
                                "fingerprint": fingerprint(dst, list(files)), "source": source.fingerprint})


def ensure_packed(directory: str | Path, weights_dir: str | Path) -> Path:
    """A packed directory as it is; a Hugging Face one packed, once, into `weights_dir` and found there from then on."""
    directory = Path(directory)
    if (directory / MANIFEST).exists():
        return directory
    name = Path(os.path.abspath(directory)).name
    target = Path(weights_dir) / f"{name}-{open_source(directory).fingerprint[:8]}"
    if not (target / MANIFEST).exists():
        print(f"{directory}: packing it into {target}, this once", file=sys.stderr)
        convert(directory, target)
    return target


@os_errors()
def to_hf(src: str | Path, dst: str | Path, progress: bool = True) -> None:
    """Unpack `src` into a Hugging Face directory in float32, a shard a layer; `dst` appears when it is complete."""
    model, dst = PackedModel(src), Path(dst).resolve()
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise UserError(f"{dst}: is there and not an empty directory; name another")
    files, where = hugging_face(model.config), {}
    total = 4 * sum(prod(shape) for parts in files.values() for shapes in parts.values() for shape in shapes.values())
    made = dst.with_name(f".{dst.name}.{os.getpid()}.part")
    try:
        dst.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(dst.parent, dst.name)
        check_space(dst.parent, total)
        made.mkdir()
        resident = model.resident()
        with closing(Progress(total, f"{dst}: unpacking", progress)) as bar:
            for i, parts in enumerate(files.values()):
                shard = f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
                write_unpacked(made / shard, model, resident, i - 1, parts, bar)
                where |= {name: shard for shapes in parts.values() for name in shapes}
        write_json(made / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})
        copy_config(model.directory, made, torch_dtype="float32", dtype="float32")
        made.rename(dst)                                            # an empty directory may stand there
    finally:
        shutil.rmtree(made, ignore_errors=True)


def write_unpacked(path: Path, model: PackedModel, resident: dict[str, Tensor], layer: int, parts: dict[str, Shapes],
                   progress: Progress) -> None:
    """One shard in fp32; layer -1 is what lies outside the layers."""
    block, prefix = np.empty(model.layout.nbytes, np.uint8), f"layers.{layer}." if layer >= 0 else ""
    attention = f"{prefix}attention."
    views = model.layout.views(torch.from_numpy(block)) | {
        name.removeprefix(attention): tensor for name, tensor in resident.items() if name.startswith(attention)}
    with atomic(path) as file:
        tensors = {name: (torch.float32, shape) for shapes in parts.values() for name, shape in shapes.items()}
        writer = TensorWriter(file, tensors, {"format": "pt"})
        for part, shapes in parts.items():
            unit, matrix = part.rsplit(".", 1)
            if matrix == "w13":
                model.read_expert(layer, int(unit.removeprefix("experts.")), block)
            for name, *triple in [(*shapes,)] if matrix == "weight" else triples(views, matrix, shapes):
                writer.write(name, unpacked(*triple) if triple else resident[prefix + part].float())
                progress.add(4 * prod(shapes[name]))
        writer.close()


def unpacked(*triple: Tensor) -> Tensor:
    """`dequantize`, a block of rows at a time for the sake of its temporaries."""
    step = max(1, BLOCK // (2 * triple[0].shape[1]))
    return torch.cat([dequantize(*rows) for rows in zip(*(t.split(step) for t in triple))])


def main() -> None:
    parser = Parser(prog="python -m duoserve.checkpoint", description="A Hugging Face Mixtral to four bits, and back.")
    parser.add_argument("src", metavar="SRC", help="the directory to read")
    parser.add_argument("dst", metavar="DST", help="the directory to write: new, empty, or an interrupted conversion")
    parser.add_argument("--group-size", type=int, choices=(128, 64, 32), default=128, metavar="128|64|32",
                        help="columns that share a scale and a zero, at most (default 128)")
    parser.add_argument("--to-hf", action="store_true", help="from packed to Hugging Face's layout, in float32")
    arguments = parser.parse_args()
    if arguments.to_hf:
        to_hf(arguments.src, arguments.dst)
    else:
        convert(arguments.src, arguments.dst, arguments.group_size)


if __name__ == "__main__":
    run_main(main)
