"""Models onnxruntime has optimised already: its own fused ops, written out again.

Each contrib op is given a body in the words of our declarations and inlined, so that the rules
see one algebra whoever fused it first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import onnx.parser
import onnx_ir as ir
import onnx_ir.passes.common as common

from fusenorm.ops import ACTIVATIONS, DType, Norm
from fusenorm.ops.spec import Body
from fusenorm.passes import facts

CONTRIB = "com.microsoft"
_BODIES = "fusenorm.contrib"


@dataclasses.dataclass(frozen=True)
class _Call:
    """One contrib node: which inputs are present, their type, its float attributes."""

    present: tuple[bool, ...]
    dtype: DType
    numbers: Mapping[str, float]

    def has(self, index: int) -> bool:
        return index < len(self.present) and self.present[index]


Writer = Callable[[Body, _Call], None]


@dataclasses.dataclass(frozen=True)
class _Contrib:
    """How a contrib op is written out.

    Attributes:
        inputs: a name for each input slot; the body reads these.
        outputs: the value each output slot stands for; None where we do not write it out.
        write: writes the body.
        epsilon: default of the attribute `epsilon`.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str | None, ...]
    write: Writer
    epsilon: float = 1e-12


def _norm(*, centred: bool, skip: bool) -> Writer:
    def write(body: Body, call: _Call) -> None:
        # The order of the optional inputs: beta (LayerNorm only), then a bias of the sum.
        first = 3 if skip else 2
        beta = call.has(first) if centred else False
        if skip and call.has(first + centred):
            body.let("skip", "Add (skip_in, sum_bias)")
        elif skip:
            body.let("skip", "Identity (skip_in)")
        spec = Norm(
            centred=centred,
            skip=skip,
            dtype=call.dtype,
            scale=call.dtype,
            bias=call.dtype if beta else None,
            residual="storage" if call.dtype == "f32" or not skip else "f32",
        )
        spec.write(body)

    return write


def _activation(name: str, *, bias: int | None = None) -> Writer:
    def write(body: Body, call: _Call) -> None:
        value = "x"
        if bias is not None and call.has(bias):
            value = body.let("biased", "Add (x, bias)")
        body.result("y", ACTIVATIONS[name].write(body, value, call.dtype))

    return write


def _split_gelu(body: Body, call: _Call) -> None:
    body.let("biased", "Add (x, bias)")
    body.halves("up", "gate", "biased")
    activated = ACTIVATIONS["gelu"].write(body, "gate", call.dtype)
    body.let("y", f"Mul (up, {activated})")


_SKIP = ("x", "skip_in", "scale")
TABLE: dict[tuple[str, str], _Contrib] = {
    ("", "SimplifiedLayerNormalization"): _Contrib(
        ("x", "scale"), ("y", None), _norm(centred=False, skip=False), 1e-5
    ),
    (CONTRIB, "SkipLayerNormalization"): _Contrib(
        (*_SKIP, "bias", "sum_bias"), ("y", None, None, "s"), _norm(centred=True, skip=True)
    ),
    (CONTRIB, "SkipSimplifiedLayerNormalization"): _Contrib(
        (*_SKIP, "sum_bias"), ("y", None, None, "s"), _norm(centred=False, skip=True)
    ),
    (CONTRIB, "Gelu"): _Contrib(("x",), ("y",), _activation("gelu")),
    (CONTRIB, "BiasGelu"): _Contrib(("x", "bias"), ("y",), _activation("gelu", bias=1)),
    (CONTRIB, "FastGelu"): _Contrib(("x", "bias"), ("y",), _activation("gelu_tanh", bias=1)),
    (CONTRIB, "QuickGelu"): _Contrib(("x",), ("y",), _activation("swish")),
    (CONTRIB, "BiasSplitGelu"): _Contrib(("x", "bias"), ("y",), _split_gelu),
}


class UnfuseContrib(ir.passes.InPlacePass):
    """Write out onnxruntime's fused norms and activations.

    A node stays as it is where it returns statistics somebody reads, normalises another axis
    than the last, or the type of its input is not known.
    """

    name = "unfuse_contrib"

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        opset = model.opset_imports.get("", 0)
        count = 0
        for graph in model.graphs():
            for node in graph:
                entry = TABLE.get((node.domain, node.op_type))
                call = _read(node, entry) if entry is not None else None
                if entry is not None and call is not None and opset >= Norm.MIN_OPSET:
                    function = _function(f"{node.op_type}_{count}", node, entry, call, opset)
                    model.functions[function.identifier()] = function
                    node.domain, node.op_type = function.domain, function.name
                    node.attributes.clear()
                    count += 1
        if not count:
            return ir.passes.PassResult(model, False)
        common.InlinePass(criteria=lambda function: function.domain == _BODIES)(model)
        common.NameFixPass()(model)
        common.RemoveUnusedOpsetsPass(process_functions=False)(model)
        return ir.passes.PassResult(model, True)


def _read(node: ir.Node, entry: _Contrib) -> _Call | None:
    used = [bool(out.uses()) or out.is_graph_output() for out in node.outputs]
    if any(use and entry.outputs[index] is None for index, use in enumerate(used)):
        return None
    if facts.attribute_int(node, "axis", -1) != -1:
        return None
    known = [facts.dtype_of(value) for value in node.inputs if value is not None]
    dtype = next((kind for kind in known if kind is not None), None)
    if dtype not in ("f32", "f16"):
        return None
    numbers = {"epsilon": entry.epsilon, "beta": 1.702}
    for ours, theirs in (("epsilon", "epsilon"), ("beta", "alpha")):
        attribute = node.attributes.get(theirs)
        if attribute is not None:
            numbers[ours] = attribute.as_float()
    return _Call(tuple(value is not None for value in node.inputs), dtype, numbers)


def _function(name: str, node: ir.Node, entry: _Contrib, call: _Call, opset: int) -> ir.Function:
    body = Body(opset)
    entry.write(body, call)
    lines = "\n".join(body.lines)
    for number, value in call.numbers.items():
        lines = lines.replace(f"@{number}", repr(value))
    inputs = ", ".join(entry.inputs[: len(node.inputs)])
    outputs = ", ".join(
        slot or f"unused_{index}" for index, slot in enumerate(entry.outputs[: len(node.outputs)])
    )
    for index, slot in enumerate(entry.outputs[: len(node.outputs)]):
        if slot is None:
            lines += f"\nunused_{index} = Identity (x)"
    text = (
        f'<domain: "{_BODIES}", opset_import: ["" : {opset}]>\n'
        f"{name} ({inputs}) => ({outputs})\n{{\n{lines}\n}}"
    )
    return ir.serde.deserialize_function(onnx.parser.parse_function(text))
