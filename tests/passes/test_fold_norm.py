"""Scale and bias of a norm in the weights behind it: which fold, which stay, and outputs equal."""

from __future__ import annotations

import collections
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import fusenorm
from fusenorm.ops import DOMAIN, DType, Linear, Norm
from fusenorm.ops.linear import unpack
from fusenorm.passes.fold_norm import OP, FoldNorm
from fusenorm.passes.fuse_linear import FuseLinearMaps
from fusenorm.passes.pattern import Refusal
from fusenorm.passes.rewrite import MISS_KEY, Rewrite
from fusenorm.pipeline import Options, lower_regions
from fusenorm.report import Site
from tests import corpus, graphs
from tests.graphs import model, rows, run

K, X, Y = 8, "float[b,s,8] x", "float[b,s,64] y"
CONSTANTS = {
    "w": rows(K, 64, seed=1),
    "v": rows(K, 64, seed=2),
    "u": rows(K, 32, seed=3),
    "odd": rows(K, 31, seed=4),
    "ob": rows(31, seed=6),
    "c": rows(64, seed=5),
    "g": np.linspace(0.5, 2, K, dtype=np.float32),
    "b": np.linspace(-1, 1, K, dtype=np.float32),
    "zero": np.zeros(K, np.float32),
    "ls": np.linspace(0.1, 0.3, K, dtype=np.float32),
    "two": np.float32(2),
    "rank2": np.array([-1, K]),
    "rank3": np.array([0, 0, 2, 4]),
    "flat": np.array([0, -1]),
    "ids": np.array([0]),
}
LN = "n = LayerNormalization (x, g, b)\n"
MAP = "y = MatMul (n, w)"


def lowered(
    body: str,
    inputs: str = X,
    outputs: str = Y,
    *,
    opset: int = 18,
    bound: float = 4e-6,
    options: Options = Options(concat_linear=False),  # noqa: B008
) -> tuple[ir.Model, list[Site]]:
    """The lowered model and what became of its norms; outputs must agree."""
    words = set(body.replace("(", " ").replace(")", " ").replace(",", " ").split())
    constants = {name: array for name, array in CONSTANTS.items() if name in words}
    proto = model(body, inputs, outputs, constants=constants, opset=opset)
    work, regions = graphs.lowered(proto, options, bound=bound)
    return work, [site for site in regions if site.op == OP]


def kinds(work: ir.Model) -> list[str]:
    return [node.op_type for node in work.graph if node.domain == DOMAIN]


