"""The inference probe, and which models may be batched."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from fusenorm.artifact import Artifact
from fusenorm.compare import golden
from fusenorm.errors import BadInput
from fusenorm.serving.endpoint import Endpoint
from fusenorm.serving.model import Served
from tests.conftest import embed_norm_model
from tests.graphs import model


def saved(source: onnx.ModelProto, folder: Path, *, recorded: bool = True) -> Path:
    onnx.save(source, folder / "m.onnx")
    run = golden(folder / "m.onnx") if recorded else None
    artifact = Artifact("m", ir.load(folder / "m.onnx"), {}, golden=run)
    return artifact.save(folder / "m.fnorm")


def test_a_good_artifact(folder: Path) -> None:
    served = Served(folder)
    assert served.probe() is None
    assert [served.batch_size(wanted) for wanted in (None, 0, 8)] == [32, 0, 8]


def test_a_model_that_answers_otherwise(artifact: Artifact, tmp_path: Path) -> None:
    assert artifact.golden is not None
    wrong = {name: array + 1 for name, array in artifact.golden.outputs.items()}
    recorded = dataclasses.replace(artifact.golden, outputs=wrong)
    folder = dataclasses.replace(artifact, golden=recorded).save(tmp_path / "wrong.fnorm")
    assert "output 'y' is not as recorded" in str(Served(folder).probe())
    with pytest.raises(BadInput, match="does not answer as recorded"):
        Endpoint(folder)


@pytest.mark.parametrize(
    "body",
    [
        "y = CumSum(x, axis)",  # rows build on one another
        "y = Softmax<axis = 0>(x)",
        "y = Identity(x)",
    ],
)
def test_rows_that_depend_on_one_another(tmp_path: Path, body: str) -> None:
    """The signature looks the same: only a run tells."""
    constants = {"axis": np.array(0)} if "axis)" in body else {}
    source = model(body, "float[n, 8] x", "float[n, 8] y", constants=constants)
    served = Served(saved(source, tmp_path))
    if body == "y = Identity(x)":
        assert served.batch_size(None) == 32
        return
    assert served.batch_size(None) == 0
    with pytest.raises(BadInput, match="not independent"):
        served.batch_size(8)


def test_without_a_recording_nothing_is_batched(tmp_path: Path) -> None:
    served = Served(saved(embed_norm_model(), tmp_path, recorded=False))
    assert served.probe() is None
    assert served.batch_size(None) == 0
