"""Nodes evaluated on arrays: exactly in wide types, rounded once in 16 bits, or refused."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import helper

from fusenorm.ops import ACTIVATIONS, DOMAIN, Gated
from fusenorm.passes.evaluate import EvaluationError, evaluate
from tests.graphs import rows

HALF = [np.float16, ml_dtypes.bfloat16]
X = rows(2, 3, 8)
SCALE, BIAS = np.linspace(0.5, 1.5, 8), np.linspace(-1, 1, 8)


def one(op: str, *arrays: np.ndarray, opset: int = 23, **attributes: object) -> np.ndarray:
    """The first output of one standard node."""
    names = [f"i{index}" for index in range(len(arrays))]
    node = helper.make_node(op, names, ["y"], **attributes)
    (y,) = evaluate([node], dict(zip(names, arrays, strict=True)), ["y"], (), opset)
    return y


def normalised(
    x: np.ndarray, axis: int = -1, epsilon: float = 1e-5, *, centred: bool = True
) -> np.ndarray:
    axes = tuple(range(axis % x.ndim, x.ndim))
    c = x - x.mean(axes, keepdims=True) if centred else x
    return c / np.sqrt((c**2).mean(axes, keepdims=True) + epsilon)


def rounds_once(got: np.ndarray, exact: np.ndarray) -> None:
    """`got` is `exact` rounded to its type, but where f32 statistics sit at a rounding edge."""
    wanted = exact.astype(got.dtype)
    step = np.abs(np.spacing(wanted.astype(np.float32))) * 2.0 ** (
        23 - ml_dtypes.finfo(got.dtype).nmant
    )
    assert (np.abs(got.astype(np.float64) - wanted.astype(np.float64)) <= step).all()
    assert np.mean(got == wanted) > 0.95


@pytest.mark.parametrize("kind", HALF)
@pytest.mark.parametrize(("axis", "epsilon"), [(-1, 1e-5), (2, 0.5), (1, 1e-5), (-2, 0.5)])
def test_layer_normalization_in_16_bits(kind: type, axis: int, epsilon: float) -> None:
    x, shape = X.astype(kind), X.shape[axis:]
    scale = np.linspace(0.5, 1.5, math.prod(shape)).reshape(shape).astype(kind)
    bias = np.linspace(-1, 1, math.prod(shape)).reshape(shape).astype(kind)
    got = one("LayerNormalization", x, scale, bias, axis=axis, epsilon=epsilon)
    assert got.dtype == kind
    wide = normalised(x.astype(np.float64), axis, epsilon)
    rounds_once(got, wide * scale.astype(np.float64) + bias.astype(np.float64))


@pytest.mark.parametrize("kind", HALF)
def test_defaults_of_the_norms(kind: type) -> None:
    x, scale = (X * 1e-3).astype(kind), SCALE.astype(kind)  # small, so that epsilon shows
    wide, factor = x.astype(np.float64), scale.astype(np.float64)
    rounds_once(one("LayerNormalization", x, scale), normalised(wide) * factor)
    got = one("RMSNormalization", x, scale)
    rounds_once(got, normalised(wide, centred=False) * factor)
    explicit = one("RMSNormalization", x, scale, axis=2, epsilon=1e-5, stash_type=1)
    np.testing.assert_array_equal(got, explicit)
    plain = one("LayerNormalization", x, scale, axis=-1, stash_type=1)
    np.testing.assert_array_equal(plain, one("LayerNormalization", x, scale))


def test_16_bit_norms_with_a_wide_scale_stay_16_bit() -> None:
    x = X.astype(np.float16)
    got = one("RMSNormalization", x, SCALE.astype(np.float32), axis=1, epsilon=0.25)
    assert got.dtype == np.float16
    wide = normalised(x.astype(np.float64), 1, 0.25, centred=False)
    rounds_once(got, wide * SCALE.astype(np.float32))


def test_large_16_bit_rows_do_not_overflow_on_the_way() -> None:
    x = np.full((1, 8), 60000, np.float16)
    np.testing.assert_array_equal(one("RMSNormalization", x, np.ones(8, np.float16)), [[1] * 8])


@pytest.mark.parametrize("kind", HALF)
@pytest.mark.parametrize(
    ("op", "row", "attributes"),
    [
        ("Gelu", "gelu", {}),
        ("Gelu", "gelu", {"approximate": "none"}),
        ("Gelu", "gelu_tanh", {"approximate": "tanh"}),
        ("Sigmoid", "sigmoid", {}),
        ("Swish", "swish", {}),
        ("Swish", "swish", {"alpha": 1.702}),
    ],
)
def test_activations_in_16_bits(
    kind: type, op: str, row: str, attributes: dict[str, object]
) -> None:
    x = rows(5, 40, seed=2).astype(kind)
    got = one(op, x, opset=24, **attributes)
    assert got.dtype == kind
    more = {"beta": attributes.get("alpha", 1.0)} if row == "swish" else {}
    exact = ACTIVATIONS[row].numpy(x.astype(np.float64), **more)
    np.testing.assert_array_equal(got, exact.astype(kind))


@pytest.mark.parametrize("alpha", [None, 1.702])
def test_swiglu_rounds_before_and_after_the_product(alpha: float | None) -> None:
    a, b = rows(5, 40).astype(np.float16), rows(5, 40, seed=1).astype(np.float16)
    got = one("SwiGLU", a, b, opset=28, **({} if alpha is None else {"alpha": alpha}))
    act = ACTIVATIONS["swish"].numpy(a.astype(np.float64), beta=alpha or 1.0)
    np.testing.assert_array_equal(got, act.astype(np.float16) * b)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_wide_types_are_computed_in_themselves(kind: type) -> None:
    x, scale = X.astype(kind), SCALE.astype(kind)
    got = one("LayerNormalization", x, scale, BIAS.astype(kind))
    assert got.dtype == kind
    exact = normalised(x.astype(np.float64), epsilon=np.float32(1e-5)) * scale + BIAS
    np.testing.assert_allclose(got, exact, rtol=0, atol=20 * np.finfo(kind).eps)


def test_functions_run_and_round_inside_too() -> None:
    spec = Gated("swish", "pair", "f16")
    feeds = {"gate": rows(3, 8).astype(np.float16), "up": rows(3, 8, seed=1).astype(np.float16)}
    node = helper.make_node(spec.op_type, ["gate", "up"], ["y"], domain=DOMAIN, beta=1.0)
    (y,) = evaluate([node], feeds, ["y"], [spec.function(18)], 18)
    exact = ACTIVATIONS["swish"].numpy(feeds["gate"].astype(np.float64), beta=1.0)
    rounds_once(y, exact.astype(np.float16) * feeds["up"])


def test_a_mix_of_types_counts_as_16_bits() -> None:
    body = [
        helper.make_node("Cast", ["half"], ["wide"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Add", ["wide", "x"], ["y"]),
        helper.make_node("Sigmoid", ["half"], ["s"]),
    ]
    half = rows(4, 64).astype(np.float16)
    x = rows(4, 64, seed=1)
    y, s = evaluate(body, {"x": x, "half": half}, ["y", "s"], (), 18)
    np.testing.assert_array_equal(y, x + half.astype(np.float32))
    exact = ACTIVATIONS["sigmoid"].numpy(half.astype(np.float64))
    np.testing.assert_array_equal(s, exact.astype(np.float16))


def test_outputs_come_in_the_order_asked_for() -> None:
    nodes = [helper.make_node("Neg", ["x"], ["a"]), helper.make_node("Abs", ["a"], ["b"])]
    x = np.float32([1, -2])
    b, a = evaluate(nodes, {"x": x}, ["b", "a"], (), 18)
    np.testing.assert_array_equal(a, -x)
    np.testing.assert_array_equal(b, np.abs(x))


@pytest.mark.parametrize(
    ("op", "arrays"),
    [
        ("Gather", [np.zeros((2, 2), np.float32), np.array(5)]),
        ("MatMul", [np.zeros((2, 3), np.float32), np.zeros((2, 3), np.float32)]),
        ("Reshape", [np.zeros(6, np.float32), np.array([4, 4])]),
        ("NoSuchOperator", [np.zeros(6, np.float32)]),
    ],
)
def test_what_cannot_run_says_so(op: str, arrays: list[np.ndarray]) -> None:
    with pytest.raises(EvaluationError):
        one(op, *arrays)


def test_infinities_are_results_not_warnings() -> None:
    got = one("Div", np.float32([1, -1, 0]), np.float32([0, 0, 0]))
    assert got[0] == np.inf
    assert got[1] == -np.inf
    assert np.isnan(got[2])
