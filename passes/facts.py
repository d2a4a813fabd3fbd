"""What can be proved of a value: its constant, type, last dimension, shape relative to another.

Everything here is conservative: None or False means "not proved", never "no".
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from fusenorm.ops.spec import DOMAIN, DTYPE_OF_ONNX, DType

_ELEMENTWISE = frozenset(
    "Add Sub Mul Div Pow Min Max Where PRelu And Or Xor Equal Less Greater Mod".split()
)
_KEEPS_SHAPE = frozenset(
    "Abs Cast CastLike Ceil Clip Cos Cosh Dropout Elu Erf Exp Floor Gelu HardSigmoid HardSwish "
    "Identity IsInf IsNaN LayerNormalization LeakyRelu Log LogSoftmax Mish Neg Not "
    "QuantizeLinear DequantizeLinear Reciprocal Relu RMSNormalization Round Selu Sigmoid Sign Sin "
    "Softmax Softplus Softsign Sqrt Swish Tanh ThresholdedRelu".split()
)
_MAX_WALK = 256
_LAST_DIM = "fusenorm.last_dim"


def dtype_of(value: ir.Value) -> DType | None:
    """The value's float type by its short name, None if it is not a float or unknown."""
    return DTYPE_OF_ONNX.get(value.dtype) if value.dtype is not None else None


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The array behind a constant value, None for anything computed at run time."""
    if value is None or value.const_value is None:
        return None
    if value.is_graph_input():
        return None
    return value.const_value.numpy()


def scalar(value: ir.Value | None) -> float | None:
    """The number behind a constant of one element."""
    if value is None or value.const_value is None or value.const_value.size != 1:
        return None
    array = constant(value)
    # More dimensions than one could give what it meets a higher rank.
    if array is None or array.dtype.kind in "USO" or array.ndim > 1:
        return None
    return float(array.reshape(()).astype(np.float64))


def rank(value: ir.Value) -> int | None:
    """The number of dimensions, if known."""
    return value.shape.rank() if value.shape is not None else None


def attribute_int(node: ir.Node, name: str, default: int) -> int:
    """An integer attribute or the default the standard gives it."""
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def is_last_axis(axis: int, value: ir.Value) -> bool:
    """Whether `axis` provably names the last dimension of `value`."""
    if axis == -1:
        return True
    known = rank(value)
    return known is not None and axis == known - 1


def last_dim(value: ir.Value) -> int | None:
    """The size of the last dimension: from the shape, or from what `annotate` could prove."""
    if value.shape is not None and value.shape.rank() > 0:
        size = value.shape[-1]
        if isinstance(size, int):
            return size
    return value.meta.get(_LAST_DIM)


def annotate(graph: ir.Graph) -> None:
    """Prove last dimensions where shape inference lost them (Reshape to a computed shape ...).

    Nodes must be in topological order.
    """
    for node in graph:
        for value in node.outputs:
            if last_dim(value) is None:
                size = _infer_last_dim(node, value)
                if size is not None:
                    value.meta[_LAST_DIM] = size


def copy_facts(source: ir.Value, target: ir.Value) -> None:
    """Give `target`, which stands for the same tensor, all that is known of `source`."""
    target.shape, target.type = source.shape, source.type
    if _LAST_DIM in source.meta:
        target.meta[_LAST_DIM] = source.meta[_LAST_DIM]


def _infer_last_dim(node: ir.Node, value: ir.Value) -> int | None:
    if node.domain != "" or not node.inputs or node.inputs[0] is None:
        return None
    first = node.inputs[0]
    second = node.inputs[1] if len(node.inputs) > 1 else None
    if node.op_type in _KEEPS_SHAPE:
        return last_dim(first) if value is node.outputs[0] else None
    if node.op_type in _ELEMENTWISE:
        sizes = [last_dim(operand) for operand in node.inputs if operand is not None]
        # Broadcasting keeps any size that is not 1; to conclude 1, all must be known.
        wide = [size for size in sizes if size not in (None, 1)]
        return wide[0] if wide else (1 if None not in sizes else None)
    if node.op_type == "MatMul" and second is not None and (rank(second) or 0) >= 2:
        return last_dim(second)
    if node.op_type == "Gather" and attribute_int(node, "axis", 0) == 0:
        return last_dim(first) if (rank(first) or 0) >= 2 else None
    if node.op_type == "Reshape":
        target = constant(second)
        if target is None:
            return _last_element(second)
        return int(target[-1]) if target.size and target[-1] > 0 else None
    if half_of(value) is not None:
        size = last_dim(first)
        return size // 2 if size is not None else None
    return None


def _last_element(shape: ir.Value | None) -> int | None:
    """The last entry of a computed shape, where it is a Concat ending in a constant."""
    node = shape.producer() if shape is not None else None
    if node is None or node.op_type != "Concat":
        return None
    tail = constant(node.inputs[-1])
    if tail is None or not tail.size or int(tail.reshape(-1)[-1]) <= 0:
        return None
    return int(tail.reshape(-1)[-1])


def is_vector(value: ir.Value, size: int) -> bool:
    """Whether `value` provably is one row of `size` numbers: [size] or [1, ..., 1, size]."""
    if value.shape is None or value.shape.rank() == 0:
        return False
    return value.shape[-1] == size and all(dim == 1 for dim in list(value.shape)[:-1])


def same_shape(a: ir.Value, b: ir.Value) -> bool:
    """Whether both provably have one shape: equal dims or symbols, or one origin.

    The origin of a value is found by walking back through nodes that keep every dimension but
    the last (elementwise with a scalar or vector, a linear map, a split of the last axis).
    """
    if a is b:
        return True
    if a.shape is not None and b.shape is not None and _equal_dims(a.shape, b.shape):
        return True
    size = last_dim(a)
    return size is not None and size == last_dim(b) and _origin(a) is _origin(b)


def _equal_dims(a: ir.Shape, b: ir.Shape) -> bool:
    """Whether every dimension is the same number or the same named symbol."""
    return a.rank() == b.rank() and all(
        x == y and (isinstance(x, int) or x.value is not None) for x, y in zip(a, b, strict=True)
    )


def _origin(value: ir.Value) -> ir.Value:
    """The value whose leading dimensions `value` shares, as far back as can be proved."""
    for _ in range(_MAX_WALK):
        node = value.producer()
        source = _row_source(node, value) if node is not None else None
        if source is None:
            return value
        value = source
    return value


def _row_source(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """The input of `node` whose leading dimensions its output has."""
    if node.domain not in ("", DOMAIN):
        return None
    if node.op_type in _KEEPS_SHAPE:
        return node.inputs[0] if value is node.outputs[0] else None
    if node.op_type == "MatMul":
        weight = node.inputs[1]
        return node.inputs[0] if weight is not None and rank(weight) == 2 else None
    if node.op_type in ("Add", "Sub", "Mul", "Div", "Pow"):
        size = last_dim(value)
        for row, other in (node.inputs, tuple(reversed(node.inputs))):
            if row is None or other is None or size is None or constant(other) is None:
                continue
            small = constant(other).ndim <= 1  # type: ignore[union-attr]
            if small and last_dim(row) == size:
                return row
        return None
    if node.op_type == "Split" and node.inputs[0] is not None:
        return node.inputs[0] if is_last_axis(attribute_int(node, "axis", 0), value) else None
    if node.op_type == "Slice" and half_of(value) is not None:
        return node.inputs[0]
    return None


def operands(node: ir.Node) -> Iterator[ir.Value]:
    """Every value a node reads, those its subgraphs capture included."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            bodies = [attribute.as_graph()]
        elif attribute.type == ir.AttributeType.GRAPHS:
            bodies = list(attribute.as_graphs())
        else:
            continue
        for body in bodies:
            yield from body.outputs
            for inner in body:
                yield from operands(inner)


