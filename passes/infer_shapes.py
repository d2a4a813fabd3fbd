"""Shapes and types of every value, by ONNX's own inference with data propagation."""

from __future__ import annotations

import re

import google.protobuf.message
import onnx
import onnx_ir as ir

from fusenorm.passes import facts

_NO_TENSOR = re.compile("Sequence|Optional")
# Larger constants are not shapes, and inference copies the model.
_SHAPE_BYTES = 1000
_FAILURES = (RuntimeError, ValueError, google.protobuf.message.Error)


class InferShapes(ir.passes.InPlacePass):
    """ONNX shape inference with data propagation; a model it cannot handle stays as it is.

    Initializers that a caller may override are unknown to it. A model that holds sequences or
    optionals keeps the types it came with.
    """

    name = "infer_shapes"

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        if any(_NO_TENSOR.search(node.op_type) for node in model.graph.all_nodes()):
            return ir.passes.PassResult(model, False)
        try:
            inferred = onnx.shape_inference.infer_shapes(_without_weights(model), data_prop=True)
        except _FAILURES:
            return ir.passes.PassResult(model, False)
        return ir.passes.PassResult(model, _Types().give(model.graph, inferred.graph))


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


def _forget_names(info: onnx.ValueInfoProto) -> None:
    """Take away what may have been written by hand, for nothing to be concluded from it."""
    for dim in info.type.tensor_type.shape.dim:
        if dim.dim_param:
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
