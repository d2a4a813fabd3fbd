"""Proof of a rewrite when it is made: matched subgraph against fused op, on hard rows.

Both sides are evaluated in float64, where equal algebra agrees to rounding and a wrong axis,
epsilon or constant shows; 16-bit rewrites also in their own type, where a lost rounding shows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Container, Hashable, Iterable, Mapping, Sequence
from typing import Self

import numpy as np
import onnx
import onnx_ir as ir

from fusenorm.ops import parse
from fusenorm.ops.spec import DOMAIN, DTYPE_OF_ONNX, DTYPES, DType, Layout, OpSpec
from fusenorm.passes import facts
from fusenorm.passes.evaluate import EvaluationError, evaluate
from fusenorm.passes.pattern import Refusal, node_name
from fusenorm.passes.rewrite import Rewrite, View

# Largest |a-b| / max|row of a| allowed in float64. The source's constants carry half an epsilon
# of its type; GELU's tail multiplies a relative error by up to x², about 100 on the rows below.
ALGEBRA_BOUND: dict[DType, float] = {
    dtype: 100 * DTYPES[dtype].epsilon / 2 for dtype in ("f32", "f16", "bf16")
} | {"f64": 100 * DTYPES["f32"].epsilon / 2}
BIT_EQUAL = 0.998
ANY_WIDTH = 16
LEADING = (1, 1, 1, 5, 3, 2, 4)  # the last ones are taken, so that ranks broadcast
# (scale, offset) of successive rows.
SHAPES_OF_ROWS = ((1, 0), (1, 10), (1e-3, 0), (30, 0), (0, 0), (1, -3), (0.1, 0), (1, 1))


@dataclasses.dataclass(frozen=True)
class Operand:
    """One input of a fused op, as far as a proof depends on it.

    Attributes:
        name: what the source nodes call it.
        dtype: its float type, None if unknown.
        shape: of a row, its own last dimensions behind others of any size.
        layout: of the slot it goes into.
        exponent: the numbers tried have this binary magnitude; None if they are the constant's.
    """

    name: str
    dtype: DType | None
    shape: tuple[int, ...]
    layout: Layout
    exponent: int | None = 0

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """Numbers in float64 that tell formulas apart."""
        assert self.exponent is not None
        if self.layout == "vector":
            return np.ldexp(rng.normal(1.0, 0.5, self.shape), self.exponent)
        if self.layout in ("heads", "sequence", "table", "cache", "panels"):
            return rng.normal(size=self.shape)
        if self.layout == "scores":  # a mask: the last number counts, the first of several rows not
            mask = np.asarray(rng.normal(size=self.shape))
            mask[rng.random(self.shape) < 0.3] = 0.0
            mask[rng.random(self.shape) < 0.3] = -np.inf
            mask[(-1,) * mask.ndim] = 0.5
            if not self.one_mask:
                mask[(0,) * (mask.ndim - 1)] = -np.inf
            return mask
        return hard_rows(rng, self.shape)

    @property
    def one_mask(self) -> bool:
        """Whether it is a mask with one row for all."""
        return self.layout == "scores" and math.prod(self.shape[:-1]) == 1

    def type(self, kind: DType) -> DType:
        """Its type in an evaluation in `kind`."""
        return kind if kind == "f64" or self.dtype is None else self.dtype


@dataclasses.dataclass(frozen=True)
class Claim:
    """That source nodes compute what a fused op does: all that a proof reads.

    Attributes:
        source: a GraphProto of the source nodes, serialized; its outputs are those compared.
        constants: what the nodes read besides the operands, and the operands that are not drawn.
        operands: one for each of spec.inputs.
        spec: the fused op.
        attributes: its numbers.
        outputs: for each of spec.outputs, whether the source has it.
        merged: the last dimensions that are one to the fused op, () if it has them as they are.
        views, result: how the fused op sees each operand, and its first output is seen.
        opset: of the model.
    """

    source: bytes
    constants: Mapping[str, np.ndarray]
    operands: tuple[Operand, ...]
    spec: OpSpec
    attributes: Mapping[str, float]
    outputs: tuple[bool, ...]
    merged: tuple[int, ...]
    views: tuple[View | None, ...]
    result: View | None
    opset: int

    @classmethod
    def of(cls, rewrite: Rewrite, opset: int) -> Self:
        """What `rewrite` claims, its values named by number in the order they are met.

        A vector the source reads as it is, such as a norm's scale, stands for any of its shape
        and magnitude, a packed weight it reads for any of its shape. Where a rule made an operand
        up from the source's constants, the numbers of all of them count.
        """
        names: dict[ir.Value, str] = {}

        def name_of(value: ir.Value | None) -> str:
            return "" if value is None else names.setdefault(value, f"v{len(names)}")

        graph = onnx.GraphProto()
        given = {value: name_of(value) for value in rewrite.inputs}
        constants: dict[str, np.ndarray] = {}
        read = set()
        wanted = [value for value in rewrite.outputs if value is not None]
        for node in _source_nodes(wanted, {*given, *rewrite.computed}):
            names_of = [name_of(value) for value in (*node.inputs, *node.outputs)]
            count = len(node.inputs)
            graph.node.append(source_proto(node, names_of[:count], names_of[count:]))
            for value in filter(None, node.inputs):
                if value in given:
                    read.add(value)
                elif value in rewrite.computed:
                    constants[name_of(value)] = np.array(rewrite.computed[value], np.int64)
                elif facts.is_constant(value):
                    constants[name_of(value)] = value.const_value.numpy()  # type: ignore[union-attr]
        graph.output.extend(onnx.ValueInfoProto(name=name_of(value)) for value in wanted)
        made_up = not read.issuperset(given)
        operands = []
        for slot, value in zip(rewrite.spec.inputs, rewrite.inputs, strict=True):
            name, layout = given[value], slot.layout
            drawn = layout in ("row", "packed") or (layout == "panels" and not made_up)
            known = None if drawn else facts.constant(value)
            if known is None:
                shape = rewrite.shapes.get(value)
                if shape is None:
                    shape = _shape(value, layout, rewrite.merged)
                exponent = 0
            elif layout == "vector" and not made_up:
                shape, exponent = known.shape, _magnitude(known)
            else:
                shape, exponent = known.shape, None
                constants[name] = known
            operands.append(Operand(name, facts.dtype_of(value), shape, layout, exponent))
        return cls(
            graph.SerializeToString(),
            constants,
            tuple(operands),
            rewrite.spec,
            {name: float(rewrite.attributes[name]) for name in rewrite.spec.attributes},
            tuple(value is not None for value in rewrite.outputs),
            rewrite.merged,
            tuple(rewrite.views.get(slot.name) for slot in rewrite.spec.inputs),
            rewrite.result,
            opset,
        )

    @property
    def key(self) -> tuple[Hashable, ...]:
        """Equal for claims that have one proof."""
        constants = tuple((name, *_digest(array)) for name, array in self.constants.items())
        attributes = tuple(self.attributes.items())
        fields = {**vars(self), "constants": constants, "attributes": attributes}
        return tuple(fields.values())


def _shape(value: ir.Value, layout: Layout, merged: tuple[int, ...]) -> tuple[int, ...]:
    if layout == "panels":
        assert value.shape is not None
        return tuple(int(size) for size in value.shape)  # type: ignore[arg-type]
    # An elementwise op may not know its width; any will do.
    tail = merged or (facts.last_dim(value) or ANY_WIDTH,)
    leading = 0 if layout == "vector" else (facts.rank(value) or 3) - len(tail)
    return (*LEADING[len(LEADING) - leading :], *tail)


def _magnitude(array: np.ndarray) -> int:
    """What to raise numbers around 1, at most 2², to by a power of two."""
    return int(np.frexp(np.abs(array.astype(np.float64)).max(initial=0))[1]) - 2


def _digest(array: np.ndarray) -> tuple[Hashable, ...]:
    """Equal for equal arrays; stands for them where they may be large."""
    data = repr(array.tolist()).encode() if array.dtype.hasobject else array.tobytes()
    return array.dtype, array.shape, hashlib.sha256(data).digest()


@dataclasses.dataclass(frozen=True)
class Validator:
    """Checks proposals; hand it to a RewritePass. Of equal claims, only the first is evaluated.

    Args:
        seed: of the random rows.
    """

    seed: int = 0
    _flaws: dict[tuple[Hashable, ...], str | None] = dataclasses.field(
        default_factory=dict, init=False, repr=False
    )

    def __call__(self, rewrite: Rewrite, opset: int) -> Refusal | None:
        """None if both sides agree, else a refusal with the largest difference found."""
        claim = Claim.of(rewrite, opset)
        key = claim.key
        if key not in self._flaws:
            self._flaws[key] = find_flaw(claim, self.seed)
        flaw = self._flaws[key]
        return None if flaw is None else Refusal("check_failed", node_name(rewrite.root), flaw)


def find_flaw(claim: Claim, seed: int = 0) -> str | None:
    """What separates the two sides of a claim, None if they agree on random rows."""
    rng = np.random.default_rng(seed)
    rows = {
        operand: np.asarray(claim.constants[operand.name], np.float64)
        if operand.exponent is None
        else operand.draw(rng)
        for operand in claim.operands
    }
    nothing = {
        operand: np.full(operand.shape, -np.inf)
        for operand in claim.operands
        if operand.one_mask and operand.exponent is not None
    }
    dtype = claim.spec.inputs[0].dtype
    kinds: list[DType] = ["f64"] if dtype == "f32" else ["f64", dtype]
    for kind, masks in itertools.product(kinds, [{}, nothing] if nothing else [{}]):
        feeds = {
            operand.name: array.astype(DTYPES[operand.type(kind)].numpy)
            for operand, array in (rows | masks).items()
        }
        try:
            source = _run_source(claim, feeds, kind)
            fused = _run_fused(claim, feeds, kind)
        except EvaluationError as error:
            return f"cannot be evaluated: {error}"
        kept = [out for out, wanted in zip(fused, claim.outputs, strict=True) if wanted]
        difference = find_difference(source, kept, dtype, kind)
        if difference:
            return difference
    return None


def hard_rows(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Rows that tell formulas apart: plain, off-centre, tiny, large, zero; in float64."""
    rows = rng.normal(size=(math.prod(shape[:-1]), shape[-1]))
    for row, (scale, offset) in zip(rows, itertools.cycle(SHAPES_OF_ROWS), strict=False):
        row[:] = scale * row + offset
    return rows.reshape(shape)


