"""What can be proved of a value: its constant, type, last dimension, shape relative to another.

Everything here is conservative: None or False means "not proved", never "no".
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import TypeGuard

import numpy as np
import onnx_ir as ir

from fusenorm.ops.spec import DOMAIN, DTYPE_OF_ONNX, DTYPES, DType

_ELEMENTWISE = frozenset(
    "Add Sub Mul Div Pow Min Max Where PRelu And Or Xor Equal Less Greater Mod".split()
)
_KEEPS_SHAPE = frozenset(
    "Abs Cast CastLike Ceil Clip Cos Cosh Dropout Elu Erf Exp Floor Gelu HardSigmoid HardSwish "
    "Identity IsInf IsNaN LayerNormalization LeakyRelu Log LogSoftmax Mish Neg Not "
    "QuantizeLinear DequantizeLinear Reciprocal Relu RMSNormalization Round Selu Sigmoid Sign Sin "
    "Softmax Softplus Softsign Sqrt Swish Tanh ThresholdedRelu".split()
)
# In older ones operators broadcast by attributes, and Reshape has its shape in one.
OLDEST_OPSET = 7
_Dim = int | ir.SymbolicDim
_MAX_WALK = 256
_LAST_DIM = "fusenorm.last_dim"
_INFERRED = "fusenorm.inferred_shape"


def dtype_of(value: ir.Value) -> DType | None:
    """The value's float type by its short name, None if it is not a float or unknown."""
    return DTYPE_OF_ONNX.get(value.dtype) if value.dtype is not None else None


def is_constant(value: ir.Value | None) -> TypeGuard[ir.Value]:
    """Whether a value is one array in every run."""
    return value is not None and value.const_value is not None and not value.is_graph_input()


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The array behind a constant value, None for anything computed at run time."""
    return value.const_value.numpy() if is_constant(value) else None  # type: ignore[union-attr]


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


def made_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The standard node of this type that makes `value`."""
    node = value.producer() if value is not None else None
    return node if node is not None and (node.domain, node.op_type) == ("", op_type) else None


def reads_shape(node: ir.Node) -> bool:
    """Whether a node takes nothing of its input but the shape."""
    return node.domain == "" and node.op_type in ("Shape", "Size")


def dim_read(node: ir.Node) -> tuple[ir.Value, int] | None:
    """The value and the axis whose size a Gather of its shape is."""
    if (node.domain, node.op_type) != ("", "Gather"):
        return None
    shape_of = made_by(node.inputs[0], "Shape")
    index = constant(node.inputs[1])
    if shape_of is None or shape_of.attributes or index is None or index.size != 1:
        return None
    value, axis = shape_of.inputs[0], int(index.item())
    if value is None or value.shape is None or not -len(value.shape) <= axis < len(value.shape):
        return None
    return value, axis


def splits_columns(node: ir.Node) -> bool:
    """Whether a node is a standard Split along the last axis."""
    if (node.domain, node.op_type) != ("", "Split"):
        return False
    axis = attribute_int(node, "axis", 0)
    return any(value and is_last_axis(axis, value) for value in (node.inputs[0], node.outputs[0]))


def permutation(node: ir.Node | None) -> tuple[int, ...] | None:
    """The order a standard Transpose puts its axes in; None for other nodes, or if unknown."""
    if node is None or (node.domain, node.op_type) != ("", "Transpose"):
        return None
    if "perm" in node.attributes:
        return tuple(node.attributes["perm"].as_ints())
    source = node.inputs[0]
    assert source is not None
    known = rank(source)
    return None if known is None else tuple(reversed(range(known)))


def is_last_axis(axis: int, value: ir.Value) -> bool:
    """Whether `axis` provably names the last dimension of `value`."""
    return trailing_axes([axis], value) is not None


def trailing_axes(axes: Sequence[int], value: ir.Value) -> int | None:
    """How many `axes` there are, if they provably are the last ones of `value` and no others."""
    known = rank(value)
    if known is None and any(axis >= 0 for axis in axes):
        return None
    from_end = sorted(axis if axis < 0 else axis - known for axis in axes)  # type: ignore[operator]
    return len(axes) if axes and from_end == list(range(-len(axes), 0)) else None


