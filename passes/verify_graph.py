"""The graph is well-formed: checked after every pass, cheap enough to stay on."""

from __future__ import annotations

import onnx_ir as ir

from fusenorm.errors import FusenormError
from fusenorm.ops import parse
from fusenorm.ops.spec import DOMAIN


class GraphInvalid(FusenormError):
    """A pass left the graph broken: a defect of ours, never of the input."""


def verify_graph(model: ir.Model, after: str) -> None:
    """Every value is defined before use, once; every fused node fits its declaration.

    Args:
        model: the model.
        after: name of the pass that ran last, for the message.

    Raises:
        GraphInvalid: naming the pass and the node.
    """
    _verify(model, model.graph, set(), after)


def _verify(model: ir.Model, graph: ir.Graph, outer: set[ir.Value], after: str) -> None:
    defined = outer | set(graph.inputs) | set(graph.initializers.values())
    names = [value.name for value in (*graph.inputs, *graph.initializers.values())]
    for node in graph:
        for value in node.inputs:
            if value is not None and value not in defined:
                _fail(after, node, f"reads {value.name} before it is defined")
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                _verify(model, attribute.as_graph(), defined, after)
            elif attribute.type == ir.AttributeType.GRAPHS:
                for body in attribute.as_graphs():
                    _verify(model, body, defined, after)
        if node.domain == DOMAIN:
            _verify_fused(model, node, after)
        defined.update(node.outputs)
        names += [value.name for value in node.outputs if value.name]
    missing = [value.name for value in graph.outputs if value not in defined]
    if missing:
        raise GraphInvalid(f"after {after}: graph output {missing[0]} is not produced")
    duplicates = len(names) - len(set(names)) - (len(graph.inputs) - len(
        set(graph.inputs) - set(graph.initializers.values())
    ))
    if duplicates:
        twice = next(name for name in names if names.count(name) > 1)
        raise GraphInvalid(f"after {after}: two values are named {twice}")


def _verify_fused(model: ir.Model, node: ir.Node, after: str) -> None:
    spec = parse(node.op_type)
    if spec is None or (DOMAIN, node.op_type, "") not in model.functions:
        _fail(after, node, f"{node.op_type} has no declaration or no function body")
        return
    if len(node.inputs) != len(spec.inputs) or any(value is None for value in node.inputs):
        _fail(after, node, f"{node.op_type} takes {len(spec.inputs)} inputs")
    if len(node.outputs) != len(spec.outputs):
        _fail(after, node, f"{node.op_type} lists {len(spec.outputs)} outputs")
    if set(node.attributes) != set(spec.attributes):
        _fail(after, node, f"{node.op_type} carries exactly {list(spec.attributes)}")


def _fail(after: str, node: ir.Node, detail: str) -> None:
    raise GraphInvalid(f"after {after}: {detail}", node=node.name or node.outputs[0].name)
