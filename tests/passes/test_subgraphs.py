"""If, Loop and Scan bodies and model-local functions: graphs like any other."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings

import fusenorm
from fusenorm.report import Report
from tests.graphs import fused, fused_ops, model, reasons, rows, run, same
from tests.passes.test_random_graphs import SHAPE, graphs

GAMMA = np.linspace(0.5, 1.5, 8, dtype=np.float32)
CONSTANTS = {
    "gamma": GAMMA,
    "eps": np.float32(1e-5),
    "last": np.array([-1], np.int64),
    "up": rows(8, 8, seed=7) / 8,
    "gate": rows(8, 8, seed=8) / 8,
    "half": np.float32(0.5),
    "two": np.array(2),
    "half_x8": rows(8, seed=11),
}


def _rms(x: str, y: str) -> str:
    """RMSNorm of `x` as `y`, every value named after y."""
    return f"""
      {y}_sq = Mul({x}, {x})
      {y}_ms = ReduceMean<keepdims = 1>({y}_sq, last)
      {y}_v = Add({y}_ms, eps)
      {y}_root = Sqrt({y}_v)
      {y}_n = Div({x}, {y}_root)
      {y} = Mul({y}_n, gamma)
    """


def _glu(x: str, y: str) -> str:
    """SwiGLU of `x` as `y`."""
    return f"""
      {y}_g = MatMul({x}, gate)
      {y}_s = Sigmoid({y}_g)
      {y}_a = Mul({y}_g, {y}_s)
      {y}_u = MatMul({x}, up)
      {y} = Mul({y}_a, {y}_u)
    """


def _block(x: str, y: str) -> str:
    """A pre-norm block: y = x + SwiGLU(RMSNorm(x)), then RMSNorm of the sum as y_out."""
    return (
        _rms(x, f"{y}_norm")
        + _glu(f"{y}_norm", f"{y}_ffn")
        + f"{y} = Add({x}, {y}_ffn)\n"
        + _rms(y, f"{y}_out")
    )


def _used(body: str) -> dict[str, np.ndarray]:
    words = set(body.replace("(", " ").replace(")", " ").replace(",", " ").split())
    return {name: array for name, array in CONSTANTS.items() if name in words}


def _model(body: str, inputs: str, outputs: str) -> onnx.ModelProto:
    return model(body, inputs, outputs, constants=_used(body))


BLOCK = ["GLU", "RMSNorm", "SkipRMSNorm"]
X = {"x": rows(2, 3, 8)}
LOOP = """
  {results} = Loop (count, , {start}) <
    body = step (int64 i, bool go, float[b,s,8] h) => (bool next, {declared}) {{
      next = Identity(go)
      {body}
    }}
  >
"""


def _loop(results: str, declared: str, body: str, start: str = "x") -> str:
    return LOOP.format(results=results, declared=declared, body=body, start=start)


def test_a_block_in_a_loop() -> None:
    """The sum is the body's loop-carried output, its norm a scan output."""
    body = _loop("y, all", "float[b,s,8] t, float[b,s,8] t_out", _block("h", "t"))
    proto = _model(body, "int64 count, float[b,s,8] x", "float[b,s,8] y, float[n,b,s,8] all")
    for count in (0, 1, 3):
        report = same(proto, {**X, "count": np.array(count)})
    assert fused_ops(report) == BLOCK
    (loop,) = fusenorm.optimize(proto).model.graph
    names = [value.name for value in loop.attributes["body"].as_graph().outputs]
    assert names == ["next", "t", "t_out"]


def test_the_loop_carried_value_is_the_norm() -> None:
    body = _loop("y", "float[b,s,8] t", "m = Mul(h, half)\n" + _rms("m", "t"))
    proto = _model(body, "int64 count, float[b,s,8] x", "float[b,s,8] y")
    assert fused_ops(same(proto, {**X, "count": np.array(2)})) == ["RMSNorm"]


UNIT = "w = Sigmoid(x)\nv = Mul(x, w)\ny = Mul(v, r)"