def last_dim(value: ir.Value) -> int | None:
    """The size of the last dimension: from the shape, or from what `annotate` could prove."""
    if value.shape is not None and value.shape.rank() > 0:
        size = value.shape[-1]
        if isinstance(size, int):
            return size
    return value.meta.get(_LAST_DIM)


def trailing_dims(value: ir.Value, count: int) -> tuple[int, ...] | None:
    """The sizes of the last `count` dimensions; None unless each is known and, of several, > 0."""
    size = last_dim(value)
    if count == 1 or size is None:
        return None if size is None else (size,)
    known = rank(value)
    if known is None or known < count:
        return None
    dims = (*value.shape[-count:-1], size)  # type: ignore[index]
    return dims if all(isinstance(dim, int) and dim > 0 for dim in dims) else None


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


def assume_row(value: ir.Value, dtype: DType, size: int | None) -> None:
    """Record of a value nothing is known of what the operator that reads it requires."""
    if value.dtype is None:
        value.dtype = DTYPES[dtype].onnx
    if last_dim(value) is None:
        value.meta[_LAST_DIM] = size


def copy_facts(source: ir.Value, target: ir.Value) -> None:
    """Give `target`, the same tensor, all that is known of `source`, but no given names."""
    target.shape, target.type = source.shape, source.type
    if source.is_graph_output() and (dims := proved_dims(source)) is not None:
        target.shape = ir.Shape(dims)
    for key in (_LAST_DIM, _INFERRED):
        if key in source.meta:
            target.meta[key] = source.meta[key]


def replace(old: ir.Value, new: ir.Value) -> None:
    """Let `new` stand for `old` everywhere; as an output of the model in the shape given to it."""
    if old.is_graph_output():
        new.shape = old.shape
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def learn_shape(output: ir.Value, inferred: ir.Shape | None) -> None:
    """Record the shape of an output of the model as inference has it, not by its given names."""
    output.meta[_INFERRED] = inferred


def proved_dims(value: ir.Value) -> tuple[_Dim, ...] | None:
    """The shape; of an output of the model, whose names may be written by hand, as inferred."""
    if value.shape is None:
        return None
    if not value.is_graph_output():
        return tuple(value.shape)
    inferred = value.meta.get(_INFERRED)
    if inferred is not None:
        return tuple(inferred)
    return tuple(dim if isinstance(dim, int) else ir.SymbolicDim(None) for dim in value.shape)


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
    half = half_of(value)
    size = last_dim(half[0]) if half is not None else None
    return size // 2 if size is not None else None


def _last_element(shape: ir.Value | None) -> int | None:
    """The last entry of a computed shape, where it is a Concat ending in a constant."""
    node = shape.producer() if shape is not None else None
    if node is None or node.op_type != "Concat" or node.domain != "":
        return None
    tail = constant(node.inputs[-1])
    if tail is None or not tail.size or int(tail.flat[-1]) <= 0:
        return None
    return int(tail.flat[-1])


def is_vector(value: ir.Value, *dims: int) -> bool:
    """Whether `value` provably is one row of shape `dims`, up to 1s in front of either."""
    if value.shape is None or value.shape.rank() == 0:
        return False
    own, wanted = (list(itertools.dropwhile(lambda dim: dim == 1, d)) for d in (value.shape, dims))
    return own == wanted


def same_shape(a: ir.Value, b: ir.Value) -> bool:
    """Whether both provably have one shape: equal dims or symbols, or one origin.

    The origin of a value is found by walking back through nodes that keep every dimension but the
    last (elementwise with a scalar or vector, a linear map, a split of the last axis).
    """
    if a is b:
        return True
    own, other = proved_dims(a), proved_dims(b)
    if equal_dims(own, other):
        return True
    size = last_dim(a)
    return size is not None and size == last_dim(b) and _origin(a) is _origin(b)


