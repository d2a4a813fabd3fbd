"""Damaged and hostile artifacts: refused with one line before onnxruntime opens a library."""

from __future__ import annotations

import itertools
import os
import random
import shutil
from pathlib import Path

import onnxruntime as ort
import pytest

import fusenorm
from fusenorm.artifact import manifest as limits
from fusenorm.artifact import open_artifact, read
from fusenorm.errors import BadInput
from tests.runtime.test_artifact import edit, rewrite

POSITIONS = 500


class Options(ort.SessionOptions):
    """Session options that take down what is registered; no library is opened."""

    def __init__(self) -> None:
        super().__init__()
        self.registered: list[str] = []

    def register_custom_ops_library(self, path: str) -> None:
        self.registered.append(path)


def refusal(folder: Path) -> str:
    """The one line that refuses a folder, after checking that nothing was registered."""
    options = Options()
    with pytest.raises(BadInput) as error:
        fusenorm.load(folder, session_options=options)
    assert options.registered == []
    line = str(error.value)
    assert "\n" not in line
    assert str(folder) in line
    return line


@pytest.mark.kernel
def test_every_flipped_byte_is_refused_before_the_library_is_opened(
    compiled: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(compiled, tmp_path / "flipped.fnorm")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert {path.suffix for path in files} == {".json", ".sha256", ".onnx", ".so", ".npz", ".data"}
    chance = random.Random(0)
    share = POSITIONS // len(files) + 1
    flipped = 0
    for path in files:
        content = path.read_bytes()
        regions = min(share, len(content))
        edges = [len(content) * part // regions for part in range(regions + 1)]
        for start, end in itertools.pairwise(edges):
            at = chance.randrange(start, end)
            changed = content[at] ^ (1 << chance.randrange(8))
            with open(path, "r+b") as file:
                file.seek(at)
                file.write(bytes([changed]))
            assert "it was changed" in refusal(folder)
            flipped += 1
        path.write_bytes(content)
    assert flipped >= POSITIONS
    fusenorm.load(folder)


@pytest.mark.kernel
def test_a_half_copied_artifact_is_refused(compiled: Path, tmp_path: Path) -> None:
    files = sorted(p.relative_to(compiled) for p in compiled.rglob("*") if p.is_file())
    for number, name in enumerate(files):
        folder = shutil.copytree(compiled, tmp_path / f"{number}.fnorm")
        path = folder / name
        os.truncate(path, path.stat().st_size // 2)
        assert "it was changed" in refusal(folder)
        path.unlink()
        assert any(said in refusal(folder) for said in ("is missing", "no manifest.json"))


@pytest.mark.kernel
def test_what_is_opened_is_what_was_checked(compiled: Path, tmp_path: Path) -> None:
    """A file exchanged between the check and the opening."""
    folder = shutil.copytree(compiled, tmp_path / "raced.fnorm")
    for path in (*folder.glob("lib/*/*.so"), folder / "model.onnx"):
        stored = open_artifact(folder)
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        options = Options()
        with pytest.raises(BadInput, match=f"{path.name}: sha256 is .*: it was changed"):
            fusenorm.load(stored, session_options=options)
        assert options.registered == []
        path.write_bytes(content)


def _mapped_libraries() -> set[str]:
    with open("/proc/self/maps") as maps:
        return {line for line in maps if "fusenorm_ops-" in line}


@pytest.mark.kernel
def test_the_library_is_opened_from_sealed_memory(compiled: Path) -> None:
    before = _mapped_libraries()
    session = fusenorm.load(compiled)
    assert session.library.path.is_relative_to(compiled)
    lines = _mapped_libraries() - before
    assert lines
    assert all("/memfd:" in line for line in lines)
    options = Options()
    fusenorm.load(compiled, session_options=options)
    (path,) = options.registered
    with pytest.raises(PermissionError), open(path, "r+b") as file:
        file.write(b"x")
    options = Options()
    fusenorm.load(compiled, session_options=options)
    assert options.registered == [path]


def test_manifests_within_limits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nested(manifest: dict) -> None:
        manifest["report"] = value = {}
        for _ in range(limits.MOST_DEPTH):
            value["x"] = value = {}

    edit(folder, nested)
    assert "manifest.json: is nested deeper than 32" in refusal(folder)
    text = (folder / "manifest.json").read_text()
    rewrite(folder, text.replace("{", '{"name": "other", "name": "twice", ', 1))
    assert "a key is repeated" in refusal(folder)
    rewrite(folder, '{"format_version": NaN}')
    assert "NaN is no number of JSON" in refusal(folder)
    monkeypatch.setattr(limits, "MOST_BYTES", 10)
    assert "manifest.json: has more than 10 bytes" in refusal(folder)


def test_folders_within_limits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "MOST_FILES", 6)
    open_artifact(folder)
    (folder / "more").mkdir()
    assert "holds more than 6 files" in refusal(folder)


def test_a_manifest_without_its_digest(folder: Path) -> None:
    (folder / "manifest.json.sha256").unlink()
    assert "manifest.json.sha256: is missing: copy the artifact again" in refusal(folder)
