"""Kernels of the fused ops. Importing this package does not import TVM; its `cpu`, `cuda` do."""

from __future__ import annotations

from fusenorm.kernels.program import Device, RowProgram, row_program, supports, symbols

__all__ = ["Device", "RowProgram", "row_program", "supports", "symbols"]
