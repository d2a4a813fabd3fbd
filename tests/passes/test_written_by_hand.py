"""Spellings written by hand, so that one the patterns forget is missed here and not only there."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.graphs import fused_ops, model, rows, same

NUMBERS = {
    "zero5": 0.5, "minus05": -0.5, "one": 1.0, "minus1": -1.0, "two": 2.0, "three": 3.0,
    "width": 8.0, "part": 1 / 8, "root2": math.sqrt(2), "root05": math.sqrt(0.5),
    "c3": 0.044715, "root2pi": math.sqrt(2 / math.pi), "eps": 1e-5, "k": 1.702,
}  # fmt: skip
CONSTANTS = {
    **{name: np.float32(number) for name, number in NUMBERS.items()},
    "last": np.array([-1], np.int64),
    "third": np.array([2], np.int64),
    "g": np.linspace(0.5, 1.5, 8, dtype=np.float32),
    "b": np.linspace(-1, 1, 8, dtype=np.float32),
}


def check(body: str, op: str, inputs: str = "float[b,s,8] x") -> None:
    """The graph fuses into `op` alone and keeps its outputs."""
    words = body.replace("(", " ").replace(")", " ").replace(",", " ").split()
    constants = {name: array for name, array in CONSTANTS.items() if name in words}
    names = [declared.split()[-1] for declared in inputs.split(", ")]
    feeds = {name: rows(2, 3, 8, seed=i) for i, name in enumerate(names)}
    report = same(model(body, inputs, constants=constants), feeds, bound=1e-5)
    assert [(site.op, site.status) for site in report.sites] == [(op, "fused")]


SQUARES = ["sq = Mul(x, x)", "sq = Pow(x, two)"]
MEANS = [
    "ms = ReduceMean<keepdims = 1>(sq, last)",
    "ms = ReduceMean(sq, third)",
    "t = ReduceSum<keepdims = 1>(sq, last)\nms = Div(t, width)",
    "t = ReduceSum<keepdims = 1>(sq, third)\nms = Mul(t, part)",
    "t = ReduceSum<keepdims = 1>(sq, last)\nms = Mul(part, t)",
    "t = ReduceSumSquare<keepdims = 1>(x, last)\nms = Div(t, width)",
    "t = ReduceSumSquare<keepdims = 1>(x, last)\nms = Mul(t, part)",
]
SHIFTED = "v = Add(ms, eps)"
OVER_ROOT = [
    "r = Sqrt(v)\nn = Div(x, r)",
    "r = Pow(v, zero5)\nn = Div(x, r)",
    "r = Sqrt(v)\ni = Reciprocal(r)\nn = Mul(x, i)",
    "r = Sqrt(v)\ni = Div(one, r)\nn = Mul(i, x)",
    "r = Sqrt(v)\ni = Pow(r, minus1)\nn = Mul(x, i)",
    "r = Pow(v, zero5)\ni = Reciprocal(r)\nn = Mul(x, i)",
    "i = Pow(v, minus05)\nn = Mul(x, i)",
]
AFFINE = [
    "y = Mul(n, g)",
    "y = Mul(g, n)",
    "m = Mul(n, g)\ny = Add(m, b)",
    "m = Mul(g, n)\ny = Add(b, m)",
    "y = Add(n, b)",
]


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("square", SQUARES)
def test_rms_norm_by_its_mean(square: str, mean: str) -> None:
    if "SumSquare" in mean:
        square = ""
    check("\n".join((square, mean, SHIFTED, OVER_ROOT[0], AFFINE[0])), "RMSNorm")


@pytest.mark.parametrize("division", OVER_ROOT)
def test_rms_norm_by_its_division(division: str) -> None:
    check("\n".join((SQUARES[0], MEANS[0], "v = Add(eps, ms)", division, AFFINE[0])), "RMSNorm")


@pytest.mark.parametrize("affine", AFFINE)
def test_rms_norm_by_its_affine_map(affine: str) -> None:
    check("\n".join((SQUARES[1], MEANS[1], SHIFTED, OVER_ROOT[0], affine)), "RMSNorm")


@pytest.mark.parametrize(
    "scaled",
    [
        "r = Sqrt(v)\nm = Mul(x, g)\ny = Div(m, r)",
        "r = Sqrt(v)\nm = Mul(g, x)\ni = Reciprocal(r)\ny = Mul(m, i)",
        "r = Sqrt(v)\nm = Div(g, r)\ny = Mul(x, m)",
        "r = Sqrt(v)\ni = Reciprocal(r)\nm = Mul(i, g)\ny = Mul(x, m)",
        "i = Pow(v, minus05)\nm = Mul(i, g)\nz = Mul(x, m)\ny = Add(z, b)",
    ],
)
def test_rms_norm_scaled_on_the_way(scaled: str) -> None:
    check("\n".join((SQUARES[0], MEANS[0], SHIFTED, scaled)), "RMSNorm")


@pytest.mark.parametrize(
    "mean",
    [
        "mu = ReduceMean<keepdims = 1>(x, last)",
        "t1 = ReduceSum<keepdims = 1>(x, last)\nmu = Div(t1, width)",
        "t1 = ReduceSum<keepdims = 1>(x, last)\nmu = Mul(t1, part)",
    ],
)
@pytest.mark.parametrize(
    "variance",
    [
        "sq = Mul(c, c)\nms = ReduceMean<keepdims = 1>(sq, last)",
        "sq = Pow(c, two)\nms = ReduceMean<keepdims = 1>(sq, last)",
        "t = ReduceSumSquare<keepdims = 1>(c, last)\nms = Div(t, width)",
        "sq = Mul(x, x)\nm2 = ReduceMean<keepdims = 1>(sq, last)\nmm = Mul(mu, mu)\n"
        "ms = Sub(m2, mm)",
        "sq = Pow(x, two)\nm2 = ReduceMean<keepdims = 1>(sq, last)\nmm = Pow(mu, two)\n"
        "ms = Sub(m2, mm)",
    ],
)
def test_layer_norm_by_mean_and_variance(mean: str, variance: str) -> None:
    tail = "v = Add(ms, eps)\nr = Sqrt(v)\nn = Div(c, r)\nm = Mul(n, g)\ny = Add(m, b)"
    check("\n".join((mean, "c = Sub(x, mu)", variance, tail)), "LayerNorm")


ERF = ["d = Div(x, root2)\ne = Erf(d)", "d = Mul(root05, x)\ne = Erf(d)"]
TANH = [
    "x3 = Pow(x, three)\nu = Mul(x3, c3)\nw = Add(x, u)\nd = Mul(w, root2pi)",
    "x2 = Mul(x, x)\nx3 = Mul(x2, x)\nu = Mul(c3, x3)\nw = Add(u, x)\nd = Mul(root2pi, w)",
    "x2 = Pow(x, two)\nx3 = Mul(x, x2)\nu = Mul(c3, x3)\nw = Add(u, x)\nd = Mul(root2pi, w)",
    "x2 = Mul(x, x)\nxc = Mul(x, c3)\nu = Mul(xc, x2)\nw = Add(x, u)\nd = Mul(w, root2pi)",
    "x2 = Mul(x, x)\nxc = Mul(x2, c3)\nu = Mul(xc, x)\nw = Add(x, u)\nd = Mul(w, root2pi)",
    "x2 = Mul(x, x)\nu = Mul(x2, c3)\nf = Add(one, u)\nxs = Mul(x, root2pi)\nd = Mul(xs, f)",
    "xc = Mul(x, c3)\nu = Mul(xc, x)\nf = Add(u, one)\nxf = Mul(x, f)\nd = Mul(xf, root2pi)",
    "x2 = Mul(x, x)\nu = Mul(x2, c3)\nf = Add(u, one)\nsf = Mul(root2pi, f)\nd = Mul(x, sf)",
]
HALVED = [
    "a = Add(e, one)\np = Mul(x, a)\ny = Mul(p, zero5)",
    "a = Add(e, one)\np = Mul(a, x)\ny = Div(p, two)",
    "a = Add(one, e)\nh = Mul(x, zero5)\ny = Mul(h, a)",
    "a = Add(e, one)\nh = Div(x, two)\ny = Mul(a, h)",
    "a = Add(e, one)\nh = Mul(a, zero5)\ny = Mul(x, h)",
    "a = Add(e, one)\nh = Div(a, two)\ny = Mul(x, h)",
]


@pytest.mark.parametrize("erf", ERF)
@pytest.mark.parametrize("halved", HALVED)
def test_gelu(erf: str, halved: str) -> None:
    check(f"{erf}\n{halved}", "Gelu")


@pytest.mark.parametrize("argument", TANH)
def test_gelu_tanh_by_its_argument(argument: str) -> None:
    check(f"{argument}\ne = Tanh(d)\n{HALVED[0]}", "Gelu")


@pytest.mark.parametrize("halved", HALVED)
def test_gelu_tanh_by_its_halves(halved: str) -> None:
    check(f"{TANH[0]}\ne = Tanh(d)\n{halved}", "Gelu")


SWISH = [
    "s = Sigmoid({z})\ny = Mul(x, s)",
    "n = Neg({z})\ne = Exp(n)\na = Add(e, one)\ny = Div(x, a)",
    "n = Mul({z}, minus1)\ne = Exp(n)\na = Add(one, e)\ny = Div(x, a)",
    "n = Neg({z})\ne = Exp(n)\na = Add(e, one)\ns = Reciprocal(a)\ny = Mul(x, s)",
    "n = Mul(minus1, {z})\ne = Exp(n)\na = Add(e, one)\ns = Div(one, a)\ny = Mul(s, x)",
    "n = Neg({z})\ne = Exp(n)\na = Add(e, one)\ns = Pow(a, minus1)\ny = Mul(x, s)",
]


@pytest.mark.parametrize("beta", ["", "z = Mul(x, k)\n", "z = Mul(k, x)\n"])
@pytest.mark.parametrize("body", SWISH)
def test_swish(body: str, beta: str) -> None:
    check(beta + body.format(z="z" if beta else "x"), "Swish")


GATES = [
    "y = Sigmoid(x)",
    "n = Neg(x)\ne = Exp(n)\na = Add(e, one)\ny = Reciprocal(a)",
    "n = Mul(x, minus1)\ne = Exp(n)\na = Add(e, one)\ny = Div(one, a)",
    "y = Relu(x)",
    "s = Sigmoid(x)\ny = Mul(s, x)",
    "z = Mul(x, k)\ns = Sigmoid(z)\ny = Mul(x, s)",
    f"{ERF[0]}\n{HALVED[2]}",
    f"{TANH[0]}\ne = Tanh(d)\n{HALVED[0]}",
]


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("product", ["Mul(act, up)", "Mul(up, act)"])
def test_glu(gate: str, product: str) -> None:
    body = f"{gate.replace('y =', 'act =')}\ny = {product}"
    check(body, "GLU", "float[b,s,8] x, float[b,s,8] up")


def test_a_plain_product_is_nothing() -> None:
    body = "a = Mul(x, z)\ny = Neg(a)"
    feeds = {"x": rows(2, 3, 8), "z": rows(2, 3, 8, seed=1)}
    report = same(model(body, "float[b,s,8] x, float[b,s,8] z"), feeds)
    assert fused_ops(report) == []
