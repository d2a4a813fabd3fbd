"""Norms in the linear ops behind them: which join, which stay, and outputs equal."""

from __future__ import annotations

import collections
import dataclasses

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import fusenorm
from fusenorm.ops import DOMAIN, DTYPES, Norm
from fusenorm.passes.fold_norm import FoldNorm
from fusenorm.passes.norm_linear import OP, NormLinear
from fusenorm.passes.pattern import Refusal
from fusenorm.passes.rewrite import MISS_KEY
from fusenorm.pipeline import DEFAULTS, Options, lower_regions
from fusenorm.report import Site
from tests import corpus, graphs
from tests.graphs import model, rows
from tests.passes.test_add_residual import _agree

JOINING = Options(norm_linear=True)
BOTH = Options(norm_linear=True, add_residual=True)
X, Y = "float[b,s,8] x", "float[b,s,64] y"
CONSTANTS = {
    "w": rows(8, 64, seed=1),
    "v": rows(8, 64, seed=2),
    "u": rows(8, 32, seed=3),
    "c": rows(64, seed=4),
    "g": np.linspace(0.5, 2, 8, dtype=np.float32),
    "b": np.linspace(-1, 1, 8, dtype=np.float32),
}
LN = "n = LayerNormalization <epsilon: float = 1e-3> (x, g, b)\n"
RMS = "n = RMSNormalization <epsilon: float = 1e-3> (x, g)\n"
MAP = "y = MatMul (n, w)"


def lowered(
    body: str,
    inputs: str = X,
    outputs: str = Y,
    *,
    options: Options = JOINING,
    bound: float = 4e-6,
    dtype: type = np.float32,
) -> tuple[list[str], list[Site]]:
    """Kinds of the fused ops, in order, and the refused norms; outputs must agree."""
    constants = {name: array.astype(dtype) for name, array in CONSTANTS.items()}
    return graphs.fused_kinds(body, inputs, outputs, constants, options, OP, bound=bound)


@pytest.mark.parametrize(
    ("kinds", "body"),
    [
        (["Linear_rms"], RMS + MAP),
        (["Linear_bias_ln"], LN + MAP),
        (["Linear_bias_rms"], RMS + "p = MatMul (n, w)\ny = Add (p, c)"),
        (["Linear_relu_bias_ln"], LN + "p = MatMul (n, w)\ny = Relu (p)"),
        (
            ["LinearGLU_swish_rms"],
            RMS + "p = MatMul (n, w)\nh = Sigmoid (p)\nk = Mul (p, h)\n"
            "t = MatMul (n, v)\ny = Mul (k, t)",
        ),
        # several maps are one reader
        (["Linear_2maps_bias_ln"], LN + "h = MatMul (n, w)\nk = MatMul (n, v)\ny = Max (h, k)"),
    ],
)
def test_norms_join(kinds: list[str], body: str) -> None:
    assert lowered(body) == (kinds, [])


def test_what_reads_the_shape_alone_reads_it_elsewhere() -> None:
    found = lowered(RMS + MAP + "\nz = Shape (n)", outputs=f"{Y}, int64[3] z")
    assert found == (["Linear_rms"], [])


def test_what_is_normalised_may_have_other_readers() -> None:
    body = RMS + MAP + "\nz = Cos (x)"
    assert lowered(body, outputs=f"{Y}, float[b,s,8] z") == (["Linear_rms"], [])


@pytest.mark.parametrize(
    ("reason", "body", "outputs", "options"),
    [
        ("output", RMS + MAP, f"{Y}, float[b,s,8] n", Options(norm_linear=True, fold_norm=())),
        ("reader", RMS + MAP + "\nz = Cos (n)", f"{Y}, float[b,s,8] z", JOINING),
        # maps of one input each its own
        ("reader", RMS + "h = MatMul (n, w)\nk = MatMul (n, v)\ny = Max (h, k)", Y,
         Options(norm_linear=True, concat_linear=False)),
        ("affine", RMS + MAP, Y, Options(norm_linear=True, fold_norm=())),
        ("affine", LN + MAP, Y, Options(norm_linear=True, fold_norm=())),
        ("sum", "t = Add (x, r)\nn = RMSNormalization (t, g)\n" + MAP, Y, JOINING),
        # no norm, or nothing it is packed with
        (None, "n = Cos (x)\n" + MAP, Y, JOINING),
        (None, "y = MatMul (x, w)", Y, JOINING),
        (None, RMS + "y = Concat <axis: int = -1> (n, n, n, n, n, n, n, n)", Y, JOINING),
    ],
)  # fmt: skip
def test_norms_that_stay(reason: str | None, body: str, outputs: str, options: Options) -> None:
    inputs = f"{X}, float[b,s,8] r" if "r)" in body else X
    kinds, refused = lowered(body, inputs, outputs, options=options)
    assert not any(map(_joined, kinds))
    found = dict.fromkeys(site.reason for site in refused)
    assert list(found) == ([] if reason is None else [reason])


