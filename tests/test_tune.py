"""What does not pay is left to onnxruntime, measured once and remembered."""

from __future__ import annotations

import errno
import itertools
import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import fusenorm
from fusenorm import tune
from fusenorm.lower import Target, build_library
from fusenorm.ops import Linear
from fusenorm.passes import Validator
from fusenorm.pipeline import lower_regions
from fusenorm.tune import Paying, Problem, problems, slower
from tests.graphs import model, rows


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "fusenorm" / "choices.json"


@pytest.fixture
def two_maps() -> onnx.ModelProto:
    """Two products of one shape, then one of another."""
    return model(
        "a = MatMul (x, w)\n b = MatMul (a, v)\n y = MatMul (b, u)",
        outputs="float[b,s,96] y",
        constants={"w": rows(8, 64), "v": rows(64, 64), "u": rows(64, 96)},
    )


WIDE, SQUARE = Problem("Linear", ((2, 8, 32),)), Problem("Linear", ((2, 64, 32),))


def test_problems_are_distinct_shapes(two_maps: onnx.ModelProto) -> None:
    lowered, _ = lower_regions(fusenorm.optimize(two_maps).model)
    assert problems(lowered) == [WIDE, SQUARE, Problem("Linear", ((3, 64, 32),))]


def test_columns_that_fill_no_panel_are_a_problem_of_their_own() -> None:
    weights = {"w": rows(8, 60), "v": rows(8, 61)}
    body = "y = MatMul (x, w)\n g = MatMul (x, v)\n u = MatMul (x, v2)\n z = Mul (g, u)"
    proto = model(
        body, outputs="float[b,s,60] y, float[b,s,61] z", constants={**weights, "v2": rows(8, 61)}
    )
    lowered, _ = lower_regions(fusenorm.optimize(proto).model)
    assert problems(lowered) == [
        Problem("Linear_bias_ragged", ((2, 8, 32),), 28),
        Problem("LinearGLU_identity_bias_ragged", ((4, 8, 32),), 29),
    ]
    like = Problem("Linear_bias_ragged", ((2, 8, 32),), 29)
    assert tune._flat(like) != tune._flat(problems(lowered)[0])  # nor remembered as one
    spec = Linear("identity", gated=True, bias=True, ragged=True)
    held = {
        tensor.name: tensor for tensor in tune._model(spec, problems(lowered)[1]).graph.initializer
    }
    assert list(held["gate_bias_of_0"].dims) == list(held["up_bias_of_0"].dims) == [61]


def test_tiny_weights_are_measured_in_a_model_of_some_size() -> None:
    assert len(tune._model(Linear(), Problem("Linear", ((1, 1, 32),))).graph.node) == tune.COPIES


def test_what_was_slower_stays_and_says_so(two_maps: onnx.ModelProto) -> None:
    check = Paying(Validator(), {SQUARE: 0.9})
    _, regions = lower_regions(fusenorm.optimize(two_maps).model, check)
    assert [site.status for site in regions] == ["fused", "refused", "fused"]
    assert regions[1].reason == "slower"
    assert "0.90 of onnxruntime's speed" in str(regions[1].detail)


