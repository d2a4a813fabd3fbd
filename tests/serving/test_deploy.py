"""The files `fusenorm deploy` writes, whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path, PurePosixPath

import pytest
from typer.testing import CliRunner, Result

from fusenorm.artifact import Artifact, Library, open_artifact
from fusenorm.cli import app
from fusenorm.errors import BadInput
from fusenorm.serving import folders, model_settings, triton
from fusenorm.serving.triton import Config
from fusenorm.signature import Tensor

CONFIG = """\
name: "m"
backend: "fusenorm"
max_batch_size: 32
input {
  name: "ids"
  data_type: TYPE_INT32
  dims: [ -1 ]
  allow_ragged_batch: true
}
input {
  name: "offset"
  data_type: TYPE_FP32
  dims: [ -1, 8 ]
  allow_ragged_batch: true
}
output {
  name: "y"
  data_type: TYPE_FP32
  dims: [ -1, 8 ]
}
dynamic_batching { }
instance_group { count: 1 kind: KIND_CPU }
"""

FOR_ONNXRUNTIME = """\
# Needs onnxruntime 1.17 or newer (its C API 17) that reads opset 18.
name: "m"
backend: "onnxruntime"
max_batch_size: 0
input {
  name: "ids"
  data_type: TYPE_INT32
  dims: [ -1, -1 ]
}
input {
  name: "offset"
  data_type: TYPE_FP32
  dims: [ -1, -1, 8 ]
}
output {
  name: "y"
  data_type: TYPE_FP32
  dims: [ -1, -1, 8 ]
}
instance_group { count: 1 kind: KIND_CPU }
model_operations { op_library_filename: "/srv/models/m/3/lib/x86-64-v2/PLACE" }
"""

SETTINGS = {
    "name": "m",
    "implementation": "fusenorm.serving.mlserver.Runtime",
    "platform": "fusenorm",
    "versions": ["2"],
    "inputs": [
        {"name": "ids", "datatype": "INT32", "shape": [-1, -1]},
        {"name": "offset", "datatype": "FP32", "shape": [-1, -1, 8]},
    ],
    "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, -1, 8]}],
    "parameters": {"uri": "./2", "extra": {"max_batch_size": 32}},
}

SERVE = """\
applications:
- name: "m"
  route_prefix: "/m"
  import_path: fusenorm.serving.ray:application
  args:
    path: "PLACE"
    name: "m"
    replicas: 2
    max_batch_size: null
    match_nodes: true
"""


def deploy(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["deploy", *map(str, arguments)])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_triton_model(folder: Path, tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    done = deploy("triton", folder, "--repo", repo, "--name", "m", "--version", 3)
    assert done.output == f"saved {repo / 'm'}\n"
    assert (repo / "m" / "config.pbtxt").read_text() == CONFIG
    assert names(repo / "m") == ["3", "config.pbtxt"]
    assert open_artifact(repo / "m" / "3").manifest == open_artifact(folder).manifest


def test_its_name_is_the_artifact_s(folder: Path, tmp_path: Path) -> None:
    assert deploy("triton", folder, "--repo", tmp_path / "r").exit_code == 0
    assert names(tmp_path / "r") == ["fused"]


def test_batches_as_told(folder: Path, tmp_path: Path) -> None:
    for size in (0, 5):
        triton.deploy(folder, tmp_path / "r", name="m", max_batch_size=size)
        text = (tmp_path / "r" / "m" / "config.pbtxt").read_text()
        assert f"max_batch_size: {size}\n" in text
        assert ("dynamic_batching" in text) == (size > 0)


def test_for_triton_s_onnxruntime(artifact: Artifact, tmp_path: Path) -> None:
    """The library's path is the one on the server."""
    library = Library("x86-64-v2", "x86_64", (), None, (), tmp_path, content=b"\x7fELF")
    source = dataclasses.replace(artifact.source, opset=18)
    both = dataclasses.replace(artifact, libraries=[library], source=source)
    folder = both.save(tmp_path / "a.fnorm")
    stored = open_artifact(folder)
    config = triton.onnxruntime_config(stored, "m", 3, PurePosixPath("/srv/models"), "x86-64-v2", 0)
    place = stored.libraries[0].path.name
    assert config == FOR_ONNXRUNTIME.replace("PLACE", place)


def test_a_scalar_and_a_fixed_size() -> None:
    scalar, fixed = Tensor("s", "float32", ()), Tensor("f", "bool", (4,))
    text = str(Config("m", "fusenorm", (scalar, fixed), (fixed,), 0))
    assert 'name: "s"\n  data_type: TYPE_FP32\n  dims: [ 1 ]\n  reshape { shape: [ ] }' in text
    assert 'name: "f"\n  data_type: TYPE_BOOL\n  dims: [ 4 ]\n}' in text


