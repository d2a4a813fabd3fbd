"""Reshapes one behind another become one, where that says the same."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from fusenorm.passes.merge_reshapes import MergeReshapes
from tests.graphs import values

KNOWN = "float[b,s,2,3,4] f, float[b,s,6,4] g"
CONSTANTS = {
    "five": np.array([0, 0, 2, 3, 4]),
    "four": np.array([0, 0, 6, 4]),
    "three": np.array([0, 0, 24]),
    "flat": np.array([0, -1]),
    "last": np.array([6, -1, 0, 4]),
    "far": np.array([0, 0, 0, 0, 4]),
    "whole": np.array([-1]),
    "column": np.array([0, 0, 24, 1]),
    "same": np.array([0, 0, 0, 0]),
}


@pytest.mark.parametrize(
    ("body", "known", "source"),
    [
        ("f = Reshape (x, five)\n y = Reshape (f, four)", KNOWN, "x"),
        ("f = Reshape (x, five)\n g = Reshape (f, four)\n y = Reshape (g, three)", KNOWN, "x"),
        ("f = Reshape (x, five)\n y = Reshape (f, whole)", "", "x"),
        ("f = Reshape (x, five)\n y = Reshape <allowzero = 1> (f, given)", "", "x"),
        ("f = Reshape (x, five)\n y = Reshape (f, flat)", KNOWN, "x"),
        # a 0 that says something else, or may
        ("f = Reshape (x, five)\n y = Reshape (f, given)", KNOWN, "f"),
        ("f = Reshape (x, five)\n y = Reshape (f, four)", "", "f"),
        ("f = Reshape (x, five)\n y = Reshape (f, four)", KNOWN.replace("b,s,2", "b,t,2"), "f"),
        ("f = Reshape (x, five)\n y = Reshape (f, four)", KNOWN.replace("b,s,2", "?,?,2"), "f"),
        ("f = Reshape (x, five)\n y = Reshape (f, last)", KNOWN, "f"),
        ("f = Reshape (x, five)\n y = Reshape (f, far)", KNOWN, "f"),
        ("f = Reshape (x, column)\n y = Reshape (f, same)", "float[b,s,24,1] f", "f"),
        # no Reshapes
        ("f = Neg (x)\n y = Reshape (f, four)", "", "f"),
        ("f = other.Reshape (x, five)\n y = Reshape (f, four)", KNOWN, "f"),
        ("f = Reshape (x, five)\n y = other.Reshape (f, four)", KNOWN, "f"),
    ],
)
def test_reshapes(body: str, known: str, source: str) -> None:
    inputs = "float[b,s,24] x, int64[n] given"
    found = values(body, inputs, known=known, constants=CONSTANTS)
    node = found["y"].producer()
    assert node is not None
    assert isinstance(node.graph, ir.Graph)
    model = ir.Model(node.graph, ir_version=8)
    assert MergeReshapes()(model).modified == (source == "x")
    assert node.inputs[0] is found[source]


def test_a_reshape_outside_a_body_stays() -> None:
    branch = "branch () => (float[b,s,24] z) {z = Reshape (f, three)}"
    body = f"f = Reshape (x, five)\n y = If (go) <then_branch = {branch}, else_branch = {branch}>"
    found = values(body, "float[b,s,24] x, bool go", known=KNOWN, constants=CONSTANTS)
    node = found["y"].producer()
    assert node is not None
    assert isinstance(node.graph, ir.Graph)
    assert not MergeReshapes()(ir.Model(node.graph, ir_version=8)).modified


def test_opsets_in_which_a_shape_is_an_attribute_stay() -> None:
    node = ir.node("Reshape", [ir.val("x")], attributes={"shape": [4]})
    again = ir.node("Reshape", [node.outputs[0]], attributes={"shape": [2, 2]})
    graph = ir.Graph([node.inputs[0]], again.outputs, nodes=[node, again], opset_imports={"": 1})  # type: ignore[list-item]
    assert not MergeReshapes()(ir.Model(graph, ir_version=3)).modified