FOLDED = {
    "standard": (LN + MAP, ["LayerNorm_noscale", "Linear_bias"]),
    "without bias": (
        "n = LayerNormalization (x, g)\n" + MAP,
        ["LayerNorm_noscale", "Linear"],
    ),
    "a bias of zeros": (
        "n = LayerNormalization (x, g, zero)\n" + MAP,
        ["LayerNorm_noscale", "Linear"],
    ),
    "a scale of zeros": (
        "n = LayerNormalization (x, zero, b)\n" + MAP,
        ["LayerNorm_noscale", "Linear_bias"],
    ),
    "a map with a bias": (
        LN + "h = MatMul (n, w)\ny = Add (h, c)",
        ["LayerNorm_noscale", "Linear_bias"],
    ),
    "an activation": (
        LN + "h = MatMul (n, w)\ny = Relu (h)",
        ["LayerNorm_noscale", "Linear_relu_bias"],
    ),
    "a gated unit": (
        LN + "p = MatMul (n, w)\nq = MatMul (n, v)\ns = Sigmoid (p)\na = Mul (p, s)\n"
        "y = Mul (a, q)",
        ["LayerNorm_noscale", "LinearGLU_swish_bias"],
    ),
    "a gated unit with biases": (
        LN + "ph = MatMul (n, w)\np = Add (ph, c)\nqh = MatMul (n, v)\nq = Add (c, qh)\n"
        "s = Sigmoid (p)\na = Mul (p, s)\ny = Mul (a, q)",
        ["LayerNorm_noscale", "LinearGLU_swish_bias"],
    ),
    "columns that fill no panel": (
        LN + "h = MatMul (n, odd)\nr = ReduceMax <keepdims: int = 0> (h)\nk = MatMul (n, w)\n"
        "y = Add (k, r)",
        ["LayerNorm_noscale", "Linear_bias_ragged", "Linear_bias"],
    ),
    "such columns of a map with a bias": (
        LN + "h = MatMul (n, odd)\np = Add (h, ob)\nr = ReduceMax <keepdims: int = 0> (p)\n"
        "k = MatMul (n, w)\ny = Add (k, r)",
        ["LayerNorm_noscale", "Linear_bias_ragged", "Linear_bias"],
    ),
    "two maps": (
        LN + "h = MatMul (n, w)\nk = MatMul (n, v)\ny = Add (h, k)",
        ["LayerNorm_noscale", "Linear_bias", "Linear_bias"],
    ),
    "alpha and a layer scale": (
        "a = Mul (x, two)\nl = Mul (f, ls)\nr = Add (a, l)\n"
        "n = LayerNormalization (r, g, b)\n" + MAP,
        ["SkipLayerNorm_noscale_alpha_layerscale", "Linear_bias"],
    ),
    "a layer scale that is the norm's scale too": (
        "l = Mul (f, ls)\nr = Add (x, l)\nn = LayerNormalization (r, ls, b)\n" + MAP,
        ["SkipLayerNorm_noscale_layerscale", "Linear_bias"],
    ),
    "its shape is read": (
        LN + "h = MatMul (n, w)\nz = Shape (n)\nd = Size (n)\nt = Mul (z, d)\n"
        "e = Cast <to: int = 1> (t)\nm = ReduceMax <keepdims: int = 0> (e)\ny = Add (h, m)",
        ["LayerNorm_noscale", "Linear_bias"],
    ),
    "through a Reshape": (
        LN + "m = Reshape (n, rank2)\nh = Gemm (m, w, c)\nz = Shape (n)\n"
        "lead = Slice (z, ids, end, ids)\nto = Concat <axis: int = 0> (lead, ends)\n"
        "y = Reshape (h, to)",
        ["LayerNorm_noscale", "Linear_bias"],
    ),
}  # fmt: skip
CONSTANTS |= {"end": np.array([2]), "ends": np.array([64])}


@pytest.mark.parametrize("case", FOLDED)
def test_folds(case: str) -> None:
    body, wanted = FOLDED[case]
    inputs = f"{X}, float[b,s,8] f" if "(f," in body else X
    work, (site,) = lowered(body, inputs)
    assert kinds(work) == wanted
    assert (site.status, site.attributes["rule"]) == ("fused", "fold_norm")
    assert site.attributes["kind"] == wanted[0]
    assert not set(work.graph.initializers) & {"g", "b", "w", "v", "zero"}


@pytest.mark.parametrize("leading", [("s",), ("b", "s"), ("b", "h", "s")])
def test_an_axis_counted_from_the_front(leading: tuple[str, ...]) -> None:
    """The proof's rows have as many axes as the model's."""
    norm = f"n = LayerNormalization <axis: int = {len(leading)}> (x, g, b)\n"
    lead = ",".join(leading)
    work, (site,) = lowered(norm + MAP, f"float[{lead},8] x", f"float[{lead},64] y")
    assert (site.status, site.reason) == ("fused", None)
    assert kinds(work) == ["LayerNorm_noscale", "Linear_bias"]


def test_the_residual_sum_stays_an_output() -> None:
    body = f"r = Add (x, f)\nn = LayerNormalization (r, g, b)\n{MAP}"
    work, (site,) = lowered(body, f"{X}, float[b,s,8] f", f"{Y}, float[b,s,8] r")
    assert kinds(work) == ["SkipLayerNorm_noscale", "Linear_bias"]
    assert [value.name for value in work.graph.outputs] == ["y", "r"]
    assert site.attributes["sum_used"]
    assert site.attributes["maps"] == ["y"]


