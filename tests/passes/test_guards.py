"""Each guard of the matcher and the rules, by a graph that is wrong without it."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

import fusenorm
from fusenorm.pipeline import lower_regions
from fusenorm.report import Report
from tests.graphs import fused, fused_ops, model, reasons, rows, same

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

    text = (
        '<ir_version: 8, opset_import: ["" : 18, "other" : 1]>\n'
        "graph (float[b,s,8] x) => (float[b,s,8] y) <float[b,s,8] g> {{\n"
        "g = {}Sigmoid(x)\ny = Mul(x, g)\n}}"
    )
    ours = fusenorm.optimize(onnx.parser.parse_model(text.format("")))
    assert fused_ops(ours.report) == ["Swish"]
    theirs = fusenorm.optimize(onnx.parser.parse_model(text.format("other.")))
    assert fused_ops(theirs.report) == []


@pytest.mark.parametrize(
    ("body", "op"),
    [
        ("t = Mul(x, c)\ns = Sigmoid(t)\ny = Mul(x, s)", "Swish"),
        ("t = Relu(x)\ny = Pow(t, two)", "Relu2"),
        ("t = Max(x, zero)\ny = Mul(t, t)", "Relu2"),
        ("g = Min(x, two)\ns = Sigmoid(g)\na = Mul(g, s)\nn = Neg(x)\nh = Max(n, low)\n"
         "u = Min(h, two)\ny = Mul(a, u)", "GLU"),
    ],
)  # fmt: skip
def test_a_constant_of_one_axis_gives_it_to_a_scalar(body: str, op: str) -> None:
    numbers = {"c": 1.5, "zero": 0.0, "two": 2.0, "low": -2.0}
    used = {name: np.float32(number) for name, number in numbers.items() if name in body}
    rank_1 = {name: number.reshape(1) for name, number in used.items()}
    for x, y, constants, fuses in (
        ("float x", "float y", used, True),
        ("float[n] x", "float[n] y", rank_1, True),
        ("float x", "float[1] y", rank_1, False),
    ):
        feed = np.full((1,) if "[n]" in x else (), 0.7, np.float32)
        report = same(model(body, x, y, constants=constants), {"x": feed})
        assert (op in fused_ops(report)) == fuses


NORM_OF_TWO_AXES = """
  mean = ReduceMean<keepdims = 1>(x, two)
  c = Sub(x, mean)
  sq = Mul(c, c)
  v = ReduceMean<keepdims = 1>(sq, two)
  e = Add(v, eps)
  r = Sqrt(e)
  y = Div(c, r)
