"""A residual sum in front of a norm joins it: one op that returns both y and the sum."""

from __future__ import annotations

import dataclasses
import functools

import onnx_ir as ir

from fusenorm.ops.norm import Norm
from fusenorm.ops.spec import DOMAIN
from fusenorm.passes import facts
from fusenorm.passes.fuse_norm import as_vector, read_norm
from fusenorm.passes.pattern import (
    Miss,
    Op,
    Pattern,
    Refusal,
    Scalar,
    Speller,
    Var,
    node_name,
)
from fusenorm.passes.rewrite import Check, Rewrite, RewritePass, Rule, root_key
from fusenorm.passes.spelling import add, mul, one_of


@dataclasses.dataclass(frozen=True)
class _Branch:
    """One operand of the residual sum: a row, perhaps with a factor that can be absorbed."""

    row: ir.Value
    number: float | None = None
    vector: ir.Value | None = None
    nodes: tuple[ir.Node, ...] = ()


def _branch(value: ir.Value, size: int) -> _Branch:
    """An operand with its factor absorbed, or as it stands."""
    node = facts.made_by(value, "Mul")
    if node is None or len(value.uses()) != 1 or value.is_graph_output():
        return _Branch(value)
    for row, factor in (node.inputs, tuple(reversed(node.inputs))):
        assert row is not None
        assert factor is not None
        if facts.last_dim(row) != size:
            continue
        number = facts.scalar(factor)
        if number is not None:
            return _Branch(row, number=number, nodes=(node,))
        if facts.is_constant(factor):
            vector = as_vector(factor, size, facts.rank(row))
            if vector is not None:
                return _Branch(row, vector=vector, nodes=(node,))
    return _Branch(value)


# What a sum may go through on its way to a norm, and the reason it then stays outside.
_BETWEEN = {
    **dict.fromkeys(("Clip", "Min", "Max"), "clipped"),
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose"), "moved"),
    **dict.fromkeys(("Cast", "Dropout", "Identity"), "between"),
}


def _sum_behind(value: ir.Value | None) -> tuple[ir.Node, tuple[ir.Node, ...]] | None:
    """The residual sum `value` comes from, and the nodes of `_BETWEEN` on the way, last first."""
    between: tuple[ir.Node, ...] = ()
    while value is not None:
        node = value.producer()
        if node is None or node.domain != "":
            return None
        if node.op_type in ("Add", "Sum"):
            return (node, between) if _is_residual(node) else None
        if node.op_type not in _BETWEEN:
            return None
        between = (*between, node)
        value = _clipped_row(node, value) if node.op_type in ("Min", "Max") else node.inputs[0]
    return None


