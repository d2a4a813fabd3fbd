"""Gated linear units: act(gate)∘up from two tensors or one packed tensor."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from fusenorm.ops.activation import Gated, GateLayout
from fusenorm.ops.spec import DOMAIN, DTYPES
from fusenorm.passes import facts
from fusenorm.passes.pattern import (
    Const,
    Miss,
    Op,
    Pattern,
    Refusal,
    Scalar,
    Speller,
    State,
    Var,
    matches,
    node_name,
)
from fusenorm.passes.rewrite import Check, Rewrite, RewritePass, Rule
from fusenorm.passes.speller import WIDTH
from fusenorm.passes.spelling import (
    add,
    erf_argument,
    half_of_product,
    mul,
    one_of,
    sigmoid,
    tanh_argument,
)


@dataclasses.dataclass(frozen=True)
class _Act:
    """The gate's side of the product: which activation of which value."""

    spec: Gated
    gate: ir.Value
    attributes: dict[str, float]
    nodes: tuple[ir.Node, ...]


@dataclasses.dataclass(frozen=True)
class _Clamped:
    """A value held inside [low, high], and the nodes that do it."""

    source: ir.Value
    low: float = -math.inf
    high: float = math.inf
    nodes: tuple[ir.Node, ...] = ()


_SIGMOID = sigmoid(Var("gate"))
_PLUS_ONE = add(Var("up"), Const(1))


def read_activation(value: ir.Value) -> _Act | None:
    """The activation whose result `value` is: ours, the standard's, or a sigmoid written out."""
    node, dtype = value.producer(), facts.dtype_of(value)
    if node is None or dtype is None:
        return None
    attributes = {}
    if node.domain == DOMAIN:
        spec = Gated.parse(node.op_type)
        if spec is None or spec.layout != "none":
            return None
        attributes = {name: node.attributes[name].as_float() for name in spec.attributes}
    elif node.domain != "":
        return None
    elif node.op_type == "Gelu":
        approximate = node.attributes.get("approximate")
        tanh = approximate is not None and approximate.as_string() == "tanh"
        spec = Gated("gelu_tanh" if tanh else "gelu", dtype=dtype)
    elif node.op_type == "Swish":
        spec, alpha = Gated("swish", dtype=dtype), node.attributes.get("alpha")
        attributes = {"beta": 1.0 if alpha is None else alpha.as_float()}
    elif node.op_type == "Relu":
        spec = Gated("relu", dtype=dtype)
    else:
        found = next(iter(matches(_SIGMOID, value)))
        if isinstance(found, Miss):
            return None
        return _Act(Gated("sigmoid", dtype=dtype), found.bindings["gate"], {}, found.nodes)
    gate = node.inputs[0]
    assert gate is not None
    return _Act(spec, gate, attributes, (node,))


def read_clamp(value: ir.Value) -> _Clamped:
    """What `value` is before Clip, Min and Max with constant bounds, however they are nested.

    A Clip without a bound stops at the type's largest number (so the standard says, and
    onnxruntime does); Min and Max leave infinities alone.
    """
    held = _Clamped(value)
    while (node := held.source.producer()) is not None and node.domain == "":
        bounds = _bounds(node)
        if bounds is None:
            break
        source, *inner = bounds
        low, high = (min(max(bound, held.low), held.high) for bound in inner)
        held = _Clamped(source, low, high, (node, *held.nodes))
    return held


