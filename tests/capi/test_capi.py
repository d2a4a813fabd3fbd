"""A C program: onnxruntime's C API, the library, a model; no Python in the process."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path, PurePosixPath

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

import fusenorm
from fusenorm.lower import Target, build_library
from fusenorm.ops import DOMAIN, Norm
from fusenorm.serving import triton

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


SPEC = Norm(skip=True)
SHAPES = {"x": (5, 100), "skip": (5, 100), "scale": (100,)}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """y = SkipRMSNorm(x, skip, scale) over rows of any number."""
    node = helper.make_node(SPEC.op_type, list(SHAPES), ["y", "sum"], domain=DOMAIN, epsilon=1e-5)
    rows = ["rows", "columns"]
    shapes = {"x": rows, "skip": rows, "scale": ["columns"]}
    graph = helper.make_graph(
        [node],
        "graph",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shapes[name]) for name in shapes],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, rows)],
    )
    proto = helper.make_model(
        graph,
        functions=[SPEC.function(18)],
        opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, 1)],
        ir_version=10,
    )
    onnx.save(proto, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def check(program: Path, library: Path, model: Path) -> None:
    """Run the program on random inputs and compare with numpy."""
    random = np.random.default_rng(0)
    values = {
        name: random.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()
    }
    done = subprocess.run(
        [program, library, model, "5", "100"],
        input=b"".join(array.tobytes() for array in values.values()),
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    y = np.frombuffer(done.stdout, np.float32).reshape(5, 100)
    expected, _ = SPEC.reference(values, {"epsilon": 1e-5})
    assert np.abs(y - expected).max() <= 2e-6


def test_a_c_program_runs_the_fused_model(program: Path, model: Path, tmp_path: Path) -> None:
    build_library([SPEC], Target.host(), tmp_path / "ops.so")
    check(program, tmp_path / "ops.so", model)


def test_what_triton_s_onnxruntime_backend_would_load(
    program: Path, model: Path, tmp_path: Path
) -> None:
    """That backend is not to be had; it registers the config's library and loads model.onnx."""
    artifact = fusenorm.compile(model, dims={"rows": 5, "columns": 100})
    folder = artifact.save(tmp_path / "a.fnorm")
    repo = tmp_path / "models"
    triton.deploy_onnxruntime(folder, repo, PurePosixPath(repo), name="m", version=2)
    config = (repo / "m" / "config.pbtxt").read_text()
    (library,) = re.findall(r'op_library_filename: "(.*)"', config)
    check(program, Path(library), repo / "m" / "2" / "model.onnx")
