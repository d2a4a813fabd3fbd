"""Feed-forward layers: the plain FFN and the GLU family (arXiv 2002.05202)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from models.activations import ACTIVATIONS

Layout = Literal["unpacked", "gate_up", "up_gate"]

GLU_ACTIVATIONS: dict[str, str] = {
    "glu": "sigmoid",
    "bilinear": "identity",
    "reglu": "relu",
    "geglu": "gelu",
    "geglu_tanh": "gelu_tanh",
    "swiglu": "swish",
    "swiglu_beta": "swish_beta",
}
"""GLU variant -> the activation of its gate."""


def swiglu_hidden(hidden: int, multiple_of: int = 256) -> int:
    """The FFN width of a gated layer: 2/3 of 4 * hidden, rounded up to ``multiple_of``.

    Three matrices of this width hold the parameters of two of width 4 * hidden
    (arXiv 2002.05202, section 3); Llama (arXiv 2302.13971) rounds up: 4096 -> 11008.
    """
    width = 2 * 4 * hidden // 3
    return -(-width // multiple_of) * multiple_of


class FFN(nn.Module):
    """y = act(x W1 + b1) W2 + b2 (arXiv 1706.03762, equation 2)."""

    def __init__(self, act: str, hidden: int, width: int, bias: bool = True) -> None:
        super().__init__()
        self.up = nn.Linear(hidden, width, bias)
        self.act = ACTIVATIONS[act]()
        self.down = nn.Linear(width, hidden, bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.act(self.up(x)))
        return y


class GatedFFN(nn.Module):
    """y = (act(x W + b) * (x V + c)) W2 + d, a matrix each for gate and up (arXiv 2002.05202)."""

    def __init__(self, act: str, hidden: int, width: int, bias: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, width, bias)
        self.up = nn.Linear(hidden, width, bias)
        self.act = ACTIVATIONS[act]()
        self.down = nn.Linear(width, hidden, bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.act(self.gate(x)) * self.up(x))
        return y


class PackedGatedFFN(nn.Module):
    """GatedFFN with one matrix [W | V], or [V | W] if not ``gate_first`` (arXiv 2002.05202)."""

    def __init__(
        self, act: str, hidden: int, width: int, bias: bool = False, gate_first: bool = True
    ) -> None:
        super().__init__()
        self.gate_first = gate_first
        self.packed = nn.Linear(hidden, 2 * width, bias)
        self.act = ACTIVATIONS[act]()
        self.down = nn.Linear(width, hidden, bias)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.packed(x).chunk(2, dim=-1)
        gate, up = (first, second) if self.gate_first else (second, first)
        y: Tensor = self.down(self.act(gate) * up)
        return y


def feed_forward(
    kind: str, hidden: int, width: int, bias: bool = False, layout: Layout = "unpacked"
) -> nn.Module:
    """The layer named ``kind``: a row of GLU_ACTIVATIONS, else a plain FFN of ACTIVATIONS."""
    if kind not in GLU_ACTIVATIONS:
        return FFN(kind, hidden, width, bias)
    act = GLU_ACTIVATIONS[kind]
    if layout == "unpacked":
        return GatedFFN(act, hidden, width, bias)
    return PackedGatedFFN(act, hidden, width, bias, gate_first=layout == "gate_up")
