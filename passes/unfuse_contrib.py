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
from fusenorm.passes.pattern import Miss, Refusal, node_name
from fusenorm.passes.rewrite import MISS_KEY

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
        op: what the report calls it where it stays.
        inputs: a name for each input slot; the body reads these.
        outputs: the value each output slot stands for; None where we do not write it out.
        write: writes the body.
        epsilon: default of the attribute `epsilon`.
        types: what it may be stored in.
    """

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str | None, ...]
    write: Writer
    epsilon: float = 1e-12
    types: tuple[DType, ...] = ("f32", "f16")


def _norm(*, centred: bool, skip: bool) -> Writer:
    def write(body: Body, call: _Call) -> None:
        # Behind the scale: beta (SkipLayerNormalization only), then a bias of the sum.
        beta = centred and call.has(3)
        if skip:
            biased = call.has(3 + centred)
            body.let("skip", "Add (skip_in, sum_bias)" if biased else "Identity (skip_in)")
        spec = Norm(
            centred=centred,
            skip=skip,
            dtype=call.dtype,
            scale=call.dtype,
            bias=call.dtype if beta else None,
            residual="f32",
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


def _embedding(body: Body, call: _Call) -> None:
    """The kernel adds the position's row to the word's, then the segment's, each time in f32."""
    body.let("zero", "Constant <value_int: int = 0> ()")
    ids = "position_ids"
    if not call.has(8):
        body.let("shape", "Shape (input_ids)")
        body.let("one", "Constant <value_int: int = 1> ()")
        body.let("length", "Gather (shape, one)")
        ids = body.let("position_range", "Range (zero, length, one)")
    words, positions = "Gather (word, input_ids)", f"Gather (position, {ids})"
    if call.has(4):
        body.let("word_row", words)
        body.let("position_row", positions)
        body.let("x", "Add (word_row, position_row)")
        body.let("skip", f"Gather (segment, {'segment_ids' if call.has(1) else 'zero'})")
    else:
        body.let("x", words)
        body.let("skip", positions)
    Norm(centred=True, skip=True, dtype=call.dtype, scale=call.dtype, bias=call.dtype).write(body)


_SKIP = ("x", "skip_in", "scale")
_TABLES = ("word", "position", "segment")
TABLE: dict[tuple[str, str], _Contrib] = {
    ("", "SimplifiedLayerNormalization"): _Contrib(
        "RMSNorm", ("x", "scale"), ("y", None), _norm(centred=False, skip=False), 1e-5
    ),
    (CONTRIB, "SkipLayerNormalization"): _Contrib(
        "SkipLayerNorm",
        (*_SKIP, "bias", "sum_bias"),
        ("y", None, None, "s"),
        _norm(centred=True, skip=True),
    ),
    (CONTRIB, "SkipSimplifiedLayerNormalization"): _Contrib(
        "SkipRMSNorm",
        (*_SKIP, "sum_bias"),
        ("y", None, None, "s"),
        _norm(centred=False, skip=True),
    ),
    (CONTRIB, "EmbedLayerNormalization"): _Contrib(
        "SkipLayerNorm",
        ("input_ids", "segment_ids", *_TABLES, "scale", "bias", "mask", "position_ids"),
        ("y", None, "s"),
        _embedding,
        types=("f32",),
    ),
    (CONTRIB, "Gelu"): _Contrib("Gelu", ("x",), ("y",), _activation("gelu")),
    (CONTRIB, "BiasGelu"): _Contrib("Gelu", ("x", "bias"), ("y",), _activation("gelu", bias=1)),
    (CONTRIB, "FastGelu"): _Contrib(
        "Gelu", ("x", "bias"), ("y",), _activation("gelu_tanh", bias=1)
    ),
    (CONTRIB, "QuickGelu"): _Contrib("Swish", ("x",), ("y",), _activation("swish")),
    (CONTRIB, "BiasSplitGelu"): _Contrib("GLU", ("x", "bias"), ("y",), _split_gelu),
}


