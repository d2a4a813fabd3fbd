"""CPU kernels: for every fused op the TIR functions of one CPU level, and their compilation."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

# tvm_ffi would import torch, which it does not need here.
os.environ.setdefault("TVM_FFI_DISABLE_TORCH_C_DLPACK", "1")

import tvm

from fusenorm.kernels import attention, linear, rows
from fusenorm.kernels.program import supports
from fusenorm.ops import Attention, Linear, OpSpec

Level = Literal["x86-64-v2", "x86-64-v3", "x86-64-v4", "aarch64"]

_LANES: dict[Level, int] = {"x86-64-v4": 16, "x86-64-v3": 8, "x86-64-v2": 4, "aarch64": 4}


def cpu(spec: OpSpec, level: Level) -> list[Any]:
    """The PrimFuncs of `spec`, in the order of `symbols`; their arguments as its module says.

    Raises:
        NotImplementedError: the op has no kernel; `supports` says why.
    """
    reason = supports(spec)
    if reason:
        raise NotImplementedError(reason)
    if isinstance(spec, Linear):
        return linear.functions(spec, _LANES[level])
    if isinstance(spec, Attention):
        return attention.functions(spec, _LANES[level])
    return rows.functions(spec, _LANES[level])


def compile_functions(functions: Mapping[str, Any], target: Mapping[str, object]) -> Any:
    """A TVM module of PrimFuncs by symbol, free of calls into TVM's runtime."""
    config = {"tirx.disable_assert": True, "tirx.disable_storage_rewrite": True}
    with tvm.transform.PassContext(config=config):
        return tvm.tirx.build(tvm.IRModule(dict(functions)), target=tvm.target.Target(dict(target)))
