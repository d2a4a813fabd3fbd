"""Residual sums in the linear maps in front of them: which join, which stay, and outputs equal."""

from __future__ import annotations

import collections
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import fusenorm
from fusenorm.ops import Norm
from fusenorm.passes.add_residual import OP, AddResidual
from fusenorm.passes.pattern import Refusal
from fusenorm.passes.rewrite import MISS_KEY
from fusenorm.pipeline import DEFAULTS, Options, lower_regions
from fusenorm.report import Site
from tests import corpus, graphs
from tests.graphs import model, rows

ADDING = Options(add_residual=True)
X, Y = "float[b,s,8] x, float[b,s,64] r", "float[b,s,64] y"
CONSTANTS = {
    "w": rows(8, 64, seed=1),
    "v": rows(8, 64, seed=2),
    "b": rows(64, seed=3),
    "g": np.linspace(0.5, 2, 64, dtype=np.float32),
    "u": rows(64, 32, seed=4),
    "ls": np.linspace(0.1, 0.3, 64, dtype=np.float32),
    "two": np.float32(2),
    "three": np.float32(3),
    "matrix": rows(3, 64, seed=5),
}
H = "h = MatMul (x, w)\n"
HB = "p = MatMul (x, w)\nh = Add (p, b)\n"
RMS = "y = RMSNormalization (t, g)"


def lowered(
    body: str,
    inputs: str = X,
    outputs: str = Y,
    *,
    options: Options = ADDING,
    bound: float = 4e-6,
    dtype: type = np.float32,
) -> tuple[list[str], list[Site]]:
    """Kinds of the fused ops, in order, and the refused sums; outputs must agree."""
    constants = {name: array.astype(dtype) for name, array in CONSTANTS.items()}
    return graphs.fused_kinds(body, inputs, outputs, constants, options, OP, bound=bound)


@pytest.mark.parametrize(
    ("kinds", "body"),
    [
        (["Linear_residual"], H + "y = Add (h, r)"),
        (["Linear_residual"], H + "y = Add (r, h)"),
        (["Linear_bias_residual"], HB + "y = Add (h, r)"),
        # a norm behind it
        (["Linear_residual", "RMSNorm"], H + "t = Add (h, r)\n" + RMS),
        (["Linear_bias_residual", "RMSNorm"], HB + "t = Add (r, h)\n" + RMS),
        (
            ["Linear_residual", "LayerNorm_bias"],
            H + "t = Add (h, r)\ny = LayerNormalization (t, g, b)",
        ),
        (
            ["Linear_residual_alpha", "RMSNorm"],
            H + "a = Mul (r, two)\nt = Add (a, h)\n" + RMS,
        ),
        # of two maps one takes the other
        (["Linear", "Linear_residual"], H + "k = MatMul (z, v)\ny = Add (h, k)"),
        # one that others read too is left out
        (["Linear", "Linear_residual"], H + "k = MatMul (z, v)\nc = Cos (h)\nd = Add (h, k)\n"
         "y = Add (d, c)"),
    ],
)  # fmt: skip
def test_sums_join(kinds: list[str], body: str) -> None:
    inputs = f"{X}, float[b,s,8] z" if "(z" in body else X
    found, refused = lowered(body, inputs)
    assert (found, refused) == (kinds, [])


def test_the_sum_goes_on() -> None:
    """As in a block: the sum is read by the norm and by the next sum, whose map reads the norm."""
    body = (
        H
        + """t = Add (r, h)\n n = RMSNormalization (t, g)\n k = MatMul (n, u)
        e = Relu (k)\n c = Concat <axis: int = -1> (e, e)\n y = Add (t, c)"""
    )
    assert lowered(body) == (["Linear_residual", "RMSNorm_noscale", "Linear_relu"], [])


def test_a_sum_that_is_an_output() -> None:
    body = H + "t = Add (r, h)\n" + RMS
    found = lowered(body, outputs=f"{Y}, float[b,s,64] t")
    assert found == (["Linear_residual", "RMSNorm"], [])


def test_a_map_whose_result_is_an_output_stays() -> None:
    kinds, (site,) = lowered(H + "y = Add (h, r)", outputs=f"{Y}, float[b,s,64] h")
    assert (kinds, site.reason) == (["Linear"], "reader")


OUTPUT_TOO = "c = Cos (r)\n" + H + "y = Add (h, c)"


def test_the_names_of_an_output_prove_no_shape() -> None:
    """It may be broadcast all the same."""
    inputs, outputs = "float[b,s,8] x, float[q,s,64] r", f"{Y}, float[b,s,64] c"
    kinds, (site,) = lowered(OUTPUT_TOO, inputs, outputs)
    assert (kinds, site.reason) == (["Linear"], "shape")


def test_the_shape_of_an_output_is_inferred() -> None:
    kinds, refused = lowered(OUTPUT_TOO, X, f"{Y}, float[n,m,64] c")
    assert (kinds, refused) == (["Linear_residual"], [])


