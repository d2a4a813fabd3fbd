"""What a module may compute is measured, not believed.

Its forward runs on hard rows, and the form whose function body gives the same numbers, rounding by
rounding, is its form. What both kinds of forms (norms and gated units) share is here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from fusenorm.errors import FusenormError
from fusenorm.torch import ops
from fusenorm.torch.proof import difference

# Times the bound of f32 that a module's own arithmetic is allowed: torch's GELU errs by 1e-6.
ROOM = 12.5
_ELEMENTS = 1 << 15  # that a share of them means something


class Refused(FusenormError):
    """A module that is left alone.

    Args:
        reason: a stable code.
        message: the same in words.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class Bound:
    """A torch op and the arguments it is to be called with."""

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self) -> torch.Tensor:
        return self.op(*self.args, **self.kwargs)

    def plan(self) -> ops.Call:
        return ops.plan(self.op, *self.args, **self.kwargs)


def prove(bound: Bound) -> None:
    """Hold the kernel against what it must compute.

    Raises:
        Refused: there is none, or it does not.
    """
    meant = bound.plan()
    kernel = meant.kernel()
    if isinstance(kernel, str):
        raise Refused("no_kernel", kernel)
    flaw = difference(meant, bound.run())
    if flaw:
        raise Refused("check_failed", f"the kernel of {meant.spec.op_type}: {flaw}")


def call(run: Callable[..., Any], *args: Any) -> Any:
    """What a run of a module returns.

    Raises:
        Refused: it raises.
    """
    try:
        return run(*args)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        raise Refused("structure", f"cannot be called with any rows: {error}") from error


def height_of(width: int) -> int:
    return 4 * max(4, _ELEMENTS // width // 4)


def shapes(rows: torch.Tensor) -> list[torch.Tensor]:
    """The same rows behind one, two and three axes: an axis may be meant from the front."""
    height, width = rows.shape
    return [
        rows.view(*leading, width) for leading in ((height,), (2, height // 2), (2, 2, height // 4))
    ]
