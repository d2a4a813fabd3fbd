from __future__ import annotations

import platform

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
