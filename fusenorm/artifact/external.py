"""Where an ONNX model keeps weights outside its file, read from the protobuf's wire format.

A server has onnxruntime, not the onnx package, and onnxruntime opens what a model names. Only the
messages a tensor can be in are walked, as tables of field number to message.
"""

from __future__ import annotations

from collections.abc import Iterator

_LOCATION = b"location"
# onnx.proto3: which fields of a message hold messages that matter, and which.
_FIELDS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
_KEY, _VALUE = 1, 2  # of an entry


def external_locations(model: bytes) -> set[str]:
    """The files a serialized ModelProto keeps tensors in, as it names them.

    Raises:
        ValueError: the bytes are no protobuf message.
    """
    found: set[str] = set()
    if _LOCATION not in model:
        return found
    waiting: list[tuple[str, memoryview]] = [("model", memoryview(model))]
    while waiting:
        kind, message = waiting.pop()
        inner = _FIELDS.get(kind)
        if inner is None:
            found |= _location(message)
            continue
        waiting += [(inner[n], part) for n, part in _fields(message) if n in inner]
    return found


def _location(entry: memoryview) -> set[str]:
    """What an external_data entry gives as location; a repeated field counts each time."""
    fields = list(_fields(entry))
    if not any(number == _KEY and part == _LOCATION for number, part in fields):
        return set()
    return {bytes(part).decode(errors="replace") for number, part in fields if number == _VALUE}


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and content of the fields that have a length."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        match tag & 7:
            case 0:
                _, at = _varint(message, at)
            case 1:
                at += 8
            case 5:
                at += 4
            case 2:
                size, at = _varint(message, at)
                yield tag >> 3, message[at : at + size]
                at += size
            case other:
                raise ValueError(f"wire type {other}")
    if at != len(message):
        raise ValueError("cut short")


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """A number and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            raise ValueError("cut short")
        byte = message[at]
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value, at
    raise ValueError("a number of more than ten bytes")
