"""What `serve deploy` and `serve run` of Ray Serve take: an application in YAML."""

from __future__ import annotations

import json
from pathlib import Path

from fusenorm.artifact import open_artifact
from fusenorm.errors import BadInput
from fusenorm.serving.folders import plain_name, write_text


def deploy(
    artifact: Path,
    output: Path,
    *,
    name: str | None = None,
    replicas: int = 1,
    max_batch_size: int | None = None,
    match_nodes: bool = False,
) -> Path:
    """Write the config of an application.

    Args:
        artifact: the artifact folder; every node must have it at this place.
        output: the file, .yaml.
        name: of the application, and its route; None: the artifact's.
        replicas: see `fusenorm.serving.ray.deployment`.
        max_batch_size: likewise.
        match_nodes: likewise.

    Returns:
        The file.

    Raises:
        BadInput: the artifact is damaged, or the output is no .yaml file.
    """
    if output.suffix not in (".yaml", ".yml"):
        raise BadInput("Ray reads .yaml files: choose another -o", file=output)
    stored = open_artifact(artifact)
    name = plain_name(name or stored.name)
    arguments = {
        "path": str(artifact.resolve()),
        "name": name,
        "replicas": replicas,
        "max_batch_size": max_batch_size,
        "match_nodes": match_nodes,
    }
    lines = [
        "applications:",
        f"- name: {json.dumps(name)}",
        f"  route_prefix: {json.dumps(f'/{name}')}",
        "  import_path: fusenorm.serving.ray:application",
        "  args:",
        *(f"    {key}: {json.dumps(value)}" for key, value in arguments.items()),
    ]
    write_text(output, "\n".join(lines) + "\n")
    return output
