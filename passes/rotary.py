"""Rotary positions: the rows of q or k, turned in the planes of two of their numbers each.

x·cos + x'·sin, where x' is (-x2, x1) of the halves x = (x1, x2), or of the even and the odd numbers
(arXiv 2104.09864). Of a longer row only the first numbers may turn.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import get_args

import onnx_ir as ir

from fusenorm.ops.attention import Form
from fusenorm.passes import facts
from fusenorm.passes.attention_site import Site, Turn
from fusenorm.passes.pattern import (
    Const,
    Joined,
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


def turned(name: str, form: Form) -> Pattern:
    """Variable `name` turned by `cos` and `sin`; its parts are `name_1` and `name_2`."""
    x, cos, sin, first, second = map(Var, (name, "cos", "sin", f"{name}_1", f"{name}_2"))
    if form == "cached":
        return Named(f"{name}_turned", Op("RotaryEmbedding", (x, cos, sin)))
    minus = one_of(Op("Neg", (second,)), mul(second, Const(-1)))
    other: Pattern = Joined((minus, first))
    if form == "pairs":
        columns = (
            Op("Unsqueeze", (minus, Var(f"{name}_axis_2"))),
            Op("Unsqueeze", (first, Var(f"{name}_axis_1"))),
        )
        paired = Named(f"{name}_paired", Joined(columns))
        other = Named(f"{name}_other", Op("Reshape", (paired, Var(f"{name}_shape"))))
    return add(mul(x, cos), mul(other, sin))


def _patterns() -> Iterator[tuple[Form, Pattern]]:
    for form in get_args(Form):
        whole = turned("x", form)
        yield form, one_of(whole, Joined((whole, Var("far"))))


_TURNED = dict(_patterns())


def read_turns(site: Site) -> None:
    """Through the rotary positions of q, and of k where they are the same."""
    q = _read(site, site.q)
    k = _read(site, site.k) if site.letters["k"] == "h" else None
    if k is not None and (q is None or not q.like(k)):
        _refuse("rotary_keys", k.nodes, f"{site.k.name} is turned otherwise than {site.q.name}")
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
    turn, standard = read_turn(value), facts.made_by(value, "RotaryEmbedding")
    if turn is None:
        if standard is not None:
            _refuse("rotary_form", (standard,), "it looks rows up, or turns pairs")
        return None
    readers = {use.node for use in value.uses()} - set(site.nodes)
    if any(node.graph is not site.root.graph for node in turn.nodes):
        detail = f"{value.name} is computed once outside this body"
        _refuse("other_graph", turn.nodes, detail)
    elif value.is_graph_output() or any(node.op_type != "Shape" for node in readers):
        _refuse("rotary_shared", turn.nodes, f"{value.name} has other readers")
    elif not _fit(turn, site.rank):
        detail = f"{turn.cos.name}, {turn.sin.name} are not provably [B, 1, S, {turn.width}]"
        _refuse("rotary_tables", turn.nodes, detail)
    else:
        return turn
    return None


def _refuse(code: str, nodes: tuple[ir.Node, ...], detail: str) -> None:
    remember(Miss(nodes, Refusal(code, node_name(nodes[0]), detail)), ROTARY)


def _fit(turn: Turn, rank: int) -> bool:
    """Whether the tables provably are of one shape that broadcasts to [B, 1, S, R].

    rank: of what they turn; of other than four axes only S and R may have a size.
    """
    dims = list(turn.cos.shape or ())
    if turn.form == "cached":
        fit = len(dims) <= 3 and dims[-1:] == [turn.width / 2] and rank == 4
    else:
        fit = len(dims) <= min(rank, 4) and dims[-1:] == [turn.width]
        fit = fit and all(dim == 1 for dim in (dims[-3:-2] if rank == 4 else dims[:-2]))
    return fit and facts.same_shape(turn.cos, turn.sin)


def read_turn(value: ir.Value) -> Turn | None:
    """How `value` is turned, or its first numbers are."""
    for form, pattern in _TURNED.items():
        for found in matches(pattern, value):
            turn = _accept(found, form) if isinstance(found, State) else None
            if turn is not None:
                return turn
    return None


def _accept(found: State, form: Form) -> Turn | None:
    """The turn a match is, if every part is in its place."""
    bound = found.bindings
    x, far = bound["x"], bound.get("far")
    size = facts.last_dim(x)
    if size is None:
        return None
    plain = Turn(x, bound["cos"], bound["sin"], size, form, found.nodes)
    turn = _standard(plain, bound["x_turned"]) if form == "cached" else _written(plain, bound)
    return turn if turn is None or far is None else _extended(turn, far)


def _standard(turn: Turn, value: ir.Value) -> Turn | None:
    """With what the attributes of the standard op say."""
    node = value.producer()
    assert node is not None
    if facts.attribute_int(node, "interleaved", 0):
        return None
    width = facts.attribute_int(node, "rotary_embedding_dim", 0) or turn.width
    return dataclasses.replace(turn, width=width, partial=width < turn.width)


def _written(turn: Turn, bound: Mapping[str, ir.Value]) -> Turn | None:
    """With the nodes that take x apart, if they do, and put it together again."""
    x, first, second = (bound[name] for name in ("x", "x_1", "x_2"))
    layout = "halves" if turn.form == "halves" else "interleaved"
    parts = [facts.half_of(first), facts.half_of(second)]
    if parts != [(x, layout, 0), (x, layout, 1)]:
        return None
    computed = {}
    if turn.form == "pairs":
        paired, other, shape = (bound[name] for name in ("x_paired", "x_other", "x_shape"))
        pair = (turn.width // 2, 2)
        if facts.trailing_dims(paired, 2) != pair or not facts.same_shape(other, x):
            return None
        computed = {shape: other} if facts.constant(shape) is None else {}
    nodes = (*turn.nodes, *_producers(first, second))
    return dataclasses.replace(turn, nodes=nodes, computed=computed)


def _extended(turn: Turn, far: ir.Value) -> Turn | None:
    """With the columns beside it, which do not turn, if they are the rest of the row."""
    near, rest = facts.columns_of(turn.source), facts.columns_of(far)
    if near is None or rest is None or near.source is not rest.source:
        return None
    if near.places + rest.places != tuple(range(near.size)):
        return None
    nodes = (*turn.nodes, *_producers(turn.source, far))
    partial = turn.width < near.size
    return dataclasses.replace(turn, source=near.source, partial=partial, nodes=nodes)


def _producers(*values: ir.Value) -> Iterator[ir.Node]:
    return (node for node in (value.producer() for value in values) if node is not None)
