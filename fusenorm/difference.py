"""How far one array is from another that it should equal."""

from __future__ import annotations

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far one output of B is from A's.

    Attributes:
        name: the output.
        dtype: its type.
        shape: its shape in the first run.
        max_abs: largest absolute difference.
        max_relative: the same relative to A's largest value.
        max_ulps: largest difference in units in the last place, only for 16-bit types.
        tolerance: the bound on `max_relative`.
        reason: why it does not agree, None if it does.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    max_abs: float
    max_relative: float
    max_ulps: int | None
    tolerance: float
    reason: str | None

    @property
    def ok(self) -> bool:
        return self.reason is None


def difference(name: str, a: np.ndarray, b: np.ndarray, tolerance: float) -> Difference:
    """Compare one output, A being the reference."""

    def result(
        reason: str | None, absolute: float = 0.0, relative: float = 0.0, ulps: int | None = None
    ) -> Difference:
        shape = tuple(a.shape)
        return Difference(name, str(a.dtype), shape, absolute, relative, ulps, tolerance, reason)

    if a.dtype != b.dtype or a.shape != b.shape:
        return result(f"{b.dtype}{list(b.shape)} instead of {a.dtype}{list(a.shape)}", math.inf)
    if not is_float(a.dtype):
        unequal = int(np.count_nonzero(a != b))
        return result(f"{unequal} of {a.size} values differ" if unequal else None, float(unequal))
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    if not np.array_equal(np.isnan(wide_a), np.isnan(wide_b)):
        return result("NaN at different places", math.inf, math.inf)
    infinite = np.isinf(wide_a) | np.isinf(wide_b)
    if not np.array_equal(wide_a[infinite], wide_b[infinite]):
        return result("infinities at different places", math.inf, math.inf)
    finite = np.isfinite(wide_a)
    wide_a, wide_b = wide_a[finite], wide_b[finite]
    absolute = float(np.max(np.abs(wide_a - wide_b), initial=0.0))
    scale = float(np.max(np.abs(wide_a), initial=0.0))
    relative = absolute / scale if scale else (math.inf if absolute else 0.0)
    ulps = _ulps(a[finite], b[finite]) if a.dtype.itemsize == 2 else None
    if relative <= tolerance:
        return result(None, absolute, relative, ulps)
    return result(f"{relative:.3g} of the largest value", absolute, relative, ulps)


def is_float(dtype: np.dtype) -> bool:
    return dtype.kind == "f" or dtype.name == "bfloat16"


def _ulps(a: np.ndarray, b: np.ndarray) -> int:
    """Largest distance in representable 16-bit numbers."""

    def ordinal(values: np.ndarray) -> np.ndarray:
        bits = values.view(np.int16).astype(np.int32)
        return np.where(bits < 0, -(bits & 0x7FFF), bits)

    return int(np.max(np.abs(ordinal(a) - ordinal(b)), initial=0))
