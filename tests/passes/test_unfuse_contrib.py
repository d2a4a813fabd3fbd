"""Models onnxruntime optimised already are read, and mean what its kernels compute."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx.reference import ReferenceEvaluator

import fusenorm
from fusenorm.ops.activation import ACTIVATIONS
from fusenorm.passes.unfuse_contrib import UnfuseContrib
from fusenorm.report import Report
from tests.graphs import fused_ops, rows, run

VECTORS = {
    name: np.linspace(low, high, 16, dtype=np.float32)
    for name, low, high in (("g", 0.5, 1.5), ("b", -1, 1), ("c", 0.3, -0.6), ("w", -1, 2))
}


def _model(body: str, outputs: str, dtype: str = "float") -> onnx.ModelProto:
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>\n'
        f"graph ({dtype}[n,s,16] x, {dtype}[n,s,16] r) => ({outputs}) {{\n{body}\n}}"
    )
    kind = np.float16 if dtype == "float16" else np.float32
    for name, array in VECTORS.items():
        if name in body.replace("(", " ").replace(")", " ").replace(",", " ").split():
            proto.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(kind), name))
    return proto


MS = "com.microsoft"
SUM = f"y, m, v, s = {MS}."
CASES = [
    ("y = SimplifiedLayerNormalization<axis = -1, epsilon = 0.01>(x, g)", "RMSNorm"),
    ("y = SimplifiedLayerNormalization(x, g)", "RMSNorm"),
    (f"y = {MS}.SkipLayerNormalization<epsilon = 0.01>(x, r, g, b)", "SkipLayerNorm"),
    (f"{SUM}SkipLayerNormalization<epsilon = 0.01>(x, r, g, b, c)", "SkipLayerNorm"),
    (f"{SUM}SkipLayerNormalization(x, r, g)", "SkipLayerNorm"),
    (f"{SUM}SkipSimplifiedLayerNormalization<epsilon = 0.01>(x, r, g)", "SkipRMSNorm"),
    (f"{SUM}SkipSimplifiedLayerNormalization(x, r, g, c)", "SkipRMSNorm"),
    (f"y = {MS}.Gelu(x)", "Gelu"),
    (f"y = {MS}.BiasGelu(x, b)", "Gelu"),
    (f"y = {MS}.FastGelu(x)", "Gelu"),
    (f"y = {MS}.FastGelu(x, b)", "Gelu"),
    (f"y = {MS}.QuickGelu(x)", "Swish"),
    (f"y = {MS}.QuickGelu<alpha = 1.0>(x)", "Swish"),
]


@pytest.mark.parametrize(("body", "op"), CASES)
def test_contrib_op(body: str, op: str) -> None:
    names = ["y", "s"] if body.startswith("y, m") else ["y"]
    proto = _model(body, ", ".join(f"float[n,s,16] {name}" for name in names))
    result = fusenorm.optimize(proto)
    assert fused_ops(result.report) == [op]
    after = ir.to_proto(result.model)
    assert "com.microsoft" not in {node.domain for node in after.graph.node}
    feeds = {"x": rows(2, 3, 16), "r": rows(2, 3, 16, seed=1)}
    feeds = {info.name: feeds[info.name] for info in proto.graph.input}
    for a, b in zip(run(proto, feeds), run(after, feeds), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-5 * np.abs(a).max())


@pytest.mark.parametrize("opset", [12, 16])
def test_a_layer_norm_before_the_standard_had_it(opset: int) -> None:
    """onnxruntime's optimizer writes it into models of any opset, and its session runs them."""
    proto = _model(
        "t = Add (x, r)\n n = LayerNormalization<axis = -1, epsilon = 0.01>(t, g, b)\n"
        "y = LayerNormalization<axis = -1>(n, g, b)",
        "float[n,s,16] y",
    )
    proto.opset_import[0].version = opset
    result = fusenorm.optimize(proto)
    found = [(site.op, site.status) for site in result.report.sites]
    assert found == [("SkipLayerNorm", "fused"), ("LayerNorm", "native")]
    feeds = {"x": rows(2, 3, 16), "r": rows(2, 3, 16, seed=1)}
    (wanted,), (got,) = run(proto, feeds), run(ir.to_proto(result.model), feeds)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_every_node_is_what_it_is_itself() -> None:
    """Nodes of equal inputs differ: in what they are, their attributes, the outputs they give."""
    proto = _model(
        f"p = {MS}.Gelu(x)\n q = {MS}.QuickGelu(r)\n t = {MS}.QuickGelu<alpha = 3.0>(x)\n"
        "n = Add (p, q)\n"
        f"u, m, v, s = {MS}.SkipLayerNormalization<epsilon = 0.01>(n, t, g, b)\n"
        f"y = {MS}.SkipLayerNormalization<epsilon = 1.0>(u, s, g, b)",
        "float[n,s,16] y",
    )
    result = fusenorm.optimize(proto)
    assert fused_ops(result.report) == ["Gelu", *["SkipLayerNorm"] * 2, *["Swish"] * 2]
    feeds = {"x": rows(2, 3, 16), "r": rows(2, 3, 16, seed=1)}
    (wanted,), (got,) = run(proto, feeds), run(ir.to_proto(result.model), feeds)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_a_gated_gelu_of_biased_halves() -> None:
    """No kernel on a CPU computes it: the second half, through GELU, gates the first."""
    proto = _model(f"y = {MS}.BiasSplitGelu(x, b)", "float[n,s,8] y")
    result = fusenorm.optimize(proto)
    assert fused_ops(result.report) == ["GLU"]
    x = rows(2, 3, 16)
    up, gate = np.split(x + VECTORS["b"], 2, axis=-1)
    (y,) = run(ir.to_proto(result.model), {"x": x, "r": x})
    np.testing.assert_allclose(y, up * ACTIVATIONS["gelu"].numpy(gate), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("norm", "vectors"),
    [
        ("SkipSimplifiedLayerNormalization", "g"),
        ("SkipSimplifiedLayerNormalization", "g, c"),
        ("SkipLayerNormalization", "g"),
        ("SkipLayerNormalization", "g, b"),
        ("SkipLayerNormalization", "g, b, c"),
        ("SkipLayerNormalization", 'g, "", c'),
    ],
)
@pytest.mark.parametrize("mean", [0, 1000])
def test_f16_skip_norm_sums_in_f32(norm: str, vectors: str, mean: int) -> None:
    """What a sum of large rows loses in f16 is all that is left when its mean is subtracted.

    onnxruntime itself leaves out the rounding between two nodes it runs in f32.
    """
    body = f"y, m, v, s = {MS}.{norm}<epsilon = 0.01>(x, r, {vectors})"
    proto = _model(body, "float16[n,s,16] y, float16[n,s,16] s", "float16")
    unfused = ReferenceEvaluator(ir.to_proto(UnfuseContrib()(ir.from_proto(proto)).model))
    after = ir.to_proto(fusenorm.optimize(proto).model)
    feeds = {"x": rows(4, 9, 16, dtype=np.float16), "r": rows(4, 9, 16, seed=1, dtype=np.float16)}
    feeds["x"] += np.float16(mean)
    for got in (run(after, feeds), unfused.run(None, feeds)):
        for a, b in zip(run(proto, feeds), got, strict=True):
            np.testing.assert_allclose(b, a, rtol=2.0**-10, atol=2.0**-12)


