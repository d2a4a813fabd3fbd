"""Artifacts with a compiled library, loaded and run."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

import fusenorm
from fusenorm.artifact import open_artifact, write
from fusenorm.errors import BadInput

pytestmark = pytest.mark.kernel


def test_the_library_runs_the_fused_ops(compiled, llama) -> None:
    session = fusenorm.load(compiled, threads=2)
    assert session.library.op_types
    assert fusenorm.load(compiled, library=False).library is None
    assert fusenorm.verify(llama, compiled).ok
    assert fusenorm.verify(compiled).ok


def test_kernels_are_called_not_bodies(compiled, tmp_path) -> None:
    options = ort.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / "profile")
    session = fusenorm.load(compiled, session_options=options)
    session.run(None, open_artifact(compiled).golden().inputs)
    profile = Path(session.end_profiling()).read_text()
    for op_type in session.library.op_types:
        assert f'"op_name" : "{op_type}"' in profile


def test_one_session_in_many_threads(compiled) -> None:
    golden = open_artifact(compiled).golden()
    session = fusenorm.load(compiled, threads=2)
    (expected,) = session.run(None, golden.inputs)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: session.run(None, golden.inputs)[0], range(32)))
    assert all(np.array_equal(result, expected) for result in results)


def test_what_the_library_needs_is_recorded(compiled) -> None:
    (entry,) = open_artifact(compiled).manifest["libraries"]
    digest = hashlib.sha256((compiled / entry["path"]).read_bytes()).hexdigest()
    assert entry["path"] == f"lib/{entry['level']}/fusenorm_ops-{digest[:12]}.so"
    assert entry["machine"] in ("x86_64", "aarch64")
    assert entry["features"] == sorted(entry["features"])


def test_compiling_twice_gives_the_same_bytes(llama, tmp_path, monkeypatch) -> None:
    """In a process whose sets have another order, too."""
    code = (
        "import sys, fusenorm; from fusenorm.artifact import write\n"
        "write.EXTERNAL_DATA_BYTES = 1024\n"
        "fusenorm.compile(sys.argv[1], tune=False).save(sys.argv[2])"
    )
    monkeypatch.setattr(write, "EXTERNAL_DATA_BYTES", 1024)
    one, two = tmp_path / "one", tmp_path / "two"
    fusenorm.compile(llama, tune=False).save(one)
    seed = {"PYTHONHASHSEED": "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"}
    subprocess.run(
        [sys.executable, "-c", code, str(llama), str(two)], env={**os.environ, **seed}, check=True
    )
    names = sorted(path.relative_to(one) for path in one.rglob("*.*"))
    assert names == sorted(path.relative_to(two) for path in two.rglob("*.*"))
    assert len(names) == 7
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


def test_a_changed_library_is_never_loaded(llama, tmp_path) -> None:
    artifact = fusenorm.compile(llama, target="cpu")
    library = artifact.libraries[0]
    folder = artifact.save(tmp_path / "changed.fnorm")
    (path,) = folder.glob("lib/*/*.so")
    path.write_bytes(library.content[:-1] + bytes([library.content[-1] ^ 1]))
    with pytest.raises(BadInput, match=f"{path.name}: sha256 is .*: it was changed"):
        fusenorm.load(folder)


def test_a_library_that_cannot_be_loaded_is_one_line(llama, tmp_path) -> None:
    artifact = fusenorm.compile(llama, target="cpu")
    broken = dataclasses.replace(artifact.libraries[0], content=b"\x7fELF and nothing else")
    folder = dataclasses.replace(artifact, libraries=[broken]).save(tmp_path / "broken.fnorm")
    with pytest.raises(BadInput, match="onnxruntime cannot load it"):
        fusenorm.load(folder)
