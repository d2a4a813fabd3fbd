"""A compiled artifact with every kind of file, made once for all tests of the runtime."""

from __future__ import annotations

from pathlib import Path

import pytest

import fusenorm
from fusenorm.artifact import write


@pytest.fixture(scope="session")
def compiled(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model for this machine, its weights beside it; tests must not change it."""
    folder = tmp_path_factory.mktemp("compiled") / "llama.fnorm"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "EXTERNAL_DATA_BYTES", 1 << 10)
        return fusenorm.compile(llama, tune=False).save(folder)
