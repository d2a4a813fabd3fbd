"""CUDA kernels compiled by nvcc for every architecture, and what became of them."""

from __future__ import annotations

import os
from collections.abc import Iterable

import pytest

from fusenorm.errors import BadInput
from fusenorm.kernels import symbols
from fusenorm.kernels.cuda import Variant
from fusenorm.kernels.threads import BUSY, STREAM, access
from fusenorm.lower.nvcc import ARCHS, Nvcc
from fusenorm.ops import Gated, Norm, OpSpec, Slot
from tests.cuda_inspection import Inspected, inspect
from tests.kernels.cases import model_ops, pairwise

pytestmark = pytest.mark.kernel

SOME: dict[OpSpec, tuple[int, ...]] = {
    Norm(skip=True, dtype="bf16", scale="bf16"): (768, 8192),
    Norm(True, bias="f32"): (1000, 16384, 32768),
    Norm(True, dtype="bf16", scale="bf16", bias="bf16"): (16384,),
    Norm(dtype="f16", scale="f32"): (1002,),
    Gated("swish", "gate_up", "bf16"): (11008,),
    Gated("gelu", dtype="f16"): (),
}
BATCH = 16


def batches() -> list[dict[OpSpec, tuple[int, ...]]]:
    if not os.environ.get("FUSENORM_ALL_OPS"):
        return [SOME]
    every = SOME | dict.fromkeys(pairwise(), (64, 1000)) | model_ops()
    items = list(every.items())
    return [dict(items[at : at + BATCH]) for at in range(0, len(items), BATCH)]


@pytest.fixture(scope="module")
def nvcc() -> Nvcc:
    try:
        return Nvcc.find()
    except BadInput as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("specs", batches(), ids=lambda specs: next(iter(specs)).op_type)
def test_kernels_move_16_bytes_and_stay_in_registers(
    nvcc: Nvcc, specs: dict[OpSpec, tuple[int, ...]]
) -> None:
    for item in inspect(specs):
        label = f"{item.symbol} {item.variant.name} {item.launch}"
        assert set(item.usage) == set(ARCHS), label
        for usage in item.usage.values():
            assert (usage.stack, usage.spills) == (0, 0), label
            assert usage.registers <= 65536 // BUSY, label
        assert (set(item.loads), set(item.stores)) == accesses(item), label
        assert item.shuffles == shuffles(item), label
        if item.variant.name == "any D":
            assert item.stores == (128,), label


def accesses(item: Inspected) -> tuple[set[int], set[int]]:
    """Bits of the loads and of the stores."""
    variant, spec = item.variant, item.spec
    if variant.kernels == 1:
        return bits(spec.inputs, variant), bits(spec.outputs, variant)
    first, last = item.launch == 0, item.launch == variant.kernels - 1
    with_sum = len(spec.outputs) == 2 and item.symbol == symbols(spec, "cuda")[0]
    # Sums of parts are single f32; the rows, the sum of two of them too, move in whole groups.
    loads = {128} if first else {32, 128}
    return loads, {128} if last else {32, 128} if first and with_sum else {32}


def bits(slots: Iterable[Slot], variant: Variant) -> set[int]:
    """Of the pieces these tensors move in; the end of a flat line moves by elements."""
    vectors = (variant.vector, 1) if variant.flat else (variant.vector,)
    return {8 * access(slot, vector) for slot in slots for vector in vectors}


def shuffles(item: Inspected) -> int:
    """A halving per shuffle: within warps, then across the warps of a row."""
    if not isinstance(item.spec, Norm):
        return 0
    levels, tile = 1 + item.spec.centred, item.variant.tile
    threads = tile.threads if tile else STREAM
    totals = levels if item.variant.kernels == 1 else min(item.launch + 1, levels)
    return totals * (threads - 1).bit_length()
