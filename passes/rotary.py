"""Rotary positions: the rows of q or k, turned in the planes of two of their numbers each.

x·cos + x'·sin, where x' is (-x2, x1) of the halves x = (x1, x2), or of the even and the odd numbers
(arXiv 2104.09864). Of a longer row only the first numbers may turn.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import onnx_ir as ir

from fusenorm.ops.attention import Form
from fusenorm.passes import facts
from fusenorm.passes.attention_site import Site, Turn
from fusenorm.passes.pattern import (
    Const,
    Miss,
    Named,
    Op,
    Pattern,
    Refusal,
    State,
    Var,
    matches,
    node_name,
)
from fusenorm.passes.rewrite import remember
from fusenorm.passes.spelling import add, mul, one_of

ROTARY = "Rotary"  # what its refusals are reported as


def turned(name: str) -> Pattern:
    """Variable `name` turned by `cos` and `sin`, given its parts `name_1` and `name_2`."""
    first, second = Var(f"{name}_1"), Var(f"{name}_2")
    minus = one_of(Op("Neg", (second,)), mul(second, Const(-1)))
    columns = (
        Op("Unsqueeze", (minus, Var(f"{name}_axis_2"))),
        Op("Unsqueeze", (first, Var(f"{name}_axis_1"))),
    )
    paired = Named(f"{name}_paired", Op("Concat", columns))
    other = one_of(Op("Concat", (minus, first)), Op("Reshape", (paired, Var(f"{name}_shape"))))
    return add(mul(Var(name), Var("cos")), mul(Named(f"{name}_other", other), Var("sin")))


_TURNED = turned("x")


def read_turns(site: Site) -> None:
    """Through the rotary positions of q, and of k where they are the same."""
    q = _read(site, site.q)
    k = _read(site, site.k) if site.letters["k"] == "h" else None
    if k is not None and (q is None or not q.like(k)):
        _refuse(site.k, k, "rotary_keys", f"{site.k.name} is turned otherwise than {site.q.name}")
        k = None
    if q is None:
        return
    site.q, site.turn = q.source, q
    if k is not None:
        site.k, site.keys_turn = k.source, True
    for turn in (q, k):
        if turn is not None:
            site.nodes += turn.nodes
            site.computed |= turn.computed


def _read(site: Site, value: ir.Value) -> Turn | None:
    """How `value` is turned, if the op can do it."""
    turn = read_turn(value)
    if turn is None:
        return None
    readers = {use.node for use in value.uses()} - set(site.nodes)
    if value.is_graph_output() or any(node.op_type != "Shape" for node in readers):
        _refuse(value, turn, "rotary_shared", f"{value.name} has other readers")
    elif not _fit(turn):
        _refuse(value, turn, "rotary_tables", f"{turn.cos.name} or {turn.sin.name} is no table")
    else:
        return turn
    return None


def _refuse(value: ir.Value, turn: Turn, code: str, detail: str) -> None:
    remember(Miss(turn.nodes, Refusal(code, node_name(value.producer()), detail)), ROTARY)


def _fit(turn: Turn) -> bool:
    """Whether the tables provably are of one shape that broadcasts to [B, 1, S, R]."""
    rank, columns = facts.rank(turn.cos), facts.last_dim(turn.cos)
    if not rank or not columns or not facts.same_shape(turn.cos, turn.sin):
        return False
    if turn.form == "cached":
        return rank <= 3 and 2 * columns == turn.width
    heads = turn.cos.shape[-3] if rank > 2 else 1  # type: ignore[index]
    return rank <= 4 and heads == 1 and columns == turn.width


def read_turn(value: ir.Value) -> Turn | None:
    """How `value` is turned, or its first numbers are."""
    joined = facts.made_by(value, "Concat")
    if joined is None or len(joined.inputs) != 2:
        return _read_whole(value)
    near, far = joined.inputs
    if near is None or far is None or not _joins_columns(joined):
        return None
    turn, rest = _read_whole(near), facts.columns_of(far)
    cut = facts.columns_of(turn.source) if turn is not None else None
    if turn is None or cut is None or rest is None or cut.source is not rest.source:
        return None
    size = cut.size
    if cut.places != range(turn.width) or rest.places != range(turn.width, size):
        return None
    nodes = (joined, *turn.nodes, *_producers(turn.source, far))
    return dataclasses.replace(turn, source=cut.source, partial=turn.width < size, nodes=nodes)


def _read_whole(value: ir.Value) -> Turn | None:
    node = facts.made_by(value, "RotaryEmbedding")
    if node is not None:
        return _read_standard(node)
    for found in matches(_TURNED, value):
        turn = _accept(found) if isinstance(found, State) else None
        if turn is not None:
            return turn
    return None


def _read_standard(node: ir.Node) -> Turn | None:
    """The standard RotaryEmbedding of a row per head, by tables of a row per position."""
    x, cos, sin, *numbers = node.inputs
    size = facts.last_dim(x) if x is not None else None
    width = facts.attribute_int(node, "rotary_embedding_dim", 0) or size
    if x is None or cos is None or sin is None or width is None or size is None:
        return None
    interleaved = facts.attribute_int(node, "interleaved", 0)
    if facts.rank(x) != 4 or interleaved or any(value is not None for value in numbers):
        return None
    return Turn(x, cos, sin, width, "cached", (node,), {}, width < size)


def _accept(found: State) -> Turn | None:
    """The turn a match is, if its parts are those of x in their places."""
    bound = found.bindings
    x, first, second, other = (bound[name] for name in ("x", "x_1", "x_2", "x_other"))
    paired, width = bound.get("x_paired"), facts.last_dim(x)
    form: Form = "halves" if paired is None else "pairs"
    layout = "halves" if paired is None else "interleaved"
    parts = [facts.half_of(first), facts.half_of(second)]
    joined = (paired or other).producer()
    if parts != [(x, layout, 0), (x, layout, 1)] or joined is None or not _joins_columns(joined):
        return None
    if width is None or (paired is not None and not _alternates(paired, other, x, width)):
        return None
    shape = bound.get("x_shape")
    computed = {shape: other} if shape is not None and facts.constant(shape) is None else {}
    nodes = (*found.nodes, *_producers(first, second))
    return Turn(x, bound["cos"], bound["sin"], width, form, nodes, computed)


def _joins_columns(node: ir.Node) -> bool:
    return facts.is_last_axis(facts.attribute_int(node, "axis", 0), node.outputs[0])


def _alternates(paired: ir.Value, other: ir.Value, x: ir.Value, width: int) -> bool:
    """Whether `other` provably is `paired`, [.., width / 2, 2], in the shape of x."""
    return facts.trailing_dims(paired, 2) == (width // 2, 2) and facts.same_shape(other, x)


def _producers(*values: ir.Value) -> Iterator[ir.Node]:
    return (node for node in (value.producer() for value in values) if node is not None)
