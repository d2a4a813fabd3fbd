"""Mutation testing of passes/: one small change at a time, and whether a test notices.

`python -m tests.mutation [--sample N] [FILE ...]` prints a table per file and every survivor.

Each test runs once to learn its time and the lines it executes. Then every mutant gets a forked
child of a process that has the heavy packages loaded already: it imports the changed module,
runs the tests that execute the changed line, quickest and most successful first, and stops at
the first that fails. Mutants nothing can tell from the original stand in
mutation_equivalents.txt, each with its reason, and are not counted.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import collections
import copy
import dataclasses
import functools
import importlib.machinery
import math
import os
import pickle
import random
import signal
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import CodeType
from typing import Any

import hypothesis
import onnx.backend.test.case.node
import onnx.reference
import onnx_ir.passes.common
import onnxruntime
import pytest
from _pytest.runner import runtestprotocol

ROOT = Path(__file__).resolve().parent.parent
PASSES = ROOT / "passes"
TESTS = "tests/passes"
EQUIVALENTS = Path(__file__).with_name("mutation_equivalents.txt")
OPTIONS = (
    "-x", "-q", "--assert=plain", "--hypothesis-profile=mutation", "-p", "no:cacheprovider",
    "-m", "not (kernel or model or serving or cuda)",
)  # fmt: skip
# A mutant may take this many seconds, and this many times what its tests take, before it counts
# as stuck, which counts as noticed.
PATIENCE, FACTOR = 10, 3
# Seconds of tests a mutant meets at most; one that only later tests would notice counts as left.
BUDGET = 30.0

# Heavy packages, imported here so that no child has to.
WARM = (onnx.reference, onnx_ir.passes.common, onnxruntime)

hypothesis.settings.register_profile(
    "mutation", phases=[hypothesis.Phase.generate], report_multiple_bugs=False, database=None
)
# Collected once, before there are children: it takes seconds.
onnx.backend.test.case.node.collect_testcases = functools.cache(
    onnx.backend.test.case.node.collect_testcases
)

COMPARE: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.LShift: ast.RShift,
    ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr,
}  # fmt: skip
CALLS = {"any": "all", "all": "any", "min": "max", "max": "min"}
# Calls whose arguments are alternatives: each may be left out.
ALTERNATIVES = {"one_of"}
# Where the words for the user stand: position of the argument, or of all from there on.
WORDS = {"Refusal": 2, "record": 3, "Problem": 0, "BadInput": 0, "GraphInvalid": 0}


@dataclasses.dataclass
class Mutant:
    """One change: `holder[key]` or `holder.key` becomes `replacement`.

    Attributes:
        file: name of the file in passes/.
        lines: of the statement it is in.
        text: the function and the change.
    """

    file: str
    lines: range
    text: str
    holder: Any
    key: str | int
    replacement: ast.AST

    def code(self, tree: ast.Module) -> CodeType:
        old = _swap(self.holder, self.key, ast.copy_location(self.replacement, self.old))
        try:
            return compile(ast.fix_missing_locations(tree), str(PASSES / self.file), "exec")
        finally:
            _swap(self.holder, self.key, old)

    @property
    def old(self) -> ast.AST:
        return (
            self.holder[self.key] if isinstance(self.key, int) else getattr(self.holder, self.key)
        )


def _swap(holder: Any, key: str | int, new: ast.AST) -> ast.AST:
    if isinstance(key, int):
        old, holder[key] = holder[key], new
    else:
        old = getattr(holder, key)
        setattr(holder, key, new)
    return old


def _changed(node: Any, **fields: Any) -> Any:
    new = copy.copy(node)
    for name, value in fields.items():
        setattr(new, name, value)
    return new


def replacements(node: ast.AST) -> Iterator[ast.AST]:
    """What can stand in the place of a node."""
    match node:
        case ast.Compare():
            for index, operator in enumerate(node.ops):
                ops = [*node.ops]
                ops[index] = COMPARE[type(operator)]()
                yield _changed(node, ops=ops)
        case ast.BoolOp():
            for index in range(len(node.values)):
                rest = node.values[:index] + node.values[index + 1 :]
                yield _changed(node, values=rest) if len(rest) > 1 else rest[0]
            yield _changed(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield node.operand
        case ast.BinOp() if type(node.op) in ARITHMETIC:
            yield _changed(node, op=ARITHMETIC[type(node.op)]())
        case ast.Constant():
            yield from map(ast.Constant, _other_constants(node.value))
        case ast.Call(func=ast.Name(id=name)) if name in CALLS:
            yield _changed(node, func=ast.Name(CALLS[name], ast.Load()))
        case ast.Call(func=ast.Name(id=name)) if name in ALTERNATIVES:
            for index in range(len(node.args)):
                yield _changed(node, args=node.args[:index] + node.args[index + 1 :])
        case ast.If() | ast.IfExp():
            for forced in (True, False):
                yield _changed(node, test=ast.Constant(forced))
        case ast.While():
            yield _changed(node, test=ast.Constant(False))
        case ast.comprehension(ifs=[_, *_]):
            yield _changed(node, ifs=[])
        case ast.Return(value=ast.expr() as value):
            if not (isinstance(value, ast.Constant) and value.value is None):
                yield ast.Return(ast.Constant(None))
        case ast.Expr() | ast.AugAssign() | ast.Raise() | ast.Continue() | ast.Break():
            yield ast.Pass()
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript(), *_]) | ast.Delete():
            yield ast.Pass()


def _other_constants(value: object) -> Iterator[bool | int | float | str]:
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield value + 1
    elif isinstance(value, float):
        yield value * 2 + 1
    elif isinstance(value, str):
        words = value.split()
        if len(words) > 2:  # a table of names
            yield from (" ".join(words[:i] + words[i + 1 :]) for i in range(len(words)))
        else:
            yield f"{value}_"


def _children(node: ast.AST) -> Iterator[tuple[Any, str | int, ast.AST]]:
    """(holder, key, child) of what a node computes with: no types, no words for the user."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        if isinstance(value, ast.AST):
            yield node, name, value
        elif isinstance(value, list):
            known = [child for child in value if isinstance(child, ast.AST)]
            if isinstance(node, ast.Call) and name == "args":
                called = ast.unparse(node.func).split(".")[-1]
                known = known[: WORDS.get(called)]
            for index, child in enumerate(known):
                yield value, index, child


