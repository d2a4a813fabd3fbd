"""What the GLU rule proposes for a product, or why it refuses it, before any proof."""

from __future__ import annotations

import numpy as np
import pytest

from fusenorm.passes.fuse_glu import FuseGLU
from fusenorm.passes.rewrite import Rewrite
from tests.graphs import outcome, proposed

PAIR = "float[b,s,8] g, float[b,s,8] u"
PACKED = "float[b,s,16] x"
ROWS = "float[b,s,8] x"
UNCLAMPED = "float[b,s,8] g0, float[b,s,8] u0"
PRODUCT = "y = Mul (a, u)"
BILINEAR = "y = Mul (g, u)"
SIGMOID = "a = Sigmoid (g)\n" + PRODUCT
SPLIT = "g, u = Split <axis = -1, num_outputs = 2> (x)\n"
SCALARS = {"zero": 0.0, "one": 1.0, "two": 2.0, "hi": 7.0, "lo": -7.0, "lower": -9.0, "nan": np.nan}
INTEGERS = {
    "i0": [0], "i1": [1], "i2": [2], "i8": [8], "i16": [16], "end": [2**62], "last": [-1],
    "first": range(8), "second": range(8, 16), "even": range(0, 16, 2), "odd": range(1, 16, 2),
    "s0": 0, "s1": 1, "pairs": [0, 0, 2, 8], "twos": [0, 0, 8, 2], "uneven": [6, 10],
}  # fmt: skip
NUMBERS = {
    "vec": np.linspace(1, 2, 8, dtype=np.float32),
    "w": np.ones((8, 8), np.float32),
    "w2": np.full((8, 8), 2, np.float32),
    "b": np.ones(8, np.float32),
    **{name: np.array(number, np.float32) for name, number in SCALARS.items()},
    **{name: np.array(number, np.int64) for name, number in INTEGERS.items()},
}