"""
EXPOSED = "s = Add(x, x)\nf = Reshape(s, flat)\nn = LayerNormalization(f, g)\ny = Reshape(n, back)"


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ("t = Sum(x, x, {})\ny = Neg(t)", "t_sum_of_2"),
        (EXPOSED, "n_rows"),
        (NORM_OF_TWO_AXES, "y_LayerNorm_noscale_x"),
        (NORM_OF_TWO_AXES, "y_LayerNorm_noscale"),
    ],
)
def test_a_name_the_model_has_is_not_given_again(body: str, name: str) -> None:
    constants = {
        "two": np.array([-2, -1]),
        "eps": np.float32(1e-5),
        "g": rows(8),
        "flat": np.array([-1, 8]),
        "back": np.array([2, 3, 8]),
    }
    lines = f"{name} = Exp(x)\n{body.format(name)}\nz = Neg({name})"
    used = {key: array for key, array in constants.items() if key in body}
    shape = "float[2,3,8]"
    same(model(lines, f"{shape} x", f"{shape} y, {shape} z", constants=used), X)


@pytest.mark.parametrize(
    ("opset", "body"),
    [
        (6, "t = Add<broadcast = 1, axis = 0>(m, a)\nu = Mul(x, t)\ns = Sigmoid(u)\ny = Mul(u, s)"),
        (5, "c = Cast<to = \"FLOAT\">(m)\ns = Sigmoid(c)\ny = Add(x, s)"),
        (4, "r = Reshape<shape = [3, 3]>(m)\ny = Add(x, r)"),
    ],
)  # fmt: skip
def test_a_model_of_an_old_opset_stays(opset: int, body: str) -> None:
    constants = {"a": np.float32([1, 2, 3]), "m": rows(3, 3)}
    proto = model(body, "float[3,3] x", "float[3,3] y", opset=opset, constants=constants)
    result = fusenorm.optimize(proto)
    assert [n.op_type for n in result.model.graph] == [n.op_type for n in proto.graph.node]
    assert fused_ops(result.report) == []


CHAINS = {
    "Min": ("x0 = Relu(x)", "{} = Min({}, c)", "s = Sigmoid({})\nu = Neg(x)\ny = Mul(s, u)"),
    "Add": ("x0 = Relu(x)", "{} = Add({}, c)", "y = Neg({})"),
    "Reshape": ("x0 = LayerNormalization(x, g)", "{} = Reshape({}, flat)", "y = MatMul({}, eye)"),
}


@pytest.mark.parametrize("link", CHAINS)
def test_a_long_chain(link: str) -> None:
    first, line, end = CHAINS[link]
    links = [line.format(f"x{count + 1}", f"x{count}") for count in range(1100)]
    body = "\n".join((first, *links, end.format("x1100")))
    numbers = {"c": np.float32(3), "flat": np.array([0, 8]), "g": rows(8), "eye": rows(8, 8)}
    used = {name: array for name, array in numbers.items() if f"{name})" in first + line + end}
    proto = model(body, "float[3,8] x", "float[3,8] y", constants=used)
    lower_regions(fusenorm.optimize(proto).model)


def test_a_mask_of_many_paths() -> None:
    links = [f"m{count + 1} = Add(m{count}, m{count})" for count in range(60)]
    end = "k = Transpose(x)\np = MatMul(x, k)\ns = Add(p, m60)\nw = Softmax(s)\ny = MatMul(w, x)"
    body = "\n".join(("m0 = Relu(mask)", *links, end))
    proto = model(body, "float[3,8] x, float[3,3] mask", "float[3,8] y")
    lower_regions(fusenorm.optimize(proto).model)


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

    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 18, "other" : 1]>\n'
        "graph (float[b,s,8] x) => (float[b,s,8] y) {\n"
        "a = other.Thing(x)\ng = Sigmoid(a)\ny = Mul(a, g)\n}"
    )
    report = fusenorm.optimize(proto).report
    assert reasons(report) == {"type_unknown"}


def _norm_over(axes: list[int], *, centred: bool = False, scale: bool = True) -> str:
    """A norm of x over `axes`, in opset 18's words."""
    centre = "mean = ReduceMean(x, axes)\nc = Sub(x, mean)" if centred else "c = Identity(x)"
    tail = "h = Div(c, root)\ny = Mul(h, g)" if scale else "y = Div(c, root)"
    body = f"{centre}\nsq = Mul(c, c)\nms = ReduceMean(sq, axes)\nshifted = Add(ms, eps)"
    return f"axes = Constant<value_ints = {axes}>()\n{body}\nroot = Sqrt(shifted)\n{tail}"


def _unchecked(proto: onnx.ModelProto) -> Report:
    """The report where no check stands behind the guards."""
    return fusenorm.optimize(proto, options=fusenorm.Options(validate=False)).report


EPS = {"eps": np.float32(1e-5)}


@pytest.mark.parametrize("lead", [(2, 3), (0, 3), (2, 0)])
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("axes", [[-2, -1], [3, 2], [2, -1]])
def test_a_norm_over_two_axes(axes: list[int], centred: bool, lead: tuple[int, int]) -> None:
    constants = {**EPS, "g": rows(4, 8, seed=1)}
    proto = model(
        _norm_over(axes, centred=centred),
        "float[b,s,4,8] x",
        "float[b,s,4,8] y",
        constants=constants,
    )
    report = same(proto, {"x": rows(*lead, 4, 8)})
    assert [site.attributes["kind"] for site in report.sites] == [
        "LayerNorm" if centred else "RMSNorm"
    ]


