"""Small graphs as ONNX text, and running them: the vocabulary of the pass tests."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort

import fusenorm
from fusenorm.ops import DOMAIN
from fusenorm.passes import facts
from fusenorm.passes.pattern import Miss
from fusenorm.passes.rewrite import Rewrite, Rule
from fusenorm.pipeline import Options, lower_regions
from fusenorm.report import Report, Site

WIDTH = 8


def model(
    body: str,
    inputs: str = "float[b,s,8] x",
    outputs: str = "float[b,s,8] y",
    *,
    opset: int = 18,
    constants: Mapping[str, np.ndarray] | None = None,
    ir_version: int = 8,
) -> onnx.ModelProto:
    """A checked model from the lines of its graph."""
    text = (
        f'<ir_version: {ir_version}, opset_import: ["" : {opset}]>\n'
        f"graph ({inputs}) => ({outputs}) {{\n{body}\n}}"
    )
    proto = onnx.parser.parse_model(text)
    for name, array in (constants or {}).items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    onnx.checker.check_model(proto)
    return proto


def values(
    body: str,
    inputs: str = "float[b,s,8] x",
    *,
    known: str = "",
    constants: Mapping[str, np.ndarray] | None = None,
    opset: int = 18,
) -> dict[str, ir.Value]:
    """Every value of a graph with output y, by name; `known` declares types of inner ones."""
    proto = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : {opset}, "fusenorm" : 1, "other" : 1]>\n'
        f"graph ({inputs}) => (float[] y) <{known}> {{\n{body}\n}}"
    )
    for name, array in (constants or {}).items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    graph = ir.from_proto(proto).graph
    produced = [out for node in graph for out in node.outputs]
    return {str(v.name): v for v in (*graph.inputs, *graph.initializers.values(), *produced)}


def proposed(
    rule: Rule, body: str, inputs: str, *, constants: Mapping[str, np.ndarray], opset: int = 18
) -> str | None:
    """The fused op, the code of the refusal, or None: what `outcome` gives."""
    found = outcome(rule, body, inputs, constants=constants, opset=opset)
    if isinstance(found, Miss):
        return found.refusal.code if found.refusal is not None else "?"
    return None if found is None else found.spec.op_type


def outcome(
    rule: Rule, body: str, inputs: str, *, constants: Mapping[str, np.ndarray], opset: int = 18
) -> Rewrite | Miss | None:
    """What a rule makes of the node that computes y, before any proof.

    Args:
        rule: asked for a proposal.
        body: of a graph with one output, y.
        inputs: the same.
        constants: those the body reads become initializers.
        opset: of the model, which knows the domains `fusenorm` and `other` too.
    """
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : {opset}, "fusenorm" : 1, "other" : 1]>\n'
        f"graph ({inputs}) => (float[] y) {{\n{body}\n}}"
    )
    read = {name for node in proto.graph.node for name in node.input}
    for name in sorted(read & constants.keys()):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(constants[name], name))
    graph = ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True)).graph
    root = graph.outputs[0].producer()
    assert root is not None
    return rule.propose(root)


def written(graph: ir.Graph | ir.Function) -> list[str]:
    """A line per node; those of its bodies follow it."""
    lines = []
    for node in graph:
        names = [
            ", ".join(str(v.name) if v else "" for v in vs) for vs in (node.outputs, node.inputs)
        ]
        op = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        lines.append(f"{names[0]} = {op}({names[1]})")
        for body in facts.bodies(node):
            lines += [f"  {line}" for line in written(body)]
    return lines


def run(proto: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Outputs under onnxruntime with every optimisation off."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = ort.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, dict(feeds))


def fused(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, Report]:
    """The optimised model, checked by onnx's own checker, and the report."""
    result = fusenorm.optimize(proto)
    after = ir.serde.serialize_model(result.model)
    onnx.checker.check_model(after)
    return after, result.report


def same(proto: onnx.ModelProto, feeds: Mapping[str, np.ndarray], *, bound: float = 4e-6) -> Report:
    """Optimise, require outputs within `bound` of max|y| of the original's, return the report."""
    after, report = fused(proto)
    for a, b in zip(run(proto, feeds), run(after, feeds), strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        scale = max(float(np.abs(a).max(initial=0)), 1e-3)
        np.testing.assert_allclose(
            b.astype(np.float64), a.astype(np.float64), rtol=0, atol=bound * scale
        )
    return report


def fused_ops(report: Report) -> list[str]:
    return sorted(site.op for site in report.sites if site.status == "fused")


def reasons(report: Report) -> set[str | None]:
    return {site.reason for site in report.sites if site.status != "fused"}


def rows(*shape: int, seed: int = 0, dtype: type = np.float32) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=shape) * 2 + 0.5).astype(dtype)


def lowered(
    proto: onnx.ModelProto, options: Options, *, bound: float
) -> tuple[ir.Model, list[Site]]:
    """The lowered model and its regions; outputs must be within `bound` of max|y|."""
    work, regions = lower_regions(fusenorm.optimize(proto).model, options=options)
    after = ir.to_proto(work)
    onnx.checker.check_model(after)
    feeds = {value.name: _feed(value) for value in proto.graph.input}
    for a, b in zip(run(proto, feeds), run(after, feeds), strict=True):
        assert a.dtype == b.dtype
        wide = a.astype(np.float64)
        atol = bound * float(np.abs(wide).max())
        np.testing.assert_allclose(b.astype(np.float64), wide, rtol=0, atol=atol)
    return work, regions


def fused_kinds(
    body: str,
    inputs: str,
    outputs: str,
    constants: Mapping[str, np.ndarray],
    options: Options,
    op: str,
    *,
    bound: float,
) -> tuple[list[str], list[Site]]:
    """Kinds of the fused ops once lowered, in order, and the sites of `op`.

    The model holds those of the constants its text names.
    """
    words = set(re.findall(r"\w+", body))
    held = {name: array for name, array in constants.items() if name in words}
    proto = model(body, inputs, outputs, constants=held, opset=23, ir_version=10)
    work, regions = lowered(proto, options, bound=bound)
    kinds = [node.op_type for node in work.graph if node.domain == DOMAIN]
    return kinds, [site for site in regions if site.op == op]


def _feed(value: onnx.ValueInfoProto) -> np.ndarray:
    """Random rows, successive indices below 50, or True."""
    dims = value.type.tensor_type.shape.dim
    shape = [dim.dim_value or 2 + axis for axis, dim in enumerate(dims)]
    dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
    if dtype.kind == "f":
        return rows(*shape, seed=len(value.name)).astype(dtype)
    if dtype.kind == "b":
        return np.array(True)
    return (np.arange(np.prod(shape)).reshape(shape) % 50).astype(dtype)
