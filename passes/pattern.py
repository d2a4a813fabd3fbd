"""The matcher: patterns are algebra, a match is a set of bindings, a failure has a node.

A pattern can do two things: `match` a value of a graph, yielding every way it fits, and
`spell` itself into a graph, one graph for every sequence of choices. The tests of a rule are
its own spellings.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from fusenorm.ops.spec import DTYPES, DType
from fusenorm.passes import facts
from fusenorm.passes.speller import Speller

__all__ = [
    "Casted",
    "Const",
    "Joined",
    "Miss",
    "Named",
    "OneOf",
    "Op",
    "Pattern",
    "Reduce",
    "Refusal",
    "Scalar",
    "Speller",
    "State",
    "Var",
    "Width",
    "matches",
    "node_name",
]

COMMUTATIVE = frozenset({"Add", "Mul"})


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why a site was left alone: a stable code, the node, and words a user can act on."""

    code: str
    node: str
    detail: str


@dataclasses.dataclass(frozen=True)
class State:
    """A partial match: what is bound, which nodes were used, how many axes are reduced."""

    bindings: Mapping[str, ir.Value] = dataclasses.field(default_factory=dict)
    nodes: tuple[ir.Node, ...] = ()
    axes: int | None = None

    def bind(self, name: str, value: ir.Value) -> State | None:
        """With `name` bound to `value`, None if it is bound to another one."""
        if name in self.bindings:
            return self if self.bindings[name] is value else None
        return dataclasses.replace(self, bindings={**self.bindings, name: value})

    def visit(self, node: ir.Node) -> State:
        if node in self.nodes:
            return self
        return dataclasses.replace(self, nodes=(*self.nodes, node))


@dataclasses.dataclass
class Miss:
    """The deepest point a match came to before it failed."""

    nodes: tuple[ir.Node, ...] = ()
    refusal: Refusal | None = None

    def record(self, state: State, code: str, node: ir.Node | None, detail: str) -> None:
        if self.refusal is None or len(state.nodes) > len(self.nodes):
            self.nodes = state.nodes
            self.refusal = Refusal(code, node_name(node), detail)


def node_name(node: ir.Node | None) -> str:
    """A node's name, or its first output's where it has none."""
    if node is None:
        return "(graph input)"
    return node.name or node.outputs[0].name or node.op_type


class Pattern(abc.ABC):
    """One piece of algebra."""

    @abc.abstractmethod
    def match(self, value: ir.Value, state: State, miss: Miss) -> Iterator[State]:
        """Every way `value` is this expression, given what is bound already."""

    @abc.abstractmethod
    def spell(self, speller: Speller) -> ir.Value:
        """Write this expression as nodes."""


@dataclasses.dataclass(frozen=True)
class Var(Pattern):
    """Any value; the same name is the same value everywhere."""

    name: str

    def match(self, value: ir.Value, state: State, miss: Miss) -> Iterator[State]:
        bound = state.bind(self.name, value)
        if bound is not None:
            yield bound
        else:
            detail = f"{value.name} should be {state.bindings[self.name].name} ({self.name})"
            miss.record(state, "different_operand", value.producer(), detail)

    def spell(self, speller: Speller) -> ir.Value:
        return speller.values[self.name]


@dataclasses.dataclass(frozen=True)
class Scalar(Pattern):
    """A constant of one element, bound to `name`."""

    name: str

    def match(self, value: ir.Value, state: State, miss: Miss) -> Iterator[State]:
        if facts.scalar(value) is None:
            detail = f"{self.name} ({value.name}) is not a constant scalar"
            miss.record(state, "not_scalar", value.producer(), detail)
            return
        bound = state.bind(self.name, value)
        if bound is not None:
            yield bound

    def spell(self, speller: Speller) -> ir.Value:
        return speller.values[self.name]


@dataclasses.dataclass(frozen=True)
class Const(Pattern):
    """A constant equal to `number`, as exactly as its type can hold it."""

    number: float

    def match(self, value: ir.Value, state: State, miss: Miss) -> Iterator[State]:
        found = facts.scalar(value)
        if _equal(found, self.number, facts.dtype_of(value)):
            yield state
        else:
            detail = f"{value.name} is {found}, not {self.number:g}"
            miss.record(state, "constant", value.producer(), detail)

    def spell(self, speller: Speller) -> ir.Value:
        return speller.number(self.number, "f64")


