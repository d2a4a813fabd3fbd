"""Gated units as models write them: clamps, biases, the forms of two halves, what is not one."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import fusenorm
from fusenorm.passes.fuse_glu import read_clamp
from fusenorm.report import Report, Site
from tests.graphs import fused, fused_ops, model, reasons, rows, run, same

ALPHA = 1.702
LIMIT = 7.0
HALVES = {
    "gate_up": "g0, u0 = Split<axis = -1, num_outputs = 2>(x)",
    "up_gate": "u0, g0 = Split<axis = -1, num_outputs = 2>(x)",
    "interleaved": "g0 = Slice(x, i0, end, last, i2)\nu0 = Slice(x, i1, end, last, i2)",
}
GATE_CLAMPS = ('g = Clip(g0, "", high)', "g = Min(g0, high)", "g = Min(high, g0)")
UP_CLAMPS = (
    "u = Clip(u0, low, high)",
    "t = Max(u0, low)\nu = Min(t, high)",
    "t = Min(high, u0)\nu = Max(low, t)",
    't = Clip(u0, "", high)\nu = Clip(t, low)',
)
SWISH = "b = Mul(g, alpha)\ns = Sigmoid(b)\na = Mul(g, s)\n"
HARD = np.array([np.nan, 1, 1, np.nan, -np.inf, 2, np.inf, 2, 8, 9, -8, -9, 7, -7, 0.5, 3])


def numbers(**replaced: float) -> dict[str, float]:
    return {"alpha": ALPHA, "high": LIMIT, "low": -LIMIT, "one": 1.0, **replaced}


def gated(
    body: str, layout: str = "interleaved", dtype: str = "float", **replaced: float
) -> onnx.ModelProto:
    """A model of `body` behind the halves g0 and u0 of x [b, s, 16] (`pair`: two inputs)."""
    inputs = f"{dtype}[b,s,16] x"
    if layout == "pair":
        inputs = f"{dtype}[b,s,8] g0, {dtype}[b,s,8] u0"
    body = f"{HALVES.get(layout, '')}\n{body}"
    kind = np.float16 if dtype == "float16" else np.float32
    constants: dict[str, np.ndarray] = {
        name: np.asarray(value, kind) for name, value in numbers(**replaced).items()
    }
    places = {"i0": 0, "i1": 1, "i2": 2, "end": 2**62, "last": -1}
    constants |= {name: np.array([place], np.int64) for name, place in places.items()}
    used = {name: array for name, array in constants.items() if name in _words(body)}
    return model(body, inputs, f"{dtype}[b,s,8] y", constants=used)


def _words(body: str) -> set[str]:
    return set(body.replace("(", " ").replace(")", " ").replace(",", " ").split())


def feeds(layout: str, dtype: type = np.float32) -> dict[str, np.ndarray]:
    """Rows well past the limits."""
    if layout == "pair":
        return {"g0": rows(2, 3, 8, dtype=dtype) * 4, "u0": rows(2, 3, 8, seed=1, dtype=dtype) * 4}
    return {"x": rows(2, 3, 16, dtype=dtype) * 4}


def only(report: Report) -> Site:
    """The report's one site, which is fused."""
    (site,) = report.sites
    assert site.status == "fused", site
    return site


def kind(report: Report) -> str:
    return str(only(report).attributes["kind"])


# --- clamps --------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["pair", *HALVES])
@pytest.mark.parametrize("up", UP_CLAMPS)
@pytest.mark.parametrize("gate", GATE_CLAMPS)
def test_the_clamped_unit_of_gpt_oss(gate: str, up: str, layout: str) -> None:
    body = f"{gate}\n{up}\n{SWISH}u1 = Add(u, one)\ny = Mul(u1, a)"
    report = same(gated(body, layout), feeds(layout))
    suffix = "" if layout == "pair" else f"_{layout}"
    assert kind(report) == f"GLU_swish_clampgate_plus1{suffix}"
    attributes = only(report).attributes
    assert attributes["limit"] == LIMIT
    assert attributes["beta"] == pytest.approx(ALPHA)
    assert (attributes.get("floor") == np.finfo(np.float32).min) == gate.startswith("g = Clip")


