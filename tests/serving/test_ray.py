"""Ray Serve and Ray tasks on a cluster simulated on this machine: a head and two nodes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
pytest.importorskip("ray", reason="make test-serving installs Ray and runs this")

import ray
import yaml
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve.context import _get_global_client

import fusenorm
from fusenorm.errors import BadInput
from fusenorm.serving import ray_config
from fusenorm.serving.ray import TARGET, application, deployment, label
from tests.serving.ports import free_ports

# What Ray's own code warns of is its own.
pytestmark = [pytest.mark.serving, pytest.mark.filterwarnings("default")]

REQUESTS = 2000
LOST_AFTER = 500
THREADS = 16
TOKENS = np.arange(24).reshape(3, 8)
(PORT,) = free_ports(1)


@pytest.fixture(scope="module")
def cluster(llama_fnorm: Path) -> Iterator[Cluster]:
    """A head that runs no artifact, and two nodes that do."""
    suits = dict([label(llama_fnorm).split("=")])
    head = {"num_cpus": 1, "include_dashboard": False, "labels": {TARGET: "none"}}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=2, labels=suits)
        ray.init(address=cluster.address, log_to_driver=False)
        serve.start(http_options={"host": "127.0.0.1", "port": PORT, "location": "HeadOnly"})
        yield cluster
    finally:
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture(scope="module")
def handle(cluster: Cluster, llama_fnorm: Path) -> Any:
    return serve.run(deployment(llama_fnorm, replicas=2, match_nodes=True), name="llama")


@pytest.fixture(scope="module")
def logits(llama: Path) -> np.ndarray:
    session = ort.InferenceSession(llama, providers=["CPUExecutionProvider"])
    return session.run(None, {"tokens": TOKENS})[0]


@pytest.fixture(scope="module")
def bound(llama: Path, llama_fnorm: Path, logits: np.ndarray) -> float:
    (difference,) = fusenorm.verify(llama, llama_fnorm).outputs
    return difference.tolerance * float(np.abs(logits).max())


def post(body: bytes, path: str = "") -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(f"http://127.0.0.1:{PORT}{path}/v2/models/llama/infer", body)
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def request(**changes: Any) -> bytes:
    tokens = {"name": "tokens", "datatype": "INT64", "shape": [3, 8], "data": TOKENS.tolist()}
    return json.dumps({"inputs": [tokens | changes]}).encode()


def answer(response: dict[str, Any]) -> np.ndarray:
    (output,) = response["outputs"]
    assert (output["name"], output["datatype"]) == ("logits", "FP32")
    return np.array(output["data"], np.float32).reshape(output["shape"])


def test_answers(handle: Any, logits: np.ndarray, bound: float) -> None:
    status, response = post(request())
    assert status == 200
    by_handle = handle.infer.remote({"tokens": TOKENS}).result()["logits"]
    for found in (answer(response), by_handle):
        assert np.abs(found - logits).max() <= bound


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "token"},
        {"datatype": "FP32"},
        {"shape": [24]},
        {"shape": [3, 9]},
        {"shape": [0, 8], "data": []},
        {"data": [float("nan")] * 24},
        {"data": [256] * 24},
        {"shape": [1, 1 << 27]},
    ],
    ids=str,
)
def test_bad_requests(handle: Any, changes: dict[str, Any]) -> None:
    status, response = post(request(**changes))
    assert status == 400
    assert "tokens" in response["error"] or "values" in response["error"]
    assert post(request())[0] == 200


def test_a_bad_request_by_handle(handle: Any) -> None:
    with pytest.raises(BadInput, match="int32"):
        handle.infer.remote({"tokens": TOKENS.astype(np.int32)}).result()


def test_replicas_are_on_nodes_that_suit(cluster: Cluster, handle: Any) -> None:
    suitable = {node["NodeID"] for node in ray.nodes() if node["Labels"].get(TARGET) != "none"}
    details = _get_global_client().get_serve_details()["applications"]["llama"]
    replicas = details["deployments"]["llama_tiny"]["replicas"]
    assert [replica["state"] for replica in replicas] == ["RUNNING"] * 2
    assert {replica["node_id"] for replica in replicas} <= suitable


def test_a_node_lost_under_load(
    cluster: Cluster, handle: Any, logits: np.ndarray, bound: float
) -> None:
    """Half by HTTP, half by handle; a node goes without a word: no request is lost."""
    numbers = iter(range(REQUESTS))
    lock = threading.Lock()
    failures: list[str] = []
    answered = 0

    def send() -> None:
        nonlocal answered
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            try:
                if number % 2:
                    found = handle.infer.remote({"tokens": TOKENS}).result(timeout_s=120)["logits"]
                else:
                    found = answer(post(request())[1])
                wrong = np.abs(found - logits).max() > bound
            except Exception as error:
                wrong = repr(error)
            with lock:
                answered += 1
                if wrong:
                    failures.append(str(wrong))

    threads = [threading.Thread(target=send) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    while answered < LOST_AFTER:
        time.sleep(0.01)
    lost = next(iter(cluster.worker_nodes))
    cluster.remove_node(lost, allow_graceful=False)
    for thread in threads:
        thread.join()
    assert failures == []
    assert answered == REQUESTS


def test_the_config(
    cluster: Cluster, llama_fnorm: Path, tmp_path: Path, logits: np.ndarray, bound: float
) -> None:
    """What `serve run` would do with it."""
    file = ray_config.deploy(llama_fnorm, tmp_path / "serve.yaml", name="configured")
    (config,) = yaml.safe_load(file.read_text())["applications"]
    assert config["import_path"] == f"{application.__module__}:{application.__name__}"
    serve.run(application(config["args"]), name="configured", route_prefix=config["route_prefix"])
    status, response = post(request(), "/configured")
    assert status == 200
    assert np.abs(answer(response) - logits).max() <= bound
    serve.delete("configured")


def test_many_models_and_targets(cluster: Cluster, llama: Path, tmp_path: Path) -> None:
    """One of three is no model: the others are made, the error is one line."""
    models = [tmp_path / name for name in ("one.onnx", "two.onnx", "broken.onnx")]
    for model in models[:2]:
        model.write_bytes(llama.read_bytes())
    models[2].write_bytes(b"no model")
    done = subprocess.run(
        [sys.executable, "-m", "fusenorm", "optimize", "--ray", cluster.address, "--no-tune"]
        + ["--target", "x86-64-v2,x86-64-v3", "-o", str(tmp_path / "out"), "--json"]
        + [str(model) for model in models],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    outcomes = json.loads(done.stdout)
    made = sorted(Path(each["output"]).name for each in outcomes if each["error"] is None)
    assert made == [f"{n}.x86-64-{v}.fnorm" for n in ("one", "two") for v in ("v2", "v3")]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == made
    for name in made:
        assert fusenorm.verify(llama, tmp_path / "out" / name).ok
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert [line for line in errors if "broken.onnx" in line]
