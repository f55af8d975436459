"""Mixtral, whole: RMSNorm, RoPE, grouped-query attention with a KV cache, the router, the experts.

The one thing unusual here is that the model does not own its experts. Each MoE layer is handed an
`ExpertSource`, which yields experts one by one as they become available, in any order; the layer runs each on
the tokens routed to it and sums the outputs in an order of its own, so the result cannot depend on when an
expert came. Training hands in dense experts; the engine hands in slots of a cache that a lane is filling.

Shapes: B sequences, T tokens, D hidden, H query heads, G key/value heads, A head_dim, E experts, K experts a
token, F ffn, C context, N layers. Source: Mixtral of Experts, arXiv 2401.04088; tensor layout as in Hugging
Face's.
"""

from contextlib import closing
from itertools import accumulate
from typing import Iterator, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import MixtralConfig
from .history import Routing
from .quant import PackedLinear, exact_swiglu, silu_table

# Row blocks are constants: a product's bits depend on how many rows it has, so the split of a prompt into
# blocks may follow from the prompt's length alone, never from memory, cache size or policy.
ATTENTION_ROWS = 512
EXPERT_ROWS = 512
PADDING = 64                                # a decode step reads its keys in multiples of this


def padded(positions: int) -> int:
    return -(-positions // PADDING) * PADDING


def key_sizes(context: int) -> list[int]:
    """For how many keys a decode step is compiled and captured: few, and a step takes the least that holds
    its position. (The last is the context itself.)"""
    return [size for size in (2**10, 2**12, 2**14, 2**16) if size < context] + [context]


class ExpertSource(Protocol):
    """What the model asks of whoever holds the experts."""

    def begin_step(self, lookahead: Tensor) -> None:
        """Once a pass: what layer 0's router says to the embeddings, [T, E]."""

    def begin_layer(self, layer: int) -> None: ...

    def route(self, layer: int, numbers: Tensor, rows: tuple[Tensor, Tensor | None]) -> Routing:
        """numbers: those of `pack_routing`; rows: the router's logits and the next layer's lookahead, [T, E]
        each. -> the pass's routing on the host."""

    def experts(self, layer: int, routing: Routing) -> Iterator[tuple[int, nn.Module]]:
        """Every expert with a token, once, in any order; valid until the iterator is resumed or closed."""

    def end_layer(self, layer: int) -> None: ...


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * h.to(x.dtype)


def rope_table(config: MixtralConfig, positions: Tensor) -> Tensor:
    """positions [T] -> cosines and sines [2, T, A], in fp32 (RoFormer, arXiv 2104.09864)."""
    even = torch.arange(0, config.head_dim, 2, device=positions.device)
    frequency = 1 / config.rope_theta ** (even / config.head_dim)
    angle = torch.outer(positions.float(), frequency).repeat(1, 2)      # half-split: pairs are (i, i + A/2)
    return torch.stack((angle.cos(), angle.sin()))


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turn each pair (i, i + A/2) of x [B, heads, T, A] by its position's angle; rope [2, T, A]."""
    a, b = x.chunk(2, -1)
    cos, sin = rope.to(x.dtype)
    return x * cos + torch.cat((-b, a), -1) * sin


class Attention(nn.Module):
    """Causal grouped-query attention; with `sliding_window` W a token sees itself and the W - 1 before it."""

    def __init__(self, config: MixtralConfig, linear=nn.Linear):
        super().__init__()
        self.config = c = config
        heads = c.num_attention_heads + 2 * c.num_key_value_heads
        self.qkv = linear(c.hidden_size, heads * c.head_dim, bias=False)
        self.o = linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)

    def project(self, x: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, D] -> turned queries [B, H, T, A] and keys, and values [B, G, T, A]."""
        c, (B, T, _) = self.config, x.shape
        H, G = c.num_attention_heads, c.num_key_value_heads
        q, k, v = self.qkv(x).view(B, T, H + 2 * G, c.head_dim).transpose(1, 2).split((H, G, G), 1)
        return rotate(q, rope), rotate(k, rope), v

    def seen(self, query: Tensor, keys: int) -> Tensor:
        """Which of the first `keys` positions a query at these positions [T] sees: [T, keys]."""
        key = torch.arange(keys, device=query.device)
        seen, window = key <= query[:, None], self.config.sliding_window
        return seen if window is None else seen & (key > query[:, None] - window)

    def forward(self, x: Tensor, rope: Tensor, kv: Tensor | None = None, start: int = 0) -> Tensor:
        """x [B, T, D] at positions start.. -> [B, T, D]; kv [2, G, C, A] is this layer's cache, written in
        place."""
        B, T, _ = x.shape
        q, k, v = self.project(x, rope)
        if kv is not None:
            kv[0, :, start:start + T], kv[1, :, start:start + T] = k[0], v[0]
            k, v = kv[:, None, :, :start + T]
        G, A = k.shape[1], k.shape[3]
        if start == 0 and self.config.sliding_window is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != G)
        else:                               # heads that share keys become rows: no backend copies keys
            mask = self.seen(torch.arange(start, start + T, device=x.device), k.shape[2])
            mask = mask.repeat(q.shape[1] // G, 1)
            y = F.scaled_dot_product_attention(q.reshape(B, G, -1, A), k, v, attn_mask=mask).reshape_as(q)
        return self.o(y.transpose(1, 2).reshape(B, T, -1))

    def step(self, x: Tensor, rope: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
        """One token, x [1, D] at `position` [1], a tensor: no shape tells how far the sequence is. k, v [G,
        C, A]."""
        q, new_k, new_v = self.project(x[None], rope)
        k.index_copy_(1, position, new_k[0]), v.index_copy_(1, position, new_v[0])
        score = (q.view(len(k), -1, k.shape[2]) @ k.mT).float() * k.shape[2] ** -0.5         # [G, H / G, C]
        share = score.masked_fill(~self.seen(position, k.shape[1]), -torch.inf).softmax(-1)
        return self.o((share.to(v.dtype) @ v).view(1, -1))


class Expert(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x), with w1 and w3 as one matrix of 2F rows."""

    def __init__(self, config: MixtralConfig, linear=nn.Linear):
        super().__init__()
        self.w13 = linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.w2 = linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, given: Tensor | None = None) -> Tensor:
        """x [T, D] -> [T, D]. `given [n]`: of w13's product with one row, where its weights are not there."""
        exact = isinstance(self.w13, PackedLinear) and len(x) == 1 and x.dtype != torch.float32
        y = self.w13.exact(x) if exact else self.w13(x)
        if given is not None:
            y[0, :len(given)] = given
        if exact:
            return self.w2.exact(exact_swiglu(y, silu_table(x.dtype, x.device), x.dtype)).to(x.dtype)
        gate, up = y.chunk(2, -1)
        return self.w2(F.silu(gate).mul_(up))


