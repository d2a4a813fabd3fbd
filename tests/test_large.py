"""Models far larger than memory: the weights are never read whole, nor written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fusenorm import cli
from fusenorm.model_io import load_model
from tests.bench.cost import DATA, Decoder, measure

WIDE = Decoder(layers=4, hidden=4096, inner=11008, heads=32, vocabulary=32000)
PEAK = 400 << 20


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """4.2 GB of weights, all zero, that take no room on disk."""
    path = WIDE.save_sparse(tmp_path)
    assert (tmp_path / DATA).stat().st_size > 4e9
    return path


@pytest.mark.parametrize("output", ["fused.onnx", "elsewhere/fused.onnx"])
def test_weights_are_not_read_whole(large: Path, output: str) -> None:
    target = large.parent / output
    target.parent.mkdir(exist_ok=True)
    cost = measure(large, target)
    assert cost.fused == 3 * WIDE.layers + 1
    assert cost.peak < PEAK
    assert sum(file.stat().st_blocks * 512 for file in large.parent.rglob("*")) < 2 << 20
    weights = load_model(target).graph.initializers
    assert {name: tuple(weights[name].shape) for name in WIDE.weights} == WIDE.weights


def test_both_models_are_run_only_if_asked_to(large: Path) -> None:
    output = large.parent / "fused.onnx"
    arguments = ["optimize", str(large), "--emit", "onnx", "-o", str(output), "--json"]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["comparison"] is None
    assert "weights of 4.3 GB" in report["not_compared"]
    assert output.is_file()
