"""What a newcomer meets: slips of many kinds, each of them answered in useful words."""

import io
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from models import a_line, load, ROOT, write_hf

from duoserve.errors import UserError
from duoserve.trace import TraceRecorder

GREEDY = dict(temperature=0, max_new_tokens=4)


# Not installed


@pytest.mark.parametrize("command", [
    ("generate.py", "--prompt", "a"), ("train_predictor.py", "traces"), ("-m", "duoserve.bench", "run"),
    ("-m", "duoserve.checkpoint", "a", "b")], ids=" ".join)
def test_torch_is_not_installed(command, tmp_path):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('No module named torch', name='torch')\n")
    run = subprocess.run([sys.executable, *command], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(tmp_path)},
                         capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout) == (2, "")
    a_line(run.stderr, "torch", "pip install -r requirements.txt")


# Files that are not what was expected


def test_a_byte_order_mark_is_no_part_of_a_prompt(ask, tiny, session, tmp_path):
    expected = ask("--prompt", "the quick")[1]
    (tmp_path / "p.txt").write_bytes("\ufeffthe quick\n".encode())
    assert ask("--prompt-file", tmp_path / "p.txt")[1] == expected
    assert ask("--prompt", "\ufeffthe quick")[1] == expected
    assert session(tiny, ["\ufeffthe quick"])[1] == session(tiny, ["the quick"])[1]
    (tmp_path / "p.txt").write_bytes("\ufeff".encode())
    status, out, err = ask("--prompt-file", tmp_path / "p.txt")
    assert (status, out) == (2, "")
    a_line(err, "the prompt is empty")


@pytest.mark.parametrize("program", [("generate", "--prompt", "a"), ("train", "t"),
                                     ("bench", "schedule", "t"), ("bench", "run")],
                         ids=" ".join)
