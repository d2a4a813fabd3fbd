"""Canonicalisation keeps bits, names, types and validity: each case once broke one of them."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from fusenorm.passes import Canonicalize, Cleanup
from tests.graphs import fused, fused_ops, model, reasons, rows, run, same

X = {"x": rows(2, 3, 8)}


def _ops(proto: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in Canonicalize()(ir.from_proto(proto)).model.graph]


def test_sequences_keep_their_type() -> None:
    body = "q = SplitToSequence<axis = 1>(x)\ny = ConcatFromSequence<axis = 1>(q)"
    same(model(body), X)


@pytest.mark.parametrize(
    ("body", "names"),
    [
        ("a = Relu(x)\ny = Identity(a)", ["a", "y"]),
        ("t = Relu(x)\na = Identity(t)\ny = Identity(t)", ["a", "y"]),
        ("a = Identity(x)\ny = Relu(a)", ["a", "y"]),
    ],
)
def test_identities_keep_output_names(body: str, names: list[str]) -> None:
    outputs = ", ".join(f"float[b,s,8] {name}" for name in names)
    proto = model(body, outputs=outputs)
    same(proto, X)
    after, _ = fused(proto)
    assert [value.name for value in after.graph.output] == names


def test_identity_of_an_outer_value_in_a_branch_stays() -> None:
    body = """
      a = Relu(x)
      y = If (flag) <
        then_branch = yes () => (float[b,s,8] z) { z = Identity(a) },
        else_branch = no () => (float[b,s,8] w) { w = Neg(a) }
      >
    """
    for flag in (True, False):
        same(model(body, "float[b,s,8] x, bool flag"), {**X, "flag": np.array(flag)})


def test_defaults_a_caller_may_override_are_not_constants() -> None:
    body = "r = Reshape(x, shp)\nsh = Shape(r)\ni = Gather(sh, zero)\ny = Cast<to = 1>(i)"
    proto = model(
        body,
        "float[16] x, int64[2] shp",
        "float y",
        constants={"shp": np.array([2, 8]), "zero": np.array(0)},
    )
    same(proto, {"x": rows(16)})
    same(proto, {"x": rows(16), "shp": np.array([4, 4])})


def test_an_epsilon_a_caller_may_override_is_refused() -> None:
    body = """
      sq = Mul(x, x)
      ms = ReduceMean<keepdims = 1>(sq, last)
      shifted = Add(ms, eps)
      root = Sqrt(shifted)
      y = Div(x, root)
    """
    constants = {"last": np.array([-1]), "eps": np.float32([1e-5])}
    proto = model(body, "float[b,s,8] x, float[1] eps", constants=constants)
    report = same(proto, {**X, "eps": np.float32([0.5])})
    assert fused_ops(report) == []
    assert "not_scalar" in reasons(report)


def test_before_ir_4_initializers_are_constants() -> None:
    body = "b = Mul(x, two)\ng = Sigmoid(b)\ny = Mul(x, g)"
    proto = model(
        body, "float[b,s,8] x, float two", constants={"two": np.float32(2)}, opset=13, ir_version=3
    )
    report = same(proto, X)
    assert fused_ops(report) == ["Swish"]


def test_random_draws_stay_apart() -> None:
    body = "a = Bernoulli(x)\nb = Bernoulli(x)\ny = Sub(a, b)"
    assert _ops(model(body)).count("Bernoulli") == 2


def test_equal_expressions_are_merged() -> None:
    body = "a = Exp(x)\nb = Exp(x)\ny = Add(a, b)"
    assert _ops(model(body)).count("Exp") == 1


def test_a_node_that_cannot_run_is_not_folded() -> None:
    body = """
      y = If (flag) <
        then_branch = yes () => (float[b,s,8] z) { z = Relu(x) },
        else_branch = no () => (float[1,1,8] w) { w = Gather(table, five) }
      >
    """
    constants = {"table": np.zeros((2, 1, 1, 8), np.float32), "five": np.array(5)}
    proto = model(body, "float[b,s,8] x, bool flag", "float[p,q,8] y", constants=constants)
    same(proto, {**X, "flag": np.array(True)})


def test_constants_are_folded_exactly() -> None:
    body = "g = Add(gamma, one)\ny = Mul(x, g)"
    gamma = np.linspace(-0.1, 0.1, 8, dtype=np.float32)
    proto = model(body, constants={"gamma": gamma, "one": np.float32(1)})
    work = Canonicalize()(ir.from_proto(proto)).model
    assert [node.op_type for node in work.graph] == ["Mul"]
    folded = work.graph.initializers["g"].const_value
    assert folded is not None
    np.testing.assert_array_equal(folded.numpy(), gamma + np.float32(1))


def test_shapes_are_folded_only_where_known() -> None:
    body = "sh = Shape(x)\nd = Gather(sh, {})\ny = ConstantOfShape(d)"
    for index, folded in ((-1, True), (1, False)):
        proto = model(body.format("i"), outputs="float[n] y", constants={"i": np.array([index])})
        assert ("Gather" not in _ops(proto)) == folded


def test_the_standard_domain_by_its_other_name() -> None:
    proto = model("g = Sigmoid(x)\ny = Mul(x, g)")
    proto.opset_import[0].domain = "ai.onnx"
    for node in proto.graph.node:
        node.domain = "ai.onnx"
    assert fused_ops(same(proto, X)) == ["Swish"]


@pytest.mark.parametrize("opset", [18, 17])  # Sigmoid and Mul are the same in both
def test_functions_of_the_same_operators_are_seen_through(opset: int) -> None:
    proto = model("y = Relu(x)")
    silu = onnx.parser.parse_function(
        f'<domain: "local", opset_import: ["" : {opset}]>\n'
        "silu (a) => (c) {\n b = Sigmoid(a)\n c = Mul(a, b)\n}"
    )
    proto.functions.append(silu)
    proto.opset_import.add(domain="local", version=1)
    proto.graph.node[0].op_type, proto.graph.node[0].domain = "silu", "local"
    assert fused_ops(same(proto, X)) == ["Swish"]


def test_cleanup_merges_fused_twins() -> None:
    body = """
      g = Sigmoid(x)
      a = Mul(x, g)
      n = Neg(x)
      e = Exp(n)
      d = Add(e, one)
      b = Div(x, d)
      y = Add(a, b)
    """
    after, report = fused(model(body, constants={"one": np.float32(1)}))
    assert [node.op_type for node in after.graph.node] == ["Swish", "Add"]
    assert not Cleanup()(ir.from_proto(after)).modified
    assert fused_ops(report) == ["Swish"]


def test_outputs_of_a_foreign_function_of_our_domain_are_refused() -> None:
    from fusenorm.errors import BadInput

    proto = model("y = Relu(x)")
    fake = onnx.parser.parse_function(
        '<domain: "fusenorm", opset_import: ["" : 18]>\n'
        "RMSNorm <epsilon> (x, scale) => (y) {\n y = Mul(x, scale)\n}"
    )
    proto.functions.append(fake)
    with pytest.raises(BadInput, match="fusenorm::RMSNorm is not what fusenorm declares"):
        fused(proto)


def test_run_helper_is_unoptimised() -> None:
    (y,) = run(model("y = Relu(x)"), X)
    np.testing.assert_array_equal(y, np.maximum(X["x"], 0))
