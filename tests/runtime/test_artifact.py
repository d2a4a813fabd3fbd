from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from fusenorm import model_io
from fusenorm.artifact import Artifact, Library, open_artifact, place, read_npz, write, write_npz
from fusenorm.errors import BadInput
from fusenorm.signature import Tensor


def elf(machine: int = 62) -> bytes:
    """The start of an ELF file: enough to be described, not to be loaded."""
    return b"\x7fELF" + bytes(14) + machine.to_bytes(2, "little") + bytes(44)


LIBRARY = f"lib/v2/fusenorm_ops-{hashlib.sha256(elf()).hexdigest()[:12]}.so"
FILES = ["golden/inputs.npz", "golden/outputs.npz", LIBRARY, "model.onnx"]


@pytest.fixture
def library(tmp_path) -> Library:
    path = tmp_path / "built.so"
    path.write_bytes(elf())
    built = SimpleNamespace(
        path=path,
        op_types=("RMSNorm",),
        level="v2",
        features=("sse4_2",),
        glibc="2.17",
        cuda=None,
    )
    return Library.of(built)


@pytest.fixture
def full(artifact, library, tmp_path) -> Path:
    """A saved artifact that has every kind of file."""
    return dataclasses.replace(artifact, libraries=[library]).save(tmp_path / "full.fnorm")