@pytest.mark.parametrize(
    ("found", "body", "inputs"),
    [
        ("GLU_sigmoid", SIGMOID, PAIR),
        ("GLU_sigmoid", "a = Sigmoid (g)\ny = Mul (u, a)", PAIR),
        ("GLU_relu", "a = Relu (g)\n" + PRODUCT, PAIR),
        ("GLU_gelu", "a = Gelu (g)\n" + PRODUCT, PAIR),
        ("GLU_gelu_tanh", 'a = Gelu <approximate = "tanh"> (g)\n' + PRODUCT, PAIR),
        ("GLU_swish", "a = Swish (g)\n" + PRODUCT, PAIR),
        ("GLU_swish", "a = Swish <alpha = 2.0> (g)\n" + PRODUCT, PAIR),
        (None, "a = other.Sigmoid (g)\n" + PRODUCT, PAIR),
        (None, "a = Tanh (g)\n" + PRODUCT, PAIR),
        (
            "GLU_sigmoid",
            "n = Neg (g)\ne = Exp (n)\nd = Add (e, one)\na = Div (one, d)\n" + PRODUCT,
            PAIR,
        ),
        (None, "n = Neg (g)\ne = Exp (n)\nd = Add (e, two)\na = Div (one, d)\n" + PRODUCT, PAIR),
        ("GLU_sigmoid", "a = Sigmoid (g)\nb0 = Sigmoid (u)\ny = Mul (a, b0)", PAIR),
        (None, "a = Sigmoid (g)\ny = Mul (a, g)", PAIR),
        (None, "a = Sigmoid (g)\ny = Mul (a, vec)", PAIR),
        ("activation_shared", "a = Sigmoid (g)\ny = Mul (a, a)", PAIR),
        (None, BILINEAR, PAIR),
        (None, "y = Mul (g, g)", PAIR),
        ("activation_shared", "a = Sigmoid (g)\ny = Mul (a, u)\nr = Neg (a)", PAIR),
        (
            "activation_shared",
            "a = Sigmoid (g)\nc = Min (a, hi)\nr = Neg (c)\ny = Mul (c, u)",
            PAIR,
        ),
        ("shapes_not_proved", SIGMOID, "float[b,s,8] g, float[b,1,8] u"),
        ("shapes_not_proved", SIGMOID, "float[b,s,8] g, float[s,8] u"),
        ("shapes_not_proved", SIGMOID, "float[b,s,8] g, float[] u"),
        ("shapes_not_proved", SIGMOID, "float[b,s,8] g, float[b,t,8] u"),
        ("GLU_sigmoid_f16", SIGMOID, "float16[b,s,8] g, float16[b,s,8] u"),
        ("GLU_sigmoid_f64", SIGMOID, "double[b,s,8] g, double[b,s,8] u"),
        (
            "GLU_swish_clampgate_plus1",
            "g = Min (g0, hi)\nt = Clip (u0, lo, hi)\nu = Add (t, one)\na = Swish (g)\n" + PRODUCT,
            UNCLAMPED,
        ),
        (
            "GLU_swish",
            "g = Min (g0, hi)\nt = Clip (u0, lo, hi)\nu = Add (t, two)\na = Swish (g)\n" + PRODUCT,
            UNCLAMPED,
        ),
        ("GLU_sigmoid", "g = Min (g0, hi)\nu = Clip (u0, lo, hi)\n" + SIGMOID, UNCLAMPED),
        (
            "GLU_swish_clampact",
            "a0 = Swish (g)\na = Min (a0, hi)\nu = Clip (u0, lo, hi)\n" + PRODUCT,
            "float[b,s,8] g, float[b,s,8] u0",
        ),
        (
            "activation_clamped",
            "a0 = Swish (g)\na = Min (a0, two)\nu = Clip (u0, lo, hi)\n" + PRODUCT,
            "float[b,s,8] g, float[b,s,8] u0",
        ),
        ("activation_clamped", "a0 = Swish (g)\na = Min (a0, hi)\n" + PRODUCT, PAIR),
        # Nothing is left between bounds of zero.
        (
            "GLU_swish",
            "g = Min (g0, zero)\nt = Clip (u0, zero, zero)\nu = Add (t, one)\na = Swish (g)\n"
            + PRODUCT,
            UNCLAMPED,
        ),
        # A bound that is computed.
        (
            "GLU_swish",
            "g = Clip (g0, given, hi)\nt = Clip (u0, lo, hi)\nu = Add (t, one)\na = Swish (g)\n"
            + PRODUCT,
            UNCLAMPED + ", float[] given",
        ),
        # Half of a row times something else.
        (
            "GLU_sigmoid",
            "g, r = Split <axis = -1, num_outputs = 2> (x)\n" + SIGMOID,
            PACKED + ", float[b,s,8] u",
        ),
        (
            "activation_shared",
            "a0 = Swish (g)\na = Min (a0, hi)\nr = Neg (a0)\nu = Clip (u0, lo, hi)\n" + PRODUCT,
            "float[b,s,8] g, float[b,s,8] u0",
        ),
        ("GLU_sigmoid_gate_up", SPLIT + SIGMOID, PACKED),
        ("GLU_sigmoid_up_gate", SPLIT + "a = Sigmoid (u)\ny = Mul (a, g)", PACKED),
        (
            "GLU_sigmoid",
            "g, u = Split <axis = 1, num_outputs = 2> (x)\n" + SIGMOID,
            "float[b,4,16] x",
        ),
        ("shapes_not_proved", "g, u = Split <axis = -1> (x, uneven)\n" + SIGMOID, PACKED),
        ("GLU_identity_gate_up", SPLIT + BILINEAR, PACKED),
        ("GLU_identity_up_gate", SPLIT + "y = Mul (u, g)", PACKED),
        (
            "GLU_sigmoid_gate_up",
            "g = Slice (x, i0, i8, last)\nu = Slice (x, i8, i16, last)\n" + SIGMOID,
            PACKED,
        ),
        (
            "GLU_sigmoid_up_gate",
            "g = Slice (x, i8, i16, last)\nu = Slice (x, i0, i8, last)\n" + SIGMOID,
            PACKED,
        ),
        (
            "GLU_sigmoid_interleaved",
            "g = Slice (x, i0, end, last, i2)\nu = Slice (x, i1, end, last, i2)\n" + SIGMOID,
            PACKED,
        ),
        (
            "GLU_sigmoid",
            "g = Slice (x, i1, end, last, i2)\nu = Slice (x, i0, end, last, i2)\n" + SIGMOID,
            PACKED,
        ),
        (
            "GLU_sigmoid",
            "g = Slice (x, i0, i8, last)\nu = Slice (z, i8, i16, last)\n" + SIGMOID,
            PACKED + ", float[b,s,16] z",
        ),
        (
            "GLU_sigmoid",
            "g = Slice (x, i0, i8, last)\nu = Slice (x, i0, i8, last)\n" + SIGMOID,
            PACKED,
        ),
        (
            "GLU_sigmoid",
            "g = Slice (x, i0, i8, last)\nu = Slice (x, i0, end, last, i2)\n" + SIGMOID,
            PACKED,
        ),
        (
            "GLU_sigmoid_gate_up",
            "g = Gather <axis = -1> (x, first)\nu = Gather <axis = -1> (x, second)\n" + SIGMOID,
            PACKED,
        ),
        (
            "GLU_sigmoid_interleaved",
            "g = Gather <axis = -1> (x, even)\nu = Gather <axis = -1> (x, odd)\n" + SIGMOID,
            PACKED,
        ),
        (
            "GLU_identity_interleaved",
            "g = Gather <axis = -1> (x, even)\nu = Gather <axis = -1> (x, odd)\n" + BILINEAR,
            PACKED,
        ),
        (
            "GLU_sigmoid_gate_up",
            "v = Reshape (x, pairs)\ng = Gather <axis = 2> (v, s0)\nu = Gather <axis = 2> (v, s1)\n"
            + SIGMOID,
            PACKED,
        ),
        (
            "GLU_sigmoid_interleaved",
            "v = Reshape (x, twos)\ng = Gather <axis = 3> (v, s0)\nu = Gather <axis = 3> (v, s1)\n"
            + SIGMOID,
            PACKED,
        ),
        ("GLU_identity", "g = MatMul (x, w)\nu = MatMul (x, w2)\n" + BILINEAR, ROWS),
        (
            "GLU_identity",
            "g = MatMul (x, w)\nt = MatMul (x, w2)\nu = Add (b, t)\n" + BILINEAR,
            ROWS,
        ),
        (None, "g = MatMul (x, w)\nu = MatMul (z, w2)\n" + BILINEAR, ROWS + ", float[b,s,8] z"),
        (None, "g = MatMul (x, w)\nu = MatMul (x, d)\n" + BILINEAR, ROWS + ", float[8,8] d"),
        (None, "g = MatMul (x, w)\ny = Mul (g, g)", ROWS),
        ("GLU_identity", "g = Gemm (x, w)\nu = Gemm (x, w2)\n" + BILINEAR, "float[s,8] x"),
        (
            None,
            "g = MatMul (x, w)\nt = MatMul (x, w2)\nu = Add (t, z)\n" + BILINEAR,
            ROWS + ", float[b,s,8] z",
        ),
        (None, "g = other.MatMul (x, w)\nu = other.MatMul (x, w2)\n" + BILINEAR, ROWS),
        (None, "g = Div (x, w)\nu = Div (x, w2)\n" + BILINEAR, "float[b,8,8] x"),
    ],
)
def test_proposals(found: str | None, body: str, inputs: str) -> None:
    assert proposed(FuseGLU(), body, inputs, constants=NUMBERS, opset=24) == found