@pytest.mark.parametrize(
    ("body", "ops"),
    [
        ("y = SimplifiedLayerNormalization(x, g)", ["RMSNorm_f16_f32scale"]),
        (f"y = {MS}.BiasGelu(x, b)", ["Add", "Gelu_f16_stepwise"]),
    ],
)
def test_f16_stays_where_no_sum_has_three_terms(body: str, ops: list[str]) -> None:
    proto = _model(body, "float16[n,s,16] y", "float16")
    assert [node.op_type for node in fusenorm.optimize(proto).model.graph] == ops


@pytest.mark.parametrize(("reader", "output"), [("", "m"), ("n = Neg(m)", "n")])
def test_statistics_somebody_reads_keep_the_node(reader: str, output: str) -> None:
    body = f"y, m = {MS}.SkipLayerNormalization(x, r, g, b)\n{reader}"
    proto = _model(body, f"float[n,s,16] y, float[n,s,1] {output}")
    result = fusenorm.optimize(proto)
    after = ir.to_proto(result.model)
    assert after.graph.node[0].op_type == "SkipLayerNormalization"
    assert _left(result.report) == [("SkipLayerNorm", "refused", "stats_used")]


def _left(report: Report) -> list[tuple[str, str, str | None]]:
    return [(site.op, site.status, site.reason) for site in report.sites]


