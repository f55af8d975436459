"""Mistakes in one line, files damaged at random, full disks, conversions killed at any moment."""

import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from models import a_line, contents, in_child, TEXT, write_hf
from safetensors.torch import load_file, save_file

import generate
from duoserve import Engine, checkpoint, files
from duoserve.checkpoint import convert, ensure_packed, open_source, to_hf
from duoserve.config import MixtralConfig
from duoserve.errors import UserError
from duoserve.files import Header, write_tensors
from duoserve.packed import PackedModel, fingerprint, tensor_files
from duoserve.predictor import Predictor
from duoserve.trace import Trace

SMALL = dict(num_hidden_layers=1, num_local_experts=2, hidden_size=32, intermediate_size=32, head_dim=8)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """path/hf, in two shards, and path/packed."""
    path = tmp_path_factory.mktemp("robust")
    write_hf(path / "hf", shards=2, **SMALL)
    convert(path / "hf", path / "packed")
    return path


@pytest.fixture
def hf(made, tmp_path):
    return Path(shutil.copytree(made / "hf", tmp_path / "hf"))


# Mistakes

def other_tokenizer(directory):
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT]), model_writer=out, model_type="bpe", vocab_size=325,
        byte_fallback=True, normalization_rule_name="identity", unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
        minloglevel=2)
    (directory / "tokenizer.model").write_bytes(out.getvalue())


def instead(name, what):
    """`name` becomes an empty directory, or a file of these bytes, or is gone."""
    def change(directory):
        (directory / name).unlink()
        if what == "directory":
            (directory / name).mkdir()
        elif what is not None:
            (directory / name).write_bytes(what)
    return change


def configured(**changes):
    def change(directory):
        raw = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(raw | changes))
    return change


def index(**changes):
    def change(directory):
        path = directory / "model.safetensors.index.json"
        raw = json.loads(path.read_text())
        path.write_text(json.dumps(raw | {"weight_map": raw["weight_map"] | changes}))
    return change


def eight_bits(directory):
    path = directory / "model-00001-of-00002.safetensors"
    state = load_file(path)
    name = next(name for name in state if name.endswith("q_proj.weight"))
    save_file(state | {name: state[name].to(torch.float8_e4m3fn)}, path)


SHARD, INDEX = "model-00002-of-00002.safetensors", "model.safetensors.index.json"
MODEL_MISTAKES = {
    "a shard not downloaded": (instead(SHARD, None), SHARD, "missing"),
    "a shard cut short": (lambda d: os.truncate(d / SHARD, 9000), SHARD, "truncated"),
    "a pointer of git-lfs": (instead(SHARD, b"version https://git-lfs.github.com/spec/v1\noid sha256:"),
    SHARD),
    "a shard that is a directory": (instead(SHARD, "directory"), SHARD),
    "no index": (instead(INDEX, None), "no weights"),
    "an index of another place": (index(**{"lm_head.weight": "../../other.safetensors"}), INDEX,
                                  "'../../other.safetensors'"),
    "an index with an absolute path": (index(**{"lm_head.weight": "/etc/passwd"}), INDEX, "'/etc/passwd'"),
    "an index that is a directory": (instead(INDEX, "directory"), INDEX),
    "float8": (eight_bits, "model-00001-of-00002.safetensors", "q_proj.weight", "F8_E4M3", "16 bits"),
    "no config": (instead("config.json", None), "config.json", "no such file"),
    "a config that is a directory": (instead("config.json", "directory"), "config.json"),
    "a config of a Llama": (configured(model_type="llama"), "config.json", "'llama'"),
    "a config with other sizes": (configured(hidden_size=64), "shape"),
    "a config with nonsense": (configured(num_attention_heads=-4), "config.json",
                               "num_attention_heads is -4"),
    "no tokenizer": (instead("tokenizer.model", None), "tokenizer.model"),
    "another model's tokenizer": (other_tokenizer, "tokenizer.model", "325 pieces", "vocab_size 320"),
    "a tokenizer that is none": (instead("tokenizer.model", b"[]"), "tokenizer.model", "sentencepiece"),
    "a tokenizer that is a directory": (instead("tokenizer.model", "directory"), "tokenizer.model")}


