"""Mutation testing of passes/: one small change at a time, and whether a test notices.

`python -m tests.mutation [--sample N] [FILE ...]` prints a table per file and every survivor.

Each test runs once to learn its time and the lines it executes. Then every mutant gets a forked
child of a process that has imported and collected everything: it changes the function in place,
runs the tests that execute the changed line, quickest and most successful first, and stops at
the first that fails. Where the line runs at import, the child imports the changed module instead.
Mutants nothing can tell from the original stand in equivalents.txt, each with its reason, and
are not counted.
"""

from __future__ import annotations

import argparse
import collections
import functools
import math
import os
import random
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import hypothesis
import onnx.backend.test.case.node
import onnx.reference
import onnx_ir.passes.common
import onnxruntime

from tests.mutation.changes import Mutant, mutants
from tests.mutation.hunt import Hunt, hunt_all
from tests.mutation.survey import PASSES, ROOT, survey

EQUIVALENTS = Path(__file__).with_name("equivalents.txt")
SURVEY = ROOT / "build" / "mutation" / "survey.json"

# Heavy packages, imported here so that no child has to.
WARM = (onnx.reference, onnx_ir.passes.common, onnxruntime)

hypothesis.settings.register_profile(
    "mutation", phases=[hypothesis.Phase.generate], report_multiple_bugs=False, database=None
)
# Collected once, before there are children: it takes seconds.
onnx.backend.test.case.node.collect_testcases = functools.cache(
    onnx.backend.test.case.node.collect_testcases
)

COLUMNS = ("count", "equal", "run", "killed")


def interval(killed: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    if not total:
        return 0.0, 1.0
    z, share = 1.96, killed / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total**2))
    spread /= 1 + z * z / total
    return middle - spread, min(1.0, middle + spread)


def equivalents() -> dict[str, str]:
    """`file scope: change` to the reason why nothing can notice it."""
    lines = EQUIVALENTS.read_text(encoding="utf-8").splitlines()
    pairs = [line.rsplit(" | ", 1) for line in lines if line and not line.startswith("#")]
    return {key.strip(): reason.strip() for key, reason in pairs}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("files", nargs="*", help="names in passes/, by default all")
    parser.add_argument("--sample", type=int, help="this many mutants of a file, at random")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--match", default="", help="only mutants whose text holds this")
    parser.add_argument(
        "--survey", type=Path, default=SURVEY, help="keeps what tests execute between runs"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at once")
    parser.add_argument("--list", action="store_true", help="count the mutants, run none")
    options = parser.parse_args()
    files = [PASSES / name for name in options.files] or sorted(PASSES.glob("*.py"))
    excused = equivalents()
    os.chdir(ROOT)
    with warnings.catch_warnings(action="ignore"):
        onnx.backend.test.case.node.collect_testcases(None)
    known = None if options.list else survey(options.survey, options.jobs)
    for name in known.failing if known else ():
        print(f"left out, it fails without any mutant: {name}")
    counts: dict[str, tuple[int, int]] = {}
    hunts = []
    with tempfile.TemporaryDirectory() as folder, os.fdopen(os.dup(1), "w") as table:
        for file in files:
            tree, found = mutants(file)
            changes = {f"{file.name} {m.text}" for m in found}
            for key in excused:
                if key.startswith(f"{file.name} ") and key not in changes:
                    print(f"{EQUIVALENTS.name}: no such change any more: {key}")
            counted = [m for m in found if f"{file.name} {m.text}" not in excused]
            chosen = [m for m in counted if options.match in m.text]
            if options.sample and len(chosen) > options.sample:
                chosen = random.Random(f"{options.seed}{file.name}").sample(chosen, options.sample)
            counts[file.name] = len(found), len(found) - len(counted)
            if known is None:
                print(f"{file.name:22} {len(found):5} {len(found) - len(counted):5}")
            else:
                hunts.append(Hunt(file, tree, chosen, known, Path(folder), options.jobs))

        def report(hunt: Hunt, left: Sequence[Mutant]) -> None:
            for mutant in left:
                print(f"{hunt.file.name}:{mutant.lines[0]} {mutant.text}", file=table, flush=True)

        if known is not None:
            sys.stdout.flush()
            hunt_all(hunts, report)
            _print_table(hunts, counts)


def _print_table(hunts: Sequence[Hunt], counts: Mapping[str, tuple[int, int]]) -> None:
    print(f"{'file':22} {'all':>5} {'equal':>5} {'run':>5} {'killed':>6} {'left':>5} {'score':>7}")
    total = collections.Counter[str]()
    for hunt in hunts:
        name, run = hunt.file.name, len(hunt.mutants)
        row = dict(zip(COLUMNS, (*counts[name], run, run - len(hunt.indices)), strict=True))
        total.update(row)
        print(_row(name, **row))
    print(_row("total", **total))


def _row(name: str, count: int, equal: int, run: int, killed: int) -> str:
    low, high = interval(killed, run)
    share = killed / run if run else 1.0
    return (
        f"{name:22} {count:5} {equal:5} {run:5} {killed:6} {run - killed:5} {share:7.1%}"
        f"  ({low:.1%} .. {high:.1%})"
    )


if __name__ == "__main__":
    main()