def _joined(kind: str) -> bool:
    return kind.startswith("Linear") and bool({"rms", "ln"} & set(kind.split("_")))


@pytest.mark.parametrize(
    ("found", "norm", "body"),
    [
        # none of it was folded
        ("Linear_rms", Norm(scale=None), "n = OP (x)\ny = MatMul (n, w)"),
        ("affine", Norm(scale=None, bias="f32"), "n = OP (x, c)\ny = MatMul (n, w)"),
        # the map's residual is normalised too
        ("reader", Norm(scale=None), "n = OP (x)\nh = MatMul (n, w)\ny = Add (h, n)"),
        # the map reads the sum
        (None, Norm(skip=True, scale=None), "z, n = OP (x, x)\ny = MatMul (n, w)"),
        ("rounding", Norm(centred=True, dtype="f16", scale=None, centre="storage"),
         "n = OP (x)\ny = MatMul (n, w)"),
        # no map of ours, whatever it is called
        (None, Norm(scale=None), "n = OP (x)\ny = other.Linear (n, w)"),
    ],
)  # fmt: skip
def test_norms_of_ours(found: str | None, norm: Norm, body: str) -> None:
    """What comes of them: the op they join, or why they stay."""
    dtype = DTYPES[norm.dtype].numpy
    rows_of = f"float{8 * dtype.itemsize if dtype.itemsize < 4 else ''}[b,s,64]"
    extra = f", {rows_of} z" if "z" in body else ""
    body = body.replace("OP", f"fusenorm.{norm.op_type} <epsilon: float = 1e-5>")
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 23, "fusenorm" : 1, "other" : 1]>\n'
        f"graph ({rows_of} x) => ({rows_of} y{extra}) {{\n{body}\n}}"
    )
    for name, array in {"w": rows(64, 64, seed=6), "c": CONSTANTS["c"]}.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(dtype), name))
    proto.functions.append(norm.function(23))
    before = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    work, _ = lower_regions(before, options=dataclasses.replace(BOTH, fold_norm=()))
    made = [node.op_type for node in work.graph if _joined(node.op_type)]
    known = [node.meta[MISS_KEY] for node in work.graph if MISS_KEY in node.meta]
    refused = [miss.refusal.code for op, miss in known if op == OP]
    assert made + refused == ([] if found is None else [found])


def test_a_residual_stream() -> None:
    """As in a block: the sum joins the map in front, the norm of it the map behind."""
    body = """
        n = RMSNormalization (x, g)\n p = MatMul (n, w)\n a = Relu (p)\n f = MatMul (a, q)
        s = Add (x, f)\n m = RMSNormalization (s, g)\n o = MatMul (m, v)\n r = Relu (o)
        y = Concat <axis: int = -1> (r, s)"""
    constants = {
        "g": np.linspace(0.5, 2, 32, dtype=np.float32),
        "w": rows(32, 64, seed=6),
        "v": rows(32, 64, seed=7),
        "q": rows(64, 32, seed=8),
    }
    proto = model(
        body, "float[b,s,32] x", "float[b,s,96] y", constants=constants, opset=23, ir_version=10
    )
    for options, kinds in (
        (BOTH, ["Linear_relu_rms", "Linear_residual", "Linear_relu_rms"]),
        (JOINING, ["Linear_relu_rms", "Linear", "SkipRMSNorm_noscale", "Linear_relu"]),
    ):
        work, _ = graphs.lowered(proto, options, bound=4e-6)
        assert [node.op_type for node in work.graph if node.domain == DOMAIN] == kinds


def test_a_map_that_ends_in_a_sum() -> None:
    found = lowered(
        RMS + "h = MatMul (n, w)\ny = Add (h, r)", f"{X}, float[b,s,64] r", options=BOTH
    )
    assert found == (["Linear_residual_rms"], [])


def test_a_map_whose_sum_is_taken_out_of_a_norm() -> None:
    """Nothing is left of it that would read the norm in front too."""
    body = RMS + "h = MatMul (n, w)\nt = Add (h, r)\ny = RMSNormalization (t, c)"
    found = lowered(body, f"{X}, float[b,s,64] r", options=BOTH)
    assert found == (["Linear_residual_rms", "RMSNorm"], [])


