"""One session under load, memory of the caller's, figures, and an environment without us."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

import fusenorm
from fusenorm.errors import BadInput
from fusenorm.runtime.session import Session

THREADS, RUNS = 8, 200


@pytest.fixture
def session(folder: Path) -> Session:
    return fusenorm.load(folder, threads=1)


def feeds(count: int) -> list[dict[str, np.ndarray]]:
    """Inputs of many shapes."""
    random = np.random.default_rng(2)
    shapes = random.integers(1, 9, (count, 2))
    return [
        {
            "ids": random.integers(0, 11, (batch, seq), np.int32),
            "offset": random.standard_normal((batch, seq, 8)).astype(np.float32),
        }
        for batch, seq in shapes
    ]


def hammer(session: Session, inputs: list[dict[str, np.ndarray]]) -> int:
    """The number of wrong outputs over THREADS threads of RUNS runs."""
    wanted = [session.run(None, feed)[0] for feed in inputs]

    def work(thread: int) -> int:
        order = np.random.default_rng(thread).integers(0, len(inputs), RUNS)
        return sum(
            not np.array_equal(session.run(None, inputs[index])[0], wanted[index])
            for index in order
        )

    with ThreadPoolExecutor(THREADS) as pool:
        return sum(pool.map(work, range(THREADS)))


def test_many_threads_on_one_session(session: Session) -> None:
    assert hammer(session, feeds(32)) == 0
    now = session.metrics.snapshot()
    assert now.runs == THREADS * RUNS + 32
    assert now.errors == 0


@pytest.mark.kernel
def test_many_threads_on_one_library(compiled: Path) -> None:
    session = fusenorm.load(compiled, threads=1, fallback=False)
    random = np.random.default_rng(3)
    shapes = random.integers(1, 7, (24, 2))
    inputs = [{"tokens": random.integers(0, 256, tuple(shape), np.int64)} for shape in shapes]
    assert hammer(session, inputs) == 0


class Tensor:
    """What another library's tensor is: DLPack and nothing else."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack__(self, **options: object) -> object:
        return self.array.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


def test_dlpack_in(session: Session, feed, monkeypatch) -> None:
    (wanted,) = session.run(None, feed)
    seen = {}
    run = ort.InferenceSession.run

    def spy(self, names, given, options=None):
        seen.update({name: value.data_ptr() for name, value in given.items()})
        return run(self, names, given, options)

    monkeypatch.setattr(ort.InferenceSession, "run", spy)
    (found,) = session.run(None, {name: Tensor(array) for name, array in feed.items()})
    np.testing.assert_array_equal(found, wanted)
    assert seen == {name: array.ctypes.data for name, array in feed.items()}
    bad = Tensor(np.zeros((2, 3, 7), np.float32))
    with pytest.raises(BadInput, match=r"'offset' is float32\[2, 3, 7\]: the model takes float32"):
        session.run(None, {**feed, "offset": bad})


def test_dlpack_where_onnxruntime_has_none(session: Session, feed, monkeypatch) -> None:
    (wanted,) = session.run(None, feed)
    monkeypatch.delattr(ort.OrtValue, "from_dlpack")
    (found,) = session.run(None, {name: Tensor(array) for name, array in feed.items()})
    np.testing.assert_array_equal(found, wanted)


def test_dlpack_that_cannot_be_shared(session: Session, feed) -> None:
    across = Tensor(np.asfortranarray(feed["offset"]))
    with pytest.raises(BadInput, match=r"input 'offset' cannot be shared: .*contiguous"):
        session.run(None, {**feed, "offset": across})


