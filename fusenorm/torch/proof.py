"""Rows that tell formulas apart, and the bounds two ways of computing one op must keep.

f32: each within 4·eps·(1 + |mean|/std)·(scale of y) of float64. 16 bits: but for differences that
this f32 bound explains (near zero), at least 99.8 % equal, and none further apart than one unit in
the last place for every rounding of the op.
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


@torch.no_grad()
def difference(call: Call, wanted: torch.Tensor, got: torch.Tensor) -> str | None:
    """What separates two results of a call of one output, None if they agree."""
    for a in (wanted, got):
        if a.dtype != call.inputs[0].dtype or a.shape != call.outputs()[0].shape:
            return f"{a.dtype} {list(a.shape)} is not what the op makes"
    if not torch.equal(wanted.isnan(), got.isnan()):
        return "NaN appears on one side only"
    program = row_program(call.spec.with_dtype("f64"))
    values = Evaluation(program, [x.double() for x in call.inputs], call.attributes)
    exact, bound = values.value("y"), _bound(call, values)
    if wanted.dtype == torch.float32:
        for name, a in (("the module", wanted), ("the kernel", got)):
            worst = float(((a.double() - exact).abs() / bound).nan_to_num(0.0).max())
            if worst > 1:
                return f"{name} is {worst:.1f} times the bound away from float64"
        return None
    explained = (wanted.double() - got.double()).abs() <= bound
    unequal = (wanted != got) & ~wanted.isnan() & ~explained
    distance = (_ordinal(wanted) - _ordinal(got)).abs()[unequal]
    if distance.numel() and int(distance.max()) > row_program(call.spec).roundings:
        return f"{int(distance.max())} units in the last place apart"
    equal = 1 - distance.numel() / wanted.numel()
    if equal < BIT_EQUAL:
        return f"only {equal:.1%} of the outputs are bit-equal: a rounding differs"
    return None


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
