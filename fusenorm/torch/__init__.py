"""The fused ops on torch tensors, and `replace`, which gives them to a model's modules.

>>> import torch, fusenorm.torch  # doctest: +SKIP
>>> y, s = fusenorm.torch.skip_rms_norm(x, skip, weight, 1e-5)  # doctest: +SKIP
>>> print(fusenorm.torch.replace(model))  # doctest: +SKIP

The ops are torch.ops.fusenorm.*: torch.compile and torch.export trace through them, autograd
differentiates them, and they run on the CPU and on CUDA's current stream. Their kernels come from
`use(artifact)`, else from this machine's cache, else they are built once (see
`fusenorm.torch.kernels`); an op without a kernel runs node by node in torch, says so in a
RuntimeWarning, and is listed by `fallbacks()`.
"""

from __future__ import annotations

from fusenorm.torch.kernels import fallbacks, use
from fusenorm.torch.ops import (
    gelu,
    gelu_tanh,
    glu,
    glu_packed,
    layer_norm,
    relu2,
    rms_norm,
    skip_layer_norm,
    skip_rms_norm,
    swish,
)
from fusenorm.torch.reference import reference
from fusenorm.torch.replace import replace

__all__ = [
    "fallbacks",
    "gelu",
    "gelu_tanh",
    "glu",
    "glu_packed",
    "layer_norm",
    "reference",
    "relu2",
    "replace",
    "rms_norm",
    "skip_layer_norm",
    "skip_rms_norm",
    "swish",
    "use",
]
