"""The attention op: its body against the numpy reference."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from fusenorm.ops import DOMAIN, DTYPES, Attention

F64 = [spec for spec in Attention.variants() if spec.dtype == "f64"]


def tensors(spec: Attention, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Operands of sizes that all differ; the mask has a row that is -inf throughout."""
    batch, groups, copies, rows, keys, inner, columns = 2, 2, 3, 4, 5, 6, 7
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
    return made


def model(spec: Attention, opset: int, scale: float) -> onnx.ModelProto:
    """One node of `spec` with its function body."""
    kind = int(DTYPES[spec.dtype].onnx)
    names = [slot.name for slot in spec.inputs]
    node = onnx.helper.make_node(spec.op_type, names, ["y"], domain=DOMAIN, scale=scale)
    graph = onnx.helper.make_graph(
        [node],
        "attention",
        [onnx.helper.make_tensor_value_info(name, kind, [None] * 4) for name in names],
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
    (expected,) = spec.reference(feeds, {"scale": 0.25})
    found = run(spec, feeds, 18, 0.25)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
    assert np.isnan(found).any() == (spec.mask and spec.empty == "nan")


def test_body_in_every_opset() -> None:
    spec = Attention("ssss", mask=True, grouped=True, empty="safe", dtype="f64")
    feeds = tensors(spec, np.random.default_rng(2))
    (expected,) = spec.reference(feeds, {"scale": 0.25})
    for opset in range(Attention.MIN_OPSET, 24):
        onnx.checker.check_model(model(spec, opset, 0.25), full_check=True)
        np.testing.assert_allclose(run(spec, feeds, opset, 0.25), expected, rtol=1e-12)
    with pytest.raises(ValueError, match="needs opset 13"):
        spec.function(12)


def test_bodies_change_only_with_their_version() -> None:
    """A library and a model may be of different age, so a new body needs a new op_type."""
    digest = hashlib.sha256()
    for spec, opset in itertools.product(Attention.variants(), (13, 14, 18)):
        digest.update(spec.function_text(opset).encode())
    assert Attention.VERSION == 1
    assert digest.hexdigest()[:16] == "454d208cdd769a97", (
        "a body changed: raise VERSION of its family"
    )


def test_names_are_read_back() -> None:
    for spec in Attention.variants():
        assert Attention.parse(spec.op_type) == spec
