"""Train the demo model: a folder of text in, a Hugging Face Mixtral and its packed 4-bit directory out.

    python weights/make_demo.py BOOKS_DIR weights/demo --minutes 60

It trains `duoserve/model.py` itself, handed dense experts. The tokenizer is sentencepiece BPE in Mistral's
manner (byte fallback, BOS 1, EOS 2, EOS only at the end of a book). Hidden matrices are trained by Muon, the
rest by AdamW. Books by the authors named in --hold-out are never trained on; they measure the result.
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
from duoserve.model import Expert, Mixtral, Routing
from duoserve.trace import TraceRecorder


class DenseExperts(nn.Module):
    """An `ExpertSource` whose experts are all here; it also gathers the load-balancing loss."""

    def __init__(self, config: MixtralConfig):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList(Expert(config) for _ in range(config.num_local_experts))
                                    for _ in range(config.num_hidden_layers))
        self.reset()

    def reset(self):
        self.balance, self.load = 0.0, []

    def begin_step(self, lookahead): ...

    def begin_layer(self, layer): ...

    def read(self, layer, logits, ids, weights, lookahead):
        share = F.one_hot(ids, logits.shape[-1]).float().mean((0, 1))               # tokens an expert gets
        self.balance = self.balance + logits.shape[-1] * (share * logits.float().softmax(-1).mean(0)).sum()
        self.load.append(share.detach())
        return Routing(ids.flatten().bincount(minlength=logits.shape[-1]).tolist(), [], [], [], None)

    def experts(self, layer, routing):
        for e, count in enumerate(routing.counts):
            if count:
                yield e, self.layers[layer][e]

    def end_layer(self, layer): ...


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
        if p.dim() == 2:
            std = 0.02 if "embed" in name or "router" in name else p.shape[1] ** -0.5
            nn.init.normal_(p, std=std / math.sqrt(2 * layers) if ".o." in name or "w2" in name else std)
    # (residual writers start smaller: GPT-2's rule)


@torch.no_grad()
def bits_per_byte(logits_of, tokens: np.ndarray, bytes_a_token: float, length: int, batch: int = 8) -> float:
    """Cross entropy of a token stream in windows of `length`, in bits for each byte of its text.

    `logits_of(window [B, length])` -> logits [B, length, vocab].
    """
    rows = torch.from_numpy(tokens[:len(tokens) // length * length].astype(np.int64)).view(-1, length)
    nll = sum(F.cross_entropy(logits_of(window)[:, :-1].flatten(0, 1).float().cpu(), window[:, 1:].flatten(),
                              reduction="sum").item() for window in rows.split(batch))
    return nll / math.log(2) / (len(rows) * (length - 1) * bytes_a_token)


def hf_state(model: Mixtral, source: DenseExperts) -> dict[str, torch.Tensor]:
    """Hugging Face's names: q, k, v apart, w1 and w3 apart."""
    c, out = model.config, {"model.embed_tokens.weight": model.embed.weight, "model.norm.weight": model.norm.weight,
                            "lm_head.weight": model.head.weight}
    for i, layer in enumerate(model.layers):
        p, kv = f"model.layers.{i}.", c.num_key_value_heads * c.head_dim
        q, k, v = layer.attention.qkv.weight.split((c.num_attention_heads * c.head_dim, kv, kv))
        out |= {p + "self_attn.q_proj.weight": q, p + "self_attn.k_proj.weight": k, p + "self_attn.v_proj.weight": v,
                p + "self_attn.o_proj.weight": layer.attention.o.weight,
                p + "input_layernorm.weight": layer.attention_norm.weight,
                p + "post_attention_layernorm.weight": layer.ffn_norm.weight,
                p + "block_sparse_moe.gate.weight": layer.router.weight}
        for e, expert in enumerate(source.layers[i]):
            w1, w3 = expert.w13.weight.chunk(2)
            name = p + f"block_sparse_moe.experts.{e}."
            out |= {name + "w1.weight": w1, name + "w3.weight": w3, name + "w2.weight": expert.w2.weight}
    return {k: v.detach() for k, v in out.items()}


