"""Constants and known shapes are folded to the bit, and nothing else is."""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from fusenorm.passes.fold_constants import FoldConstants
from fusenorm.passes.verify_graph import find_problem
from tests.graphs import values

F32, I64 = np.float32, np.int64
CONSTANTS = {
    "a": F32([[1, 2, 3], [4, 5, 6]]),
    "b": F32([[0.1, 0.2, 0.3]]),
    "whole": np.array([[3, -2, 1]]),
    "flag": np.array([True, False, True]),
    "one": np.array([1]),
    "zero": np.array([0]),
    "two": np.array([2]),
    "six": np.array([6]),
    "start": np.array(1),
    "end": np.array(7),
    "step": np.array(2),
    "byte": np.array([3], np.int8),
    "half": np.float16([0.1, 0.2]),
}


def folded(
    body: str,
    inputs: str = "float[b,s,8] x",
    *,
    constants: Mapping[str, np.ndarray] = CONSTANTS,
    known: str = "",
    **options: int,
) -> np.ndarray | None:
    """The value of c, which y reads, where folding makes it a constant."""
    found = values(f"{body}\ny = Identity(c)", inputs, constants=constants, known=known)
    graph = found["y"].producer().graph  # type: ignore[union-attr]
    assert isinstance(graph, ir.Graph)
    before = [node.op_type for node in graph]
    result = FoldConstants(**options)(ir.Model(graph, ir_version=8))
    assert result.modified == ("c" in graph.initializers)
    if "c" not in graph.initializers:
        assert [node.op_type for node in graph] == before
        return None
    assert "c" not in {out.name for node in graph for out in node.outputs}
    reader = graph[-1].inputs[0]
    assert reader is not None
    assert (reader.name, reader.const_value) == ("c", graph.initializers["c"].const_value)
    assert find_problem(result.model) is None
    assert reader.const_value is not None
    return reader.const_value.numpy()


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("Add(a, b)", CONSTANTS["a"] + CONSTANTS["b"]),
        ("Add(half, half)", np.float16([0.2, 0.4])),
        ("Sub(a, b)", CONSTANTS["a"] - CONSTANTS["b"]),
        ("Mul(a, b)", CONSTANTS["a"] * CONSTANTS["b"]),
        ("Div(a, b)", CONSTANTS["a"] / CONSTANTS["b"]),
        ("Neg(a)", -CONSTANTS["a"]),
        ("Sqrt(a)", np.sqrt(CONSTANTS["a"])),
        ("Cast<to = 10>(b)", CONSTANTS["b"].astype(np.float16)),
        ("Concat<axis = 0>(a, b)", np.concatenate([CONSTANTS["a"], CONSTANTS["b"]])),
        ("Gather(a, one)", CONSTANTS["a"][[1]]),
        ("Slice(a, one, two, one)", CONSTANTS["a"][:, 1:2]),
        ("Reshape(a, six)", np.arange(1, 7, dtype=F32)),
        ("Squeeze(b, zero)", CONSTANTS["b"][0]),
        ("Unsqueeze(b, zero)", CONSTANTS["b"][None]),
        ("Transpose(a)", CONSTANTS["a"].T),
        ("Identity(a)", CONSTANTS["a"]),
        ("Flatten<axis = 0>(a)", np.arange(1, 7, dtype=F32)[None]),
        ("Equal(a, b)", np.zeros((2, 3), bool)),
        ("Where(flag, a, b)", F32([[1, 0.2, 3], [4, 0.2, 6]])),
        ("Range(start, end, step)", I64([1, 3, 5])),
        ("Div(whole, two)", I64([[1, -1, 0]])),
    ],
)
def test_an_operator_numpy_computes_as_every_runtime(expression: str, result: np.ndarray) -> None:
    array = folded(f"c = {expression}")
    assert array is not None
    assert array.dtype == result.dtype
    np.testing.assert_array_equal(array, result)


@pytest.mark.parametrize(
    "body",
    [
        "c = Exp(a)",  # runtimes differ in the last bit
        "c = other.Add(a, b)",
        "c = other.Shape(x)",
        "u = other.Thing(x)\nc = Cast<to = 10>(u)",
        "c = Add(a, x)",
        "c = Add(a, given)",
        "c, d = Split<axis = 0, num_outputs = 2>(a)",
        "c = Slice(a, one, two, , one)",
        "c = Constant<value_float = 1.0>()",
        "c = Gather(a, six)",  # cannot run
        "c = Range(tenth, seven, tenth)",  # runtimes differ in the last bits
        "c = Gather(words, one)",
        "c = Equal(words, words)",
    ],
)
def test_what_is_not_folded(body: str) -> None:
    constants = {**CONSTANTS, "given": CONSTANTS["a"], "tenth": F32(0.1), "seven": F32(7)}
    constants["words"] = np.array(["a", "b"], object)
    assert folded(body, "float[2,3] x, float[2,3] given", constants=constants) is None


