"""A real MLServer with the fusenorm runtime."""

from __future__ import annotations

from typing import ClassVar

import pytest

pytest.importorskip("tritonclient", reason="make test-serving installs tritonclient and runs this")

from tests.serving.conformance import Conformance
from tests.serving.servers import MLServer

pytestmark = pytest.mark.serving


class TestMLServer(Conformance):
    Server = MLServer
    parser_grpc: ClassVar[set[str]] = {"short", "long", "a gigabyte claimed"}
