"""CUDA kernels, as the text nvcc compiles, run thread by thread on the CPU against the oracles."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest

from fusenorm.kernels import row_program
from fusenorm.ops import DTYPES, Gated, Norm, OpSpec
from tests.kernels.cases import FILLS, attributes, check, columns, inputs, some
from tests.kernels.emulated import Emulated, Guarded, emulate

pytestmark = pytest.mark.kernel

OPS = some()
# Some widths of the case table have kernels of their own, the others take the general ones.
SPECIALISED = (1, 9, 64, 1000)
BATCH = 12
LARGE: tuple[OpSpec, ...] = (
    Norm(True, True, "bf16", "bf16", "bf16", alpha=True, layer_scale=True),
    Norm(skip=True),
    Norm(True, dtype="f16", scale="f32", bias="f32"),
    Norm(dtype="bf16", scale=None),
    Gated("swish", "gate_up", "bf16"),
    Gated("gelu", "interleaved"),
)
CENTRED = Norm(True)
LARGE_WIDTHS = (768, 4096, 8192, 11008, 32768, 65536)


def batched(specs: Iterable[OpSpec]) -> list[Any]:
    """Parameters, of which one process tests all that are in a library (--dist loadgroup)."""
    return [
        pytest.param(
            spec,
            id=spec.op_type,
            marks=pytest.mark.xdist_group(f"library {OPS.index(spec) // BATCH}"),
        )
        for spec in specs
    ]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory):
    """The library that holds an op, built when its first op is asked for."""
    built: dict[int, Emulated] = {}

    def get(spec: OpSpec) -> Emulated:
        batch = OPS.index(spec) // BATCH
        if batch not in built:
            part = OPS[batch * BATCH : (batch + 1) * BATCH]
            built[batch] = emulate(
                dict.fromkeys(part, SPECIALISED), tmp_path_factory.mktemp("serial")
            )
        return built[batch]

    return get


of_large = pytest.mark.xdist_group("large")


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    return emulate(dict.fromkeys((*LARGE, CENTRED), LARGE_WIDTHS), tmp_path_factory.mktemp("large"))


def run(
    library: Emulated,
    spec: OpSpec,
    values: dict[str, np.ndarray],
    *,
    offset: int = 0,
    gap: int = 0,
) -> tuple[list[np.ndarray], int]:
    """The outputs and the widest access in bytes; without the second output y is the same."""
    rows, width = values[spec.inputs[0].name].shape
    width //= 2 if spec.inputs[0].layout == "packed" else 1
    given = [Guarded(slot, values[slot.name], offset, gap) for slot in spec.inputs]
    made = []
    for count in range(len(spec.outputs), 0, -1):
        empty = [
            np.full((rows, width), np.nan, DTYPES[slot.dtype].numpy)
            for slot in spec.outputs[:count]
        ]
        outputs = [
            Guarded(slot, array, offset, gap)
            for slot, array in zip(spec.outputs, empty, strict=False)
        ]
        arrays = [guarded.array for guarded in outputs]
        widest = library(spec, [item.array for item in given], arrays, attributes(spec))
        assert all(guarded.untouched() for guarded in (*given, *outputs))
        made.append((arrays, widest))
    for slot, item in zip(spec.inputs, given, strict=True):
        assert item.array.tobytes() == values[slot.name].tobytes()
    assert all(arrays[0].tobytes() == made[0][0][0].tobytes() for arrays, _ in made)
    return made[0]


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("spec", batched(OPS))
def test_agrees_with_the_oracle(library, spec: OpSpec, fill: str) -> None:
    if fill == "largest" and spec.dtype != "f16":
        pytest.skip("the squares overflow f32 as well: nothing to compare")
    for width in columns(8):
        for rows in (1, 3):
            values = inputs(spec, rows, width, fill)
            check(spec, values, run(library(spec), spec, values)[0], fill)


@pytest.mark.parametrize("spec", batched(OPS[::2]))
@pytest.mark.parametrize(("offset", "gap"), [(1, 0), (0, 1), (0, 8), (8, 0), (3, 16)])
def test_any_place_and_stride(library, spec: OpSpec, offset: int, gap: int) -> None:
    for width in (1, 9, 64, 72):
        values = inputs(spec, 5, width, "normal")
        made, widest = run(library(spec), spec, values, offset=offset, gap=gap)
        check(spec, values, made, "normal")
        if width in (64, 72):
            aligned = offset % 8 == 0 and gap % 8 == 0
            assert widest == (16 if aligned and not (gap and row_program(spec).flat) else 0)


@pytest.mark.parametrize("spec", batched(OPS[1::2]))
@pytest.mark.parametrize("rows", [0, 2, 17, 300])
def test_any_number_of_rows(library, spec: OpSpec, rows: int) -> None:
    for width in (9, 64, 40):
        values = inputs(spec, rows, width, "normal")
        check(spec, values, run(library(spec), spec, values)[0], "normal")


@of_large
@pytest.mark.parametrize("width", [*LARGE_WIDTHS, 4104, 100000])
@pytest.mark.parametrize("spec", LARGE, ids=lambda spec: spec.op_type)
def test_long_rows(large: Emulated, spec: OpSpec, width: int) -> None:
    for rows in (1, 2):
        values = inputs(spec, rows, width, "normal")
        made, widest = run(large, spec, values)
        assert widest == 16
        check(spec, values, made, "normal")


@of_large
@pytest.mark.parametrize("fill", ["large mean", "nan"])
@pytest.mark.parametrize("spec", [*LARGE[:4], CENTRED], ids=lambda spec: spec.op_type)
def test_split_rows(large: Emulated, spec: OpSpec, fill: str) -> None:
    values = inputs(spec, 3, 50000, fill)
    check(spec, values, run(large, spec, values, gap=8)[0], fill)


@of_large
@pytest.mark.parametrize(
    ("rows", "width", "parts"),
    [
        (1, 32776, 8),
        (2, 1 << 21, 128),
        (100, 32776, 2),
        (129, 32776, 1),
        (1, 32768, 1),
        (1, 32775, 1),
    ],
)
def test_few_long_rows_are_shared_out(large: Emulated, rows: int, width: int, parts: int) -> None:
    spec = LARGE[3]
    values = inputs(spec, rows, width, "normal")
    check(spec, values, run(large, spec, values)[0], "normal")
    assert large.blocks() == rows * parts


@of_large
def test_few_long_rows_of_a_gated_unit_are_shared_out(large: Emulated) -> None:
    for width in (11008, 40000):
        run(large, LARGE[4], inputs(LARGE[4], 2, width, "normal"))
        assert large.blocks() >= 2 * width // 4096


@of_large
def test_wrong_arguments_are_named(large: Emulated) -> None:
    spec = LARGE[1]
    values = inputs(spec, 3, 768, "normal")
    outputs = [np.empty((3, 768), np.float32) for _ in spec.outputs]

    def call(change: dict[str, np.ndarray], made: Sequence[np.ndarray] = outputs) -> None:
        large(spec, list((values | change).values()), made, attributes(spec))

    call({})
    with pytest.raises(ValueError, match=r"skip\.shape\[0\].* argument #1"):
        call({"skip": values["skip"][:2].copy()})
    with pytest.raises(ValueError, match=r"scale\.shape\[0\]"):
        call({"scale": values["scale"][:700].copy()})
    with pytest.raises(ValueError, match=r"x\.strides"):
        call({"x": np.asfortranarray(values["x"])})


@of_large
@pytest.mark.parametrize("columns", [2 * 3072 - 2, 3072, 4 * 3072])
def test_a_packed_row_is_twice_as_long(large: Emulated, columns: int) -> None:
    spec = LARGE[4]
    x = np.zeros((2, columns), DTYPES["bf16"].numpy)
    y = np.full((2, 3072), 7, DTYPES["bf16"].numpy)
    with pytest.raises(ValueError, match=r"x\.shape\[1\]"):
        large(spec, [x], [y], attributes(spec))
    assert (y == 7).all()


@of_large
def test_more_rows_than_a_launch_has_blocks(large: Emulated) -> None:
    spec = LARGE[3]
    row = np.zeros((1, 8), DTYPES["bf16"].numpy)
    many = np.broadcast_to(row, (2**31, 8))  # one row, seen that often
    with pytest.raises(RuntimeError, match="at most 2147483647 rows"):
        large(spec, [many], [many], attributes(spec))
