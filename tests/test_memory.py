"""Little host memory: a conversion that holds a few matrices at most, and experts that stay on the disk."""

import ctypes
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from io import StringIO
from math import prod
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from models import (answers, at_rest, DEFAULTS, hostile, in_child, InterruptAt, LateLane, load, LONG,
                    on_a_gpu, put_lane, same, SAMPLED, SHORT, tokenizer_model)

from duoserve import machine, memory, store
from duoserve.bench.flags import SHAPES
from duoserve.bench.madeup import RandomModel
from duoserve.cache import GPUExpertCache
from duoserve.checkpoint import convert, hugging_face, to_hf
from duoserve.config import MixtralConfig
from duoserve.errors import UserError
from duoserve.link import IN_FLIGHT, LinkError
from duoserve.memory import LIBRARIES, LOGIT_ROWS, plan_memory
from duoserve.packed import ModelShapes, PackedModel
from duoserve.predictor import Predictor
from duoserve.simulated import SimulatedLane, VirtualClock
from duoserve.trace import read_traces
from duoserve.training import measure_affinity

M_MMAP_THRESHOLD = -3                       # of malloc.h: what is larger is mapped by itself


# Conversion

def write_hollow(path: Path, **changes) -> int:
    """A bfloat16 checkpoint of zeros in a file full of holes: large, and quickly made. Returns its bytes."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(DEFAULTS | {"model_type": "mixtral"} | changes))
    (path / "tokenizer.model").write_bytes(tokenizer_model())
    entries, end = {}, 0
    for parts in hugging_face(MixtralConfig.read(path)).values():
        for shapes in parts.values():
            for name, shape in shapes.items():
                start, end = end, end + 2 * prod(shape)
                entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    with open(path / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    return end


def with_at_most(nbytes, job, *arguments):
    """Call it, with no more memory than there is by now and `nbytes`. To be called in a child process."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**17)              # (what is freed is no hidden reserve)
    with open("/proc/self/status") as status:
        now = next(int(line.split()[1]) for line in status if line.startswith("VmData")) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (now + nbytes,) * 2)
    job(*arguments)


def test_converting_takes_a_few_matrices_of_memory_whatever_the_model(tmp_path):
    """The system enforces the bound: RLIMIT_DATA counts all private memory, and malloc returns what is freed.

    Packing holds the largest tensor (of Mixtral-8x22B: the embedding, 402 MB), or a matrix and an expert (201
    and 160 MB), and blocks of temporaries; unpacking holds it in float32 as well.
    """
    size = write_hollow(tmp_path / "hf", hidden_size=256, intermediate_size=1024, vocab_size=32768,
                        num_hidden_layers=2)
    largest = 2 * 32768 * 256
    jobs = ((convert, largest + 24 * 10**6, "hf", "out"), (to_hf, 4 * largest, "out", "back"))
    assert size > 1.4 * jobs[0][1] and 2 * size > 1.4 * jobs[1][1]
    for job, bound, source, destination in jobs:
        in_child(lambda: with_at_most(bound, job, tmp_path / source, tmp_path / destination))
    PackedModel(tmp_path / "out")


def taken(device: str) -> tuple[int, int, int]:
    """By how much a process grows with a store of 128 experts, what these take, and what one does."""
    def resident():
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) * 1024

    def make(experts):
        config = MixtralConfig(hidden_size=512, intermediate_size=1408, num_hidden_layers=8, vocab_size=512,
                               num_local_experts=experts, num_attention_heads=4, num_key_value_heads=2)
        model = RandomModel(config, torch.device("cpu"))
        keys = [(layer, e) for layer in range(8) for e in range(experts)]
        made = store.ExpertStore(model, keys, pin=device == "cuda")
        made.wait()
        assert made.pinned == (device == "cuda")
        return made, 8 * experts * store.stride_of(model)

    torch.ones(1, device=device)
    small = make(2)                         # (threads, and what libraries take at their first call)
    before = resident()
    made, wanted = make(16)
    return resident() - before, wanted, made.nbytes


@pytest.mark.parametrize("device", ("cpu", pytest.param("cuda", marks=on_a_gpu)))
def test_host_memory_is_taken_exactly(device):
    """The process grows by the experts' size; rounding blocks up to a power of two would nearly double it."""
    code = f"import test_memory; print(*test_memory.taken('{device}'))"     # (CUDA does not survive a fork)
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    grown, wanted, expert = map(int, done.stdout.split())
    assert wanted > 140 * 10**6 and 2 ** expert.bit_length() > 1.7 * expert
    # (Something may be given back; each thread's allocator takes some, on 32 processors 5 %.)
    assert wanted - 10**6 < grown < wanted * (1.1 if device == "cuda" else 1.04)


# Experts on the disk

@pytest.fixture(scope="module")
def want(tiny):
    return answers(load(tiny, policy="cache", cache_experts=24))


@pytest.fixture
def copy(tiny, tmp_path):
    return Path(shutil.copytree(tiny, tmp_path / "model"))


