"""The GPU benchmark, tried out on the CPU and with a clock of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.bench import cuda
from tests.bench.cuda import OPS, Case, Cpu, Row


class Scripted(Cpu):
    """Takes the times it is given; notes what was captured."""

    def __init__(self, times: Iterator[float], cache: int = 1 << 12) -> None:
        self.times, self.cache = times, cache
        self.captured = 0

    def capture(self, run: cuda.Run) -> cuda.Run:
        self.captured += 1
        return run

    def seconds(self, run: cuda.Run) -> float:
        run()
        return next(self.times)


def measured(case: Case, seconds: list[float], monkeypatch: pytest.MonkeyPatch) -> Scripted:
    monkeypatch.setitem(cuda._SIDES, "ours", lambda case, device, op: op.eager)
    return Scripted(iter(seconds))


def test_sides_take_turns_and_medians_count(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("gelu", "f32", 128, 64)
    device = measured(case, [1.0, 2.0, 4.0, 3.0, 2.0, 6.0, 2.0, 9.0, 5.0], monkeypatch)
    taken = cuda.measure(case, device, ["torch"], rounds=3)
    calls = 16 * cuda.set_count(case, device)
    assert {name: round(seconds * calls, 6) for name, seconds in taken.items()} == {
        "copy": 2.0,
        "ours": 2.0,
        "torch": 5.0,
    }
    assert device.captured == 0


def test_few_rows_are_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("gelu", "f32", 4, 64)
    device = measured(case, [1.0] * 3, monkeypatch)
    cuda.measure(case, device, ["torch"], rounds=1)
    assert device.captured == 3


def test_buffers_exceed_the_cache_and_each_is_used() -> None:
    case = Case("skip-rms", "bf16", 2, 100)
    assert case.bytes == (4 * 2 + 1) * 100 * 2
    device = Scripted(iter(()), cache=10_000)
    sets = cuda.buffers(case, device)
    assert len(sets) == 23  # four caches
    assert [tensor.shape for tensor in sets[0]] == [(2, 100), (2, 100), (100,)]
    seen: list[int] = []
    cuda.rotate(lambda x, skip, weight: seen.append(x.data_ptr()), sets, 2)()
    assert seen == [given[0].data_ptr() for given in sets] * 2
    assert len(set(seen)) == 23


def test_a_copy_moves_as_many_bytes() -> None:
    case = Case("rms", "f32", 3, 50)
    copied: list[int] = []

    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func is torch.ops.aten.copy_.default:
                copied.append(2 * args[0].nbytes)
            return func(*args, **(kwargs or {}))

    copy = cuda.copy_of(case, Scripted(iter(())))
    with Counting():
        copy(None)
    assert copied == [case.bytes]


@pytest.mark.parametrize(
    ("shape", "goal"),
    [
        ((1 << 14, 4096), 0.92),
        ((1 << 18, 256), 0.6),
        ((1 << 10, 1 << 16), 0.85),
        ((16, 4096), None),
    ],
)
def test_goals(shape: tuple[int, int], goal: float | None) -> None:
    assert Case("rms", "bf16", *shape).goal == goal


def test_the_table_says_what_is_missed() -> None:
    case = Case("ln", "f16", 1 << 14, 4096)
    row = Row(
        case, {"copy": 9e-5, "ours": 1e-4, "torch": 9e-5, "torch.compile": 2e-4, "liger": 9e-5}
    )
    assert row.missed == ["0.92 of copy", "liger"]
    names = ("torch", "torch.compile", "liger")
    assert row.line(names) == (
        "| ln | f16 | 16384 x 4096 | 100.00 | 2685 | 0.90 | 0.92 | 0.90 | 2.00 | 0.90 "
        "| 0.92 of copy, liger |"
    )
    assert "torch.compile / ours: geometric mean 2.00, least 2.00" in cuda.table([row], names)


def test_a_side_that_is_missing_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    case = Case("gelu", "f32", 4, 64)
    assert [name for name, _ in cuda.sides(case, Cpu(), ["torch", "liger"])] == [
        "copy",
        "ours",
        "torch",
    ]
    assert "gelu f32 4 x 64: liger: has no such op" in capsys.readouterr().err


@pytest.mark.kernel
@pytest.mark.parametrize("name", OPS)
def test_sides_compute_the_same(name: str) -> None:
    (given,) = cuda.buffers(Case(name, "f32", 3, 64), Scripted(iter(()), cache=1))
    ours, eager = (getattr(OPS[name], side)(*given) for side in ("ours", "eager"))
    torch.testing.assert_close(ours, eager, rtol=1e-5, atol=2e-6)
    outputs = ours if isinstance(ours, tuple) else (ours,)
    assert len(outputs) == OPS[name].written


@pytest.mark.kernel
def test_the_command_runs_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--device cpu --quick --ops rms,swiglu --dtypes f32 --against torch --out"
    cuda.main([*arguments.split(), str(tmp_path)])
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results) == 2 * 3
    assert all(result["seconds"]["ours"] > 0 for result in results)
    assert (tmp_path / "table.md").read_text().count("| rms |") == 3
    assert "without a kernel" not in capsys.readouterr().err
