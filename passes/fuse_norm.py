"""LayerNorm and RMSNorm, recognised as algebra around one mean of squares."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Literal

import numpy as np
import onnx_ir as ir

from fusenorm.ops.norm import Norm
from fusenorm.ops.spec import DOMAIN, DType
from fusenorm.passes import facts
from fusenorm.passes.pattern import (
    Miss,
    Named,
    Pattern,
    Refusal,
    Scalar,
    Speller,
    State,
    Var,
    node_name,
)
from fusenorm.passes.rewrite import Check, Rewrite, RewritePass, Rule, first_accepted
from fusenorm.passes.spelling import (
    add,
    centred,
    mean_square,
    mul,
    one_of,
    over_root,
    storage,
    variance,
    wide,
)


def norm_pattern(subtract_mean: bool) -> Pattern:
    """c/√(mean(c²)+ε)·γ+β with γ and β optional, c = x - mean(x) or x."""
    x = Var("x")
    if subtract_mean:
        c = wide(Named("centred", centred(wide(x), "x")))
        spread = variance(wide(x), c, "x")
    else:
        c = wide(x)
        spread = mean_square(c, "x")
    shifted = add(spread, Scalar("epsilon"))
    scale, bias = wide(Var("scale")), wide(Var("bias"))
    normalised = over_root(c, shifted)
    scaled = one_of(
        mul(storage(normalised), scale),
        over_root(mul(c, scale), shifted),
        mul(c, over_root(scale, shifted)),
    )
    affine = Named("affine", one_of(add(scaled, bias), scaled, add(storage(normalised), bias)))
    return storage(one_of(affine, normalised))


class _FuseNorm(Rule):
    """What both norms share; subclasses say whether the mean is subtracted."""

    roots = frozenset({"Add", "Mul", "Div", "Cast"})
    subtract_mean: bool

    @functools.cached_property
    def pattern(self) -> Pattern:
        return norm_pattern(self.subtract_mean)

    def example(self, speller: Speller) -> None:
        speller.row("x")
        speller.vector("scale")
        speller.vector("bias")
        speller.scalar("epsilon", 1e-5)

    def propose(self, root: ir.Node) -> Rewrite | Miss | None:
        return first_accepted(self.pattern, root.outputs[0], lambda m: self._accept(root, m))

    def _accept(self, root: ir.Node, match: State) -> Rewrite | Refusal:
        found, name = match.bindings, node_name(root)
        x, y = found["x"], root.outputs[0]
        dtype = facts.dtype_of(x)
        if dtype is None or facts.dtype_of(y) is None:
            return Refusal("type_unknown", name, f"the type of {x.name} or {y.name} is unknown")
        if dtype != facts.dtype_of(y):
            detail = f"input is {dtype}, output {facts.dtype_of(y)}"
            return Refusal("types", name, detail)
        assert match.axes is not None
        dims = facts.trailing_dims(x, match.axes)
        if dims is None:
            detail = f"the last {match.axes} dimensions of {x.name} are not all known"
            return Refusal("hidden_unknown", name, detail)
        vectors = {}
        for slot in ("scale", "bias"):
            if slot not in found:
                continue
            vector = as_row(found[slot], dims, facts.rank(x))
            if vector is None:
                detail = f"{found[slot].name} is not one row of {list(dims)} numbers"
                return Refusal(f"{slot}_shape", name, detail)
            vectors[slot] = vector
        spec = Norm(
            centred=self.subtract_mean,
            dtype=dtype,
            scale=facts.dtype_of(vectors["scale"]) if "scale" in vectors else None,
            bias=facts.dtype_of(vectors["bias"]) if "bias" in vectors else None,
            affine=_where(found.get("affine"), dtype),
            centre=_where(found.get("centred"), dtype),
        )
        epsilon = facts.scalar(found["epsilon"])
        assert epsilon is not None
        return Rewrite(
            rule=self.name,
            spec=spec,
            inputs=(x, *vectors.values()),
            attributes={"epsilon": epsilon},
            outputs=(y,),
            nodes=match.nodes,
            merged=dims if len(dims) > 1 else (),
        )


def _where(value: ir.Value | None, dtype: DType) -> Literal["f32", "storage"]:
    """Whether a step of a 16-bit norm happens in the storage type or in f32."""
    if value is None or dtype not in ("f16", "bf16"):
        return "f32"
    return "storage" if facts.dtype_of(value) == dtype else "f32"


def as_vector(value: ir.Value, size: int, rank: int | None) -> ir.Value | None:
    """`as_row` for a row of one axis."""
    return as_row(value, (size,), rank)


def as_row(value: ir.Value, dims: tuple[int, ...], rank: int | None) -> ir.Value | None:
    """`value` where it is one row of shape `dims`; a constant scalar is repeated into one.

    A row of higher rank than x would enlarge x, so it must not have more dimensions.
    """
    size = math.prod(dims)
    number = facts.scalar(value)
    if number is not None and size > 1:
        array = facts.constant(value)
        assert array is not None
        repeated = ir.val(
            f"{value.name}_x{size}", const_value=ir.tensor(np.full(size, array.reshape(())))
        )
        repeated.const_value.name = repeated.name  # type: ignore[union-attr]
        return repeated
    if not facts.is_vector(value, *dims):
        return None
    assert value.shape is not None
    own = value.shape.rank()
    return value if own == 1 or (rank is not None and own <= rank) else None


@dataclasses.dataclass(frozen=True)
class NormNode:
    """A norm found in the graph, ours or the standard's, in our terms."""

    spec: Norm
    vectors: tuple[ir.Value, ...]
    epsilon: float