def _clipped_row(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """The operand of Min or Max that is as wide as the result; the other ones are bounds."""
    size = facts.last_dim(value)
    return next((x for x in node.inputs if x is not None and facts.last_dim(x) == size), None)


def _is_residual(total: ir.Node) -> bool:
    """Whether an Add is more than the bias of a linear map: two rows, or such a sum and a bias."""
    node: ir.Node | None = total
    while node is not None and node.domain == "" and node.op_type in ("Add", "Sum"):
        rows = [value for value in node.inputs if value is not None and not _is_bias(value)]
        if len(rows) != 1:
            return bool(rows)
        node = rows[0].producer()
    return False


def _is_bias(value: ir.Value) -> bool:
    array = facts.constant(value)
    return array is not None and all(size == 1 for size in array.shape[:-1])


class FuseResidual(Rule):
    """A residual Add joins the norm it feeds.

    ## What it matches
    Add(x, f) in either order, feeding LayerNorm or RMSNorm (fused here or a standard
    LayerNormalization / RMSNormalization). Scalar factors on either side (DeepNorm's α, residual
    multipliers) and a LayerScale vector join too. The sum may have other readers or be a graph
    output: it becomes the op's second output. Leading dimensions may broadcast. Of more than two
    terms (parallel attention and MLP, a bias after the sum) the last Add joins.

    ## Formula
    s = alpha·x + beta·(layer_scale∘skip); y = norm(s); both returned.

    ## Numerics
    The sum is rounded where the source graph rounds it, before the statistics read it.

    ## Refuses
    `clipped`: the norm reads the sum through Clip, Min or Max (T5 in f16). `moved`: through a
    Reshape or Transpose that cannot move out of the way. `between`: through a Cast or Dropout.
    `rounding`: a 16-bit Sum of several rounds once, Adds would each round. `no_residual`: the
    operands are not provably rows of the hidden size. `other_graph`: the sum is outside the body
    the norm is in. `stats_used`, `axis`, `scale_shape`, `types`, `cycle`, `check_failed`.

    ## References
    arXiv 2203.00555 (DeepNorm), 2103.17239 (LayerScale).
    """

    name = "residual"
    op = "SkipNorm"
    roots = frozenset(
        {"LayerNormalization", "RMSNormalization"}
        | {root_key(DOMAIN, spec.op_type) for spec in Norm.variants() if not spec.skip}
    )

    @functools.cached_property
    def pattern(self) -> Pattern:
        x, skip = Var("x"), Var("skip")
        total = add(
            one_of(x, mul(x, Scalar("alpha"))),
            one_of(skip, mul(skip, Scalar("beta")), mul(skip, Var("layer_scale"))),
        )
        return Op("LayerNormalization", (total, Var("scale"), Var("bias")))

    def example(self, speller: Speller) -> None:
        for name in ("x", "skip"):
            speller.row(name)
        for name in ("layer_scale", "scale", "bias"):
            speller.vector(name)
        speller.scalar("alpha", 1.75)
        speller.scalar("beta", 0.25)

    def propose(self, root: ir.Node) -> Rewrite | Miss | None:
        found, norm = _sum_behind(root.inputs[0]), read_norm(root)
        assert norm is not None
        if found is None:
            return None
        total, between = found
        s = total.outputs[0]
        if isinstance(norm, Refusal):
            return Miss((total, *between, root), norm)
        if between:
            code, name = _BETWEEN[between[0].op_type], node_name(between[0])
            detail = f"the norm reads the sum {s.name} through this {between[0].op_type}"
            return Miss((total, *between, root), Refusal(code, name, detail))
        if total.op_type == "Sum":
            detail = f"a Sum of {len(total.inputs)} rounds once where Adds would each round"
            return Miss((total, root), Refusal("rounding", node_name(total), detail))
        a, b = total.inputs
        assert a is not None
        assert b is not None
        size = facts.last_dim(s)
        if size is None or facts.last_dim(a) != size or facts.last_dim(b) != size:
            detail = f"{a.name} and {b.name} are not provably rows of the hidden size {size}"
            return Miss((total, root), Refusal("no_residual", node_name(total), detail))
        x, skip = _assign(a, b, size)
        if any(_reads(vector, total) for vector in norm.vectors):
            detail = "scale or bias is computed from the sum itself"
            return Miss((total, root), Refusal("cycle", node_name(root), detail))
        spec = dataclasses.replace(
            norm.spec,
            skip=True,
            alpha=x.number is not None,
            beta=skip.number is not None,
            layer_scale=skip.vector is not None,
        )
        attributes = {"epsilon": norm.epsilon, "alpha": x.number, "beta": skip.number}
        vectors = (skip.vector,) if skip.vector is not None else ()
        return Rewrite(
            rule=self.name,
            spec=spec,
            inputs=(x.row, skip.row, *vectors, *norm.vectors),
            attributes={key: value for key, value in attributes.items() if value is not None},
            outputs=(root.outputs[0], s),
            nodes=(total, *x.nodes, *skip.nodes, root),
        )


def _assign(a: ir.Value, b: ir.Value, size: int) -> tuple[_Branch, _Branch]:
    """Which operand is x and which is skip: x takes a number only, skip may take a vector."""
    first, second = _branch(a, size), _branch(b, size)
    if first.vector is not None and second.vector is not None:
        second = _Branch(b)
    if first.vector is not None:
        first, second = second, first
    if first.number is None and second.number is not None:
        first, second = second, first
    return first, second


def _reads(value: ir.Value, node: ir.Node) -> bool:
    """Whether `value` is computed from an output of `node`."""
    pending, seen = [value], set()
    while pending:
        producer = pending.pop().producer()
        if producer is node:
            return True
        if producer is not None and producer not in seen:
            seen.add(producer)
            pending += facts.operands(producer)
    return False


class FuseResidualNorm(RewritePass):
    """The pass of the residual rule."""

    name = "fuse_residual"

    def __init__(self, check: Check | None = None, budget: list[int] | None = None) -> None:
        super().__init__((FuseResidual(),), check, budget)
