"""What a module may compute: a norm or a gated unit over the fused ops, found by trying.

A module is measured, not believed: its forward runs on hard rows with parameters drawn at random,
and the form whose function body gives the same numbers, rounding by rounding, is its form.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Iterator
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import nn

from fusenorm.errors import FusenormError
from fusenorm.ops import ACTIVATIONS
from fusenorm.torch import kernels, ops
from fusenorm.torch.proof import difference, rows

_ELEMENTS = 1 << 15  # that a share of them means something
_BETAS = (1.0, 1.702)  # SiLU; QuickGELU


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
            return Bound(
                ops.layer_norm, (x, weight, bias, self.epsilon), {"affine": self.affine}
            )
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


@torch.no_grad()
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


def _prove(bound: Bound, wanted: torch.Tensor) -> None:
    """Hold the kernel against what the module computed.

    Raises:
        Refused: it has no kernel, or they differ.
    """
    call = bound.plan()
    kernel = kernels.find(call.spec, wanted.device.type)
    if isinstance(kernel, str):
        raise Refused("no_kernel", kernel)
    flaw = difference(call, wanted, bound.run())
    if flaw:
        raise Refused("check_failed", f"{call.spec.op_type} differs from the module: {flaw}")


def _takes_one_tensor(module: nn.Module) -> bool:
    try:
        inspect.signature(module.forward).bind(None)
    except (TypeError, ValueError):
        return False
    return True


def _like_a_norm(module: nn.Module) -> bool:
    """A leaf that holds a small positive number, or is called a norm."""
    leaf = next(module.children(), None) is None
    return leaf and (bool(_epsilons(module, torch.float32)) or "norm" in type(module).__name__.lower())


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
    drawn = {
        name: torch.empty_like(parameter).uniform_(0.5, 1.5)
        for name, parameter in parameters.items()
    }
    wanted = _output(module, drawn, x)
    flaws = []
    for form in _norm_forms(module, dtype):
        bound = form.bind(x, drawn.get("weight"), drawn.get("bias"))
        call = bound.plan()
        flaw = difference(call, wanted, call.reference()[0])
        if flaw is None:
            _prove(bound, wanted)
            own = form.bind(x, parameters.get("weight"), parameters.get("bias"))
            _prove(own, _output(module, parameters, x))
            return form
        flaws.append(f"{call.spec.op_type} with epsilon {form.epsilon:g}: {flaw}")
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
    """What the module makes of x with these parameters.

    Raises:
        Refused: it does not take one tensor, or makes none of its shape and type.
    """
    try:
        y = torch.func.functional_call(module, parameters, (x,))
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        raise Refused("structure", f"cannot be called with one tensor: {error}") from error
    if not isinstance(y, torch.Tensor) or y.shape != x.shape or y.dtype != x.dtype:
        made = f"{y.dtype} {list(y.shape)}" if isinstance(y, torch.Tensor) else type(y).__name__
        raise Refused("types", f"makes {made} of {x.dtype} {list(x.shape)}")
    return y


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
    return max(16, _ELEMENTS // width)


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
            call = bound.plan()
            if difference(call, hidden, call.reference()[0]) is None:
                _prove(bound, hidden)
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
    behind = getattr(module, last)
    like = next(module.parameters()).to(dtype)
    height = _height(behind.in_features)
    given = {
        name: rows((height, getattr(module, name).out_features), like, seed)
        for seed, name in enumerate(first)
    }
    x = torch.ones((height, getattr(module, first[0]).in_features), dtype=dtype, device=like.device)
    read: dict[str, list[Any]] = {name: [] for name in (*first, last)}
    made: list[Any] = []

    def replace(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            read[name].append(args[0] if len(args) == 1 else None)
            made.append(output)
            return given.get(name)

        return hook

    handles = [getattr(module, name).register_forward_hook(replace(name)) for name in read]
    training = [child for child in module.modules() if child.training]
    module.eval()
    try:
        y = module(x)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        raise Refused("structure", f"cannot be called with one tensor: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
        for child in training:
            child.training = True
    once = all(len(values) == 1 for values in read.values())
    if not (once and all(read[name][0] is x for name in first) and y is made[-1]):
        raise Refused("structure", "its linear maps are not wired as a gated unit's")
    hidden = read[last][0]
    if not isinstance(hidden, torch.Tensor) or hidden.shape != (height, behind.in_features):
        raise Refused("structure", f"'{last}' does not read one row for every row")
    return given, hidden
