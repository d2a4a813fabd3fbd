"""Residual sums in front of norms: every one joins its norm or is refused by name."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from fusenorm.passes import Canonicalize, FuseNorm, FuseResidualNorm, facts
from fusenorm.passes.fuse_residual import FuseResidual
from fusenorm.passes.pattern import Refusal
from fusenorm.passes.rewrite import Rewrite
from fusenorm.passes.speller import Speller, spellings
from fusenorm.report import Report, Site, collect_sites
from tests.graphs import fused, fused_ops, model, proposed, reasons, rows, same

GAMMA = np.linspace(0.5, 1.5, 8, dtype=np.float32)
BIAS = np.linspace(-1, 1, 8, dtype=np.float32)
THREE = "float[b,s,8] x, float[b,s,8] a, float[b,s,8] m"
FEEDS = {"x": rows(2, 3, 8), "a": rows(2, 3, 8, seed=1) / 3, "m": rows(2, 3, 8, seed=2) * 7}
NORM = """
  sq = Mul({0}, {0})
  ms = ReduceMean<keepdims = 1>(sq, last)
  shifted = Add(ms, eps)
  root = Sqrt(shifted)
  n = Div({0}, root)
  y = Mul(n, gamma)
"""
CONSTANTS = {"last": np.array([-1]), "eps": np.float32(1e-5), "gamma": GAMMA}


def _sites(report: Report, status: str) -> list[Site]:
    return [site for site in report.sites if site.status == status]


@pytest.mark.parametrize(
    ("sums", "joins"),
    [
        ("t = Add(x, a)\ns = Add(t, m)", {"s", "t", "m"}),  # GPT-J, NeoX
        ("t = Add(a, m)\ns = Add(x, t)", {"s", "t", "x"}),  # Falcon
        ("t = Add(a, m)\ns = Add(t, x)", {"s", "t", "x"}),
        ("s = Sum(x, a, m)", {"s", "s_sum_of_2", "m"}),
    ],
)
def test_three_terms_are_one_site_on_the_last_sum(sums: str, joins: set[str]) -> None:
    body = f"{sums}\n{NORM.format('s')}\nz = Add(s, y)"
    outputs = "float[b,s,8] z, float[b,s,8] s"
    proto = model(body, THREE, outputs, constants=CONSTANTS)
    report = same(proto, FEEDS)
    assert [(site.op, site.status) for site in report.sites] == [("SkipRMSNorm", "fused")]
    after, _ = fused(proto)
    (skip,) = (node for node in after.graph.node if node.op_type == "SkipRMSNorm")
    assert {*skip.input[:2], skip.output[1]} == joins


def test_a_sum_of_four_adds_from_left_to_right() -> None:
    inputs = ", ".join(f"float[b,s,8] {name}" for name in "xamn")
    feeds = {**FEEDS, "n": rows(2, 3, 8, seed=3) * 1e4}
    proto = model("y = Sum(x, a, m, n)", inputs)
    same(proto, feeds, bound=0)
    after, _ = fused(proto)
    assert [node.op_type for node in after.graph.node] == ["Add"] * 3


def test_a_16_bit_sum_of_three_rounds_once_and_stays() -> None:
    half = "float16[b,s,8]"
    body = "s = Sum(x, a, m)\ny = LayerNormalization(s, gamma)"
    proto = model(
        body,
        f"{half} x, {half} a, {half} m",
        f"{half} y",
        constants={"gamma": GAMMA.astype(np.float16)},
    )
    report = same(proto, {name: array.astype(np.float16) for name, array in FEEDS.items()})
    assert [(site.status, site.reason) for site in report.sites] == [("native", "rounding")]


@pytest.mark.parametrize(
    "sums",
    [
        "f = Add(a, bias)\ns = Add(x, f)",
        "f = Add(bias, a)\ns = Add(f, x)",
        "t = Add(x, a)\ns = Add(t, bias)",
        "t = Add(x, a)\ns = Add(bias, t)",
        "t = Add(x, a)\nu = Add(t, bias)\ns = Add(u, two)",
    ],
)
@pytest.mark.parametrize("shape", [(8,), (1, 1, 8)])
def test_a_bias_before_or_after_the_sum(sums: str, shape: tuple[int, ...]) -> None:
    body = f"{sums}\n{NORM.format('s')}"
    constants = {**CONSTANTS, "bias": BIAS.reshape(shape), "two": BIAS * 2}
    proto = model(body, THREE, constants=constants)
    report = same(proto, FEEDS)
    assert [(site.op, site.status) for site in report.sites] == [("SkipRMSNorm", "fused")]


@pytest.mark.parametrize(
    "sums",
    [
        "f = MatMul(x, w)\ns = Add(f, bias)",
        "f = MatMul(x, w)\ng = Add(f, bias)\ns = Add(g, two)",
        "s = Add(x, one)",
    ],
)
def test_a_bias_alone_is_no_residual(sums: str) -> None:
    constants = {
        **CONSTANTS, "bias": BIAS, "two": BIAS * 2, "one": np.float32(1), "w": rows(8, 8, seed=4),
    }  # fmt: skip
    report = same(model(f"{sums}\n{NORM.format('s')}", constants=constants), {"x": FEEDS["x"]})
    assert [(site.op, site.status) for site in report.sites] == [("RMSNorm", "fused")]


def test_a_factor_whose_product_is_an_output_is_not_taken_in() -> None:
    body = "m = Mul(x, half)\ns = Add(m, a)\ny = LayerNormalization(s, gamma)"
    outputs = ", ".join(f"float[b,s,8] {name}" for name in "yms")
    constants = {"half": np.float32(0.5), "gamma": GAMMA}
    proto = model(body, "float[b,s,8] x, float[b,s,8] a", outputs, constants=constants)
    *_, root = ir.from_proto(proto).graph
    found = FuseResidual().propose(root)
    assert isinstance(found, Rewrite)
    assert [value.name for value in found.inputs] == ["m", "a", "gamma"]


BETWEEN = [
    ("c = Clip(s, low, high)", "clipped", "c"),
    ("t = Max(s, low)\nc = Min(t, high)", "clipped", "c"),
    ("t = Max(low, s)\nc = Min(high, t)", "clipped", "c"),
    ("bound = ReduceMax<keepdims = 0>(x)\nt = Neg(bound)\nu = Max(s, t)\nc = Min(u, bound)",
     "clipped", "c"),
    ("c = Transpose<perm = [1, 0, 2]>(s)", "moved", "c"),
    ("c = Dropout(s)", "between", "c"),
    ("t = Clip(s, low, high)\nc = Dropout(t)", "between", "c"),
]  # fmt: skip


@pytest.mark.parametrize(("between", "reason", "node"), BETWEEN)
def test_what_keeps_a_sum_from_a_fused_norm_is_named(between: str, reason: str, node: str) -> None:
    constants = {**CONSTANTS, "low": np.float32(-2), "high": np.float32(2)}
    body = f"s = Add(x, a)\n{between}\n{NORM.format('c')}"
    inputs = "float[3,3,8] x, float[3,3,8] a"
    proto = model(body, inputs, "float[3,3,8] y", constants=constants)
    report = same(proto, {"x": rows(3, 3, 8), "a": rows(3, 3, 8, seed=1)})
    assert fused_ops(report) == ["RMSNorm"]
    (site,) = _sites(report, "refused")
    assert (site.op, site.reason, site.output) == ("SkipRMSNorm", reason, "s")
    assert site.detail is not None
    assert site.detail.startswith(f"{node}: ")
    assert site.nodes[0] == "s"


def test_what_keeps_a_sum_from_a_standard_norm_is_named() -> None:
    constants = {"gamma": GAMMA, "low": np.float32(-2), "high": np.float32(2)}
    body = "s = Add(x, a)\nc = Clip(s, low, high)\ny = LayerNormalization(c, gamma)"
    proto = model(body, "float[b,s,8] x, float[b,s,8] a", constants=constants)
    report = same(proto, {"x": FEEDS["x"], "a": FEEDS["a"]})
    assert [(site.status, site.reason) for site in report.sites] == [("native", "clipped")]


def test_a_16_bit_sum_read_in_f32_is_named() -> None:
    body = f"s = Add(x, a)\nc = Cast<to = 1>(s)\n{NORM.format('c')}"
    half = "float16[b,s,8]"
    proto = model(body, f"{half} x, {half} a", constants=CONSTANTS)
    feeds = {name: FEEDS[name].astype(np.float16) for name in ("x", "a")}
    report = same(proto, feeds)
    (site,) = _sites(report, "refused")
    assert (site.op, site.reason) == ("SkipRMSNorm", "between")


def test_a_sum_over_rows_of_unproved_width_is_named() -> None:
    body = f"t = MatMul(a, w)\ns = Add(x, t)\n{NORM.format('s')}"
    inputs = "float[b,s,8] x, float[b,s,8] a, float[8,k] w"
    report = same(
        model(body, inputs, constants=CONSTANTS),
        {"x": FEEDS["x"], "a": FEEDS["a"], "w": rows(8, 1)},
    )
    assert fused_ops(report) == ["RMSNorm"]
    (site,) = _sites(report, "refused")
    assert (site.op, site.reason, site.output) == ("SkipRMSNorm", "no_residual", "s")


def test_a_refused_sum_whose_add_ends_another_near_miss_is_still_named() -> None:
    """x + norm(a), as after a sandwich norm: the Add was also tried as the inner norm's bias."""
    inner = NORM.format("a").replace(" y =", " inner =")
    for name in ("sq", "ms", "shifted", "root", "n"):
        inner = inner.replace(f" {name} =", f" {name}0 =").replace(f"({name},", f"({name}0,")
        inner = inner.replace(f", {name})", f", {name}0)").replace(f"({name})", f"({name}0)")
    body = f"{inner}\ns = Add(inner, x)\nc = Clip(s, low, high)\n{NORM.format('c')}"
    constants = {**CONSTANTS, "low": np.float32(-2), "high": np.float32(2)}
    proto = model(body, "float[b,s,8] x, float[b,s,8] a", constants=constants)
    report = same(proto, {"x": FEEDS["x"], "a": FEEDS["a"]})
    assert fused_ops(report) == ["RMSNorm", "RMSNorm"]
    assert [site.reason for site in _sites(report, "refused")] == ["clipped"]


