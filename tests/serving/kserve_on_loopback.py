"""`fusenorm.serving.kserve`, but listening on 127.0.0.1 only: KServe's server has no option."""

from __future__ import annotations

from typing import Any

import grpc.aio
import uvicorn

from fusenorm.serving import kserve

_Config, _server = uvicorn.Config, grpc.aio.server


class _Server:
    def __init__(self, server: Any) -> None:
        self._server = server

    def __getattr__(self, name: str) -> Any:
        return getattr(self._server, name)

    def add_insecure_port(self, address: str) -> int:
        return self._server.add_insecure_port(address.replace("[::]", "127.0.0.1"))


uvicorn.Config = lambda app, **options: _Config(app, **options | {"host": "127.0.0.1"})
grpc.aio.server = lambda *arguments, **options: _Server(_server(*arguments, **options))
kserve.main()