def test_a_model_that_is_a_file(program, cli, tiny, tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    for path, words in ((tmp_path / "x.gguf", "is a file; what is read is a directory"),
                        (tiny / "config.json", f"give {tiny}")):
        status, out, err = cli(*program, "--model", path)
        assert (status, out) == (2, "")
        a_line(err, f"{path}: is a file", words)


def test_a_file_to_convert(cli, tmp_path):
    write_hf(tmp_path, num_hidden_layers=1)
    status, _, err = cli("checkpoint", tmp_path / "model.safetensors", tmp_path / "out")
    assert status == 2
    a_line(err, "is a file; what is read is a directory", f"give {tmp_path}")


@pytest.mark.parametrize("program", [("train",), ("bench", "schedule")], ids=" ".join)
def test_a_model_where_traces_should_be(program, cli, tiny, tmp_path):
    status, _, err = cli(*program, tiny, "--model", tiny)
    assert status == 2
    a_line(err, f"{tiny}: holds a model, not traces", "--trace-dir")
    shutil.copy(tiny / "outer.safetensors", tmp_path)
    status, _, err = cli(*program, tmp_path, "--model", tiny)
    assert status == 2
    a_line(err, "outer.safetensors: is not a trace")


@pytest.mark.parametrize("interactive", (False, True))
def test_an_error_after_the_answer_has_its_own_line(interactive, ask, tiny, session, monkeypatch, tmp_path):
    text = ask("--prompt", "the quick")[1]

    def full(*_):
        raise UserError("the disk is full")
    monkeypatch.setattr(TraceRecorder, "save", full)
    if interactive:
        status, out, err = session(tiny, ["the quick"], "--trace-dir", tmp_path / "t")
        assert (status, out[-1]) == (0, "\n") and "error: the disk is full\n" in err
    else:
        status, out, err = ask("--prompt", "the quick", "--trace-dir", tmp_path / "t")
        assert (status, out, err) == (2, text, "error: the disk is full\n")


def test_an_error_within_the_answer_too(ask, monkeypatch):
    from duoserve import engine
    sample, calls = engine.sample, []
    monkeypatch.setattr(engine, "sample", lambda *arguments: (
        calls.append(1) or (sample(*arguments) if len(calls) < 4 else torch.tensor(-1))))
    status, out, err = ask("--prompt", "the quick")
    assert status == 2 and len(out) > 1 and out.endswith("\n")
    a_line(err, "not finite")


# From Python


@pytest.fixture(scope="module")
def engine(tiny):
    return load(tiny)


@pytest.mark.parametrize("prompt, word", [
    (["a", "b"], "'a'"), (None, "NoneType"), (b"x", "bytes"), (7, "int"), ([1, 2.0], "2.0"),
    (np.array([1.0, 2.0]), "1.0"), (torch.tensor([[1, 2]]), "[1, 2]"), ({1: 2}, "dict")], ids=str)
def test_a_prompt_of_another_type(prompt, word, engine):
    for call in (engine.generate, engine.logits):
        with pytest.raises(UserError, match="a list of token ids") as error:
            call(prompt)
        assert word in str(error.value) and "--" not in str(error.value)


def test_an_option_of_another_type(engine):
    for name, value in (("max_new_tokens", 2.5), ("max_new_tokens", "4"), ("max_new_tokens", None),
                        ("top_k", 2.0), ("temperature", "hot"), ("temperature", None), ("top_p", "1"),
                        ("seed", 0.5), ("seed", None)):
        with pytest.raises(UserError) as error:
            engine.generate("the", **{name: value})
        assert str(error.value).startswith(f"{name}={value!r}: give a ") and "--" not in str(error.value)


def test_whole_numbers_of_any_kind_are_token_ids(engine):
    expected = engine.generate([1, 263, 287], **GREEDY).token_ids
    for ids in (np.array([1, 263, 287]), list(np.array([1, 263, 287], np.uint16)),
                torch.tensor([1, 263, 287]), list(torch.tensor([1, 263, 287], dtype=torch.int32)),
                (1, 263, 287)):
        assert engine.generate(ids, **GREEDY).token_ids == expected
        assert engine.logits(ids).shape == (3, engine.config.vocab_size)
    result = engine.generate([1, 263], max_new_tokens=np.int64(3), temperature=np.float32(0.5),
                             top_k=np.int32(5), top_p=np.float64(0.9), seed=np.int64(3))
    assert result.token_ids == engine.generate([1, 263], max_new_tokens=3, temperature=0.5, top_k=5,
                                               top_p=0.9, seed=3).token_ids


# Flags


def test_short_flags(cli, tiny, tmp_path):
    (tmp_path / "p").write_text("the quick")
    rest = ("--device", "cpu", "--predictor", "none", "--json")
    run = lambda *arguments: json.loads(cli("generate", *arguments, *rest)[1])
    long = run("--model", tiny, "--prompt", "the quick", "--max-new-tokens", 5, "--context", 100)
    for prompt in (("-p", "the quick"), ("-f", tmp_path / "p")):
        short = run("-m", tiny, *prompt, "-n", 5, "-c", 100)
        assert short["token_ids"] == long["token_ids"] and short["new_tokens"] == 5
        assert short["stats"]["peak_device_bytes"] == long["stats"]["peak_device_bytes"]


# bench schedule


def test_a_list_does_not_swallow_the_traces(cli, tiny, traces, tmp_path):
    traces = Path(shutil.copy(min(traces.iterdir()), tmp_path)).parent
    run = ("--model", tiny, "--predictor", "none", "--json")
    for options in (("--policies", "lru"), ("--policies", "lru", "cache"),
                    ("--policies", "lru", "--cache-experts", 6),
                    ("--policies", "lru", "--cache-experts", 6, 9),
                    ("--cache-experts", 6, 9, "--policies", "lru")):
        status, out, err = cli("bench", "schedule", *run, *options, traces)
        assert status == 0, err
        assert out == cli("bench", "schedule", traces, *run, *options)[1]


def test_bench_schedule_obeys_memory_and_slots_together(cli, tiny, traces):
    """The slots asked for, if they fit; as generate.py does."""
    run = ("bench", "schedule", traces, "--model", tiny, "--predictor", "none", "--policies", "cache",
           "--json")
    sizes = lambda *options: [row["cache_experts"] for row in json.loads(cli(*run, *options)[1])["rows"]]
    assert sizes("--gpu-memory", "1GB", "--cache-experts", 6, 9) == [6, 9]
    assert sizes("--gpu-memory", "1GB") == [24]
    tight = cli(*run, "--gpu-memory", "1MB")[2].split(": ")[2].split(" is the least")[0]
    fit, = sizes("--gpu-memory", tight)     # (rounded up: it takes a few of these tiny experts)
    assert 2 <= fit < 20
    status, out, err = cli(*run, "--gpu-memory", tight, "--cache-experts", 2, fit + 1)
    assert (status, out) == (2, "")
    a_line(err, f"--cache-experts {fit + 1}", f"leaves room for {fit}")


# What is said while it runs


@pytest.mark.parametrize("command", ("schedule", "run"))
def test_the_bench_shows_that_it_goes_on(command, cli, tiny, traces, monkeypatch):
    """On a terminal, when it takes long; it counts all of the work, and the line is gone at the end."""
    from duoserve import errors
    shown, ticks = io.StringIO(), itertools.count()
    shown.isatty = lambda: True
    monkeypatch.setattr(errors, "time", SimpleNamespace(monotonic=lambda: 3.0 * next(ticks)))
    what = ("rows", (traces, "--cache-experts", 2, 6)) if command == "schedule" else \
        ("answers", ("--rounds", 2, "--max-new-tokens", 2, "--device", "cpu"))
    run = ("bench", command, *what[1], "--model", tiny, "--predictor", "none", "--policies", "duo", "lru")
    monkeypatch.setattr(sys, "stderr", shown)
    assert cli(*run)[0] == 0
    assert f"\r{what[0]}: 4 of 4" in shown.getvalue() and shown.getvalue().endswith("\r\033[K")


@pytest.mark.parametrize("word", ("exit", "quit", " exit "))
def test_a_word_leaves_a_conversation(word, tiny, session):
    status, out, err = session(tiny, ["the quick", word, "the fox"])
    assert status == 0 and out == session(tiny, ["the quick"])[1] and err.count("tokens (length)") == 1
    assert session(tiny, ["the quick", f"{word} now"])[1].count("\n") == 2     # not alone: it is text


def test_a_conversation_says_how_to_leave(tiny, session, monkeypatch):
    assert "leaves" not in session(tiny, ["the quick"])[2]       # nobody types there

    class Terminal(io.TextIOWrapper):
        isatty = lambda self: True
    monkeypatch.setattr(io, "TextIOWrapper", Terminal)
    hint = [line for line in session(tiny, ["the quick"])[2].splitlines() if "leaves" in line]
    assert len(hint) == 1 and all(word in hint[0] for word in ("exit", "quit", "Ctrl-D"))


# Threads


@pytest.fixture
def threads():
    """What torch is told, put back afterwards."""
    before = torch.get_num_threads()
    yield torch.get_num_threads
    torch.set_num_threads(before)


def test_threads_are_as_many_as_were_asked_for(cli, tiny, threads):
    for *program, flag in (("generate", "--prompt", "a", "--threads"), ("generate", "--prompt", "a", "-t"),
                           ("bench", "run", "--rounds", 1, "--policies", "duo", "--threads")):
        for n in (2, 1):
            status, _, err = cli(*program, flag, n, "--model", tiny, "--device", "cpu", "--predictor", "none",
                                 "--max-new-tokens", 2)
            assert (status, threads()) == (0, n), err


def test_threads_from_python(tiny, threads):
    load(tiny, threads=3)
    assert threads() == 3
    mistakes = (0, "--threads 0: a whole number from 1"), (1.0, "threads=1.0"), ("two", "threads='two'")
    for n, words in mistakes:
        with pytest.raises(UserError, match=words):
            load(tiny, threads=n)


def test_threads_by_default(tiny, threads, monkeypatch):
    """One for small matrices, for large ones as many as affinity and quota allow; or OMP_NUM_THREADS."""
    from duoserve import machine
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    torch.set_num_threads(3)
    load(tiny)
    assert threads() == 1
    torch.set_num_threads(3)
    monkeypatch.setattr("duoserve.quant.SMALL_MATRIX", 100)
    monkeypatch.setattr(machine, "TORCH_THREADS", 3)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    for quota, expected in (("max 100000", 3), ("200000 100000", 2), ("50000 100000", 1)):
        torch.set_num_threads(3)
        monkeypatch.setattr(machine, "Path", lambda _: SimpleNamespace(read_text=lambda: quota))
        machine.set_threads(None, load(tiny, threads=3).config)
        assert threads() == expected
    torch.set_num_threads(3)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    load(tiny)
    assert threads() == 3


@pytest.mark.parametrize("module, given, expected", [
    *((module, {}, "passive") for module in ("generate", "train_predictor", "duoserve.bench",
                                             "duoserve.checkpoint", "duoserve")),
    ("generate", {"OMP_WAIT_POLICY": "active"}, "active")])
def test_waiting_threads_sleep(module, given, expected):
    """OMP_WAIT_POLICY is read when torch is imported, so it must be set before; a user's setting is kept."""
    if expected == "passive" and os.path.exists("/dev/nvidiactl"):
        expected = "None"                   # beside a GPU they spin, as they do by default
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    code = f"""
import os, sys
class Watch:
    def find_spec(self, name, *_):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"))
            sys.exit()
sys.meta_path.insert(0, Watch())
import {module}
from duoserve.errors import import_requirements
import_requirements()
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment | given, capture_output=True,
                         text=True, timeout=60)
    assert run.stdout.strip() == expected, run.stderr
