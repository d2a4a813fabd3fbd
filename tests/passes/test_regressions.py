"""Wrong results shipping tools produce today (SEMANTICS.md §5): never here, one test each."""

from __future__ import annotations

import re

import numpy as np
import pytest

from tests.graphs import fused, fused_ops, model, reasons, rows, run, same

GAMMA = np.linspace(0.5, 1.5, 8, dtype=np.float32)
BETA = np.linspace(-1, 1, 8, dtype=np.float32)
LAST = np.array([-1], np.int64)
NUMBERS = {
    "eps": np.float32(1e-5),
    "two": np.float32(2),
    "gamma": GAMMA,
    "beta": BETA,
    "last": LAST,
}
RMS = """
  sq = Mul(x, x)
  ms = ReduceMean<keepdims=1>(sq, {axes})
  shifted = Add(ms, eps)
  root = Sqrt(shifted)
  n = Div(x, root)
  y = Mul(n, gamma)
"""
LN = """
  mean = ReduceMean<keepdims={keep}>(x, {first})
  c = Sub({a}, {b})
  sq = Pow(c, two)
  var = ReduceMean<keepdims={keep}>(sq, {second})
  shifted = Add(var, eps)
  root = Sqrt(shifted)
  n = Div(c, root)
  g = Mul(n, gamma)
  y = Add(g, beta)
"""


def _ln(**parts: object) -> str:
    text = LN
    for name, value in {
        "keep": 1,
        "first": "last",
        "second": "last",
        "a": "x",
        "b": "mean",
        **parts,
    }.items():
        text = text.replace("{" + name + "}", str(value))
    return text


def _used(body: str, **extra: object) -> dict[str, np.ndarray]:
    pool = {**NUMBERS, **extra}
    return {
        name: np.asarray(v)
        for name, v in pool.items()
        if name in body.replace("(", " ").replace(")", " ").replace(",", " ").split()
    }


@pytest.mark.parametrize(
    "body", [_ln(keep=0), RMS.replace("keepdims=1", "keepdims=0").format(axes="last")]
)
def test_01_keepdims_0_on_a_square_tensor(body: str) -> None:
    proto = model(body, "float[8,8] x", "float[8,8] y", constants=_used(body))
    report = same(proto, {"x": rows(8, 8)})
    assert fused_ops(report) == []
    assert "keepdims" in reasons(report)


def test_02_swapped_subtraction_keeps_its_sign() -> None:
    body = _ln(a="mean", b="x")
    report = same(model(body, constants=_used(body)), {"x": rows(2, 3, 8)})
    assert "LayerNorm" not in fused_ops(report)


def test_03_residual_into_layer_normalization_of_another_axis() -> None:
    body = "s = Add(x, r)\ny = LayerNormalization<axis=1>(s, gamma)"
    proto = model(
        body,
        "float[2,8,8] x, float[2,8,8] r",
        "float[2,8,8] y",
        constants={"gamma": np.tile(GAMMA, (8, 1)) + np.arange(8, dtype=np.float32)[:, None]},
    )
    report = same(proto, {"x": rows(2, 8, 8), "r": rows(2, 8, 8, seed=1)})
    assert fused_ops(report) == []
    assert reasons(report) == {"axis"}


def test_04_scale_that_would_enlarge_x() -> None:
    body = RMS.format(axes="last")
    constants = _used(body, gamma=np.array([0.5, 2.0], np.float32))
    report = same(
        model(body, "float[b,s,1] x", "float[b,s,2] y", constants=constants), {"x": rows(2, 3, 1)}
    )
    assert all(
        "scale" not in str(site.attributes["kind"]) or site.op == "RMSNorm" for site in report.sites
    )


def test_05_f16_island_with_f32_gamma_loads() -> None:
    body = f"""
      w = Cast<to=1>(x)
      {RMS.format(axes="last").replace("x", "w").replace("y =", "z =")}
      y = Cast<to=10>(z)
    """
    proto = model(body, "float16[b,s,8] x", "float16[b,s,8] y", constants=_used(body))
    report = same(proto, {"x": rows(2, 3, 8, dtype=np.float16)}, bound=2.0**-10)
    assert fused_ops(report) == ["RMSNorm"]


