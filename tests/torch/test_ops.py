"""The fused ops called on torch tensors of the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fusenorm.torch
from fusenorm.kernels import supports
from fusenorm.ops import FAMILIES, OpSpec
from fusenorm.torch import ops
from fusenorm.torch.reference import DTYPES, reference
from tests.kernels.cases import attributes, check, inputs, misaligned, pairwise
from tests.torch.calls import SPECS, array, as_tuple, tensor, torch_call

every_op = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.op_type)


def hold(spec: OpSpec, values: dict[str, np.ndarray], made: tuple[torch.Tensor, ...]) -> None:
    check(spec, values, [array(part) for part in made], "normal")


def drawn(spec: OpSpec, rows: int, width: int) -> dict[str, torch.Tensor]:
    values = inputs(spec, rows, width, "normal")
    return {name: tensor(value) for name, value in values.items()}


def test_every_declared_op_can_be_called() -> None:
    for family in FAMILIES:
        for spec in family.variants():
            if supports(spec) is None:
                op, given = torch_call(spec, drawn(spec, 2, 4))
                assert ops.plan(op, **given).spec == spec


def test_every_torch_op_is_public() -> None:
    public = {getattr(fusenorm.torch, name) for name in fusenorm.torch.__all__}
    assert {op for op in vars(ops).values() if isinstance(op, torch._ops.OpOverload)} <= public


@pytest.mark.parametrize("spec", pairwise(), ids=lambda spec: spec.op_type)
def test_the_reference_is_the_function_body(spec: OpSpec) -> None:
    values = inputs(spec, 50, 64, "normal")
    made = reference(
        spec, [tensor(value) for value in values.values()], [*attributes(spec).values()]
    )
    hold(spec, values, made)


@pytest.mark.kernel
@every_op
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (50, 64), (3, 1000)])
def test_kernels_agree_with_the_oracle(spec: OpSpec, rows: int, width: int) -> None:
    values = inputs(spec, rows, width, "normal")
    op, given = torch_call(spec, {name: tensor(misaligned(v)) for name, v in values.items()})
    hold(spec, values, as_tuple(op(**given)))
    assert fusenorm.torch.fallbacks() == {}


@pytest.mark.kernel
@every_op
def test_any_number_of_axes_and_any_strides(spec: OpSpec) -> None:
    flat = drawn(spec, 24, 40)
    op, given = torch_call(spec, flat)
    wanted = as_tuple(op(**given))
    for spread in (
        lambda t: t.view(2, 3, 4, -1),
        lambda t: t.t().contiguous().t(),
        lambda t: torch.cat([t, t], -1)[:, : t.shape[-1]],
    ):
        moved = {name: spread(t) if t.dim() == 2 else t for name, t in flat.items()}
        op, given = torch_call(spec, moved)
        for made, part in zip(as_tuple(op(**given)), wanted, strict=True):
            assert made.is_contiguous()
            assert torch.equal(made.view(part.shape), part)


@pytest.mark.kernel
@every_op
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (3, 0)])
def test_nothing_gives_nothing(spec: OpSpec, shape: tuple[int, ...]) -> None:
    given = {
        slot.name: torch.empty(
            shape[-1:] if slot.layout == "vector"
            else (*shape[:-1], shape[-1] * (2 if slot.layout == "packed" else 1)),
            dtype=DTYPES[slot.dtype],
        )
        for slot in spec.inputs
    }  # fmt: skip
    op, arguments = torch_call(spec, given)
    assert [made.shape for made in as_tuple(op(**arguments))] == [shape] * len(spec.outputs)


@pytest.mark.kernel
@every_op
def test_torch_accepts_the_registration(spec: OpSpec) -> None:
    tensors = {name: t.requires_grad_() for name, t in drawn(spec, 4, 16).items()}
    op, given = torch_call(spec, tensors)
    names = [argument.name for argument in op._schema.arguments if not argument.kwarg_only]
    args = tuple(given.pop(name) for name in names if name in given)
    torch.library.opcheck(op, args, given)


@pytest.mark.kernel
def test_gradients_are_those_of_torch() -> None:
    def close(made: torch.Tensor, wanted: torch.Tensor, over: list[torch.Tensor]) -> None:
        seed = torch.randn_like(made)
        ours = torch.autograd.grad(made, over, seed)
        theirs = torch.autograd.grad(wanted, over, seed)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)

    x, skip = (torch.randn(5, 32, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(32, requires_grad=True) for _ in range(2))
    plain = torch.nn.functional
    close(
        fusenorm.torch.layer_norm(x, weight, bias, 1e-5),
        plain.layer_norm(x, (32,), weight, bias, 1e-5),
        [x, weight, bias],
    )
    close(
        fusenorm.torch.skip_rms_norm(x, skip, weight, 1e-5)[0],
        plain.rms_norm(x + skip, (32,), weight, 1e-5),
        [x, skip, weight],
    )
    close(fusenorm.torch.glu(x, skip), plain.silu(x) * skip, [x, skip])
    frozen = weight.detach()
    close(fusenorm.torch.rms_norm(x, frozen, 1e-5), plain.rms_norm(x, (32,), frozen, 1e-5), [x])


X = torch.ones(2, 8)
W = torch.ones(8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda t: t.rms_norm(X, W[:7], 1e-5), ValueError, "'weight' is .7.: not .8."),
        (lambda t: t.rms_norm(X.int(), W, 1e-5), TypeError, "'x' is torch.int32"),
        (lambda t: t.rms_norm(W[0], W, 1e-5), ValueError, "'x' is a scalar"),
        (lambda t: t.skip_rms_norm(X, X[:1], W, 1e-5), ValueError, "'skip' is .1, 8.: not .2, 8."),
        (lambda t: t.skip_rms_norm(X, X.half(), W, 1e-5), TypeError, "'skip' is torch.float16"),
        (lambda t: t.glu(X, X, "softmax"), ValueError, "no activation 'softmax': there are"),
        (lambda t: t.glu(X, X, clamp="gate"), ValueError, "'floor' is needed for clamp='gate'"),
        (lambda t: t.glu_packed(X[:, :7]), ValueError, "'x' holds two halves"),
        (
            lambda t: t.rms_norm(X.to("meta"), W, 1e-5),
            ValueError,
            "'weight' is on cpu, not on meta",
        ),
    ],
)
def test_wrong_calls_are_named(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(fusenorm.torch)


@pytest.mark.kernel
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_traces_through(backend: str) -> None:
    def block(x: torch.Tensor, skip: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y, s = fusenorm.torch.skip_rms_norm(x, skip, weight, 1e-5, alpha=2.0)
        return fusenorm.torch.glu(y * 2, s) + 1

    compiled = torch.compile(block, backend=backend, fullgraph=True, dynamic=True)
    for rows in (3, 5):
        x, skip = torch.randn(rows, 24), torch.randn(rows, 24)
        torch.testing.assert_close(compiled(x, skip, W.repeat(3)), block(x, skip, W.repeat(3)))


@pytest.mark.kernel
def test_export_keeps_the_op() -> None:
    class Block(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return fusenorm.torch.glu_packed(x, "gelu_tanh", "up_gate")

    rows = torch.export.Dim("rows", max=64)
    program = torch.export.export(Block(), (torch.randn(4, 16),), dynamic_shapes=({0: rows},))
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert targets == [torch.ops.fusenorm.glu_packed.default]
    x = torch.randn(7, 16)
    assert torch.equal(program.module()(x), Block()(x))
