"""The models inside onnxscript's wheel: every site found, every output kept."""

from __future__ import annotations

import pytest

pytest.importorskip("onnxscript")

from tests import onnxscript_models as models
from tests.corpus import found

pytestmark = pytest.mark.model


@pytest.mark.parametrize("name", models.MODELS)
def test_every_site_is_found_and_every_output_kept(name: str) -> None:
    proto, feeds = models.load(name)
    after, report = models.optimised(proto)
    assert found(report) == models.MODELS[name].truth
    difference = models.worst_difference(proto, after, feeds)
    assert difference.ok, difference