def test_a_constant_operand_of_the_sum() -> None:
    """A position embedding of as many rows as there are: the proof has rows of its own."""
    body = f"r = Add (x, position)\nn = LayerNormalization (r, g, b)\n{MAP}"
    constants = {name: CONSTANTS[name] for name in "wgb"} | {"position": rows(1, 17, K)}
    proto = model(body, "float[b,17,8] x", "float[b,17,64] y", constants=constants)
    work, regions = lower_regions(fusenorm.optimize(proto).model)
    assert kinds(work) == ["SkipLayerNorm_noscale", "Linear_bias"]
    assert [site.reason for site in regions] == [None, None]


def test_the_standard_rms_norm() -> None:
    work, (site,) = lowered("n = RMSNormalization (x, g)\n" + MAP, opset=23)
    assert kinds(work) == ["RMSNorm_noscale", "Linear"]
    assert site.nodes


def test_a_norm_with_a_bias_only() -> None:
    body = "n = fusenorm.LayerNorm_noscale_bias <epsilon = 1e-5> (x, b)\n" + MAP
    work = _fold(body, {"b": CONSTANTS["b"], "w": CONSTANTS["w"]})
    assert kinds(work) == ["LayerNorm_noscale", "Linear_bias"]


def test_rows_of_unknown_rank() -> None:
    body = "x = other.Rows (q)\nn = fusenorm.LayerNorm_noscale_bias <epsilon = 1e-5> (x, b)\n" + MAP
    work = _fold(body, {"b": CONSTANTS["b"], "w": CONSTANTS["w"]}, "float[b,s,8] q")
    assert kinds(work) == ["LayerNorm_noscale", "Linear_bias"]


def test_the_numbers_are_rounded_once() -> None:
    work, _ = lowered(LN + "h = MatMul (n, w)\ny = Add (h, c)")
    _, weight, bias = next(n for n in work.graph if n.op_type == "Linear_bias").inputs
    wide = {name: CONSTANTS[name].astype(np.float64) for name in ("w", "g", "b", "c")}
    made = unpack(weight.const_value.numpy())  # type: ignore[union-attr]
    assert np.array_equal(made, (wide["g"][:, None] * wide["w"]).astype(np.float32))
    want = (wide["c"] + wide["b"] @ wide["w"]).astype(np.float32)
    np.testing.assert_allclose(bias.const_value.numpy(), want, rtol=1e-7)  # type: ignore[union-attr]


def test_the_columns_of_a_gated_unit_keep_to_their_map() -> None:
    work, _ = lowered(FOLDED["a gated unit"][0])
    _, _, gate, up = next(n for n in work.graph if n.op_type.startswith("LinearGLU")).inputs
    for value, name in ((gate, "w"), (up, "v")):
        want = CONSTANTS["b"].astype(np.float64) @ CONSTANTS[name]
        np.testing.assert_allclose(value.const_value.numpy(), want, rtol=1e-6)  # type: ignore[union-attr]