def _bounds(node: ir.Node) -> tuple[ir.Value, float, float] | None:
    """The operand a node clamps and its bounds, low below high; None for any other node."""
    if node.op_type == "Clip" and not node.attributes:
        source = node.inputs[0]
        assert source is not None
        dtype = facts.dtype_of(source)
        if dtype is None:
            return None
        largest = DTYPES[dtype].largest
        given = [*node.inputs[1:], None, None][:2]
        low, high = (
            default if bound is None else facts.scalar(bound)
            for bound, default in zip(given, (-largest, largest), strict=True)
        )
        if low is None or high is None or not low <= high:
            return None
        return source, low, high
    if node.op_type in ("Min", "Max") and len(node.inputs) == 2:
        for source, bound in (node.inputs, tuple(reversed(node.inputs))):
            number = facts.scalar(bound)
            assert source is not None
            if number is not None and not math.isnan(number):
                least = node.op_type == "Min"
                return source, -math.inf if least else number, number if least else math.inf
    return None


class FuseGLU(Rule):
    """The product of an activated gate and its linear twin becomes one op.

    ## What it matches
    act(g)·u in either order, act one of sigmoid, ReLU and its square, GELU (erf, tanh), Swish
    with any β, or none (bilinear). g and u are two tensors of provably one shape, or the two
    halves of one (Split, Slice, Gather, interleaved columns, a view [..., 2, D] or [..., D, 2]),
    either half being the gate. Bilinear needs both to be halves of one tensor or linear maps of
    one input. SwiGLU with g, or act(g), and u clamped to one limit, u + 1 after that or not
    (GPT-OSS, DeepSeek-V4, Step-3). The standard SwiGLU op.

    ## Formula
    y = act(g)∘u; clamped: y = act(min(g, limit))∘(clip(u, -limit, limit) + 1).

    ## Numerics
    act(g) is rounded to the storage type before the product where the graph rounds it. Clamps
    keep NaN; a Clip without a minimum raises -inf to the lowest number, Min does not.

    ## Refuses
    `shapes_not_proved`: the product might broadcast. `activation_shared`: act(g) has other
    readers, so it must be computed anyway. `activation_clamped`: act(g) is clamped, u not to the
    same limit. `rank`: they may be scalars, to which a constant would give an axis. `types`,
    `check_failed`.

    ## References
    arXiv 2002.05202; ONNX SwiGLU-28; arXiv 2508.10925 (GPT-OSS).
    """

    name = "glu"
    op = "GLU"
    roots = frozenset({"Mul", "SwiGLU"})

    @functools.cached_property
    def pattern(self) -> Pattern:
        gate, up = Var("gate"), Var("up")
        activated = one_of(
            sigmoid(gate),
            Op("Relu", (gate,)),
            mul(gate, sigmoid(one_of(gate, mul(gate, Scalar("beta"))))),
            half_of_product(gate, add(Op("Erf", (erf_argument(gate),)), Const(1))),
            half_of_product(gate, add(Op("Tanh", (tanh_argument(gate),)), Const(1))),
        )
        return mul(activated, up)

    def example(self, speller: Speller) -> None:
        """Two tensors or the halves of one, in every way; clamped as GPT-OSS does, or not."""
        gate, up = _spell_pair(speller)
        speller.scalar("beta", 1.5)
        form = speller.pick(3)
        if form:
            gate, up = _spell_clamp(speller, gate, -3.0), _spell_clamp(speller, up, -2.0)
        if form == 2:
            up = speller.node("Add", [up, speller.number(1.0, speller.dtype)])
        speller.values |= {"gate": gate, "up": up}

    def propose(self, root: ir.Node) -> Rewrite | Miss | None:
        a, b = root.inputs
        assert a is not None
        assert b is not None
        if root.op_type == "SwiGLU":
            return self._standard(root, a, b)
        nearest: Miss | None = None
        for activated, up in ((a, b), (b, a)):
            held = read_clamp(activated)
            act = read_activation(held.source)
            if act is None or act.gate is up or facts.constant(up) is not None:
                continue
            outcome = self._gate(root, act, held, up)
            if isinstance(outcome, Rewrite):
                return outcome
            nearest = outcome
        return nearest or self._bilinear(root, a, b)

    def _standard(self, root: ir.Node, gate: ir.Value, up: ir.Value) -> Rewrite | Miss | None:
        """The standard SwiGLU, whose operands never broadcast; onnxruntime cannot run it."""
        dtype, alpha = facts.dtype_of(gate), root.attributes.get("alpha")
        if dtype is None:
            return None
        beta = 1.0 if alpha is None else alpha.as_float()
        act = _Act(Gated("swish", dtype=dtype), gate, {"beta": beta}, ())
        return self._unit(root, act, _Clamped(gate), up)

    def _gate(self, root: ir.Node, act: _Act, held: _Clamped, up: ir.Value) -> Rewrite | Miss:
        for value in (held.source, *(node.outputs[0] for node in held.nodes)):
            if len(value.uses()) > 1 or value.is_graph_output():
                detail = f"{value.name} has other readers"
                refusal = Refusal("activation_shared", node_name(root), detail)
                return Miss((*act.nodes, *held.nodes, root), refusal)
        return self._unit(root, act, held, up)

    def _unit(self, root: ir.Node, act: _Act, held: _Clamped, up: ir.Value) -> Rewrite | Miss:
        nodes = (*act.nodes, *held.nodes, root)
        clamped = _clamped(act, held, up)
        if clamped is not None:
            act, up, inner = clamped
            nodes = (*inner, *nodes)
        elif held.nodes:
            detail = f"the activated gate is clamped, {up.name} is not or not to its limit"
            return Miss(nodes, Refusal("activation_clamped", node_name(root), detail))
        return self._rewrite(root, act.spec, act.attributes, act.gate, up, nodes)

    def _bilinear(self, root: ir.Node, a: ir.Value, b: ir.Value) -> Rewrite | Miss | None:
        dtype = facts.dtype_of(a)
        if a is b or dtype is None:
            return None
        first, second = facts.half_of(a), facts.half_of(b)
        packed = first and second and first[0] is second[0]
        source = _linear_input(a)
        if not packed and (source is None or source is not _linear_input(b)):
            return None
        return self._rewrite(root, Gated("identity", dtype=dtype), {}, a, b, (root,))

    def _rewrite(
        self,
        root: ir.Node,
        act: Gated,
        attributes: dict[str, float],
        gate: ir.Value,
        up: ir.Value,
        nodes: tuple[ir.Node, ...],
    ) -> Rewrite | Miss:
        layout, inputs = _layout(gate, up)
        proved = root.op_type == "SwiGLU" or facts.same_shape(gate, up)
        if layout == "pair" and not proved:
            detail = f"{gate.name} and {up.name} are not provably of one shape"
            return Miss(nodes, Refusal("shapes_not_proved", node_name(root), detail))
        parts = (gate, up) if layout != "pair" else ()
        split = filter(None, (value.producer() for value in parts))
        views = [view for view in map(facts.view_of, parts) if view is not None]
        return Rewrite(
            rule=self.name,
            spec=dataclasses.replace(act, layout=layout),
            inputs=inputs,
            attributes=attributes,
            outputs=(root.outputs[0],),
            nodes=(*dict.fromkeys(split), *nodes),
            shapes={view.source: (*_lead(view), math.prod(view.pair)) for view in views},
            computed={view.target: (*_lead(view), *view.pair) for view in views},
        )


