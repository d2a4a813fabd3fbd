"""Pack what a bare GPU machine with torch needs to run every GPU check: one archive.

    python -m tests.gpu_bundle [-o build/fusenorm-gpu.tar.gz] [--python 3.12]
    tar xzf fusenorm-gpu.tar.gz && fusenorm-gpu/run.sh    # over there

It holds the sources and tests, an artifact of built kernels (the tests' ops and the benchmark's,
for their row lengths), wheels of what fusenorm imports, and run.sh. Over there Python's version
must be the one given here.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from onnx import helper
from torch.utils._python_dispatch import TorchDispatchMode

from fusenorm.artifact import Artifact, Library
from fusenorm.lower import Target, build_library
from fusenorm.ops import DOMAIN, DTYPES, OpSpec
from fusenorm.torch import ops
from tests.bench import cuda as bench
from tests.kernels.cases import attributes, gpu_ops, pairwise
from tests.torch.calls import SPECS

ROOT = Path(__file__).resolve().parent.parent
NAME = "fusenorm-gpu"
ARTIFACT = "ops.fnorm"
SOURCES = ("fusenorm", "passes", "tests", "pyproject.toml", "constraints.txt", "LICENSE")
PACKAGES = ("apache-tvm-ffi", "ml_dtypes", "onnx", "onnx-ir", "pytest", "matplotlib")
OPSET = 18
RUN = f"""#!/bin/sh
# Every check that needs a GPU; results go to out/. PYTHON is one that has torch.
set -e
cd "$(dirname "$0")"
PYTHON=${{PYTHON:-python3}}
if [ ! -e packages/.done ]; then
    "$PYTHON" -m pip install --quiet --no-index --find-links wheels --target packages \\
        {" ".join(PACKAGES)}
    touch packages/.done
fi
PYTHONPATH="$PWD:$PWD/packages${{PYTHONPATH:+:$PYTHONPATH}}" \\
    exec "$PYTHON" -m tests.gpu_run {ARTIFACT} "$@"
"""


class _Noting(TorchDispatchMode):
    """Notes the fused ops that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.specs: list[OpSpec] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.namespace == DOMAIN:
            self.specs.append(ops.plan(func, *args, **(kwargs or {})).spec)
        return func(*args, **(kwargs or {}))


class _Meta(bench.Cpu):
    """A device that computes nothing."""

    name = "meta"


def bench_columns(cases: Iterable[bench.Case]) -> dict[OpSpec, set[int]]:
    """The fused ops that cases of the benchmark call, and the row lengths they ask for."""
    columns: dict[OpSpec, set[int]] = {}
    for case in cases:
        with _Noting() as noted:
            bench.OPS[case.op].ours(*bench.buffers(case, _Meta())[0])
        columns.setdefault(noted.specs[0], set()).add(case.hidden)
    return columns


def model(specs: Iterable[OpSpec]) -> onnx.ModelProto:
    """A graph with one node of every op, each with inputs and outputs of its own."""
    nodes, inputs, outputs = [], [], []
    for spec in specs:
        sizes = {"row": ["rows", 64], "packed": ["rows", 128], "vector": [64]}
        for slots, values in ((spec.inputs, inputs), (spec.outputs, outputs)):
            values += [
                helper.make_tensor_value_info(
                    f"{spec.op_type}_{slot.name}", int(DTYPES[slot.dtype].onnx), sizes[slot.layout]
                )
                for slot in slots
            ]
        nodes.append(
            helper.make_node(
                spec.op_type,
                [f"{spec.op_type}_{slot.name}" for slot in spec.inputs],
                [f"{spec.op_type}_{slot.name}" for slot in spec.outputs],
                domain=DOMAIN,
                **attributes(spec),
            )
        )
    return helper.make_model(
        helper.make_graph(nodes, "ops", inputs, outputs),
        functions=[spec.function(OPSET) for spec in specs],
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)],
        ir_version=8,
    )


def artifact(target: Target, folder: Path, quick: bool) -> Path:
    """The ops compiled for a target."""
    columns = bench_columns(bench.cases([*bench.OPS], [*bench.DTYPES], bench.ELEMENTS, quick))
    if not quick:
        for spec, lengths in gpu_ops().items():
            columns.setdefault(spec, set()).update(lengths)
    tested = SPECS[:2] if quick else (*SPECS, *pairwise())
    specs = list(dict.fromkeys((*columns, *tested)))
    with tempfile.TemporaryDirectory() as work:
        library = Library.of(
            build_library(specs, target, Path(work, "ops.so"), print, columns=columns)
        )
    built = Artifact(
        "ops", ir.from_proto(model(specs)), {}, libraries=[library], target=str(target)
    )
    return built.save(folder)


def pack(path: Path, built: Path, wheels: Path) -> None:
    """Write the archive, whole or not at all."""

    def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        entry.uid = entry.gid = 0
        entry.uname = entry.gname = ""
        return None if "__pycache__" in entry.name else entry

    with tempfile.TemporaryDirectory() as work:
        run = Path(work, "run.sh")
        run.write_text(RUN, encoding="utf-8")
        run.chmod(0o755)
        parts = {name: ROOT / name for name in SOURCES}
        parts |= {ARTIFACT: built, "wheels": wheels, "run.sh": run}
        fresh = path.with_name(f".{path.name}")
        with tarfile.open(fresh, "w:gz") as archive:
            for name, part in parts.items():
                archive.add(part, f"{NAME}/{name}", filter=plain)
        fresh.replace(path)


def download(folder: Path, python: str) -> None:
    """Wheels of what fusenorm imports, for a version of Python on this kind of machine."""
    constraints = ("-c", str(ROOT / "constraints.txt"))
    version = ("--python-version", python, "--only-binary", ":all:")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "-d", str(folder)]
    subprocess.run([*command, *version, *constraints, *PACKAGES], check=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, default=Path("build", f"{NAME}.tar.gz"))
    parser.add_argument("--python", default=f"{sys.version_info.major}.{sys.version_info.minor}")
    parser.add_argument("--level", default="x86-64-v3", help="of the CPU over there")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="few ops, few row lengths")
    given = parser.parse_args(arguments)
    target = Target(given.device, Target.parse(given.level).level)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        built = artifact(target, Path(folder, ARTIFACT), given.quick)
        wheels = Path(folder, "wheels")
        wheels.mkdir()
        download(wheels, given.python)
        pack(given.out, built, wheels)
    print(f"{given.out}: {given.out.stat().st_size / 1e6:.1f} MB, for Python {given.python}")


if __name__ == "__main__":
    main()
