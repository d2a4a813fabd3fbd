"""Dimensions that an input of the model names are read off that input."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from fusenorm.passes import facts


class ShareShapes(ir.passes.InPlacePass):
    """Where an inner value has a dimension of an input's name, its size is read off the input.

    What was computed for its size alone goes, transposes of queries for one (T5), and equal
    computations of sizes in every layer become one. An output of the model may have been given its
    names by hand: nothing is concluded from those.
    """

    name = "share_shapes"

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        named = _named_dims(graph)
        shapes: dict[ir.Value, ir.Value] = {}
        modified = False
        for node in list(graph):
            read = facts.dim_read(node)
            if read is None:
                continue
            value, axis = read
            assert value.shape is not None
            dim = value.shape[axis]
            source = named.get(dim.value) if isinstance(dim, ir.SymbolicDim) else None
            if source is None or value.is_graph_input() or value.is_graph_output():
                continue
            given, place = source
            if given not in shapes:
                shapes[given] = _shape_of(given, graph)
            _read_instead(node, shapes[given], place, graph)
            modified = True
        return ir.passes.PassResult(model, modified)


def _named_dims(graph: ir.Graph) -> dict[str | None, tuple[ir.Value, int]]:
    """Where each name of a dimension stands first: a tensor among the inputs and its axis.

    A name that stands twice there is no name of one size.
    """
    named: dict[str | None, tuple[ir.Value, int]] = {}
    twice = set()
    for given in graph.inputs:
        dims = list(given.shape or ()) if isinstance(given.type, ir.TensorType) else []
        for axis, dim in enumerate(dims):
            if isinstance(dim, ir.SymbolicDim) and dim.value is not None:
                named.setdefault(dim.value, (given, axis))
                if dims.count(dim) > 1:
                    twice.add(dim.value)
    return {name: place for name, place in named.items() if name not in twice}


def _shape_of(value: ir.Value, graph: ir.Graph) -> ir.Value:
    """A Shape of an input, in front of everything else."""
    name = facts.unused(f"{value.name}_shape", graph)
    node = ir.node("Shape", [value], name=name)
    made = node.outputs[0]
    made.name, made.dtype = name, ir.DataType.INT64
    made.shape = ir.Shape([len(value.shape or ())])
    graph.insert_before(graph[0], node)
    return made


def _read_instead(node: ir.Node, shape: ir.Value, axis: int, graph: ir.Graph) -> None:
    """Let a Gather read this axis of this shape."""
    old, index = node.inputs
    assert old is not None
    array = facts.constant(index)
    assert array is not None
    name = facts.unused(f"{shape.name}_{axis}", graph)
    place = ir.val(name, const_value=ir.tensor(np.full_like(array, axis), name=name))
    graph.register_initializer(place)
    node.replace_input_with(0, shape)
    node.replace_input_with(1, place)
    shape_of = old.producer()
    assert shape_of is not None
    if not old.uses() and not old.is_graph_output():
        graph.remove(shape_of, safe=True)
