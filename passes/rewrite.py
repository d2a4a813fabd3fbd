"""From a match to a fused node: proposals, their application, and the pass that runs rules."""

from __future__ import annotations

import abc
import dataclasses
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir

from fusenorm.errors import BadInput
from fusenorm.ops.spec import DOMAIN, OpSpec, Slot
from fusenorm.passes import facts
from fusenorm.passes.pattern import (
    Miss,
    Pattern,
    Refusal,
    Speller,
    State,
    matches,
    node_name,
)

RULE_KEY = "fusenorm.rule"
SOURCE_KEY = "fusenorm.source"
MISS_KEY = "fusenorm.miss"
MADE_UP = "fusenorm.made_up"
MIN_IR_VERSION = 8
# Made-up constants up to this many elements are compared, so that equal ones are one.
SHARED_SIZE = 1 << 16
_BROADCASTING = frozenset("Add Sub Mul Div Pow Min Max".split())


@dataclasses.dataclass(frozen=True)
class View:
    """The same numbers in another shape.

    Attributes:
        op_type: what makes it.
        numbers: of a Reshape the new shape, 0 where a size stays as it is; else the one axis.
    """

    op_type: Literal["Reshape", "Unsqueeze", "Squeeze"]
    numbers: tuple[int, ...]

    def shape(self, dims: Sequence[Any]) -> tuple[Any, ...]:
        """What becomes of the shape `dims`."""
        if self.op_type == "Reshape":
            return tuple(size or dims[axis] for axis, size in enumerate(self.numbers))
        (axis,) = self.numbers
        one = (1,) if self.op_type == "Unsqueeze" else ()
        return (*dims[:axis], *one, *dims[axis + 1 - len(one) :])