def test_two_norms_over_two_axes_share_their_constants() -> None:
    body = (
        _norm_over([-2, -1])
        + "\nr = Relu(x)\nrq = Mul(r, r)\nrm = ReduceMean(rq, axes)\nrs = Add(rm, eps)\n"
        "rr = Sqrt(rs)\nrn = Div(r, rr)\nz = Mul(rn, g)"
    )
    shape = "float[b,4,8]"
    constants = {**EPS, "g": rows(4, 8, seed=1)}
    proto = model(body, f"{shape} x", f"{shape} y, {shape} z", constants=constants)
    assert fused_ops(same(proto, {"x": rows(3, 4, 8)})) == ["RMSNorm", "RMSNorm"]
    after, _ = fused(proto)
    assert [value.name for value in after.graph.output] == ["y", "z"]
    assert sorted(len(tensor.dims) for tensor in after.graph.initializer) == [1, 1, 1]
    sizes = {
        info.name: info.type.tensor_type.shape.dim[-1].dim_value for info in after.graph.value_info
    }
    assert {sizes[node.output[0]] for node in after.graph.node if node.domain} == {32}
    again, report = fused(after)
    assert fused_ops(report) == ["RMSNorm", "RMSNorm"]
    assert len(again.graph.node) == len(after.graph.node)


def test_a_norm_over_every_axis() -> None:
    constants = {**EPS, "g": rows(4, 8, seed=1)}
    proto = model(_norm_over([0, 1]), "float[4,8] x", "float[4,8] y", constants=constants)
    assert fused_ops(same(proto, {"x": rows(4, 8)})) == ["RMSNorm"]


@pytest.mark.parametrize("shape", [(8,), (4, 1), (1, 8), (2, 1, 1, 1)])
def test_a_scale_that_is_not_one_row_of_both_axes(shape: tuple[int, ...]) -> None:
    constants = {**EPS, "g": rows(*shape, seed=1)}
    proto = model(_norm_over([-2, -1]), "float[2,3,4,8] x", "float[2,3,4,8] y", constants=constants)
    report = same(proto, {"x": rows(2, 3, 4, 8)})
    assert [site.attributes["kind"] for site in report.sites] == ["RMSNorm_noscale"]


def test_a_scale_as_long_as_both_axes_that_would_enlarge_x() -> None:
    constants = {**EPS, "g": rows(4, seed=1)}
    proto = model(_norm_over([-2, -1]), "float[b,4,1] x", "float[b,4,4] y", constants=constants)
    for report in (same(proto, {"x": rows(3, 4, 1)}), _unchecked(proto)):
        assert [site.attributes["kind"] for site in report.sites] == ["RMSNorm_noscale"]


@pytest.mark.parametrize("shape", [(4, 8), (1, 4, 8), (1,)])
def test_a_scale_that_is_one_row_of_both_axes(shape: tuple[int, ...]) -> None:
    constants = {**EPS, "g": rows(*shape, seed=1)}
    proto = model(_norm_over([-2, -1]), "float[b,4,8] x", "float[b,4,8] y", constants=constants)
    report = same(proto, {"x": rows(3, 4, 8)})
    assert [site.attributes["kind"] for site in report.sites] == ["RMSNorm"]


def test_a_computed_scale_of_both_axes() -> None:
    body = "g = Exp(v)\n" + _norm_over([-2, -1])
    proto = model(body, "float[b,4,8] x, float[4,8] v", "float[b,4,8] y", constants=EPS)
    report = same(proto, {"x": rows(3, 4, 8), "v": rows(4, 8, seed=1) / 10})
    assert [site.attributes["kind"] for site in report.sites] == ["RMSNorm"]


@pytest.mark.parametrize(
    ("axes", "shape", "reason"),
    [
        ([0], "4,8", "axis"),
        ([0, 2], "4,3,8", "axis"),
        ([-3, -1], "4,3,8", "axis"),
        ([1, 2], "b,s,8", "hidden_unknown"),
        ([1, 2], "b,8,s", "hidden_unknown"),
    ],
)
def test_axes_that_are_no_row(axes: list[int], shape: str, reason: str) -> None:
    proto = model(
        _norm_over(axes, scale=False), f"float[{shape}] x", f"float[{shape}] y", constants=EPS
    )
    sizes = {"b": 2, "s": 3}
    feeds = {"x": rows(*(sizes.get(dim) or int(dim) for dim in shape.split(",")))}
    report = same(proto, feeds)
    assert fused_ops(report) == []
    assert reasons(report) == {reason}


def test_a_mean_over_two_axes_and_a_variance_over_one() -> None:
    body = _norm_over([-2, -1], centred=True, scale=False).replace("(sq, axes)", "(sq, last)")
    proto = model(body, "float[b,4,8] x", "float[b,4,8] y", constants={**EPS, **LAST})
    assert fused_ops(same(proto, {"x": rows(3, 4, 8)})) == ["RMSNorm"]
    assert fused_ops(_unchecked(proto)) == ["RMSNorm"]


