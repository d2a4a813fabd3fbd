"""Which library a machine gets, GPUs included, and what is said where there is none."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import onnxruntime as ort
import pytest

import fusenorm
from fusenorm.artifact import Artifact, Cuda, Library, Stored, open_artifact
from fusenorm.errors import BadInput, SlowerFallback
from fusenorm.runtime import compatibility as module
from fusenorm.runtime.compatibility import CPU, CUDA, compatibility
from fusenorm.runtime.host import Gpu, Host

ELF = b"\x7fELF no code"
FATBIN = Cuda(("sm_80", "sm_90a"), "compute_90", "12.4")
V2 = Library("x86-64-v2", "x86_64", ("sse4_2",), "2.17", (), Path("v2.so"), content=ELF)
GPU = dataclasses.replace(V2, cuda=FATBIN)
HOST = Host("x86_64", frozenset({"sse4_2"}), "2.36")
BOTH = (CUDA, CPU)


def on(capability: tuple[int, int], driver: str = "12.8") -> Host:
    return dataclasses.replace(HOST, gpus=(Gpu(capability, driver),))


@pytest.fixture
def stored(artifact: Artifact, tmp_path: Path) -> Stored:
    """With a library for the GPU and one for the CPU."""
    libraries = [GPU, V2]
    return open_artifact(dataclasses.replace(artifact, libraries=libraries).save(tmp_path / "a"))


@pytest.fixture
def with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """An onnxruntime that has the CUDA provider."""
    monkeypatch.setattr(ort, "get_available_providers", lambda: list(BOTH))


def test_gpu_code_is_described_in_the_manifest(stored: Stored) -> None:
    gpu, cpu = stored.manifest["libraries"]
    assert gpu["cuda"] == {"archs": ["sm_80", "sm_90a"], "ptx": "compute_90", "driver": "12.4"}
    assert gpu["path"].startswith("lib/x86-64-v2-cuda/")
    assert cpu["cuda"] is None
    assert stored.libraries[0].cuda == FATBIN


@pytest.mark.usefixtures("with_cuda")
@pytest.mark.parametrize(
    ("host", "status", "variant", "said"),
    [
        (on((8, 0)), "ok", "x86-64-v2-cuda", "this machine has it: x86_64, glibc 2.36, sm_80"),
        (on((8, 9)), "ok", "x86-64-v2-cuda", "sm_89 with CUDA 12.8"),
        (on((9, 0)), "ok", "x86-64-v2-cuda", "sm_90 with CUDA 12.8"),
        (on((12, 0)), "ok", "x86-64-v2-cuda", "sm_120 with CUDA 12.8"),
        (on((7, 5)), "fallback", None, "needs a GPU of sm_80, sm_90a, compute_90 and newer, this"),
        (on((8, 0), "12.2"), "fallback", None, "needs a driver for CUDA 12.4, this machine's GPU"),
        (HOST, "ok", "x86-64-v2", "lib/x86-64-v2 needs x86_64, sse4_2, glibc 2.17"),
    ],
)
def test_a_session_on_the_gpu(stored: Stored, host: Host, status, variant, said) -> None:
    found = compatibility(stored, BOTH, host=host)
    assert (found.status, found.variant) == (status, variant)
    assert said in found.reason
    assert found.as_dict() == {"status": status, "reason": found.reason, "variant": variant}


@pytest.mark.usefixtures("with_cuda")
def test_the_gpu_that_the_provider_names(stored: Stored) -> None:
    host = dataclasses.replace(HOST, gpus=(Gpu((7, 0), "12.8"), Gpu((8, 0), "12.8")))
    assert compatibility(stored, [CUDA, CPU], host=host).status == "fallback"
    second = [(CUDA, {"device_id": 1}), CPU]
    assert compatibility(stored, second, host=host).variant == "x86-64-v2-cuda"
    third = [(CUDA, {"device_id": "2"})]
    assert "needs GPU 2, this machine has 2" in compatibility(stored, third, host=host).reason


def test_a_session_on_the_cpu(stored: Stored) -> None:
    assert compatibility(stored, host=on((8, 0))).variant == "x86-64-v2"
    assert compatibility(stored, BOTH, host=on((8, 0))).variant == "x86-64-v2"


def test_a_library_for_the_other_device_is_no_use(
    artifact: Artifact, tmp_path: Path, with_cuda: None
) -> None:
    for library, providers, said in ((GPU, [CPU], "a GPU"), (V2, [CUDA], "the CPU")):
        one = dataclasses.replace(artifact, libraries=[library]).save(tmp_path / said)
        found = compatibility(one, providers, host=on((8, 0)))
        assert found.status == "fallback"
        assert f"is for {said}, not for this session's provider" in found.reason
    found = compatibility(tmp_path / "a GPU", [CUDA, CPU], host=HOST)
    assert found.status == "fallback"


def test_machine_code_for_one_version_only() -> None:
    exact = Cuda(("sm_90a",))
    assert Gpu((9, 0), "12.8").lacks(exact) is None
    assert "needs a GPU of sm_90a" in Gpu((9, 1), "12.8").lacks(exact)
    assert Gpu((8, 6), "12.8").lacks(Cuda(("sm_80",))) is None
    assert "this machine's is sm_80" in Gpu((8, 0), "12.8").lacks(Cuda(("sm_86",)))
    assert "needs a GPU of something" in Gpu((8, 0), "12.8").lacks(Cuda(("something",)))


def test_the_driver_is_asked_only_for_a_session_on_the_gpu(monkeypatch, stored: Stored) -> None:
    asked = []
    monkeypatch.setattr("fusenorm.runtime.host._gpus", lambda: asked.append(1) or ())
    compatibility(stored)
    assert asked == []
    monkeypatch.setattr(ort, "get_available_providers", lambda: list(BOTH))
    compatibility(stored, BOTH)
    assert asked == [1]


def test_a_driver_by_ctypes(monkeypatch: pytest.MonkeyPatch) -> None:
    def given(at, value: int) -> int:
        at._obj.value = value
        return 0

    capabilities = [{75: 8, 76: 6}, {75: 9, 76: 0}]
    driver = SimpleNamespace(
        cuInit=lambda flags: 0,
        cuDriverGetVersion=lambda at: given(at, 12040),
        cuDeviceGetCount=lambda at: given(at, len(capabilities)),
        cuDeviceGetAttribute=lambda at, name, device: given(at, capabilities[device][name]),
    )
    monkeypatch.setattr("ctypes.CDLL", lambda name: driver)
    assert Host.detect(gpus=True).gpus == (Gpu((8, 6), "12.4"), Gpu((9, 0), "12.4"))
    driver.cuInit = lambda flags: 100
    assert Host.detect(gpus=True).gpus == ()


def test_providers_this_onnxruntime_lacks(stored: Stored) -> None:
    found = compatibility(stored, ["QNNExecutionProvider"])
    assert found.status == "no"
    assert "asks for QNNExecutionProvider; this onnxruntime has " in found.reason
    with pytest.raises(BadInput, match="asks for QNNExecutionProvider"):
        fusenorm.load(stored, providers=["QNNExecutionProvider"])


def test_damaged_artifacts_must_not_be_loaded(stored: Stored) -> None:
    stored.model.unlink()
    found = compatibility(stored.path)
    assert found.status == "no"
    assert "model.onnx: is missing: copy the artifact again" in found.reason


def test_without_fused_ops_there_is_nothing_to_fall_back_from(folder: Path) -> None:
    found = compatibility(folder)
    assert (found.status, found.variant) == ("ok", None)
    assert not fusenorm.load(folder).metrics.snapshot().start.fallback


@pytest.fixture
def no_cpuinfo(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that does not say what its CPU has."""
    detect = Host.detect
    unknown = Path("/nonexistent/cpuinfo")
    monkeypatch.setattr(Host, "detect", lambda **options: detect(unknown, **options))


