"""The programs as users see them: what goes to which stream, what --json holds, mistakes in one line."""

import json
import math
import re
import runpy
import shlex
import shutil
import signal
import sys
import time
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from models import a_line, build, logits_of, program, ROOT, write_hf
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import duoserve
import generate
import train_predictor
from duoserve import checkpoint
from duoserve.bench import __main__ as bench
from duoserve.config import MixtralConfig
from duoserve.errors import Parser
from duoserve.engine import Engine
from duoserve.options import EngineOptions
from duoserve.packed import PackedModel
from duoserve.policies import POLICIES
from duoserve.predictor import Predictor
from duoserve.tokenizer import Tokenizer


# generate.py


STATS = {"load_s", "ttft_s", "tpot_s", "policy", "cache_experts", "hits", "misses", "prefetched",
         "prefetched_used", "in_time", "bytes_moved", "peak_device_bytes", "link_busy_fraction",
         "host_experts", "host_busy_fraction"}


def test_json_is_one_object_with_all_that_was_promised(ask):
    status, out, err = ask("--prompt", "the quick brown", "--json", "--cache-experts", 5,
                           "--simulate-link", "100MB/s")
    answer = json.loads(out)
    assert status == 0
    assert set(answer) >= {"text", "token_ids", "prompt_tokens", "new_tokens", "finish_reason", "stats"}
    assert set(answer["stats"]) >= STATS
    assert answer["new_tokens"] == len(answer["token_ids"]) == 6 and answer["finish_reason"] == "length"
    stats = answer["stats"]
    assert stats["policy"] == "duo" and stats["cache_experts"] == 5
    # Five steps, three layers, top two.
    assert stats["hits"] + stats["misses"] + stats["prefetched_used"] == 5 * 3 * 2
    assert 0 <= stats["in_time"] <= stats["hits"] + stats["prefetched_used"]
    assert 0 < stats["link_busy_fraction"] <= 1 and stats["bytes_moved"] > 0 and stats["tpot_s"] > 0


def test_json_of_one_token_has_a_null_tpot(ask):
    answer = json.loads(ask("--prompt", "the", "--json", "--max-new-tokens", 1)[1])
    assert answer["stats"]["tpot_s"] is None


def test_without_json_the_continuation_is_alone_on_standard_output(ask):
    text = json.loads(ask("--prompt", "the quick", "--json")[1])["text"]
    status, out, err = ask("--prompt", "the quick")
    assert (status, out) == (0, text + "\n")
    closing = err.strip().splitlines()[-1]
    assert "6 tokens" in closing and "length" in closing and text not in err


def test_on_a_terminal_the_prompt_comes_before_its_continuation(ask, monkeypatch):
    """But not where it is answered: a message, or what is asked for as JSON."""
    run = ("--prompt", "the quick"), ("--prompt", "the quick", "--chat"), ("--prompt", "the quick", "--json")
    text, said, _ = (ask(*arguments)[1] for arguments in run)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert [ask(*arguments)[1] for arguments in run[:2]] == ["the quick" + text, said]
    assert json.loads(ask(*run[2])[1])["text"] + "\n" == text


@pytest.mark.parametrize("options, words", [
    (("--simulate-link", "1MB/s", "--cache-experts", 4),
     r"busy (8|9|10)\d* % of the time: more --gpu-memory is what would help"),
    (("--simulate-link", "0.5MB/s", "--policy", "on-demand"),
     r"busy (8|9|10)\d* % of the time: --policy duo is what would help"),
    (("--simulate-link", "1MB/s", "--cache-experts", 24), "every expert needed was there: computing set the"),
    (("--simulate-link", "900GB/s"), r"busy [0-4]?\d % of the time: computing set the speed"),
    ((), "no link to wait for here: computing set the speed")],
    ids=("slow", "keeps nothing", "all fit", "fast", "none"))
def test_the_closing_line_says_what_bounded_the_speed(options, words, ask):
    assert re.search(words, ask("--prompt", "the quick", "--max-new-tokens", 3, *options)[2])


def test_what_bounded_the_speed_where_the_link_was_half_the_time(ask):
    """Also where nothing had to cross it."""
    stats = dict(bytes_moved=1, link_busy_fraction=0.65, cache_experts=5, policy="cache", bytes_from_disk=0,
                 host_experts=0, split_experts=0, host_busy_fraction=0.8, host_unused=None)
    say = lambda **changes: generate.what_bounded(SimpleNamespace(**stats | changes))
    assert say() == ("the link was busy 65 % of the time, computing took the rest: "
                     "more --gpu-memory would help some")
    assert "computing set the speed, not the link" in say(bytes_moved=0, link_busy_fraction=0)
    assert say(bytes_from_disk=1).endswith(
        "would help some; some experts came from the disk: more --host-memory would help")
    assert "or the disk; some experts" in say(bytes_from_disk=1, link_busy_fraction=0.3)
    for helped in (dict(host_experts=1), dict(split_experts=1)):
        assert say(**helped).startswith("the link was busy 65 % of the time, the host 80 %, computing")


def test_the_same_command_gives_the_same_text(ask):
    once = ask("--prompt", "the quick")[1]
    assert ask("--prompt", "the quick")[1] == once == ask("--prompt", "the quick", "--seed", 0)[1]
    assert ask("--prompt", "the quick", "--temperature", 0.8, "--top-p", 0.95)[1] == once       # the defaults
    assert any(ask("--prompt", "the quick", "--seed", seed)[1] != once for seed in (1, 2, 3))


