"""Modules that are norms over the last axis."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from fusenorm.torch import ops
from fusenorm.torch.forms import ROOM, Bound, Refused, call, height_of, prove, shapes
from fusenorm.torch.proof import difference, rows


@dataclasses.dataclass(frozen=True)
class NormForm:
    """A norm over the last axis with the module's `weight` and `bias`, as far as it has them.

    Attributes:
        dtype: the type of x it was proved for.
        centred: LayerNorm rather than RMSNorm.
        offset: γ is 1 + weight, in f32.
        affine: as `fusenorm.ops.Norm` has it.
        epsilon: of the module.
    """

    eval_only: ClassVar[bool] = False

    dtype: torch.dtype
    centred: bool
    offset: bool
    affine: Literal["f32", "storage"]
    epsilon: float

    @property
    def op(self) -> str:
        """The torch op's name."""
        return "layer_norm" if self.centred else "rms_norm"

    def bind(self, x: torch.Tensor, weight: Any, bias: Any) -> Bound:
        """The torch op of the form with its arguments."""
        if self.offset:
            weight = 1.0 + weight.float()
        if self.centred:
            return Bound(ops.layer_norm, (x, weight, bias, self.epsilon), {"affine": self.affine})
        return Bound(ops.rms_norm, (x, weight, self.epsilon, bias), {"affine": self.affine})

    def __call__(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        return self.bind(x, weight, bias).run()


def like_a_norm(module: nn.Module) -> bool:
    """A leaf with parameters and a small positive number, or one that is called a norm."""
    if next(module.children(), None) is not None:
        return False
    held = next(module.parameters(), None) is not None and _epsilons(module, torch.float32)
    return bool(held) or "norm" in type(module).__name__.lower()


def _epsilons(module: nn.Module, dtype: torch.dtype) -> list[float]:
    """Numbers of the module that may be its ε."""
    held = [value for value in vars(module).values() if isinstance(value, float)]
    if getattr(module, "eps", 0.0) is None:  # torch.nn.RMSNorm: that of a type
        held += [torch.finfo(dtype).eps, torch.finfo(torch.float32).eps]
    return [value for value in dict.fromkeys(held) if 0 < value < 0.1]


def norm_form(module: nn.Module, dtype: torch.dtype) -> NormForm:
    """The proved form of a module that is like a norm.

    Raises:
        Refused: it is none over the last axis alone, or its op has no kernel.
    """
    parameters = dict(module.named_parameters(recurse=False))
    if parameters.keys() - {"weight", "bias"} or next(module.buffers(), None) is not None:
        raise Refused("structure", "it holds more than a weight and a bias")
    shapes = {tuple(parameter.shape) for parameter in parameters.values()}
    shapes = shapes or {tuple(getattr(module, "normalized_shape", ()))}
    (shape,) = shapes if len(shapes) == 1 else ((),)
    if len(shape) != 1:
        raise Refused("axis", f"it covers {list(shape)}, not the last axis alone")
    like = next(iter(parameters.values()), torch.empty(0)).to(dtype)
    x = rows((height_of(shape[0]), shape[0]), like)
    all_x = x.repeat(3, 1)
    drawn = {
        name: torch.empty_like(parameter).uniform_(0.5, 1.5)
        for name, parameter in parameters.items()
    }
    wanted = _output(module, drawn, x)
    flaws = []
    for form in _norm_forms(module, dtype):
        bound = form.bind(all_x, drawn.get("weight"), drawn.get("bias"))
        meant = bound.plan()
        flaw = difference(meant, wanted, ROOM)
        if flaw is None:
            own = form.bind(all_x, parameters.get("weight"), parameters.get("bias"))
            flaw = difference(own.plan(), _output(module, parameters, x), ROOM)
        if flaw is None:
            prove(bound)
            prove(own)
            return form
        flaws.append(f"as {meant.spec.op_type} with epsilon {form.epsilon:g}: {flaw}")
    raise Refused("not_a_norm", flaws[0] if flaws else "it holds no number that may be its epsilon")


def _norm_forms(module: nn.Module, dtype: torch.dtype) -> Iterator[NormForm]:
    affines: tuple[Literal["f32", "storage"], ...] = ("f32", "storage")
    weighted = getattr(module, "weight", None) is not None
    for centred, offset, affine, epsilon in itertools.product(
        (False, True), (False, True), affines, _epsilons(module, dtype)
    ):
        if (weighted or not offset) and (dtype != torch.float32 or affine == "f32"):
            yield NormForm(dtype, centred, offset, affine, epsilon)


def _output(module: nn.Module, parameters: dict[str, Any], x: torch.Tensor) -> torch.Tensor:
    """What the module makes of x in each of its shapes with these parameters, as rows.

    Raises:
        Refused: it does not take one tensor, or makes none of its shape and type.
    """
    made = []
    for shaped in shapes(x):
        y = call(torch.func.functional_call, module, parameters, (shaped,))
        if not isinstance(y, torch.Tensor) or (y.shape, y.dtype) != (shaped.shape, x.dtype):
            got = f"{y.dtype} {list(y.shape)}" if isinstance(y, torch.Tensor) else type(y).__name__
            raise Refused("types", f"makes {got} of {x.dtype} {list(shaped.shape)}")
        made.append(y.reshape(x.shape))
    return torch.cat(made)
