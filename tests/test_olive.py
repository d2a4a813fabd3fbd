"""fusenorm as a pass of an Olive workflow; `make test-olive` runs this where Olive is installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import fusenorm

pytest.importorskip("olive", reason="make test-olive installs Olive and runs this")
pytestmark = pytest.mark.filterwarnings("default")  # what Olive's imports warn of is its own

FUSED = {"RMSNorm": 1, "SkipRMSNorm": 8, "GLU": 4}
TOKENS = {"tokens": np.arange(16).reshape(2, 8)}


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLIVE_DISABLE_TELEMETRY", "1")


def _run(model: Path, folder: Path, *passes: dict[str, Any]) -> dict[str, Any]:
    """Run a workflow of FusenormPass and what follows it; the saved model's config."""
    import olive

    from fusenorm.olive import package_config

    config = {
        "input_model": {"type": "ONNXModel", "model_path": str(model)},
        "passes": {f"step{index}": step for index, step in enumerate(passes)},
        "cache_dir": str(folder / "cache"),
        "output_dir": str(folder / "out"),
    }
    olive.run(config, package_config=package_config())
    return json.loads((folder / "out" / "model_config.json").read_text())["config"]


def _logits(model: Path) -> np.ndarray:
    return ort.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, TOKENS)[0]


def _agrees(a: np.ndarray, b: np.ndarray) -> None:
    np.testing.assert_allclose(b, a, rtol=0, atol=1e-5 * np.abs(a).max())


def test_a_portable_model(llama: Path, tmp_path: Path) -> None:
    config = _run(llama, tmp_path, {"type": "FusenormPass"})
    assert config["model_attributes"] == {"fusenorm": FUSED}
    file = Path(config["model_path"], config["onnx_file_name"])
    assert {node.domain for node in onnx.load(file).graph.node} == {"", "fusenorm"}
    _agrees(_logits(llama), _logits(file))


def test_weights_outside_the_file(llama: Path, tmp_path: Path) -> None:
    source = tmp_path / "outside.onnx"
    onnx.save(onnx.load(llama), source, save_as_external_data=True, size_threshold=100)
    config = _run(source, tmp_path, {"type": "FusenormPass"})
    _agrees(_logits(llama), _logits(Path(config["model_path"], config["onnx_file_name"])))


@pytest.mark.kernel
def test_an_artifact_goes_along(llama: Path, tmp_path: Path) -> None:
    """Through a pass of Olive's own, to the output folder."""
    steps = (
        {"type": "FusenormPass", "target": "cpu"},
        {"type": "AddOliveMetadata", "graph_name": "g"},
    )
    config = _run(llama, tmp_path, *steps)
    (folder,) = config["model_attributes"]["additional_files"]
    assert folder == str(tmp_path / "out" / "model.fnorm")
    (logits,) = fusenorm.load(folder).run(None, TOKENS)
    _agrees(_logits(llama), logits)


def test_rules_of_one_s_own(tmp_path: Path) -> None:
    from tests.graphs import model
    from tests.passes.test_plugins import BODY, CONSTANTS

    source = tmp_path / "tanh.onnx"
    onnx.save(model(BODY, constants=CONSTANTS), source)
    step = {"type": "FusenormPass", "check_rewrites": False}
    assert _run(source, tmp_path / "without", step)["model_attributes"] == {"fusenorm": {}}
    step["rules"] = ["tests.passes.test_plugins:TanhSwish"]
    assert _run(source, tmp_path / "with", step)["model_attributes"] == {"fusenorm": {"Swish": 1}}


def test_the_command_line(llama: Path, tmp_path: Path) -> None:
    """The two commands of the README."""
    packages, config, out = (tmp_path / name for name in ("olive.json", "run.json", "out"))
    packages.write_text(_say("-m", "fusenorm.olive"))
    steps = {"fuse": {"type": "FusenormPass"}}
    source = {"type": "ONNXModel", "model_path": str(llama)}
    paths = {"output_dir": str(out), "cache_dir": str(tmp_path / "cache")}
    config.write_text(json.dumps({"input_model": source, "passes": steps, **paths}))
    _say("-m", "olive", "run", "--config", str(config), "--package-config", str(packages))
    assert json.loads((out / "model_config.json").read_text())["config"]["model_attributes"] == {
        "fusenorm": FUSED
    }


def _say(*arguments: str) -> str:
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