def test_16_bits() -> None:
    inputs, outputs = X.replace("float", "float16"), Y.replace("float", "float16")
    half = {"dtype": np.float16, "bound": 4e-3}
    kinds, refused = lowered(LN + MAP, inputs, outputs, **half)  # type: ignore[arg-type]
    assert (kinds, [site.reason for site in refused]) == (["Linear_f16"], ["affine"])
    options = Options(norm_linear=True, fold_norm=("f16",))
    kinds, refused = lowered(LN + MAP, inputs, outputs, options=options, **half)  # type: ignore[arg-type]
    assert (kinds, refused) == (["Linear_bias_ln_f16"], [])


def test_off_by_default() -> None:
    assert lowered(RMS + MAP, options=DEFAULTS) == (["RMSNorm_noscale", "Linear"], [])


def test_compiled_again_it_stays() -> None:
    proto = model(
        RMS + MAP, X, Y, opset=23, ir_version=10, constants={n: CONSTANTS[n] for n in "gw"}
    )
    once, _ = lower_regions(fusenorm.optimize(proto).model, options=JOINING)
    again = fusenorm.optimize(ir.to_proto(once))
    for options in (DEFAULTS, BOTH, Options(centre_residual=True)):
        work, _ = lower_regions(again.model, options=options)
        assert [node.op_type for node in work.graph] == ["Linear_rms"]
    assert not NormLinear()(once).modified


def test_it_says_whether_it_did_something() -> None:
    proto = model(
        RMS + MAP, X, Y, opset=23, ir_version=10, constants={n: CONSTANTS[n] for n in "gw"}
    )
    work, _ = lower_regions(fusenorm.optimize(proto).model)
    assert NormLinear()(work).modified
    assert not NormLinear()(work).modified


def test_no_scale_folds_behind_a_norm_that_joined() -> None:
    """There it would be normalised away."""
    body = LN + "m = RMSNormalization (n, g)\ny = MatMul (m, w)"
    proto = model(body, X, Y, opset=23, ir_version=10, constants={n: CONSTANTS[n] for n in "gbw"})
    work, _ = lower_regions(fusenorm.optimize(proto).model, options=JOINING)
    first, linear = work.graph
    assert linear.op_type == "Linear_rms"
    for step in (FoldNorm(), NormLinear()):
        assert not step(work).modified
        assert not any(MISS_KEY in node.meta for node in (first, linear))


def test_what_does_not_pay_stays_and_is_reported_once() -> None:
    def refuse(rewrite: object, opset: int) -> Refusal | None:
        normed = rewrite.spec.op_type == "Linear_rms"  # type: ignore[attr-defined]
        return Refusal("slower", "n", "why") if normed else None

    proto = model(
        RMS + MAP, X, Y, opset=23, ir_version=10, constants={n: CONSTANTS[n] for n in "gw"}
    )
    work, regions = lower_regions(fusenorm.optimize(proto).model, refuse, JOINING)
    assert [node.op_type for node in work.graph] == ["RMSNorm_noscale", "Linear"]
    assert [(site.op, site.reason) for site in regions] == [
        ("NormFold", None),
        ("Linear", None),
        ("NormLinear", "slower"),
    ]
    assert not NormLinear(refuse)(work).modified


def test_the_report_names_norm_and_map_and_what_was_folded() -> None:
    proto = model(
        LN + MAP, X, Y, opset=23, ir_version=10, constants={n: CONSTANTS[n] for n in "gbw"}
    )
    for node, name in zip(proto.graph.node, ("norm", "map"), strict=True):
        node.name = name
    _, (linear, fold) = lower_regions(fusenorm.optimize(proto).model, options=JOINING)
    kind = {"kind": "Linear_bias_ln", "rule": "norm_linear"}
    assert (linear.op, linear.nodes) == ("Linear", ("map", "norm"))
    assert linear.attributes == kind | {"epsilon": pytest.approx(1e-3)}
    assert (fold.op, fold.attributes["maps"]) == ("NormFold", ["y"])


EXPECTED = {
    "llama": {"Linear_3maps_rms": 2, "LinearGLU_swish_rms": 2, "Linear_bias_ragged_rms": 1},
    "t5_v1_1_enc": {"Linear_3maps_rms": 2, "LinearGLU_gelu_tanh_rms": 2},
    "vit": {"Linear_3maps_bias_ln": 1, "Linear_gelu_bias_ln": 2},  # the first adds positions
    "bert": {},
}


@pytest.mark.skipif(not corpus.available(), reason="the corpus is not here")
@pytest.mark.parametrize("name", EXPECTED)
def test_real_exports(name: str) -> None:
    for path in corpus.files((name,)):
        result = fusenorm.optimize(path)
        work, _ = lower_regions(result.model, options=BOTH)
        kinds = collections.Counter(node.op_type for node in work.graph)
        found = {kind: count for kind, count in kinds.items() if _joined(kind)}
        assert found == EXPECTED[name], path.name
        _agree(path, result.model, work)