def edit(folder: Path, change) -> None:
    """Rewrite the manifest."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    rewrite(folder, json.dumps(manifest))


def rewrite(folder: Path, text: str) -> None:
    """Another manifest, with its digest."""
    (folder / "manifest.json").write_text(text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    (folder / "manifest.json.sha256").write_text(f"{digest}  manifest.json\n")


def test_holds_what_it_lists(full) -> None:
    stored = open_artifact(full)
    assert [entry["path"] for entry in stored.manifest["files"]] == FILES
    assert sorted(p.relative_to(full).as_posix() for p in full.rglob("*") if p.is_file()) == [
        *FILES[:3],
        "manifest.json",
        "manifest.json.sha256",
        "model.onnx",
    ]
    assert stored.libraries[0].machine == "x86_64"
    assert stored.libraries[0].features == ("sse4_2",)
    assert stored.libraries[0].path.is_file()
    assert stored.signature.inputs[0].limit == 11
    assert {"fusenorm", "onnx", "onnxruntime"} <= stored.manifest["versions"].keys()
    golden = stored.golden()
    assert golden.inputs.keys() == {"ids", "offset"}
    assert golden.outputs["y"].shape == (2, 8, 8)


def test_the_same_artifact_gives_the_same_bytes(artifact, tmp_path) -> None:
    report = {"passes": [{"name": "fuse", "seconds": 0.1}]}
    one = dataclasses.replace(artifact, report=report).save(tmp_path / "one")
    report = {"passes": [{"name": "fuse", "seconds": 0.2}]}
    two = dataclasses.replace(artifact, report=report).save(tmp_path / "two")
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert len(files) == 5
    assert [(one / file).read_bytes() for file in files] == [
        (two / file).read_bytes() for file in files
    ]


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_byte_is_found(full, name) -> None:
    path = full / name
    original = path.read_bytes()
    for at in {0, len(original) // 2, len(original) - 1}:
        changed = bytearray(original)
        changed[at] ^= 1
        path.write_bytes(changed)
        with pytest.raises(BadInput, match=f"{name}: sha256 is .*: it was changed"):
            open_artifact(full)
    path.write_bytes(original + b"\0")
    with pytest.raises(BadInput, match=f"{name}: has .* bytes, not .*: it was changed"):
        open_artifact(full)
    path.write_bytes(original)
    open_artifact(full)


@pytest.mark.parametrize("name", FILES)
def test_missing_files_are_named(full, name) -> None:
    (full / name).unlink()
    with pytest.raises(BadInput, match=f"{name}: is missing"):
        open_artifact(full)


@pytest.mark.parametrize("name", ["evil.so", "lib/v2/other.so", "golden/x/y"])
def test_extra_files_are_named(full, name) -> None:
    (full / name).parent.mkdir(exist_ok=True)
    (full / name).write_bytes(b"")
    with pytest.raises(BadInput, match=f"{name}: is not listed in manifest.json"):
        open_artifact(full)


@pytest.mark.parametrize("name", [*FILES, "lib", "manifest.json"])
def test_symlinks_are_refused(full, tmp_path, name) -> None:
    moved = tmp_path / "moved"
    (full / name).rename(moved)
    (full / name).symlink_to(moved)
    with pytest.raises(BadInput, match=r"only regular files|no manifest\.json"):
        open_artifact(full)


def test_other_kinds_of_files_are_refused(full) -> None:
    os.mkfifo(full / "pipe")
    with pytest.raises(BadInput, match="pipe: only regular files"):
        open_artifact(full)


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../outside", "lib/../../outside", "./model.onnx", "lib//x", "a\\b", "", "."],
)
def test_paths_that_escape_are_refused(full, name) -> None:
    entry = {"path": name, "size": 0, "sha256": ""}
    edit(full, lambda manifest: manifest["files"].append(entry))
    with pytest.raises(BadInput, match=r"manifest\.json: path '.*' is not allowed"):
        open_artifact(full)


def test_a_library_elsewhere_is_refused(full) -> None:
    edit(full, lambda manifest: manifest["libraries"][0].update(path="../evil.so"))
    with pytest.raises(BadInput, match=r"path '\.\./evil\.so' is not allowed"):
        open_artifact(full)


def test_a_library_not_listed_is_refused(full) -> None:
    edit(full, lambda manifest: manifest["libraries"][0].update(path="lib/v9/x.so"))
    with pytest.raises(BadInput, match=r"'lib/v9/x\.so' is not listed under files"):
        open_artifact(full)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("[]", "format_version is None"),
        ("{}", "format_version is None"),
        ('{"format_version": 99}', "format_version is 99: this fusenorm reads 1"),
        ('{"format_version": 1}', r"malformed manifest \(KeyError: 'name'\)"),
        ('{"format_version": 1, "files": 3}', "malformed manifest"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_broken_manifest_is_one_line(full, text, message) -> None:
    rewrite(full, text)
    with pytest.raises(BadInput, match=message) as error:
        open_artifact(full)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["files", "signature", "libraries", "golden"])
@pytest.mark.parametrize("value", [None, 3, "x", [3], {"x": 1}])
def test_any_wrong_shape_of_a_manifest_is_bad_input(full, key, value) -> None:
    edit(full, lambda manifest: manifest.update({key: value}))
    if (key, value) == ("golden", None):
        assert open_artifact(full).golden() is None
    else:
        with pytest.raises(BadInput, match="malformed manifest"):
            open_artifact(full)


def test_no_folder(tmp_path) -> None:
    with pytest.raises(BadInput, match="nowhere: no such artifact folder"):
        open_artifact(tmp_path / "nowhere")
    with pytest.raises(BadInput, match=r"not a fusenorm artifact: no manifest\.json"):
        open_artifact(tmp_path)


def test_save_replaces_an_artifact_and_nothing_else(artifact, folder, tmp_path) -> None:
    dataclasses.replace(artifact, name="second").save(folder)
    assert open_artifact(folder).name == "second"
    other = tmp_path / "photos"
    other.mkdir()
    (other / "holiday.jpg").write_bytes(b"")
    for path in (other, other / "holiday.jpg"):
        with pytest.raises(BadInput, match="exists and is not a fusenorm artifact"):
            artifact.save(path)
    link = tmp_path / "link"
    link.symlink_to(folder)
    with pytest.raises(BadInput, match="exists and is not a fusenorm artifact"):
        artifact.save(link)
    leftover = [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert leftover == []


def test_save_without_an_atomic_exchange(artifact, folder, monkeypatch) -> None:
    monkeypatch.setattr(place, "_exchange", lambda one, other: False)
    dataclasses.replace(artifact, name="second").save(folder)
    assert open_artifact(folder).name == "second"
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".")] == []


def test_save_keeps_the_old_artifact_if_the_check_fails(artifact, folder) -> None:
    def check(stage: Path) -> None:
        assert open_artifact(stage).name == "second"
        raise BadInput("no")

    with pytest.raises(BadInput, match="no"):
        dataclasses.replace(artifact, name="second").save(folder, check=check)
    assert open_artifact(folder).name == "fused"
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".")] == []


def test_large_weights_go_beside_the_model(artifact, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(write, "EXTERNAL_DATA_BYTES", 10)
    folder = artifact.save(tmp_path / "large")
    stored = open_artifact(folder)
    assert "model.onnx.data" in [entry["path"] for entry in stored.manifest["files"]]
    (folder / "model.onnx.data").write_bytes(b"")
    with pytest.raises(BadInput, match=r"model\.onnx\.data: has 0 bytes"):
        open_artifact(folder)


def test_external_weights_stay_external(artifact, tmp_path) -> None:
    source = tmp_path / "source.onnx"
    ir.save(artifact.model, source, external_data="weights.bin", size_threshold_bytes=0)
    folder = Artifact("external", model_io.load_model(source), {}).save(tmp_path / "external")
    assert (folder / "model.onnx.data").stat().st_size > 0
    open_artifact(folder)


def test_a_library_must_be_elf(library, tmp_path) -> None:
    def built(content: bytes) -> SimpleNamespace:
        path = tmp_path / "x.so"
        path.write_bytes(content)
        return SimpleNamespace(path=path, op_types=(), level="", features=(), glibc=None, cuda=None)

    assert Library.of(built(elf(183))).machine == "aarch64"
    with pytest.raises(BadInput, match="unknown machine"):
        Library.of(built(elf(8)))
    with pytest.raises(BadInput, match="not an ELF library"):
        Library.of(built(b"hello"))


def test_npz_holds_every_type_but_objects(tmp_path) -> None:
    path = tmp_path / "x.npz"
    arrays = {
        "a.0/b": np.arange(6, dtype=np.float16).reshape(2, 3),
        "scalar": np.array(3, np.int64),
        "bf16": np.ones(3, ml_dtypes.bfloat16),
    }
    write_npz(path, arrays)
    found = read_npz(path, [Tensor("bf16", "bfloat16", (3,))])
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        assert np.array_equal(found[name], array)
    np.savez(path, evil=np.array([{"a": 1}], object))
    with pytest.raises(BadInput, match=r"x\.npz: not an \.npz of plain arrays"):
        read_npz(path)
    for content in (b"", b"hello", b"PK\x03\x04broken"):
        path.write_bytes(content)
        with pytest.raises(BadInput, match=r"x\.npz: not an \.npz of plain arrays"):
            read_npz(path)
