"""What a module may compute: a norm or a gated unit over the fused ops, found by trying.

A module is measured, not believed: its forward runs on hard rows with parameters drawn at random,
and the form whose function body gives the same numbers, rounding by rounding, is its form.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import nn

from fusenorm.errors import FusenormError
from fusenorm.ops import ACTIVATIONS
from fusenorm.torch import ops
from fusenorm.torch.proof import difference, rows

_ELEMENTS = 1 << 15  # that a share of them means something
_BETAS = (1.0, 1.702)  # SiLU; QuickGELU
# Times the bound of f32 that a module's own arithmetic is allowed: torch's GELU errs by 1e-6.
_ROOM = 12.5


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


Form: TypeAlias = NormForm | GatedForm


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


@torch.no_grad()  # type: ignore[untyped-decorator]  # torch is not typed here
def find_form(module: nn.Module, dtype: torch.dtype) -> Form | None:
    """The proved form of a module, None if it is neither built like a norm nor like a gated unit.

    Args:
        module: with its parameters in place.
        dtype: of the x it is used with.

    Raises:
        Refused: it is built like one, but is none of the forms, or its op has no kernel.
    """
    if not _takes_one_tensor(module):
        return None
    linears = _linears(module)
    if linears:
        return _gated_form(module, *linears, dtype)
    return _norm_form(module, dtype) if _like_a_norm(module) else None


def _prove(bound: Bound) -> None:
    """Hold the kernel against what it must compute.

    Raises:
        Refused: there is none, or it does not.
    """
    call = bound.plan()
    kernel = call.kernel()
    if isinstance(kernel, str):
        raise Refused("no_kernel", kernel)
    flaw = difference(call, bound.run())
    if flaw:
        raise Refused("check_failed", f"the kernel of {call.spec.op_type} is {flaw}")


def _takes_one_tensor(module: nn.Module) -> bool:
    try:
        inspect.signature(module.forward).bind(None)
    except (TypeError, ValueError):
        return False
    return True


def _like_a_norm(module: nn.Module) -> bool:
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


def _norm_form(module: nn.Module, dtype: torch.dtype) -> NormForm:
    parameters = dict(module.named_parameters(recurse=False))
    if parameters.keys() - {"weight", "bias"} or next(module.buffers(), None) is not None:
        raise Refused("structure", "it holds more than a weight and a bias")
    shapes = {tuple(parameter.shape) for parameter in parameters.values()}
    shapes = shapes or {tuple(getattr(module, "normalized_shape", ()))}
    (shape,) = shapes if len(shapes) == 1 else ((),)
    if len(shape) != 1:
        raise Refused("axis", f"it covers {list(shape)}, not the last axis alone")
    like = next(iter(parameters.values()), torch.empty(0)).to(dtype)
    x = rows((_height(shape[0]), shape[0]), like)
    all_x = x.repeat(3, 1)
    drawn = {
        name: torch.empty_like(parameter).uniform_(0.5, 1.5)
        for name, parameter in parameters.items()
    }
    wanted = _output(module, drawn, x)
    flaws = []
    for form in _norm_forms(module, dtype):
        bound = form.bind(all_x, drawn.get("weight"), drawn.get("bias"))
        call = bound.plan()
        flaw = difference(call, wanted, _ROOM)
        if flaw is None:
            own = form.bind(all_x, parameters.get("weight"), parameters.get("bias"))
            flaw = difference(own.plan(), _output(module, parameters, x), _ROOM)
        if flaw is None:
            _prove(bound)
            _prove(own)
            return form
        flaws.append(f"{call.spec.op_type} with epsilon {form.epsilon:g}: it is {flaw}")
    raise Refused("not_a_norm", f"no form of a norm is what it computes ({flaws[0]})")


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
    for shaped in _shapes(x):
        y = _call(torch.func.functional_call, module, parameters, (shaped,))
        if not isinstance(y, torch.Tensor) or (y.shape, y.dtype) != (shaped.shape, x.dtype):
            got = f"{y.dtype} {list(y.shape)}" if isinstance(y, torch.Tensor) else type(y).__name__
            raise Refused("types", f"makes {got} of {x.dtype} {list(shaped.shape)}")
        made.append(y.reshape(x.shape))
    return torch.cat(made)


def _call(run: Callable[..., Any], *args: Any) -> Any:
    """What a run of a module returns.

    Raises:
        Refused: it raises.
    """
    try:
        return run(*args)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        raise Refused("structure", f"cannot be called with any rows: {error}") from error


def _linears(module: nn.Module) -> tuple[tuple[str, ...], str] | None:
    """Names of the linear maps of a gated unit: those that read x, and the last; None if none."""
    sizes = {
        name: (child.in_features, child.out_features)
        for name, child in module.named_children()
        if isinstance(getattr(child, "in_features", None), int)
    }
    others = [child for name, child in module.named_children() if name not in sizes]
    if any(next(child.parameters(), None) is not None for child in others):
        return None
    for last, (hidden, _) in sizes.items():
        first = tuple(name for name in sizes if name != last)
        widths = {sizes[name] for name in first}
        if len(widths) == 1 and next(iter(widths))[1] * len(first) == 2 * hidden:
            return first, last
    return None


def _height(width: int) -> int:
    return 4 * max(4, _ELEMENTS // width // 4)


def _shapes(rows: torch.Tensor) -> list[torch.Tensor]:
    """The same rows behind one, two and three axes: an axis may be meant from the front."""
    height, width = rows.shape
    return [
        rows.view(*leading, width) for leading in ((height,), (2, height // 2), (2, 2, height // 4))
    ]


def _gated_form(
    module: nn.Module, first: tuple[str, ...], last: str, dtype: torch.dtype
) -> GatedForm:
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
            if difference(bound.plan(), hidden, _ROOM) is None:
                _prove(bound)
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
    height = _height(getattr(module, last).in_features)
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
            for shaped, *outputs in zip(_shapes(x), *map(_shapes, given.values()), strict=True)
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
        y = _call(module, x)
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
