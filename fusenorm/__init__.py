"""Fuse norm, GELU and GLU subgraphs of ONNX models and run them as TVM kernels in onnxruntime.

>>> import fusenorm
>>> sorted(set(fusenorm.__all__) & {"optimize", "compile", "load", "verify", "explain"})
['compile', 'explain', 'load', 'optimize', 'verify']

Names are imported when first used, so `import fusenorm` alone loads neither TVM nor onnxruntime.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fusenorm.artifact import Artifact as Artifact
    from fusenorm.compare import Comparison as Comparison
    from fusenorm.compare import verify as verify
    from fusenorm.errors import BadInput as BadInput
    from fusenorm.errors import CheckFailed as CheckFailed
    from fusenorm.errors import FusenormError as FusenormError
    from fusenorm.errors import SlowerFallback as SlowerFallback
    from fusenorm.pipeline import Options as Options
    from fusenorm.pipeline import Result as Result
    from fusenorm.pipeline import compile as compile
    from fusenorm.pipeline import explain as explain
    from fusenorm.pipeline import optimize as optimize
    from fusenorm.report import Report as Report
    from fusenorm.runtime.compatibility import Compatibility as Compatibility
    from fusenorm.runtime.compatibility import compatibility as compatibility
    from fusenorm.runtime.session import Session as Session
    from fusenorm.runtime.session import load as load

__version__ = "0.1.0"

_HOME = {
    "Artifact": "fusenorm.artifact",
    "BadInput": "fusenorm.errors",
    "CheckFailed": "fusenorm.errors",
    "Comparison": "fusenorm.compare",
    "Compatibility": "fusenorm.runtime.compatibility",
    "FusenormError": "fusenorm.errors",
    "Options": "fusenorm.pipeline",
    "Report": "fusenorm.report",
    "Result": "fusenorm.pipeline",
    "Session": "fusenorm.runtime.session",
    "SlowerFallback": "fusenorm.errors",
    "compatibility": "fusenorm.runtime.compatibility",
    "compile": "fusenorm.pipeline",
    "explain": "fusenorm.pipeline",
    "load": "fusenorm.runtime.session",
    "optimize": "fusenorm.pipeline",
    "verify": "fusenorm.compare",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'fusenorm' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
