"""What was found in a model: every candidate site, fused, native or refused, and why."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any, Literal

import onnx_ir as ir

from fusenorm.ops import Gated, Norm, parse
from fusenorm.ops.spec import DOMAIN
from fusenorm.passes.pattern import node_name
from fusenorm.passes.rewrite import MISS_KEY, RULE_KEY, SOURCE_KEY

Status = Literal["fused", "native", "refused"]

NATIVE = {
    "LayerNormalization": "LayerNorm",
    "RMSNormalization": "RMSNorm",
    "Gelu": "Gelu",
    "Swish": "Swish",
}
# Nodes at the heart of a pattern; one that stays in the graph is a site that was not fused.
ANCHORS = {
    "ReduceMean": "RMSNorm",
    "ReduceSumSquare": "RMSNorm",
    "ReduceL2": "RMSNorm",
    "Erf": "Gelu",
    "Tanh": "Gelu",
    "Sigmoid": "Swish",
}


@dataclasses.dataclass(frozen=True)
class Site:
    """One site of the source graph.

    Attributes:
        op: LayerNorm, RMSNorm, SkipLayerNorm, SkipRMSNorm, Gelu, Swish or GLU.
        status: `fused`; `native`: a standard op left as it is; `refused`: left as it is.
        reason: a stable code why it was not fused, None if it was.
        detail: the same in words.
        nodes: the source nodes it consists of.
        output: name of the value it computes.
        attributes: what else is known: kind, activation, layout, alpha, rule ...
    """

    op: str
    status: Status
    reason: str | None
    detail: str | None
    nodes: tuple[str, ...]
    output: str
    attributes: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        own = dataclasses.asdict(self)
        attributes = own.pop("attributes")
        return {**own, "nodes": list(self.nodes), **attributes}


@dataclasses.dataclass(frozen=True)
class PassRecord:
    """One pass as it ran: whether it changed the graph, how long it took, nodes left."""

    name: str
    changed: bool
    seconds: float
    nodes: int


@dataclasses.dataclass
class Report:
    """The outcome of optimize or explain.

    Attributes:
        model: source name, opset, IR version before and after, node counts.
        sites: one entry per site of the source graph.
        passes: the passes in the order they ran.
        checks: name of each check and its outcome.
    """

    model: dict[str, Any]
    sites: list[Site]
    passes: list[PassRecord]
    checks: dict[str, Any]

    @property
    def counts(self) -> dict[str, int]:
        """Fused sites by op."""
        return dict(collections.Counter(s.op for s in self.sites if s.status == "fused"))

    def as_dict(self) -> dict[str, Any]:
        """The form `--json` prints."""
        return {
            "model": self.model,
            "sites": [site.as_dict() for site in self.sites],
            "counts": self.counts,
            "checks": self.checks,
            "passes": [dataclasses.asdict(record) for record in self.passes],
        }


def collect_sites(model: ir.Model) -> list[Site]:
    """Read the sites off an optimised model, in graph order."""
    sites: list[Site] = []
    fused_sources: set[tuple[ir.Graph | None, str]] = set()
    nodes = [node for graph in model.graphs() for node in graph]
    for node in nodes:
        if node.domain == DOMAIN:
            names = node.metadata_props.get(SOURCE_KEY, "").split("\n")
            fused_sources.update((node.graph, name) for name in names)
    covered: set[ir.Node] = set()
    for node in nodes:
        if node.domain == DOMAIN:
            sites.append(_fused(node))
        elif node.domain == "" and node.op_type in NATIVE:
            sites.append(_left(node, NATIVE[node.op_type], "native"))
        elif _is_candidate(node) and node not in covered:
            if (node.graph, node_name(node)) in fused_sources:
                continue
            known = node.meta.get(MISS_KEY)
            covered.update(known[1].nodes if known else ())
            sites.append(_left(node, known[0] if known else ANCHORS[node.op_type], "refused"))
    return sites


def _is_candidate(node: ir.Node) -> bool:
    """The heart of a pattern, or part of a rewrite that was rolled back."""
    if node.domain == "" and node.op_type in ANCHORS:
        return True
    known = node.meta.get(MISS_KEY)
    if known is None or known[1].refusal.code != "check_failed":
        return False
    return not any(part.op_type in NATIVE or part.op_type in ANCHORS for part in known[1].nodes)


def _fused(node: ir.Node) -> Site:
    spec = parse(node.op_type)
    assert spec is not None
    attributes: dict[str, Any] = {"kind": node.op_type, "rule": node.metadata_props.get(RULE_KEY)}
    if isinstance(spec, Gated):
        attributes["activation"] = spec.activation
        if spec.layout != "none":
            attributes["layout"] = spec.layout
            attributes["variant"] = spec.row.gated
    for name in spec.attributes:
        attributes[name] = node.attributes[name].as_float()
    if isinstance(spec, Norm) and spec.skip:
        attributes["sum_used"] = bool(node.outputs[1].uses() or node.outputs[1].is_graph_output())
    sources = tuple(node.metadata_props.get(SOURCE_KEY, node_name(node)).split("\n"))
    return Site(spec.family, "fused", None, None, sources, node.outputs[0].name or "", attributes)


def _left(node: ir.Node, op: str, status: Status) -> Site:
    known = node.meta.get(MISS_KEY)
    refusal = known[1].refusal if known else None
    if refusal is None:
        reason = None if status == "native" else "no_pattern"
        detail = None if status == "native" else f"no rule reaches this {node.op_type}"
    else:
        reason, detail = refusal.code, f"{refusal.node}: {refusal.detail}"
    names = tuple(node_name(part) for part in known[1].nodes) if known else (node_name(node),)
    output = node.outputs[0].name or ""
    return Site(op, status, reason, detail, names, output, {"kind": node.op_type})
