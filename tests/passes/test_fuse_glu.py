"""What the GLU rule proposes for a product, or why it refuses it, before any proof."""

from __future__ import annotations

import collections
import itertools

import numpy as np
import onnx_ir as ir
import pytest

from fusenorm.passes.fuse_glu import FuseGatedUnit, FuseGLU, read_activation, read_clamp
from fusenorm.passes.infer_shapes import InferShapes
from fusenorm.passes.pattern import Miss
from fusenorm.passes.rewrite import MISS_KEY, Rewrite
from fusenorm.passes.speller import Speller, spellings
from tests.graphs import model, outcome, proposed, values

PAIR = "float[b,s,8] g, float[b,s,8] u"
PACKED = "float[b,s,16] x"
ROWS = "float[b,s,8] x"
UNCLAMPED = "float[b,s,8] g0, float[b,s,8] u0"
PRODUCT = "y = Mul (a, u)"
BILINEAR = "y = Mul (g, u)"
SIGMOID = "a = Sigmoid (g)\n" + PRODUCT
SPLIT = "g, u = Split <axis = -1, num_outputs = 2> (x)\n"
INTS = "int32[b,s,8] g, int32[b,s,8] u"
SCALARS = {
    "zero": 0.0, "half": 0.5, "minus": -0.5, "one": 1.0, "two": 2.0, "hi": 7.0, "lo": -7.0,
    "lower": -9.0, "nan": np.nan,
}  # fmt: skip
INTEGERS = {
    "i0": [0], "i1": [1], "i2": [2], "i8": [8], "i16": [16], "end": [2**62], "last": [-1],
    "first": range(8), "second": range(8, 16), "even": range(0, 16, 2), "odd": range(1, 16, 2),
    "s0": 0, "s1": 1, "pairs": [0, 0, 2, 8], "twos": [0, 0, 8, 2], "uneven": [6, 10],
    "equal": [8, 8],
}  # fmt: skip
NUMBERS = {
    "vec": np.linspace(1, 2, 8, dtype=np.float32),
    "w": np.ones((8, 8), np.float32),
    "w2": np.full((8, 8), 2, np.float32),
    "b": np.ones(8, np.float32),
    **{name: np.array(number, np.float32) for name, number in SCALARS.items()},
    **{name: np.array(number, np.int64) for name, number in INTEGERS.items()},
}


