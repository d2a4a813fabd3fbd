"""Fixtures shared by the tests of everything that reads a finished model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from fusenorm.artifact import Artifact
from fusenorm.compare import golden
from fusenorm.ops import DOMAIN, Norm

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def llama(root: Path) -> Path:
    return root / "models" / "llama_tiny.onnx"


def embed_norm_model(scale: float = 1.0) -> onnx.ModelProto:
    """ids -> Gather -> + bias[batch, seq, 8] -> fused RMSNorm, with the function's body."""
    norm = Norm()
    random = np.random.default_rng(0)
    table = (scale * random.standard_normal((11, 8))).astype(np.float32)
    nodes = [
        helper.make_node("Cast", ["ids"], ["wide"], to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "wide"], ["rows"]),
        helper.make_node("Add", ["rows", "offset"], ["sum"]),
        helper.make_node(norm.op_type, ["sum", "gamma"], ["y"], domain=DOMAIN, epsilon=1e-5),
    ]
    graph = helper.make_graph(
        nodes,
        "embed_norm",
        [
            helper.make_tensor_value_info("ids", TensorProto.INT32, ["batch", "seq"]),
            helper.make_tensor_value_info("offset", TensorProto.FLOAT, ["batch", "seq", 8]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "seq", 8])],
        [
            numpy_helper.from_array(table, "table"),
            numpy_helper.from_array(np.full(8, 0.5, np.float32), "gamma"),
        ],
    )
    return helper.make_model(
        graph,
        functions=[norm.function(18)],
        opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, 1)],
        ir_version=8,
    )


@pytest.fixture
def fused(tmp_path: Path) -> Path:
    """A fused model file: inputs ids int32[batch, seq] and offset float32[batch, seq, 8]."""
    path = tmp_path / "fused.onnx"
    onnx.save(embed_norm_model(), path)
    return path


@pytest.fixture
def artifact(fused: Path) -> Artifact:
    """The same model as an artifact without a library."""
    return Artifact("fused", ir.load(fused), {"sites": [], "counts": {}}, golden=golden(fused))


@pytest.fixture
def folder(artifact: Artifact, tmp_path: Path) -> Path:
    """The artifact, saved."""
    return artifact.save(tmp_path / "fused.fnorm")


@pytest.fixture
def feed() -> dict[str, np.ndarray]:
    """Inputs the model takes."""
    random = np.random.default_rng(1)
    return {
        "ids": random.integers(0, 11, (2, 3), np.int32),
        "offset": random.standard_normal((2, 3, 8)).astype(np.float32),
    }