class UnfuseContrib(ir.passes.InPlacePass):
    """Write out onnxruntime's fused norms and activations.

    A node stays as it is where it returns statistics or a mask index somebody reads
    (`stats_used`), normalises another axis than the last (`axis`), or is stored in another type
    than its body is known to be right for (`types`, `type_unknown`). An embedding's indices must
    not be negative: the kernel refuses them, Gather counts them from the end.
    """

    name = "unfuse_contrib"

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        opset = model.opset_imports.get("", 0)
        written: list[ir.Function] = []
        for graph in model.graphs():
            for node in graph:
                entry = TABLE.get((node.domain, node.op_type))
                if entry is None:
                    continue
                call = _read(node, entry, opset)
                if isinstance(call, Refusal):
                    node.meta[MISS_KEY] = (entry.op, Miss((node,), call))
                    continue
                _type_rows(node, entry, call.dtype)
                function = _function(f"{node.op_type}_{len(written)}", node, entry, call, opset)
                written.append(function)
                model.functions[function.identifier()] = function
                node.domain, node.op_type = function.domain, function.name
        if not written:
            return ir.passes.PassResult(model, False)
        common.InlinePass(criteria=lambda function: function.domain == _BODIES)(model)
        common.NameFixPass()(model)
        return ir.passes.PassResult(model, True)


def _read(node: ir.Node, entry: _Contrib, opset: int) -> _Call | Refusal:
    name = node_name(node)
    if opset < Norm.MIN_OPSET:
        return Refusal("opset", name, f"opset {opset} is older than {Norm.MIN_OPSET}")
    for slot, value in zip(entry.outputs, node.outputs, strict=False):
        if slot is None and (value.uses() or value.is_graph_output()):
            return Refusal("stats_used", name, f"its output {value.name} is used elsewhere")
    if facts.attribute_int(node, "axis", -1) != -1:
        return Refusal("axis", name, "normalises another axis than the last")
    known = [facts.dtype_of(value) for value in node.inputs if value is not None]
    dtype = next((kind for kind in known if kind is not None), None)
    if dtype is None:
        return Refusal("type_unknown", name, "the type of its input is unknown")
    if dtype not in entry.types:
        return Refusal("types", name, f"{node.op_type} in {dtype} stays onnxruntime's")
    if {*known} - {None, dtype}:
        return Refusal("types", name, "its scale has another type than its input")
    numbers = {"epsilon": entry.epsilon, "beta": 1.702}
    for ours, theirs in (("epsilon", "epsilon"), ("beta", "alpha")):
        attribute = node.attributes.get(theirs)
        if attribute is not None:
            numbers[ours] = attribute.as_float()
    return _Call(tuple(value is not None for value in node.inputs), dtype, numbers)


def _type_rows(node: ir.Node, entry: _Contrib, dtype: DType) -> None:
    """Type the rows a node reads: where another contrib op computes them, nothing else does."""
    slots = dict(zip(entry.inputs, node.inputs, strict=False))
    vectors = [value for slot in ("scale", "bias") if (value := slots.get(slot)) is not None]
    size = facts.last_dim(vectors[0]) if vectors else None
    for slot in ("x", "skip_in"):
        row = slots.get(slot)
        if row is not None:
            facts.assume_row(row, dtype, size)


def _function(name: str, node: ir.Node, entry: _Contrib, call: _Call, opset: int) -> ir.Function:
    body = Body(opset)
    names = entry.inputs[: len(node.inputs)]
    given = [slot for slot, present in zip(names, call.present, strict=True) if present]
    stored = call.dtype
    if "sum_bias" in given:  # three terms, and only their sum is rounded
        call = dataclasses.replace(call, dtype="f32")
    for slot in given:
        body.cast(slot, f"{slot}_stored", stored, call.dtype)
    entry.write(body, call)
    results = enumerate(entry.outputs[: len(node.outputs)])
    outputs = ", ".join(
        body.cast(f"{result}_stored", result, call.dtype, stored)
        if result
        else body.let(f"unused_{index}", "Identity (x)")
        for index, result in results
    )
    lines = "\n".join(body.lines)
    for number, value in call.numbers.items():
        lines = lines.replace(f"@{number}", repr(value))
    inputs = ", ".join(f"{slot}_stored" if call.dtype != stored else slot for slot in names)
    text = (
        f'<domain: "{_BODIES}", opset_import: ["" : {opset}]>\n'
        f"{name} ({inputs}) => ({outputs})\n{{\n{lines}\n}}"
    )
    return ir.serde.deserialize_function(onnx.parser.parse_function(text))
