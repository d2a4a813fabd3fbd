"""The algebra exporters spell in different ways, each idea once.

Every function returns a pattern; a rule is a composition of them.
"""

from __future__ import annotations

import math

from fusenorm.passes.pattern import Casted, Const, OneOf, Op, Pattern, Reduce, Width


def add(a: Pattern, b: Pattern) -> Pattern:
    return Op("Add", (a, b))


def sub(a: Pattern, b: Pattern) -> Pattern:
    return Op("Sub", (a, b))


def mul(a: Pattern, b: Pattern) -> Pattern:
    return Op("Mul", (a, b))


def div(a: Pattern, b: Pattern) -> Pattern:
    return Op("Div", (a, b))


def one_of(*options: Pattern) -> Pattern:
    return OneOf(options)


def wide(a: Pattern) -> Pattern:
    """`a`, possibly raised to f32 (the Cast island of 16-bit exports)."""
    return Casted(a, "wide")


def storage(a: Pattern) -> Pattern:
    """`a`, possibly rounded back to the storage type."""
    return Casted(a, "storage")


def product(a: Pattern, b: Pattern, c: Pattern) -> Pattern:
    """a·b·c in every association."""
    return one_of(mul(mul(a, b), c), mul(mul(a, c), b), mul(a, mul(b, c)))


def reciprocal(a: Pattern) -> Pattern:
    return one_of(Op("Reciprocal", (a,)), div(Const(1), a), Op("Pow", (a, Const(-1))))


def square(a: Pattern) -> Pattern:
    return one_of(mul(a, a), Op("Pow", (a, Const(2))))


def cube(a: Pattern) -> Pattern:
    return one_of(Op("Pow", (a, Const(3))), mul(a, square(a)))


def root(a: Pattern) -> Pattern:
    return one_of(Op("Sqrt", (a,)), Op("Pow", (a, Const(0.5))))


def over_root(a: Pattern, b: Pattern) -> Pattern:
    """a / √b."""
    return one_of(div(a, root(b)), mul(a, one_of(reciprocal(root(b)), Op("Pow", (b, Const(-0.5))))))


def mean(a: Pattern, of: str) -> Pattern:
    """The mean of `a` over its last axis or axes, which are those of variable `of`."""
    total = Reduce("ReduceSum", a)
    return one_of(
        Reduce("ReduceMean", a),
        div(total, Width(of)),
        mul(total, Width(of, reciprocal=True)),
    )


def mean_square(a: Pattern, of: str) -> Pattern:
    """mean(a²) over the last axis or axes."""
    total = Reduce("ReduceSumSquare", a)
    return one_of(
        mean(square(a), of), div(total, Width(of)), mul(total, Width(of, reciprocal=True))
    )


def variance(a: Pattern, deviation: Pattern, of: str) -> Pattern:
    """mean((a - mean(a))²), where `deviation` is a - mean(a), or mean(a²) - mean(a)²."""
    return one_of(mean_square(deviation, of), sub(mean_square(a, of), square(mean(a, of))))


def centred(a: Pattern, of: str) -> Pattern:
    """a - mean(a)."""
    return sub(a, mean(a, of))


def half(a: Pattern) -> Pattern:
    return one_of(mul(a, Const(0.5)), div(a, Const(2)))


def sigmoid(a: Pattern) -> Pattern:
    """1 / (1 + exp(-a))."""
    negative = one_of(Op("Neg", (a,)), mul(a, Const(-1)))
    return one_of(Op("Sigmoid", (a,)), reciprocal(add(Op("Exp", (negative,)), Const(1))))


def half_of_product(a: Pattern, b: Pattern) -> Pattern:
    """½·a·b in every association."""
    return one_of(half(mul(a, b)), mul(half(a), b), mul(a, half(b)))


def erf_argument(x: Pattern) -> Pattern:
    """x / √2."""
    return one_of(div(x, Const(math.sqrt(2))), mul(x, Const(math.sqrt(0.5))))


def tanh_argument(x: Pattern) -> Pattern:
    """√(2/π)·(x + 0.044715·x³)."""
    coefficient = Const(0.044715)
    term = one_of(
        mul(cube(x), coefficient),
        mul(mul(x, coefficient), square(x)),
        mul(mul(square(x), coefficient), x),
    )
    scale = Const(math.sqrt(2 / math.pi))
    inner = add(term, x)
    factored = add(one_of(mul(square(x), coefficient), mul(mul(x, coefficient), x)), Const(1))
    return one_of(mul(inner, scale), product(x, scale, factored))
