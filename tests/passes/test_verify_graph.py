"""The verifier sees what a broken pass could leave behind."""

from __future__ import annotations

import onnx_ir as ir
import pytest

import fusenorm
from fusenorm.ops import DOMAIN
from fusenorm.passes.verify_graph import GraphInvalid, verify_graph
from tests.graphs import model


@pytest.fixture
def swish() -> ir.Model:
    return fusenorm.optimize(model("g = Sigmoid(x)\na = Mul(x, g)\ny = Relu(a)")).model


def test_a_good_model_passes(swish: ir.Model) -> None:
    verify_graph(swish, "test")


def test_use_before_definition(swish: ir.Model) -> None:
    first, second = swish.graph
    swish.graph.remove(first)
    swish.graph.insert_after(second, first)
    with pytest.raises(GraphInvalid, match="after test: reads a before it is defined"):
        verify_graph(swish, "test")


def test_two_values_of_one_name(swish: ir.Model) -> None:
    swish.graph[0].outputs[0].name = "y"
    with pytest.raises(GraphInvalid, match="y is defined twice"):
        verify_graph(swish, "test")


def test_lost_output(swish: ir.Model) -> None:
    swish.graph.outputs[0] = ir.val("elsewhere")
    with pytest.raises(GraphInvalid, match="output elsewhere is not produced"):
        verify_graph(swish, "test")


@pytest.mark.parametrize("break_it", ["function", "attribute", "input"])
def test_fused_node_that_does_not_fit(swish: ir.Model, break_it: str) -> None:
    node = swish.graph[0]
    if break_it == "function":
        del swish.functions[(DOMAIN, "Swish", "")]
    elif break_it == "attribute":
        del node.attributes["beta"]
    else:
        node.replace_input_with(0, None)
    with pytest.raises(GraphInvalid, match="Swish"):
        verify_graph(swish, "test")


def test_a_value_of_a_branch_is_not_seen_outside() -> None:
    branches = [
        f"{name}_branch = g{name} () => (float[b,s,8] {name}) {{ {name} = Relu(x) }}"
        for name in ("then", "else")
    ]
    work = ir.from_proto(
        model(f"a = If (c) <{', '.join(branches)}>\ny = Neg(a)", "float[b,s,8] x, bool c")
    )
    verify_graph(work, "test")
    choice, last = work.graph
    last.replace_input_with(0, choice.attributes["then_branch"].as_graph().outputs[0])
    with pytest.raises(GraphInvalid, match="reads then before it is defined"):
        verify_graph(work, "test")
