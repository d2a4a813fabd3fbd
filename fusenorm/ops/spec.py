"""What a fused-op declaration is: slots, attributes, function body, numpy reference."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal, Self

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir

DOMAIN = "fusenorm"

DType = Literal["f16", "bf16", "f32", "f64"]
Layout = Literal[
    "row", "vector", "packed", "panels", "heads", "sequence", "scores", "table", "cache"
]


@dataclasses.dataclass(frozen=True)
class DTypeInfo:
    """One storage type: its ONNX enum and its numpy type."""

    onnx: ir.DataType
    numpy: np.dtype

    @property
    def epsilon(self) -> float:
        """Distance from 1 to the next number."""
        return float(ml_dtypes.finfo(self.numpy).eps)

    @property
    def largest(self) -> float:
        """The largest finite number."""
        return float(ml_dtypes.finfo(self.numpy).max)


DTYPES: dict[DType, DTypeInfo] = {
    "f16": DTypeInfo(ir.DataType.FLOAT16, np.dtype(np.float16)),
    "bf16": DTypeInfo(ir.DataType.BFLOAT16, np.dtype(ml_dtypes.bfloat16)),
    "f32": DTypeInfo(ir.DataType.FLOAT, np.dtype(np.float32)),
    "f64": DTypeInfo(ir.DataType.DOUBLE, np.dtype(np.float64)),
}
DTYPE_OF_ONNX: dict[ir.DataType, DType] = {info.onnx: name for name, info in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Slot:
    """One input or output of a fused op.

    layout: `row` is [..., D], `vector` is [D], `packed` is [..., 2D] (gate and up in one tensor),
    `panels` is a packed weight (see fusenorm.ops.linear), `heads` is [B, H, S, D], `sequence`
    [B, S, H, D], `scores` what broadcasts to [B, H, S, T], `table` what broadcasts to [B, 1, S, R],
    `cache` to [B, S, R].
    """

    name: str
    dtype: DType
    layout: Layout


class Body:
    """Writes a function body line by line; holds what is spelled differently per opset."""

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self.lines: list[str] = []

    def let(self, name: str, expression: str) -> str:
        self.lines.append(f"{name} = {expression}")
        return name

    def cast(self, name: str, value: str, source: DType, target: DType) -> str:
        """`value` as `target`; nothing is written when it already is."""
        if source == target:
            return value
        return self.let(name, f"Cast <to: int = {int(DTYPES[target].onnx)}> ({value})")

    def constant(self, name: str, value: float | str, dtype: DType) -> str:
        """A scalar in `dtype`: a number, or `@attribute` to take it from the node."""
        text = value if isinstance(value, str) else repr(float(value))
        raw = name if dtype == "f32" else f"{name}_f32"
        self.let(raw, f"Constant <value_float: float = {text}> ()")
        return self.cast(name, raw, "f32", dtype)

    def result(self, name: str, value: str) -> None:
        """Give the last value written the output's name."""
        head, _, expression = self.lines[-1].partition(" = ")
        if head == value:
            self.lines[-1] = f"{name} = {expression}"
        else:
            self.let(name, f"Identity ({value})")

    def greatest(self, name: str, value: str) -> str:
        """Maximum over the last axis, kept as 1."""
        if self.opset < 18:
            return self.let(name, f"ReduceMax <axes: ints = [-1], keepdims: int = 1> ({value})")
        axes = self.let(f"{name}_axes", "Constant <value_ints: ints = [-1]> ()")
        return self.let(name, f"ReduceMax <keepdims: int = 1> ({value}, {axes})")

    def mean(self, name: str, value: str) -> str:
        """Mean over the last axis, kept as 1."""
        if self.opset < 18:
            text = f"ReduceMean <axes: ints = [-1], keepdims: int = 1> ({value})"
            return self.let(name, text)
        axes = self.let(f"{name}_axes", "Constant <value_ints: ints = [-1]> ()")
        return self.let(name, f"ReduceMean <keepdims: int = 1> ({value}, {axes})")

    def halves(self, first: str, second: str, value: str) -> None:
        """The two equal halves of the last axis."""
        count = "" if self.opset < 18 else ", num_outputs: int = 2"
        self.lines.append(f"{first}, {second} = Split <axis: int = -1{count}> ({value})")

    def stride(self, name: str, value: str, start: int) -> str:
        """Every second element of the last axis from `start`."""
        for part, number in (("start", start), ("end", 2**62), ("axis", -1), ("step", 2)):
            self.let(f"{name}_{part}", f"Constant <value_ints: ints = [{number}]> ()")
        arguments = ", ".join(f"{name}_{part}" for part in ("start", "end", "axis", "step"))
        return self.let(name, f"Slice ({value}, {arguments})")