def test_a_graph_output_keeps_its_node() -> None:
    graph = values("y = Neg(a)", constants=CONSTANTS)["y"].producer().graph  # type: ignore[union-attr]
    model = ir.Model(graph, ir_version=8)  # type: ignore[arg-type]
    assert not FoldConstants()(model).modified
    assert [node.op_type for node in model.graph] == ["Neg"]


def test_chains_fold_in_one_go() -> None:
    array = folded("u = Neg(a)\nv = Sqrt(a)\nw = Mul(u, v)\nc = Transpose(w)")
    assert array is not None
    np.testing.assert_array_equal(array, (-CONSTANTS["a"] * np.sqrt(CONSTANTS["a"])).T)


@pytest.mark.parametrize(
    ("source", "code", "result"),
    [
        (F32([1.5]), 10, np.float16([1.5])),
        (F32([1.5]), 16, np.array([1.5], ml_dtypes.bfloat16)),
        (F32([1.5]), 11, np.float64([1.5])),
        (F32([1.5]), 6, np.int32([1])),
        (F32([1.5]), 7, I64([1])),
        (F32([1.5]), 9, np.array([True])),
        (np.float16([1.5]), 1, F32([1.5])),
        (np.array([1.5], ml_dtypes.bfloat16), 1, F32([1.5])),
        (np.float64([1.5]), 1, F32([1.5])),
        (np.float64([2**24 + 1]), 7, I64([2**24 + 1])),
        (np.int32([7]), 1, F32([7])),
        (I64([7]), 1, F32([7])),
        (np.array([True]), 1, F32([1])),
        (np.float64([1.5, 1e9, np.nan]), 10, np.float16([1.5, np.inf, np.nan])),
        (np.float64([1 + 2**-11 + 2**-40]), 10, None),  # some runtimes round to f32 first
        (F32([1.5]), 3, None),  # runtimes saturate or wrap
        (F32([1.5]), 8, None),  # runtimes print in their own ways
        (np.int8([3]), 1, None),
    ],
)
def test_casts(source: np.ndarray, code: int, result: np.ndarray | None) -> None:
    array = folded(f"c = Cast<to = {code}>(v)", constants={"v": source})
    assert (array is None) == (result is None)
    if array is not None and result is not None:
        assert array.dtype == result.dtype
        np.testing.assert_array_equal(array, result)


@pytest.mark.parametrize(("opset", "folds"), [(6, False), (7, True)])
def test_operators_that_broadcast_by_attributes_stay(opset: int, folds: bool) -> None:
    found = values("c = Neg(a)\ny = Identity(c)", "float[b,s,8] x", constants=CONSTANTS)
    graph = found["y"].producer().graph  # type: ignore[union-attr]
    assert isinstance(graph, ir.Graph)
    graph.opset_imports[""] = opset
    assert FoldConstants()(ir.Model(graph, ir_version=8)).modified == folds


@pytest.mark.parametrize(("limit", "folds"), [(9, True), (8, False)])
def test_large_inputs_are_left_to_the_runtime(limit: int, folds: bool) -> None:
    assert (folded("c = Add(a, b)", limit=limit) is not None) == folds


@pytest.mark.parametrize(("limit", "folds"), [(4, True), (3, False)])
def test_large_results_would_grow_the_file(limit: int, folds: bool) -> None:
    constants = {"start": np.array(0), "end": np.array(4), "step": np.array(1)}
    found = folded("c = Range(start, end, step)", constants=constants, limit=limit)
    assert (found is not None) == folds


def test_by_default_a_vector_folds_and_an_embedding_does_not() -> None:
    wide, table = np.ones(1 << 16, F32), np.ones((1 << 16) + 1, F32)
    assert folded("c = Neg(v)", constants={"v": wide}) is not None
    assert folded("c = Neg(v)", constants={"v": table}) is None


@pytest.mark.parametrize(
    ("body", "kind", "result"),
    [
        ("c = Shape(x)", "float[2,3,8]", [2, 3, 8]),
        ("c = Shape(x)", "float[b,3,8]", None),
        ("c = Shape(x)", "float[]", None),
        ("c = Shape<start = 1>(x)", "float[b,3,8]", [3, 8]),
        ("c = Shape<start = -1>(x)", "float[b,3,8]", [8]),
        ("c = Shape<end = 1>(x)", "float[2,s,8]", [2]),
        ("c = Shape<start = 1, end = -1>(x)", "float[b,3,h]", [3]),
        ("c = Shape<start = 1, end = 9>(x)", "float[b,3,8]", [3, 8]),
        ("c = Shape<start = 1>(x)", "float[b,s,8]", None),
        ("c = Size(x)", "float[2,3,8]", 48),
        ("c = Size(x)", "float", 1),
        ("c = Size(x)", "float[b,3]", None),
        ("c = Size(x)", "float[]", None),
    ],
)
def test_shapes_and_sizes(body: str, kind: str, result: object) -> None:
    array = folded(body, f"{kind} x")
    assert (array is None) == (result is None)
    if array is not None:
        assert array.dtype == I64
        np.testing.assert_array_equal(array, np.array(result))


