"""Linear maps of one input: which become one op, in which groups, and which stay alone."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import fusenorm
from fusenorm.passes.concat_linear import ConcatLinearMaps
from fusenorm.passes.pattern import Refusal
from fusenorm.passes.rewrite import SOURCE_KEY
from fusenorm.passes.validate import Claim, Validator, find_flaw
from fusenorm.pipeline import DEFAULTS, Options, lower_regions
from tests import corpus
from tests.graphs import model, rows, run

X = "float[b,s,8] x"
WIDTHS = {"w": 64, "v": 96, "u": 32, "t": 64, "r": 32, "q": 32, "p": 32}
CONSTANTS = {name: rows(8, width, seed=width + ord(name)) for name, width in WIDTHS.items()} | {
    f"{name}b": rows(width, seed=ord(name)) for name, width in WIDTHS.items()
}


def maps(*names: str, of: str = "x", bias: str = "") -> str:
    """A line or two for each map: y_NAME = x·NAME, and a bias for those in `bias`."""
    lines = []
    for name in names:
        if name in bias:
            lines.append(f"h_{name} = MatMul ({of}, {name})\n y_{name} = Add (h_{name}, {name}b)")
        else:
            lines.append(f"y_{name} = MatMul ({of}, {name})")
    return "\n".join(lines)


def lowered(
    body: str, inputs: str = X, *, more: str = "", options: Options = DEFAULTS
) -> tuple[ir.Model, list[str], list[str | None]]:
    """The lowered model, kinds of its linear ops and reasons of refusals; outputs must agree."""
    words = body.replace("(", " ").replace(")", " ").replace(",", " ").split()
    given = [f"float[b,s,{WIDTHS[word[2:]]}] {word}" for word in words if word[:2] == "y_"
             and word[2:] in WIDTHS]  # fmt: skip
    outputs = ", ".join([*dict.fromkeys(given), *([more] if more else [])])
    constants = {name: array for name, array in CONSTANTS.items() if name in words}
    proto = model(body, inputs, outputs, constants=constants)
    work, regions = lower_regions(fusenorm.optimize(proto).model, options=options)
    after = ir.to_proto(work)
    onnx.checker.check_model(after)
    feeds = {value.name: rows(2, 3, 8, seed=5 + place) for place, value in
             enumerate(proto.graph.input)}  # fmt: skip
    for a, b in zip(run(proto, feeds), run(after, feeds), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=4e-6 * np.abs(a).max())
    kinds = [node.op_type for node in work.graph if node.op_type.startswith("Linear")]
    return work, kinds, [site.reason for site in regions if site.status == "refused"]


@pytest.mark.parametrize(
    ("kinds", "body"),
    [
        (["Linear_2maps"], maps("w", "v")),
        (["Linear_3maps"], maps("w", "v", "u")),
        (["Linear_2maps", "Linear_2maps"], maps("w", "v", "u", "t")),
        (["Linear_2maps", "Linear_3maps"], maps("w", "v", "u", "t", "r")),
        (["Linear_3maps", "Linear_3maps"], maps("w", "v", "u", "t", "r", "q")),
        (["Linear_2maps", "Linear_2maps", "Linear_3maps"], maps("w", "v", "u", "t", "r", "q", "p")),
        (["Linear_3maps_bias"], maps("w", "v", "u", bias="wvu")),
        # of different inputs
        (["Linear_2maps", "Linear_2maps"], maps("w", "v") + "\n" + maps("u", "t", of="z")),
        (["Linear", "Linear"], maps("w") + "\n" + maps("v", of="z")),
        # one after another
        (["Linear_2maps"], "c = Cos (x)\n" + maps("w", "v", of="c")),
    ],
)
def test_plain_maps_of_one_input_stand_side_by_side(kinds: list[str], body: str) -> None:
    inputs = f"{X}, float[b,s,8] z" if "(z" in body else X
    assert lowered(body, inputs)[1:] == (kinds, [])


@pytest.mark.parametrize(
    ("kinds", "body"),
    [
        (["Linear_2maps_bias", "Linear"], maps("w", "u", "v", bias="wv")),
        (["Linear_2maps", "Linear_relu"], maps("w", "u") + "\nh = MatMul (x, v)\ny_v = Relu (h)"),
        (["Linear_bias", "Linear"], maps("w", "u", bias="w")),
    ],
)
def test_what_ends_otherwise_stays_alone(kinds: list[str], body: str) -> None:
    _, found, reasons = lowered(body)
    assert sorted(found) == sorted(kinds)
    alone = sum("maps" not in kind for kind in kinds)
    assert reasons == ["unlike"] * alone


def test_activated_maps_stay_alone_even_if_alike() -> None:
    body = "g = MatMul (x, w)\nh = MatMul (x, v)\ny_w = Relu (g)\ny_v = Relu (h)"
    assert lowered(body)[1:] == (["Linear_relu", "Linear_relu"], ["unlike", "unlike"])


def test_gated_units_stay_alone() -> None:
    body = (
        maps("u")
        + """
        g = MatMul (x, w)\n h = MatMul (x, t)\n s = Sigmoid (g)\n y_w = Mul (h, s)"""
    )
    assert sorted(lowered(body)[1]) == ["Linear", "LinearGLU_sigmoid"]


def test_16_bits_stand_side_by_side_too() -> None:
    constants = {"w": rows(8, 64).astype(np.float16), "v": rows(8, 32).astype(np.float16)}
    proto = model(
        "y = MatMul (x, w)\nz = MatMul (x, v)",
        "float16[s,8] x",
        "float16[s,64] y, float16[s,32] z",
        constants=constants,
    )
    work, _ = lower_regions(fusenorm.optimize(proto).model)
    assert [node.op_type for node in work.graph] == ["Linear_2maps_f16"]


def test_a_map_between_others_that_reads_one_of_them() -> None:
    """The op stands where the first map stood, before what reads any of them."""
    body = maps("w") + "\nc = Cos (y_w)\n" + maps("v") + "\ne = Add (c, y_w)"
    work, kinds, reasons = lowered(body, more="float[b,s,64] e")
    assert (kinds, reasons) == (["Linear_2maps"], [])
    assert [node.op_type for node in work.graph] == ["Linear_2maps", "Cos", "Add"]


SPLIT = {
    "w": rows(8, 192),
    "z": rows(8, 64),
    "b": rows(192),
    "cube": rows(1, 1, 192),
    "sizes": np.array([32, 64, 96]),
    "odd": np.array([32, 62, 98]),
    "four": np.array([32, 64, 64, 32]),
}


def split(
    body: str,
    outputs: str = "float[b,s,32] q, float[b,s,64] k, float[b,s,96] v",
    known: Mapping[str, np.ndarray] = SPLIT,
) -> list[str]:
    """Op types of the lowered model; outputs must agree."""
    words = body.replace("(", " ").replace(")", " ").replace(",", " ").split()
    constants = {name: array for name, array in known.items() if name in words}
    proto = model(body, X, outputs, constants=constants)
    work, _ = lower_regions(fusenorm.optimize(proto).model)
    after = ir.to_proto(work)
    onnx.checker.check_model(after)
    feeds = {"x": rows(2, 3, 8, seed=5)}
    for a, b in zip(run(proto, feeds), run(after, feeds), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=4e-6 * np.abs(a).max())
    return [node.op_type for node in work.graph]


@pytest.mark.parametrize("axis", [2, -1])
@pytest.mark.parametrize(
    ("kind", "product"),
    [
        ("Linear_3maps", "h = MatMul (x, w)"),
        ("Linear_3maps_bias", "p = MatMul (x, w)\n h = Add (p, b)"),
        ("Linear_3maps_bias", "p = MatMul (x, w)\n h = Add (cube, p)"),
    ],
)
def test_columns_that_are_dealt_out_are_maps_of_their_own(
    kind: str, product: str, axis: int
) -> None:
    assert split(f"{product}\n q, k, v = Split <axis: int = {axis}> (h, sizes)") == [kind]


def test_maps_of_what_such_maps_made() -> None:
    """The second group reads an output of the first one's op, and so does the second Split."""
    wide = {"w": rows(8, 64), "v": rows(8, 96), "t": rows(64, 32), "r": rows(64, 64)}
    body = "h = MatMul (x, w)\n k = MatMul (x, v)\n q = MatMul (h, t)\n z = MatMul (h, r)"
    outputs = "float[b,s,96] k, float[b,s,32] q, float[b,s,64] z"
    assert split(body, outputs, wide) == ["Linear_2maps", "Linear_2maps"]
    wide = {
        "w": rows(8, 96),
        "v": rows(32, 64),
        "two": np.array([32, 64]),
        "half": np.array([32, 32]),
    }
    body = """h = MatMul (x, w)\n m, k = Split <axis: int = -1> (h, two)
        n = MatMul (m, v)\n q, z = Split <axis: int = -1> (n, half)"""
    outputs = "float[b,s,64] k, float[b,s,32] q, float[b,s,32] z"
    assert split(body, outputs, wide) == ["Linear_2maps", "Linear_2maps"]


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        ("q, k, v = Split <axis: int = -1> (h, odd)", "float[b,s,32] q, float[b,s,62] k, float v"),
        (
            "q, k, v, o = Split <axis: int = -1> (h, four)",
            "float[b,s,32] q, float[b,s,64] k, float[b,s,64] v, float[b,s,32] o",
        ),
        (
            "q, k, v = Split <axis: int = -1> (h, sizes)\n r = Relu (h)",
            "float[b,s,32] q, float[b,s,64] k, float[b,s,96] v, float[b,s,192] r",
        ),
        (
            "q, k, v = Split <axis: int = -1> (h, sizes)",
            "float[b,s,32] q, float[b,s,64] k, float[b,s,96] v, float[b,s,192] h",
        ),
        (
            "q, k, v = Split <axis: int = 1, num_outputs: int = 3> (h)",
            "float[b,m,192] q, float[b,m,192] k, float[b,n,192] v",
        ),
        (
            "r = Relu (h)\n q, k, v = Split <axis: int = -1> (r, sizes)",
            "float[b,s,32] q, float[b,s,64] k, float[b,s,96] v",
        ),
    ],
)
def test_columns_that_stay_together(body: str, outputs: str) -> None:
    kinds = split(f"h = MatMul (x, w)\n {body}", outputs)
    assert "Split" in kinds
    assert "Linear_3maps" not in kinds