class OpSpec(abc.ABC):
    """One fused op, fully typed: everything but the numbers of a node's attributes and tensors.

    Subclasses are frozen dataclasses. `op_type` and `parse` are inverse to each other, so one
    op_type stands for exactly one body, one tuple of types and one kernel.
    """

    VERSION: ClassVar[int] = 1
    MIN_OPSET: ClassVar[int] = 12

    @property
    @abc.abstractmethod
    def family(self) -> str:
        """The name reports use: LayerNorm, SkipRMSNorm, GLU ..."""

    @property
    @abc.abstractmethod
    def tokens(self) -> tuple[str, ...]:
        """What distinguishes this spec inside its family, in a fixed order."""

    @classmethod
    @abc.abstractmethod
    def variants(cls) -> Iterator[Self]:
        """Every declared spec: `parse` looks names up here, tests run through it."""

    @property
    @abc.abstractmethod
    def inputs(self) -> tuple[Slot, ...]:
        """Inputs in order; each is always present."""

    @property
    @abc.abstractmethod
    def outputs(self) -> tuple[Slot, ...]:
        """Outputs in order; a node lists all of them."""

    @property
    @abc.abstractmethod
    def attributes(self) -> tuple[str, ...]:
        """Names of the float attributes a node carries, all required."""

    @abc.abstractmethod
    def write(self, body: Body) -> None:
        """Write the meaning of the op, ending with its outputs' names."""

    @abc.abstractmethod
    def reference(
        self, inputs: Mapping[str, np.ndarray], attributes: Mapping[str, float]
    ) -> tuple[np.ndarray, ...]:
        """The formula in float64 numpy, written apart from the body to check it."""

    @abc.abstractmethod
    def with_dtype(self, dtype: DType) -> Self:
        """The same algebra stored in another type (f64 is the oracle's)."""

    @property
    def op_type(self) -> str:
        version = () if self.VERSION == 1 else (f"v{self.VERSION}",)
        return "_".join((self.family, *self.tokens, *version))

    @classmethod
    def parse(cls, op_type: str) -> Self | None:
        """The spec `op_type` stands for, or None."""
        return _by_name(cls).get(op_type)  # type: ignore[return-value]

    def function_text(self, opset: int) -> str:
        """The function body in ONNX's text form, for models of this opset."""
        body = Body(opset)
        self.write(body)
        head = ", ".join(slot.name for slot in self.inputs)
        tail = ", ".join(slot.name for slot in self.outputs)
        attributes = f"<{', '.join(self.attributes)}> " if self.attributes else ""
        signature = f"{self.op_type} {attributes}({head}) => ({tail})"
        lines = "\n".join(f"  {line}" for line in body.lines)
        return f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>\n{signature}\n{{\n{lines}\n}}'

    def function(self, opset: int) -> onnx.FunctionProto:
        """The function body as a FunctionProto.

        Raises:
            ValueError: `opset` is older than the body can be written in.
        """
        if opset < self.MIN_OPSET:
            raise ValueError(f"{self.op_type} needs opset {self.MIN_OPSET}, not {opset}")
        proto = onnx.parser.parse_function(self.function_text(opset))
        proto.doc_string = " ".join((self.__doc__ or "").split("\n\n")[0].split())
        return proto


_NAMES: dict[type[OpSpec], dict[str, OpSpec]] = {}


def _by_name(family: type[OpSpec]) -> dict[str, OpSpec]:
    if family not in _NAMES:
        _NAMES[family] = {spec.op_type: spec for spec in family.variants()}
    return _NAMES[family]
