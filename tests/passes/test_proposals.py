"""What the norm and activation rules propose for a graph, or why and where they refuse it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import pytest

from fusenorm.ops import DOMAIN, Gated, Norm
from fusenorm.passes.fuse_activation import FuseGelu, FuseGeluTanh, FuseRelu2, FuseSwish
from fusenorm.passes.fuse_attention import FuseAttention
from fusenorm.passes.fuse_linear import FuseLinear
from fusenorm.passes.fuse_norm import (
    FuseLayerNorm,
    FuseRMSNorm,
    NormNode,
    as_row,
    read_call,
    read_norm,
)
from fusenorm.passes.fuse_residual import FuseResidual
from fusenorm.passes.infer_shapes import InferShapes
from fusenorm.passes.pattern import Miss, Refusal
from fusenorm.passes.rewrite import Rewrite, Rule
from tests.graphs import values

F16, F32 = 10, 1
NUMBERS = {
    "last": np.array([-1]),
    "two_last": np.array([-2, -1]),
    "eps": np.float32(1e-6),
    "g": np.linspace(0.5, 1.5, 8, dtype=np.float32),
    "b": np.linspace(-1, 1, 8, dtype=np.float32),
    "g16": np.linspace(0.5, 1.5, 8).astype(np.float16),
    "eps16": np.float16(1e-3),
    "matrix": np.ones((3, 8), np.float32),
    "one": np.float32(1),
    "half": np.float32(0.5),
    "root2": np.float32(np.sqrt(2)),
    "one16": np.float16(1),
    "half16": np.float16(0.5),
    "root2_16": np.float16(np.sqrt(2)),
    "k": np.float32(1.702),
    "row": np.linspace(1, 2, 8, dtype=np.float32),
    "width": np.float32(8),
    "row3": np.linspace(1, 2, 24, dtype=np.float32).reshape(3, 8),
    "three16": np.float16(3),
    "c3_16": np.float16(0.044715),
    "root2pi_16": np.float16(np.sqrt(2 / np.pi)),
}


def found(
    body: str, inputs: str = "float[b,3,8] x", more: Mapping[str, np.ndarray] | None = None
) -> dict[str, ir.Value]:
    """Every value of a graph, types and shapes inferred."""
    words = set(body.replace("(", " ").replace(")", " ").replace(",", " ").split())
    constants = {k: v for k, v in {**NUMBERS, **(more or {})}.items() if k in words}
    named = values(body, inputs, constants=constants, opset=24)
    named["y"].type = None  # to be inferred
    InferShapes()(ir.Model(named["y"].producer().graph, ir_version=10))  # type: ignore[arg-type, union-attr]
    return named


def propose(rule: Rule, body: str, inputs: str = "float[b,3,8] x") -> Rewrite | Miss | None:
    root = found(body, inputs)["y"].producer()
    assert root is not None
    return rule.propose(root)


def accepted(rule: Rule, body: str, inputs: str = "float[b,3,8] x") -> Rewrite:
    proposal = propose(rule, body, inputs)
    assert isinstance(proposal, Rewrite), proposal
    assert proposal.rule == rule.name
    assert [value.name for value in proposal.outputs if value is not None] == ["y"]
    assert proposal.nodes[0] is proposal.root
    return proposal


def refused(rule: Rule, body: str, inputs: str = "float[b,3,8] x") -> tuple[str, str]:
    proposal = propose(rule, body, inputs)
    assert isinstance(proposal, Miss), proposal
    assert proposal.refusal is not None
    return proposal.refusal.code, proposal.refusal.node


def names(proposal: Rewrite) -> list[str | None]:
    return [value.name for value in proposal.inputs]


RMS = """
  sq = Mul(x, x)
  ms = ReduceMean<keepdims = 1>(sq, last)
  v = Add(ms, eps)
  r = Sqrt(v)
  n = Div(x, r)
"""
LN = """
  mu = ReduceMean<keepdims = 1>(x, last)
  c = Sub(x, mu)
  sq = Mul(c, c)
  ms = ReduceMean<keepdims = 1>(sq, last)
  v = Add(ms, eps)
  r = Sqrt(v)
  n = Div(c, r)
