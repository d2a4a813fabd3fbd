"""Rows that tell formulas apart, and the bounds that what computes an op must keep to.

f32: within 4·eps·(1 + |mean|/std)·(scale of y) of float64. 16 bits: against the function body
rounded node by node, but for differences that this f32 bound explains (near zero), at least 99.8 %
equal, and none further apart than one unit in the last place for every rounding of the op.
"""

from __future__ import annotations

import numpy as np
import torch

from fusenorm.kernels import row_program
from fusenorm.ops import Gated, Norm
from fusenorm.passes.validate import BIT_EQUAL, hard_rows
from fusenorm.torch.ops import Call
from fusenorm.torch.reference import Evaluation

_LARGE = 6e4  # close to f16's maximum; its square is far from f32's


def rows(shape: tuple[int, int], like: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Random rows of many scales, offset, constant, close to f16's maximum, with a NaN."""
    rng = np.random.default_rng(seed)
    made = hard_rows(rng, shape)
    made[-1] = _LARGE * np.sign(made[-1])
    made[-2] = 3.25
    made[-3, 0] = np.nan
    return torch.from_numpy(made).to(like.device, like.dtype)


@torch.no_grad()  # type: ignore[untyped-decorator]  # torch is not typed here
def difference(call: Call, made: torch.Tensor, room: float = 1.0) -> str | None:
    """What separates a result from what the call means, None if it is as close as it must be.

    Args:
        call: of an op with one output y, its rows behind one axis.
        made: the result.
        room: times the f32 bound is allowed.
    """
    values = Evaluation(
        row_program(call.spec.with_dtype("f64")),
        [x.double() for x in call.inputs],
        call.attributes,
    )
    exact, bound = values.value("y"), room * _bound(call, values)
    if made.dtype == torch.float32:
        if not torch.equal(made.isnan(), exact.isnan()):
            return "NaN appears on one side only"
        worst = float(((made - exact).abs() / bound).nan_to_num(0.0).max())
        return f"{worst:.1f} times the bound away from float64" if worst > 1 else None
    (wanted,) = call.reference()
    if not torch.equal(made.isnan(), wanted.isnan()):
        return "NaN appears on one side only"
    explained = (wanted.double() - made.double()).abs() <= bound
    unequal = (wanted != made) & ~wanted.isnan() & ~explained
    distance = (_ordinal(wanted) - _ordinal(made)).abs()[unequal]
    if distance.numel() and int(distance.max()) > row_program(call.spec).roundings:
        return f"{int(distance.max())} units in the last place apart"
    equal = 1 - distance.numel() / made.numel()
    return f"only {equal:.1%} of the outputs are bit-equal" if equal < BIT_EQUAL else None


def _bound(call: Call, exact: Evaluation) -> torch.Tensor:
    """Of the absolute error in f32, for each row."""
    # What an activation errs by, up multiplies.
    gated = isinstance(call.spec, Gated) and call.spec.layout != "none"
    sizes = [exact.value(name).abs().nan_to_num(0.0) for name in ("y", "up")[: 1 + gated]]
    scale = torch.stack(sizes).amax((0, -1)).clamp(min=1.0)
    spread = torch.ones_like(scale)
    if isinstance(call.spec, Norm):
        x = exact.value("x")
        centre = x.mean(-1, keepdim=True) if call.spec.centred else 0.0
        deviation = ((x - centre).square().mean(-1) + call.attributes[0]).sqrt()
        spread = 1 + 2 * x.abs().amax(-1) / deviation
    return 4 * torch.finfo(torch.float32).eps * (spread * scale)[:, None]


def _ordinal(tensor: torch.Tensor) -> torch.Tensor:
    """The place of every 16-bit number among all of them, -0 and +0 in one."""
    bits = tensor.view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)