@pytest.mark.parametrize(
    ("index", "kind", "result"),
    [
        ([-1], "float[b,s,8]", [8]),
        ([2], "float[b,s,8]", [8]),
        (2, "float[b,s,8]", 8),
        ([[2]], "float[b,s,8]", [[8]]),
        ([1], "float[b,3,h]", [3]),
        ([-2], "float[b,3,h]", [3]),
        ([-3], "float[2,s,h]", [2]),
        ([0], "float[2,s,h]", [2]),
        ([0], "float[b,3,8]", None),
        ([3], "float[b,3,8]", None),
        ([4], "float[b,3,8]", None),
        ([-4], "float[b,3,8]", None),
        ([1, 2], "float[b,3,8]", [3, 8]),
        ([1, 0], "float[b,3,8]", None),
        ([-1], "float[b,s,h]", None),
        ([-1], "float[]", None),
        ([0], "float[]", None),
    ],
)
def test_one_dimension_of_a_shape_known_in_part(index: object, kind: str, result: object) -> None:
    constants = {"i": np.array(index)}
    array = folded("s = Shape(x)\nc = Gather(s, i)", f"{kind} x", constants=constants)
    assert (array is None) == (result is None)
    if array is not None:
        assert array.dtype == I64
        np.testing.assert_array_equal(array, np.array(result))


@pytest.mark.parametrize(
    ("numbers", "kind", "result"),
    [
        ("minus1, big", "float[b,s,8]", [8]),
        ("minus1, big, zero", "float[b,s,8]", [8]),
        ("one, big, zero, two", "float[b,3,s,4]", [3, 4]),
        ("big, zero, zero, minus2", "float[2,s,4]", None),
        ("minus1, big, zero, zero", "float[2,s,4]", None),
        ("one, big, , two", "float[b,3,s,4]", None),
        ("one, both", "float[b,3,8]", None),
        ("zero, big", "float[b,3,8]", None),
        ("one, ints", "float[b,3,8]", None),
        ("minus1, big", "float[]", None),
    ],
)
def test_dimensions_sliced_of_a_shape(numbers: str, kind: str, result: list[int] | None) -> None:
    given = {"minus1": -1, "minus2": -2, "zero": 0, "one": 1, "two": 2, "big": 2**62}
    constants = {name: np.array([number]) for name, number in given.items()}
    constants["both"] = np.array([2, 3])
    used = {name: array for name, array in constants.items() if name in numbers.split(", ")}
    body = f"s = Shape(x)\nc = Slice(s, {numbers})"
    array = folded(body, f"{kind} x, int64[1] ints", constants=used)
    assert (None if array is None else array.tolist()) == result


@pytest.mark.parametrize(
    "body",
    [
        "s = Shape<start = 1>(x)\nc = Gather(s, i)",  # an index of another shape
        "s = other.Shape(x)\nc = Gather(s, i)",
        "s = Abs(ints)\nc = Gather(s, i)",
        "c = Gather(ints, i)",
        "s = Shape(x)\nc = Gather(s, ints)",
    ],
)
def test_a_gather_of_something_else(body: str) -> None:
    constants = {"i": np.array([1])}
    assert folded(body, "float[b,3,h] x, int64[1] ints", constants=constants) is None


@pytest.mark.parametrize(
    ("index", "known", "result"),
    [(-1, "", 4), (1, "", None), (1, "float[p,q] r", 4), (0, "float[p,q] r", None)],
)
def test_a_dimension_only_annotation_knows(index: int, known: str, result: int | None) -> None:
    body = "r = Reshape(x, to)\ns = Shape(r)\nc = Gather(s, i)"
    constants = {"to": np.array([-1, 4]), "i": np.array([index])}
    array = folded(body, "float[b,s] x", constants=constants, known=known)
    assert (None if array is None else array.tolist()) == (None if result is None else [result])


def test_branches_are_folded_where_they_are() -> None:
    body = """
      y = If (flag) <
        then_branch = yes () => (float[] p) { u = Neg(a) p = Exp(u) },
        else_branch = no () => (float[] q) { q = Exp(a) }
      >
    """
    found = values(body, "bool flag", constants={"a": CONSTANTS["a"]})
    graph = found["y"].producer().graph  # type: ignore[union-attr]
    model = ir.Model(graph, ir_version=8)  # type: ignore[arg-type]
    assert FoldConstants()(model).modified
    branch = graph[0].attributes["then_branch"].as_graph()  # type: ignore[index]
    assert [node.op_type for node in branch] == ["Exp"]
    np.testing.assert_array_equal(branch.initializers["u"].const_value.numpy(), -CONSTANTS["a"])
    assert "u" not in model.graph.initializers