def combine_experts(h: Tensor, weights: Tensor, expert_out: Tensor) -> Tensor:
    """h [T, D], weights [T, K], what the expert of each rank gave [T, K, D] -> [T, D], summed in rank order,
    whatever order they came in."""
    for rank, out in enumerate(expert_out.unbind(1)):
        h = h + weights[:, rank, None].to(h.dtype) * out
    return h


def route(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """logits [T, E] -> ids [T, K] in rank order and their weights [T, K] in fp32, which sum to one."""
    ranked = logits.float().softmax(-1).sort(dim=-1, descending=True, stable=True)
    weights, ids = (part[:, :top_k] for part in ranked)
    return ids, weights / weights.sum(-1, keepdim=True)


def pack_routing(logits: Tensor, ids: Tensor, weights: Tensor, lookahead: Tensor | None) -> Tensor:
    """logits, lookahead [T, E], ids, weights [T, K] -> one row of fp32 numbers, which the host reads at once
    and `Routing.unpack` takes apart."""
    counts = (ids.flatten()[:, None] == torch.arange(logits.shape[1], device=ids.device)).sum(0)
    last = [part[-1] for part in (ids, weights, logits, lookahead) if part is not None]
    return torch.cat([part.float() for part in (counts, *last)])


class Router(nn.Linear):
    """A row by itself is multiplied where it is made: by a compiler, in a third of the time."""

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() > x.shape[-1]:
            return super().forward(x)
        return (x.float() * self.weight.float()).sum(-1).view(*x.shape[:-1], -1).to(x.dtype)


class Layer(nn.Module):
    def __init__(self, config: MixtralConfig, linear=nn.Linear):
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, linear)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.router = Router(config.hidden_size, config.num_local_experts, bias=False)

    def attend(self, h: Tensor, rope: Tensor, kv: Tensor | None, start: int) -> Tensor:
        """The residual stream h [B, T, D] with this layer's attention added, in row blocks where there is a
        cache."""
        rows = ATTENTION_ROWS if kv is not None else h.shape[1]
        return torch.cat([
            block + self.attention(self.attention_norm(block), turn, kv, start + i * rows)
            for i, (block, turn) in enumerate(zip(h.split(rows, 1), rope.split(rows, 1)))], 1)

    def step(self, h: Tensor, rope: Tensor, k: Tensor, v: Tensor, position: Tensor, top_k: int,
             following: "Layer"):
        """One token up to the router's choice: h [1, D] -> h, what the experts read [1, D], their weights
        [1, K], what the host must know, and their ids [1, K]."""
        h = h + self.attention.step(self.attention_norm(h), rope, k, v, position)
        x = self.ffn_norm(h)
        logits = self.router(x)
        ids, weights = route(logits, top_k)
        return h, x, weights, pack_routing(logits, ids, weights, following.gate(h)), ids

    def gate(self, h: Tensor) -> Tensor:
        """Router logits [.., E] of a residual stream h [.., D]: its own, or a look ahead from the one
        before."""
        return self.router(self.ffn_norm(h))