@pytest.mark.parametrize(
    "body",
    [
        f"""r, y = If (flag) <
          then_branch = yes () => (float[b,s,8] r, float[b,s,8] y) {{ r = Cos(q) {UNIT} }},
          else_branch = no () => (float[b,s,8] c, float[b,s,8] d) {{ c = Sin(q) d = Exp(x) }}
        >""",
        f"""r = If (flag) <
          then_branch = yes () => (float[b,s,8] c) {{ c = Cos(q) }},
          else_branch = no () => (float[b,s,8] d) {{ d = Sin(q) }}
        >
        {UNIT}""",
    ],
    ids=["inside", "outside"],
)
def test_the_names_of_an_output_of_a_body_prove_no_shape(body: str) -> None:
    """r may be broadcast to x, whose names it has there."""
    proto = _model(body, "bool flag, float[b,s,8] x, float[p,s,8] q", "float[n,m,8] y")
    report = same(proto, {**X, "q": rows(1, 3, 8, seed=1), "flag": np.array(True)})
    assert reasons(report) == {"shapes_not_proved"}


def test_a_body_that_reads_the_sum_outside() -> None:
    """The residual sum outside stays available to the body that captures it."""
    inner = "k = Add(h, s)\n" + _rms("k", "t")
    body = "s = Add(x, r)\n" + _rms("s", "n") + _loop("y", "float[b,s,8] t", inner, start="n")
    proto = _model(body, "int64 count, float[b,s,8] x, float[b,s,8] r", "float[b,s,8] y")
    for count in (0, 2):
        report = same(proto, {**X, "r": rows(2, 3, 8, seed=1), "count": np.array(count)})
    assert fused_ops(report) == ["SkipRMSNorm", "SkipRMSNorm"]
    assert all(site.attributes["sum_used"] == (site.output == "n") for site in report.sites)


def test_a_body_that_reads_inside_a_match_outside() -> None:
    """A value in the middle of a norm outside that a body captures keeps its producers."""
    inner = "k = Mul(h, n_root)\n" + _glu("k", "t")
    body = _rms("x", "n") + _loop("y", "float[b,s,8] t", inner, start="n")
    proto = _model(body, "int64 count, float[b,s,8] x", "float[b,s,8] y")
    report = same(proto, {**X, "count": np.array(2)})
    assert fused_ops(report) == ["GLU", "RMSNorm"]


def test_the_mean_square_outside_its_norm_inside() -> None:
    """What is computed once is not to be computed in every turn."""
    outer = "sq = Mul(x, x)\nms = ReduceMean<keepdims = 1>(sq, last)\nv = Add(ms, eps)\n"
    inner = "root = Sqrt(v)\nn = Div(x, root)\nm = Mul(n, gamma)\nt = Sub(m, h)"
    body = outer + _loop("y", "float[b,s,8] t", inner)
    proto = _model(body, "int64 count, float[b,s,8] x", "float[b,s,8] y")
    report = same(proto, {**X, "count": np.array(2)})
    assert _sites(report) == [("RMSNorm", "refused", "other_graph")]


def test_the_sum_outside_its_norm_inside() -> None:
    """The sum is computed once; taken into the body, it would be once a turn."""
    inner = _rms("s", "m") + "t = Add(m, h)"
    body = "s = Add(x, r)\n" + _loop("y", "float[b,s,8] t", inner)
    proto = _model(body, "int64 count, float[b,s,8] x, float[b,s,8] r", "float[b,s,8] y")
    report = same(proto, {**X, "r": rows(2, 3, 8, seed=1), "count": np.array(2)})
    assert _sites(report) == [("RMSNorm", "fused", None), ("SkipRMSNorm", "refused", "other_graph")]


def test_a_scan() -> None:
    """State and scanned rows; the body's outputs are the sum and its norm."""
    inner = "s = Add(h, row)\n" + _rms("s", "n")
    body = f"""
      last_state, y = Scan <num_scan_inputs = 1,
        body = step (float[b,8] h, float[b,8] row) => (float[b,8] s, float[b,8] n) {{ {inner} }}
      > (start, x)
    """
    proto = _model(
        body, "float[b,8] start, float[s,b,8] x", "float[b,8] last_state, float[s,b,8] y"
    )
    report = same(proto, {"start": rows(2, 8, seed=3), "x": rows(4, 2, 8)})
    assert fused_ops(report) == ["SkipRMSNorm"]


def test_an_if_in_a_loop() -> None:
    """Three graphs deep; each branch has a norm of its own, one captures the sum of the body."""
    branches = f"""
      s = Add(h, r)
      even = Mod(i, two)
      flag = Cast<to = 9>(even)
      t = If (flag) <
        then_branch = odd () => (float[b,s,8] p) {{ {_block("s", "q")} p = Add(q_out, q) }},
        else_branch = even () => (float[b,s,8] w) {{ {_rms("h", "w_norm")} w = Add(w_norm, s) }}
      >
    """
    body = _loop("y", "float[b,s,8] t", branches)
    proto = _model(body, "int64 count, float[b,s,8] x, float[b,s,8] r", "float[b,s,8] y")
    for count in (1, 2, 3):
        report = same(proto, {**X, "r": rows(2, 3, 8, seed=1), "count": np.array(count)})
    assert fused_ops(report) == ["GLU", "RMSNorm", "RMSNorm", "SkipRMSNorm"]


