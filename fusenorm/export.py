"""A torch module as an ONNX graph, for callers that start from PyTorch."""

from __future__ import annotations

import warnings
from typing import Any

import onnx_ir as ir

from fusenorm.errors import BadInput


def export_module(module: Any, args: tuple[Any, ...], dynamic_shapes: Any = None) -> ir.Model:
    """Export with torch's own exporter.

    Args:
        module: a torch.nn.Module.
        args: example inputs.
        dynamic_shapes: which dimensions vary, as torch.export takes it; None fixes all.

    Raises:
        BadInput: torch is missing or cannot export the module.
    """
    try:
        import torch
    except ImportError as error:
        raise BadInput("optimizing a torch module needs torch: install fusenorm[torch]") from error
    if not isinstance(module, torch.nn.Module):
        raise BadInput(f"cannot optimize a {type(module).__name__}: give a path, model or module")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter warns about itself
            program = torch.onnx.export(
                module.eval(), args, dynamo=True, dynamic_shapes=dynamic_shapes, verbose=False
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise BadInput(f"torch cannot export {type(module).__name__}: {error}") from error
    assert program is not None
    return program.model
