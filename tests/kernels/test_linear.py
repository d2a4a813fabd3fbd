"""Linear kernels inside onnxruntime against float64: every tile, tail, level and thread count.

Those of bf16 are called directly: onnxruntime could not run their bodies.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnxruntime as ort
import pytest

from fusenorm.kernels import symbols
from fusenorm.kernels.registers import LANES, Tile
from fusenorm.lower import Target, build_library
from fusenorm.lower.library import compile_module
from fusenorm.ops import DTYPES, Linear, Norm
from fusenorm.ops.linear import PANEL, unpack
from fusenorm.runtime.direct import open_library
from tests.guarded import guarded
from tests.kernels.cases import FILLS, evaluate, inputs, misaligned, pairwise
from tests.ops.test_linear_op import NUMBERS, model, numbers

pytestmark = pytest.mark.kernel

Run: TypeAlias = Callable[[dict[str, np.ndarray]], list[np.ndarray]]

SHAPED = [
    Linear(bias=True),
    Linear("gelu"),
    Linear("swish", gated=True),
    Linear(bias=True, residual=True, alpha=True),
    Linear(dtype="f16", residual=True, alpha=True),
    Linear("swish", gated=True, bias=True, dtype="f16"),
    Linear(bias=True, maps=3),
]
RAGGED = [
    Linear(bias=True, ragged=True),
    Linear("gelu", bias=True, ragged=True, norm="ln"),
    Linear("swish", gated=True, bias=True, ragged=True),
    Linear(bias=True, dtype="f16", ragged=True),
    Linear("swish", gated=True, bias=True, dtype="f16", precision="storage", ragged=True),
    Linear("relu", bias=True, dtype="bf16", ragged=True),
]
NORMED = [
    Linear(bias=True, maps=2, norm="rms"),
    Linear("swish", gated=True, norm="ln"),
    Linear(residual=True, norm="ln"),
    Linear(bias=True, dtype="f16", norm="rms"),
    Linear("gelu", bias=True, dtype="f16", norm="ln"),
]
IN_BF16 = [
    Linear("swish", True, True, "bf16", "storage"),
    Linear(bias=True, dtype="bf16", maps=2),
    Linear(bias=True, dtype="bf16", norm="ln"),
]
SPECS = pairwise(
    [
        *(spec for spec in Linear.variants() if spec.dtype in ("f32", "f16")),
        *IN_BF16,
        *(spec for spec in Linear.variants() if spec.dtype == "bf16"),
    ]
)
MAPS = [Linear(bias=True, maps=2), Linear(maps=3)]
ALONE = [
    *(dataclasses.replace(spec, norm="none") for spec in NORMED),
    *(Norm(centred, dtype=spec.dtype, scale=None) for spec in NORMED for centred in (False, True)),
    *(Norm(centred, dtype="bf16", scale=None) for centred in (False, True)),
]
SHAPES = [
    ((2, 3), 1, PANEL), ((1, 1), 768, 96), ((250,), 700, 160), ((3, 33), 64, 1024),
    ((1,), 2048, 2048), ((60,), 5000, PANEL), ((2000,), 300, 11 * PANEL),
]  # fmt: skip
# How many bits are as the body has them: a long sum in f32 meets more ties of f16.
EQUAL = {"f16": 0.99, "bf16": 0.998}
LEVELS = [
    level
    for level in ("x86-64-v2", "x86-64-v3", "x86-64-v4", "aarch64")
    if Target.parse(level).machine == Target.host().machine
    and set(Target.parse(level).features) <= set(Target.host().features)
]


@pytest.fixture(scope="module", params=LEVELS)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("linear") / f"{request.param}.so"
    build_library(
        [*ALONE, *SPECS, *SHAPED, *RAGGED, *NORMED, Linear(), Linear("relu", bias=True), *MAPS],
        Target.parse(request.param),
        path,
    )
    return path


def session(spec: Linear, library: Path, threads: int = 1, rank: int = 2) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library))
    return ort.InferenceSession(model(spec, 18, rank).SerializeToString(), options)


def running(spec: Linear, library: Path) -> Run:
    """The op in onnxruntime, of bf16 called."""
    if spec.dtype == "bf16":
        return called(spec, library)
    return functools.partial(session(spec, library).run, None)


def called(spec: Linear, library: Path) -> Run:
    """The op called without onnxruntime, on arrays aligned to their elements only."""
    op = open_library(library)[spec.op_type]

    def call(given: dict[str, np.ndarray]) -> list[np.ndarray]:
        arrays = [misaligned(array) for array in given.values()]
        made = op(*arrays, **numbers(spec))
        return list(made) if isinstance(made, tuple) else [made]

    return call


def feeds(spec: Linear, rows: tuple[int, ...], inner: int, columns: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng([inner, columns, *rows])
    panels = math.ceil(columns / PANEL) * spec.parts
    given = {}
    for slot in spec.inputs:
        # Maps of one x, the second twice as wide as the first and so on.
        wider = int(slot.name[-1]) + 1 if spec.maps > 1 and slot.layout != "row" else 1
        shape = {
            "x": (*rows, inner),
            "residual": (*rows, columns),
            "panels": (wider * panels, inner, PANEL),
            "vector": (wider * columns,),
        }[slot.name if slot.layout == "row" else slot.layout]
        given[slot.name] = random.standard_normal(shape).astype(DTYPES[slot.dtype].numpy)
    return given


def round_each(spec: Linear, given: dict[str, np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """The op with sums in float64 and a rounding to 16 bits at every node; y and its factors."""
    wide = {name: array.astype(np.float64) for name, array in given.items()}
    panels = [wide["weight"][part::2] for part in (0, 1)] if spec.gated else [wide["weight"]]
    names = ("gate_bias", "up_bias") if spec.gated else ("bias",)
    parts = []
    for part, name in zip(panels, names, strict=True):
        value = (wide["x"] @ unpack(part)).astype(given["x"].dtype)
        value = value[..., : given[name].size] if spec.ragged else value
        parts.append(value + given[name] if spec.bias else value)
    if spec.residual:
        row = given["residual"] * given["x"].dtype.type(NUMBERS["alpha"] if spec.alpha else 1)
        return parts[0] + row, [*parts, row]
    if not spec.gated and spec.activation == "identity":
        return parts[0], parts
    inputs = ("gate", "up") if spec.gated else ("x",)
    return evaluate(spec.unit, dict(zip(inputs, parts, strict=True)))[0], parts


def normalised(spec: Linear, x: np.ndarray, library: Path) -> np.ndarray:
    """What the products read: in 16 bits the rows the norm's own kernel makes, which are held to
    its body's elsewhere, so that what is compared here is as near as without a norm.
    """
    if spec.prologue is None:
        return x
    own = numbers(spec.prologue)
    if spec.dtype in EQUAL:
        return open_library(library)[spec.prologue.op_type](x, **own)  # type: ignore[return-value]
    return spec.prologue.reference({"x": x}, own)[0]


def check(
    spec: Linear, given: dict[str, np.ndarray], made: list[np.ndarray], library: Path
) -> None:
    """Each map against what it is alone."""
    assert len(made) == spec.maps
    given = given | {"x": normalised(spec, given["x"], library)}
    spec = dataclasses.replace(spec, norm="none")
    names = [slot.name for slot in spec.one.inputs]
    reads = len(names) - 1
    for index, y in enumerate(made):
        own = list(given.values())[1 + index * reads : 1 + (index + 1) * reads]
        check_one(spec.one, dict(zip(names, [given["x"], *own], strict=True)), y)


def check_one(spec: Linear, given: dict[str, np.ndarray], made: np.ndarray) -> None:
    """|error| <= 4·eps·(sum of magnitudes) carried through the activation.

    In 16 bits the oracle is the body node by node: one unit in the last place of the product of
    the factors' sizes per rounding point, and nearly all bits equal.
    """
    steep = spec.activation == "relu2"
    if spec.dtype in EQUAL:
        rounded, parts = round_each(spec, given)
        assert (made.shape, made.dtype) == (rounded.shape, rounded.dtype)
        sizes = [np.maximum(np.abs(part.astype(np.float64)), 1.0) for part in parts]
        scale = np.prod(sizes, axis=0) * (2 * sizes[0] if steep else 1.0)
        points = 2 + 2 * (spec.gated + spec.residual) + 6 * (spec.precision == "storage")
        error = np.abs(made.astype(np.float64) - rounded)
        assert np.all(error <= points * scale * DTYPES[spec.dtype].epsilon)
        # In GELU's tail 1 + erf cancels, and long sums meet ties: the last bits are those of f32.
        if given["x"].shape[-1] > 64:
            return
        plain = np.abs(rounded) > 2.0**-6
        differing = np.count_nonzero(made[plain] != rounded[plain])
        assert differing <= (1 - EQUAL[spec.dtype]) * np.count_nonzero(plain)
        return
    (want,) = spec.reference(given, numbers(spec))
    assert made.shape == want.shape
    magnitudes = {name: np.abs(array) for name, array in given.items()}
    summed = dataclasses.replace(spec, activation="identity", alpha=False)
    (magnitude,) = summed.reference(magnitudes, {})
    scale = np.maximum(magnitude, 1.0) * (2 * magnitude if steep else 2.0)
    assert np.all(np.abs(made - want) <= 4 * np.finfo(np.float32).eps * scale)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.op_type)
def test_every_op_and_row_count(spec: Linear, library: Path) -> None:
    run = running(spec, library)
    for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 17, 29):
        given = feeds(spec, (rows,), 33, 2 * PANEL - 5 * spec.ragged)
        check(spec, given, run(given), library)


@pytest.mark.parametrize("spec", RAGGED, ids=lambda spec: spec.op_type)
def test_any_number_of_columns(spec: Linear, library: Path) -> None:
    """Nothing is read past the bias, nothing written past y; what lies behind a row stays."""
    run = called(spec, library)
    for columns, rows in itertools.product((1, 3, 7, 8, 15, 16, 17, 31, 33, 50, 95), (1, 2, 29)):
        given = feeds(spec, (rows,), 21, columns)
        made = run(given)
        check(spec, given, made, library)
        if spec.dtype != "bf16":
            running = session(spec, library, 2)
            binding, y = running.io_binding(), guarded(np.full_like(made[0], np.nan))
            for name, array in given.items():
                binding.bind_cpu_input(name, guarded(array))
            binding.bind_output("y", "cpu", 0, y.dtype, y.shape, y.ctypes.data)
            running.run_with_iobinding(binding)
            assert np.array_equal(y, made[0])


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("spec", [*SHAPED, *NORMED, RAGGED[0]], ids=lambda spec: spec.op_type)
def test_shapes_and_threads(spec: Linear, library: Path, threads: int) -> None:
    for rows, inner, columns in SHAPES:
        given = feeds(spec, rows, inner, columns - spec.ragged)
        run = session(spec, library, threads, len(rows) + 1)
        check(spec, given, run.run(None, given), library)


@pytest.mark.parametrize(
    "spec", [SHAPED[0], SHAPED[3], SHAPED[5], *NORMED, *IN_BF16], ids=lambda spec: spec.op_type
)
def test_shapes_called_directly(spec: Linear, library: Path) -> None:
    run = called(spec, library)
    for rows, inner, columns in SHAPES:
        given = feeds(spec, rows, inner, columns)
        made = run(given)
        if spec.dtype == "bf16":
            check(spec, given, made, library)
        else:
            wanted = session(spec, library, rank=len(rows) + 1).run(None, given)
            assert all(map(np.array_equal, made, wanted))


def test_no_rows(library: Path) -> None:
    spec = Linear("relu", bias=True)
    given = feeds(spec, (0, 3), 8, PANEL)
    assert session(spec, library, rank=3).run(None, given)[0].shape == (0, 3, PANEL)
    for op in (spec, *IN_BF16):
        given = feeds(op, (0, 3), 8, PANEL)
        assert called(op, library)(given)[0].shape == (0, 3, PANEL)


def test_nan_and_infinity_travel(library: Path) -> None:
    for spec in (Linear(), *SHAPED[:-1], *NORMED, *IN_BF16):
        given = feeds(spec, (9,), 8, PANEL)
        given["x"][3, 2] = np.nan
        run = running(spec, library)
        for made in run(given):
            assert np.isnan(made[3]).all()
            assert np.isfinite(np.delete(made, 3, axis=0)).all()


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("weight", (2, 9, PANEL), "panels as high as the last axis of x"),
        ("weight", (2, 8, 16), "panels as high as the last axis of x"),
        ("bias", (32,), "vector as long as the weight has columns"),
        ("ragged bias", (32,), "as many panels as its bias has numbers"),
        ("ragged bias", (65,), "as many panels as its bias has numbers"),
        ("ragged bias", (0,), "as many panels as its bias has numbers"),
        ("residual", (2, PANEL), "'residual' does not have the shape of y"),
        ("residual", (1, 2 * PANEL), "'residual' does not have the shape of y"),
    ],
)
def test_wrong_shapes_are_refused(
    library: Path, name: str, shape: tuple[int, ...], message: str
) -> None:
    ragged, name = name.startswith("ragged"), name.split()[-1]
    spec = RAGGED[0] if ragged else SHAPED[3]
    given = feeds(spec, (2,), 8, 2 * PANEL)
    given[name] = np.zeros(shape, np.float32)
    with pytest.raises(Exception, match=message):
        session(spec, library).run(None, given)


def test_a_gated_weight_holds_pairs_of_panels(library: Path) -> None:
    spec = Linear("swish", gated=True)
    given = feeds(spec, (2,), 8, PANEL) | {"weight": np.zeros((3, 8, PANEL), np.float32)}
    with pytest.raises(Exception, match="panels"):
        session(spec, library).run(None, given)


@pytest.mark.parametrize("maps", [2, 3])
def test_maps_of_one_x_are_bit_for_bit_each_alone(library: Path, maps: int) -> None:
    spec = Linear(bias=True, maps=maps)
    given = feeds(spec, (40,), 300, 3 * PANEL)
    together = session(spec, library, 3).run(None, given)
    alone = session(spec.one, library, 3)
    for index, y in enumerate(together):
        own = {name: given[f"{name}_{index}"] for name in ("weight", "bias")}
        assert np.array_equal(y, alone.run(None, {"x": given["x"], **own})[0])


def test_a_map_nothing_reads_is_left_out(library: Path) -> None:
    spec = Linear(maps=3)
    proto = model(spec, 18, 2)
    proto.graph.node[0].output[1] = ""
    del proto.graph.output[1]
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(library))
    run = ort.InferenceSession(proto.SerializeToString(), options)
    given = feeds(spec, (17,), 40, PANEL)
    first, last = run.run(None, given)
    check_one(spec.one, {"x": given["x"], "weight": given["weight_0"]}, first)
    check_one(spec.one, {"x": given["x"], "weight": given["weight_2"]}, last)


def test_the_shape_of_every_output_is_inferred(library: Path) -> None:
    proto = model(Linear(maps=3), 18, 3)
    for value in proto.graph.output:
        value.type.tensor_type.ClearField("shape")
    for index, value in enumerate(proto.graph.input[1:]):
        for dim, size in zip(value.type.tensor_type.shape.dim, (index + 1, 8, PANEL), strict=True):
            dim.dim_value = size
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(library))
    run = ort.InferenceSession(proto.SerializeToString(), options)
    shapes = [value.shape for value in run.get_outputs()]
    assert shapes == [["x0", "x1", width * PANEL] for width in (1, 2, 3)]


def test_the_columns_of_a_ragged_op_are_inferred_from_its_bias(library: Path) -> None:
    proto = model(RAGGED[0], 18, 3)
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    proto.graph.input[2].type.tensor_type.shape.dim[0].dim_value = 41
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(library))
    run = ort.InferenceSession(proto.SerializeToString(), options)
    assert run.get_outputs()[0].shape == ["x0", "x1", 41]


@pytest.mark.parametrize("spec", SHAPED[3:5], ids=lambda spec: spec.op_type)
@pytest.mark.parametrize("threads", [1, 3])
def test_y_may_lie_where_the_residual_does(spec: Linear, library: Path, threads: int) -> None:
    run = session(spec, library, threads)
    for rows in (1, 2, 29, 300):
        given = feeds(spec, (rows,), 300, 11 * PANEL)
        (want,) = run.run(None, given)
        place = ort.OrtValue.ortvalue_from_numpy(given["residual"].copy())
        binding = run.io_binding()
        for name, array in given.items():
            binding.bind_cpu_input(name, array)
        binding.bind_ortvalue_input("residual", place)
        binding.bind_ortvalue_output("y", place)
        run.run_with_iobinding(binding)
        assert np.array_equal(place.numpy(), want)


@pytest.mark.parametrize("spec", NORMED, ids=lambda spec: spec.op_type)
def test_a_norm_in_front_gives_the_bits_of_the_norm_alone(spec: Linear, library: Path) -> None:
    """Which is held to float64 on rows of every kind; here a second pass or a rounding may lack."""
    prologue, plain = spec.prologue, dataclasses.replace(spec, norm="none")
    assert prologue is not None
    kernels = open_library(library)
    for rows in (1, 2, 3, 4, 7, 14, 29):
        for inner, fill in itertools.product((1, 33, 768), FILLS):
            given = feeds(spec, (rows,), inner, 2 * PANEL)
            given |= inputs(prologue, rows, inner, fill)
            x = kernels[prologue.op_type](given["x"], **numbers(prologue))
            wanted = session(plain, library).run(None, given | {"x": x})
            for made in (session(spec, library).run(None, given), called(spec, library)(given)):
                assert all(map(functools.partial(np.array_equal, equal_nan=True), made, wanted))


@pytest.mark.parametrize("rows", [1, 2, 29])
@pytest.mark.parametrize("spec", [SHAPED[3], NORMED[2]], ids=lambda spec: spec.op_type)
def test_y_may_lie_where_x_does_that_is_the_residual_too(
    spec: Linear, library: Path, rows: int
) -> None:
    run, width = session(spec, library), 11 * PANEL
    given = feeds(spec, (rows,), width, width)
    given["residual"] = given["x"]
    (want,) = run.run(None, given)
    place = ort.OrtValue.ortvalue_from_numpy(given["x"].copy())
    binding = run.io_binding()
    for name, array in given.items():
        binding.bind_cpu_input(name, array)
    for name in ("x", "residual"):
        binding.bind_ortvalue_input(name, place)
    binding.bind_ortvalue_output("y", place)
    run.run_with_iobinding(binding)
    assert np.array_equal(place.numpy(), want)


@pytest.mark.parametrize(
    "spec",
    [*SHAPED[:4], *RAGGED[:3], Linear(dtype="f16"), Linear("swish", gated=True, dtype="f16")],
    ids=lambda spec: spec.op_type,
)
def test_sums_stay_in_registers(spec: Linear) -> None:
    """Whatever the epilogue needs, its constants must not push them to the stack."""
    target = Target.parse("x86-64-v4")
    tile = Tile.of(LANES[target.level])
    assembly = compile_module([spec], target).inspect_source("asm")
    blocks = re.split(r"^\.LBB.*$", assembly, flags=re.MULTILINE)
    products = tile.rows * tile.vectors
    loops = [block for block in blocks if block.count("vfmadd231ps") == products]
    assert len(loops) == (2 if spec.dtype == "f32" else 3)
    for loop in loops:
        assert [line for line in loop.splitlines() if "rsp" in line and "zmm" in line] == []


@pytest.mark.parametrize("level", LANES)
def test_ops_of_one_type_lay_out_rows_alike(level: str) -> None:
    """A library holds the function once, so each op must make the same."""
    import tvm_ffi

    from fusenorm.kernels import linear

    plain = [Linear(), Linear("swish", gated=True), Linear(bias=True, residual=True)]
    for norm in ("none", "rms", "ln"):
        alike = [dataclasses.replace(spec, norm=norm) for spec in plain]  # type: ignore[arg-type]
        assert len({symbols(spec)[1] for spec in alike}) == 1
        one, *others = (linear.functions(spec, LANES[level])[1] for spec in alike)
        assert all(tvm_ffi.structural_equal(one, other) for other in others)
    assert len({symbols(Linear(norm=norm))[1] for norm in ("none", "rms", "ln")}) == 3  # type: ignore[arg-type]