@pytest.mark.parametrize(
    ("body", "dtype", "reason"),
    [
        ("y = SimplifiedLayerNormalization<axis = 1>(x, g)", "float", ("RMSNorm", "axis")),
        (f"y = {MS}.SkipLayerNormalization(x, r, g)", "bfloat16", ("SkipLayerNorm", "types")),
        (
            f"y = {MS}.SkipSimplifiedLayerNormalization(x, r, g)",
            "bfloat16",
            ("SkipRMSNorm", "types"),
        ),
        (f"y = {MS}.Gelu(x)", "bfloat16", ("Gelu", "types")),
        (f"y = {MS}.BiasGelu(x, b)", "bfloat16", ("Gelu", "types")),
        (f"y = {MS}.FastGelu(x)", "bfloat16", ("Gelu", "types")),
        (f"y = {MS}.BiasSplitGelu(x, b)", "bfloat16", ("GLU", "types")),
        (f"h = {MS}.Unknown(x)\ny = {MS}.QuickGelu(h)", "float", ("Swish", "type_unknown")),
    ],
)
def test_what_stays_says_why(body: str, dtype: str, reason: tuple[str, str]) -> None:
    op, code = reason
    report = fusenorm.optimize(_model(body, f"{dtype}[n,s,16] y", dtype)).report
    assert _left(report) == [(op, "refused", code)]


def test_a_scale_of_another_type_keeps_the_node() -> None:
    """The result then has the scale's type."""
    proto = _model("y = SimplifiedLayerNormalization(x, g)", "float16[n,s,16] y")
    narrow = VECTORS["g"].astype(np.float16)
    proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(narrow, "g"))
    report = fusenorm.optimize(proto).report
    assert _left(report) == [("RMSNorm", "refused", "types")]


@pytest.mark.parametrize(("opset", "op"), [(11, "QuickGelu"), (12, "Swish")])
def test_an_opset_older_than_the_bodies(opset: int, op: str) -> None:
    proto = _model(f"y = {MS}.QuickGelu(x)", "float[n,s,16] y")
    proto.opset_import[0].version = opset
    result = fusenorm.optimize(proto)
    left = [("Swish", "refused", "opset")] if opset < 12 else [("Swish", "fused", None)]
    assert _left(result.report) == left
    assert [node.op_type.split("_")[0] for node in result.model.graph] == [op]


@pytest.mark.parametrize(
    ("body", "ops"),
    [
        ("y = {ms}.SkipSimplifiedLayerNormalization(h, r, g)", ["SkipRMSNorm"]),
        ("y = {ms}.SkipSimplifiedLayerNormalization(r, h, g)", ["SkipRMSNorm"]),
        (
            "t = {ms}.BiasGelu(h, b)\ns = Add(r, h)\nn = LayerNormalization(s, g)\ny = Sub(n, t)",
            ["Gelu", "SkipLayerNorm"],
        ),
    ],
)
def test_a_row_nothing_is_known_of_is_as_wide_as_the_vectors(body: str, ops: list[str]) -> None:
    proto = _model(f"h = {MS}.Unknown(x)\n{body.replace('{ms}', MS)}", "float[n,s,16] y")
    assert fused_ops(fusenorm.optimize(proto).report) == ops


