"""Fixtures shared by all tests. One thread is enough for tiny models: two would only wait for each other."""

import gc
import getpass
import io
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
torch.set_num_threads(1)

import generate
import train_predictor
from duoserve import checkpoint, training
from duoserve.bench import __main__ as bench
from duoserve.errors import run_main

PROGRAMS = {"generate": generate.main, "train": train_predictor.main, "bench": bench.main,
            "checkpoint": checkpoint.main}


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: runs on a GPU only")
    config.addinivalue_line("markers", "compiles: by torch.compile, a minute of work where nothing is cached")


def compiles(item) -> bool:
    return item.get_closest_marker("compiles") is not None


def pytest_collection_modifyitems(items):
    items.sort(key=compiles)                # these come last,


@pytest.fixture(scope="session", autouse=True)
def compiled_beside(request):
    """... and where nothing is compiled yet, a process of their own runs them first, beside all others: what
    it compiles is found in the cache, and its verdict is not asked for."""
    items, default = request.session.items, f"{tempfile.gettempdir()}/torchinductor_{getpass.getuser()}"
    slow = [item.nodeid for item in items if compiles(item)]
    if (len(items) < 20 * len(slow) or not slow or len(os.sched_getaffinity(0)) == 1
            or Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", default), "fxgraph").exists()):
        yield lambda: None
        return
    beside = subprocess.Popen([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *slow],
                              cwd=request.config.rootpath, stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL)
    yield beside.wait
    beside.kill()
    beside.wait()


@pytest.fixture(autouse=True)
def wait_for_compiler(request, compiled_beside):
    if compiles(request.node):
        compiled_beside()


@pytest.fixture(scope="module", autouse=True)
def frozen():
    """What was imported so far, a million objects, need not be looked through at each collection."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def no_power_cut():
    """A file is whole when it is closed: nothing here waits for the disk, which others may keep busy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)                        # (as strict about what it is given)
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A packed model of three layers with eight experts of 11 kB, two a token."""
    from models import packed
    return packed(tmp_path_factory.mktemp("tiny"), seed=7)


@pytest.fixture(scope="session")
def traces(tiny, tmp_path_factory):
    """A directory with ten sequences that `tiny` generated, each of 12 prompt tokens and 12 new ones."""
    from duoserve import Engine
    from duoserve.trace import TraceRecorder
    directory = tmp_path_factory.mktemp("traces")
    engine = Engine.from_pretrained(tiny, device="cpu", predictor="none")
    recorder = engine.source.recorder = TraceRecorder(engine.config, engine.context, engine.device)
    for i in range(10):
        result = engine.generate([1, *range(20 * i + 20, 20 * i + 31)], max_new_tokens=12, seed=i)
        recorder.save(directory, engine.sequence.kv_tokens, result.prompt_tokens, engine.packed.fingerprint)
    return directory


@pytest.fixture
def hasty(monkeypatch):
    """Short training, for tests that do not ask how good a predictor is."""
    monkeypatch.setattr(training, "LEAST_STEPS", 40)


@pytest.fixture(scope="session")
def predictor(tiny, traces, tmp_path_factory):
    """The file that train_predictor.py makes of `traces`, after a short training."""
    out = tmp_path_factory.mktemp("predictor") / "predictor.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "LEAST_STEPS", 40)
        patch.setattr(sys, "argv",
                      ["train_predictor.py", str(traces), "--model", str(tiny), "--out", str(out), "--json"])
        train_predictor.main()
    return out


@pytest.fixture
def cli(monkeypatch, capsys):
    """`cli(program, *arguments)` -> (exit status, standard output, standard error), in this process."""
    def run(program, *arguments):
        monkeypatch.setattr(sys, "argv", [program, *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            run_main(PROGRAMS[program])
        return end.value.code or 0, *capsys.readouterr()
    return run


@pytest.fixture
def ask(cli, tiny):
    """`ask(*arguments)`: generate.py on the tiny model, with a short answer."""
    def run(*arguments):
        return cli("generate", "--model", tiny, "--device", "cpu", "--predictor", "none",
                   "--max-new-tokens", 6, *arguments)
    return run


@pytest.fixture
def session(cli, monkeypatch):
    """`session(model, lines, *arguments)`: generate.py --interactive with lines typed; as `cli`."""
    def run(model, lines, *arguments):
        data = lines if isinstance(lines, bytes) else "".join(f"{line}\n" for line in lines).encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        return cli("generate", "--model", model, "--device", "cpu", "--predictor", "none", "--temperature", 0,
                   "--max-new-tokens", 6, "--interactive", *arguments)
    return run