def test_an_mlserver_model(folder: Path, tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    done = deploy("mlserver", folder, "--repo", repo, "--name", "m", "--version", 2)
    assert done.output == f"saved {repo / 'm'}\n"
    assert json.loads((repo / "m" / "model-settings.json").read_text()) == SETTINGS
    assert json.loads((repo / "settings.json").read_text()) == {"parallel_workers": 0}
    assert open_artifact(repo / "m" / "2").manifest == open_artifact(folder).manifest


def test_the_server_s_own_settings_stay(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text("{}")
    model_settings.deploy(folder, tmp_path)
    assert (tmp_path / "settings.json").read_text() == "{}"


def test_a_ray_application(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    options = ("--name", "m", "--replicas", 2, "--match-nodes")
    assert deploy("ray", folder, "-o", file, *options).output == f"saved {file}\n"
    assert file.read_text() == SERVE.replace("PLACE", str(folder))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("triton", "A", "--repo", "R", "--name", "../m"), "'../m' is no name for a model"),
        (("triton", "A", "--repo", "R", "--name", ".m"), "'.m' is no name for a model"),
        (("triton", "A", "--repo", "R", "--ort"), "--ort needs --server-path"),
        (("triton", "A", "--repo", "R", "--server-path", "/m"), "--server-path and --variant are"),
        (("triton", "A", "--repo", "R", "--ort", "--server-path", "m"), "absolute path"),
        (("triton", "R", "--repo", "R"), "no such artifact folder"),
        (("mlserver", "A", "--repo", "R", "--name", "a/b"), "'a/b' is no name for a model"),
        (("ray", "A", "-o", "R.txt"), "Ray reads .yaml files"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(
    folder: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    places = {"A": str(folder), "R": str(tmp_path / "repo"), "R.txt": str(tmp_path / "repo.txt")}
    before = names(tmp_path)
    done = deploy(*(places.get(argument, argument) for argument in arguments))
    assert done.exit_code == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert names(tmp_path) == before


def test_a_damaged_artifact_replaces_nothing(folder: Path, tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    triton.deploy(folder, repo, name="m")
    (folder / "model.onnx").write_bytes(b"")
    with pytest.raises(BadInput, match=r"model\.onnx: has 0 bytes"):
        triton.deploy(folder, repo, name="m")
    open_artifact(repo / "m" / "1")
    assert names(repo / "m") == ["1", "config.pbtxt"]


def test_a_copy_that_went_wrong_is_not_put_in_place(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = tmp_path / "repo"
    triton.deploy(folder, repo, name="m")

    def half(source: Path, stage: Path, **_: object) -> None:
        (stage / "manifest.json").write_bytes((source / "manifest.json").read_bytes())

    monkeypatch.setattr(folders.shutil, "copytree", half)
    with pytest.raises(BadInput, match="missing"):
        triton.deploy(folder, repo, name="m")
    open_artifact(repo / "m" / "1")
    assert names(repo / "m") == ["1", "config.pbtxt"]


def test_a_full_disk_is_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise shutil.Error([("a", "b", "No space left on device"), ("c", "d", "and so on")])

    monkeypatch.setattr(folders.shutil, "copytree", full)
    with pytest.raises(BadInput, match=r"m/1: cannot be written: No space left on device$"):
        triton.deploy(folder, tmp_path / "repo", name="m")


def test_what_is_not_ours_stays(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "repo" / "m" / "1"
    other.mkdir(parents=True)
    (other / "model.py").write_text("theirs")
    with pytest.raises(BadInput, match="exists and is not a fusenorm artifact"):
        triton.deploy(folder, tmp_path / "repo", name="m")
    assert (other / "model.py").read_text() == "theirs"


def test_the_backend_stands_alone(folder: Path, tmp_path: Path) -> None:
    """It answers where only numpy and onnxruntime can be imported, and no fusenorm but its own."""
    backend = triton.write_backend(tmp_path / "backends")
    assert triton.write_backend(tmp_path / "backends") == backend
    assert names(tmp_path / "backends") == ["fusenorm"]
    script = f"""
import sys
known = sys.stdlib_module_names | {{"numpy", "onnxruntime", "fusenorm"}}
class Only:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in known:
            raise ModuleNotFoundError(name)
sys.path[:] = [{str(backend)!r}] + [p for p in sys.path if p and {str(Path.cwd())!r} != p]
sys.meta_path.insert(0, Only())
from fusenorm.serving.model import Served
print(Served({str(folder)!r}).probe(), sys.modules["fusenorm"].__file__)
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["None", str(backend / "fusenorm" / "__init__.py")]