@pytest.mark.parametrize(
    ("up", "held"),
    [
        ("u = Clip (u0, lo, hi)", True),
        ("t = Min (u0, hi)\nu = Max (lo, t)", True),
        ("u = Clip (u0, lower, hi)", False),
        ('u = Clip (u0, "", hi)', False),
        ("u = Clip (u0, hi, lo)", False),
        ("u = Clip (u0, nan, hi)", False),
        ("u = Clip (u0, lo, computed)", False),
        ("u = Min (u0, hi, hi)", False),
        ("u = Min (u0, computed)", False),
        ("u = Max (u0, nan)", False),
        ("u = Max (u0, lo)", False),
    ],
)
@pytest.mark.parametrize(
    ("gate", "same"),
    [
        ("g = Min (g0, hi)", True),
        ("g = Clip (g0, lower, hi)", True),
        ("g = Min (g0, two)", False),
        ("g = Identity (g0)", False),
    ],
)
def test_clamps_join_where_both_stop_at_one_limit(
    gate: str, same: bool, up: str, held: bool
) -> None:
    body = f"{gate}\n{up}\na = Swish (g)\n{PRODUCT}"
    inputs = f"{UNCLAMPED}, float computed"
    kind = "GLU_swish_clampgate" if same and held else "GLU_swish"
    assert proposed(FuseGLU(), body, inputs, constants=NUMBERS, opset=24) == kind


def test_the_number_of_a_swish_is_its_beta() -> None:
    for attribute, beta in (("<alpha = 2.0>", 2.0), ("", 1.0)):
        found = outcome(
            FuseGLU(), f"a = Swish {attribute} (g)\n{PRODUCT}", PAIR, constants=NUMBERS, opset=24
        )
        assert isinstance(found, Rewrite)
        assert found.attributes == {"beta": beta}


def test_a_gate_clamped_before_and_behind_its_activation() -> None:
    """The op has one clamp: the other stays in front."""
    body = "g = Min (g0, two)\na0 = Swish (g)\na = Min (a0, hi)\nu = Clip (u0, lo, hi)\n"
    found = outcome(FuseGLU(), body + PRODUCT, UNCLAMPED, constants=NUMBERS, opset=24)
    assert isinstance(found, Rewrite)
    assert found.spec.op_type == "GLU_swish_clampact"
    assert [value.name for value in found.inputs] == ["g", "u0"]
    assert found.attributes["limit"] == 7.0
