"""A C program: onnxruntime's C API, the library, a model; no Python in the process."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from fusenorm.lower import Target, build_library
from fusenorm.ops import DOMAIN, Norm

pytestmark = pytest.mark.kernel

SOURCE = Path(__file__).with_name("run_model.c")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    include = os.environ.get("ORT_INCLUDE_DIR")
    if not include or not (Path(include) / "onnxruntime_c_api.h").exists():
        pytest.skip("ORT_INCLUDE_DIR names no folder with onnxruntime_c_api.h (not in the wheel)")
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    capi = Path(ort.__file__).parent / "capi"
    (library,) = capi.glob("libonnxruntime.so.*")
    path = tmp_path_factory.mktemp("capi") / "run_model"
    link = [str(library), f"-Wl,-rpath,{capi}"]
    # The program links by the library's own name, which the wheel does not ship as a file.
    (path.parent / "libonnxruntime.so.1").symlink_to(library)
    link.append(f"-Wl,-rpath,{path.parent}")
    subprocess.run(
        [compiler, "-Wall", "-Werror", f"-I{include}", str(SOURCE), *link, "-o", str(path)],
        check=True,
    )
    return path


def test_a_c_program_runs_the_fused_model(program: Path, tmp_path: Path) -> None:
    spec = Norm(skip=True)
    build_library([spec], Target.host(), tmp_path / "ops.so")
    inputs = [slot.name for slot in spec.inputs]
    node = helper.make_node(spec.op_type, inputs, ["y", ""], domain=DOMAIN, epsilon=1e-5)
    graph = helper.make_graph(
        [node],
        "graph",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in inputs],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    proto = helper.make_model(
        graph,
        functions=[spec.function(18)],
        opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, 1)],
        ir_version=10,
    )
    onnx.save(proto, tmp_path / "model.onnx")
    random = np.random.default_rng(0)
    shapes = {"x": (5, 100), "skip": (5, 100), "scale": (100,)}
    values = {
        name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()
    }
    done = subprocess.run(
        [program, tmp_path / "ops.so", tmp_path / "model.onnx", "5", "100"],
        input=b"".join(array.tobytes() for array in values.values()),
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    y = np.frombuffer(done.stdout, np.float32).reshape(5, 100)
    expected, _ = spec.reference(values, {"epsilon": 1e-5})
    assert np.abs(y - expected).max() <= 2e-6