@pytest.mark.parametrize("policy, kept",
                         [*(("duo", kept) for kept in (0, 1, 7, 23, 24)), ("layer-prefetch", 0),
                          ("layer-prefetch", 7), ("on-demand", 7), ("cache", 0)])
def test_the_same_bits_however_little_memory_there_is(policy, kept, tiny, want):
    stride = store.stride_of(PackedModel(tiny))
    options = dict(policy=policy, cache_experts=5, host_memory=max(1, kept * stride + stride // 2))
    engine = load(tiny, **options)
    assert len(engine.store.blocks) == kept and len(engine.store.memory) <= max(1, kept) * stride
    assert same(answers(engine), want)
    engine = load(tiny, **options)
    put_lane(engine, LateLane(engine, seed=kept))
    hostile(engine, seed=kept)              # drops guesses half-way, before their CRC is known
    assert same(answers(engine), want)


def test_guesses_of_what_lies_on_the_disk_arrive(tiny):
    """Chunk by chunk, in the order of the file: only so can their CRC be checked."""
    engine = load(tiny, cache_experts=9, host_memory="30%", simulate_link=8e6, policy="lru")
    fetch, failed = engine.store.fetch, []

    def watched(*piece):
        try:
            fetch(*piece)
        except LinkError as error:
            failed.append(error)
            raise
    engine.store.fetch = watched
    assert same(answers(engine), answers(load(tiny, cache_experts=24)))
    assert not failed and engine.result.stats.prefetched_used


@pytest.mark.parametrize("link, chunk", [("50MB/s", 1000), (None, 777), (None, 10**9)])
def test_the_same_bits_in_any_pieces(link, chunk, tiny, want):
    engine = load(tiny, cache_experts=4, host_memory="10%", simulate_link=link)
    engine.cache.lane.chunks = chunk, chunk
    assert same(answers(engine), want) and 0 < len(engine.store.blocks) < 4


def test_sizes_of_all_kinds_and_what_is_kept_without_a_predictor(tiny):
    model = PackedModel(tiny)
    stride = store.stride_of(model)
    for size, kept in ((f"{9 * stride}B", 9), ("50%", model.nbytes // 2 // stride),
                       ("1TB", 24), (None, 24), ("1B", 0)):
        engine = load(tiny, host_memory=size)
        assert len(engine.store.blocks) == kept
        layers = [sum(layer == i for layer, _ in engine.store.blocks) for i in range(3)]
        assert max(layers) - min(layers) <= 1           # evenly


def test_with_a_predictor_those_used_most_are_kept(tiny, traces, predictor):
    used = np.zeros((3, 8))
    for trace in (all_traces := read_traces(traces)):
        for layer in range(3):
            used[layer] += np.bincount(trace.top(2)[:, layer].ravel(), minlength=8)
    implied = Predictor((), measure_affinity(all_traces, 2), "").popularity()
    assert np.abs(implied - used / used.sum(1, keepdims=True)).max() < 0.02
    kept = load(tiny, predictor=predictor, host_memory=8 * store.stride_of(PackedModel(tiny))).store.blocks
    assert len(kept) == 8 and sum(used[key] for key in kept) > 0.9 * np.sort(used.ravel())[-8:].sum()


def test_too_little_memory_is_said_before_anything_is_read(tiny, monkeypatch):
    needed = load(tiny, cache_experts=2).plan.total + 24 * store.stride_of(PackedModel(tiny))
    read = PackedModel.read_expert, PackedModel.resident
    monkeypatch.setattr(memory, "available_memory", lambda: needed - 1)
    for method in ("read_expert", "resident"):
        monkeypatch.setattr(PackedModel, method, lambda *_: pytest.fail("was read"))
    words = "would take .*B of host memory and .*B are available; --host-memory"
    with pytest.raises(UserError, match=words) as refusal:
        load(tiny, cache_experts=2)
    assert str(tiny) in str(refusal.value)
    monkeypatch.setattr(memory, "available_memory", lambda: 10_000)
    with pytest.raises(UserError, match="--host-memory 10 GB would take .* 10 kB are available; free some"):
        load(tiny, cache_experts=2, host_memory="10GB")
    monkeypatch.setattr(memory, "available_memory", lambda: needed - 1)
    monkeypatch.setattr(PackedModel, "read_expert", read[0])
    monkeypatch.setattr(PackedModel, "resident", read[1])
    advice = str(refusal.value).split("--host-memory ")[1].split()[0]
    engine = load(tiny, cache_experts=2, host_memory=advice)
    assert engine.generate(SHORT, max_new_tokens=2).token_ids


def test_memory_of_a_container(tmp_path, monkeypatch):
    files = {"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:  5000 kB\n",
             "/sys/fs/cgroup/memory.max": "max\n", "/sys/fs/cgroup/memory.stat": "anon 1000\nfile 5\n"}
    monkeypatch.setattr(machine, "open", lambda path: StringIO(files[str(path)]), raising=False)
    monkeypatch.setattr(Path, "read_text", lambda path: files[str(path)])
    assert machine.available_memory() == 5_120_000
    files["/sys/fs/cgroup/memory.max"] = "4000000\n"
    assert machine.available_memory() == 3_999_000
    files["/proc/meminfo"] = ""
    assert machine.available_memory() == 3_999_000


def all_on_disk(directory, **options):
    return load(directory, cache_experts=3, host_memory=1, **options)


def spoil(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("policy", ("duo", "layer-prefetch"))
def test_a_damaged_expert_on_the_disk_is_named_and_never_computed_with(policy, copy, want):
    file = copy / "layer-001.safetensors"
    offset = PackedModel(copy).headers[file.name].tensors["experts.6"][2] + 5
    spoil(file, offset)
    engine = all_on_disk(copy, policy=policy)
    used, cache = set(), engine.cache
    engine.source.slots.expert.register_forward_pre_hook(
        lambda *_: used.update(key for key, slot in cache.slot_of.items() if slot.pinned))
    with pytest.raises(UserError, match=r"layer-001.safetensors: experts 6 is corrupted"):
        engine.logits(LONG)
    assert used and (1, 6) not in used and at_rest(engine.cache)
    spoil(file, offset)
    assert same(answers(all_on_disk(copy, policy=policy)), want)


def rewrite(path):
    time.sleep(0.01)            # (a file system's clock ticks only a few hundred times a second)
    with open(path, "r+b") as file:
        file.seek(-50, 2)
        file.write(b"x")


def replace(path):
    shutil.copy(path, f"{path}.new")
    os.replace(f"{path}.new", path)


CHANGES = {"truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
           "emptied": lambda path: os.truncate(path, 0), "rewritten": rewrite, "replaced": replace,
           "deleted": os.unlink}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_under_us_is_one_line(change, copy, want):
    engine = all_on_disk(copy)
    assert same(answers(engine), want)                  # every expert's CRC has been checked by now
    for layer in range(3):
        CHANGES[change](copy / f"layer-{layer:03d}.safetensors")
    words = r"layer-00\d.safetensors: (truncated|was changed|no such file)"
    with pytest.raises(UserError, match=words) as error:
        engine.generate(LONG, **SAMPLED)
    assert "\n" not in str(error.value) and at_rest(engine.cache)


def test_a_guess_that_cannot_be_read_is_not_visible(tiny, want, monkeypatch):
    """Only what the router asks for must be readable."""
    engine, read, failed = all_on_disk(tiny, simulate_link="20MB/s"), store.read_into, []

    def moody(file, start, buffer, path, crc):
        guess = len(buffer) < engine.packed.layout.nbytes       # a demand reads the whole expert
        if guess and random.random() < 0.2:
            failed.append(path)
            raise UserError(f"{path}: cannot be read")
        return read(file, start, buffer, path, crc)
    monkeypatch.setattr(store, "read_into", moody)
    assert same(answers(engine), want) and len(failed) > 20


def test_a_host_that_reads_the_disk_for_guesses_comes_back_after_two_chunks():
    """Even a slow one, whose every chunk has crossed the link before the next is read, as on a GPU."""
    class Lane(SimulatedLane):
        flying = 0

        def poll(self):
            self.flying = 0

        def room(self, asked):
            return self.flying < IN_FLIGHT

        def send(self, transfer, nbytes):
            super().send(transfer, nbytes)
            self.flying += 1
    cache = GPUExpertCache(3, 12, Lane(VirtualClock(), 0, 1))
    cache.serve(SimpleNamespace(known={(0, 0), (0, 1)}))
    cache.plan([(0, 0), (0, 1)])
    sent = [cache.counts.bytes_moved]
    for _ in range(3):
        cache.pump()
        sent.append(cache.counts.bytes_moved)
    assert sent == [2, 4, 6, 8] and cache.demand((0, 0)) and cache.counts.bytes_moved == 12


def test_memory_that_cannot_be_had_at_all(tiny, monkeypatch):
    def refuse(*_):
        raise OSError(12, "Cannot allocate memory")
    monkeypatch.setattr(store.mmap, "mmap", refuse)
    with pytest.raises(UserError, match="--host-memory"):
        load(tiny)


def test_before_the_first_token_there_is_no_time_to_it(tiny):
    engine = load(tiny)
    InterruptAt(engine, 2)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(SHORT)
    assert engine.result.stats.ttft_s is None and '"ttft_s": null' in json.dumps(engine.result.asdict())


def test_the_plan_has_room_for_a_row_block_beside_its_capture():
    """Whatever the context; an eager engine captures nothing."""
    model, rows = ModelShapes(SHAPES["mixtral-8x7b"]), 512 * (3 * 14336 + 4 * 4096) * 2
    always = LIBRARIES + LOGIT_ROWS * 32000 * 6 + 14336 * 4096 * 2  # (the last: a matrix, unpacked)
    prompt = 4096 * 4096 * 8 * 2                                    # what a long one takes besides
    planned = [plan_memory(model, torch.bfloat16, context, compiled, True, None, None).workspace
               for context, compiled in ((64, True), (4096, True), (64, False))]
    assert planned[0] >= always + 2 * rows and planned[1] >= always + rows + prompt
    assert planned[2] >= always + 9 * 14336 * 4096 + rows
