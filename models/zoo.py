"""Every module of the zoo by name, with random weights and example inputs.

model, inputs = ZOO["swiglu"].build(), ZOO["swiglu"].example()
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from models.blocks import BlockKind, residual
from models.ffn import GLU_ACTIVATIONS, Layout, feed_forward, swiglu_hidden
from models.norms import NORMS, BatchNorm, DeepNorm, LayerNorm, deepnorm_alpha
from models.transformer import Config, Decoder, DecoderConfig, Encoder, EncoderConfig

HIDDEN = 64
VOCAB = Config.vocab
DYNAMIC_AXES = {0: "batch", 1: "sequence"}
"""The dynamic axes of every input and output in the zoo."""

InputKind = Literal["states", "tokens", "mask"]
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Entry:
    """One module: how to make it, what it reads and writes, one line of description."""

    doc: str
    factory: Callable[[], nn.Module]
    inputs: dict[str, InputKind]
    output: str = "y"

    def build(self, seed: int = 0) -> nn.Module:
        """The module in eval mode, its weights drawn from ``seed``."""
        return randomise(self.factory(), seed).eval()

    def example(
        self, batch: int = 2, seq: int = 5, seed: int = 0, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, ...]:
        """Inputs for ``forward``, in order."""
        generator = torch.Generator().manual_seed(seed)
        return tuple(_input(kind, batch, seq, generator, dtype) for kind in self.inputs.values())


def _input(
    kind: InputKind, batch: int, seq: int, generator: torch.Generator, dtype: torch.dtype
) -> Tensor:
    match kind:
        case "states":
            return torch.randn(batch, seq, HIDDEN, generator=generator).to(dtype)
        case "tokens":
            return torch.randint(VOCAB, (batch, seq), generator=generator)
        case "mask":  # row i is padded by i tokens, and keeps at least one
            lengths = (seq - torch.arange(batch)).clamp(min=1)
            return (torch.arange(seq) < lengths[:, None]).to(torch.int64)


def randomise(module: M, seed: int) -> M:
    """Draw every weight anew, so that no gamma is 1, no beta 0, and activations stay O(1).

    Matrices are normal with std 1/sqrt(fan in), embeddings with std 1; weights of a norm are in
    [0.5, 1.5], offsets in [-0.5, 0.5]. Scalars (the beta of Swish) keep their value.
    """
    generator = torch.Generator().manual_seed(seed)
    tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    with torch.no_grad():
        for name, tensor in module.state_dict(keep_vars=True).items():
            if tensor.ndim == 2:
                std = 1.0 if id(tensor) in tables else tensor.shape[1] ** -0.5
                tensor.normal_(0.0, std, generator=generator)
            elif tensor.ndim == 1:
                offset = name.endswith(("bias", "running_mean"))
                low = -0.5 if offset else 0.5
                tensor.uniform_(low, low + 1.0, generator=generator)
    return module


def _blocks(kind: BlockKind, norm: str, act: str) -> nn.Module:
    """Two residual FFN blocks: the sum of the first is read by a norm and by the next sum."""
    width = swiglu_hidden(HIDDEN, multiple_of=32)
    return nn.Sequential(
        *(
            residual(kind, partial(NORMS[norm], HIDDEN), feed_forward(act, HIDDEN, width), depth=2)
            for _ in range(2)
        )
    )


def _ffn(kind: str, bias: bool = False, layout: Layout = "unpacked") -> nn.Module:
    return feed_forward(kind, HIDDEN, swiglu_hidden(HIDDEN, multiple_of=32), bias, layout)


def _deep_norm() -> nn.Module:
    return DeepNorm(LayerNorm(HIDDEN), deepnorm_alpha(layers=4))


def _states(doc: str, factory: Callable[[], nn.Module]) -> Entry:
    return Entry(doc, factory, {"x": "states"})


def _decoder(doc: str, config: DecoderConfig) -> Entry:
    return Entry(doc, partial(Decoder, config), {"tokens": "tokens"}, "logits")


def _encoder(doc: str, config: EncoderConfig) -> Entry:
    inputs: dict[str, InputKind] = {"tokens": "tokens", "mask": "mask"}
    return Entry(doc, partial(Encoder, config), inputs, "states")


_NORMS = {
    "layer_norm": _states("LayerNorm, decomposed", partial(NORMS["layer"], HIDDEN)),
    "layer_norm_no_bias": _states("LayerNorm without beta", partial(LayerNorm, HIDDEN, bias=False)),
    "rms_norm": _states("RMSNorm as in Llama: cast, then weight", partial(NORMS["rms"], HIDDEN)),
    "rms_norm_gemma": _states(
        "RMSNorm as in Gemma: 1 + weight, then cast", partial(NORMS["rms_gemma"], HIDDEN)
    ),
    "deep_norm": Entry(
        "DeepNorm residual: LayerNorm(alpha * x + f)", _deep_norm, {"x": "states", "f": "states"}
    ),
    "batch_norm": _states("BatchNorm at inference, for contrast", partial(BatchNorm, HIDDEN)),
}

_BLOCKS = {
    "prenorm_block": _states("two blocks x + f(norm(x))", partial(_blocks, "pre", "rms", "swiglu")),
    "prenorm_block_layer": _states(
        "two blocks x + f(norm(x)), with LayerNorm", partial(_blocks, "pre", "layer", "gelu")
    ),
    "postnorm_block": _states(
        "two blocks norm(x + f(x))", partial(_blocks, "post", "layer", "gelu")
    ),
    "deepnorm_block": _states(
        "two blocks norm(alpha * x + f(x))", partial(_blocks, "deep", "layer", "gelu")
    ),
    "sandwich_block": _states(
        "two blocks x + norm(f(norm(x)))", partial(_blocks, "sandwich", "rms_gemma", "geglu_tanh")
    ),
}

_FFNS = {
    f"ffn_{act}{suffix}": _states(f"FFN with {act}, {word} bias", partial(_ffn, act, bias=bias))
    for act in ("relu", "leaky_relu", "gelu", "gelu_tanh", "swish", "swish_beta", "quick_gelu")
    for suffix, word, bias in (("", "with", True), ("_no_bias", "without", False))
}

_GLU_LAYOUTS: dict[str, tuple[str, bool, Layout]] = {
    "": ("two matrices", False, "unpacked"),
    "_bias": ("two matrices and biases", True, "unpacked"),
    "_packed": ("packed [gate | up]", False, "gate_up"),
    "_packed_up_first": ("packed [up | gate]", False, "up_gate"),
}

_GLUS = {
    f"{kind}{suffix}": _states(f"{kind} FFN, {words}", partial(_ffn, kind, bias, layout))
    for kind in GLU_ACTIVATIONS
    for suffix, (words, bias, layout) in _GLU_LAYOUTS.items()
}

_TRANSFORMERS = {
    "decoder": _decoder("Llama-like: pre-RMSNorm, RoPE, grouped queries, SwiGLU", DecoderConfig()),
    "decoder_packed": _decoder(
        "Phi-3-like: the decoder with a packed [gate | up]", DecoderConfig(layout="gate_up")
    ),
    "decoder_gemma": _decoder(
        "Gemma-2-like: sandwich RMSNorm with 1 + weight, GEGLU (tanh), scaled embedding",
        DecoderConfig(
            layers=2, norm="rms_gemma", act="geglu_tanh", block="sandwich", scale_embedding=True
        ),
    ),
    "decoder_deepnorm": _decoder(
        "GLM-130B-like: DeepNorm with LayerNorm, GEGLU",
        DecoderConfig(layers=2, kv_heads=4, norm="layer", act="geglu", block="deep", bias=True),
    ),
    "decoder_gpt": _decoder(
        "GPT-like: pre-LayerNorm, GELU (tanh) FFN, biases",
        DecoderConfig(layers=2, kv_heads=4, ffn=384, norm="layer", act="gelu_tanh", bias=True),
    ),
    "encoder": _encoder("BERT-like: post-LayerNorm, GELU, attention mask", EncoderConfig()),
    "encoder_pre": _encoder("the encoder with pre-LayerNorm", EncoderConfig(block="pre")),
    "encoder_deepnorm": _encoder("the encoder with DeepNorm", EncoderConfig(block="deep")),
}

ZOO: dict[str, Entry] = _NORMS | _BLOCKS | _FFNS | _GLUS | _TRANSFORMERS
"""Name -> Entry, in the order ``python -m models.export --list`` prints them."""