REFUSED = {
    "reader": [
        (LN + "h = MatMul (n, w)\nr = ReduceMax <keepdims: int = 0> (n)\ny = Add (h, r)", X, Y),
        (LN + "h = MatMul (n, w)\nk = MatMul (n, given)\nr = ReduceMax <keepdims: int = 0> (k)\n"
         "y = Add (h, r)", X + ", float[8,40] given", Y),
        (LN + "m = Reshape (n, rank3)\nh = MatMul (n, w)\nr = ReduceMax <keepdims: int = 0> (m)\n"
         "y = Add (h, r)", X, Y),
        (LN + "m = Reshape (n, rank2)\ny = Gemm <alpha: float = 2.0> (m, odd)", X, "float[t,31] y"),
        (LN + "m = Reshape (n, rank2)\ny = Gemm (m, w)", X, "float[t,64] y, float[t,8] m"),
        (LN + "h = MatMul (n, w)\ny = If (flag) <\n"
         "then_branch = g1 () => (float[b,s,64] t) { k = MatMul (n, v)\n t = Add (h, k) },\n"
         "else_branch = g2 () => (float[b,s,64] e) { e = Neg (h) }>", X + ", bool flag", Y),
    ],
    "output": [(LN + MAP, X, f"{Y}, float[b,s,8] n")],
    "not_constant": [
        ("n = LayerNormalization (x, scale, b)\n" + MAP, X + ", float[8] scale", Y),
        ("n = LayerNormalization (x, g, bias)\n" + MAP, X + ", float[8] bias", Y),
    ],
    "axis": [("n = LayerNormalization <axis: int = 1> (x, grid)\n" + MAP, "float[b,3,8] x",
              "float[b,3,64] y")],
    "scale_shape": [
        ("x = Compress <axis: int = 2> (q, eight)\nn = LayerNormalization (x, g, one)\n" + MAP,
         "float[b,s,8] q", Y),
    ],
}  # fmt: skip
CONSTANTS |= {"one": rows(1), "eight": np.ones(8, bool), "grid": rows(3, 8), "short": rows(4, 64)}


@pytest.mark.parametrize(
    ("reason", "case"), [(reason, case) for reason, cases in REFUSED.items() for case in cases]
)
def test_refuses(reason: str, case: tuple[str, str, str]) -> None:
    work, (site,) = lowered(*case)
    assert (site.status, site.reason) == ("refused", reason)
    assert not any("noscale" in kind for kind in kinds(work))
    assert site.detail
    assert site.nodes


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        (LN + "y = Relu (n)", "float[b,s,8] y"),
        ("h = Relu (x)\n" + MAP.replace("n,", "h,"), Y),
        (LN + "m = Reshape (n, rank3)\ny = MatMul (m, short)", "float[b,s,2,64] y"),
        (LN + "z = Shape (n)\ny = Cast <to: int = 1> (z)", "float[r] y"),
    ],
)
def test_what_is_no_candidate_is_not_mentioned(body: str, outputs: str) -> None:
    assert lowered(body, outputs=outputs)[1] == []


def test_a_norm_without_scale_and_bias_stays_unmentioned() -> None:
    body = "n = fusenorm.LayerNorm_noscale <epsilon = 1e-5> (x)\n" + MAP
    work = _fold(body, {"w": CONSTANTS["w"]}, modified=False)
    assert kinds(work) == ["LayerNorm_noscale", "Linear"]


@pytest.mark.parametrize(
    "end",
    [
        "y = other.MatMul (n, w)",
        "m = Reshape (n, to)\ny = MatMul (m, cut)",  # which may cut its rows
    ],
)
def test_what_reads_a_norm_of_unknown_width_is_no_candidate(end: str) -> None:
    body = "n = fusenorm.LayerNorm_noscale_bias <epsilon = 1e-5> (x, b)\n" + end
    constants = {"b": CONSTANTS["b"], "w": CONSTANTS["w"], "cut": rows(4, 40)}
    work = _fold(body, constants, "float[b,s,k] x, int64[2] to", modified=False)
    assert not any(MISS_KEY in node.meta for node in work.graph)


def test_an_absent_bias() -> None:
    work, _ = lowered(FOLDED["without bias"][0], options=Options(fold_norm=()))
    work.graph[0].resize_inputs(3)
    assert FoldNorm()(work).modified
    assert kinds(work) == ["LayerNorm_noscale", "Linear"]


def test_a_map_that_cannot_run() -> None:
    """Its bias is of another width."""
    body = "n = LayerNormalization (x, g)\ny = fusenorm.Linear_bias (n, panels, c)"
    constants = {"g": CONSTANTS["g"], "panels": rows(1, K, 32), "c": CONSTANTS["c"]}
    work = _fold(body, constants, modified=False)
    _, miss = work.graph[0].meta[MISS_KEY]
    assert miss.refusal.code == "check_failed"
    assert miss.refusal.detail.startswith("cannot be evaluated: ")