@dataclasses.dataclass(frozen=True)
class Op(Pattern):
    """A node of the standard domain; Add and Mul match in both orders."""

    op_type: str
    operands: tuple[Pattern, ...]

    def match(self, value: ir.Value, state: State, miss: Miss) -> Iterator[State]:
        node = _producer(value, self.op_type, state, miss)
        if node is None or len(node.inputs) != len(self.operands):
            return
        here = state.visit(node)
        orders = [node.inputs]
        if self.op_type in COMMUTATIVE:
            orders.append(tuple(reversed(node.inputs)))
        for inputs in orders:
            yield from _match_all(self.operands, inputs, here, miss)

    def spell(self, speller: Speller) -> ir.Value:
        values = [operand.spell(speller) for operand in self.operands]
        typed = next((value for value in values if facts.scalar(value) is None), values[0])
        values = speller.narrowed([speller.typed(value, typed) for value in values])
        if self.op_type in COMMUTATIVE and speller.pick(2):
            values.reverse()
        return speller.node(self.op_type, values, facts.dtype_of(values[0]))


@dataclasses.dataclass(frozen=True)
class Reduce(Pattern):
    """A reduction over the last axis, or several last axes, keepdims=1, however they are written.

    Every reduction of one match is over as many.
    """

    op_type: str
    operand: Pattern

    def match(self, value: ir.Value, state: State, miss: Miss) -> Iterator[State]:
        node = _producer(value, self.op_type, state, miss)
        if node is None or node.inputs[0] is None:
            return
        here = state.visit(node)
        if facts.attribute_int(node, "keepdims", 1) != 1:
            miss.record(here, "keepdims", node, "the reduction drops its axis (keepdims=0)")
            return
        axes = _axes(node)
        count = None if axes is None else facts.trailing_axes(axes, node.inputs[0])
        if count is None:
            detail = f"reduces over axes {axes}, not provably the last ones"
            miss.record(here, "axis", node, detail)
            return
        if here.axes not in (None, count):
            miss.record(here, "axis", node, f"reduces {count} axes where {here.axes} were before")
            return
        here = dataclasses.replace(here, axes=count)
        yield from self.operand.match(node.inputs[0], here, miss)

    def spell(self, speller: Speller) -> ir.Value:
        value = self.operand.spell(speller)
        start = (0, speller.rank)[speller.pick(2)]
        axes = list(range(start - speller.axes, start))
        as_input = 13 if self.op_type == "ReduceSum" else 18
        if speller.opset >= as_input:
            inputs = [value, speller.constant(np.array(axes, np.int64))]
            return speller.node(self.op_type, inputs, facts.dtype_of(value), keepdims=1)
        return speller.node(self.op_type, [value], facts.dtype_of(value), axes=axes, keepdims=1)


@dataclasses.dataclass(frozen=True)
class Joined(Pattern):
    """The columns of its operands side by side: a Concat over the last axis."""

    operands: tuple[Pattern, ...]

    def match(self, value: ir.Value, state: State, miss: Miss) -> Iterator[State]:
        node = _producer(value, "Concat", state, miss)
        if node is None or len(node.inputs) != len(self.operands):
            return
        here = state.visit(node)
        axis = facts.attribute_int(node, "axis", 1)  # of opset 1; later ones require it
        if not facts.is_last_axis(axis, value):
            miss.record(here, "axis", node, f"joins over axis {axis}, not provably the last one")
            return
        yield from _match_all(self.operands, node.inputs, here, miss)

    def spell(self, speller: Speller) -> ir.Value:
        values = [operand.spell(speller) for operand in self.operands]
        return speller.node("Concat", values, facts.dtype_of(values[0]), axis=-1)


@dataclasses.dataclass(frozen=True)
class Width(Pattern):
    """A constant equal to the size of the reduced axes of variable `of`, or to its reciprocal."""

    of: str
    reciprocal: bool = False

    def match(self, value: ir.Value, state: State, miss: Miss) -> Iterator[State]:
        found = facts.scalar(value)
        source = state.bindings.get(self.of)
        dims = facts.trailing_dims(source, state.axes or 1) if source is not None else None
        size = None if dims is None else math.prod(dims)
        # Rows of no numbers have no mean.
        expected = None if not size else (1 / size if self.reciprocal else float(size))
        if expected is not None and _equal(found, expected, facts.dtype_of(value)):
            yield state
        else:
            detail = f"{value.name} is {found}, not the hidden size {size}"
            miss.record(state, "hidden_size", value.producer(), detail)

    def spell(self, speller: Speller) -> ir.Value:
        dims = facts.trailing_dims(speller.values[self.of], speller.axes)
        assert dims is not None
        size = float(math.prod(dims))
        return speller.number(1 / size if self.reciprocal else size, "f64")


