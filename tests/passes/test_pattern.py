"""What each piece of a pattern takes, what it binds, and where it says a match failed."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from fusenorm.passes.pattern import (
    Casted,
    Const,
    Joined,
    Miss,
    Named,
    OneOf,
    Op,
    Pattern,
    Reduce,
    Refusal,
    Scalar,
    State,
    Var,
    Width,
    matches,
    node_name,
)
from tests.graphs import values

X, Y, Z = Var("x"), Var("y"), Var("z")


def states(
    pattern: Pattern, body: str, inputs: str = "float[b,s,8] a", **more: object
) -> list[State]:
    """Every match at the value y of a graph."""
    found = list(matches(pattern, values(body, inputs, **more)["y"]))  # type: ignore[arg-type]
    if len(found) == 1 and isinstance(found[0], Miss):
        return []
    assert all(isinstance(state, State) for state in found)
    return found  # type: ignore[return-value]


def bound(pattern: Pattern, body: str, inputs: str = "float[b,s,8] a", **more: object) -> list[str]:
    """The names bound to x, y and z by every match."""
    return [
        " ".join(str(state.bindings[name].name) for name in "xyz" if name in state.bindings)
        for state in states(pattern, body, inputs, **more)
    ]


def why(
    pattern: Pattern, body: str, inputs: str = "float[b,s,8] a", **more: object
) -> tuple[str, str]:
    """(code, node) of the miss at y."""
    (miss,) = matches(pattern, values(body, inputs, **more)["y"])  # type: ignore[arg-type]
    assert isinstance(miss, Miss)
    assert miss.refusal is not None
    return miss.refusal.code, miss.refusal.node


# States and misses.


def test_a_name_stands_for_one_value() -> None:
    a, b = ir.val("a"), ir.val("b")
    state = State().bind("x", a)
    assert state is not None
    assert state.bindings == {"x": a}
    assert state.bind("x", a) is state
    assert state.bind("x", b) is None
    other = state.bind("y", b)
    assert other is not None
    assert other.bindings == {"x": a, "y": b}
    assert state.bindings == {"x": a}


def test_a_node_counts_once() -> None:
    one, two = ir.node("Relu", [ir.val("a")]), ir.node("Neg", [ir.val("a")])
    assert State().visit(one).visit(two).visit(one).nodes == (one, two)


def test_the_deepest_miss_is_kept_and_of_equals_the_first() -> None:
    one, two = ir.node("Relu", [ir.val("a")]), ir.node("Neg", [ir.val("a")])
    miss = Miss()
    miss.record(State(), "first", None, "")
    miss.record(State(), "second", None, "")
    assert miss.refusal == Refusal("first", "(graph input)", "")
    miss.record(State().visit(one).visit(two), "deep", two, "words")
    miss.record(State().visit(one), "shallow", one, "")
    assert miss.refusal == Refusal("deep", node_name(two), "words")
    assert miss.nodes == (one, two)


def test_a_node_without_a_name_is_called_by_its_output() -> None:
    a = ir.val("a")
    assert node_name(ir.node("Relu", [a], outputs=[ir.val("y")])) == "y"
    assert node_name(ir.node("Relu", [a], outputs=[ir.val("y")], name="named")) == "named"
    assert node_name(ir.node("Relu", [a], outputs=[ir.val(None)])) == "Relu"
    assert node_name(None) == "(graph input)"


# Operators.


def test_the_same_variable_is_the_same_value() -> None:
    assert bound(Op("Sub", (X, X)), "y = Sub(a, a)") == ["a"]
    pair = "float[8] a, float[8] b"
    assert why(Op("Sub", (X, X)), "y = Sub(a, b)", pair) == ("different_operand", "(graph input)")
    assert bound(Op("Sub", (X, Y)), "y = Sub(a, b)", pair) == ["a b"]
    negative = Op("Sub", (X, Op("Neg", (X,))))
    assert why(negative, "m = Neg(b)\ny = Sub(a, m)", pair) == (
        "different_operand",
        "(graph input)",
    )
    assert why(negative, "r = Relu(a)\nm = Neg(r)\ny = Sub(a, m)", pair) == (
        "different_operand",
        "r",
    )


@pytest.mark.parametrize("op", ["Add", "Mul"])
def test_a_commutative_operator_matches_in_both_orders(op: str) -> None:
    pair = "float[8] a, float[8] b"
    assert bound(Op(op, (X, Y)), f"y = {op}(a, b)", pair) == ["a b", "b a"]
    assert bound(Op(op, (Op("Neg", (X,)), Y)), f"n = Neg(b)\ny = {op}(a, n)", pair) == ["b a"]


@pytest.mark.parametrize("op", ["Sub", "Div", "Pow"])
def test_another_operator_matches_in_its_own(op: str) -> None:
    pair = "float[8] a, float[8] b"
    assert bound(Op(op, (X, Y)), f"y = {op}(a, b)", pair) == ["a b"]


def test_an_operator_is_one_of_the_standard_domain_and_arity() -> None:
    assert why(Op("Relu", (X,)), "y = Neg(a)") == ("operator", "y")
    assert why(Op("Relu", (X,)), "y = other.Relu(a)") == ("operator", "y")
    assert why(Op("Neg", (Op("Relu", (X,)),)), "y = Neg(a)") == ("operator", "(graph input)")
    three = "float[8] a, float low, float high"
    assert states(Op("Clip", (X, Y)), "y = Clip(a, low, high)", three) == []
    assert bound(Op("Clip", (X, Y, Z)), "y = Clip(a, low, high)", three) == ["a low high"]
    assert states(Op("Clip", (X, Y, Z)), "y = Clip(a, , high)", three) == []


def test_the_nodes_of_a_match_are_in_the_order_they_were_met() -> None:
    pattern = Op("Sub", (Op("Neg", (X,)), Op("Exp", (Op("Neg", (X,)),))))
    (state,) = states(pattern, "n = Neg(a)\ne = Exp(n)\ny = Sub(n, e)")
    assert [node_name(node) for node in state.nodes] == ["y", "n", "e"]


def test_alternatives_are_tried_in_order() -> None:
    pattern = OneOf((Op("Neg", (X,)), Y, Op("Neg", (Z,))))
    assert bound(pattern, "y = Neg(a)") == ["a", "y", "a"]
    assert states(OneOf(()), "y = Neg(a)") == []


def test_a_named_value_is_the_first_met() -> None:
    named = Named("kept", Op("Neg", (X,)))
    (state,) = states(Op("Sub", (named, named)), "n = Neg(a)\ny = Sub(n, n)")
    assert state.bindings["kept"].name == "n"
    twice = "n = Neg(a)\nm = Neg(a)\ny = Sub(n, m)"
    (state,) = states(Op("Sub", (named, named)), twice)
    assert state.bindings["kept"].name == "n"


# Numbers.


@pytest.mark.parametrize(
    ("value", "kind", "equal"),
    [
        (np.float32(0.1), "float", True),
        (np.float64(0.1), "double", True),
        (np.float64(np.float32(0.1)), "double", True),
        (np.float16(0.1), "float16", True),
        (np.float32(np.float16(0.1)), "float", False),
        (np.float32(0.1 * (1 + 1e-6)), "float", False),
        (np.float32(0.1 * (1 - 1e-6)), "float", False),
        (np.float64(0.1 * (1 + 1e-6)), "double", False),
        (np.float16(0.1002), "float16", False),
        (np.nextafter(np.float32(0.1), np.float32(1)), "float", True),
        (np.float32(-0.1), "float", False),
        (np.float32([0.1]), "float", True),
        (np.float32([0.1, 0.1]), "float", False),
    ],
)
def test_a_number_as_exactly_as_its_type_can_hold_it(
    value: np.ndarray, kind: str, equal: bool
) -> None:
    size = "2" if np.size(value) == 2 else "8"
    found = states(
        Op("Mul", (X, Const(0.1))), "y = Mul(a, c)", f"{kind}[{size}] a", constants={"c": value}
    )
    assert bool(found) == equal


@pytest.mark.parametrize(("steps", "equal"), [(0, True), (1, True), (2, False)])
def test_a_number_may_be_rounded_to_its_neighbour(steps: int, equal: bool) -> None:
    value = np.float32(1 + steps * 2.0**-23)
    found = states(Op("Sub", (X, Const(1))), "y = Sub(a, c)", constants={"c": value})
    assert bool(found) == equal


def test_a_whole_number_may_be_of_an_integer_type() -> None:
    found = states(Op("Pow", (X, Const(2))), "y = Pow(a, c)", constants={"c": np.int64(2)})
    assert len(found) == 1
    code = why(Op("Pow", (X, Const(2))), "y = Pow(a, c)", constants={"c": np.int64(3)})
    assert code == ("constant", "(graph input)")


def test_a_scalar_is_bound_and_one_name_is_one_scalar() -> None:
    pattern = Op("Sub", (Op("Mul", (X, Scalar("z"))), Scalar("z")))
    constants = {"c": np.float32(3), "d": np.float32(3), "v": np.ones(8, np.float32)}
    assert bound(pattern, "m = Mul(a, c)\ny = Sub(m, c)", constants=constants) == ["a c"]
    assert states(pattern, "m = Mul(a, c)\ny = Sub(m, d)", constants=constants) == []
    code = why(pattern, "m = Mul(a, c)\ny = Sub(m, v)", constants=constants)
    assert code == ("not_scalar", "(graph input)")
    run_time = "float[8] a, float[8] b"
    assert why(Op("Sub", (X, Scalar("z"))), "n = Neg(b)\ny = Sub(a, n)", run_time) == (
        "not_scalar",
        "n",
    )


WIDTH = Op("Div", (X, Width("x")))
PART = Op("Mul", (X, Width("x", reciprocal=True)))


@pytest.mark.parametrize(
    ("pattern", "body", "value", "kind", "fits"),
    [
        (WIDTH, "y = Div(a, c)", 8.0, "float[b,8]", True),
        (WIDTH, "y = Div(a, c)", 0.125, "float[b,8]", False),
        (WIDTH, "y = Div(a, c)", 9.0, "float[b,8]", False),
        (WIDTH, "y = Div(a, c)", 8.0, "float[b,n]", False),
        (PART, "y = Mul(a, c)", 0.125, "float[b,8]", True),
        (PART, "y = Mul(a, c)", 8.0, "float[b,8]", False),
        (PART, "y = Mul(a, c)", 0.126, "float[b,8]", False),
        (PART, "y = Mul(a, c)", 1 / 3, "float[b,3]", True),
        (WIDTH, "y = Div(a, c)", 0.0, "float[b,0]", False),
        (PART, "y = Mul(a, c)", 0.125, "float[b,0]", False),
    ],
)
def test_the_width_of_a_variable(
    pattern: Pattern, body: str, value: float, kind: str, fits: bool
) -> None:
    found = states(pattern, body, f"{kind} a", constants={"c": np.float32(value)})
    assert bool(found) == fits
    if not fits:
        code = why(WIDTH, "y = Div(a, c)", f"{kind} a", constants={"c": np.float32(value + 1)})
        assert code == ("hidden_size", "(graph input)")


def test_the_width_of_what_is_not_bound_yet_is_unknown() -> None:
    pattern = Op("Div", (Width("x"), X))
    constants = {"c": np.float32(8)}
    assert why(pattern, "y = Div(c, a)", constants=constants) == ("hidden_size", "(graph input)")


# Reductions.

MEAN = Reduce("ReduceMean", X)
INT = {"last": np.array([-1]), "third": np.array([2]), "second": np.array([1]), "all": np.arange(3)}
INT |= {"two": np.array([-1, -2]), "none": np.zeros(0, np.int64)}


@pytest.mark.parametrize(
    ("body", "opset", "axes"),
    [
        ("y = ReduceMean<axes = [-1]>(a)", 17, 1),
        ("y = ReduceMean<axes = [2], keepdims = 1>(a)", 17, 1),
        ("y = ReduceMean<axes = [1, 2]>(a)", 17, 2),
        ("y = ReduceMean(a, last)", 18, 1),
        ("y = ReduceMean<keepdims = 1>(a, third)", 18, 1),
        ("y = ReduceMean(a, two)", 18, 2),
        ("y = ReduceMean(a, all)", 18, 3),
    ],
)
def test_a_reduction_over_the_last_axes(body: str, opset: int, axes: int) -> None:
    (state,) = states(MEAN, body, opset=opset, constants=INT)
    assert state.bindings["x"].name == "a"
    assert state.axes == axes
    assert [node.op_type for node in state.nodes] == ["ReduceMean"]


PAIR = Joined((Op("Neg", (X,)), Var("z")))


@pytest.mark.parametrize("axis", [-1, 2])
def test_columns_side_by_side(axis: int) -> None:
    found = values(f"n = Neg(a)\ny = Concat<axis = {axis}>(n, b)", "float[s,8] a, float[s,8] b")
    found["y"].shape = ir.Shape([3, "s", 16])
    (state,) = matches(PAIR, found["y"])
    assert isinstance(state, State)
    assert (state.bindings["x"], state.bindings["z"]) == (found["a"], found["b"])
    assert [node.op_type for node in state.nodes] == ["Concat", "Neg"]


@pytest.mark.parametrize(("shape", "last"), [([3, 16], True), ([16], False), ([2, 3, 16], False)])
def test_the_first_concat_may_leave_out_its_axis(shape: list[int], last: bool) -> None:
    found = values("n = Neg(a)\ny = Concat(n, b)", "float[s,8] a, float[s,8] b", opset=1)
    found["y"].shape = ir.Shape(shape)
    assert isinstance(next(matches(PAIR, found["y"])), State) == last


@pytest.mark.parametrize(
    ("join", "refusal"),
    [
        ("Concat<axis = 1>(n, b)", ("axis", "y")),
        ("Concat<axis = -2>(n, b)", ("axis", "y")),
        ("Concat<axis = 2>(n, b)", ("axis", "y")),  # the rank is not known
        ("Sum(n, b)", ("operator", "y")),
        ("other.Concat<axis = -1>(n, b)", ("operator", "y")),
        ("Concat<axis = -1>(b, n)", ("operator", "(graph input)")),
    ],
)
def test_what_is_not_side_by_side(join: str, refusal: tuple[str, str]) -> None:
    inputs = "float[b,s,8] a, float[b,s,8] b"
    assert why(PAIR, f"n = Neg(a)\ny = {join}", inputs) == refusal


def test_as_many_columns_as_operands() -> None:
    body = "n = Neg(a)\ny = Concat<axis = -1>(n, a, a)"
    (miss,) = matches(PAIR, values(body)["y"])
    assert miss == Miss()


@pytest.mark.parametrize(
    ("body", "opset", "code"),
    [
        ("y = ReduceMean<axes = [-1], keepdims = 0>(a)", 17, "keepdims"),
        ("y = ReduceMean<keepdims = 0>(a, last)", 18, "keepdims"),
        ("y = ReduceMean<axes = [1]>(a)", 17, "axis"),
        ("y = ReduceMean<axes = [0, 2]>(a)", 17, "axis"),
        ("y = ReduceMean(a)", 17, "axis"),
        ("y = ReduceMean(a)", 18, "axis"),
        ("y = ReduceMean(a, none)", 18, "axis"),
        ("y = ReduceMean(a, second)", 18, "axis"),
        ("y = ReduceMean(a, given)", 18, "axis"),
        ("y = ReduceMax(a, last)", 18, "operator"),
    ],
)
def test_any_other_reduction(body: str, opset: int, code: str) -> None:
    inputs = "float[b,s,8] a, int64[1] given"
    assert why(MEAN, body, inputs, opset=opset, constants=INT) == (code, "y")


def test_all_reductions_of_a_match_are_over_as_many_axes() -> None:
    pattern = Op("Sub", (MEAN, MEAN))
    assert bound(pattern, "m = ReduceMean(a, two)\ny = Sub(m, m)", constants=INT) == ["a"]
    uneven = "m = ReduceMean(a, two)\nn = ReduceMean(a, last)\ny = Sub(m, n)"
    assert why(pattern, uneven, constants=INT) == ("axis", "n")


@pytest.mark.parametrize(("number", "fits"), [(24.0, True), (8.0, False)])
def test_the_width_is_that_of_all_reduced_axes(number: float, fits: bool) -> None:
    pattern = Op("Div", (Reduce("ReduceSum", X), Width("x")))
    body = "t = ReduceSum(a, two)\ny = Div(t, n)"
    constants = {**INT, "n": np.float32(number)}
    assert bool(states(pattern, body, "float[b,3,8] a", constants=constants)) == fits


# Casts.


@pytest.mark.parametrize(
    ("source", "code", "to", "through"),
    [
        ("float16", 1, "wide", True),
        ("bfloat16", 1, "wide", True),
        ("float16", 11, "wide", True),
        ("float", 11, "wide", False),
        ("float16", 16, "wide", False),
        ("float", 10, "wide", False),
        ("float", 10, "storage", True),
        ("float", 16, "storage", True),
        ("double", 10, "storage", True),
        ("double", 1, "storage", False),
        ("bfloat16", 10, "storage", False),
        ("float16", 1, "storage", False),
        ("int32", 1, "wide", False),
    ],
)
def test_a_cast_that_is_seen_through(source: str, code: int, to: str, through: bool) -> None:
    found = values(f"y = Cast<to = {code}>(a)", f"{source}[8] a")
    found["y"].dtype = ir.DataType(code)
    ends = [state.bindings["x"].name for state in matches(Casted(X, to), found["y"])]  # type: ignore[union-attr]
    assert ends == (["a", "y"] if through else ["y"])


def test_a_cast_need_not_be_there() -> None:
    assert bound(Casted(Op("Neg", (X,)), "wide"), "y = Neg(a)") == ["a"]
    assert bound(Casted(X, "wide"), "y = other.Cast<to = 1>(a)", "float16[8] a") == ["y"]
    random = values("y = RandomNormalLike<dtype = 1>(a)", "float16[8] a")["y"]
    random.dtype = ir.DataType.FLOAT
    assert [state.nodes for state in matches(Casted(X, "wide"), random)] == [()]
    (through, _) = states(Casted(X, "wide"), "y = Cast<to = 1>(a)", "float16[8] a")
    assert [node.op_type for node in through.nodes] == ["Cast"]
