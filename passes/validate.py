"""Proof of a rewrite when it is made: matched subgraph against fused op, on hard rows.

Both sides are evaluated in float64, where equal algebra agrees to rounding and a wrong axis,
epsilon or constant shows; 16-bit rewrites also in their own type, where a lost rounding shows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir

from fusenorm.ops import parse
from fusenorm.ops.spec import DOMAIN, DTYPE_OF_ONNX, DTYPES, DType
from fusenorm.passes import facts
from fusenorm.passes.evaluate import EvaluationError, evaluate
from fusenorm.passes.pattern import Refusal, node_name
from fusenorm.passes.rewrite import Rewrite

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
class Validator:
    """Checks proposals; hand it to a RewritePass.

    Args:
        seed: of the random rows.
    """

    seed: int = 0

    def __call__(self, rewrite: Rewrite, opset: int) -> Refusal | None:
        """None if both sides agree, else a refusal with the largest difference found."""
        name = node_name(rewrite.root)
        rows = {}
        rng = np.random.default_rng(self.seed)
        for slot, value in zip(rewrite.spec.inputs, rewrite.inputs, strict=True):
            known = facts.constant(value)
            if known is not None and slot.layout == "vector":
                rows[value] = np.asarray(known, np.float64)
                continue
            # An elementwise op may not know its width; any will do.
            size = facts.last_dim(value) or ANY_WIDTH
            rows[value] = hard_rows(rng, size, facts.rank(value) or 3, slot.layout == "vector")
        wanted = [value for value in rewrite.outputs if value is not None]
        dtype = rewrite.spec.inputs[0].dtype
        kinds: list[DType] = ["f64"] if dtype in ("f32", "f64") else ["f64", dtype]
        for kind in kinds:
            feeds = {
                value: array.astype(DTYPES[_type(value, kind)].numpy)
                for value, array in rows.items()
            }
            try:
                source = _run(_source_nodes(wanted, rows), rows, wanted, feeds, opset, kind)
                fused = _run_fused(rewrite, feeds, opset, kind)
            except EvaluationError as error:
                return Refusal("check_failed", name, f"cannot be evaluated: {error}")
            kept = [out for out, value in zip(fused, rewrite.outputs, strict=True) if value]
            detail = _difference(source, kept, dtype, kind)
            if detail:
                return Refusal("check_failed", name, detail)
        return None


def _type(value: ir.Value, kind: DType) -> DType:
    """The type `value` has in an evaluation in `kind`."""
    own = facts.dtype_of(value)
    return kind if kind == "f64" or own is None else own


def hard_rows(rng: np.random.Generator, size: int, rank: int, vector: bool) -> np.ndarray:
    """Rows that tell formulas apart: plain, off-centre, tiny, large, zero.

    Leading dimensions all differ, so that a reduction over one of them shows. Returns float64 of
    `rank` dimensions, or [size] for a vector.
    """
    if vector:
        return rng.normal(1.0, 0.5, size)
    leading = LEADING[len(LEADING) - rank + 1 :] if rank > 1 else ()
    plain = rng.normal(size=(math.prod(leading), size))
    for start in range(0, len(plain), 8):
        block = plain[start : start + 8]
        for row, (scale, offset) in zip(block, SHAPES_OF_ROWS, strict=False):
            row[:] = scale * row + offset
    plain = plain.reshape(*leading, size)
    return plain.reshape(size) if rank == 1 else plain


def _source_nodes(wanted: Sequence[ir.Value], stop: Mapping[ir.Value, object]) -> list[ir.Node]:
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


def _run(
    nodes: Sequence[ir.Node],
    inputs: Iterable[ir.Value],
    outputs: Sequence[ir.Value],
    feeds: Mapping[ir.Value, np.ndarray],
    opset: int,
    kind: DType,
) -> list[np.ndarray]:
    """Evaluate source nodes with every float type replaced by `kind` (f64) or as written."""
    retype = kind == "f64"
    names: dict[ir.Value, str] = {}

    def name_of(value: ir.Value | None) -> str:
        return "" if value is None else names.setdefault(value, f"v{len(names)}")

    protos, constants, functions = [], {}, {}
    given = set(inputs)
    for node in nodes:
        proto = ir.serde.serialize_node(node)
        del proto.input[:], proto.output[:]
        proto.input.extend(name_of(value) for value in node.inputs)
        proto.output.extend(name_of(value) for value in node.outputs)
        for value in node.inputs:
            array = facts.constant(value) if value not in given else None
            if value is not None and array is not None:
                wide = retype and value.dtype in DTYPE_OF_ONNX
                constants[name_of(value)] = array.astype(np.float64) if wide else array
        if retype:
            _retype_cast(proto)
        if node.domain == DOMAIN:
            spec = parse(node.op_type)
            assert spec is not None
            spec = spec.with_dtype("f64") if retype else spec
            proto.op_type = spec.op_type
            functions[spec.op_type] = spec.function(opset)
        protos.append(proto)
    return evaluate(
        protos,
        {**constants, **{name_of(value): array for value, array in feeds.items()}},
        [name_of(value) for value in outputs],
        functions.values(),
        opset,
    )


def _retype_cast(proto: onnx.NodeProto) -> None:
    if proto.op_type == "Cast" and proto.domain == "":
        for attribute in proto.attribute:
            if attribute.name == "to" and ir.DataType(attribute.i) in DTYPE_OF_ONNX:
                attribute.i = int(ir.DataType.DOUBLE)


def _run_fused(
    rewrite: Rewrite, feeds: Mapping[ir.Value, np.ndarray], opset: int, kind: DType
) -> list[np.ndarray]:
    spec = rewrite.spec.with_dtype("f64") if kind == "f64" else rewrite.spec
    arrays = {
        slot.name: feeds[value].astype(DTYPES[slot.dtype].numpy)
        for slot, value in zip(spec.inputs, rewrite.inputs, strict=True)
    }
    node = onnx.helper.make_node(
        spec.op_type,
        [slot.name for slot in spec.inputs],
        [slot.name for slot in spec.outputs],
        domain=DOMAIN,
    )
    for name in spec.attributes:
        node.attribute.append(onnx.helper.make_attribute(name, float(rewrite.attributes[name])))
    return evaluate([node], arrays, list(node.output), [spec.function(opset)], opset)


def _difference(
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
        error = np.abs(wide_a - wide_b, where=finite, out=np.zeros_like(size))
        worst = float((error / rows).max(initial=0.0))
        if worst > ALGEBRA_BOUND[dtype]:
            return f"differs by {worst:.1e} of a row's largest output in {kind}"
        if kind != "f64":
            equal = float(np.mean(np.asarray(a) == np.asarray(b))) if a.size else 1.0
            if equal < BIT_EQUAL:
                return f"only {equal:.1%} of {kind} outputs are bit-equal: a rounding was lost"
    return None