@pytest.mark.parametrize("command", [["generate"], ["train"], ["checkpoint"], ["bench"], ["bench", "run"]])
def test_version(command, cli):
    shown = f"duoserve {duoserve.__version__}, torch {torch.__version__}\n"
    assert cli(*command, "--version") == (0, shown, "")


@pytest.mark.parametrize("name, also", [("float32", ("fp32", torch.float32)), ("bfloat16", ("bf16",)),
                                        ("float16", ("fp16", "half", torch.half))])
def test_a_dtype_by_other_names(name, also):
    for other in (name, *also):
        assert EngineOptions(device="cpu", dtype=other).dtype == getattr(torch, name)


def test_a_prompt_from_a_file(ask, tmp_path):
    # One newline at the end belongs to the file.
    for end, same in (("", ""), ("\n", ""), ("\r\n", ""), ("\n\n", "\n"), ("\r", "\r")):
        (tmp_path / "p.txt").write_bytes(f"the quick{end}".encode())
        assert ask("--prompt-file", tmp_path / "p.txt")[1] == ask("--prompt", "the quick" + same)[1]


def test_host_memory_says_what_it_keeps_and_the_closing_line_what_it_costs(ask):
    run = ("--prompt", "the quick", "--cache-experts", 4, "--max-new-tokens", 3)
    status, out, err = ask(*run, "--host-memory", "30%", "--simulate-link", "1MB/s")
    note = r"note: (\d+) of 24 experts are kept in memory; the others are read from the disk\n"
    kept = int(re.search(note, err)[1])
    assert 0 < kept < 24
    assert "is what would help; some experts came from the disk: more --host-memory would help]" in err
    assert json.loads(ask(*run, "--host-memory", "30%", "--json")[1])["stats"]["bytes_from_disk"] > 0
    status, out, err = ask(*run, "--host-memory", "1GB")
    assert "note: 24 of 24 experts are kept in memory\n" in err and "disk" not in err
    assert json.loads(ask(*run, "--json")[1])["stats"]["bytes_from_disk"] == 0
    assert "note: 0 of 24" in ask(*run, "--host-memory", "11B")[2]
    assert "kept in memory" not in ask(*run)[2]


def test_more_slots_than_experts_is_said_and_clamped(ask):
    status, out, err = ask("--prompt", "the", "--json", "--cache-experts", 1000)
    assert status == 0 and json.loads(out)["stats"]["cache_experts"] == 24
    assert "--cache-experts 1000" in err and "24" in err


def test_the_context_is_what_the_request_needs(ask):
    """Unless --context says otherwise, the KV cache is no larger than prompt and new tokens need."""
    def peak(*options):
        return json.loads(ask("--prompt", "the quick", "--json", *options)[1])["stats"]["peak_device_bytes"]

    assert peak() < peak("--max-new-tokens", 20) < peak("--context", 256)


def test_without_a_predictor_it_says_so_and_when_told_none_it_does_not(cli, tiny):
    run = ("generate", "--model", tiny, "--device", "cpu", "--max-new-tokens", 2, "--prompt", "the")
    assert "predictor.safetensors" in cli(*run)[2]
    assert "predictor.safetensors" not in cli(*run, "--predictor", "none")[2]


def test_an_interruption_shows_what_there_is(ask, monkeypatch):
    from duoserve import engine
    sample, calls = engine.sample, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return sample(*arguments)
    monkeypatch.setattr(engine, "sample", interrupted)
    status, out, err = ask("--prompt", "the quick", "--json")
    answer = json.loads(out)
    assert status == 130 and answer["finish_reason"] == "interrupted" and answer["new_tokens"] == 3
    assert "Traceback" not in err


# Flag -> values that are refused in one line, which names the flag.
SIZES = "abc", "", "4GB/s", "0", "0%", "-5", "-1GB", "nan%", "x%", "1e999%", "4 GiB more"
BAD_VALUES = {
    "--max-new-tokens": ("0", "-1", "many"), "--temperature": ("-1", "nan", "inf"),
    "--top-p": ("0", "1.1", "nan"), "--top-k": ("0", "-1"), "--seed": ("-1", "9" * 30),
    "--context": ("1", "-5", "257", "1000000"), "--threads": ("0", "-1", "x", "1.5", "99999"),
    "--cache-experts": ("1", "-2"), "--policy": ("nope", "Duo"), "--dtype": ("int4",),
    "--device": ("tpu", "meta", "gpu0", "cuda:9"), "--gpu-memory": (*SIZES, "9" * 400),
    "--host-memory": SIZES, "--simulate-link": ("-1", "0", "abc", "9" * 400), "--timeline": ("/tmp", "t.png"),
    "--trace-dir": ("README.md", "/dev/null/traces"), "--predictor": ("/no/such/predictor",),
    "--model": ("README.md", "/no/such/dir")}


@pytest.mark.parametrize("flag", BAD_VALUES)
def test_a_bad_value_is_one_line_that_names_its_flag(flag, ask):
    threads = torch.get_num_threads()
    for value in BAD_VALUES[flag]:
        status, out, err = ask("--prompt", "a", f"{flag}={value}")
        assert (status, out) == (2, ""), value
        a_line(err, value[:40], *[flag] * (flag not in ("--predictor", "--model")))
        assert not flag.endswith("memory") or "/s'" not in err.replace("'4GB/s'", "")   # sizes are no rates
    assert torch.get_num_threads() == threads