def test_inner_values_have_names_of_their_own() -> None:
    """The body of the If has a value named as one of those a norm is written out with."""
    body = """
      h = SimplifiedLayerNormalization(x, g)
      one = Constant<value_int = 1>()
      yes = Cast<to = 9>(one)
      y = If(yes) <
        then_branch = then () => (float[n,s,16] a) { square = Neg(h) a = Abs(square) },
        else_branch = otherwise () => (float[n,s,16] d) { d = Identity(h) }
      >
    """
    work = ir.from_proto(_model(body, "float[n,s,16] y"))
    assert UnfuseContrib()(work).modified
    names = [value.name for graph in work.graphs() for node in graph for value in node.outputs]
    assert len(names) == len(set(names))
    assert not UnfuseContrib()(work).modified


EMBED = {
    "ids": np.array([[1, 4, 2], [0, 5, 5]], np.int32),
    "kinds": np.array([[0, 0, 1], [1, 0, 1]], np.int32),
    "mask": np.array([[1, 1, 0], [1, 1, 1]], np.int32),
    "at": np.array([[2, 0, 1], [3, 3, 0]], np.int32),
    "row": np.array([[2, 0, 1]], np.int32),
}


def _embedding(inputs: str, outputs: str = "y, i, s") -> onnx.ModelProto:
    """One EmbedLayerNormalization with these inputs behind its ids, None for an absent one."""
    names = ["ids", *inputs.replace("None", "").split(" ")]
    node = onnx.helper.make_node(
        "EmbedLayerNormalization", names, outputs.split(", "), domain=MS, epsilon=0.01
    )
    sizes = {"words": (6, 16), "places": (4, 16), "segments": (2, 16), "g": (16,), "b": (16,)}
    graph = onnx.helper.make_graph(
        [node],
        "embed",
        [
            onnx.helper.make_tensor_value_info(
                name, onnx.TensorProto.INT32, [1 if name == "row" else "n", "s"]
            )
            for name in EMBED
            if name in names
        ],
        [
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", "s", 16])
            for name in ("y", "s")
            if name in outputs.split(", ")
        ],
        [
            onnx.numpy_helper.from_array(rows(*size, seed=seed), name)
            for seed, (name, size) in enumerate(sizes.items())
            if name in names
        ],
    )
    imports = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid(MS, 1)]
    return onnx.helper.make_model(graph, opset_imports=imports, ir_version=8)


@pytest.mark.parametrize(
    "inputs",
    [
        "kinds words places segments g b",
        "kinds words places segments g b mask",
        "kinds words places segments g b None at",
        "kinds words places segments g b mask row",
        "None words places None g b",
        "None words places segments g b",
    ],
)
@pytest.mark.parametrize("outputs", ["y, i, s", "y, i"])
def test_embedding(inputs: str, outputs: str) -> None:
    proto = _embedding(inputs, outputs)
    result = fusenorm.optimize(proto)
    assert fused_ops(result.report) == ["SkipLayerNorm"]
    after = ir.to_proto(result.model)
    onnx.checker.check_model(after)
    assert {node.domain for node in after.graph.node} == {"", "fusenorm"}
    feeds = {info.name: EMBED[info.name] for info in proto.graph.input}
    y, *total = run(proto, feeds)
    got, *got_total = run(after, feeds)
    np.testing.assert_allclose(got, y, rtol=0, atol=4e-6 * np.abs(y).max())
    for a, b in zip(total, got_total, strict=True):  # the kernel's order of additions
        np.testing.assert_array_equal(b, a)


def test_a_mask_index_somebody_reads_keeps_the_embedding() -> None:
    proto = _embedding("kinds words places segments g b mask")
    info = onnx.helper.make_tensor_value_info("i", onnx.TensorProto.INT32, ["n"])
    proto.graph.output.append(info)
    result = fusenorm.optimize(proto)
    assert _left(result.report) == [("SkipLayerNorm", "refused", "stats_used")]
    assert [node.op_type for node in result.model.graph] == ["EmbedLayerNormalization"]


def test_an_embedding_in_f16_stays() -> None:
    """Its kernel sums in f32 on a CPU and in f16 on a GPU."""
    proto = _embedding("kinds words places segments g b")
    for tensor in proto.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor).astype(np.float16)
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    for value in proto.graph.output:
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    report = fusenorm.optimize(proto).report
    assert _left(report) == [("SkipLayerNorm", "refused", "types")]


