"""Models onnxruntime optimised already are read, and mean what its kernels compute."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import pytest

import fusenorm
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


def test_f16_skip_norm_sums_in_f32() -> None:
    body = f"y, m, v, s = {MS}.SkipSimplifiedLayerNormalization<epsilon = 0.01>(x, r, g)"
    proto = _model(body, "float16[n,s,16] y, float16[n,s,16] s", "float16")
    after = ir.to_proto(fusenorm.optimize(proto).model)
    feeds = {"x": rows(4, 9, 16, dtype=np.float16), "r": rows(4, 9, 16, seed=1, dtype=np.float16)}
    for a, b in zip(run(proto, feeds), run(after, feeds), strict=True):
        np.testing.assert_allclose(b, a, rtol=2.0**-10, atol=2.0**-12)


def test_statistics_somebody_reads_keep_the_node() -> None:
    body = f"y, m = {MS}.SkipLayerNormalization(x, r, g, b)"
    proto = _model(body, "float[n,s,16] y, float[n,s,1] m")
    after = ir.to_proto(fusenorm.optimize(proto).model)
    assert [node.op_type for node in after.graph.node] == ["SkipLayerNormalization"]


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
