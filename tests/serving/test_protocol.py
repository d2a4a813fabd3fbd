from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from fusenorm.errors import BadInput
from fusenorm.serving.protocol import (
    DATATYPES,
    Input,
    Output,
    batch_symbol,
    datatype,
    decode,
    dims,
    metadata,
    parse,
)
from fusenorm.signature import Signature, Tensor

TOKENS = Tensor("tokens", "int64", ("batch", "seq"))
LOGITS = Tensor("logits", "float32", ("batch", "seq", 256))


def test_metadata() -> None:
    assert metadata([TOKENS, LOGITS]) == [
        {"name": "tokens", "datatype": "INT64", "shape": [-1, -1]},
        {"name": "logits", "datatype": "FP32", "shape": [-1, -1, 256]},
    ]


@pytest.mark.parametrize("dtype", DATATYPES)
def test_every_datatype_is_of_a_real_type(dtype: str) -> None:
    """Raw bytes of it come back as they were."""
    tensor = Tensor("x", dtype, (2,))
    values = np.array([0, 1]).astype(tensor.numpy)
    found = decode(tensor, Input("x", DATATYPES[dtype], [2], values.tobytes()))
    assert found.dtype == values.dtype
    assert (found == values).all()


@pytest.mark.parametrize("dtype", ["string", "", "float8_e4m3fn"])
def test_what_is_no_number_of_the_protocol(dtype: str) -> None:
    with pytest.raises(BadInput, match="'x'"):
        datatype(Tensor("x", dtype, (1,)))


def test_an_unknown_rank() -> None:
    with pytest.raises(BadInput, match="'x' has no known rank"):
        dims(Tensor("x", "float32", None))


@pytest.mark.parametrize(
    ("shapes", "symbol"),
    [
        ([("n", 3), ("n",)], "n"),
        ([("n", "s"), ("n", "s", 8)], "n"),
        ([("n", 3), ("m", 3)], None),  # two symbols
        ([("n", 3), (3,)], None),  # an output without it
        ([("n", "n"), ("n",)], None),  # twice in one
        ([("n", "n + s"), ("n",)], None),  # and in an expression
        ([(4, 3), (4,)], None),  # a fixed size
        ([(None, 3), (None,)], None),  # no name: nothing says they are equal
        ([(), ("n",)], None),  # a scalar
        ([None, ("n",)], None),  # an unknown rank
    ],
)
def test_the_batch_axis(shapes: list[Any], symbol: str | None) -> None:
    first, *others = (Tensor(str(index), "float32", shape) for index, shape in enumerate(shapes))
    assert batch_symbol(Signature((first,), tuple(others))) == symbol


def test_lists_become_arrays() -> None:
    nested = decode(TOKENS, Input("tokens", "INT64", [2, 2], [[1, 2], [3, 4]]))
    flat = decode(TOKENS, Input("tokens", "INT64", [2, 2], [1, 2, 3, 4]))
    np.testing.assert_array_equal(nested, [[1, 2], [3, 4]])
    np.testing.assert_array_equal(flat, nested)
    whole = decode(LOGITS, Input("logits", "FP32", [1, 1, 2], [1, float("inf")]))
    np.testing.assert_array_equal(whole, np.array([[[1, np.inf]]], np.float32))
    half = decode(Tensor("x", "bfloat16", (1,)), Input("x", "BF16", [1], [1.5]))
    assert half.dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (Input("tokens", "INT32", [1, 2], [1, 2]), "is INT32: the model takes INT64"),
        (Input("tokens", "INT64", [1, 2], [1]), "has 1 values"),
        (Input("tokens", "INT64", [1, 2], [[1], [2, 3]]), "unequal lengths"),
        (Input("tokens", "INT64", [1, 2], [1, float("nan")]), "values that are not INT64"),
        (Input("tokens", "INT64", [1, 2], [1, 2.0]), "values that are not INT64"),
        (Input("tokens", "INT64", [1, 2], [True, False]), "values that are not INT64"),
        (Input("tokens", "INT64", [1, 2], ["1", "2"]), "values that are not INT64"),
        (Input("tokens", "INT64", [1, 2], [1, 1 << 70]), "values that are not INT64"),
        (Input("tokens", "INT64", [1, 2], [1, (1 << 63) + 5]), "values"),
        (Input("tokens", "INT64", [0, 2], []), "at least one element"),
        (Input("tokens", "INT64", [-1, -2], [1, 2]), "at least one element"),
        (Input("tokens", "INT64", [1, 2], b"\0" * 15), "has 15 bytes"),
        (Input("tokens", "INT64", [1, 1 << 27], b"\0" * 16), "has 16 bytes"),
    ],
    ids=str,
)
def test_bad_inputs(given: Input, reason: str) -> None:
    with pytest.raises(BadInput, match="input 'tokens'") as error:
        decode(TOKENS, given)
    assert reason in str(error.value)


def test_integers_that_do_not_fit() -> None:
    tensor = Tensor("x", "int8", (1,))
    assert decode(tensor, Input("x", "INT8", [1], [-128])) == -128
    with pytest.raises(BadInput, match="beyond INT8"):
        decode(tensor, Input("x", "INT8", [1], [128]))


def test_parse() -> None:
    body = b"""{"inputs": [{"name": "x", "datatype": "INT64", "shape": [1], "data": [1]}],
               "outputs": [{"name": "y"}]}"""
    assert parse(body) == ([Input("x", "INT64", [1], [1])], ["y"])


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{}",
        b"\xff",
        b'{"inputs": 3}',
        b'{"inputs": [3]}',
        b'{"inputs": [{"name": "x", "datatype": "INT64", "shape": 3, "data": []}]}',
        b'{"inputs": [{"name": "x", "datatype": "INT64", "shape": [1.5], "data": []}]}',
        b'{"inputs": [{"name": "x", "datatype": "INT64", "shape": [true], "data": []}]}',
        b'{"inputs": [{"name": "x", "datatype": "INT64", "shape": [1]}]}',
        b"[" * 100_000,
    ],
)
def test_what_is_no_request(body: bytes) -> None:
    with pytest.raises(BadInput, match="not an inference request"):
        parse(body)


def test_an_output_as_json() -> None:
    output = Output("y", "FP32", np.array([[1.5, 2]], np.float32))
    expected = {"name": "y", "datatype": "FP32", "shape": [1, 2], "data": [1.5, 2.0]}
    assert output.as_dict() == expected
