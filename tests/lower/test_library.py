"""What a built library contains and needs."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import get_args

import pytest

from fusenorm.errors import BadInput
from fusenorm.lower import Target, build_library
from fusenorm.lower.elf import read_needs
from fusenorm.lower.library import _compiler, compile_module
from fusenorm.lower.table import table
from fusenorm.lower.target import Level
from fusenorm.ops import Gated, Norm

SPECS = (Norm(skip=True), Norm(dtype="f16", scale="f16"), Gated("gelu"), Gated("swish", "gate_up"))
LIBC = {
    *("calloc", "malloc", "free", "memcpy", "memset", "snprintf", "strchr", "strcmp", "strtol"),
    *("clock", "sysconf", "time"),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory):
    steps: list[str] = []
    path = tmp_path_factory.mktemp("built") / "ops.so"
    info = build_library([*SPECS, SPECS[0]], Target.host(), path, steps.append)
    assert steps
    return info


def test_the_table_names_every_op_once() -> None:
    text = table([(spec, "cpu") for spec in SPECS], Target.parse("x86-64-v3"))
    assert "OP_COUNT = 4" in text
    assert "X86_LEVEL 3" in text
    assert text.count('"SkipRMSNorm"') == 1
    assert "__tvm_ffi_fusenorm_SkipRMSNorm__nosum" in text


@pytest.mark.kernel
def test_a_library_needs_libc_only(built) -> None:
    assert set(built.undefined) <= LIBC
    assert all(re.match(r"libc\.|ld-linux", name) for name in built.libraries)
    assert built.glibc is None or tuple(map(int, built.glibc.split("."))) <= (2, 17)


@pytest.mark.kernel
def test_a_library_shows_only_its_entry_points(built) -> None:
    kernels = {
        f"__tvm_ffi_fusenorm_{name}"
        for name in (
            "SkipRMSNorm",
            "SkipRMSNorm__nosum",
            "RMSNorm_f16",
            "Gelu",
            "GLU_swish_gate_up",
        )
    }
    others = {"RegisterCustomOps", "__tvm_ffi_fusenorm_lanes"}
    assert set(read_needs(built.path).defined) == others | kernels


@pytest.mark.kernel
def test_each_op_type_is_built_once(built) -> None:
    assert built.op_types == ("GLU_swish_gate_up", "Gelu", "RMSNorm_f16", "SkipRMSNorm")
    assert built.level == Target.host().level


@pytest.mark.kernel
def test_nothing_but_the_library_is_left(built) -> None:
    assert [path.name for path in built.path.parent.iterdir()] == ["ops.so"]


@pytest.mark.kernel
@pytest.mark.parametrize("level", get_args(Level))
def test_kernel_objects_call_nothing(level: str, tmp_path: Path) -> None:
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    path = tmp_path / "kernels.o"
    specs = [*SPECS, Norm(True, True, "bf16", "bf16", "bf16"), Gated("gelu_tanh", "interleaved")]
    compile_module(specs, Target.parse(level)).write_to_file(str(path), "o")
    command = ["nm", "--undefined-only", str(path)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("nm does not read this machine's objects")
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    strong = [line for line in shown.splitlines() if re.search(r"\bU\b", line)]
    assert strong == []


@pytest.mark.kernel
@pytest.mark.parametrize(("level", "register"), [("x86-64-v4", "zmm"), ("x86-64-v3", "ymm")])
def test_levels_use_their_registers(level: str, register: str) -> None:
    text = compile_module([Norm(skip=True)], Target.parse(level)).inspect_source("asm")
    assert text.count(f"%{register}") > 20
    assert level == "x86-64-v4" or "%zmm" not in text
    assert all("fusenorm_" in line for line in text.splitlines() if "\tcall" in line)


def test_an_op_without_kernel_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="RMSNorm_f64: f64 has no CPU kernel"):
        build_library([Norm(dtype="f64", scale="f64")], Target.host(), tmp_path / "a.so")


def test_nothing_to_build_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no fused op"):
        build_library([], Target.host(), tmp_path / "a.so")


@pytest.fixture
def no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)


@pytest.mark.usefixtures("no_compiler")
def test_a_missing_compiler_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BadInput, match="pip install ziglang"):
        build_library([SPECS[0]], Target.host(), tmp_path / "a.so")


@pytest.mark.usefixtures("no_compiler")
def test_zig_does_not_compile_for_the_cpu_it_runs_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    command = _compiler(Target.host())
    assert command[-2:] == ["-target", f"{Target.host().machine}-linux-gnu"]


def test_text_is_no_library(tmp_path: Path) -> None:
    path = tmp_path / "a.so"
    path.write_text("text")
    with pytest.raises(BadInput, match="not a 64-bit ELF library"):
        read_needs(path)
