"""Where kernels come from: artifacts, the cache, a build, or nowhere."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fusenorm.torch
from fusenorm import cache
from fusenorm.artifact import Artifact, Cuda, Library
from fusenorm.errors import BadInput
from fusenorm.kernels import symbols
from fusenorm.lower import Target, build_library
from fusenorm.lower.nvcc import Nvcc
from fusenorm.ops import Gated, Norm
from fusenorm.runtime.direct import open_library
from fusenorm.torch import kernels

X, W = torch.randn(3, 32), torch.rand(32)


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing found yet, and nothing of it kept."""
    monkeypatch.setattr(kernels, "_found", {})
    monkeypatch.setattr(kernels, "_given", [])


def test_without_a_kernel_the_reference_runs_and_says_so() -> None:
    x = X.double()
    with pytest.warns(RuntimeWarning, match="RMSNorm_f64 runs node by node in torch on cpu: f64"):
        y = fusenorm.torch.rms_norm(x, W.double(), 1e-5)
    torch.testing.assert_close(y, torch.nn.functional.rms_norm(x, (32,), W.double(), 1e-5))
    assert fusenorm.torch.fallbacks() == {"RMSNorm_f64 on cpu": "f64 has no CPU kernel"}
    fusenorm.torch.rms_norm(x, W.double(), 1e-5)  # once is enough


def test_undeclared_mixtures_run_by_the_reference() -> None:
    x = X.half()
    with pytest.warns(RuntimeWarning, match="no fused op is declared as LayerNorm_f16_f32bias"):
        y = fusenorm.torch.layer_norm(x, W.half(), W, 1e-5)
    wanted = torch.nn.functional.layer_norm(x.float(), (32,), W.half().float(), W, 1e-5)
    torch.testing.assert_close(y.float(), wanted, rtol=1e-3, atol=1e-3)


def test_a_failed_build_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "/nowhere/cc")
    with pytest.warns(RuntimeWarning, match="/nowhere/cc"):
        y = fusenorm.torch.swish(X)
    torch.testing.assert_close(y, torch.nn.functional.silu(X))


