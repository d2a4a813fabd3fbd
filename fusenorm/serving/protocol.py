"""A signature as inference servers write it down: names, datatypes, dims, the batch axis.

The Open Inference Protocol (v2) is what Triton, MLServer and KServe speak; every adapter takes
its words from here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fusenorm.errors import BadInput
from fusenorm.signature import Dim, Signature, Tensor

DATATYPES = {
    "bool": "BOOL",
    "int8": "INT8",
    "int16": "INT16",
    "int32": "INT32",
    "int64": "INT64",
    "uint8": "UINT8",
    "uint16": "UINT16",
    "uint32": "UINT32",
    "uint64": "UINT64",
    "float16": "FP16",
    "bfloat16": "BF16",
    "float32": "FP32",
    "float64": "FP64",
}
# Kinds of numpy arrays a list of JSON values may become, per kind of the tensor wanted.
_FROM_JSON = {"b": "b", "i": "iu", "u": "iu", "f": "iuf", "V": "iuf"}


class Input(NamedTuple):
    """One input as a request gives it: raw little-endian bytes, or the values as nested lists."""

    name: str
    datatype: str
    shape: Sequence[int]
    data: Any


class Output(NamedTuple):
    """One output of a response."""

    name: str
    datatype: str
    array: np.ndarray

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "name": self.name,
            "datatype": self.datatype,
            "shape": list(self.array.shape),
            "data": self.array.ravel().tolist(),
        }


def datatype(tensor: Tensor) -> str:
    """The protocol's name for a tensor's element type.

    Raises:
        BadInput: the protocol has none (strings, sequences, 8-bit floats).
    """
    if tensor.dtype not in DATATYPES:
        kind = tensor.dtype or "no tensor"
        raise BadInput(f"'{tensor.name}' is {kind}: it cannot be served, only numbers can")
    return DATATYPES[tensor.dtype]


def dims(tensor: Tensor) -> list[int]:
    """A tensor's shape with -1 for sizes that are free.

    Raises:
        BadInput: its rank is not known.
    """
    if tensor.shape is None:
        raise BadInput(f"'{tensor.name}' has no known rank: it cannot be served")
    return [dim if isinstance(dim, int) else -1 for dim in tensor.shape]


def metadata(tensors: Sequence[Tensor]) -> list[dict[str, Any]]:
    """Tensors as the protocol's model metadata lists them."""
    return [
        {"name": tensor.name, "datatype": datatype(tensor), "shape": dims(tensor)}
        for tensor in tensors
    ]


def batch_symbol(signature: Signature) -> str | None:
    """The symbolic size that is the first axis of every input and output and no other axis.

    Whether rows along it are independent only a run can tell: `Served.batches`.
    """
    tensors = (*signature.inputs, *signature.outputs)
    first = {tensor.shape[0] if tensor.shape else None for tensor in tensors}
    if len(first) != 1:
        return None
    (symbol,) = first
    rest: list[Dim] = [dim for tensor in tensors for dim in (tensor.shape or ())[1:]]
    named = Tensor("", "", tuple(rest)).symbols
    return symbol if isinstance(symbol, str) and symbol not in set(named) else None


def parse(body: bytes) -> tuple[list[Input], list[str]]:
    """The JSON body of an inference request: its inputs, and the names of the outputs wanted.

    Raises:
        BadInput: it is no such request.
    """
    try:
        request = json.loads(body)
        inputs = [
            Input(str(each["name"]), str(each["datatype"]), _sizes(each["shape"]), each["data"])
            for each in request["inputs"]
        ]
        return inputs, [str(each["name"]) for each in request.get("outputs") or ()]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise BadInput(f"not an inference request ({type(error).__name__}: {error})") from error


def _sizes(shape: Any) -> list[int]:
    if not isinstance(shape, list) or not all(type(size) is int for size in shape):
        raise TypeError("shape is no list of integers")
    return shape


def decode(tensor: Tensor, given: Input) -> np.ndarray:
    """One input of a request as an array.

    Args:
        tensor: what the model takes; the shape is not compared with it here.
        given: what the request holds.

    Returns:
        The array; over the same memory if the data are bytes.

    Raises:
        BadInput: another datatype, a wrong length, no element at all, or a value that is none of
            the datatype's.
    """
    what = f"input '{tensor.name}'"
    wanted = datatype(tensor)
    shape, data = given.shape, given.data
    if given.datatype != wanted:
        raise BadInput(f"{what} is {given.datatype}: the model takes {wanted}")
    count = math.prod(shape)
    if count <= 0 or min(shape, default=1) < 0:
        raise BadInput(f"{what} is {list(shape)}: it must hold at least one element")
    if isinstance(data, bytes | bytearray | memoryview):
        if len(data) != count * tensor.numpy.itemsize:
            raise BadInput(f"{what} has {len(data)} bytes: {wanted}{list(shape)} is another size")
        return np.frombuffer(data, tensor.numpy).reshape(shape)
    try:
        values = np.asarray(data)
    except ValueError as error:
        raise BadInput(f"{what} holds lists of unequal lengths") from error
    if values.size != count:
        raise BadInput(f"{what} has {values.size} values: {list(shape)} is {count}")
    if values.dtype.kind not in _FROM_JSON[tensor.numpy.kind]:
        raise BadInput(f"{what} holds values that are not {wanted}")
    with np.errstate(over="ignore"):
        array = values.astype(tensor.numpy).reshape(shape)
    if tensor.numpy.kind in "iu" and (array.reshape(values.shape) != values).any():
        raise BadInput(f"{what} holds values beyond {wanted}")
    return array