def _says_nothing(node: ast.AST) -> bool:
    """Whether a node is documentation, a check of types, or words for the user."""
    match node:
        case ast.JoinedStr() | ast.Assert() | ast.Import() | ast.ImportFrom():
            return True
        case ast.Expr(value=ast.Constant()):
            return True
        case ast.Assign(targets=[target], value=value):
            alias = isinstance(value, ast.Subscript) and ast.unparse(value.value) == "Callable"
            return alias or ast.unparse(target) in ("detail", "__all__")
        case ast.If(body=[ast.Raise(exc=ast.Call(func=ast.Name(id="ImportError")))]):
            return True
    return False


def mutants(file: Path) -> tuple[ast.Module, list[Mutant]]:
    """The file's tree and every change to it, in the order of the source."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found: list[Mutant] = []
    counts: collections.Counter[str] = collections.Counter()

    def visit(holder: Any, key: str | int, node: ast.AST, around: list[ast.AST]) -> None:
        if _says_nothing(node):
            return
        for new in replacements(node):
            text = _describe(node, new, around)
            counts[text] += 1
            if counts[text] > 1:
                text = f"{text} #{counts[text]}"
            found.append(Mutant(file.name, _lines([*around, node]), text, holder, key, new))
        for inner, name, child in _children(node):
            visit(inner, name, child, [*around, node])

    visit(None, "", tree, [])
    return tree, found


def _describe(node: ast.AST, new: ast.AST, around: list[ast.AST]) -> str:
    scope = ".".join(
        part.name for part in around if isinstance(part, ast.FunctionDef | ast.ClassDef)
    )
    if isinstance(node, ast.Constant):  # a number alone says little: show what it is part of
        whole = around[-1]
        before = _short(whole)
        if isinstance(node.value, str) and len(node.value.split()) > 2:
            (gone,) = set(node.value.split()) - set(new.value.split()) or {"?"}  # type: ignore[attr-defined]
            return f"{scope}: without {gone}"
        return f"{scope}: {before}: {node.value!r} -> {new.value!r}"  # type: ignore[attr-defined]
    if isinstance(node, ast.If | ast.While):
        return f"{scope}: if {_short(node.test)} -> {_short(new.test)}"  # type: ignore[attr-defined]
    return f"{scope}: {_short(node)} -> {_short(new)}"


def _short(node: ast.AST) -> str:
    if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.arguments | ast.Module):
        return getattr(node, "name", "arguments")
    if isinstance(node, ast.comprehension):
        node = ast.Tuple([node.target, node.iter, *node.ifs], ast.Load())
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= 160 else f"{text[:120]}...{text[-37:]}"


def _lines(path: list[ast.AST]) -> range:
    """The lines of the innermost statement; of a compound one, those before its body."""
    statement = next(node for node in reversed(path) if isinstance(node, ast.stmt))
    body = getattr(statement, "body", None)
    last = statement.end_lineno or statement.lineno
    if isinstance(body, list) and body:
        last = max(statement.lineno, body[0].lineno - 1)
    return range(statement.lineno, last + 1)


@dataclasses.dataclass(frozen=True)
class Trial:
    """What one test executes of passes/ and how long it takes."""

    seconds: float
    lines: frozenset[tuple[str, int]]


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


def load_instead(codes: Mapping[Path, CodeType]) -> None:
    """Give these files' modules this code when they are imported."""
    loader = importlib.machinery.SourceFileLoader
    original = loader.get_code

    def get_code(self: importlib.machinery.SourceFileLoader, fullname: str) -> CodeType | None:
        return codes.get(Path(os.path.realpath(self.path))) or original(self, fullname)

    loader.get_code = get_code  # type: ignore[method-assign, assignment]


