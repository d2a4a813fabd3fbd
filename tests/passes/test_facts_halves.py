"""Halves of a packed tensor: by Split, Slice or Gather, and as parts of a view of pairs."""

from __future__ import annotations

import numpy as np
import pytest

from fusenorm.passes import facts
from tests.graphs import values


def half(body: str, kind: str = "float[b,s,8]", **constants: object) -> tuple[str, int] | None:
    arrays = {name: np.asarray(array, np.int64) for name, array in constants.items()}
    opset = 11 if "split =" in body else 18
    inputs = f"{kind} x, int64[1] n"
    found = values(body, inputs, constants=arrays, opset=opset)
    part = facts.half_of(found["y"])
    if part is None:
        return None
    assert part[0] is found["x"]
    return part[1:]


@pytest.mark.parametrize(
    ("body", "part"),
    [
        ("y, b = Split<axis = -1, num_outputs = 2>(x)", ("halves", 0)),
        ("a, y = Split<axis = 2, num_outputs = 2>(x)", ("halves", 1)),
        ("a, y = Split<axis = 1, num_outputs = 2>(x)", None),
        ("a, y = Split<num_outputs = 2>(x)", None),
        ("y, b, c = Split<axis = -1, num_outputs = 3>(x)", None),
        ("y = Split<axis = -1, num_outputs = 1>(x)", None),
        ("y, b = Split<axis = -1, split = [4, 4]>(x)", ("halves", 0)),
        ("y, b = Split<axis = -1, split = [3, 5]>(x)", None),
        ("y, b = Split<axis = -1>(x, even)", ("halves", 0)),
        ("a, y = Split<axis = -1>(x, even)", ("halves", 1)),
        ("a, y = Split<axis = -1>(x, uneven)", None),
        ("a, y = Split<axis = -1>(x, n)", None),
        ("y, b = other.Split<axis = -1>(x)", None),
        ("y = Relu(x)", None),
        ("y = RandomNormal<shape = [2, 8]>()", None),
    ],
)
def test_a_half_by_split(body: str, part: tuple[str, int] | None) -> None:
    assert half(body, even=[4, 4], uneven=[3, 5]) == part


@pytest.mark.parametrize(
    ("kind", "body", "part"),
    [
        ("float[b,s,7]", "y, b = Split<axis = -1, num_outputs = 2>(x)", None),
        ("float[b,s,n]", "y, b = Split<axis = -1, num_outputs = 2>(x)", None),
        ("float[b,s,n]", "y, b = Split<axis = -1>(x, even)", ("halves", 0)),
    ],
)
def test_a_split_of_an_odd_or_unknown_width(
    kind: str, body: str, part: tuple[str, int] | None
) -> None:
    assert half(body, kind, even=[4, 4]) == part


MOST = 2**62


@pytest.mark.parametrize(
    ("start", "end", "axis", "step", "part"),
    [
        (0, 4, -1, 1, ("halves", 0)),
        (4, 8, -1, 1, ("halves", 1)),
        (4, MOST, 2, 1, ("halves", 1)),
        (-4, MOST, -1, 1, ("halves", 1)),
        (-8, -4, -1, 1, ("halves", 0)),
        (0, 8, -1, 2, ("interleaved", 0)),
        (1, MOST, -1, 2, ("interleaved", 1)),
        (0, 4, 1, 1, None),
        (0, 3, -1, 1, None),
        (0, 5, -1, 1, None),
        (1, 5, -1, 1, None),
        (4, 7, -1, 1, None),
        (0, 8, -1, 1, None),
        (0, 7, -1, 3, None),
        (2, 8, -1, 2, None),
        (3, -9, -1, -1, None),
        (0, 0, -1, 1, None),
    ],
)
def test_a_half_by_slice(
    start: int, end: int, axis: int, step: int, part: tuple[str, int] | None
) -> None:
    body = "y = Slice(x, start, end, axis, step)"
    assert half(body, start=[start], end=[end], axis=[axis], step=[step]) == part


