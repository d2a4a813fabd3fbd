"""Random transformer-like graphs with decoys: outputs never change, nothing crashes.

FUSENORM_EXAMPLES=10000 runs the nightly length.
"""

from __future__ import annotations

import os

import numpy as np
import onnx
import onnx_ir as ir
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

import fusenorm
from fusenorm.ops import DOMAIN, DTYPES, DType, parse
from fusenorm.passes import RULES
from fusenorm.passes.speller import WIDTH, Speller
from tests.graphs import rows, run

EXAMPLES = int(os.environ.get("FUSENORM_EXAMPLES", "200"))
SHAPE = (2, WIDTH, WIDTH)  # square, so that a norm over the wrong axis still runs


class Drawn(Speller):
    """A speller whose choices hypothesis makes."""

    def __init__(self, data: st.DataObject, opset: int, dtype: DType) -> None:
        super().__init__((), opset, dtype, len(SHAPE))
        self.shape = SHAPE
        self.data = data

    def pick(self, count: int) -> int:
        return self.data.draw(st.integers(0, count - 1))

    def row(self, name: str, factor: int = 1) -> ir.Value:
        """An earlier value of the graph, or a new input."""
        value = self.earlier() if factor == 1 else self.widened()
        self.values[name] = value
        return value

    def earlier(self) -> ir.Value:
        return self.rows[self.pick(len(self.rows))]

    def widened(self) -> ir.Value:
        weight = self.numbers(WIDTH, 2 * WIDTH)
        return self.shaped(self.node("MatMul", [self.earlier(), weight]), 2 * WIDTH)

    def numbers(self, *shape: int) -> ir.Value:
        rng = np.random.default_rng(self.pick(50))
        return self.constant(rng.normal(0, 0.4, shape).astype(DTYPES[self.dtype].numpy))

    def shaped(self, value: ir.Value, width: int = WIDTH) -> ir.Value:
        value.shape = ir.Shape((*SHAPE[:-1], width))
        return value

    def vector(self, name: str) -> None:
        """A constant row, or a decoy: a matrix, a column, a scalar, a run-time value."""
        kind = self.pick(12)
        shapes = {0: (WIDTH, WIDTH), 1: (WIDTH, 1), 2: (1,), 3: (1, 1, WIDTH)}
        self.values[name] = (
            self.earlier() if kind == 4 else self.numbers(*shapes.get(kind, (WIDTH,)))
        )

    def scalar(self, name: str, number: float) -> None:
        """The number, or a decoy: a row of numbers."""
        if self.pick(12) == 0:
            array = np.linspace(0.5, 1.5, WIDTH) * number
            self.values[name] = self.constant(array.astype(DTYPES[self.dtype].numpy))
        else:
            super().scalar(name, number)

    rows: list[ir.Value]


def _decoy(speller: Drawn) -> ir.Value:
    """Something a transformer holds besides norms, or that only looks like a norm."""
    x, kind = speller.earlier(), speller.pick(9)
    if kind == 0:
        return speller.node("Add", [x, speller.earlier()])
    if kind == 1:
        return speller.node("MatMul", [x, speller.numbers(WIDTH, WIDTH)])
    if kind == 2:
        return speller.node("Add", [x, speller.numbers(WIDTH)])
    if kind == 3:
        scale = speller.numbers(*((WIDTH,), (1,), (WIDTH, 1))[speller.pick(3)])
        return speller.node("Mul", [x, scale])
    if kind == 4:
        return speller.node(("Tanh", "Sigmoid", "Relu", "Neg")[speller.pick(4)], [x])
    if kind == 5:
        return speller.node("Transpose", [x], perm=[0, 2, 1])
    if kind == 6:  # a norm over another axis, or swapped, or without its epsilon
        axis = (1, -2, 0, -1)[speller.pick(4)]
        mean = speller.node("ReduceMean", [x], axes=[axis], keepdims=1)
        pair = [x, mean] if speller.pick(2) else [mean, x]
        centred = speller.node("Sub", pair)
        square = speller.node("Mul", [centred, centred])
        other = (axis, -1)[speller.pick(2)]
        spread = speller.node("ReduceMean", [square], axes=[other], keepdims=1)
        shifted = speller.node("Add", [spread, speller.number(0.01, speller.dtype)])
        return speller.node("Div", [centred, speller.node("Sqrt", [shifted])])
    if kind == 7:
        return speller.node("Mul", [x, speller.earlier()])
    flat = speller.node("Reshape", [x, speller.constant(np.array([-1, WIDTH], np.int64))])
    return speller.node("Reshape", [flat, speller.constant(np.array(SHAPE, np.int64))])


