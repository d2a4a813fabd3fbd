"""Linear maps of one input become one op: its rows are laid out for the products once."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Iterator

import onnx_ir as ir

from fusenorm.ops.linear import MOST_MAPS, PANEL, Linear
from fusenorm.ops.spec import DOMAIN
from fusenorm.passes import facts
from fusenorm.passes.pattern import Miss, Refusal, node_name
from fusenorm.passes.rewrite import Check, Rewrite, RewritePass

OP = "LinearMaps"
RULE = "concat_linear"


class ConcatLinearMaps(RewritePass):
    """Queries, keys and values, or any plain maps of one input, are computed side by side.

    ## What it matches
    Two or more Linear ops of one x, without activation, of one type and all with a bias or all
    without, as wide as they like in whole panels. More than three become several ops, dealt out
    evenly. Also one such op whose columns a Split deals out to two or three tensors of whole
    panels.

    ## Formula
    y_i = x·W_i + b_i, an output each; the weights stay as they are packed, or are cut up so.

    ## Numerics
    Every output is what the map alone gives, bit for bit.

    ## Refuses
    `unlike`: others read the same x, but end otherwise. `slower`, `check_failed`.

    ## References
    arXiv 1706.03762 (the projections of multi-head attention).
    """

    name = RULE

    def __init__(self, check: Check | None = None) -> None:
        super().__init__((), check)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        opset = model.opset_imports.get("", 0)
        modified = False
        for graph in list(model.graphs()):
            # The op stands where the first of its maps stood: the order stays one to run in. What a
            # proposal reads may be what the one before it made.
            for proposals in (_proposals, _splits):
                for proposal in proposals(graph):
                    modified |= self.settle(model, proposal, OP, opset) is not None
        return ir.passes.PassResult(model, modified)


def _proposals(graph: ir.Graph) -> Iterator[Rewrite | Miss]:
    """What becomes of the Linear ops of a graph that share their x with others."""
    readers: dict[ir.Value, dict[Linear, list[ir.Node]]] = collections.defaultdict(dict)
    for node in graph:
        spec = Linear.parse(node.op_type)
        if spec is not None and node.domain == DOMAIN:
            x = node.inputs[0]
            assert x is not None
            readers[x].setdefault(spec, []).append(node)
    for x, alike in readers.items():
        count = sum(map(len, alike.values()))
        for spec, nodes in alike.items():
            if spec.plain and len(nodes) > 1:
                yield from (_side_by_side(spec, part) for part in _dealt_out(nodes))
            elif count > 1:
                detail = (
                    f"the {count} maps of {x.name} end differently, in an activation or a panel"
                )
                for node in nodes:
                    yield Miss((node,), Refusal("unlike", node_name(node), detail))


def _dealt_out(nodes: list[ir.Node]) -> Iterator[list[ir.Node]]:
    """The nodes in order, as few groups as there can be, of as equal sizes as can be."""
    groups = math.ceil(len(nodes) / MOST_MAPS)
    for index in range(groups):
        yield nodes[len(nodes) * index // groups : len(nodes) * (index + 1) // groups]


def _side_by_side(spec: Linear, nodes: list[ir.Node]) -> Rewrite:
    x = nodes[0].inputs[0]
    assert x is not None
    given = (value for node in nodes for value in node.inputs[1:] if value is not None)
    return Rewrite(
        rule=RULE,
        spec=dataclasses.replace(spec, maps=len(nodes)),
        inputs=(x, *given),
        attributes={},
        outputs=tuple(node.outputs[0] for node in nodes),
        nodes=tuple(nodes),
    )


def _splits(graph: ir.Graph) -> Iterator[Rewrite]:
    """What becomes of the Linear ops of a graph whose columns a Split deals out."""
    for node in list(graph):
        spec = Linear.parse(node.op_type)
        if spec is None or node.domain != DOMAIN or not spec.plain:
            continue
        y = node.outputs[0]
        (use, *others) = y.uses() or (None,)
        if use is None or others or y.is_graph_output() or use.node.graph is not graph:
            continue
        split = use.node
        widths = [facts.last_dim(part) or 1 for part in split.outputs]
        whole = 1 < len(widths) <= MOST_MAPS and not any(width % PANEL for width in widths)
        constant = all(map(facts.is_constant, node.inputs[1:]))
        if facts.splits_columns(split) and whole and constant:
            yield _split_up(node, spec, split, widths)


def _split_up(node: ir.Node, spec: Linear, split: ir.Node, widths: list[int]) -> Rewrite:
    x, weight, *biases = node.inputs
    assert x is not None
    assert weight is not None
    given = []
    for width, end in zip(widths, itertools.accumulate(widths), strict=True):
        given.append(_panels(weight, (end - width) // PANEL, end // PANEL))
        given += [_columns(bias, end - width, end) for bias in biases]
    return Rewrite(
        rule=RULE,
        spec=dataclasses.replace(spec, maps=len(widths)),
        inputs=(x, *given),
        attributes={},
        outputs=tuple(split.outputs),
        nodes=(node, split),
    )


def _panels(weight: ir.Value, first: int, last: int) -> ir.Value:
    """Some panels of a packed weight, taken when they are read."""
    stored = weight.const_value
    assert stored is not None
    shape = ir.Shape([last - first, *stored.shape.numpy()[1:]])
    tensor = ir.LazyTensor(lambda: ir.tensor(stored.numpy()[first:last]), stored.dtype, shape)
    return ir.val(f"{weight.name}_{first}", const_value=tensor)


def _columns(bias: ir.Value | None, first: int, last: int) -> ir.Value:
    """Some numbers of a bias, which may have 1s in front of its axis."""
    array = facts.constant(bias)
    assert array is not None
    assert bias is not None
    return ir.val(f"{bias.name}_{first}", const_value=ir.tensor(array.ravel()[first:last]))