@dataclasses.dataclass(frozen=True)
class OneOf(Pattern):
    """Alternative spellings of one thing, tried in order."""

    options: tuple[Pattern, ...]

    def match(self, value: ir.Value, state: State, miss: Miss) -> Iterator[State]:
        for option in self.options:
            yield from option.match(value, state, miss)

    def spell(self, speller: Speller) -> ir.Value:
        return self.options[speller.pick(len(self.options))].spell(speller)


@dataclasses.dataclass(frozen=True)
class Casted(Pattern):
    """The operand, possibly through one Cast up from 16 bits, or back down to them.

    to: `wide` for a Cast from f16 or bf16 to f32 or f64, `storage` for the reverse. A Cast
    between any other types is part of the computation, not of its storage.
    """

    operand: Pattern
    to: str

    def match(self, value: ir.Value, state: State, miss: Miss) -> Iterator[State]:
        node = value.producer()
        if node is not None and node.op_type == "Cast" and node.domain == "":
            source = node.inputs[0]
            if source is not None and self._fits(facts.dtype_of(source), facts.dtype_of(value)):
                yield from self.operand.match(source, state.visit(node), miss)
        yield from self.operand.match(value, state, miss)

    def _fits(self, source: DType | None, target: DType | None) -> bool:
        narrow, wide = (source, target) if self.to == "wide" else (target, source)
        return narrow in ("f16", "bf16") and wide in ("f32", "f64")

    def spell(self, speller: Speller) -> ir.Value:
        value = self.operand.spell(speller)
        if not speller.island:
            return value
        target: DType = "f32" if self.to == "wide" else speller.dtype
        if facts.dtype_of(value) == target:
            return value
        return speller.node("Cast", [value], target, to=int(DTYPES[target].onnx))


@dataclasses.dataclass(frozen=True)
class Named(Pattern):
    """The operand; the first value found for it is kept as `name` for the rule's guards."""

    name: str
    operand: Pattern

    def match(self, value: ir.Value, state: State, miss: Miss) -> Iterator[State]:
        known = self.name in state.bindings
        bound = state if known else state.bind(self.name, value)
        assert bound is not None
        yield from self.operand.match(value, bound, miss)

    def spell(self, speller: Speller) -> ir.Value:
        return self.operand.spell(speller)


def _equal(found: float | None, number: float, dtype: DType | None) -> bool:
    """Whether a constant is `number` as exactly as its type can hold it.

    It may have been rounded once to f32 before it reached a wider type.
    """
    unit = max(DTYPES[dtype].epsilon if dtype else 0.0, DTYPES["f32"].epsilon)
    return found is not None and abs(found - number) <= unit * abs(number)


def _producer(value: ir.Value, op_type: str, state: State, miss: Miss) -> ir.Node | None:
    node = value.producer()
    if node is not None and node.op_type == op_type and node.domain == "":
        return node
    found = node.op_type if node is not None else "an input or constant"
    miss.record(state, "operator", node, f"{value.name} is {found}, not {op_type}")
    return None


def _match_all(
    operands: Sequence[Pattern], values: Sequence[ir.Value | None], state: State, miss: Miss
) -> Iterator[State]:
    if not operands:
        yield state
        return
    first = values[0]
    if first is None:
        return
    for matched in operands[0].match(first, state, miss):
        yield from _match_all(operands[1:], values[1:], matched, miss)


def _axes(node: ir.Node) -> list[int] | None:
    """The axes of a reduction; None when they cannot be known or mean all of them."""
    if "axes" in node.attributes:
        return list(node.attributes["axes"].as_ints())
    if len(node.inputs) > 1:
        axes = facts.constant(node.inputs[1])
        return None if axes is None else [int(axis) for axis in axes.reshape(-1)]
    return None


def matches(pattern: Pattern, value: ir.Value) -> Iterator[State | Miss]:
    """Every match of `pattern` at `value`; last, if there was none, the nearest miss."""
    miss = Miss()
    found = False
    for state in pattern.match(value, State(), miss):
        found = True
        yield state
    if not found:
        yield miss
