"""The small changes mutation testing makes to a file, one at a time."""

from __future__ import annotations

import ast
import collections
import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import Any

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
WORDS = {"Refusal": 2, "Refused": 2, "refuse": 2, "_refuse": 2}
WORDS |= {"record": 3, "Problem": 0, "BadInput": 0, "GraphInvalid": 0}


@dataclasses.dataclass
class Mutant:
    """One change: `holder[key]` or `holder.key` becomes `replacement`.

    Attributes:
        path: of the file.
        lines: of the statement it is in.
        text: the function and the change.
        outermost: the statement of the module it is in.
    """

    path: str
    lines: range
    text: str
    holder: Any
    key: str | int
    replacement: ast.AST
    outermost: ast.stmt

    def code(self, tree: ast.Module | None = None) -> CodeType:
        """The changed module's, or that of the changed statement of the module alone."""
        tree = tree or ast.Module([self.outermost], [])
        old = _swap(self.holder, self.key, ast.copy_location(self.replacement, self.old))
        try:
            return compile(ast.fix_missing_locations(tree), self.path, "exec")
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
            # False and None are one to whoever asks for a truth.
            if ast.unparse(value) not in ("None", "False"):
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
            end = None
            if isinstance(node, ast.Call) and name == "args":
                end = WORDS.get(ast.unparse(node.func).split(".")[-1])
            for index, child in enumerate(value[:end]):
                if isinstance(child, ast.AST):  # not the key of a dict taken in whole
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
        case ast.keyword(arg="strict" | "safe", value=ast.Constant(True)):
            return True  # like assert, for what is known to hold
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
            path = [*around, node]
            found.append(Mutant(str(file), _lines(path), text, holder, key, new, path[1]))
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