@pytest.mark.parametrize("op_type", ["Linear", "Shape"])
def test_an_op_of_another_domain_reads_the_norm(op_type: str) -> None:
    body = LN + MAP + f"\nz = other.{op_type} (n, v)"
    work = _fold(body, {name: CONSTANTS[name] for name in "gbwv"}, modified=False)
    assert "Linear" in kinds(work)


def test_an_op_of_ours_that_is_no_map_reads_the_norm() -> None:
    body = LN + MAP + "\nz = fusenorm.LayerNorm_noscale <epsilon = 1e-5> (n)"
    work = _fold(body, {name: CONSTANTS[name] for name in "gbw"}, modified=False)
    assert "Linear" in kinds(work)


def test_a_tied_weight_keeps_the_norm() -> None:
    """The head of a model whose embedding table is its weight too."""
    body = (
        "t = Transpose <perm: ints = [1, 0]> (w)\nx = Gather (w, ids)\n" + LN + "y = MatMul (n, t)"
    )
    proto = model(
        body, "int64[b,s] ids", "float[b,s,8320] y",
        constants={"w": rows(8320, 8), "g": CONSTANTS["g"], "b": CONSTANTS["b"]},
    )  # fmt: skip
    _, regions = lower_regions(fusenorm.optimize(proto).model)
    assert [(site.op, site.reason) for site in regions] == [
        (OP, "reader"), ("Linear", "weight_shared")]  # fmt: skip


@pytest.mark.parametrize("bias", [True, False])
def test_no_bias_goes_into_a_map_that_does_not_pay_with_it(bias: bool) -> None:
    def pays(rewrite: Rewrite) -> Refusal | None:
        return Refusal("slower", "n", "why") if rewrite.spec.op_type == "Linear_bias" else None

    body = (LN if bias else "n = LayerNormalization (x, g)\n") + MAP
    proto = model(
        body, X, Y, constants={name: CONSTANTS[name] for name in ("gbw" if bias else "gw")}
    )
    work, regions = lower_regions(fusenorm.optimize(proto).model, pays=pays)
    assert kinds(work)[-1] == "Linear"
    found = [site.reason for site in regions if site.op == OP]
    assert found == (["slower"] if bias else [None])


def test_numbers_out_of_range_are_rolled_back() -> None:
    constants = {"w": rows(K, 64), "g": np.full(K, 1e30, np.float32)}
    constants["w"][0, 0] = 1e30
    proto = model("n = LayerNormalization (x, g)\n" + MAP, X, Y, constants=constants)
    work, regions = lower_regions(fusenorm.optimize(proto).model)
    (site,) = (site for site in regions if site.op == OP)
    assert site.reason == "check_failed"
    assert kinds(work) == ["Linear"]


@pytest.mark.parametrize(
    ("types", "reason"), [(("f32",), "types"), (("f32", "f16"), None), ((), "types")]
)
def test_16_bit_weights_on_request(types: tuple[DType, ...], reason: str | None) -> None:
    constants = {name: CONSTANTS[name].astype(np.float16) for name in "gbw"}
    proto = model(LN + MAP, X.replace("float", "float16"), Y.replace("float", "float16"),
                  constants=constants)  # fmt: skip
    options = Options(fold_norm=types)
    work, regions = lower_regions(fusenorm.optimize(proto).model, options=options)
    (site,) = (site for site in regions if site.op == OP)
    assert site.reason == reason
    if reason is None:
        assert kinds(work) == ["LayerNorm_f16_noscale", "Linear_bias_f16"]
        (linear,) = (node for node in work.graph if node.op_type.startswith("Linear"))
        assert {value.dtype for value in linear.inputs[1:]} == {ir.DataType.FLOAT16}  # type: ignore[union-attr]