# Arguments -> words that say how to mend it.
MENDS = [
    ([], "--prompt"), (["--prompt", ""], "prompt"), (["--prompt", " \n "], "prompt"),
    (["--prompt", "a", "--prompt-file", "b"], "--prompt"),
    (["--prompt-file", "/no/such/file"], "/no/such/file", "name a text file"),
    (["--prompt-file", "a", "the fox"], "unrecognized arguments: the fox"),
    (["--prompt-file", "/"], "--prompt-file"),
    (["the fox"], "--prompt 'the fox'"), (["the", "fox"], "--prompt 'the fox'"),
    (["--prompt", "the", "quick fox"], "--prompt 'the quick fox'"),
    (["--prompt", "fox " * 400], "--context"), (["--prompt", "fox " * 9, "--context", "8"], "--context"),
    (["--prompt", "a", "--model", "mistralai/Mixtral-8x7B-v0.1"], "nothing is downloaded"),
    (["--prompt", "a", "--timeline", "/no/such/dir/t.svg"], "/no/such/dir"),
    (["--prompt", "a", "--dtype", "float"], "--dtype float: choose one of float32, ", ", bf16, fp16, half"),
    (["--prompt", "a", "--simulate-link", "25"], "25GB/s"),
    (["--prompt", "a", "--simulate-link", "25Gb/s"], "8 of them a byte: write 3.12GB/s"),
    (["--prompt", "a", "--simulate-link", "1Gbps"], "write 125MB/s"),
    (["--prompt", "a", "--gpu-memory", "1MB"], "--gpu-memory 1 MB", "is the least that works"),
    *((["--prompt", "a", flag, size], f"{flag} {size}", mend)
      for flag in ("--gpu-memory", "--host-memory")
      for size, mend in (("11", "was read as bytes; write 11GiB"),
                         ("8000", "was read as bytes; write 8000MB"), ("0.9", "is 90% meant?"),
                         ("0.125", "is 12.5% meant?"), ("1.5", "write 1.5GiB")))]


def test_a_mistake_is_one_line_that_says_how_to_mend_it(ask):
    for arguments, *words in MENDS:
        status, out, err = ask(*arguments)
        assert (status, out) == (2, ""), arguments
        a_line(err, *words)


@pytest.mark.parametrize("arguments, words", [
    (("generate", "--prompt", "a", "--modle", "x"), "did you mean --model?"),
    (("generate", "--prompt", "a", "--gpu_memory=8GiB"), "did you mean --gpu-memory?"),
    (("generate", "--prompt", "a", "-json"), "did you mean --json?"),
    (("generate", "-prompt", "a"), "did you mean --prompt?"),
    (("generate", "-prompt=a"), "did you mean --prompt?"),
    (("generate", "--prompt", "a", "--policy", "LRU"), "did you mean lru?"),
    (("generate", "--prompt", "a", "--policy", "ondemand"), "did you mean on-demand?"),
    (("bench", "schedule", "t", "--chunk-size", "4"), "did you mean --chunks?"),
    (("bench", "run", "--policies", "duo", "lur"), "did you mean lru?"),
    (("bench", "schedule", "t", "--policies", "orakle"), "did you mean oracle?"),
    (("train", "t", "--ouput", "p"), "did you mean --out?"),
    (("checkpoint", "a", "b", "--group_size", "64"), "did you mean --group-size?"),
    (("generate", "--prompt", "a", "--frobnicate"), "--frobnicate"),
    (("generate", "--prompt", "a", "--policy", "nope"), "--policy nope")],
    ids=lambda value: value if isinstance(value, str) else " ".join(value))
