"""Shapes and types of every value, by ONNX's own inference with data propagation."""

from __future__ import annotations

import itertools
import math
import re

import google.protobuf.message
import onnx
import onnx_ir as ir

from fusenorm.passes import facts

_NO_TENSOR = re.compile("Sequence|Optional")
# Larger constants are not shapes, and inference copies the model.
_SHAPE_BYTES = 1000
_INVENTED = "unk__"  # names of sizes that ONNX makes up
_SOLVED = "fusenorm.solved"  # the shape of a value that inference leaves open
_ROUNDS = 4
_FAILURES = (
    RuntimeError,
    ValueError,
    google.protobuf.message.Error,
    onnx.shape_inference.InferenceError,
)


class InferShapes(ir.passes.InPlacePass):
    """ONNX shape inference with data propagation; a model it cannot handle stays as it is.

    It leaves a size open that a Reshape infers from its input (-1): where all others are the same
    on both sides, it is what is left of the known ones. And it leaves open how far a Range counts
    to a size. Inference goes on with what is found, but not in a model with bodies: what is known
    there might contradict a branch that is never taken, which onnxruntime refuses.
    Initializers that a caller may override are unknown to it. A model that holds sequences or
    optionals keeps the types it came with.
    """

    name = "infer_shapes"

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        if any(_NO_TENSOR.search(node.op_type) for node in model.graph.all_nodes()):
            return ir.passes.PassResult(model, False)
        modified, types = False, _Types()
        solves = not any(True for node in model.graph for _ in facts.bodies(node))
        for _ in range(_ROUNDS):
            try:
                inferred = onnx.shape_inference.infer_shapes(_proto(model), data_prop=True)
            except _FAILURES:
                return ir.passes.PassResult(model, modified)
            modified |= types.give(model.graph, inferred.graph)
            if not solves or not _solve(model.graph):
                break
            modified = True
        return ir.passes.PassResult(model, modified)


def _proto(model: ir.Model) -> onnx.ModelProto:
    """The model for inference, solved values made of inputs: it would invent names for them."""
    proto = _without_weights(model)
    solved = [node for node in model.graph if node.outputs and _SOLVED in node.outputs[0].meta]
    if not solved:
        return proto
    for info in proto.graph.value_info:
        _forget_names(info, _INVENTED)  # what they stand for may be known now
    taken = {info.name for info in (*proto.graph.input, *proto.graph.initializer)}
    taken.update(name for node in proto.graph.node for name in node.output)
    places = {node: index for index, node in enumerate(model.graph)}
    for node in solved:
        output = node.outputs[0]
        given = proto.graph.input.add()
        ir.serde.serialize_value_into(given, output)
        numbered = (f"{output.name}_given_{count}" for count in itertools.count())
        given.name = next(name for name in numbered if name not in taken)
        taken.add(given.name)
        identity = onnx.helper.make_node("Identity", [given.name], [str(output.name)])
        proto.graph.node[places[node]].CopyFrom(identity)
    return proto


def _without_weights(model: ir.Model) -> onnx.ModelProto:
    """The model, its large and overridable initializers being inputs, its outputs inner values."""
    proto = onnx.ModelProto(ir_version=model.ir_version)
    for domain, version in model.opset_imports.items():
        proto.opset_import.add(domain=domain, version=version)
    proto.functions.extend(map(ir.serde.serialize_function, model.functions.values()))
    graph = proto.graph
    graph.input.extend(map(ir.serde.serialize_value, model.graph.inputs))
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if value.is_graph_input():
            continue
        if tensor is None or tensor.nbytes > _SHAPE_BYTES:
            graph.input.append(ir.serde.serialize_value(value))
        else:
            graph.initializer.append(ir.serde.serialize_tensor(tensor))
            graph.initializer[-1].name = str(value.name)
    for node in model.graph:
        ir.serde.serialize_node_into(graph.node.add(), node)
        _forget_names_in_bodies(graph.node[-1])
        for value in node.outputs:
            if value.type is not None:
                ir.serde.serialize_value_into(graph.value_info.add(), value)
                if value.is_graph_output():
                    _forget_names(graph.value_info[-1])
    return proto


def _solve(graph: ir.Graph) -> bool:
    """Give values shapes that inference left open; whether there was any such."""
    found = False
    for node in graph:
        output = node.outputs[0] if node.outputs else None
        if output is None or output.dtype is None or output.is_graph_output():
            continue
        shape = output.meta.get(_SOLVED) or _open_shape(node)
        if shape is not None:
            found |= _SOLVED not in output.meta
            output.shape = output.meta[_SOLVED] = shape
    return found


