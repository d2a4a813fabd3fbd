"""Standard ops as runtimes compute them in 16 bits: inside in f32 or better, rounded once.

The reference evaluator rounds every step inside these ops to the storage type, so its answer
would be further from the op's definition than any runtime's.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from onnx.reference.op_run import OpRun

from fusenorm.ops.activation import ACTIVATIONS


def _normalise(
    x: np.ndarray,
    scale: np.ndarray,
    bias: np.ndarray | None,
    axis: int,
    epsilon: float,
    *,
    subtract_mean: bool,
) -> np.ndarray:
    axes = tuple(range(axis % x.ndim, x.ndim))
    wide = x.astype(np.float32)
    if subtract_mean:
        wide = wide - wide.mean(axes, keepdims=True)
    wide = wide / np.sqrt(np.square(wide).mean(axes, keepdims=True) + np.float32(epsilon))
    wide = wide * scale.astype(np.float32)
    if bias is not None:
        wide = wide + bias.astype(np.float32)
    return wide.astype(x.dtype)


class LayerNormalization(OpRun):
    op_domain = ""

    def _run(self, x, scale, bias=None, *, axis, epsilon, stash_type):  # type: ignore[no-untyped-def]
        return (_normalise(x, scale, bias, axis, epsilon, subtract_mean=True),)


class RMSNormalization(OpRun):
    op_domain = ""

    def _run(self, x, scale, axis, epsilon, stash_type):  # type: ignore[no-untyped-def]
        return (_normalise(x, scale, None, axis, epsilon, subtract_mean=False),)


class Gelu(OpRun):
    op_domain = ""

    def _run(self, x, approximate):  # type: ignore[no-untyped-def]
        row = ACTIVATIONS["gelu_tanh" if approximate == "tanh" else "gelu"]
        return (row.numpy(x.astype(np.float64)).astype(x.dtype),)


class Sigmoid(OpRun):
    op_domain = ""

    def _run(self, x):  # type: ignore[no-untyped-def]
        sigmoid: Callable[[np.ndarray], np.ndarray] = ACTIVATIONS["sigmoid"].numpy
        return (sigmoid(x.astype(np.float64)).astype(x.dtype),)


class Swish(OpRun):
    op_domain = ""

    def _run(self, x, alpha):  # type: ignore[no-untyped-def]
        swish = ACTIVATIONS["swish"].numpy
        return (swish(x.astype(np.float64), beta=alpha).astype(x.dtype),)


class SwiGLU(OpRun):
    op_domain = ""

    def _run(self, a, b, alpha):  # type: ignore[no-untyped-def]
        swish = ACTIVATIONS["swish"].numpy
        return (swish(a.astype(np.float64), beta=alpha).astype(a.dtype) * b,)


ROUND_ONCE: list[type[OpRun]] = [
    LayerNormalization,
    RMSNormalization,
    Gelu,
    Sigmoid,
    Swish,
    SwiGLU,
]
