"""Artifacts to serve, compiled once, and requests with their answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

import fusenorm

if TYPE_CHECKING:
    from tests.serving.servers import Case

LENGTHS = (1, 3, 8, 17)


def _compiled(model: Path, folder: Path) -> Path:
    return fusenorm.compile(fusenorm.optimize(model), tune=False).save(folder)


@pytest.fixture(scope="session")
def llama_fnorm(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _compiled(llama, tmp_path_factory.mktemp("compiled") / "llama.fnorm")


@pytest.fixture(scope="session")
def doubled_fnorm(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with every logit doubled, exactly."""
    model = onnx.load(llama)
    (output,) = model.graph.output
    for node in model.graph.node:
        node.output[:] = ["once" if name == output.name else name for name in node.output]
    model.graph.initializer.append(numpy_helper.from_array(np.float32(2), "two"))
    model.graph.node.append(helper.make_node("Mul", ["once", "two"], [output.name]))
    folder = tmp_path_factory.mktemp("doubled")
    onnx.save(model, folder / "doubled.onnx")
    return _compiled(folder / "doubled.onnx", folder / "doubled.fnorm")


@pytest.fixture(scope="session")
def cases(llama: Path, llama_fnorm: Path) -> list[Case]:
    """Batches of 1 to 4 rows, lengths between 1 and 17."""
    from tests.serving.servers import Case

    session = ort.InferenceSession(llama, providers=["CPUExecutionProvider"])
    random = np.random.default_rng(0)
    (difference,) = fusenorm.verify(llama, llama_fnorm).outputs
    found = []
    for rows in (1, 2, 3, 4):
        for length in LENGTHS:
            tokens = random.integers(0, 256, (rows, length))
            (logits,) = session.run(None, {"tokens": tokens})
            found.append(Case(tokens, logits, difference.tolerance))
    return found
