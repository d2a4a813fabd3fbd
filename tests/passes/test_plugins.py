"""A rule of one's own: the README's ten lines, its tests for free, shipped as a plugin."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import fusenorm
from fusenorm.errors import BadInput
from fusenorm.testing import check_rule
from tests.graphs import fused_ops, model, rows, run, same

README = Path(__file__).parents[2].joinpath("README.md").read_text(encoding="utf-8")
RULE, TESTS = (
    code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "TanhSwish" in code
)
NAMES: dict[str, object] = {"__name__": "readme"}
exec(RULE, NAMES)
TanhSwish = NAMES["TanhSwish"]


BODY = "h = Mul(x, p5)\nt = Tanh(h)\na = Add(t, one)\ns = Mul(a, p5)\ny = Mul(x, s)"
CONSTANTS = {"p5": np.float32(0.5), "one": np.float32(1)}


def test_without_the_rule_it_is_refused() -> None:
    assert fused_ops(same(model(BODY, constants=CONSTANTS), {"x": rows(2, 3, 8)})) == []


def test_with_the_rule_it_fuses() -> None:
    proto = model(BODY, constants=CONSTANTS)
    result = fusenorm.optimize(proto, options=fusenorm.Options(rules=(TanhSwish(),)))
    assert fused_ops(result.report) == ["Swish"]
    import onnx_ir as ir

    feeds = {"x": rows(2, 3, 8)}
    (a,), (b,) = run(proto, feeds), run(ir.to_proto(result.model), feeds)
    np.testing.assert_allclose(b, a, rtol=0, atol=4e-6 * np.abs(a).max())


def test_the_readme_says_ten_lines() -> None:
    assert "takes ten lines" in README
    assert len([line for line in RULE.splitlines() if line.strip()]) == 10


def test_the_rule_s_own_tests() -> None:
    exec(TESTS, NAMES)


def test_check_rule_sees_a_wrong_rule() -> None:
    class Wrong(TanhSwish):
        activation = "gelu"

    with pytest.raises(AssertionError, match="check_failed"):
        check_rule(Wrong(), "Gelu", opsets=(18,))


def test_check_rule_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    assert check_rule(TanhSwish(), "Swish", opsets=(18,), limit=2) == 2
    assert capfd.readouterr().err == ""  # onnxruntime warns about constants nothing reads


def test_as_a_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "tanh_swish-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tanh-swish\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[fusenorm.rules]\ntanh = tanh_plugin:make\n")
    (tmp_path / "tanh_plugin.py").write_text(
        "from tests.passes.test_plugins import TanhSwish as make\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    report = fusenorm.explain(model(BODY, constants=CONSTANTS))
    assert fused_ops(report) == ["Swish"]
    assert report.sites[0].attributes["rule"] == "tanh_swish"

    (info / "entry_points.txt").write_text("[fusenorm.rules]\ntanh = no_such_module:make\n")
    with pytest.raises(BadInput, match="rule plugin tanh"):
        fusenorm.explain(model(BODY, constants=CONSTANTS))
