"""Activations and the gated linear units made of them.

The activation table is the one place that knows a formula: bodies, references, patterns and
kernels read its rows.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Literal, Self

import numpy as np

from fusenorm.ops.spec import Body, DType, OpSpec, Slot


@dataclasses.dataclass(frozen=True)
class Activation:
    """One row: a name, its formula as ONNX nodes and as numpy.

    Attributes:
        name: the field's name for it.
        write: writes the nodes for value `x` in type `dtype`, returns the result's name.
        numpy: the formula in float64; keyword `beta` where it is parametric.
        attributes: names of its float attributes.
        family: the report's name when it stands alone, None if it is a standard op anyway.
        gated: the report's name of the GLU it makes (arXiv 2002.05202).
    """

    name: str
    write: Callable[[Body, str, DType], str]
    numpy: Callable[..., np.ndarray]
    attributes: tuple[str, ...] = ()
    family: str | None = None
    gated: str = "GLU"


def _erf(x: np.ndarray) -> np.ndarray:
    return np.vectorize(math.erf, otypes=[np.float64])(x)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def _write_gelu(body: Body, x: str, dtype: DType) -> str:
    if dtype in ("f16", "bf16"):
        # Where every node rounds, the exporters' division and a product differ.
        body.let("act_scaled", f"Div ({x}, {body.constant('act_root', math.sqrt(2), dtype)})")
    else:
        body.let("act_scaled", f"Mul ({x}, {body.constant('act_root', math.sqrt(0.5), dtype)})")
    body.let("act_erf", "Erf (act_scaled)")
    body.let("act_sum", f"Add (act_erf, {body.constant('act_one', 1.0, dtype)})")
    body.let("act_half", f"Mul ({x}, {body.constant('act_point5', 0.5, dtype)})")
    return body.let("act", "Mul (act_half, act_sum)")


def _write_gelu_tanh(body: Body, x: str, dtype: DType) -> str:
    body.let("act_square", f"Mul ({x}, {x})")
    body.let("act_cube", f"Mul (act_square, {x})")
    body.let("act_term", f"Mul (act_cube, {body.constant('act_c3', 0.044715, dtype)})")
    body.let("act_inner", f"Add ({x}, act_term)")
    root = body.constant("act_root", math.sqrt(2.0 / math.pi), dtype)
    body.let("act_argument", f"Mul (act_inner, {root})")
    body.let("act_tanh", "Tanh (act_argument)")
    body.let("act_sum", f"Add (act_tanh, {body.constant('act_one', 1.0, dtype)})")
    body.let("act_half", f"Mul ({x}, {body.constant('act_point5', 0.5, dtype)})")
    return body.let("act", "Mul (act_half, act_sum)")


def _write_relu2(body: Body, x: str, dtype: DType) -> str:
    body.let("act_relu", f"Relu ({x})")
    return body.let("act", "Mul (act_relu, act_relu)")


def _write_swish(body: Body, x: str, dtype: DType) -> str:
    body.let("act_scaled", f"Mul ({x}, {body.constant('act_beta', '@beta', dtype)})")
    body.let("act_sigmoid", "Sigmoid (act_scaled)")
    return body.let("act", f"Mul ({x}, act_sigmoid)")


ACTIVATIONS: dict[str, Activation] = {
    row.name: row
    for row in (
        Activation("identity", lambda body, x, dtype: x, lambda x: x, gated="Bilinear"),
        Activation("sigmoid", lambda body, x, dtype: body.let("act", f"Sigmoid ({x})"), _sigmoid),
        Activation(
            "relu",
            lambda body, x, dtype: body.let("act", f"Relu ({x})"),
            lambda x: np.maximum(x, 0),
            gated="ReGLU",
        ),
        Activation(
            "relu2",
            _write_relu2,
            lambda x: np.maximum(x, 0) ** 2,
            family="Relu2",
            gated="ReGLU2",
        ),
        Activation(
            "gelu",
            _write_gelu,
            lambda x: 0.5 * x * (1 + _erf(x * math.sqrt(0.5))),
            family="Gelu",
            gated="GEGLU",
        ),
        Activation(
            "gelu_tanh",
            _write_gelu_tanh,
            lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
            family="Gelu",
            gated="GEGLU",
        ),
        Activation(
            "swish",
            _write_swish,
            lambda x, beta: x * _sigmoid(beta * x),
            attributes=("beta",),
            family="Swish",
            gated="SwiGLU",
        ),
    )
}

GateLayout = Literal["none", "pair", "gate_up", "up_gate", "interleaved"]
Clamp = Literal["none", "gate", "act"]
# The forms of a gated unit; those after the first are SwiGLU's only.
_CLAMPED: tuple[tuple[Clamp, bool], ...] = (
    ("none", False),
    ("gate", False),
    ("gate", True),
    ("act", False),
)


@dataclasses.dataclass(frozen=True)
class Gated(OpSpec):
    """act(x) alone, or act(gate)∘up: the GLU family over its activation table.

    Attributes:
        activation: a row of ACTIVATIONS.
        layout: `none`: y = act(x). `pair`: y = act(gate)∘up from two tensors. `gate_up`,
            `up_gate`: one packed tensor, gate in the first or second half of the last axis.
            `interleaved`: gate in its even columns, up in its odd ones.
        dtype: storage type of every input and output.
        precision: `f32` computes the activation in f32 and rounds it once to `dtype` (what the
            standard ops do); `storage` rounds every node, as decomposed 16-bit exports do.
        clamp: what is held inside [floor, limit] while up is inside [-limit, limit]: the `gate`
            (GPT-OSS) or its activation (`act`, Step-3). NaN stays.
        plus1: 1 is added to up after that (GPT-OSS: y = act(gate)∘(up + 1)).
    """

    activation: str = "swish"
    layout: GateLayout = "none"
    dtype: DType = "f32"
    precision: Literal["f32", "storage"] = "f32"
    clamp: Clamp = "none"
    plus1: bool = False

    @property
    def row(self) -> Activation:
        return ACTIVATIONS[self.activation]

    @property
    def family(self) -> str:
        if self.layout != "none":
            return "GLU"
        return self.row.family or self.activation.capitalize()

    @property
    def tokens(self) -> tuple[str, ...]:
        tokens = (
            [self.activation] if self.layout != "none" or self.activation == "gelu_tanh" else []
        )
        tokens += [f"clamp{self.clamp}"] if self.clamp != "none" else []
        tokens += ["plus1"] if self.plus1 else []
        tokens += [self.layout] if self.layout not in ("none", "pair") else []
        tokens += [self.dtype] if self.dtype != "f32" else []
        tokens += ["stepwise"] if self.precision == "storage" else []
        return tuple(tokens)

    @classmethod
    def variants(cls) -> Iterator[Self]:
        layouts: tuple[GateLayout, ...] = ("none", "pair", "gate_up", "up_gate", "interleaved")
        dtypes: tuple[DType, ...] = ("f32", "f16", "bf16", "f64")
        for row, layout, dtype in itertools.product(ACTIVATIONS.values(), layouts, dtypes):
            if layout == "none" and row.family is None:
                continue
            forms = _CLAMPED if row.name == "swish" and layout != "none" else _CLAMPED[:1]
            for form in forms:
                yield cls(row.name, layout, dtype, "f32", *form)
                if dtype in ("f16", "bf16") and row.name != "identity":
                    yield cls(row.name, layout, dtype, "storage", *form)

    @property
    def inputs(self) -> tuple[Slot, ...]:
        if self.layout == "none":
            return (Slot("x", self.dtype, "row"),)
        if self.layout == "pair":
            return (Slot("gate", self.dtype, "row"), Slot("up", self.dtype, "row"))
        return (Slot("x", self.dtype, "packed"),)

    @property
    def outputs(self) -> tuple[Slot, ...]:
        return (Slot("y", self.dtype, "row"),)

    @property
    def attributes(self) -> tuple[str, ...]:
        return (*self.row.attributes, *(("floor", "limit") if self.clamp != "none" else ()))

    def write(self, body: Body) -> None:
        if self.layout == "gate_up":
            body.halves("gate", "up", "x")
        elif self.layout == "up_gate":
            body.halves("up", "gate", "x")
        elif self.layout == "interleaved":
            body.stride("gate", "x", 0)
            body.stride("up", "x", 1)
        gate, up = "x" if self.layout == "none" else "gate", "up"
        if self.clamp != "none":
            limit = body.constant("clamp_limit", "@limit", self.dtype)
            floor = body.constant("clamp_floor", "@floor", self.dtype)
            lowest = body.let("clamp_lowest", f"Neg ({limit})")
            up = body.let("up_clamped", f"Clip ({up}, {lowest}, {limit})")
        if self.clamp == "gate":
            gate = body.let("gate_clamped", f"Clip ({gate}, {floor}, {limit})")
        if self.plus1:
            up = body.let("up_plus1", f"Add ({up}, {body.constant('up_one', 1.0, self.dtype)})")
        exact = self.precision == "storage" or self.dtype == "f64" or self.activation == "identity"
        at: DType = self.dtype if exact else "f32"
        value = body.cast("gate_cast", gate, self.dtype, at)
        value = self.row.write(body, value, at)
        value = body.cast("act_rounded", value, at, self.dtype)
        if self.clamp == "act":
            value = body.let("act_clamped", f"Clip ({value}, {floor}, {limit})")
        if self.layout == "none":
            body.result("y", value)
        else:
            body.let("y", f"Mul ({value}, {up})")

    def reference(
        self, inputs: Mapping[str, np.ndarray], attributes: Mapping[str, float]
    ) -> tuple[np.ndarray, ...]:
        wide = {name: np.asarray(value, np.float64) for name, value in inputs.items()}
        if self.layout == "interleaved":
            gate, up = wide["x"][..., 0::2], wide["x"][..., 1::2]
        elif self.layout in ("gate_up", "up_gate"):
            first, second = np.split(wide["x"], 2, axis=-1)
            gate, up = (first, second) if self.layout == "gate_up" else (second, first)
        else:
            gate, up = wide["x" if self.layout == "none" else "gate"], wide.get("up", np.ones(()))
        floor, limit = attributes.get("floor", -np.inf), attributes.get("limit", np.inf)
        if self.clamp == "gate":
            gate = np.clip(gate, floor, limit)
        act = self.row.numpy(gate, **{name: attributes[name] for name in self.row.attributes})
        if self.clamp == "act":
            act = np.clip(act, floor, limit)
        return (act * (np.clip(up, -limit, limit) + self.plus1),)

    def with_dtype(self, dtype: DType) -> Self:
        return dataclasses.replace(self, dtype=dtype, precision="f32")
