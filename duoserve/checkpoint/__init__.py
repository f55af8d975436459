"""From a Hugging Face Mixtral, or another layout that `formats.py` reads, to a packed directory, and back.

    python -m duoserve.checkpoint SRC DST [--group-size 128]    # safetensors -> 4 bits
    python -m duoserve.checkpoint SRC DST --to-hf               # 4 bits -> safetensors in float32

A conversion streams: a matrix is read, packed by blocks of rows and written into its layer's file, so the
model is never in memory. Each file says what it was made from, so an interrupted conversion can go on.
"""

import glob
import json
import os
import re
import shutil
import sys
from contextlib import closing, contextmanager, suppress
from math import prod
from pathlib import Path
from typing import Iterator

from ..errors import Parser, Progress, UserError, format_bytes, import_requirements, note

import_requirements()
import torch
from torch import Tensor

from ..config import MixtralConfig
from ..files import Header, atomic, read_json, reading, write_tensors
from ..packed import (MANIFEST, ExpertLayout, ModelShapes, PackedModel, check_directory, fingerprint, place,
                      tensor_files)
from ..quant import dequantize
from ..tokenizer import Tokenizer
from .formats import BLOCK, ConsolidatedSource, HuggingFaceSource, QuantizedSource, consolidated_config

FIELDS = ("q", "scale", "zero")

Shapes = dict[str, tuple[int, ...]]                                 # Hugging Face's name -> shape
Tensors = dict[str, tuple[torch.dtype, tuple[int, ...]]]            # packed name -> dtype and shape