@pytest.mark.parametrize(
    ("found", "body", "inputs"),
    [
        ("GLU_sigmoid", SIGMOID, PAIR),
        ("GLU_sigmoid", "a = Sigmoid (g)\ny = Mul (u, a)", PAIR),
        ("GLU_relu", "a = Relu (g)\n" + PRODUCT, PAIR),
        ("GLU_gelu", "a = Gelu (g)\n" + PRODUCT, PAIR),
        ("GLU_gelu_tanh", 'a = Gelu <approximate = "tanh"> (g)\n' + PRODUCT, PAIR),
        ("GLU_gelu", 'a = Gelu <approximate = "none"> (g)\n' + PRODUCT, PAIR),
        ("GLU_swish", "a = Swish (g)\n" + PRODUCT, PAIR),
        ("GLU_swish", "a = Swish <alpha = 2.0> (g)\n" + PRODUCT, PAIR),
        (None, "a = other.Sigmoid (g)\n" + PRODUCT, PAIR),
        (None, "a = Tanh (g)\n" + PRODUCT, PAIR),
        (None, "a = Relu (g)\n" + PRODUCT, INTS),
        (None, "a = Clip (g, s0, s1)\n" + PRODUCT, INTS.replace("int32", "int64")),
        (None, "g = other.Map (x)\ny = SwiGLU (g, u)", PAIR.replace(" g", " x")),
        (
            "GLU_sigmoid",
            "n = Neg (g)\ne = Exp (n)\nd = Add (e, one)\na = Div (one, d)\n" + PRODUCT,
            PAIR,
        ),
        (None, "n = Neg (g)\ne = Exp (n)\nd = Add (e, two)\na = Div (one, d)\n" + PRODUCT, PAIR),
        ("GLU_sigmoid", "a = Sigmoid (g)\nb0 = Relu (u)\ny = Mul (a, b0)", PAIR),
        ("GLU_relu", "a = Sigmoid (g)\nb0 = Relu (u)\ny = Mul (b0, a)", PAIR),
        ("GLU_relu", "a = Sigmoid (g)\nb0 = Relu (u)\nr = Neg (a)\ny = Mul (a, b0)", PAIR),
        (None, "a = Sigmoid (g)\ny = Mul (a, g)", PAIR),
        (None, "a = Sigmoid (g)\ny = Mul (a, vec)", PAIR),
        ("activation_shared", "a = Sigmoid (g)\ny = Mul (a, a)", PAIR),
        (None, BILINEAR, PAIR),
        (None, "y = Mul (g, g)", PAIR),
        ("activation_shared", "a = Sigmoid (g)\ny = Mul (a, u)\nr = Neg (a)", PAIR),
        (
            "activation_shared",
            "a = Sigmoid (g)\nc = Min (a, hi)\nr = Neg (c)\ny = Mul (c, u)",
            PAIR,
        ),
        ("shapes_not_proved", SIGMOID, "float[b,s,8] g, float[b,1,8] u"),
        ("shapes_not_proved", SIGMOID, "float[b,s,8] g, float[s,8] u"),
        ("shapes_not_proved", SIGMOID, "float[b,s,8] g, float[] u"),
        ("shapes_not_proved", SIGMOID, "float[b,s,8] g, float[b,t,8] u"),
        ("GLU_sigmoid_f16", SIGMOID, "float16[b,s,8] g, float16[b,s,8] u"),
        ("GLU_sigmoid_f64", SIGMOID, "double[b,s,8] g, double[b,s,8] u"),
        (
            "GLU_swish_clampgate_plus1",
            "g = Min (g0, hi)\nt = Clip (u0, lo, hi)\nu = Add (t, one)\na = Swish (g)\n" + PRODUCT,
            UNCLAMPED,
        ),
        (
            "GLU_swish",
            "g = Min (g0, hi)\nt = Clip (u0, lo, hi)\nu = Add (t, two)\na = Swish (g)\n" + PRODUCT,
            UNCLAMPED,
        ),
        ("GLU_sigmoid", "g = Min (g0, hi)\nu = Clip (u0, lo, hi)\n" + SIGMOID, UNCLAMPED),
        (
            "GLU_swish_clampact",
            "a0 = Swish (g)\na = Min (a0, hi)\nu = Clip (u0, lo, hi)\n" + PRODUCT,
            "float[b,s,8] g, float[b,s,8] u0",
        ),
        (
            "activation_clamped",
            "a0 = Swish (g)\na = Min (a0, two)\nu = Clip (u0, lo, hi)\n" + PRODUCT,
            "float[b,s,8] g, float[b,s,8] u0",
        ),
        ("activation_clamped", "a0 = Swish (g)\na = Min (a0, hi)\n" + PRODUCT, PAIR),
        (
            "GLU_swish_clampgate",
            "g = Min (g0, half)\nu = Clip (u0, minus, half)\na = Swish (g)\n" + PRODUCT,
            UNCLAMPED,
        ),
        # Nothing is left between bounds of zero.
        (
            "GLU_swish",
            "g = Min (g0, zero)\nt = Clip (u0, zero, zero)\nu = Add (t, one)\na = Swish (g)\n"
            + PRODUCT,
            UNCLAMPED,
        ),
        # A bound that is computed.
        (
            "GLU_swish",
            "g = Clip (g0, given, hi)\nt = Clip (u0, lo, hi)\nu = Add (t, one)\na = Swish (g)\n"
            + PRODUCT,
            UNCLAMPED + ", float[] given",
        ),
        # Half of a row times something else.
        (
            "GLU_sigmoid",
            "g, r = Split <axis = -1, num_outputs = 2> (x)\n" + SIGMOID,
            PACKED + ", float[b,s,8] u",
        ),
        (
            "GLU_sigmoid",
            "r, u = Split <axis = -1, num_outputs = 2> (x)\n" + SIGMOID,
            PACKED + ", float[b,s,8] g",
        ),
        (None, SPLIT + "y = Mul (g, z)", PACKED + ", float[b,s,8] z"),
        (None, SPLIT + "y = Mul (z, u)", PACKED + ", float[b,s,8] z"),
        (None, SPLIT + "y = Mul (g, g)", PACKED),
        (None, SPLIT + BILINEAR, PACKED.replace("float", "int32")),
        (
            None,
            SPLIT + "p, q = Split <axis = -1, num_outputs = 2> (z)\ny = Mul (g, q)",
            PACKED + ", float[b,s,16] z",
        ),
        (
            "activation_shared",
            "a0 = Swish (g)\na = Min (a0, hi)\nr = Neg (a0)\nu = Clip (u0, lo, hi)\n" + PRODUCT,
            "float[b,s,8] g, float[b,s,8] u0",
        ),
        ("GLU_sigmoid_gate_up", SPLIT + SIGMOID, PACKED),
        ("GLU_sigmoid_up_gate", SPLIT + "a = Sigmoid (u)\ny = Mul (a, g)", PACKED),
        (
            "GLU_sigmoid",
            "g, u = Split <axis = 1, num_outputs = 2> (x)\n" + SIGMOID,
            "float[b,4,16] x",
        ),
        ("shapes_not_proved", "g, u = Split <axis = -1> (x, uneven)\n" + SIGMOID, PACKED),
        (
            "GLU_sigmoid_gate_up",
            "x = Reshape (z, t)\ng, u = Split <axis = -1> (x, equal)\n" + SIGMOID,
            "float[b,s,16] z, int64[n] t",
        ),
        ("GLU_identity_gate_up", SPLIT + BILINEAR, PACKED),
        ("GLU_identity_up_gate", SPLIT + "y = Mul (u, g)", PACKED),
        (
            "GLU_sigmoid_gate_up",
            "g = Slice (x, i0, i8, last)\nu = Slice (x, i8, i16, last)\n" + SIGMOID,
            PACKED,
        ),
        (
            "GLU_sigmoid_up_gate",
            "g = Slice (x, i8, i16, last)\nu = Slice (x, i0, i8, last)\n" + SIGMOID,
            PACKED,
        ),
        (
            "GLU_sigmoid_interleaved",
            "g = Slice (x, i0, end, last, i2)\nu = Slice (x, i1, end, last, i2)\n" + SIGMOID,
            PACKED,
        ),
        (
            "GLU_sigmoid",
            "g = Slice (x, i1, end, last, i2)\nu = Slice (x, i0, end, last, i2)\n" + SIGMOID,
            PACKED,
        ),
        (
            "GLU_sigmoid",
            "g = Slice (x, i0, i8, last)\nu = Slice (z, i8, i16, last)\n" + SIGMOID,
            PACKED + ", float[b,s,16] z",
        ),
        (
            "GLU_sigmoid",
            "g = Slice (x, i0, i8, last)\nu = Slice (x, i0, i8, last)\n" + SIGMOID,
            PACKED,
        ),
        (
            "GLU_sigmoid",
            "g = Slice (x, i0, i8, last)\nu = Slice (x, i0, end, last, i2)\n" + SIGMOID,
            PACKED,
        ),
        (
            "GLU_sigmoid_gate_up",
            "g = Gather <axis = -1> (x, first)\nu = Gather <axis = -1> (x, second)\n" + SIGMOID,
            PACKED,
        ),
        (
            "GLU_sigmoid_interleaved",
            "g = Gather <axis = -1> (x, even)\nu = Gather <axis = -1> (x, odd)\n" + SIGMOID,
            PACKED,
        ),
        (
            "GLU_identity_interleaved",
            "g = Gather <axis = -1> (x, even)\nu = Gather <axis = -1> (x, odd)\n" + BILINEAR,
            PACKED,
        ),
        (
            "GLU_sigmoid_gate_up",
            "v = Reshape (x, pairs)\ng = Gather <axis = 2> (v, s0)\nu = Gather <axis = 2> (v, s1)\n"
            + SIGMOID,
            PACKED,
        ),
        (
            "GLU_sigmoid_interleaved",
            "v = Reshape (x, twos)\ng = Gather <axis = 3> (v, s0)\nu = Gather <axis = 3> (v, s1)\n"
            + SIGMOID,
            PACKED,
        ),
        ("GLU_identity", "g = MatMul (x, w)\nu = MatMul (x, w2)\n" + BILINEAR, ROWS),
        (
            "GLU_identity",
            "g = MatMul (x, w)\nt = MatMul (x, w2)\nu = Add (b, t)\n" + BILINEAR,
            ROWS,
        ),
        (None, "g = MatMul (x, w)\nu = MatMul (z, w2)\n" + BILINEAR, ROWS + ", float[b,s,8] z"),
        (None, "g = MatMul (x, w)\nu = MatMul (x, d)\n" + BILINEAR, ROWS + ", float[8,8] d"),
        (None, "g = MatMul (x, w)\ny = Mul (g, g)", ROWS),
        ("GLU_identity", "g = Gemm (x, w)\nu = Gemm (x, w2)\n" + BILINEAR, "float[s,8] x"),
        (
            None,
            "g = MatMul (x, w)\nt = MatMul (x, w2)\nu = Add (t, z)\n" + BILINEAR,
            ROWS + ", float[b,s,8] z",
        ),
        (
            None,
            "t = other.MatMul (x, w)\ng = Add (b, t)\nr = other.MatMul (x, w2)\nu = Add (b, r)\n"
            + BILINEAR,
            ROWS,
        ),
        (None, "g = Div (x, w)\nu = Div (x, w2)\n" + BILINEAR, "float[b,8,8] x"),
    ],
)
def test_proposals(found: str | None, body: str, inputs: str) -> None:
    assert proposed(FuseGLU(), body, inputs, constants=NUMBERS, opset=24) == found


