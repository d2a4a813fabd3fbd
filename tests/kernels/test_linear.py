"""Linear kernels inside onnxruntime against float64: every tile, tail, level and thread count."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from fusenorm.kernels import symbols
from fusenorm.kernels.registers import LANES, Tile
from fusenorm.lower import Target, build_library
from fusenorm.lower.library import compile_module
from fusenorm.ops import DTYPES, Linear
from fusenorm.ops.linear import PANEL, unpack
from tests.kernels.cases import evaluate, pairwise
from tests.ops.test_linear_op import BETA, model

pytestmark = pytest.mark.kernel

SPECS = pairwise(spec for spec in Linear.variants() if spec.dtype != "f64")
SHAPED = [
    Linear(bias=True),
    Linear("gelu"),
    Linear("swish", gated=True),
    Linear("swish", gated=True, bias=True, dtype="f16"),
    Linear(bias=True, maps=3),
]
MAPS = [Linear(bias=True, maps=2), Linear(maps=3)]
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
        [*SPECS, *SHAPED, Linear(), Linear("relu", bias=True), *MAPS],
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


def feeds(spec: Linear, rows: tuple[int, ...], inner: int, columns: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng([inner, columns, *rows])
    panels = columns // PANEL * (2 if spec.gated else 1)
    given = {}
    for slot in spec.inputs:
        # Maps of one x, the second twice as wide as the first and so on.
        wider = int(slot.name[-1]) + 1 if spec.maps > 1 and slot.layout != "row" else 1
        shape = {
            "row": (*rows, inner),
            "panels": (wider * panels, inner, PANEL),
            "vector": (wider * columns,),
        }[slot.layout]
        given[slot.name] = random.standard_normal(shape).astype(DTYPES[slot.dtype].numpy)
    return given


def round_each(spec: Linear, given: dict[str, np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """The op with sums in float64 and a rounding to f16 at every node; y and its factors."""
    wide = {name: array.astype(np.float64) for name, array in given.items()}
    panels = [wide["weight"][part::2] for part in (0, 1)] if spec.gated else [wide["weight"]]
    names = ("gate_bias", "up_bias") if spec.gated else ("bias",)
    parts = []
    for part, name in zip(panels, names, strict=True):
        value = (wide["x"] @ unpack(part)).astype(np.float16)
        parts.append(value + given[name] if spec.bias else value)
    if not spec.gated and spec.activation == "identity":
        return parts[0], parts
    inputs = ("gate", "up") if spec.gated else ("x",)
    return evaluate(spec.unit, dict(zip(inputs, parts, strict=True)))[0], parts


def check(spec: Linear, given: dict[str, np.ndarray], made: list[np.ndarray]) -> None:
    """Each map against what it is alone."""
    assert len(made) == spec.maps
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
    if spec.dtype == "f16":
        rounded, parts = round_each(spec, given)
        assert (made.shape, made.dtype) == (rounded.shape, rounded.dtype)
        sizes = [np.maximum(np.abs(part.astype(np.float64)), 1.0) for part in parts]
        scale = np.prod(sizes, axis=0) * (2 * sizes[0] if steep else 1.0)
        points = 2 + 2 * spec.gated + 6 * (spec.precision == "storage")
        error = np.abs(made.astype(np.float64) - rounded)
        assert np.all(error <= points * scale * 2.0**-10)
        # In GELU's tail 1 + erf cancels, and long sums meet ties: the last bits are those of f32.
        if given["x"].shape[-1] > 64:
            return
        plain = np.abs(rounded) > 2.0**-6
        assert np.mean(made[plain] == rounded[plain]) >= 0.99
        return
    (want,) = spec.reference(given, dict.fromkeys(spec.attributes, BETA))
    assert made.shape == want.shape
    magnitudes = {name: np.abs(array) for name, array in given.items()}
    (magnitude,) = Linear("identity", gated=spec.gated, bias=spec.bias).reference(magnitudes, {})
    scale = np.maximum(magnitude, 1.0) * (2 * magnitude if steep else 2.0)
    assert np.all(np.abs(made - want) <= 4 * np.finfo(np.float32).eps * scale)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.op_type)
def test_every_op_and_row_count(spec: Linear, library: Path) -> None:
    run = session(spec, library)
    for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 17):
        given = feeds(spec, (rows,), 33, 2 * PANEL)
        check(spec, given, run.run(None, given))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("spec", SHAPED, ids=lambda spec: spec.op_type)
def test_shapes_and_threads(spec: Linear, library: Path, threads: int) -> None:
    for rows, inner, columns in [
        ((2, 3), 1, PANEL), ((1, 1), 768, 96), ((250,), 700, 160), ((3, 33), 64, 1024),
        ((1,), 2048, 2048), ((60,), 5000, PANEL), ((2000,), 300, 11 * PANEL),
    ]:  # fmt: skip
        given = feeds(spec, rows, inner, columns)
        run = session(spec, library, threads, len(rows) + 1)
        check(spec, given, run.run(None, given))


def test_no_rows(library: Path) -> None:
    spec = Linear("relu", bias=True)
    given = feeds(spec, (0, 3), 8, PANEL)
    assert session(spec, library, rank=3).run(None, given)[0].shape == (0, 3, PANEL)


def test_nan_and_infinity_travel(library: Path) -> None:
    for spec in (Linear(), *SHAPED[:-1]):
        given = feeds(spec, (9,), 8, PANEL)
        given["x"][3, 2] = np.nan
        (made,) = session(spec, library).run(None, given)
        assert np.isnan(made[3]).all()
        assert np.isfinite(np.delete(made, 3, axis=0)).all()


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("weight", (2, 9, PANEL), "panels as high as the last axis of x"),
        ("weight", (2, 8, 16), "panels as high as the last axis of x"),
        ("bias", (32,), "vector as long as the weight has columns"),
    ],
)
def test_wrong_shapes_are_refused(
    library: Path, name: str, shape: tuple[int, ...], message: str
) -> None:
    spec = Linear(bias=True)
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


@pytest.mark.parametrize("spec", SHAPED[:3], ids=lambda spec: spec.op_type)
def test_the_loop_of_products_keeps_its_sums_in_registers(spec: Linear) -> None:
    """Whatever the epilogue needs, its constants must not push the sums to the stack."""
    target = Target.parse("x86-64-v4")
    tile = Tile.of(spec, LANES[target.level])
    assembly = compile_module([spec], target).inspect_source("asm")
    blocks = re.split(r"^\.LBB.*$", assembly, flags=re.MULTILINE)
    products = tile.rows * tile.vectors * tile.parts
    (loop,) = (block for block in blocks if block.count("vfmadd231ps") == products)
    assert [line for line in loop.splitlines() if "rsp" in line and "zmm" in line] == []


@pytest.mark.parametrize("level", LANES)
def test_ops_of_one_type_lay_out_rows_alike(level: str) -> None:
    """A library holds the function once, so each op must make the same."""
    import tvm_ffi

    from fusenorm.kernels import linear

    plain, gated = Linear(), Linear("swish", gated=True)
    assert symbols(plain)[1] == symbols(gated)[1]
    one, other = (linear.functions(spec, LANES[level])[1] for spec in (plain, gated))
    assert tvm_ffi.structural_equal(one, other)
