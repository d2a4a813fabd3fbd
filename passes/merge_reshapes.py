"""A Reshape of a Reshape takes its numbers where the first one does."""

from __future__ import annotations

import onnx_ir as ir

from fusenorm.passes import facts


class MergeReshapes(ir.passes.InPlacePass):
    """Of Reshapes one behind another the last one stays, where its shape says the same there.

    A 0 in a shape without `allowzero` copies a size of what is reshaped, which then has to be the
    same on both sides.
    """

    name = "merge_reshapes"

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        if model.opset_imports.get("", 0) < facts.OLDEST_OPSET:
            return ir.passes.PassResult(model, False)
        for graph in model.graphs():
            for node in graph:
                if (node.domain, node.op_type) != ("", "Reshape"):
                    continue
                while (source := _further_source(node)) is not None:
                    node.replace_input_with(0, source)
                    modified = True
        return ir.passes.PassResult(model, modified)


def _further_source(node: ir.Node) -> ir.Value | None:
    """What the Reshape in front of `node` reshapes, if `node` can do the same to it."""
    value, shape = node.inputs
    first = facts.made_by(value, "Reshape")
    if first is None or first.graph is not node.graph or value is None:
        return None
    source = first.inputs[0]
    assert source is not None
    if facts.attribute_int(node, "allowzero", 0):
        return source
    target = facts.constant(shape)
    if target is None:
        return None
    before, after = facts.proved_dims(source), facts.proved_dims(value)
    for axis in (target == 0).nonzero()[0]:
        if before is None or after is None or axis >= len(before):
            return None
        if not facts.equal_dims((before[axis],), (after[axis],)):
            return None
    return source
