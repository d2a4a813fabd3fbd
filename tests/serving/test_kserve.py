"""KServe's own Python server, on the folders of deploy mlserver."""

from __future__ import annotations

import pytest

pytest.importorskip("tritonclient", reason="make test-serving installs tritonclient and runs this")

from tests.serving.conformance import Conformance
from tests.serving.servers import KServe

pytestmark = pytest.mark.serving


class TestKServe(Conformance):
    Server = KServe
