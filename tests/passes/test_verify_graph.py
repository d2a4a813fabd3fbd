"""The verifier sees what a broken pass could leave behind."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

import fusenorm
from fusenorm.ops import DOMAIN
from fusenorm.passes.verify_graph import GraphInvalid, find_problem, verify_graph
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


def test_what_is_wrong_first_is_told_first(swish: ir.Model) -> None:
    swish.graph[0].outputs[0].name = "y"
    with pytest.raises(GraphInvalid, match="y is defined twice"):
        verify_graph(swish, "test", ["other"])


def test_outputs_must_keep_their_names(swish: ir.Model) -> None:
    verify_graph(swish, "test", ["y"])
    with pytest.raises(GraphInvalid, match=r"the graph's outputs became \['y'\]"):
        verify_graph(swish, "test", ["z"])


def test_values_without_a_name_are_no_twins(swish: ir.Model) -> None:
    for _ in range(2):
        swish.graph.append(ir.node("Split", [swish.graph.inputs[0]], num_outputs=2))
        for value in swish.graph[-1].outputs:
            value.name = None
    verify_graph(swish, "test")


@pytest.mark.parametrize("body", [False, True])
def test_a_fused_op_nobody_declared(swish: ir.Model, body: bool) -> None:
    if body:
        swish.functions[DOMAIN, "Unheard", ""] = next(iter(swish.functions.values()))
    swish.graph[0].op_type = "Unheard"
    with pytest.raises(GraphInvalid, match="Unheard has no declaration"):
        verify_graph(swish, "test")


def test_one_input_of_several_is_missing() -> None:
    work = fusenorm.optimize(
        model("a = Sigmoid(x)\ny = Mul(a, z)", "float[b,s,8] x, float[b,s,8] z")
    )
    node = next(node for node in work.model.graph if node.domain == DOMAIN)
    node.replace_input_with(1, None)
    with pytest.raises(GraphInvalid, match=r"takes 2 inputs"):
        verify_graph(work.model, "test")


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


def _problem(graph: ir.Graph) -> str | None:
    found = find_problem(ir.Model(graph, ir_version=10))
    return None if found is None else f"{found.node}: {found.detail}"


def _switch(*bodies: ir.Graph) -> ir.Graph:
    """A graph of one node with a list of bodies."""
    several = ir.Attr("bodies", ir.AttributeType.GRAPHS, list(bodies))
    node = ir.Node("other", "Switch", [], [several], outputs=[ir.val("y")], name="switch")
    return ir.Graph([], node.outputs, nodes=[node], opset_imports={"": 18, "other": 1})


def test_bodies_in_a_list_are_graphs_too() -> None:
    fine, lost = ir.node("Constant", [], {"value_int": 1}), ir.node("Neg", [ir.val("nowhere")])
    bodies = [ir.Graph([], node.outputs, nodes=[node]) for node in (fine, lost)]
    assert _problem(_switch(bodies[0].clone())) is None
    assert "reads nowhere before it is defined" in str(_problem(_switch(*bodies)))


def test_a_body_may_not_return_an_outer_value() -> None:
    made = ir.node("Constant", [], {"value_int": 1}, outputs=[ir.val("outer")])
    graph = _switch(ir.Graph([], made.outputs, nodes=[]))
    graph.insert_before(graph[0], made)
    assert _problem(graph) == "None: subgraph output outer is a value of the outer graph"


def test_outputs_of_one_name() -> None:
    x = ir.val("x")
    node = ir.node("Split", [x], outputs=[ir.val("y"), ir.val("z")], name="split")
    graph = ir.Graph([x], node.outputs, nodes=[node])
    assert _problem(graph) is None
    graph.outputs[1] = graph.outputs[0]
    assert _problem(graph) == "None: two graph outputs have one name"
    node.outputs[1].name = "y"
    assert _problem(graph) == "split: y is defined twice"


@pytest.mark.parametrize("taken", ["x", "c"])
def test_a_name_of_an_input_or_initializer_is_taken(taken: str) -> None:
    x, c = ir.val("x"), ir.val("c", const_value=ir.tensor([1.0], name="c"))
    node = ir.node("Add", [x, c], outputs=[ir.val(taken)], name="sum")
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[c])
    assert _problem(graph) == f"sum: {taken} is defined twice"


@pytest.mark.parametrize("change", ["more inputs", "fewer outputs", "more attributes"])
def test_a_fused_node_with_other_slots(change: str) -> None:
    s = "s = Add(x, r)\ny = LayerNormalization(s, g)"
    scale = np.ones(8, np.float32)
    work = fusenorm.optimize(
        model(s, "float[b,s,8] x, float[b,s,8] r", constants={"g": scale})
    ).model
    (node,) = work.graph
    assert find_problem(work) is None
    if change == "more inputs":
        node.resize_inputs(4)
        node.replace_input_with(3, node.inputs[2])
    elif change == "fewer outputs":
        node.resize_outputs(1)
    else:
        node.attributes["extra"] = ir.AttrInt64("extra", 1)
    problem = find_problem(work)
    assert problem is not None
    assert problem.node == node.name
    wanted = {"more inputs": "takes 3 inputs", "fewer outputs": "lists 2 outputs"}
    assert wanted.get(change, "carries exactly ['epsilon']") in problem.detail


def test_outputs_must_keep_their_names_and_order(swish: ir.Model) -> None:
    verify_graph(swish, "test", ["y"])
    for wanted in (["z"], [], ["y", "z"]):
        with pytest.raises(GraphInvalid, match=r"outputs became \['y'\]"):
            verify_graph(swish, "test", wanted)
