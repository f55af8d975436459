"""The checkpoints that people have, each read as if it had Hugging Face's layout: its 16-bit safetensors;
the same model in 4 bits, by AWQ or GPTQ; and Mistral's own consolidated files. Every tensor's name, shape and
type is checked before the first is converted; weights of 4 bits are repacked, never quantised again.
"""

import hashlib
import json
import re
from itertools import chain
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from ..config import MixtralConfig
from ..errors import UserError
from ..files import Header, reading
from ..quant import pack
from ..quantize import quantize

BLOCK = 2 * 2**20                           # weights at a time: 8 MB of fp32, which malloc reuses
SAMPLE = 2**16                              # bytes of each source tensor that its fingerprint hashes
FLOATS = torch.float16, torch.bfloat16, torch.float32
CONFIG_ERRORS = OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError

# What can be repacked, defaults first. GPTQ's `desc_act` deals columns out to groups in another order.
REPACKED = {"awq": {"bits": [4], "zero_point": [True], "version": ["gemm"]},
            "gptq": {"bits": [4], "desc_act": [False], "is_marlin_format": [False],
                     "checkpoint_format": ["gptq", "gptq_v2"]}}
# Hugging Face's part of a tensor's name -> Mistral's.
CONSOLIDATED = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output",
                "model.layers": "layers", "input_layernorm": "attention_norm",
                "post_attention_layernorm": "ffn_norm", "self_attn.": "attention.", "q_proj": "wq",
                "k_proj": "wk", "v_proj": "wv", "o_proj": "wo", "block_sparse_moe": "feed_forward"}
# config.json's keys -> those of params.json; mistral-inference's defaults for what may be left out.
PARAMS = {"vocab_size": "vocab_size", "hidden_size": "dim", "intermediate_size": "hidden_dim",
          "head_dim": "head_dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
          "num_key_value_heads": "n_kv_heads", "num_local_experts": "num_experts",
          "num_experts_per_tok": "num_experts_per_tok", "rms_norm_eps": "norm_eps",
          "rope_theta": "rope_theta", "max_position_embeddings": "max_seq_len",
          "sliding_window": "sliding_window"}
OPTIONAL = {"rope_theta": 1e6, "max_seq_len": 32768, "sliding_window": None}


