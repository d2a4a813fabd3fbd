"""fusenorm as a pass of Olive: `python -m fusenorm.olive` prints the package config that adds it.

The module needs olive-ai; nothing else in fusenorm imports it.
"""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

from olive.model import ONNXModelHandler
from olive.model.utils import resolve_onnx_path
from olive.package_config import OlivePackageConfig
from olive.passes import Pass
from olive.passes.pass_config import PassConfigParam

from fusenorm.pipeline import PLUGINS, Options, compile, optimize


class FusenormPass(Pass):  # type: ignore[misc]  # olive has no types
    """Fuse norm, GELU and GLU subgraphs of an ONNX model; with `target`, compile them too."""

    @classmethod
    def _default_config(cls, accelerator_spec: object) -> dict[str, PassConfigParam]:
        target = "compile kernels for this target (cpu, x86-64-v3 ...); none: a portable ONNX file"
        rules = "rules of your own, as module:class"
        return {
            "target": PassConfigParam(type_=str, default_value=None, description=target),
            "rules": PassConfigParam(type_=list[str], default_value=[], description=rules),
            "check_rewrites": PassConfigParam(
                type_=bool, default_value=True, description="check every rewrite numerically"
            ),
        }

    def _run_for_config(
        self, model: ONNXModelHandler, config: Any, output_model_path: str
    ) -> ONNXModelHandler:
        """The portable model; an artifact goes along as an additional file, NAME.fnorm."""
        rules = [importlib.metadata.EntryPoint(name, name, PLUGINS).load() for name in config.rules]
        options = Options(validate=config.check_rewrites, rules=tuple(rule() for rule in rules))
        result = optimize(model.model_path, options=options)
        file = Path(resolve_onnx_path(output_model_path, "model.onnx"))
        result.save(file)
        attributes = {**(model.model_attributes or {}), "fusenorm": result.report.counts}
        if config.target:
            folder = compile(result, config.target).save(file.with_suffix(".fnorm"))
            known = attributes.get("additional_files") or []
            attributes["additional_files"] = [*known, str(folder)]
        # Of a folder Olive copies everything: weights of their own, the artifact.
        return ONNXModelHandler(file.parent, file.name, model_attributes=attributes)


def package_config() -> dict[str, Any]:
    """Olive's own package config and this pass: what `olive.run` takes as `package_config`."""
    config = json.loads(Path(OlivePackageConfig.get_default_config_path()).read_text())
    kinds = ("providers", "accelerators", "precisions")
    everywhere = {f"supported_{kind}": ["*"] for kind in kinds}
    config["passes"]["FusenormPass"] = {"module_path": "fusenorm.olive.FusenormPass", **everywhere}
    return config


if __name__ == "__main__":
    print(json.dumps(package_config(), indent=1))