@pytest.mark.parametrize(
    ("kind", "body", "part"),
    [
        ("float[b,s,8]", "y = Slice(x, zero, four, last)", ("halves", 0)),
        ("float[b,s,8]", "y = Slice(x, zero, n, last)", None),
        ("float[b,s,8]", "y = Slice(x, n, four, last)", None),
        ("float[b,s,8]", "y = Slice(x, zero, four, n)", None),
        ("float[b,s,8]", "y = Slice(x, pair, pairs, axes)", None),
        ("float[8]", "y = Slice(x, zero, four)", None),
        ("float[b,s,n]", "y = Slice(x, zero, four, last)", None),
        ("float[b,s,7]", "y = Slice(x, zero, three, last)", None),
        ("float[b,s,9]", "y = Slice(x, zero, four, last)", None),
        ("float[b,s,6]", "y = Slice(x, zero, three, last)", ("halves", 0)),
        ("float[b,s,8]", "y = other.Slice(x, zero, four, last)", None),
        ("float[b,s,8]", "y = Pad(x, zero, four, last)", None),
    ],
)
def test_a_slice_whose_bounds_are_no_half(
    kind: str, body: str, part: tuple[str, int] | None
) -> None:
    bounds = {"zero": [0], "three": [3], "four": [4], "last": [-1]}
    assert half(body, kind, **bounds, pair=[0, 0], pairs=[4, 8], axes=[1, 2]) == part


def test_a_split_whose_sizes_are_left_out() -> None:
    found = values("y, b = Split<axis = -1, num_outputs = 2>(x)")
    node = found["y"].producer()
    assert node is not None
    node.resize_inputs(2)
    assert facts.half_of(found["y"]) == (found["x"], "halves", 0)


@pytest.mark.parametrize(
    ("kind", "body", "part"),
    [
        ("float[b,s,4]", "y = Gather<axis = -1>(x, first)", ("halves", 0)),
        ("float[b,s,4]", "y = Gather<axis = -1>(x, back)", ("halves", 1)),
        ("float[b,s,4]", "y = Gather<axis = 2>(x, even)", ("interleaved", 0)),
        ("float[b,s,4]", "y = Gather<axis = -1>(x, odd)", ("interleaved", 1)),
        ("float[b,s,4]", "y = Gather<axis = -1>(x, turned)", None),
        ("float[b,s,4]", "y = Gather<axis = -1>(x, twice)", None),
        ("float[b,s,4]", "y = Gather<axis = -1>(x, none)", None),
        ("float[b,s,4]", "y = Gather<axis = -1>(x, n)", None),
        ("float[b,s,4]", "y = Gather<axis = 1>(x, first)", None),
        ("float[4,s,4]", "y = Gather(x, first)", None),
        ("float[4]", "y = Gather(x, first)", ("halves", 0)),
        ("float[b,s,4]", "y = Gather<axis = -1>(x, raised)", None),
        ("float[b,s,2]", "y = Gather<axis = -1>(x, number)", None),
        ("float[b,s,4]", "y = other.Gather<axis = -1>(x, first)", None),
        ("float[2]", "y, mask = Dropout(x)", None),
    ],
)
def test_a_half_by_gather(kind: str, body: str, part: tuple[str, int] | None) -> None:
    indices = {
        "first": [0, 1], "back": [-2, -1], "even": [0, 2], "odd": [1, 3], "turned": [1, 0],
        "twice": [0, 0], "none": [], "raised": [[0, 1]], "number": 0,
    }  # fmt: skip
    assert half(body, kind, **indices) == part


def test_what_has_no_first_input_is_no_half() -> None:
    loop = """
      y = Loop(n, , x) <
        body = step (int64 i, bool go, float[b,s,8] h) => (bool next, float[b,s,8] t) {
          next = Identity(go)
          t = Neg(h)
        }
      >
    """
    assert half(loop) is None
    assert half(loop.replace("(n,", "(,")) is None


# Views of a packed tensor.

PLACES = {
    "i0": [0], "i1": [1], "i2": [2], "first": [-2], "second": [-3], "last": [-1], "axis2": [2],
    "axis3": [3], "both": [-2, 0], "zero": 0, "one": 1, "raised": [[0]], "none": [],
    "to_halves": [0, 0, 2, 4], "to_pairs": [0, 0, 4, 2], "flat_halves": [2, 4],
    "flat_pairs": [4, 2], "empty_one_one": [0, 1, 1],
}  # fmt: skip
HALVES = "p = Reshape(x, to_halves)"
PAIRS = "p = Reshape(x, to_pairs)"


