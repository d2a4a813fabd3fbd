"""What the command prints: tables for people, JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from fusenorm.bench import Latency
    from fusenorm.compare import Comparison


def out() -> Console:
    return Console(width=None if sys.stdout.isatty() else 160, markup=False, highlight=False)


def errors() -> Console:
    return Console(stderr=True, markup=False, highlight=False)


def new_table(*columns: str, title: str | None = None) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def print_json(value: object) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def statuses(report: Mapping[str, Any]) -> dict[str, int]:
    counts = dict.fromkeys(("fused", "native", "refused"), 0)
    for site in report["sites"]:
        counts[site["status"]] += 1
    return counts


def print_report(report: Mapping[str, Any]) -> None:
    console = out()
    sites = new_table("op", "status", "kind or reason", "output", "nodes")
    for site in report["sites"]:
        reason = ": ".join(site[key] for key in ("reason", "detail") if site.get(key))
        output, nodes = site["output"], str(len(site["nodes"]))
        sites.add_row(site["op"], site["status"], reason or site.get("kind", ""), output, nodes)
    if report["sites"]:
        console.print(sites)
        console.print()
    counts = statuses(report)
    summary = f"{len(report['sites'])} sites: " + ", ".join(
        f"{n} {name}" for name, n in counts.items()
    )
    ops = ", ".join(f"{op} {number}" for op, number in report["counts"].items())
    console.print(f"{summary} ({ops})" if ops else summary)
    for name, value in report.get("checks", {}).items():
        console.print(f"check {name}: {value}")


def print_comparison(comparison: Comparison) -> None:
    table = new_table("output", "type", "max abs", "max relative", "bound", "ulps", "verdict")
    for output in comparison.outputs:
        table.add_row(
            output.name,
            f"{output.dtype}{list(output.shape)}",
            f"{output.max_abs:.3g}",
            f"{output.max_relative:.3g}",
            f"{output.tolerance:.3g}",
            "" if output.max_ulps is None else str(output.max_ulps),
            output.reason or "agrees",
        )
    out().print(table)


def print_latency(latency: Latency) -> None:
    table = new_table("latency", "median ms", "fastest ms", "relative to ours")
    for row in latency.rows:
        table.add_row(row.name, f"{row.median:.3f}", f"{row.fastest:.3f}", f"{row.relative:.2f}×")
    console = out()
    console.print(table)
    shapes = ", ".join(f"{name} {list(shape)}" for name, shape in latency.shapes.items())
    console.print(f"{latency.rounds} runs each, in turns; {shapes}")
