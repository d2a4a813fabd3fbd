"""GELU, Swish and squared ReLU from the elementary functions exporters write them in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ClassVar

import onnx_ir as ir

from fusenorm.ops.activation import Gated
from fusenorm.passes import facts
from fusenorm.passes.pattern import (
    Const,
    Miss,
    Named,
    Op,
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
    div,
    erf_argument,
    half_of_product,
    mul,
    one_of,
    sigmoid,
    square,
    storage,
    tanh_argument,
    wide,
)


def gelu_pattern() -> Pattern:
    """½·x·(1 + erf(x/√2))."""
    x = wide(Var("x"))
    gate = add(Named("inner", Op("Erf", (erf_argument(x),))), Const(1))
    return storage(half_of_product(x, gate))


def gelu_tanh_pattern() -> Pattern:
    """½·x·(1 + tanh(√(2/π)·(x + 0.044715·x³)))."""
    x = wide(Var("x"))
    gate = add(Named("inner", Op("Tanh", (tanh_argument(x),))), Const(1))
    return storage(half_of_product(x, gate))


def swish_pattern() -> Pattern:
    """x·sigmoid(β·x), β a constant scalar or absent."""
    x = wide(Var("x"))
    argument = one_of(x, mul(x, Scalar("beta")))
    negative = one_of(Op("Neg", (argument,)), mul(argument, Const(-1)))
    return storage(
        one_of(
            mul(x, Named("inner", sigmoid(argument))),
            div(x, Named("inner", add(Op("Exp", (negative,)), Const(1)))),
        )
    )


def relu2_pattern() -> Pattern:
    """max(x, 0)²."""
    x = wide(Var("x"))
    zero = Const(0)
    relu = one_of(Op("Relu", (x,)), Op("Max", (x, zero)), Op("Max", (zero, x)))
    return storage(square(relu))


class ActivationRule(Rule):
    """A spelling of one of the declared activations: a pattern over one variable `x`.

    Attributes:
        activation: a row of ops.ACTIVATIONS.
        algebra: makes the pattern. It binds `x`; a parametric activation's number as
            Scalar("beta"); and, where it may be computed in 16 bits, the value of its
            transcendental function as Named("inner", ...).
    """

    roots = frozenset({"Mul", "Div", "Cast"})
    activation: ClassVar[str]
    algebra: ClassVar[Callable[[], Pattern]]

    @functools.cached_property
    def pattern(self) -> Pattern:
        return type(self).algebra()

    def example(self, speller: Speller) -> None:
        speller.row("x")
        speller.scalar("beta", 1.5)

    def propose(self, root: ir.Node) -> Rewrite | Miss | None:
        return first_accepted(self.pattern, root.outputs[0], lambda m: self._accept(root, m))

    def _accept(self, root: ir.Node, match: State) -> Rewrite | Refusal:
        x, y = match.bindings["x"], root.outputs[0]
        dtype = facts.dtype_of(x)
        if dtype is None or facts.dtype_of(y) is None:
            detail = f"the type of {x.name} or {y.name} is unknown"
            return Refusal("type_unknown", node_name(root), detail)
        if dtype != facts.dtype_of(y):
            detail = f"input is {dtype}, output {facts.dtype_of(y)}"
            return Refusal("types", node_name(root), detail)
        inner = match.bindings.get("inner")
        stepwise = dtype in ("f16", "bf16") and inner is not None and facts.dtype_of(inner) == dtype
        spec = Gated(self.activation, "none", dtype, "storage" if stepwise else "f32")
        beta = match.bindings.get("beta")
        number = 1.0 if beta is None else facts.scalar(beta)
        assert number is not None
        return Rewrite(
            rule=self.name,
            spec=spec,
            inputs=(x,),
            attributes={"beta": number} if spec.attributes else {},
            outputs=(y,),
            nodes=match.nodes,
        )


class FuseGelu(ActivationRule):
    """GELU written with Erf becomes one op.

    ## What it matches
    ½, x and 1 + erf(x/√2) multiplied in any association and order; x/√2 or x·√½; ½ or /2.

    ## Formula
    y = ½·x·(1 + erf(x/√2)).

    ## Numerics
    16-bit graphs keep a rounding at every node.

    ## Refuses
    `constant`: another constant than the formula's, beyond what its type can hold.
    `different_operand`: the factors read different values. `rank`: x may be a scalar, to which
    a constant would give an axis. `types`, `check_failed`.

    ## References
    arXiv 1606.08415; ONNX Gelu-20.
    """

    name = "gelu"
    op = "Gelu"
    activation = "gelu"
    algebra = staticmethod(gelu_pattern)


class FuseGeluTanh(ActivationRule):
    """GELU's tanh approximation becomes one op.

    ## What it matches
    x³ as Pow 3 or products, √(2/π) inside or factored out, every order and association.

    ## Formula
    y = ½·x·(1 + tanh(√(2/π)·(x + 0.044715·x³))).

    ## Numerics
    16-bit graphs keep a rounding at every node of the declared body; a spelling that rounds
    elsewhere is refused by the check.

    ## Refuses
    As gelu.

    ## References
    arXiv 1606.08415; ONNX Gelu-20 with approximate="tanh".
    """

    name = "gelu_tanh"
    op = "Gelu"
    activation = "gelu_tanh"
    algebra = staticmethod(gelu_tanh_pattern)


class FuseSwish(ActivationRule):
    """Swish, SiLU and QuickGELU become one op.

    ## What it matches
    x·sigmoid(β·x) with β constant or absent; sigmoid as Sigmoid or 1/(1 + exp(-x)); the
    standard Swish op.

    ## Formula
    y = x·sigmoid(beta·x); SiLU is beta = 1, QuickGELU beta = 1.702.

    ## Numerics
    16-bit graphs keep a rounding at every node.

    ## Refuses
    `not_scalar`: β is a vector or computed. `different_operand`: x·sigmoid(g) is a gated unit,
    see glu. `rank`, as gelu. `types`, `check_failed`.

    ## References
    arXiv 1710.05941; ONNX Swish-24.
    """

    name = "swish"
    op = "Swish"
    roots = frozenset({"Mul", "Div", "Cast", "Swish"})
    activation = "swish"
    algebra = staticmethod(swish_pattern)

    def propose(self, root: ir.Node) -> Rewrite | Miss | None:
        """The standard Swish is rewritten too: onnxruntime has no kernel for it."""
        if root.op_type != "Swish":
            return super().propose(root)
        x, alpha = root.inputs[0], root.attributes.get("alpha")
        dtype = facts.dtype_of(x) if x is not None else None
        if x is None or dtype is None:
            return None
        return Rewrite(
            rule=self.name,
            spec=Gated(self.activation, "none", dtype),
            inputs=(x,),
            attributes={"beta": 1.0 if alpha is None else alpha.as_float()},
            outputs=(root.outputs[0],),
            nodes=(root,),
        )


class FuseRelu2(ActivationRule):
    """The square of a ReLU becomes one op.

    ## What it matches
    relu(x) squared by Pow 2 or a product with itself; relu as Relu or Max with 0.

    ## Formula
    y = max(x, 0)².

    ## Numerics
    One rounding, as in the graph: the square of a 16-bit number is exact in f32.

    ## Refuses
    `different_operand`: a product of two values' ReLUs. `rank`, as gelu. `types`, `check_failed`.

    ## References
    arXiv 2109.08668.
    """

    name = "relu2"
    op = "Relu2"
    roots = frozenset({"Mul", "Pow", "Cast"})
    activation = "relu2"
    algebra = staticmethod(relu2_pattern)


class FuseActivation(RewritePass):
    """The pass of the activation rules."""

    name = "fuse_activation"

    def __init__(self, check: Check | None = None, budget: list[int] | None = None) -> None:
        super().__init__((FuseGelu(), FuseGeluTanh(), FuseSwish(), FuseRelu2()), check, budget)
