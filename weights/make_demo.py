"""Train the demo model: a folder of text in, a Hugging Face Mixtral and its packed 4-bit directory out.

    python weights/make_demo.py BOOKS_DIR weights/demo --minutes 60

It trains `duoserve/model.py` itself, handed dense experts; on a GPU the whole step is one CUDA graph. The
tokenizer is sentencepiece BPE in Mistral's manner (byte fallback, BOS 1, EOS 2, EOS only at the end of a
book). Hidden matrices are trained by Muon, the rest by AdamW. Books by the authors named in --hold-out are
never trained on; they measure the result.
"""

import argparse
import json
import math
import random
import re
import sys
import time
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from duoserve import Engine
from duoserve.checkpoint import convert
from duoserve.config import MixtralConfig
from duoserve.model import Mixtral, RMSNorm, route
from duoserve.history import Routing
from duoserve.trace import TraceRecorder


def swiglu(gate: torch.Tensor, up: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up [T, E * F], each expert's part times its weight, of weights [T, E]."""
    return ((F.silu(gate) * up).unflatten(1, (weights.shape[1], -1)) * weights[:, :, None]).flatten(1)


class DenseExperts(nn.Module):
    """An `ExpertSource` that holds all experts as two stacks; it also gathers the load-balancing loss."""

    def __init__(self, config: MixtralConfig):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        stack = config.num_hidden_layers, config.num_local_experts
        self.w13 = nn.Parameter(torch.empty(*stack, 2 * config.intermediate_size, config.hidden_size))
        self.w2 = nn.Parameter(torch.empty(*stack, config.intermediate_size, config.hidden_size))  # W2.T
        self.swiglu = swiglu

    def begin_step(self, lookahead):
        self.balance, self.load = 0.0, []
        # Taken apart once, since the gradient of each w13[i] is as large as that of w13.
        self.layers = list(zip(self.w13.unbind(), self.w2.unbind()))

    def begin_layer(self, layer): ...

    def note(self, logits, ids):
        share = torch.zeros_like(logits, dtype=torch.float32).scatter(1, ids, 1.0).mean(0) / ids.shape[1]
        self.balance = self.balance + logits.shape[1] * (share * logits.float().softmax(-1).mean(0)).sum()
        self.load.append(share)             # each expert's share of the tokens

    def route(self, layer, numbers, rows):
        logits = rows[0]
        self.note(logits, route(logits, self.top_k)[0])
        return Routing(numbers[:logits.shape[-1]].int().tolist(), [], [], [], None)

    def experts(self, layer, routing):
        for e, (count, w13, w2) in enumerate(zip(routing.counts, *(w.unbind() for w in self.layers[layer]))):
            if count:
                w1, w3 = w13.chunk(2)
                yield e, lambda x: (F.silu(F.linear(x, w1)) * F.linear(x, w3)) @ w2

    def end_layer(self, layer): ...

    def all(self, layer, x, weights):
        """x [T, D], weights [T, E] (0 where not chosen) -> the weighted sum of all experts' answers."""
        w13, w2 = self.layers[layer]
        w1, w3 = w13.unflatten(1, (2, -1)).unbind(1)
        gate, up = F.linear(x, w1.flatten(0, 1)), F.linear(x, w3.flatten(0, 1))
        return self.swiglu(gate, up, weights) @ w2.flatten(0, 1)


class FusedNorm(RMSNorm):
    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps) if x.is_cuda else super().forward(x)