def read_norm(node: ir.Node) -> NormNode | Refusal | None:
    """The norm a node computes, None if it is none, a refusal if it is one we cannot express."""
    if node.domain == DOMAIN:
        spec = Norm.parse(node.op_type)
        if spec is None or spec.skip:
            return None
        vectors = tuple(value for value in node.inputs[1:] if value is not None)
        return NormNode(spec, vectors, node.attributes["epsilon"].as_float())
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
        wanted = facts.last_dim(value) if size is None else size
        # One number may be meant for a row of any width.
        one = size is None and wanted == 1
        vector = None if wanted is None or one else as_vector(value, wanted, 1)
        if vector is None:
            detail = f"{value.name} is not provably one row of {size or 'what it scales'}"
            return Refusal("scale_shape", name, detail)
        found.append(vector)
    types = [facts.dtype_of(vector) for vector in found]
    epsilon = node.attributes.get("epsilon")
    spec = Norm(
        centred=node.op_type == "LayerNormalization",
        dtype=dtype,
        scale=types[0],
        bias=types[1] if len(types) > 1 else None,
    )
    return NormNode(spec, tuple(found), 1e-5 if epsilon is None else epsilon.as_float())


@dataclasses.dataclass(frozen=True)
class NormCall:
    """A norm in the graph with all it reads, a residual sum's operands included.

    Attributes:
        spec: what it computes.
        inputs: one value for each of spec.inputs.
        attributes: one number for each of spec.attributes.
    """

    spec: Norm
    inputs: tuple[ir.Value, ...]
    attributes: dict[str, float]


def read_call(node: ir.Node) -> NormCall | Refusal | None:
    """As `read_norm`, of a norm behind a residual sum too."""
    spec = Norm.parse(node.op_type) if node.domain == DOMAIN else None
    if spec is not None:
        given = tuple(value for value in node.inputs if value is not None)
        return NormCall(
            spec, given, {name: node.attributes[name].as_float() for name in spec.attributes}
        )
    found = read_norm(node)
    if not isinstance(found, NormNode):
        return found
    assert node.inputs[0] is not None
    return NormCall(found.spec, (node.inputs[0], *found.vectors), {"epsilon": found.epsilon})


class FuseLayerNorm(_FuseNorm):
    """Decomposed LayerNorm becomes one op.

    ## What it matches
    Mean, centring, mean of squares, root, division, then scale and bias, in any spelling:
    square as Pow 2, x·x or ReduceSumSquare; variance also as mean(x²) - mean(x)²; mean as
    ReduceMean or a sum divided by the size; division by the root, by Reciprocal, by 1/√ or
    Pow -0.5; operands in any order; scale applied to the centred value, to the inverse root or
    last; 16-bit models with or without an f32 island of Casts. Also a standard
    RMSNormalization of x - mean(x).

    ## Formula
    y = (x - mean(x)) / sqrt(mean((x - mean(x))²) + epsilon) · scale + bias over the last axis,
    or over several last axes of known sizes: a Reshape makes them one and another undoes it.

    ## Numerics
    Statistics in f32, two-pass. The rounding before scale and bias is kept where the graph has
    it.

    ## Refuses
    `axis`, `keepdims`: not the last axes, or the axes dropped. `scale_shape`, `bias_shape`: not
    one row of the normalised axes' shape. `not_scalar`: epsilon is no constant scalar.
    `hidden_unknown`: an axis of unknown size. `types`, `check_failed`.

    ## References
    arXiv 1607.06450; ONNX LayerNormalization-17.
    """

    name = "layer_norm"
    op = "LayerNorm"
    roots = _FuseNorm.roots | {"RMSNormalization"}
    subtract_mean = True

    def propose(self, root: ir.Node) -> Rewrite | Miss | None:
        c = root.inputs[0]
        if root.op_type != "RMSNormalization":
            return super().propose(root)
        if c is None:
            return None
        return first_accepted(
            centred(Var("x"), "x"), c, lambda match: self._of_centred(root, c, match)
        )

    def _of_centred(self, root: ir.Node, c: ir.Value, match: State) -> Rewrite | Refusal:
        """RMSNormalization of c = x - mean(x)."""
        norm = read_norm(root)
        assert norm is not None
        if isinstance(norm, Refusal):
            return norm
        if match.axes != 1:
            detail = f"the mean is over {match.axes} axes, the norm over the last one"
            return Refusal("axis", node_name(root), detail)
        spec = norm.spec
        return Rewrite(
            rule=self.name,
            spec=dataclasses.replace(spec, centred=True, centre=_where(c, spec.dtype)),
            inputs=(match.bindings["x"], *norm.vectors),
            attributes={"epsilon": norm.epsilon},
            outputs=(root.outputs[0],),
            nodes=(*match.nodes, root),
        )


class FuseRMSNorm(_FuseNorm):
    """Decomposed RMSNorm becomes one op.

    ## What it matches
    The mean of squares, its root, the division and the scale in any spelling (see layer_norm);
    scale missing, folded as 1 + γ, scalar, or applied in the 16-bit type after the cast.

    ## Formula
    y = x / sqrt(mean(x²) + epsilon) · scale + bias over the last axis or axes (see layer_norm).

    ## Numerics
    Statistics in f32. `x_hat.to(T) * scale` (Llama) and `(x_hat * scale).to(T)` (Gemma, OLMo2)
    round differently; each keeps its own order.

    ## Refuses
    As layer_norm.

    ## References
    arXiv 1910.07467; ONNX RMSNormalization-23.
    """

    name = "rms_norm"
    op = "RMSNorm"
    subtract_mean = False


class FuseNorm(RewritePass):
    """The pass of both norm rules."""

    name = "fuse_norm"

    def __init__(self, check: Check | None = None, budget: list[int] | None = None) -> None:
        super().__init__((FuseLayerNorm(), FuseRMSNorm()), check, budget)
