"""What every server of an artifact must do, asked by tritonclient over HTTP and gRPC.

The tests of one server are a subclass that says which: its class attribute `Server`.
"""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import tritonclient.grpc as grpc
from tritonclient.utils import InferenceServerException

from tests.serving.servers import Case, Client, Load, Server, damage, under_load

REQUESTS = 10_000
GIGABYTE = 1 << 30
GOOD = {"name": "tokens", "shape": [1, 4], "datatype": "INT64", "data": [1, 2, 3, 4]}


def _request(**changes: Any) -> bytes:
    return json.dumps({"inputs": [GOOD | changes]}).encode()


# what is wrong with it -> body of an HTTP request
BAD_BODIES = {
    "name": _request(name="token"),
    "missing": b'{"inputs": []}',
    "datatype": _request(datatype="INT32"),
    "floats": _request(datatype="FP32", data=[1.5, 2.5, 3.5, 4.5]),
    "no such datatype": _request(datatype="INT65"),
    "rank": _request(shape=[4]),
    "rank 3": _request(shape=[1, 4, 1]),
    "short": _request(data=[1, 2, 3]),
    "long": _request(data=[1, 2, 3, 4, 5]),
    "NaN": _request(data=[1, float("nan"), 3, 4]),
    "zero rows": _request(shape=[0, 4], data=[]),
    "negative rows": _request(shape=[-1, 4]),
    "a gigabyte claimed": _request(shape=[1, GIGABYTE // 8]),
    "no such token": _request(data=[1, 2, 3, 256]),
    "no such output": json.dumps({"inputs": [GOOD], "outputs": [{"name": "y"}]}).encode(),
    "twice": json.dumps({"inputs": [GOOD, GOOD]}).encode(),
    "not JSON": b"{",
    "not a request": b"[]",
}

# what is wrong with it -> name, datatype, shape, raw content of a gRPC request
RAW = np.arange(4).tobytes()
BAD_TENSORS: dict[str, tuple[str, str, list[int], bytes]] = {
    "name": ("token", "INT64", [1, 4], RAW),
    "datatype": ("tokens", "FP64", [1, 4], RAW),
    "rank": ("tokens", "INT64", [4], RAW),
    "rank 3": ("tokens", "INT64", [1, 4, 1], RAW),
    "short": ("tokens", "INT64", [1, 4], RAW[:-1]),
    "long": ("tokens", "INT64", [1, 4], RAW + RAW),
    "NaN": ("tokens", "FP64", [1, 4], np.full(4, np.nan).tobytes()),
    "zero rows": ("tokens", "INT64", [0, 4], b""),
    "a gigabyte claimed": ("tokens", "INT64", [1, GIGABYTE // 8], RAW),
    "no such token": ("tokens", "INT64", [1, 4], np.array([1, 2, 3, 256]).tobytes()),
}


class Conformance:
    """Tests of one server; they share its process, in this order."""

    Server: ClassVar[type[Server]]
    # Bad requests the server's own parser refuses as an error of its own (500, INTERNAL) before
    # any model sees them.
    parser_http: ClassVar[set[str]] = set()
    parser_grpc: ClassVar[set[str]] = set()

    @pytest.fixture(scope="class")
    @classmethod
    def server(
        cls, tmp_path_factory: pytest.TempPathFactory, llama_fnorm: Path
    ) -> Iterator[Server]:
        reason = cls.Server.missing()
        if reason is not None:
            pytest.skip(reason)
        server = cls.Server(tmp_path_factory.mktemp(cls.__name__))
        server.deploy(llama_fnorm)
        try:
            server.start()
            yield server
        finally:
            server.stop()

    @pytest.fixture
    def client(self, server: Server) -> Iterator[Client]:
        client = Client(server)
        yield client
        client.close()

    def test_ready(self, server: Server, client: Client) -> None:
        for each in (client.http, client.grpc):
            assert each.is_server_live()
            assert each.is_server_ready()
            assert each.is_model_ready("llama")

    def test_metadata(self, client: Client) -> None:
        by_http = client.http.get_model_metadata("llama")
        by_grpc = client.grpc.get_model_metadata("llama", as_json=True)
        assert by_http["name"] == by_grpc["name"] == "llama"
        for found in (by_http, by_grpc):
            tokens, logits = (_port(found[kind][0]) for kind in ("inputs", "outputs"))
            assert tokens == ("tokens", "INT64", [-1, -1])
            assert logits == ("logits", "FP32", [-1, -1, 256])

    def test_answers(self, client: Client, cases: list[Case]) -> None:
        for case in cases:
            assert case.wrong(client.by_http(case.tokens)) is None
            assert case.wrong(client.by_grpc(case.tokens)) is None

    def test_ten_thousand_requests(self, server: Server, cases: list[Case]) -> None:
        load = Load(server, cases, REQUESTS)
        load.start()
        load.wait()
        assert load.failures == []
        assert load.answered == REQUESTS

    @pytest.mark.parametrize("what", BAD_BODIES)
    def test_bad_http(self, server: Server, client: Client, cases: list[Case], what: str) -> None:
        connection = http.client.HTTPConnection(server.http, timeout=30)
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v2/models/llama/infer", BAD_BODIES[what], headers)
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        assert response.status == 500 if what in self.parser_http else 400 <= response.status < 500
        assert text
        assert cases[0].wrong(client.by_http(cases[0].tokens)) is None

    def test_http_headers_of_a_gigabyte(
        self, server: Server, client: Client, cases: list[Case]
    ) -> None:
        """The body claimed never comes, or is shorter than the header in it."""
        head = "POST /v2/models/llama/infer HTTP/1.1\r\nHost: localhost\r\n"
        with socket.create_connection(("127.0.0.1", server.http_port), timeout=30) as connection:
            connection.sendall(f"{head}Content-Length: {GIGABYTE}\r\n\r\n{{".encode())
        connection = http.client.HTTPConnection(server.http, timeout=30)
        headers = {
            "Content-Type": "application/octet-stream",
            "Inference-Header-Content-Length": str(GIGABYTE),
        }
        connection.request("POST", "/v2/models/llama/infer", _request(data=[1, 2]), headers)
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        assert 400 <= response.status < 500, text
        assert cases[0].wrong(client.by_http(cases[0].tokens)) is None

    @pytest.mark.parametrize("what", BAD_TENSORS)
    def test_bad_grpc(self, client: Client, cases: list[Case], what: str) -> None:
        name, datatype, shape, raw = BAD_TENSORS[what]
        given = grpc.InferInput(name, shape, datatype)
        given._raw_content = raw  # the client would not let a wrong length pass
        with pytest.raises(InferenceServerException) as error:
            client.grpc.infer("llama", [given])
        wanted = "INTERNAL" if what in self.parser_grpc else "INVALID_ARGUMENT"
        assert error.value.status() == f"StatusCode.{wanted}", error.value
        assert cases[0].wrong(client.by_grpc(cases[0].tokens)) is None

    def test_unknown_model(self, client: Client, cases: list[Case]) -> None:
        for send in (client.by_http, client.by_grpc):
            with pytest.raises(InferenceServerException, match="other"):
                send(cases[0].tokens, "other")

    def test_load_and_unload_beside_it(
        self, server: Server, client: Client, cases: list[Case], doubled_fnorm: Path
    ) -> None:
        with under_load(server, cases, (1.0,)) as load:
            server.deploy(doubled_fnorm, "other")
            for _ in range(3):
                client.http.load_model("other")
                assert cases[0].wrong(client.by_grpc(cases[0].tokens, "other"), (2.0,)) is None
                client.http.unload_model("other")
        assert load.failures == []
        assert load.answered > 0

    def test_replaced_under_load(
        self,
        server: Server,
        client: Client,
        cases: list[Case],
        llama_fnorm: Path,
        doubled_fnorm: Path,
    ) -> None:
        with under_load(server, cases, (1.0, 2.0)) as load:
            for version, artifact, factor in (
                (2, doubled_fnorm, 2.0),
                (3, llama_fnorm, 1.0),
                (3, doubled_fnorm, 2.0),
                (4, llama_fnorm, 1.0),
            ):
                server.deploy(artifact, version=version)
                client.http.load_model("llama")
                for case in cases:
                    assert case.wrong(client.by_grpc(case.tokens), (factor,)) is None
        assert load.failures == []
        assert load.answered > 0

    @pytest.mark.parametrize("how", ["a bit flipped", "half copied"])
    def test_a_damaged_version_is_refused(
        self,
        server: Server,
        client: Client,
        cases: list[Case],
        llama_fnorm: Path,
        doubled_fnorm: Path,
        how: str,
    ) -> None:
        with under_load(server, cases, (1.0,)) as load:
            folder = server.deploy(doubled_fnorm, version=5)
            (library,) = folder.glob("lib/*/*.so")
            if how == "half copied":
                library.unlink()
            else:
                damage(library)
            with pytest.raises(InferenceServerException) as error:
                client.http.load_model("llama")
            reason = "is missing: copy" if how == "half copied" else "it was changed"
            (line,) = [line for line in str(error.value).splitlines() if reason in line]
            assert library.name in line
            for case in cases:
                assert case.wrong(client.by_grpc(case.tokens)) is None
        assert load.failures == []
        server.deploy(llama_fnorm, version=5)
        client.http.load_model("llama")
        assert cases[0].wrong(client.by_grpc(cases[0].tokens)) is None

    def test_killed_and_started_again(self, server: Server, cases: list[Case]) -> None:
        answers = []
        for _ in range(2):
            client = Client(server)
            answers.append([client.by_grpc(case.tokens) for case in cases])
            client.close()
            if len(answers) == 1:
                server.kill()
                assert not server.answers("/v2/health/live")
                server.start()
        for case, before, after in zip(cases, *answers, strict=True):
            assert case.wrong(after) is None
            assert before is not None
            np.testing.assert_array_equal(before, after)


def _port(found: dict[str, Any]) -> tuple[str, str, list[int]]:
    return found["name"], found["datatype"], [int(size) for size in found["shape"]]
