"""A handful of nodes on arrays: constant folding and the proofs of rewrites run on this."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx
import onnx.inliner
from onnx.reference import ReferenceEvaluator

from fusenorm.ops.spec import DOMAIN
from fusenorm.passes.round_once import ROUND_ONCE


class EvaluationError(Exception):
    """The nodes cannot run on these arrays."""


# What ONNX's reference implementation raises, with no class of its own.
_FAILURES = (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError)


def evaluate(
    nodes: Sequence[onnx.NodeProto],
    arrays: Mapping[str, np.ndarray],
    outputs: Sequence[str],
    functions: Iterable[onnx.FunctionProto],
    opset: int,
) -> list[np.ndarray]:
    """Run a few nodes on arrays with ONNX's reference implementation.

    Args:
        nodes: in an order they can run in.
        arrays: value name to array, everything the nodes read from outside.
        outputs: names of the values to return.
        functions: bodies of the nodes that are functions.
        opset: of the standard domain.

    Returns:
        One array for each of `outputs`.

    Raises:
        EvaluationError: a node cannot run.
    """

    def info(name: str) -> onnx.ValueInfoProto:
        # The evaluator takes arrays as they come and reads no types.
        return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)

    graph = onnx.helper.make_graph(
        list(nodes), "check", [info(name) for name in arrays], [info(name) for name in outputs]
    )
    model = onnx.helper.make_model(
        graph,
        functions=list(functions),
        opset_imports=[
            onnx.helper.make_opsetid("", opset),
            onnx.helper.make_opsetid(DOMAIN, 1),
        ],
        ir_version=10,
    )
    narrow = any(array.dtype.itemsize == 2 for array in arrays.values())
    try:
        with np.errstate(all="ignore"):
            if not narrow:
                return ReferenceEvaluator(model).run(None, dict(arrays))  # type: ignore[return-value]
            # Replacement ops do not reach into function bodies.
            flat = onnx.inliner.inline_local_functions(model)
            return ReferenceEvaluator(flat, new_ops=ROUND_ONCE).run(None, dict(arrays))  # type: ignore[return-value]
    except _FAILURES as error:
        raise EvaluationError(str(error)) from error
