"""Which modules are taken for what, proved, left alone, and how they behave afterwards."""

from __future__ import annotations

import copy
import functools
import io
import re
from collections.abc import Callable

import pytest
import torch
from torch import nn

import fusenorm.torch
from fusenorm.errors import BadInput
from fusenorm.torch import gated, kernels
from fusenorm.torch.gated import GatedForm
from fusenorm.torch.norms import NormForm
from fusenorm.torch.replace import Replacement

pytestmark = pytest.mark.kernel

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
WIDTH = 48


class RMS(nn.Module):
    """x / rms(x), rounded or not, times weight or 1 + weight; over another axis if asked for."""

    def __init__(self, rounds: bool = True, offset: bool = False, axis: int = -1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(WIDTH) if offset else torch.ones(WIDTH))
        self.eps = 1e-6
        self.rounds, self.offset, self.axis = rounds, offset, axis

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(self.axis, keepdim=True) + self.eps)
        weight = 1.0 + self.weight.float() if self.offset else self.weight
        return weight * wide.to(x.dtype) if self.rounds else (weight * wide).to(x.dtype)


class MLP(nn.Module):
    """last(act(gate(x)) * up(x)), from two linear maps or one."""

    def __init__(
        self,
        act: Callable[[torch.Tensor], torch.Tensor],
        packed: Callable[[torch.Tensor], tuple[torch.Tensor, ...]] | None = None,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.act, self.packed = act, packed
        self.up = nn.Linear(WIDTH, 160 if packed else 80)
        if packed is None:
            self.gate = nn.Linear(WIDTH, 80)
        self.drop = nn.Dropout(drop)
        self.last = nn.Linear(80, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.packed(self.up(x)) if self.packed else (self.gate(x), self.up(x))
        return self.last(self.drop(self.act(gate) * up))


silu, gelu = nn.functional.silu, nn.functional.gelu
gelu_tanh = functools.partial(gelu, approximate="tanh")


def halves(packed: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return packed.chunk(2, -1)


def turns(packed: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return packed[..., ::2], packed[..., 1::2]


def stepwise(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x)


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


def form_of(module: nn.Module, dtype: torch.dtype) -> tuple[object, Replacement]:
    """The form a module is replaced by; its outputs then are as close as they were proved."""
    module = module.to(dtype)
    x = torch.randn(2, 5, WIDTH, dtype=dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        wanted = module(x)
        done = fusenorm.torch.replace(module)
        assert [site.status for site in done.sites] == ["fused"], str(done)
        made = module(x)
    rounding = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(made, wanted, rtol=2 * rounding, atol=2 * rounding)
    return module._fusenorm_form, done


@every_dtype
@pytest.mark.parametrize(
    ("make", "centred", "offset", "affine", "epsilon"),
    [
        (lambda: nn.LayerNorm(WIDTH), True, False, "f32", 1e-5),
        (lambda: nn.LayerNorm(WIDTH, eps=1e-3, bias=False), True, False, "f32", 1e-3),
        (lambda: nn.LayerNorm(WIDTH, elementwise_affine=False), True, False, "f32", 1e-5),
        (lambda: nn.RMSNorm(WIDTH, eps=1e-4), False, False, "f32", 1e-4),
        (lambda: RMS(rounds=True), False, False, "storage", 1e-6),
        (lambda: RMS(rounds=False), False, False, "f32", 1e-6),
        (lambda: RMS(rounds=False, offset=True), False, True, "f32", 1e-6),
    ],
)
def test_norms_are_found_with_their_rounding(
    make: Callable[[], nn.Module],
    centred: bool,
    offset: bool,
    affine: str,
    epsilon: float,
    dtype: torch.dtype,
) -> None:
    module = make()
    if not list(module.parameters()):
        module = nn.Sequential(module, nn.Linear(WIDTH, 1)).to(dtype)
        fusenorm.torch.replace(module)
        form = module[0]._fusenorm_form
    else:
        form, _ = form_of(module, dtype)
    affine = "f32" if dtype == torch.float32 else affine
    assert form == NormForm(dtype, centred, offset, affine, epsilon)


@every_dtype
def test_the_epsilon_of_a_type_is_found(dtype: torch.dtype) -> None:
    form, _ = form_of(nn.RMSNorm(WIDTH), dtype)
    assert form.epsilon in (torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)


@pytest.mark.parametrize(
    ("make", "dtype", "layout", "activation", "first"),
    [
        (lambda: MLP(silu), torch.float32, "pair", "swish", ("gate", "up")),
        (lambda: MLP(silu), torch.bfloat16, "pair", "swish", ("gate", "up")),
        (lambda: MLP(gelu), torch.float32, "pair", "gelu", ("gate", "up")),
        (lambda: MLP(gelu), torch.float16, "pair", "gelu", ("gate", "up")),
        (lambda: MLP(gelu_tanh), torch.float32, "pair", "gelu_tanh", ("gate", "up")),
        (lambda: MLP(gelu_tanh), torch.bfloat16, "pair", "gelu_tanh", ("gate", "up")),
        (lambda: MLP(torch.relu), torch.float32, "pair", "relu", ("gate", "up")),
        (lambda: MLP(silu, halves), torch.bfloat16, "gate_up", "swish", ("up",)),
        (lambda: MLP(silu, lambda p: halves(p)[::-1]), torch.float32, "up_gate", "swish", ("up",)),
        (lambda: MLP(gelu, turns), torch.float16, "interleaved", "gelu", ("up",)),
    ],
)
def test_gated_units_are_found(
    make: Callable[[], nn.Module],
    dtype: torch.dtype,
    layout: str,
    activation: str,
    first: tuple[str, ...],
) -> None:
    form, _ = form_of(make(), dtype)
    assert form == GatedForm(dtype, first, "last", layout, activation, "f32", 1.0, False)


def test_an_activation_rounded_step_by_step_is_told_apart() -> None:
    form, _ = form_of(MLP(stepwise), torch.bfloat16)
    assert (form.activation, form.beta, form.precision) == ("swish", 1.0, "storage")


def test_a_constant_that_16_bits_do_not_have_is_told_apart() -> None:
    form, _ = form_of(MLP(quick_gelu), torch.float32)
    assert (form.activation, form.beta) == ("swish", 1.702)
    # In a 16-bit graph the constant is rounded, here it is not.
    (site,) = fusenorm.torch.replace(MLP(quick_gelu).bfloat16()).sites
    assert site.reason == "not_gated"


def test_linear_maps_of_one_shape_are_told_apart() -> None:
    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.gate, self.up = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(silu(self.gate(x)) * self.up(x))

    form, _ = form_of(Square(), torch.float32)
    assert (form.first, form.last) == (("gate", "up"), "last")


class Halved(MLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.act(self.gate(x)) * self.up(x) / 2)


class Shifted(MLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.act(self.gate(x + 1)) * self.up(x))


class Residual(MLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + super().forward(x)


class L1(RMS):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x / (x.abs().mean(-1, keepdim=True) + self.eps)


class BareNorm(nn.Module):
    """A norm by its name only."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * nn.functional.normalize(x, dim=-1)


class Wide(RMS):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).float()


@pytest.mark.parametrize(
    ("make", "reason", "detail"),
    [
        (lambda: nn.LayerNorm((2, WIDTH)), "axis", "it covers .2, 48., not the last axis alone"),
        (lambda: nn.BatchNorm1d(WIDTH), "structure", "holds more than a weight and a bias"),
        (lambda: nn.GroupNorm(4, WIDTH), "types|not_a_norm|structure", ""),
        (lambda: RMS(axis=1), "not_a_norm", "as RMSNorm with epsilon 1e-06: NaN appears"),
        (lambda: RMS(axis=-2), "not_a_norm", "as RMSNorm with epsilon 1e-06: NaN appears"),
        (lambda: RMS(axis=2), "structure", "cannot be called with any rows"),
        (lambda: L1(), "not_a_norm", "as RMSNorm .*: .* times the bound away from float64"),
        (lambda: BareNorm(), "not_a_norm", "it holds no number that may be its epsilon"),
        (lambda: Wide().half(), "types", "makes torch.float32"),
        (lambda: MLP(nn.functional.hardswish), "not_gated", "no activation of the table"),
        (lambda: MLP(silu, lambda p: p.chunk(2, 1)), "structure|not_gated", ""),
        (lambda: Halved(silu), "not_gated", "no activation of the table"),
        (lambda: Shifted(silu), "structure", "not wired as a gated unit's"),
        (lambda: Residual(silu), "structure", "not wired as a gated unit's"),
    ],
)
def test_others_are_left_alone_with_a_reason(
    make: Callable[[], nn.Module], reason: str, detail: str
) -> None:
    module = make()
    (site,) = fusenorm.torch.replace(module).sites
    assert site.status == "refused"
    assert site.reason in reason.split("|"), site
    assert re.search(detail, site.detail), site
    assert "forward" not in vars(module)


def test_what_is_no_norm_and_no_gated_unit_is_no_site() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Embedding(3, 4), nn.Dropout(0.05))
    assert fusenorm.torch.replace(model).sites == ()
    ffn = nn.TransformerEncoderLayer(WIDTH, 2, 96)
    kinds = {site.kind for site in fusenorm.torch.replace(ffn).sites}
    assert kinds == {"LayerNorm"}


def test_a_kernel_that_differs_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(tensors: list[torch.Tensor], attributes: tuple[float, ...]) -> None:
        tensors[-1].copy_(tensors[0])

    monkeypatch.setattr(kernels, "find", lambda spec, device, columns: wrong)
    (site,) = fusenorm.torch.replace(nn.LayerNorm(WIDTH)).sites
    assert site.reason == "check_failed"
    monkeypatch.setattr(kernels, "find", lambda spec, device, columns: "no compiler")
    (site,) = fusenorm.torch.replace(nn.LayerNorm(WIDTH)).sites
    assert (site.reason, site.detail) == ("no_kernel", "no compiler")


def test_a_forward_somebody_replaced_is_kept() -> None:
    module = nn.LayerNorm(WIDTH)
    module.forward = lambda x: x
    (site,) = fusenorm.torch.replace(module).sites
    assert site.reason in ("patched", "not_a_norm")
    module = nn.LayerNorm(WIDTH)
    module.forward = functools.partial(nn.LayerNorm.forward, module)
    (site,) = fusenorm.torch.replace(module).sites
    assert site.reason == "patched"


def test_parameters_hooks_and_copies_stay_what_they_are() -> None:
    model = nn.Sequential(RMS(), MLP(silu)).eval()
    names, called = list(model.state_dict()), []
    model[0].register_forward_hook(lambda module, args, output: called.append(type(module)))
    done = fusenorm.torch.replace(model)
    called.clear()
    assert done.counts == {"rms_norm": 1, "glu": 1}
    assert list(model.state_dict()) == names
    x = torch.randn(3, WIDTH)
    other = nn.Sequential(RMS(), MLP(silu)).eval()
    nn.init.uniform_(other[0].weight)
    wanted = other(x)
    model.load_state_dict(other.state_dict(), assign=True)
    torch.testing.assert_close(model(x), wanted)
    assert called == [RMS]
    copied = copy.deepcopy(model)
    nn.init.zeros_(model[0].weight)
    torch.testing.assert_close(copied(x), wanted)
    assert fusenorm.torch.replace(model).sites == ()  # replaced already


def test_replaced_modules_can_be_saved() -> None:
    file = io.BytesIO()
    norm = nn.LayerNorm(WIDTH)
    fusenorm.torch.replace(norm)
    torch.save(norm, file)
    file.seek(0)
    x = torch.randn(3, WIDTH)
    assert torch.equal(torch.load(file, weights_only=False)(x), norm(x))


def test_undo_gives_every_forward_back() -> None:
    model = nn.Sequential(nn.LayerNorm(WIDTH), nn.LayerNorm((2, WIDTH)))
    x = torch.randn(2, WIDTH)
    wanted = model(x)
    done = fusenorm.torch.replace(model)
    assert done.as_dict()["counts"] == {"layer_norm": 1}
    done.undo()
    assert all("forward" not in vars(module) for module in model)
    assert torch.equal(model(x), wanted)
    assert fusenorm.torch.replace(model).counts == {"layer_norm": 1}


def ran(monkeypatch: pytest.MonkeyPatch, module: nn.Module, run: Callable[[], object]) -> bool:
    """Whether a call ran by the form rather than by the module's own forward."""
    calls: list[object] = []
    form = type(module._fusenorm_form)
    own = form.__call__
    monkeypatch.setattr(form, "__call__", lambda *args: calls.append(args) or own(*args))
    run()
    return bool(calls)


def test_calls_that_were_not_proved_take_the_own_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    norm, mlp = nn.LayerNorm(WIDTH), MLP(silu, drop=0.5).train()
    fusenorm.torch.replace(nn.Sequential(norm, mlp))
    x = torch.randn(2, WIDTH)
    assert ran(monkeypatch, norm, lambda: norm(x))
    assert not ran(monkeypatch, norm, lambda: norm(input=x))
    assert not ran(monkeypatch, mlp, lambda: mlp(x))
    assert ran(monkeypatch, mlp.eval(), lambda: mlp(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert not ran(monkeypatch, mlp, lambda: mlp(x))
    norm.bfloat16()
    assert not ran(monkeypatch, norm, lambda: norm(x.bfloat16()))


def test_replacing_leaves_training_modes_alone() -> None:
    mlp = MLP(silu, drop=0.5)
    mlp.last.eval()
    fusenorm.torch.replace(mlp)
    assert [child.training for child in mlp.modules()] == [True, True, True, True, False]


def test_replaced_modules_train() -> None:
    module = nn.LayerNorm(WIDTH)
    x = torch.randn(3, WIDTH)
    wanted = torch.autograd.grad(module(x).square().sum(), module.weight)
    fusenorm.torch.replace(module)
    made = torch.autograd.grad(module(x).square().sum(), module.weight)
    torch.testing.assert_close(made, wanted)


def test_what_cannot_be_replaced_in_is_named() -> None:
    with pytest.raises(BadInput, match="of a str: give a torch module"):
        fusenorm.torch.replace("model")
    with pytest.raises(BadInput, match="no float parameters: give the activations' dtype"):
        fusenorm.torch.replace(nn.LayerNorm(WIDTH, elementwise_affine=False))


def test_the_report_can_be_read() -> None:
    done = fusenorm.torch.replace(nn.Sequential(nn.LayerNorm(WIDTH), nn.BatchNorm1d(4)))
    assert str(done).splitlines() == [
        "0  LayerNorm  layer_norm",
        "1  BatchNorm1d  structure: it holds more than a weight and a bias",
        "2 modules: 1 fused",
    ]


def test_every_activation_of_the_table_is_tried() -> None:
    tried = {activation for activation, _, _ in gated._variants(torch.float16)}
    assert tried == set(fusenorm.ops.ACTIVATIONS)
