"""What the tests of other fusers ask of norms and activations, and what we answer."""

from __future__ import annotations

import numpy as np
import pytest

from tests.graphs import fused_ops, model, reasons, rows, same

RMS = """
  p = Pow({x}, two)
  m = ReduceMean<keepdims = 1>(p, last)
  e = Add(m, eps)
  q = Sqrt(e)
  i = Reciprocal(q)
  n = Mul({x}, i)
  y = Mul(scale, n)
"""
ERF = "d = Div(x, root)\ne = Erf(d)\na = Add(e, one)\nt = Mul(x, a)\ny = Mul(half, t)"


def numbers(dtype: type = np.float32, **changed: float) -> dict[str, np.ndarray]:
    plain = {"two": 2.0, "eps": 1e-6, "root": 2**0.5, "one": 1.0, "half": 0.5, **changed}
    return {"last": np.array([-1], np.int64)} | {k: np.array(v, dtype) for k, v in plain.items()}


def used(body: str, constants: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: v for name, v in constants.items() if f" {name})" in body or f"({name}," in body}


@pytest.mark.parametrize("sums", ["t = Add(x, r)\ns = Add(t, b)", "t = Add(x, b)\ns = Add(t, r)"])
@pytest.mark.parametrize(
    ("norm", "op"),
    [("y = LayerNormalization(s, scale)", "SkipLayerNorm"), (RMS.format(x="s"), "SkipRMSNorm")],
)
def test_a_bias_and_a_scale_computed_at_run_time(sums: str, norm: str, op: str) -> None:
    body = f"{sums}\n{norm}"
    inputs = "float[2,3,8] x, float[2,3,8] r, float[8] b, float[8] scale"
    proto = model(body, inputs, "float[2,3,8] y", constants=used(body, numbers()))
    feeds = {"x": rows(2, 3, 8), "r": rows(2, 3, 8, seed=1), "b": rows(8, seed=2)}
    report = same(proto, {**feeds, "scale": rows(8, seed=3)})
    assert [(site.op, site.status) for site in report.sites] == [(op, "fused")]


def test_a_residual_of_rank_two() -> None:
    body = f"s = Add(x, r)\n{RMS.format(x='s')}"
    inputs = "float[n,8] x, float[n,8] r, float[8] scale"
    proto = model(body, inputs, "float[n,8] y", constants=used(body, numbers()))
    feeds = {"x": rows(5, 8), "r": rows(5, 8, seed=1), "scale": rows(8, seed=2)}
    assert fused_ops(same(proto, feeds)) == ["SkipRMSNorm"]


def test_whole_numbers_are_cast_first() -> None:
    body = f"f = Cast<to = 1>(x)\n{RMS.format(x='f')}"
    constants = used(body, numbers())
    proto = model(body, "int32[b,s,8] x, float[8] scale", constants=constants)
    x = rows(2, 3, 8, seed=1).astype(np.int32)
    assert fused_ops(same(proto, {"x": x, "scale": rows(8)})) == ["RMSNorm"]


def test_no_fused_op_computes_in_f64() -> None:
    body = RMS.format(x="x")
    constants = used(body, numbers(np.float64))
    proto = model(body, "double[b,s,8] x, double[8] scale", "double[b,s,8] y", constants=constants)
    feeds = {"x": rows(2, 3, 8, dtype=np.float64), "scale": rows(8, dtype=np.float64)}
    assert reasons(same(proto, feeds)) == {"types"}


@pytest.mark.parametrize(
    ("body", "changed", "reason"),
    [
        (ERF, {"root": 2.0}, "constant"),
        (ERF, {"half": 0.3}, "constant"),
        (ERF.replace("Erf", "Tanh"), {}, "operator"),
    ],
)
def test_nearly_a_gelu(body: str, changed: dict[str, float], reason: str) -> None:
    report = same(model(body, constants=used(body, numbers(**changed))), {"x": rows(2, 3, 8)})
    assert [(site.op, site.reason) for site in report.sites] == [("Gelu", reason)]


def test_silu_between_casts() -> None:
    body = "f = Cast<to = 1>(x)\ng = Sigmoid(f)\nm = Mul(f, g)\ny = Cast<to = 10>(m)"
    proto = model(body, "float16[b,s,8] x", "float16[b,s,8] y")
    report = same(proto, {"x": rows(2, 3, 8, dtype=np.float16)}, bound=1e-3)
    assert fused_ops(report) == ["Swish"]