def test_an_axis_counted_from_the_front_of_unknown_rank() -> None:
    norm = _norm_over([1], scale=False).replace("y =", "z =")
    body = f"x = Reshape(p, to)\n{norm}\ny = Reshape(z, back)"
    constants = {**EPS, "back": np.array([64])}
    proto = model(body, "float[64] p, int64[k] to", "float[64] y", constants=constants)
    report = same(proto, {"p": rows(64), "to": np.array([2, 4, 8])})
    assert reasons(report) == {"axis"}


@pytest.mark.parametrize(("number", "hits"), [(32.0, True), (8.0, False)])
def test_a_sum_over_two_axes_is_a_mean_with_both_sizes(number: float, hits: bool) -> None:
    body = _norm_over([-2, -1]).replace(
        "ms = ReduceMean(sq, axes)", "total = ReduceSum(sq, axes)\nms = Div(total, n)"
    )
    constants = {**EPS, "g": rows(4, 8, seed=1), "n": np.float32(number)}
    proto = model(body, "float[b,4,8] x", "float[b,4,8] y", constants=constants)
    report = same(proto, {"x": rows(3, 4, 8)})
    assert (fused_ops(report) == ["RMSNorm"]) == hits


def test_the_check_sees_axes_that_were_not_merged() -> None:
    import dataclasses

    import onnx_ir as ir

    from fusenorm.passes import Canonicalize, FuseNorm, Validator
    from fusenorm.passes.pattern import Refusal
    from fusenorm.passes.rewrite import Rewrite

    verdicts = []

    def judge(rewrite: Rewrite, opset: int) -> Refusal | None:
        wrong = dataclasses.replace(rewrite, merged=())
        verdicts.append([Validator()(rewrite, opset), Validator()(wrong, opset)])
        return None

    shape = "float[b,8,8]"
    proto = model(_norm_over([-2, -1], scale=False), f"{shape} x", f"{shape} y", constants=EPS)
    FuseNorm(judge)(Canonicalize()(ir.from_proto(proto)).model)
    ((right, wrong),) = verdicts
    assert right is None
    assert wrong is not None


CENTRED = "mean = ReduceMean<keepdims = 1>(x, axes)\nc = Sub({0})\ny = RMSNormalization(c, g)"


def _centred_rms(order: str = "x, mean", axes: tuple[int, ...] = (-1,)) -> str:
    return f"axes = Constant<value_ints = {list(axes)}>()\n{CENTRED.format(order)}"


def test_the_standard_rms_norm_of_centred_rows_is_a_layer_norm() -> None:
    """How torch's exporter leaves Cohere's hand-written LayerNorm at opset 23."""
    report = same(model(_centred_rms(), opset=23, constants={"g": GAMMA}), X)
    (site,) = report.sites
    assert (site.status, site.attributes["kind"]) == ("fused", "LayerNorm")
    assert site.attributes["epsilon"] == pytest.approx(1e-5)


def test_and_takes_the_residual_sum_in_front() -> None:
    body = "x = Add(p, f)\n" + _centred_rms()
    proto = model(body, "float[b,s,8] p, float[b,s,8] f", opset=23, constants={"g": GAMMA})
    report = same(proto, {"p": X["x"], "f": rows(2, 3, 8, seed=1)})
    assert [(site.op, site.status) for site in report.sites] == [("SkipLayerNorm", "fused")]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_16_bit_centring_keeps_its_rounding(dtype: str) -> None:
    import onnx_ir as ir

    kind = ir.DataType.FLOAT16 if dtype == "float16" else ir.DataType.BFLOAT16
    constants = {"g": GAMMA.astype(kind.numpy())}
    proto = model(
        _centred_rms(), f"{dtype}[b,s,8] x", f"{dtype}[b,s,8] y", opset=23, constants=constants
    )
    (site,) = fusenorm.optimize(proto).report.sites
    assert site.status == "fused"
    assert str(site.attributes["kind"]).endswith("_centrefirst")


