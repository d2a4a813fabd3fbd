"""A torch module straight into optimize."""

from __future__ import annotations

import numpy as np
import pytest

import fusenorm
from fusenorm.errors import BadInput

pytestmark = pytest.mark.model


def test_a_module_is_exported_and_optimised() -> None:
    import onnx_ir as ir
    import torch

    from models.zoo import ZOO
    from tests.graphs import run

    module = ZOO["swiglu"].build(0)
    args = ZOO["swiglu"].example(2, 3)
    result = fusenorm.optimize(module, args=args)
    assert result.report.counts == {"GLU": 1}
    names = [str(value.name) for value in result.model.graph.inputs]
    feeds = dict(zip(names, (arg.numpy() for arg in args), strict=True))
    (got,) = run(ir.to_proto(result.model), feeds)
    with torch.no_grad():
        wanted = module(*args).numpy()
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_a_module_needs_example_inputs() -> None:
    from models.zoo import ZOO

    with pytest.raises(BadInput, match="args="):
        fusenorm.optimize(ZOO["swiglu"].build(0))


def test_something_else_is_refused() -> None:
    with pytest.raises(BadInput, match="cannot optimize a list"):
        fusenorm.optimize([])