@contextmanager
def os_errors():
    """An error of the system (no permission, a disk that fails) as a `UserError` that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from error


def hugging_face(c: MixtralConfig) -> dict[str, dict[str, Shapes]]:
    """Packed file -> what is in it -> the Hugging Face tensors it is made of, with their shapes.

    A name that ends in `.weight` is one tensor of 16 bits; any other is matrices, packed and stacked by rows.
    """
    D, F, A = c.hidden_size, c.intermediate_size, c.head_dim
    q, kv = c.num_attention_heads * A, c.num_key_value_heads * A
    outer, *layers = tensor_files(c)
    files = {outer: {"embed.weight": {"model.embed_tokens.weight": (c.vocab_size, D)},
                     "norm.weight": {"model.norm.weight": (D,)}}}
    if not c.tie_word_embeddings:           # a tied head is the embedding, whatever else is stored
        files[outer]["head.weight"] = {"lm_head.weight": (c.vocab_size, D)}
    for i, file in enumerate(layers):
        layer = f"model.layers.{i}"
        attention, moe = f"{layer}.self_attn", f"{layer}.block_sparse_moe"
        rows = {"q": q, "k": kv, "v": kv}
        files[file] = {
            "attention_norm.weight": {f"{layer}.input_layernorm.weight": (D,)},
            "attention.qkv": {f"{attention}.{x}_proj.weight": (n, D) for x, n in rows.items()},
            "attention.o": {f"{attention}.o_proj.weight": (D, q)},
            "ffn_norm.weight": {f"{layer}.post_attention_layernorm.weight": (D,)},
            "router.weight": {f"{moe}.gate.weight": (c.num_local_experts, D)}}
        for e in range(c.num_local_experts):
            expert = f"{moe}.experts.{e}"
            files[file][f"experts.{e}.w13"] = {f"{expert}.{w}.weight": (F, D) for w in ("w1", "w3")}
            files[file][f"experts.{e}.w2"] = {f"{expert}.w2.weight": (D, F)}
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
        raise UserError(f"{directory}: is an unfinished conversion; run it again from the original model")
    others = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".gguf"))]
    if others and not any(name.endswith(".safetensors") for name in names):
        why = "nothing is ever unpickled: save the model as safetensors"
        if others[0].endswith(".gguf"):
            why = "its quantisation cannot be repacked: convert the 16-bit model that it was made of"
        raise UserError(f"{directory}: holds {others[0]} but no safetensors; {why}")
    hugging = {"model.safetensors", "model.safetensors.index.json"} & set(names)
    if not hugging and any(re.fullmatch(r"consolidated.*\.safetensors", name) for name in names):
        kind, raw = ConsolidatedSource, consolidated_config(directory / "params.json")
        config = MixtralConfig.from_dict(raw, str(directory / "params.json"))
    else:
        raw = read_json(directory / "config.json")
        config = MixtralConfig.from_dict(raw, str(directory / "config.json"))
        kind = QuantizedSource if raw.get("quantization_config") else HuggingFaceSource
        if not hugging:
            raise UserError(f"{directory}: no weights in it; get model*.safetensors with their index, too")
    tokenizers = [name for name in names if name in ("tokenizer.model", "tokenizer.model.v3")]
    if not tokenizers:
        only = "".join(f"only {name}; " for name in ("tokenizer.json", "tekken.json") if name in names)
        raise UserError(f"{directory}: no tokenizer.model; {only}copy the model's sentencepiece file there")
    path = directory / tokenizers[0]
    Tokenizer(path, config)                 # (as a check)
    return kind(directory, raw, config, path, hugging_face(config))


def remove_leftovers(directory: Path, name: str = "*") -> None:
    """Delete what `atomic` and `to_hf` left of `name` when their processes were killed."""
    for path in directory.glob(f".{name}.*.part"):
        pid = re.search(r"\.(\d{1,9})\.part$", path.name)
        if pid and (int(pid[1]) == os.getpid() or not Path("/proc", pid[1]).exists()):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def check_space(path: Path, need: int) -> None:
    free = shutil.disk_usage(path).free
    if free < need:
        raise UserError(f"{path}: needs {format_bytes(need)} on this disk; {format_bytes(free)} are free")


def write_json(path: Path, value: dict) -> None:
    with atomic(path) as file:
        file.write(json.dumps(value, indent=2).encode() + b"\n")


def copy_config(raw: dict, tokenizer: Path, dst: Path, **changes) -> None:
    """config.json without its quantisation, and the tokenizer."""
    kept = {key: value for key, value in raw.items() if key != "quantization_config"}
    write_json(dst / "config.json", kept | changes)
    with atomic(dst / "tokenizer.model") as file, reading(tokenizer) as source:
        file.write(source.read())


def packed_tensors(source: HuggingFaceSource, model: ModelShapes) -> dict[str, Tensors]:
    """Packed file -> the tensors in it, in order."""
    parts, kinds = hugging_face(source.config), {"u8": torch.uint8, "f16": torch.float16}
    files: dict[str, Tensors] = {file: {} for file in parts}
    for name, (kind, shape) in model.all_shapes().items():
        file, inside = place(name)
        files[file][inside] = kinds[kind] if kind in kinds else source.dtype(*parts[file][inside]), shape
    return files


def check_destination(dst: Path, files: dict[str, Tensors], stamp: dict[str, str]) -> dict[str, Header]:
    """Make `dst`, or check that it is empty or holds part of this conversion -> the headers of its files."""
    dst.mkdir(parents=True, exist_ok=True)
    found = {path.name for path in dst.iterdir() if not path.name.startswith(".")}
    foreign = found - set(files) - {"config.json", "tokenizer.model", "predictor.safetensors"}
    if found and (not found & set(files) or foreign and MANIFEST not in found):
        raise UserError(f"{dst}: holds {min(foreign or found)} already; name a new or an empty directory")
    headers = {}
    for file in sorted(found & set(files)):
        with suppress(UserError):           # what is damaged will be made again
            headers[file] = Header(dst / file)
        if file in headers and not stamp.items() <= headers[file].metadata.items():
            raise UserError(f"{dst / file}: is of another model or group size; name another directory")
    return headers


def intact(header: Header, tensors: Tensors, progress: Progress) -> bool:
    """Whether a packed file is whole: its tensors, its size and the CRCs are what they should be."""
    found = {name: entry[:2] for name, entry in header.tensors.items()}
    if found != tensors or not header.crc or header.size != max(end for *_, end in header.tensors.values()):
        return False
    with suppress(UserError):
        for name in tensors:
            progress.add(header.read(name).nbytes)
        return True
    return False


def triples(views: dict[str, Tensor], matrix: str, shapes: Shapes):
    """For each Hugging Face tensor: its name, and its rows of the packed matrix's q, scale and zero."""
    rows = [rows for rows, _ in shapes.values()]
    return zip(shapes, *(views[f"{matrix}.{field}"].split(rows) for field in FIELDS))