def test_a_16_bit_norm_that_rounds_before_its_scale() -> None:
    body = "n = fusenorm.RMSNorm_f16_castfirst <epsilon = 1e-5> (x, g)\n" + MAP
    constants = {name: CONSTANTS[name].astype(np.float16) for name in "gw"}
    work = _fold(body, constants, X.replace("float", "float16"), types=("f16",))
    assert kinds(work) == ["RMSNorm_f16_noscale", "Linear_f16"]


def test_the_option_leaves_every_norm_alone() -> None:
    work, (site,) = lowered(LN + MAP, options=Options(fold_norm=()))
    assert site.reason == "types"
    assert kinds(work) == ["Linear"]


def test_the_report_names_norm_and_maps() -> None:
    _, (site,) = lowered(FOLDED["two maps"][0])
    assert site.attributes["maps"] == ["h", "k"]
    assert site.output == "n"


def test_a_model_that_is_not_touched_says_so() -> None:
    work, _ = lowered(LN + MAP, options=Options(fold_norm=()))
    assert FoldNorm()(work).modified
    assert not FoldNorm()(work).modified


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("Linear_residual", LN + "h = MatMul (n, w)\ny = Add (h, r)"),
        ("Linear_2maps", LN + "h = MatMul (n, w)\nk = MatMul (n, v)\ny = Max (h, k)"),
    ],
)
def test_maps_later_passes_made_are_not_folded_into(kind: str, body: str) -> None:
    """As in a model that is compiled again."""
    inputs = f"{X}, float[b,s,64] r" if "r)" in body else X
    work, _ = lowered(body, inputs, options=Options(fold_norm=(), add_residual=True))
    assert kinds(work) == [kind]
    assert not FoldNorm()(work).modified


def _fold(
    body: str,
    constants: dict[str, np.ndarray],
    inputs: str = X,
    *,
    types: tuple[DType, ...] = ("f32",),
    modified: bool = True,
) -> ir.Model:
    """Pack and fold a graph with ops of our own in it."""
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 18, "fusenorm" : 1, "other" : 1]>\n'
        f"graph ({inputs}) => (float[] y) {{\n{body}\n}}"
    )
    for name, array in constants.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    work = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    for node in work.graph:
        if node.domain == DOMAIN and Norm.parse(node.op_type):
            x = work.graph.inputs[0]
            node.outputs[0].shape, node.outputs[0].type = x.shape, x.type
    FuseLinearMaps()(work)
    assert FoldNorm(types)(work).modified == modified
    return work


def _held(name: str, shape: tuple[int, ...]) -> ir.Value:
    return ir.val(name, const_value=ir.tensor(rows(*shape, seed=len(name)), name=name))


NORMS = [
    Norm(centred=True, bias="f32"),
    Norm(),
    Norm(scale=None, bias="f32"),
    Norm(centred=True, skip=True, bias="f32", alpha=True, beta=True, layer_scale=True),
]
ENDS = [
    spec
    for spec in Linear.variants()
    if spec.dtype == "f32" and spec.maps == 1 and not spec.residual and spec.norm == "none"
]


@pytest.mark.parametrize("norm", NORMS, ids=lambda spec: spec.op_type)
def test_every_norm_before_every_map(norm: Norm) -> None:
    """Whatever the map ends in, the proof of the fold is found and holds."""
    for end in ENDS:
        given = {
            slot.name: ir.val(slot.name, dtype=ir.DataType.FLOAT, shape=ir.Shape(["b", "s", K]))
            for slot in norm.inputs
            if slot.layout == "row"
        }
        shapes = {"vector": (64 - 9 * end.ragged,), "panels": (4 if end.gated else 2, K, 32)}
        vectors = [
            _held(f"norm_{slot.name}", (K,)) for slot in norm.inputs if slot.layout == "vector"
        ]
        held = [_held(slot.name, shapes[slot.layout]) for slot in end.inputs[1:]]
        attributes = dict.fromkeys((*norm.attributes, *end.attributes), 1.5)
        first = ir.node(
            norm.op_type, [*given.values(), *vectors], domain=DOMAIN, name="norm",
            attributes={name: attributes[name] for name in norm.attributes},
            outputs=[ir.val(slot.name) for slot in norm.outputs],
        )  # fmt: skip
        last = ir.node(
            end.op_type,
            [first.outputs[0], *held],
            domain=DOMAIN, name="map", outputs=[ir.val("z")],
            attributes={name: attributes[name] for name in end.attributes},
        )  # fmt: skip
        graph = ir.Graph(
            list(given.values()), last.outputs, nodes=[first, last],
            initializers=[*vectors, *held], opset_imports={"": 18, DOMAIN: 1},
        )  # fmt: skip
        work = ir.Model(graph, ir_version=8)
        assert FoldNorm()(work).modified, (norm.op_type, end.op_type)
        found = Norm.parse(graph[0].op_type)
        assert found is not None
        assert (found.scale, found.bias) == (None, None)