class Mixtral(nn.Module):
    """`linear` makes attention's and the experts' matrices: `nn.Linear` to train, `quant.PackedLinear` to
    run."""

    def __init__(self, config: MixtralConfig, linear=nn.Linear):
        super().__init__()
        self.config = config
        unset = torch.empty(config.vocab_size, config.hidden_size)  # (else drawn at random, needlessly)
        self.embed = nn.Embedding(*unset.shape, _weight=unset)
        self.layers = nn.ModuleList(Layer(config, linear) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor, source: ExpertSource, kv: Tensor | None = None,
                start: int = 0) -> Tensor:
        """tokens [B, T] at positions start.. -> normed hidden states [B, T, D]; `head` turns those into
        logits.

        Layer by layer over all the tokens, so every expert is asked for once a pass, however long the pass
        is. kv [N, 2, G, C, A] holds the positions before `start` and takes the new ones (then B is 1).
        """
        h = self.embed(tokens)
        source.begin_step(self.layers[0].gate(h.flatten(0, 1)))
        rope = rope_table(self.config, torch.arange(start, start + tokens.shape[1], device=tokens.device))
        for i, layer in enumerate(self.layers):
            source.begin_layer(i)
            h = layer.attend(h, rope, None if kv is None else kv[i], start)
            h = self.mix(i, h.flatten(0, 1), source).view_as(h)
            source.end_layer(i)
        return self.norm(h)

    def mix(self, i: int, h: Tensor, source: ExpertSource) -> Tensor:
        """h [T, D] with layer i's mixture of experts added."""
        layer, (T, D), K = self.layers[i], h.shape, self.config.num_experts_per_tok
        x = layer.ffn_norm(h)
        logits = layer.router(x)
        ids, weights = route(logits, K)
        lookahead = self.layers[i + 1].gate(h) if i + 1 < len(self.layers) else None
        order = ids.flatten().argsort(stable=True)                  # (token, rank) pairs, expert after expert
        token = order // K
        routing = source.route(i, pack_routing(logits, ids, weights, lookahead), (logits, lookahead))
        ends = list(accumulate(routing.counts))
        expert_out = x.new_empty(T * K, D)                          # of each (token, rank) pair
        with closing(source.experts(i, routing)) as ready:      # (closed in any case: no slot stays pinned)
            for e, expert in ready:
                for start in range(ends[e] - routing.counts[e], ends[e], EXPERT_ROWS):
                    mine = slice(start, min(start + EXPERT_ROWS, ends[e]))
                    expert_out.index_copy_(0, order[mine], expert(x.index_select(0, token[mine])))
        return combine_experts(h, weights, expert_out.view(T, K, D))