def packed(source: HuggingFaceSource, parts: dict[str, Shapes], shapes: Tensors,
           layout: ExpertLayout) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one packed file, each valid until the next is asked for; `parts` as in `hugging_face`,
    `shapes` as in `packed_tensors`."""
    block = torch.zeros(layout.nbytes, dtype=torch.uint8)           # each expert in turn; padding stays zero
    views = layout.views(block)
    for name, (dtype, shape) in shapes.items():
        if name.startswith("attention."):
            views[name.removeprefix("attention.")] = torch.empty(shape, dtype=dtype)
    for part, wanted in parts.items():
        unit, matrix = part.rsplit(".", 1)
        if matrix == "weight":
            yield part, source.plain(*wanted)
            continue
        for name, *into in triples(views, matrix, wanted):
            source.pack(name, *into)
        if unit == "attention":
            yield from ((f"{part}.{field}", views[f"{matrix}.{field}"]) for field in FIELDS)
        elif matrix == "w2":                # an expert is ready with its second matrix
            yield unit, block


def total_bytes(tensors: Tensors) -> int:
    return sum(prod(shape) * dtype.itemsize for dtype, shape in tensors.values())


@os_errors()
def convert(src: str | Path, dst: str | Path, group_size: int = 128) -> bool:
    """Pack the model in `src` into `dst`, or go on with that: files there are checked, and kept if whole.

    -> False if there was nothing left to do.
    """
    if group_size not in (128, 64, 32):
        raise UserError(f"group size {group_size}: it can be 128, 64 or 32")
    source, dst = open_source(src), Path(dst)
    group_size = min(group_size, source.largest_group)              # wider would merge the source's scales
    model = ModelShapes(source.config, group_size)
    parts, files = hugging_face(source.config), packed_tensors(source, model)
    stamp = {"source": f"{source.fingerprint}-{group_size}"}
    size = {file: total_bytes(tensors) for file, tensors in files.items()}
    headers = check_destination(dst, files, stamp)
    remove_leftovers(dst)
    with closing(Progress(sum(size[file] for file in headers), f"{dst}: checking")) as bar:
        todo = [file for file in files if file not in headers or not intact(headers[file], files[file], bar)]
    if not todo:
        with suppress(UserError):
            PackedModel(dst)
            print(f"{dst}: holds this model already, complete and undamaged", file=sys.stderr)
            return False
    check_space(dst, sum(size[file] for file in todo))
    (dst / MANIFEST).unlink(missing_ok=True)
    try:
        with closing(Progress(sum(size[file] for file in todo), f"{dst}: packing")) as bar:
            for file in todo:
                tensors = packed(source, parts[file], files[file], model.layout)
                write_tensors(dst / file, files[file], stamp, tensors, bar.add)
    except KeyboardInterrupt:
        note(f"{dst}: what is done is kept; the same command goes on from there")
        raise
    copy_config(source.raw, source.tokenizer, dst)
    write_json(dst / MANIFEST, {"format": "duoserve", "version": 1, "group_size": group_size,
                                "fingerprint": fingerprint(dst, list(files)), "source": source.fingerprint})
    return True


def ensure_packed(directory: str | Path, weights_dir: str | Path) -> Path:
    """A packed directory as it is; another packed into `weights_dir`, once, and found there from then on."""
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
def to_hf(src: str | Path, dst: str | Path) -> None:
    """Unpack `src` into a Hugging Face directory in float32, a shard a layer; `dst` appears when complete."""
    model, dst = PackedModel(src), Path(dst).resolve()
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise UserError(f"{dst}: is there and not an empty directory; name another")
    where: dict[str, str] = {}              # tensor -> shard
    files = hugging_face(model.config)
    total = sum(total_bytes(float_tensors(parts)) for parts in files.values())
    made = dst.with_name(f".{dst.name}.{os.getpid()}.part")
    try:
        dst.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(dst.parent, glob.escape(dst.name))
        check_space(dst.parent, total)
        made.mkdir()
        with closing(Progress(total, f"{dst}: unpacking")) as bar:
            for i, (file, parts) in enumerate(files.items(), 1):
                shard, shapes = f"model-{i:05d}-of-{len(files):05d}.safetensors", float_tensors(parts)
                tensors = unpacked(model.headers[file], parts, model.layout)
                write_tensors(made / shard, shapes, {"format": "pt"}, tensors, bar.add)
                where |= dict.fromkeys(shapes, shard)
        index = {"metadata": {"total_size": total}, "weight_map": where}
        write_json(made / "model.safetensors.index.json", index)
        raw = read_json(model.directory / "config.json")
        copy_config(raw, model.directory / "tokenizer.model", made, torch_dtype="float32", dtype="float32")
        made.rename(dst)                    # an empty directory may be there
    finally:
        shutil.rmtree(made, ignore_errors=True)


def float_tensors(parts: dict[str, Shapes]) -> Tensors:
    """The Hugging Face tensors of a file's `parts`."""
    return {name: (torch.float32, shape) for shapes in parts.values() for name, shape in shapes.items()}


