"""Shape inference of whole models: what becomes known, what stays unknown, what is new."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from fusenorm.passes import infer_shapes
from fusenorm.passes.infer_shapes import InferShapes

HEAD = '<ir_version: 8, opset_import: ["" : 18, "other" : 1, "local" : 1]>'
X = "float[b,s,8] x"


def parsed(
    body: str,
    inputs: str = X,
    *,
    known: str = "",
    output: str = "float[] y",
    rest: str = "",
    constants: Mapping[str, np.ndarray] | None = None,
) -> ir.Model:
    """A model of one output, y, whose type is unknown unless given."""
    text = f"{HEAD}\ngraph ({inputs}) => ({output}) <{known}> {{\n{body}\n}}\n{rest}"
    proto = onnx.parser.parse_model(text)
    for name, array in (constants or {}).items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    model = ir.from_proto(proto)
    if output == "float[] y":
        model.graph.outputs[0].type = model.graph.outputs[0].shape = None
    return model


def learned(model: ir.Model) -> tuple[str, ir.DataType | None] | None:
    """Shape and type of y, None where nothing was learned of any value."""
    result = InferShapes()(model)
    y = model.graph.outputs[0]
    assert not InferShapes()(model).modified
    return (str(y.shape), y.dtype) if result.modified else None


FLOAT = ir.DataType.FLOAT


@pytest.mark.parametrize(
    ("body", "known", "shape"),
    [
        ("y = Neg(x)", "", "[b,s,8]"),
        ("a = Neg(x)\ny = Transpose(a)", "", "[8,s,b]"),
        # A shape computed from a shape.
        (
            "h = Shape<start = 0, end = 1>(x)\nt = Concat<axis = 0>(h, h)\n"
            "z = ConstantOfShape(t)\ny = Add(z, z)",
            "",
            "[b,b]",
        ),
        # What is declared of values nobody can infer is taken as it is.
        ("a = other.Thing(x)\ny = Neg(a)", "float[b,4] a", "[b,4]"),
    ],
)
def test_what_follows_from_the_inputs(body: str, known: str, shape: str) -> None:
    assert learned(parsed(body, known=known)) == (shape, FLOAT)


def test_functions_of_the_model_are_looked_into() -> None:
    rest = '<domain: "local", opset_import: ["" : 18]>\nf (p) => (q) { q = Transpose(p) }'
    assert learned(parsed("y = local.f(x)", rest=rest)) == ("[8,s,b]", FLOAT)


def test_an_operator_means_what_it_does_in_the_model_s_opset() -> None:
    model = parsed("y = ReduceSum<axes = [1], keepdims = 0>(x)")
    model.graph.opset_imports[""] = 12
    assert learned(model) == ("[b,8]", FLOAT)


def test_what_cannot_be_inferred_stays_unknown() -> None:
    assert learned(parsed("y = other.Thing(x)")) is None


@pytest.mark.parametrize(
    "body",
    [
        "q = SequenceConstruct(x)\ny = ConcatFromSequence<axis = 0>(q)",
        "o = Optional(x)\ny = OptionalGetElement(o)",
    ],
)
def test_a_model_of_sequences_or_optionals_stays_as_it_is(body: str) -> None:
    model = parsed(f"a = Neg(x)\n{body}")
    assert learned(model) is None
    assert model.graph[0].outputs[0].shape is None


def test_a_model_inference_cannot_handle_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> onnx.ModelProto:
        raise ValueError("too large")

    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", fail)
    assert learned(parsed("y = Neg(x)")) is None


# Constants.


@pytest.mark.parametrize("overridable", [False, True])
def test_a_shape_a_caller_may_override_is_unknown(overridable: bool) -> None:
    inputs = f"{X}, int64[3] to" if overridable else X
    model = parsed("y = Reshape(x, to)", inputs, constants={"to": np.array([2, 3, 8])})
    InferShapes()(model)
    shape = model.graph.outputs[0].shape
    assert shape is not None
    assert (shape.dims == (2, 3, 8)) == (not overridable)


@pytest.mark.parametrize(("size", "kept"), [(1000, True), (1001, False)])
def test_only_small_constants_are_shapes(size: int, kept: bool) -> None:
    model = parsed("y = Cast<to = 1>(w)", constants={"w": np.zeros(size, np.uint8)})
    proto = infer_shapes._without_weights(model)
    assert [tensor.name for tensor in proto.graph.initializer] == (["w"] if kept else [])
    assert [info.name for info in proto.graph.input] == (["x"] if kept else ["x", "w"])
    assert learned(model) == (f"[{size}]", FLOAT)


def test_constants_are_known_by_the_names_of_their_values() -> None:
    constants = {"to": np.array([2, 8]), "axes": np.array([1])}
    model = parsed("a = Reshape(x, to)\ny = Unsqueeze(a, axes)", constants=constants)
    for value in model.graph.initializers.values():
        value.const_value = ir.tensor(constants[str(value.name)], name="another")
    assert learned(model) == ("[2,1,8]", FLOAT)


def test_a_constant_whose_numbers_are_elsewhere_has_a_type() -> None:
    model = parsed("y = Add(x, w)", constants={"w": np.zeros((5, 1, 8), np.float32)})
    model.graph.initializers["w"].const_value = None
    assert learned(model) == ("[5,s,8]", FLOAT)


# Values.


def test_values_of_one_type_share_one_shape() -> None:
    model = parsed("a = Neg(x)\nb = Abs(a)\ny = Exp(b)")
    assert learned(model) == ("[b,s,8]", FLOAT)
    first, second, _ = (node.outputs[0] for node in model.graph)
    assert first.shape is second.shape


@pytest.mark.parametrize(
    ("shape", "dtype", "modified"),
    [
        (["b", "s", 8], FLOAT, False),
        (None, FLOAT, True),
        (["b", "s", 8], None, True),
        ([None, None, 8], FLOAT, True),
    ],
)
def test_only_what_is_new_is_a_change(
    shape: list[int | str | None] | None, dtype: ir.DataType | None, modified: bool
) -> None:
    model = parsed("y = Neg(x)", output="float[b,s,8] y")
    y = model.graph.outputs[0]
    y.type = None
    y.shape = None if shape is None else ir.Shape(shape)
    if dtype is not None:
        y.dtype = dtype
    assert InferShapes()(model).modified == modified
    assert y.dtype == FLOAT


def test_a_shape_declared_without_a_type_stays_known(caplog: pytest.LogCaptureFixture) -> None:
    model = parsed("a = other.Thing(x)\nb = Cast<to = 1>(a)\ny = Neg(b)", known="float[2,3] b")
    b = model.graph[1].outputs[0]
    b.type = None
    assert InferShapes()(model).modified
    assert (str(b.shape), b.dtype) == ("[2,3]", FLOAT)
    assert caplog.messages == []


def test_values_of_bodies_are_learned_too() -> None:
    body = """
      y = If (f) <
        then_branch = yes () => (float[b,s,8] z) { v = Transpose(x) z = Transpose(v) },
        else_branch = no () => (float[b,s,8] w) {
          w = If (f) <
            then_branch = inner () => (float[b,s,8] p) { u = Abs(x) p = Neg(u) },
            else_branch = other () => (float[b,s,8] q) { q = Exp(x) }
          >
        }
      >
    """
    model = parsed(body, f"{X}, bool f", output="float[b,s,8] y")
    (z,) = model.graph[0].attributes["then_branch"].as_graph().outputs
    z.shape = None
    assert InferShapes()(model).modified
    assert str(z.shape) == "[b,s,8]"
    shapes = {
        value.name: str(value.shape)
        for graph in model.graphs()
        for node in graph
        for value in node.outputs
    }
    assert (shapes["v"], shapes["u"]) == ("[8,s,b]", "[b,s,8]")
    assert not InferShapes()(model).modified


GIVEN = X + ", int64[1] given, int64[3] given3"
SIZES = """h = Shape(x)\nb = Gather(h, zero)\ns = Gather(h, one)\nbu = Unsqueeze(b, first)
su = Unsqueeze(s, first)\n"""
NUMBERS = {
    "zero": np.array(0),
    "one": np.array(1),
    "two": np.array(2),
    "first": np.array([0]),
    "open": np.array([-1]),
    "four": np.array([4]),
    "three": np.array([3]),
    "step": np.array(2),
}


@pytest.mark.parametrize(
    ("body", "inputs", "shape"),
    [
        # what a Reshape leaves open
        ("t = Concat<axis = 0>(bu, su, open, four)\ny = Reshape(x, t)", X, "[b,s,2,4]"),
        ("t = Concat<axis = 0>(su, bu, open)\ny = Reshape(x, t)", X, "[s,b,8]"),
        ("t = Concat<axis = 0>(bu, four, su, open)\ny = Reshape(x, t)", X, "[b,4,s,2]"),
        (
            "t = Concat<axis = 0>(bu, su, open, four)\nr = Reshape(x, t)\n"
            "v = Transpose<perm = [0, 2, 3, 1]>(r)\nm = MatMul(r, v)\n"
            "u = Concat<axis = 0>(bu, su, open)\ny = Reshape(m, u)",
            "float[b,2,8] x",
            "[b,2,4]",
        ),
        ("t = Concat<axis = 0>(bu, su, open, three)\ny = Reshape(x, t)", X, None),
        # a size that is no -1 need not be what is left where another one is 0
        ("t = Concat<axis = 0>(bu, su, given, four)\ny = Reshape(x, t)", GIVEN, None),
        ("y = Reshape(x, given3)", GIVEN, None),
        ("t = Concat<axis = 0>(bu, open, four)\ny = Reshape(x, t)", X, None),
        ("t = Concat<axis = 0>(bu, open, su)\ny = Reshape(x, t)", "float[b,s,d] x", None),
        ("t = Concat<axis = 0>(bu, bu, open)\ny = Reshape(x, t)", X, None),
        # how far a Range counts
        ("y = Range(zero, s, one)", X, "[s]"),
        ("r = Range(zero, b, one)\nu = Unsqueeze(r, first)\ny = Add(u, u)", X, "[1,b]"),
        ("y = Range(one, s, one)", X, None),
        ("y = Range(zero, s, step)", X, None),
        ("n = Add(s, one)\ny = Range(zero, n, one)", X, None),
    ],
)
def test_sizes_inference_leaves_open(body: str, inputs: str, shape: str | None) -> None:
    body = SIZES + body.replace("y =", "z =") + "\ny = Identity(z)"
    used = {name: array for name, array in NUMBERS.items() if name in body}
    model = parsed(body, inputs, constants=used)
    assert InferShapes()(model).modified
    z = model.graph.outputs[0].producer().inputs[0]  # type: ignore[union-attr]
    found = str(z.shape)  # type: ignore[union-attr]
    assert found == shape if shape is not None else "unk__" in found
    assert not InferShapes()(model).modified


SPLIT = SIZES + "t = Concat<axis = 0>(bu, su, open, four)\nr = Reshape(x, t)\n"


def split(rest: str, inputs: str = X) -> ir.Model:
    used = {name: array for name, array in NUMBERS.items() if name in SPLIT + rest}
    return parsed(SPLIT + rest, inputs, constants=used)


def test_nothing_is_solved_beside_bodies() -> None:
    """onnxruntime refuses a branch that contradicts sizes, though it is never taken."""
    branches = "yes () => (float[] p) { p = Squeeze(r, two1) }, else_branch = no () => (float[] q) "
    body = f"y = If (go) <then_branch = {branches} {{ q = Identity(r) }}>"
    model = split(body, X + ", bool go, int64[1] two1")
    InferShapes()(model)
    (reshape,) = (node for node in model.graph if node.op_type == "Reshape")
    assert "unk__" in str(reshape.outputs[0].shape)


def test_names_made_up_for_solved_values_are_free() -> None:
    inputs = X + ", float[k,5] r_given_0, float[2] r_given_1"
    model = split("v = Transpose<perm = [1, 0, 2, 3]>(r)\ny = Neg(v)", inputs)
    assert InferShapes()(model).modified
    assert [str(value.shape) for value in model.graph.inputs] == ["[b,s,8]", "[k,5]", "[2]"]
    assert str(model.graph[-1].inputs[0].shape) == "[s,b,2,4]"  # type: ignore[union-attr]


def test_rounds_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["r0 = Identity(x)"]
    for layer in range(30):
        lines.append(f"h{layer} = Shape(r{layer})")
        for axis, name in enumerate(("zero", "one")):
            lines.append(f"g{layer}{axis} = Gather(h{layer}, {name})")
            lines.append(f"u{layer}{axis} = Unsqueeze(g{layer}{axis}, first)")
        lines.append(f"t{layer} = Concat<axis = 0>(u{layer}0, u{layer}1, open, four)")
        lines.append(f"s{layer} = Reshape(r{layer}, t{layer})")
        lines.append(f"w{layer} = Concat<axis = 0>(u{layer}0, u{layer}1, open)")
        lines.append(f"v{layer} = Relu(s{layer})")  # whose size is known a round later
        lines.append(f"r{layer + 1} = Reshape(v{layer}, w{layer})")
    body = "\n".join([*lines, "y = Neg(r30)"])
    used = {name: array for name, array in NUMBERS.items() if name in body}
    calls = []
    infer = onnx.shape_inference.infer_shapes

    def counted(*given: object, **options: object) -> onnx.ModelProto:
        calls.append(given)
        return infer(*given, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", counted)
    InferShapes()(parsed(body, constants=used))
    assert 1 < len(calls) <= 4


def test_what_inference_cannot_handle_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: object, **options: object) -> onnx.ModelProto:
        raise onnx.shape_inference.InferenceError("no")

    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", fail)
    assert not InferShapes()(parsed("y = Neg(x)")).modified
