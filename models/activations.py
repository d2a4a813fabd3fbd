"""Elementwise activations, written out, and the table that names them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn


class LeakyReLU(nn.Module):
    """y = x if x > 0 else slope * x."""

    def __init__(self, slope: float = 0.01) -> None:
        super().__init__()
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.leaky_relu(x, self.slope)


class GELU(nn.Module):
    """y = x * Phi(x) = x/2 * (1 + erf(x / sqrt(2))) (arXiv 1606.08415)."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1.0 + torch.erf(x / math.sqrt(2.0)))


class GELUTanh(nn.Module):
    """y = x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 * x^3))) (arXiv 1606.08415)."""

    def forward(self, x: Tensor) -> Tensor:
        inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * x.pow(3))
        return 0.5 * x * (1.0 + torch.tanh(inner))


class SiLU(nn.Module):
    """y = x * sigmoid(x), that is Swish with beta = 1 (arXiv 1702.03118)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class Swish(nn.Module):
    """y = x * sigmoid(beta * x), beta a constant or trained (arXiv 1710.05941)."""

    def __init__(self, beta: float, trainable: bool = False) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.tensor(beta)) if trainable else beta

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.beta * x)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "identity": nn.Identity,
    "sigmoid": nn.Sigmoid,
    "relu": nn.ReLU,
    "leaky_relu": LeakyReLU,
    "gelu": GELU,
    "gelu_tanh": GELUTanh,
    "swish": SiLU,
    "swish_beta": partial(Swish, beta=1.5, trainable=True),
    "quick_gelu": partial(Swish, beta=1.702),
}
