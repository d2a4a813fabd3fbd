"""The fused ops on a GPU: numbers, streams, graphs, torch.compile, a replaced model.

Kernels come from the artifact FUSENORM_ARTIFACT names, else they are built for this GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

import fusenorm.torch
from fusenorm.ops import OpSpec
from fusenorm.torch import kernels
from tests.kernels.cases import FILLS, check, inputs, pairwise
from tests.torch.calls import SPECS, array, as_tuple, tensor, torch_call

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]
every_op = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.op_type)


@pytest.fixture(scope="module", autouse=True)
def artifact() -> Iterator[None]:
    path = os.environ.get("FUSENORM_ARTIFACT")
    if path:
        fusenorm.torch.use(path)
    yield
    assert fusenorm.torch.fallbacks() == {}


def carried(spec: OpSpec) -> OpSpec:
    """The op, if the artifact has it; without one, some are built."""
    held = [taken["cuda"][0].op_types for taken in kernels._given if "cuda" in taken]
    if spec.op_type not in (held[0] if held else [known.op_type for known in SPECS]):
        pytest.skip("no artifact has it")
    return spec


def on_gpu(spec: OpSpec, values: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: tensor(value).cuda() for name, value in values.items()}


def shifted(given: torch.Tensor) -> torch.Tensor:
    """The same numbers one element past an aligned address, with space between rows."""
    width = given.shape[-1]
    wide = given.new_empty(given.numel() // max(width, 1) * (width + 3) + 1)[1:]
    moved = wide.view(*given.shape[:-1], width + 3)[..., :width]
    return moved.copy_(given)


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("spec", pairwise(), ids=lambda spec: spec.op_type)
def test_the_case_table(spec: OpSpec, fill: str) -> None:
    if fill == "largest" and spec.dtype != "f16":
        pytest.skip("the squares overflow f32 as well: nothing to compare")
    carried(spec)
    for rows, width in ((1, 1), (3, 7), (5, 64), (50, 1000), (3, 8192), (2, 40000)):
        values = inputs(spec, rows, width, fill)
        op, given = torch_call(spec, on_gpu(spec, values))
        made = as_tuple(op(**given))
        check(spec, values, [array(part) for part in made], fill)
        if width < 40000:
            op, given = torch_call(spec, {n: shifted(t) for n, t in on_gpu(spec, values).items()})
            for part, other in zip(made, as_tuple(op(**given)), strict=True):
                torch.testing.assert_close(part, other, rtol=1e-6, atol=1e-6, equal_nan=True)


@every_op
def test_no_rows(spec: OpSpec) -> None:
    op, given = torch_call(carried(spec), on_gpu(spec, inputs(spec, 0, 64, "normal")))
    assert [part.shape for part in as_tuple(op(**given))] == [(0, 64)] * len(spec.outputs)


@every_op
def test_a_graph_replays_on_new_inputs(spec: OpSpec) -> None:
    values = on_gpu(carried(spec), inputs(spec, 6, 256, "normal"))
    op, given = torch_call(spec, values)
    op(**given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = as_tuple(op(**given))
    for _ in range(2):
        for value in values.values():
            value.uniform_(-2, 2)
        wanted = [part.clone() for part in as_tuple(op(**given))]
        for part in captured:
            part.fill_(torch.nan)
        graph.replay()
        for part, want in zip(captured, wanted, strict=True):
            torch.testing.assert_close(part, want, rtol=0, atol=0)


def test_the_current_stream_is_used() -> None:
    x, weight = torch.zeros(4096, 1024, device="cuda"), torch.ones(1024, device="cuda")
    fusenorm.torch.rms_norm(x, weight, 1e-5)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        x.fill_(2.0)
        y = fusenorm.torch.rms_norm(x, weight, 1e-5)
    side.synchronize()
    torch.testing.assert_close(y, torch.ones_like(y))


def test_calls_do_not_wait() -> None:
    x, weight = torch.ones(8, 1024, device="cuda"), torch.ones(1024, device="cuda")
    fusenorm.torch.rms_norm(x, weight, 1e-5)
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)
    fusenorm.torch.rms_norm(x, weight, 1e-5)
    assert not torch.cuda.current_stream().query()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_the_tensors_own_gpu_is_used() -> None:
    x, weight = torch.randn(8, 64, device="cuda:1"), torch.rand(64, device="cuda:1")
    y = fusenorm.torch.rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(y, nn.functional.rms_norm(x, (64,), weight, 1e-5))
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compile(mode: str) -> None:
    def block(x: torch.Tensor, skip: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y, s = fusenorm.torch.skip_rms_norm(x, skip, weight, 1e-5)
        return fusenorm.torch.glu(y, s) + 1

    x, skip = (torch.randn(16, 256, device="cuda") for _ in range(2))
    weight = torch.rand(256, device="cuda")
    compiled = torch.compile(block, mode=mode, fullgraph=True)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(compiled(x, skip, weight), block(x, skip, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_modules_are_replaced(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.LayerNorm(512), nn.RMSNorm(512, eps=1e-6)).to("cuda", dtype)
    x = torch.randn(64, 512, device="cuda", dtype=dtype)
    wanted = model(x)
    done = fusenorm.torch.replace(model)
    assert done.counts == {"layer_norm": 1, "rms_norm": 1}, str(done)
    step = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(model(x), wanted, rtol=2 * step, atol=2 * step)