def _source_nodes(wanted: Sequence[ir.Value], stop: Container[ir.Value]) -> list[ir.Node]:
    """The nodes between the fused inputs and outputs, in an order they can run in."""
    order: list[ir.Node] = []
    seen: set[ir.Node] = set()

    def visit(value: ir.Value | None) -> None:
        node = value.producer() if value is not None and value not in stop else None
        if node is None or node in seen:
            return
        seen.add(node)
        for operand in node.inputs:
            visit(operand)
        order.append(node)

    for value in wanted:
        visit(value)
    return order


def _run_source(claim: Claim, feeds: Mapping[str, np.ndarray], kind: DType) -> list[np.ndarray]:
    graph = onnx.GraphProto.FromString(claim.source)
    outputs = [value.name for value in graph.output]
    return run_nodes(graph.node, {**claim.constants, **feeds}, outputs, kind, claim.opset)


def run_nodes(
    nodes: Iterable[onnx.NodeProto],
    arrays: Mapping[str, np.ndarray],
    outputs: Sequence[str],
    kind: DType,
    opset: int,
) -> list[np.ndarray]:
    """Evaluate nodes on arrays: if `kind` is f64 with every float of that type, else as written.

    Raises:
        EvaluationError: a node cannot run.
    """
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    functions = {}
    if kind == "f64":
        floats = {info.numpy for info in DTYPES.values()}
        arrays = {
            name: array.astype(np.float64) if array.dtype in floats else array
            for name, array in arrays.items()
        }
    for node in nodes:
        if kind == "f64":
            _retype_cast(node)
        if node.domain == DOMAIN:
            spec = parse(node.op_type)
            assert spec is not None
            spec = spec.with_dtype("f64") if kind == "f64" else spec
            node.op_type = spec.op_type
            functions[spec.op_type] = spec.function(opset)
    return evaluate(nodes, arrays, outputs, functions.values(), opset)