@pytest.mark.parametrize(
    ("order", "axes", "reason"),
    [
        ("mean, x", (-1,), "no_pattern"),
        ("x, mean", (1,), "axis"),
        ("x, mean", (-2, -1), "axis"),
    ],
)
def test_rms_norm_of_rows_centred_otherwise(order: str, axes: tuple[int, ...], reason: str) -> None:
    proto = model(
        _centred_rms(order, axes),
        "float[b,4,8] x",
        "float[b,4,8] y",
        opset=23,
        constants={"g": GAMMA},
    )
    report = same(proto, {"x": rows(2, 4, 8)})
    assert fused_ops(report) == []
    assert {site.status: site.reason for site in report.sites} == {
        "refused": reason, "native": None,
    }  # fmt: skip


def test_a_plain_standard_rms_norm_is_no_near_miss() -> None:
    body = "c = Sub(x, u)\ny = RMSNormalization(c, g)"
    proto = model(body, "float[b,s,8] x, float[b,s,8] u", opset=23, constants={"g": GAMMA})
    report = same(proto, {**X, "u": rows(2, 3, 8, seed=1)})
    assert [(site.status, site.reason) for site in report.sites] == [("native", None)]


HEADS = "float[b,4,s,8]"


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ((8,), "{}"),
        ((1, 1, 1, 8), "{}"),
        ((4, 1, 8), "{}_noscale"),
        ((4, 1, 1), "{}_noscale"),
    ],
)
@pytest.mark.parametrize("centred", [True, False])
def test_a_norm_of_every_head(shape: tuple[int, ...], kind: str, centred: bool) -> None:
    """Norms of queries and keys: one scale for all heads, or one for each (Cohere)."""
    constants = {**EPS, "g": rows(*shape, seed=1)}
    proto = model(
        _norm_over([-1], centred=centred), f"{HEADS} x", f"{HEADS} y", constants=constants
    )
    report = same(proto, {"x": rows(2, 4, 3, 8)})
    family = "LayerNorm" if centred else "RMSNorm"
    assert [site.attributes["kind"] for site in report.sites] == [kind.format(family)]


def test_heads_by_transpose() -> None:
    body = "r = Reshape(q, heads)\nx = Transpose<perm = [0, 2, 1, 3]>(r)\n" + _norm_over([-1])
    constants = {**EPS, "g": GAMMA, "heads": np.array([0, 0, 4, 8])}
    proto = model(body, "float[b,s,32] q", f"{HEADS} y", constants=constants)
    assert fused_ops(same(proto, {"q": rows(2, 3, 32)})) == ["RMSNorm"]


def test_channels_first_by_transposes() -> None:
    """ConvNeXt's stem and downsampling norms."""
    norm = _norm_over([-1], centred=True).replace("y =", "last_y =")
    body = (
        f"x = Transpose<perm = [0, 2, 3, 1]>(i)\n{norm}\ny = Transpose<perm = [0, 3, 1, 2]>(last_y)"
    )
    image = "float[n,8,h,w]"
    proto = model(body, f"{image} i", f"{image} y", constants={**EPS, "g": GAMMA})
    assert fused_ops(same(proto, {"i": rows(2, 8, 3, 5)})) == ["LayerNorm"]


def test_channels_first_in_place_is_refused() -> None:
    constants = {**EPS, "g": GAMMA.reshape(8, 1, 1)}
    image = "float[n,8,h,w]"
    proto = model(_norm_over([1], centred=True), f"{image} x", f"{image} y", constants=constants)
    report = same(proto, {"x": rows(2, 8, 3, 5)})
    assert fused_ops(report) == []
    assert reasons(report) == {"axis"}


def test_a_residual_between_transposes_in_front_of_a_decomposed_norm() -> None:
    """ConvNeXt's blocks: the sum is channels-first, the norm channels-last."""
    body = (
        "ft = Transpose<perm = [0, 3, 1, 2]>(f)\ns = Add(i, ft)\n"
        "x = Transpose<perm = [0, 2, 3, 1]>(s)\n" + _norm_over([-1], centred=True)
    )
    inputs = "float[n,8,h,w] i, float[n,h,w,8] f"
    proto = model(body, inputs, "float[n,h,w,8] y", constants={**EPS, "g": GAMMA})
    report = same(proto, {"i": rows(2, 8, 3, 5), "f": rows(2, 3, 5, 8, seed=1)})
    assert [(site.op, site.status) for site in report.sites] == [("SkipLayerNorm", "fused")]