class Survey:
    """A pytest plugin: every test alone in a forked child, timed, its lines noted."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.ran: set[tuple[str, int]] = set()

    def pytest_collection(self) -> None:
        builtins.ran_lines = self.ran  # type: ignore[attr-defined]
        load_instead({file: probed(file) for file in PASSES.glob("*.py")})

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        imported = frozenset(self.ran)
        trials: dict[str, Trial] = {}
        failing: list[str] = []
        for item in session.items:
            result = self.file.with_suffix(".one")
            if _in_child(functools.partial(self._one, item, result), None) == 0:
                trials[item.nodeid] = pickle.loads(result.read_bytes())
            else:
                failing.append(item.nodeid)
        self.file.write_bytes(pickle.dumps((imported, trials, failing)))
        return True

    def _one(self, item: pytest.Item, result: Path) -> int:
        self.ran.clear()
        start = time.perf_counter()
        reports = runtestprotocol(item, log=False, nextitem=None)
        seconds = time.perf_counter() - start
        result.write_bytes(pickle.dumps(Trial(seconds, frozenset(self.ran))))
        return int(any(report.failed for report in reports))


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


def _in_child(work: Callable[[], int], limit: float | None) -> int:
    """Exit status of `work` in a forked child, negative where a signal ended it."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if limit is not None:
                signal.alarm(math.ceil(limit))  # its default action ends the process
            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, 1)
            os.dup2(silent, 2)
            status = work()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def survey(result: Path) -> tuple[frozenset[tuple[str, int]], dict[str, Trial]]:
    """The lines that run at import, and what each test runs; read from `result` if it is there."""
    if not result.exists():
        arguments = [*OPTIONS, TESTS]
        _in_child(lambda: int(pytest.main(arguments, plugins=[Survey(result)])), None)
    if not result.exists():
        raise SystemExit(f"the tests cannot be collected: pytest {TESTS}")
    imported, trials, failing = pickle.loads(result.read_bytes())
    for name in failing:
        print(f"left out, it fails without any mutant: {name}")
    return imported, trials


