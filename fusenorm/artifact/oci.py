"""An artifact as an OCI image layout after CNCF's ModelPack: pushed by any OCI client.

    DIR/
      oci-layout, index.json
      blobs/sha256/...     one blob per file of the artifact, a config, the image manifest

The files are layers as they are, with their path as annotation, so that equal files of two versions
are one blob. The layout holds no times: the same artifact gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusenorm.artifact.manifest import DIGEST, MANIFEST, sha256
from fusenorm.artifact.place import fresh_folder
from fusenorm.artifact.read import Stored, open_artifact
from fusenorm.errors import BadInput

LAYOUT = "oci-layout"
_INDEX = "application/vnd.oci.image.index.v1+json"
_IMAGE = "application/vnd.oci.image.manifest.v1+json"
_MODEL = "application/vnd.cncf.model.manifest.v1+json"
_CONFIG = "application/vnd.cncf.model.config.v1+json"
_LAYER = "application/vnd.cncf.model.{}.v1.raw"
_FILE_PATH = "org.cncf.model.filepath"
_TITLE = "org.opencontainers.image.title"
_REFERENCE = "org.opencontainers.image.ref.name"


def pack_oci(
    folder: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    require_signature: str | os.PathLike[str] | None = None,
) -> str:
    """Write an artifact as an OCI image layout: whole or not at all.

    Args:
        folder: the artifact.
        output: the layout's folder; must not exist, or be a layout, which is replaced.
        require_signature: a public key file; the artifact must be signed with its private key.

    Returns:
        The image manifest's digest, `sha256:...`.

    Raises:
        BadInput: the artifact is damaged or not signed as required, or the layout cannot be
            written.
    """
    stored = open_artifact(folder, require_signature=require_signature)
    with fresh_folder(output, LAYOUT, "an OCI layout") as stage:
        image = _write(stored, stage)
    return str(image["digest"])


def _write(stored: Stored, layout: Path) -> Mapping[str, Any]:
    blobs = layout / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    layers = [_layer(stored, name, blobs) for name in (MANIFEST, DIGEST, *sorted(stored.files))]
    config = {
        "descriptor": {"name": stored.name},
        "config": {"format": "onnx"},
        "modelfs": {"type": "layers", "diffIds": [layer["digest"] for layer in layers]},
    }
    image = {
        "schemaVersion": 2,
        "mediaType": _IMAGE,
        "artifactType": _MODEL,
        "config": _blob(config, _CONFIG, blobs),
        "layers": layers,
        "annotations": {_TITLE: stored.name},
    }
    entry = {**_blob(image, _IMAGE, blobs), "artifactType": _MODEL}
    entry["annotations"] = {_REFERENCE: "latest"}
    index = {"schemaVersion": 2, "mediaType": _INDEX, "manifests": [entry]}
    (layout / "index.json").write_bytes(_json(index))
    (layout / LAYOUT).write_bytes(_json({"imageLayoutVersion": "1.0.0"}))
    return entry


def _layer(stored: Stored, name: str, blobs: Path) -> dict[str, Any]:
    """Copy one file of the artifact to a blob.

    Raises:
        BadInput: the file was changed since the artifact was opened.
    """
    file = stored.path / name
    copy = blobs / "copy"
    shutil.copyfile(file, copy)
    digest = sha256(copy)
    entry = stored.files.get(name)
    if entry is not None and entry["sha256"] != digest:
        raise BadInput("was changed while it was packed", file=file)
    size = copy.stat().st_size
    copy.replace(blobs / digest)
    return {
        "mediaType": _LAYER.format(_kind(name)),
        "digest": f"sha256:{digest}",
        "size": size,
        "annotations": {_FILE_PATH: name},
    }


def _kind(name: str) -> str:
    """ModelPack's kind of layer."""
    if name in (MANIFEST, DIGEST):
        return "weight.config"
    return {"lib": "code", "golden": "dataset"}.get(name.partition("/")[0], "weight")


def _blob(value: Mapping[str, Any], media_type: str, blobs: Path) -> dict[str, Any]:
    content = _json(value)
    digest = hashlib.sha256(content).hexdigest()
    (blobs / digest).write_bytes(content)
    return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(content)}


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
