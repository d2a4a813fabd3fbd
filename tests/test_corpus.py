"""Real exports: every site found, every output kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import fusenorm
from tests import corpus

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(not corpus.available(), reason="the corpus folder is not beside this tree"),
]


@pytest.mark.parametrize("path", list(corpus.files()), ids=lambda path: path.name)
def test_every_site_of_a_real_export_is_found(path: Path) -> None:
    report = fusenorm.optimize(path).report
    assert corpus.found(report) == corpus.truth(path)


@pytest.mark.kernel
@pytest.mark.parametrize("path", list(corpus.files(corpus.COMPLETE)), ids=lambda path: path.name)
def test_the_artifact_computes_what_onnxruntime_does(path: Path, tmp_path: Path) -> None:
    folder = fusenorm.compile(path).save(tmp_path / "model.fnorm")
    recorded = {
        name: value for name, value in np.load(path.with_suffix(".npz")).items() if name != "ref"
    }
    at_recorded = fusenorm.verify(path, folder, recorded)
    assert at_recorded.ok, str(at_recorded)
    elsewhere = fusenorm.verify(path, folder)
    assert elsewhere.ok, str(elsewhere)
    assert len(elsewhere.runs) == 2
