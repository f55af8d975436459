"""What tests share: small random Mixtrals in Hugging Face's layout, the same on every machine, and ways to
disturb an engine."""

import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import traceback
from collections import deque
from dataclasses import replace
from functools import cache, partial
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from duoserve import Engine
from duoserve.history import Routing
from duoserve.model import Expert, Mixtral
from duoserve.packed import PackedModel
from duoserve.quant import PackedLinear
from duoserve.simulated import SimulatedLane, VirtualClock

needs_compiler = pytest.mark.skipif(not shutil.which("g++") and not shutil.which("c++"),
                                    reason="torch.compile needs a C++ compiler")
on_a_gpu = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

TEXT = ("the quick brown fox jumps over the lazy dog and then the other dogs run home to the old house "
        "on the hill")
DEFAULTS = dict(vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
                num_attention_heads=4, num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2,
                max_position_embeddings=256, rms_norm_eps=1e-5, rope_theta=10000.0, bos_token_id=1,
                eos_token_id=2, tie_word_embeddings=False)

# Name -> arguments of `write_hf`: the smallest model that shows one feature. `make_reference.py` recorded
# what transformers answers. With these seeds no greedy step is close, and no EOS comes.
SHAPES: dict[str, dict] = {
    "mha": dict(seed=101, num_key_value_heads=4, intermediate_size=128),
    "gqa4": dict(seed=201, num_attention_heads=8, hidden_size=96, head_dim=16, intermediate_size=160),
    "gqa8": dict(seed=301, num_attention_heads=8, num_key_value_heads=1, head_dim=24),
    "wide": dict(seed=402, hidden_size=128, intermediate_size=256),
    "six_experts": dict(seed=501, num_local_experts=6, num_experts_per_tok=3, dtype=torch.float16),
    "nine_layers": dict(seed=606, num_hidden_layers=9, rope_theta=1e6, eos_token_id=[2, 7]),
    "rope_parameters": dict(seed=701, rope_parameters={"rope_theta": 500.0, "rope_type": "default"}),
    "sliding_window": dict(seed=801, sliding_window=8),
    "tied": dict(seed=905, tie_word_embeddings=True),
}


@cache
def tokenizer_model(*control: str) -> bytes:
    """A sentencepiece BPE of 320 pieces: unk, bos, eos, `control`, the 256 bytes, and pieces of `TEXT`."""
    out = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT]), model_writer=out, model_type="bpe", vocab_size=320,
        byte_fallback=True, normalization_rule_name="identity", unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
        minloglevel=2, control_symbols=list(control))
    return out.getvalue()


