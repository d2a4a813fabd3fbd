"""The archive for GPU machines: what it holds, and that it runs where it is unpacked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import onnx
import pytest
import torch

from fusenorm.lower import Target
from fusenorm.ops import Gated, Norm
from tests import gpu_bundle, gpu_run
from tests.bench import cuda as bench
from tests.gpu_run import Step


def test_the_benchmarks_ops_and_row_lengths_are_built() -> None:
    columns = gpu_bundle.bench_columns(
        bench.cases(["skip-rms", "swiglu"], ["bf16"], 1 << 20, False)
    )
    lengths = {1 << power for power in range(8, 18)}
    assert columns == {
        Norm(skip=True, dtype="bf16", scale="bf16"): lengths,
        Gated("swish", "pair", "bf16"): lengths,
    }


def test_the_artifacts_model_is_valid() -> None:
    model = gpu_bundle.model(gpu_bundle.SPECS)
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == [s.op_type for s in gpu_bundle.SPECS]


@pytest.mark.kernel
def test_it_runs_where_it_is_unpacked(tmp_path: Path) -> None:
    built = gpu_bundle.artifact(Target.host(), tmp_path / "ops.fnorm", quick=True)
    (tmp_path / "wheels").mkdir()
    gpu_bundle.pack(tmp_path / "bundle.tar.gz", built, tmp_path / "wheels")
    with tarfile.open(tmp_path / "bundle.tar.gz") as archive:
        archive.extractall(tmp_path / "there", filter="data")
    there = tmp_path / "there" / gpu_bundle.NAME
    (there / "packages").mkdir()
    (there / "packages" / ".done").touch()  # this environment has what the wheels bring
    settings = {**os.environ, "PYTHON": sys.executable, "XDG_CACHE_HOME": "/nowhere"}
    settings.pop("PYTHONPATH", None)
    done = subprocess.run(
        ["/bin/sh", str(there / "run.sh"), "--device", "cpu"],
        cwd=tmp_path, env=settings, capture_output=True, text=True, check=False,
    )  # fmt: skip
    logs = "\n".join(path.read_text() for path in (there / "out").glob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    summary = (there / "out" / "summary.md").read_text()
    assert [line.split(" | ")[:2] for line in summary.splitlines()[2:]] == [
        ["| tests", "passed"],
        ["| bench", "passed"],
    ]
    assert "without a kernel" not in logs  # they came from the artifact
    assert json.loads((there / "out" / "environment.json").read_text())["torch"]


def test_a_gpu_run_tests_sanitizes_and_measures(tmp_path: Path) -> None:
    steps = list(gpu_run.steps(Path("ops.fnorm"), tmp_path, "cuda"))
    assert [step.name for step in steps] == ["tests", "memcheck", "racecheck", "bench"]
    for step in steps[1:3]:
        assert step.missing == "compute-sanitizer is not installed" or step.missing is None
        assert step.command[1:3] == ("--tool", step.name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_run.main(["a.fnorm", "--out", str(tmp_path / "out")]) == 2
    assert "no CUDA GPU" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_failure_is_an_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def script(code: str) -> tuple[str, ...]:
        return (sys.executable, "-c", code)

    monkeypatch.setattr(
        gpu_run,
        "steps",
        lambda artifact, out, device: [
            Step("good", script("import os; print(os.environ['FUSENORM_ARTIFACT'])")),
            Step("bad", script("raise SystemExit(3)")),
            Step("absent", (), "it is not installed"),
        ],
    )
    assert gpu_run.main(["a.fnorm", "--device", "cpu", "--out", str(tmp_path)]) == 1
    lines = (tmp_path / "summary.md").read_text().splitlines()[2:]
    assert [line.split(" | ")[1] for line in lines] == [
        "passed",
        "failed with exit code 3",
        "not run: it is not installed",
    ]
    assert (tmp_path / "good.log").read_text() == "a.fnorm\n"