@pytest.mark.parametrize("mistake", MODEL_MISTAKES)
def test_a_mistaken_download_is_one_line_and_nothing_is_converted(mistake, hf, cli, monkeypatch):
    spoil, *names = MODEL_MISTAKES[mistake]
    spoil(hf)
    monkeypatch.setattr(generate, "WEIGHTS", hf.parent / "weights")
    status, out, err = cli("generate", "--model", hf, "--prompt", "a")
    assert (status, out) == (2, "") and not (hf.parent / "weights").exists()
    a_line(err, hf, *names)


PACKED_MISTAKES = {
    "no tokenizer": (instead("tokenizer.model", None), "tokenizer.model"),
    "no config": (instead("config.json", None), "config.json"),
    "no manifest": (instead("manifest.json", None), "unfinished"),
    "a manifest that is a directory": (instead("manifest.json", "directory"), "manifest.json"),
    "a layer gone": (instead("layer-000.safetensors", None), "layer-000.safetensors", "copy it",
                     "convert the model again"),
    "a layer cut short": (lambda d: os.truncate(d / "layer-000.safetensors", 3000), "layer-000.safetensors",
                          "truncated"),
    "a config edited": (configured(rope_theta=5.0), "manifest.json", "changed")}


@pytest.mark.parametrize("mistake", PACKED_MISTAKES)
def test_a_spoilt_packed_directory_is_one_line(mistake, made, tmp_path, cli):
    spoil, *names = PACKED_MISTAKES[mistake]
    directory = Path(shutil.copytree(made / "packed", tmp_path / "model"))
    spoil(directory)
    status, out, err = cli("generate", "--model", directory, "--prompt", "a")
    assert (status, out) == (2, "")
    a_line(err, directory, *names)


def test_what_is_wrong_with_the_prompt_is_said_before_anything_is_loaded(ask, tmp_path, monkeypatch):
    monkeypatch.setattr(Engine, "__init__", lambda *_, **__: pytest.fail("loaded"))
    (tmp_path / "empty").write_bytes(b" \n")
    for arguments in (("--prompt", "fox " * 400), ("--prompt-file", tmp_path / "empty")):
        status, out, err = ask(*arguments)
        assert (status, out) == (2, "")
        a_line(err, "prompt")


def test_a_standard_input_that_is_closed(ask, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)             # what Python makes of a stream that is closed
    status, out, err = ask("--prompt-file", "-")
    assert (status, out) == (2, "")
    a_line(err, "standard input")


def test_a_disk_that_fills_up_and_one_that_cannot_be_written(cli, tmp_path):
    write_hf(tmp_path / "hf", num_hidden_layers=2, vocab_size=2000)          # `outer` is the larger file

    def run():                              # a bound on the size of files looks like a disk that fills up
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        return cli("checkpoint", tmp_path / "hf", tmp_path / "out")
    status, _, err = in_child(run)
    assert status == 2 and list((tmp_path / "out").iterdir()) == []
    a_line(err, tmp_path / "out/outer.safetensors", "cannot be written")
    with pytest.raises(UserError, match="/proc/weights"):
        convert(tmp_path / "hf", "/proc/weights")


def test_a_source_that_cannot_be_read_is_what_the_error_names(hf, tmp_path, monkeypatch):
    """The file that vanished or could not be read is named, not the one that was to be written."""
    def gone(self, name, *into):
        (hf / SHARD).unlink(missing_ok=True)
        return pack(self, name, *into)
    pack = checkpoint.HuggingFaceSource.pack
    monkeypatch.setattr(checkpoint.HuggingFaceSource, "pack", gone)
    with pytest.raises(UserError, match=f"{SHARD}: no such file"):
        convert(hf, tmp_path / "out")
    monkeypatch.undo()

    def broken(*_):
        raise OSError(5, "Input/output error")
    write_hf(hf, shards=2, **SMALL)
    source = open_source(hf)
    monkeypatch.setattr(checkpoint, "open_source", lambda _: source)
    monkeypatch.setattr(files.os, "preadv", broken)
    words = r"hf/model-0000\d-of-00002.safetensors: cannot be read .Input/output error"
    with pytest.raises(UserError, match=words):
        convert(hf, tmp_path / "other")


