"""Conversion from Hugging Face's layout and back: nothing lost, nothing half done, every mistake named."""

import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from models import a_line, contents, write_hf
from safetensors.torch import load_file, save_file

from duoserve import checkpoint
from duoserve.checkpoint import convert, ensure_packed, to_hf
from duoserve.errors import Progress, UserError, format_bytes
from duoserve.files import Header
from duoserve.packed import PackedModel
from duoserve.quant import dequantize, group_size
from duoserve.quantize import quantize

PACKED = ("q_proj", "k_proj", "v_proj", "o_proj", "w1", "w2", "w3")


@pytest.fixture
def hf(tmp_path):
    write_hf(tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A conversion to look at and to copy, never to change."""
    path = tmp_path_factory.mktemp("made")
    write_hf(path / "hf")
    convert(path / "hf", path / "packed")
    return path


@pytest.fixture
def packed(made, tmp_path):
    return Path(shutil.copytree(made / "packed", tmp_path / "packed"))


def load(directory):
    state = {}
    for file in directory.glob("*.safetensors"):
        state |= load_file(file)
    return state


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(*words, call=convert, args):
    with pytest.raises(UserError) as error:
        call(*args)
    assert not [word for word in words if word not in str(error.value)], str(error.value)


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 4
    path.write_bytes(data)


# Nothing lost

@pytest.mark.parametrize("dtype, group", [(torch.bfloat16, 128), (torch.float16, 64), (torch.float32, 32),
                                          (torch.bfloat16, 32)])
def test_round_trip_is_what_quantisation_makes_of_each_matrix(tmp_path, monkeypatch, dtype, group):
    monkeypatch.setattr(checkpoint, "BLOCK", 1000)                  # several blocks of rows, even here
    state = write_hf(tmp_path / "hf", dtype=dtype, hidden_size=128, intermediate_size=192,
                     num_hidden_layers=1)
    convert(tmp_path / "hf", tmp_path / "packed", group)
    to_hf(tmp_path / "packed", tmp_path / "back")
    back = load(tmp_path / "back")
    assert back.keys() == state.keys()
    for name, w in state.items():
        if name.split(".")[-2] in PACKED:
            expected = dequantize(*quantize(w, group_size(w.shape[1], group)))
        else:
            expected = (w.half() if dtype == torch.float32 else w).float()
        assert back[name].dtype == torch.float32 and torch.equal(back[name], expected), name


def test_what_lies_on_the_grid_survives_exactly(tmp_path):
    state = write_hf(tmp_path / "hf", grid=True, num_hidden_layers=2)
    convert(tmp_path / "hf", tmp_path / "packed")
    to_hf(tmp_path / "packed", tmp_path / "back")
    back = load(tmp_path / "back")
    assert all(torch.equal(back[name], w.float()) for name, w in state.items())


def test_the_packed_directory_is_flat_and_complete(made):
    assert set(contents(made / "packed")) == {
        "config.json", "tokenizer.model", "outer.safetensors", "manifest.json",
        *(f"layer-{i:03d}.safetensors" for i in range(3))}
    model = PackedModel(made / "packed")
    assert model.resident()["embed.weight"].dtype == torch.bfloat16
    assert model.manifest["format"] == "duoserve" and model.manifest["group_size"] == 128
    block = np.empty(model.layout.nbytes, np.uint8)
    model.read_expert(2, 7, block)
    views, state = model.layout.views(torch.from_numpy(block)), load(made / "hf")
    w13 = torch.cat([state[f"model.layers.2.block_sparse_moe.experts.7.{w}.weight"] for w in ("w1", "w3")])
    qkv = torch.cat([state[f"model.layers.2.self_attn.{x}_proj.weight"] for x in "qkv"])
    for field, of_w13, of_qkv in zip(("q", "scale", "zero"), quantize(w13, 64), quantize(qkv, 64)):
        assert torch.equal(views[f"w13.{field}"], of_w13)
        assert torch.equal(model.resident()[f"layers.2.attention.qkv.{field}"], of_qkv)


def test_shards_and_one_file_give_the_same(made, tmp_path):
    write_hf(tmp_path / "hf", shards=4)
    convert(tmp_path / "hf", tmp_path / "packed")
    to_hf(tmp_path / "packed", tmp_path / "a")
    to_hf(made / "packed", tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_shards_may_be_links_and_other_safetensors_are_let_be(tmp_path):
    write_hf(tmp_path / "blobs", shards=2)
    (tmp_path / "hf").mkdir()
    for path in (tmp_path / "blobs").iterdir():                     # as in Hugging Face's cache
        (tmp_path / "hf" / path.name).symlink_to(path)
    (tmp_path / "hf" / "consolidated.safetensors").write_bytes(b"another layout")
    convert(tmp_path / "hf", tmp_path / "packed")
    assert not any(path.is_symlink() for path in (tmp_path / "packed").iterdir())
    PackedModel(tmp_path / "packed")


@pytest.mark.parametrize("head", [False, True])
def test_tied_embeddings_have_no_head_of_their_own(tmp_path, head):
    state = write_hf(tmp_path / "hf", tie_word_embeddings=True, num_hidden_layers=1)
    if head:                                                        # some savers write it nevertheless
        state |= {"lm_head.weight": state["model.embed_tokens.weight"].clone()}
        save_file(state, tmp_path / "hf/model.safetensors")
    convert(tmp_path / "hf", tmp_path / "packed")
    assert "head.weight" not in PackedModel(tmp_path / "packed").resident()
    to_hf(tmp_path / "packed", tmp_path / "back")
    assert "lm_head.weight" not in load(tmp_path / "back")


def test_to_hf_writes_what_transformers_reads(made, tmp_path):
    to_hf(made / "packed", tmp_path / "back")
    config = json.loads((tmp_path / "back/config.json").read_text())
    source = json.loads((made / "hf/config.json").read_text())
    assert config == source | {"torch_dtype": "float32", "dtype": "float32"}
    index = json.loads((tmp_path / "back/model.safetensors.index.json").read_text())
    assert set(contents(tmp_path / "back")) == {
        "config.json", "tokenizer.model", "model.safetensors.index.json", *index["weight_map"].values()}
    for name, file in index["weight_map"].items():
        assert name in Header(tmp_path / "back" / file).tensors
        assert Header(tmp_path / "back" / file).metadata["format"] == "pt"
    assert index["weight_map"].keys() == load(made / "hf").keys()
    assert (tmp_path / "back/tokenizer.model").read_bytes() == (made / "hf/tokenizer.model").read_bytes()
    convert(tmp_path / "back", tmp_path / "again")                  # and it is a source like any other


# Every mistake named

def test_no_such_directory(tmp_path):
    refused("nowhere", args=(tmp_path / "nowhere", tmp_path / "out"))
    refused("nowhere", call=ensure_packed, args=(tmp_path / "nowhere", tmp_path))
    refused("nowhere", call=to_hf, args=(tmp_path / "nowhere", tmp_path / "out"))


def test_nothing_is_written_when_the_source_is_refused(hf, tmp_path):
    (hf / "tokenizer.model").unlink()
    refused("tokenizer.model", args=(hf, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_no_weights(hf, tmp_path):
    (hf / "model.safetensors").unlink()
    refused(str(hf), "no weights", args=(hf, tmp_path / "out"))
    refused(str(hf), "no weights", call=ensure_packed, args=(hf, tmp_path / "out"))


def test_only_tokenizer_json(hf, tmp_path):
    (hf / "tokenizer.model").rename(hf / "tokenizer.json")
    refused("only tokenizer.json", "no tokenizer.model", "sentencepiece", args=(hf, tmp_path / "out"))
    refused("only tokenizer.json", call=ensure_packed, args=(hf, tmp_path / "out"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pt", "consolidated.00.pth"])
def test_pickles_are_refused(hf, tmp_path, name):
    (hf / "model.safetensors").rename(hf / name)
    refused(name, "nothing is ever unpickled", "save the model as safetensors", args=(hf, tmp_path / "out"))


def test_no_config_and_another_architecture(hf, tmp_path):
    edit_config(hf, model_type="llama")
    refused("config.json", "'llama'", args=(hf, tmp_path / "out"))
    (hf / "config.json").unlink()
    refused("config.json", "no such file", args=(hf, tmp_path / "out"))


def test_a_quantised_checkpoint_is_refused_by_its_method(hf, tmp_path):
    edit_config(hf, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    refused("config.json", "'bitsandbytes'", "16-bit", args=(hf, tmp_path / "out"))
    edit_config(hf, quantization_config=None)
    convert(hf, tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())


@pytest.mark.parametrize("name",
                         ["model.norm.weight", "lm_head.weight", "model.layers.2.self_attn.k_proj.weight",
                                  "model.layers.1.block_sparse_moe.experts.5.w3.weight"])
def test_a_missing_or_misshapen_tensor_is_named_with_its_file(tmp_path, name):
    state = write_hf(tmp_path / "hf")
    save_file({n: w for n, w in state.items() if n != name}, tmp_path / "hf/model.safetensors")
    refused("model.safetensors", name, "missing", args=(tmp_path / "hf", tmp_path / "out"))
    save_file(state | {name: state[name][:-1].clone()}, tmp_path / "hf/model.safetensors")
    refused("model.safetensors", name, "shape", str(list(state[name].shape)),
            args=(tmp_path / "hf", tmp_path / "out"))
    save_file(state | {name: state[name].to(torch.int8)}, tmp_path / "hf/model.safetensors")
    refused("model.safetensors", name, "int8", args=(tmp_path / "hf", tmp_path / "out"))
    assert not (tmp_path / "out").exists()      # all are checked before the first is converted


def test_tensors_that_a_mixtral_does_not_have_are_not_left_out_in_silence(tmp_path):
    state = write_hf(tmp_path / "hf", num_hidden_layers=1)
    rotary = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(state | rotary, tmp_path / "hf/model.safetensors")
    convert(tmp_path / "hf", tmp_path / "out")
    save_file(state | {"model.layers.0.self_attn.q_proj.bias": torch.ones(64)},
              tmp_path / "hf/model.safetensors")
    refused("model.safetensors", "q_proj.bias", args=(tmp_path / "hf", tmp_path / "other"))


@pytest.mark.parametrize("dtype, name, value", [
    (torch.float32, "model.layers.0.block_sparse_moe.gate.weight", 7e4),
    (torch.float32, "model.embed_tokens.weight", -1e30),
    (torch.bfloat16, "model.norm.weight", float("nan")),
    (torch.bfloat16, "model.layers.1.self_attn.o_proj.weight", 1e5),
    (torch.float32, "model.layers.2.block_sparse_moe.experts.3.w2.weight", float("inf"))])
def test_numbers_beyond_float16_are_refused_by_name(tmp_path, dtype, name, value):
    state = write_hf(tmp_path / "hf", dtype=dtype)
    state[name].view(-1)[5] = value
    save_file(state, tmp_path / "hf/model.safetensors")
    refused("model.safetensors", name, args=(tmp_path / "hf", tmp_path / "out"))
    assert not (tmp_path / "out/manifest.json").exists()


def test_columns_that_no_group_divides(tmp_path):
    write_hf(tmp_path / "hf", intermediate_size=100)
    refused("w2", "100", "32", args=(tmp_path / "hf", tmp_path / "out"))
    refused("group size 100", args=(tmp_path / "hf", tmp_path / "out", 100))


def test_index_and_shards(tmp_path):
    hf, args = tmp_path / "hf", (tmp_path / "hf", tmp_path / "out")
    write_hf(hf, shards=3)
    index, shard = hf / "model.safetensors.index.json", hf / "model-00002-of-00003.safetensors"
    text, data = index.read_text(), shard.read_bytes()
    shard.unlink()
    refused(str(shard), "missing", args=args)
    shard.write_bytes(data[:-10])
    refused(str(shard), "truncated", args=args)
    shard.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refused(str(shard), args=args)
    shutil.copy(hf / "model-00001-of-00003.safetensors", shard)
    refused(str(shard), "is not in it", args=args)
    shard.write_bytes(data)
    for outside in ("../model.safetensors", "/etc/passwd", "a/../../b", ""):
        index.write_text(text.replace(shard.name, outside))
        refused(str(index), repr(outside), args=args)
    for broken in ("{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', '{"weight_map": 3}'):
        index.write_text(broken)
        refused(str(index), args=args)
    index.write_text(text)
    convert(*args)


def test_a_truncated_or_damaged_single_file(hf, tmp_path):
    path = hf / "model.safetensors"
    data = path.read_bytes()
    for wrong in (data[:-1], data[:100], b"", data[:8] + b"x" + data[9:]):
        path.write_bytes(wrong)
        refused(str(path), args=(hf, tmp_path / "out"))


def test_destinations_that_are_not_ours(made, tmp_path, packed):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    refused(str(out), "thesis.txt", args=(made / "hf", out))
    refused(str(out), call=to_hf, args=(made / "packed", out))
    assert set(contents(out)) == {"thesis.txt"}
    (out / "thesis.txt").rename(tmp_path / "thesis.txt")
    shutil.copy(made / "hf/config.json", out)       # a model half downloaded, not a conversion
    refused(str(out), "config.json", args=(made / "hf", out))
    # An unfinished conversion with a file that is not part of it.
    shutil.copy(packed / "outer.safetensors", out)
    (tmp_path / "thesis.txt").rename(out / "thesis.txt")
    refused(str(out), "thesis.txt", args=(made / "hf", out))
    refused("thesis.txt", args=(made / "hf", out / "thesis.txt"))
    refused("thesis.txt", call=to_hf, args=(made / "packed", out / "thesis.txt"))
    refused(str(made / "hf"), args=(made / "hf", made / "hf"))
    refused("packed", "--to-hf", args=(packed, tmp_path / "new"))
    refused(str(packed), "another", args=(made / "hf", packed, 32))


def test_a_fine_tune_of_the_same_shape_is_another_model(made, tmp_path, packed):
    state = write_hf(tmp_path / "tuned")
    state["model.layers.1.self_attn.q_proj.weight"][3, 4] += 1      # the header and the size stay the same
    save_file(state, tmp_path / "tuned/model.safetensors", {"format": "pt"})
    before = contents(packed)
    refused(str(packed), "another model", args=(tmp_path / "tuned", packed))
    assert contents(packed) == before
    names = [ensure_packed(source, tmp_path).name for source in (made / "hf", tmp_path / "tuned")]
    assert names[0].split("-")[1] != names[1].split("-")[1]


def test_a_disk_without_enough_space_is_noticed_before_anything_is_written(made, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    refused(str(tmp_path / "out"), "1 kB are free", args=(made / "hf", tmp_path / "out"))
    refused("1 kB are free", call=to_hf, args=(made / "packed", tmp_path / "back"))


def test_the_command_line_says_it_in_one_line(made, tmp_path, cli):
    def line(path):
        size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        return f"{path}: {format_bytes(size)} in 4 files\n"

    for args, word in (((made / "no", tmp_path / "out"), "no such"),
                       ((made / "hf", tmp_path / "out", "--group-size", "100"), "--group-size")):
        status, out, err = cli("checkpoint", *args)
        assert (status, out) == (2, "")
        a_line(err, word)
    status, out, err = cli("checkpoint", made / "hf", tmp_path / "out")     # without a terminal just one line
    assert (status, out, err) == (0, "", line(tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(made / "packed")
    back = tmp_path / "back"
    assert cli("checkpoint", tmp_path / "out", back, "--to-hf") == (0, "", line(back))
    assert cli("checkpoint", made / "hf", tmp_path / "out") == (
        0, "", f"{tmp_path / 'out'}: holds this model already, complete and undamaged\n")


# Nothing half done

def test_an_interrupted_conversion_goes_on_where_it_was(made, tmp_path, monkeypatch, capsys):
    out, real = tmp_path / "out", checkpoint.write_tensors

    def interrupt(path, *rest):
        if path.name == "layer-001.safetensors":
            raise KeyboardInterrupt
        real(path, *rest)

    monkeypatch.setattr(checkpoint, "write_tensors", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(made / "hf", out)
    monkeypatch.undo()
    assert capsys.readouterr().err.endswith(f"note: {out}: what is done is kept; the same command goes on "
                                            "from there\n")
    assert set(contents(out)) == {"outer.safetensors", "layer-000.safetensors"}
    refused("not a (complete) packed model", call=PackedModel, args=(out,))
    refused("unfinished", call=ensure_packed, args=(out, tmp_path))
    times = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    convert(made / "hf", out)
    assert contents(out) == contents(made / "packed")
    assert {name: (out / name).stat().st_mtime_ns for name in times} == times


def test_interrupted_in_the_middle_of_a_layer_nothing_is_left_of_it(made, tmp_path, monkeypatch):
    real = checkpoint.HuggingFaceSource.pack

    def interrupt(self, name, *into):
        if "layers.1.block_sparse_moe.experts.3" in name:
            raise KeyboardInterrupt
        real(self, name, *into)

    monkeypatch.setattr(checkpoint.HuggingFaceSource, "pack", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(made / "hf", tmp_path / "out")
    assert set(contents(tmp_path / "out")) == {"outer.safetensors", "layer-000.safetensors"}


def start(made, out):
    """Convert in a child process, slowly enough to be killed half-way."""
    def slowly(*args):
        time.sleep(0.005)
        real(*args)

    def run():
        checkpoint.HuggingFaceSource.pack = slowly
        convert(made / "hf", out)
    real = checkpoint.HuggingFaceSource.pack
    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def test_killed_and_run_twice_at_once(made, tmp_path):
    out = tmp_path / "out"
    process = start(made, out)
    while not list(out.glob(".layer-*.part")):
        assert process.is_alive()
        time.sleep(0.002)
    time.sleep(random.random() * 0.25)
    process.kill()
    process.join()
    left = set(contents(out))
    assert "manifest.json" not in left
    for name in left:
        assert name.endswith(".part") or (out / name).read_bytes() == (made / "packed" / name).read_bytes()
    # Of a process that still runs: not ours to remove.
    alive = out / f".layer-002.safetensors.{os.getppid()}.part"
    alive.write_bytes(b"x")
    both = [start(made, out), start(made, out)]
    for process in both:
        process.join()
        assert process.exitcode == 0
    alive.unlink()
    assert contents(out) == contents(made / "packed")


def test_complete_is_left_alone_and_damaged_is_mended(made, tmp_path, packed, capsys):
    times = {path.name: path.stat().st_mtime_ns for path in packed.iterdir()}
    convert(made / "hf", packed)
    assert "already" in capsys.readouterr().err
    assert {path.name: path.stat().st_mtime_ns for path in packed.iterdir()} == times
    flip(packed / "layer-001.safetensors", -100)
    (packed / "layer-002.safetensors").write_bytes((packed / "layer-002.safetensors").read_bytes()[:-1000])
    with open(packed / "outer.safetensors", "ab") as file:
        file.write(b"more")
    (packed / "predictor.safetensors").write_bytes(b"stays")
    convert(made / "hf", packed)
    assert contents(packed) == contents(made / "packed") | {"predictor.safetensors": b"stays"}
    assert (packed / "layer-000.safetensors").stat().st_mtime_ns == times["layer-000.safetensors"]


def test_a_failed_write_to_hf_leaves_nothing(packed, tmp_path):
    flip(packed / "layer-001.safetensors", -100)
    refused("layer-001.safetensors", "experts 7", call=to_hf, args=(packed, tmp_path / "back"))
    assert set(path.name for path in tmp_path.iterdir()) == {"packed"}
    dead = subprocess.Popen(["true"])
    dead.wait()
    (tmp_path / f".back[1].{dead.pid}.part").mkdir()
    (tmp_path / "back[1]").mkdir()                                  # empty: may be there
    flip(packed / "layer-001.safetensors", -100)
    to_hf(packed, tmp_path / "back[1]")
    assert set(path.name for path in tmp_path.iterdir()) == {"packed", "back[1]"}


def test_ensure_packed_converts_once_and_finds_it_again(made, tmp_path, capsys):
    assert ensure_packed(made / "packed", tmp_path) == made / "packed" and not list(tmp_path.iterdir())
    found = ensure_packed(made / "hf", tmp_path / "weights")
    assert found.parent == tmp_path / "weights" and len(found.name.removeprefix("hf-")) == 8
    assert contents(found) == contents(made / "packed")
    times = {path.name: path.stat().st_mtime_ns for path in found.iterdir()}
    capsys.readouterr()
    moved = shutil.copytree(made / "hf", tmp_path / "elsewhere" / "hf")
    assert ensure_packed(str(moved), str(tmp_path / "weights")) == found
    assert {path.name: path.stat().st_mtime_ns for path in found.iterdir()} == times
    assert capsys.readouterr().err == ""


# Packed directories that are not what they were

def test_a_flipped_bit_is_caught_and_named(packed):
    model = PackedModel(packed)
    start, end = model.headers["layer-001.safetensors"].tensors["experts.5"][2:]
    flip(packed / "layer-001.safetensors", (start + end) // 2)
    refused("layer-001.safetensors", "experts 5", call=PackedModel(packed).read_expert,
            args=(1, 5, np.empty(model.layout.nbytes, np.uint8)))
    start = model.headers["outer.safetensors"].tensors["embed.weight"][2]
    flip(packed / "outer.safetensors", start + 7)
    refused("outer.safetensors", "embed", call=PackedModel(packed).resident, args=())


def test_a_truncated_or_foreign_or_missing_layer_is_caught(packed, tmp_path):
    path = packed / "layer-001.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    refused("layer-001.safetensors", "truncated", call=PackedModel, args=(packed,))
    path.unlink()
    refused("layer-001.safetensors", "no such file", call=PackedModel, args=(packed,))
    write_hf(tmp_path / "hf", seed=1)
    convert(tmp_path / "hf", tmp_path / "other")
    shutil.copy(tmp_path / "other" / path.name, path)
    refused("manifest.json", "another model", call=PackedModel, args=(packed,))
    path.write_bytes(data)
    PackedModel(packed)
    edit_config(packed, rope_theta=5.0)
    refused("manifest.json", call=PackedModel, args=(packed,))


# Memory and display

def test_memory_stays_far_below_the_model(tmp_path):
    """Torch allocates no more than an expert's block and a matrix or two, out of 3 layers of 8 experts."""
    write_hf(tmp_path / "hf", hidden_size=256, intermediate_size=512, dtype=torch.float16)
    source = (tmp_path / "hf/model.safetensors").stat().st_size
    with torch.profiler.profile(profile_memory=True,
                                activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        convert(tmp_path / "hf", tmp_path / "out")
    held = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert 0 < peak < source / 3


def test_progress_is_for_terminals_and_for_work_that_lasts(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def run(terminal):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
        progress, seen = Progress(total, "packing"), []
        for _ in range(4):
            now[0] += 1
            progress.add(10**8)
            seen.append(capsys.readouterr().err)
        progress.close()
        return seen + [capsys.readouterr().err]

    total = 10**9
    assert "".join(run(False)) == ""
    first, second, *_, closed = run(True)
    assert first == "" and closed == "\r\033[K"
    assert second.startswith("\rpacking: 200 MB of 1 GB, 100 MB/s, 0:08 left") and "\n" not in second
    total = 4 * 10**8
    *_, done, closed = run(True)            # (nothing is left of it when the work is done)
    assert done.startswith("\rpacking: 400 MB of 400 MB") and done.endswith("\r\033[K") and closed == ""