def unpacked(header: Header, parts: dict[str, Shapes], layout: ExpertLayout) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one shard, in fp32: what `packed` made a file of, from that file."""
    for part, shapes in parts.items():
        unit, matrix = part.rsplit(".", 1)
        if matrix == "weight":
            yield *shapes, header.read(part).float()
            continue
        if unit == "attention":
            views = {f"{matrix}.{field}": header.read(f"{part}.{field}") for field in FIELDS}
        elif matrix == "w13":               # with its first matrix comes the whole expert
            views = layout.views(header.read(unit))
        yield from ((name, unpack(*triple)) for name, *triple in triples(views, matrix, shapes))


def unpack(*triple: Tensor) -> Tensor:
    """`dequantize` by blocks of rows, so that its temporaries are small."""
    step = max(1, BLOCK // (2 * triple[0].shape[1]))
    return torch.cat([dequantize(*rows) for rows in zip(*(t.split(step) for t in triple))])


def make_parser() -> Parser:
    parser = Parser(prog="python -m duoserve.checkpoint",
                    description="A Hugging Face Mixtral to four bits, and back.",
                    examples=("mixtral-hf weights/mixtral", "weights/demo demo-hf --to-hf"))
    add = parser.add_argument
    add("src", metavar="SRC", help="the directory to read")
    add("dst", metavar="DST", help="the directory to write: new, empty, or an interrupted conversion")
    add("--group-size", type=int, choices=(128, 64, 32), default=128, metavar="128|64|32",
        help="columns that share a scale and a zero, at most (default 128)")
    add("--to-hf", action="store_true",
        help="from packed to Hugging Face's layout, in float32 (default: from that to packed)")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    dst = Path(args.dst)
    if args.to_hf:
        to_hf(args.src, dst)
    elif not convert(args.src, dst, args.group_size):
        return                              # all was there already; `convert` has said so
    made = [path.stat().st_size for path in dst.glob("*.safetensors") if path.name != "predictor.safetensors"]
    print(f"{dst}: {format_bytes(sum(made))} in {len(made)} files", file=sys.stderr)