def test_a_map_beside_others_is_not_split_up_as_well() -> None:
    body = """h = MatMul (x, w)\n q, k, v = Split <axis: int = -1> (h, sizes)\n o = MatMul (x, z)"""
    outputs = "float[b,s,32] q, float[b,s,64] k, float[b,s,96] v, float[b,s,64] o"
    assert split(body, outputs) == ["Linear_2maps", "Split"]


def test_maps_in_two_graphs_stay_apart() -> None:
    body = """y_w = MatMul (x, w)
        y_v = If (flag) <
          then_branch = g1 () => (float[b,s,96] a) { a = MatMul (x, v) },
          else_branch = g2 () => (float[b,s,96] c) { c = Neg (other) }
        >"""
    proto = model(
        body, f"{X}, bool flag, float[b,s,96] other", "float[b,s,64] y_w, float[b,s,96] y_v",
        constants={name: CONSTANTS[name] for name in "wv"},
    )  # fmt: skip
    _, regions = lower_regions(fusenorm.optimize(proto).model)
    kinds = [site.attributes["kind"] for site in regions if site.status == "fused"]
    assert kinds == ["Linear", "Linear"]


def test_an_op_of_another_domain_is_no_map() -> None:
    work = ir.from_proto(onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 18, "other" : 1]>'
        "graph (float[s,8] x, float[2,8,32] w) => (float[s,64] y, float[s,64] z) {"
        "y = other.Linear (x, w)\n z = other.Linear (x, w) }"
    ))  # fmt: skip
    assert not ConcatLinearMaps()(work).modified