def test_ops_of_other_domains_are_something_else() -> None:
    """Whatever they are called."""
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 23, "other" : 1]>\n'
        "graph (float[b,s,64] x, float[b,s,64] r) => (float[b,s,64] y, float[b,s,64] t) {\n"
        "h = other.Linear (x, x)\ns = Add (h, r)\n k = MatMul (x, w)\n"
        "y, t = other.SkipRMSNorm (k, s, r)\n}"
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(rows(64, 64), "w"))
    work, _ = lower_regions(ir.from_proto(proto), options=ADDING)
    assert [node.op_type for node in work.graph] == ["Linear", "Add", "Linear", "SkipRMSNorm"]
    assert not any(MISS_KEY in node.meta for node in work.graph)


@pytest.mark.parametrize(
    ("reason", "body", "inputs"),
    [
        ("shape", H + "y = Add (h, r)", "float[b,s,8] x, float[b,n,64] r"),
        ("shape", H + "y = Add (h, r)", "float[b,s,8] x, float[1,s,64] r"),
        ("shape", H + "y = Add (h, r)", "float[b,3,8] x, float[3,64] r"),
        ("shape", H + "y = Add (h, r)", "float[3,3,8] x, float[3,1,64] r"),
        ("shape", H + "y = Add (h, r)", "float[b,s,8] x, float[b,s,1] r"),
        ("shape", H + "y = Add (h, r)", "float[1,s,8] x, float[b,s,64] r"),
        ("shape", H + "t = Add (h, r)\n" + RMS, "float[b,3,8] x, float[3,64] r"),
        ("reader", H + "t = Add (h, r)\nc = Cos (h)\ny = Sub (t, c)", X),
        ("reader", H + "y = Add (h, h)", X),
        ("factor", H + "a = Mul (h, two)\nt = Add (r, a)\n" + RMS, X),
        ("factor", H + "a = Mul (h, ls)\nt = Add (r, a)\n" + RMS, X),
        ("factor", H + "a = Mul (h, two)\ne = Mul (r, three)\nt = Add (e, a)\n" + RMS, X),
        ("factor", H + "a = Mul (h, two)\ne = Mul (r, three)\nt = Add (a, e)\n" + RMS, X),
        # no map without activation, or no residual
        (None, H + "k = Relu (h)\ny = Add (k, r)", X),
        (None, H + "k = Cos (h)\ny = Add (k, r)", X),
        (None, HB + "y = Add (h, matrix)", "float[b,3,8] x, float[b,3,64] r"),
    ],
)
def test_sums_that_stay(reason: str | None, body: str, inputs: str) -> None:
    kinds, refused = lowered(body, inputs)
    assert not any("residual" in kind for kind in kinds)
    assert [site.reason for site in refused] == ([] if reason is None else [reason])


def test_16_bits() -> None:
    inputs, outputs = X.replace("float", "float16"), Y.replace("float", "float16")
    half = {"dtype": np.float16, "bound": 2e-3}
    found = lowered(HB + "y = Add (h, r)", inputs, outputs, **half)  # type: ignore[arg-type]
    assert found == (["Linear_bias_residual_f16"], [])
    body = H + "a = Mul (r, two)\nt = Add (a, h)\n" + RMS
    found = lowered(body, inputs, outputs, **half)  # type: ignore[arg-type]
    assert found == (["Linear_residual_alpha_f16", "RMSNorm_f16"], [])


def test_16_bits_summed_in_f32_stay() -> None:
    """There the norm reads what is not rounded yet."""
    norm = Norm(skip=True, dtype="f16", scale=None, residual="f32")
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 23, "fusenorm" : 1]>\n'
        "graph (float16[b,s,8] x, float16[b,s,64] r) => (float16[b,s,64] y) {\nh = MatMul (x, w)\n"
        f"y, t = fusenorm.{norm.op_type} <epsilon: float = 1e-5> (r, h)\n}}"
    )
    weight = CONSTANTS["w"].astype(np.float16)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    proto.functions.append(norm.function(23))
    _, regions = lower_regions(
        ir.from_proto(onnx.shape_inference.infer_shapes(proto)), options=ADDING
    )
    assert [site.reason for site in regions if site.op == OP] == ["rounding"]


def test_a_sum_left_out_so_far_gets_a_name() -> None:
    proto = model(
        H + "t = Add (h, r)\n" + RMS, X, Y, opset=23, ir_version=10,
        constants={name: CONSTANTS[name] for name in "wg"},
    )  # fmt: skip
    result = fusenorm.optimize(proto)
    (norm,) = (node for node in result.model.graph if node.op_type == "SkipRMSNorm")
    norm.outputs[1].name, norm.outputs[1].shape = "", None
    work, _ = lower_regions(result.model, options=ADDING)
    linear, alone = work.graph
    assert (linear.op_type, alone.op_type) == ("Linear_residual", "RMSNorm")
    assert linear.outputs[0].name == "h_sum"
    assert linear.outputs[0].shape == alone.outputs[0].shape
    feeds = {"x": rows(2, 3, 8), "r": rows(2, 3, 64)}
    (want,), (made,) = graphs.run(proto, feeds), graphs.run(ir.to_proto(work), feeds)
    np.testing.assert_allclose(made, want, rtol=0, atol=4e-6 * np.abs(want).max())


