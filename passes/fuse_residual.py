"""A residual sum in front of a norm joins it: one op that returns both y and the sum."""

from __future__ import annotations

import dataclasses
import functools

import onnx_ir as ir

from fusenorm.ops.norm import Norm
from fusenorm.ops.spec import DOMAIN
from fusenorm.passes import facts
from fusenorm.passes.fuse_norm import as_vector
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
class _NormNode:
    """A norm found in the graph, ours or the standard's, in our terms."""

    spec: Norm
    vectors: tuple[ir.Value, ...]
    epsilon: float


def read_norm(node: ir.Node) -> _NormNode | Refusal | None:
    """The norm a node computes, None if it is none, a refusal if it is one we cannot express."""
    if node.domain == DOMAIN:
        spec = Norm.parse(node.op_type)
        if spec is None or spec.skip:
            return None
        vectors = tuple(value for value in node.inputs[1:] if value is not None)
        return _NormNode(spec, vectors, node.attributes["epsilon"].as_float())
    if node.domain != "" or node.op_type not in ("LayerNormalization", "RMSNormalization"):
        return None
    name, x = node_name(node), node.inputs[0]
    assert x is not None
    dtype, size = facts.dtype_of(x), facts.last_dim(x)
    if not facts.is_last_axis(facts.attribute_int(node, "axis", -1), x):
        return Refusal("axis", name, "normalises more than the last axis")
    if any(out.uses() or out.is_graph_output() for out in node.outputs[1:]):
        return Refusal("stats_used", name, "its Mean or InvStdDev output is used")
    if facts.attribute_int(node, "stash_type", 1) != 1 or dtype not in ("f32", "f16", "bf16"):
        return Refusal("types", name, f"statistics of {dtype} in another type than f32")
    found: list[ir.Value] = []
    for value in node.inputs[1:]:
        if value is None:
            continue
        scale_size = size or facts.last_dim(value) or 0
        vector = as_vector(value, scale_size, 1)
        if vector is None:
            return Refusal("scale_shape", name, f"{value.name} is not one row of {scale_size}")
        found.append(vector)
    types = [facts.dtype_of(vector) for vector in found]
    epsilon = node.attributes.get("epsilon")
    spec = Norm(
        centred=node.op_type == "LayerNormalization",
        dtype=dtype,
        scale=types[0],
        bias=types[1] if len(types) > 1 else None,
    )
    return _NormNode(spec, tuple(found), 1e-5 if epsilon is None else epsilon.as_float())


@dataclasses.dataclass(frozen=True)
class _Branch:
    """One operand of the residual sum: a row, perhaps with a factor that can be absorbed."""

    row: ir.Value
    number: float | None = None
    vector: ir.Value | None = None
    nodes: tuple[ir.Node, ...] = ()


def _branches(value: ir.Value, size: int) -> list[_Branch]:
    """How an operand can be read: with its factor absorbed, or as it stands."""
    plain = _Branch(value)
    node = value.producer()
    if node is None or node.op_type != "Mul" or node.domain != "":
        return [plain]
    if len(value.uses()) != 1 or value.is_graph_output():
        return [plain]
    for row, factor in (node.inputs, tuple(reversed(node.inputs))):
        if row is None or factor is None or facts.last_dim(row) != size:
            continue
        number = facts.scalar(factor)
        if number is not None and (facts.rank(factor) or 0) <= 1:
            return [_Branch(row, number=number, nodes=(node,)), plain]
        if facts.constant(factor) is not None and facts.is_vector(factor, size):
            vector = as_vector(factor, size, facts.rank(row))
            if vector is not None:
                return [_Branch(row, vector=vector, nodes=(node,)), plain]
    return [plain]


class FuseResidual(Rule):
    """A residual Add joins the norm it feeds.

    ## What it matches
    Add(x, f) in either order, feeding LayerNorm or RMSNorm (fused here or a standard
    LayerNormalization / RMSNormalization). Scalar factors on either side (DeepNorm's α, residual
    multipliers) and a LayerScale vector join too. The sum may have other readers or be a graph
    output: it becomes the op's second output. Leading dimensions may broadcast.

    ## Formula
    s = alpha·x + beta·(layer_scale∘skip); y = norm(s); both returned.

    ## Numerics
    The sum is rounded where the source graph rounds it, before the statistics read it.

    ## Refuses
    `no_residual`: the operands are not two rows of the hidden size (a bias vector is no
    residual). `stats_used`, `axis`, `scale_shape`, `types`, `cycle`, `check_failed`.

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
        s = root.inputs[0]
        total = s.producer() if s is not None else None
        if s is None or total is None or total.op_type != "Add" or total.domain != "":
            return None
        if total.graph is not root.graph:
            return None
        norm = read_norm(root)
        if norm is None:
            return None
        if isinstance(norm, Refusal):
            return Miss((root, total), norm)
        size = facts.last_dim(s) or (facts.last_dim(norm.vectors[0]) if norm.vectors else None)
        a, b = total.inputs
        assert a is not None
        assert b is not None
        if size is None or facts.last_dim(a) != size or facts.last_dim(b) != size:
            detail = f"{a.name} and {b.name} are not provably rows of the hidden size {size}"
            return Miss((total, root), Refusal("no_residual", node_name(total), detail))
        if any(facts.is_vector(row, size) and facts.constant(row) is not None for row in (a, b)):
            return None  # a bias
        if facts.dtype_of(a) != norm.spec.dtype:
            detail = f"sum of {facts.dtype_of(a)} feeds a norm of {norm.spec.dtype}"
            return Miss((total, root), Refusal("types", node_name(total), detail))
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
            nodes=(*x.nodes, *skip.nodes, total, root),
        )


def _assign(a: ir.Value, b: ir.Value, size: int) -> tuple[_Branch, _Branch]:
    """Which operand is x and which is skip: x takes a number only, skip may take a vector."""
    first, second = _branches(a, size)[0], _branches(b, size)[0]
    if first.vector is not None and second.vector is not None:
        second = _branches(b, size)[-1]
    if first.vector is not None:
        first, second = second, first
    if first.number is None and second.number is not None and second.vector is None:
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
