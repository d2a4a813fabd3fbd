"""Each guard of the matcher and the rules, by a graph that is wrong without it."""

from __future__ import annotations

import numpy as np
import pytest

from tests.graphs import fused_ops, model, reasons, rows, same

LAST = {"last": np.array([-1], np.int64)}
GAMMA = np.linspace(0.5, 1.5, 8, dtype=np.float32)
X = {"x": rows(2, 3, 8)}


def _rms(square: str = "sq = Mul(x, x)", mean: str = "", tail: str = "y = Div(x, root)") -> str:
    mean = mean or "ms = ReduceMean<keepdims = 1>(sq, last)"
    return f"{square}\n{mean}\nshifted = Add(ms, eps)\nroot = Sqrt(shifted)\n{tail}"


@pytest.mark.parametrize("factor", [1.001, 0.999, 1.0001])
def test_constants_must_be_the_formula_s(factor: float) -> None:
    body = "d = Div(x, r)\ne = Erf(d)\na = Add(e, one)\nh = Mul(x, half)\ny = Mul(h, a)"
    constants = {
        "r": np.float32(np.sqrt(2) * factor),
        "one": np.float32(1),
        "half": np.float32(0.5),
    }
    report = same(model(body, constants=constants), X)
    assert fused_ops(report) == []
    assert reasons(report) == {"constant"}


@pytest.mark.parametrize(
    ("op", "number", "hits"),
    [("Div", 8.0, True), ("Div", 8.001, False), ("Mul", 0.125, True), ("Mul", 0.12501, False)],
)
def test_a_sum_is_a_mean_only_with_the_width(op: str, number: float, hits: bool) -> None:
    mean = f"total = ReduceSum<keepdims = 1>(sq, last)\nms = {op}(total, n)"
    constants = {**LAST, "eps": np.float32(1e-5), "n": np.float32(number)}
    report = same(model(_rms(mean=mean), constants=constants), X)
    assert (fused_ops(report) == ["RMSNorm"]) == hits


def test_a_tiny_width_is_not_any_width() -> None:
    mean = "total = ReduceSum<keepdims = 1>(sq, last)\nms = Mul(total, n)"
    constants = {**LAST, "eps": np.float32(1e-5), "n": np.float32(1 / 4096 * 1.00001)}
    proto = model(_rms(mean=mean), "float[b,4096] x", "float[b,4096] y", constants=constants)
    report = same(proto, {"x": rows(2, 4096)})
    assert fused_ops(report) == []


def test_another_domain_s_operator_is_not_the_standard_s() -> None:
    import onnx.parser

    import fusenorm

    text = (
        '<ir_version: 8, opset_import: ["" : 18, "other" : 1]>\n'
        "graph (float[b,s,8] x) => (float[b,s,8] y) <float[b,s,8] g> {{\n"
        "g = {}Sigmoid(x)\ny = Mul(x, g)\n}}"
    )
    ours = fusenorm.optimize(onnx.parser.parse_model(text.format("")))
    assert fused_ops(ours.report) == ["Swish"]
    theirs = fusenorm.optimize(onnx.parser.parse_model(text.format("other.")))
    assert fused_ops(theirs.report) == []


def test_imports_nothing_uses_are_dropped() -> None:
    """onnxruntime saves every domain it knows, ours too once a library was registered."""
    proto = model("g = Sigmoid(x)\ny = Mul(x, g)")
    proto.opset_import.add(domain="fusenorm", version=1000)
    assert fused_ops(same(proto, X)) == ["Swish"]


@pytest.mark.parametrize("shape", [(8, 8), (3, 1), (2, 3, 8), (1, 1, 1, 8)])
def test_a_scale_that_is_not_one_row(shape: tuple[int, ...]) -> None:
    body = _rms(tail="n = Div(x, root)\ny = Mul(n, g)")
    x, out = (
        ("float[2,8,8] x", "float[2,8,8] y")
        if shape == (8, 8)
        else (
            "float[2,3,8] x",
            "float[1,2,3,8] y" if len(shape) == 4 else "float[2,3,8] y",
        )
    )
    constants = {**LAST, "eps": np.float32(1e-5), "g": rows(*shape)}
    proto = model(body, x, out, constants=constants)
    report = same(proto, {"x": rows(2, 8 if shape == (8, 8) else 3, 8)})
    # The norm itself may fuse; the product must stay outside.
    assert [s.attributes["kind"] for s in report.sites if s.status == "fused"] == [
        "RMSNorm_noscale"
    ]


@pytest.mark.parametrize("shape", [(1,), (), (1, 8), (1, 1, 8)])
def test_a_scale_that_is_one_row_in_disguise(shape: tuple[int, ...]) -> None:
    body = _rms(tail="n = Div(x, root)\ny = Mul(n, g)")
    constants = {**LAST, "eps": np.float32(1e-5), "g": rows(*shape) if shape else np.float32(0.7)}
    report = same(model(body, constants=constants), X)
    assert [site.attributes["kind"] for site in report.sites] == ["RMSNorm"]


def test_two_norms_may_share_one_scalar_scale() -> None:
    body = _rms(tail="n = Div(x, root)\ny0 = Mul(n, g)\nz = Neg(x)\n") + (
        "sq2 = Mul(z, z)\nms2 = ReduceMean<keepdims = 1>(sq2, last)\nsh2 = Add(ms2, eps)\n"
        "root2 = Sqrt(sh2)\nn2 = Div(z, root2)\nm2 = Mul(n2, g)\ny = Add(y0, m2)"
    )
    constants = {**LAST, "eps": np.float32(1e-5), "g": np.float32(0.7)}
    report = same(model(body, constants=constants), X)
    assert fused_ops(report) == ["RMSNorm", "RMSNorm"]


