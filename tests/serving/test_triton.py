"""A real Triton server with the fusenorm backend."""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

pytest.importorskip("tritonclient", reason="make test-serving installs tritonclient and runs this")

import tritonclient.http as http
from tritonclient.utils import InferenceServerException

from fusenorm.serving import triton
from tests.serving.conformance import BAD_TENSORS, Conformance
from tests.serving.servers import ROOT, Case, Client, Load, Server, Triton

pytestmark = pytest.mark.serving


class TestTriton(Conformance):
    Server = Triton
    # Triton 2.51 answers 500 to JSON it cannot parse; the same tensors in binary are a 400.
    parser_http: ClassVar[set[str]] = {
        "short",
        "long",
        "NaN",
        "negative rows",
        "a gigabyte claimed",
        "not JSON",
        "not a request",
    }

    @pytest.mark.parametrize("what", BAD_TENSORS)
    def test_bad_binary_http(
        self, server: Server, client: Client, cases: list[Case], what: str
    ) -> None:
        name, datatype, shape, raw = BAD_TENSORS[what]
        given = http.InferInput(name, shape, datatype)
        given._raw_data = raw  # the client would not let a wrong length pass
        given._parameters["binary_data_size"] = len(raw)
        with pytest.raises(InferenceServerException) as error:
            client.http.infer("llama", [given])
        assert error.value.status() == "400", error.value
        assert cases[0].wrong(client.by_http(cases[0].tokens)) is None

    def test_one_bad_request_of_a_batch(self, server: Server, cases: list[Case]) -> None:
        """It fails alone: those it was batched with are answered."""
        load = Load(server, [case for case in cases if case.tokens.shape[1] == 8], 2000)
        client = Client(server)
        load.start()
        refused = 0
        while refused < 50:
            with pytest.raises(InferenceServerException, match="out of data bounds"):
                client.by_grpc(np.full((1, 8), 256))
            refused += 1
        load.wait()
        client.close()
        assert load.failures == []

    def test_requests_share_runs(self, server: Server, client: Client, cases: list[Case]) -> None:
        """Of ragged lengths, too: fewer calls of the backend than requests."""
        before = _counts(client)
        load = Load(server, cases, 2000, http_every=2001)
        load.start()
        load.wait()
        assert load.failures == []
        rows, calls = (after - b for after, b in zip(_counts(client), before, strict=True))
        assert rows == sum(len(cases[number % len(cases)].tokens) for number in range(2000))
        assert calls < 1500

    def test_the_stub_needs_onnxruntime_only(self) -> None:
        python = ROOT / ".venv-triton" / "bin" / "python"
        code = "import importlib.util as u; print(u.find_spec('fusenorm'), u.find_spec('tvm_ffi'))"
        done = subprocess.run([python, "-c", code], cwd="/", capture_output=True, text=True)
        assert done.stdout.split() == ["None", "None"]


def _counts(client: Client) -> tuple[int, int]:
    """Rows served and calls of the backend, as the server counts them."""
    (found,) = client.http.get_inference_statistics("llama")["model_stats"]
    return found["inference_count"], found["execution_count"]


def test_custom_metrics(tmp_path: Path, llama_fnorm: Path, cases: list[Case]) -> None:
    reason = Triton.missing()
    if reason is not None:
        pytest.skip(reason)
    server = Triton(tmp_path)
    triton.deploy(llama_fnorm, server.repo, name="llama", metrics=True)
    try:
        server.start()
        client = Client(server)
        for case in cases:
            client.by_grpc(case.tokens)
        time.sleep(1.1)  # the figures follow once a second, with the next batch
        client.by_grpc(cases[0].tokens)
        client.close()
        text = server.metrics()
    finally:
        server.stop()
    sent = sum(len(case.tokens) for case in cases) + len(cases[0].tokens)
    probe = 2  # the recorded run, at the start
    for name, value in (
        ("rows_total", sent + probe),
        ("run_seconds_count", len(cases) + 2),
        ('run_seconds_bucket{.*le="\\+Inf"', len(cases) + 2),
        ("fallback", 0),
        ("errors_total", 0),
    ):
        pattern = rf'^fusenorm_{name}.*model="llama".*version="1".* (\S+)$'
        (found,) = re.findall(pattern, text, re.MULTILINE)
        assert float(found) == value, name
    assert re.search(r'^fusenorm_load_seconds{.*variant="x86-64-v\d".*} 0\.\d', text, re.MULTILINE)
