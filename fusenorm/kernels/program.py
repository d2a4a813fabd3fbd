"""A fused op's function body read as the program of a row kernel.

Every value of the body belongs to one kind: known while compiling (`literal`), one number per
call (`attribute`), one per row (`row`) or one per element (`element`). A reduction turns elements
into a row value, so reductions cut the program into passes over the row.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import numpy as np
import onnx

from fusenorm.ops import DTYPES, Attention, DType, Linear, OpSpec, Slot
from fusenorm.ops.spec import DTYPE_OF_ONNX

Device = Literal["cpu", "cuda"]
Kind = Literal["literal", "attribute", "row", "element"]

_KINDS: tuple[Kind, ...] = ("literal", "attribute", "row", "element")
_ROUNDING = {"Add": 2, "Sub": 2, "Mul": 2, "Div": 2, "Sqrt": 1, "Reciprocal": 1}
_TRANSCENDENTAL = {"Sigmoid": 1, "Erf": 1, "Tanh": 1}
_EXACT = {"Identity": 1, "Neg": 1, "Relu": 1, "Max": 2, "Min": 2, "Cast": 1}
_ARITY = {**_ROUNDING, **_TRANSCENDENTAL, **_EXACT}

_DTYPE_OF_CAST = {int(number): dtype for number, dtype in DTYPE_OF_ONNX.items()}

BODY_OPSET = 18


@dataclasses.dataclass(frozen=True)
class Value:
    """One value of the body.

    Attributes:
        name: its name in the body.
        dtype: its type; a 16-bit value is rounded to that type where it is made.
        kind: what it is one number of.
        literal: the number itself, for kind `literal`.
    """

    name: str
    dtype: DType
    kind: Kind
    literal: float | None = None


@dataclasses.dataclass(frozen=True)
class Node:
    """`output = op(inputs)`, elementwise."""

    op: str
    inputs: tuple[str, ...]
    output: str

    @property
    def rounds(self) -> bool:
        """Whether the result can need rounding to its type."""
        return self.op not in _EXACT or self.op == "Cast"


@dataclasses.dataclass(frozen=True)
class Reduction:
    """`output` = mean over the row of `input`, summed in f32."""

    input: str
    output: str


@dataclasses.dataclass(frozen=True)
class View:
    """A value that is a part of a packed row: element j is packed[half·D + stride·j + offset]."""

    source: str
    half: int
    offset: int
    stride: int


@dataclasses.dataclass(frozen=True)
class RowProgram:
    """The body of a fused op as passes over a row.

    Attributes:
        inputs, outputs: the op's tensors.
        attributes: its float attributes, in order.
        values: every value but packed inputs and integer constants, by name.
        nodes: elementwise nodes in order, by the name of their output.
        views: values that are parts of a packed input, by name.
        levels: reductions by pass; those of one level need only earlier levels.
    """

    inputs: tuple[Slot, ...]
    outputs: tuple[Slot, ...]
    attributes: tuple[str, ...]
    values: dict[str, Value]
    nodes: dict[str, Node]
    views: dict[str, View]
    levels: tuple[tuple[Reduction, ...], ...]

    @property
    def flat(self) -> bool:
        """No row structure: the kernel may run over elements in one dimension."""
        return not self.levels and all(slot.layout == "row" for slot in self.inputs)

    @property
    def rounded(self) -> bool:
        """Whether an output has 16 bits, so that a last bit of f32 can decide a tie."""
        return any(slot.dtype in ("f16", "bf16") for slot in self.outputs)

    @property
    def roundings(self) -> int:
        """How often an element is rounded to 16 bits on its way."""
        made = [(node, self.values[name]) for name, node in self.nodes.items()]
        return sum(
            node.rounds and value.kind != "attribute" and value.dtype in ("f16", "bf16")
            for node, value in made
        )

    def summand(self, name: str) -> bool:
        """Whether an elementwise sum or difference reads the value."""
        sums = [node.inputs for node in self.nodes.values() if node.op in ("Add", "Sub")]
        return any(name in inputs for inputs in sums)

    def uses(self, name: str) -> int:
        """How many nodes and reductions read the value."""
        reads = [read for node in self.nodes.values() for read in node.inputs]
        reads += [reduction.input for level in self.levels for reduction in level]
        return reads.count(name)

    def row_free(self, name: str) -> bool:
        """Whether an element value can be computed before any reduction."""
        if self.values[name].kind == "row":
            return False
        node = self.nodes.get(name)
        return node is None or all(self.row_free(read) for read in node.inputs)


def symbols(spec: OpSpec, device: Device = "cpu") -> tuple[str, ...]:
    """Names of an op's kernels: with every output, then without the second.

    A linear op's are those of the products of one of its maps; the second, shared by all of its
    type and norm, lays out the rows of x for the first.
    """
    own = spec.products if isinstance(spec, Linear) else spec
    name = f"fusenorm_{own.op_type}" if device == "cpu" else f"fusenorm_cuda_{own.op_type}"
    if isinstance(spec, Linear):
        tiles = f"fusenorm_tiles_{spec.dtype}"
        return name, tiles if spec.norm == "none" else f"{tiles}_{spec.norm}"
    return (name, f"{name}__nosum") if len(spec.outputs) == 2 else (name,)


def supports(spec: OpSpec, device: Device = "cpu") -> str | None:
    """None if the op has a kernel there, else the reason why not."""
    if any(slot.dtype == "f64" for slot in (*spec.inputs, *spec.outputs)):
        return f"f64 has no {device.upper()} kernel"
    if isinstance(spec, Linear | Attention):
        return None if device == "cpu" else "products of matrices stay with CUDA's own libraries"
    try:
        row_program(spec)
    except NotImplementedError as error:
        return str(error)
    return None


@functools.cache
def row_program(spec: OpSpec) -> RowProgram:
    """The program of `spec`.

    Raises:
        NotImplementedError: the body has a node outside the vocabulary.
    """
    return _Reader(spec).read()


class _Reader:
    def __init__(self, spec: OpSpec) -> None:
        self.spec = spec
        self.body = spec.function(BODY_OPSET)
        self.values: dict[str, Value] = {}
        self.nodes: dict[str, Node] = {}
        self.views: dict[str, View] = {}
        self.levels: list[list[Reduction]] = []
        self.depth: dict[str, int] = {}
        self.integers: dict[str, tuple[int, ...]] = {}
        self.packed = {slot.name: slot for slot in spec.inputs if slot.layout == "packed"}

    def read(self) -> RowProgram:
        for slot in self.spec.inputs:
            if slot.name not in self.packed:
                self._define(Value(slot.name, slot.dtype, "element"), 0)
        for proto in self.body.node:
            self._node(proto)
        return RowProgram(
            inputs=self.spec.inputs,
            outputs=self.spec.outputs,
            attributes=self.spec.attributes,
            values=self.values,
            nodes=self.nodes,
            views=self.views,
            levels=tuple(tuple(level) for level in self.levels),
        )

    def _define(self, value: Value, depth: int) -> None:
        self.values[value.name] = value
        self.depth[value.name] = depth

    def _node(self, proto: onnx.NodeProto) -> None:
        if proto.op_type == "Constant":
            self._constant(proto)
        elif proto.op_type == "ReduceMean":
            self._mean(proto)
        elif proto.op_type == "Split":
            self._split(proto)
        elif proto.op_type == "Slice":
            self._slice(proto)
        elif proto.op_type == "Clip":
            self._clip(proto)
        elif len(proto.input) == _ARITY.get(proto.op_type):
            self._elementwise(proto)
        else:
            raise self._unknown(proto)

    def _unknown(self, proto: onnx.NodeProto) -> NotImplementedError:
        return NotImplementedError(f"no kernel for {proto.op_type} in {self.spec.op_type}")

    def _constant(self, proto: onnx.NodeProto) -> None:
        (attribute,) = proto.attribute
        name = proto.output[0]
        if attribute.name == "value_ints":
            self.integers[name] = tuple(attribute.ints)
        elif attribute.name != "value_float":
            raise self._unknown(proto)
        elif attribute.ref_attr_name:
            # The node attribute itself is the value; an alias of it keeps names apart.
            self._define(Value(attribute.ref_attr_name, "f32", "attribute"), 0)
            self._define(Value(name, "f32", "attribute"), 0)
            self.nodes[name] = Node("Identity", (attribute.ref_attr_name,), name)
        else:
            self._define(Value(name, "f32", "literal", attribute.f), 0)

    def _elementwise(self, proto: onnx.NodeProto) -> None:
        reads = [self.values[name] for name in proto.input]
        name, dtype = proto.output[0], reads[0].dtype
        if proto.op_type == "Cast":
            dtype = _DTYPE_OF_CAST[_cast_target(proto)]
            if reads[0].literal is not None:
                rounded = float(np.asarray(reads[0].literal).astype(DTYPES[dtype].numpy))
                self._define(Value(name, dtype, "literal", rounded), 0)
                return
        self._apply(Node(proto.op_type, tuple(proto.input), name), dtype)

    def _apply(self, node: Node, dtype: DType) -> None:
        kind = max((self.values[read].kind for read in node.inputs), key=_KINDS.index)
        if kind == "literal":
            kind = "attribute"
        self.nodes[node.output] = node
        self._define(Value(node.output, dtype, kind), max(self.depth[read] for read in node.inputs))

    def _clip(self, proto: onnx.NodeProto) -> None:
        """Clip between two bounds; the value goes first, so that its NaN stays."""
        value, low, high = proto.input
        (name,), dtype = proto.output, self.values[value].dtype
        self._apply(Node("Max", (value, low), f"{name}_raised"), dtype)
        self._apply(Node("Min", (f"{name}_raised", high), name), dtype)

    def _mean(self, proto: onnx.NodeProto) -> None:
        read = self.values[proto.input[0]]
        axes = self.integers.get(proto.input[1]) if len(proto.input) > 1 else None
        if axes != (-1,) or read.kind != "element":
            raise self._unknown(proto)
        name, level = proto.output[0], self.depth[read.name]
        while len(self.levels) <= level:
            self.levels.append([])
        self.levels[level].append(Reduction(read.name, name))
        self._define(Value(name, read.dtype, "row"), level + 1)

    def _split(self, proto: onnx.NodeProto) -> None:
        axis = next((item.i for item in proto.attribute if item.name == "axis"), 0)
        if proto.input[0] not in self.packed or axis != -1 or len(proto.output) != 2:
            raise self._unknown(proto)
        for half, name in enumerate(proto.output):
            self._view(name, View(proto.input[0], half, 0, 1))

    def _slice(self, proto: onnx.NodeProto) -> None:
        source, *arguments = proto.input
        numbers = [self.integers.get(name) for name in arguments]
        match numbers:
            case [(0 | 1 as start,), (end,), (-1,), (2,)] if end >= 2**31 and source in self.packed:
                self._view(proto.output[0], View(source, 0, start, 2))
            case _:
                raise self._unknown(proto)

    def _view(self, name: str, view: View) -> None:
        self.views[name] = view
        self._define(Value(name, self.packed[view.source].dtype, "element"), 0)


def _cast_target(proto: onnx.NodeProto) -> int:
    """The `to` of a Cast."""
    return next(int(item.i) for item in proto.attribute if item.name == "to")