@pytest.mark.parametrize(
    "body",
    [
        "a = other.Sigmoid (g)",
        "a = other.Gelu (g)",
        "a = other.Relu (g)",
        "a = fusenorm.GLU_relu (g, u)",
        "a = Constant <value_float = 1.0> ()",
    ],
)
def test_what_is_no_activation(body: str) -> None:
    found = values(f"{body}\n{PRODUCT}", PAIR, known="float[b,s,8] a")
    assert read_activation(found["a"]) is None


@pytest.mark.parametrize(
    ("clamp", "bounds"),
    [
        ("c = Clip (x, lo, hi)", (-7, 7)),
        ("c = Clip (x, hi, hi)", (7, 7)),
        ("c = Clip (x, hi, lo)", None),
        ("c = Clip (x, nan, hi)", None),
        ("c = Max (x, nan)", None),
        ("c = other.Clip (x, lo, hi)", None),
        ("c = other.Min (x, hi)", None),
    ],
)
def test_bounds_of_a_clamp(clamp: str, bounds: tuple[float, float] | None) -> None:
    names = [name for name in SCALARS if f" {name}" in clamp]
    found = values(f"{clamp}\ny = Neg (c)", constants={name: NUMBERS[name] for name in names})
    held = read_clamp(found["c"])
    if bounds is None:
        assert held.source is found["c"]
    else:
        assert (held.source, held.low, held.high) == (found["x"], *bounds)


