"""exp, sigmoid, tanh and erf as vectorised f32 polynomials in TIR.

`T.exp` and its kin become one libm call per lane, five to nine times slower and a dependency.
NaN gives NaN. The error bounds are in units in the last place, measured against float64 by
tests/kernels/test_mathfn.py.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import tvm.script.ir_builder.tirx as T

Expr = Any
"""A TIR expression; TVM's builder is not typed."""


@dataclasses.dataclass(frozen=True)
class Lanes:
    """Vectors of `count` lanes; 1 means scalars.

    LLVM keeps the constants of a loop in registers through all loops around it, and so takes them
    from a loop beside it that may need every one. With `zero`, a uint32 that it cannot know to be
    0 and that is made anew in each turn, constants are made where they are used.
    """

    count: int
    zero: Expr = None

    def type(self, base: str) -> str:
        return base if self.count == 1 else f"{base}x{self.count}"

    def spread(self, scalar: Expr) -> Expr:
        return scalar if self.count == 1 else T.broadcast(scalar, self.count)

    def f32(self, value: float) -> Expr:
        if self.zero is None:
            return self.spread(T.float32(value))
        bits = T.uint32(int(np.float32(value).view(np.uint32)))
        return self.spread(T.reinterpret("float32", bits ^ self.zero))

    def u32(self, value: int) -> Expr:
        bits = T.uint32(value)
        return self.spread(bits if self.zero is None else bits ^ self.zero)

    def cast(self, base: str, value: Expr) -> Expr:
        return T.cast(value, self.type(base))

    def bits(self, value: Expr) -> Expr:
        return T.reinterpret(self.type("uint32"), value)

    def from_bits(self, bits: Expr) -> Expr:
        return T.reinterpret(self.type("float32"), bits)

    def shift_left(self, value: Expr, count: int) -> Expr:
        return T.shift_left(value, self.spread(T.uint32(count)))

    def shift_right(self, value: Expr, count: int) -> Expr:
        return T.shift_right(value, self.spread(T.uint32(count)))

    def let(self, value: Expr) -> Expr:
        """Name an f32 value: later uses cost nothing and see only its number.

        It goes through a buffer, which LLVM turns into a register again. TVM's simplifier looks
        through T.bind: it repeats shared terms without bound and takes (x + c) - c for x.
        """
        cell = T.alloc_buffer((self.count,), "float32")
        index = T.int64(0) if self.count == 1 else T.ramp(T.int64(0), 1, self.count)
        T.buffer_store(cell, value, [index])
        return T.bind(cell[index])

    def zeros(self, count: int) -> list[Any]:
        """Vectors to add to; one buffer each, as TVM puts larger ones on the heap."""
        made = [T.alloc_buffer((self.count,), "float32") for _ in range(count)]
        for vector in made:
            T.buffer_store(vector, self.f32(0.0), [T.ramp(0, 1, self.count)])
        return made

    def add(self, vector: Any, value: Expr) -> None:
        """Add to one of `zeros`."""
        index = T.ramp(0, 1, self.count)
        T.buffer_store(vector, vector[index] + value, [index])

    def interleaved(self, a: Expr, b: Expr) -> tuple[Expr, Expr]:
        """a0 b0 a1 b1 …, in two vectors."""
        half = self.count // 2
        low = [T.int32(part * self.count + lane) for lane in range(half) for part in (0, 1)]
        high = [T.int32(part * self.count + half + lane) for lane in range(half) for part in (0, 1)]
        return self.let(T.Shuffle([a, b], low)), self.let(T.Shuffle([a, b], high))

    def transposed(self, vectors: list[Expr]) -> list[Expr]:
        """As many vectors as there are lanes, with lanes and vectors exchanged."""
        half = self.count // 2
        for _ in range(self.count.bit_length() - 1):
            pairs = [self.interleaved(vectors[i], vectors[i + half]) for i in range(half)]
            vectors = [vector for pair in pairs for vector in pair]
        return vectors

    def first(self, count: Expr) -> Expr:
        """A mask of the first `count` lanes."""
        limit = T.cast(count, "int32")
        return T.bind(T.get_active_lane_mask(self.type("bool"), T.int32(0), limit))

    def fence(self, value: Expr) -> Expr:
        """A product that is rounded before it is added to: LLVM makes no fma of it."""
        return T.call_llvm_pure_intrin(self.type("float32"), "llvm.arithmetic.fence", value)

    def polynomial(self, x: Expr, coefficients: tuple[float, ...]) -> Expr:
        """Horner, highest power first."""
        head, *rest = coefficients
        value = self.f32(head)
        for coefficient in rest:
            value = self.let(value * x + self.f32(coefficient))
        return value

    def clamp(self, x: Expr, low: float, high: float) -> Expr:
        """x inside [low, high]; NaN stays NaN."""
        raised = self.let(T.Select(x < self.f32(low), self.f32(low), x))
        return self.let(T.Select(raised > self.f32(high), self.f32(high), raised))


