"""The commands of `fusenorm deploy`, one per server; `fusenorm.cli` registers them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Annotated

import typer

from fusenorm.errors import BadInput

Folder = Annotated[Path, typer.Argument(metavar="ARTIFACT", help="A folder made by optimize.")]
Repo = Annotated[Path, typer.Option("--repo", metavar="DIR", help="The model repository.")]
Name = Annotated[str | None, typer.Option("--name", help="The model's name; else the artifact's.")]
Version = Annotated[int, typer.Option("--version", min=1, help="The model's version.")]
MaxBatchSize = Annotated[
    int | None,
    typer.Option(
        "--max-batch-size", min=0, help="Most rows of a batch; else 32 if rows are independent."
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def triton(
    artifact: Folder,
    repo: Repo,
    name: Name = None,
    version: Version = 1,
    max_batch_size: MaxBatchSize = None,
    backends: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write the backend into the server's backend directory."),
    ] = None,
    metrics: Annotated[
        bool, typer.Option("--metrics", help="Add the session's figures to the server's metrics.")
    ] = False,
    ort: Annotated[
        bool, typer.Option("--ort", help="For Triton's own onnxruntime backend.")
    ] = False,
    server_path: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="With --ort: the repository's path on the server."),
    ] = None,
    variant: Annotated[
        str | None,
        typer.Option(help="With --ort: the library, e.g. x86-64-v3; else this machine's."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Write a model of a Triton repository: config.pbtxt and a version folder."""
    from fusenorm.serving import triton as writer

    if ort and (server_path is None or backends is not None or metrics):
        raise BadInput("--ort needs --server-path, and no --backends or --metrics")
    if not ort and (server_path is not None or variant is not None):
        raise BadInput("--server-path and --variant are for --ort")
    if server_path is None:
        folder = writer.deploy(
            artifact,
            repo,
            name=name,
            version=version,
            max_batch_size=max_batch_size,
            metrics=metrics,
        )
    else:
        folder = writer.deploy_onnxruntime(
            artifact,
            repo,
            PurePosixPath(server_path),
            name=name,
            version=version,
            max_batch_size=max_batch_size,
            variant=variant,
        )
    typer.echo(f"saved {folder}")
    if backends is not None:
        typer.echo(f"saved {writer.write_backend(backends)}")


def mlserver(
    artifact: Folder,
    repo: Repo,
    name: Name = None,
    version: Version = 1,
    max_batch_size: MaxBatchSize = None,
    debug: Debug = False,
) -> None:
    """Write a model MLServer (or KServe) loads: model-settings.json and a version folder."""
    from fusenorm.serving import model_settings

    folder = model_settings.deploy(
        artifact, repo, name=name, version=version, max_batch_size=max_batch_size
    )
    typer.echo(f"saved {folder}")


def ray(
    artifact: Folder,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE.yaml")] = Path(
        "serve.yaml"
    ),
    name: Name = None,
    replicas: Annotated[int, typer.Option(min=1, help="How many processes serve it.")] = 1,
    max_batch_size: MaxBatchSize = None,
    match_nodes: Annotated[
        bool, typer.Option("--match-nodes", help="Only on nodes labelled as able to run it.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Write a config of Ray Serve: for `serve run` or `serve deploy`."""
    from fusenorm.serving import ray_config

    written = ray_config.deploy(
        artifact,
        output,
        name=name,
        replicas=replicas,
        max_batch_size=max_batch_size,
        match_nodes=match_nodes,
    )
    typer.echo(f"saved {written}")


def mlflow(
    artifact: Folder,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Where to write.")],
    debug: Debug = False,
) -> None:
    """Write a model MLflow loads as a python_function: MLmodel and the artifact."""
    from fusenorm.serving.mlflow import deploy

    typer.echo(f"saved {deploy(artifact, output)}")


COMMANDS: tuple[Callable[..., None], ...] = (triton, mlserver, ray, mlflow)
