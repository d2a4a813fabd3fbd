"""A Llama-like decoder and a BERT-like encoder, small enough to read and to ship.

Attention is plain MatMul and Softmax, so that every exporter and opset can express it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from models.blocks import BlockKind, residual
from models.ffn import Layout, feed_forward, swiglu_hidden
from models.norms import NORMS, widen

Rotary = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Config:
    """What a decoder layer and an encoder layer share. ``ffn`` 0: swiglu_hidden of ``hidden``."""

    vocab: int = 256
    hidden: int = 96
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    ffn: int = 0
    multiple_of: int = 32
    norm: str = "rms"
    act: str = "swiglu"
    block: BlockKind = "pre"
    layout: Layout = "unpacked"
    bias: bool = False

    def __post_init__(self) -> None:
        if self.hidden % (2 * self.heads):
            raise ValueError(f"hidden {self.hidden} is not an even multiple of {self.heads} heads")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads do not share {self.kv_heads} kv heads evenly")

    @property
    def width(self) -> int:
        return self.ffn or swiglu_hidden(self.hidden, self.multiple_of)


@dataclass(frozen=True)
class DecoderConfig(Config):
    """Llama by default (arXiv 2302.13971): pre-RMSNorm, RoPE, grouped queries, SwiGLU."""

    rope_theta: float = 10000.0
    scale_embedding: bool = False


@dataclass(frozen=True)
class EncoderConfig(Config):
    """BERT by default (arXiv 1810.04805): post-LayerNorm, learned positions, GELU."""

    layers: int = 2
    kv_heads: int = 4
    ffn: int = 384
    norm: str = "layer"
    act: str = "gelu"
    block: BlockKind = "post"
    bias: bool = True
    positions: int = 64


def rotary(positions: Tensor, head_dim: int, theta: float) -> Rotary:
    """cos and sin of position * theta^(-2i/head_dim), both halves (arXiv 2104.09864)."""
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
    angles = positions[:, None].to(torch.float32) * theta ** (-pairs / head_dim)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, tables: Rotary) -> Tensor:
    """x * cos + rotate_half(x) * sin (arXiv 2104.09864, in Llama's half-split order)."""
    cos, sin = (table.to(x.dtype) for table in tables)
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


class Attention(nn.Module):
    """softmax(q k^T / sqrt(d)) v, each kv head read by a group of q heads (arXiv 2305.13245)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.head_dim = config.hidden // config.heads
        self.kv_heads = config.kv_heads
        self.group = config.heads // config.kv_heads
        kv_width = config.kv_heads * self.head_dim
        self.q = nn.Linear(config.hidden, config.hidden, config.bias)
        self.k = nn.Linear(config.hidden, kv_width, config.bias)
        self.v = nn.Linear(config.hidden, kv_width, config.bias)
        self.o = nn.Linear(config.hidden, config.hidden, config.bias)

    def forward(self, x: Tensor, mask: Tensor, tables: Rotary | None = None) -> Tensor:
        batch, seq, hidden = x.shape
        # [batch, kv head, group, seq, head_dim]; k and v broadcast over the group
        q = self.q(x).view(batch, seq, self.kv_heads, self.group, self.head_dim)
        k = self.k(x).view(batch, seq, self.kv_heads, 1, self.head_dim)
        v = self.v(x).view(batch, seq, self.kv_heads, 1, self.head_dim)
        q, k, v = (t.permute(0, 2, 3, 1, 4) for t in (q, k, v))
        if tables is not None:
            q, k = rotate(q, tables), rotate(k, tables)
        scores = q @ k.transpose(-1, -2) * self.head_dim**-0.5
        scores = scores.masked_fill(~mask, torch.finfo(x.dtype).min)
        weights = torch.softmax(widen(scores), dim=-1).to(x.dtype)
        y: Tensor = self.o((weights @ v).permute(0, 3, 1, 2, 4).reshape(batch, seq, hidden))
        return y


class Layer(nn.Module):
    """Attention, then FFN, each in its residual block."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        norm = partial(NORMS[config.norm], config.hidden)
        ffn = feed_forward(config.act, config.hidden, config.width, config.bias, config.layout)
        self.attention = residual(config.block, norm, Attention(config), config.layers)
        self.ffn = residual(config.block, norm, ffn, config.layers)

    def forward(self, x: Tensor, mask: Tensor, tables: Rotary | None = None) -> Tensor:
        y: Tensor = self.ffn(self.attention(x, mask, tables))
        return y


def final_norm(config: Config) -> nn.Module:
    """The norm after the last layer, where the blocks do not end in one themselves."""
    ends_in_norm = config.block in ("post", "deep")
    return nn.Identity() if ends_in_norm else NORMS[config.norm](config.hidden)


class Decoder(nn.Module):
    """tokens [batch, seq] -> logits [batch, seq, vocab], causal (arXiv 2302.13971)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab, config.hidden)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = final_norm(config)
        self.head = nn.Linear(config.hidden, config.vocab, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        config = self.config
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        causal = positions[:, None] >= positions[None, :]
        tables = rotary(positions, config.hidden // config.heads, config.rope_theta)
        x = self.embedding(tokens)
        if config.scale_embedding:
            x = x * config.hidden**0.5
        for layer in self.layers:
            x = layer(x, causal, tables)
        logits: Tensor = self.head(self.norm(x))
        return logits


class Encoder(nn.Module):
    """tokens and mask [batch, seq] -> states [batch, seq, hidden] (arXiv 1810.04805)."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab, config.hidden)
        self.position = nn.Embedding(config.positions, config.hidden)
        self.embedding_norm = NORMS[config.norm](config.hidden)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = final_norm(config)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        visible = mask.to(torch.bool)[:, None, None, None, :]
        x = self.embedding_norm(self.embedding(tokens) + self.position(positions))
        for layer in self.layers:
            x = layer(x, visible)
        y: Tensor = self.norm(x)
        return y
