"""Fused ops to native code: one onnxruntime custom-ops library per CPU level.

Importing this package does not import TVM; building does.
"""

from __future__ import annotations

from fusenorm.lower.library import LibraryInfo, build_library
from fusenorm.lower.target import Target

__all__ = ["LibraryInfo", "Target", "build_library"]
