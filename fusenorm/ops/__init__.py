"""The fused ops: each family declared once, as an ONNX function body.

A declaration gives the schema, the portable fallback and the kernel's program; an independent
numpy reference beside it checks the body. `parse` turns an op_type back into its declaration.
"""

from __future__ import annotations

from fusenorm.ops.activation import ACTIVATIONS, Activation, Gated
from fusenorm.ops.norm import Norm
from fusenorm.ops.spec import DOMAIN, DTYPES, DType, OpSpec, Slot

__all__ = [
    "ACTIVATIONS",
    "DOMAIN",
    "DTYPES",
    "FAMILIES",
    "Activation",
    "DType",
    "Gated",
    "Norm",
    "OpSpec",
    "Slot",
    "parse",
]

FAMILIES: tuple[type[OpSpec], ...] = (Norm, Gated)


def parse(op_type: str) -> OpSpec | None:
    """The declaration a fused node's op_type names, or None if no family knows it."""
    for family in FAMILIES:
        spec = family.parse(op_type)
        if spec is not None:
            return spec
    return None
