"""What each test executes of passes/ and how long it takes, kept between runs."""

from __future__ import annotations

import ast
import builtins
import collections
import dataclasses
import difflib
import functools
import hashlib
import importlib.machinery
import json
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
from _pytest.runner import runtestprotocol

ROOT = Path(__file__).resolve().parents[2]
PASSES = ROOT / "passes"
TESTS = "tests/passes"
OPTIONS = (
    "-x", "-q", "--assert=plain", "--hypothesis-profile=mutation", "-p", "no:cacheprovider",
    "-m", "not (kernel or model or serving or cuda)",
)  # fmt: skip
_TERMINAL = os.dup(2)
# Exit status of a child whose own machinery failed, not a test.
BROKEN = 70


@dataclasses.dataclass(frozen=True)
class Trial:
    """What one test executes of passes/: seconds of CPU time, and lines by file name."""

    seconds: float
    lines: Mapping[str, frozenset[int]]

    def runs(self, file: str, lines: Iterable[int]) -> bool:
        return not self.lines.get(file, frozenset()).isdisjoint(lines)


@dataclasses.dataclass(frozen=True)
class Survey:
    """What all tests execute.

    Attributes:
        imported: lines that run when tests are collected, by file name.
        trials: of each test that passes.
        failing: the tests that do not.
    """

    imported: Mapping[str, frozenset[int]]
    trials: Mapping[str, Trial]
    failing: tuple[str, ...]


class Collected:
    """A pytest plugin: does `work` with the collected tests instead of running them."""

    def __init__(self, work: Callable[[dict[str, pytest.Item]], None]) -> None:
        self.work = work

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        try:
            self.work({item.nodeid: item for item in session.items})
        except BaseException:  # pytest would tell nobody here
            os.write(_TERMINAL, traceback.format_exc().encode())
            raise
        return True


def passes_alone(item: pytest.Item) -> bool:
    reports = runtestprotocol(item, log=False, nextitem=None)
    return not any(report.failed for report in reports)


def in_child(work: Callable[[], int], limit: float | None = None) -> int:
    """Exit status of `work` in a forked child, negative where a signal ended it.

    Args:
        work: returns the status; BROKEN stands for an exception.
        limit: seconds of CPU time it may take.
    """
    return status_of(start_child(work, limit))


def status_of(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def start_child(work: Callable[[], int], limit: float | None = None) -> int:
    """The process id of the child; arguments as in `in_child`."""
    child = os.fork()
    if child == 0:
        status = BROKEN
        try:
            if limit is not None:
                signal.setitimer(signal.ITIMER_PROF, limit)  # the signal ends the process
            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, 1)
            os.dup2(silent, 2)
            status = work()
        except BaseException:
            os.write(_TERMINAL, traceback.format_exc().encode())
        finally:
            os._exit(status)
    return child


def load_instead(codes: Mapping[Path, CodeType]) -> None:
    """Give these files' modules this code when they are imported."""
    loader = importlib.machinery.SourceFileLoader
    original = loader.get_code

    def get_code(self: importlib.machinery.SourceFileLoader, fullname: str) -> CodeType | None:
        return codes.get(Path(os.path.realpath(self.path))) or original(self, fullname)

    loader.get_code = get_code  # type: ignore[method-assign, assignment]


def survey(kept: Path, jobs: int) -> Survey:
    """What tests execute; `kept` has it from an earlier run.

    Tests that are new or whose file has changed are run, of others the lines are followed through
    the changes of passes/. It only decides which tests a mutant meets: where it is out of date a
    mutant is left that a test might have noticed, never the reverse.
    """
    old: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    sources, digests = _sources(), _digests()
    if old.get("sources") != sources or old.get("digests") != digests:
        known = {
            name: (seconds, _followed(lines, old["sources"], sources))
            for name, (seconds, lines) in old.get("trials", {}).items()
            if (file := name.split("::")[0]) and old["digests"].get(file) == digests.get(file)
        }
        kept.parent.mkdir(parents=True, exist_ok=True)
        new = kept.with_suffix(".new")
        new.unlink(missing_ok=True)
        in_child(functools.partial(_look, new, known, jobs))
        if not new.exists():
            raise SystemExit(f"the tests cannot be collected: pytest {TESTS}")
        old = {**json.loads(new.read_text()), "sources": sources, "digests": digests}
        new.write_text(json.dumps(old))
        new.replace(kept)
    trials = {name: Trial(s, _sets(lines)) for name, (s, lines) in old["trials"].items()}
    return Survey(_sets(old["imported"]), trials, tuple(old["failing"]))


