"""The fused model.onnx is an ordinary ONNX file: onnxruntime alone gives the same outputs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fusenorm

STOCK = """
import sys
import numpy as np
import onnxruntime as ort

model, library, inputs, outputs = sys.argv[1:]
options = ort.SessionOptions()
if library:
    options.register_custom_ops_library(library)
session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
feed = dict(np.load(inputs))
np.savez(outputs, *session.run(None, feed))
ours = [name for name in sys.modules if name.split(".")[0] in ("fusenorm", "tvm", "tvm_ffi")]
assert not ours, ours
"""


@pytest.mark.kernel
@pytest.mark.parametrize("with_library", [False, True])
def test_onnxruntime_alone(llama: Path, tmp_path: Path, with_library: bool) -> None:
    folder = fusenorm.compile(llama).save(tmp_path / "llama.fnorm")
    feed = {"tokens": np.random.default_rng(0).integers(0, 256, (3, 11), np.int64)}
    np.savez(tmp_path / "in.npz", **feed)
    (library,) = folder.glob("lib/*/fusenorm_ops-*.so")
    subprocess.run(
        [
            sys.executable,
            "-I",
            "-c",
            STOCK,
            str(folder / "model.onnx"),
            str(library) if with_library else "",
            str(tmp_path / "in.npz"),
            str(tmp_path / "out.npz"),
        ],
        check=True,
        cwd=tmp_path,
    )
    with np.load(tmp_path / "out.npz") as stored:
        got = stored["arr_0"]
    (wanted,) = fusenorm.load(llama).run(None, feed)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