def test_an_epsilon_of_higher_rank_would_raise_the_output_s() -> None:
    body = _rms()
    constants = {**LAST, "eps": np.float32([[[1e-5]]])}
    proto = model(body, "float[s,8] x", "float[1,s,8] y", constants=constants)
    report = same(proto, {"x": rows(3, 8)})
    assert fused_ops(report) == []
    assert "not_scalar" in reasons(report)


def test_f64_is_left_in_f64() -> None:
    constants = {**LAST, "eps": np.float64(1e-5)}
    proto = model(_rms(), "double[b,s,8] x", "double[b,s,8] y", constants=constants)
    report = same(proto, {"x": X["x"].astype(np.float64)}, bound=1e-15)
    assert fused_ops(report) == []
    assert "types" in reasons(report)


def test_the_scale_may_not_be_computed_from_the_sum() -> None:
    body = """
      s = Add(x, r)
      g = ReduceMax<keepdims = 0>(s, first)
      y = LayerNormalization(s, g)
    """
    proto = model(
        body,
        "float[b,s,8] x, float[b,s,8] r",
        constants={"first": np.array([0, 1], np.int64)},
    )
    report = same(proto, {**X, "r": rows(2, 3, 8, seed=1)})
    assert fused_ops(report) == []
    assert reasons(report) == {"cycle"}


def test_not_even_inside_a_branch() -> None:
    body = """
      s = Add(x, r)
      g = If (flag) <
        then_branch = yes () => (float[8] z) { z = ReduceMax<keepdims = 0>(s, first) },
        else_branch = no () => (float[8] w) { w = ReduceMin<keepdims = 0>(s, first) }
      >
      y = LayerNormalization(s, g)
    """
    proto = model(
        body,
        "float[b,s,8] x, float[b,s,8] r, bool flag",
        constants={"first": np.array([0, 1], np.int64)},
    )
    feeds = {**X, "r": rows(2, 3, 8, seed=1), "flag": np.array(True)}
    assert fused_ops(same(proto, feeds)) == []


@pytest.mark.parametrize(("inner", "outer"), [(11, 1), (10, 1)])
def test_an_island_of_another_type_is_computation(inner: int, outer: int) -> None:
    body = (
        f"w = Cast<to = {inner}>(x)\n"
        + _rms("sq = Mul(w, w)", tail="d = Div(w, root)")
        + f"\ny = Cast<to = {outer}>(d)"
    )
    eps = np.array(1e-3, np.float64 if inner == 11 else np.float16)
    proto = model(body, constants={**LAST, "eps": eps})
    large = {"x": np.full((1, 1, 8), 1e20 if inner == 11 else 3.0, np.float32)}
    report = same(proto, large, bound=2.0**-9)
    kinds = [site.attributes["kind"] for site in report.sites if site.status == "fused"]
    assert "RMSNorm" not in kinds
    assert "RMSNorm_noscale" not in kinds


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_silu_without_an_island(dtype: str) -> None:
    body = "g = Sigmoid(x)\na = Mul(x, g)\ny = Mul(a, u)"
    proto = model(body, f"{dtype}[b,s,64] x, {dtype}[b,s,64] u", f"{dtype}[b,s,64] y")
    import fusenorm

    report = fusenorm.optimize(proto).report
    (site,) = report.sites
    assert (site.op, site.status) == ("GLU", "fused")
    assert site.attributes["activation"] == "swish"


def test_an_activation_of_unknown_width_fuses() -> None:
    body = "g = Sigmoid(x)\ny = Mul(x, g)"
    proto = model(body, "float[n,64,h,w] x", "float[n,64,h,w] y")
    assert fused_ops(same(proto, {"x": rows(1, 64, 3, 5)})) == ["Swish"]


def test_a_product_that_might_broadcast_is_no_glu() -> None:
    body = "g = Sigmoid(x)\ny = Mul(g, u)"
    proto = model(body, "float[b,s,8] x, float[c,s,8] u", "float[d,s,8] y")
    report = same(proto, {**X, "u": rows(1, 3, 8)})
    assert fused_ops(report) == []
    assert "shapes_not_proved" in reasons(report)


def test_statistics_do_not_have_the_rows_shape() -> None:
    body = "n, mean = LayerNormalization<axis = 1>(x, g)\na = Sigmoid(mean)\ny = Mul(a, n)"
    constants = {"g": GAMMA[:4].reshape(4, 1)}
    proto = model(body, "float[b,4,1] x", "float[b,4,1] y", constants=constants)
    report = same(proto, {"x": rows(2, 4, 1)})
    assert "GLU" not in fused_ops(report)


def test_two_branches_with_equal_names_report_both_sites() -> None:
    body = """
      y = If (flag) <
        then_branch = yes () => (float[b,s,8] z) { g = Sigmoid(x) z = Mul(x, g) },
        else_branch = no () => (float[b,s,8] w) { g = Sigmoid(x) w = Mul(u, g) }
      >
    """
    proto = model(body, "float[b,s,8] x, float[b,s,8] u, bool flag")
    feeds = {**X, "u": rows(2, 3, 8, seed=1), "flag": np.array(True)}
    report = same(proto, feeds)
    assert sorted(site.op for site in report.sites) == ["GLU", "Swish"]


def test_a_value_of_unknown_type_says_so() -> None:
    import onnx.parser

    import fusenorm

    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 18, "other" : 1]>\n'
        "graph (float[b,s,8] x) => (float[b,s,8] y) {\n"
        "a = other.Thing(x)\ng = Sigmoid(a)\ny = Mul(a, g)\n}"
    )
    report = fusenorm.optimize(proto).report
    assert reasons(report) == {"type_unknown"}
