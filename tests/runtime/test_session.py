from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

import fusenorm
from fusenorm.artifact import Library, open_artifact
from fusenorm.errors import BadInput, SlowerFallback
from fusenorm.runtime.host import Host, choose

V2 = Library("v2", "x86_64", ("sse4_2",), "2.17", (), Path("v2.so"))
V3 = Library("v3", "x86_64", ("avx2", "fma", "sse4_2"), "2.17", (), Path("v3.so"))
HOST = Host("x86_64", frozenset(("sse4_2", "avx2", "fma")), "2.36")


def test_runs_as_an_inference_session(folder, fused, feed) -> None:
    session = fusenorm.load(folder)
    assert isinstance(session, ort.InferenceSession)
    plain = ort.InferenceSession(fused)
    (ours,), (theirs,) = session.run(None, feed), plain.run(None, feed)
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(session.run(["y"], feed)[0], theirs)


def test_the_recorded_run_comes_out_again(folder) -> None:
    golden = open_artifact(folder).golden()
    (found,) = fusenorm.load(folder).run(None, golden.inputs)
    np.testing.assert_allclose(found, golden.outputs["y"], rtol=1e-6)


def test_loads_a_plain_model(fused, feed) -> None:
    session = fusenorm.load(fused, threads=1)
    assert session.library is None
    assert session.get_session_options().intra_op_num_threads == 1
    assert str(session.signature.inputs[1]) == "float32[batch, seq, 8]"
    assert session.run(None, feed)[0].shape == (2, 3, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.zeros(1)}, "input 'x' is none of the model's"),
        ({"ids": np.zeros((2, 3), np.int64)}, r"is int64\[2, 3\]: the model takes int32"),
        ({"ids": np.zeros((2, 4), np.int32)}, "and seq is 4 in 'ids'"),
    ],
)
def test_refuses_inputs_before_onnxruntime_sees_them(folder, feed, change, message) -> None:
    session = fusenorm.load(folder)
    with pytest.raises(BadInput, match=message):
        session.run(None, {**feed, **change})
    with pytest.raises(BadInput, match=message):
        session.run_async(None, {**feed, **change}, lambda *_: None, None)


def test_refuses_unknown_outputs(folder, feed) -> None:
    with pytest.raises(BadInput, match="output 'z' is none of the model's: y"):
        fusenorm.load(folder).run(["z"], feed)


def test_takes_ort_values_and_checks_them(folder, feed) -> None:
    session = fusenorm.load(folder)
    values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in feed.items()}
    np.testing.assert_array_equal(session.run(None, values)[0], session.run(None, feed)[0])
    values["offset"] = ort.OrtValue.ortvalue_from_numpy(np.zeros((2, 3, 7), np.float32))
    with pytest.raises(BadInput, match=r"'offset' is float32\[2, 3, 7\]"):
        session.run(None, values)


def test_run_async(folder, feed) -> None:
    session = fusenorm.load(folder)
    done, found = threading.Event(), []

    def callback(results, user_data, error) -> None:
        found.extend((results, user_data, error))
        done.set()

    session.run_async(None, feed, callback, "mine")
    assert done.wait(10)
    assert found[1:] == ["mine", ""]
    np.testing.assert_array_equal(found[0][0], session.run(None, feed)[0])


def test_bad_files_are_named(tmp_path) -> None:
    path = tmp_path / "broken.onnx"
    with pytest.raises(BadInput, match=r"broken\.onnx: no such file"):
        fusenorm.load(path)
    path.write_bytes(b"hello")
    with pytest.raises(BadInput, match=r"broken\.onnx: onnxruntime cannot load it"):
        fusenorm.load(path)
    with pytest.raises(BadInput, match="threads is 0"):
        fusenorm.load(path, threads=0)


def test_a_library_for_another_machine_is_never_loaded(artifact, tmp_path, feed) -> None:
    library = dataclasses.replace(V2, features=("quantum",), content=b"\x7fELF no code")
    folder = dataclasses.replace(artifact, libraries=[library]).save(tmp_path / "quantum")
    message = r"lib/v2 (needs CPU features this machine lacks: quantum|is built for x86_64)"
    with pytest.raises(BadInput, match=message):
        fusenorm.load(folder, fallback=False)
    with pytest.warns(SlowerFallback, match=message) as warned:
        session = fusenorm.load(folder)
    assert "\n" not in str(warned[0].message)
    assert warned[0].filename == __file__
    assert session.run(None, feed)[0].shape == (2, 3, 8)
    assert session.metrics.snapshot().start.fallback
    assert fusenorm.load(folder, library=False).run(None, feed)[0].shape == (2, 3, 8)


def test_choose_takes_the_first_that_runs() -> None:
    assert choose([V3, V2], HOST, "a") is V3
    assert choose([V3, V2], dataclasses.replace(HOST, features=frozenset(["sse4_2"])), "a") is V2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"machine": "aarch64"}, "a: lib/v2 is built for x86_64, this machine is aarch64"),
        ({"features": frozenset()}, "a: lib/v2 needs CPU features this machine lacks: sse4_2;"),
        ({"glibc": "2.9"}, "a: lib/v2 needs glibc 2.17, this machine has 2.9;"),
        ({"glibc": None}, "a: lib/v2 needs glibc 2.17, this machine has none;"),
    ],
)
def test_choose_says_what_is_lacking(change, message) -> None:
    with pytest.raises(BadInput, match=message):
        choose([V3, V2], dataclasses.replace(HOST, **change), "a")


@pytest.mark.parametrize("key", ["flags", "Features"])
def test_detect_reads_cpuinfo(tmp_path, key) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(f"processor\t: 0\n{key}\t\t: fpu asimd avx2\n\n{key}\t: other\n")
    assert Host.detect(path).features == {"fpu", "asimd", "avx2"}
    assert Host.detect(tmp_path / "none").features is None
