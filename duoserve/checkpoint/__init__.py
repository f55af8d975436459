"""From a Hugging Face Mixtral, or what else `formats.py` reads, to a packed directory, and back.

    python -m duoserve.checkpoint SRC DST [--group-size 128]    # safetensors -> 4 bits
    python -m duoserve.checkpoint SRC DST --to-hf               # 4 bits -> safetensors in float32

A conversion streams: one matrix is read, packed block of rows by block of rows and written into its layer's file, so
the model is never in memory. Each file says what it was made from, so an interrupted conversion goes on where it was.
"""

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
from pathlib import Path

from ..errors import Parser, UserError, format_bytes, import_requirements

import_requirements()
import numpy as np
import torch
from torch import Tensor

from ..config import MixtralConfig
from .formats import BLOCK, ConsolidatedSource, HuggingFaceSource, QuantizedSource, consolidated_config
from ..files import Header, TensorWriter, atomic, reading
from ..packed import MANIFEST, PackedModel, check_directory, fingerprint, tensor_files
from ..quant import ExpertLayout, dequantize, group_size as group_of
from ..tokenizer import Tokenizer

FIELDS = ("q", "scale", "zero")

Shapes = dict[str, tuple[int, ...]]                                 # Hugging Face's name -> shape
Tensors = dict[str, tuple[torch.dtype, tuple[int, ...]]]            # packed name -> dtype and shape


class Progress:
    """One rewritten line on standard error, where that is a terminal and the work takes more than two seconds.

    It counts bytes, unless `write` says how to write down something else.
    """

    def __init__(self, total: int, label: str, shown: bool = True, write=format_bytes):
        self.total, self.label, self.done, self.start, self.write = total, label, 0, time.monotonic(), write
        self.shown, self.next, self.lock = shown and sys.stderr.isatty(), self.start + 2, threading.Lock()

    def add(self, n: int) -> None:
        with self.lock:                                             # loading adds from several threads
            self.done, now = self.done + n, time.monotonic()
            if self.shown and now >= self.next and self.done:
                rate = self.done / (now - self.start)
                minutes, seconds = divmod(round(max(0, self.total - self.done) / rate), 60)
                print(f"\r{self.label}: {self.write(self.done)} of {self.write(self.total)}, {self.write(rate)}/s, "
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


@os_errors()
def open_source(directory: str | Path) -> HuggingFaceSource:
    """What `directory` holds, ready to be read; `UserError` says why it cannot be."""
    directory = Path(directory)
    check_directory(directory)
    names = sorted(path.name for path in directory.iterdir())
    if MANIFEST in names:
        raise UserError(f"{directory}: is packed already; --to-hf turns it back")
    if "outer.safetensors" in names or "layer-000.safetensors" in names:
        raise UserError(f"{directory}: is an unfinished conversion; run it again from the model it was made of")
    others = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".gguf"))]
    if others and not any(name.endswith(".safetensors") for name in names):
        why = ("its kinds of quantisation cannot be repacked: convert the 16-bit model that it was made of"
               if others[0].endswith(".gguf") else "nothing is ever unpickled: save the model as safetensors")
        raise UserError(f"{directory}: holds {others[0]} but no safetensors; {why}")
    hugging = {"model.safetensors", "model.safetensors.index.json"} & set(names)
    if not hugging and any(re.fullmatch(r"consolidated.*\.safetensors", name) for name in names):
        kind, raw = ConsolidatedSource, consolidated_config(directory / "params.json")
        config = MixtralConfig.from_dict(raw, str(directory / "params.json"))
    else:
        config, raw = MixtralConfig.read(directory), json.loads((directory / "config.json").read_bytes())
        kind = QuantizedSource if raw.get("quantization_config") else HuggingFaceSource
        if not hugging:
            raise UserError(f"{directory}: no weights in it (neither model.safetensors, nor its index, nor "
                            "consolidated.safetensors)")
    tokenizer = next((name for name in ("tokenizer.model", "tokenizer.model.v3") if name in names), None)
    if not tokenizer:
        only = "".join(f"only {name}; " for name in ("tokenizer.json", "tekken.json") if name in names)
        raise UserError(f"{directory}: no tokenizer.model; {only}copy the sentencepiece file of the same model there")
    Tokenizer(directory / tokenizer, config.bos_token_id, config.eos_token_ids).check(config.vocab_size)
    return kind(directory, raw, config, directory / tokenizer, hugging_face(config))


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
        raise UserError(f"{path}: {format_bytes(need)} are needed on this disk and {format_bytes(free)} are free")