def view(
    body: str, kind: str = "float[b,s,8]", pairs: str | None = None, opset: int = 18
) -> tuple[tuple[int, int], int, int] | None:
    """What view_of says of y, a part of p, without source and target."""
    constants = {name: np.array(array, np.int64) for name, array in PLACES.items()}
    if pairs is None:
        pairs = "float[b,s,2,4]" if "to_halves" in body else "float[b,s,4,2]"
    inputs = f"{kind} x, int64[1] n"
    found = values(body, inputs, known=f"{pairs} p", constants=constants, opset=opset)
    part = facts.view_of(found["y"])
    if part is None:
        return None
    node = found["p"].producer()
    assert node is not None
    assert (part.source, part.target) == tuple(node.inputs)
    return part.pair, part.axis, part.part


@pytest.mark.parametrize(
    ("lines", "part"),
    [
        (f"{HALVES}\ny = Gather<axis = -2>(p, one)", ((2, 4), -2, 1)),
        (f"{HALVES}\ny = Gather<axis = 2>(p, zero)", ((2, 4), -2, 0)),
        (f"{PAIRS}\ny = Gather<axis = 3>(p, one)", ((4, 2), -1, 1)),
        (f"{HALVES}\na, b = Split<axis = -2, num_outputs = 2>(p)\ny = Squeeze(b, first)",
         ((2, 4), -2, 1)),
        (f"{HALVES}\na, b = Split<axis = -2, num_outputs = 2>(p)\ny = Squeeze(a, axis2)",
         ((2, 4), -2, 0)),
        (f"{PAIRS}\na, b = Split<axis = 3, num_outputs = 2>(p)\ny = Squeeze(b, axis3)",
         ((4, 2), -1, 1)),
        (f"{PAIRS}\na, b = Split<axis = 3, num_outputs = 2>(p)\ny = Squeeze(b, last)",
         ((4, 2), -1, 1)),
        (f"{PAIRS}\na = Slice(p, i1, i2, last)\ny = Squeeze(a, last)", ((4, 2), -1, 1)),
        # Another axis than the one taken of is dropped, or others as well, or which is unknown.
        (f"{HALVES}\na, b = Split<axis = -2, num_outputs = 2>(p)\ny = Squeeze(a, i0)", None),
        (f"{HALVES}\na, b = Split<axis = -2, num_outputs = 2>(p)\ny = Squeeze(a, both)", None),
        (f"{HALVES}\na, b = Split<axis = -2, num_outputs = 2>(p)\ny = Squeeze(a, n)", None),
        (f"{HALVES}\na, b = Split<axis = -2, num_outputs = 2>(p)\ny = Squeeze(a)", None),
        # The axis of the parts stays, or both are taken.
        (f"{HALVES}\ny, b = Split<axis = -2, num_outputs = 2>(p)", None),
        (f"{HALVES}\ny = Gather<axis = -2>(p, i1)", None),
        (f"{HALVES}\na = Slice(p, i0, i2, first)\ny = Squeeze(a, first)", None),
        (f"{HALVES}\na = Gather<axis = -2>(p, zero)\ny = Squeeze(a, first)", None),
        (f"{HALVES}\na = Gather<axis = -2>(p, none)\ny = Squeeze(a, first)", None),
        (f"{HALVES}\ny = Gather<axis = -2>(p, raised)", None),
        (f"{HALVES}\nz, a, b = Split<axis = -2>(p, empty_one_one)\ny = Squeeze(a, first)", None),
        (f"{HALVES}\ny = Gather<axis = -1>(p, one)", None),
        (f"{HALVES}\ny = Gather<axis = -3>(p, one)", None),
        (f"{HALVES}\ny = other.Gather<axis = -2>(p, one)", None),
        (f"{HALVES}\ny = Gather<axis = -2>(p, n)", None),
        ("p = Neg(x)\ny = Gather<axis = -2>(p, one)", None),
        ("p = other.Reshape(x, to_halves)\ny = Gather<axis = -2>(p, one)", None),
        ("p = Identity(x)\ny = Identity(p)", None),
    ],
)  # fmt: skip
def test_a_part_of_a_view(lines: str, part: tuple[tuple[int, int], int, int] | None) -> None:
    assert view(lines) == part


@pytest.mark.parametrize(
    ("lines", "part"),
    [
        ("p = Reshape(x, flat_halves)\ny = Gather(p, one)", ((2, 4), -2, 1)),
        ("p = Reshape(x, flat_pairs)\ny = Gather<axis = 1>(p, one)", ((4, 2), -1, 1)),
        ("p = Reshape(x, flat_halves)\na, b = Split<num_outputs = 2>(p)\ny = Squeeze(a, i0)",
         ((2, 4), -2, 0)),
    ],
)  # fmt: skip
def test_a_part_of_a_view_of_one_row(lines: str, part: tuple[tuple[int, int], int, int]) -> None:
    assert view(lines, "float[8]", "float[2,4]" if "halves" in lines else "float[4,2]") == part


