"""Runs the tests that execute a changed line, until one notices."""

from __future__ import annotations

import ast
import collections
import functools
import gc
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import CodeType, FunctionType

import pytest

from tests.mutation.changes import Mutant
from tests.mutation.survey import (
    BROKEN,
    OPTIONS,
    TESTS,
    Collected,
    Survey,
    in_child,
    load_instead,
    passes_alone,
    start_child,
    status_of,
)

# A mutant may take this many seconds of CPU time, and this many times what its tests take,
# before it counts as stuck, which counts as noticed.
PATIENCE, FACTOR = 10, 3
# Seconds of tests a mutant meets at most; one that only later tests would notice counts as left.
BUDGET = 10.0
# Lines before and after a change whose tests come first.
NEAR = 10
# Files of tests that are tried one at a time where a mutant must be imported.
ALONE = 5

_Functions = Mapping[tuple[str, int], Sequence[FunctionType]]


class Chosen:
    """A pytest plugin: only these tests, in this order; the one that fails is written down."""

    def __init__(self, order: list[str], killer: Path) -> None:
        self.order = order
        self.killer = killer

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        known = {item.nodeid: item for item in items}
        items[:] = [known[name] for name in self.order]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.killer.write_text(report.nodeid)


def hunt_all(hunts: Sequence[Hunt], report: Callable[[Hunt, Sequence[Mutant]], None]) -> None:
    """Try all mutants of every hunt; `report` what survives as soon as it is known.

    Raises:
        SystemExit: a process failed.
    """

    def work(items: Mapping[str, pytest.Item]) -> None:
        for hunt in hunts:
            hunt.in_place(items)
            report(hunt, hunt.left)
            hunt.kept.write_text(json.dumps((hunt.indices, hunt.outside)))

    if in_child(lambda: int(pytest.main([*OPTIONS, TESTS], plugins=[Collected(work)]))):
        raise SystemExit("the hunt broke off")
    for hunt in hunts:
        indices, hunt.outside = json.loads(hunt.kept.read_text())
        hunt.at_import()
        report(hunt, hunt.left)
        hunt.indices += indices


