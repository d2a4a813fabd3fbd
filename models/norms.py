"""Normalisations, written out so that an exporter sees the formula and not a library call.

Statistics are taken in float32 whatever the storage type is (in float64 for a float64 input).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn


def widen(x: Tensor) -> Tensor:
    """x in the type its statistics are taken in: float32, or its own type if that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class LayerNorm(nn.Module):
    """y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias, per row (arXiv 1607.06450)."""

    def __init__(self, hidden: int, eps: float = 1e-5, bias: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden))
        self.bias = nn.Parameter(torch.zeros(hidden)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        wide = widen(x)
        centred = wide - wide.mean(-1, keepdim=True)
        variance = centred.pow(2).mean(-1, keepdim=True)
        y = centred / torch.sqrt(variance + self.eps) * self.weight
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype)


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight, per row (arXiv 1910.07467).

    Llama rounds x_hat to the storage type before the weight. Gemma (``gemma=True``) stores
    weight - 1, multiplies in float32 and rounds once.
    """

    def __init__(self, hidden: int, eps: float = 1e-6, gemma: bool = False) -> None:
        super().__init__()
        self.eps = eps
        self.gemma = gemma
        self.weight = nn.Parameter(torch.zeros(hidden) if gemma else torch.ones(hidden))

    def forward(self, x: Tensor) -> Tensor:
        wide = widen(x)
        x_hat = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.gemma:
            return (x_hat * (1.0 + widen(self.weight))).to(x.dtype)
        return self.weight * x_hat.to(x.dtype)


class DeepNorm(nn.Module):
    """y = norm(alpha * x + f), f being the sublayer's output (arXiv 2203.00555)."""

    def __init__(self, norm: nn.Module, alpha: float) -> None:
        super().__init__()
        self.norm = norm
        self.alpha = alpha

    def forward(self, x: Tensor, f: Tensor) -> Tensor:
        y: Tensor = self.norm(self.alpha * x + f)
        return y


def deepnorm_alpha(layers: int) -> float:
    """alpha = (2 * layers)^(1/4), for a model that is only an encoder or only a decoder."""
    return float((2 * layers) ** 0.25)


class BatchNorm(nn.Module):
    """y = (x - mean) / sqrt(var + eps) * weight + bias, per *feature* (arXiv 1502.03167).

    The contrast to LayerNorm: statistics run over the batch, and at inference they are
    constants, so the whole norm is an affine map of each feature.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, hidden: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps = eps
        self.momentum = momentum
        self.weight = nn.Parameter(torch.ones(hidden))
        self.bias = nn.Parameter(torch.zeros(hidden))
        self.register_buffer("running_mean", torch.zeros(hidden))
        self.register_buffer("running_var", torch.ones(hidden))

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = self.running_mean, self.running_var
        if self.training:
            rows = x.flatten(0, -2)
            mean, variance = rows.mean(0), rows.var(0, correction=0)
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(rows.var(0), self.momentum)
        return (x - mean) / torch.sqrt(variance + self.eps) * self.weight + self.bias


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "layer": LayerNorm,
    "rms": RMSNorm,
    "rms_gemma": partial(RMSNorm, gemma=True),
}