def test_the_option_leaves_every_map_alone() -> None:
    off = Options(concat_linear=False)
    assert lowered(maps("w", "v"), options=off)[1:] == (["Linear", "Linear"], [])


def test_the_report_names_every_map() -> None:
    proto = model(
        maps("w", "v"), outputs="float[b,s,64] y_w, float[b,s,96] y_v",
        constants={name: CONSTANTS[name] for name in "wv"},
    )  # fmt: skip
    for node, name in zip(proto.graph.node, ("query", "key"), strict=True):
        node.name = name
    _, (site,) = lower_regions(fusenorm.optimize(proto).model)
    assert (site.status, site.op, site.nodes) == ("fused", "Linear", ("query", "key"))
    assert site.attributes == {"kind": "Linear_2maps", "rule": "concat_linear"}


def test_a_refused_proof_leaves_the_maps_and_is_reported_once() -> None:
    def refuse(rewrite: object, opset: int) -> Refusal | None:
        two = rewrite.spec.op_type == "Linear_2maps"  # type: ignore[attr-defined]
        return Refusal("slower", "n", "why") if two else None

    proto = model(
        maps("w", "v"), outputs="float[b,s,64] y_w, float[b,s,96] y_v",
        constants={name: CONSTANTS[name] for name in "wv"},
    )  # fmt: skip
    work, regions = lower_regions(fusenorm.optimize(proto).model, refuse)
    assert [node.op_type for node in work.graph] == ["Linear", "Linear"]
    assert [site.status for site in regions] == ["fused", "refused", "fused"]
    (refused,) = (site for site in regions if site.status == "refused")
    assert (refused.op, refused.reason, len(refused.nodes)) == ("LinearMaps", "slower", 2)
    assert not ConcatLinearMaps(refuse)(work).modified