@pytest.mark.parametrize("layout", ["pair", *HALVES])
def test_the_clamped_unit_of_deepseek_v4(layout: str) -> None:
    body = f"{GATE_CLAMPS[0]}\n{UP_CLAMPS[0]}\ns = Sigmoid(g)\na = Mul(g, s)\ny = Mul(a, u)"
    suffix = "" if layout == "pair" else f"_{layout}"
    assert kind(same(gated(body, layout), feeds(layout))) == f"GLU_swish_clampgate{suffix}"


@pytest.mark.parametrize("limit", [2.0, np.inf])
@pytest.mark.parametrize("clamp", ['c = Clip(a, "", high)', "c = Min(a, high)"])
def test_the_clamped_activation_of_step_3(clamp: str, limit: float) -> None:
    body = f"s = Sigmoid(g0)\na = Mul(g0, s)\n{clamp}\n{UP_CLAMPS[0]}\ny = Mul(c, u)"
    proto = gated(body, "gate_up", high=limit, low=-limit)
    report = same(proto, feeds("gate_up"))
    assert kind(report) == "GLU_swish_clampact_gate_up"
    assert only(report).attributes.get("limit") == (limit if limit < np.inf else None)


@pytest.mark.parametrize("gate", GATE_CLAMPS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_nan_and_infinities_go_where_they_went(gate: str, dtype: type) -> None:
    body = f"{gate}\n{UP_CLAMPS[0]}\n{SWISH}u1 = Add(u, one)\ny = Mul(u1, a)"
    proto = gated(body, dtype="float16" if dtype is np.float16 else "float")
    after, report = fused(proto)
    assert "clampgate_plus1" in kind(report)
    x = {"x": HARD.astype(dtype).reshape(1, 1, 16)}
    (a,), (b,) = run(proto, x), run(after, x)
    assert np.isnan(a).any()
    np.testing.assert_array_equal(b, a)


def test_a_gate_with_a_floor_of_its_own_keeps_it() -> None:
    body = f"g = Clip(g0, low2, high)\n{UP_CLAMPS[0]}\n{SWISH}y = Mul(a, u)"
    report = same(gated(body, low2=-1.5), feeds("interleaved"))
    assert kind(report) == "GLU_swish_clampgate_interleaved"
    assert only(report).attributes["floor"] == -1.5


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_16_bit_clamped_unit_keeps_every_rounding(dtype: str) -> None:
    body = f"{GATE_CLAMPS[1]}\n{UP_CLAMPS[0]}\n{SWISH}u1 = Add(u, one)\ny = Mul(u1, a)"
    proto = gated(body, dtype="float16")
    if dtype == "bfloat16":
        proto = _as_bf16(proto)
    suffix = {"float16": "f16", "bfloat16": "bf16"}[dtype]
    assert kind(fusenorm.optimize(proto).report) == (
        f"GLU_swish_clampgate_plus1_interleaved_{suffix}_stepwise"
    )
    if dtype == "float16":
        same(proto, feeds("interleaved", np.float16), bound=2.0**-10)


def _as_bf16(proto: onnx.ModelProto) -> onnx.ModelProto:
    import ml_dtypes

    half, brain = onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.elem_type = brain
    for tensor in proto.graph.initializer:
        if tensor.data_type == half:
            array = onnx.numpy_helper.to_array(tensor).astype(ml_dtypes.bfloat16)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    return proto


@pytest.mark.parametrize(
    ("gate", "up", "shift", "replaced"),
    [
        (GATE_CLAMPS[0], "u = Identity(u0)", "u1 = Add(u, one)", {}),  # only the gate
        ("g = Identity(g0)", UP_CLAMPS[0], "u1 = Add(u, one)", {}),  # only up
        (GATE_CLAMPS[0], UP_CLAMPS[0], "u1 = Add(u, one)", {"one": 2.0}),
        (GATE_CLAMPS[0], "u = Clip(u0, low, high2)", "u1 = Add(u, one)", {"high2": 5.0}),
        (GATE_CLAMPS[0], UP_CLAMPS[0], "u1 = Add(u, one)", {"low": -5.0}),
        ("g = Max(g0, high)", UP_CLAMPS[0], "u1 = Add(u, one)", {}),  # a floor, no limit
        (GATE_CLAMPS[0], UP_CLAMPS[0], "u1 = Sub(u, one)", {}),
        ("g = Min(g0, high, high2)", UP_CLAMPS[0], "u1 = Add(u, one)", {"high2": 5.0}),
    ],
)  # fmt: skip
def test_clamps_that_are_not_those_of_a_unit_stay(
    gate: str, up: str, shift: str, replaced: dict[str, float]
) -> None:
    body = f"{gate}\n{up}\n{SWISH}{shift}\ny = Mul(u1, a)"
    assert kind(same(gated(body, **replaced), feeds("interleaved"))) == "GLU_swish"


def test_bounds_that_are_attributes_are_not_taken_for_none() -> None:
    proto = model("g = Clip<max = 7.0>(x)\ny = Neg(g)", opset=10)
    (clip, _) = ir.serde.deserialize_model(proto).graph
    assert read_clamp(clip.outputs[0]).source is clip.outputs[0]


def test_the_clamps_of_another_activation_stay() -> None:
    body = f"{GATE_CLAMPS[0]}\n{UP_CLAMPS[0]}\na = Relu(g)\ny = Mul(a, u)"
    assert kind(same(gated(body), feeds("interleaved"))) == "GLU_relu"


def test_a_clamp_that_varies_along_the_row_stays() -> None:
    body = f"g = Min(g0, limits)\n{UP_CLAMPS[0]}\n{SWISH}y = Mul(a, u)"
    proto = gated(body, "pair", limits=0.0)
    for tensor in proto.graph.initializer:
        if tensor.name == "limits":
            vector = np.linspace(3, 7, 8, dtype=np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(vector, "limits"))
    assert kind(same(proto, feeds("pair"))) == "GLU_swish"


def test_a_vector_alpha_leaves_a_gate_of_sigmoid_alone() -> None:
    body = f"{GATE_CLAMPS[0]}\n{UP_CLAMPS[0]}\n{SWISH}y = Mul(a, u)"
    proto = gated(body, "pair")
    for tensor in proto.graph.initializer:
        if tensor.name == "alpha":
            vector = np.linspace(1, 2, 8, dtype=np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(vector, "alpha"))
    report = same(proto, feeds("pair"))
    assert [site.attributes["activation"] for site in report.sites] == ["sigmoid"]


def test_a_clamped_activation_beside_a_free_up_is_refused_by_name() -> None:
    body = "s = Sigmoid(g0)\na = Mul(g0, s)\nc = Min(a, high)\ny = Mul(c, u0)"
    report = same(gated(body, "gate_up"), feeds("gate_up"))
    assert fused_ops(report) == ["Swish"]
    assert [(site.op, site.reason) for site in report.sites if site.status == "refused"] == [
        ("GLU", "activation_clamped")
    ]


@pytest.mark.parametrize("reader", ["c", "a"])
def test_an_activation_others_read_is_not_clamped_away(reader: str) -> None:
    body = f"s = Sigmoid(g0)\na = Mul(g0, s)\nc = Min(a, high)\n{UP_CLAMPS[0]}\nm = Mul(c, u)"
    report = same(gated(f"{body}\ny = Add(m, {reader})", "gate_up"), feeds("gate_up"))
    assert "activation_shared" in reasons(report)


def test_a_clamped_half_others_read_stays_for_them() -> None:
    body = f"{GATE_CLAMPS[0]}\n{UP_CLAMPS[0]}\n{SWISH}m = Mul(a, u)\ny = Add(m, u)"
    assert kind(same(gated(body), feeds("interleaved"))) == "GLU_swish_clampgate_interleaved"


# --- halves --------------------------------------------------------------------------------

UNIT = "s = Sigmoid(g)\na = Mul(g, s)\ny = Mul(a, u)"


def halves(body: str, shape: str = "b,s,16", opset: int = 18, **constants: object) -> str:
    """The layout a unit of g and u, made of x by `body`, is fused in."""
    dims = [5 if dim == "b" else 3 if dim == "s" else int(dim) for dim in shape.split(",")]
    out = ",".join([*shape.split(",")[:-1], str(dims[-1] // 2)])
    proto = model(
        f"{body}\n{UNIT}",
        f"float[{shape}] x",
        f"float[{out}] y",
        opset=opset,
        constants={name: np.asarray(value) for name, value in constants.items()},
    )
    site = only(same(proto, {"x": rows(*dims)}))
    return str(site.attributes["layout"])


@pytest.mark.parametrize(
    ("body", "opset", "constants", "layout"),
    [
        ("g, u = Split<axis = -1>(x)", 13, {}, "gate_up"),
        ("g, u = Split<axis = 2>(x, parts)", 13, {"parts": [8, 8]}, "gate_up"),
        ("g, u = Split<axis = 2, split = [8, 8]>(x)", 12, {}, "gate_up"),
        ("u, g = Split<axis = 2, num_outputs = 2>(x)", 18, {}, "up_gate"),
        ("g = Gather<axis = -1>(x, i)\nu = Gather<axis = 2>(x, j)", 18,
         {"i": np.arange(8), "j": np.arange(8, 16)}, "gate_up"),
        ("g = Gather<axis = 2>(x, i)\nu = Gather<axis = 2>(x, j)", 18,
         {"i": np.arange(-8, 0), "j": np.arange(8)}, "up_gate"),
        ("g = Gather<axis = 2>(x, i)\nu = Gather<axis = 2>(x, j)", 18,
         {"i": np.arange(0, 16, 2), "j": np.arange(1, 16, 2)}, "interleaved"),
        ("g = Gather<axis = 2>(x, i)\nu = Gather<axis = 2>(x, j)", 18,
         {"i": np.arange(1, 9), "j": np.arange(8, 16)}, "pair"),
        ("g = Gather<axis = 2>(x, i)\nu = Gather<axis = 2>(x, j)", 18,
         {"i": np.arange(8)[::-1].copy(), "j": np.arange(8, 16)}, "pair"),
        ("g = Gather<axis = 2>(x, i)\nu = Gather<axis = 2>(x, j)", 18,
         {"i": [0, 1, 2, 3, 4, 5, 7, 6], "j": np.arange(8, 16)}, "pair"),
    ],
)  # fmt: skip
def test_halves_of_the_last_axis(
    body: str, opset: int, constants: dict[str, object], layout: str
) -> None:
    assert halves(body, opset=opset, **constants) == layout


ROWS = {"t": [0, 0, 2, 8], "zero": 0, "one": 1, "ax": [-2], "lo": [0], "hi": [1], "end": [2]}
COLUMNS = {**ROWS, "t": [0, 0, 8, 2], "ax": [-1]}
TAKE = {
    "Gather": "g = Gather<axis = {at}>(v, zero)\nu = Gather<axis = {at}>(v, one)",
    "Split": "p, q = Split<axis = {at}, num_outputs = 2>(v)\n"
    "g = Squeeze(p, ax)\nu = Squeeze(q, ax)",
    "Slice": "p = Slice(v, lo, hi, ax)\nq = Slice(v, hi, end, ax)\n"
    "g = Squeeze(p, ax)\nu = Squeeze(q, ax)",
    "Gather1": "p = Gather<axis = {at}>(v, lo)\nq = Gather<axis = {at}>(v, hi)\n"
    "g = Squeeze(p, ax)\nu = Squeeze(q, ax)",
}


def _used(body: str, pool: dict[str, object]) -> dict[str, object]:
    return {
        name: np.asarray(value, np.int64) for name, value in pool.items() if name in _words(body)
    }


@pytest.mark.parametrize("take", TAKE)
@pytest.mark.parametrize(
    ("pool", "at", "layout"),
    [
        (ROWS, -2, "gate_up"),
        (ROWS, 2, "gate_up"),
        (COLUMNS, -1, "interleaved"),
        (COLUMNS, 3, "interleaved"),
    ],
)
def test_halves_of_a_view(take: str, pool: dict[str, object], at: int, layout: str) -> None:
    body = f"v = Reshape(x, t)\n{TAKE[take].format(at=at)}"
    assert halves(body, **_used(body, pool)) == layout


def test_the_second_row_of_a_view_may_be_the_gate() -> None:
    body = "v = Reshape(x, t)\ng = Gather<axis = -2>(v, one)\nu = Gather<axis = -2>(v, zero)"
    assert halves(body, **_used(body, ROWS)) == "up_gate"


@pytest.mark.parametrize(
    ("shape", "target"),
    [("b,16", [-1, 2, 8]), ("b,s,16", [0, -1, 2, 8]), ("5,3,16", [5, 3, 2, 8])],
)
def test_a_view_of_proved_leading_dimensions(shape: str, target: list[int]) -> None:
    at = len(target) - 2
    body = f"v = Reshape(x, t)\n{TAKE['Gather'].format(at=at)}"
    assert halves(body, shape, **_used(body, {**ROWS, "t": target})) == "gate_up"


def test_a_view_whose_shape_is_computed_from_another_value() -> None:
    body = """
      shape = Shape<start = 0, end = 2>(r)
      target = Concat<axis = 0>(shape, pair)
      v = Reshape(x, target)
      g = Gather<axis = -2>(v, zero)
      u = Gather<axis = -2>(v, one)
    """
    proto = model(
        f"{body}\n{UNIT}\n",
        "float[b,s,16] x, float[b,s,4] r",
        constants=_used(body, {**ROWS, "pair": [2, 8]}),  # type: ignore[arg-type]
    )
    report = same(proto, {"x": rows(2, 3, 16), "r": rows(2, 3, 4)})
    assert only(report).attributes["layout"] == "gate_up"


@pytest.mark.parametrize(
    ("shape", "target", "take"),
    [
        ("5,3,16", [-1, 2, 8], TAKE["Gather"].format(at=1)),  # the leading axes become one
        ("5,3,16", [3, 5, 2, 8], TAKE["Gather"].format(at=2)),  # they change places
        ("5,3,16", [5, 2, 3, 8], TAKE["Gather"].format(at=1)),  # the pair is not of the last axis
        ("5,3,16", [5, 3, 8, 2], TAKE["Gather"].format(at=0)),
        ("5,3,16", [5, 6, 2, 4], TAKE["Gather"].format(at=2)),  # rows become two
        ("1,16", [2, 8], TAKE["Gather"].format(at=0)),  # the leading axis goes
        ("1,3,16", [1, 3, 2, 8], TAKE["Slice"].replace("p, ax", "p, lo").replace("q, ax", "q, lo")),
        ("1,3,16", [1, 3, 2, 8], "p = Gather<axis = 2>(v, zero)\nq = Gather<axis = 2>(v, one)\n"
         "g = Squeeze(p, lo)\nu = Squeeze(q, lo)"),
        ("5,3,2", [5, 3, 2], TAKE["Gather"].format(at=2)),  # no view at all
        ("4,5", [5, 2, 2], TAKE["Gather"].format(at=1)),  # five columns have no halves
        ("5,2,2", [5, 2, 2], "g = Gather<axis = 1>(v, lo)\nu = Gather<axis = 1>(v, hi)"),
    ],
)  # fmt: skip
def test_a_view_of_other_rows_is_no_half(shape: str, target: list[int], take: str) -> None:
    body = f"v = Reshape(x, t)\n{take}\n{UNIT}"
    constants = _used(body, {**ROWS, "t": target})
    dims = [int(dim) for dim in shape.split(",")]
    proto = model(body, f"float[{shape}] x", "float[a] y", constants=constants)  # type: ignore[arg-type]
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    site = only(same(proto, {"x": rows(*dims)}))
    assert site.attributes["layout"] == "pair"


def test_the_names_of_an_output_prove_no_view() -> None:
    body = f"v = Reshape(x, t)\n{TAKE['Gather'].format(at=2)}\n{UNIT}"
    outputs = "float[n,m,8] y, float[b,s,2,8] v"
    constants = {"zero": np.array(0), "one": np.array(1)}
    proto = model(body, "float[b,s,16] x, int64[4] t", outputs, constants=constants)
    site = only(same(proto, {"x": rows(5, 3, 16), "t": np.array([3, 5, 2, 8])}))
    assert site.attributes["layout"] == "pair"


@pytest.mark.parametrize("first", ["u", "g"])
def test_one_half_twice_is_a_pair(first: str) -> None:
    body = f"{first}, other = Split<axis = -1, num_outputs = 2>(x)\n" + (
        "g = Neg(u)" if first == "u" else "u = Neg(g)"
    )
    assert halves(body) == "pair"


# --- linear maps in front, and what is no gated unit ----------------------------------------

WEIGHTS = {
    "w": rows(6, 16),
    "wg": rows(6, 8),
    "wu": rows(6, 8, seed=1),
    "b": rows(16, seed=2),
    "bg": rows(8, seed=3),
    "bu": rows(8, seed=4),
}
ACTIVATED = {
    "GLU": "a = Sigmoid(g)",
    "ReGLU": "a = Relu(g)",
    "ReGLU2": "r = Relu(g)\na = Pow(r, two)",
    "SwiGLU": "c = Mul(g, beta)\ns = Sigmoid(c)\na = Mul(g, s)",
    "GEGLU": "d = Div(g, root)\ne = Erf(d)\nf = Add(e, one)\nh = Mul(g, half)\na = Mul(h, f)",
}
PACKED = (
    "p = MatMul(x, w)\nx2 = Add(p, b)\n{first}, {second} = Split<axis = 2, num_outputs = 2>(x2)"
)


@pytest.mark.parametrize("variant", ACTIVATED)
@pytest.mark.parametrize(
    ("maps", "layout"),
    [
        (PACKED.format(first="g", second="u"), "gate_up"),
        (PACKED.format(first="u", second="g"), "up_gate"),
        ("p = MatMul(x, wg)\ng = Add(p, bg)\nq = MatMul(x, wu)\nu = Add(bu, q)", "pair"),
        ("g = MatMul(x, wg)\nq = MatMul(x, wu)\nu = Add(q, bu)", "pair"),
    ],
)
@pytest.mark.parametrize("swapped", [False, True])
def test_biases_in_front_of_every_variant(
    variant: str, maps: str, layout: str, swapped: bool
) -> None:
    body = f"{maps}\n{ACTIVATED[variant]}\ny = Mul({'u, a' if swapped else 'a, u'})"
    scalars = {"beta": 1.702, "root": np.sqrt(2), "one": 1, "half": 0.5, "two": 2}
    constants = {name: np.float32(value) for name, value in scalars.items()} | WEIGHTS
    used = {name: array for name, array in constants.items() if name in _words(body)}
    site = only(same(model(body, "float[b,s,6] x", constants=used), {"x": rows(2, 3, 6)}))
    assert (site.attributes["variant"], site.attributes["layout"]) == (variant, layout)


@pytest.mark.parametrize("square", ["y = Pow(r, two)", "y = Mul(r, r)"])
@pytest.mark.parametrize("relu", ["r = Relu(x)", "r = Max(x, zero)", "r = Max(zero, x)"])
@pytest.mark.parametrize("dtype", ["float", "float16"])
def test_squared_relu_alone(relu: str, square: str, dtype: str) -> None:
    body = f"{relu}\n{square}"
    kind = np.float16 if dtype == "float16" else np.float32
    constants = {name: kind(number) for name, number in {"two": 2, "zero": 0}.items()}
    used = {name: array for name, array in constants.items() if name in _words(body)}
    proto = model(body, f"{dtype}[b,8] x", f"{dtype}[b,8] y", constants=used)
    report = same(proto, {"x": rows(3, 8, dtype=kind)}, bound=0)
    assert only(report).op == "Relu2"


def test_squared_relu_between_casts() -> None:
    body = "w = Cast<to = 1>(x)\nr = Relu(w)\nq = Pow(r, two)\ny = Cast<to = 10>(q)"
    proto = model(body, "float16[b,8] x", "float16[b,8] y", constants={"two": np.float32(2)})
    assert kind(same(proto, {"x": rows(3, 8, dtype=np.float16)}, bound=0)) == "Relu2_f16"


@pytest.mark.parametrize(
    "body",
    [
        "r = Relu(x)\ny = Pow(r, p)",
        "r = Relu(x)\nn = Neg(x)\nq = Relu(n)\ny = Mul(r, q)",
        "r = Relu(x)\ny = Mul(x, r)",
    ],
)
def test_what_is_no_squared_relu(body: str) -> None:
    constants = {"p": np.float32(3)} if "p)" in body else {}
    report = same(model(body, constants=constants), {"x": rows(2, 3, 8)})
    assert "Relu2" not in fused_ops(report)


def test_a_scaled_activation_is_no_gated_unit() -> None:
    body = "s = Sigmoid(x)\na = Mul(x, s)\ny = Mul(a, scale)"
    proto = model(body, constants={"scale": rows(8)})
    assert [site.op for site in same(proto, {"x": rows(2, 3, 8)}).sites] == ["Swish"]


@pytest.mark.parametrize(
    ("op", "body"),
    [
        ("Swish", "s = Sigmoid(x)\na = Mul(x, s)\n"),
        # The rule of the activation comes further into the product than that of the unit.
        (
            "Gelu",
            "d = Div(x, root)\ne = Erf(d)\ns = Add(e, one)\nh = Mul(x, half)\na = Mul(h, s)\n",
        ),
    ],
)
def test_a_product_outside_a_fused_activation_is_reported(op: str, body: str) -> None:
    numbers = {"root": np.sqrt(2, dtype=np.float32), "one": np.float32(1), "half": np.float32(0.5)}
    constants = {name: number for name, number in numbers.items() if name in body}
    proto = model(body + "y = Mul(a, u)", "float[b,s,8] x, float[b,s,1] u", constants=constants)
    report = same(proto, {"x": rows(2, 3, 8), "u": rows(2, 3, 1)})
    assert [(site.op, site.status, site.reason) for site in report.sites] == [
        (op, "fused", None),
        ("GLU", "refused", "shapes_not_proved"),
    ]
    assert report.sites[1].output == "y"


def test_the_standard_swiglu_takes_in_what_is_in_front_of_it() -> None:
    body = """
      shape = Shape<start = 0, end = 2>(r)
      target = Concat<axis = 0>(shape, pair)
      v = Reshape(x, target)
      g0 = Gather<axis = -2>(v, zero)
      u0 = Gather<axis = -2>(v, one)
      g = Clip(g0, "", high)
      u = Clip(u0, low, high)
      y = SwiGLU<alpha = 1.5>(g, u)
    """
    proto = model(
        body,
        "float[b,s,16] x, float[b,s,4] r",
        opset=28,
        ir_version=13,
        constants={
            "pair": np.array([2, 8]),
            "zero": np.array(0),
            "one": np.array(1),
            "high": np.float32(LIMIT),
            "low": np.float32(-LIMIT),
        },
    )
    site = only(fusenorm.optimize(proto).report)
    assert site.attributes["kind"] == "GLU_swish_clampgate_gate_up"
    assert site.attributes["beta"] == 1.5


def test_the_standard_swiglu_never_broadcasts() -> None:
    proto = model("y = SwiGLU(x, u)", "float[b,s,8] x, float[c,s,8] u", opset=28, ir_version=13)
    assert kind(fusenorm.optimize(proto).report) == "GLU_swish"