def source_proto(node: ir.Node, inputs: Sequence[str], outputs: Sequence[str]) -> onnx.NodeProto:
    """A node as it is, but for the names of what it reads and makes."""
    proto = ir.serde.serialize_node(node)
    for field in ("name", "doc_string", "metadata_props", "input", "output"):
        proto.ClearField(field)
    proto.input.extend(inputs)
    proto.output.extend(outputs)
    return proto


def fused_proto(
    spec: OpSpec, attributes: Mapping[str, float], inputs: Sequence[str], outputs: Sequence[str]
) -> onnx.NodeProto:
    """A node of a fused op."""
    proto = onnx.helper.make_node(spec.op_type, inputs, outputs, domain=DOMAIN)
    for name, number in attributes.items():
        proto.attribute.append(onnx.helper.make_attribute(name, float(number)))
    return proto


def _retype_cast(proto: onnx.NodeProto) -> None:
    for attribute in proto.attribute:
        is_target = (proto.op_type, attribute.name) == ("Cast", "to")
        if is_target and ir.DataType(attribute.i) in DTYPE_OF_ONNX:
            attribute.i = int(ir.DataType.DOUBLE)


def _run_fused(claim: Claim, feeds: Mapping[str, np.ndarray], kind: DType) -> list[np.ndarray]:
    spec = claim.spec.with_dtype("f64") if kind == "f64" else claim.spec
    merged = claim.merged
    arrays = {}
    for slot, operand, view in zip(spec.inputs, claim.operands, claim.views, strict=True):
        array = feeds[operand.name].astype(DTYPES[slot.dtype].numpy)
        if view is not None:
            array = array.reshape(view.shape(array.shape))
        if merged:
            array = array.reshape(*array.shape[: -len(merged)], math.prod(merged))
        arrays[slot.name] = array
    names = [slot.name for slot in spec.inputs], [slot.name for slot in spec.outputs]
    node = fused_proto(spec, claim.attributes, *names)
    outputs = evaluate([node], arrays, list(node.output), [spec.function(claim.opset)], claim.opset)
    if claim.result is not None:
        outputs[0] = outputs[0].reshape(claim.result.shape(outputs[0].shape))
    return [out.reshape(*out.shape[:-1], *merged) if merged else out for out in outputs]