@pytest.mark.parametrize(
    ("up", "held"),
    [
        ("u = Clip (u0, lo, hi)", True),
        ("t = Min (u0, hi)\nu = Max (lo, t)", True),
        ("u = Clip (u0, lower, hi)", False),
        ('u = Clip (u0, "", hi)', False),
        ("u = Clip (u0, hi, lo)", False),
        ("u = Clip (u0, nan, hi)", False),
        ("u = Clip (u0, lo, computed)", False),
        ("u = Min (u0, hi, hi)", False),
        ("u = Min (u0, computed)", False),
        ("u = Max (u0, nan)", False),
        ("u = Max (u0, lo)", False),
    ],
)
@pytest.mark.parametrize(
    ("gate", "same"),
    [
        ("g = Min (g0, hi)", True),
        ("g = Clip (g0, lower, hi)", True),
        ("g = Min (g0, two)", False),
        ("g = Identity (g0)", False),
    ],
)
def test_clamps_join_where_both_stop_at_one_limit(
    gate: str, same: bool, up: str, held: bool
) -> None:
    body = f"{gate}\n{up}\na = Swish (g)\n{PRODUCT}"
    inputs = f"{UNCLAMPED}, float computed"
    kind = "GLU_swish_clampgate" if same and held else "GLU_swish"
    assert proposed(FuseGLU(), body, inputs, constants=NUMBERS, opset=24) == kind


def test_the_number_of_a_swish_is_its_beta() -> None:
    for attribute, beta in (("<alpha = 2.0>", 2.0), ("", 1.0)):
        found = outcome(
            FuseGLU(), f"a = Swish {attribute} (g)\n{PRODUCT}", PAIR, constants=NUMBERS, opset=24
        )
        assert isinstance(found, Rewrite)
        assert found.attributes == {"beta": beta}


def test_a_gate_clamped_before_and_behind_its_activation() -> None:
    """The op has one clamp: the other stays in front."""
    body = "g = Min (g0, two)\na0 = Swish (g)\na = Min (a0, hi)\nu = Clip (u0, lo, hi)\n"
    found = outcome(FuseGLU(), body + PRODUCT, UNCLAMPED, constants=NUMBERS, opset=24)
    assert isinstance(found, Rewrite)
    assert found.spec.op_type == "GLU_swish_clampact"
    assert [value.name for value in found.inputs] == ["g", "u0"]
    assert found.attributes["limit"] == 7.0


def test_an_activation_that_is_an_output_too_is_shared() -> None:
    found = values(f"a = Sigmoid (g)\n{PRODUCT}", PAIR, known="float[b,s,8] a")
    root = found["y"].producer()
    assert root is not None
    assert root.graph is not None
    assert isinstance(FuseGLU().propose(root), Rewrite)
    root.graph.outputs.append(found["a"])
    miss = FuseGLU().propose(root)
    assert isinstance(miss, Miss)
    assert miss.refusal is not None
    assert miss.refusal.code == "activation_shared"