@pytest.mark.parametrize("outer", ["captured", "made up"])
def test_a_name_made_up_in_a_body_hides_no_outer_one(outer: str) -> None:
    """A scale of one number is repeated into half_x8: in the graph, in both branches."""
    first, factor = _rms("x", "n").replace("gamma", "half"), "n"
    if outer == "captured":
        first, factor = "n = Mul(x, half_x8)", "half_x8"
    body = f"""
      {first}
      y = If (flag) <
        then_branch = yes () => (float[b,s,8] p)
          {{ {_rms("n", "q").replace("gamma", "half")} p = Mul(q, {factor}) }},
        else_branch = no () => (float[b,s,8] w) {{ {_rms("n", "w").replace("gamma", "half")} }}
      >
    """
    proto = _model(body, "float[b,s,8] x, bool flag", "float[b,s,8] y")
    for flag in (True, False):
        report = same(proto, {**X, "flag": np.array(flag)})
    assert fused_ops(report) == ["RMSNorm"] * (2 if outer == "captured" else 3)
    graph, *branches = fusenorm.optimize(proto).model.graphs()
    outside = {value.name for value in graph.initializers.values()}
    assert "half_x8" in outside
    assert all(outside.isdisjoint(branch.initializers) for branch in branches)


def _written(model: ir.Model) -> list[str]:
    """Every node of the model and its bodies, as text without types."""
    return [str(ir.to_proto(node)) for node in model.graph.all_nodes() if not _bodies(node)]


def _bodies(node: ir.Node) -> bool:
    return any(attr.type == ir.AttributeType.GRAPH for attr in node.attributes.values())


def test_optimising_again_changes_nothing() -> None:
    body = _loop("y, all", "float[b,s,8] t, float[b,s,8] t_out", _block("h", "t"))
    proto = _model(body, "int64 count, float[b,s,8] x", "float[b,s,8] y, float[n,b,s,8] all")
    once = fusenorm.optimize(proto)
    twice = fusenorm.optimize(ir.to_proto(once.model))
    assert fused_ops(twice.report) == BLOCK
    assert _written(twice.model) == _written(once.model)


def test_a_loop_keeps_its_absent_condition() -> None:
    body = 'all = Loop (count, "") <body = step (int64 i, bool go) => (bool next, float[b,s,8] t) {'
    body += f"next = Identity(go)\n{_rms('x', 't')} }} >"
    proto = _model(body, "int64 count, float[b,s,8] x", "float[n,b,s,8] all")
    assert fused_ops(same(proto, {**X, "count": np.array(2)})) == ["RMSNorm"]


def test_constants_a_body_needs_no_more_go() -> None:
    inner = _rms("h", "t")
    constants = "last = Constant<value_ints = [-1]>()\neps = Constant<value_float = 1.0e-5>()\n"
    body = _loop("y", "float[b,s,8] t", constants + inner)
    proto = model(
        body,
        "int64 count, float[b,s,8] x",
        "float[b,s,8] y",
        constants={"gamma": GAMMA},
    )
    assert fused_ops(same(proto, {**X, "count": np.array(2)})) == ["RMSNorm"]
    _, inside = fusenorm.optimize(proto).model.graphs()
    assert not inside.initializers