@torch.no_grad()
def load_hf(model: Mixtral, source: DenseExperts, path: Path) -> None:
    """Put back what `save_hf` wrote: each of `hf_state`'s tensors is a view of a parameter, or a parameter."""
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
    """Let the model go on from places in the books, and record its routing: for train_predictor.py and the bench."""
    c, rng = engine.config, np.random.default_rng(0)
    recorder = TraceRecorder(engine.context, c.num_hidden_layers, c.num_local_experts, engine.device)
    engine.source.recorder = recorder
    for i in range(sequences):
        start, length = rng.integers(len(tokens) - prompt[1]), rng.integers(*prompt)
        ids = [c.bos_token_id, *(int(t) for t in tokens[start:start + length] if t > 2)]
        result = engine.generate(ids, max_new_tokens=new, seed=i)
        recorder.save(folder, engine.passed, result.prompt_tokens, engine.packed.fingerprint)
    engine.source.recorder = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("books", type=Path, help="a folder of .txt or .md files, or the 16-bit model's\n"
                        "directory of an earlier run, which keeps them as tokens (train.npy, test.npy)")
    parser.add_argument("out", type=Path, help="the packed directory to write")
    parser.add_argument("--hf", type=Path, help="where the 16-bit model goes (default OUT-hf)")
    parser.add_argument("--resume", action="store_true", help="begin with the weights in --hf, left by an earlier run")
    parser.add_argument("--hold-out", nargs="*", default=["Oscar_Wilde", "Robert_Louis_Stevenson", "Kenneth_Grahame"])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--steps", type=int, help="train this many steps instead of by the clock (0: only pack)")
    parser.add_argument("--traces", type=Path, metavar="DIR", help="record the demo's routing in DIR/train and DIR/test")
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--ffn", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8192, help="tokens a step")
    parser.add_argument("--length", type=int, default=512, help="tokens a sequence; twice that in the last quarter")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--muon-lr", type=float, default=3e-3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
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
    print(f"{len(train)} tokens to train on, {len(test)} held out, {test_bytes / len(test):.2f} bytes each", flush=True)

    heads = args.hidden // 64
    raw = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "vocab_size": 4096,
           "hidden_size": args.hidden, "intermediate_size": args.ffn, "num_hidden_layers": args.layers,
           "num_attention_heads": heads, "num_key_value_heads": heads // 3 if heads % 3 == 0 else heads // 2,
           "head_dim": 64, "hidden_act": "silu",
           "num_local_experts": 8, "num_experts_per_tok": 2,
           "max_position_embeddings": 2 * args.length,
           "rms_norm_eps": 1e-5, "rope_theta": 1e4, "sliding_window": None, "bos_token_id": 1, "eos_token_id": 2,
           "tie_word_embeddings": False, "torch_dtype": "bfloat16"}
    config = MixtralConfig.from_dict(raw)
    model, source = Mixtral(config).to(device), DenseExperts(config).to(device)
    init_weights(model, args.layers), init_weights(source, args.layers)
    if args.resume:
        load_hf(model, source, hf / "model.safetensors")
    everything = [(n, p) for m in (model, source) for n, p in m.named_parameters()]
    print(f"{sum(p.numel() for _, p in everything) / 1e6:.1f} M parameters on {device}", flush=True)
    # The model runs in bf16, as it will when it is used; the optimizers see fp32 masters of its weights.
    masters = [p.detach().clone() for _, p in everything]
    model.to(torch.bfloat16), source.to(torch.bfloat16)
    matrix = [p.dim() == 2 and not any(k in n for k in ("embed", "head", "router")) for n, p in everything]
    optimizers = [torch.optim.Muon([m for m, is_matrix in zip(masters, matrix) if is_matrix], lr=args.muon_lr,
                                   weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
                  torch.optim.AdamW([m for m, is_matrix in zip(masters, matrix) if not is_matrix], lr=args.lr,
                                    betas=(0.9, 0.95), weight_decay=0.01)]
    peak = [o.param_groups[0]["lr"] for o in optimizers]

    def dense_logits(window):
        with torch.no_grad():
            source.reset()
            return model.head(model(window.to(device), source))

    rng, began, saved, step, done = np.random.default_rng(0), time.time(), time.time(), 0, float(args.steps == 0)
    while done < 1:
        done = (step + 1) / args.steps if args.steps else (time.time() - began) / (args.minutes * 60)
        done = min(done, 1)
        rate = min(1, (step + 1) / 50) * (0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2)
        for optimizer, lr in zip(optimizers, peak):
            optimizer.param_groups[0]["lr"] = lr * rate
        length = args.length * (2 if done > 0.75 else 1)
        starts = rng.integers(0, len(train) - length - 1, args.batch // length)
        batch = torch.from_numpy(np.stack([train[s:s + length + 1] for s in starts]).astype(np.int64)).to(device)
        source.reset()
        logits = model.head(model(batch[:, :-1], source))
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        (loss + 0.01 * source.balance).backward()
        for (_, p), master in zip(everything, masters):
            master.grad = torch.zeros_like(master) if p.grad is None else p.grad.float()
            p.grad = None
        nn.utils.clip_grad_norm_(masters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            for (_, p), master in zip(everything, masters):
                p.copy_(master)
        step += 1
        if step % 20 == 0 or done >= 1:
            load = torch.stack(source.load)
            speed = step * args.batch / (time.time() - began)
            print(f"step {step}  {100 * done:.1f} %  loss {loss.item():.3f}  {speed:.0f} tokens/s  "
                  f"expert load {100 * load.min():.1f} .. {100 * load.max():.1f} %", flush=True)
        if time.time() - saved > 600 or done >= 1:
            saved = time.time()
            save_hf(model, source, raw, hf)
            bpb = bits_per_byte(dense_logits, test[:len(test) // 8], test_bytes / len(test), 2 * args.length)
            print(f"held out: {bpb:.4f} bits per byte after {step * args.batch / 1e6:.1f} M tokens", flush=True)

    convert(hf, args.out)
    engine, part = Engine.from_pretrained(args.out, device=args.device, policy="cache"), test[:len(test) // 2]
    before = bits_per_byte(dense_logits, part, test_bytes / len(test), 2 * args.length)
    after = bits_per_byte(lambda window: torch.stack([engine.logits(row.tolist()) for row in window]),
                          part, test_bytes / len(test), 2 * args.length)
    packed_bytes = sum(path.stat().st_size for path in args.out.iterdir())
    print(f"{args.out}: {packed_bytes / 1e6:.1f} MB; held out {before:.4f} bits per byte, packed {after:.4f}")
    if args.traces:
        engine = Engine.from_pretrained(args.out, device=args.device, policy="cache", cache_experts=8 * args.layers)
        make_traces(engine, train, args.traces / "train", 120, (16, 96), 160)
        make_traces(engine, test, args.traces / "test", 24, (256, 400), 64)


if __name__ == "__main__":
    main()
