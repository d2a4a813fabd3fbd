"""Residual blocks: where the norm stands around a sublayer f.

Whatever follows x (an attention mask, rotary tables) is handed on to f.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

from models.norms import DeepNorm, deepnorm_alpha

BlockKind = Literal["pre", "post", "deep", "sandwich"]


class PreNorm(nn.Module):
    """y = x + f(norm(x)) (arXiv 2002.04745; GPT-2, Llama)."""

    def __init__(self, norm: nn.Module, f: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.f = f

    def forward(self, x: Tensor, *context: object) -> Tensor:
        y: Tensor = x + self.f(self.norm(x), *context)
        return y


class PostNorm(nn.Module):
    """y = norm(x + f(x)) (arXiv 1706.03762; BERT)."""

    def __init__(self, norm: nn.Module, f: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.f = f

    def forward(self, x: Tensor, *context: object) -> Tensor:
        y: Tensor = self.norm(x + self.f(x, *context))
        return y


class DeepNormBlock(nn.Module):
    """y = norm(alpha * x + f(x)) (arXiv 2203.00555)."""

    def __init__(self, norm: nn.Module, f: nn.Module, alpha: float) -> None:
        super().__init__()
        self.deep_norm = DeepNorm(norm, alpha)
        self.f = f

    def forward(self, x: Tensor, *context: object) -> Tensor:
        y: Tensor = self.deep_norm(x, self.f(x, *context))
        return y


class Sandwich(nn.Module):
    """y = x + norm_out(f(norm_in(x))) (arXiv 2105.13290; Gemma 2, arXiv 2408.00118)."""

    def __init__(self, norm_in: nn.Module, f: nn.Module, norm_out: nn.Module) -> None:
        super().__init__()
        self.norm_in = norm_in
        self.f = f
        self.norm_out = norm_out

    def forward(self, x: Tensor, *context: object) -> Tensor:
        y: Tensor = x + self.norm_out(self.f(self.norm_in(x), *context))
        return y


def residual(kind: BlockKind, norm: Callable[[], nn.Module], f: nn.Module, depth: int) -> nn.Module:
    """The block ``kind`` around f, in a model of ``depth`` layers (DeepNorm's alpha)."""
    match kind:
        case "pre":
            return PreNorm(norm(), f)
        case "post":
            return PostNorm(norm(), f)
        case "deep":
            return DeepNormBlock(norm(), f, deepnorm_alpha(depth))
        case "sandwich":
            return Sandwich(norm(), f, norm())
