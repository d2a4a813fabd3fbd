"""What happens to scores one step after another, masks added or numbers selected, as one mask.

Masks added are summed. Numbers selected are selected of 0 first: where that leaves 0, a score stays
as it is, elsewhere the mask takes its place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Literal

import numpy as np
import onnx_ir as ir

from fusenorm.passes import facts
from fusenorm.passes.rewrite import SOURCE_KEY, registered, source_names


@dataclasses.dataclass(frozen=True)
class Step:
    """One mask.

    Attributes:
        node: what applies it.
        scores: before it.
        value: the mask.
        kind: `added`: the mask is; `chosen`: it is the condition under which `number` takes the
            place of a score, or does not if `inverted`; `selected`: it takes the place of a score
            where it is not 0.
    """

    node: ir.Node
    scores: ir.Value
    value: ir.Value
    kind: Literal["added", "chosen", "selected"]
    number: float = 0.0
    inverted: bool = False

    @property
    def key(self) -> Hashable:
        return self.value, self.number, self.inverted


Made = dict[Hashable, ir.Value]


def read_selection(node: ir.Node) -> Step | None:
    """The selection of one number, unlike 0 and NaN, in the place of scores that a Where is."""
    condition, chosen, other = node.inputs
    assert condition is not None
    for scores, constant, inverted in ((other, chosen, False), (chosen, other, True)):
        number = facts.scalar(constant)
        if scores is not None and number is not None and number * number > 0:
            return Step(node, scores, condition, "chosen", number, inverted)
    return None


def read_selected(node: ir.Node) -> Step | None:
    """A Where that has scores stay where a mask is 0, as `join` writes it; `value` is the mask."""
    condition, scores, mask = node.inputs
    kept = facts.made_by(condition, "Equal")
    if kept is None or scores is None or mask is None:
        return None
    if kept.inputs[0] is not mask or facts.scalar(kept.inputs[1]) != 0.0:
        return None
    return Step(node, scores, mask, "selected")


def join(steps: Sequence[Step], made: Made) -> None:
    """Write `steps`, the last first, all of one kind, as one; `made` has the masks of the graph."""
    last, scores = steps[0].node, steps[-1].scores
    selects = steps[0].kind == "chosen"
    graph = last.graph
    assert graph is not None

    def written(op_type: str, inputs: Sequence[ir.Value], name: str) -> ir.Value:
        value = ir.val(facts.unused(name, graph), dtype=ir.DataType.FLOAT)
        graph.insert_before(last, ir.node(op_type, inputs, outputs=[value], name=value.name))
        return value

    def constant(number: float) -> ir.Value:
        tensor = ir.tensor(np.array(number, np.float32))
        return registered(ir.val("mask_number", const_value=tensor), graph)

    def mask() -> ir.Value:
        total = constant(0.0) if selects else None
        for step in reversed(steps):
            if total is None:
                total = step.value
            elif step.kind == "added":
                total = written("Add", [total, step.value], f"{last.outputs[0].name}_mask")
            else:
                branches = [constant(step.number), total][:: -1 if step.inverted else 1]
                total = written("Where", [step.value, *branches], f"{step.value.name}_mask")
        assert total is not None
        return total

    key = tuple(step.key for step in steps)
    if key not in made:
        made[key] = mask()
    name = f"{last.outputs[0].name}_masked"
    if selects:
        kept = written("Equal", [made[key], constant(0.0)], f"{name}_kept")
        kept.dtype = ir.DataType.BOOL
        joined = written("Where", [kept, scores, made[key]], name)
    else:
        joined = written("Add", [scores, made[key]], name)
    facts.copy_facts(last.outputs[0], joined)
    nodes = [step.node for step in reversed(steps)]
    node = joined.producer()
    assert node is not None
    node.metadata_props[SOURCE_KEY] = "\n".join(source_names(nodes))
    last.outputs[0].replace_all_uses_with(joined)
    for node in reversed(nodes):
        graph.remove(node, safe=True)