def same_leading_dims(a: ir.Value, b: ir.Value) -> bool:
    """Whether both provably have the same dimensions but for the last, in the same order.

    A name that stands twice says nothing of the order.
    """
    own, other = proved_dims(a), proved_dims(b)
    if own is None or other is None or not equal_dims(own[:-1], other[:-1]):
        return False
    names = [dim for dim in own[:-1] if isinstance(dim, ir.SymbolicDim)]
    return len(set(names)) == len(names)


def equal_dims(a: Sequence[_Dim] | None, b: Sequence[_Dim] | None) -> bool:
    """Whether both are known and every dimension is the same number or the same named symbol."""
    if a is None or b is None or len(a) != len(b):
        return False
    return all(
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
        for row, other in (node.inputs, tuple(reversed(node.inputs))):
            assert row is not None
            array = constant(other)
            if array is not None and array.ndim <= 1 and last_dim(row) == last_dim(value):
                return row
        return None
    if node.op_type == "Split":
        return node.inputs[0] if splits_columns(node) else None
    half = half_of(value)
    return half[0] if half is not None else None


def unused(name: str, graph: ir.Graph) -> str:
    """`name`, or the first numbered one no value of the graph has."""
    taken = {out.name for node in graph for out in node.outputs} | set(graph.initializers)
    taken.update(given.name for given in graph.inputs)
    numbered = (f"{name}_{count}" for count in itertools.count(2))
    return next(each for each in itertools.chain((name,), numbered) if each not in taken)


def operands(node: ir.Node) -> Iterator[ir.Value]:
    """Every value a node reads, those its subgraphs capture included."""
    yield from (value for value in node.inputs if value is not None)
    for body in bodies(node):
        yield from body.outputs
        for inner in body:
            yield from operands(inner)


def bodies(node: ir.Node) -> Iterator[ir.Graph]:
    """The subgraphs of an If, Loop or Scan."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def half_of(value: ir.Value) -> tuple[ir.Value, str, int] | None:
    """(source, "halves" or "interleaved", 0 or 1) if `value` is that half of source's columns.

    Knows Split into two equal parts, Slice and Gather with constants, and the parts of a view
    [..., 2, D] or [..., D, 2] of source.
    """
    node = value.producer()
    if node is None or node.domain != "":
        return None
    if node.op_type == "Split":
        source = node.inputs[0]
        assert source is not None
        if len(node.outputs) != 2 or not splits_columns(node):
            return None
        sizes, size = _split_sizes(node), last_dim(source)
        even = sizes[0] == sizes[1] if sizes else size is not None and size % 2 == 0
        return (source, "halves", list(node.outputs).index(value)) if even else None
    view = view_of(value)
    if view is not None:
        return view.source, "halves" if view.axis == -2 else "interleaved", view.part
    found = columns_of(value)
    if found is None or found.size % 2:
        return None
    for part in (0, 1):
        if found.places == tuple(range(part * found.size // 2, (part + 1) * found.size // 2)):
            return found.source, "halves", part
        if found.places == tuple(range(part, found.size, 2)):
            return found.source, "interleaved", part
    return None


@dataclasses.dataclass(frozen=True)
class Columns:
    """Some columns of a row.

    Attributes:
        source: the row.
        size: how many columns it has.
        places: which of them.
    """

    source: ir.Value
    size: int
    places: tuple[int, ...]


def columns_of(value: ir.Value) -> Columns | None:
    """The columns `value` is, if a Slice or Gather with constants takes them of the last axis."""
    node = value.producer()
    source = node.inputs[0] if node is not None and node.inputs else None
    if source is None or not (size := last_dim(source)):
        return None
    taken = _taken(value, size)
    if taken is None or not taken.keeps or not is_last_axis(taken.axis, source):
        return None
    return Columns(source, size, taken.places)


@dataclasses.dataclass(frozen=True)
class View:
    """One part of the pairs a Reshape makes of a row.

    Attributes:
        source: the row, [..., 2D].
        target: the shape it is given.
        pair: the end of that shape: (2, D) if `axis` is -2, (D, 2) if it is -1.
        axis: the axis of the two parts.
        part: which of them.
    """

    source: ir.Value
    target: ir.Value
    pair: tuple[int, int]
    axis: int
    part: int


def view_of(value: ir.Value) -> View | None:
    """The view `value` provably is a part of, without the axis of the parts."""
    squeeze = made_by(value, "Squeeze")
    part = squeeze.inputs[0] if squeeze is not None else value
    assert part is not None
    taken = _taken(part, 2)
    if taken is None or len(taken.places) != 1 or taken.keeps == (part is value):
        return None
    pairs = taken.source
    reshape = made_by(pairs, "Reshape")
    after = proved_dims(pairs)
    if reshape is None or after is None:
        return None
    (source, target), known = reshape.inputs, len(after)
    assert source is not None
    assert target is not None
    axis = taken.axis - known if taken.axis >= 0 else taken.axis
    if squeeze is not None and squeezed_axis(squeeze) not in (axis, axis + known):
        return None
    before, size = proved_dims(source), last_dim(source)
    if before is None or not size or size % 2:
        return None
    pair = (2, size // 2) if axis == -2 else (size // 2, 2)
    lead, kept = before[:-1], after[:-2]
    # Where all but one of the leading dimensions stay, so does that one.
    moved = [x for x, y in zip(lead, kept, strict=False) if not equal_dims((x,), (y,))]
    whole = len(lead) == len(kept) and len(moved) <= 1
    if not whole or axis not in (-2, -1) or after[-2:] != pair:
        return None
    return View(source, target, pair, axis, taken.places[0])


@dataclasses.dataclass(frozen=True)
class _Taken:
    """What a node takes of an axis of a value: which places, and whether the axis stays."""

    source: ir.Value
    axis: int
    places: tuple[int, ...]
    keeps: bool = True


def _taken(value: ir.Value, size: int) -> _Taken | None:
    """What a Split in two, a Slice or a Gather takes of an axis of `size` places, if constant."""
    node = value.producer()
    if node is None or node.domain != "" or node.op_type not in ("Split", "Gather", "Slice"):
        return None
    source = node.inputs[0]
    assert source is not None
    if node.op_type == "Split":
        if not len(node.outputs) == size == 2:
            return None
        return _Taken(source, attribute_int(node, "axis", 0), (list(node.outputs).index(value),))
    if node.op_type == "Gather":
        indices = constant(node.inputs[1])
        if indices is None or indices.ndim > 1:
            return None
        places = tuple(int(index) % size for index in indices.flat)
        return _Taken(source, attribute_int(node, "axis", 0), places, indices.ndim == 1)
    bounds = [constant(operand) for operand in node.inputs[1:]]
    if len(bounds) < 3 or any(bound is None or bound.size != 1 for bound in bounds):
        return None
    start, end, axis, *steps = (int(bound.item()) for bound in bounds)  # type: ignore[union-attr]
    if steps and steps[0] < 1:  # runtimes clamp bounds in their own ways
        return None
    places = tuple(range(size)[slice(start, end, *steps)])
    return _Taken(source, axis, places)


def squeezed_axis(node: ir.Node) -> int | None:
    """The one axis a Squeeze drops or an Unsqueeze adds; None if that cannot be known."""
    axes: list[int] = []
    if "axes" in node.attributes:
        axes = list(node.attributes["axes"].as_ints())
    elif len(node.inputs) > 1:
        given = constant(node.inputs[1])
        axes = [] if given is None else [int(axis) for axis in given.flat]
    return axes[0] if len(axes) == 1 else None


def _split_sizes(node: ir.Node) -> list[int] | None:
    """Explicit part sizes of a Split; None when the standard makes them equal."""
    if "split" in node.attributes:
        return list(node.attributes["split"].as_ints())
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        sizes = constant(node.inputs[1])
        return [-1, -2] if sizes is None else [int(size) for size in sizes]
    return None