def test_a_measurement_is_remembered(
    two_maps: onnx.ModelProto, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lowered, _ = lower_regions(fusenorm.optimize(two_maps).model)
    measured: list[Problem] = []

    def share(problem: Problem, library: Path) -> float:
        measured.append(problem)
        return 0.5 if problem == SQUARE else 1.5

    monkeypatch.setattr(tune, "share", share)
    assert slower(lowered, Path("none.so"), "x86-64-v3") == {SQUARE: 0.5}
    assert slower(lowered, Path("none.so"), "x86-64-v3") == {SQUARE: 0.5}
    assert len(measured) == 3
    slower(lowered, Path("none.so"), "x86-64-v4")
    assert len(measured) == 6
    cache.write_text("damaged {", encoding="utf-8")
    slower(lowered, Path("none.so"), "x86-64-v4")
    assert len(measured) == 9


def test_where_nothing_can_be_remembered_it_is_measured_anew(
    two_maps: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lowered, _ = lower_regions(fusenorm.optimize(two_maps).model)
    monkeypatch.setattr(tune, "share", lambda *_: 0.5)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(slower(lowered, Path("none.so"), "x86-64-v3")) == 3

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    assert len(slower(lowered, Path("none.so"), "x86-64-v3")) == 3


def test_where_a_measurement_cannot_be_written_nothing_fails(
    two_maps: onnx.ModelProto, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lowered, _ = lower_regions(fusenorm.optimize(two_maps).model)
    monkeypatch.setattr(tune, "share", lambda *_: 0.5)

    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    cache.parent.mkdir()
    for name in ("write_text", "unlink"):  # both say so on a file system mounted read-only
        monkeypatch.setattr(Path, name, read_only)
    assert len(slower(lowered, Path("none.so"), "x86-64-v3")) == 3


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("spec", "panels"),
    [
        (Linear("swish", gated=True, bias=True), ((4, 40, 32),)),
        (Linear("swish", gated=True, bias=True, dtype="f16"), ((4, 40, 32),)),
        (Linear(bias=True, maps=2), ((4, 40, 32), (1, 40, 32))),
        (Linear("relu", gated=True, bias=True, ragged=True), ((4, 40, 32),)),
        (Linear(bias=True, residual=True, alpha=True), ((4, 40, 32),)),
        (Linear("swish", gated=True, norm="rms"), ((4, 40, 32),)),
    ],
)
def test_measures_both_sides(
    tmp_path: Path, spec: Linear, panels: tuple[tuple[int, ...], ...]
) -> None:
    library = tmp_path / "ops.so"
    build_library([spec], Target.host(), library)
    problem = Problem(spec.op_type, panels, 29 if spec.ragged else 0)
    assert 0.01 < tune.share(problem, library) < 100


def test_maps_side_by_side_are_one_problem() -> None:
    proto = model(
        "y = MatMul (x, w)\n z = MatMul (x, v)",
        outputs="float[b,s,64] y, float[b,s,96] z",
        constants={"w": rows(8, 64), "v": rows(8, 96)},
    )
    lowered, _ = lower_regions(fusenorm.optimize(proto).model)
    assert problems(lowered) == [Problem("Linear_2maps", ((2, 8, 32), (3, 8, 32)))]


NORM_THEN_MAP = model(
    "n = LayerNormalization (x, g, b)\n y = MatMul (n, w)",
    outputs="float[b,s,64] y",
    constants={"w": rows(8, 64), "g": rows(8, seed=1), "b": rows(8, seed=2)},
)
BIASED = Problem("Linear_bias", WIDE.panels)


@pytest.mark.kernel
@pytest.mark.parametrize("slow", [{BIASED}, {BIASED, WIDE}], ids=["biased", "both"])
def test_compile_ends_where_what_a_norm_leaves_behind_does_not_pay(
    monkeypatch: pytest.MonkeyPatch, slow: set[Problem]
) -> None:
    rounds = itertools.count()

    def slower(lowered: ir.Model, library: Path, level: str) -> dict[Problem, float]:
        assert next(rounds) < 4
        return dict.fromkeys(slow.intersection(problems(lowered)), 0.5)

    monkeypatch.setattr(tune, "slower", slower)
    compiled = fusenorm.compile(fusenorm.optimize(NORM_THEN_MAP))
    assert problems(compiled.model) == [problem for problem in (WIDE,) if problem not in slow]


@pytest.mark.kernel
def test_what_a_model_comes_with_stays(
    two_maps: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    once, _ = lower_regions(fusenorm.optimize(two_maps).model)
    rounds = itertools.count()

    def slower(lowered: ir.Model, library: Path, level: str) -> dict[Problem, float]:
        assert next(rounds) < 4
        return dict.fromkeys(problems(lowered), 0.5)

    monkeypatch.setattr(tune, "slower", slower)
    compiled = fusenorm.compile(fusenorm.optimize(ir.to_proto(once)))
    assert problems(compiled.model) == problems(once)


@pytest.mark.kernel
def test_compile_leaves_out_what_does_not_pay(
    two_maps: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "share", lambda problem, library: 0.5)
    tuned = fusenorm.compile(fusenorm.optimize(two_maps))
    assert {site["reason"] for site in tuned.report["regions"]} == {"slower"}  # type: ignore[index]
    assert tuned.libraries == []
    whole = fusenorm.compile(fusenorm.optimize(two_maps), tune=False)
    assert {site["status"] for site in whole.report["regions"]} == {"fused"}  # type: ignore[index]
    feed = {"x": rows(2, 3, 8)}
    a = fusenorm.load(tuned.save(tmp_path / "a.fnorm")).run(None, feed)[0]
    b = fusenorm.load(whole.save(tmp_path / "b.fnorm")).run(None, feed)[0]
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4 * float(np.abs(a).max()))