def write_json(path: Path, value: dict) -> None:
    with atomic(path) as file:
        file.write(json.dumps(value, indent=2).encode() + b"\n")


def copy_config(raw: dict, tokenizer: Path, dst: Path, **changes) -> None:
    """config.json without its quantisation, and the tokenizer."""
    write_json(dst / "config.json", {key: raw[key] for key in raw if key != "quantization_config"} | changes)
    with atomic(dst / "tokenizer.model") as file, reading(tokenizer) as source:
        file.write(source.read())


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
    for name, crc in zip(header.tensors, table):
        data = header.read(name).view(-1).view(torch.uint8).numpy()
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
def convert(src: str | Path, dst: str | Path, group_size: int = 128, progress: bool = True) -> bool:
    """Pack the model in `src` into `dst`, or go on with that: what is complete there is checked and kept.

    False if that was all of it.
    """
    if group_size not in (128, 64, 32):
        raise UserError(f"group size {group_size}: it can be 128, 64 or 32")
    source, dst = open_source(src), Path(dst)
    group_size = min(group_size, source.largest_group)              # wider than the source's would merge its scales
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
            return False
    check_space(dst, sum(size[file] for file in todo))
    (dst / MANIFEST).unlink(missing_ok=True)
    with closing(Progress(sum(size[file] for file in todo), f"{dst}: packing", progress)) as bar:
        for file in todo:
            write_packed(dst / file, source, parts[file], files[file], layout, stamp, bar)
    copy_config(source.raw, source.tokenizer, dst)
    write_json(dst / MANIFEST, {"format": "duoserve", "version": 1, "group_size": group_size,
                                "fingerprint": fingerprint(dst, list(files)), "source": source.fingerprint})
    return True


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
        with closing(Progress(total, f"{dst}: unpacking", progress)) as bar:
            for i, parts in enumerate(files.values()):
                shard = f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
                write_unpacked(made / shard, model, i - 1, parts, bar)
                where |= {name: shard for shapes in parts.values() for name in shapes}
        write_json(made / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})
        raw = json.loads((model.directory / "config.json").read_bytes())
        copy_config(raw, model.directory / "tokenizer.model", made, torch_dtype="float32", dtype="float32")
        made.rename(dst)                                            # an empty directory may stand there
    finally:
        shutil.rmtree(made, ignore_errors=True)


def write_unpacked(path: Path, model: PackedModel, layer: int, parts: dict[str, Shapes], progress: Progress) -> None:
    """One shard in fp32; layer -1 is what lies outside the layers."""
    block, prefix = np.empty(model.layout.nbytes, np.uint8), f"layers.{layer}." if layer >= 0 else ""
    attention = f"{prefix}attention."
    views = model.layout.views(torch.from_numpy(block)) | {
        name.removeprefix(attention): tensor for name, tensor in model.resident(attention).items()}
    with atomic(path) as file:
        tensors = {name: (torch.float32, shape) for shapes in parts.values() for name, shape in shapes.items()}
        writer = TensorWriter(file, tensors, {"format": "pt"})
        for part, shapes in parts.items():
            unit, matrix = part.rsplit(".", 1)
            if matrix == "w13":
                model.read_expert(layer, int(unit.removeprefix("experts.")), block)
            for name, *triple in [(*shapes,)] if matrix == "weight" else triples(views, matrix, shapes):
                plain = {} if triple else model.resident(prefix + part)
                writer.write(name, unpacked(*triple) if triple else plain[prefix + part].float())
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
    parser.add_argument("--to-hf", action="store_true",
                        help="from packed to Hugging Face's layout, in float32 (default: from that to packed)")
    arguments = parser.parse_args()
    src, dst = arguments.src, Path(arguments.dst)
    if arguments.to_hf:
        to_hf(src, dst)
    elif not convert(src, dst, arguments.group_size):
        return                                                      # all was there already, and that has been said
    made = [path.stat().st_size for path in dst.glob("*.safetensors") if path.name != "predictor.safetensors"]
    print(f"{dst}: {format_bytes(sum(made))} in {len(made)} files", file=sys.stderr)
