"""Kernels of the fused ops. Importing this package does not import TVM; `kernels.cpu` does."""

from __future__ import annotations

from fusenorm.kernels.program import RowProgram, row_program, supports, symbols

__all__ = ["RowProgram", "row_program", "supports", "symbols"]