@pytest.mark.parametrize(
    ("maps", "inputs", "nodes"),
    [
        ("g = MatMul (x, w)\nu = MatMul (x, w2)\n", ROWS, ["Sigmoid", "Mul"]),
        (SPLIT, PACKED, ["Split", "Sigmoid", "Mul"]),
    ],
)
def test_what_makes_two_tensors_is_left_and_what_takes_halves_goes(
    maps: str, inputs: str, nodes: list[str]
) -> None:
    found = outcome(FuseGLU(), maps + SIGMOID, inputs, constants=NUMBERS, opset=24)
    assert isinstance(found, Rewrite)
    assert [node.op_type for node in found.nodes] == nodes


@pytest.mark.parametrize(
    ("body", "inputs", "node", "missed"),
    [
        (SIGMOID, PAIR, "GLU_sigmoid", None),
        ("y = SwiGLU (g, u)", PAIR, "GLU_swish", None),
        (SIGMOID, "float[b,s,8] g, float[b,1,8] u", "Mul", "GLU"),
    ],
)
def test_what_the_pass_does_with_a_product(
    body: str, inputs: str, node: str, missed: str | None
) -> None:
    work = ir.from_proto(model(body, inputs, opset=28, ir_version=13))
    InferShapes()(work)
    FuseGatedUnit()(work)
    root = work.graph.outputs[0].producer()
    assert root is not None
    assert root.op_type == node
    op, _ = root.meta.get(MISS_KEY, (None, None))
    assert op == missed


# --- what the rule is tested with ----------------------------------------------------------

# How gate and up are written: inputs, layout, the nodes that take the halves of x.
WHOLE = ("Split", "Split", "Slice Slice", "Gather Gather", "Reshape Gather Reshape Gather")
STORED = [
    ("gate up", "", ""),
    *(("x", layout, nodes) for layout in ("_gate_up", "_up_gate") for nodes in WHOLE),
    # With the gate in the odd columns there is no fused layout.
    *(
        ("x", layout, nodes)
        for layout in ("_interleaved", "")
        for nodes in ("Slice Slice", "Reshape Gather Reshape Gather")
    ),
]
HELD = [f"{gate} {up}" for gate, up in itertools.product(("Clip", "Max Min"), repeat=2)]
FORMS = [
    ("", ""),
    *(("_clampgate", nodes) for nodes in HELD),
    *(("_clampgate_plus1", f"{nodes} Add") for nodes in HELD),
]


def test_examples_store_and_clamp_both_in_every_way() -> None:
    rule = FuseGLU()

    def write(speller: Speller) -> ir.Value:
        rule.example(speller)
        gate = speller.node("Swish", [speller.values["gate"]])
        return speller.node("Mul", [gate, speller.values["up"]])

    written = []
    for spelled in spellings(write, opset=24, rank=4, limit=1000):
        nodes = " ".join(node.op_type for node in spelled.graph)
        InferShapes()(spelled)
        root = spelled.graph.outputs[0].producer()
        assert root is not None
        found = rule.propose(root)
        assert isinstance(found, Rewrite)
        clamped = "clamp" in found.spec.op_type
        bounds = {"floor": -3.0, "limit": 2.0} if clamped else {}
        assert found.attributes == {"beta": 1.0, **bounds}
        inputs = " ".join(str(value.name) for value in spelled.graph.inputs)
        written.append((inputs, found.spec.op_type, nodes))
    assert collections.Counter(written) == collections.Counter(
        (inputs, f"GLU_swish{form}{layout}", " ".join(f"{halves} {clamps} Swish Mul".split()))
        for (inputs, layout, halves), (form, clamps) in itertools.product(STORED, FORMS)
    )


def test_spellings_hold_every_activation() -> None:
    pattern = FuseGLU().pattern

    def write(speller: Speller) -> ir.Value:
        speller.row("gate")
        speller.row("up")
        speller.scalar("beta", 2.0)
        return pattern.spell(speller)

    found = {" ".join(node.op_type for node in m.graph) for m in spellings(write, limit=40)}
    assert found >= {
        "Sigmoid Mul",
        "Relu Mul",
        "Sigmoid Mul Mul",
        "Mul Sigmoid Mul Mul",
        "Div Erf Add Mul Mul Mul",
        "Pow Mul Add Mul Tanh Add Mul Mul Mul",
    }
