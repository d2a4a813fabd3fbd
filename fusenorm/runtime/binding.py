"""Inputs and outputs in memory of the caller's: what onnxruntime is given, seen as the signature.

>>> binding = session.io_binding()  # doctest: +SKIP
>>> binding.bind_ortvalue_input("x", OrtValue.from_dlpack(tensor))  # doctest: +SKIP
>>> binding.bind_output("y", "cpu", 0, np.float32, y.shape, y.ctypes.data)  # doctest: +SKIP
>>> session.run_with_iobinding(binding)  # y holds the output  # doctest: +SKIP
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort

from fusenorm.errors import BadInput

_ORT_TYPES = {"float": "float32", "double": "float64"}
# onnx.TensorProto.DataType
_ONNX_TYPES = (
    *("", "float32", "uint8", "int8", "uint16", "int16", "int32", "int64", "string", "bool"),
    *("float16", "float64", "uint32", "uint64", "complex64", "complex128", "bfloat16"),
)


@dataclasses.dataclass(frozen=True)
class View:
    """Type and shape of an input that is no array."""

    dtype: str
    shape: tuple[int, ...]


class Binding(ort.IOBinding):  # type: ignore[misc]
    """An onnxruntime.IOBinding that knows what was bound as inputs.

    Attributes:
        given: type and shape by input.
    """

    def __init__(self, session: ort.InferenceSession) -> None:
        super().__init__(session)
        self.given: dict[str, Any] = {}

    def bind_cpu_input(self, name: str, arr_on_cpu: Any) -> None:
        super().bind_cpu_input(name, arr_on_cpu)
        self.given[name] = arr_on_cpu

    def bind_input(
        self,
        name: str,
        device_type: str,
        device_id: int,
        element_type: Any,
        shape: Sequence[int],
        buffer_ptr: int,
    ) -> None:
        super().bind_input(name, device_type, device_id, element_type, shape, buffer_ptr)
        known = isinstance(element_type, int)
        dtype = _ONNX_TYPES[element_type] if known else np.dtype(element_type).name
        self.given[name] = View(dtype, tuple(shape))

    def bind_ortvalue_input(self, name: str, ortvalue: ort.OrtValue) -> None:
        super().bind_ortvalue_input(name, ortvalue)
        self.given[name] = viewed(ortvalue)

    def clear_binding_inputs(self) -> None:
        super().clear_binding_inputs()
        self.given.clear()


def imported(name: str, value: Any, source: object) -> Any:
    """An input as onnxruntime takes it: DLPack tensors become OrtValues over the same memory.

    Raises:
        BadInput: a tensor onnxruntime cannot share.
    """
    if isinstance(value, np.ndarray | ort.OrtValue | View) or not hasattr(value, "__dlpack__"):
        return value
    share = getattr(ort.OrtValue, "from_dlpack", np.from_dlpack)  # older ones lack it
    try:
        return share(value)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise BadInput(f"input '{name}' cannot be shared: {error}", file=source) from error


def viewed(value: Any) -> Any:
    """What has the type and shape of an input."""
    if isinstance(value, ort.OrtValue) and value.is_tensor():
        return View(dtype_of(value.data_type()), tuple(value.shape()))
    return value


def dtype_of(text: str) -> str:
    """Numpy's name for the element type in onnxruntime's `tensor(float)`; '' for no tensor."""
    kind, _, rest = text.partition("(")
    name = rest.removesuffix(")")
    return _ORT_TYPES.get(name, name) if kind == "tensor" else ""
