"""The graph passes: canonicalisation, matching, one file per rule. Installed as fusenorm.passes."""

from __future__ import annotations

if __name__ != "fusenorm.passes":
    raise ImportError(f"import fusenorm.passes, not {__name__}")

from fusenorm.passes.canonicalize import Canonicalize, Cleanup
from fusenorm.passes.expose_residual import ExposeResidual
from fusenorm.passes.fold_batch_norm import FoldBatchNorm
from fusenorm.passes.fuse_activation import (
    ActivationRule,
    FuseActivation,
    FuseGelu,
    FuseGeluTanh,
    FuseRelu2,
    FuseSwish,
)
from fusenorm.passes.fuse_glu import FuseGatedUnit, FuseGLU
from fusenorm.passes.fuse_norm import FuseLayerNorm, FuseNorm, FuseRMSNorm
from fusenorm.passes.fuse_residual import FuseResidual, FuseResidualNorm
from fusenorm.passes.rewrite import RewritePass, Rule
from fusenorm.passes.validate import Validator

RULES: tuple[Rule, ...] = (
    FuseLayerNorm(),
    FuseRMSNorm(),
    FuseResidual(),
    FuseGelu(),
    FuseGeluTanh(),
    FuseSwish(),
    FuseRelu2(),
    FuseGLU(),
)

__all__ = [
    "RULES",
    "ActivationRule",
    "Canonicalize",
    "Cleanup",
    "ExposeResidual",
    "FoldBatchNorm",
    "FuseActivation",
    "FuseGatedUnit",
    "FuseNorm",
    "FuseResidualNorm",
    "RewritePass",
    "Rule",
    "Validator",
]
