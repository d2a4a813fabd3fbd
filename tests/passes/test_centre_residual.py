"""LayerNorm made RMSNorm: which residual streams can be centred, which not, and outputs equal."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

import fusenorm
from fusenorm.ops import DOMAIN
from fusenorm.ops.linear import unpack
from fusenorm.passes.centre_residual import STREAMS_KEY, CentreResidual
from fusenorm.passes.infer_shapes import InferShapes
from fusenorm.pipeline import Options, lower_regions
from fusenorm.report import CENTRED_STREAM, Site
from tests import corpus, graphs
from tests.graphs import model, rows, run, values

K, IDS = 32, "int64[b,s] ids"
CONSTANTS = {
    "table": rows(50, K, seed=1),
    "other": rows(50, K, seed=2),
    "w": rows(K, K, seed=3),
    "v": rows(K, K, seed=4),
    "u": rows(K, 64, seed=5),
    "d": rows(64, K, seed=6),
    "c": rows(K, seed=7),
    "g": np.linspace(0.5, 2, K, dtype=np.float32),
    "b": np.linspace(-1, 1, K, dtype=np.float32),
    "position": rows(1, 1, K, seed=8),
    "ls": np.linspace(0.1, 0.3, K, dtype=np.float32),
    "two": np.float32(2),
    "rank2": np.array([-1, K]),
    "pairs": np.array([0, 0, 2, 16]),
    "first": np.array([0]),
}
# A pre-norm model with one block: word embeddings, a map from norm to stream, a last norm.
EMBED = "x = Gather (table, ids)\n"
NORM = "n = LayerNormalization (x, g, b)\n"
BLOCK = "p = MatMul (n, w)\nf = Add (p, c)\nr = Add (x, f)\n"
LAST = "y = LayerNormalization (r, g, b)"
PRE = EMBED + NORM + BLOCK + LAST
Y = f"float[b,s,{K}] y"


def lowered(
    body: str,
    inputs: str = IDS,
    outputs: str = Y,
    *,
    opset: int = 18,
    constants: dict[str, np.ndarray] | None = None,
    options: Options = Options(centre_residual=True, fold_norm=()),  # noqa: B008
) -> tuple[ir.Model, list[Site]]:
    """The lowered model and what became of its streams; outputs must agree."""
    words = set(body.replace("(", " ").replace(")", " ").replace(",", " ").split())
    held = {name: array for name, array in CONSTANTS.items() if name in words} | (constants or {})
    proto = model(body, inputs, outputs, constants=held, opset=opset)
    work, regions = graphs.lowered(proto, options, bound=1e-5)
    return work, [site for site in regions if site.op == CENTRED_STREAM]


def norms(work: ir.Model) -> list[str]:
    return [node.op_type for node in work.graph if "Norm" in node.op_type]


CENTRED = {
    "pre-norm": (PRE, ["RMSNorm_bias", "SkipRMSNorm_bias"], ["x", "f"]),
    "two tables": (
        "a = Gather (table, ids)\nq = Gather (other, ids)\nx = Add (a, q)\n" + NORM + BLOCK + LAST,
        ["SkipRMSNorm_bias", "SkipRMSNorm_bias"],
        ["a", "f", "q"],
    ),
    "a constant": (
        "a = Gather (table, ids)\nx = Add (a, position)\n" + NORM + BLOCK + LAST,
        ["RMSNorm_bias", "SkipRMSNorm_bias"],
        ["a", "f", "position"],
    ),
    "two blocks": (
        EMBED + NORM + BLOCK + "m = LayerNormalization (r, g, b)\nh = MatMul (m, u)\n"
        "a = Relu (h)\nl = MatMul (a, d)\nt = Add (r, l)\ny = LayerNormalization (t, g, b)",
        ["RMSNorm_bias", "SkipRMSNorm_bias", "SkipRMSNorm_bias"],
        ["f", "l", "x"],
    ),
    "a multiplier": (
        EMBED + NORM + "p = MatMul (n, w)\nf = Add (p, c)\n"
        "a = Mul (x, two)\nr = Add (a, f)\n" + LAST,
        ["RMSNorm_bias", "SkipRMSNorm_bias_alpha"],
        ["f", "x"],
    ),
    "a sum of three": (
        EMBED + NORM + "p = MatMul (n, w)\nq = MatMul (n, v)\n"
        "f = Add (p, q)\nr = Add (x, f)\n" + LAST,
        ["RMSNorm_bias", "SkipRMSNorm_bias"],
        ["p", "q", "x"],
    ),
    "rows regrouped": (
        EMBED + NORM + "m = Reshape (n, rank2)\np = Gemm (m, w, c)\nsh = Shape (x)\n"
        "f = Reshape (p, sh)\nr = Add (x, f)\n" + LAST,
        ["RMSNorm_bias", "SkipRMSNorm_bias"],
        ["f", "x"],
    ),
    "rows put in front": (
        "a = Gather (table, ids)\nx = Concat <axis: int = 1> (start, a)\n" + NORM + BLOCK + LAST,
        ["RMSNorm_bias", "SkipRMSNorm_bias"],
        ["a", "f", "start"],
    ),
    "a constant in the sum of a norm without bias": (
        "a = Gather (table, ids)\nx = Add (a, start)\ny = LayerNormalization (x, g)",
        ["SkipRMSNorm"],
        ["a", "start"],
    ),
}  # fmt: skip
START = {"start": rows(2, 1, K, seed=9)}


@pytest.mark.parametrize("case", CENTRED)
def test_centres(case: str) -> None:
    body, wanted, writers = CENTRED[case]
    more = START if "start" in body else None
    inputs = "int64[2,s] ids" if more else IDS
    outputs = f"float[2,t,{K}] y" if more else Y
    work, (site,) = lowered(body, inputs, outputs, constants=more)
    assert norms(work) == wanted
    assert (site.status, site.reason, site.attributes["kind"]) == ("fused", None, "RMSNorm")
    assert sorted(site.attributes["writers"]) == sorted(writers)
    assert len(site.nodes) == len(wanted)
    assert site.attributes["rule"] == "centre_residual"


def test_a_map_of_rows_of_unknown_width() -> None:
    body = "f = MatMul (h, w)\nx = Add (q, f)\ny = LayerNormalization (x, g, b)"
    more = {"w": rows(4, K)}
    _, (site,) = lowered(f"q = Gather (table, ids)\n{body}", f"{IDS}, float[b,s,k] h",
                         constants=more)  # fmt: skip
    assert site.status == "fused"


def test_the_writers_have_mean_zero_and_are_rounded_once() -> None:
    work, _ = lowered(PRE)
    gather, linear = (
        next(node for node in work.graph if node.op_type == kind)
        for kind in ("Gather", "Linear_bias")
    )
    table, weight, bias = (
        value.const_value.numpy()  # type: ignore[union-attr]
        for value in (gather.inputs[0], *linear.inputs[1:])
    )
    for made, name in ((table, "table"), (unpack(weight), "w"), (bias, "c")):
        wide = CONSTANTS[name].astype(np.float64)
        want = (wide - wide.mean(-1, keepdims=True)).astype(np.float32)
        assert made.dtype == np.float32
        np.testing.assert_allclose(made, want, rtol=0, atol=1e-7)


def test_a_weight_of_several_panels_is_centred_over_all_of_them() -> None:
    wide = {"table": rows(50, 96), "w": rows(96, 96), "g": rows(96), "b": rows(96), "c": rows(96)}
    work, (site,) = lowered(PRE, outputs="float[b,s,96] y", constants=wide)
    assert site.status == "fused"
    (linear,) = (node for node in work.graph if node.op_type == "Linear_bias")
    matrix = unpack(linear.inputs[1].const_value.numpy())  # type: ignore[union-attr]
    assert np.abs(matrix.mean(axis=1)).max() < 1e-6


def test_a_constant_read_elsewhere_too_keeps_its_numbers_there() -> None:
    body = ("a = Gather (table, ids)\nx = Add (a, position)\n" + NORM + BLOCK
            + "t = LayerNormalization (r, g, b)\ny = Add (t, position)")  # fmt: skip
    work, (site,) = lowered(body)
    assert site.status == "fused"
    assert "position" in work.graph.initializers


def test_scale_and_bias_fold_behind_it() -> None:
    work, _ = lowered(PRE, options=Options(centre_residual=True))
    assert norms(work) == ["RMSNorm_noscale", "SkipRMSNorm_bias"]


def test_off_by_default() -> None:
    work, sites = lowered(PRE, options=Options(fold_norm=()))
    assert sites == []
    assert norms(work) == ["LayerNormalization", "SkipLayerNorm_bias"]


def block(more: str = "", *, last: str = LAST, embed: str = EMBED, norm: str = NORM) -> str:
    return f"{embed}{norm}{BLOCK}{more}{last}"


TWO = "t = LayerNormalization (r, g, b)\ny = Add (t, "
REFUSED: dict[str, list[tuple[str, str, str]]] = {
    "reader": [
        (block("e = Relu (r)\n", last=f"{TWO}e)"), IDS, Y),
        (block("e = Relu (f)\n", last=f"{TWO}e)"), IDS, Y),
        (block("e = Relu (x)\n", last=f"{TWO}e)"), IDS, Y),
        (block("e = Mul (r, r)\n", last=f"{TWO}e)"), IDS, Y),
        (block("e = Reshape (r, pairs)\nz = ReduceMax <keepdims: int = 0> (e)\n",
               last=f"{TWO}z)"), IDS, Y),
        (block("e = Concat <axis: int = -1> (r, x)\nz = ReduceMax <keepdims: int = 0> (e)\n",
               last=f"{TWO}z)"), IDS, Y),
        (block(last="y = RMSNormalization (r, g)"), IDS, Y),
        (block("e = If (flag) <then_branch = g1 () => (float[b,s,32] h) { h = Neg (r) },\n"
               "else_branch = g2 () => (float[b,s,32] k) { k = Relu (r) }>\n",
               last=f"{TWO}e)"), f"{IDS}, bool flag", Y),
    ],
    "output": [
        (PRE, IDS, f"{Y}, float[b,s,{K}] r"),
        (PRE, IDS, f"{Y}, float[b,s,{K}] x"),
        (PRE, IDS, f"{Y}, float[b,s,{K}] f"),
    ],
    "writer": [
        (block(embed=""), f"float[b,s,{K}] x", Y),
        (block(embed="a = Gather (table, ids)\nx = Relu (a)\n"), IDS, Y),
        (block(embed="x = Gather (cube, ids)\n"), "int64[b] ids", f"float[b,4,{K}] y"),
        (block(embed="x = Gather <axis: int = 1> (table, ids)\n"), f"int64[{K}] ids",
         f"float[50,{K}] y"),
        (EMBED + NORM + "p = MatMul (n, w)\nf = Relu (p)\nr = Add (x, f)\n" + LAST, IDS, Y),
        (EMBED + NORM + "p = MatMul (n, w)\nf = Mul (p, ls)\nr = Add (x, f)\n" + LAST, IDS, Y),
        (EMBED + NORM + BLOCK + "h = Gather (table, jds)\ne = Relu (h)\n" + f"{TWO}e)",
         f"{IDS}, int64[b,s] jds", Y),
        (EMBED + NORM + BLOCK + LAST, IDS, f"{Y}, float[50,{K}] table"),
    ],
    "post_norm": [
        (EMBED + NORM + "p = MatMul (n, w)\nr = Add (n, p)\n" + LAST, IDS, Y),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("reason", "case"), [(reason, case) for reason, cases in REFUSED.items() for case in cases]
)
def test_refuses(reason: str, case: tuple[str, str, str]) -> None:
    body, inputs, outputs = case
    more = {"cube": rows(50, 4, K)} if "cube" in body else {}
    work, sites = lowered(body, inputs, outputs, opset=23, constants=more)
    refused = [site for site in sites if site.status == "refused"]
    assert [site.reason for site in refused] == [reason]
    assert refused[0].detail
    assert refused[0].attributes["kind"] == "LayerNorm"
    made = sum(len(site.nodes) for site in sites if site.status == "fused")
    assert sum("RMSNorm_" in kind for kind in norms(work)) == made
    assert set(work.graph.initializers) >= {"g", "b"}


TABLES = "a = Gather (table, ids)\nx = Gather (other, ids)\n"
# Graphs of gathered rows: the norms of each stream, why it stays, and a word of the detail.
STREAMS: dict[str, list[tuple[tuple[str, ...], str | None, str]]] = {
    "e = Add (a, x)\ny = LayerNormalization (e, g)": [(("y",), None, "")],
    "e = Concat <axis: int = 0> (a, x)\ny = LayerNormalization (e, g)": [(("y",), None, "")],
    "e = Concat <axis: int = 1> (a, x)\ny = LayerNormalization (e, g)": [(("y",), None, "")],
    "e = Concat <axis: int = -1> (a, x)\ny = LayerNormalization (e, wide)": [
        (("y",), "writer", "made by Concat")],
    "e = Concat <axis: int = 2> (a, x)\nn = LayerNormalization (a, g)\n"
    "y = LayerNormalization (e, wide)": [
        (("n",), "reader", "Concat sees"), (("y",), "writer", "made by Concat")],
    "e = Reshape (x, rank2)\ny = LayerNormalization (e, g)": [(("y",), None, "")],
    "e = Reshape (x, pairs)\ny = LayerNormalization (e, narrow)": [
        (("y",), "writer", "made by Reshape")],
    "e = Add (x, two)\ny = LayerNormalization (e, g)": [(("y",), "writer", "made by Add")],
    "e = Add (x, given)\ny = LayerNormalization (e, g)": [(("y",), "writer", "is an input,")],
    "e = other.Add (a, x)\ny = LayerNormalization (e, g)": [(("y",), "writer", "made by Add")],
    "e = other.Gather (free, ids)\ny = LayerNormalization (e, g)": [
        (("y",), "writer", "made by Gather")],
    "e = Mul (free, column)\ny = LayerNormalization (e, g)": [
        (("y",), "writer", "made by Mul")],
    "t = Relu (free)\ne = Gather (t, ids)\ny = LayerNormalization (e, g)": [
        (("y",), "writer", "made by Gather")],
    "e = other.Linear (given, panels)\ny = LayerNormalization (e, g)": [
        (("y",), "writer", "made by Linear")],
    "e = fusenorm.Swish (x)\ny = LayerNormalization (e, g)": [
        (("y",), "writer", "made by Swish")],
    "e = fusenorm.Linear_bias (given, panels, g)\ny = LayerNormalization (e, g)": [
        (("y",), None, "")],
    "e = fusenorm.Linear_bias (given, panels, narrow)\ny = LayerNormalization (e, g)": [
        (("y",), "check_failed", "cannot be evaluated: ")],
    "y = LayerNormalization (x, scale)": [(("y",), None, "")],
    "e = Reshape (x, to)\ny = LayerNormalization (e, g)": [],  # of unknown width
    # What reads a result of the stream's reader is no part of the stream.
    "n = LayerNormalization (x, g)\ne = Relu (x)\ny = LayerNormalization (e, g)": [
        (("n",), "reader", "Relu sees"), (("y",), "writer", "made by Relu")],
}  # fmt: skip


@pytest.mark.parametrize("body", STREAMS)
def test_what_belongs_to_a_stream(body: str) -> None:
    more = {"wide": rows(2 * K), "narrow": rows(16), "free": rows(50, K), "panels": rows(1, K, K)}
    found = values(
        TABLES + body,
        f"int64[2,3] ids, float[2,3,{K}] given, float[50,1] column, float[{K}] scale, int64[2] to",
        known=f"float[2,3,{K}] e" if "." in body else "", constants=CONSTANTS | more,
    )  # fmt: skip
    graph = found["y"].producer().graph  # type: ignore[union-attr]
    found["y"].type = None  # to be inferred
    work = ir.Model(graph, ir_version=8)  # type: ignore[arg-type]
    InferShapes()(work)
    CentreResidual()(work)
    for outcome, (read, code, word) in zip(work.meta[STREAMS_KEY], STREAMS[body], strict=True):
        assert outcome.norms == read
        assert (outcome.refusal.code if outcome.refusal else None) == code
        assert outcome.refusal is None or word in outcome.refusal.detail


def test_16_bit_streams_stay() -> None:
    held = {name: CONSTANTS[name].astype(np.float16) for name in ("table", "w", "g", "b", "c")}
    proto = model(PRE, IDS, Y.replace("float", "float16"), constants=held)
    options = Options(centre_residual=True)
    work, regions = lower_regions(fusenorm.optimize(proto).model, options=options)
    assert [s.reason for s in regions if s.op == CENTRED_STREAM] == ["types"]
    assert not any("RMS" in kind for kind in norms(work))


def test_numbers_out_of_range_are_rolled_back() -> None:
    held = {"w": rows(K, K)}
    held["w"][0] = 3.3e38
    held["w"][0, 0] = -3.3e38
    proto = model(PRE, IDS, Y, constants={n: CONSTANTS[n] for n in ("table", "g", "b", "c")} | held)
    options = Options(centre_residual=True, fold_norm=())
    work, regions = lower_regions(fusenorm.optimize(proto).model, options=options)
    (site,) = (site for site in regions if site.op == CENTRED_STREAM)
    assert site.reason == "check_failed"
    assert norms(work) == ["LayerNormalization", "SkipLayerNorm_bias"]
    assert "table" in work.graph.initializers


def test_rms_norms_alone_are_no_stream() -> None:
    body = PRE.replace("LayerNormalization", "RMSNormalization").replace(", g, b)", ", g)")
    work, sites = lowered(body, opset=23)
    assert sites == []
    assert not CentreResidual()(work).modified


def test_it_is_done_once() -> None:
    work, _ = lowered(PRE, options=Options(fold_norm=()))
    assert CentreResidual()(work).modified
    assert not CentreResidual()(work).modified
    assert [node.domain for node in work.graph if "Norm" in node.op_type] == [DOMAIN, DOMAIN]


# Models whose every LayerNorm but those of post-norm stems becomes an RMSNorm.
EXPECTED = {"gpt2": 5, "opt": 5, "phi": 3, "falcon": 3, "stablelm": 5, "clip_text": 5}


@pytest.mark.skipif(not corpus.available(), reason="the corpus is not here")
@pytest.mark.parametrize("name", EXPECTED)
def test_real_exports(name: str) -> None:
    for path in corpus.files((name,)):
        result = fusenorm.optimize(path)
        work, regions = lower_regions(result.model, options=Options(centre_residual=True))
        made = [s for s in regions if s.op == CENTRED_STREAM and s.status == "fused"]
        assert sum(len(site.nodes) for site in made) == EXPECTED[name], path.name
        assert not any("LayerNorm" in kind for kind in norms(work))
        with np.load(path.with_suffix(".npz")) as stored:
            feeds = {value.name: stored[value.name] for value in result.model.graph.inputs}
        before, after = (ir.to_proto(each) for each in (result.model, work))
        for a, b in zip(run(before, feeds), run(after, feeds), strict=True):
            np.testing.assert_allclose(b, a, rtol=0, atol=2e-5 * float(np.abs(a).max()))