def test_a_misspelled_word_is_named_with_what_was_meant(arguments, words, cli, traces, tiny):
    """And a word that is like no other gets no guess."""
    arguments = [traces if word == "t" else word for word in arguments]
    model = () if arguments[0] == "checkpoint" else ("--model", tiny)
    status, out, err = cli(*arguments, *model)
    assert (status, out) == (2, "")
    a_line(err, words)
    assert ("did you mean" in err) == ("did you mean" in words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(cli, tiny):
    for device in ("cuda", "cuda:1", "cuda:99999"):
        status, out, err = cli("generate", "--model", tiny, "--prompt", "a", "--device", device)
        assert (status, out) == (2, "")
        a_line(err, f"--device {device}")


@pytest.mark.parametrize("flag", ("--model", "--predictor", "--timeline", "--prompt-file"))
def test_a_name_too_long_for_any_file(cli, tiny, flag):
    name = "x" * 300 + ".json"
    prompt = () if flag == "--prompt-file" else ("--prompt", "a")
    status, _, err = cli("generate", "--model", tiny, *prompt, "--max-new-tokens", 2, flag, name)
    assert status == 2
    a_line(err.splitlines()[-1] + "\n", "x" * 300)


def test_a_prompt_that_is_no_text(ask, tmp_path):
    (tmp_path / "p").write_bytes(b"caf\xe9")
    for arguments in (("--prompt-file", tmp_path / "p"), ("--prompt", "caf\udce9")):  # as Python decodes argv
        status, out, err = ask(*arguments)
        assert (status, out) == (2, "")
        a_line(err, "prompt")


def test_a_model_directory_that_is_none(cli, tiny, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "config only").mkdir()
    shutil.copy(tiny / "config.json", tmp_path / "config only")
    shutil.copytree(tiny, tmp_path / "half")
    (tmp_path / "half" / "layer-001.safetensors").unlink()
    for name in ("empty", "config only", "half"):
        for command in (("generate", "--prompt", "a"), ("train", tmp_path), ("bench", "schedule", tmp_path)):
            status, out, err = cli(*command, "--model", tmp_path / name)
            assert (status, out) == (2, "")
            a_line(err, tmp_path / name)
    assert not list((ROOT / "weights").glob("empty*"))


# Traces


def test_trace_dir(ask, tiny, tmp_path):
    """A new file each run, none overwritten, with exactly what the contract says."""
    directory = tmp_path / "deep" / "traces"
    first = json.loads(ask("--prompt", "the quick brown fox", "--trace-dir", directory, "--json")[1])
    [path] = directory.iterdir()
    before = path.read_bytes()
    ask("--prompt", "the quick brown fox", "--trace-dir", directory)
    assert len(list(directory.iterdir())) == 2 and path.read_bytes() == before
    assert all(p.suffix == ".safetensors" for p in directory.iterdir())

    tensors, n = load_file(path), first["prompt_tokens"]
    with safe_open(path, "pt") as file:
        meta = file.metadata()
    assert set(tensors) == {"router_logits", "lookahead_logits", "token_ids"}
    assert meta == {"prompt_tokens": str(n), "model": PackedModel(tiny).fingerprint, "version": "1"}
    assert tensors["router_logits"].shape == tensors["lookahead_logits"].shape == (n + 5, 3, 8)
    assert tensors["router_logits"].dtype == tensors["lookahead_logits"].dtype == torch.float16
    assert tensors["token_ids"].tolist()[n:] == first["token_ids"][:-1]

    ids = tensors["token_ids"].tolist()         # what the model itself says of these tokens, in one pass
    model, source = build(tiny)
    logits_of(model, source, ids)
    close = dict(rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(tensors["router_logits"].float(), torch.stack(source.logits, 1), **close)
    ahead = torch.stack(source.lookahead[:-1], 1)
    torch.testing.assert_close(tensors["lookahead_logits"].float(), ahead, **close)
    layer = model.layers[0]
    embedded = layer.router(layer.ffn_norm(model.embed(torch.tensor(ids))))
    torch.testing.assert_close(tensors["lookahead_logits"][:, 0].float(), embedded.detach(), **close)


def test_a_trace_of_an_answer_that_ended_by_itself(cli, tiny, tmp_path):
    """Its last row is that of the last token: the EOS never went through the model."""
    shutil.copytree(tiny, tmp_path / "model")
    run = ("generate", "--model", tmp_path / "model", "--device", "cpu", "--predictor", "none",
           "--temperature", 0, "--json")
    answer = json.loads(cli(*run, "--prompt", "the quick", "--max-new-tokens", 6)[1])
    with pytest.MonkeyPatch.context() as patch:
        init, eos = Tokenizer.__init__, (answer["token_ids"][3],)
        patch.setattr(Tokenizer, "__init__", lambda self, path, config: init(
            self, path, replace(config, eos_token_ids=eos)))
        stopped = json.loads(cli(*run, "--prompt", "the quick", "--trace-dir", tmp_path / "t")[1])
    assert stopped["finish_reason"] == "stop" and 0 < stopped["new_tokens"] <= 3
    tensors = load_file(next((tmp_path / "t").iterdir()))
    assert tensors["token_ids"].tolist()[stopped["prompt_tokens"]:] == stopped["token_ids"]


# train_predictor.py


def test_training_reports_and_repeats(cli, hasty, tiny, traces, predictor, tmp_path):
    """Without --out the file is written beside the model and found there; its bits are always the same."""
    model = shutil.copytree(tiny, tmp_path / "model")
    status, out, err = cli("train", traces, "--model", model, "--json")
    report = json.loads(out)
    assert status == 0
    assert set(report) == {"recall", "next_visit_recall", "tpot_ms", "cache_experts", "replayed_sequences",
                           "train_sequences", "test_sequences", "seconds", "out"}
    assert set(report["recall"]) == {"popularity", "previous", "affinity", "lookahead", "history", "full"}
    assert all(0 <= share <= 1 for share in (*report["recall"].values(), report["next_visit_recall"]))
    assert set(report["tpot_ms"]) == {"lookahead", "full"} and report["cache_experts"] == 6
    assert report["train_sequences"] + report["test_sequences"] == 10
    assert report["out"] == str(model / "predictor.safetensors")
    assert (model / "predictor.safetensors").read_bytes() == predictor.read_bytes()
    again = Predictor.read(predictor, PackedModel(tiny).fingerprint, 3, 8)
    for i in range(8):                          # (so often that a random order of tensors would show)
        again.save(tmp_path / f"{i}.safetensors")
        assert (tmp_path / f"{i}.safetensors").read_bytes() == predictor.read_bytes()
    status, out, err = cli("generate", "--model", model, "--device", "cpu", "--prompt", "the",
                           "--max-new-tokens", 3)
    assert status == 0 and "predictor" not in err


def test_training_says_what_it_replaces_and_when_it_tests_on_what_it_saw(cli, hasty, tiny, traces, tmp_path):
    model = shutil.copytree(tiny, tmp_path / "model")
    (model / "predictor.safetensors").write_text("an older one")
    other = Path(shutil.copytree(traces, tmp_path / "other"))
    for path in sorted(other.iterdir())[:3]:
        path.rename(path.with_name(f"renamed-{path.name}"))
    for path in sorted(other.iterdir())[5:]:
        spoil(path, noted="another")
    assert cli("train", traces, "--model", model, "--out", tmp_path / "p")[2] == ""
    note = f"note: replaces {model / 'predictor.safetensors'} "
    err = cli("train", traces, "--model", model, "--out", tmp_path / "p", "--test", traces)[2]
    assert err.startswith("note: 10 of the")
    err = cli("train", traces, "--model", model, "--test", other)[2]
    assert err.splitlines()[1].startswith(note) and err.startswith("note: 5 of the traces in --test")
    assert err.count("\n") == 2
    assert (model / "predictor.safetensors").read_bytes() == (tmp_path / "p").read_bytes()


def test_training_that_lasts_shows_how_far_it_is(cli, hasty, tiny, traces, tmp_path, monkeypatch):
    """In one line with rate and time left, wiped at the end; nothing where standard error is no terminal."""
    clock = (i / 16 for i in count())
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    run = ("train", traces, "--model", tiny, "--out", tmp_path / "p")
    assert cli(*run)[2] == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    shown = cli(*run)[2]
    assert shown.startswith("\rtraining steps: 32 of 80, 16/s, 0:03 left") and "\n" not in shown
    assert shown.endswith("0:00 left\033[K\r\033[K")


def spoil(path: Path, **changes) -> None:
    """Rewrite a safetensors file with other metadata."""
    with safe_open(path, "pt") as file:
        meta = file.metadata()
    save_file(load_file(path), path, meta | changes)


def test_bad_predictors(ask, predictor, tmp_path):
    path = tmp_path / "p.safetensors"
    for change in ("truncated", "another model's", "another version", "a directory", "text"):
        shutil.copy(predictor, path)
        if change == "truncated":
            path.write_bytes(predictor.read_bytes()[:5000])
        elif change == "another model's":
            spoil(path, model="0123456789abcdef")
        elif change == "another version":
            spoil(path, version="1")
        elif change == "text":
            path.write_text("not a predictor")
        status, out, err = ask("--prompt", "a", "--predictor", tmp_path if change == "a directory" else path)
        assert (status, out) == (2, ""), change
        a_line(err, tmp_path)
        assert ("version 1, this reads version 2" in err) == (change == "another version")


def test_bad_traces(cli, tiny, traces, tmp_path):
    """Every kind of them, for both programs that read traces."""
    changes = "missing", "empty", "truncated", "another model's", "another version", "another shape", "text"
    for change in changes:
        directory = tmp_path / change
        if change == "empty":
            directory.mkdir()
        elif change != "missing":
            shutil.copytree(traces, directory)
            victim = sorted(directory.iterdir())[3]
            if change == "truncated":
                victim.write_bytes(victim.read_bytes()[:-100])
            elif change == "text":
                victim.write_text("not a trace")
            elif change == "another shape":
                tensors = load_file(victim)
                with safe_open(victim, "pt") as file:
                    meta = file.metadata()
                save_file(tensors | {"token_ids": tensors["token_ids"][1:].clone()}, victim, meta)
            else:
                meta = {"another model's": {"model": "0123456789abcdef"}, "another version": {"version": "7"}}
                spoil(victim, **meta[change])
        for command in (("train", directory), ("bench", "schedule", directory)):
            status, out, err = cli(*command, "--model", tiny)
            assert (status, out) == (2, ""), change
            a_line(err, directory if change in ("missing", "empty") else victim)
    assert not (tiny / "predictor.safetensors").exists()


def test_too_few_sequences(cli, tiny, traces, tmp_path):
    shutil.copytree(traces, tmp_path / "few")
    for path in sorted((tmp_path / "few").iterdir())[3:]:
        path.unlink()
    status, out, err = cli("train", tmp_path / "few", "--model", tiny)
    assert (status, out) == (2, "")
    a_line(err, tmp_path / "few", "3")


def test_out_must_be_writable(cli, tiny, traces):
    status, out, err = cli("train", traces, "--model", tiny, "--out", "/no/such/dir/p.safetensors")
    assert (status, out) == (2, "")
    a_line(err, "/no/such/dir")


# python -m duoserve.bench


ROW = {"policy", "cache_experts", "ttft_ms", "tpot_ms", "hits", "prefetched_used", "misses",
       "needed_transfers_per_token", "moved_transfers_per_token", "link_busy", "floor_ms"}


def test_bench_schedule(cli, tiny, traces, predictor, tmp_path):
    for path in sorted(traces.iterdir())[:3]:
        shutil.copy(path, tmp_path)
    run = ("bench", "schedule", tmp_path, "--model", tiny, "--predictor", predictor,
           "--cache-experts", 2, 6, 24, "--json")
    status, out, err = cli(*run)
    assert status == 0 and cli(*run)[1] == out          # to the last digit
    result = json.loads(out)
    assert set(result) >= {"costs", "belady_transfers_per_token", "rows"}
    assert list(result["belady_transfers_per_token"]) == ["2", "6", "24"]
    policies = {*POLICIES, "oracle"}
    rows = {(r["policy"], r["cache_experts"]) for r in result["rows"]}
    assert rows == {(policy, slots) for policy in policies for slots in (2, 6, 24)}
    for r in result["rows"]:
        assert set(r) >= ROW
        # Traces, steps, layers, top two.
        assert r["hits"] + r["prefetched_used"] + r["misses"] == 3 * 11 * 3 * 2
        assert r["needed_transfers_per_token"] == pytest.approx((r["prefetched_used"] + r["misses"]) / 33)
        assert r["moved_transfers_per_token"] >= r["needed_transfers_per_token"] - 24 / 11
        assert 0 <= r["link_busy"] <= 1 + 1e-9 and r["ttft_ms"] > 0 and r["tpot_ms"] > 0
    assert result["costs"]["expert_transfer_ms"] == 3.7 and result["costs"]["chunks"] == 12


def test_bench_schedule_prints_a_table(cli, tiny, traces):
    status, out, err = cli("bench", "schedule", traces, "--model", tiny, "--predictor", "none",
                           "--cache-experts", 6, "--policies", "duo", "lru", "--expert-transfer-ms", 2)
    table, legend = out.split("\n\n")
    _, headings, *rows = table.splitlines()
    assert status == 0 and [row.split()[0] for row in rows] == ["duo", "lru"]
    explained = {name for line in legend.splitlines() for name in re.split("  +", line)[0].split(", ")}
    assert explained == {*headings.split()} - {"policy", "slots", "tok/s"}


def test_bench_schedule_says_whose_experts_the_figures_are_for(cli, tiny, traces):
    run = ("bench", "schedule", traces, "--model", tiny, "--predictor", "none", "--policies", "cache")
    for options, flags in (((), ""), (("--link", "25GB/s"), "with --link the"),
                           (("--gpu-memory", "1GB"), "with --gpu-memory the"),
                           (("--link", "1GB/s", "--gpu-memory", "1GB"), "with --link and --gpu-memory the")):
        err = cli(*run, *options)[2]
        assert err.count("experts of this model's size (11") == bool(flags) and flags in err


def test_bench_schedule_of_what_costs_nothing(cli, tiny):
    """Every expert cached and computed in no time: nothing may divide by that time."""
    run = ("bench", "schedule", "--model-config", tiny / "config.json", "--attention-ms", 0, "--expert-ms", 0,
           "--cache-experts", 24, "--policies", "cache")
    assert cli(*run)[0] == 0
    assert json.loads(cli(*run, "--json")[1])["rows"][0]["tpot_ms"] == 0


def test_bench_schedule_plans_from_a_config_alone(cli, tmp_path):
    write_hf(tmp_path, num_hidden_layers=2)
    for path in tmp_path.iterdir():
        if path.name != "config.json":
            path.unlink()
    run = ("bench", "schedule", "--model-config", tmp_path / "config.json", "--json")
    status, out, err = cli(*run, "--cache-experts", 4, "--policies", "duo", "oracle")
    assert status == 0 and len(json.loads(out)["rows"]) == 2 and "synthetic" in err
    status, out, err = cli(*run, "--gpu-memory", "4GB", "--policies", "lru")
    assert status == 0 and json.loads(out)["rows"][0]["cache_experts"] == 16


def test_bench_run(cli, tiny):
    status, out, err = cli("bench", "run", "--model", tiny, "--device", "cpu", "--predictor", "none",
                           "--policies", "duo", "lru", "--cache-experts", 6, "--simulate-link", "100MB/s",
                           "--max-new-tokens", 4, "--rounds", 2, "--host-memory", "50%", "--json")
    result = json.loads(out)
    assert status == 0 and [r["policy"] for r in result["rows"]] == ["duo", "lru"]
    assert all(r["tpot_s"] > 0 and r["ttft_s"] > 0 and 0 < r["link_busy_fraction"] <= 1
               for r in result["rows"])


def test_bench_run_finds_a_policy_that_computes_something_else(cli, tiny, monkeypatch):
    generate = Engine.generate

    def other(engine, *arguments, **options):
        result = generate(engine, *arguments, **options)
        result.token_ids += [7] * (engine.policy == "lru")
        return result
    monkeypatch.setattr(Engine, "generate", other)
    status, out, err = cli("bench", "run", "--model", tiny, "--device", "cpu", "--predictor", "none",
                           "--policies", "duo", "lru", "--max-new-tokens", 3, "--rounds", 1)
    assert (status, out) == (2, "")
    a_line(err, "lru and duo gave different tokens")


def test_bench_quality(cli, tiny, tmp_path):
    """As by definition: the bits of each token given those before it in its window, divided by the bytes."""
    text = "the quick brown fox jumps over the lazy dog, café " * 3
    (tmp_path / "t").write_bytes(b"\xef\xbb\xbf" + text.encode())        # (a byte order mark is no text)
    run = ("bench", "quality", tmp_path / "t", "--model", tiny, "--device", "cpu", "--context", 32)
    status, out, err = cli(*run, "--json")
    got = json.loads(out)
    model, source = build(tiny)
    ids = Tokenizer(tiny / "tokenizer.model", MixtralConfig()).sp.encode(text)
    bits = 0.0
    for start in range(0, len(ids), 32):
        window = ids[start:start + 32]
        p = logits_of(model, source, [1, *window])[:-1].double().softmax(-1)
        bits -= sum(math.log2(p[i, token]) for i, token in enumerate(window))
    assert status == 0 and len(ids) % 32
    assert got == {"bits_per_byte": pytest.approx(bits / len(text.encode()), rel=1e-4),
                   "perplexity": pytest.approx(2 ** (bits / len(ids)), rel=1e-4), "tokens": len(ids),
                   "bytes": len(text.encode()), "windows": -(-len(ids) // 32), "context": 32}
    assert "are few" in err
    status, out, err = cli(*run)
    assert status == 0
    assert out.startswith(f"{got['bits_per_byte']:.4f} bits per byte, "
                          f"perplexity {got['perplexity']:.3f} per token")
    assert json.loads(cli(*run[:-2], "--json")[1])["context"] == 256       # what the model takes
    one_by_one = json.loads(cli(*run, "--decode", "--json")[1])     # as new tokens: only rounded otherwise
    assert one_by_one == {**got, "bits_per_byte": pytest.approx(bits / len(text.encode()), rel=1e-4),
                          "perplexity": pytest.approx(2 ** (bits / len(ids)), rel=1e-4)}
    half = json.loads(cli(*run, "--decode", "--dtype", "bf16", "--json")[1])
    assert 0 < abs(half["bits_per_byte"] - got["bits_per_byte"]) < 2e-3 * got["bits_per_byte"]


@pytest.mark.parametrize("command", [["generate"], ["train"], ["checkpoint"], ["bench"],
                                     *(["bench", name] for name in ("schedule", "run", "gpu", "quality"))])
def test_help_explains_everything(command, cli, monkeypatch):
    """Each option with its default, each of bench's commands in a line, and two examples at the end."""
    shown = []
    monkeypatch.setattr(Parser, "print_help", lambda self, file=None: shown.append(self))
    assert cli(*command, "--help") == (0, "", "")
    for action in shown[0]._actions:
        if action.option_strings and action.dest not in ("help", "version", "prompt", "prompt_file"):
            assert action.help and "default" in action.help, action
    if command == ["bench"]:
        lines = [line.strip() for line in shown[0].format_help().splitlines()]
        for name in ("schedule", "run", "gpu", "quality"):
            assert any(re.fullmatch(rf"{name} {{2,}}\w.{{20,}}", line) for line in lines)
    assert "%" not in re.sub(r" %|\d%", "", shown[0].format_help())
    examples = shown[0].format_help().splitlines()[-2:]
    for example in examples:
        check_parses(example.strip())
        assert example.startswith(f"  {shown[0].prog} ")
    assert shown[0].format_help().splitlines()[-3] == "examples:" and len(set(examples)) == 2


# What is written down


PARSERS = {"generate.py": generate.make_parser, "train_predictor.py": train_predictor.make_parser,
           "duoserve.checkpoint": checkpoint.make_parser, "duoserve.bench": bench.make_parser,
           "weights/make_demo.py": runpy.run_path(ROOT / "weights" / "make_demo.py")["make_parser"]}


def check_parses(command: str) -> None:
    """The program itself understands it; for pytest, and for --help, there is nothing to check."""
    program, *words = shlex.split(command.removeprefix("python ").removeprefix("-m "), comments=True)
    if program != "pytest" and "--help" not in words:
        PARSERS[program]().parse_args(words)


def commands(readme: str) -> list[str]:
    """The Python programs called in its blocks, fenced or indented, and in its spans of code."""
    parts = (ROOT / readme).read_text().replace("\\\n", "").split("```")
    lines = [line for block in parts[1::2] for line in block.splitlines()]
    for prose in parts[::2]:
        lines += re.findall("^ {4}(.*)", prose, re.M)
        lines += [span.replace("\n", " ") for span in re.findall("`([^`]+)`", prose)]
    calls = [re.fullmatch(r"(?:\w+=\S+ )?(python .*)", call) for line in lines for call in line.split(" && ")]
    return [call[1] for call in calls if call]


@pytest.mark.parametrize("readme, least", [("README.md", 10), ("duoserve/bench/README.md", 5),
                                           ("weights/README.md", 2)])
def test_commands_in_a_readme_are_understood(readme, least):
    assert len(commands(readme)) >= least
    for command in commands(readme):
        check_parses(command)


def test_what_the_readme_does_without_a_gpu_works(cli, tmp_path, monkeypatch):
    """But for the length of the answers, and with the policy that it shows."""
    code, = re.findall(r"```python\n# my_policy.py.*?\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    (tmp_path / "my_policy.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    runs = [command for command in commands("README.md") if re.search(r"generate.py --prompt \S", command)]
    for command in runs:
        assert cli("generate", *shlex.split(command)[2:], "--device", "cpu", "-n", 3)[0] == 0, command
    assert runs


@pytest.mark.parametrize("data, word", [
    (None, "cannot be read"), (b"", "empty"), (b" \n ", "empty"), (b"\x7fELF\x02\x00\x00", "UTF-8"),
    (b"caf\xe9 " * 99, "UTF-8"),
    (b"the fox", "too short"), (b"the fox " * 99, "--context")])
def test_a_text_that_says_nothing(data, word, cli, tiny, tmp_path):
    path = tmp_path / "text"
    if data is not None:
        path.write_bytes(data)
    status, out, err = cli("bench", "quality", path, "--model", tiny, "--device", "cpu", "--context", 1)
    assert (status, out) == (2, "")
    a_line(err, word, *[path] * (word != "--context"))


BENCH_MISTAKES = [
    ("schedule TRACES --policies nope", "nope"), ("schedule TRACES --cache-experts 1", "--cache-experts"),
    ("schedule TRACES --attention-ms -1", "--attention-ms"),
    ("schedule TRACES --expert-transfer-ms 0", "--expert-transfer-ms"),
    ("schedule TRACES --prefill-attention-ms -1", "--prefill-attention-ms"),
    ("schedule TRACES --prefill-expert-ms nan", "--prefill-expert-ms"),
    ("schedule TRACES --host-block-ms 1", "--host-expert-ms"),
    ("schedule TRACES --chunks 0", "--chunks"), ("schedule TRACES --link fast", "--link"),
    ("schedule TRACES --link 25", "--link 25: 25 B a second is not a link's speed; write it like 25GB/s"),
    ("schedule TRACES --link 100Gbit/s", "--link 100Gbit/s: that is bits, 8 of them a byte: write 12.5GB/s"),
    ("schedule TRACES --link 25GB/s --expert-transfer-ms 3", "--link"),
    ("schedule TRACES --gpu-memory 12", "write 12GiB"), ("schedule TRACES --gpu-memory 1MB", "--gpu-memory"),
    ("schedule TRACES --predictor /no/such/file", "/no/such/file"),
    ("schedule TRACES --context 1000000", "--context 1000000: this model takes from 2 to 256 tokens"),
    ("schedule TRACES --context 1", "--context 1: this model takes from 2 to 256 tokens"),
    ("schedule TRACES --context -5", "--context -5: this model takes from 2 to 256 tokens"),
    ("schedule TRACES --what", "--what"), ("schedule", ""),
    ("schedule --model-config /no/such/config", "/no/such/config"),
    # Neither a word of the list nor the directory that may follow it.
    ("schedule --model-config CONFIG --policies duo tarces", "--policies tarces: unknown"),
    ("schedule --model-config CONFIG --cache-experts nine", "--cache-experts nine"),
    ("schedule --model-config CONFIG --cache-experts 9 2.5", "--cache-experts 2.5"),
    ("run --rounds 0", "--rounds"), ("run --max-new-tokens 1", "--max-new-tokens"),
    ("run --policies nope", "nope"),
    ("run --prompt=", "prompt"), ("quality", "FILE"), ("sing", "sing"), ("", "schedule, run, gpu, quality")]


def test_a_mistake_in_bench_is_one_line(cli, tiny, traces):
    for line, name in BENCH_MISTAKES:
        given = {"TRACES": traces, "CONFIG": tiny / "config.json"}
        arguments = [given.get(word, word) for word in line.split()]
        if arguments[:1] in (["schedule"], ["run"]):
            arguments += [*["--model", tiny] * ("CONFIG" not in line),
                          *["--predictor", "none"] * ("--predictor" not in line)]
        status, out, err = cli("bench", *arguments)
        assert (status, out) == (2, ""), line
        a_line(err, name)


def test_a_mistake_in_a_policy_of_ones_own_is_a_line_with_its_place(tiny, traces, tmp_path, cli):
    policy = tmp_path / "own.py"
    policy.write_text("from duoserve.scheduler import ExpertScheduler\n\n\n"
                      "class Own(ExpertScheduler):\n"
                      "    def victm(self, key, candidates, urgent):\n        return None\n\n"
                      "    def plan_prefetch(self, layer, routing):\n        self.cache.plan(nothing)\n")
    model = "--model", tiny, "--predictor", "none"
    for run in (("bench", "schedule", traces, *model, "--policies", policy, "--cache-experts", 3),
                ("generate", *model, "--prompt", "a", "--device", "cpu", "--policy", policy)):
        status, out, err = cli(*run)
        assert status == 2 and out == ""
        note, *_, error = err.splitlines()
        assert note == f"note: {policy}: victm is no method that a policy is asked; did you mean victim?"
        assert error.startswith(f"error: {policy}:9, in plan_prefetch: NameError:")
        policy.write_text(policy.read_text() + "\n")               # (a note once a version of the file)
    status, out, err = cli("bench", "schedule", traces, *model, "--policies", "cache", policy, "lru",
                           "--cache-experts", 3)
    assert status == 2 and err.splitlines()[-1].startswith(f"error: {policy}:9, in plan_prefetch: NameError:")
    shown = [line.split()[0] for line in out.splitlines() if line[:5] in ("cache", "lru  ")]
    assert shown == ["cache", "lru"]


def test_a_shape_may_be_named_instead_of_its_config(cli):
    run = "bench", "schedule", "--policies", "duo", "--cache-experts", 300, "--json", "--model-config"
    status, out, _ = cli(*run, "mixtral-8x22b")
    assert status == 0 and json.loads(out)["rows"][0]["cache_experts"] == 300
    assert cli(*run, "mixtral-9x7b")[0] == 2


# For real


def test_the_programs_themselves(tiny, traces, ask):
    """Five at once, since they spend their time on starting: a prompt from standard input, a reader that goes
    away (`| head -c 1`), Ctrl-C, a standard output that is full, and a mistake in the bench."""
    command = ("generate.py", "--model", tiny, "--device", "cpu", "--predictor", "none", "--max-new-tokens")
    left = program(*command, 200, "--prompt", "the", "--simulate-link", "2MB/s")
    stopped = program(*command, 250, "--prompt", "the", "--simulate-link", "1MB/s")
    piped = program(*command, 6, "--prompt-file", "-")
    with open("/dev/full", "w") as device:
        full = program(*command, 2, "--prompt", "a", stdout=device)
    bench = program("-m", "duoserve.bench", "schedule", traces, "--model", tiny, "--cache-experts", 1)

    assert left.stdout.read(1)              # (these two take many seconds if nobody stops them)
    left.stdout.close()
    assert stopped.stdout.read(1)
    stopped.send_signal(signal.SIGINT)
    err = left.stderr.read()
    assert left.wait(timeout=120) == 0 and b"Traceback" not in err and b"Exception" not in err
    out, err = stopped.communicate(timeout=120)
    assert stopped.returncode == 130 and b"interrupted" in err and b"Traceback" not in err

    out, err = piped.communicate(b"the quick", timeout=120)
    assert (piped.returncode, out.decode()) == (0, ask("--prompt", "the quick")[1])
    assert b"6 tokens" in err and b"Warning" not in err

    err = full.communicate(timeout=120)[1].decode()
    assert full.returncode == 2
    a_line(err, "standard output")

    out, err = bench.communicate(timeout=120)
    assert (bench.returncode, out) == (2, b"")
    assert err.decode().splitlines()[-1].startswith("error: --cache-experts 1") and b"Warning" not in err


def test_the_closing_line_says_how_many_experts_were_there_in_time():
    """Those that came too late do not count, used or not."""
    stats = SimpleNamespace(tpot_s=0.1, ttft_s=0.2, prompt_tokens_kept=0, hits=10, prefetched_used=60,
                            misses=30, in_time=52, cache_experts=5, peak_device_bytes=1, bytes_moved=0,
                            link_busy_fraction=0.5, bytes_from_disk=0, policy="duo", host_experts=0,
                            split_experts=0, host_unused=None)
    result = SimpleNamespace(stats=stats, token_ids=[1, 2], finish_reason="length", prompt_tokens=3)
    assert "52 % of experts were there in time" in generate.closing_line(result)
