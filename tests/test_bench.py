from __future__ import annotations

import dataclasses
import itertools
import os
import time

import onnx.parser
import onnx_ir as ir
import pytest

from fusenorm.artifact import Artifact, Source, sha256
from fusenorm.bench import bench, measure, options
from fusenorm.errors import BadInput


def test_sides_take_turns() -> None:
    calls: list[str] = []
    seen: list[tuple[str, int, int]] = []
    sides = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    times = measure(sides, 0.0, lambda *step: seen.append(step))
    assert [len(taken) for taken in times.values()] == [5, 5, 5]
    rounds = ["".join(calls[at : at + 3]) for at in range(0, len(calls), 3)]
    assert rounds[:3] == ["abc"] * 3
    assert {"".join(sorted(each)) for each in rounds} == {"abc"}
    assert seen[-1] == ("measure", 5, 5)


def test_no_side_always_follows_the_same_one() -> None:
    calls: list[str] = []
    measure({name: (lambda name=name: calls.append(name)) for name in "abc"}, 0.0)
    before = {name: {a for a, b in itertools.pairwise(calls[9:]) if b == name} for name in "abc"}
    assert all(len(others - {name}) == 2 for name, others in before.items())


def test_a_pause_is_not_measured_nor_the_run_after_it() -> None:
    begun, calls = time.perf_counter(), []
    times = measure({"a": lambda: calls.append("a")}, 0.0, pause=0.02)
    assert time.perf_counter() - begun >= 5 * 0.02
    assert max(times["a"]) < 0.02
    assert len(calls) == 3 + 2 * len(times["a"])


def test_table(folder, fused) -> None:
    latency = bench(folder, fused, seconds=0.0, threads=1, dims={"seq": 4, "batch": 2})
    assert [row.name for row in latency.rows] == ["fusenorm", "onnxruntime", "onnxruntime-noskip"]
    assert latency.rows[0].relative == 1
    assert all(0 < row.fastest <= row.median for row in latency.rows)
    assert latency.shapes == {"ids": (2, 4), "offset": (2, 4, 8)}
    assert latency.as_dict()["threads"] == 1


def test_measures_at_the_first_shape_that_runs(folder, tmp_path) -> None:
    assert bench(folder, seconds=0.0).shapes["ids"] == (1, 128)
    text = """<ir_version: 8, opset_import: ["": 18]> g (float[m, n] x) => (float[a, b] y) {
        shape = Constant <value_ints: ints = [5, 2]> ()
        y = Reshape (x, shape)
    }"""
    model = ir.serde.deserialize_model(onnx.parser.parse_model(text))
    baked = Artifact("baked", model, {}).save(tmp_path / "baked")
    assert bench(baked, seconds=0.0).shapes == {"x": (1, 10)}
    with pytest.raises(BadInput, match="baked: onnxruntime cannot run it on random inputs"):
        bench(baked, dims={"n": 9})


def test_refuses_what_it_cannot_measure(artifact, folder, fused, llama, tmp_path) -> None:
    with pytest.raises(BadInput, match="cannot measure against 'abacus': one of onnxruntime"):
        bench(folder, against=["abacus"])
    source = Source(sha256(fused), 18, 8)
    other = dataclasses.replace(artifact, source=source).save(tmp_path / "other")
    bench(other, fused, seconds=0.0)
    with pytest.raises(BadInput, match="is not the model fused was made from"):
        bench(other, llama)


def test_measured_sessions_have_their_threads_pinned() -> None:
    entry, places = "session.intra_op_thread_affinities", sorted(os.sched_getaffinity(0))
    for threads in (1, len(places) + 1):
        with pytest.raises(RuntimeError, match="affinities"):
            options(threads).get_session_config_entry(entry)
    if len(places) > 1:
        assert options(2).get_session_config_entry(entry) == str(places[1] + 1)
