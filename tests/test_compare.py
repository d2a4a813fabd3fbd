from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest

from fusenorm.compare import difference, verify
from fusenorm.errors import BadInput


def compare(a, b, tolerance: float = 1e-3):
    return difference("y", np.asarray(a), np.asarray(b), tolerance)


def test_a_model_agrees_with_itself_and_its_artifact(fused, folder) -> None:
    for b in (fused, folder, None):
        found = verify(folder if b is None else fused, b)
        assert found.ok
        assert found.outputs[0].max_relative < 1e-6
    # Cast, Gather, Add, then the body's longest chain
    assert found.depth == 3 + 7
    assert found.tolerance == pytest.approx(4 * 2**-23 * found.depth**0.5)


def test_runs_at_two_shapes(fused) -> None:
    assert verify(fused, fused).runs == ({"batch": 2, "seq": 8}, {"batch": 1, "seq": 5})
    assert verify(fused, fused, dims={"seq": 3, "batch": 1}).runs == ({"batch": 1, "seq": 3},)


def test_other_weights_are_found(fused, tmp_path) -> None:
    model = onnx.load(fused)
    gamma = onnx.numpy_helper.to_array(model.graph.initializer[1]).copy()
    gamma[3] *= 1.001
    model.graph.initializer[1].CopyFrom(onnx.numpy_helper.from_array(gamma, "gamma"))
    other = tmp_path / "other.onnx"
    onnx.save(model, other)
    found = verify(fused, other)
    assert not found.ok
    assert "differ in 'y'" in str(found)
    assert found.as_dict()["ok"] is False
    assert verify(fused, other, tolerance=0.01).ok


def test_given_inputs_are_used(fused, feed, tmp_path) -> None:
    path = tmp_path / "in.npz"
    np.savez(path, **feed)
    assert verify(fused, fused, path).outputs[0].shape == (2, 3, 8)
    assert verify(fused, fused, feed).ok
    with pytest.raises(BadInput, match="input 'ids' is missing"):
        verify(fused, fused, {"offset": feed["offset"]})


def test_models_of_other_inputs_are_refused(fused, tmp_path) -> None:
    model = onnx.load(fused)
    model.graph.output[0].name = "z"
    model.graph.node[-1].output[0] = "z"
    other = tmp_path / "other.onnx"
    onnx.save(model, other)
    with pytest.raises(BadInput, match=r"other\.onnx: outputs are \['z'\], not \['y'\]"):
        verify(fused, other)
    with pytest.raises(BadInput, match=r"fused\.onnx: holds no recorded run"):
        verify(fused)


def test_difference_is_relative_to_the_largest_value() -> None:
    assert compare([100.0, 0.0], [100.0, 0.05]).ok
    found = compare([100.0, 0.0], [100.0, 0.2])
    assert found.reason == "0.002 of the largest value"
    assert found.max_abs == pytest.approx(0.2)


def test_nan_and_infinity_must_coincide() -> None:
    nan, inf = np.nan, np.inf
    assert compare([nan, 1.0, inf, -inf], [nan, 1.0, inf, -inf]).ok
    assert compare([nan, 1.0], [1.0, nan]).reason == "NaN at different places"
    assert compare([inf, 1.0], [-inf, 1.0]).reason == "infinities at different places"
    assert compare([inf, 1.0], [1.0, 1.0]).reason == "infinities at different places"
    assert not compare([0.0], [1e-30]).ok
    assert compare([0.0], [-0.0]).ok
    assert compare(np.zeros((0, 3)), np.zeros((0, 3))).ok


def test_integers_must_be_equal() -> None:
    assert compare([1, 2], [1, 2]).ok
    assert compare([1, 2], [1, 3]).reason == "1 of 2 values differ"
    assert compare([1], [1.0]).reason == "float64[1] instead of int64[1]"


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_ulps_of_16_bit_types(dtype) -> None:
    step = float(ml_dtypes.finfo(dtype).eps)
    assert compare(np.array([1, 2], dtype), np.array([1 + 3 * step, 2], dtype), 1).max_ulps == 3
    assert compare(np.array([0.0], dtype), np.array([-0.0], dtype), 1).max_ulps == 0
    tiny = ml_dtypes.finfo(dtype).smallest_subnormal
    assert compare(np.array([tiny], dtype), np.array([-tiny], dtype), 2).max_ulps == 2
