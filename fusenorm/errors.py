"""Errors a user sees, each one line that names the file, the node and what to do.

>>> print(BadInput("not an ONNX model", file="a.onnx"))
a.onnx: not an ONNX model
"""

from __future__ import annotations


class FusenormError(Exception):
    """Base of every error raised on purpose.

    Args:
        message: What is wrong and what to do, one line.
        file: The file it concerns.
        node: The graph node it concerns.
    """

    def __init__(self, message: str, *, file: object = None, node: str | None = None) -> None:
        self.message = " ".join(str(message).split())
        where = [str(part) for part in (file, f"node {node}" if node else None) if part]
        super().__init__(": ".join([*where, self.message]))


class BadInput(FusenormError):
    """The model, artifact, tensor or option given cannot be used (exit code 2)."""


class CheckFailed(FusenormError):
    """A comparison or verification came out negative (exit code 1)."""


class SlowerFallback(RuntimeWarning):
    """An artifact runs without its library, slower: none of its libraries suits this machine."""
