"""Data movement between a residual Add and its norm, moved out of the way bit for bit."""

from __future__ import annotations

import onnx_ir as ir

from fusenorm.passes import facts
from fusenorm.passes.fuse_norm import read_norm
from fusenorm.passes.pattern import Refusal, node_name


class ExposeResidual(ir.passes.InPlacePass):
    """Let every norm read the residual Add itself.

    - norm(Reshape(a + b)) becomes Reshape(norm(a + b)) where the Reshape keeps the last
      dimension (OPT): a norm sees rows only.
    - norm(Transpose(a + Transpose'(b))) becomes norm(Transpose(a) + b) where the two transposes
      undo each other and nothing else reads the sum (ConvNeXt): one transpose less.
    """

    name = "expose_residual"

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for graph in model.graphs():
            for node in list(graph):
                norm = read_norm(node)
                if norm is None or isinstance(norm, Refusal) or len(node.outputs) != 1:
                    continue
                modified |= _sink_reshape(graph, node) or _cancel_transposes(graph, node)
        return ir.passes.PassResult(model, modified)


def _moved(norm: ir.Node, op_type: str) -> tuple[ir.Node, ir.Node] | None:
    """(the node moving data, the Add it moves), both beside the norm, that make what it reads."""
    mover = facts.made_by(norm.inputs[0], op_type)
    if mover is None:
        return None
    add = facts.made_by(mover.inputs[0], "Add")
    return (mover, add) if add is not None and add.graph is norm.graph else None


def _sink_reshape(graph: ir.Graph, norm: ir.Node) -> bool:
    found = _moved(norm, "Reshape")
    if found is None:
        return False
    reshape, add = found
    total, y = add.outputs[0], norm.outputs[0]
    size = facts.last_dim(reshape.outputs[0])
    if size is None or facts.last_dim(total) != size:
        return False
    norm.replace_input_with(0, total)
    norm.attributes.pop("axis", None)  # still the last one, by default, whatever the sum's rank
    after = ir.node(
        "Reshape",
        [y, *reshape.inputs[1:]],
        attributes=dict(reshape.attributes),
        name=f"{node_name(norm)}_reshape",
    )
    graph.insert_after(norm, after)
    _take_over(graph, y, after.outputs[0], keep=after)
    facts.copy_facts(total, y)
    return True


def _cancel_transposes(graph: ir.Graph, norm: ir.Node) -> bool:
    found = _moved(norm, "Transpose")
    if found is None:
        return False
    outer, add = found
    total, moved = add.outputs[0], outer.outputs[0]
    if len(total.uses()) != 1 or total.is_graph_output() or moved.is_graph_output():
        return False
    order = facts.permutation(outer)
    if order is None:
        return False
    for index, operand in enumerate(add.inputs):
        other = add.inputs[1 - index]
        assert operand is not None
        assert other is not None
        inner = operand.producer()
        if not _undo(facts.permutation(inner), order):
            continue
        assert inner is not None
        dims = facts.proved_dims(other)
        if dims is None or len(dims) != len(order):
            continue  # a broadcast operand of lower rank has other axes to move
        turned = ir.node(
            "Transpose", [other], attributes=dict(outer.attributes), name=node_name(outer)
        )
        graph.insert_before(add, turned)
        turned.outputs[0].type = other.type
        turned.outputs[0].shape = ir.Shape([dims[axis] for axis in order])
        add.replace_input_with(index, inner.inputs[0])
        add.replace_input_with(1 - index, turned.outputs[0])
        moved.replace_all_uses_with(total)
        facts.copy_facts(moved, total)
        graph.remove(outer, safe=True)
        return True
    return False


def _undo(first: tuple[int, ...] | None, second: tuple[int, ...]) -> bool:
    """Whether two transposes in a row change nothing."""
    if first is None or len(first) != len(second):
        return False
    return [first[axis] for axis in second] == list(range(len(first)))


def _take_over(graph: ir.Graph, old: ir.Value, new: ir.Value, *, keep: ir.Node) -> None:
    """`new` stands for what `old` was: its readers but `keep`, its name, its place as output."""
    name = old.name
    facts.copy_facts(old, new)
    facts.replace(old, new)
    keep.replace_input_with(0, old)
    old.name = facts.unused(f"{name}_rows", graph)
    new.name = name