@dataclasses.dataclass(frozen=True)
class Rewrite:
    """A proposal: these source nodes become one node of `spec`.

    Attributes:
        rule: name of the rule that proposes it.
        spec: the fused op.
        inputs: one value for each of spec.inputs.
        attributes: one number for each of spec.attributes.
        outputs: the values the node's outputs take the place of, in order of spec.outputs;
            None for an output the source graph does not have.
        nodes: the source nodes it stands for.
        merged: sizes of the source's last axes that are one axis for the op; empty where the op
            takes its inputs as they are.
        views: how the op sees inputs it does not take as they are, by slot.
        result: how its first output is seen as the source's.
        shapes: what a check tries an input with, for inputs that are no rows.
        computed: what the source has, in a check, for shapes it computes from elsewhere.
    """

    rule: str
    spec: OpSpec
    inputs: tuple[ir.Value, ...]
    attributes: Mapping[str, float]
    outputs: tuple[ir.Value | None, ...]
    nodes: tuple[ir.Node, ...]
    merged: tuple[int, ...] = ()
    views: Mapping[str, View] = dataclasses.field(default_factory=dict)
    result: View | None = None
    shapes: Mapping[ir.Value, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    computed: Mapping[ir.Value, tuple[int, ...]] = dataclasses.field(default_factory=dict)

    @property
    def root(self) -> ir.Node:
        assert self.outputs[0] is not None
        producer = self.outputs[0].producer()
        assert producer is not None
        return producer


Check = Callable[[Rewrite, int], Refusal | None]


class Rule(abc.ABC):
    """One fusion. The class docstring is its documentation (`fusenorm rules NAME`).

    Sections, in this order: What it matches, Formula, Numerics, Refuses, References.

    Attributes:
        name: how reports and the command line call it.
        op: the op its sites are reported as when they are refused.
        roots: the operators a match can end in, as `root_key` names them.
    """

    name: ClassVar[str]
    op: ClassVar[str]
    roots: ClassVar[frozenset[str]]

    @property
    def summary(self) -> str:
        return self.documentation.partition("\n")[0]

    @property
    def documentation(self) -> str:
        return inspect.cleandoc(type(self).__doc__ or "")

    @property
    @abc.abstractmethod
    def pattern(self) -> Pattern:
        """The algebra the rule stands for: its tests are the spellings of this."""

    @abc.abstractmethod
    def example(self, speller: Speller) -> None:
        """Give every variable of the pattern a value to spell it with."""

    @abc.abstractmethod
    def propose(self, root: ir.Node) -> Rewrite | Miss | None:
        """A rewrite of the subgraph ending in `root`, or how near it came.

        None says that `root` is plainly no candidate.
        """


def first_accepted(
    pattern: Pattern, root: ir.Value, accept: Callable[[State], Rewrite | Refusal]
) -> Rewrite | Miss:
    """The first match of `pattern` at `root` that passes `accept`, else the nearest miss."""
    nearest = Miss()
    for found in matches(pattern, root):
        if isinstance(found, Miss):
            return found
        outcome = accept(found)
        if isinstance(outcome, Rewrite):
            return outcome
        if len(found.nodes) > len(nearest.nodes):
            nearest = Miss(found.nodes, outcome)
    return nearest


def root_key(domain: str, op_type: str) -> str:
    """How `Rule.roots` names an operator: bare in the standard domain."""
    return f"{domain}::{op_type}" if domain else op_type


class RewritePass(ir.passes.InPlacePass):
    """Runs rules over every graph of a model, from outputs to inputs, largest match first.

    Args:
        rules: tried in order at each node.
        check: proves a proposal before it is applied; a refusal leaves the graph as it was.
        budget: how many rewrites may still be made, shared between passes (for bisecting).
    """

    name: ClassVar[str] = "rewrite"

    def __init__(
        self, rules: tuple[Rule, ...], check: Check | None = None, budget: list[int] | None = None
    ) -> None:
        super().__init__()
        self.rules = rules
        self.check = check
        self.budget = budget if budget is not None else [sys.maxsize]

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        opset = model.opset_imports.get("", 0)
        if 0 < opset < facts.OLDEST_OPSET:
            return ir.passes.PassResult(model, False)
        for graph in list(model.graphs()):
            changed = False
            for node in reversed(list(graph)):
                if node.graph is not None:
                    changed |= self._visit(model, node, opset)
            if changed:
                graph.sort()
            modified |= changed
        return ir.passes.PassResult(model, modified)

    def _visit(self, model: ir.Model, node: ir.Node, opset: int) -> bool:
        for rule in self.rules:
            if root_key(node.domain, node.op_type) not in rule.roots or self.budget[0] <= 0:
                continue
            proposal = rule.propose(node)
            if proposal is not None and self.settle(model, proposal, rule.op, opset) is not None:
                return True
        return False

    def settle(
        self, model: ir.Model, proposal: Rewrite | Miss, op: str, opset: int
    ) -> ir.Node | None:
        """Apply a proposal that passes the check; keep any other for the report, as one of `op`.

        Returns:
            The fused node, if it was made.
        """
        if isinstance(proposal, Rewrite):
            refusal = _refused(proposal, opset) or (
                self.check(proposal, opset) if self.check else None
            )
            if refusal is None:
                self.budget[0] -= 1
                return apply(model, proposal, opset)
            proposal = Miss(proposal.nodes, refusal)
        remember(proposal, op)
        return None


def _refused(rewrite: Rewrite, opset: int) -> Refusal | None:
    spec = rewrite.spec
    name = node_name(rewrite.root)
    outside = next((node for node in rewrite.nodes if node.graph is not rewrite.root.graph), None)
    if outside is not None:
        detail = f"{node_name(outside)} is computed once outside this body"
        return Refusal("other_graph", name, detail)
    x = rewrite.inputs[0]
    if not facts.rank(x) and facts.last_dim(x) is None and any(map(_adds_axis, rewrite.nodes)):
        detail = f"{x.name} may be a scalar, and a constant would give it an axis"
        return Refusal("rank", name, detail)
    if opset < spec.MIN_OPSET:
        return Refusal("opset", name, f"opset {opset} is older than {spec.MIN_OPSET}")
    if spec.inputs[0].dtype == "f64":
        return Refusal("types", name, "no fused op computes in f64")
    if spec.parse(spec.op_type) != spec:
        return Refusal("types", name, f"no fused op is declared for {spec.op_type}")
    return None


def _adds_axis(node: ir.Node) -> bool:
    """Whether a node would give a scalar the axis of a constant."""
    return node.op_type in _BROADCASTING and any(
        facts.is_constant(value) and facts.rank(value) for value in node.inputs
    )


def remember(miss: Miss, op: str) -> None:
    """Keep the nearest miss on every node it went through, for the report."""
    if miss.refusal is None:
        return
    for node in miss.nodes:
        known = node.meta.get(MISS_KEY)
        if known is None or len(known[1].nodes) <= len(miss.nodes):
            node.meta[MISS_KEY] = (op, miss)


def apply(model: ir.Model, rewrite: Rewrite, opset: int) -> ir.Node:
    """Put the fused node in the place of the nodes it stands for, and return it.

    Source nodes stay as long as something else uses their results.
    """
    root, spec = rewrite.root, rewrite.spec
    graph = root.graph
    assert graph is not None
    outputs = []
    for slot, old in zip(spec.outputs, rewrite.outputs, strict=True):
        value = ir.val(None if old is None else old.name)
        if old is None:
            name = f"{rewrite.outputs[0].name}_{slot.name}"  # type: ignore[union-attr]
            value.name = facts.unused(name, graph)
            facts.copy_facts(rewrite.outputs[0], value)  # type: ignore[arg-type]
        else:
            facts.copy_facts(old, value)
        outputs.append(value)
    inputs = [
        registered(_seen(rewrite, graph, slot, value), graph)
        for slot, value in zip(spec.inputs, rewrite.inputs, strict=True)
    ]
    fused = ir.node(
        spec.op_type,
        inputs,
        attributes={name: float(rewrite.attributes[name]) for name in spec.attributes},
        domain=DOMAIN,
        outputs=outputs,
        name=f"{node_name(root)}_{spec.op_type}",
        metadata_props={
            RULE_KEY: rewrite.rule,
            SOURCE_KEY: "\n".join(dict.fromkeys(source_names(rewrite.nodes))),
        },
    )
    graph.insert_before(root, fused)
    for old, new in zip(rewrite.outputs, outputs, strict=True):
        if old is not None:
            final = _restore(rewrite, graph, new)
            facts.replace(old, final)
            old.name = f"{old.name}_before_{spec.op_type}"
    _remove_dead(rewrite.nodes)
    _declare(model, spec, opset)
    return fused


def _seen(rewrite: Rewrite, graph: ir.Graph, slot: Slot, value: ir.Value) -> ir.Value:
    """`value` as the fused op takes it."""
    if not rewrite.merged and slot.name not in rewrite.views:
        return value
    name = facts.unused(f"{rewrite.root.outputs[0].name}_{rewrite.spec.op_type}_{slot.name}", graph)
    if not rewrite.merged:
        return _view(rewrite, value, rewrite.views[slot.name], name)
    width = math.prod(rewrite.merged)
    array = facts.constant(value)
    if slot.layout == "vector" and array is not None:
        return ir.val(f"{value.name}_flat", const_value=ir.tensor(array.reshape(width)))
    lead = len(_lead(rewrite)) if slot.layout == "row" else 0
    return _view(rewrite, value, View("Reshape", (*[0] * lead, width)), name)


def _restore(rewrite: Rewrite, graph: ir.Graph, value: ir.Value) -> ir.Value:
    """`value`, an output of the fused op with the facts of the source's, in the source's shape."""
    lead, result = _lead(rewrite) if rewrite.merged else (), rewrite.result
    if rewrite.merged:
        result = View("Reshape", (*[0] * len(lead), *rewrite.merged))
    if result is None:
        return value
    name, shape = str(value.name), value.shape
    value.name = facts.unused(f"{name}_{rewrite.spec.op_type}", graph)
    value.shape = ir.Shape([*lead, math.prod(rewrite.merged)]) if rewrite.merged else None
    return _view(rewrite, value, result, name, shape)


def _lead(rewrite: Rewrite) -> Sequence[int | ir.SymbolicDim]:
    """The dimensions of the source's rows in front of the merged ones."""
    dims = facts.proved_dims(rewrite.inputs[0])
    assert dims is not None
    return dims[: -len(rewrite.merged)]


def _view(
    rewrite: Rewrite, value: ir.Value, view: View, name: str, shape: ir.Shape | None = None
) -> ir.Value:
    """`value` seen in another shape, `shape` if that is known, in front of the root."""
    root = rewrite.root
    assert root.graph is not None
    numbers = np.array(view.numbers, np.int64)
    kind = "shape" if view.op_type == "Reshape" else "axes"
    given = registered(ir.val(f"{name}_{kind}", const_value=ir.tensor(numbers)), root.graph)
    if shape is None and (dims := facts.proved_dims(value)) is not None:
        shape = ir.Shape(view.shape(dims))
    result = ir.val(name, type=value.type, shape=shape)
    title = f"{name}_{view.op_type.lower()}"
    root.graph.insert_before(
        root, ir.node(view.op_type, [value, given], outputs=[result], name=title)
    )
    return result


def registered(value: ir.Value, graph: ir.Graph) -> ir.Value:
    """`value`, made an initializer of `graph` if it is a constant a rule made up."""
    if value.graph is not None:
        return value
    assert value.const_value is not None
    array = value.const_value.numpy() if value.const_value.size <= SHARED_SIZE else None
    if array is not None:
        for known in graph.initializers.values():
            made_up = known.meta.get(MADE_UP)
            if (
                made_up is not None
                and made_up.dtype == array.dtype
                and made_up.shape == array.shape
                and made_up.tobytes() == array.tobytes()  # -0 is not 0
            ):
                return known
        value.meta[MADE_UP] = array
    value.name = facts.unused(str(value.name), graph)
    value.const_value.name = value.name
    graph.register_initializer(value)
    return value


def source_names(nodes: Iterable[ir.Node]) -> list[str]:
    """The names nodes had in the model as it came."""
    names: list[str] = []
    for node in nodes:
        names += node.metadata_props.get(SOURCE_KEY, node_name(node)).split("\n")
    return names


def _remove_dead(nodes: tuple[ir.Node, ...]) -> None:
    """Remove those of `nodes` nothing reads any more."""
    pending = list(nodes)
    while pending:
        dead = [
            node
            for node in pending
            if not any(out.uses() or out.is_graph_output() for out in node.outputs)
        ]
        if not dead:
            return
        for node in dead:
            assert node.graph is not None
            node.graph.remove(node, safe=True)
        pending = [node for node in pending if node not in dead]


def _declare(model: ir.Model, spec: OpSpec, opset: int) -> None:
    """Add the op's function body to the model, once."""
    identifier = (DOMAIN, spec.op_type, "")
    if identifier not in model.functions:
        model.ir_version = max(model.ir_version, MIN_IR_VERSION)
        function = ir.serde.deserialize_function(spec.function(opset))
        model.functions[identifier] = function
    version = model.opset_imports.setdefault(DOMAIN, 1)
    if version != 1:
        raise BadInput(f"domain {DOMAIN} is imported at version {version}, expected 1")