@st.composite
def graphs(draw: st.DrawFn) -> ir.Model:
    speller = Drawn(draw(st.data()), 17, "f32")
    inputs = [ir.val(f"x{i}", dtype=ir.DataType.FLOAT, shape=ir.Shape(SHAPE)) for i in range(2)]
    speller.inputs = inputs
    speller.rows = list(inputs)
    rules = [rule for rule in RULES if rule.name != "residual"]
    for _ in range(draw(st.integers(2, 7))):
        if draw(st.booleans()):
            rule = draw(st.sampled_from(rules))
            speller.axes = speller.pick(len(SHAPE)) + 1
            rule.example(speller)
            value = rule.pattern.spell(speller)
        else:
            value = _decoy(speller)
        speller.rows.append(speller.shaped(value))
    produced = [node.outputs[0] for node in speller.nodes]
    outputs = {speller.rows[-1]: None}
    for value in draw(st.lists(st.sampled_from(produced), max_size=2)):
        outputs[value] = None
    return ir.Model(
        ir.Graph(
            inputs,
            [value for value in outputs if value.producer() is not None] or [produced[-1]],
            nodes=speller.nodes,
            initializers=speller.initializers,
            opset_imports={"": 17},
            name="random",
        ),
        ir_version=8,
    )


def _typed(model: ir.Model) -> onnx.ModelProto | None:
    """The model with every type and shape inferred, None if it is not a valid one."""
    proto = ir.to_proto(model)
    for output in proto.graph.output:
        output.ClearField("type")
    try:
        proto = onnx.shape_inference.infer_shapes(proto, strict_mode=True, check_type=True)
        onnx.checker.check_model(proto)
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError):
        return None
    return proto


def _in_f64(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The same algebra with every float in f64, fused ops by their f64 twins."""
    wide = onnx.ModelProto()
    wide.CopyFrom(proto)
    double = onnx.TensorProto.DOUBLE
    del wide.graph.value_info[:], wide.functions[:]
    for info in (*wide.graph.input, *wide.graph.output):
        info.type.tensor_type.elem_type = double
    for tensor in wide.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        if array.dtype == np.float32:
            tensor.CopyFrom(onnx.numpy_helper.from_array(array.astype(np.float64), tensor.name))
    functions = {}
    for node in wide.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.i == onnx.TensorProto.FLOAT:
                attribute.i = double
        if node.domain == DOMAIN:
            spec = parse(node.op_type)
            assert spec is not None
            twin = spec.with_dtype("f64")
            node.op_type = twin.op_type
            functions[twin.op_type] = twin.function(17)
    wide.functions.extend(functions.values())
    return wide


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES <= 200,
    suppress_health_check=list(HealthCheck),
)
@given(graphs())
def test_outputs_never_change(model: ir.Model) -> None:
    proto = _typed(model)
    if proto is None:
        return
    feeds = {f"x{i}": rows(*SHAPE, seed=i, dtype=np.float32) for i in range(2)}
    result = fusenorm.optimize(proto)
    after = ir.to_proto(result.model)
    onnx.checker.check_model(after)
    run(after, feeds)
    # In f64 what differs is the formula, not the rounding of an ill-conditioned chain.
    wide = {name: value.astype(np.float64) for name, value in feeds.items()}
    with np.errstate(all="ignore"):
        before_values = ReferenceEvaluator(_in_f64(proto)).run(None, wide)
        after_values = ReferenceEvaluator(_in_f64(after)).run(None, wide)
    for a, b in zip(before_values, after_values, strict=True):
        assert a.shape == b.shape
        assert np.array_equal(np.isfinite(a), np.isfinite(b))
        finite = np.isfinite(a)
        scale = max(float(np.abs(a[finite]).max(initial=0)), 1e-3)
        difference = np.abs(a - b, where=finite, out=np.zeros_like(a))
        assert float(difference.max()) <= 1e-4 * scale  # constants are kept in f32
    again = fusenorm.optimize(result.model)
    assert again.report.counts == result.report.counts
