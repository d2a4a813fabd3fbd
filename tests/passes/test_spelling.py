"""Each idea of the algebra: how many ways it is spelled, and that each way computes it."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from fusenorm.passes import spelling
from fusenorm.passes.pattern import Const, Op, Pattern, Reduce, Var
from tests.graphs import rows
from tests.passes.test_speller import nodes, spelled, value

X = Var("x")
POSITIVE = Op("Exp", (X,))
ALL = 1000  # more spellings than any of them has


def sigmoid(x: np.ndarray) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-x)))


def mean(x: np.ndarray) -> np.ndarray:
    return np.asarray(x.mean(-1, keepdims=True))


TABLE: dict[str, tuple[Callable[[], Pattern], Callable[[np.ndarray], np.ndarray], int]] = {
    "product": (lambda: spelling.product(X, Const(3), Op("Neg", (X,))), lambda x: -3 * x * x, 12),
    "reciprocal": (lambda: spelling.reciprocal(POSITIVE), lambda x: np.exp(-x), 3),
    "square": (lambda: spelling.square(X), np.square, 3),
    "cube": (lambda: spelling.cube(X), lambda x: x**3, 7),
    "root": (lambda: spelling.root(POSITIVE), lambda x: np.exp(x / 2), 2),
    "over_root": (lambda: spelling.over_root(X, POSITIVE), lambda x: x / np.exp(x / 2), 16),
    "mean": (lambda: spelling.mean(X, "x"), mean, 8),
    "mean_square": (lambda: spelling.mean_square(X, "x"), lambda x: mean(x * x), 30),
    "centred": (lambda: spelling.centred(X, "x"), lambda x: x - mean(x), 8),
    "half": (lambda: spelling.half(X), lambda x: x / 2, 3),
    "sigmoid": (lambda: spelling.sigmoid(X), sigmoid, 19),
    "half_of_product": (
        lambda: spelling.half_of_product(X, Op("Neg", (X,))),
        lambda x: -x * x / 2,
        18,
    ),
    "erf_argument": (lambda: spelling.erf_argument(X), lambda x: x / math.sqrt(2), 3),
    "tanh_argument": (
        lambda: spelling.tanh_argument(X),
        lambda x: math.sqrt(2 / math.pi) * (x + 0.044715 * x**3),
        392,
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_every_spelling_computes_the_idea(name: str) -> None:
    pattern, formula, count = TABLE[name]
    models = spelled(pattern(), limit=ALL)
    assert len(models) == count
    for model in models:
        (info,) = model.graph.inputs
        x = rows(*info.shape.numpy()).astype(np.float64)  # type: ignore[union-attr]
        np.testing.assert_allclose(value(model), formula(x), rtol=2e-5, atol=2e-5)


def test_a_variance_is_of_the_deviation_or_a_difference_of_means() -> None:
    deviation = Op("Sub", (X, Reduce("ReduceMean", X)))
    models = spelled(spelling.variance(X, deviation, "x"), limit=40)
    assert {nodes(model)[-1] for model in models} == {"ReduceMean", "Div", "Mul", "Sub"}
    for model in models:
        (info,) = model.graph.inputs
        x = rows(*info.shape.numpy())  # type: ignore[union-attr]
        np.testing.assert_allclose(value(model), x.var(-1, keepdims=True), rtol=2e-5, atol=2e-5)
