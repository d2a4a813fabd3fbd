"""Inference servers as processes on free loopback ports, and the load put on them."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ClassVar

import numpy as np
import tritonclient.grpc as grpc
import tritonclient.http as http
from tritonclient.utils import InferenceServerException

from fusenorm.serving import model_settings, triton
from tests.serving.ports import free_ports

ROOT = Path(__file__).resolve().parent.parent.parent
BUILD = ROOT / "build"
START_SECONDS = 60
STOP_SECONDS = 20
JSON = {"Content-Type": "application/json"}


class Server:
    """A server with a model repository of its own; `start` it, and `stop` it whatever happens.

    Args:
        home: an empty folder for the repository and the log.
    """

    needs: ClassVar[tuple[Path, ...]]

    def __init__(self, home: Path) -> None:
        self.home = home
        self.repo = home / "repo"
        self.repo.mkdir()
        self.http_port, self.grpc_port, self.metrics_port = free_ports(3)
        self.http = f"127.0.0.1:{self.http_port}"
        self.grpc = f"127.0.0.1:{self.grpc_port}"
        self.process: subprocess.Popen[bytes] | None = None

    @classmethod
    def missing(cls) -> str | None:
        """Why this server cannot be started here."""
        for path in cls.needs:
            if not path.exists():
                return f"no {path}: make test-serving installs it, where its packages can be had"
        return None

    def command(self) -> list[str]:
        raise NotImplementedError

    def environment(self) -> dict[str, str]:
        return {}

    def deploy(self, artifact: Path, name: str = "llama", version: int = 1) -> Path:
        """Write a model into the repository; its version's folder."""
        raise NotImplementedError

    def start(self) -> None:
        """Start the process and wait until it and its models are ready."""
        with open(self.home / "log", "ab") as log:
            self.process = subprocess.Popen(
                self.command(),
                env={**os.environ, **self.environment()},
                cwd=ROOT,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_SECONDS
        while not self.answers("/v2/health/ready"):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"not ready:\n{self.log()[-4000:]}")
            time.sleep(0.1)

    def stop(self) -> None:
        """Ask the process to end, and end it and its children for good."""
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_SECONDS)
        self.kill()

    def kill(self) -> None:
        """kill -9 the server, then what it left behind."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process = None

    def answers(self, path: str) -> bool:
        try:
            with urllib.request.urlopen(f"http://{self.http}{path}", timeout=5) as response:
                return bool(response.status == 200)
        except (OSError, urllib.error.URLError):
            return False

    def log(self) -> str:
        return (self.home / "log").read_text(errors="replace")

    def metrics(self) -> str:
        url = f"http://127.0.0.1:{self.metrics_port}/metrics"
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.read().decode()


class Triton(Server):
    """Triton with the backend as `fusenorm deploy triton --backends` writes it.

    Its Python has onnxruntime and nothing of ours.
    """

    home_of_server = BUILD / "triton" / "pytriton" / "tritonserver"
    needs = (ROOT / ".venv-triton" / ".done", BUILD / "triton" / ".done")

    def __init__(self, home: Path) -> None:
        super().__init__(home)
        self.backends = home / "backends"
        self.backends.mkdir()
        (self.backends / "python").symlink_to(self.home_of_server / "backends" / "python")
        triton.write_backend(self.backends)
        self.shared_memory = f"fusenorm{os.getpid()}_{self.http_port}_"

    @classmethod
    def missing(cls) -> str | None:
        if "libpython3.11.so.1.0" not in subprocess.getoutput("ldconfig -p"):
            return "no libpython3.11.so.1.0, which Triton's stub needs: install libpython3.11"
        return super().missing()

    def command(self) -> list[str]:
        return [
            str(self.home_of_server / "bin" / "tritonserver"),
            f"--model-repository={self.repo}",
            f"--backend-directory={self.backends}",
            "--http-address=127.0.0.1",
            f"--http-port={self.http_port}",
            "--grpc-address=127.0.0.1",
            f"--grpc-port={self.grpc_port}",
            "--metrics-address=127.0.0.1",
            f"--metrics-port={self.metrics_port}",
            "--allow-gpu-metrics=false",
            "--model-control-mode=explicit",
            "--load-model=*",
            "--disable-auto-complete-config",
            f"--backend-config=python,shm-region-prefix-name={self.shared_memory}",
        ]

    def environment(self) -> dict[str, str]:
        libraries = BUILD / "triton" / "nvidia_pytriton.libs"
        path = f"{ROOT / '.venv-triton' / 'bin'}:{os.environ['PATH']}"
        return {"LD_LIBRARY_PATH": str(libraries), "PATH": path}

    def deploy(self, artifact: Path, name: str = "llama", version: int = 1) -> Path:
        return triton.deploy(artifact, self.repo, name=name, version=version) / str(version)

    def kill(self) -> None:
        super().kill()
        for path in Path("/dev/shm").glob(f"{self.shared_memory}*"):
            path.unlink(missing_ok=True)


class MLServer(Server):
    python = ROOT / ".venv-mlserver" / "bin"
    needs = (ROOT / ".venv-mlserver" / ".done",)

    def command(self) -> list[str]:
        return [str(self.python / "mlserver"), "start", str(self.repo)]

    def environment(self) -> dict[str, str]:
        return {
            "MLSERVER_HOST": "127.0.0.1",
            "MLSERVER_HTTP_PORT": str(self.http_port),
            "MLSERVER_GRPC_PORT": str(self.grpc_port),
            "MLSERVER_METRICS_PORT": str(self.metrics_port),
            "MLSERVER_METRICS_DIR": str(self.home / "metrics"),
            "MLSERVER_ENVIRONMENTS_DIR": str(self.home / "environments"),
        }

    def deploy(self, artifact: Path, name: str = "llama", version: int = 1) -> Path:
        folder = model_settings.deploy(artifact, self.repo, name=name, version=version)
        return folder / str(version)


class KServe(MLServer):
    """KServe's Python server over MLServer's repository."""

    python = ROOT / ".venv-kserve" / "bin"
    needs = (ROOT / ".venv-kserve" / ".done",)

    def command(self) -> list[str]:
        return [
            str(self.python / "python"),
            "-m",
            "tests.serving.kserve_on_loopback",
            f"--repo={self.repo}",
            f"--http_port={self.http_port}",
            f"--grpc_port={self.grpc_port}",
        ]


class Case:
    """A request and its answer.

    Attributes:
        tokens: int64[rows, length].
        logits: what onnxruntime gives for the source model, float32[rows, length, 256].
        bound: on the largest difference, absolute.
    """

    def __init__(self, tokens: np.ndarray, logits: np.ndarray, relative: float) -> None:
        self.tokens, self.logits = tokens, logits
        self.bound = relative * float(np.abs(logits).max())

    def wrong(self, found: np.ndarray | None, scale: Sequence[float] = (1.0,)) -> str | None:
        """What is wrong with an answer; `scale`: factors one of which may be in it."""
        if found is None or found.dtype != np.float32 or found.shape != self.logits.shape:
            return f"{None if found is None else (found.dtype, found.shape)}"
        differences = [float(np.abs(found - factor * self.logits).max()) for factor in scale]
        bounds = [factor * self.bound for factor in scale]
        if any(d <= bound for d, bound in zip(differences, bounds, strict=True)):
            return None
        return f"{list(self.tokens.shape)} differs by {min(differences):.3g}"


class Client:
    """tritonclient on both protocols, for one thread. HTTP is JSON: all servers speak that."""

    def __init__(self, server: Server) -> None:
        self.http = http.InferenceServerClient(server.http, network_timeout=60)
        self.grpc = grpc.InferenceServerClient(server.grpc)

    def by_grpc(self, tokens: np.ndarray, name: str = "llama") -> np.ndarray | None:
        given = grpc.InferInput("tokens", list(tokens.shape), "INT64")
        given.set_data_from_numpy(tokens)
        return self.grpc.infer(name, [given], client_timeout=60).as_numpy("logits")

    def by_http(self, tokens: np.ndarray, name: str = "llama") -> np.ndarray | None:
        given = http.InferInput("tokens", list(tokens.shape), "INT64")
        given.set_data_from_numpy(tokens, binary_data=False)
        wanted = http.InferRequestedOutput("logits", binary_data=False)
        return self.http.infer(name, [given], outputs=[wanted], headers=JSON).as_numpy("logits")

    def close(self) -> None:
        self.http.close()
        self.grpc.close()


class Load:
    """Requests from many threads; `failures` collects what was wrong, `answered` counts.

    Args:
        server: where to.
        cases: sent over and over.
        requests: how many; None: until `stop`.
        threads: how many clients.
        http_every: every so manieth request goes by HTTP, the others by gRPC.
        scale: see `Case.wrong`.
    """

    def __init__(
        self,
        server: Server,
        cases: Sequence[Case],
        requests: int | None = None,
        *,
        threads: int = 16,
        http_every: int = 25,
        scale: Sequence[float] = (1.0,),
    ) -> None:
        self.server, self.http_every, self.scale = server, http_every, scale
        self.failures: list[str] = []
        self.answered = 0
        self._numbers = itertools.count() if requests is None else iter(range(requests))
        self._cases = cases
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._send) for _ in range(threads)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def wait(self) -> None:
        """Until every request was answered."""
        for thread in self._threads:
            thread.join()

    def stop(self) -> None:
        self._stopped.set()
        self.wait()

    def _send(self) -> None:
        client = Client(self.server)
        while not self._stopped.is_set():
            with self._lock:
                number = next(self._numbers, None)
            if number is None:
                break
            case = self._cases[number % len(self._cases)]
            send = client.by_grpc if number % self.http_every else client.by_http
            try:
                wrong = case.wrong(send(case.tokens), self.scale)
            except (InferenceServerException, OSError) as error:
                wrong = f"lost: {error}"
            with self._lock:
                self.answered += 1
                if wrong is not None:
                    self.failures.append(wrong)
        client.close()


@contextmanager
def under_load(server: Server, cases: Sequence[Case], scale: Sequence[float]) -> Iterator[Load]:
    """Requests without end while the block runs."""
    load = Load(server, cases, threads=4, scale=scale)
    load.start()
    try:
        yield load
    finally:
        load.stop()


def damage(file: Path) -> None:
    """Flip one bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.unlink()  # the old bytes stay where they are mapped
    file.write_bytes(content)