def _as_body(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A graph as the body of a Loop of one turn that captures its inputs."""
    body = onnx.GraphProto()
    body.CopyFrom(proto.graph)
    del body.input[:]
    integer, boolean = onnx.TensorProto.INT64, onnx.TensorProto.BOOL
    body.input.append(onnx.helper.make_tensor_value_info("turn", integer, []))
    body.input.append(onnx.helper.make_tensor_value_info("go", boolean, []))
    body.node.append(onnx.helper.make_node("Identity", ["go"], ["next"]))
    body.output.insert(0, onnx.helper.make_tensor_value_info("next", boolean, []))
    names = [f"{output.name}_all" for output in proto.graph.output]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Loop", ["count", ""], names, body=body)],
        "outer",
        list(proto.graph.input),
        [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names],
        [onnx.numpy_helper.from_array(np.array(1), "count")],
    )
    return onnx.helper.make_model(
        graph, opset_imports=list(proto.opset_import), ir_version=proto.ir_version
    )


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(graphs())
def test_any_graph_as_a_body(work: ir.Model) -> None:
    """What fuses in a graph fuses in a body, and the outputs stay."""
    proto = ir.to_proto(work)
    body = _as_body(proto)
    outside, inside = fusenorm.optimize(proto), fusenorm.optimize(body)
    assert fused_ops(inside.report) == fused_ops(outside.report)
    feeds = {info.name: rows(*SHAPE, seed=seed) for seed, info in enumerate(proto.graph.input)}
    outputs = zip(run(body, feeds), run(ir.to_proto(inside.model), feeds), strict=True)
    for a, b in outputs:
        assert a.shape == b.shape
        finite = np.isfinite(a)
        assert np.array_equal(finite, np.isfinite(b))
        scale = max(float(np.abs(a[finite]).max(initial=0)), 1e-3)
        np.testing.assert_allclose(b[finite], a[finite], rtol=0, atol=1e-4 * scale)


FUNCTIONS = """<ir_version: 8, opset_import: ["" : 18, "mine" : 1]>
graph ({inputs}) => ({outputs}) {{
{body}
}}
{functions}
"""
NORM = """<domain: "mine", opset_import: ["" : {opset}]>
{name} (x, gamma) => (y)
{{
  eps = Constant<value_float = 1.0e-5>()
  last = Constant<value_ints = [-1]>()
  {body}
}}
"""


def _norm_function(name: str = "Norm", opset: int = 18) -> str:
    body = _rms("x", "y")
    if opset < 18:
        body = body.replace("<keepdims = 1>(y_sq, last)", "<axes = [-1], keepdims = 1>(y_sq)")
    return NORM.format(name=name, opset=opset, body=body)


def _functions(
    body: str,
    *functions: str,
    inputs: str = "float[b,s,8] x",
    outputs: str = "float[b,s,8] y",
    check: bool = True,
) -> onnx.ModelProto:
    text = FUNCTIONS.format(
        inputs=inputs, outputs=outputs, body=body, functions="\n".join(functions)
    )
    proto = onnx.parser.parse_model(text)
    for name, array in _used(body).items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    if check:
        onnx.checker.check_model(proto)
    return proto


def _sites(report: Report) -> list[tuple[str, str, str | None]]:
    return [(site.op, site.status, site.reason) for site in report.sites]


def test_a_function_called_twice() -> None:
    proto = _functions(
        "a = mine.Norm(x, gamma)\nb = Relu(a)\ny = mine.Norm(b, gamma)", _norm_function()
    )
    report = same(proto, X)
    assert fused_ops(report) == ["RMSNorm", "RMSNorm"]
    assert len({site.output for site in report.sites}) == 2
    assert {f.domain for f in fused(proto)[0].functions} == {"fusenorm"}


def test_a_function_that_calls_another() -> None:
    block = (
        '<domain: "mine", opset_import: ["" : 18, "mine" : 1]>\n'
        "Block (x, gamma, gate, up) => (y)\n{"
        + "n = mine.Norm(x, gamma)\n"
        + _glu("n", "f")
        + "s = Add(x, f)\ny = mine.Norm(s, gamma)}"
    )
    proto = _functions("y = mine.Block(x, gamma, gate, up)", block, _norm_function())
    assert fused_ops(same(proto, X)) == BLOCK


def test_a_function_with_an_attribute() -> None:
    """Each call has its own, or the default."""
    text = _norm_function().replace("Norm (x", "Norm <e: float = 0.001> (x")
    text = text.replace("value_float = 1.0e-5", "value_float: float = @e")
    proto = _functions("a = mine.Norm<e = 0.1>(x, gamma)\ny = mine.Norm(a, gamma)", text)
    report = same(proto, X)
    assert fused_ops(report) == ["RMSNorm", "RMSNorm"]
    assert [site.attributes["epsilon"] for site in report.sites] == pytest.approx([0.1, 0.001])


def test_a_function_called_from_a_body() -> None:
    loop = _loop("y", "float[b,s,8] t", "t = mine.Norm(h, gamma)")
    proto = _functions(loop, _norm_function(), inputs="int64 count, float[b,s,8] x")
    assert fused_ops(same(proto, {**X, "count": np.array(2)})) == ["RMSNorm"]


def test_a_function_with_a_body_inside() -> None:
    inner = f"""
      y = If (flag) <
        then_branch = yes () => (float[b,s,8] p) {{ {_rms("x", "p")} }},
        else_branch = no () => (float[b,s,8] q) {{ q = Relu(x) }}
      >
    """
    text = NORM.format(name="Maybe", opset=18, body=inner).replace(
        "(x, gamma)", "(x, gamma, flag)", 1
    )
    proto = _functions("y = mine.Maybe(x, gamma, flag)", text, inputs="float[b,s,8] x, bool flag")
    for flag in (True, False):
        assert fused_ops(same(proto, {**X, "flag": np.array(flag)})) == ["RMSNorm"]


def test_a_function_in_another_opset_whose_operators_are_the_same() -> None:
    unit = (
        f'<domain: "mine", opset_import: ["" : 17]>\nOld (x, gate, up) => (y) {{{_glu("x", "y")}}}'
    )
    proto = _functions("y = mine.Old(x, gate, up)", unit)
    assert fused_ops(same(proto, X)) == ["GLU"]
    assert fused(proto)[0].opset_import[0].version == 18


def test_a_function_in_another_opset_with_other_operators_stays() -> None:
    """ReduceMean took its axes as an attribute then; the rest is fused."""
    proto = _functions(
        "a = mine.Old(x, gamma)\ny = mine.Norm(a, gamma)",
        _norm_function("Old", 17),
        _norm_function(),
        check=False,
    )
    result = fusenorm.optimize(proto)
    assert _sites(result.report) == [
        ("RMSNorm", "fused", None),
        ("RMSNorm", "refused", "function_opset"),
    ]
    assert "function mine:Old is not inlined" in str(result.report.sites[1].detail)
    (old,) = (f for f in result.model.functions.values() if f.name == "Old")
    assert old.opset_imports[""] == 17


def test_what_a_function_of_another_opset_calls_stays_too() -> None:
    """Inlined there, this opset's operators would stand in a body of another."""
    outer = _norm_function("Old", 17).replace("y = Mul(y_n, gamma)", "y = mine.Norm(y_n, gamma)")
    outer = outer.replace('["" : 17]', '["" : 17, "mine" : 1]')
    proto = _functions("y = mine.Old(x, gamma)", outer, _norm_function(), check=False)
    result = fusenorm.optimize(proto)
    assert _sites(result.report) == [("RMSNorm", "refused", "function_opset")] * 2
    (old,) = (f for f in result.model.functions.values() if f.name == "Old")
    assert [node.op_type for node in old][-1] == "Norm"
    assert len(result.model.functions) == 2


def test_a_function_that_imports_another_domain() -> None:
    text = NORM.format(
        name="Quick", opset=18, body="y = com.microsoft.QuickGelu<alpha = 1.0>(x)"
    ).replace('["" : 18]', '["" : 18, "com.microsoft" : 1]')
    proto = _functions("y = mine.Quick(x, gamma)", text)
    assert fused_ops(same(proto, X)) == ["Swish"]


def test_two_functions_of_two_versions_of_a_domain() -> None:
    """The model takes over the first one's version; the second stays."""
    functions = [
        f'<domain: "mine", opset_import: ["" : 18, "theirs" : {version}]>\n'
        f"F{version} (x) => (y) {{ h = theirs.Op(x)\ns = Sigmoid(h)\ny = Mul(x, s) }}"
        for version in (1, 2)
    ]
    proto = _functions("a = mine.F1(x)\ny = mine.F2(a)", *functions, check=False)
    result = fusenorm.optimize(proto)
    first, second = result.report.sites
    assert first.reason != second.reason == "function_opset"
    assert result.model.opset_imports["theirs"] == 1


@pytest.mark.parametrize("used", [True, False])
def test_a_function_of_another_version_of_a_domain(used: bool) -> None:
    """What the versions of a domain nobody knows have in common, nobody knows."""
    text = _norm_function().replace('["" : 18]', '["" : 18, "theirs" : 2]')
    if used:
        text = text.replace("y_root = Sqrt", "y_root = theirs.Sqrt")
    proto = _functions("a = theirs.Thing(x)\ny = mine.Norm(a, gamma)", text, check=False)
    proto.opset_import.add(domain="theirs", version=1)
    report = fusenorm.explain(proto)
    if used:
        assert _sites(report) == [("RMSNorm", "refused", "function_opset")]
    else:
        assert "mine" not in {
            function.domain for function in fusenorm.optimize(proto).model.functions.values()
        }