@pytest.mark.kernel
@pytest.mark.parametrize("cuda", [None, Cuda(("sm_80",))])
def test_an_artifact_comes_first(
    cuda: Cuda | None, artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = build_library([Norm()], Target.host(), tmp_path / "ops.so")
    library = dataclasses.replace(Library.of(info), cuda=cuda)
    held = dataclasses.replace(artifact, libraries=[library])
    monkeypatch.setattr(kernels, "_built", None)  # building would fail
    fusenorm.torch.use(held.save(tmp_path / "a.fnorm"))
    y = fusenorm.torch.rms_norm(X, W, 1e-5)
    torch.testing.assert_close(y, torch.nn.functional.rms_norm(X, (32,), W, 1e-5))


@pytest.mark.kernel
def test_a_cuda_library_is_built_and_loads_without_a_gpu() -> None:
    try:
        Nvcc.find()
    except BadInput as error:
        pytest.skip(str(error))
    spec = Norm(skip=True, dtype="bf16", scale="bf16")
    library = open_library(kernels._built(spec, "cuda", 32))
    function = library.function(symbols(spec, "cuda")[0])
    x, weight = X.bfloat16(), W.bfloat16()
    with pytest.raises(ValueError, match="cuda"):
        function(x, x, weight, x.clone(), x.clone(), 1e-5)


def test_an_artifact_without_a_library_is_refused(folder: Path) -> None:
    with pytest.raises(BadInput, match="holds no library"):
        fusenorm.torch.use(folder)


@pytest.mark.kernel
def test_another_process_finds_it_in_the_cache_and_needs_no_tvm() -> None:
    fusenorm.torch.relu2(X)
    code = (
        "import sys, torch, fusenorm.torch\n"
        "fusenorm.torch.relu2(torch.ones(2, 4))\n"
        "sys.exit('tvm' in sys.modules or bool(fusenorm.torch.fallbacks()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("rows", "width", "ranges"),
    [
        (5, 64, [(0, 5)]),
        (2, 1 << 17, [(0, 1), (1, 2)]),
        (1000, 1 << 10, [(0, 333), (333, 666), (666, 1000)]),
    ],
)
def test_rows_are_shared_among_torchs_threads(
    threads: None, rows: int, width: int, ranges: list[tuple[int, int]]
) -> None:
    seen = []

    def kernel(x: torch.Tensor, y: torch.Tensor, begin: int, end: int, epsilon: float) -> None:
        seen.append((begin, end))
        y[begin:end] = x[begin:end] + epsilon

    x, y = torch.randn(rows, width), torch.empty(rows, width)
    kernels._on_cpu(kernel, [x, y], [2.0])
    assert sorted(seen) == ranges
    assert torch.equal(y, x + 2.0)


def test_an_error_in_a_thread_is_raised(threads: None) -> None:
    def kernel(y: torch.Tensor, begin: int, end: int) -> None:
        if begin == 0:
            raise ValueError("of the first rows")

    with pytest.raises(ValueError, match="of the first rows"):
        kernels._on_cpu(kernel, [torch.empty(1000, 1000)], [])


@pytest.mark.kernel
def test_threads_make_the_same_numbers_also_after_a_fork() -> None:
    code = """
import os, torch, fusenorm.torch
x = torch.randn(300, 1024)
torch.set_num_threads(1)
wanted = fusenorm.torch.relu2(x)
torch.set_num_threads(3)
same = torch.equal(fusenorm.torch.relu2(x), wanted)
child = os.fork()
if not child:  # where torch's own threads are gone
    made = fusenorm.torch.relu2(x).numpy()
    os._exit(0 if (made == wanted.numpy()).all() else 1)
same = same and os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
raise SystemExit(not same)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=300).returncode == 0


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """An empty cache; what was built."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return []


def kept(key: str, built: list[str]) -> Path:
    def build(path: Path) -> None:
        built.append(key)
        path.write_text(f"library {key}")

    return cache.library(key, build)


def test_a_library_is_built_once(store: list[str]) -> None:
    path = kept("a", store)
    assert (path, store) == (kept("a", store), ["a"])
    assert path.read_text() == "library a"
    assert path != kept("b", store)
    assert {p.name[0] for p in path.parent.iterdir()} <= {"a", "b", "f"}


def test_a_changed_library_is_built_again(store: list[str]) -> None:
    kept("a", store).write_text("something else")
    assert kept("a", store).read_text() == "library a"
    entry = cache.folder() / "libraries" / "a.json"
    for text in ("", "[]", '{"sha256": "../../x"}'):
        entry.write_text(text)
        assert kept("a", store).read_text() == "library a"
    assert store == ["a"] * 5


def test_a_cache_others_may_write_to_is_refused(store: list[str]) -> None:
    kept("a", store)
    (cache.folder() / "libraries").chmod(0o777)
    with pytest.raises(BadInput, match="others may write to it: set XDG_CACHE_HOME"):
        kept("a", store)


def test_a_cache_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(BadInput, match=r"cannot be used as a cache .*Not a directory.*: set XDG"):
        kept("a", [])


def test_the_key_is_everything_the_content_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = []
    monkeypatch.setattr(kernels.cache, "library", lambda key, build: keys.append(key))
    kernels._built(Norm(), "cpu", 64)
    kernels._built(Norm(), "cuda", 64)
    kernels._built(Norm(), "cuda", 128)
    kernels._built(Gated(), "cpu", 64)
    monkeypatch.setattr(kernels, "_sources", lambda: "other sources")
    kernels._built(Norm(), "cpu", 64)
    monkeypatch.setattr(Target, "host", lambda: Target("cpu", "x86-64-v2"))
    kernels._built(Norm(), "cpu", 64)
    assert len(set(keys)) == 6
    kernels._built(Norm(), "cpu", 128)  # one kernel takes any row length there
    assert keys[-1] == keys[-2]
