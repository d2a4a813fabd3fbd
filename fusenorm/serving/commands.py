"""The commands of `fusenorm deploy`, one per server; `fusenorm.cli` registers them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

Folder = Annotated[Path, typer.Argument(metavar="ARTIFACT", help="A folder made by optimize.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def mlflow(
    artifact: Folder,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Where to write.")],
    debug: Debug = False,
) -> None:
    """Write a model MLflow loads as a python_function: MLmodel and the artifact."""
    from fusenorm.serving.mlflow import deploy

    typer.echo(f"saved {deploy(artifact, output)}")


COMMANDS: tuple[Callable[..., None], ...] = (mlflow,)