def test_a_sum_in_front_of_a_norm_over_two_axes_is_named() -> None:
    body = NORM.format("s").replace("gamma", "matrix").replace("last", "both")
    constants = {
        "matrix": rows(3, 8), "both": np.array([-2, -1]), "eps": np.float32(1e-5),
    }  # fmt: skip
    inputs = "float[b,3,8] x, float[b,3,8] a"
    proto = model(f"s = Add(x, a)\n{body}", inputs, "float[b,3,8] y", constants=constants)
    report = same(proto, {"x": FEEDS["x"], "a": FEEDS["a"]})
    assert fused_ops(report) == ["RMSNorm"]
    assert reasons(report) == {"moved"}


def test_a_sum_whose_check_failed_is_one_site() -> None:
    def refuse(rewrite: Rewrite, opset: int) -> Refusal:
        return Refusal("check_failed", "here", f"{rewrite.spec.op_type} at opset {opset}")

    body = f"s = Add(x, a)\n{NORM.format('s')}"
    proto = model(body, "float[b,s,8] x, float[b,s,8] a", constants=CONSTANTS)
    work = FuseNorm()(Canonicalize()(ir.from_proto(proto)).model).model
    FuseResidualNorm(refuse)(work)
    sites = [(site.op, site.status, site.reason) for site in collect_sites(work)]
    assert sites == [("RMSNorm", "fused", None), ("SkipRMSNorm", "refused", "check_failed")]