class Trainee(Mixtral):
    """`Mixtral`, which if `dense` runs all experts on all tokens: four times the work, but in three large
    products of fixed shapes, for which the host need not wait for the routers."""

    dense = False

    def __init__(self, config: MixtralConfig, dropout: float = 0.0):
        super().__init__(config)
        for module in self.modules():
            if isinstance(module, RMSNorm):
                module.__class__ = FusedNorm
        self.drop = lambda y: F.dropout(y, dropout) if dropout and torch.is_grad_enabled() else y
        for layer in self.layers:
            layer.attention.register_forward_hook(lambda attention, args, y: self.drop(y))

    def mix(self, i, h, source):
        if not self.dense:
            return super().mix(i, h, source)
        x = self.layers[i].ffn_norm(h)
        logits = self.layers[i].router(x)
        ids, weights = route(logits, self.config.num_experts_per_tok)
        source.note(logits, ids)
        weights = torch.zeros_like(logits).scatter(1, ids, weights.to(logits.dtype))
        return h + self.drop(source.all(i, x, weights))


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """About the nearest orthogonal matrix to each of x [n, rows, cols], by Newton-Schulz: Muon's update."""
    y = x.mT if x.shape[1] > x.shape[2] else x
    y = y / torch.linalg.vector_norm(y, dim=(1, 2), keepdim=True).clamp(min=1e-7)
    y = y.to(torch.bfloat16 if x.is_cuda else x.dtype)
    for _ in range(5):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), y, beta=3.4445)
    return (y.mT if x.shape[1] > x.shape[2] else y).to(x.dtype)


class Optimizer:
    """Muon for the hidden matrices, a stack for each shape, and AdamW for the rest, on fp32 masters of the
    weights that lie in one flat tensor. Its whole state is on the device, so that a CUDA graph can hold a
    step."""

    def __init__(self, named: list, muon_lr: float, lr: float, weight_decay: float, outer_decay: float):
        self.muon_lr, self.lr, groups = muon_lr, lr, {}
        for name, p in named:
            outer = any(k in name for k in ("embed", "head"))
            matrix = p.dim() > 1 and not outer and "router" not in name
            decay = outer_decay if outer else weight_decay if matrix else weight_decay / 10
            groups.setdefault((p.shape[-2:] if matrix else None, decay), []).append(p)
        self.params = [p for group in groups.values() for p in group]
        self.master = torch.cat([p.detach().flatten().float() for p in self.params])
        self.grad, momentum, second = (torch.zeros_like(self.master) for _ in range(3))
        sizes = [sum(p.numel() for p in group) for group in groups.values()]
        self.groups = list(zip(groups, *(t.split(sizes) for t in (self.master, self.grad, momentum, second))))
        self.rate = self.master.new_zeros(())               # a factor of both peak rates
        self.count = self.master.new_zeros(())              # of steps

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        return [v.view_as(p) for v, p in zip(flat.split([p.numel() for p in self.params]), self.params)]

    @torch.no_grad()
    def step(self, grads) -> None:
        torch._foreach_copy_(self.views(self.grad), list(grads))
        self.grad.mul_((1 / (self.grad.norm() + 1e-6)).clamp(max=1))                # clipped at a norm of 1
        self.count.add_(1)
        for (shape, decay), master, grad, momentum, second in self.groups:
            if shape:
                momentum.lerp_(grad, 0.05)
                update = orthogonal(grad.lerp(momentum, 0.95).view(-1, *shape)).flatten()
                lr, scale = self.rate * self.muon_lr, 0.2 * math.sqrt(max(shape))   # updates as AdamW's
            else:
                momentum.lerp_(grad, 0.1)
                second.lerp_(grad.square(), 0.05)
                deviation = (second / (1 - torch.pow(0.95, self.count))).sqrt_().add_(1e-8)
                update = momentum / (1 - torch.pow(0.9, self.count)) / deviation
                lr, scale = self.rate * self.lr, 1.0
            master.mul_(1 - lr * decay).sub_(update.mul_(lr * scale))
        torch._foreach_copy_(self.params, self.views(self.master))


def windows(tokens: int, length: int, seed: int):
    """An endless stream of window starts: each pass cuts the text up with another offset, and is shuffled."""
    rng = np.random.default_rng(seed)
    while True:
        yield from rng.permutation(np.arange(rng.integers(length), tokens - length, length))