def test_off_by_default() -> None:
    kinds, refused = lowered(H + "t = Add (h, r)\n" + RMS, options=DEFAULTS)
    assert (kinds, refused) == (["Linear", "SkipRMSNorm"], [])


def test_it_says_whether_it_did_something() -> None:
    proto = model(H + "y = Add (h, r)", X, Y, constants={"w": CONSTANTS["w"]})
    work, _ = lower_regions(fusenorm.optimize(proto).model)
    assert AddResidual()(work).modified
    assert not AddResidual()(work).modified


def test_why_a_norm_kept_its_scale_is_still_reported() -> None:
    body = H + "t = Add (h, r)\nn = RMSNormalization (t, g)\nk = MatMul (n, u)\ny = Concat "
    body += "<axis: int = -1> (n, k)"
    proto = model(
        body, X, "float[b,s,96] y", opset=23, ir_version=10,
        constants={name: CONSTANTS[name] for name in "wgu"},
    )  # fmt: skip
    _, regions = lower_regions(fusenorm.optimize(proto).model, options=ADDING)
    found = [(site.op, site.reason) for site in regions]
    assert found == [("Linear", None), ("NormFold", "reader"), ("Linear", None)]


def test_what_does_not_pay_stays_and_is_reported_once() -> None:
    def refuse(rewrite: object, opset: int) -> Refusal | None:
        residual = rewrite.spec.op_type == "Linear_residual"  # type: ignore[attr-defined]
        return Refusal("slower", "n", "why") if residual else None

    proto = model(
        H + "t = Add (h, r)\n" + RMS, X, Y, opset=23, ir_version=10,
        constants={name: CONSTANTS[name] for name in "wg"},
    )  # fmt: skip
    work, regions = lower_regions(fusenorm.optimize(proto).model, refuse, ADDING)
    assert [node.op_type for node in work.graph] == ["Linear", "SkipRMSNorm"]
    assert [(site.op, site.reason) for site in regions] == [
        ("Linear", None),
        ("LinearResidual", "slower"),
    ]
    assert not AddResidual(refuse)(work).modified


def test_the_report_names_map_sum_and_folded_norm() -> None:
    body = H + "t = Add (h, r)\nn = RMSNormalization (t, g)\nk = MatMul (n, u)\ny = Add (k, e)"
    proto = model(
        body, f"{X}, float[b,s,32] e", "float[b,s,32] y", opset=23, ir_version=10,
        constants={name: CONSTANTS[name] for name in "wgu"},
    )  # fmt: skip
    for node, name in zip(proto.graph.node, ("map", "sum", "norm", "next", "last"), strict=True):
        node.name = name
    _, regions = lower_regions(fusenorm.optimize(proto).model, options=ADDING)
    found = [(site.op, site.attributes["kind"], site.attributes["rule"]) for site in regions]
    assert found == [
        ("Linear", "Linear_residual", "add_residual"),
        ("NormFold", "RMSNorm_noscale", "add_residual"),
        ("Linear", "Linear_residual", "add_residual"),
    ]
    assert regions[0].nodes == ("map", "sum", "norm")
    assert regions[2].nodes == ("next", "last")


EXPECTED = {
    "bert": {"Linear_bias_residual": 4},
    "llama": {"Linear_residual": 4},
    "gemma": {"Linear_residual": 4},
    "t5_v1_1_enc": {"Linear_residual": 4},
    "vit": {"Linear_bias_residual": 4},
    "deepnorm": {"Linear_bias_residual_alpha": 6},
}


@pytest.mark.skipif(not corpus.available(), reason="the corpus is not here")
@pytest.mark.parametrize("name", EXPECTED)
def test_real_exports(name: str) -> None:
    for path in corpus.files((name,)):
        result = fusenorm.optimize(path)
        work, _ = lower_regions(result.model, options=ADDING)
        kinds = collections.Counter(node.op_type for node in work.graph)
        found = {kind: count for kind, count in kinds.items() if "residual" in kind}
        assert found == EXPECTED[name], path.name
        _agree(path, result.model, work)


def _agree(path: Path, before: ir.Model, after: ir.Model) -> None:
    """The outputs with and without lowering, on the inputs kept beside an export."""
    with np.load(path.with_suffix(".npz")) as stored:
        wanted = {value.name for value in before.graph.inputs}
        feeds = {name: stored[name] for name in stored.files if name in wanted}
    pairs = zip(*(graphs.run(ir.to_proto(m), feeds) for m in (before, after)), strict=True)
    for a, b in pairs:
        np.testing.assert_allclose(b, a, rtol=0, atol=2e-5 * float(np.abs(a).max()))
