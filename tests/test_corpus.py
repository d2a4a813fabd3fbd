"""Real exports: every site found, every output kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

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
