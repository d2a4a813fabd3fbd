"""What was found in a model: every candidate site, fused, native or refused, and why."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterator
from typing import Any, Literal

import onnx_ir as ir

from fusenorm.ops import REGIONS, Gated, Norm, parse
from fusenorm.ops.spec import DOMAIN
from fusenorm.passes.centre_residual import RULE as CENTRE_RESIDUAL
from fusenorm.passes.centre_residual import STREAMS_KEY, Outcome
from fusenorm.passes.fold_batch_norm import FOLDED_KEY
from fusenorm.passes.fold_batch_norm import OP as BATCH_NORM
from fusenorm.passes.fold_norm import INTO_KEY
from fusenorm.passes.fold_norm import OP as NORM_FOLD
from fusenorm.passes.fuse_residual import FuseResidual
from fusenorm.passes.pattern import Miss, node_name
from fusenorm.passes.rewrite import MISS_KEY, RULE_KEY, SOURCE_KEY
from fusenorm.passes.rotary import ROTARY
from fusenorm.passes.unfuse_contrib import TABLE as CONTRIB

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
    "BatchNormalization": BATCH_NORM,
}


CENTRED_STREAM = "CentredStream"
CONTRACTIONS = {"MatMul": "Linear", "Gemm": "Linear", "Attention": "Attention"}


@dataclasses.dataclass(frozen=True)
class Site:
    """One site of the source graph.

    Attributes:
        op: LayerNorm, RMSNorm, SkipLayerNorm, SkipRMSNorm, Gelu, Swish, GLU or BatchNorm.
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
        sites.extend(_folded(node))
        if node.domain == DOMAIN:
            sites.append(_fused(node))
            known = node.meta.get(MISS_KEY)
            if known and _is_norm(node):
                covered.update(known[1].nodes)
                sites.append(_outside(node, *known))
            elif known and known[0] == "GLU":
                # Its activation was fused; the product with the linear twin was not.
                covered.update(known[1].nodes)
                sites.append(_left(known[1].nodes[-1], "GLU", "refused", known[1]))
        elif node.domain == "" and node.op_type in NATIVE:
            sites.append(_left(node, NATIVE[node.op_type], "native"))
        elif (node.domain, node.op_type) in CONTRIB and MISS_KEY in node.meta:
            sites.append(_left(node, node.meta[MISS_KEY][0], "refused"))
        elif _is_candidate(node) and node not in covered:
            if (node.graph, node_name(node)) in fused_sources:
                continue
            known = node.meta.get(MISS_KEY)
            covered.update(known[1].nodes if known else ())
            sites.append(_left(node, known[0] if known else ANCHORS[node.op_type], "refused"))
    for function in model.functions.values():
        sites.extend(_inside(function))
    return sites


def collect_regions(model: ir.Model) -> list[Site]:
    """Contractions of a compiled model: fused with what surrounds them, or why not.

    Besides, rotary positions that stay around them, the residual streams that were centred and the
    norms whose scale and bias went into the maps behind them, or why not.
    """
    sites = [_centred(stream) for stream in model.meta.get(STREAMS_KEY, ())]
    for graph in model.graphs():
        for node in graph:
            known = node.meta.get(MISS_KEY)
            if node.domain == DOMAIN and isinstance(parse(node.op_type), REGIONS):
                sites.append(_fused(node))
                if known and node is known[1].nodes[0]:
                    sites.append(_left(node, known[0], "refused"))
            elif node.op_type in CONTRACTIONS and node.domain == "" and known:
                op = known[0] if known[0] in CONTRACTIONS.values() else CONTRACTIONS[node.op_type]
                sites.append(_left(node, op, "refused"))
            elif known and known[0] == ROTARY and node is known[1].nodes[0]:
                sites.append(_left(node, ROTARY, "refused"))
            elif known and known[0] == NORM_FOLD:
                sites.append(_left(node, NORM_FOLD, "refused"))
            if INTO_KEY in node.metadata_props:  # the norm, or the map it joined
                maps = node.metadata_props[INTO_KEY].split("\n")
                site = _fused(node)
                attributes = {**site.attributes, "maps": maps}
                sites.append(dataclasses.replace(site, op=NORM_FOLD, attributes=attributes))
    return sites


