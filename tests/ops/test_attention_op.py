"""The attention op: its body against the numpy reference."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from typing import get_args

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from fusenorm.ops import DOMAIN, DTYPES, Attention
from fusenorm.ops.attention import Form

ATTRIBUTES = {"scale": 0.25, "softcap": 2.0}
F64 = [
    spec
    for spec in Attention.variants()
    if spec.dtype == "f64" and (spec.rotary == "none" or spec.layout in ("hhhh", "ssss"))
    if not spec.softcap or (spec.rotary, spec.layout) in (("none", "hhhh"), ("qk", "ssss"))
]


def tensors(spec: Attention, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Operands of sizes that all differ; the mask has a row that is -inf throughout."""
    batch, groups, copies, rows, keys, inner, columns = 2, 2, 3, 4, 5, 6, 7
    if spec.rotary == "qk":
        keys = rows
    heads = groups * copies
    key_heads = groups if spec.grouped else heads
    shapes = {
        "q": (batch, heads, rows, inner),
        "k": (batch, key_heads, keys, inner),
        "v": (batch, key_heads, keys, columns),
    }
    made = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    for name, letter in zip("qkv", spec.layout, strict=False):
        if letter == "s":
            made[name] = np.ascontiguousarray(made[name].swapaxes(1, 2))
    if spec.mask:
        made["mask"] = np.where(rng.random((batch, 1, rows, keys)) < 0.3, -np.inf, 0.0)
        made["mask"][0, 0, 1] = -np.inf
        made["mask"][1, 0, :, 0] = 0.5
        made["mask"][1, 0, 2] = -0.5
    if spec.rotary != "none":
        turning = 4 if spec.partial else inner
        shape = (batch, rows, turning // 2) if spec.form == "cached" else (batch, 1, rows, turning)
        made |= {name: rng.normal(size=shape) for name in ("cos", "sin")}
    return made


def model(spec: Attention, opset: int, scale: float) -> onnx.ModelProto:
    """One node of `spec` with its function body."""
    kind = int(DTYPES[spec.dtype].onnx)
    names = [slot.name for slot in spec.inputs]
    ranks = [3 if slot.layout == "cache" else 4 for slot in spec.inputs]
    numbers = {name: ATTRIBUTES[name] for name in spec.attributes} | {"scale": scale}
    node = onnx.helper.make_node(spec.op_type, names, ["y"], domain=DOMAIN, **numbers)
    graph = onnx.helper.make_graph(
        [node],
        "attention",
        [
            onnx.helper.make_tensor_value_info(name, kind, [None] * rank)
            for name, rank in zip(names, ranks, strict=True)
        ],
        [onnx.helper.make_tensor_value_info("y", kind, [None] * 4)],
    )
    imports = [onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid(DOMAIN, 1)]
    return onnx.helper.make_model(
        graph, functions=[spec.function(opset)], opset_imports=imports, ir_version=10
    )


def run(spec: Attention, feeds: dict[str, np.ndarray], opset: int, scale: float) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        (y,) = ReferenceEvaluator(model(spec, opset, scale)).run(None, feeds)
    return np.asarray(y)


@pytest.mark.parametrize("spec", F64, ids=lambda spec: spec.op_type)
def test_body_is_the_formula(spec: Attention) -> None:
    feeds = tensors(spec, np.random.default_rng(1))
    (expected,) = spec.reference(feeds, ATTRIBUTES)
    found = run(spec, feeds, 18, 0.25)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
    assert np.isnan(found).any() == (spec.mask and spec.empty == "nan")


@pytest.mark.parametrize("form", [None, "halves", "pairs", "cached"])
@pytest.mark.parametrize("select", [False, True])
def test_body_in_every_opset(form: Form | None, select: bool) -> None:
    spec = Attention(
        "ssss", True, grouped=True, empty="safe", select=select, softcap=select, dtype="f64"
    )
    if form is not None:
        spec = dataclasses.replace(spec, rotary="qk", form=form, partial=True)
    feeds = tensors(spec, np.random.default_rng(2))
    (expected,) = spec.reference(feeds, ATTRIBUTES)
    for opset in range(Attention.MIN_OPSET, 24):
        onnx.checker.check_model(model(spec, opset, 0.25), full_check=True)
        np.testing.assert_allclose(run(spec, feeds, opset, 0.25), expected, rtol=1e-12)
    with pytest.raises(ValueError, match="needs opset 13"):
        spec.function(12)


@pytest.mark.parametrize(
    ("turning", "changed", "known"),
    [
        (False, False, "454d208cdd769a97"),
        (True, False, "3d3f350ed3a84a9e"),
        (False, True, "18e8c0250f1d9a25"),
        (True, True, "77a4ee7716ab5742"),
    ],
)
def test_bodies_change_only_with_their_version(turning: bool, changed: bool, known: str) -> None:
    """A library and a model may be of different age, so a new body needs a new op_type."""
    digest = hashlib.sha256()
    specs = [
        spec
        for spec in Attention.variants()
        if (spec.rotary != "none") == turning and (spec.select or spec.softcap) == changed
    ]
    for spec, opset in itertools.product(specs, (13, 14, 18)):
        digest.update(spec.function_text(opset).encode())
    assert Attention.VERSION == 1
    assert digest.hexdigest()[:16] == known, "a body changed: raise VERSION of its family"


@pytest.mark.parametrize("form", get_args(Form))
def test_only_the_distance_of_positions_counts(form: Form) -> None:
    """Rotations: q·k is the same when every position grows by one number (arXiv 2104.09864)."""
    spec = Attention("hhhh", rotary="qk", form=form, dtype="f64")
    feeds = tensors(spec, np.random.default_rng(3))
    rows, rates = feeds["q"].shape[2], np.array([1.0, 0.3, 0.1])
    found = []
    for start in (0, 5, -2.5):
        angle = (start + np.arange(rows)[:, None]) * rates
        if form != "cached":
            angle = np.tile(angle, 2) if form == "halves" else angle.repeat(2, axis=-1)
        found += spec.reference(feeds | {"cos": np.cos(angle), "sin": np.sin(angle)}, {"scale": 1})
    np.testing.assert_allclose(found[1:], [found[0]] * 2, rtol=1e-9)
    assert not np.allclose(found[0], spec.reference(feeds, {"scale": 1})[0])


def test_names_are_read_back() -> None:
    for spec in Attention.variants():
        assert Attention.parse(spec.op_type) == spec