EXPECTED = {
    "bert": 0, "gpt2": 5, "llama": 5, "qwen2": 5, "gemma": 5, "t5_v1_1_enc": 4, "vit": 4,
}  # fmt: skip


@pytest.mark.skipif(not corpus.available(), reason="the corpus is not here")
@pytest.mark.parametrize("name", EXPECTED)
def test_real_exports(name: str) -> None:
    for path in corpus.files((name,)):
        result = fusenorm.optimize(path)
        work, regions = lower_regions(result.model)
        status = collections.Counter(site.status for site in regions if site.op == OP)
        assert status["fused"] == EXPECTED[name], path.name
        reasons = {s.reason for s in regions if s.op == OP and s.status == "refused"}
        assert reasons <= {"reader"}
        with np.load(path.with_suffix(".npz")) as stored:
            feeds = {value.name: stored[value.name] for value in result.model.graph.inputs}
        before, after = (ir.to_proto(each) for each in (result.model, work))
        for a, b in zip(run(before, feeds), run(after, feeds), strict=True):
            np.testing.assert_allclose(b, a, rtol=0, atol=2e-5 * float(np.abs(a).max()))


@pytest.mark.kernel
def test_the_compiled_block_agrees(tmp_path: Path) -> None:
    """A norm folded into three maps side by side, as kernels run it."""
    norm = "r = Add (x, f)\nn = LayerNormalization (r, g, b)\n"
    body = f"{norm}{MAP}\nk = MatMul (n, v)\nl = MatMul (n, u)"
    proto = model(
        body, f"{X}, float[b,s,8] f", f"{Y}, float[b,s,64] k, float[b,s,32] l, float[b,s,8] r",
        constants={name: CONSTANTS[name] for name in "gbwvu"},
    )  # fmt: skip
    artifact = fusenorm.compile(fusenorm.optimize(proto), tune=False)
    assert artifact.libraries[0].op_types == ("Linear_3maps_bias", "SkipLayerNorm_noscale")
    feeds = {name: rows(2, 19, 8, seed=len(name)) for name in ("x", "f")}
    made = fusenorm.load(artifact.save(tmp_path / "a.fnorm")).run(None, feeds)
    for a, b in zip(run(proto, feeds), made, strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=4e-6 * float(np.abs(a).max()))


def test_a_model_of_fused_ops_alone() -> None:
    """It need not import the standard's operators."""
    body = "r = Add (x, f)\nn = LayerNormalization (r, g)\n" + MAP
    work, _ = lowered(body, f"{X}, float[b,s,8] f", options=Options(fold_norm=()))
    proto = ir.to_proto(work)
    kept = [entry for entry in proto.opset_import if entry.domain]
    del proto.opset_import[:]
    proto.opset_import.extend(kept)
    again, _ = lower_regions(fusenorm.optimize(proto).model)
    assert kinds(again) == ["SkipLayerNorm_noscale", "Linear"]
    feeds = {info.name: rows(2, 3, K) for info in proto.graph.input}
    for a, b in zip(run(proto, feeds), run(ir.to_proto(again), feeds), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5)
