"""Single functions of vLLM's model code, cut out of its sources and run as they are, with stand-ins for what they call.

Its model files cannot be imported without CUDA builds and a hundred packages; a function that only reshapes tensors
needs torch.
"""

import ast
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from vllm_sources import sources

MODELS = "model_executor/models"


@cache
def parsed(path: Path) -> ast.Module:
    """Return the syntax tree of a source file."""
    return ast.parse(path.read_text(encoding="utf-8"))


def source_file(version: str, file: str) -> Path:
    """Return a file of vLLM: below its `model_executor/models` or, with `models/` at the beginning, below `vllm`."""
    base = sources(version) / "vllm"
    return base / file if file.startswith("models/") else base / MODELS / file


def cut_out(version: str, file: str, name: str, **surroundings: Any) -> Any:
    """Return a function of a file, `function` or `Class.method`, defined where only torch and `surroundings` are known.

    Its annotations and decorators are dropped: they name what is not there.
    """
    tree: ast.AST = parsed(source_file(version, file))
    for part in name.split("."):
        kinds = (ast.ClassDef, ast.FunctionDef)
        tree = next(node for node in ast.walk(tree) if isinstance(node, kinds) and node.name == part)
    (function,) = ast.parse(ast.unparse(tree)).body
    assert isinstance(function, ast.FunctionDef)
    for node in ast.walk(function):
        if isinstance(node, ast.FunctionDef):
            node.decorator_list, node.returns = [], None
        elif isinstance(node, ast.arg):
            node.annotation = None
    module = ast.Module([_WithoutAnnotations().visit(function)], [])
    known: dict[str, Any] = {"torch": torch} | surroundings
    exec(compile(ast.fix_missing_locations(module), file, "exec"), known)
    return known[function.name]


class _WithoutAnnotations(ast.NodeTransformer):
    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        return None if node.value is None else ast.Assign([node.target], node.value)


class Loader:
    """In place of `AutoWeightsLoader`: keeps the tensors that it is given."""

    def __init__(self, *_: Any, **__: Any) -> None:
        """Take what vLLM's takes."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], **_: Any) -> dict[str, torch.Tensor]:
        """Return the tensors by name."""
        return dict(weights)


class Parameter:
    """In place of one parameter of a model: keeps what is loaded, by shard."""

    def __init__(self, name: str, output_dim: int | None, loaded: dict[str, torch.Tensor]) -> None:
        self.name, self.loaded = name, loaded
        if output_dim is not None:
            self.output_dim = output_dim

    @staticmethod
    def weight_loader(parameter: "Parameter", tensor: torch.Tensor, shard: str | None = None) -> None:
        """Keep a tensor, under a module's name that says which shard it is."""
        module, _, role = parameter.name.rpartition(".")
        parameter.loaded[f"{module}.{role}" if shard is None else f"{module}:{shard}.{role}"] = tensor


def parameters(tensors: Mapping[str, torch.Tensor], target: str | None) -> dict[str, Parameter]:
    """Return a parameter for each tensor of a layer, with the output dimension that it has in an output format.

    target: None for a 16-bit layer. All parameters share the dictionary of what was loaded.
    """
    loaded: dict[str, torch.Tensor] = {}
    dimensions: dict[str, int | None] = {
        "weight": 0,
        "weight_packed": 1 if target == "lut" else 0,
        "weight_scale": 1 if target == "lut" else 0,
        "weight_lut": 1,
        "weight_chan_scale": 0,
        "weight_shape": None,
    }
    return {name: Parameter(name, dimensions.get(name.rpartition(".")[2]), loaded) for name in tensors}