@pytest.mark.parametrize(
    ("body", "axis"),
    [
        (RMS.format(axes="other"), 1),
        (RMS.format(axes="other"), -2),
        (_ln(first="other", second="other"), -2),
    ],
)
def test_06_norm_over_another_axis(body: str, axis: int) -> None:
    constants = _used(body, other=np.array([axis], np.int64))
    report = same(model(body, constants=constants), {"x": rows(2, 8, 8)})
    assert fused_ops(report) == []
    assert "axis" in reasons(report)


def test_07_two_means_over_different_axes() -> None:
    body = _ln(first="other")
    constants = _used(body, other=np.array([1], np.int64))
    report = same(model(body, constants=constants), {"x": rows(2, 8, 8)})
    assert "LayerNorm" not in fused_ops(report)


def test_08_default_epsilon_of_layer_normalization_is_1e_5() -> None:
    body = "s = Add(x, r)\ny = LayerNormalization(s, gamma)"
    proto = model(body, "float[b,s,8] x, float[b,s,8] r", constants={"gamma": GAMMA}, opset=17)
    small = {"x": rows(2, 3, 8) * 1e-3, "r": rows(2, 3, 8, seed=1) * 1e-3}
    report = same(proto, small)
    assert fused_ops(report) == ["SkipLayerNorm"]
    assert report.sites[0].attributes["epsilon"] == pytest.approx(1e-5)


def test_09_statistics_outputs_used_elsewhere() -> None:
    body = "s = Add(x, r)\ny, m = LayerNormalization(s, gamma)\nt = Add(y, m)"
    proto = model(
        body,
        "float[b,s,8] x, float[b,s,8] r",
        "float[b,s,8] t",
        constants={"gamma": GAMMA},
        opset=17,
    )
    report = same(proto, {"x": rows(2, 3, 8), "r": rows(2, 3, 8, seed=1)})
    assert fused_ops(report) == []
    assert reasons(report) == {"stats_used"}


def test_10_norm_inside_an_if_branch() -> None:
    inner = RMS.format(axes="last").replace("y =", "z =")
    body = f"""
      y = If (flag) <
        then_branch = yes () => (float[b,s,8] z) {{ {inner} }},
        else_branch = no () => (float[b,s,8] w) {{ w = Identity(x) }}
      >
    """
    proto = model(
        body,
        "float[b,s,8] x, bool flag",
        constants={**_used(inner)},
    )
    for flag in (True, False):
        report = same(proto, {"x": rows(2, 3, 8), "flag": np.array(flag)})
    assert fused_ops(report) == ["RMSNorm"]


def test_11_vector_epsilon_and_vector_swish_beta() -> None:
    body = RMS.format(axes="last")
    constants = _used(body, eps=np.full(8, 1e-5, np.float32) * np.arange(1, 9, dtype=np.float32))
    report = same(model(body, constants=constants), {"x": rows(2, 3, 8)})
    assert fused_ops(report) == []
    assert "not_scalar" in reasons(report)
    body = "b = Mul(x, beta)\ng = Sigmoid(b)\ny = Mul(x, g)"
    report = same(model(body, constants=_used(body)), {"x": rows(2, 3, 8)})
    assert "Swish" not in fused_ops(report)


def test_12_bias_that_enlarges_x_before_gelu() -> None:
    body = "h = Add(x, bias)\ny = Gelu(h)"
    constants = {"bias": rows(4, 1, 8)}
    proto = model(body, "float[s,8] x", "float[4,s,8] y", constants=constants, opset=20)
    report = same(proto, {"x": rows(3, 8)})
    assert [site.status for site in report.sites] == ["native"]


