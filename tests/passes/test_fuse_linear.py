"""Linear maps at compile time: which fuse, with what, and which stay as they are."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

import fusenorm
from fusenorm.ops.linear import unpack
from fusenorm.passes.fuse_linear import FuseLinear
from fusenorm.passes.speller import Speller, spellings
from fusenorm.pipeline import lower_regions
from fusenorm.report import Site
from tests.graphs import model, proposed, rows, run

W = rows(8, 128, seed=1)  # several panels, so that their order shows
V = rows(8, 128, seed=2)
B = rows(128, seed=3)
OUT = "float[b,s,128] y"


def lowered(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, list[Site]]:
    """The model compile would pack, as stock onnxruntime sees it, and its regions."""
    work, regions = lower_regions(fusenorm.optimize(proto).model)
    after = ir.to_proto(work)
    onnx.checker.check_model(after)
    return after, regions


def check(proto: onnx.ModelProto) -> tuple[list[str], list[str | None]]:
    """Kinds of the fused regions and reasons of the others; outputs must agree."""
    after, regions = lowered(proto)
    feeds = {
        value.name: rows(*(2 + axis if dim.dim_param else dim.dim_value
                           for axis, dim in enumerate(value.type.tensor_type.shape.dim)))
        for value in proto.graph.input
    }  # fmt: skip
    for a, b in zip(run(proto, feeds), run(after, feeds), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=4e-6 * np.abs(a).max(initial=1e-3))
    kinds = [str(site.attributes["kind"]) for site in regions if site.status == "fused"]
    return kinds, [site.reason for site in regions if site.status == "refused"]


def _write(speller: Speller) -> ir.Value:
    rule = FuseLinear()
    rule.example(speller)
    return rule.pattern.spell(speller)


@pytest.mark.parametrize(("opset", "rank"), [(12, 3), (13, 2), (18, 4), (23, 3)])
def test_every_spelling_fuses_and_agrees(opset: int, rank: int) -> None:
    found = set()
    for spelled in spellings(_write, opset=opset, rank=rank, limit=40):
        (kind,), refused = check(ir.to_proto(spelled))
        assert refused == []
        found.add(kind)
    ends = ("", "_relu", "_sigmoid")
    assert found == {f"Linear{act}{bias}" for act in ends for bias in ("", "_bias")}


ACTIVATED = {
    "Linear": "y = MatMul (x, w)",
    "Linear_bias": "h = MatMul (x, w)\n y = Add (b, h)",
    "Linear_relu_bias": "h = MatMul (x, w)\n t = Add (h, b)\n y = Relu (t)",
    "Linear_sigmoid": "h = MatMul (x, w)\n y = Sigmoid (h)",
    "Linear_swish": "h = MatMul (x, w)\n s = Sigmoid (h)\n y = Mul (h, s)",
    "Linear_gelu_bias": "h = MatMul (x, w)\n t = Add (h, b)\n y = Gelu (t)",
    "LinearGLU_swish": """g = MatMul (x, w)\n u = MatMul (x, v)
        s = Sigmoid (g)\n a = Mul (g, s)\n y = Mul (a, u)""",
    "LinearGLU_gelu_bias": """g = MatMul (x, w)\n h = Add (g, b)\n u = MatMul (x, v)
        t = Add (u, b)\n a = Gelu (h)\n y = Mul (a, t)""",
    "LinearGLU_identity": "g = MatMul (x, w)\n u = MatMul (x, v)\n y = Mul (g, u)",
}


@pytest.mark.parametrize("kind", ACTIVATED)
def test_what_follows_the_product_joins_it(kind: str) -> None:
    used = {name: array for name, array in {"w": W, "v": V, "b": B}.items()
            if f"{name})" in ACTIVATED[kind] or f"({name}," in ACTIVATED[kind]}  # fmt: skip
    proto = model(ACTIVATED[kind], outputs=OUT, constants=used, opset=20)
    # A standard Gelu is an activation too: it stays native until compile takes it in.
    assert check(proto) == ([kind], [])


@pytest.mark.parametrize(("width", "ragged"), [(128, ""), (52, "_ragged"), (29, "_ragged")])
@pytest.mark.parametrize(("halves", "gate"), [("g, u", "g"), ("u, g", "g")])
def test_halves_of_one_product_are_dealt_out(
    halves: str, gate: str, width: int, ragged: str
) -> None:
    body = f"""h = MatMul (x, w)\n t = Add (h, b)
        {halves} = Split <axis: int = -1, num_outputs: int = 2> (t)
        s = Sigmoid ({gate})\n a = Mul ({gate}, s)\n y = Mul (a, u)"""
    constants = {"w": rows(8, 2 * width), "b": rows(2 * width)}
    proto = model(body, outputs=f"float[b,s,{width}] y", constants=constants)
    assert check(proto) == ([f"LinearGLU_swish_bias{ragged}"], [])


@pytest.mark.parametrize(("width", "end"), [(128, ""), (52, "_bias_ragged")])
def test_interleaved_columns_are_dealt_out(width: int, end: str) -> None:
    ends = {"z": [0], "o": [1], "e": [2**31], "ax": [-1], "st": [2]}
    body = """h = MatMul (x, w)
        g = Slice (h, z, e, ax, st)\n u = Slice (h, o, e, ax, st)
        s = Sigmoid (g)\n a = Mul (g, s)\n y = Mul (a, u)"""
    constants = {"w": rows(8, 2 * width)} | {k: np.array(v, np.int64) for k, v in ends.items()}
    proto = model(body, outputs=f"float[b,s,{width}] y", constants=constants)
    assert check(proto) == ([f"LinearGLU_swish{end}"], [])


def test_rows_of_a_width_only_the_weight_knows() -> None:
    body = """d = Shape <start: int = 0, end: int = 2> (x)\n t = Concat <axis: int = 0> (d, rest)
        h = Reshape (x, t)\n y = MatMul (h, w)"""
    constants = {"w": W, "rest": np.array([-1], np.int64)}
    assert check(model(body, "float[b,s,2,4] x", OUT, constants=constants)) == (["Linear"], [])


@pytest.mark.parametrize("transposed", [0, 1])
def test_gemm(transposed: int) -> None:
    body = f"y = Gemm <transB: int = {transposed}> (x, w, b)"
    weight = np.ascontiguousarray(W.T) if transposed else W
    proto = model(body, "float[b,8] x", "float[b,128] y", constants={"w": weight, "b": B})
    assert check(proto) == (["Linear_bias"], [])


ROWS = {
    "w": W,
    "z": V,
    "b": B,
    "flat": np.array([-1, 8], np.int64),
    "deep": np.array([1, -1, 8], np.int64),
    "wide": np.array([128], np.int64),
    "pairs": np.array([2, 64], np.int64),
    "copied": np.array([0, 0, 128], np.int64),
}
LEADING = "d = Shape <start: int = 0, end: int = 2> (x)\n t = Concat <axis: int = 0> (d, wide)\n"


@pytest.mark.parametrize("given", ["float[b,s,8] x", "float[2,3,8] x"])
@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ("r = Reshape (x, flat)\n h = Gemm (r, w, b)\n v = Reshape (h, t)", "Linear_bias"),
        ("r = Reshape (x, flat)\n h = MatMul (r, w)\n v = Reshape (h, t)", "Linear"),
        ("r = Reshape (x, deep)\n h = MatMul (r, w)\n v = Reshape (h, t)", "Linear"),
        (
            "r = Reshape (x, flat)\n h = Gemm (r, w, b)\n u = Reshape (h, t)\n v = Relu (u)",
            "Linear_relu_bias",
        ),
        (
            "r = Reshape (x, flat)\n h = MatMul (r, w)\n u = Reshape (h, t)\n v = Add (u, b)",
            "Linear_bias",
        ),
        (
            "r = Reshape (x, flat)\n h = MatMul (r, w)\n g = Reshape (h, t)\n k = MatMul (r, z)\n"
            "u = Reshape (k, t)\n s = Sigmoid (g)\n a = Mul (g, s)\n v = Mul (a, u)",
            "LinearGLU_swish",
        ),
    ],
)
def test_rows_laid_side_by_side_for_the_product(given: str, body: str, kind: str) -> None:
    used = {name: array for name, array in ROWS.items() if f"{name})" in body or f"{name}," in body}
    output = OUT if "b" in given else "float[2,3,128] y"
    constants = {**used, "wide": ROWS["wide"]}
    proto = model(f"{LEADING}{body}\n y = Cos (v)", given, output, constants=constants)
    after, regions = lowered(proto)
    assert [site.attributes["kind"] for site in regions] == [kind]
    assert "Reshape" not in {node.op_type for node in after.graph.node}
    assert check(proto) == ([kind], [])


def test_the_rows_of_an_output_are_inferred() -> None:
    body = LEADING + "r = Reshape (x, flat)\n h = MatMul (r, w)\n y = Reshape (h, t)"
    constants = {name: ROWS[name] for name in ("flat", "w", "wide")}
    proto = model(body, "float[b,s,8] x", "float[n,m,128] y", constants=constants)
    after, _ = lowered(proto)
    assert {node.op_type for node in after.graph.node} == {"Linear"}
    assert check(proto) == (["Linear"], [])


def test_the_names_of_an_output_prove_no_rows_behind_a_norm() -> None:
    """The norm of a reshaped sum reads the sum itself, whose axes are those of x the other way."""
    body = f"""
      c = Cos (z)
      a = Add (z, c)
      f = Reshape (a, flat)
      n = LayerNormalization (f, one)
      h = MatMul (n, w)
      {LEADING}
      y = Reshape (h, t)
    """
    constants = {name: ROWS[name] for name in ("flat", "w", "wide")} | {"one": np.ones(8, "f")}
    given = "float[b,s,8] x, float[s,b,8] z"
    proto = model(body, given, "float[b,s,128] y, float[b,s,8] a", constants=constants)
    after, _ = lowered(proto)
    assert "Reshape" in {node.op_type for node in after.graph.node}


@pytest.mark.parametrize(
    ("body", "given", "output"),
    [
        # Its rows are others.
        ("r = Reshape (x, flat)\n h = MatMul (r, w)\n y = Relu (h)", "float[b,s,8] x",
         "float[n,128] y"),
        ("r = Reshape (x, flat)\n h = MatMul (r, w)\n d = Shape <end: int = 2> (x)\n"
         "t = Concat <axis: int = 0> (d, pairs)\n y = Reshape (h, t)", "float[b,s,8] x",
         "float[b,s,2,64] y"),
        ("h = MatMul (x, w)\n y = Reshape (h, copied)", "float[b,s,8] x", OUT),
        # Something else reads the rows.
        (LEADING + "r = Reshape (x, flat)\n h = MatMul (r, w)\n v = Reshape (h, t)\n"
         "m = ReduceMax (h)\n y = Add (v, m)", "float[b,s,8] x", OUT),
        # The names of an output may be anybody's, and a name that stands twice anything's.
        ("r = Reshape (x, flat)\n h = MatMul (r, w)\n y = Reshape (h, t)",
         "float[b,s,8] x, int64[3] t", OUT),
        (LEADING + "r = Reshape (x, flat)\n h = MatMul (r, w)\n v = Reshape (h, t)\n y = Cos (v)",
         "float[s,s,8] x", "float[s,s,128] y"),
        # x has other columns than the product reads.
        (LEADING + "r = Reshape (x, flat)\n h = MatMul (r, w)\n y = Reshape (h, t)",
         "float[b,16,4] x", "float[b,16,128] y"),
    ],
)  # fmt: skip
def test_reshapes_that_stay(body: str, given: str, output: str) -> None:
    used = {name: array for name, array in ROWS.items() if f"{name})" in body}
    proto = model(body, given, output, constants=used)
    after, regions = lowered(proto)
    assert "Reshape" in {node.op_type for node in after.graph.node}
    assert [site.attributes["kind"] for site in regions] == [
        "Linear_relu" if "Relu" in body else "Linear"
    ]


PLAIN = "float[b,s,8] x"
MATRIX = "float[s,8] x"
GATED = "fusenorm.GLU_sigmoid"
TURNED = "t = Transpose (wt)\n"
CONSTANTS = {
    "w": W,
    "v": V,
    "b": B,
    "wt": np.ascontiguousarray(W.T),
    "half": W.astype(np.float16),
    "brain": W.astype(ml_dtypes.bfloat16),
    "wide": W.astype(np.float64),
    "odd": rows(8, 95),
    "uneven": rows(8, 144),  # halves of 72 columns, for which panels hold 96
    "batch": rows(2, 8, 64),
    "column": rows(5, 1),
    "matrix": rows(5, 128),
    "cube": rows(1, 1, 128),
    "one": np.array(1.5, np.float32),
}


@pytest.mark.parametrize(
    ("found", "body", "inputs"),
    [
        ("Linear", "y = MatMul (x, w)", PLAIN),
        (None, "y = MatMul (x, w)", "float[8] x"),
        (None, "y = MatMul (x, w)", "float[] x"),
        (None, "y = MatMul (x, batch)", PLAIN),
        (None, "y = MatMul (x, w)", PLAIN + ", float[8,128] w"),
        ("Linear_f16", "y = MatMul (x, half)", PLAIN.replace("float", "float16")),
        ("types", "y = MatMul (x, brain)", PLAIN.replace("float", "bfloat16")),
        ("types", "y = MatMul (x, wide)", PLAIN.replace("float", "double")),
        # what is added
        ("Linear_bias", "h = MatMul (x, w)\n y = Add (h, b)", PLAIN),
        ("Linear_bias", "h = MatMul (x, w)\n y = Add (one, h)", PLAIN),
        (None, "y = Add (x, one)", PLAIN),
        (None, "h = MatMul (x, w)\n y = Add (h, b)", PLAIN + ", float[128] b"),
        (None, "h = MatMul (x, w)\n g = Add (h, b)\n y = Add (g, b)", PLAIN),
        (None, "h = Gemm (x, w, b)\n y = Add (h, one)", MATRIX),
        (None, "h = MatMul (x, w)\n y = Add (h, column)", "float[5,8] x"),
        (None, "h = MatMul (x, w)\n y = Add (h, cube)", MATRIX),
        (None, "h = Mul (x, w)\n y = Add (h, b)", "float[8,128] x"),
        (None, "h = other.MatMul (x, w)\n y = Add (h, b)", PLAIN),
        (None, "h = MatMul (x, w)\n g = Add (h, b)\n y = Add (g, h)", PLAIN),
        # Gemm
        ("Linear", "y = Gemm <alpha = 1.0> (x, w)", MATRIX),
        ("Linear_bias", "y = Gemm <beta = 1.0, transB = 1> (x, wt, b)", MATRIX),
        ("Linear_bias", "y = Gemm (x, w, one)", MATRIX),
        ("gemm_form", "y = Gemm <alpha = 2.0> (x, w)", MATRIX),
        ("gemm_form", "y = Gemm <beta = 3.0> (x, w, b)", MATRIX),
        ("gemm_form", "y = Gemm <transA = 1> (x, w)", "float[8,s] x"),
        ("bias_shape", "y = Gemm (x, w, matrix)", "float[5,8] x"),
        ("bias_shape", "y = Gemm (x, w, cube)", MATRIX),
        ("bias_shape", "y = Gemm (x, w, b)", MATRIX + ", float[128] b"),
        # the weight turned
        ("Linear", TURNED + "y = MatMul (x, t)", PLAIN),
        ("Linear", "t = Transpose (w)\n y = Gemm <transB = 1> (x, t)", MATRIX),
        (None, TURNED + "h = MatMul (x, t)\n g = MatMul (z, t)\n y = Add (h, g)", PLAIN),
        (None, TURNED + "g = Identity (t)\n y = MatMul (x, t)", PLAIN),
        # activations
        ("Linear_relu", "h = MatMul (x, w)\n y = Relu (h)", PLAIN),
        ("Linear_gelu", "h = MatMul (x, w)\n y = Gelu (h)", PLAIN),
        ("Linear_swish", "h = MatMul (x, w)\n y = fusenorm.Swish <beta = 1.5> (h)", PLAIN),
        (None, "y = Relu (x)", PLAIN),
        (None, "h = other.Cos (x)\n y = Relu (h)", PLAIN),
        (None, "h = MatMul (x, w)\n g = Neg (h)\n y = Relu (h)", PLAIN),
        (None, "h = MatMul (x, w)\n y = Cos (h)", PLAIN),
        # gated units
        ("LinearGLU_sigmoid", f"g = MatMul (x, w)\n u = MatMul (x, v)\n y = {GATED} (g, u)", PLAIN),
        (None, f"u = MatMul (x, v)\n y = {GATED} (g, u)", PLAIN + ", float[b,s,128] g"),
        (None, f"g = MatMul (x, w)\n y = {GATED} (g, u)", PLAIN + ", float[b,s,128] u"),
        (None, f"g = MatMul (x, w)\n u = MatMul (z, v)\n y = {GATED} (g, u)", PLAIN),
        (None, f"g = MatMul (x, w)\n u = MatMul (x, odd)\n y = {GATED} (g, u)", PLAIN),
        (
            "LinearGLU_sigmoid_bias",
            f"g = MatMul (x, w)\n h = MatMul (x, v)\n u = Add (h, b)\n y = {GATED} (g, u)",
            PLAIN,
        ),
        (
            None,
            "g = MatMul (x, w)\n u = MatMul (x, v)\n"
            "y = fusenorm.GLU_swish_clampgate_plus1 <beta = 1.0, floor = -9.0, limit = 7.0> (g, u)",
            PLAIN,
        ),
        # halves of one
        ("LinearGLU_sigmoid", f"h = MatMul (x, w)\n y = {GATED}_gate_up (h)", PLAIN),
        ("LinearGLU_sigmoid_bias", f"h = Gemm (x, w, one)\n y = {GATED}_up_gate (h)", MATRIX),
        (None, f"h = MatMul (x, odd)\n y = {GATED}_gate_up (h)", PLAIN),
        (None, f"h = MatMul (x, uneven)\n y = {GATED}_gate_up (h)", PLAIN),
        (None, f"y = {GATED}_gate_up (x)", PLAIN),
        (
            None,
            "h = MatMul (x, w)\n y = fusenorm.GLU_swish_clampgate_gate_up"
            " <beta = 1.0, floor = -9.0, limit = 7.0> (h)",
            PLAIN,
        ),
    ],
)
def test_proposals(found: str | None, body: str, inputs: str) -> None:
    more = "" if "z" not in body else f", {PLAIN.replace('x', 'z')}"
    assert proposed(FuseLinear(), body, inputs + more, constants=CONSTANTS, opset=20) == found


@pytest.mark.parametrize("name", ["w", "t"])
def test_a_weight_that_is_an_output_stays(name: str) -> None:
    body = {"w": "y = MatMul (x, w)", "t": TURNED + "y = MatMul (x, t)"}[name]
    shape = {"w": (8, 128), "t": (8, 8320)}[name]
    weight = rows(*shape)
    outputs = f"float[b,s,{shape[1]}] y, float[{shape[0]},{shape[1]}] {name}"
    constants = {"w": weight} if name == "w" else {"wt": np.ascontiguousarray(weight.T)}
    reasons: list[str | None] = ["weight_shared"] if name == "w" else []
    assert check(model(body, outputs=outputs, constants=constants)) == ([], reasons)


REFUSED = {
    "columns": ("y = MatMul (x, w)", {"w": rows(8, 50)}, "float[s,50] y"),
    "gemm_form": ("y = Gemm <alpha: float = 2.0> (x, w)", {"w": W}, "float[s,128] y"),
    "bias_shape": ("y = Gemm (x, w, b)", {"w": W, "b": rows(1, 1)}, "float[s,128] y"),
    "weight_shared": ("h = MatMul (x, w)\n c = Cos (w)\n u = MatMul (x, c)\n y = Add (h, u)",
                      {"w": W}, "float[s,128] y"),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_refused_with_a_reason(reason: str) -> None:
    body, constants, outputs = REFUSED[reason]
    kinds, reasons = check(model(body, "float[s,8] x", outputs, constants=constants))
    assert (kinds, reasons) == ([], [reason])


@pytest.mark.parametrize("sizes", [(8, 0), (0, 64)])
def test_a_weight_without_numbers_stays(sizes: tuple[int, int]) -> None:
    inner, columns = sizes
    proto = model(
        "y = MatMul (x, w)", f"float[s,{inner}] x", f"float[s,{columns}] y",
        constants={"w": rows(inner, columns)},
    )  # fmt: skip
    assert check(proto) == ([], ["empty"])


@pytest.mark.parametrize("columns", [26, 31, 104, 127])
@pytest.mark.parametrize("kind", ACTIVATED)
def test_columns_that_leave_a_panel_unfilled(kind: str, columns: int) -> None:
    """Without a bias they get one, and both of a gated unit do."""
    constants = {"w": W[:, :columns], "v": V[:, :columns], "b": B[:columns]}
    proto = model(
        ACTIVATED[kind], "float[s,8] x", f"float[s,{columns}] y", constants=constants, opset=20
    )
    unit = kind.removesuffix("_bias")
    assert check(proto) == ([f"{unit}_bias_ragged"], [])


@pytest.mark.parametrize(("columns", "end"), [(50, None), (52, "_ragged"), (64, "")])
def test_one_bias_of_a_gated_unit(columns: int, end: str | None) -> None:
    body = """g = MatMul (x, w)\n u = MatMul (x, v)\n t = Add (u, b)
        s = Sigmoid (g)\n a = Mul (g, s)\n y = Mul (a, t)"""
    constants = {"w": W[:, :columns], "v": V[:, :columns], "b": B[:columns]}
    proto = model(body, "float[s,8] x", f"float[s,{columns}] y", constants=constants)
    refused: list[str | None] = ["columns", "columns"]
    wanted = ([], refused) if end is None else ([f"LinearGLU_swish_bias{end}"], [])
    assert check(proto) == wanted


def test_a_made_up_bias_keeps_the_sign_of_zero() -> None:
    """Beside a bias of 0, which does not."""
    body = "y = MatMul (x, w)\n h = MatMul (x, v)\n z = Add (h, nothing)"
    constants = {"w": W[:, :31], "v": V[:, :31], "nothing": np.float32(0)}
    outputs = "float[s,31] y, float[s,31] z"
    after, _ = lowered(model(body, "float[s,8] x", outputs, constants=constants))
    held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in after.graph.initializer}
    signs = []
    for node in after.graph.node:
        bias = held[node.input[2]]
        assert np.array_equal(bias, np.zeros(31))
        signs.append({bool(sign) for sign in np.signbit(bias)})
    assert signs == [{True}, {False}]


def test_numbers_that_are_not_finite_stay_so() -> None:
    weight, bias = W.copy(), B.copy()
    weight[0, 0], weight[1, 1], bias[2] = np.inf, np.nan, -np.inf
    constants = {"w": weight, "b": bias}
    after, _ = lowered(
        model("h = MatMul (x, w)\n y = Add (h, b)", outputs=OUT, constants=constants)
    )
    assert [node.op_type for node in after.graph.node] == ["Linear_bias"]
    (y,) = run(after, {"x": rows(1, 3, 8)})
    assert np.isinf(y[..., 0]).all()
    assert np.isnan(y[..., 1]).all()
    assert np.isneginf(y[..., 2]).all()
    assert np.isfinite(y[..., 3:]).all()


def test_a_tied_weight_stays_unpacked() -> None:
    """An embedding table that is the output projection too must not be stored twice."""
    body = "t = Transpose <perm: ints = [1, 0]> (w)\n e = Gather (w, ids)\n y = MatMul (e, t)"
    table = rows(8320, 8)
    proto = model(body, "int64[b,s] ids", "float[b,s,8320] y", constants={"w": table})
    after, regions = lowered(proto)
    assert [site.status for site in regions] == ["refused"]
    assert [site.reason for site in regions] == ["weight_shared"]
    assert after.ByteSize() <= proto.ByteSize() + 2000


def test_a_transposed_weight_of_its_own_is_packed() -> None:
    body = "t = Transpose <perm: ints = [1, 0]> (w)\n y = MatMul (x, t)"
    proto = model(body, outputs="float[b,s,8320] y", constants={"w": rows(8320, 8)})
    assert check(proto) == (["Linear"], [])


def test_a_transpose_that_turns_nothing_is_no_transpose() -> None:
    """Its weight is square, so that every shape fits either way."""
    body = "t = Transpose <perm: ints = [0, 1]> (w)\n y = MatMul (x, t)"
    constants = {"w": rows(320, 320)}
    proto = model(body, "float[s,320] x", "float[s,320] y", constants=constants)
    assert check(proto) == ([], [])


def test_a_product_with_other_readers_keeps_its_activation_apart() -> None:
    body = "h = MatMul (x, w)\n y = Relu (h)"
    proto = model(body, outputs=f"{OUT}, float[b,s,128] h", constants={"w": W})
    assert check(proto) == (["Linear"], [])


def test_a_bias_that_enlarges_is_no_bias() -> None:
    body = "h = MatMul (x, w)\n y = Add (h, b)"
    proto = model(
        body, "float[s,8] x", "float[3,s,128] y", constants={"w": W, "b": rows(3, 1, 128)}
    )
    assert check(proto) == (["Linear"], [])


def test_gate_and_up_of_different_inputs_stay_two_maps() -> None:
    body = """g = MatMul (x, w)\n u = MatMul (z, v)
        s = Sigmoid (g)\n a = Mul (g, s)\n y = Mul (a, u)"""
    proto = model(body, "float[b,s,8] x, float[b,s,8] z", OUT, constants={"w": W, "v": V})
    assert check(proto) == (["Linear", "Linear"], [])


def test_runtime_weights_stay() -> None:
    proto = model("y = MatMul (x, w)", "float[b,s,8] x, float[8,128] w", OUT)
    assert check(proto) == ([], [])


def test_the_weight_is_stored_once_and_packed() -> None:
    proto = model("y = MatMul (x, w)", outputs=OUT, constants={"w": W})
    after, _ = lowered(proto)
    (weight,) = (onnx.numpy_helper.to_array(tensor) for tensor in after.graph.initializer)
    assert np.array_equal(unpack(weight), W)
    assert after.ByteSize() <= proto.ByteSize() + 2000