class Hunt:
    """Finds the mutants of one file no test notices, and learns which tests notice most.

    Args:
        file: in passes/.
        tree: of it.
        mutants: to try.
        survey: what tests execute.
        folder: for results.
        jobs: processes at once.

    Attributes:
        indices: of the mutants nothing has noticed so far.
        inside: of those that change functions.
        outside: of those that change what runs at import.
        killers: the tests that noticed one in this process.
        lines: in the file, and one.
        often: how many tests run each line.
    """

    def __init__(
        self,
        file: Path,
        tree: ast.Module,
        mutants: Sequence[Mutant],
        survey: Survey,
        folder: Path,
        jobs: int,
    ) -> None:
        self.file = file
        self.tree = tree
        self.mutants = mutants
        self.survey = survey
        self.folder = folder
        self.jobs = jobs
        self.kept = folder / f"{file.name}.json"
        self.indices: list[int] = []
        self.inside: list[int] = []
        self.outside: list[int] = []
        self.log = folder / f"{file.name}.log"
        self.log.touch()
        self.killers: set[str] = set()
        lines = (trial.lines.get(file.name, ()) for trial in survey.trials.values())
        self.lines = len(file.read_text(encoding="utf-8").splitlines()) + 1
        self.often = collections.Counter(itertools.chain.from_iterable(lines))

    @property
    def kills(self) -> collections.Counter[str]:
        """How often the tests of each function noticed a mutant, in any process so far."""
        return collections.Counter(self.log.read_text().splitlines())

    @property
    def left(self) -> list[Mutant]:
        return [self.mutants[index] for index in self.indices]

    @property
    def killer(self) -> Path:
        """Where this process finds the test that noticed a mutant."""
        return self.folder / f"killer_{self.worker}"

    def in_place(self, items: Mapping[str, pytest.Item]) -> None:
        """Try changes of functions imported already on tests collected already."""
        imported = self.survey.imported.get(self.file.name, frozenset())
        for index, mutant in enumerate(self.mutants):
            (self.inside if imported.isdisjoint(mutant.lines) else self.outside).append(index)
        survives = functools.partial(self._survives_in_place, items, _functions(self.file))
        self._share(self.inside, survives, lambda: self._stands(items))

    def at_import(self) -> None:
        """Try the changes that must be there when the module is imported."""
        self._share(self.outside, self._survives_import, lambda: True)

    def _share(
        self,
        chosen: Sequence[int],
        survives: Callable[[Mutant], bool | None],
        stands: Callable[[], bool],
    ) -> None:
        """Deal mutants out to processes, and gather what survives and which tests noticed.

        Args:
            chosen: indices of the mutants.
            survives: None where it cannot be tried this way.
            stands: whether the tests that noticed something pass on the unchanged file.

        Raises:
            SystemExit: a process failed, or its tests do not stand.
        """
        jobs = min(self.jobs, len(chosen))

        def hunt(worker: int) -> int:
            self.worker = worker
            found = [(index, survives(self.mutants[index])) for index in chosen[worker::jobs]]
            self._result(worker).write_text(json.dumps(found))
            return int(not stands())

        children = [start_child(functools.partial(hunt, worker)) for worker in range(jobs)]
        statuses = [status_of(child) for child in children]
        if any(statuses):
            raise SystemExit(f"the hunt in {self.file.name} broke off")
        for worker in range(jobs):
            found = json.loads(self._result(worker).read_text())
            self.indices += [index for index, survived in found if survived]
            self.outside += [index for index, survived in found if survived is None]
        self.indices.sort()

    def _result(self, worker: int) -> Path:
        return self.folder / f"left_{worker}"

    def _survives_import(self, mutant: Mutant) -> bool:
        """Whether the tests pass where the module is imported with the change.

        Collecting all tests takes longest, so those of a few files come first, one file at a time.
        """
        direct = [n for n, trial in self.survey.trials.items() if self.file.name in trial.lines]
        files = collections.defaultdict(list)
        for name in self._order(direct, range(self.lines)):
            files[name.split("::")[0]].append(name)
        code = mutant.code(self.tree)

        def run(part: list[str]) -> int:
            load_instead({self.file: code})
            given = dict.fromkeys(name.split("::")[0] for name in part)
            return int(pytest.main([*OPTIONS, *given], plugins=[Chosen(part, self.killer)]))

        parts = [*files.values()]
        rest = list(itertools.chain.from_iterable(parts[ALONE:]))
        return all(
            self._status(functools.partial(run, part), part) == 0
            for part in (*parts[:ALONE], rest)
            if part
        )

    def _survives_in_place(
        self, items: Mapping[str, pytest.Item], live: _Functions, mutant: Mutant
    ) -> bool | None:
        """Whether the tests pass where functions imported already have the change."""
        direct = [
            name
            for name, trial in self.survey.trials.items()
            if trial.runs(self.file.name, mutant.lines)
        ]
        near = range(mutant.lines.start - NEAR, mutant.lines.stop + NEAR)
        order = self._order(direct, near)
        code = mutant.code()
        changed = [(function, part) for key, part in _walk(code) for function in live.get(key, ())]
        if any(function.__code__.co_freevars != part.co_freevars for function, part in changed):
            return None  # a function keeps the closure it was made with
        work = functools.partial(self._run, [items[name] for name in order], changed)
        return not order or self._status(work, order) == 0

    def _stands(self, items: Mapping[str, pytest.Item]) -> bool:
        """Whether all tests that noticed something pass one after another on the file as it is."""
        tests = [item for name, item in items.items() if name in self.killers]
        return in_child(functools.partial(self._run, tests, [])) == 0

    def _run(
        self, tests: Sequence[pytest.Item], changed: Sequence[tuple[FunctionType, CodeType]]
    ) -> int:
        """1 if a test fails where these functions have this code."""
        for function, code in changed:
            function.__code__ = code
        for test in tests:
            if not passes_alone(test):
                self.killer.write_text(test.nodeid)
                return 1
        return 0

    def _status(self, work: Callable[[], int], order: Sequence[str]) -> int:
        limit = PATIENCE + FACTOR * sum(self.survey.trials[name].seconds for name in order)
        self.killer.write_text("")
        status = in_child(work, limit)
        if status == BROKEN:
            raise SystemExit(f"the hunt in {self.file.name} is broken")
        killer = self.killer.read_text()
        if status and killer:
            self.killers.add(killer)
            with self.log.open("a") as log:
                log.write(f"{_function(killer)}\n")
        return status

    def _order(self, names: Sequence[str], near: range) -> list[str]:
        """First the quick tests of little else that notice most and run those of the lines `near`
        few others do; those named after the file count ten times.
        """
        kills, own = self.kills, f"/test_{self.file.name}"

        def cost(name: str) -> float:
            trial = self.survey.trials[name]
            run = trial.lines.get(self.file.name, frozenset())
            rare = sum(1 / self.often[line] for line in run.intersection(near))
            breadth = sum(map(len, trial.lines.values()))
            worth = (1e-3 + rare) * (1 + kills[_function(name)]) * (10 if own in name else 1)
            return trial.seconds * breadth / worth

        order, seconds = [], 0.0
        for name in sorted(names, key=cost):
            seconds += self.survey.trials[name].seconds
            if seconds <= BUDGET:
                order.append(name)
        return order


def _walk(code: CodeType) -> Iterator[tuple[tuple[str, int], CodeType]]:
    """Every code object in another, outer ones first, with its name and first line."""
    for part in code.co_consts:
        if isinstance(part, CodeType):
            yield (part.co_qualname, part.co_firstlineno), part
            yield from _walk(part)


def _functions(file: Path) -> _Functions:
    """The functions made from a file, by name and first line."""
    found = collections.defaultdict(list)
    for thing in gc.get_objects():
        if type(thing) is FunctionType:
            code = thing.__code__
            if code.co_name != "<lambda>" and os.path.realpath(code.co_filename) == str(file):
                found[code.co_qualname, code.co_firstlineno].append(thing)
    return dict(found)


def _function(test: str) -> str:
    """The test without its parameters."""
    return test.partition("[")[0]
