"""CPU kernels: for every fused op the TIR functions of one CPU level, and their compilation."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

# tvm_ffi would import torch, which it does not need here.
os.environ.setdefault("TVM_FFI_DISABLE_TORCH_C_DLPACK", "1")

import tvm

from fusenorm.kernels import attention, linear, rows
from fusenorm.kernels.program import supports
from fusenorm.kernels.registers import LANES, Level
from fusenorm.ops import Attention, Linear, OpSpec


def cpu(spec: OpSpec, level: Level) -> list[Any]:
    """The PrimFuncs of `spec`, in the order of `symbols`; their arguments as its module says.

    Raises:
        NotImplementedError: the op has no kernel; `supports` says why.
    """
    reason = supports(spec)
    if reason:
        raise NotImplementedError(reason)
    if isinstance(spec, Linear):
        return linear.functions(spec, LANES[level])
    if isinstance(spec, Attention):
        return attention.functions(spec, LANES[level])
    return rows.functions(spec, LANES[level])


def compile_functions(functions: Mapping[str, Any], target: Mapping[str, object]) -> Any:
    """A TVM module of PrimFuncs by symbol, free of calls into TVM's runtime."""
    config = {"tirx.disable_assert": True, "tirx.disable_storage_rewrite": True}
    # Buffers are as large as they need to be: shrinking them takes most of the time there is.
    disabled = ["s_tir.CompactBufferAllocation"]
    with tvm.transform.PassContext(config=config, disabled_pass=disabled):
        return tvm.tirx.build(tvm.IRModule(dict(functions)), target=tvm.target.Target(dict(target)))
