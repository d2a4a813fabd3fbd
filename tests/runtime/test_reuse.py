"""Artifacts replaced, reloaded and shared inside one process."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

import fusenorm
from fusenorm.artifact import Artifact, open_artifact, write
from fusenorm.errors import BadInput
from tests.conftest import embed_norm_model
from tests.graphs import model, rows
from tests.runtime.test_artifact import edit

X = {"x": rows(2, 3, 8)}


def _compiled(body: str, **constants: np.ndarray) -> Artifact:
    return fusenorm.compile(fusenorm.optimize(model(body, constants=constants)))


SILU = "g = Sigmoid(x)\ny = Mul(x, g)"
GELU = "d = Div(x, r)\ne = Erf(d)\na = Add(e, one)\nh = Mul(x, half)\ny = Mul(h, a)"
NUMBERS = {"r": np.float32(np.sqrt(2)), "one": np.float32(1), "half": np.float32(0.5)}


@pytest.mark.kernel
def test_another_artifact_at_the_same_path_brings_its_own_library(tmp_path: Path) -> None:
    first = fusenorm.load(_compiled(SILU).save(tmp_path / "a.fnorm"))
    (silu,) = first.run(None, X)
    second = fusenorm.load(_compiled(GELU, **NUMBERS).save(tmp_path / "a.fnorm"))
    assert first.library.path.name != second.library.path.name
    with open("/proc/self/maps") as maps:
        loaded = set(re.findall(r"fusenorm_ops-\w+\.so", maps.read()))
    assert {first.library.path.name, second.library.path.name} <= loaded
    np.testing.assert_array_equal(first.run(None, X)[0], silu)
    assert not np.allclose(second.run(None, X)[0], silu)


@pytest.mark.kernel
def test_session_options_hold_one_library(tmp_path: Path) -> None:
    silu = _compiled(SILU).save(tmp_path / "silu.fnorm")
    gelu = _compiled(GELU, **NUMBERS).save(tmp_path / "gelu.fnorm")
    options = ort.SessionOptions()
    for _ in range(2):
        fusenorm.load(silu, session_options=options).run(None, X)
    with pytest.raises(BadInput, match="hold the library of another artifact"):
        fusenorm.load(gelu, session_options=options)


def test_an_initializer_the_caller_may_override(tmp_path: Path) -> None:
    proto = model("y = Mul(x, g)", "float[b,s,8] x, float[8] g", constants={"g": rows(8)})
    path = tmp_path / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    session = fusenorm.load(path)
    twos = np.full(8, 2, np.float32)
    np.testing.assert_array_equal(session.run(None, {**X, "g": twos})[0], X["x"] * 2)


def test_weights_are_never_those_of_another_artifact(
    tmp_path: Path, feed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder replaced when onnxruntime has the model and comes to map the weights."""
    monkeypatch.setattr(write, "EXTERNAL_DATA_BYTES", 10)
    target = tmp_path / "replaced.fnorm"
    protos = [embed_norm_model(scale) for scale in (1.0, -3.0)]
    gamma = onnx.numpy_helper.from_array(np.full(8, 2, np.float32), "gamma")
    protos[1].graph.initializer[1].CopyFrom(gamma)  # small: in the model itself
    old, new = (Artifact("embed", ir.from_proto(proto), {}) for proto in protos)
    (wanted,) = fusenorm.load(new.save(tmp_path / "new.fnorm")).run(None, feed)
    create = ort.InferenceSession.__init__
    waiting = []

    def replaced(self, *arguments, **options) -> None:
        while waiting:
            waiting.pop().save(target)
        create(self, *arguments, **options)

    monkeypatch.setattr(ort.InferenceSession, "__init__", replaced)
    old.save(target)
    waiting.append(new)
    np.testing.assert_array_equal(fusenorm.load(target).run(None, feed)[0], wanted)
    stored = open_artifact(target)
    waiting.append(old)
    with pytest.raises(BadInput, match="was replaced while it was loaded: open it again"):
        fusenorm.load(stored)


def test_savers_and_readers_at_once(artifact: Artifact, tmp_path: Path) -> None:
    target = tmp_path / "shared.fnorm"
    failures: list[Exception] = []
    done = threading.Event()

    def save() -> None:
        try:
            for _ in range(5):
                artifact.save(target)
        except BadInput as error:
            failures.append(error)

    def read() -> None:
        while not done.is_set():
            if target.exists():
                try:
                    open_artifact(target)
                except BadInput as error:
                    failures.append(error)

    savers = [threading.Thread(target=save) for _ in range(4)]
    reader = threading.Thread(target=read)
    for thread in (*savers, reader):
        thread.start()
    for thread in savers:
        thread.join()
    done.set()
    reader.join()
    assert failures == []
    assert [path.name for path in tmp_path.iterdir() if "shared" in path.name] == ["shared.fnorm"]


def test_a_failed_replacement_keeps_the_old_artifact(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = artifact.save(tmp_path / "kept.fnorm")
    monkeypatch.setattr("fusenorm.artifact.place._exchange", lambda one, other: False)
    rename, calls = Path.rename, []

    def failing(self: Path, to: Path) -> Path:
        calls.append(to)
        if self.name.startswith(".kept") and Path(to) == target and len(calls) == 3:
            raise OSError(28, "No space left on device")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(BadInput, match="No space left"):
        artifact.save(target)
    monkeypatch.undo()
    open_artifact(target)
    assert [path.name for path in tmp_path.iterdir() if "kept" in path.name] == ["kept.fnorm"]


@pytest.mark.parametrize("key", ["name", "target", "versions", "source", "report", "libraries"])
def test_a_manifest_that_lacks_a_part(folder: Path, key: str) -> None:
    edit(folder, lambda manifest: manifest.pop(key))
    with pytest.raises(BadInput, match="malformed manifest"):
        open_artifact(folder)


def test_outputs_that_are_no_tensors_are_not_called_equal(tmp_path: Path) -> None:
    proto = model("y = SplitToSequence<axis = 1>(x)", outputs="seq(float[b,p,8]) y")
    path = tmp_path / "sequence.onnx"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(BadInput, match="not compared"):
        fusenorm.verify(path, path)
