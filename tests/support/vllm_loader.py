"""What vLLM's default loader opens of a directory, by its own code (see vllm_sources)."""

import ast
import json
import os
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from vllm_sources import sources

_INDEX = "model.safetensors.index.json"


def loaded_files(directory: Path, version: str) -> list[str]:
    """Return the names of the files that vLLM of a version loads weights from (`_prepare_weights`, format auto).

    It takes Mistral's form if `consolidated*.safetensors` lies anywhere; else every safetensors file at the top that
    the index lists, if there is one.
    """
    every = [path.name for path in directory.rglob("*")]
    if any(fnmatch(name, "consolidated*.safetensors") for name in every):
        return ["Mistral's own form"]
    names = [str(path) for path in directory.glob("*.safetensors")]
    found = _filter(version)(names, str(directory), _INDEX)
    return sorted(Path(name).name for name in found)


def _filter(version: str) -> Any:
    """Return vLLM's own `filter_duplicate_safetensors_files`, cut out of its module."""
    path = sources(version) / "vllm" / "model_executor" / "model_loader" / "weight_utils.py"
    name = "filter_duplicate_safetensors_files"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    function = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    scope: dict[str, Any] = {"os": os, "json": json}
    exec(compile(ast.Module([function], []), str(path), "exec"), scope)
    return scope[name]
