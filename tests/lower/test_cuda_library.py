"""A library with CUDA kernels on a machine without a GPU: what it holds, needs and refuses."""

from __future__ import annotations

import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

import fusenorm
from fusenorm.artifact import open_artifact
from fusenorm.errors import BadInput, FusenormError
from fusenorm.kernels import symbols
from fusenorm.lower import LibraryInfo, Target, build_library
from fusenorm.lower.elf import read_needs
from fusenorm.lower.nvcc import ARCHS, PTX, Nvcc
from fusenorm.ops import Gated, Linear, Norm
from fusenorm.pipeline import row_lengths
from tests.lower.test_onnxruntime import model, same, session, values

SPECS = (Norm(skip=True), Gated("swish", "pair"))
COLUMNS = {SPECS[0]: (64,)}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> LibraryInfo:
    try:
        Nvcc.find()
    except BadInput as error:
        pytest.skip(str(error))
    path = tmp_path_factory.mktemp("cuda") / "ops.so"
    target = Target.parse("cuda")
    return build_library([*SPECS, Linear()], target, path, columns=COLUMNS)


def images(content: bytes) -> Iterator[tuple[str, str]]:
    """(kind, architecture) of what the fat binaries in a library hold."""
    start = 0
    while (start := content.find(b"\x50\xed\x55\xba\x01\x00", start)) >= 0:
        header, size = struct.unpack_from("<HQ", content, start + 6)
        at, end = start + header, start + header + size
        while at < end:
            kind, _, length, payload = struct.unpack_from("<HHIQ", content, at)
            (arch,) = struct.unpack_from("<I", content, at + 28)
            yield {1: "compute", 2: "sm"}.get(kind, str(kind)), f"{arch}"
            at += length + payload
        start += header


@pytest.mark.kernel
def test_it_holds_every_architecture_and_ptx(built: LibraryInfo) -> None:
    found = {f"{kind}_{arch}" for kind, arch in images(built.path.read_bytes())}
    assert {*ARCHS, PTX} <= found
    assert built.cuda == Nvcc.find().cuda
    assert built.cuda.archs == ARCHS


@pytest.mark.kernel
def test_it_needs_nothing_of_tvm_or_a_driver(built: LibraryInfo) -> None:
    known = r"(libc|libm|libdl|librt|libpthread|libgcc_s|libstdc\+\+|ld-linux[-\w]*)\.so"
    assert all(re.match(known, name) for name in built.libraries), built.libraries
    assert not [name for name in built.undefined if name.startswith(("TVM", "cu", "fusenorm"))]


@pytest.mark.kernel
def test_it_shows_its_entry_points_alone(built: LibraryInfo) -> None:
    kernels = {"SkipRMSNorm", "SkipRMSNorm__nosum", "GLU_swish"}
    shown = {f"__tvm_ffi_fusenorm_{part}{name}" for name in kernels for part in ("", "cuda_")}
    shown |= {f"__tvm_ffi_{name}" for name in symbols(Linear())}
    others = {"RegisterCustomOps", "__tvm_ffi_fusenorm_lanes"}
    assert set(read_needs(built.path).defined) == others | shown


@pytest.mark.kernel
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.op_type)
def test_the_cpu_provider_runs_its_cpu_kernels(built: LibraryInfo, spec) -> None:
    content, feed = model(spec), values(spec, (2, 3, 40))
    mine = session(content, built.path).run(None, feed)
    same(spec, mine, session(content, None).run(None, feed))


@pytest.mark.kernel
def test_a_cpu_tensor_is_refused_by_name(built: LibraryInfo) -> None:
    code = (
        "import numpy as np, tvm_ffi\n"
        f"f = tvm_ffi.load_module({str(built.path)!r}).get_function('fusenorm_cuda_GLU_swish')\n"
        "x = np.ones((2, 8), np.float32)\n"
        "f(x, x.copy(), x.copy(), 1.0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ValueError: Mismatched gate.device_type on argument #0" in done.stderr
    assert "expected cuda" in done.stderr


def fake_nvcc(folder: Path, script: str) -> Path:
    path = folder / "nvcc"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_the_compiler_is_found_by_one_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named, wheel, system = (tmp_path / name for name in ("named", "nvidia/cu99/bin", "system"))
    for folder in (named, wheel, system):
        folder.mkdir(parents=True)
        fake_nvcc(folder, "echo Cuda compilation tools, release 99.1, V99.1.7")
    monkeypatch.setenv("PATH", f"{system}:/bin")
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name: type("Spec", (), {"submodule_search_locations": [str(tmp_path / name)]}),
    )
    monkeypatch.setenv("FUSENORM_NVCC", str(named / "nvcc"))
    assert Nvcc.find() == Nvcc(named / "nvcc", "99.1")
    monkeypatch.delenv("FUSENORM_NVCC")
    assert Nvcc.find().path == wheel / "nvcc"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert Nvcc.find().path == system / "nvcc"
    assert Nvcc.find().cuda.driver == "99.1"


def test_no_compiler_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FUSENORM_NVCC", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(BadInput, match=r"pip install 'fusenorm\[cuda\]'"):
        build_library([SPECS[0]], Target.parse("cuda"), tmp_path / "a.so")


def test_a_failing_compiler_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSENORM_NVCC", str(fake_nvcc(tmp_path, "echo broken >&2; exit 3")))
    with pytest.raises(FusenormError, match="nvcc failed: broken"):
        Nvcc.find()
    monkeypatch.setenv("FUSENORM_NVCC", str(fake_nvcc(tmp_path, "echo something else")))
    with pytest.raises(BadInput, match="does not say its version"):
        Nvcc.find()
    monkeypatch.setenv("FUSENORM_NVCC", str(tmp_path / "absent"))
    with pytest.raises(BadInput, match="cannot be run"):
        Nvcc.find()


@pytest.mark.kernel
def test_a_bf16_model_is_compiled_for_gpus_alone(built: LibraryInfo, tmp_path: Path) -> None:
    """onnxruntime's CPU provider cannot run it: there is no recorded run."""
    spec = Norm(skip=True, dtype="bf16", scale="bf16")
    proto = onnx.load_from_string(model(spec))
    for tensor in (*proto.graph.input, *proto.graph.output):
        sizes = ("rows", 72) if tensor.name != "scale" else (72,)
        for size in sizes:
            dim = tensor.type.tensor_type.shape.dim.add()
            setattr(dim, "dim_param" if isinstance(size, str) else "dim_value", size)
    assert row_lengths(ir.from_proto(proto)) == {spec: {72}}
    stored = open_artifact(fusenorm.compile(proto, target="cuda").save(tmp_path / "a.fnorm"))
    (library,) = stored.libraries
    assert library.variant == f"{Target.host()}-cuda"
    assert library.cuda == built.cuda
    assert stored.golden() is None
    with pytest.raises(BadInput, match="onnxruntime cannot load it"):
        fusenorm.compile(proto, target="cpu")
    shown = read_needs(library.path).defined
    assert "__tvm_ffi_fusenorm_cuda_SkipRMSNorm_bf16" in shown


@pytest.mark.kernel
def test_products_are_left_to_onnxruntime(built: LibraryInfo, llama: Path) -> None:
    artifact = fusenorm.compile(llama, target="cpu,cuda", tune=False)
    assert [library.variant for library in artifact.libraries] == [
        str(Target.host()),
        f"{Target.host()}-cuda",
    ]
    assert artifact.report["regions"] == []
    assert not any("Linear" in name for name in artifact.libraries[0].op_types)
