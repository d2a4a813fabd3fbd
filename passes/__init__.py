"""The graph passes: canonicalisation, matching, one file per rule. Installed as fusenorm.passes."""

from __future__ import annotations

if __name__ != "fusenorm.passes":
    raise ImportError(f"import fusenorm.passes, not {__name__}")
