"""The polynomials against float64, over dense samples of where they are used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fusenorm.lower import Target

pytestmark = pytest.mark.kernel

# name: (from, to, ulps, the function in float64)
FUNCTIONS: dict[str, tuple[float, float, float, Callable[[np.ndarray], np.ndarray]]] = {
    "exp": (-87.3, 88.37, 2, np.exp),
    "sigmoid": (-87.3, 60, 3, lambda x: 1 / (1 + np.exp(-x))),
    "tanh": (-12, 12, 6, np.tanh),
    "erf": (-6, 6, 2, lambda x: torch.erf(torch.from_numpy(x)).numpy()),
}


@pytest.fixture(scope="module")
def module() -> Any:
    import tvm.script.ir_builder.tirx as T  # noqa: N812
    from tvm.script.ir_builder import IRBuilder

    from fusenorm.kernels import cpu, mathfn

    lanes = mathfn.Lanes(4)

    def function(name: str) -> Any:
        with IRBuilder() as builder, T.prim_func(s_tir=True):
            T.func_name(name)
            T.func_attr({"global_symbol": name, "tirx.noalias": True})
            handles = T.arg("x", T.handle()), T.arg("y", T.handle())
            count = T.int64()
            x, y = (T.match_buffer(handle, (count,), "float32", align=4) for handle in handles)
            with T.serial(count // 4) as k:
                at = T.ramp(k * 4, 1, 4)
                T.buffer_store(y, getattr(mathfn, name)(lanes, lanes.let(x[at])), [at])
        return builder.get()

    return cpu.compile_functions({name: function(name) for name in FUNCTIONS}, Target.host().tvm)


def apply(module: Any, name: str, x: np.ndarray) -> np.ndarray:
    y = np.empty_like(x)
    module[name](x, y)
    return y


@pytest.mark.parametrize("name", FUNCTIONS)
def test_error_is_as_stated(module: Any, name: str) -> None:
    low, high, ulps, exact = FUNCTIONS[name]
    small = np.geomspace(1e-30, min(-low, high), 1 << 16)
    samples = np.concatenate([np.linspace(low, high, 1 << 21), small, -small])
    x = samples.astype(np.float32)
    reference = exact(x.astype(np.float64))
    unit = np.spacing(np.abs(reference).astype(np.float32)).astype(np.float64)
    error = np.abs(apply(module, name, x) - reference) / unit
    assert error.max() <= ulps


@pytest.mark.parametrize("name", FUNCTIONS)
def test_nan_infinities_and_zero(module: Any, name: str) -> None:
    x = np.array([np.nan, np.inf, -np.inf, 0, 200, -200, 3e38, -3e38], np.float32)
    got = apply(module, name, x)
    assert np.isnan(got[0])
    top, bottom, zero = {
        "exp": (np.inf, 0, 1),
        "sigmoid": (1, 0, 0.5),
        "tanh": (1, -1, 0),
        "erf": (1, -1, 0),
    }[name]
    expected = np.array([top, bottom, zero, top, bottom, top, bottom])
    assert np.allclose(got[1:], expected, rtol=0, atol=1.2e-38)


def test_bounded_functions_stay_in_bounds(module: Any) -> None:
    x = np.linspace(-100, 100, 1 << 20).astype(np.float32)
    for name in ("tanh", "erf", "sigmoid"):
        assert np.abs(apply(module, name, x)).max() <= 1
