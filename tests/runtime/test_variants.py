"""One artifact for several kinds of machines."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner

import fusenorm
from fusenorm import cli
from fusenorm.artifact import Stored, open_artifact
from fusenorm.errors import BadInput
from fusenorm.lower import Target
from fusenorm.runtime.compatibility import compatibility
from fusenorm.runtime.host import Host
from fusenorm.runtime.session import start
from tests.graphs import model, rows

pytestmark = pytest.mark.kernel

LEVELS = ("x86-64-v4", "x86-64-v3", "x86-64-v2")
WEIGHT = rows(64, 128)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A linear map and its activation."""
    body = "h = MatMul(x, w)\na = Add(h, b)\ng = Sigmoid(a)\ny = Mul(a, g)"
    proto = model(
        body,
        "float[n,64] x",
        "float[n,128] y",
        constants={"w": WEIGHT, "b": rows(128)},
    )
    path = tmp_path_factory.mktemp("variants") / "linear.onnx"
    onnx.save(proto, path)
    return path


@pytest.fixture(scope="module")
def folder(path: Path) -> Path:
    targets = ["x86-64-v2", "x86-64-v4,x86-64-v3"]
    return fusenorm.compile(path, target=targets, tune=False).save(path.parent / "linear.fnorm")


@pytest.fixture(scope="module")
def stored(folder: Path) -> Stored:
    return open_artifact(folder)


def host(level: str) -> Host:
    """A machine of just this level."""
    return Host("x86_64", frozenset(Target.parse(level).features), "2.36")


def test_the_most_demanding_library_comes_first(stored: Stored) -> None:
    assert tuple(library.level for library in stored.libraries) == LEVELS
    assert stored.manifest["target"] == "x86-64-v2,x86-64-v4,x86-64-v3"
    for library, entry in zip(stored.libraries, stored.manifest["libraries"], strict=True):
        assert library.features == tuple(sorted(Target.parse(library.level).features))
        assert entry["path"].startswith(f"lib/{library.level}/")
        assert entry["cuda"] is None


@pytest.mark.parametrize("level", LEVELS)
def test_a_machine_gets_the_best_it_can_run(stored: Stored, level: str) -> None:
    found = compatibility(stored, host=host(level))
    assert (found.status, found.variant) == ("ok", level)
    assert found.reason.startswith(f"lib/{level} needs x86_64, ")
    assert found.reason.endswith("this machine has it: x86_64, glibc 2.36")


def test_all_levels_run_the_same_weights(stored: Stored, path: Path) -> None:
    size = sum(file.stat().st_size for file in stored.path.glob("model.onnx*"))
    assert WEIGHT.nbytes < size < 1.2 * WEIGHT.nbytes
    x = {"x": rows(5, 64)}
    (wanted,) = fusenorm.load(path).run(None, x)
    ran = 0
    for library in stored.libraries:
        if Target.parse(library.level).runs_here:
            (found,) = start(stored, library).run(None, x)
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
            ran += 1
    assert ran


def test_the_command_takes_a_list(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.fnorm"
    arguments = ["compile", str(path), "-o", str(out), "--no-tune", "--json"]
    targets = ["--target", "x86-64-v2,cpu", "--target", "x86-64-v2"]
    result = CliRunner().invoke(cli.app, [*arguments, *targets])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["comparison"]["ok"]
    assert len(open_artifact(out).libraries) == len({"x86-64-v2", Target.host().level})


def test_a_target_of_another_machine_is_saved_and_said_to_be_unchecked(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    least = Host("x86_64", frozenset(Target.parse("x86-64-v2").features), "2.36")
    monkeypatch.setattr(Host, "detect", lambda **_: least)
    out = tmp_path / "a.fnorm"
    arguments = ["compile", str(path), "-o", str(out), "--target", "x86-64-v4", "--no-tune"]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    assert "not compared with its source: lib/x86-64-v4 needs CPU features" in result.stdout
    result = CliRunner().invoke(cli.app, ["inspect", str(out), "--json"])
    found = json.loads(result.stdout)["compatibility"]
    assert (found["status"], found["variant"]) == ("fallback", None)
    result = CliRunner().invoke(cli.app, ["inspect", str(out)])
    assert "fallback: lib/x86-64-v4 needs CPU features this machine lacks: " in result.stdout
    with pytest.raises(BadInput, match="lib/x86-64-v4 needs CPU features this machine lacks"):
        fusenorm.verify(out)


def test_unknown_targets(path: Path) -> None:
    with pytest.raises(BadInput, match="unknown target 'x86-64-v9'"):
        fusenorm.compile(path, target=["cpu", "x86-64-v9"])


@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not installed")
def test_the_libraries_hold_no_instruction_above_their_level(stored: Stored) -> None:
    """AVX and later begin with v, the mask registers of AVX-512 are named %k, its vectors %zmm."""
    found = {}
    for library in stored.libraries:
        text = subprocess.run(
            ["objdump", "-d", "--no-show-raw-insn", library.path],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        lines = [line.split("\t") for line in text.splitlines() if line.count("\t") >= 1]
        code = [(line[1].split() or [""])[0] + " " + line[1] for line in lines]
        # The C part asks which features there are, by xgetbv.
        found[library.level] = (
            any(line.startswith("v") for line in code),
            any("%zmm" in line or "%k1" in line or "%ymm16" in line for line in code),
        )
    assert found == {
        "x86-64-v4": (True, True),
        "x86-64-v3": (True, False),
        "x86-64-v2": (False, False),
    }
