"""Real exports kept beside the repository, and what they are known to contain.

`python -m tests.corpus [NAME ...]` prints the table of sites found against the truth.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import fusenorm
from fusenorm.report import Report

FOLDER = Path(os.environ.get("FUSENORM_CORPUS", Path(__file__).parents[2] / "shared" / "corpus"))
# The models whose every f32 export must be recognised completely.
COMPLETE = (
    "bert", "gpt2", "llama", "qwen2", "gemma", "t5_v1_1_enc", "vit", "deepnorm", "glu_zoo",
    "glu_zoo_packed",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Counts:
    """Sites of one model: norms in all, those behind a residual sum, activations, GLUs.

    `plain` are the functions that make an activation elsewhere but here stand for themselves,
    such as the tanh of a soft cap: candidates that must be refused.
    """

    norm: int
    skip: int
    activation: int
    glu: int
    plain: int


def available() -> bool:
    return (FOLDER / "truth.json").is_file()


def files(names: tuple[str, ...] | None = None, *, half: bool | None = False) -> Iterator[Path]:
    """The exports of `names` (all by default), f32 or f16 ones; both if `half` is None."""
    for path in sorted(FOLDER.glob("*.onnx")):
        if names is not None and path.name.split(".")[0] not in names:
            continue
        if half is None or path.name.endswith(".fp16.onnx") == half:
            yield path


def truth(path: Path) -> Counts:
    """What torch executed, by the file's architecture."""
    entry = json.loads((FOLDER / "truth.json").read_text())[path.name.split(".")[0]]

    def total(*prefixes: str) -> int:
        return sum(count for key, count in entry.items() if key.startswith(prefixes))

    return Counts(
        norm=total("norm:"),
        # Two norms may share one sum: only the first can return it.
        skip=total("add_norm:res:unique_sums", "add_norm:emb"),
        activation=total("act:gelu", "act:silu", "act:quickgelu"),
        glu=total("gated:"),
        plain=total("act:tanh"),
    )


def found(report: Report) -> Counts:
    """What the report says: fused or native sites by kind, and the refused ones."""
    ops = collections.Counter(site.op for site in report.sites if site.status != "refused")
    skip = ops["SkipLayerNorm"] + ops["SkipRMSNorm"]
    return Counts(
        norm=skip + ops["LayerNorm"] + ops["RMSNorm"],
        skip=skip,
        activation=ops["Gelu"] + ops["Swish"],
        glu=ops["GLU"],
        plain=sum(site.status == "refused" for site in report.sites),
    )


def table(paths: Iterator[Path]) -> Iterator[str]:
    """Markdown: truth and found as norm/skip/activation/GLU/plain, then the statuses."""
    yield "| file | truth n/s/a/g/p | found n/s/a/g/p | fused | native | refused |"
    yield "|---|---|---|---|---|---|"
    for path in paths:
        report = fusenorm.optimize(path).report
        status = collections.Counter(site.status for site in report.sites)
        why = collections.Counter(s.reason for s in report.sites if s.status == "refused")
        wanted, got = (
            "/".join(map(str, dataclasses.astuple(counts)))
            for counts in (truth(path), found(report))
        )
        refused = ", ".join(f"{count} {code}" for code, count in why.items()) or "0"
        mark = "" if wanted == got else " *"
        yield (
            f"| {path.name} | {wanted} | {got}{mark} | {status['fused']} | {status['native']} "
            f"| {refused} |"
        )


if __name__ == "__main__":
    for line in table(files(tuple(sys.argv[1:]) or None, half=None)):
        print(line)
