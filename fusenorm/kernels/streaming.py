"""Stores past the caches: tensors too large for them are written without being read first.

TIR has no such store, so kernels that use it bring the LLVM functions with them. It is a wish: LLVM
stores 16-bit numbers as usual where it narrows them in the store itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import tvm.script.ir_builder.tirx as T

from fusenorm.kernels.mathfn import Expr, Lanes
from fusenorm.ops import DTYPES, DType

_LLVM: dict[DType, str] = {"f16": "half", "bf16": "i16", "f32": "float"}
_LINE = 64
_ADDRESS, _FENCE = "fusenorm_address", "fusenorm_fence"


@contextmanager
def available(lanes: Lanes, dtypes: Iterable[DType]) -> Iterator[None]:
    """A scope in which the functions below work for vectors of these types."""
    text = f"""
define linkonce_odr i64 @{_ADDRESS}(ptr %at) alwaysinline {{
  %number = ptrtoint ptr %at to i64
  ret i64 %number
}}
define linkonce_odr void @{_FENCE}() alwaysinline {{
  fence seq_cst
  ret void
}}
!0 = !{{i32 1}}
"""
    for dtype in sorted(set(dtypes)):
        vector = f"<{lanes.count} x {_LLVM[dtype]}>"
        text += f"""
define linkonce_odr void @{_name(lanes, dtype)}(ptr %at, {vector} %value) alwaysinline {{
  store {vector} %value, ptr %at, align {alignment(lanes, dtype)}, !nontemporal !0
  ret void
}}
"""
    with T.attr(T.int32(0), "pragma_import_llvm", text):
        yield


def alignment(lanes: Lanes, dtype: DType) -> int:
    """Bytes: the size of a vector, or of a cache line."""
    return min(_LINE, lanes.count * DTYPES[dtype].numpy.itemsize)


def aligned(lanes: Lanes, dtype: DType, element: Expr) -> Expr:
    """Whether a vector may be stored here."""
    return _address(element) % T.int64(alignment(lanes, dtype)) == T.int64(0)


def apart(element: Expr, other: Expr) -> Expr:
    """Whether these lie apart: what was just read had better stay in the caches."""
    return _address(element) != _address(other)


def _address(element: Expr) -> Expr:
    return T.call_extern("int64", _ADDRESS, T.address_of(element))


def store(lanes: Lanes, dtype: DType, element: Expr, value: Expr) -> None:
    """Store a vector from this element on, which must be `aligned`."""
    T.evaluate(T.call_extern("void", _name(lanes, dtype), T.address_of(element), value))


def finish() -> None:
    """Other threads see what was stored so from here on."""
    T.evaluate(T.call_extern("void", _FENCE))


def _name(lanes: Lanes, dtype: DType) -> str:
    return f"fusenorm_stream_{lanes.count}x{_LLVM[dtype]}"