class Hunt:
    """Runs mutants and learns which tests notice them."""

    def __init__(self, folder: Path, known: Path | None) -> None:
        self.killer = folder / "killer"
        self.imported, self.trials = survey(known or folder / "survey")
        self.kills: collections.Counter[tuple[str, str]] = collections.Counter()

    def survives(self, mutant: Mutant, tree: ast.Module) -> bool:
        order = self._order(mutant.file, mutant.lines)
        return self._pass(mutant.file, mutant.code(tree), order)

    def check(self, file: Path, tree: ast.Module) -> None:
        """The unchanged file must pass, or every change would count as noticed."""
        order = self._order(file.name, range(len(file.read_text(encoding="utf-8").splitlines())))
        if not self._pass(file.name, compile(tree, str(file), "exec"), order):
            raise SystemExit(f"{file.name} as it is fails {self.killer.read_text()}")

    def _pass(self, file: str, code: CodeType, order: list[str]) -> bool:
        """Whether the tests pass with this code in the place of the file's."""
        if not order:
            return True
        limit = PATIENCE + FACTOR * sum(self.trials[name].seconds for name in order)
        self.killer.write_text("")
        status = _in_child(lambda: self._run(PASSES / file, code, order), limit)
        self.kills[file, _function(self.killer.read_text())] += 1
        return status == 0

    def _order(self, file: str, lines: range) -> list[str]:
        """The tests that execute the lines, or any if they run at import: the best ones first."""
        spots = {(file, line) for line in lines}
        at_import = bool(spots & self.imported)
        direct = {name for name, trial in self.trials.items() if spots & trial.lines}

        def cost(name: str) -> float:
            trial, kills = self.trials[name], self.kills[file, _function(name)]
            return trial.seconds * (1 if name in direct else 30) / (1 + kills)

        order, seconds = [], 0.0
        for name in sorted(self.trials if at_import else direct, key=cost):
            seconds += self.trials[name].seconds
            if seconds <= BUDGET:
                order.append(name)
        return order

    def _run(self, file: Path, code: CodeType, order: list[str]) -> int:
        load_instead({file: code})
        files = dict.fromkeys(name.split("::")[0] for name in order)
        return int(pytest.main([*OPTIONS, *files], plugins=[Chosen(order, self.killer)]))


def _function(test: str) -> str:
    """The test without its parameters."""
    return test.partition("[")[0]


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
    if not EQUIVALENTS.exists():
        return {}
    lines = EQUIVALENTS.read_text(encoding="utf-8").splitlines()
    pairs = [line.rsplit(" | ", 1) for line in lines if line and not line.startswith("#")]
    return {key.strip(): reason.strip() for key, reason in pairs}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("files", nargs="*", help="names in passes/, by default all")
    parser.add_argument("--sample", type=int, help="this many mutants of a file, at random")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--match", default="", help="only mutants whose text holds this")
    parser.add_argument("--survey", type=Path, help="keeps what tests execute between runs")
    parser.add_argument("--list", action="store_true", help="count the mutants, run none")
    options = parser.parse_args()
    files = [PASSES / name for name in options.files] or sorted(PASSES.glob("*.py"))
    excused = equivalents()
    os.chdir(ROOT)
    with warnings.catch_warnings(action="ignore"):
        onnx.backend.test.case.node.collect_testcases(None)
    print(f"{'file':22} {'all':>5} {'run':>5} {'killed':>6} {'left':>5} {'score':>7}  95 %")
    everything = [0, 0]
    with tempfile.TemporaryDirectory() as folder:
        hunt = None if options.list else Hunt(Path(folder), options.survey)
        for file in files:
            tree, found = mutants(file)
            chosen = [m for m in found if options.match in m.text]
            chosen = [m for m in chosen if f"{m.file} {m.text}" not in excused]
            count = len(chosen)
            if options.sample and count > options.sample:
                chosen = random.Random(f"{options.seed}{file.name}").sample(chosen, options.sample)
            if hunt is None:
                print(f"{file.name:22} {count:5}")
                everything[1] += count
                continue
            hunt.check(file, tree)
            left = [mutant for mutant in chosen if hunt.survives(mutant, tree)]
            # Once more: by now it is known which tests notice most.
            left = [mutant for mutant in left if hunt.survives(mutant, tree)]
            killed = len(chosen) - len(left)
            everything[0] += killed
            everything[1] += len(chosen)
            _row(file.name, count, killed, len(chosen))
            for mutant in left:
                print(f"    {mutant.file}:{mutant.lines[0]} {mutant.text}", flush=True)
    _row("total", everything[1], *everything)


def _row(name: str, count: int, killed: int, run: int) -> None:
    low, high = interval(killed, run)
    share = killed / run if run else 1.0
    print(
        f"{name:22} {count:5} {run:5} {killed:6} {run - killed:5} {share:7.1%}"
        f"  {low:.1%} .. {high:.1%}",
        flush=True,
    )


if __name__ == "__main__":
    main()
