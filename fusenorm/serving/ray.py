"""An artifact as a Ray Serve application.

>>> serve.run(deployment("/models/llama.fnorm", replicas=2))  # doctest: +SKIP

It answers the Open Inference Protocol's JSON by HTTP, and arrays by handle. Replicas can be kept
to nodes that run the artifact's libraries: start those with the label `python -m
fusenorm.serving.ray ARTIFACT` prints, as in `ray start --labels "$(...)"`.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import JSONResponse

from fusenorm.artifact import Stored, open_artifact
from fusenorm.errors import BadInput
from fusenorm.runtime.host import Host
from fusenorm.serving.endpoint import Endpoint
from fusenorm.serving.protocol import metadata, parse

TARGET = "fusenorm.io/target"
RETRY_SECONDS = 60.0
# A node of one level runs the libraries of all levels below.
_X86_LEVELS = ("x86-64-v1", "x86-64-v2", "x86-64-v3", "x86-64-v4")


class Model:
    """One replica.

    Args:
        path: the artifact's folder on every node.
        options: threads and max_batch_size, see `Endpoint`.
    """

    def __init__(self, path: str, options: Mapping[str, Any]) -> None:
        self._endpoint = Endpoint(path, **options)
        self._name = self._endpoint.served.stored.name

    def metadata(self, _: None) -> dict[str, Any]:
        signature = self._endpoint.signature
        inputs, outputs = metadata(signature.inputs), metadata(signature.outputs)
        return {"name": self._name, "inputs": inputs, "outputs": outputs}

    async def answer(self, body: bytes) -> tuple[int, dict[str, Any]]:
        """HTTP status and response of an inference request in JSON."""
        try:
            outputs = await self._endpoint.infer(*parse(body))
        except BadInput as error:
            return 400, {"error": error.message}
        return 200, {"model_name": self._name, "outputs": [output.as_dict() for output in outputs]}

    async def infer(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Arrays by name in, arrays by name out.

        Raises:
            BadInput: the request is at fault.
        """
        return await self._endpoint.run(feed)

    def check_health(self) -> None:
        """Ray asks again and again, and replaces a replica that raises."""
        wrong = self._endpoint.served.probe()
        if wrong is not None:
            raise RuntimeError(wrong)


class Front:
    """Hands requests to the replicas; those a lost node took along are sent again.

    Ray itself fails a request whose replica dies. An inference changes nothing, so it may run
    twice.
    """

    def __init__(self, model: DeploymentHandle) -> None:
        self._model = model

    async def __call__(self, request: Request) -> JSONResponse:
        """POST: an inference request; GET: the model's metadata."""
        if request.method != "POST":
            return JSONResponse(await self._call("metadata", None))
        status, response = await self._call("answer", await request.body())
        return JSONResponse(response, status)

    async def infer(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What other deployments and drivers call by handle; see `Model.infer`."""
        return dict(await self._call("infer", feed))

    async def _call(self, method: str, argument: object) -> Any:
        deadline = time.monotonic() + RETRY_SECONDS
        while True:
            try:
                return await getattr(self._model, method).remote(argument)
            except RayActorError:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.1)


def deployment(
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    replicas: int = 1,
    threads: int = 1,
    max_batch_size: int | None = None,
    match_nodes: bool = False,
) -> serve.Application:
    """A Ray Serve application of one artifact.

    Args:
        path: the artifact's folder, at the same place on every node.
        name: of the deployment; None: the artifact's.
        replicas: how many.
        threads: onnxruntime's, and the CPUs Ray reserves, per replica.
        max_batch_size: see `Endpoint`.
        match_nodes: place replicas only on nodes whose label fusenorm.io/target says that they
            run one of the artifact's libraries.

    Raises:
        BadInput: the artifact is damaged.
    """
    stored = open_artifact(path)
    actor: dict[str, Any] = {"num_cpus": threads}
    if match_nodes and stored.libraries:
        actor["label_selector"] = {TARGET: f"in({','.join(_suitable(stored))})"}
    model = serve.deployment(
        Model,
        name=name or stored.name,
        num_replicas=replicas,
        ray_actor_options=actor,
        max_ongoing_requests=64,  # enough to fill a batch while another runs
    )
    # On the head node, like the controller: without it there is no Serve anyway.
    front = serve.deployment(
        Front,
        name=f"{name or stored.name}-front",
        ray_actor_options={"num_cpus": 0, "resources": {"node:__internal_head__": 0.001}},
        max_ongoing_requests=1000,
    )
    options = {"threads": threads, "max_batch_size": max_batch_size}
    return front.bind(model.bind(str(Path(path).absolute()), options))


def application(arguments: dict[str, Any]) -> serve.Application:
    """What the config of `fusenorm deploy ray` imports."""
    return deployment(**arguments)


def label(path: str | os.PathLike[str]) -> str:
    """This machine's label: the best level of the artifact's libraries it runs, or none."""
    host = Host.detect()
    levels = [each.level for each in open_artifact(path).libraries if host.lacks(each) is None]
    return f"{TARGET}={levels[0] if levels else 'none'}"


def _suitable(stored: Stored) -> list[str]:
    """Levels of nodes that run one of the libraries."""
    levels = {library.level for library in stored.libraries}
    for level in sorted(levels & set(_X86_LEVELS))[:1]:
        levels.update(_X86_LEVELS[_X86_LEVELS.index(level) :])
    return sorted(levels)


if __name__ == "__main__":
    print(label(sys.argv[1]))
