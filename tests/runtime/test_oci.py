"""The OCI image layout, read back by its digests."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fusenorm import cli
from fusenorm.artifact import open_artifact
from fusenorm.artifact.oci import pack_oci
from fusenorm.errors import BadInput


def blob(layout: Path, descriptor: dict) -> bytes:
    """A descriptor's content, after checking its size and digest."""
    algorithm, _, digest = descriptor["digest"].partition(":")
    content = (layout / "blobs" / algorithm / digest).read_bytes()
    assert len(content) == descriptor["size"]
    assert hashlib.new(algorithm, content).hexdigest() == digest
    return content


def image(layout: Path) -> tuple[dict, dict]:
    """The image manifest and the config."""
    assert json.loads((layout / "oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}
    index = json.loads((layout / "index.json").read_text())
    assert index["mediaType"] == "application/vnd.oci.image.index.v1+json"
    (entry,) = index["manifests"]
    assert entry["mediaType"] == "application/vnd.oci.image.manifest.v1+json"
    found = json.loads(blob(layout, entry))
    return found, json.loads(blob(layout, found["config"]))


def test_the_layout_gives_the_artifact_back(folder: Path, tmp_path: Path) -> None:
    layout = tmp_path / "layout"
    digest = pack_oci(folder, layout)
    assert digest == json.loads((layout / "index.json").read_text())["manifests"][0]["digest"]
    manifest, config = image(layout)
    assert manifest["artifactType"] == "application/vnd.cncf.model.manifest.v1+json"
    assert manifest["config"]["mediaType"] == "application/vnd.cncf.model.config.v1+json"
    assert config["descriptor"] == {"name": "fused"}
    assert config["config"] == {"format": "onnx"}
    digests = [layer["digest"] for layer in manifest["layers"]]
    assert config["modelfs"] == {"type": "layers", "diffIds": digests}
    restored = tmp_path / "restored"
    for layer in manifest["layers"]:
        path = restored / layer["annotations"]["org.cncf.model.filepath"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(blob(layout, layer))
    assert open_artifact(restored).manifest == open_artifact(folder).manifest


def test_kinds_of_layers(folder: Path, tmp_path: Path) -> None:
    pack_oci(folder, tmp_path / "layout")
    manifest, _ = image(tmp_path / "layout")
    kinds = {
        layer["annotations"]["org.cncf.model.filepath"]: layer["mediaType"].removeprefix(
            "application/vnd.cncf.model."
        )
        for layer in manifest["layers"]
    }
    assert kinds == {
        "manifest.json": "weight.config.v1.raw",
        "manifest.json.sha256": "weight.config.v1.raw",
        "model.onnx": "weight.v1.raw",
        "golden/inputs.npz": "dataset.v1.raw",
        "golden/outputs.npz": "dataset.v1.raw",
    }


def test_nothing_else_is_in_it_and_it_is_the_same_each_time(folder: Path, tmp_path: Path) -> None:
    contents = []
    for name in ("one", "two", "two"):  # a layout is replaced
        pack_oci(folder, tmp_path / name)
        files = [path for path in (tmp_path / name).rglob("*") if path.is_file()]
        contents.append({p.relative_to(tmp_path / name): p.read_bytes() for p in files})
    assert contents[0] == contents[1] == contents[2]
    assert len(contents[0]) == 2 + 2 + 5
    assert {path.name for path in tmp_path.iterdir()} >= {"one", "two"}
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_damaged_artifacts_are_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "model.onnx").write_bytes(b"")
    with pytest.raises(BadInput, match=r"model\.onnx: has 0 bytes"):
        pack_oci(folder, tmp_path / "layout")
    assert not (tmp_path / "layout").exists()


def test_nothing_but_a_layout_is_overwritten(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="exists and is not an OCI layout"):
        pack_oci(folder, folder)


def test_nothing_is_written_into_an_artifact(folder: Path) -> None:
    with pytest.raises(BadInput, match=r"lies in the artifact .*fused\.fnorm: choose another"):
        pack_oci(folder, folder / "some" / "layout")
    open_artifact(folder)


def test_the_command(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli.app, ["pack", "--oci", str(folder), "--json"])
    assert json.loads(result.stdout)["output"] == "fused.fnorm.oci"
    digest = json.loads(result.stdout)["digest"]
    result = CliRunner().invoke(cli.app, ["pack", str(folder), "--oci", "-o", "layout"])
    assert result.stdout == f"saved layout ({digest})\n"
    result = CliRunner().invoke(cli.app, ["pack", str(folder)])
    assert result.exit_code == 2
    assert "pack needs a format: give --oci" in result.stderr
