"""Attention kernels inside onnxruntime against float64: layouts, masks, tails, sizes, levels."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from fusenorm.kernels.registers import KEYS
from fusenorm.lower import Target, build_library
from fusenorm.lower.library import compile_module
from fusenorm.ops import Attention
from tests.guarded import guarded
from tests.ops.test_attention_op import ATTRIBUTES, model

pytestmark = pytest.mark.kernel

PLAIN = Attention("hhhh")
SPECS = {
    "plain": PLAIN,
    "safe": Attention("ssss", mask=True, empty="safe"),
    "zero": Attention("hhss", mask=True, grouped=True, empty="zero"),
    "nan": Attention("shsh", mask=True),
    "grouped": Attention("sshs", grouped=True),
    "select": Attention("hshs", mask=True, grouped=True, select=True),
    "softcap": Attention("sshs", mask=True, softcap=True),
    "both": Attention("hhhh", mask=True, empty="zero", select=True, softcap=True),
}
MASKED = [name for name, spec in SPECS.items() if spec.mask]
TURNED = {
    "halves": Attention("ssss", mask=True, grouped=True, empty="safe", rotary="qk"),
    "pairs": Attention("hhhh", rotary="qk", form="pairs", partial=True),
    "cached": Attention("shsh", mask=True, rotary="q", form="cached", partial=True),
}
LOWEST = float(np.finfo(np.float32).min)
LEVELS = [
    level
    for level in ("x86-64-v2", "x86-64-v3", "x86-64-v4", "aarch64")
    if Target.parse(level).machine == Target.host().machine
    and set(Target.parse(level).features) <= set(Target.host().features)
]
SCALE = 0.25
NUMBERS = ATTRIBUTES | {"scale": SCALE}

Feeds = dict[str, np.ndarray]


@pytest.fixture(scope="module", params=LEVELS)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("attention") / f"{request.param}.so"
    build_library([*SPECS.values(), *TURNED.values()], Target.parse(request.param), path)
    return path


def run(spec: Attention, library: Path, feeds: Feeds, threads: int = 1) -> np.ndarray:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library))
    proto = model(spec, 18, SCALE)
    (y,) = ort.InferenceSession(proto.SerializeToString(), options).run(None, feeds)
    return np.asarray(y)


def operands(
    spec: Attention,
    batch: int = 1,
    heads: int = 2,
    rows: int = 5,
    keys: int = 7,
    inner: int = 16,
    columns: int = 16,
    copies: int = 1,
) -> Feeds:
    """Normal numbers; `heads` of k and v, `copies` times as many of q; the mask is left out."""
    random = np.random.default_rng([batch, heads, rows, keys, inner, columns])
    shapes = {
        "q": (batch, heads * (copies if spec.grouped else 1), rows, inner),
        "k": (batch, heads, keys, inner),
        "v": (batch, heads, keys, columns),
    }
    feeds = {}
    for (name, shape), letter in zip(shapes.items(), spec.layout, strict=False):
        made = random.standard_normal(shape).astype(np.float32)
        feeds[name] = np.ascontiguousarray(made.swapaxes(1, 2) if letter == "s" else made)
    return feeds


def tables(spec: Attention, rows: int, turning: int, batch: int | None = 1) -> Feeds:
    """cos and sin of angles that differ from number to number; None: [rows, numbers] alone."""
    shape = (rows, turning // 2 if spec.form == "cached" else turning)
    angle = np.arange(np.prod(shape)).reshape(shape) * 0.7
    if batch is not None:
        middle = () if spec.form == "cached" else (1,)
        angle = angle + np.arange(batch).reshape(batch, *middle, 1, 1)
    return {"cos": np.cos(angle).astype(np.float32), "sin": np.sin(angle).astype(np.float32)}


def turned(name: str, rows: int, inner: int, **sizes: int) -> Feeds:
    """Operands of TURNED[name] with tables, and a causal mask where it has one."""
    spec = TURNED[name]
    keys = rows if spec.rotary == "qk" else rows + 3
    feeds = operands(spec, rows=rows, keys=keys, inner=inner, **sizes)
    if spec.mask:
        feeds["mask"] = causal(rows, keys)
    width = max(2, inner // 4 * 2) if spec.partial else inner
    return feeds | tables(spec, rows, width, sizes.get("batch", 1))


def check(spec: Attention, feeds: Feeds, y: np.ndarray) -> None:
    """|error| <= 4·eps·(1 + magnitude of the scores)·(weights of |v|); NaN where the oracle's is.

    An error of d in every score moves a weighted mean of v by at most 2·d·(mean of |v|).
    """
    with np.errstate(invalid="ignore"):
        (want,) = spec.reference(feeds, NUMBERS)
        (spread,) = spec.reference({**feeds, "v": np.abs(feeds["v"])}, NUMBERS)
    assert y.shape == want.shape
    np.testing.assert_array_equal(np.isnan(y), np.isnan(want))
    finite = np.isfinite(want)
    size = (
        SCALE
        * max(1.0, np.abs(feeds["q"][np.isfinite(feeds["q"])]).max(initial=0))
        * np.abs(feeds["k"][np.isfinite(feeds["k"])]).max(initial=0)
    )
    magnitude = 1 + size * np.sqrt(feeds["q"].shape[-1])
    limit = 4 * np.finfo(np.float32).eps * magnitude * spread
    assert np.all(np.abs(y - want)[finite] <= limit[finite] + 1e-30)


def causal(rows: int, keys: int, lowest: float = LOWEST) -> np.ndarray:
    allowed = np.arange(keys) <= np.arange(rows)[:, None] + (keys - rows)
    return np.where(allowed, 0, lowest).astype(np.float32)[None, None]


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 33])
def test_every_row_count(name: str, rows: int, library: Path) -> None:
    spec = SPECS[name]
    for keys in (1, 17, KEYS + 2):
        feeds = operands(spec, rows=rows, keys=keys, copies=3)
        if spec.mask:
            random = np.random.default_rng(rows)
            mask = random.standard_normal((1, 1, rows, keys)).astype(np.float32)
            feeds["mask"] = np.where(mask < 0.3, 0, mask)
        check(spec, feeds, run(spec, library, feeds))


@pytest.mark.parametrize("inner", [1, 3, 4, 8, 15, 16, 31, 64, 65, 80, 130])
def test_every_width(inner: int, library: Path) -> None:
    for rows in (2, 9):
        for columns in (1, 5, 16, 33, 64, 100, 128):
            feeds = operands(PLAIN, rows=rows, keys=19, inner=inner, columns=columns)
            check(PLAIN, feeds, run(PLAIN, library, feeds))


@pytest.mark.parametrize("threads", [1, 3])
def test_blocks_of_keys_and_tasks(threads: int, library: Path) -> None:
    for spec in SPECS.values():
        for batch, heads, rows, keys in [
            (1, 3, 300, KEYS + 90),
            (3, 2, 40, 2 * KEYS + 1),
            (2, 30, 1, KEYS),
        ]:
            feeds = operands(spec, batch, heads, rows, keys, copies=2)
            if spec.mask:
                feeds["mask"] = np.zeros((1, 1, 1, keys), np.float32)
            check(spec, feeds, run(spec, library, feeds, threads))


@pytest.mark.parametrize("lowest", [LOWEST, -np.inf, -1e4])
@pytest.mark.parametrize("rows", [5, 31, 32, 40, 300, KEYS + 90])
def test_causal_masks(rows: int, lowest: float, library: Path) -> None:
    for name in MASKED:
        for keys in (rows, rows + 130):
            feeds = operands(SPECS[name], rows=rows, keys=keys, copies=2)
            feeds["mask"] = causal(rows, keys, lowest)
            check(SPECS[name], feeds, run(SPECS[name], library, feeds))


def test_padding(library: Path) -> None:
    """Rows without a weight in the first block of keys; rows of one mask: x + lowest = lowest."""
    for name in MASKED:
        feeds = operands(SPECS[name], batch=2, rows=KEYS + 90, keys=KEYS + 90)
        mask = np.broadcast_to(causal(KEYS + 90, KEYS + 90), (2, 1, KEYS + 90, KEYS + 90)).copy()
        mask[0, ..., : KEYS + 20] = LOWEST
        mask[1, ..., KEYS + 40 :] = LOWEST
        feeds["mask"] = mask
        check(SPECS[name], feeds, run(SPECS[name], library, feeds))


@pytest.mark.parametrize(("name", "outcome"), [("safe", 0.0), ("zero", 0.0), ("nan", np.nan)])
def test_rows_without_a_key(name: str, outcome: float, library: Path) -> None:
    for rows, keys in ((3, 5), (40, 300)):
        feeds = operands(SPECS[name], rows=rows, keys=keys)
        feeds["mask"] = np.where(np.arange(rows) % 3 == 1, -np.inf, 0.5).astype(np.float32)
        feeds["mask"] = np.broadcast_to(feeds["mask"][:, None], (1, 1, rows, keys)).copy()
        y = run(SPECS[name], library, feeds)
        check(SPECS[name], feeds, y)
        by_head = y.swapaxes(1, 2) if SPECS[name].layout[3] == "s" else y
        np.testing.assert_array_equal(by_head[:, :, 1::3], np.float32(outcome))


@pytest.mark.parametrize("operand", ["q", "k", "v"])
@pytest.mark.parametrize("wild", [np.nan, np.inf])
def test_nan_and_infinity_travel_through_masked_keys(
    operand: str, wild: float, library: Path
) -> None:
    """0·NaN is NaN: keys without weight are left out only where everything is tame."""
    spec = SPECS["nan"]
    feeds = operands(spec, heads=1, rows=40, keys=200)
    feeds["mask"] = causal(40, 200)
    feeds["mask"][..., 150:] = LOWEST
    feeds[operand].reshape(-1)[-5] = wild
    y = run(spec, library, feeds)
    check(spec, feeds, y)
    assert np.isnan(y).any()


@pytest.mark.parametrize("number", [-np.inf, LOWEST, -1e4, 0.5, np.inf, np.nan])
def test_what_is_selected_counts_whatever_the_score(number: float, library: Path) -> None:
    for name in ("select", "both"):
        for rows in (5, 40):
            feeds = operands(SPECS[name], rows=rows, keys=rows, copies=2)
            feeds["mask"] = causal(rows, rows, number)
            keys = feeds["k"][:, :, -1] if SPECS[name].layout[1] == "h" else feeds["k"][:, -1]
            for wild in (np.nan, np.inf, 1e30):
                keys[:] = wild
                y = run(SPECS[name], library, feeds)
                check(SPECS[name], feeds, y)
            if number < 0:
                assert np.isfinite(y).any()


@pytest.mark.parametrize(("query", "key"), [(2e18, 1e19), (1e23, 1e14)])
def test_large_numbers_outweigh_a_mask(query: float, key: float, library: Path) -> None:
    spec = SPECS["nan"]
    feeds = operands(spec, heads=1, rows=40, keys=40)
    feeds["mask"] = np.where(causal(40, 40) == 0, 0, np.float32(-1e37))
    feeds["q"] = np.full_like(feeds["q"], query)
    feeds["k"][..., -1, :] = key
    (want,) = spec.reference(feeds, NUMBERS)
    np.testing.assert_allclose(run(spec, library, feeds), want, rtol=1e-6)
    np.testing.assert_allclose(want[0, 0, 3], feeds["v"][0, -1, 0], rtol=1e-6)


def test_nan_weights_count_as_zero_only_if_safe(library: Path) -> None:
    for name, outcome in (("safe", 0.0), ("zero", np.nan)):
        feeds = operands(SPECS[name], heads=1, rows=3)
        feeds["mask"] = np.zeros((1, 1, 3, 7), np.float32)
        feeds["mask"][0, 0, 1, 2] = np.nan
        y = run(SPECS[name], library, feeds)
        check(SPECS[name], feeds, y)
        np.testing.assert_array_equal(y[:, 1], np.float32(outcome))


def test_weights_that_count_as_zero_keep_the_nan_of_values(library: Path) -> None:
    feeds = operands(SPECS["safe"], heads=1, rows=3)
    feeds["mask"] = np.zeros((1, 1, 3, 7), np.float32)
    feeds["mask"][0, 0, 1, 2] = np.nan
    feeds["v"][..., 4] = np.nan
    y = run(SPECS["safe"], library, feeds)
    check(SPECS["safe"], feeds, y)


@pytest.mark.parametrize(
    "shape",
    [(), (7,), (5, 1), (5, 7), (2, 1, 7), (3, 1, 1, 1), (1, 2, 1, 7), (3, 2, 5, 7), (1, 1, 5, 7)],
)
def test_masks_broadcast(shape: tuple[int, ...], library: Path) -> None:
    for name in MASKED:
        feeds = operands(SPECS[name], batch=3)
        feeds["mask"] = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
        proto = model(SPECS[name], 18, SCALE)
        proto.graph.input[3].CopyFrom(_value("mask", len(shape)))
        options = ort.SessionOptions()
        options.register_custom_ops_library(str(library))
        session = ort.InferenceSession(proto.SerializeToString(), options)
        check(SPECS[name], feeds, np.asarray(session.run(None, feeds)[0]))


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("rows", [5, 40])
def test_nothing_past_the_operands_is_read(name: str, rows: int, library: Path) -> None:
    spec, keys = SPECS[name], KEYS + 3
    for shape in ((1, 1, 1, 1), (1, 1, rows, 1), (1, 1, 1, keys), (1, 2, rows, keys)):
        feeds = operands(spec, rows=rows, keys=keys, inner=8, columns=8)
        feeds["mask"] = np.zeros(shape, np.float32)
        options = ort.SessionOptions()
        options.register_custom_ops_library(str(library))
        session = ort.InferenceSession(model(spec, 18, SCALE).SerializeToString(), options)
        binding = session.io_binding()
        for key, array in feeds.items():
            binding.bind_cpu_input(key, guarded(array))
        binding.bind_output("y")
        session.run_with_iobinding(binding)
        check(spec, feeds, binding.copy_outputs_to_cpu()[0])


def _value(name: str, rank: int) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None] * rank)


def test_operands_broadcast_as_matmul_has_it(library: Path) -> None:
    for narrow in ("q", "k", "v"):
        for axis in (0, 1):
            feeds = operands(PLAIN, batch=3)
            feeds[narrow] = feeds[narrow].take([0], axis=axis)
            check(PLAIN, feeds, run(PLAIN, library, feeds))


def test_a_mask_has_more_rows_than_q(library: Path) -> None:
    spec = SPECS["nan"]
    feeds = operands(spec, rows=1)
    feeds["mask"] = np.random.default_rng(1).standard_normal((4, 2, 9, 7)).astype(np.float32)
    y = run(spec, library, feeds)
    assert y.shape == (4, 9, 2, 16) or y.shape == (4, 2, 9, 16)
    check(spec, feeds, y)


def test_a_mask_repeats_the_one_row_of_k(library: Path) -> None:
    for name in ("nan", "safe"):
        spec = SPECS[name]
        assert spec.mask
        for rows in (1, 40):
            feeds = operands(spec, rows=rows)
            feeds["k"] = feeds["k"].take([0], axis=1 if spec.layout[1] == "s" else 2)
            feeds["mask"] = np.linspace(-1, 1, 7, dtype=np.float32).reshape(1, 1, 1, 7)
            check(spec, feeds, run(spec, library, feeds))


def test_nothing_to_do(library: Path) -> None:
    for batch, rows, keys in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        for spec in SPECS.values():
            feeds = operands(spec, batch=batch, rows=rows, keys=keys)
            if spec.mask:
                feeds["mask"] = np.zeros((1, 1, rows, keys), np.float32)
            y = run(spec, library, feeds)
            (want,) = spec.reference(feeds, NUMBERS)
            np.testing.assert_array_equal(y, want)


@pytest.mark.parametrize("name", TURNED)
@pytest.mark.parametrize("inner", [2, 6, 16, 30, 32, 62, 64, 80, 96, 128, 130])
def test_rows_turn_by_their_positions(name: str, inner: int, library: Path) -> None:
    for rows in (1, 3, 4, 9, 40):
        feeds = turned(name, rows, inner, batch=2, copies=2)
        check(TURNED[name], feeds, run(TURNED[name], library, feeds))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", TURNED)
def test_rows_turn_in_every_block_and_task(name: str, threads: int, library: Path) -> None:
    for heads, rows in ((1, KEYS + 90), (30, 2), (2, 300)):
        feeds = turned(name, rows, 24, heads=heads, copies=2)
        check(TURNED[name], feeds, run(TURNED[name], library, feeds, threads))


@pytest.mark.parametrize("name", TURNED)
def test_tables_broadcast(name: str, library: Path) -> None:
    """Over the batch, over positions, and where a table has fewer axes; a batch of tables too."""
    spec = TURNED[name]
    for batch, sides, rows in ((3, 1, 5), (1, 3, 5), (2, None, 5), (2, 2, 1), (1, None, 1)):
        if spec.partial and sides:  # the numbers that stay are not repeated
            batch = max(batch, sides)
        feeds = turned(name, 5, 8, batch=batch)
        feeds |= tables(spec, rows, 4 if spec.partial else 8, sides)
        check(spec, feeds, shaped(spec, library, feeds))


@pytest.mark.parametrize("name", TURNED)
def test_one_row_by_several_positions(name: str, library: Path) -> None:
    """Tables of more rows than q, or than k, repeat them: nothing stays in place of the product."""
    spec = TURNED[name]
    for turning in ("q", "k") if spec.rotary == "qk" else ("q",):
        feeds = turned(name, 5, 8)
        axis = 1 if spec.layout["qk".index(turning)] == "s" else 2
        feeds[turning] = feeds[turning].take([0], axis=axis)
        y = shaped(spec, library, feeds)
        if spec.partial:  # in numpy, the numbers that stay are repeated beforehand
            feeds[turning] = feeds[turning].repeat(5, axis)
        check(spec, feeds, y)


def test_turned_rows_without_numbers(library: Path) -> None:
    for name, spec in TURNED.items():
        for batch, rows in ((0, 3), (2, 0)):
            feeds = turned(name, rows, 8, batch=batch)
            (want,) = spec.reference(feeds, NUMBERS)
            np.testing.assert_array_equal(run(spec, library, feeds), want)


def test_nan_in_a_table_travels(library: Path) -> None:
    """Keys without weight are left out only where what they turn into is tame."""
    feeds = turned("halves", 40, 16, heads=1)
    feeds["sin"].reshape(-1)[-1] = np.nan
    y = run(TURNED["halves"], library, feeds)
    check(TURNED["halves"], feeds, y)
    assert np.isnan(y).any() == np.isnan(TURNED["halves"].reference(feeds, NUMBERS)[0]).any()


@pytest.mark.parametrize(
    ("name", "shapes", "message"),
    [
        ("halves", {"cos": (1, 1, 5, 8)}, "'cos' has another shape than sin"),
        ("halves", {"cos": (1, 1, 5, 8), "sin": (1, 1, 5, 8)}, "does not fit the last axis"),
        ("halves", {"cos": (1, 2, 5, 16), "sin": (1, 2, 5, 16)}, "does not fit the last axis"),
        ("halves", {"cos": (1, 1, 4, 16), "sin": (1, 1, 4, 16)}, "other rows than q or k"),
        ("halves", {"cos": (2, 1, 5, 16), "sin": (2, 1, 5, 16)}, "'cos' has another batch"),
        ("halves", {"k": (3, 6, 2, 16), "v": (3, 6, 2, 16)}, "other rows than q or k"),
        ("pairs", {"cos": (1, 1, 5, 3), "sin": (1, 1, 5, 3)}, "does not fit the last axis"),
        ("pairs", {"cos": (1, 1, 5, 18), "sin": (1, 1, 5, 18)}, "does not fit the last axis"),
        ("pairs", {"cos": (1, 1, 1, 5, 8)}, "'cos' does not have four axes"),
        ("cached", {"cos": (1, 5, 9), "sin": (1, 5, 9)}, "does not fit the last axis"),
        ("cached", {"cos": (1, 1, 5, 4)}, "'cos' has more than three axes"),
    ],
)  # fmt: skip
def test_wrong_tables_are_refused(
    name: str, shapes: dict[str, tuple[int, ...]], message: str, library: Path
) -> None:
    feeds = turned(name, 5, 16, batch=3)
    feeds |= {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    if "mask" in feeds and "k" in shapes:
        feeds["mask"] = np.zeros((1, 1, 1, 6), np.float32)
    with pytest.raises(Exception, match=message):
        shaped(TURNED[name], library, feeds)


def shaped(spec: Attention, library: Path, feeds: Feeds) -> np.ndarray:
    """`run` with inputs of any rank."""
    proto = model(spec, 18, SCALE)
    for value in proto.graph.input:
        value.CopyFrom(_value(value.name, feeds[value.name].ndim))
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library))
    session = ort.InferenceSession(proto.SerializeToString(), options)
    return np.asarray(session.run(None, feeds)[0])


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("k", (1, 2, 7, 15), "last axis than q"),
        ("k", (1, 3, 7, 16), "heads"),
        ("k", (2, 7, 16), "four axes"),
        ("v", (1, 2, 8, 16), "rows than k"),
        ("mask", (1, 1, 5, 6), "does not broadcast to the scores"),
        ("mask", (1, 1, 4, 7), "does not broadcast to the scores"),
    ],
)
def test_wrong_shapes_are_refused(
    name: str, shape: tuple[int, ...], message: str, library: Path
) -> None:
    spec = Attention("hhss", mask=True, grouped=True, empty="zero")
    feeds = operands(spec) | {"mask": np.zeros((1, 1, 5, 7), np.float32)}
    made = np.zeros(shape, np.float32)
    feeds[name] = made.swapaxes(1, 2) if name == "v" else made
    with pytest.raises(Exception, match=message):
        shaped(spec, library, feeds)


@pytest.mark.parametrize("spec", [SPECS["safe"], *TURNED.values()], ids=lambda spec: spec.op_type)
@pytest.mark.parametrize("level", ["x86-64-v2", "x86-64-v3", "x86-64-v4", "aarch64"])
def test_kernels_need_no_heap_and_little_stack(level: str, spec: Attention) -> None:
    assembly = compile_module([spec], Target.parse(level)).inspect_source("asm")
    assert "TVMBackend" not in assembly
    frames = re.findall(r"sub(?:q\s+\$|\s+sp, sp, #)(\d+)", assembly)
    assert 0 < sum(map(int, frames)) < 16384
