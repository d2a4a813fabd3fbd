"""What whole models cost to load and to hold, and how far their outputs are from the source's.

python -m tests.bench.loading [--models bert,llama] [--length 128] [--rounds 3]

Every load is in a process of its own, the sides in turns; figures are medians. Seconds are those of
making the session; MiB are the process's largest resident memory, after loading and after a run,
less what it was before. Differences are the largest, relative to the output's largest value, from
onnxruntime with its optimisations off, at every length.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort

import fusenorm

FEED = "feed.npz"


def _plain(model: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


# By what of (source, artifact) is loaded.
SIDES: dict[str, Callable[[Path, Path], ort.InferenceSession]] = {
    "ours": lambda _, folder: fusenorm.load(folder, threads=1),
    "onnxruntime": lambda model, _: _plain(model),
    "onnxruntime on our model.onnx, no library": lambda _, folder: _plain(folder / "model.onnx"),
}


def peak_mebibytes() -> float:
    """The largest resident memory of this process so far."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise OSError("/proc/self/status has no VmHWM")


def load_once(side: str, model: Path) -> tuple[float, float, float]:
    """Seconds to load, MiB after it, MiB after a run: of this process."""
    with np.load(model.parent / FEED) as stored:
        feed = dict(stored)
    before = peak_mebibytes()
    begun = time.perf_counter()
    session = SIDES[side](model, model.with_suffix(".fnorm"))
    seconds = time.perf_counter() - begun
    loaded = peak_mebibytes()
    session.run(None, feed)
    return seconds, loaded - before, peak_mebibytes() - before


def _in_a_process(side: str, model: Path) -> list[float]:
    command = [sys.executable, "-m", "tests.bench.loading", "--side", side, "--model"]
    done = subprocess.run([*command, os.fspath(model)], check=True, capture_output=True, text=True)
    return [float(number) for number in json.loads(done.stdout)]


def table(names: list[str], folder: Path, length: int, rounds: int) -> None:
    """Print it."""
    # Not above: they bring torch, which the measured processes do without.
    from tests.bench.models import ARCHITECTURES, export
    from tests.bench.wholemodels import compiled

    print(f"| model | {' | '.join(SIDES)} | largest difference, bound |")
    print("| --- |" + " --- |" * (len(SIDES) + 1))
    for architecture in ARCHITECTURES:
        if names and architecture.name not in names:
            continue
        model = export(architecture, folder)
        artifact = compiled(model)
        np.savez(folder / FEED, **architecture.feed(length))
        taken: dict[str, list[list[float]]] = {side: [] for side in SIDES}
        for _ in range(rounds):
            for side, rows in taken.items():
                rows.append(_in_a_process(side, model))
        cells = [
            "{:.2f} s, {:.0f} MiB, {:.0f} MiB".format(
                *(statistics.median(column) for column in zip(*rows, strict=True))
            )
            for rows in taken.values()
        ]
        found = [
            fusenorm.verify(model, artifact, architecture.feed(n)) for n in architecture.lengths
        ]
        worst = max(output.max_relative for one in found for output in one.outputs)
        cells.append(f"{worst:.1e}, {found[0].tolerance:.1e}")
        print(f"| {architecture.name} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("build/bench"))
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.side:
        print(json.dumps(load_once(chosen.side, chosen.model)))
    else:
        names = [name for name in chosen.models.split(",") if name]
        table(names, chosen.folder, chosen.length, chosen.rounds)


if __name__ == "__main__":
    main()
