"""Kernels against the oracles: float64 for f32, the body node by node for 16 bits."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fusenorm.kernels import symbols
from fusenorm.lower import Target
from fusenorm.lower.library import compile_module
from fusenorm.ops import DTYPES, Gated, Norm, OpSpec
from fusenorm.runtime.direct import Kernels
from tests.kernels.cases import (
    FILLS,
    attributes,
    check,
    columns,
    inputs,
    misaligned,
    pairwise,
    placed,
)

pytestmark = pytest.mark.kernel

LANES = {"x86-64-v4": 16, "x86-64-v3": 8, "x86-64-v2": 4, "aarch64": 4}


def results(kernels: Kernels, spec: OpSpec, values: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Every output, twice for y if there is a form without the sum."""
    op = kernels[spec.op_type]
    arrays = [misaligned(array) for array in values.values()]
    made = op(*arrays, **attributes(spec))
    if not isinstance(made, tuple):
        return [made]
    alone = op(*arrays, with_sum=False, **attributes(spec))
    assert np.array_equal(_bits(alone[0]), _bits(made[0]))
    return list(made)


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view(np.uint16 if array.itemsize == 2 else np.uint32)


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("spec", pairwise(), ids=lambda spec: spec.op_type)
def test_agrees_with_the_oracle(kernels: Kernels, spec: OpSpec, fill: str) -> None:
    if fill == "largest" and spec.dtype != "f16":
        pytest.skip("the squares overflow f32 as well: nothing to compare")
    for width in columns(LANES[Target.host().level]):
        for rows in (1, 3):
            values = inputs(spec, rows, width, fill)
            made = results(kernels, spec, values)
            check(spec, values, made, fill)


@pytest.mark.parametrize("spec", pairwise()[::5], ids=lambda spec: spec.op_type)
def test_no_rows_give_no_rows(kernels: Kernels, spec: OpSpec) -> None:
    for array, slot in zip(
        results(kernels, spec, inputs(spec, 0, 64, "normal")), spec.outputs, strict=True
    ):
        assert array.shape == (0, 64)
        assert array.dtype == DTYPES[slot.dtype].numpy


@pytest.mark.parametrize("offset", [0, 4], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("width", [4096, 4100])
@pytest.mark.parametrize("spec", pairwise()[::3], ids=lambda spec: spec.op_type)
def test_many_rows_are_as_one_by_one(
    kernels: Kernels, spec: OpSpec, width: int, offset: int
) -> None:
    """They are stored past the caches where that can be."""
    rows = 70
    arrays = {name: placed(a, 0) for name, a in inputs(spec, rows, width, "normal").items()}
    for name, outputs in zip(symbols(spec), (spec.outputs, spec.outputs[:1]), strict=False):
        function = kernels.function(name)
        made = [
            [placed(np.zeros((rows, width), DTYPES[slot.dtype].numpy), offset) for slot in outputs]
            for _ in range(2)
        ]
        operands = [_bare(array) for array in arrays.values()]
        for results, step in zip(made, (rows - 1, 1), strict=True):
            given = [_bare(array) for array in results]
            for begin in range(0, rows - 1, step):
                function(*operands, *given, begin, begin + step, *attributes(spec).values())
        for many, single in zip(*made, strict=True):
            assert np.array_equal(_bits(many), _bits(single))
            assert _bits(many)[:-1].any()
            assert not _bits(many)[-1].any()


def _bare(array: np.ndarray) -> np.ndarray:
    """As kernels take it: bf16 as its bits."""
    return array.view(np.uint16) if array.dtype.name == "bfloat16" else array


@pytest.mark.parametrize("spec", pairwise(), ids=lambda spec: spec.op_type)
def test_outputs_may_lie_where_inputs_do(kernels: Kernels, spec: OpSpec) -> None:
    held = [index for index, slot in enumerate(spec.inputs) if slot.layout == "row"]
    for name, outputs in zip(symbols(spec), (spec.outputs, spec.outputs[:1]), strict=False):
        function, numbers = kernels.function(name), attributes(spec).values()
        for rows, width in ((3, 17), (2, 1000), (17, 4096)):
            arrays = list(inputs(spec, rows, width, "normal").values())
            apart = [np.zeros((rows, width), DTYPES[slot.dtype].numpy) for slot in outputs]
            function(*map(_bare, arrays), *map(_bare, apart), 0, rows, *numbers)
            for places in itertools.permutations(held, len(outputs)):
                if any(arrays[i].dtype != y.dtype for i, y in zip(places, apart, strict=True)):
                    continue
                shared = [array.copy() for array in arrays]
                results = [shared[index] for index in places]
                function(*map(_bare, shared), *map(_bare, results), 0, rows, *numbers)
                for mine, other in zip(results, apart, strict=True):
                    assert np.array_equal(_bits(mine), _bits(other))


@pytest.mark.parametrize("level", ["x86-64-v2", "x86-64-v3", "x86-64-v4"])
def test_large_outputs_pass_the_caches(level: str) -> None:
    for spec in (Norm(skip=True), Gated("gelu")):
        assembly = compile_module([spec], Target.parse(level)).inspect_source("asm")
        assert "movnt" in assembly
        assert "lock" in assembly  # the fence