def _open_shape(node: ir.Node) -> ir.Shape | None:
    source = node.inputs[0] if node.inputs else None
    if node.domain != "" or source is None:
        return None
    if node.op_type == "Reshape" and len(node.inputs) > 1:
        axis = _open_axis(node.inputs[1])
        return None if axis is None else _solved(source.shape, node.outputs[0].shape, axis)
    return _counted(node) if node.op_type == "Range" else None


def _open_axis(target: ir.Value | None) -> int | None:
    """Where the one -1 is in a shape: a constant, or a Concat of sizes and constants."""
    joined = facts.made_by(target, "Concat")
    parts = [target] if joined is None else list(joined.inputs)
    entries: list[int | None] = []
    for part in parts:
        array = facts.constant(part)
        if array is not None:
            entries += [int(size) for size in array.flat]
        elif joined is not None and part is not None and part.shape == ir.Shape([1]):
            entries.append(None)
        else:
            return None
    return entries.index(-1) if -1 in entries else None


def _counted(node: ir.Node) -> ir.Shape | None:
    """The shape of a Range up to a size of some value, in steps of 1 from 0."""
    start, limit, step = node.inputs
    counter = limit.producer() if limit is not None else None
    read = facts.dim_read(counter) if counter is not None else None
    if read is None or facts.scalar(start) != 0 or facts.scalar(step) != 1:
        return None
    value, axis = read
    dims = facts.proved_dims(value)
    assert dims is not None
    return ir.Shape([dims[axis]])


def _solved(source: ir.Shape | None, shape: ir.Shape | None, axis: int) -> ir.Shape | None:
    """`shape` with the size of `axis`, a name so far, if the other names are those of `source`."""
    if source is None or shape is None or axis >= len(shape) or isinstance(shape[axis], int):
        return None
    left = [dim for place, dim in enumerate(shape) if place != axis]
    for dim in source:
        if isinstance(dim, ir.SymbolicDim):
            if dim.value is None or dim not in left:
                return None
            left.remove(dim)
    if not all(isinstance(dim, int) for dim in left):
        return None
    before, after = (
        math.prod(dim for dim in dims if isinstance(dim, int)) for dims in (source, left)
    )
    if not after or before % after:
        return None
    dims = list(shape)
    dims[axis] = before // after
    return ir.Shape(dims)


def _forget_names(info: onnx.ValueInfoProto, prefix: str = "") -> None:
    """Take away names of sizes, such as were written by hand, for nothing to be concluded."""
    for dim in info.type.tensor_type.shape.dim:
        if dim.dim_param.startswith(prefix) and dim.dim_param:
            dim.Clear()


def _forget_names_in_bodies(node: onnx.NodeProto) -> None:
    """The same for the outputs of the subgraphs of an If, Loop or Scan."""
    for attribute in node.attribute:
        for output in attribute.g.output:
            _forget_names(output)
        for inner in attribute.g.node:
            _forget_names_in_bodies(inner)


def _as_given(given: ir.Shape | None, found: ir.Shape | None) -> ir.Shape | None:
    """The shape of an output of the model: what is found, but by the names it was given."""
    if given is None or found is None or len(given) != len(found):
        return found
    return ir.Shape(
        [
            b if isinstance(b, int) or (isinstance(a, ir.SymbolicDim) and a.value is None) else a
            for a, b in zip(given, found, strict=True)
        ]
    )


class _Types:
    """Reads inferred types; values of one type share one Shape."""

    def __init__(self) -> None:
        self.known: dict[bytes, tuple[ir.Shape | None, ir.TypeProtocol | None]] = {}

    def give(self, graph: ir.Graph, inferred: onnx.GraphProto) -> bool:
        """Give the graph's values the types they have in `inferred`; whether any is new."""
        infos = (*inferred.input, *inferred.value_info, *inferred.output)
        types = {info.name: info.type for info in infos}
        modified = False
        for value in (*graph.inputs, *(out for node in graph for out in node.outputs)):
            if value.name in types:
                modified |= self._learn(value, types[value.name])
        for node, proto in zip(graph, inferred.node, strict=True):
            for attribute in proto.attribute:
                # No standard operator has bodies in a list.
                if attribute.type == onnx.AttributeProto.GRAPH:
                    body = node.attributes[attribute.name].as_graph()
                    modified |= self.give(body, attribute.g)
        return modified

    def _learn(self, value: ir.Value, found: onnx.TypeProto) -> bool:
        key = found.SerializeToString()
        if key not in self.known:
            shape = ir.serde.deserialize_type_proto_for_shape(found)
            self.known[key] = shape, ir.serde.deserialize_type_proto_for_type(found)
        shape, kind = self.known[key]
        modified = False
        if value.is_graph_output():
            facts.learn_shape(value, shape)
            shape = _as_given(value.shape, shape)
        if shape is not None and shape != value.shape:
            value.shape, modified = shape, True
        if kind is not None and kind.dtype != value.dtype:
            value.dtype, modified = kind.dtype, True
        return modified