def _lead(view: facts.View) -> tuple[int, ...]:
    """Leading dimensions to try a view with, all of them different."""
    rank = facts.rank(view.source)
    assert rank is not None
    return tuple(range(4, 4 + rank - 1))


def _clamped(
    act: _Act, held: _Clamped, up: ir.Value
) -> tuple[_Act, ir.Value, tuple[ir.Node, ...]] | None:
    """A gated unit's act, its up before clamp and shift, and the nodes of clamps and shift.

    None where up and the gate (or `held`, its activation) are not clamped as the op family has
    it; clamps then stay in front of a plain unit.
    """
    found = next(iter(matches(_PLUS_ONE, up)))
    added = found if isinstance(found, State) else State({"up": up})
    inner = read_clamp(added.bindings["up"])
    gate = _Clamped(act.gate) if held.nodes else read_clamp(act.gate)
    outer = held if held.nodes else gate
    spec = dataclasses.replace(
        act.spec,
        layout="pair",
        clamp="act" if held.nodes else "gate",
        plus1=bool(added.nodes),
    )
    alike = 0 < outer.high == inner.high == -inner.low
    if not inner.nodes or not alike or Gated.parse(spec.op_type) != spec:
        return None
    attributes = {**act.attributes, "floor": outer.low, "limit": outer.high}
    nodes = (*gate.nodes, *inner.nodes, *added.nodes)
    return _Act(spec, gate.source, attributes, act.nodes), inner.source, nodes


