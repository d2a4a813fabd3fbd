from __future__ import annotations

import pytest

from fusenorm.lower import Target, build_library
from fusenorm.runtime.direct import Kernels, open_library
from tests.kernels.cases import pairwise


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    """The pairwise ops compiled for this machine."""
    path = tmp_path_factory.mktemp("kernels") / "pairwise.so"
    build_library(pairwise(), Target.host(), path)
    return open_library(path)
