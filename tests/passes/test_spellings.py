"""Every rule against its own spellings: each must fuse, stay valid and keep its outputs."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from fusenorm.passes import RULES
from fusenorm.passes.fuse_norm import FuseLayerNorm, FuseRMSNorm
from fusenorm.passes.rewrite import Rule
from fusenorm.passes.speller import Speller, spellings
from tests.graphs import fused, rows, run

EXPECTED = {
    "layer_norm": "LayerNorm",
    "rms_norm": "RMSNorm",
    "residual": "SkipLayerNorm",
    "gelu": "Gelu",
    "gelu_tanh": "Gelu",
    "swish": "Swish",
    "relu2": "Relu2",
    "glu": "GLU",
}
LIMIT = 40


def _write(rule: Rule, speller: Speller) -> ir.Value:
    rule.example(speller)
    return rule.pattern.spell(speller)


def _models(
    rule: Rule, opset: int, dtype: str, rank: int, island: bool = True, axes: int = 1
) -> list[ir.Model]:
    return list(
        spellings(
            lambda speller: _write(rule, speller),
            opset=opset,
            dtype=dtype,  # type: ignore[arg-type]
            rank=rank,
            island=island,
            axes=axes,
            limit=LIMIT,
        )
    )


def _feeds(model: ir.Model, dtype: type) -> dict[str, np.ndarray]:
    return {
        str(value.name): rows(*value.shape.numpy(), seed=index, dtype=dtype)  # type: ignore[union-attr]
        for index, value in enumerate(model.graph.inputs)
    }


def test_every_rule_has_an_expectation() -> None:
    assert {rule.name for rule in RULES} == set(EXPECTED)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
@pytest.mark.parametrize(("opset", "rank"), [(13, 3), (17, 2), (18, 4), (23, 3)])
def test_f32_spellings_fuse_and_agree(rule: Rule, opset: int, rank: int) -> None:
    if rule.name == "residual" and opset < 17:
        pytest.skip("LayerNormalization is of opset 17")
    models = _models(rule, opset, "f32", rank)
    assert len(models) >= 20
    for model in models:
        proto = ir.serde.serialize_model(model)
        after, report = fused(proto)
        assert [(s.op, s.status) for s in report.sites] == [(EXPECTED[rule.name], "fused")], proto
        feeds = _feeds(model, np.float32)
        (a,), (b,) = run(proto, feeds), run(after, feeds)
        np.testing.assert_allclose(b, a, rtol=0, atol=4e-6 * np.abs(a).max())


@pytest.mark.parametrize("rule", [FuseLayerNorm(), FuseRMSNorm()], ids=lambda rule: rule.name)
@pytest.mark.parametrize(("opset", "rank", "axes"), [(13, 3, 2), (18, 4, 3), (23, 2, 2)])
def test_spellings_over_several_axes_fuse_and_agree(
    rule: Rule, opset: int, rank: int, axes: int
) -> None:
    models = _models(rule, opset, "f32", rank, axes=axes)
    assert len(models) >= 20
    for model in models:
        proto = ir.serde.serialize_model(model)
        after, report = fused(proto)
        assert [(s.op, s.status) for s in report.sites] == [(EXPECTED[rule.name], "fused")], proto
        feeds = _feeds(model, np.float32)
        (a,), (b,) = run(proto, feeds), run(after, feeds)
        np.testing.assert_allclose(b, a, rtol=0, atol=4e-6 * np.abs(a).max())


@pytest.mark.parametrize("island", [True, False])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_f16_spellings_fuse_or_say_which_rounding_was_lost(rule: Rule, island: bool) -> None:
    models = _models(rule, 18, "f16", 3, island)
    count = 0
    for model in models:
        proto = ir.serde.serialize_model(model)
        after, report = fused(proto)
        codes = {site.reason for site in report.sites if site.status == "refused"}
        assert codes <= {"check_failed"}, report.sites
        hit = [site.op for site in report.sites if site.status == "fused"]
        count += EXPECTED[rule.name] in hit
        feeds = _feeds(model, np.float16)
        (a,), (b,) = run(proto, feeds), run(after, feeds)
        scale = float(np.abs(a.astype(np.float32)).max())
        np.testing.assert_allclose(b.astype(np.float32), a, rtol=0, atol=4 * 2.0**-10 * scale)
    if island:  # all fuse but a function written out in 16 bits, another way, inside a GLU
        written_out = [{"Exp", "Erf", "Tanh"} & {node.op_type for node in m.graph} for m in models]
        assert count >= len(models) - (sum(map(bool, written_out)) if rule.name == "glu" else 0)
    elif rule.name in ("layer_norm", "rms_norm"):  # statistics in 16 bits are not what we compute
        assert count == 0
    else:  # the usual spelling does; one that rounds elsewhere than the declared body must not
        assert count >= 0.1 * len(models)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_documentation_has_its_sections(rule: Rule) -> None:
    wanted = ["What it matches", "Formula", "Numerics", "Refuses", "References"]
    found = [line[3:] for line in rule.documentation.splitlines() if line.startswith("## ")]
    assert found == wanted
    assert rule.summary.endswith(".")
