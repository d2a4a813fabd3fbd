"""Torch calls that mean a given fused op."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from fusenorm.ops import DTYPES, Gated, Norm, OpSpec
from fusenorm.torch import ops
from tests.kernels.cases import attributes

# One op of each torch op, in every type, with what else it can have.
SPECS = (
    Norm(),
    Norm(dtype="bf16", scale="bf16", affine="storage"),
    Norm(centred=True, dtype="f16", scale="f32", bias="f32"),
    Norm(skip=True, dtype="f16", scale="f16"),
    Norm(skip=True, dtype="bf16", scale="f32", alpha=True, beta=True, layer_scale=True),
    Norm(centred=True, skip=True, bias="f32"),
    Gated("gelu", dtype="f16"),
    Gated("gelu_tanh"),
    Gated("swish", dtype="bf16", precision="storage"),
    Gated("relu2"),
    Gated("swish", "pair", "bf16"),
    Gated("swish", "interleaved", clamp="gate", plus1=True),
    Gated("gelu", "up_gate", "f16"),
)


def torch_call(
    spec: OpSpec, tensors: Mapping[str, torch.Tensor]
) -> tuple[torch._ops.OpOverload, dict[str, Any]]:
    """The torch op and all its arguments, by name."""
    given: dict[str, Any] = {**tensors, **attributes(spec)}
    if isinstance(spec, Norm):
        given["weight"] = given.pop("scale", None)
        given["eps"] = given.pop("epsilon")
        given["bias"] = given.get("bias")
        given["affine"] = spec.affine
        given |= {"residual": spec.residual} if spec.skip else {}
        given |= {"centre": spec.centre} if spec.centred else {}
        name = f"{'skip_' if spec.skip else ''}{'layer' if spec.centred else 'rms'}_norm"
        return getattr(ops, name), given
    assert isinstance(spec, Gated)
    given["precision"] = spec.precision
    if spec.layout == "none":
        return getattr(ops, spec.activation), given
    given |= {"activation": spec.activation, "clamp": spec.clamp, "plus1": spec.plus1}
    if spec.layout == "pair":
        return ops.glu, given
    return ops.glu_packed, {**given, "layout": spec.layout}


def tensor(array: np.ndarray) -> torch.Tensor:
    """The same memory in torch."""
    if array.dtype == DTYPES["bf16"].numpy:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def array(made: torch.Tensor) -> np.ndarray:
    """The same memory in numpy."""
    made = made.detach().cpu()
    if made.dtype == torch.bfloat16:
        return made.view(torch.uint16).numpy().view(DTYPES["bf16"].numpy)
    return made.numpy()


def as_tuple(made: Any) -> tuple[torch.Tensor, ...]:
    return made if isinstance(made, tuple) else (made,)