# Links as Hugging Face's cache makes them

def test_a_snapshot_of_links_into_blobs(made, tmp_path):
    """models--x/snapshots/<revision>/* -> ../../blobs/<hash>, also for config and tokenizer."""
    blobs, snapshot = tmp_path / "models--x/blobs", tmp_path / "models--x/snapshots/0a1b"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, path in enumerate(sorted((made / "hf").iterdir())):
        shutil.copy(path, blobs / f"{i:040x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{i:040x}")
    found = ensure_packed(snapshot, tmp_path / "weights")
    assert contents(found) == contents(made / "packed")
    assert not any(path.is_symlink() for path in found.iterdir())
    (blobs / f"{0:040x}").unlink()                                  # (config.json's)
    with pytest.raises(UserError, match="config.json: no such file"):
        open_source(snapshot)


# Files damaged at random

JUNK = [None, True, -1, 0, 3, 0.5, 1e308, 1e-320, float("nan"), float("inf"), 10**30, 2**31 - 1, 2**63, 1000,
        "", "x", "..", "../../../etc/passwd", "/etc/passwd", "a\0b", "\ud800", "9" * 5000, "F8_E5M2", "BF16",
        [], {}, [1, 2], {"a": {}}]
WATCHED: list | None = None


def watch(event, arguments):
    if (WATCHED is not None and event in ("open", "os.listdir", "os.scandir")
            and isinstance(arguments[0], (str, Path))):
        WATCHED.append(os.path.realpath(arguments[0]))


sys.addaudithook(watch)


def places(value, parent=None, key=None):
    """Every (container, key) in a parsed JSON file."""
    if parent is not None:
        yield parent, key
    for k in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[k], value, k)


def other_json(rng, text: bytes) -> bytes:
    """Other types, huge numbers, deep nesting, lost and renamed keys: still JSON."""
    raw = json.loads(text)
    for _ in range(rng.choice((1, 1, 2, 5))):
        parent, key = rng.choice(list(places(raw)))
        what = rng.randrange(5)
        if what < 2 and isinstance(parent, dict):
            value = parent.pop(key)
            if what:
                parent[rng.choice(("", "zzz", "dtype", "\ud800"))] = value
        elif what == 2:
            for _ in range(rng.choice((3, 150))):
                parent[key] = [parent[key]]
        else:
            parent[key] = rng.choice(JUNK)
    return json.dumps(raw).encode()


def other_bytes(rng, data: bytes) -> bytes:
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        i = rng.randrange(len(data) + 1)
        what = rng.randrange(4)
        if what == 0 and i < len(data):
            data[i] ^= 1 << rng.randrange(8)
        elif what == 1:
            del data[i:]
        elif what == 2:
            data[i:i + rng.randrange(9)] = rng.randbytes(rng.randrange(9))
        else:
            data[i:i] = rng.choice((b"[", b"{", b'"', b"-", b"\0", b"9" * 30, b"[" * 100_000))
    return bytes(data)


def damage(rng, path: Path) -> None:
    data = path.read_bytes()
    if path.suffix == ".json":
        path.write_bytes(rng.choice((other_json, other_bytes))(rng, data))
    elif path.suffix == ".safetensors" and rng.random() < 0.9:
        end = 8 + int.from_bytes(data[:8], "little")
        header = rng.choice((other_json, other_bytes))(rng, data[8:end])
        wrong, length = rng.random() < 0.1, len(header)
        length = rng.choice((0, 1, length - 1, length + 1, 2**63, 2**64 - 1)) if wrong else length
        path.write_bytes(length.to_bytes(8, "little") + header + data[end:])
    else:
        path.write_bytes(other_bytes(rng, data))


