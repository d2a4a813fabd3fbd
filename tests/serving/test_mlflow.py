"""MLflow loads what `fusenorm deploy mlflow` writes; the last test needs MLflow itself."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import fusenorm
from fusenorm import cli
from fusenorm.errors import BadInput
from fusenorm.serving import mlflow as module
from fusenorm.serving.mlflow import _load_pyfunc, _spec, deploy
from fusenorm.signature import Tensor


@pytest.fixture
def model(folder: Path, tmp_path: Path) -> Path:
    return deploy(folder, tmp_path / "mlflow")


def test_what_is_written(model: Path, folder: Path) -> None:
    files = {path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file()}
    inner = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == {"MLmodel", *(f"fused.fnorm/{name}" for name in inner)}
    lines = (model / "MLmodel").read_text().splitlines()
    assert lines[:5] == [
        "flavors:",
        "  python_function:",
        "    loader_module: fusenorm.serving.mlflow",
        '    data: "fused.fnorm"',
        "signature:",
    ]
    inputs, outputs = (json.loads(json.loads(line.partition(": ")[2])) for line in lines[5:])
    assert [entry["name"] for entry in inputs] == ["ids", "offset"]
    assert inputs[1]["tensor-spec"] == {"dtype": "float32", "shape": [-1, -1, 8]}
    assert outputs == [{**inputs[1], "name": "y"}]


def test_the_same_bytes_again_in_its_place(model: Path, folder: Path, tmp_path: Path) -> None:
    before = (model / "MLmodel").read_bytes()
    deploy(folder, model)
    assert (model / "MLmodel").read_bytes() == before
    with pytest.raises(BadInput, match="exists and is not an MLflow model"):
        deploy(folder, folder)
    Path(f"{folder}.sig").write_text("signature")
    assert (deploy(folder, tmp_path / "signed") / "fused.fnorm.sig").read_text() == "signature"


def test_the_loader(model: Path, folder: Path, feed) -> None:
    loaded = _load_pyfunc(str(model / "fused.fnorm"), {"threads": 1})
    (wanted,) = fusenorm.load(folder).run(None, feed)
    np.testing.assert_array_equal(loaded.predict(feed)["y"], wanted)
    with pytest.raises(BadInput, match="input 'ids' is missing"):
        loaded.predict({"offset": feed["offset"]})
    with pytest.raises(BadInput, match="give a dict of arrays by name: ids, offset"):
        loaded.predict(feed["ids"])


def test_an_array_alone_for_one_input(llama: Path, tmp_path: Path) -> None:
    loaded = module.Model(fusenorm.load(llama))
    assert loaded.predict(np.zeros((1, 4), np.int64))["logits"].shape == (1, 4, 256)


@pytest.mark.parametrize(
    "change", [{"dtype": "bfloat16"}, {"dtype": ""}, {"dtype": "string"}, {"shape": None}]
)
def test_types_mlflow_does_not_have(change) -> None:
    with pytest.raises(BadInput, match=r"'x' is .*: MLflow takes arrays of numpy's own types"):
        _spec(dataclasses.replace(Tensor("x", "float32", ("n",)), **change))


def test_the_command(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "mlflow"
    result = CliRunner().invoke(cli.app, ["deploy", "mlflow", str(folder), "-o", str(out)])
    assert result.stdout == f"saved {out}\n"
    (folder / "model.onnx").unlink()
    result = CliRunner().invoke(cli.app, ["deploy", "mlflow", str(folder), "-o", str(out)])
    assert result.exit_code == 2
    assert "model.onnx: is missing" in result.stderr


@pytest.mark.serving
@pytest.mark.filterwarnings("ignore:.*Any type hint:UserWarning")  # importing MLflow makes it
def test_mlflow_itself(model: Path, folder: Path, feed) -> None:
    mlflow = pytest.importorskip("mlflow", reason="make test-serving installs it")
    loaded = mlflow.pyfunc.load_model(str(model), model_config={"threads": 1})
    (wanted,) = fusenorm.load(folder).run(None, feed)
    np.testing.assert_array_equal(loaded.predict(feed)["y"], wanted)
    assert [spec.name for spec in loaded.metadata.get_input_schema()] == ["ids", "offset"]
    for wrong in (feed["ids"].astype(np.float32), np.zeros((2, 3, 1), np.int32)):
        with pytest.raises(mlflow.exceptions.MlflowException):
            loaded.predict({**feed, "ids": wrong})
