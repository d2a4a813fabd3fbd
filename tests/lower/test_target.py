from __future__ import annotations

import platform
import re

import pytest

from fusenorm.errors import BadInput
from fusenorm.lower import Target


def test_levels_contain_one_another() -> None:
    two, three, four = (Target.parse(f"x86-64-v{level}") for level in (2, 3, 4))
    assert set(two.features) < set(three.features) < set(four.features)


def test_the_host_has_every_feature_of_its_level() -> None:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        words = set(file.read().split())
    assert Target.host().missing_features(words) == ()
    assert Target.parse("cpu") == Target.host()
    assert Target.host().machine == platform.machine()


def test_missing_features_are_named() -> None:
    target = Target.parse("x86-64-v3")
    assert target.missing_features(set(target.features) - {"f16c"}) == ("f16c",)


def test_an_unknown_target_is_refused_with_the_known_ones() -> None:
    with pytest.raises(BadInput, match=r"'x86-64-v9'.*x86-64-v3"):
        Target.parse("x86-64-v9")


def test_tvm_is_told_the_level() -> None:
    assert Target.parse("x86-64-v4").tvm["mcpu"] == "x86-64-v4"
    assert "aarch64" in str(Target.parse("aarch64").tvm["mtriple"])


# LLVM's names that /proc/cpuinfo spells otherwise; crc32 is part of SSE 4.2.
CPUINFO = {"sahf": "lahf_lm", "sse3": "pni", "lzcnt": "abm", "bmi": "bmi1", "crc32": "sse4_2"}


@pytest.mark.kernel
@pytest.mark.parametrize("level", ["x86-64-v2", "x86-64-v3", "x86-64-v4"])
def test_features_are_those_llvm_may_use(level: str) -> None:
    from tvm.target import Target as TvmTarget
    from tvm.target import codegen

    def features(cpu: str) -> set[str]:
        target = TvmTarget({**Target.parse(level).tvm, "mcpu": cpu})
        return {str(name) for name in codegen.llvm_get_cpu_features(target)}

    tuning = re.compile(r".*-.*|macrofusion|nopl|vzeroupper")
    extra = {n for n in features(level) - features("x86-64") if not tuning.fullmatch(n)}
    assert {CPUINFO.get(n, n.replace(".", "_")) for n in extra} == set(Target.parse(level).features)


def test_several_targets_come_the_most_demanding_first() -> None:
    found = Target.parse_all(["x86-64-v2, x86-64-v4", "x86-64-v3", "x86-64-v2"])
    assert [target.level for target in found] == ["x86-64-v4", "x86-64-v3", "x86-64-v2"]
    assert Target.parse_all("cpu") == [Target.host()]


def test_cuda_stands_on_this_machines_level() -> None:
    target = Target.parse("cuda")
    assert (target.kind, target.level) == ("cuda", Target.host().level)
    assert Target.parse_all("cuda,cpu,cuda") == [Target.host(), target]
    assert str(target) == f"{Target.host()}-cuda"