def test_the_proof_reads_no_weight() -> None:
    """It would cost as much as that of every map; the algebra does not depend on the numbers."""
    proto = model(
        maps("w", "v"), outputs="float[b,s,64] y_w, float[b,s,96] y_v",
        constants={name: CONSTANTS[name] for name in "wv"},
    )  # fmt: skip
    claims = []

    def check(rewrite: object, opset: int) -> Refusal | None:
        claims.append(Claim.of(rewrite, opset))  # type: ignore[arg-type]
        return Validator()(rewrite, opset)  # type: ignore[arg-type]

    lower_regions(fusenorm.optimize(proto).model, check)
    assert claims[-1].constants == {}
    assert [operand.shape for operand in claims[-1].operands[1:]] == [(2, 8, 32), (3, 8, 32)]
    assert find_flaw(claims[-1]) is None


def test_a_proof_of_swapped_maps_fails() -> None:
    proto = model(
        maps("w", "t"), outputs="float[b,s,64] y_w, float[b,s,64] y_t",
        constants={name: CONSTANTS[name] for name in "wt"},
    )  # fmt: skip
    seen = []

    def check(rewrite: object, opset: int) -> Refusal | None:
        if rewrite.spec.op_type == "Linear_2maps":  # type: ignore[attr-defined]
            x, one, other = rewrite.inputs  # type: ignore[attr-defined]
            swapped = type(rewrite)(**{**vars(rewrite), "inputs": (x, other, one)})  # type: ignore[arg-type]
            seen.append(Validator()(swapped, opset))
        return None

    lower_regions(fusenorm.optimize(proto).model, check)
    assert seen[0].code == "check_failed"


EXPECTED = {
    "bert": {"Linear_3maps_bias": 2},
    "gpt2": {"Linear_3maps_bias": 2},
    "llama": {"Linear_3maps": 2},
    "qwen2": {"Linear_3maps_bias": 2},
    "gemma": {"Linear_3maps": 2},
    "t5_v1_1_enc": {"Linear_3maps": 2},
    "vit": {"Linear_3maps_bias": 2},
    "bart": {"Linear_3maps_bias": 4, "Linear_2maps_bias": 2},
    "whisper_enc": {"Linear_3maps_bias": 2},  # its keys have no bias before a norm's is folded in
}


@pytest.mark.skipif(not corpus.available(), reason="the corpus is not here")
@pytest.mark.parametrize("name", EXPECTED)
def test_real_exports(name: str) -> None:
    for path in corpus.files((name,)):
        result = fusenorm.optimize(path)
        work, regions = lower_regions(result.model)
        kinds = collections.Counter(str(s.attributes["kind"]) for s in regions)
        assert {kind: n for kind, n in kinds.items() if "maps" in kind} == EXPECTED[name], path.name
        _agree(path, result.model, work)


def _agree(path: Path, before: ir.Model, after: ir.Model) -> None:
    """The outputs with and without lowering, on the inputs kept beside an export."""
    with np.load(path.with_suffix(".npz")) as stored:
        wanted = {value.name for value in before.graph.inputs}
        feeds = {name: stored[name] for name in stored.files if name in wanted}
    for a, b in zip(run(ir.to_proto(before), feeds), run(ir.to_proto(after), feeds), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=2e-5 * float(np.abs(a).max()))


def test_sources_of_fused_maps_are_kept() -> None:
    """A bias and its product are both named by the op that takes three such maps."""
    work, _, _ = lowered(maps("w", "v", "u", bias="wvu"))
    (node,) = work.graph
    assert len(node.metadata_props[SOURCE_KEY].split("\n")) == 6
