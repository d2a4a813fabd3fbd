"""Kernels against the oracles: float64 for f32, the body node by node for 16 bits."""

from __future__ import annotations

import numpy as np
import pytest

from fusenorm.lower import Target
from fusenorm.ops import DTYPES, OpSpec
from fusenorm.runtime.direct import Kernels
from tests.kernels.cases import (
    FILLS,
    attributes,
    columns,
    evaluate,
    f32_bound,
    inputs,
    misaligned,
    pairwise,
    rounding_points,
    ulps,
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
            if spec.dtype == "f32":
                check_f32(spec, values, made)
            else:
                check_16(spec, values, made, fill)


def check_f32(spec: OpSpec, values: dict[str, np.ndarray], made: list[np.ndarray]) -> None:
    with np.errstate(all="ignore"):
        references = spec.reference(values, attributes(spec))
    for array, reference in zip(made, references, strict=True):
        unknown = np.isnan(reference)
        assert np.array_equal(np.isnan(array), unknown)
        error = np.abs(array.astype(np.float64) - reference)
        valid = ~unknown.any(-1)
        bound = np.broadcast_to(f32_bound(spec, values, reference), reference.shape)
        assert (error <= bound)[valid].all(), float((error / bound)[valid].max())


def check_16(
    spec: OpSpec, values: dict[str, np.ndarray], made: list[np.ndarray], fill: str
) -> None:
    expected = evaluate(spec, values)
    for array, graph in zip(made, expected, strict=True):
        distance = ulps(array, graph)
        # A share needs many elements and different ones; behind a large mean, the last bit of
        # that mean already shifts more than it allows.
        few = distance.size < 3000 or fill not in ("normal", "nan")
        assert few or (distance == 0).mean() >= 0.998
        with np.errstate(all="ignore"):
            error = np.abs(array.astype(np.float64) - graph.astype(np.float64))
            slack = f32_bound(spec, values, graph.astype(np.float64))
            if getattr(spec, "affine", "f32") == "storage":
                # One step of the normalised value, however little of it the bias leaves.
                slack = slack + DTYPES[spec.dtype].epsilon * (
                    np.abs(graph.astype(np.float64)) + 1.5
                )
            close = error <= np.broadcast_to(slack, error.shape)
        assert ((distance <= rounding_points(spec)) | close).all(), int(distance.max())


@pytest.mark.parametrize("spec", pairwise()[::5], ids=lambda spec: spec.op_type)
def test_no_rows_give_no_rows(kernels: Kernels, spec: OpSpec) -> None:
    for array, slot in zip(
        results(kernels, spec, inputs(spec, 0, 64, "normal")), spec.outputs, strict=True
    ):
        assert array.shape == (0, 64)
        assert array.dtype == DTYPES[slot.dtype].numpy