@pytest.mark.kernel
@pytest.mark.usefixtures("no_cpuinfo")
def test_in_doubt_the_recorded_run_decides(compiled: Path, monkeypatch) -> None:
    probed = []
    probe = module.probe
    monkeypatch.setattr(module, "probe", lambda *given: probed.append(probe(*given)))
    assert fusenorm.load(compiled, fallback=False).library is not None
    assert probed == [None]


@pytest.mark.usefixtures("no_cpuinfo")
def test_in_doubt_a_library_that_kills_the_process_is_not_taken(stored: Stored, feed) -> None:
    with pytest.warns(SlowerFallback, match="lib/x86-64-v2 .*cannot load it.*runs without"):
        session = fusenorm.load(stored)
    assert session.library is None
    assert session.run(None, feed)[0].shape == (2, 3, 8)


KILLER = """
int RegisterCustomOps(void* options, const void* api) {
  (void)options; (void)api;
  __asm__ volatile(".byte 0x0f, 0x0b");
  return 0;
}
"""


@pytest.mark.kernel
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_an_illegal_instruction_ends_the_child_only(artifact: Artifact, tmp_path: Path) -> None:
    (tmp_path / "killer.c").write_text(KILLER)
    library = tmp_path / "killer.so"
    command = ["cc", "-shared", "-fPIC", str(tmp_path / "killer.c"), "-o", str(library)]
    subprocess.run(command, check=True)
    killer = dataclasses.replace(V2, content=library.read_bytes(), features=(), glibc=None)
    folder = dataclasses.replace(artifact, libraries=[killer]).save(tmp_path / "killer")
    found = compatibility(folder, check=True, host=HOST)
    assert found.status == "fallback"
    assert "lib/x86-64-v2 ends in SIGILL in its recorded run" in found.reason
    with pytest.raises(BadInput, match="ends in SIGILL"):
        fusenorm.load(folder, check=True, fallback=False)


def test_other_numbers_than_recorded_are_refused(artifact: Artifact, tmp_path: Path) -> None:
    assert artifact.golden is not None
    shifted = {name: array + 1 for name, array in artifact.golden.outputs.items()}
    golden = dataclasses.replace(artifact.golden, outputs=shifted)
    folder = dataclasses.replace(artifact, golden=golden).save(tmp_path / "shifted")
    with pytest.raises(BadInput, match="gives another 'y' than its recorded run"):
        fusenorm.load(folder, check=True)
    fusenorm.load(folder)  # quick by default


def test_nothing_recorded_nothing_checked(artifact: Artifact, tmp_path: Path) -> None:
    folder = dataclasses.replace(artifact, golden=None).save(tmp_path / "blank")
    assert "holds no recorded run" in compatibility(folder, check=True).reason