def fuzz(source: Path, name: str, times: int, use) -> int:
    """Damage `name` in copies of a directory and `use` each: within three seconds it works, or a UserError of
    one line names the directory, and no file elsewhere is opened. Returns how many copies were refused."""
    global WATCHED
    rng, refused, directory = random.Random(name), 0, source.with_name("fuzzed")
    use(source)                                                     # (whatever is imported is imported now)
    for i in range(times):
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(source, directory)
        damage(rng, directory / name)
        began, WATCHED = time.perf_counter(), []
        try:
            with warnings.catch_warnings(action="ignore"):          # (numpy's, of overflows)
                use(directory)
        except UserError as error:
            refused += 1
            assert str(directory) in str(error) and "\n" not in str(error), (i, error)
        finally:
            opened, WATCHED = WATCHED, None
        assert time.perf_counter() - began < 3, i
        allowed = str(directory), f"{source.parent}/out", "/proc/", "/sys/", sys.base_prefix
        outside = [path for path in opened if not path.startswith(allowed)]
        assert not outside, (i, outside)
    return refused


def use_source(directory):
    open_source(directory)
    # Some of them are converted to the end.
    if (directory / "model-00001-of-00002.safetensors").stat().st_size % 4 == 0:
        shutil.rmtree(directory.parent / "out", ignore_errors=True)
        convert(directory, directory.parent / "out")


@pytest.mark.parametrize("name", ("config.json", INDEX, SHARD, "tokenizer.model"))
def test_damaged_downloads(name, hf):
    assert fuzz(hf, name, 90, use_source) > 45


def use_packed(directory, **options):
    """With a fingerprint that matches, since otherwise it would stop nearly everything."""
    path = directory / "manifest.json"
    with suppress(UserError, ValueError, TypeError, RecursionError):
        names = tensor_files(MixtralConfig.read(directory))
        stamp = {"fingerprint": fingerprint(directory, names)}
        path.write_text(json.dumps(json.loads(path.read_bytes()) | stamp))
    engine = Engine.from_pretrained(directory, device="cpu",
                                    **{"predictor": "none", "host_memory": "30%"} | options)
    engine.generate([1, 5, 7], max_new_tokens=2)


@pytest.mark.parametrize("name",
                         ("config.json", "manifest.json", "outer.safetensors", "layer-000.safetensors"))
def test_damaged_packed_models(name, made, tmp_path):
    directory = Path(shutil.copytree(made / "packed", tmp_path / "packed"))
    assert fuzz(directory, name, 60, use_packed) > 30


def test_damaged_predictors_and_traces(tiny, traces, predictor, tmp_path):
    (tmp_path / "some").mkdir()
    trace = shutil.copy(next(traces.iterdir()), tmp_path / "some/trace.safetensors")
    shutil.copy(predictor, tmp_path / "some")
    fingerprint = PackedModel(tiny).fingerprint

    def use_predictor(directory):
        read = Predictor.read(directory / predictor.name, fingerprint, 3, 8)
        read(0, np.ones((3, 3, 8), np.float32)), read(3, np.ones((3, 3, 8), np.float32)), read.popularity()
    assert fuzz(tmp_path / "some", predictor.name, 100, use_predictor) > 33
    assert fuzz(tmp_path / "some", trace.name, 80, lambda directory: Trace.read(directory / trace.name)) > 40