def _is_candidate(node: ir.Node) -> bool:
    """The heart of a pattern, or part of a rewrite that was rolled back."""
    if node.domain == "" and node.op_type in ANCHORS:
        return True
    known = node.meta.get(MISS_KEY)
    if known is None or known[1].refusal.code != "check_failed":
        return False
    return not any(
        part.op_type in NATIVE or part.op_type in ANCHORS or _is_norm(part)
        for part in known[1].nodes
    )


def _is_norm(node: ir.Node) -> bool:
    return node.domain == DOMAIN and isinstance(parse(node.op_type), Norm)


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
        number = node.attributes[name].as_float()
        if math.isfinite(number):  # else a bound that is none, which JSON cannot hold
            attributes[name] = number
    if isinstance(spec, Norm) and spec.skip:
        attributes["sum_used"] = bool(node.outputs[1].uses() or node.outputs[1].is_graph_output())
    sources = tuple(node.metadata_props.get(SOURCE_KEY, node_name(node)).split("\n"))
    return Site(spec.family, "fused", None, None, sources, node.outputs[0].name or "", attributes)


def _inside(function: ir.Function) -> Iterator[Site]:
    """What stands in a function of the model's own that could not be inlined."""
    for node in function.all_nodes() if function.domain != DOMAIN else ():
        op = {**NATIVE, **ANCHORS}.get(node.op_type) if node.domain == "" else None
        if op is not None:
            detail = (
                f"function {function.domain}:{function.name} is not inlined: it or one that calls "
                "it is written in an opset with other operators than the model's"
            )
            output = node.outputs[0].name or ""
            kind = {"kind": node.op_type}
            yield Site(op, "refused", "function_opset", detail, (node_name(node),), output, kind)


def _folded(node: ir.Node) -> Iterator[Site]:
    """The BatchNormalizations a linear map took in."""
    for line in filter(None, node.metadata_props.get(FOLDED_KEY, "").split("\n")):
        name, _, output = line.partition("\t")
        attributes = {"kind": node.op_type, "rule": node.metadata_props.get(RULE_KEY)}
        yield Site(BATCH_NORM, "fused", None, None, (name,), output, attributes)


def _outside(norm: ir.Node, op: str, miss: Miss) -> Site:
    """What stands in front of a fused norm, mostly a residual sum, and could not join it."""
    spec, refusal, total = parse(norm.op_type), miss.refusal, miss.nodes[0]
    assert spec is not None
    assert refusal is not None
    detail = f"{refusal.node}: {refusal.detail}"
    names = tuple(node_name(part) for part in miss.nodes)
    kind = {"kind": total.op_type}
    output = total.outputs[0].name or ""
    family = f"Skip{spec.family}" if op == FuseResidual.op else op
    return Site(family, "refused", refusal.code, detail, names, output, kind)


def _centred(stream: Outcome) -> Site:
    refusal = stream.refusal
    attributes = {
        "kind": "LayerNorm" if refusal else "RMSNorm",
        "rule": CENTRE_RESIDUAL,
        "writers": list(stream.writers),
    }
    if refusal is None:
        return Site(CENTRED_STREAM, "fused", None, None, stream.norms, stream.output, attributes)
    detail = f"{refusal.node}: {refusal.detail}"
    return Site(
        CENTRED_STREAM, "refused", refusal.code, detail, stream.norms, stream.output, attributes
    )


def _left(node: ir.Node, op: str, status: Status, miss: Miss | None = None) -> Site:
    """A site that stays as it is; `miss` says why, if not the nearest one of the node."""
    known = node.meta.get(MISS_KEY)
    miss = miss or (known[1] if known else None)
    refusal = miss.refusal if miss else None
    if refusal is None:
        reason = None if status == "native" else "no_pattern"
        detail = None if status == "native" else f"no rule reaches this {node.op_type}"
    else:
        reason, detail = refusal.code, f"{refusal.node}: {refusal.detail}"
    names = tuple(node_name(part) for part in miss.nodes) if miss else (node_name(node),)
    output = node.outputs[0].name or ""
    return Site(op, status, reason, detail, names, output, {"kind": node.op_type})