def half_of(value: ir.Value) -> tuple[ir.Value, str, int] | None:
    """(source, "halves" or "interleaved", 0 or 1) if `value` is that half of source's columns.

    Knows Split into two equal parts and Slice with constant bounds.
    """
    node = value.producer()
    if node is None or node.domain != "" or node.inputs[0] is None:
        return None
    source = node.inputs[0]
    if node.op_type == "Split":
        if len(node.outputs) != 2 or not is_last_axis(attribute_int(node, "axis", 0), source):
            return None
        sizes = _split_sizes(node)
        if sizes is not None and sizes[0] != sizes[1]:
            return None
        size = last_dim(source)
        if sizes is None and size is not None and size % 2:
            return None
        if sizes is None and size is None:
            return None
        return source, "halves", list(node.outputs).index(value)
    if node.op_type != "Slice" or len(node.inputs) < 4:
        return None
    bounds = [constant(operand) for operand in node.inputs[1:]]
    size = last_dim(source)
    if any(bound is None or bound.size != 1 for bound in bounds) or size is None or size % 2:
        return None
    start, end, axis, *steps = (int(bound.reshape(())) for bound in bounds)  # type: ignore[union-attr]
    if not is_last_axis(axis, source):
        return None
    columns = range(size)[slice(start, end, steps[0] if steps else 1)]
    for part in (0, 1):
        if columns == range(part * size // 2, (part + 1) * size // 2):
            return source, "halves", part
        if columns == range(part, size, 2):
            return source, "interleaved", part
    return None


def _split_sizes(node: ir.Node) -> list[int] | None:
    """Explicit part sizes of a Split; None when the standard makes them equal."""
    if "split" in node.attributes:
        return list(node.attributes["split"].as_ints())
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        sizes = constant(node.inputs[1])
        return [-1, -2] if sizes is None else [int(size) for size in sizes]
    return None