class HuggingFaceSource:
    """Safetensors of 16 or 32 bits, in one file or in shards with an index.

    What a conversion needs of any source: its `config`, parsed and `raw`, the `tokenizer`'s path, a
    `fingerprint`, the `largest_group` that loses nothing, and `dtype`, `plain` and `pack`, which take Hugging
    Face's names.
    """

    described, largest_group = "config.json", 128

    def __init__(self, directory: Path, raw: dict, config: MixtralConfig, tokenizer: Path, parts: dict):
        """`parts`: as from `hugging_face`."""
        self.directory, self.raw, self.config, self.tokenizer = directory, raw, config, tokenizer
        self.headers: dict[str, Header] = {}                        # file -> its header
        self.where: dict[str, Header] = {}                          # tensor, by its stored name -> its file
        self.index, self.files = self._find()
        for part, shapes in chain.from_iterable(file.items() for file in parts.values()):
            for name, shape in shapes.items():
                for stored, (shape, *dtypes) in self._stored(name, shape, part.endswith(".weight")).items():
                    self._check(stored, shape, dtypes)
        for name in self.files:             # a bias or a layer too many is not ignored
            extra = name.startswith(("model.layers.", "layers.")) and name not in self.where
            if extra and not name.endswith("rotary_emb.inv_freq"):
                raise UserError(f"{self.index}: {name} has no place in the Mixtral of {self.described}")
        self.fingerprint = self._fingerprint()

    def _find(self) -> tuple[Path, dict[str, str]]:
        """The file that lists the tensors, and tensor -> file; fills `headers`."""
        index, single = self.directory / "model.safetensors.index.json", self.directory / "model.safetensors"
        if single.exists():                 # it goes before an index, as in transformers
            self.headers[single.name] = Header(single)
            return single, dict.fromkeys(self.headers[single.name].tensors, single.name)
        files = self._read_index(index)
        self.headers = {name: Header(self.directory / name) for name in sorted(set(files.values()))}
        return index, files

    def _read_index(self, index: Path) -> dict[str, str]:
        """Tensor -> shard, each of them in the directory (where links may lead anywhere)."""
        try:
            files = json.loads(index.read_bytes())["weight_map"]
            if not files or not all(isinstance(file, str) for file in files.values()):
                raise ValueError("weight_map names no files")
        except CONFIG_ERRORS as error:
            raise UserError(f"{index}: cannot be used ({error!r}); get it again") from None
        for file in set(files.values()):
            path = PurePosixPath(file)
            if not file or "\0" in file or path.is_absolute() or ".." in path.parts:
                raise UserError(f"{index}: names {file!r}, outside {self.directory}; get it again")
            if not (self.directory / file).is_file():
                raise UserError(f"{self.directory / file}: missing, though {index.name} names it; get it too")
        return files

    def _stored(self, name: str, shape: tuple[int, ...], plain: bool) -> dict[str, tuple]:
        """What is stored of a tensor: the file's name for it -> its shape there, then its possible types."""
        return {name: (shape, *FLOATS)}

    def _check(self, name: str, shape: tuple[int, ...], dtypes: list[torch.dtype]) -> None:
        if name not in self.files:
            mend = "get the complete model"
            if f"{name.removesuffix('weight')}qweight" in self.files:
                mend = "its qweight is there, but config.json has no quantization_config: get the right one"
            raise UserError(f"{self.index}: {name} is missing; {mend}")
        self.where[name] = self.headers[self.files[name]]
        self.where[name].expect(name, shape, dtypes, self.described)

    def _fingerprint(self) -> str:
        """Hashes config, tokenizer, headers and a sample of each tensor: fine-tunes differ there only."""
        digest = hashlib.sha256()
        for path in (self.directory / self.described, self.tokenizer):
            with reading(path) as file:
                digest.update(hashlib.sha256(file.read()).digest())
        for name, header in self.headers.items():
            digest.update(hashlib.sha256(header.raw + f"{name} {header.size}".encode()).digest())
            with reading(header.path) as file:
                for _, _, start, end in header.tensors.values():
                    file.seek(max(start, (start + end - SAMPLE) // 2))
                    digest.update(file.read(min(SAMPLE, end - start)))
        return digest.hexdigest()[:16]

    def _load(self, name: str) -> Tensor:
        return self.where[name].read(name)

    def _read(self, name: str) -> tuple[Tensor, str]:
        """A tensor by Hugging Face's name, and what to call it in an error."""
        return self._load(name), f"{self.where[name].path}: {name}"

    def dtype(self, name: str) -> torch.dtype:
        """The type of `plain`: the checkpoint's own 16 bits; float32 becomes float16."""
        (stored,) = self._stored(name, (), True)
        dtype = self.where[stored].tensors[stored][0]
        return torch.float16 if dtype == torch.float32 else dtype

    def plain(self, name: str) -> Tensor:
        """A tensor that stays in 16 bits."""
        tensor, called = self._read(name)
        tensor = tensor.to(self.dtype(name))
        if not all(block.isfinite().all() for block in tensor.view(-1).split(BLOCK)):
            raise UserError(f"{called} holds numbers that are infinite, NaN or beyond float16")
        return tensor

    def pack(self, name: str, q: Tensor, scale: Tensor, zero: Tensor) -> None:
        """Pack a matrix [N, columns] into q [N, columns / 2], scale and zero [N, groups], on the host."""
        (weight, called), device = self._read(name), "cuda" if torch.cuda.is_available() else "cpu"
        group, step = weight.shape[1] // scale.shape[1], max(1, BLOCK // weight.shape[1])
        for block, *into in zip(*(t.split(step) for t in (weight, q, scale, zero))):
            for view, made in zip(into, quantize(block.to(device), group, called)):
                view.copy_(made)


class QuantizedSource(HuggingFaceSource):
    """4-bit matrices by AWQ or GPTQ, whose weights are `(q - zero) * scale` as ours are, beside plain ones.

    A 32-bit word holds eight nibbles, the lowest first. qweight: AWQ [in, out / 8], eight outputs a word, in
    the order 0 2 4 6 1 3 5 7 (AutoAWQ, `WQLinear_GEMM`); GPTQ [in / 8, out], eight inputs a word. qzeros
    [groups, out / 8], in the same order of outputs (GPTQ: ascending), and scales [groups, out] in fp16. GPTQ
    stores a zero less one (AutoGPTQ: `zeros + 1`, which may make 16), `gptq_v2` the zero itself.
    """

    def __init__(self, directory: Path, raw: dict, *rest):
        found = raw["quantization_config"]
        found = found if isinstance(found, dict) else {"quant_method": found}
        self.method, self.group = found.get("quant_method"), found.get("group_size", 128)

        def require(fits: bool, what: str) -> None:
            if not fits:
                raise UserError(f"{directory / self.described}: quantization_config: {what} cannot be "
                                "repacked; give AWQ (version gemm) or GPTQ (desc_act false) of 4 bits in "
                                "groups of 128, 64 or 32, or the 16-bit model they were made of")

        require(self.method in list(REPACKED), f"weights quantised by {self.method!r}")    # (maybe no string)
        whole = type(self.group) is int
        require(whole and (self.group in (-1, 32, 64) or self.group > 0 and self.group % 128 == 0),
                f"group_size {self.group!r}")
        for key, allowed in REPACKED[self.method].items():
            value = allowed[0] if found.get(key) is None else found[key]
            version = value.lower() if isinstance(value, str) else value
            require(version in allowed, f"{key} {value!r}")
        self.largest_group = 128 if self.group == -1 else min(self.group, 128)
        self.lacking = version == "gptq"    # one, in each stored zero
        super().__init__(directory, raw, *rest)
        for name, header in self.where.items():
            if name.endswith(".g_idx"):     # the group of each column
                index = self._load(name).long()
                if not torch.equal(index, torch.arange(len(index)) // self._group(len(index))):
                    raise UserError(f"{header.path}: {name} puts columns into groups out of order; give a "
                                    "GPTQ checkpoint made without desc_act, or the 16-bit model")
            elif name.endswith(".bias") and self._load(name).any():         # AutoGPTQ writes zeros
                raise UserError(f"{header.path}: {name} is not zero; a Mixtral has no biases")

    def _group(self, columns: int) -> int:
        return columns if self.group == -1 else self.group

    def _stored(self, name: str, shape: tuple[int, ...], plain: bool) -> dict[str, tuple]:
        module = name.removesuffix("weight")
        if f"{module}qweight" not in self.files:
            return super()._stored(name, shape, plain)
        if plain:
            raise UserError(f"{self.index}: {name} is quantised ({module}qweight), but is needed in 16 bits;"
                            " give a checkpoint that leaves it so (modules_to_not_convert)")
        rows, columns = shape
        group = self._group(columns)
        if columns % group or rows % 8:
            raise UserError(f"{self.index}: {name} is {rows} by {columns}, no multiple of 8 by group_size "
                            f"{group}; give a checkpoint with smaller groups, or the 16-bit model")
        words = (columns, rows // 8) if self.method == "awq" else (columns // 8, rows)
        stored = {"qweight": (words, torch.int32), "qzeros": ((columns // group, rows // 8), torch.int32),
                  "scales": ((columns // group, rows), torch.float16),
                  "g_idx": ((columns,), torch.int32, torch.int64), "bias": ((rows,), *FLOATS)}
        return {module + key: value for key, value in stored.items()
                if key not in ("g_idx", "bias") or module + key in self.files}

    def _nibbles(self, name: str) -> Tensor:
        """int32 [a, b] -> uint8 [a, b, 8]; AWQ's even outputs, then its odd ones, put back in order."""
        words = self._load(name)
        pairs = words.view(torch.uint8)     # little-endian: nibbles 0 and 1, 2 and 3, ...
        nibbles = torch.stack((pairs & 15, pairs >> 4), -1).view(*words.shape, 8)
        return nibbles.unflatten(-1, (2, 4)).mT.flatten(-2) if self.method == "awq" else nibbles

    def pack(self, name: str, q: Tensor, scale: Tensor, zero: Tensor) -> None:
        module = name.removesuffix("weight")
        if f"{module}qweight" not in self.files:
            return super().pack(name, q, scale, zero)
        scales = self._load(f"{module}scales")
        zeros = self._nibbles(f"{module}qzeros").flatten(1) + self.lacking
        if not scales.isfinite().all():
            path = self.where[f"{module}scales"].path
            raise UserError(f"{path}: {module}scales holds infinities or NaN; get it again")
        for view, theirs in ((scale, scales), (zero, zeros)):       # repeated, if their groups are wider
            view.copy_(theirs.T.repeat_interleave(view.shape[1] // len(theirs), 1))
        nibbles = self._nibbles(f"{module}qweight")
        columns = nibbles.flatten(1).T if self.method == "awq" else nibbles.transpose(0, 1).flatten(1)
        q.copy_(pack(columns, columns.shape[1] // scale.shape[1]))


class ConsolidatedSource(HuggingFaceSource):
    """Mistral's own files: other names, and RoPE on neighbours (x0, x1), not on halves (x0, x[A/2]).

    The names are mistral-inference's, or those of the first release, where a layer's experts are stacked in
    `block_sparse_moe.w1|w2|w3` [experts * F, D], w2 transposed (transformers,
    `convert_mixtral_weights_to_hf.py`).
    """

    described = "params.json"

    def _find(self) -> tuple[Path, dict[str, str]]:
        files, self.transposed = {}, set()
        for path in sorted(self.directory.glob("consolidated*.safetensors")):
            self.headers[path.name] = header = Header(path)
            header.tensors = dict(chain.from_iterable(
                self._renamed(path, *tensor).items() for tensor in header.tensors.items()))
            for name in header.tensors:
                if files.setdefault(name, path.name) != path.name:
                    raise UserError(f"{path}: {name} is in {files[name]} too: slices for several GPUs cannot "
                                    "be joined here; get the model in Hugging Face's layout")
        return self.directory / "consolidated*.safetensors", files

    def _renamed(self, path: Path, name: str, entry: tuple) -> dict[str, tuple]:
        """A tensor, or those that are stacked in it, by mistral-inference's names."""
        if name.endswith("block_sparse_moe.gate.weight"):
            return {name.replace("block_sparse_moe", "feed_forward"): entry}
        stack = re.fullmatch(r"(layers\.\d+\.)block_sparse_moe\.(w[123])(?:\.weight)?", name)
        if not stack:
            return {name: entry}
        c, (dtype, shape, start, end) = self.config, entry
        D, F, E = c.hidden_size, c.intermediate_size, c.num_local_experts
        if shape != (E * F, D):
            raise UserError(f"{path}: {name} has shape {list(shape)}, by params.json {[E * F, D]}")
        names = [f"{stack[1]}feed_forward.experts.{e}.{stack[2]}.weight" for e in range(E)]
        if stack[2] == "w2":
            self.transposed |= set(names)
        each, size = (D, F) if stack[2] == "w2" else (F, D), (end - start) // E
        return {name: (dtype, each, start + e * size, start + (e + 1) * size) for e, name in enumerate(names)}

    def _stored(self, name: str, shape: tuple[int, ...], plain: bool) -> dict[str, tuple]:
        for theirs, ours in CONSOLIDATED.items():
            name = name.replace(theirs, ours)
        return {name: (shape, *FLOATS)}

    def _read(self, name: str) -> tuple[Tensor, str]:
        (stored,) = self._stored(name, (), True)
        tensor, called = super()._read(stored)
        if stored in self.transposed:
            tensor = tensor.view(tensor.shape[::-1]).T.contiguous()
        elif stored.endswith((".wq.weight", ".wk.weight")):         # of a head even rows first, then odd
            pairs = tensor.unflatten(0, (-1, self.config.head_dim // 2, 2))
            tensor = pairs.transpose(1, 2).flatten(0, 2)
        return tensor, called


def consolidated_config(path: Path) -> dict:
    """What params.json says, as Hugging Face's config.json says it."""
    try:
        params = json.loads(path.read_bytes())
        params = OPTIONAL | params | params["moe"]
        if isinstance(window := params["sliding_window"], str):     # as in some releases
            params["sliding_window"] = int(window)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; consolidated safetensors need it: get it too") from None
    except CONFIG_ERRORS as error:
        raise UserError(f"{path}: not a Mixtral's parameters ({error!r}); get it again") from None
    for key in PARAMS.values():
        if params.get(key) is None and key not in OPTIONAL:
            raise UserError(f"{path}: has no {key}; get it again")
    return {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_act": "silu",
            "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
            **{ours: params[key] for ours, key in PARAMS.items()}}
