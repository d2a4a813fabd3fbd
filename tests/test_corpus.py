"""Real exports: every site found, every output kept."""

from __future__ import annotations

from pathlib import Path

import pytest

import fusenorm
from tests import corpus

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(not corpus.available(), reason="the corpus folder is not beside this tree"),
]


@pytest.mark.parametrize(
    "path", list(corpus.files(corpus.COMPLETE)), ids=lambda path: path.name
)
def test_every_site_of_a_real_export_is_found(path: Path) -> None:
    report = fusenorm.optimize(path).report
    assert corpus.found(report) == corpus.truth(path)
    assert [site for site in report.sites if site.status == "refused"] == []