# What onnxruntime's optimiser leaves in a file besides norms and activations.
OTHERS = {
    "BiasAdd": "h = {ms}.BiasAdd(x, b, r)",
    "BiasDropout": "h, k = {ms}.BiasDropout(x, b)",
    "FusedGemm": 'f = Reshape(x, flat)\nh2 = {ms}.FusedGemm<activation = "Relu">(f, w2, b)\n'
    "h = Reshape(h2, back)",
    "FusedMatMul": "h = {ms}.FusedMatMul<alpha = 0.5, transB = 1>(x, w2)",
    "GroupNorm": "h = {ms}.GroupNorm<groups = 1, activation = 0>(x, g, b)",
    "MatMulBnb4": "h = {ms}.MatMulBnb4<K = 16, N = 16, block_size = 16, quant_type = 1>(x, q, a)",
    "MatMulNBits": "h = {ms}.MatMulNBits<K = 16, N = 16, bits = 4, block_size = 16>(x, p, a)",
    "SkipGroupNorm": "h = {ms}.SkipGroupNorm<groups = 1, activation = 0>(x, g, b, r)",
}
WEIGHTS = {
    "w2": rows(16, 16),
    "flat": np.array([-1, 16]),
    "back": np.array([2, 3, 16]),
    "q": np.arange(128, dtype=np.uint8),
    "p": np.arange(128, dtype=np.uint8).reshape(16, 1, 8),
    "a": np.linspace(0.1, 1, 16, dtype=np.float32),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_operators_are_left_alone(name: str) -> None:
    body = OTHERS[name].replace("{ms}", MS) + f"\ny = {MS}.SkipLayerNormalization(h, r, g, b)"
    proto = _model(body, "float[2,3,16] y")
    for weight, array in WEIGHTS.items():
        if weight in body.replace("(", " ").replace(")", " ").replace(",", " ").split():
            proto.graph.initializer.append(onnx.numpy_helper.from_array(array, weight))
    result = fusenorm.optimize(proto)
    after = ir.to_proto(result.model)
    assert name in [node.op_type for node in after.graph.node]
    assert fused_ops(result.report) == ["SkipLayerNorm"]  # though ONNX cannot infer h's type
    if name not in ("BiasAdd", "BiasDropout", "GroupNorm", "SkipGroupNorm"):  # no CPU kernels
        feeds = {"x": rows(2, 3, 16), "r": rows(2, 3, 16, seed=1)}
        (a,), (b,) = run(proto, feeds), run(after, feeds)
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-5 * np.abs(a).max())


def test_a_row_of_unknown_type_in_a_residual_sum() -> None:
    """The file says of what type the sum is; ONNX cannot infer it."""
    body = f"h = {MS}.FusedMatMul(x, w2)\nt = Reshape(h, back)\ns = Add(t, r)"
    proto = _model(f"{body}\ny = LayerNormalization(s, g)", "float[2,3,16] y")
    for name in ("w2", "back"):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(WEIGHTS[name], name))
    info = onnx.helper.make_tensor_value_info("s", onnx.TensorProto.FLOAT, [2, 3, 16])
    proto.graph.value_info.append(info)
    result = fusenorm.optimize(proto)
    assert fused_ops(result.report) == ["SkipLayerNorm"]
    feeds = {"x": rows(2, 3, 16), "r": rows(2, 3, 16, seed=1)}
    (a,), (b,) = run(proto, feeds), run(ir.to_proto(result.model), feeds)
    np.testing.assert_allclose(b, a, rtol=0, atol=1e-5 * np.abs(a).max())


@pytest.mark.model
@pytest.mark.parametrize("level", ["ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED"])
def test_a_model_saved_by_onnxruntime(llama: Path, tmp_path: Path, level: str) -> None:
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    options.optimized_model_filepath = str(tmp_path / "saved.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(str(llama), options, providers=["CPUExecutionProvider"])
    result = fusenorm.optimize(tmp_path / "saved.onnx")
    assert result.report.counts == fusenorm.optimize(llama).report.counts
    result.save(tmp_path / "fused.onnx")
    comparison = fusenorm.verify(llama, tmp_path / "fused.onnx")
    assert comparison.ok, str(comparison)
