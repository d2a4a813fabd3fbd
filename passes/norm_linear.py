"""A norm joins the linear op that reads its result."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from fusenorm.ops.linear import Linear
from fusenorm.ops.norm import Norm
from fusenorm.ops.spec import DOMAIN
from fusenorm.passes import facts
from fusenorm.passes.fold_norm import INTO_KEY
from fusenorm.passes.fuse_norm import NormCall, read_call
from fusenorm.passes.pattern import Miss, Refusal, node_name
from fusenorm.passes.rewrite import Check, Rewrite, RewritePass

OP = "NormLinear"
RULE = "norm_linear"


class NormLinear(RewritePass):
    """A norm is the first step of the linear op behind it.

    ## What it matches
    A LayerNorm or RMSNorm without scale and bias, which FoldNorm has put into the weights, whose
    result one Linear or LinearGLU op reads and nothing else.

    ## Formula
    y = act(norm(x)·W + b), and so for several maps and for gated units.

    Only on request: over whole models it was measured at 0.97 to 1.03 of the speed of the norm by
    itself, which is within the noise of a measurement of one op, so compile does not choose.

    ## Numerics
    The norm's own: statistics in f32 and two-pass, its result rounded where it was. Rows are
    normalised where they are laid out for the products, once for all maps.

    ## Refuses
    `reader`: something else reads the norm's result, and not only its shape. `output`: it is an
    output of the graph. `affine`: a scale or bias stayed with the norm. `sum`: it adds a residual
    first, which AddResidual may take out of it. `rounding`: in 16 bits, it rounds before its end.
    `slower`, `check_failed`.

    ## References
    arXiv 2407.09577 (FlashNorm).
    """

    name = RULE

    def __init__(self, check: Check | None = None) -> None:
        super().__init__((), check)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        opset = model.opset_imports.get("", 0)
        modified = False
        for graph in list(model.graphs()):
            for node in list(graph):
                found = _read(node)
                if found is None:
                    continue
                spec, norm, call = found
                refusal = _refusal(node, norm, call.spec)
                proposal = (
                    _joined(node, spec, norm, call) if refusal is None else Miss((node,), refusal)
                )
                made = self.settle(model, proposal, OP, opset)
                if made is not None:
                    modified = True
                    _without_norm(norm, call.inputs[0])
                    if INTO_KEY in norm.metadata_props:
                        made.metadata_props[INTO_KEY] = norm.metadata_props[INTO_KEY]
        return ir.passes.PassResult(model, modified)


def _read(node: ir.Node) -> tuple[Linear, ir.Node, NormCall] | None:
    """A linear op, the norm in front of it and what that computes."""
    spec = Linear.parse(node.op_type) if node.domain == DOMAIN else None
    rows = node.inputs[0] if spec is not None else None
    norm = rows.producer() if rows is not None else None
    if spec is None or norm is None or spec.norm != "none" or rows is not norm.outputs[0]:
        return None
    call = read_call(norm)
    return (spec, norm, call) if isinstance(call, NormCall) else None


def _refusal(node: ir.Node, norm: ir.Node, spec: Norm) -> Refusal | None:
    """Why the norm, which computes `spec`, does not join `node`; None if it may."""
    name, y = node_name(norm), norm.outputs[0]
    if y.is_graph_output():
        return Refusal("output", name, f"{y.name} is an output")
    for use in y.uses():
        if (use.node, use.idx) != (node, 0) and not facts.reads_shape(use.node):
            return Refusal("reader", name, f"{y.name} is read by {node_name(use.node)} too")
    if spec.skip:
        return Refusal("sum", name, f"{norm.op_type} adds a residual first")
    if spec.scale is not None or spec.bias is not None:
        return Refusal("affine", name, f"scale or bias of {norm.op_type} is not in the weights")
    if spec != Norm(centred=spec.centred, dtype=spec.dtype, scale=None):
        return Refusal("rounding", name, f"{norm.op_type} rounds before its end")
    return None


def _without_norm(norm: ir.Node, x: ir.Value) -> None:
    """Have nothing read the norm: what read its shape reads that of `x`."""
    for use in list(norm.outputs[0].uses()):
        use.node.replace_input_with(use.idx, x)


def _joined(node: ir.Node, spec: Linear, norm: ir.Node, call: NormCall) -> Rewrite:
    given = (value for value in node.inputs[1:] if value is not None)
    numbers = {name: node.attributes[name].as_float() for name in spec.attributes}
    return Rewrite(
        rule=RULE,
        spec=dataclasses.replace(spec, norm="ln" if call.spec.centred else "rms"),
        inputs=(*call.inputs, *given),
        attributes={**numbers, **call.attributes},
        outputs=tuple(node.outputs),
        nodes=(node, norm),
    )