ROWS = "float[b,3,8] x, float[b,3,8] a"
HALF = ROWS.replace("float", "float16")
SUM = "s = Add (x, a)\n"
NUMBERS = {
    "g": GAMMA,
    "g16": GAMMA.astype(np.float16),
    "bias": BIAS,
    "alpha": np.array(1.75, np.float32),
    "alpha1": np.array([1.75], np.float32),
    "alpha11": np.array([[1.75]], np.float32),
    "vec": GAMMA * 2,
    "vec2": GAMMA[None] * 2,
    "cube": np.ones((1, 1, 1, 8), np.float32),
    "col": np.ones((3, 1), np.float32),
    "matrix": np.ones((3, 8), np.float32),
    "low": np.array(-2, np.float32),
    "high": np.array(2, np.float32),
    "w": rows(8, 8),
    "sh": np.array([0, 0, 8]),
    "ax": np.array([0, 1]),
}


@pytest.mark.parametrize(
    ("found", "body", "inputs"),
    [
        ("SkipLayerNorm", "s = Add (x, a)", ROWS),
        ("SkipLayerNorm_bias", SUM + "y = LayerNormalization (s, g, bias)", ROWS),
        ("SkipRMSNorm", SUM + "y = RMSNormalization (s, g)", ROWS),
        ("SkipRMSNorm", SUM + "y = fusenorm.RMSNorm <epsilon = 0.001> (s, g)", ROWS),
        ("SkipLayerNorm", SUM + "y = fusenorm.LayerNorm <epsilon = 0.001> (s)", ROWS),
        ("SkipLayerNorm_alpha", "m = Mul (x, alpha)\ns = Add (m, a)", ROWS),
        ("SkipLayerNorm_alpha", "m = Mul (alpha, x)\ns = Add (a, m)", ROWS),
        ("SkipLayerNorm_alpha", "m = Mul (x, alpha1)\ns = Add (m, a)", ROWS),
        ("SkipLayerNorm", "m = Mul (x, alpha11)\ns = Add (m, a)", ROWS),
        (
            "SkipLayerNorm_alpha_beta",
            "m = Mul (x, alpha)\nl = Mul (a, alpha)\ns = Add (m, l)",
            ROWS,
        ),
        (
            "SkipLayerNorm_alpha_layerscale",
            "m = Mul (x, alpha)\nl = Mul (a, vec)\ns = Add (m, l)",
            ROWS,
        ),
        (
            "SkipLayerNorm_alpha_layerscale",
            "m = Mul (x, vec)\nl = Mul (a, alpha)\ns = Add (m, l)",
            ROWS,
        ),
        ("SkipLayerNorm_layerscale", "m = Mul (x, vec)\ns = Add (m, a)", ROWS),
        ("SkipLayerNorm_layerscale", "l = Mul (vec, a)\ns = Add (x, l)", ROWS),
        ("SkipLayerNorm_layerscale", "l = Mul (vec2, a)\ns = Add (x, l)", ROWS),
        ("SkipLayerNorm", "l = Mul (cube, a)\ns = Add (x, l)", ROWS),
        ("SkipLayerNorm", "l = Mul (col, a)\ns = Add (x, l)", ROWS),
        ("SkipLayerNorm", "l = Mul (matrix, a)\ns = Add (x, l)", ROWS),
        ("SkipLayerNorm_layerscale", "m = Mul (x, vec)\nl = Mul (a, vec)\ns = Add (m, l)", ROWS),
        ("no_residual", "l = other.Mul (a, alpha)\ns = Add (x, l)", ROWS),
        ("SkipLayerNorm", "l = Div (a, alpha)\ns = Add (x, l)", ROWS),
        ("SkipLayerNorm", "l = Mul (a, alpha)\nr = Neg (l)\ns = Add (x, l)", ROWS),
        ("SkipLayerNorm", "l = Mul (a, v)\ns = Add (x, l)", ROWS + ", float[8] v"),
        ("no_residual", "l = Mul (c, alpha)\ns = Add (x, l)", ROWS + ", float[3,1] c"),
        (None, "s = other.Add (x, a)", ROWS),
        (None, "s = Sub (x, a)", ROWS),
        (None, "s = Add (x, bias)", ROWS),
        (None, "h = MatMul (x, w)\ns = Add (h, bias)", ROWS),
        ("SkipLayerNorm", "t = Add (x, a)\ns = Add (t, bias)", ROWS),
        (None, "t = other.Add (x, a)\ns = Add (t, bias)", ROWS),
        (None, "t = Add (x, vec)\ns = Add (t, bias)", ROWS),
        ("SkipLayerNorm", "s = Add (x, matrix)", ROWS),
        (None, "s = Add (x, vec2)", ROWS),
        ("SkipLayerNorm", "l = Mul (c, vec)\ns = Add (x, l)", ROWS + ", float[3,1] c"),
        ("rounding", "s = Sum (x, a, x)", ROWS),
        ("clipped", "t = Add (x, a)\ns = Min (high, t)", ROWS),
        (None, "s = Sum (x, bias)", ROWS),
        ("clipped", "t = Add (x, a)\ns = Clip (t, low, high)", ROWS),
        (None, "t = Add (x, a)\ns = other.Clip (t, low, high)", ROWS),
        ("clipped", "t = Add (x, a)\ns = Min (t, high)", ROWS),
        ("clipped", "t = Add (x, a)\ns = Max (low, t)", ROWS),
        ("moved", "t = Add (x, a)\ns = Reshape (t, sh)", ROWS),
        (
            "moved",
            "t = Add (x, a)\ns = Flatten (t)\ny = LayerNormalization (s, v)",
            ROWS + ", float[24] v",
        ),
        ("moved", "t = Add (x, a)\ns = Squeeze (t)", ROWS),
        ("moved", "t = Add (x, a)\ns = Unsqueeze (t, ax)", ROWS),
        ("moved", "t = Add (x, a)\ns = Transpose (t)", ROWS),
        ("between", "t = Add (x, a)\ns = Dropout (t)", ROWS),
        ("between", "t = Add (x, a)\ns = Identity (t)", ROWS),
        (None, "t = Add (x, a)\ns = Neg (t)", ROWS),
        (None, "t = Add (x, bias)\ns = Identity (t)", ROWS),
        ("no_residual", "s = Add (x, c)", ROWS + ", float[3,1] c"),
        ("no_residual", "s = Add (c, x)", ROWS + ", float[3,1] c"),
        ("SkipLayerNorm", "s = Add (c, x)", ROWS + ", float[8] c"),
        ("axis", SUM + "y = LayerNormalization <axis = 1> (s, matrix)", ROWS),
        ("stats_used", SUM + "y, mean = LayerNormalization (s, g)\nr = Neg (mean)", ROWS),
        (
            "scale_shape",
            SUM + "t = ReduceMean (s, g2)\ny = LayerNormalization (s, t)",
            ROWS + ", int64[1] g2",
        ),
        (
            "cycle",
            SUM + "q = Mul (s, s)\nt = ReduceMean <keepdims = 0> (q, ax)\n"
            "y = LayerNormalization (s, t)",
            ROWS,
        ),
        ("SkipLayerNorm", SUM + "y = LayerNormalization (s, v)", ROWS + ", float[8] v"),
        ("scale_shape", SUM + "y = LayerNormalization (s, v)", ROWS + ", float[n] v"),
        ("no_residual", "s = Add (x, a)", "float[] x, float[] a"),
        ("no_residual", "s = Add (x, a)", "float[b,3,n] x, float[b,3,n] a"),
        (
            "SkipLayerNorm_f16",
            SUM + "y = LayerNormalization (s, g16)",
            HALF,
        ),
        (
            "between",
            SUM + "c = Cast <to = 1> (s)\ny = LayerNormalization (c, g)",
            HALF,
        ),
        (None, "y = LayerNormalization (x, g)", ROWS),
    ],
)
def test_proposals(found: str | None, body: str, inputs: str) -> None:
    """What the rule makes of a norm, before any proof; it is of s where none is written."""
    if "LayerNorm" not in body and "RMSNorm" not in body:
        body = f"{body}\ny = LayerNormalization (s, g)"
    assert proposed(FuseResidual(), body, inputs, constants=NUMBERS, opset=23) == found


def test_it_starts_at_norms_without_a_sum() -> None:
    roots = FuseResidual.roots
    assert roots > {"LayerNormalization", "RMSNormalization"}
    assert roots > {"fusenorm::RMSNorm", "fusenorm::LayerNorm_f16_bias"}
    assert not any("Skip" in root for root in roots)


def test_the_sums_it_is_spelled_with() -> None:
    def write(speller: Speller) -> ir.Value:
        rule.example(speller)
        return rule.pattern.spell(speller)

    def text(value: ir.Value) -> str:
        node = value.producer()
        if node is not None:
            return f"{node.op_type}({', '.join(sorted(text(v) for v in node.inputs if v))})"
        number = facts.scalar(value)
        return str(value.name) if value.const_value is None else f"{number or 'vector'}"

    rule = FuseResidual()
    models = list(spellings(write, limit=100))
    assert len(models) == 2 * (1 + 2) * (1 + 2 + 2)
    assert {text(model.graph[-1].inputs[0]) for model in models} == {  # type: ignore[arg-type]
        f"Add({skip}, {x})" if skip < x else f"Add({x}, {skip})"
        for x in ("x", "Mul(1.75, x)")
        for skip in ("skip", "Mul(0.25, skip)", "Mul(skip, vector)")
    }