def test_outputs_in_the_callers_memory(session: Session, feed) -> None:
    (wanted,) = session.run(None, feed)
    y = np.zeros((2, 3, 8), np.float32)
    binding = session.io_binding()
    ids = ort.OrtValue.ortvalue_from_numpy(feed["ids"])
    assert ids.data_ptr() == feed["ids"].ctypes.data
    binding.bind_ortvalue_input("ids", ids)
    offset = feed["offset"]
    binding.bind_input("offset", "cpu", 0, np.float32, offset.shape, offset.ctypes.data)
    binding.bind_output("y", "cpu", 0, np.float32, y.shape, y.ctypes.data)
    session.run_with_iobinding(binding)
    np.testing.assert_array_equal(y, wanted)
    assert binding.get_outputs()[0].data_ptr() == y.ctypes.data
    offset += 1
    session.run_with_iobinding(binding)
    np.testing.assert_array_equal(y, session.run(None, feed)[0])
    assert session.metrics.snapshot().rows == 4 * 2


def test_what_is_bound_is_checked(session: Session, feed) -> None:
    binding = session.io_binding()
    binding.bind_output("y")
    binding.bind_cpu_input("ids", feed["ids"])
    with pytest.raises(BadInput, match="input 'offset' is missing"):
        session.run_with_iobinding(binding)
    wide = np.zeros((2, 4, 8), np.float32)
    for element_type in (np.float32, 1):
        binding.bind_input("offset", "cpu", 0, element_type, wide.shape, wide.ctypes.data)
        with pytest.raises(BadInput, match="and seq is 3 in 'ids'"):
            session.run_with_iobinding(binding)
    binding.clear_binding_inputs()
    with pytest.raises(BadInput, match="input 'ids' is missing"):
        session.run_with_iobinding(binding)


def test_ort_values_in_and_out(session: Session, feed) -> None:
    values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in feed.items()}
    (found,) = session.run_with_ort_values(None, values)
    np.testing.assert_array_equal(found.numpy(), session.run(None, feed)[0])
    del values["ids"]
    with pytest.raises(BadInput, match="input 'ids' is missing"):
        session.run_with_ort_values(["y"], values)


def test_runs_are_counted(session: Session, feed) -> None:
    session.run(None, feed)
    for _ in range(3):
        with pytest.raises(BadInput):
            session.run(None, {})
    now = session.metrics.snapshot()
    assert (now.runs, now.rows, now.errors) == (1, 2, 3)
    assert 0 < now.seconds < now.start.seconds + 10
    assert (now.start.variant, now.start.fallback) == (None, False)


ALONE = """
import importlib.abc, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("tvm", "tvm_ffi", "onnx", "onnx_ir", "ml_dtypes", "google",
                                  "torch", "typer", "rich", "sympy", "onnxscript"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuse())
import numpy as np
import fusenorm
session = fusenorm.load(sys.argv[1], check=True, fallback=False)
y, = session.run(None, {"tokens": np.zeros((1, 8), np.int64)})
assert y.shape == (1, 8, 256), y.shape
assert session.library is not None
assert fusenorm.compatibility(sys.argv[1]).status == "ok"
"""


@pytest.mark.kernel
def test_a_server_needs_onnxruntime_and_the_artifact(compiled: Path, root: Path) -> None:
    subprocess.run([sys.executable, "-c", ALONE, str(compiled)], cwd=root, check=True)


@pytest.mark.kernel
def test_large_weights_are_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fusenorm.artifact import write
    from tests.graphs import model, rows

    monkeypatch.setattr(write, "EXTERNAL_DATA_BYTES", 1 << 10)
    constants = {"w": rows(256, 512), "b": rows(512)}
    proto = model(
        "h = MatMul(x, w)\na = Add(h, b)\ng = Sigmoid(a)\ny = Mul(a, g)",
        "float[n,256] x",
        "float[n,512] y",
        constants=constants,
    )
    result = fusenorm.optimize(proto)
    folder = fusenorm.compile(result, tune=False).save(tmp_path / "large.fnorm")
    data = folder / "model.onnx.data"
    assert data.stat().st_size < 1.1 * constants["w"].nbytes
    assert (folder / "model.onnx").stat().st_size < 1 << 14
    session = fusenorm.load(folder, fallback=False)
    with open("/proc/self/maps") as maps:
        assert any(str(data) in line for line in maps)
    assert session.run(None, {"x": rows(3, 256)})[0].shape == (3, 512)