def _sources() -> dict[str, str]:
    return {file.name: file.read_text(encoding="utf-8") for file in sorted(PASSES.glob("*.py"))}


def _digests() -> dict[str, str]:
    """Of every file of tests, by its path in the tree."""
    return {
        str(file.relative_to(ROOT)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(ROOT.joinpath(TESTS).glob("*.py"))
    }


def _followed(
    lines: Mapping[str, list[int]], before: Mapping[str, str], after: Mapping[str, str]
) -> dict[str, list[int]]:
    """Lines by file name, where they are now; a rewritten stretch counts as run as a whole."""
    return {
        file: numbers
        if before[file] == after[file]
        else _moved(frozenset(numbers), before[file], after[file])
        for file, numbers in lines.items()
        if file in after
    }


def _moved(lines: frozenset[int], before: str, after: str) -> list[int]:
    new = set()
    for tag, old_start, old_end, start, end in _changes(before, after):
        if tag == "equal":
            new |= {line - old_start + start for line in lines if old_start < line <= old_end}
        elif not lines.isdisjoint(range(old_start, old_end + 2)):
            new |= set(range(start + 1, end + 1))
    return sorted(new)


@functools.cache
def _changes(before: str, after: str) -> list[tuple[str, int, int, int, int]]:
    matcher = difflib.SequenceMatcher(None, before.splitlines(), after.splitlines(), False)
    return matcher.get_opcodes()


def _look(result: Path, known: Mapping[str, Any], jobs: int) -> int:
    """Run every test that is not known, each alone in a forked child, and write down all."""
    ran: set[tuple[str, int]] = set()
    builtins.ran_lines = ran  # type: ignore[attr-defined]
    load_instead({file: probed(file) for file in PASSES.glob("*.py")})

    def look(names: Sequence[str], items: Mapping[str, pytest.Item], part: Path) -> int:
        trials, failing = {}, []
        for name in names:
            one = part.with_suffix(f"{part.suffix}.one")
            if in_child(functools.partial(_try, items[name], ran, one)) == 0:
                trials[name] = json.loads(one.read_text())
                one.unlink()
            else:
                failing.append(name)
        part.write_text(json.dumps((trials, failing)))
        return 0

    def work(items: dict[str, pytest.Item]) -> None:
        imported = _lists(ran)
        new = [name for name in items if name not in known]
        parts = [result.with_suffix(f".part{index}") for index in range(jobs)]
        children = [
            start_child(functools.partial(look, new[index::jobs], items, part))
            for index, part in enumerate(parts)
        ]
        if any([status_of(child) for child in children]):  # noqa: C419 -- waits for all
            raise SystemExit("the survey broke off")
        trials = {name: known[name] for name in items if name in known}
        failing = []
        for part in parts:
            found, failed = json.loads(part.read_text())
            trials.update(found)
            failing += failed
            part.unlink()
        result.write_text(json.dumps({"imported": imported, "trials": trials, "failing": failing}))

    return int(pytest.main([*OPTIONS, TESTS], plugins=[Collected(work)]))


def _try(item: pytest.Item, ran: set[tuple[str, int]], result: Path) -> int:
    ran.clear()
    start = time.process_time()
    good = passes_alone(item)
    result.write_text(json.dumps((time.process_time() - start, _lists(ran))))
    return int(not good)


def probed(file: Path) -> CodeType:
    """The file, noting in `builtins.ran_lines` each statement that runs."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        for field in ("body", "orelse", "finalbody"):
            statements = getattr(node, field, None)
            if isinstance(statements, list):
                setattr(node, field, [part for s in statements for part in _noted(file.name, s)])
    return compile(ast.fix_missing_locations(tree), str(file), "exec")


def _noted(file: str, statement: ast.stmt) -> list[ast.stmt]:
    future = isinstance(statement, ast.ImportFrom) and statement.module == "__future__"
    documentation = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    if future or documentation:
        return [statement]
    return [*ast.parse(f"ran_lines.add(({file!r}, {statement.lineno}))").body, statement]


def _lists(ran: Iterable[tuple[str, int]]) -> dict[str, list[int]]:
    found = collections.defaultdict(list)
    for file, line in sorted(ran):
        found[file].append(line)
    return dict(found)


def _sets(lines: Mapping[str, Iterable[int]]) -> dict[str, frozenset[int]]:
    return {file: frozenset(numbers) for file, numbers in lines.items()}
