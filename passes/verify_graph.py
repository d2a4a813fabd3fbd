"""The graph is well-formed: checked after every pass, cheap enough to stay on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import onnx_ir as ir

from fusenorm.errors import FusenormError
from fusenorm.ops import parse
from fusenorm.ops.spec import DOMAIN
from fusenorm.passes import facts
from fusenorm.passes.pattern import node_name


class GraphInvalid(FusenormError):
    """A pass left the graph broken: a defect of ours, never of the input."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is wrong with a graph, and at which node (None: at its outputs or names)."""

    detail: str
    node: str | None = None


def verify_graph(model: ir.Model, after: str, outputs: Sequence[str | None] | None = None) -> None:
    """Every value is defined before use, once; every fused node fits its declaration.

    Args:
        model: the model.
        after: name of the pass that ran last, for the message.
        outputs: names the graph's outputs must have, in order.

    Raises:
        GraphInvalid: naming the pass and the node.
    """
    problem = find_problem(model)
    found = [value.name for value in model.graph.outputs]
    if problem is None and outputs is not None and found != list(outputs):
        problem = Problem(f"the graph's outputs became {found}")
    if problem is not None:
        raise GraphInvalid(f"after {after}: {problem.detail}", node=problem.node)


def find_problem(model: ir.Model) -> Problem | None:
    """The first thing wrong with the model's graphs, None if they are well-formed."""
    return next(_problems(model, model.graph, set()), None)


def _problems(model: ir.Model, graph: ir.Graph, visible: set[ir.Value]) -> Iterator[Problem]:
    """What is wrong with a graph in which the values of the outer ones are `visible`."""
    own = {*graph.inputs, *graph.initializers.values()}
    names = {value.name for value in own}
    visible |= own
    for node in graph:
        for value in node.inputs:
            if value is not None and value not in visible:
                yield Problem(f"reads {value.name} before it is defined", node_name(node))
        for body in facts.bodies(node):
            yield from _problems(model, body, visible)
        if node.domain == DOMAIN:
            yield from (Problem(detail, node_name(node)) for detail in _misfits(model, node))
        own.update(node.outputs)
        visible.update(node.outputs)
        for value in node.outputs:
            if value.name and value.name in names:
                yield Problem(f"{value.name} is defined twice", node_name(node))
            names.add(value.name)
    for value in graph.outputs:
        if value not in visible:
            yield Problem(f"graph output {value.name} is not produced")
        elif value not in own:
            yield Problem(f"subgraph output {value.name} is a value of the outer graph")
    if len({value.name for value in graph.outputs}) != len(graph.outputs):
        yield Problem("two graph outputs have one name")
    visible -= own


def _misfits(model: ir.Model, node: ir.Node) -> Iterator[str]:
    """Where a fused node departs from its declaration."""
    spec = parse(node.op_type)
    if spec is None or (DOMAIN, node.op_type, "") not in model.functions:
        yield f"{node.op_type} has no declaration or no function body"
        return
    if len(node.inputs) != len(spec.inputs) or any(value is None for value in node.inputs):
        yield f"{node.op_type} takes {len(spec.inputs)} inputs"
    if len(node.outputs) != len(spec.outputs):
        yield f"{node.op_type} lists {len(spec.outputs)} outputs"
    if set(node.attributes) != set(spec.attributes):
        yield f"{node.op_type} carries exactly {list(spec.attributes)}"