# Adding it rounds to an integer, left in the low bits of the sum.
_TO_INTEGER = 1.5 * 2.0**23

# Least relative error with 1 + r as the last two.
_EXP = (0.0013814467, 0.008368781, 0.041668393, 0.1666652, 0.49999994, 1.0, 1.0)


def exp(lanes: Lanes, x: Expr) -> Expr:
    """e^x: x = n·ln 2 + r, a polynomial in r, scaled by 2^n.

    At most 2 ulp for x in [-87.3, 88.37]; above it +inf, below it the smallest normal number.
    """
    x = lanes.clamp(x, -87.33654, 89.0)
    shifted = lanes.let(x * lanes.f32(1.44269504) + lanes.f32(_TO_INTEGER))
    n = lanes.let(shifted - lanes.f32(_TO_INTEGER))
    r = lanes.let(n * lanes.f32(-0.693359375) + x)
    r = lanes.let(n * lanes.f32(2.12194440e-4) + r)
    power = lanes.shift_left(lanes.bits(shifted), 23) + lanes.u32(0x3F800000)
    return lanes.let(lanes.polynomial(r, _EXP) * lanes.from_bits(power))


def sigmoid(lanes: Lanes, x: Expr) -> Expr:
    """1 / (1 + e^-x); at most 3 ulp for x >= -87.3, 0 below -88.8."""
    e = exp(lanes, lanes.let(lanes.f32(0.0) - x))
    return lanes.let(lanes.f32(1.0) / (e + lanes.f32(1.0)))


_TANH_P = (1.331932e-08, 2.058368e-05, 0.0034940476, 0.13379729, 1.0)
_TANH_Q = (7.762127e-07, 0.00032831135, 0.025871124, 0.46713045, 1.0)


def tanh(lanes: Lanes, x: Expr) -> Expr:
    """tanh as an odd rational function x·P(x²) / Q(x²), fitted on [0, 9.02]; at most 6 ulp.

    The function passes 1 before x = 10: clamping it makes ±1 exact from there on.
    """
    x = lanes.clamp(x, -10.0, 10.0)
    square = lanes.let(x * x)
    above = lanes.let(x * lanes.polynomial(square, _TANH_P))
    return lanes.clamp(lanes.let(above / lanes.polynomial(square, _TANH_Q)), -1.0, 1.0)


_ERF_SMALL = (
    -5.96761703e-4,
    4.99119423e-3,
    -2.67681349e-2,
    1.12819925e-1,
    -3.76125336e-1,
    1.28379166e-1,
)
# log2(1 - erf(t)) / t
_ERF_LARGE = (
    -2.4937484e-05,
    0.0005528366,
    -0.0056033763,
    0.034992024,
    -0.1540479,
    -0.91589016,
    -1.6283952,
)
_EXP2 = (
    0.0013276461,
    0.009675541,
    0.055507135,
    0.2402212,
    0.69314694,
    1.0000001,
)


def erf(lanes: Lanes, x: Expr) -> Expr:
    """erf: an odd polynomial up to 0.9277, 1 - 2^q(|x|) beyond; at most 2 ulp."""
    positive = lanes.let(lanes.from_bits(lanes.bits(x) & lanes.u32(0x7FFFFFFF)))
    sign = lanes.bits(x) & lanes.u32(0x80000000)
    square = lanes.let(x * x)
    small = lanes.let(lanes.polynomial(square, _ERF_SMALL) * x + x)
    t = lanes.let(T.Select(positive > lanes.f32(4.0), lanes.f32(4.0), positive))
    q = lanes.let(lanes.polynomial(t, _ERF_LARGE) * t)
    # q is in [-27, 0]: its integer part goes straight into the exponent.
    shifted = lanes.let(q + lanes.f32(_TO_INTEGER))
    n = lanes.let(shifted - lanes.f32(_TO_INTEGER))
    fraction = lanes.polynomial(lanes.let(q - n), _EXP2)
    power = lanes.bits(fraction) + lanes.shift_left(lanes.bits(shifted), 23)
    large = lanes.let(lanes.f32(1.0) - lanes.from_bits(power))
    signed = lanes.from_bits(lanes.bits(large) | sign)
    return lanes.let(T.Select(positive > lanes.f32(0.927734375), signed, small))
