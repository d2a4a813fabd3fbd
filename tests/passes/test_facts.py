"""What the rules may take for proved of a value, and what they may not."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from fusenorm.passes import facts
from tests.graphs import values


def annotated(body: str, inputs: str = "float[b,s,8] x", **options: object) -> int | None:
    """The last dimension of y that annotate proves where nothing is declared of y."""
    found = values(body, inputs, **options)  # type: ignore[arg-type]
    node = found["y"].producer()
    assert node is not None
    assert node.graph is not None
    facts.annotate(node.graph)  # type: ignore[arg-type]
    return facts.last_dim(found["y"])


def initializer(array: np.ndarray) -> ir.Value:
    return values("y = Identity(c)", constants={"c": array})["c"]


# Types and constants.


def test_types_are_the_floats_we_compute_in() -> None:
    inputs = "float[1] a, float16[1] b, bfloat16[1] c, double[1] d, int64[1] i"
    found = values("y = Identity(a)", inputs)
    kinds = [facts.dtype_of(found[name]) for name in "abcdi"]
    assert kinds == ["f32", "f16", "bf16", "f64", None]
    assert facts.dtype_of(ir.val("untyped")) is None


def test_a_constant_is_an_initializer_no_caller_can_override() -> None:
    found = values(
        "y = Add(x, fixed)",
        "float[2] x, float[2] given",
        constants={"fixed": np.float32([1, 2]), "given": np.float32([3, 4])},
    )
    np.testing.assert_array_equal(facts.constant(found["fixed"]), np.float32([1, 2]))
    assert [facts.constant(found[name]) for name in ("given", "x", "y")] == [None] * 3
    assert facts.constant(None) is None


@pytest.mark.parametrize(
    ("array", "number"),
    [
        (np.float32(1.5), 1.5),
        (np.float16([1.5]), 1.5),
        (np.int64([-3]), -3.0),
        (np.array(True), 1.0),
        (np.float32([[1.5]]), None),
        (np.float32([1, 1]), None),
        (np.zeros(0, np.float32), None),
        (np.array(["text"], object), None),
        (np.array(["12"], object), None),
    ],
)
def test_a_scalar_is_one_number_that_raises_no_rank(
    array: np.ndarray, number: float | None
) -> None:
    assert facts.scalar(initializer(array)) == number


def test_what_is_computed_or_overridable_or_absent_is_no_scalar() -> None:
    found = values("y = Add(x, given)", "float x, float given", constants={"given": np.float32(1)})
    assert [facts.scalar(found[name]) for name in ("x", "y", "given")] == [None] * 3
    assert facts.scalar(None) is None


def test_an_attribute_has_the_standard_s_default() -> None:
    found = values("a = Softmax(x)\ny = Softmax<axis = 1>(a)")
    plain, given = (found[name].producer() for name in "ay")
    assert plain is not None
    assert given is not None
    assert facts.attribute_int(plain, "axis", -1) == -1
    assert facts.attribute_int(given, "axis", -1) == 1


def test_the_node_that_makes_a_value() -> None:
    found = values("a = Neg(x)\nb = other.Neg(a)\ny = Abs(b)")
    assert facts.made_by(found["a"], "Neg") is found["a"].producer()
    assert [facts.made_by(v, "Neg") for v in (found["b"], found["y"], found["x"], None)] == [
        None
    ] * 4


@pytest.mark.parametrize(
    ("body", "kind", "order"),
    [
        ("y = Transpose<perm = [0, 2, 1]>(x)", "float[b,s,8]", (0, 2, 1)),
        ("y = Transpose<perm = [0, 2, 1]>(x)", "float[]", (0, 2, 1)),
        ("y = Transpose(x)", "float[b,s,8]", (2, 1, 0)),
        ("y = Transpose(x)", "float[]", None),
        ("y = other.Transpose(x)", "float[b,s,8]", None),
        ("y = Neg(x)", "float[b,s,8]", None),
    ],
)
def test_the_order_of_a_transpose(body: str, kind: str, order: tuple[int, ...] | None) -> None:
    assert facts.permutation(values(body, f"{kind} x")["y"].producer()) == order
    assert facts.permutation(None) is None


@pytest.mark.parametrize(
    ("kind", "size", "known"),
    [
        ("float16[b,s,4]", 8, (ir.DataType.FLOAT16, 4)),
        ("float16[b,s,n]", 8, (ir.DataType.FLOAT16, 8)),
        ("float16[b,s,4]", None, (ir.DataType.FLOAT16, 4)),
        ("float16[b,s,n]", None, (ir.DataType.FLOAT16, None)),
    ],
)
def test_what_is_known_is_not_assumed(kind: str, size: int | None, known: object) -> None:
    x = values("y = Neg(x)", f"{kind} x")["x"]
    facts.assume_row(x, "f32", size)
    assert (x.dtype, facts.last_dim(x)) == known


@pytest.mark.parametrize("size", [8, None])
def test_what_is_assumed_of_a_value_nothing_is_known_of(size: int | None) -> None:
    value = ir.val("untyped")
    facts.assume_row(value, "f32", size)
    assert (value.dtype, facts.last_dim(value)) == (ir.DataType.FLOAT, size)
    facts.assume_row(value, "f16", 4)
    assert (value.dtype, facts.last_dim(value)) == (ir.DataType.FLOAT, size or 4)


# Axes and dimensions.


@pytest.mark.parametrize(
    ("kind", "axis", "last"),
    [
        ("float[2,3,8]", -1, True),
        ("float[2,3,8]", 2, True),
        ("float[2,3,8]", 1, False),
        ("float[2,3,8]", 3, False),
        ("float[2,3,8]", -2, False),
        ("float[8]", 0, True),
        ("float[]", -1, True),
        ("float[]", 0, False),
        ("float[]", 2, False),
    ],
)
def test_the_last_axis_by_its_number(kind: str, axis: int, last: bool) -> None:
    x = values("y = Identity(x)", f"{kind} x")["x"]
    assert facts.is_last_axis(axis, x) == last


@pytest.mark.parametrize(
    ("kind", "axes", "count"),
    [
        ("float[2,3,8]", [-2, -1], 2),
        ("float[2,3,8]", [2, 1], 2),
        ("float[2,3,8]", [-1, 1], 2),
        ("float[2,3,8]", [0, 1, 2], 3),
        ("float[2,3,8]", [0, 1], None),
        ("float[2,3,8]", [0, 2], None),
        ("float[2,3,8]", [2, -1], None),
        ("float[2,3,8]", [], None),
        ("float[]", [-2, -1], 2),
        ("float[]", [-2, 1], None),
        ("float[]", [1, 2], None),
    ],
)
def test_the_last_axes_and_no_others(kind: str, axes: list[int], count: int | None) -> None:
    x = values("y = Identity(x)", f"{kind} x")["x"]
    assert facts.trailing_axes(axes, x) == count


@pytest.mark.parametrize(
    ("kind", "rank", "size"),
    [
        ("float[b,s,8]", 3, 8),
        ("float[8,s]", 2, None),
        ("float[0]", 1, 0),
        ("float", 0, None),
        ("float[]", None, None),
    ],
)
def test_rank_and_last_dimension(kind: str, rank: int | None, size: int | None) -> None:
    x = values("y = Identity(x)", f"{kind} x")["x"]
    assert (facts.rank(x), facts.last_dim(x)) == (rank, size)


@pytest.mark.parametrize(
    ("kind", "count", "dims"),
    [
        ("float[2,3,8]", 1, (8,)),
        ("float[2,3,8]", 2, (3, 8)),
        ("float[2,3,8]", 3, (2, 3, 8)),
        ("float[2,3,8]", 4, None),
        ("float[b,3,8]", 2, (3, 8)),
        ("float[2,s,8]", 2, None),
        ("float[2,0,8]", 2, None),
        ("float[2,1,8]", 2, (1, 8)),
        ("float[2,3,n]", 1, None),
        ("float[2,3,n]", 2, None),
        ("float[]", 1, None),
        ("float[2,0]", 1, (0,)),
    ],
)
def test_the_last_dimensions(kind: str, count: int, dims: tuple[int, ...] | None) -> None:
    x = values("y = Identity(x)", f"{kind} x")["x"]
    assert facts.trailing_dims(x, count) == dims


# Last dimensions that shape inference lost.

KEEPS = (
    "Abs Ceil Cos Cosh Elu Erf Exp Floor HardSigmoid HardSwish Identity LeakyRelu Log LogSoftmax "
    "Mish Neg Reciprocal Relu Round Selu Sigmoid Sign Sin Softmax Softplus Softsign Sqrt Tanh "
    "ThresholdedRelu Gelu IsInf IsNaN Dropout Clip"
).split()
SPELLED = {
    "Cast": "Cast<to = 10>(x)",
    "CastLike": "CastLike(x, half)",
    "Not": "Not(flags)",
    "LayerNormalization": "LayerNormalization(x, g)",
    "RMSNormalization": "RMSNormalization(x, g)",
    "Swish": "Swish(x)",
    "QuantizeLinear": "QuantizeLinear(x, one)",
    "DequantizeLinear": "DequantizeLinear(bytes, one)",
}
OPERANDS = "float[b,s,8] x, bool[b,s,8] flags, uint8[b,s,8] bytes"
CONSTANTS = {
    "half": np.float16(1),
    "g": np.ones(8, np.float32),
    "one": np.float32(1),
    "row": np.arange(1, 9, dtype=np.float32),
    "bits": np.array([True, False] * 4),
}


@pytest.mark.parametrize("op", [*KEEPS, *SPELLED])
def test_an_operator_that_keeps_every_dimension(op: str) -> None:
    expression = SPELLED.get(op, f"{op}(x)")
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 24]>\n'
        f"graph ({OPERANDS}) => (float[] y) {{\ny = {expression}\n}}"
    )
    proto.graph.output[0].ClearField("type")
    for name, array in CONSTANTS.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True).graph.output[0]
    dims = [dim.dim_param or dim.dim_value for dim in inferred.type.tensor_type.shape.dim]
    assert dims == ["b", "s", 8]
    assert annotated(f"y = {expression}", OPERANDS, constants=CONSTANTS, opset=24) == 8


@pytest.mark.parametrize(
    "expression",
    [
        *(f"{op}(x, row)" for op in "Add Sub Mul Div Pow Min Max PRelu Equal Less Greater".split()),
        "Mod<fmod = 1>(x, row)",
        "Where(flags, x, row)",
        *(f"{op}(flags, bits)" for op in ("And", "Or", "Xor")),
    ],
)
def test_an_operator_that_broadcasts(expression: str) -> None:
    assert annotated(f"y = {expression}", OPERANDS, constants=CONSTANTS) == 8


@pytest.mark.parametrize(
    ("a", "b", "size"),
    [
        ("float[s,8]", "float[s,1]", 8),
        ("float[s,1]", "float[s,8]", 8),
        ("float[s,n]", "float[s,8]", 8),
        ("float[s,1]", "float[s,1]", 1),
        ("float[s,1]", "float[s,n]", None),
        ("float[s,n]", "float[s,n]", None),
    ],
)
def test_broadcasting_keeps_what_is_not_1(a: str, b: str, size: int | None) -> None:
    assert annotated("y = Add(x, z)", f"{a} x, {b} z") == size


@pytest.mark.parametrize(
    ("body", "inputs", "size"),
    [
        ("y = MatMul(x, w)", "float[b,s,8] x, float[8,5] w", 5),
        ("y = MatMul(x, w)", "float[b,s,8] x, float[b,8,5] w", 5),
        ("y = MatMul(x, w)", "float[b,s,8] x, float[8] w", None),
        ("y = MatMul(x, w)", "float[b,s,8] x, float[] w", None),
        ("y = Gather(table, i)", "float[9,8] table, int64[b,s] i", 8),
        ("y = Gather<axis = 1>(table, i)", "float[9,8] table, int64[b,s] i", None),
        ("y = Gather(table, i)", "float[9] table, int64[b,s] i", None),
        ("y = Gather(table, i)", "float[] table, int64[b,s] i", None),
        ("y = ReduceMax<keepdims = 0>(x)", "float[b,s,8] x", None),
        ("y = Transpose<perm = [1, 0]>(x)", "float[n,8] x", None),
        ("y = other.Relu(x)", "float[b,s,8] x", None),
        ("half, y = Split<axis = -1, num_outputs = 2>(x)", "float[b,s,8] x", 4),
        ("half, y = Split<axis = 0, num_outputs = 2>(x)", "float[2,8] x", None),
        ("y, mask = Dropout(x)", "float[b,s,8] x", 8),
        ("z, y = Dropout(x)", "float[b,s,8] x", None),
        ("z, y = LayerNormalization(x, g)", "float[b,s,8] x, float[8] g", None),
        ("y = RandomNormal<shape = [2, 8]>()", "float[b,s,8] x", None),
    ],
)
def test_the_last_dimension_of(body: str, inputs: str, size: int | None) -> None:
    assert annotated(body, inputs) == size


@pytest.mark.parametrize(
    ("target", "size"), [([-1, 4], 4), ([4, -1], None), ([2, 0], None), ([], None), ([1], 1)]
)
def test_the_last_dimension_of_a_reshape(target: list[int], size: int | None) -> None:
    constants = {"shape": np.array(target, np.int64)}
    assert annotated("y = Reshape(x, shape)", "float[b,s] x", constants=constants) == size


@pytest.mark.parametrize(
    ("body", "size"),
    [
        ("to = Concat<axis = 0>(lead, four)\ny = Reshape(x, to)", 4),
        ("to = Concat<axis = 0>(lead, two_four)\ny = Reshape(x, to)", 4),
        ("to = Concat<axis = 0>(lead, four_two)\ny = Reshape(x, to)", 2),
        ("to = Concat<axis = 0>(four, lead)\ny = Reshape(x, to)", None),
        ("to = Concat<axis = 0>(lead, two_four, four_two)\ny = Reshape(x, to)", 2),
        ("to = Concat<axis = 0>(lead, one)\ny = Reshape(x, to)", 1),
        ("to = Concat<axis = 0>(lead, rest)\ny = Reshape(x, to)", None),
        ("to = Concat<axis = 0>(lead, none)\ny = Reshape(x, to)", None),
        ("to = Concat<axis = 0>(lead, zero)\ny = Reshape(x, to)", None),
        ("to = Neg(four)\ny = Reshape(x, to)", None),
        ("to = other.Concat(lead, four)\ny = Reshape(x, to)", None),
        ("y = Reshape(x, lead)", None),
    ],
)
def test_the_last_dimension_of_a_reshape_to_a_computed_shape(body: str, size: int | None) -> None:
    tails = {
        "four": [4],
        "two_four": [2, 4],
        "four_two": [4, 2],
        "one": [1],
        "rest": [-1],
        "none": [],
        "zero": [0],
    }
    constants = {name: np.array(tail, np.int64) for name, tail in tails.items()}
    assert annotated(body, "float[b,s] x, int64[2] lead", constants=constants) == size


def test_proved_dimensions_are_carried_on_and_survive_replacement() -> None:
    body = "r = Reshape(x, to)\nn = Neg(r)\ny = Add(n, r)"
    constants = {"to": np.array([0, -1, 4], np.int64)}
    assert annotated(body, "float[b,s] x", constants=constants) == 4
    found = values(body, "float[b,s] x", constants=constants)
    facts.annotate(found["y"].producer().graph)  # type: ignore[arg-type, union-attr]
    stand_in = ir.val("z")
    facts.copy_facts(found["n"], stand_in)
    assert facts.last_dim(stand_in) == 4
    facts.copy_facts(found["x"], stand_in)
    assert stand_in.shape == found["x"].shape
    assert stand_in.dtype == ir.DataType.FLOAT


def test_several_dimensions_are_never_proved_of_an_unknown_rank() -> None:
    body = "to = Concat<axis = 0>(lead, four)\nr = Reshape(x, to)\ny = Neg(r)"
    constants = {"four": np.array([4])}
    found = values(body, "float[b,s] x, int64[k] lead", constants=constants)
    facts.annotate(found["y"].producer().graph)  # type: ignore[arg-type, union-attr]
    assert facts.trailing_dims(found["r"], 1) == (4,)
    assert facts.trailing_dims(found["r"], 2) is None


def test_an_even_split_of_an_unknown_width_has_no_known_one() -> None:
    body = "z, y = Split<axis = -1>(x, even)"
    assert annotated(body, "float[b,n] x", constants={"even": np.array([4, 4])}) is None


def test_a_declared_dimension_is_not_overruled() -> None:
    found = values("z = Add(x, w)\ny = Neg(z)", "float[b,1] x, float[n] w", known="float[b,7] z")
    facts.annotate(found["y"].producer().graph)  # type: ignore[arg-type, union-attr]
    assert facts.last_dim(found["z"]) == facts.last_dim(found["y"]) == 7


# Rows and shapes.


@pytest.mark.parametrize(
    ("kind", "size", "is_row"),
    [
        ("float[8]", 8, True),
        ("float[1,8]", 8, True),
        ("float[1,1,8]", 8, True),
        ("float[2,8]", 8, False),
        ("float[2,1,8]", 8, False),
        ("float[n,8]", 8, False),
        ("float[4]", 8, False),
        ("float[8,1]", 8, False),
        ("float", 8, False),
        ("float", 1, False),
        ("float[1]", 1, True),
        ("float[]", 8, False),
    ],
)
def test_one_row_of_numbers(kind: str, size: int, is_row: bool) -> None:
    x = values("y = Identity(x)", f"{kind} x")["x"]
    assert facts.is_vector(x, size) == is_row


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("float[b,s,8]", "float[b,s,8]", True),
        ("float[2,3,8]", "float[2,3,8]", True),
        ("float[b,s,8]", "float[b,t,8]", False),
        ("float[b,s,8]", "float[s,8]", False),
        ("float[b,8]", "float[b,8,8]", False),
        ("float[b,s,8]", "float[b,s,4]", False),
        ("float[b,s,1]", "float[b,s,8]", False),
        ("float[?,8]", "float[?,8]", False),
        ("float[]", "float[]", False),
        ("float[]", "float[b,s,8]", False),
        ("float", "float", True),
    ],
)
def test_declared_shapes_are_the_same(a: str, b: str, same: bool) -> None:
    found = values("y = Add(x, z)", f"{a} x, {b} z")
    assert facts.same_shape(found["x"], found["z"]) == same
    assert facts.same_shape(found["z"], found["x"]) == same


@pytest.mark.parametrize(("shape", "same"), [("float[b,s,8]", False), ("float[2,3,8]", True)])
def test_names_of_an_output_may_be_written_by_hand(shape: str, same: bool) -> None:
    found = values("y = Add(x, z)", f"{shape} x, {shape} z")
    x, z, y = (found[name] for name in "xzy")
    y.shape = x.shape
    assert facts.same_shape(x, z)
    assert facts.same_shape(x, y) == facts.same_shape(y, x) == same


def test_a_value_has_its_own_shape() -> None:
    x = values("y = Neg(x)", "float[] x")["x"]
    assert facts.same_shape(x, x)


TWINS = "y = Add(a, b)"  # a and b, both from x, of no declared shape


@pytest.mark.parametrize(
    "lines",
    [
        "a = MatMul(x, w)\nb = MatMul(x, v)",
        "a = MatMul(x, w)\nl = MatMul(x, v)\nb = Sigmoid(l)",
        "l = MatMul(x, w)\nr = MatMul(x, v)\na = Add(l, row)\nb = Add(row, r)",
        "l = MatMul(x, w)\nr = MatMul(x, v)\na = Mul(l, row)\nb = Div(r, one)",
        "l = MatMul(x, w)\nr = MatMul(x, v)\na = Sub(l, row)\nb = Pow(r, one)",
        "l = MatMul(x, w)\na, b = Split<axis = -1, num_outputs = 2>(l)",
        "l = MatMul(x, w)\na = Slice(l, i0, i4, last)\nb = Slice(l, i4, i8, last)",
        "l = MatMul(x, w)\na, m = Dropout(l)\nb = Neg(l)",
    ],
)
def test_two_values_of_one_origin_have_one_shape(lines: str) -> None:
    assert _twins(lines)


@pytest.mark.parametrize(
    "lines",
    [
        "a = MatMul(x, w)\nb = MatMul(x, wide)",  # another width
        "a = MatMul(x, w)\nb = MatMul(z, w)",  # another origin
        "a = MatMul(x, w)\nb = MatMul(x, batched)",  # weights that may enlarge
        "a = MatMul(x, w)\nb = MatMul(x, unknown)",
        "l = MatMul(x, w)\na = Neg(l)\nb = Add(l, matrix)",  # a constant that may enlarge
        "l = MatMul(x, w)\na = Neg(l)\nb = Add(l, z)",
        "l = MatMul(x, thin)\na = MatMul(x, w)\nb = Add(l, row)",  # 1 that becomes 8: still x's
        "l = MatMul(x, w)\na = Neg(l)\nb = other.Neg(l)",
        "a, t = Split<axis = 1, num_outputs = 2>(x)\nb = Neg(x)",
        "a = Slice(x, i0, i4, one_axis)\nb = Neg(x)",
        "a = ReduceMax<keepdims = 1>(x, one_axis)\nb = Neg(x)",
        "a = MatMul(x, p)\nb = MatMul(x, q)",  # widths nobody knows
        "a = Slice(x, i0, i8, last, two)\nb = Slice(z, i0, i8, last, two)",
        "a = Neg(x)\nt, b = Dropout(x)",
    ],
)
def test_what_might_have_another_shape(lines: str) -> None:
    assert not _twins(lines)


def _twins(lines: str) -> bool:
    shapes = {
        **dict.fromkeys(("w", "v"), (8, 8)), "wide": (8, 4), "thin": (8, 1), "batched": (2, 8, 8),
        "matrix": (5, 8), "row": (8,), "one": (),
    }  # fmt: skip
    constants = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    indices = {"i0": 0, "i4": 4, "i8": 8, "last": -1, "one_axis": 1, "two": 2}
    constants |= {name: np.array([index]) for name, index in indices.items()}
    inputs = "float[?,?,8] x, float[?,?,8] z, float[] unknown, float[8,n] p, float[8,m] q"
    # Of parts along the rows the width is declared: it is the rows that differ.
    declared = any(words in lines for words in ("axis = 1", "one_axis", "other."))
    known = "float[?,?,8] a, float[?,?,8] b" if declared else ""
    found = values(f"{lines}\n{TWINS}", inputs, constants=constants, known=known)
    facts.annotate(found["y"].producer().graph)  # type: ignore[arg-type, union-attr]
    return facts.same_shape(found["a"], found["b"])


def test_the_first_axis_is_the_default_one_to_split() -> None:
    body = "a, t = Split<num_outputs = 2>(x)\nz = Neg(x)\ny = Neg(z)"
    found = values(body, "float[?,8] x", known="float[?,8] a, float[?,8] t, float[?,8] z")
    assert not facts.same_shape(found["a"], found["z"])
    assert facts.half_of(found["a"]) is None


@pytest.mark.parametrize(("axis", "same"), [(-1, True), (2, True), (1, False), (0, False)])
def test_parts_of_any_size_share_the_rows(axis: int, same: bool) -> None:
    body = f"a, b, t = Split<axis = {axis}>(x, sizes)\ny = Add(a, b)"
    known = "float[?,?,2] a, float[?,?,2] b"
    found = values(body, "float[?,?,8] x", known=known, constants={"sizes": np.array([2, 2, 4])})
    assert facts.same_shape(found["a"], found["b"]) == same


def test_a_walk_that_is_given_up_proves_nothing() -> None:
    lines = [
        f"{to} = Neg({of})"
        for i in range(300)
        for to, of in ((f"a{i + 1}", f"a{i}"), (f"b{i + 1}", f"b{i}"))
    ]
    found = values("\n".join([*lines, "y = Add(a300, b300)"]), "float[?,8] a0, float[?,8] b0")
    facts.annotate(found["y"].producer().graph)  # type: ignore[arg-type, union-attr]
    assert not facts.same_shape(found["a300"], found["b300"])
    assert facts.same_shape(found["a200"], found["a3"])


# What a node reads.


def test_a_node_reads_what_its_bodies_capture() -> None:
    body = """
      a = Neg(x)
      c = Abs(x)
      y = If (flag) <
        then_branch = yes () => (float[] p) { p = Relu(a) },
        else_branch = no () => (float[] q) {
          q = If (flag) <
            then_branch = inner () => (float[] u) { u = Exp(c) },
            else_branch = alone () => (float[] v) { v = Identity(z) }
          >
        }
      >
    """
    found = values(body, "float[b,s,8] x, float[b,s,8] z, bool flag")
    node = found["y"].producer()
    assert node is not None
    assert {"flag", "a", "c", "z"} <= {value.name for value in facts.operands(node)}
    assert "x" not in {value.name for value in facts.operands(node)}
    plain = values("y = Clip(x, , high)", "float[2] x, float high")
    node = plain["y"].producer()
    assert node is not None
    assert [value.name for value in facts.operands(node)] == ["x", "high"]


def test_bodies_in_a_list_and_outer_values_they_return() -> None:
    outer, inner = ir.val("outer"), ir.val("inner")
    own = ir.node("Neg", [inner])
    bodies = [ir.Graph([], [outer], nodes=[]), ir.Graph([], own.outputs, nodes=[own])]
    several = ir.Attr("bodies", ir.AttributeType.GRAPHS, bodies)
    node = ir.Node("other", "Switch", [ir.val("x")], [several])
    read = {value.name for value in facts.operands(node)}
    assert {"x", "outer", "inner"} <= read


@pytest.mark.parametrize(
    ("name", "free"), [("free", "free"), ("x", "x_2"), ("k", "k_3"), ("a", "a_2")]
)
def test_a_name_nothing_has(name: str, free: str) -> None:
    body = "a = Neg (x)\nk_2 = Mul (a, k)"
    found = values(body, "float[b,s,8] x", constants={"k": np.float32(2)})
    graph = found["a"].producer().graph  # type: ignore[union-attr]
    assert isinstance(graph, ir.Graph)
    assert facts.unused(name, graph) == free


@pytest.mark.parametrize(
    ("body", "reads"),
    [("y = Shape (x)", True), ("y = Size (x)", True), ("y = Neg (x)", False)],
)
def test_what_reads_nothing_but_a_shape(body: str, reads: bool) -> None:
    node = values(body, "float[b,s,8] x")["y"].producer()
    assert node is not None
    assert facts.reads_shape(node) == reads
