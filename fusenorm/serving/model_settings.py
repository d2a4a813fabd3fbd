"""What MLServer loads, and KServe after it.

REPO/settings.json              of the server, unless there is one
REPO/NAME/model-settings.json   names the runtime and the version to serve
REPO/NAME/VERSION/              the artifact as it is

MLServer answers "not ready" while it loads a version beside another, but replaces a model that has
none without a gap. So it is told of one model without versions, and the uri says which of them is
served.
"""

from __future__ import annotations

import json
from pathlib import Path

from fusenorm.errors import BadInput
from fusenorm.serving.folders import plain_name, write_model, write_text
from fusenorm.serving.model import Served
from fusenorm.serving.protocol import metadata

SETTINGS = "settings.json"
MODEL_SETTINGS = "model-settings.json"
RUNTIME = "fusenorm.serving.mlserver.Runtime"


def deploy(
    artifact: Path,
    repo: Path,
    *,
    name: str | None = None,
    version: int = 1,
    max_batch_size: int | None = None,
) -> Path:
    """Write a model of MLServer's repository.

    Args:
        artifact: the artifact folder.
        repo: the model repository.
        name: the model's name there; None: the artifact's.
        version: folder the artifact goes to; an existing one is replaced in one step.
        max_batch_size: None: 32 if the model's rows are independent, else 0.

    Returns:
        The model's folder, REPO/NAME.

    Raises:
        BadInput: the artifact is damaged, cannot be served or cannot be batched.
    """
    served = Served(artifact)
    stored = served.stored
    rows = served.batch_size(max_batch_size)
    inputs, outputs = metadata(stored.signature.inputs), metadata(stored.signature.outputs)
    for port in (*inputs, *outputs):
        if port["datatype"] == "BF16":
            raise BadInput(f"'{port['name']}' is bfloat16, which MLServer lacks", file=artifact)
    name = plain_name(name or stored.name)
    settings = {
        "name": name,
        "implementation": RUNTIME,
        "platform": "fusenorm",
        "versions": [str(version)],
        "inputs": inputs,
        "outputs": outputs,
        "parameters": {"uri": f"./{version}", "extra": {"max_batch_size": rows}},
    }
    text = json.dumps(settings, indent=2) + "\n"
    folder = write_model(stored, repo, name, version, MODEL_SETTINGS, text)
    if not (repo / SETTINGS).exists():
        # The batches are made here: in one process, by one runtime.
        write_text(repo / SETTINGS, json.dumps({"parallel_workers": 0}, indent=2) + "\n")
    return folder
