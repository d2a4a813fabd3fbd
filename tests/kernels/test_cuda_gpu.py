"""CUDA kernels on a GPU, called on torch's tensors through tvm-ffi, against the oracles."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fusenorm.artifact import open_artifact
from fusenorm.kernels import symbols
from fusenorm.lower import Target, build_library
from fusenorm.ops import DTYPES, DType, Norm, OpSpec
from tests.kernels.cases import (
    FILLS,
    attributes,
    check,
    columns,
    gpu_ops,
    inputs,
    model_ops,
    some,
)

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

OPS = some()
MODELS = model_ops()


NORMS = [spec for spec in MODELS if isinstance(spec, Norm)]


@pytest.fixture(scope="session")
def module(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The library of the artifact FUSENORM_ARTIFACT names, or one built here."""
    import tvm_ffi

    given = os.environ.get("FUSENORM_ARTIFACT")
    if given:
        (path,) = (Path(given, item.path) for item in open_artifact(given).libraries if item.cuda)
    else:
        path = tmp_path_factory.mktemp("gpu") / "ops.so"
        build_library(gpu_ops(), Target.parse("cuda"), path, columns=gpu_ops())
    return tvm_ffi.load_module(str(path.absolute()))


def on_gpu(array: np.ndarray, dtype: DType, offset: int = 0, gap: int = 0) -> torch.Tensor:
    """The array `offset` elements into memory of torch's, its rows `gap` elements apart."""
    bits = torch.from_numpy(array.view(np.int16 if array.itemsize == 2 else np.int32).copy())
    kind = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}[dtype]
    wide = array.shape[-1] + (gap if array.ndim > 1 else 0)
    rows = array.size // array.shape[-1]
    memory = torch.full((rows * wide + offset,), 7, dtype=bits.dtype, device="cuda")
    view = memory[offset:].view(rows, wide)[:, : array.shape[-1]]
    view.copy_(bits.reshape(rows, -1))
    return view.view(kind) if array.ndim > 1 else view[0].view(kind)


def on_host(tensor: torch.Tensor, dtype: DType) -> np.ndarray:
    bits = tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32).cpu()
    return bits.contiguous().numpy().view(DTYPES[dtype].numpy)


def run(
    module: Any, spec: OpSpec, values: dict[str, np.ndarray], offset: int = 0, gap: int = 0
) -> list[np.ndarray]:
    """The outputs; without the second one y is the same."""
    rows, width = values[spec.inputs[0].name].shape
    width //= 2 if spec.inputs[0].layout == "packed" else 1
    given = [on_gpu(values[slot.name], slot.dtype, offset, gap) for slot in spec.inputs]
    made: list[list[np.ndarray]] = []
    for name, count in zip(symbols(spec, "cuda"), (len(spec.outputs), 1), strict=False):
        slots = spec.outputs[:count]
        empty = np.full((rows, width), np.nan)
        outputs = [
            on_gpu(empty.astype(DTYPES[slot.dtype].numpy), slot.dtype, offset, gap)
            for slot in slots
        ]
        call(module, name, [*given, *outputs], attributes(spec).values())
        torch.cuda.synchronize()
        made.append([on_host(item, slot.dtype) for item, slot in zip(outputs, slots, strict=True)])
    assert all(arrays[0].tobytes() == made[0][0].tobytes() for arrays in made)
    return made[0]


def call(module: Any, name: str, tensors: Sequence[torch.Tensor], numbers: Any) -> None:
    import tvm_ffi

    with tvm_ffi.use_torch_stream():
        module.get_function(name)(*tensors, *(float(number) for number in numbers))


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("spec", OPS, ids=lambda spec: spec.op_type)
def test_agrees_with_the_oracle(module: Any, spec: OpSpec, fill: str) -> None:
    if fill == "largest" and spec.dtype != "f16":
        pytest.skip("the squares overflow f32 as well: nothing to compare")
    for width in columns(8):
        for rows in (1, 3):
            values = inputs(spec, rows, width, fill)
            check(spec, values, run(module, spec, values), fill)


@pytest.mark.parametrize("spec", MODELS, ids=lambda spec: spec.op_type)
def test_the_sizes_of_models(module: Any, spec: OpSpec) -> None:
    for width in (*MODELS[spec], 5120, 65536):
        for rows in (1, 33):
            values = inputs(spec, rows, width, "normal")
            check(spec, values, run(module, spec, values), "normal")


@pytest.mark.parametrize("spec", NORMS, ids=lambda spec: spec.op_type)
def test_few_long_rows(module: Any, spec: OpSpec) -> None:
    for rows, width in ((1, 65536), (3, 50000), (100, 33000)):
        values = inputs(spec, rows, width, "large mean")
        check(spec, values, run(module, spec, values, gap=8), "large mean")


@pytest.mark.parametrize("spec", OPS, ids=lambda spec: spec.op_type)
@pytest.mark.parametrize(("offset", "gap"), [(1, 0), (0, 1), (0, 8), (8, 0), (3, 16)])
def test_any_place_and_stride(module: Any, spec: OpSpec, offset: int, gap: int) -> None:
    for rows, width in ((5, 9), (300, 64), (0, 64)):
        values = inputs(spec, rows, width, "normal")
        check(spec, values, run(module, spec, values, offset, gap), "normal")


@pytest.mark.parametrize("spec", list(MODELS)[::3], ids=lambda spec: spec.op_type)
def test_a_graph_captured_replays(module: Any, spec: OpSpec) -> None:
    width = (MODELS[spec] or (4096,))[-1]
    values = inputs(spec, 4, width, "normal")
    tensors = [on_gpu(values[slot.name], slot.dtype) for slot in spec.inputs]
    kinds = {
        slot.dtype: on_gpu(np.zeros((4, width), DTYPES[slot.dtype].numpy), slot.dtype)
        for slot in spec.outputs
    }
    outputs = [torch.zeros_like(kinds[slot.dtype]) for slot in spec.outputs]
    name, numbers = symbols(spec, "cuda")[0], attributes(spec).values()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(module, name, [*tensors, *outputs], numbers)
    assert all(bool((output == 0).all()) for output in outputs)
    graph.replay()
    torch.cuda.synchronize()
    made = [on_host(item, slot.dtype) for item, slot in zip(outputs, spec.outputs, strict=True)]
    check(spec, values, made, "normal")