def grid_matrix(rng: np.random.RandomState, rows: int, columns: int) -> np.ndarray:
    """[rows, columns] of (q - 8) * 2**-k with q = 0 and 15 in every 32 columns: packing loses nothing."""
    q = rng.randint(0, 16, (rows, columns // 32, 32))
    low, high = np.split(rng.rand(rows, columns // 32, 32).argsort(-1)[..., :2], 2, -1)
    np.put_along_axis(q, low, 0, -1)
    np.put_along_axis(q, high, 15, -1)
    k = round(np.log2(4.9 * columns ** 0.5))        # 4.9 is q's standard deviation, with the forced ends
    return (q.reshape(rows, columns) - 8) * 2.0 ** -k


def write_hf(path: Path, *, seed: int = 0, grid: bool = False, dtype: torch.dtype = torch.bfloat16,
             shards: int = 1, **config_overrides) -> dict[str, Tensor]:
    """Write a random Hugging Face Mixtral directory; `config_overrides` are keys of its config.json.

    Weights come from numpy's `RandomState`, whose stream never changes (NEP 19). With `grid`, every matrix
    that gets packed is exactly representable in 4 bits, at any group size. Returns the state dict by Hugging
    Face's names.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    config = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_act": "silu",
              "torch_dtype": str(dtype).removeprefix("torch.")} | DEFAULTS | config_overrides
    if "rope_parameters" in config_overrides and "rope_theta" not in config_overrides:
        del config["rope_theta"]                    # one spelling or the other
    (path / "config.json").write_text(json.dumps(config, indent=2))
    (path / "tokenizer.model").write_bytes(tokenizer_model())

    rng, state = np.random.RandomState(seed), {}
    D, F = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or D // heads

    def put(name: str, array: np.ndarray) -> None:
        state[name] = torch.from_numpy(array).to(dtype)

    def matrix(name: str, rows: int, columns: int) -> None:
        put(name, grid_matrix(rng, rows, columns) if grid else rng.randn(rows, columns) / columns ** 0.5)

    def norm(name: str) -> None:
        put(name, 1 + 0.1 * rng.randn(D))

    put("model.embed_tokens.weight", 0.25 * rng.randn(config["vocab_size"], D))
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        norm(f"{layer}.input_layernorm.weight")
        for name, n in (("q", heads), ("k", config["num_key_value_heads"]),
                        ("v", config["num_key_value_heads"])):
            matrix(f"{layer}.self_attn.{name}_proj.weight", n * head_dim, D)
        matrix(f"{layer}.self_attn.o_proj.weight", D, heads * head_dim)
        norm(f"{layer}.post_attention_layernorm.weight")
        put(f"{layer}.block_sparse_moe.gate.weight", 2 * rng.randn(config["num_local_experts"], D) / D ** 0.5)
        for e in range(config["num_local_experts"]):
            expert = f"{layer}.block_sparse_moe.experts.{e}"
            matrix(f"{expert}.w1.weight", F, D)
            matrix(f"{expert}.w2.weight", D, F)
            matrix(f"{expert}.w3.weight", F, D)
    norm("model.norm.weight")
    if not config["tie_word_embeddings"]:
        put("lm_head.weight", 3 * rng.randn(config["vocab_size"], D) / D ** 0.5)

    names = list(state)
    if shards == 1:
        save_file(state, path / "model.safetensors", {"format": "pt"})
        return state
    where = {}                              # contiguous parts, so that layers and experts straddle files
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = names[i * len(names) // shards:(i + 1) * len(names) // shards]
        save_file({name: state[name] for name in part}, path / file, {"format": "pt"})
        where |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in state.values())
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": where}))
    return state


def packed(path: Path, *, group_size: int = 128, **arguments) -> Path:
    """`write_hf` into path/hf, converted into path/packed, which is returned."""
    from duoserve.checkpoint import convert
    write_hf(path / "hf", **arguments)
    convert(path / "hf", path / "packed", group_size=group_size)
    return path / "packed"


ROOT = Path(__file__).resolve().parents[1]
# Long enough for prefill to expect every expert to be used.
LONG = [1, *(7 * i % 300 + 10 for i in range(69))]
SHORT = [1, 42, 77, 200, 33]
SAMPLED = dict(max_new_tokens=6, temperature=0.9, top_p=0.9, seed=3)


def a_line(error: str, *names: str) -> None:
    """One line that says what is wrong and names it."""
    assert error.startswith("error: ") and error.count("\n") == 1 and "Traceback" not in error, error
    for name in names:
        assert str(name) in error, error


def program(*arguments, **options) -> subprocess.Popen:
    """`python` with these arguments in the project's directory; streams are pipes unless given."""
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE) | options
    return subprocess.Popen([sys.executable, *map(str, arguments)], cwd=ROOT,
                            env=os.environ | {"OMP_NUM_THREADS": "1"}, **streams)


def in_child(job):
    """What `job()` returns, in a child process that is forked here: nothing is imported again, and limits set
    there end there. What it raises fails the test."""
    here, there = multiprocessing.Pipe(duplex=False)
    pid = os.fork()
    if pid == 0:
        try:
            there.send((job(), None))
        except BaseException:
            there.send((None, traceback.format_exc()))
        finally:
            os._exit(0)
    there.close()
    try:
        answer, problem = here.recv()
    finally:
        os.waitpid(pid, 0)
    assert problem is None, problem
    return answer


def contents(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


class AllExperts:
    """An `ExpertSource` that has every expert and yields them last first: the order must not matter."""

    def __init__(self, model: PackedModel, linear):
        self.table, self.logits, self.lookahead, self.top_k = {}, [], [], model.config.num_experts_per_tok
        for i in range(model.config.num_hidden_layers):
            for e in range(model.config.num_local_experts):
                block = np.empty(model.layout.nbytes, np.uint8)
                model.read_expert(i, e, block)
                self.table[i, e] = model.layout.bind(Expert(model.config, linear), torch.from_numpy(block))

    def begin_step(self, lookahead):
        self.logits, self.lookahead = [], [lookahead]       # of the last pass: a tensor [T, E] a layer

    def begin_layer(self, layer):
        pass

    def route(self, layer, numbers, rows):
        self.logits.append(rows[0])
        self.lookahead.append(rows[1])
        return Routing.unpack(numbers.tolist(), rows[0].shape[1], self.top_k)

    def experts(self, layer, routing):
        for e in reversed(range(len(routing.counts))):
            if routing.counts[e]:
                yield e, self.table[layer, e]

    def end_layer(self, layer):
        pass


def build(directory: Path, **changes) -> tuple[Mixtral, AllExperts]:
    """The whole packed model in float32; `changes` to its config show that a comparison would notice them."""
    stored = PackedModel(directory)
    linear = partial(PackedLinear, largest_group=stored.largest_group)
    model = Mixtral(replace(stored.config, **changes), linear)
    state = stored.resident()
    if stored.config.tie_word_embeddings:
        state["head.weight"] = state["embed.weight"]
    model.load_state_dict(state)        # copies into float32 parameters
    return model.eval(), AllExperts(stored, linear)


@torch.inference_mode()
def logits_of(model: Mixtral, source: AllExperts, ids: list[int], kv=None, start: int = 0) -> torch.Tensor:
    """Logits [tokens, vocab] of one pass over `ids`."""
    return model.head(model(torch.tensor([ids]), source, kv, start))[0]


def load(directory, **options) -> Engine:
    return Engine.from_pretrained(directory, device="cpu", **{"predictor": "none"} | options)


def put_lane(engine, lane):
    engine.cache.lane = engine.source.lane = lane
    lane.fed_by(engine.cache.pump)
    return lane


class LateLane(SimulatedLane):
    """Bytes arrive at their time and not before; once a transfer begins, its slot is NaN where they are
    missing.

    Time is virtual. It passes, by a random amount, at each read, and where the schedule waits for a transfer.
    """

    def __init__(self, engine, seed=0):
        size, self.memory = engine.cache.expert_bytes, engine.slots_memory
        super().__init__(VirtualClock(), size, -(-size // 6))       # an expert: six chunks, in a second
        self.move, self.pending, self.random = engine.cache.lane.copy, deque(), random.Random(seed)

    def send(self, transfer, nbytes):
        if transfer.sent == 0:
            self.memory[transfer.slot].fill_(0xFF)
        start = transfer.sent
        super().send(transfer, nbytes)
        self.pending.append((self.ends[-1], transfer, start, transfer.sent))

    def land(self):
        while self.pending and self.pending[0][0] <= self.now():
            self.move(*self.pending.popleft()[1:])

    def wait(self, transfer):
        super().wait(transfer)
        self.land()

    def arrived(self, transfer):
        self.land()
        return super().arrived(transfer)

    def read(self, fetched, pause=None):
        self.clock.advance(self.random.choice((0, 0.1, 0.5, 3)))
        return super().read(fetched)


def by_table(engine):
    """Lets a step on the CPU take the way of one on a GPU: by the table, ahead of what the host has read."""
    step, c = engine.step, engine.config
    step.capturing, step.capture = True, lambda piece: piece
    step.experts, step.divided = ([partial(piece, rank) for rank in range(c.num_experts_per_tok)]
                                  for piece in (step._expert, step._divided))


def hostile(engine, seed=0):
    """While an expert is computed, let time pass and replace the plan with random guesses."""
    ready, rng, cache = engine.source.ready, random.Random(seed), engine.cache
    keys = [(layer, e) for layer in range(engine.config.num_hidden_layers)
            for e in range(engine.config.num_local_experts)]

    def disturbed(layer, routing):
        for item in ready(layer, routing):
            cache.plan(rng.sample(keys, 5))
            for _ in range(rng.randrange(4)):
                cache.lane.clock.advance(0.5)
                cache.pump()
            yield item
    engine.source.ready = disturbed


def answers(engine):
    """What must never depend on the schedule: logits of a long and a short prompt, two sampled answers."""
    return (engine.logits(LONG), engine.generate(SHORT, **SAMPLED).token_ids, engine.logits(SHORT),
            engine.generate(LONG, **SAMPLED).token_ids)


def same(got, want) -> bool:
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(got, want))


def at_rest(cache) -> bool:
    return not cache.queue and not cache.needed and not any(slot.pinned for slot in cache.slots) and all(
        slot.key is None or slot.whole for slot in cache.slots)


class InterruptAt:
    """Ctrl-C in the middle of the n-th expert's computation."""

    def __init__(self, engine, n):
        self.n, self.hook = n, engine.source.slots.expert.register_forward_pre_hook(self)

    def __call__(self, *_):
        self.n -= 1
        if self.n == 0:
            self.hook.remove()
            raise KeyboardInterrupt