"""
ISLAND = RMS.replace("x", "w").replace("sq =", f"w = Cast<to = {F32}>(x)\n  sq =", 1)


# Norms.


@pytest.mark.parametrize(
    ("tail", "inputs", "scale", "bias"),
    [
        ("y = Mul(n, g)", ["x", "g"], "f32", None),
        ("m = Mul(n, g)\ny = Add(m, b)", ["x", "g", "b"], "f32", "f32"),
        ("y = Add(n, b)", ["x", "b"], None, "f32"),
        ("y = Mul(n, given)", ["x", "given"], "f32", None),
    ],
)
@pytest.mark.parametrize(("rule", "norm"), [(FuseRMSNorm(), RMS), (FuseLayerNorm(), LN)])
def test_norms(
    rule: Rule, norm: str, tail: str, inputs: list[str], scale: str | None, bias: str | None
) -> None:
    proposal = accepted(rule, norm + tail, "float[b,3,8] x, float[8] given")
    centred = rule.name == "layer_norm"
    assert proposal.spec == Norm(centred=centred, scale=scale, bias=bias)  # type: ignore[arg-type]
    assert names(proposal) == inputs
    assert proposal.attributes == {"epsilon": pytest.approx(1e-6)}
    assert proposal.merged == ()


@pytest.mark.parametrize(
    ("rule", "norm", "mean", "row"),
    [
        (FuseLayerNorm(), LN, "mu", "x"),
        (FuseLayerNorm(), LN, "ms", "sq"),
        (FuseRMSNorm(), RMS, "ms", "sq"),
    ],
)
def test_a_mean_is_a_sum_over_the_width_of_x(rule: Rule, norm: str, mean: str, row: str) -> None:
    whole = f"{mean} = ReduceMean<keepdims = 1>({row}, last)"
    total = f"t = ReduceSum<keepdims = 1>({row}, last)\n{mean} = Div(t, width)"
    assert whole in norm
    proposal = accepted(rule, norm.replace(whole, total) + "y = Mul(n, g)")
    assert "ReduceSum" in [node.op_type for node in proposal.nodes]
    assert names(proposal) == ["x", "g"]


def test_a_norm_without_an_affine_map() -> None:
    proposal = accepted(FuseRMSNorm(), RMS.replace("n =", "y ="))
    assert proposal.spec == Norm(scale=None)
    assert names(proposal) == ["x"]


@pytest.mark.parametrize(
    ("body", "spec"),
    [
        (f"{ISLAND}m = Mul(n, g)\ny = Cast<to = {F16}>(m)", Norm(dtype="f16", scale="f32")),
        (f"{ISLAND}h = Cast<to = {F16}>(n)\ny = Mul(h, g16)",
         Norm(dtype="f16", scale="f16", affine="storage")),
        (f"{ISLAND}y = Cast<to = {F16}>(n)", Norm(dtype="f16", scale=None)),
        (f"{ISLAND}u = Cast<to = {F32}>(g16)\nm = Mul(u, n)\ny = Cast<to = {F16}>(m)",
         Norm(dtype="f16", scale="f16")),
    ],
)  # fmt: skip
def test_where_a_16_bit_norm_rounds(body: str, spec: Norm) -> None:
    assert accepted(FuseRMSNorm(), body, "float16[b,3,8] x").spec == spec


@pytest.mark.parametrize(
    ("centre", "where"),
    [
        ("mu = ReduceMean<keepdims = 1>(x, last)\ncs = Sub(x, mu)\n"
         f"c = Cast<to = {F32}>(cs)", "storage"),
        (f"w = Cast<to = {F32}>(x)\nmu = ReduceMean<keepdims = 1>(w, last)\nc = Sub(w, mu)", "f32"),
    ],
)  # fmt: skip
def test_where_a_16_bit_norm_centres(centre: str, where: str) -> None:
    rest = LN[LN.index("sq =") :]
    body = f"{centre}\n{rest}\ny = Cast<to = {F16}>(n)"
    spec = accepted(FuseLayerNorm(), body, "float16[b,3,8] x").spec
    assert spec == Norm(centred=True, dtype="f16", scale=None, centre=where)  # type: ignore[arg-type]


def test_a_norm_over_two_axes_makes_them_one() -> None:
    body = RMS.replace("last", "two_last") + "y = Mul(n, matrix)"
    proposal = accepted(FuseRMSNorm(), body)
    assert proposal.merged == (3, 8)
    assert names(proposal) == ["x", "matrix"]


def test_an_island_nothing_leaves_is_a_norm_of_the_raised_row() -> None:
    proposal = accepted(FuseRMSNorm(), f"{ISLAND}y = Mul(n, g)", "float16[b,3,8] x")
    assert proposal.spec == Norm()
    assert names(proposal) == ["w", "g"]


@pytest.mark.parametrize(
    ("body", "inputs", "refusal"),
    [
        (RMS + "y = Mul(n, matrix)", "float[b,3,8] x", ("scale_shape", "y")),
        (RMS + "y = Add(n, matrix)", "float[b,3,8] x", ("bias_shape", "y")),
        (RMS + "m = Mul(n, g)\ny = Add(m, matrix)", "float[b,3,8] x", ("bias_shape", "y")),
        (RMS.replace("n =", "y ="), "float[b,s,h] x", ("hidden_unknown", "y")),
        (RMS.replace("last", "two_last").replace("n =", "y ="), "float[b,s,8] x",
         ("hidden_unknown", "y")),
        (RMS.replace("n =", "y =").replace("(x", "(u").replace("x)", "u)").replace(
            "sq =", "u = other.Thing(x)\nsq =", 1), "float[b,3,8] x", ("type_unknown", "y")),
        (RMS + f"y = Cast<to = {F16}>(n)", "float[b,3,8] x", ("types", "y")),
        (RMS.replace("eps", "row").replace("n =", "y ="), "float[b,3,8] x",
         ("not_scalar", "(graph input)")),
    ],
)  # fmt: skip
def test_refused_norms(body: str, inputs: str, refusal: tuple[str, str]) -> None:
    assert refused(FuseRMSNorm(), body, inputs) == refusal


# Rows.


@pytest.mark.parametrize(
    ("kind", "dims", "rank", "fits"),
    [
        ("float[8]", (8,), 3, True),
        ("float[8]", (8,), None, True),
        ("float[1,8]", (8,), 3, True),
        ("float[1,8]", (8,), 2, True),
        ("float[1,8]", (8,), 1, False),
        ("float[1,8]", (8,), None, False),
        ("float[2,8]", (8,), 3, False),
        ("float[4]", (8,), 3, False),
        ("float[1]", (1,), 3, True),
        ("float[3,8]", (3, 8), 3, True),
        ("float[24]", (3, 8), 3, False),
    ],
)
def test_a_row_must_not_raise_the_rank(
    kind: str, dims: tuple[int, ...], rank: int | None, fits: bool
) -> None:
    row = values("y = Neg(v)", f"{kind} v")["v"]
    assert as_row(row, dims, rank) is (row if fits else None)


@pytest.mark.parametrize("array", [np.float32(0.7), np.float16([0.7])])
def test_a_constant_scalar_is_repeated(array: np.ndarray) -> None:
    scalar = values("y = Neg(c)", constants={"c": array})["c"]
    row = as_row(scalar, (3, 4), 2)
    assert row is not None
    assert row.const_value is not None
    assert row.name == row.const_value.name == "c_x12"
    assert row.const_value.numpy().dtype == array.dtype
    np.testing.assert_array_equal(row.const_value.numpy(), np.full(12, array.reshape(())))
    pair = as_row(scalar, (2,), 2)
    assert pair is not None
    assert pair.name == "c_x2"
    single = values("y = Neg(c)", constants={"c": np.float32([0.7])})["c"]
    assert as_row(single, (1,), 2) is single


# Norms that are one node already.


def norm_node(
    body: str, inputs: str = "float[b,3,8] x", slots: int | None = None
) -> NormNode | Refusal | None:
    more = {"gs": np.float32([2]), "g64": np.ones(8), "raised": np.ones((1, 8), np.float32)}
    node = found(body, inputs, more)["y"].producer()
    assert node is not None
    if slots is not None:
        node.resize_inputs(slots)
    return read_norm(node)


def test_standard_norms() -> None:
    plain = norm_node("y = LayerNormalization(x, g)")
    assert isinstance(plain, NormNode)
    assert plain.spec == Norm(centred=True)
    assert [value.name for value in plain.vectors] == ["g"]
    assert plain.epsilon == 1e-5
    full = norm_node("y = LayerNormalization<epsilon = 0.5, axis = 2>(x, g, b)")
    assert isinstance(full, NormNode)
    assert full.spec == Norm(centred=True, bias="f32")
    assert [value.name for value in full.vectors] == ["g", "b"]
    assert full.epsilon == 0.5
    root = norm_node("y = RMSNormalization<stash_type = 1>(x, g)")
    assert isinstance(root, NormNode)
    assert root.spec == Norm()
    mixed = norm_node("y = RMSNormalization(x, g16)", "float16[b,3,8] x")
    assert isinstance(mixed, NormNode)
    assert mixed.spec == Norm(dtype="f16", scale="f16")


def test_a_standard_norm_of_a_scale_to_repeat_or_of_unknown_width() -> None:
    repeated = norm_node("y = LayerNormalization(x, gs)")
    assert isinstance(repeated, NormNode)
    assert [value.name for value in repeated.vectors] == ["gs_x8"]
    one = norm_node("y = LayerNormalization(x, gs)", "float[b,3,1] x")
    assert isinstance(one, NormNode)
    assert [value.name for value in one.vectors] == ["gs"]
    unknown = norm_node("y = LayerNormalization(x, g)", "float[b,3,h] x")
    assert isinstance(unknown, NormNode)
    assert [value.name for value in unknown.vectors] == ["g"]


def test_a_bias_that_is_left_out() -> None:
    norm = norm_node("y = LayerNormalization(x, g)", slots=3)
    assert isinstance(norm, NormNode)
    assert norm.spec == Norm(centred=True)
    assert len(norm.vectors) == 1


@pytest.mark.parametrize(
    ("body", "inputs", "code"),
    [
        ("y = LayerNormalization(x, raised)", "float[b,3,8] x", "scale_shape"),
        ("y = LayerNormalization(x, given)", "float[b,3,h] x, float[n] given", "scale_shape"),
        ("y = LayerNormalization(x, gs)", "float[b,3,h] x", "scale_shape"),
        ("y = LayerNormalization(x, g, gs)", "float[b,3,h] x", "scale_shape"),
        ("y = LayerNormalization<axis = 1>(x, matrix)", "float[b,3,8] x", "axis"),
        ("y = LayerNormalization<axis = -2>(x, matrix)", "float[b,3,8] x", "axis"),
        ("y = LayerNormalization(x, g64)", "double[b,3,8] x", "types"),
        ("y = LayerNormalization<stash_type = 10>(x, g)", "float[b,3,8] x", "types"),
        ("y = LayerNormalization(x, given)", "float[b,3,8] x, float[n] given", "scale_shape"),
        ("y = LayerNormalization(x, g, given)", "float[b,3,8] x, float[n] given", "scale_shape"),
        ("y, m = LayerNormalization(x, g)\nq = Neg(m)", "float[b,3,8] x", "stats_used"),
        ("y, m, d = LayerNormalization(x, g)\nq = Neg(d)", "float[b,3,8] x", "stats_used"),
    ],
)
def test_standard_norms_we_cannot_express(body: str, inputs: str, code: str) -> None:
    refusal = norm_node(body, inputs)
    assert isinstance(refusal, Refusal)
    assert (refusal.code, refusal.node) == (code, "y")


def test_unread_statistics_are_no_obstacle() -> None:
    assert isinstance(norm_node("y, m, d = LayerNormalization(x, g)"), NormNode)
    outputs = found("y, m = LayerNormalization(x, g)")
    node = outputs["y"].producer()
    assert node is not None
    node.graph.outputs.append(outputs["m"])  # type: ignore[union-attr]
    assert isinstance(read_norm(node), Refusal)


def test_our_own_norms() -> None:
    x, g = ir.val("x"), ir.val("g")
    node = ir.Node(DOMAIN, "LayerNorm", [x, g], [ir.AttrFloat32("epsilon", 0.25)])
    own = read_norm(node)
    assert own == NormNode(Norm(centred=True), (g,), 0.25)
    skip = ir.Node(DOMAIN, "SkipRMSNorm", [x, x, g], [ir.AttrFloat32("epsilon", 0.25)])
    assert read_norm(skip) is None
    assert read_norm(ir.Node(DOMAIN, "Swish", [x], [ir.AttrFloat32("beta", 1.0)])) is None
    assert read_norm(ir.Node("other", "LayerNormalization", [x, g])) is None
    assert read_norm(ir.Node("", "GroupNormalization", [x, g])) is None
    assert read_call(ir.Node("other", "LayerNorm", [x, g])) is None


def test_rms_normalization_of_a_centred_row_is_a_layer_norm() -> None:
    centre = "mu = ReduceMean<keepdims = 1>(x, last)\nc = Sub(x, mu)\n"
    proposal = propose(FuseLayerNorm(), f"{centre}y = RMSNormalization<epsilon = 0.5>(c, g)")
    assert isinstance(proposal, Rewrite)
    assert proposal.spec == Norm(centred=True)
    assert names(proposal) == ["x", "g"]
    assert proposal.attributes == {"epsilon": 0.5}
    assert [node.op_type for node in proposal.nodes] == ["Sub", "ReduceMean", "RMSNormalization"]
    summed = "t = ReduceSum<keepdims = 1>(x, last)\nmu = Div(t, width)\nc = Sub(x, mu)\n"
    by_width = propose(FuseLayerNorm(), f"{summed}y = RMSNormalization(c, g)")
    assert isinstance(by_width, Rewrite)
    half = propose(FuseLayerNorm(), f"{centre}y = RMSNormalization(c, g16)", "float16[b,3,8] x")
    assert isinstance(half, Rewrite)
    assert half.spec == Norm(centred=True, dtype="f16", scale="f16", centre="storage")


@pytest.mark.parametrize(
    ("body", "inputs", "refusal"),
    [
        ("mu = ReduceMean<keepdims = 1>(x, two_last)\nc = Sub(x, mu)\ny = RMSNormalization(c, g)",
         "float[b,3,8] x", ("axis", "y")),
        ("mu = ReduceMean<keepdims = 1>(x, last)\nc = Sub(x, mu)\n"
         "y = RMSNormalization<axis = 1>(c, matrix)", "float[b,3,8] x", ("axis", "y")),
        ("y = RMSNormalization(x, g)", "float[b,3,8] x", ("operator", "(graph input)")),
        ("c = Neg(x)\ny = RMSNormalization(c, g)", "float[b,3,8] x", ("operator", "c")),
    ],
)  # fmt: skip
def test_rms_normalization_of_anything_else(
    body: str, inputs: str, refusal: tuple[str, str]
) -> None:
    assert refused(FuseLayerNorm(), body, inputs) == refusal


# Residual sums.


@pytest.mark.parametrize(
    ("sums", "inputs", "factors"),
    [
        ("s = Add(x, r)", ["x", "r"], {}),
        ("u = Mul(x, k)\ns = Add(u, r)", ["x", "r"], {"alpha": 1.702}),
        ("u = Mul(half, r)\ns = Add(x, u)", ["r", "x"], {"alpha": 0.5}),
        ("u = Mul(x, k)\nv = Mul(r, half)\ns = Add(u, v)", ["x", "r"],
         {"alpha": 1.702, "beta": 0.5}),
        ("u = Mul(r, row)\ns = Add(x, u)", ["x", "r", "row"], {}),
        ("u = Mul(x, row)\ns = Add(u, r)", ["r", "x", "row"], {}),
        ("u = Mul(x, k)\nv = Mul(r, row)\ns = Add(u, v)", ["x", "r", "row"], {"alpha": 1.702}),
        ("u = Mul(x, row)\nv = Mul(r, k)\ns = Add(u, v)", ["r", "x", "row"], {"alpha": 1.702}),
        ("u = Mul(x, row)\nv = Mul(r, row)\ns = Add(u, v)", ["v", "x", "row"], {}),
        ("u = Mul(x, k)\nw = Neg(u)\ns = Add(u, r)", ["u", "r"], {}),
        ("u = Neg(r)\ns = Add(x, u)", ["x", "u"], {}),
        ("u = Mul(r, x)\ns = Add(x, u)", ["x", "u"], {}),
        ("u = Mul(row, r)\ns = Add(x, u)", ["x", "r", "row"], {}),
        ("u = Mul(x, half)\nv = Mul(r, row)\ns = Add(v, u)", ["x", "r", "row"], {"alpha": 0.5}),
        ("u = Mul(r, row3)\ns = Add(x, u)", ["x", "u"], {}),
    ],
)  # fmt: skip
def test_which_operand_of_a_sum_takes_which_factor(
    sums: str, inputs: list[str], factors: dict[str, float]
) -> None:
    body = f"{sums}\ny = LayerNormalization(s, g)"
    proposal = propose(FuseResidual(), body, "float[b,3,8] x, float[b,3,8] r")
    assert isinstance(proposal, Rewrite)
    assert names(proposal) == [*inputs, "g"]
    wanted = {name: pytest.approx(factor) for name, factor in factors.items()}
    assert proposal.attributes == {"epsilon": 1e-5, **wanted}
    assert proposal.spec == Norm(
        centred=True, skip=True, alpha="alpha" in factors, beta="beta" in factors,
        layer_scale="row" in inputs,
    )  # fmt: skip


# Activations.

SILU = "s = Sigmoid(x)\ny = Mul(x, s)"
QUICK = "z = Mul(x, k)\ns = Sigmoid(z)\ny = Mul(s, x)"
GELU = "d = Div(x, root2)\ne = Erf(d)\na = Add(e, one)\nh = Mul(x, half)\ny = Mul(h, a)"
TANH16 = (
    "x3 = Pow(x, three16)\nu = Mul(x3, c3_16)\nw = Add(x, u)\nd = Mul(w, root2pi_16)\n"
    "e = Tanh(d)\na = Add(e, one16)\nh = Mul(x, half16)\ny = Mul(h, a)"
)
DIVIDED16 = "n = Neg(x)\ne = Exp(n)\na = Add(e, one16)\ny = Div(x, a)"
GELU16 = GELU.replace("root2", "root2_16").replace("one", "one16").replace("half", "half16")


@pytest.mark.parametrize(
    ("rule", "body", "kind", "spec", "attributes"),
    [
        (FuseSwish(), SILU, "float", Gated("swish"), {"beta": 1.0}),
        (FuseSwish(), QUICK, "float", Gated("swish"), {"beta": pytest.approx(1.702)}),
        (FuseSwish(), SILU, "float16", Gated("swish", dtype="f16", precision="storage"),
         {"beta": 1.0}),
        (FuseSwish(), SILU, "bfloat16", Gated("swish", dtype="bf16", precision="storage"),
         {"beta": 1.0}),
        (FuseGelu(), GELU, "float", Gated("gelu"), {}),
        (FuseGelu(), GELU16, "float16", Gated("gelu", dtype="f16", precision="storage"), {}),
        (FuseGeluTanh(), TANH16, "float16",
         Gated("gelu_tanh", dtype="f16", precision="storage"), {}),
        (FuseSwish(), DIVIDED16, "float16", Gated("swish", dtype="f16", precision="storage"),
         {"beta": 1.0}),
        (FuseSwish(), SILU, "double", Gated("swish", dtype="f64"), {"beta": 1.0}),
    ],
)  # fmt: skip
def test_activations(
    rule: Rule, body: str, kind: str, spec: Gated, attributes: dict[str, float]
) -> None:
    proposal = accepted(rule, body, f"{kind}[b,3,8] x")
    assert proposal.spec == spec
    assert proposal.attributes == attributes
    assert names(proposal) == ["x"]


def test_an_activation_in_an_f32_island_rounds_once() -> None:
    body = f"w = Cast<to = {F32}>(x)\ns = Sigmoid(w)\nm = Mul(w, s)\ny = Cast<to = {F16}>(m)"
    proposal = accepted(FuseSwish(), body, "float16[b,3,8] x")
    assert proposal.spec == Gated("swish", dtype="f16")


def test_what_only_one_side_of_which_is_16_bits() -> None:
    up = f"w = Cast<to = {F32}>(x)\ns = Sigmoid(w)\ny = Mul(w, s)"
    proposal = accepted(FuseSwish(), up, "float16[b,3,8] x")  # of w, not of x
    assert names(proposal) == ["w"]
    down = f"s = Sigmoid(x)\nm = Mul(x, s)\ny = Cast<to = {F16}>(m)"
    assert refused(FuseSwish(), down) == ("types", "y")


@pytest.mark.parametrize(
    ("body", "refusal"),
    [
        ("u = other.Thing(x)\ns = Sigmoid(u)\ny = Mul(u, s)", ("type_unknown", "y")),
        ("s = Sigmoid(z)\ny = Mul(x, s)", ("different_operand", "z")),
        ("z = Mul(x, row)\ns = Sigmoid(z)\ny = Mul(x, s)", ("not_scalar", "(graph input)")),
        ("z = Mul(x, x)\ns = Sigmoid(z)\ny = Mul(x, s)", ("not_scalar", "(graph input)")),
    ],
)
def test_refused_activations(body: str, refusal: tuple[str, str]) -> None:
    if "z =" not in body:
        body = f"z = Neg(x)\n{body}"
    assert refused(FuseSwish(), body) == refusal


@pytest.mark.parametrize("unknown", ["x", "y"])
@pytest.mark.parametrize(
    ("rule", "body"), [(FuseSwish(), SILU), (FuseRMSNorm(), RMS.replace("n =", "y ="))]
)
def test_a_type_nobody_knows(rule: Rule, body: str, unknown: str) -> None:
    named = found(body)
    named[unknown].dtype = None
    root = named["y"].producer()
    assert root is not None
    miss = rule.propose(root)
    assert isinstance(miss, Miss)
    assert miss.refusal is not None
    assert (miss.refusal.code, miss.refusal.node) == ("type_unknown", "y")


@pytest.mark.parametrize(
    ("body", "beta"), [("y = Swish(x)", 1.0), ("y = Swish<alpha = 1.5>(x)", 1.5)]
)
@pytest.mark.parametrize(("kind", "dtype"), [("float", "f32"), ("float16", "f16")])
def test_the_standard_swish(body: str, beta: float, kind: str, dtype: str) -> None:
    proposal = accepted(FuseSwish(), body, f"{kind}[b,3,8] x")
    assert proposal.spec == Gated("swish", dtype=dtype)  # type: ignore[arg-type]
    assert proposal.attributes == {"beta": beta}
    assert [node.op_type for node in proposal.nodes] == ["Swish"]


@pytest.mark.parametrize(("rule", "op"), [(FuseSwish(), "Swish"), (FuseLinear(), "Relu")])
def test_an_activation_of_an_unknown_type_is_no_candidate(rule: Rule, op: str) -> None:
    assert propose(rule, f"u = other.Thing(x)\ny = {op}(u)") is None


@pytest.mark.parametrize(
    ("rule", "name", "op", "roots"),
    [
        (FuseAttention(), "attention", "Attention", {"MatMul", "Transpose", "Attention"}),
        (FuseGelu(), "gelu", "Gelu", {"Mul", "Div", "Cast"}),
        (FuseGeluTanh(), "gelu_tanh", "Gelu", {"Mul", "Div", "Cast"}),
        (FuseSwish(), "swish", "Swish", {"Mul", "Div", "Cast", "Swish"}),
        (FuseRelu2(), "relu2", "Relu2", {"Mul", "Pow", "Cast"}),
        (FuseRMSNorm(), "rms_norm", "RMSNorm", {"Add", "Mul", "Div", "Cast"}),
        (FuseLayerNorm(), "layer_norm", "LayerNorm",
         {"Add", "Mul", "Div", "Cast", "RMSNormalization"}),
    ],
)  # fmt: skip
def test_how_rules_are_called(rule: Rule, name: str, op: str, roots: set[str]) -> None:
    assert (rule.name, rule.op, rule.roots) == (name, op, roots)
