"""Real exports: every site found, every output kept."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

import fusenorm
from fusenorm.model_io import save_model
from fusenorm.ops import Attention
from fusenorm.pipeline import fused_specs, lower_regions
from tests import corpus

# Models with rotary positions, but for those whose scores are capped.
TURNED = (
    "falcon", "gemma", "glm", "gpt_neox", "granite", "llama", "mistral", "mixtral", "modernbert",
    "olmo", "olmo2", "phi", "phi3", "qwen2", "qwen3", "stablelm", "starcoder2",
)  # fmt: skip
# Of them, those whose heads of k the TorchScript exporter repeats by shapes it computes.
REPEATED = set(TURNED) - {"falcon", "gpt_neox", "modernbert", "phi"}

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(not corpus.available(), reason="the corpus folder is not beside this tree"),
]


@pytest.mark.parametrize("path", list(corpus.files()), ids=lambda path: path.name)
def test_every_site_of_a_real_export_is_found(path: Path) -> None:
    report = fusenorm.optimize(path).report
    assert corpus.found(report) == corpus.truth(path)


@pytest.mark.parametrize("path", list(corpus.files(half=True)), ids=lambda path: path.name)
def test_every_site_of_an_f16_export_is_found(path: Path) -> None:
    """T5 clamps its sums in f16: the norm behind reads the clamped sum, which is told."""
    report = fusenorm.optimize(path).report
    found, truth = corpus.found(report), corpus.truth(path)
    refused = [site.reason for site in report.sites if site.status == "refused"]
    if path.name.startswith("t5"):
        assert refused == ["clipped"] * truth.skip
        truth = dataclasses.replace(truth, skip=0, plain=truth.skip)
    assert found == truth


@pytest.mark.parametrize("path", list(corpus.files(half=True)), ids=lambda path: path.name)
def test_an_f16_export_stays_as_near_to_float64(path: Path) -> None:
    """At most 1.5 of the distance of the graph rounded at every node, and an ulp."""
    source = onnx.load(path)
    fused = ir.to_proto(fusenorm.optimize(path).model)
    recorded = np.load(path.with_suffix(".npz"))
    feeds = {value.name: recorded[value.name] for value in source.graph.input}
    wide = {n: a.astype(np.float64) if a.dtype.kind == "f" else a for n, a in feeds.items()}
    with np.errstate(divide="ignore", invalid="ignore"):  # T5's logarithm of distance 0
        exact, graph, ours = (
            [array.astype(np.float64) for array in evaluator(proto).run(None, given)]
            for proto, given in ((widened(source), wide), (source, feeds), (fused, feeds))
        )
    for y, before, after in zip(exact, graph, ours, strict=True):
        ulp = np.spacing(np.float16(np.abs(y).max()))
        assert np.abs(after - y).max() <= 1.5 * np.abs(before - y).max() + ulp


class GatherElements(OpRun):
    """onnx's own takes no more than 64 rows."""

    op_domain = ""

    def _run(self, data: np.ndarray, indices: np.ndarray, axis: int = 0) -> tuple[np.ndarray]:
        return (np.take_along_axis(data, indices, axis),)


def evaluator(proto: onnx.ModelProto) -> ReferenceEvaluator:
    return ReferenceEvaluator(proto, new_ops=[GatherElements])


def widened(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph in float64."""
    wide = onnx.ModelProto()
    wide.CopyFrom(proto)
    floats = (onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT)
    tensors = [*wide.graph.initializer]
    for node in wide.graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                tensors.append(attribute.t)
            if (node.op_type, attribute.name) == ("Cast", "to") and attribute.i in floats:
                attribute.i = onnx.TensorProto.DOUBLE
            assert not attribute.HasField("g")
    for tensor in tensors:
        if tensor.data_type in floats:
            array = onnx.numpy_helper.to_array(tensor).astype(np.float64)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    return wide


@pytest.mark.kernel
@pytest.mark.parametrize("path", list(corpus.files(corpus.COMPLETE)), ids=lambda path: path.name)
def test_the_artifact_computes_what_onnxruntime_does(path: Path, tmp_path: Path) -> None:
    folder = fusenorm.compile(path).save(tmp_path / "model.fnorm")
    recorded = {
        name: value for name, value in np.load(path.with_suffix(".npz")).items() if name != "ref"
    }
    at_recorded = fusenorm.verify(path, folder, recorded)
    assert at_recorded.ok, str(at_recorded)
    elsewhere = fusenorm.verify(path, folder)
    assert elsewhere.ok, str(elsewhere)
    assert len(elsewhere.runs) == 2


@pytest.mark.parametrize("path", list(corpus.files(TURNED)), ids=lambda path: path.name)
def test_attention_takes_rotary_positions(path: Path, tmp_path: Path) -> None:
    model, sites = lower_regions(fusenorm.optimize(path).model)
    specs = [spec for spec in fused_specs(model) if isinstance(spec, Attention)]
    architecture, exporter, *_ = path.name.split(".")
    turned = "q" if exporter == "ts" and architecture in REPEATED else "qk"
    assert {spec.rotary for spec in specs} == {turned}
    assert not [site for site in sites if site.op == "Rotary"]
    save_model(model, tmp_path / "model.onnx")
    compared = fusenorm.verify(path, tmp_path / "model.onnx")
    assert compared.ok, str(compared)
