"""The fused ops: each family declared once, as an ONNX function body.

A declaration gives the schema, the portable fallback and the kernel's program; an independent
numpy reference beside it checks the body. `parse` turns an op_type back into its declaration.
"""

from __future__ import annotations

from fusenorm.ops.activation import ACTIVATIONS, Activation, Gated
from fusenorm.ops.attention import Attention
from fusenorm.ops.linear import Linear
from fusenorm.ops.norm import Norm
from fusenorm.ops.spec import DOMAIN, DTYPES, DType, OpSpec, Slot

__all__ = [
    "ACTIVATIONS",
    "DOMAIN",
    "DTYPES",
    "FAMILIES",
    "REGIONS",
    "Activation",
    "Attention",
    "DType",
    "Gated",
    "Linear",
    "Norm",
    "OpSpec",
    "Slot",
    "parse",
]

FAMILIES: tuple[type[OpSpec], ...] = (Norm, Gated)
"""Ops over rows: what optimize finds in a graph."""
REGIONS: tuple[type[OpSpec], ...] = (Linear, Attention)
"""Ops with contractions: what compile makes of the graph around them."""


def parse(op_type: str) -> OpSpec | None:
    """The declaration a fused node's op_type names, or None if no family knows it."""
    for family in (*FAMILIES, *REGIONS):
        spec = family.parse(op_type)
        if spec is not None:
            return spec
    return None