class Trainer:
    """Steps of training. On a GPU the fourth and later ones of a sequence length replay one CUDA graph."""

    def __init__(self, model: Trainee, source: DenseExperts, optimizer: Optimizer, text: np.ndarray,
                 batch: int):
        device = optimizer.master.device
        self.model, self.source, self.optimizer, self.batch, self.length = model, source, optimizer, batch, 0
        self.hidden = torch.zeros((), device=device)        # share of the tokens that are
        self.text = torch.from_numpy(text.astype(np.int32)).to(device)
        self.report = torch.zeros(3, device=device)         # loss, smallest and largest load of an expert
        self.cuda = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if self.cuda else None

    def step(self) -> None:
        """All of it on the device, from `starts` and the optimizer's `rate` to the weights and `report`."""
        place = torch.arange(self.length + 1, device=self.text.device)
        tokens = self.text[self.starts[:, None] + place].long()
        shown = tokens[:, :-1]              # (0 is <unk>, which no text has, as any byte is a token)
        shown = shown.masked_fill(torch.rand(shown.shape, device=shown.device) < self.hidden, 0)
        logits = self.model.head(self.model(shown, self.source))
        loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        self.optimizer.step(torch.autograd.grad(loss + 0.01 * self.source.balance, self.optimizer.params))
        self.report.copy_(torch.stack((loss.detach(), *torch.stack(self.source.load).aminmax())))
        self.source.layers, self.source.balance = [], 0.0       # lets go of this step's autograd graph

    def advance(self, length: int, rate: float, hidden: float) -> bool:
        """One step. True if it was a slow one, which prepares those that follow."""
        with torch.cuda.stream(self.stream):
            if length != self.length:
                if self.cuda:
                    torch.cuda.synchronize()
                self.length, self.age, self.run = length, 0, self.step  # frees an earlier CUDA graph
                self.next = windows(len(self.text), length, seed=length)
                self.starts = torch.zeros(max(1, self.batch // length), dtype=torch.int64,
                                          device=self.text.device)
            starts = torch.tensor([next(self.next) for _ in range(len(self.starts))], pin_memory=self.cuda)
            self.starts.copy_(starts, non_blocking=True)
            self.optimizer.rate.fill_(rate), self.hidden.fill_(hidden)
            self.run()
        self.age += 1
        if self.cuda and self.age == 3:
            self.record()
        return self.cuda and self.age <= 3

    def read(self) -> list[float]:
        """`report`, once every step so far is done."""
        with torch.cuda.stream(self.stream):
            return self.report.tolist()

    def record(self) -> None:
        """Make `run` replay `step`, recorded (not run) on the stream on which the steps before it ran."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                self.step()
            self.run = graph.replay
        except RuntimeError as error:
            torch.cuda.set_stream(torch.cuda.default_stream())
            print(f"no CUDA graph, so training goes on without: {str(error).splitlines()[0]}", flush=True)


def read_books(folder: Path) -> dict[str, str]:
    """Every .txt or .md file below the folder, without trailing blanks or repeated empty lines."""
    books = {}
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".txt", ".md")):
        text = "\n".join(line.rstrip() for line in path.read_text("utf-8", "replace").splitlines())
        books[path.stem] = re.sub(r"\n{3,}", "\n\n", text).strip()
    return books


def train_tokenizer(books: dict[str, str], vocab: int, out: Path) -> None:
    lines = [line for text in books.values() for line in text.splitlines() if line]
    random.Random(0).shuffle(lines)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines[:150_000]), model_prefix=str(out / "tokenizer"), vocab_size=vocab,
        model_type="bpe", byte_fallback=True, split_digits=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, character_coverage=0.9999, unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
        max_sentence_length=100_000, minloglevel=2)
    (out / "tokenizer.vocab").unlink()


def tokenize(books: dict[str, str], sp) -> np.ndarray:
    """BOS, book, EOS, and so on, as one uint16 array."""
    return np.concatenate([np.array([1, *sp.encode(text), 2], np.uint16) for text in books.values()])


def init_weights(module: nn.Module, layers: int) -> None:
    for name, p in module.named_parameters():
        if p.dim() >= 2:
            std = 0.02 if "embed" in name or "router" in name else p.shape[-2 if "w2" in name else -1] ** -0.5
            nn.init.normal_(p, std=std / math.sqrt(2 * layers) if ".o." in name or "w2" in name else std)
    # (residual writers start smaller: GPT-2's rule)


@torch.no_grad()
def bits_per_byte(logits_of, tokens: np.ndarray, bytes_a_token: float, length: int, batch: int = 8) -> float:
    """Cross entropy of a token stream in windows of `length`, in bits for each byte of its text.

    `logits_of(window [B, length])` -> logits [B, length, vocab].
    """
    rows = torch.from_numpy(tokens[:len(tokens) // length * length].astype(np.int64)).view(-1, length)
    nll = 0.0
    for window in rows.split(batch):
        logits = logits_of(window)[:, :-1].flatten(0, 1).float()
        nll += F.cross_entropy(logits, window[:, 1:].flatten().to(logits.device), reduction="sum").item()
    return nll / math.log(2) / (len(rows) * (length - 1) * bytes_a_token)


def hf_state(model: Mixtral, source: DenseExperts) -> dict[str, torch.Tensor]:
    """Hugging Face's names: q, k, v apart, w1 and w3 apart."""
    c, out = model.config, {"model.embed_tokens.weight": model.embed.weight,
                            "model.norm.weight": model.norm.weight, "lm_head.weight": model.head.weight}
    for i, layer in enumerate(model.layers):
        p, kv = f"model.layers.{i}.", c.num_key_value_heads * c.head_dim
        q, k, v = layer.attention.qkv.weight.split((c.num_attention_heads * c.head_dim, kv, kv))
        out |= {p + "self_attn.q_proj.weight": q, p + "self_attn.k_proj.weight": k,
                p + "self_attn.v_proj.weight": v, p + "self_attn.o_proj.weight": layer.attention.o.weight,
                p + "input_layernorm.weight": layer.attention_norm.weight,
                p + "post_attention_layernorm.weight": layer.ffn_norm.weight,
                p + "block_sparse_moe.gate.weight": layer.router.weight}
        for e, (w13, w2) in enumerate(zip(source.w13[i], source.w2[i])):
            w1, w3 = w13.chunk(2)
            name = p + f"block_sparse_moe.experts.{e}."
            out |= {name + "w1.weight": w1, name + "w3.weight": w3, name + "w2.weight": w2.T}
    return {k: v.detach() for k, v in out.items()}


@torch.no_grad()
def load_hf(model: Mixtral, source: DenseExperts, path: Path) -> None:
    """Load what `save_hf` wrote: each of `hf_state`'s tensors is a parameter or a view of one."""
    tensors = load_file(path)
    for name, view in hf_state(model, source).items():
        view.copy_(tensors[name])


def save_hf(model, source, raw_config: dict, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(raw_config, indent=2) + "\n")
    state = {k: v.to(torch.bfloat16).contiguous().cpu() for k, v in hf_state(model, source).items()}
    save_file(state, out / "model.safetensors.part")
    (out / "model.safetensors.part").rename(out / "model.safetensors")


def make_traces(engine: Engine, tokens: np.ndarray, folder: Path, sequences: int, prompt: tuple[int, int],
                new: int) -> None:
    """Let the model continue passages of the books, and record its routing."""
    c, rng = engine.config, np.random.default_rng(0)
    recorder = engine.source.recorder = TraceRecorder(c, engine.context, engine.device)
    for i in range(sequences):
        start, length = rng.integers(len(tokens) - prompt[1]), rng.integers(*prompt)
        ids = [c.bos_token_id, *(int(t) for t in tokens[start:start + length] if t > 2)]
        result = engine.generate(ids, max_new_tokens=new, seed=i)
        recorder.save(folder, engine.sequence.kv_tokens, result.prompt_tokens, engine.packed.fingerprint)
    engine.source.recorder = None


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("books", type=Path, help="a folder of .txt or .md files, or the 16-bit model's\n"
                        "directory of an earlier run, which keeps them as tokens (train.npy, test.npy)")
    parser.add_argument("out", type=Path, help="the packed directory to write")
    parser.add_argument("--hf", type=Path, help="where the 16-bit model goes (default OUT-hf)")
    parser.add_argument("--resume", action="store_true",
                        help="begin with the weights in --hf, left by an earlier run")
    parser.add_argument("--hold-out", nargs="*",
                        default=["Oscar_Wilde", "Robert_Louis_Stevenson", "Kenneth_Grahame"])
    parser.add_argument("--minutes", type=float, default=60, help="of training")
    parser.add_argument("--steps", type=int,
                        help="train this many steps instead of by the clock (0: only pack)")
    parser.add_argument("--traces", type=Path, metavar="DIR",
                        help="record the demo's routing in DIR/train and DIR/test")
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--ffn", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8192, help="tokens a step")
    parser.add_argument("--length", type=int, default=512,
                        help="tokens a sequence; twice that in the last quarter")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--muon-lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.6, help="of the matrices that Muon trains;\n"
                        "a tenth of it for routers and norms")
    parser.add_argument("--outer-decay", type=float, default=2.0, help="of the embeddings and the head")
    parser.add_argument("--dropout", type=float, default=0.0,
                        help="of what attention and (on a GPU) experts write")
    parser.add_argument("--mask", type=float, nargs=2, default=(0.0, 0.0), metavar=("FROM", "TO"),
                        help="the share of the tokens that are hidden from the model as it reads, at the\n"
                        "beginning of training and at its end")
    parser.add_argument("--eval-every", type=float, default=10, metavar="MINUTES",
                        help="save and measure this often")
    parser.add_argument("--compile", action="store_true", help="fuse the experts' activation (needs Triton)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    device, hf = torch.device(args.device), args.hf or args.out.with_name(args.out.name + "-hf")
    hf.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)

    ready = args.books / "train.npy"
    if ready.exists():
        train, test = np.load(ready), np.load(args.books / "test.npy")
        test_bytes = json.loads((args.books / "test.json").read_text())["bytes"]
        (hf / "tokenizer.model").write_bytes((args.books / "tokenizer.model").read_bytes())
    else:
        books = read_books(args.books)
        held = {k: v for k, v in books.items() if any(k.startswith(h) for h in args.hold_out)}
        rest = {k: v for k, v in books.items() if k not in held}
        if not (hf / "tokenizer.model").exists():
            train_tokenizer(rest, 4096, hf)
        sp = sentencepiece.SentencePieceProcessor(model_file=str(hf / "tokenizer.model"))
        train, test = tokenize(rest, sp), tokenize(held, sp)
        test_bytes = sum(len(t.encode()) for t in held.values())
        np.save(hf / "train.npy", train), np.save(hf / "test.npy", test)
        (hf / "test.json").write_text(json.dumps({"bytes": test_bytes, "books": sorted(held)}))
    print(f"{len(train)} tokens to train on, {len(test)} held out, {test_bytes / len(test):.2f} bytes each",
          flush=True)

    heads = args.hidden // 64
    raw = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "vocab_size": 4096,
           "hidden_size": args.hidden, "intermediate_size": args.ffn, "num_hidden_layers": args.layers,
           "num_attention_heads": heads,
           "num_key_value_heads": heads // 3 if heads % 3 == 0 else (heads + 1) // 2, "head_dim": 64,
           "hidden_act": "silu", "num_local_experts": 8, "num_experts_per_tok": 2,
           "max_position_embeddings": 2 * args.length,
           "rms_norm_eps": 1e-5, "rope_theta": 1e4, "sliding_window": None, "bos_token_id": 1,
           "eos_token_id": 2, "tie_word_embeddings": False, "torch_dtype": "bfloat16"}
    config = MixtralConfig.from_dict(raw)
    model, source = Trainee(config, args.dropout).to(device), DenseExperts(config).to(device)
    model.dense = device.type == "cuda"         # (on a CPU the work of unused experts would cost time)
    init_weights(model, args.layers), init_weights(source, args.layers)
    if args.resume:
        load_hf(model, source, hf / "model.safetensors")
    everything = [(n, p) for m in (model, source) for n, p in m.named_parameters()]
    print(f"{sum(p.numel() for _, p in everything) / 1e6:.1f} M parameters on {device}", flush=True)
    # The model runs in bf16, as it will when it is used; the optimizers see fp32 masters of its weights.
    optimizer = Optimizer(everything, args.muon_lr, args.lr, weight_decay=args.weight_decay,
                          outer_decay=args.outer_decay)
    model.to(torch.bfloat16), source.to(torch.bfloat16)
    trainer = Trainer(model, source, optimizer, train, args.batch)
    if args.compile:
        torch._dynamo.config.suppress_errors = True             # where it cannot be compiled it runs as it is
        fused = torch.compile(swiglu, dynamic=False)    # for training only: measuring has other shapes
        source.swiglu = lambda *x: (fused if torch.is_grad_enabled() else swiglu)(*x)

    def dense_logits(window):
        with torch.no_grad():
            return model.head(model(window.to(device), source))

    step, slow, done = 0, 0, float(args.steps == 0)
    began = saved = time.time()
    while done < 1:
        done = (step + 1) / args.steps if args.steps else (time.time() - began) / (args.minutes * 60)
        done = min(done, 1)
        rate = min(1, (step + 1) / 50) * (0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2)
        before = time.time()
        hidden = args.mask[0] + done * (args.mask[1] - args.mask[0])
        if trainer.advance(args.length * (2 if done > 0.75 else 1), rate, hidden):
            slow, began = slow + 1, began + time.time() - before
        step += 1
        if step % 20 == 0 or done >= 1:
            loss, least, most = trainer.read()                  # (the host is never further ahead than this)
            speed = (step - slow) * args.batch / (time.time() - began)
            print(f"step {step}  {100 * done:.1f} %  loss {loss:.3f}  {speed:.0f} tokens/s  "
                  f"expert load {100 * least:.1f} .. {100 * most:.1f} %", flush=True)
            if time.time() - saved > 60 * args.eval_every or done >= 1:
                before = time.time()
                save_hf(model, source, raw, hf)
                bpb = bits_per_byte(dense_logits, test[:len(test) // 8], test_bytes / len(test),
                                    2 * args.length)
                print(f"held out: {bpb:.4f} bits per byte after {step * args.batch / 1e6:.1f} M tokens",
                      flush=True)
                saved, began = time.time(), began + time.time() - before

    convert(hf, args.out)
    engine, part = Engine.from_pretrained(args.out, device=args.device, policy="cache"), test[:len(test) // 2]
    before = bits_per_byte(dense_logits, part, test_bytes / len(test), 2 * args.length)
    after = bits_per_byte(lambda window: torch.stack([engine.logits(row.tolist()) for row in window]),
                          part, test_bytes / len(test), 2 * args.length)
    packed_bytes = sum(path.stat().st_size for path in args.out.iterdir())
    print(f"{args.out}: {packed_bytes / 1e6:.1f} MB; held out {before:.4f} bits per byte, packed {after:.4f}")
    if args.traces:
        engine = Engine.from_pretrained(args.out, device=args.device, policy="cache",
                                        cache_experts=8 * args.layers)
        make_traces(engine, train, args.traces / "train", 120, (16, 96), 160)
        make_traces(engine, test, args.traces / "test", 24, (256, 400), 64)


if __name__ == "__main__":
    main()