def find_difference(
    source: Sequence[np.ndarray], fused: Sequence[np.ndarray], dtype: DType, kind: DType
) -> str | None:
    """What separates the two sides, None if they agree."""
    for a, b in zip(source, fused, strict=True):
        if a.shape != b.shape:
            return f"shape {list(a.shape)} became {list(b.shape)}"
        wide_a, wide_b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        if not np.array_equal(np.isfinite(wide_a), np.isfinite(wide_b)):
            return "infinities or NaN appear on one side only"
        finite = np.isfinite(wide_a)
        size = np.where(finite, np.abs(wide_a), 0.0)
        floor = max(1e-3 * float(size.max(initial=0.0)), 1e-30)
        rows = np.maximum(size.max(axis=-1, keepdims=True, initial=0.0), floor)
        error = np.abs(np.subtract(wide_a, wide_b, where=finite, out=np.zeros_like(size)))
        worst = float((error / rows).max(initial=0.0))
        if worst > ALGEBRA_BOUND[dtype]:
            return f"differs by {worst:.1e} of a row's largest output in {kind}"
        equal = np.asarray(a) == np.asarray(b)
        if kind != "f64" and np.count_nonzero(equal) < BIT_EQUAL * equal.size:
            return f"only {equal.mean():.1%} of {kind} outputs are bit-equal: a rounding was lost"
    return None
