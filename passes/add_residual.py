"""A residual sum joins the linear map that makes one of its operands."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from fusenorm.ops.linear import Linear
from fusenorm.ops.norm import Norm
from fusenorm.ops.spec import DOMAIN
from fusenorm.passes import facts
from fusenorm.passes.fold_norm import INTO_KEY
from fusenorm.passes.pattern import Miss, Refusal, node_name
from fusenorm.passes.rewrite import Check, Rewrite, RewritePass, apply

OP = "LinearResidual"
RULE = "add_residual"


@dataclasses.dataclass(frozen=True)
class _Sum:
    """s = alpha·x + skip, an Add or the sum of a residual norm.

    Attributes:
        node: it.
        x, skip: its operands.
        s: the sum.
        norm: what reads it in the same op, None of an Add.
    """

    node: ir.Node
    x: ir.Value
    skip: ir.Value
    s: ir.Value
    norm: Norm | None = None

    @property
    def alpha(self) -> bool:
        return self.norm is not None and self.norm.alpha

    def flaw(self, row: ir.Value) -> tuple[str, str] | None:
        """Code and words why no op makes its operand `row` and adds the other one."""
        if self.norm is None:
            return None
        if self.norm.residual == "f32":
            return "rounding", f"{self.node.op_type} reads the sum before it is rounded"
        weighted = self.norm.beta or self.norm.layer_scale or (self.norm.alpha and row is self.x)
        return ("factor", f"the sum weights {row.name}") if weighted else None


class AddResidual(RewritePass):
    """A residual sum is the last step of the linear map in front of it.

    ## What it matches
    An Add, or the sum in a SkipLayerNorm or SkipRMSNorm, one of whose operands is the result of a
    Linear op without activation that nothing else reads. The norm stays, of the sum alone.

    ## Formula
    y = (x·W + b) + alpha·residual; of a norm behind it, norm(y).

    Only on request: over whole models it was measured at 0.97 to 1.03 of the speed of the sum in
    the norm, which is within the noise of a measurement of one op, so compile does not choose.

    ## Numerics
    The sum is rounded where it was.

    ## Refuses
    `shape`: the operands do not provably have one shape. `reader`: something else reads the map's
    result. `factor`: a factor weights it in the sum. `rounding`: in 16 bits, the norm reads the sum
    before it is rounded. `slower`, `check_failed`.

    ## References
    arXiv 1512.03385 (residual connections).
    """

    name = RULE

    def __init__(self, check: Check | None = None) -> None:
        super().__init__((), check)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        opset = model.opset_imports.get("", 0)
        modified = False
        for graph in list(model.graphs()):
            for total in filter(None, map(_read, list(graph))):
                proposal = _propose(total)
                if proposal is None:
                    continue
                made = self.settle(model, proposal, OP, opset)
                if made is not None:
                    modified = True
                    _without_sum(model, total, proposal.nodes[0], made.outputs[0], opset)
        return ir.passes.PassResult(model, modified)


def _read(node: ir.Node) -> _Sum | None:
    if (node.domain, node.op_type) == ("", "Add"):
        x, skip = node.inputs
        assert x is not None
        assert skip is not None
        return _Sum(node, x, skip, node.outputs[0])
    norm = Norm.parse(node.op_type) if node.domain == DOMAIN else None
    if norm is None or not norm.skip:
        return None
    x, skip, *_ = node.inputs
    assert x is not None
    assert skip is not None
    return _Sum(node, x, skip, node.outputs[1], norm)


def _propose(total: _Sum) -> Rewrite | Miss | None:
    """The sum made by one of the maps in front of it, the last one first; or why by none."""
    nearest = None
    for row, other in ((total.skip, total.x), (total.x, total.skip)):
        linear = row.producer()
        spec = Linear.parse(linear.op_type) if linear and linear.domain == DOMAIN else None
        if linear is None or spec is None or not spec.plain or facts.is_constant(other):
            continue
        refusal = _refusal(total, row, other)
        if refusal is not None:
            nearest = Miss((linear, total.node), refusal)
            continue
        if not total.s.name:  # left out so far
            total.s.name = facts.unused(f"{row.name}_sum", linear.graph)  # type: ignore[arg-type]
            facts.copy_facts(row, total.s)
        given = (value for value in linear.inputs if value is not None)
        return Rewrite(
            rule=RULE,
            spec=dataclasses.replace(spec, residual=True, alpha=total.alpha),
            inputs=(*given, other),
            attributes={"alpha": total.node.attributes["alpha"].as_float()} if total.alpha else {},
            outputs=(total.s,),
            nodes=(linear, total.node),
        )
    return nearest


def _refusal(total: _Sum, row: ir.Value, other: ir.Value) -> Refusal | None:
    name = node_name(total.node)
    if len(row.uses()) > 1 or row.is_graph_output():
        return Refusal("reader", name, f"{row.name} is read by others too, or an output")
    flaw = total.flaw(row)
    if flaw is not None:
        code, detail = flaw
        return Refusal(code, name, detail)
    if not facts.same_shape(row, other):
        return Refusal("shape", name, f"{row.name} and {other.name} are not provably of one shape")
    return None


def _without_sum(model: ir.Model, total: _Sum, linear: ir.Node, s: ir.Value, opset: int) -> None:
    """Put the norm of `s` alone in the place of a residual norm, and nothing in that of its map."""
    if total.norm is None:
        return
    node, spec = total.node, total.norm.alone
    vectors = {
        slot.name: value
        for slot, value in zip(total.norm.inputs, node.inputs, strict=True)
        if value is not None
    }
    rewrite = Rewrite(
        rule=RULE,
        spec=spec,
        inputs=(s, *(vectors[slot.name] for slot in spec.inputs[1:])),
        attributes={"epsilon": node.attributes["epsilon"].as_float()},
        outputs=(node.outputs[0],),
        nodes=(node,),
    )
    made = apply(model, rewrite, opset)
    made.meta.update(node.meta)
    if INTO_KEY in node.metadata_props:
        made.metadata_props[INTO_KEY] = node.metadata_props[INTO_KEY]
    assert linear.graph is not None
    linear.graph.remove(linear, safe=True)
