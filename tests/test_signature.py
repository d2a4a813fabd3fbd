from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusenorm.errors import BadInput
from fusenorm.signature import Signature, Tensor, resolve
from fusenorm.testing import random_inputs, sizes


@pytest.fixture
def signature(fused) -> Signature:
    return Signature.of_model(ir.load(fused))


def test_of_model(signature) -> None:
    assert [f"{tensor.name}: {tensor}" for tensor in signature.inputs] == [
        "ids: int32[batch, seq]",
        "offset: float32[batch, seq, 8]",
    ]
    assert signature.symbols == ("batch", "seq")


def test_indices_of_a_table_are_limited_through_a_cast(signature) -> None:
    assert [tensor.limit for tensor in signature.inputs] == [11, None]


def test_round_trip(signature) -> None:
    assert Signature.from_dict(signature.as_dict()) == signature


def test_accepts_what_fits(signature, feed) -> None:
    signature.check(feed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": np.zeros(1)}, "input 'extra' is none of the model's: ids, offset"),
        ({"ids": None}, r"input 'ids' is missing: give int32\[batch, seq\]"),
        (
            {"ids": np.zeros((2, 3), np.int64)},
            r"'ids' is int64\[2, 3\]: the model takes int32\[batch, seq\]",
        ),
        (
            {"ids": np.zeros(3, np.int32)},
            r"'ids' is int32\[3\]: the model takes int32\[batch, seq\]",
        ),
        (
            {"offset": np.zeros((2, 3, 7), np.float32)},
            r"'offset' is float32\[2, 3, 7\]: the model takes float32\[batch, seq, 8\]",
        ),
        (
            {"offset": np.zeros((2, 4, 8), np.float32)},
            r"'offset' is float32\[2, 4, 8\]: .*, and seq is 3 in 'ids'",
        ),
    ],
)
def test_refuses_what_does_not(signature, feed, change, message) -> None:
    changed = {name: array for name, array in {**feed, **change}.items() if array is not None}
    with pytest.raises(BadInput, match=f"m.onnx: .*{message}"):
        signature.check(changed, "m.onnx")


def test_expressions_of_symbols() -> None:
    tensor = Tensor("mask", "int64", ("batch", "past + seq"))
    assert tuple(tensor.symbols) == ("batch", "past", "seq")
    assert resolve(tensor.shape, {"batch": 2, "past": 3, "seq": 4}) == (2, 7)
    with pytest.raises(BadInput, match="no size for axis 'n'"):
        resolve(("n",), {})
    with pytest.raises(BadInput, match="no size for axis 'a b'"):
        resolve(("a b",), {})


@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 100))
def test_random_inputs_fit_their_signature(batch: int, seq: int, seed: int) -> None:
    signature = Signature(
        (
            Tensor("ids", "int64", ("batch", "seq"), 5),
            Tensor("attention_mask", "int64", ("batch", "seq")),
            Tensor("position_ids", "int64", ("batch", "seq")),
            Tensor("flag", "bool", ("batch",)),
            Tensor("use_cache", "bool", ()),
            Tensor("x", "bfloat16", ("batch", None, 4)),
        ),
        (),
    )
    dims = sizes(signature, {"batch": batch, "seq": seq})
    feed = random_inputs(signature, dims, seed)
    signature.check(feed)
    assert all(isinstance(array, np.ndarray) for array in feed.values())
    assert feed["ids"].min() >= 0
    assert feed["ids"].max() < 5
    assert (feed["attention_mask"] == 1).all()
    assert (feed["position_ids"] == np.arange(seq)).all()
    again = random_inputs(signature, dims, seed)
    assert all(np.array_equal(feed[name], again[name]) for name in feed)


def test_sizes_names_unknown_axes(signature) -> None:
    assert sizes(signature) == {"batch": 2, "seq": 8}
    with pytest.raises(BadInput, match="no symbolic axis 'n': the model's are batch, seq"):
        sizes(signature, {"n": 1})
