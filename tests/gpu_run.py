"""Every check that needs a GPU, with the kernels of an artifact; results in one folder.

    python -m tests.gpu_run ops.fnorm [--out out]
    python -m tests.gpu_run ops.fnorm --device cpu    # whether everything is there

Steps: the tests marked cuda, the same under compute-sanitizer's memcheck and racecheck where that
is installed, the benchmark. summary.md says how each went; the exit code is 1 if one failed, 2
without a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

TESTS = ("tests/torch/test_cuda.py", "tests/kernels/test_cuda_gpu.py")
# Each test once, on ordinary numbers: under the sanitizer a kernel takes a hundred times as long.
SANITIZED = "(case_table and normal) or no_rows or few_long_rows"
TOOLS = ("memcheck", "racecheck")


@dataclasses.dataclass(frozen=True)
class Step:
    """One program to run; `missing` says why it cannot."""

    name: str
    command: tuple[str, ...]
    missing: str | None = None


def steps(artifact: Path, out: Path, device: str) -> Iterator[Step]:
    python = sys.executable
    # Above these folders lie fixtures for what is not needed, and not installed, on a GPU machine.
    pytest = (python, "-m", "pytest", *TESTS, "-m", "cuda", "--confcutdir", "tests/torch", "-q")
    bench = (python, "-m", "tests.bench", "--cuda", "--artifact", str(artifact))
    bench = (*bench, "--out", str(out / "bench"))
    if device == "cpu":
        yield Step("tests", (*pytest, "--collect-only"))
        quick = ("--device", "cpu", "--quick", "--ops", "rms", "--dtypes", "f32")
        yield Step("bench", (*bench, *quick, "--against", "torch"))
        return
    yield Step("tests", pytest)
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    missing = None if Path(sanitizer).exists() else "compute-sanitizer is not installed"
    for tool in TOOLS:
        check = (sanitizer, "--tool", tool, "--error-exitcode", "9", *pytest, "-k", SANITIZED)
        yield Step(tool, check, missing)
    yield Step("bench", bench)


def environment() -> dict[str, object]:
    """What the figures were measured on."""
    known: dict[str, object] = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    if torch.cuda.is_available():
        known["gpu"] = torch.cuda.get_device_name()
        known["capability"] = torch.cuda.get_device_capability()
    return known


def run(step: Step, out: Path, artifact: Path) -> tuple[str, float]:
    """Run a step into its log; its outcome and seconds."""
    if step.missing:
        return f"not run: {step.missing}", 0.0
    begun = time.monotonic()
    settings = {"FUSENORM_ARTIFACT": str(artifact)}
    if step.name in TOOLS:  # which see every allocation if none is cut from another
        settings["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    with open(out / f"{step.name}.log", "w", encoding="utf-8") as log:
        code = subprocess.run(
            step.command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **settings}
        ).returncode
    return "passed" if code == 0 else f"failed with exit code {code}", time.monotonic() - begun


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        print("torch sees no CUDA GPU here; --device cpu tells whether everything else is there")
        return 2
    given.out.mkdir(parents=True, exist_ok=True)
    known = json.dumps(environment(), indent=1)
    (given.out / "environment.json").write_text(known + "\n", encoding="utf-8")
    lines = ["| step | outcome | seconds |", "| --- | --- | --- |"]
    failed = False
    for step in steps(given.artifact, given.out, given.device):
        outcome, seconds = run(step, given.out, given.artifact)
        failed |= outcome.startswith("failed")
        lines.append(f"| {step.name} | {outcome} | {seconds:.0f} |")
        print(lines[-1], flush=True)
        (given.out / "summary.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
