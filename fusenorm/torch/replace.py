"""`replace`: the fused ops in place of a model's norms and gated units.

A module that is found to be one (`fusenorm.torch.norms`, `fusenorm.torch.gated`) keeps its class,
parameters, buffers and hooks; only its `forward` becomes another. Calls that were not proved
(another type of x, autocast, more than one argument, training where it drops out) still take the
module's own forward.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import inspect
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from fusenorm.errors import BadInput
from fusenorm.torch.forms import Refused
from fusenorm.torch.gated import GatedForm, gated_form
from fusenorm.torch.norms import NormForm, like_a_norm, norm_form

Form: TypeAlias = NormForm | GatedForm

_FORM = "_fusenorm_form"


@dataclasses.dataclass(frozen=True)
class Site:
    """One module that is a norm or gated unit, or is built like one.

    Attributes:
        module: its name in the model.
        kind: its class.
        status: `fused`, or `refused`: left as it is.
        op: the torch op it runs now.
        reason: a stable code why it was left alone.
        detail: the same in words.
    """

    module: str
    kind: str
    status: Literal["fused", "refused"]
    op: str | None = None
    reason: str | None = None
    detail: str | None = None


@dataclasses.dataclass(frozen=True)
class Replacement:
    """What `replace` did to a model.

    Attributes:
        model: the model.
        sites: in the order of model.named_modules().
    """

    model: nn.Module = dataclasses.field(repr=False)
    sites: tuple[Site, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Replaced modules by torch op."""
        return dict(collections.Counter(site.op for site in self.sites if site.op))

    def undo(self) -> None:
        """Give every replaced module its own forward back."""
        for site in self.sites:
            if site.status == "fused":
                module = self.model.get_submodule(site.module)
                del module.forward
                delattr(module, _FORM)

    def as_dict(self) -> dict[str, Any]:
        """In plain types."""
        return {"sites": [dataclasses.asdict(site) for site in self.sites], "counts": self.counts}

    def __str__(self) -> str:
        lines = [
            f"{site.module}  {site.kind}  {site.op or f'{site.reason}: {site.detail}'}"
            for site in self.sites
        ]
        fused = sum(self.counts.values())
        return "\n".join([*lines, f"{len(self.sites)} modules: {fused} fused"])


def replace(model: nn.Module, dtype: torch.dtype | None = None) -> Replacement:
    """Run a loaded model's norms and gated units by the fused ops, in place.

    Every module is proved when it is replaced: its own forward against the kernel on random and
    adversarial rows, within the bounds of `fusenorm.torch.proof`; one that differs is left alone.
    Replace after the weights are on their device and in their type.

    Args:
        model: any module; its submodules are replaced, and it itself.
        dtype: of the activations; that of most parameters by default.

    Returns:
        What was replaced or left, and why; its `undo` takes everything back.

    Raises:
        BadInput: the model is no module, or has no float parameters and no dtype was given.
    """
    if not isinstance(model, nn.Module):
        raise BadInput(f"cannot replace modules of a {type(model).__name__}: give a torch module")
    wanted = dtype or _main_dtype(model)
    sites = [
        site for name, module in model.named_modules() if (site := _replace(name, module, wanted))
    ]
    return Replacement(model, tuple(sites))


def _replace(name: str, module: nn.Module, dtype: torch.dtype) -> Site | None:
    kind = type(module).__name__
    if hasattr(module, _FORM):
        return None
    try:
        form = _find_form(module, dtype)
        if form is None:
            return None
        if "forward" in vars(module):
            raise Refused("patched", "its forward was replaced by something else")
    except Refused as refusal:
        return Site(name, kind, "refused", None, refusal.reason, refusal.message)
    setattr(module, _FORM, form)
    module.forward = functools.partial(_forward, module)
    return Site(name, kind, "fused", form.op)


@torch.no_grad()  # type: ignore[untyped-decorator]  # torch is not typed here
def _find_form(module: nn.Module, dtype: torch.dtype) -> Form | None:
    """The proved form of a module, None if it is neither built like a norm nor like a gated unit.

    Raises:
        Refused: it is built like one, but is none of the forms, or its op has no kernel.
    """
    if not _takes_one_tensor(module):
        return None
    form = gated_form(module, dtype)
    return norm_form(module, dtype) if form is None and like_a_norm(module) else form


def _takes_one_tensor(module: nn.Module) -> bool:
    try:
        inspect.signature(module.forward).bind(None)
    except (TypeError, ValueError):
        return False
    return True


def _forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    form: Form = getattr(module, _FORM)
    if len(args) == 1 and not kwargs and _proved(form, module, args[0]):
        return form(module, args[0])
    return type(module).forward(module, *args, **kwargs)


def _proved(form: Form, module: nn.Module, x: Any) -> bool:
    """Whether a call is one the form was proved for."""
    return (
        isinstance(x, torch.Tensor)
        and x.dtype == form.dtype
        and not (module.training and form.eval_only)
        and not torch.is_autocast_enabled(x.device.type)
    )


def _main_dtype(model: nn.Module) -> torch.dtype:
    counts: collections.Counter[torch.dtype] = collections.Counter()
    for parameter in model.parameters():
        if parameter.dtype.is_floating_point:
            counts[parameter.dtype] += parameter.numel()
    if not counts:
        raise BadInput("the model has no float parameters: give the activations' dtype")
    return counts.most_common(1)[0][0]
