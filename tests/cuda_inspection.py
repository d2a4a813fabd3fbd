"""What nvcc makes of the CUDA kernels, without a GPU: registers, spills, accesses, shuffles.

python -m tests.cuda_inspection [--all]   # --all: every op of the case table
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from fusenorm.kernels import symbols
from fusenorm.kernels.cuda import Variant, variants
from fusenorm.lower import Target, build_library
from fusenorm.lower.library import cuda_includes, cuda_source
from fusenorm.lower.nvcc import ARCHS, Nvcc
from fusenorm.ops import OpSpec
from tests.kernels.cases import model_ops, pairwise

_USAGE = re.compile(
    r"Compiling entry function '(\w+)' for '(sm_\d+)'.*?"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
    r"Used (\d+) registers",
    re.S,
)
_ENTRY = re.compile(r"\.entry (\w+)\((.*?)\n}\n", re.S)
_ACCESS = re.compile(r"\b(ld|st)\.global\S*?(?:\.v(\d))?\.[a-z]+(\d+)\s")


@dataclasses.dataclass(frozen=True)
class Usage:
    """What one kernel takes on one architecture.

    Attributes:
        registers: per thread.
        stack, spills: bytes of local memory per thread.
    """

    registers: int
    stack: int
    spills: int


@dataclasses.dataclass(frozen=True)
class Inspected:
    """One kernel.

    Attributes:
        spec: the op.
        symbol: the function that launches it.
        variant: which of the op's it belongs to.
        launch: its number among those of the variant.
        usage: by architecture.
        loads, stores: bits its accesses to global memory have, in ascending order.
        shuffles: warp shuffles in its PTX.
    """

    spec: OpSpec
    symbol: str
    variant: Variant
    launch: int
    usage: Mapping[str, Usage]
    loads: tuple[int, ...]
    stores: tuple[int, ...]
    shuffles: int


def inspect(specs: Mapping[OpSpec, Sequence[int]]) -> list[Inspected]:
    """Compile the kernels of ops, each specialised on some row lengths, for every architecture."""
    nvcc = Nvcc.find()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernels.cu")
        source.write_text(cuda_source(specs, specs), encoding="utf-8")
        said, text = nvcc.kernels(source, cuda_includes(), Path(folder))
        ptx = dict(_ENTRY.findall(text))
    usage: dict[str, dict[str, Usage]] = {}
    for kernel, arch, stack, stores, loads, registers in _USAGE.findall(said):
        made = Usage(int(registers), int(stack), int(stores) + int(loads))
        usage.setdefault(kernel, {})[arch] = made
    found = []
    for spec, columns in specs.items():
        for symbol in symbols(spec, "cuda"):
            made = ((v, launch) for v in variants(spec, columns) for launch in range(v.kernels))
            for number, (variant, launch) in enumerate(made):
                kernel = f"{symbol}_kernel{f'_{number}' if number else ''}"
                bits: dict[str, set[int]] = {"ld": set(), "st": set()}
                for kind, count, size in _ACCESS.findall(ptx[kernel]):
                    bits[kind].add(int(count or 1) * int(size))
                loads, stores = (tuple(sorted(bits[kind])) for kind in ("ld", "st"))
                shuffles = ptx[kernel].count("shfl.sync.bfly")
                found.append(
                    Inspected(spec, symbol, variant, launch, usage[kernel], loads, stores, shuffles)
                )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="every op of the case table")
    specs = model_ops()
    if parser.parse_args().all:
        specs |= {spec: (64, 1000) for spec in pairwise() if spec not in specs}
    print(
        f"| op | kernel | {' | '.join(f'{arch} registers' for arch in ARCHS)} | spilled bytes "
        "| load bits | store bits | shuffles |"
    )
    print("|---" * (7 + len(ARCHS) - 1) + "|")
    for item in inspect(specs):
        name = item.symbol.removeprefix("fusenorm_cuda_")
        registers = " | ".join(str(item.usage[arch].registers) for arch in ARCHS)
        spills = sum(usage.spills + usage.stack for usage in item.usage.values())
        kernel = f"{item.variant.name}{f', {item.launch + 1}' if item.variant.kernels > 1 else ''}"
        print(
            f"| {name} | {kernel} | {registers} | {spills} | {item.loads} "
            f"| {item.stores} | {item.shuffles} |"
        )
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        library = build_library(
            specs, Target.parse("cuda"), Path(folder, "ops.so"), columns=specs
        ).path
        seconds = time.perf_counter() - start
        print(
            f"\n{len(specs)} ops in one library of {library.stat().st_size} bytes, built in "
            f"{seconds:.1f} s with CUDA {Nvcc.find().release}"
        )


if __name__ == "__main__":
    main()