@pytest.mark.parametrize(
    ("axes", "part"), [("<axes = [2]>", ((2, 4), -2, 0)), ("<axes = [0]>", None), ("", None)]
)
def test_a_part_of_a_view_before_opset_13(axes: str, part: object) -> None:
    lines = f"{HALVES}\na, b = Split<axis = -2>(p)\ny = Squeeze{axes}(a)"
    assert view(lines, opset=11) == part


@pytest.mark.parametrize(
    ("kind", "pairs"),
    [
        ("float[b,s,8]", "float[]"),
        ("float[b,s,n]", "float[b,s,2,4]"),
        ("float[b,s,9]", "float[b,s,2,4]"),
        ("float[b,s,0]", "float[b,s,2,4]"),
        ("float[b,s,8]", "float[b,s,2,5]"),
        ("float[b,s,8]", "float[b,s,4,2]"),
        ("float[b,s,8]", "float[b,2,4]"),
        ("float[b,s,8]", "float[c,t,2,4]"),
    ],
)
def test_shapes_that_are_no_view(kind: str, pairs: str) -> None:
    assert view(f"{HALVES}\ny = Gather<axis = -2>(p, one)", kind, pairs) is None


def test_a_view_of_a_row_of_unknown_rank() -> None:
    lines = f"r = other.Thing(x)\n{HALVES.replace('x', 'r')}\ny = Gather<axis = -2>(p, one)"
    constants = {name: np.array(PLACES[name]) for name in ("to_halves", "one")}
    found = values(lines, known="float[b,s,2,4] p", constants=constants)
    facts.assume_row(found["r"], "f32", 8)
    assert facts.view_of(found["y"]) is None


@pytest.mark.parametrize(
    ("lines", "part"),
    [
        (f"{HALVES}\ny = Gather<axis = -2>(p, one)", ("halves", 1)),
        (f"{PAIRS}\ny = Gather<axis = -1>(p, zero)", ("interleaved", 0)),
    ],
)
def test_a_part_of_a_view_is_a_half(lines: str, part: tuple[str, int]) -> None:
    constants = {name: np.array(array, np.int64) for name, array in PLACES.items()}
    pairs = "float[b,s,2,4]" if "halves" in lines else "float[b,s,4,2]"
    found = values(lines, known=f"{pairs} p", constants=constants)
    assert facts.half_of(found["y"]) == (found["x"], *part)


@pytest.mark.parametrize(
    ("kind", "body", "columns"),
    [
        ("float[b,s,9]", "y = Slice(x, zero, four, last)", (9, (0, 1, 2, 3))),
        ("float[b,s,9]", "y = Slice(x, four, nine, two)", (9, (4, 5, 6, 7, 8))),
        ("float[b,s,9]", "y = Slice(x, nine, nine, last)", (9, ())),
        ("float[b,s,9]", "y = Slice(x, zero, four, zero)", None),
        ("float[b,s,n]", "y = Slice(x, zero, four, last)", None),
        ("float[b,s,0]", "y = Slice(x, zero, four, last)", None),
        ("float[b,s,9]", "y = Gather<axis = -1>(x, given)", (9, (1, 3, 5))),
        ("float[b,s,9]", "y = Gather<axis = -1>(x, one)", None),
        ("float[b,s,9]", "y = Neg(x)", None),
        ("float[b,s,9]", "y = Constant<value_float = 1.0>()", None),
    ],
)
def test_columns(kind: str, body: str, columns: tuple[int, tuple[int, ...]] | None) -> None:
    numbers = {"zero": [0], "four": [4], "nine": [9], "two": [2], "last": [-1], "given": [1, 3, 5]}
    arrays = {name: np.array(numbers[name]) for name in numbers if name in body}
    arrays |= {"one": np.array(1)} if "one" in body else {}
    found = values(body, f"{kind} x", constants=arrays)
    part = facts.columns_of(found["y"])
    assert part == (columns and facts.Columns(found["x"], *columns))


def test_an_input_is_no_part() -> None:
    assert facts.columns_of(values("y = Neg(x)")["x"]) is None
