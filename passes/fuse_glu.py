"""Gated linear units: act(gate)∘up from two tensors or one packed tensor."""

from __future__ import annotations

import dataclasses
import functools

import onnx_ir as ir

from fusenorm.ops.activation import Gated, GateLayout
from fusenorm.ops.spec import DOMAIN
from fusenorm.passes import facts
from fusenorm.passes.pattern import (
    Const,
    Miss,
    Op,
    Pattern,
    Refusal,
    Scalar,
    Speller,
    Var,
    matches,
    node_name,
)
from fusenorm.passes.rewrite import Check, Rewrite, RewritePass, Rule
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


_SIGMOID = sigmoid(Var("gate"))


def read_activation(value: ir.Value) -> _Act | None:
    """The activation whose result `value` is: ours, the standard's, or a sigmoid written out."""
    node, dtype = value.producer(), facts.dtype_of(value)
    if node is None or dtype is None or not node.inputs or node.inputs[0] is None:
        return None
    if node.domain == DOMAIN:
        spec = Gated.parse(node.op_type)
        if spec is None or spec.layout != "none":
            return None
        attributes = {name: node.attributes[name].as_float() for name in spec.attributes}
        return _Act(spec, node.inputs[0], attributes, (node,))
    if node.domain != "":
        return None
    attributes = {}
    if node.op_type == "Gelu":
        approximate = node.attributes.get("approximate")
        tanh = approximate is not None and approximate.as_string() == "tanh"
        activation = "gelu_tanh" if tanh else "gelu"
    elif node.op_type == "Swish":
        activation, alpha = "swish", node.attributes.get("alpha")
        attributes = {"beta": 1.0 if alpha is None else alpha.as_float()}
    elif node.op_type in ("Sigmoid", "Relu"):
        activation = node.op_type.lower()
    else:
        found = next(iter(matches(_SIGMOID, value)))
        if isinstance(found, Miss):
            return None
        return _Act(Gated("sigmoid", "none", dtype), found.bindings["gate"], {}, found.nodes)
    return _Act(Gated(activation, "none", dtype), node.inputs[0], attributes, (node,))


class FuseGLU(Rule):
    """The product of an activated gate and its linear twin becomes one op.

    ## What it matches
    act(g)·u in either order, act one of sigmoid, ReLU, GELU (erf, tanh), Swish with any β, or
    none (bilinear). g and u are two tensors of provably one shape, or the two halves of one
    (Split, Slice, or interleaved columns), either half being the gate. Bilinear needs both to
    be halves of one tensor or linear maps of one input. The standard SwiGLU op.

    ## Formula
    y = act(g)∘u.

    ## Numerics
    act(g) is rounded to the storage type before the product where the graph rounds it.

    ## Refuses
    `shapes_not_proved`: the product might broadcast. `activation_shared`: act(g) has other
    readers, so it must be computed anyway. `types`, `check_failed`.

    ## References
    arXiv 2002.05202; ONNX SwiGLU-28.
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
        """Two tensors, or the halves of one by Split or Slice, or interleaved columns."""
        layout = speller.pick(4)
        names = ("gate", "up") if layout == 0 or not speller.pick(2) else ("up", "gate")
        speller.scalar("beta", 1.5)
        if layout == 0:
            for name in names:
                speller.row(name)
            return
        packed = speller.row("x", factor=2)
        for part, name in enumerate(names):
            speller.values[name] = (
                speller.split(packed, part)
                if layout == 1
                else speller.columns(packed, part, interleaved=layout == 3)
            )

    def propose(self, root: ir.Node) -> Rewrite | Miss | None:
        a, b = root.inputs
        if a is None or b is None:
            return None
        if root.op_type == "SwiGLU":
            return self._standard(root, a, b)
        nearest: Miss | None = None
        for activated, up in ((a, b), (b, a)):
            act = read_activation(activated)
            if act is None or act.gate is up:
                continue
            outcome = self._gate(root, act, activated, up)
            if isinstance(outcome, Rewrite):
                return outcome
            nearest = outcome
        return nearest or self._bilinear(root, a, b)

    def _standard(self, root: ir.Node, gate: ir.Value, up: ir.Value) -> Rewrite | Miss | None:
        """The standard SwiGLU, whose operands never broadcast; onnxruntime cannot run it."""
        dtype, alpha = facts.dtype_of(gate), root.attributes.get("alpha")
        if dtype is None:
            return None
        layout, inputs = _layout(gate, up)
        return Rewrite(
            rule=self.name,
            spec=Gated("swish", layout, dtype),
            inputs=inputs,
            attributes={"beta": 1.0 if alpha is None else alpha.as_float()},
            outputs=(root.outputs[0],),
            nodes=(root,),
        )

    def _gate(self, root: ir.Node, act: _Act, activated: ir.Value, up: ir.Value) -> Rewrite | Miss:
        nodes = (*act.nodes, root)
        if len(activated.uses()) > 1 or activated.is_graph_output():
            detail = f"{activated.name} has other readers"
            return Miss(nodes, Refusal("activation_shared", node_name(root), detail))
        return self._rewrite(root, act.spec, act.attributes, act.gate, up, nodes)

    def _bilinear(self, root: ir.Node, a: ir.Value, b: ir.Value) -> Rewrite | Miss | None:
        halves = facts.half_of(a), facts.half_of(b)
        packed = halves[0] and halves[1] and halves[0][0] is halves[1][0] and a is not b
        source = _linear_input(a)
        if not packed and (source is None or source is not _linear_input(b) or a is b):
            return None
        dtype = facts.dtype_of(a)
        if dtype is None:
            return None
        return self._rewrite(root, Gated("identity", "none", dtype), {}, a, b, (root,))

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
        if layout == "pair" and not facts.same_shape(gate, up):
            detail = f"{gate.name} and {up.name} are not provably of one shape"
            return Miss(nodes, Refusal("shapes_not_proved", node_name(root), detail))
        split = (gate.producer(), up.producer()) if layout != "pair" else ()
        return Rewrite(
            rule=self.name,
            spec=dataclasses.replace(act, layout=layout),
            inputs=inputs,
            attributes=attributes,
            outputs=(root.outputs[0],),
            nodes=(*dict.fromkeys(node for node in split if node is not None), *nodes),
        )


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
        row = [operand for operand in node.inputs if facts.constant(operand) is None]
        node = row[0].producer() if len(row) == 1 and row[0] is not None else None
    if node is None or node.domain != "" or node.op_type not in ("MatMul", "Gemm"):
        return None
    if facts.constant(node.inputs[1]) is None:
        return None
    return node.inputs[0]


class FuseGatedUnit(RewritePass):
    """The pass of the GLU rule."""

    name = "fuse_glu"

    def __init__(self, check: Check | None = None, budget: list[int] | None = None) -> None:
        super().__init__((FuseGLU(),), check, budget)