@pytest.mark.parametrize("entry, said", [
    ({"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}, "F8_E4M3"),
    ({"dtype": "U64", "shape": [1], "data_offsets": [0, 8]}, "U64"),
    ({"dtype": "XYZZY!", "shape": [1], "data_offsets": [0, 8]}, "damaged"),
    ({"dtype": "U8", "shape": [2**62] * 100_000, "data_offsets": [0, 8]}, "damaged"),
    ({"dtype": "U8", "shape": [9], "data_offsets": [0, 9]}, "truncated"),
    ({"dtype": "U8", "shape": [0, 2**70], "data_offsets": [5, 5]}, None)])
def test_headers(entry, said, tmp_path):
    text = json.dumps({"x": entry}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    if said is None:
        Header(tmp_path / "a.safetensors")
        return
    began = time.perf_counter()
    with pytest.raises(UserError, match=f"a.safetensors.*{said}"):
        Header(tmp_path / "a.safetensors")
    assert time.perf_counter() - began < 1


@pytest.mark.parametrize("was, now", [(b'"U8"', b'"I8"'), (b'"F16"', b'"I16"'), (b'"BF16"', b'"I16" ')])
def test_a_packed_tensor_of_another_type(was, now, made, tmp_path):
    directory = Path(shutil.copytree(made / "packed", tmp_path / "model"))
    path = directory / "layer-000.safetensors"
    path.write_bytes(path.read_bytes().replace(was, now))
    with pytest.raises(UserError, match=f"{path}: .* is torch.int"):
        use_packed(directory)


# Conversions killed at any moment

def killed_at(moment: int, job, *arguments) -> bool:
    """Run a job in a child process, killed at its n-th step that touches the disk; did it get there?"""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    try:
        left = [moment]

        def step(*_):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(lambda event, arguments: step() if event in ("os.rename", "os.remove", "os.mkdir") or
                         event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR) else None)
        checkpoint.write_tensors = lambda path, shapes, stamp, tensors, *rest: write_tensors(
            path, shapes, stamp, (step() or tensor for tensor in tensors), *rest)
        job(*arguments)
    except BaseException:
        os._exit(1)
    os._exit(0)


def test_killed_at_every_step_a_conversion_goes_on_and_nothing_half_written_is_believed(made, tmp_path):
    whole, out, moment = contents(made / "packed"), tmp_path / "out", 0
    while killed_at(moment, convert, made / "hf", out):
        moment += 1
        left = contents(out) if out.exists() else {}
        for name, data in left.items():
            assert name.endswith(".part") or data == whole[name], name
        if "manifest.json" in left:
            PackedModel(out)
        elif out.exists():
            with pytest.raises(UserError, match="not a .complete. packed model"):
                PackedModel(out)
        convert(made / "hf", out)
        assert contents(out) == whole                               # no .part is left either
        shutil.rmtree(out)
    assert moment > 25 and contents(out) == whole


def test_killed_again_and_again_it_still_gets_there(made, tmp_path):
    """Each run goes one step further than the last, on what that left, as generate.py would."""
    moment = 2
    while killed_at(moment, ensure_packed, made / "hf", tmp_path / "weights"):
        moment += 1
    [out] = (tmp_path / "weights").iterdir()
    assert contents(out) == contents(made / "packed")


def test_killed_while_unpacking_there_is_nothing_or_all_of_it(made, tmp_path):
    moment = 0
    to_hf(made / "packed", tmp_path / "whole")
    while killed_at(moment, to_hf, made / "packed", tmp_path / "back"):
        moment += 1
        assert not (tmp_path / "back").exists()
    assert moment > 20 and contents(tmp_path / "back") == contents(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"back", "whole"}


def test_two_processes_that_need_the_same_model_for_the_first_time(made, tmp_path):
    fork = multiprocessing.get_context("fork")
    start = fork.Barrier(2)

    def need():
        start.wait()
        PackedModel(ensure_packed(made / "hf", tmp_path / "weights")).resident()
    processes = [fork.Process(target=need) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    [out] = (tmp_path / "weights").iterdir()
    assert contents(out) == contents(made / "packed")


def test_a_mistaken_option_is_said_before_anything_is_converted(hf, cli, monkeypatch):
    monkeypatch.setattr("duoserve.checkpoint.convert", lambda *_, **__: pytest.fail("converted"))
    for flag, value in (("--policy", "nope"), ("--device", "cuda:7"), ("--dtype", "int8"),
                        ("--predictor", "/no/such"),
                        ("--gpu-memory", "abc"), ("--host-memory", "abc"), ("--simulate-link", "fast"),
                        ("--cache-experts", "1")):
        status, out, err = cli("generate", "--model", hf, "--prompt", "a", f"{flag}={value}")
        assert (status, out) == (2, "")
        a_line(err, value if flag == "--predictor" else flag)