def _layout(gate: ir.Value, up: ir.Value) -> tuple[GateLayout, tuple[ir.Value, ...]]:
    """How gate and up are stored, and the fused op's inputs."""
    first, second = facts.half_of(gate), facts.half_of(up)
    if first and second and first[:2] == second[:2] and first[2] != second[2]:
        if first[1] == "halves":
            return ("gate_up" if first[2] == 0 else "up_gate"), (first[0],)
        if first[2] == 0:
            return "interleaved", (first[0],)
    return "pair", (gate, up)


def _linear_input(value: ir.Value) -> ir.Value | None:
    """x where `value` is x·W or x·W + b with constant W and b."""
    node = value.producer()
    if node is not None and node.op_type == "Add":
        rows = [v for v in filter(None, node.inputs) if facts.constant(v) is None]
        node = rows[0].producer() if len(rows) == 1 else None
    if node is None or node.domain != "" or node.op_type not in ("MatMul", "Gemm"):
        return None
    if facts.constant(node.inputs[1]) is None:
        return None
    return node.inputs[0]


def _spell_pair(speller: Speller) -> tuple[ir.Value, ir.Value]:
    """Two tensors, or the halves of one by Split, Slice, Gather or a view of pairs."""

    def gather(x: ir.Value, part: int) -> ir.Value:
        columns = np.arange(part * WIDTH, (part + 1) * WIDTH)
        return speller.node("Gather", [x, speller.constant(columns)], axis=-1)

    def view(x: ir.Value, pair: tuple[int, int], axis: int, part: int) -> ir.Value:
        target = np.array([*[0] * (speller.rank - 1), *pair], np.int64)
        pairs = speller.node("Reshape", [x, speller.constant(target)])
        place = speller.constant(np.array(part, np.int64))
        return speller.node("Gather", [pairs, place], axis=axis)

    ways: tuple[Callable[[ir.Value, int], ir.Value] | None, ...] = (
        None,
        speller.split,
        lambda x, part: speller.columns(x, part, interleaved=False),
        lambda x, part: speller.columns(x, part, interleaved=True),
        gather,
        lambda x, part: view(x, (2, WIDTH), -2, part),
        lambda x, part: view(x, (WIDTH, 2), -1, part),
    )
    way = ways[speller.pick(len(ways))]
    if way is None:
        return speller.row("gate"), speller.row("up")
    x = speller.row("x", factor=2)
    first, second = way(x, 0), way(x, 1)
    return (second, first) if speller.pick(2) else (first, second)


def _spell_clamp(speller: Speller, value: ir.Value, low: float) -> ir.Value:
    """`value` inside [low, 2]."""
    lowest, limit = (speller.number(bound, speller.dtype) for bound in (low, 2.0))
    if speller.pick(2):
        return speller.node("Min", [speller.node("Max", [value, lowest]), limit])
    return speller.node("Clip", [value, lowest, limit])


class FuseGatedUnit(RewritePass):
    """The pass of the GLU rule."""

    name = "fuse_glu"

    def __init__(self, check: Check | None = None, budget: list[int] | None = None) -> None:
        super().__init__((FuseGLU(),), check, budget)
