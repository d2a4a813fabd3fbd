"""Small computations on constants, done once here instead of at every run."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from fusenorm.passes import facts
from fusenorm.passes.evaluate import EvaluationError, evaluate

# Larger results would grow the file; shapes, scalars and norm scales are far below.
FOLD_LIMIT = 1 << 16
# Ops whose numpy result is the runtime's to the bit: integers, and IEEE-rounded arithmetic.
FOLDABLE = frozenset(
    "Add Sub Mul Div Neg Sqrt Cast Concat Gather Slice Reshape Squeeze Unsqueeze Transpose "
    "Identity Flatten Equal Where Range".split()
)


# Casts whose numpy result is the runtime's; others saturate or print in their own ways.
CASTABLE = frozenset({"FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE", "INT32", "INT64", "BOOL"})


class FoldConstants(ir.passes.InPlacePass):
    """Replace small nodes with constant inputs, and Shape of a known dimension, by constants.

    Args:
        limit: largest result in elements.
    """

    name = "fold_constants"

    def __init__(self, limit: int = FOLD_LIMIT) -> None:
        super().__init__()
        self.limit = limit

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        opset = model.opset_imports.get("", 0)
        if opset < facts.OLDEST_OPSET:
            return ir.passes.PassResult(model, False)
        for graph in model.graphs():
            facts.annotate(graph)
            for node in list(graph):
                array = self._fold(node, opset)
                if array is not None:
                    _replace(graph, node, array)
                    modified = True
        return ir.passes.PassResult(model, modified)

    def _fold(self, node: ir.Node, opset: int) -> np.ndarray | None:
        if node.domain != "" or node.outputs[0].is_graph_output():
            return None
        if node.op_type == "Slice" and not _slices_forwards(node):
            return None  # runtimes clamp bounds in their own ways
        if node.op_type in ("Gather", "Slice"):
            known = _picked_dims(node)
            if known is not None:
                return known
        if node.op_type in ("Shape", "Size"):
            return _static_shape(node)
        if node.op_type not in FOLDABLE:
            return None
        if node.op_type == "Cast" and not _castable(node):
            return None
        arrays = [array for v in node.inputs if (array := facts.constant(v)) is not None]
        if len(arrays) != len(node.inputs) or sum(array.size for array in arrays) > self.limit:
            return None
        if any(array.dtype.kind in "USO" for array in arrays):
            return None  # strings have no size in bytes
        if node.op_type == "Range" and arrays[0].dtype.kind not in "iu":
            return None  # runtimes add up fractions in their own ways
        proto = ir.serde.serialize_node(node)
        feeds = dict(zip(proto.input, arrays, strict=True))
        try:
            (result,) = evaluate([proto], feeds, proto.output, (), opset)
        except EvaluationError:
            return None  # a branch never taken may hold a node that cannot run
        if node.op_type == "Cast" and not _same_by_way_of_f32(arrays[0], result):
            return None
        return result if result.size <= self.limit else None


def _slices_forwards(node: ir.Node) -> bool:
    steps = node.inputs[4] if len(node.inputs) > 4 else None
    array = facts.constant(steps)
    return steps is None or (array is not None and bool(np.all(array > 0)))


def _castable(node: ir.Node) -> bool:
    source = node.inputs[0]
    assert source is not None
    target = ir.DataType(node.attributes["to"].as_int())
    return source.dtype is not None and {source.dtype.name, target.name} <= CASTABLE


def _same_by_way_of_f32(source: np.ndarray, result: np.ndarray) -> bool:
    """Whether a runtime that rounds to f32 first, as some do, has the same 16-bit numbers."""
    if result.dtype.itemsize != 2:
        return True
    with np.errstate(over="ignore"):
        twice = source.astype(np.float32).astype(result.dtype)
    return np.array_equal(twice, result, equal_nan=True)


def _static_shape(node: ir.Node) -> np.ndarray | None:
    """What Shape or Size returns, where the dimensions it reads are known.

    The size of a Shape's own result is the rank, known even if no dimension is.
    """
    source = node.inputs[0]
    assert source is not None
    if source.shape is None:
        return None
    # Size has neither attribute: it reads all of them.
    start = facts.attribute_int(node, "start", 0)
    end = facts.attribute_int(node, "end", source.shape.rank())
    dims = list(source.shape)[start:end]
    if not all(isinstance(dim, int) for dim in dims):
        return None
    sizes = np.array(dims, np.int64)
    return sizes if node.op_type == "Shape" else np.array(sizes.prod(), np.int64)


def _picked_dims(node: ir.Node) -> np.ndarray | None:
    """Gather or Slice of Shape(x) by constants, where the dimensions of x it picks are known."""
    shape_of = facts.made_by(node.inputs[0], "Shape")
    numbers = [facts.constant(value) for value in node.inputs[1:]]
    if shape_of is None or shape_of.attributes:
        return None
    source = shape_of.inputs[0]
    assert source is not None
    rank = facts.rank(source)
    places = numbers[0] if node.op_type == "Gather" else _sliced(rank, numbers)
    if places is None:
        return None
    dims = [_dim(source, rank, int(place)) for place in places.flat]
    if not all(isinstance(dim, int) for dim in dims):
        return None
    return np.array(dims, np.int64).reshape(places.shape)


def _sliced(rank: int | None, numbers: list[np.ndarray | None]) -> np.ndarray | None:
    """The places Slice takes of a shape, by starts, ends, perhaps axes and steps, one of each."""
    known = [int(array.item()) for array in numbers if array is not None and array.size == 1]
    if rank is None or len(known) != len(numbers) or len(known) < 2:
        return None
    start, end, step = *known[:2], known[3] if len(known) == 4 else 1
    return np.arange(rank)[start:end:step]


def _dim(source: ir.Value, rank: int | None, place: int) -> object:
    if place == -1 or (rank is not None and place == rank - 1):
        return facts.last_dim(source)
    if source.shape is not None and -source.shape.rank() <= place < source.shape.rank():
        return source.shape[place]
    return None


def _replace(graph: ir.Graph, node: ir.Node, array: np.ndarray) -> None:
    old = node.outputs[0]
    new = ir.val(old.name, const_value=ir.tensor(array, name=old.name))
    old.replace_all_uses_with(new)
    graph.remove(node, safe=True)
    graph.register_initializer(new)
