"""Kernels called on arrays, without onnxruntime."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fusenorm.errors import BadInput
from fusenorm.lower import Target, build_library
from fusenorm.ops import Gated, Linear, Norm
from fusenorm.ops.linear import PANEL, pack
from fusenorm.runtime.direct import Kernels, open_library

X = np.ones((2, 3, 8), np.float32)
V = np.ones(8, np.float32)
W = np.ones((2, 8, PANEL), np.float32)
B = np.ones(PANEL, np.float32)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("direct") / "ops.so"
    specs = [
        *(Norm(skip=True), Norm(dtype="bf16", scale="bf16"), Gated("swish", "gate_up")),
        *(Linear("relu", gated=True, bias=True), Linear(dtype="bf16", maps=2)),
        Linear(bias=True, ragged=True),
    ]
    build_library(specs, Target.host(), path)
    return path


@pytest.fixture(scope="module")
def kernels(path: Path) -> Kernels:
    return open_library(path)


@pytest.mark.kernel
def test_outputs_have_the_rows_shape(kernels: Kernels) -> None:
    y, s = kernels["SkipRMSNorm"](X, X, V, epsilon=1e-5)
    assert y.shape == s.shape == X.shape
    assert np.array_equal(s, 2 * X)
    (alone,) = kernels["SkipRMSNorm"](X, X, V, epsilon=1e-5, with_sum=False)
    assert np.array_equal(alone, y)
    assert kernels["GLU_swish_gate_up"](X, beta=1.0).shape == (2, 3, 4)


@pytest.mark.kernel
def test_read_only_and_torch_inputs(kernels: Kernels) -> None:
    frozen = X.copy()
    frozen.flags.writeable = False
    assert kernels["SkipRMSNorm"](frozen, X, V, epsilon=1e-5)[1].max() == 2
    x = torch.randn(5, 40, dtype=torch.bfloat16)
    y = kernels["RMSNorm_bf16"](x, torch.ones(40, dtype=torch.bfloat16), epsilon=1e-5)
    expected = torch.nn.functional.rms_norm(x.float(), (40,), eps=1e-5)
    assert str(y.dtype) == "bfloat16"
    assert np.allclose(y.astype(np.float32), expected.numpy(), rtol=1e-2)


@pytest.mark.kernel
def test_linear_ops_take_packed_weights(kernels: Kernels) -> None:
    made = kernels["LinearGLU_relu_bias"](X, W, B, -9 * B)
    assert made.shape == (2, 3, PANEL)
    assert np.array_equal(np.unique(made), [-9])
    x, weight = torch.randn(5, 40).bfloat16(), torch.randn(40, 3 * PANEL).bfloat16()
    panels = torch.stack(weight.split(PANEL, dim=1))
    assert np.array_equal(panels.float().numpy(), pack(weight.float().numpy()))
    one, other = kernels["Linear_2maps_bf16"](x, panels, panels[1:])
    assert (str(one.dtype), one.shape, other.shape) == ("bfloat16", (5, 96), (5, 64))
    assert np.array_equal(one[:, PANEL:], other)
    assert np.allclose(one.astype(np.float32), (x.float() @ weight.float()).numpy(), 1e-2, 1e-3)


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda k: k["SkipRMSNorm"](X, X, epsilon=1), TypeError, "takes x, skip, scale; 2 inputs"),
        (lambda k: k["SkipRMSNorm"](X, X, V), TypeError, "attributes, all of them: epsilon"),
        (lambda k: k["SkipRMSNorm"](X, X, V, epsilon=1, a=1), TypeError, "all of them: epsilon"),
        (lambda k: k["SkipRMSNorm"](X, X[:1], V, epsilon=1), ValueError, "'skip' is .1, 3, 8"),
        (lambda k: k["SkipRMSNorm"](X, X, V[:7], epsilon=1), ValueError, "'scale' is .7"),
        (
            lambda k: k["SkipRMSNorm"](X, X.astype("f8"), V, epsilon=1),
            TypeError,
            "'skip' is float64",
        ),
        (lambda k: k["SkipRMSNorm"](X, X, 1.0, epsilon=1), TypeError, "'scale' is float:"),
        (lambda k: k["SkipRMSNorm"](X.T, X, V, epsilon=1), ValueError, "'x' is not contiguous"),
        (
            lambda k: k["SkipRMSNorm"](torch.ones(8, 8).T, X, V, epsilon=1),
            ValueError,
            "'x' is not contiguous",
        ),
        (lambda k: k["SkipRMSNorm"](V[0], X, V, epsilon=1), TypeError, "'x' is float32"),
        (lambda k: k["GLU_swish_gate_up"](X[..., :7].copy(), beta=1), ValueError, "two halves"),
        (lambda k: k["LinearGLU_relu_bias"](X, W, B), TypeError, "takes x, weight, gate_bias, up_"),
        (lambda k: k["LinearGLU_relu_bias"](X, W, B, B, a=1), TypeError, "all of them: none"),
        (lambda k: k["LinearGLU_relu_bias"](np.ones((), "f4"), W, B, B), ValueError, "a scalar"),
        (lambda k: k["LinearGLU_relu_bias"](X, W[:1], B, B), ValueError, "be .even, 8, 32."),
        (lambda k: k["LinearGLU_relu_bias"](X, W[:, :7].copy(), B, B), ValueError, "'weight' is"),
        (lambda k: k["LinearGLU_relu_bias"](X, W[0], B, B), ValueError, "'weight' is .8, 32"),
        (lambda k: k["LinearGLU_relu_bias"](X, W, B, B[:9]), ValueError, "'up_bias' is .9"),
        (lambda k: k["Linear_2maps_bf16"](X, W, W), TypeError, "'x' is float32"),
        (lambda k: k["Linear_bias_ragged"](X, W, B), ValueError, "'weight' has 2 panels of 32"),
        (lambda k: k["Linear_bias_ragged"](X, W, B[:0]), ValueError, "'weight' has 2 panels"),
        (lambda k: k["RMSNorm"], KeyError, "no kernel fusenorm_RMSNorm"),
        (lambda k: k["Nothing"], KeyError, "no fused op is called Nothing"),
    ],
)
def test_wrong_calls_are_named(
    kernels: Kernels, call: Callable[[Kernels], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(kernels)


def test_no_library(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such library"):
        open_library(tmp_path / "none.so")
    text = tmp_path / "text.so"
    text.write_text("text")
    with pytest.raises(BadInput, match="cannot be loaded"):
        open_library(text)


@pytest.mark.kernel
def test_calling_needs_no_tvm(path: Path) -> None:
    code = (
        "import sys, numpy as np\n"
        "from fusenorm.runtime.direct import open_library\n"
        f"open_library({str(path)!r})['GLU_swish_gate_up'](np.ones((2, 8), np.float32), beta=1.0)\n"
        "sys.exit('tvm' in sys.modules or 'onnxruntime' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
