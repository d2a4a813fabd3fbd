"""Modules that are gated units: linear maps around act(gate)∘up."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import nn

from fusenorm.ops import ACTIVATIONS
from fusenorm.torch import ops
from fusenorm.torch.forms import ROOM, Bound, Refused, call, height_of, prove, shapes
from fusenorm.torch.proof import difference, rows

_BETAS = (1.0, 1.702)  # SiLU; QuickGELU


@dataclasses.dataclass(frozen=True)
class GatedForm:
    """last(act(gate(x))∘up(x)), gate and up being two linear maps or the halves of one.

    Attributes:
        dtype: the type of x it was proved for.
        first: names of the linear maps that read x: gate and up, or the packed one.
        last: name of the linear map behind.
        layout, activation, precision: as `fusenorm.ops.Gated` has them.
        beta: of Swish.
        eval_only: the module drops out in training.
    """

    dtype: torch.dtype
    first: tuple[str, ...]
    last: str
    layout: str
    activation: str
    precision: Literal["f32", "storage"]
    beta: float
    eval_only: bool

    @property
    def op(self) -> str:
        """The torch op's name."""
        return "glu" if self.layout == "pair" else "glu_packed"

    def bind(self, *given: torch.Tensor) -> Bound:
        """The torch op of the form with its arguments."""
        precision = {"precision": self.precision}
        if self.layout == "pair":
            return Bound(ops.glu, (*given, self.activation, self.beta), precision)
        rest = (self.activation, self.layout, self.beta)
        return Bound(ops.glu_packed, (*given, *rest), precision)

    def __call__(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        given = [getattr(module, name)(x) for name in self.first]
        return getattr(module, self.last)(self.bind(*given).run())


def gated_form(module: nn.Module, dtype: torch.dtype) -> GatedForm | None:
    """The proved form of a module, None if it does not hold the linear maps of a gated unit.

    Raises:
        Refused: it holds them, but is no gated unit, or its op has no kernel.
    """
    refusal = None
    for first, last in _linears(module):
        try:
            return _form(module, first, last, dtype)
        except Refused as refused:
            refusal = refused
    if refusal is not None:
        raise refusal
    return None


def _linears(module: nn.Module) -> Iterator[tuple[tuple[str, ...], str]]:
    """Names of the linear maps of a gated unit: those that read x, and the last."""
    children = dict(module.named_children())
    sizes = {
        name: (child.in_features, child.out_features)
        for name, child in children.items()
        if isinstance(getattr(child, "in_features", None), int)
    }
    others = [child for name, child in children.items() if name not in sizes]
    if len(sizes) not in (2, 3) or any(list(child.parameters()) for child in others):
        return
    for last, (hidden, _) in sizes.items():
        first = tuple(name for name in sizes if name != last)
        widths = {sizes[name] for name in first}
        if len(widths) == 1 and sizes[first[0]][1] * len(first) == 2 * hidden:
            yield first, last


def _form(module: nn.Module, first: tuple[str, ...], last: str, dtype: torch.dtype) -> GatedForm:
    """The form of a module with these linear maps.

    Raises:
        Refused: it is none, or its op has no kernel.
    """
    given, hidden = _observe(module, first, last, dtype)
    drops = any(isinstance(child, nn.Dropout) and child.p > 0 for child in module.children())
    for names, layout in _wirings(first):
        tensors = [given[name] for name in names]
        for activation, beta, precision in _variants(dtype):
            form = GatedForm(dtype, names, last, layout, activation, precision, beta, drops)
            bound = form.bind(*tensors)
            if difference(bound.plan(), hidden, ROOM) is None:
                prove(bound)
                return form
    raise Refused("not_gated", "no activation of the table makes it a gated unit")


def _wirings(first: tuple[str, ...]) -> list[tuple[tuple[str, ...], str]]:
    """Which linear map is the gate."""
    if len(first) == 1:
        return [(first, layout) for layout in ("gate_up", "up_gate", "interleaved")]
    return [(first, "pair"), (first[::-1], "pair")]


def _variants(dtype: torch.dtype) -> Iterator[tuple[str, float, Literal["f32", "storage"]]]:
    precisions: tuple[Literal["f32", "storage"], ...] = ("f32", "storage")
    for row, precision in itertools.product(ACTIVATIONS.values(), precisions):
        if precision == "storage" and (dtype == torch.float32 or row.name == "identity"):
            continue
        for beta in _BETAS if row.attributes else (1.0,):
            yield row.name, beta, precision


def _observe(
    module: nn.Module, first: tuple[str, ...], last: str, dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Run the module with hard rows in place of what its first linear maps make.

    Returns:
        Those rows by the linear map's name, and what the last linear map then reads.

    Raises:
        Refused: the linear maps are not wired as in a gated unit.
    """
    like = next(module.parameters()).to(dtype)
    height = height_of(getattr(module, last).in_features)
    given = {
        name: rows((height, getattr(module, name).out_features), like, seed)
        for seed, name in enumerate(first)
    }
    x = like.new_ones((height, getattr(module, first[0]).in_features))
    training = [child for child in module.modules() if child.training]
    module.eval()
    try:
        hidden = [
            _hidden(module, shaped, dict(zip(first, outputs, strict=True)), last)
            for shaped, *outputs in zip(shapes(x), *map(shapes, given.values()), strict=True)
        ]
    finally:
        for child in training:
            child.training = True
    return {name: t.repeat(3, 1) for name, t in given.items()}, torch.cat(hidden)


def _hidden(
    module: nn.Module, x: torch.Tensor, given: dict[str, torch.Tensor], last: str
) -> torch.Tensor:
    """What the last linear map reads when the first ones make `given`, as rows."""
    calls: list[tuple[str, Any, Any]] = []

    def watch(name: str) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            calls.append((name, args[0] if args else None, output))
            return given.get(name)

        return hook

    names = (*given, last)
    handles = [getattr(module, name).register_forward_hook(watch(name)) for name in names]
    try:
        y = call(module, x)
    finally:
        for handle in handles:
            handle.remove()
    read = {name: value for name, value, _ in calls}
    hidden = read.get(last)
    wired = (
        sorted(name for name, _, _ in calls) == sorted(names)
        and all(read[name] is x for name in given)
        and y is calls[-1][2]
    )
    if not (wired and isinstance(hidden, torch.Tensor) and hidden.shape[:-1] == x.shape[:-1]):
        raise Refused("structure", "its linear maps are not wired as a gated unit's")
    return hidden.reshape(-1, hidden.shape[-1])