def test_13_residual_after_a_norm_is_not_its_bias() -> None:
    body = RMS.format(axes="last").replace("y =", "z =") + "\ny = Add(z, r)"
    proto = model(body, "float[b,s,8] x, float[b,s,8] r", constants=_used(body))
    report = same(proto, {"x": rows(2, 3, 8), "r": rows(2, 3, 8, seed=1)})
    assert fused_ops(report) == ["RMSNorm"]
    assert report.sites[0].attributes["kind"] == "RMSNorm"


def test_14_mixed_types_never_reach_one_skip_op() -> None:
    body = f"""
      w = Cast<to=1>(x)
      s = Add(w, r)
      {RMS.format(axes="last").replace("x", "s")}
    """
    proto = model(body, "float16[b,s,8] x, float[b,s,8] r", constants=_used(body))
    report = same(proto, {"x": rows(2, 3, 8, dtype=np.float16), "r": rows(2, 3, 8, seed=1)})
    assert fused_ops(report) == ["SkipRMSNorm"]
    assert report.sites[0].attributes["kind"] == "SkipRMSNorm"


def test_15_two_norms_of_other_epsilon_and_width_keep_their_own() -> None:
    first = RMS.format(axes="last")
    renamed = {"x": "u", "y": "v", "gamma": "gamma2", "eps": "eps2"}
    second = re.sub(
        r"\b(x|y|gamma|eps|sq|ms|shifted|root|n)\b",
        lambda name: renamed.get(name[1], f"{name[1]}_b"),
        first,
    )
    body = first + second
    constants = _used(body, eps2=np.float32(0.5), gamma2=np.ones(4, np.float32))
    proto = model(
        body,
        "float[b,s,8] x, float[b,s,4] u",
        "float[b,s,8] y, float[b,s,4] v",
        constants=constants,
    )
    report = same(proto, {"x": rows(2, 3, 8), "u": rows(2, 3, 4, seed=1)})
    assert fused_ops(report) == ["RMSNorm", "RMSNorm"]
    assert sorted(site.attributes["epsilon"] for site in report.sites) == pytest.approx([1e-5, 0.5])


def test_16_f16_sum_of_squares_that_would_overflow() -> None:
    body = f"""
      w = Cast<to=1>(x)
      {RMS.format(axes="last").replace("x", "w").replace("y =", "z =")}
      y = Cast<to=10>(z)
    """
    proto = model(body, "float16[b,8] x", "float16[b,8] y", constants=_used(body))
    after, report = fused(proto)
    assert fused_ops(report) == ["RMSNorm"]
    (y,) = run(after, {"x": np.full((1, 8), 60000, np.float16)})
    np.testing.assert_allclose(y[0], GAMMA, rtol=2e-3)


def test_17_a_graph_output_inside_the_match_survives() -> None:
    body = "s = Add(x, r)\n" + RMS.format(axes="last").replace("x", "s")
    proto = model(
        body,
        "float[b,s,8] x, float[b,s,8] r",
        "float[b,s,8] y, float[b,s,8] s, float[b,s,8] n, float[b,s,1] ms",
        constants=_used(body),
    )
    after, _ = fused(proto)
    assert [out.name for out in after.graph.output] == ["y", "s", "n", "ms"]
    report = same(proto, {"x": rows(2, 3, 8), "r": rows(2, 3, 8, seed=1)})
    assert "SkipRMSNorm" in fused_ops(report)


def test_18_constants_of_one_model_are_not_given_to_another() -> None:
    body = "b = Mul(x, alpha)\ng = Sigmoid(b)\na = Mul(x, g)\ny = Mul(a, u)"
    for alpha in (1.0, 1.702, 1.5):
        proto = model(
            body, "float[b,s,8] x, float[b,s,8] u", constants={"alpha": np.float32(alpha)}
        )
        report = same(proto, {"x": rows(2, 3, 8), "u": rows(2, 3, 8, seed=1)})
        assert fused_ops(report) == ["GLU"]
        assert report.sites[0].attributes["beta"] == pytest.approx(alpha)
        assert report.sites[0].attributes["layout"] == "pair"
        assert report.sites[0].attributes["variant"] == "SwiGLU"
