"""What vLLM's model files do with checkpoints, found in their syntax: nothing of vLLM is imported."""

import ast
import re
import zlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from vllm_sources import sources

_SHAPING = re.compile(
    r"m?T|t|cat|chunk|concat(?:enate)?|expand|flatten|flip|gather|[hv]?stack|index_select|movedim|narrow|pad|permute"
    r"|rearrange|repeat(?:_interleave)?|reshape|roll|select|split(?:_with_sizes)?|squeeze|swapaxes|tensor_split|tile"
    r"|transpose|unbind|unflatten|unfold|unsqueeze|view"
)
"""Methods and functions that give a tensor another shape or order."""
_WEIGHTS = re.compile(r"(?:loaded_|hf_|checkpoint_)?(?:weights?|tensors?)(?:_dict)?|state_dict")
"""Arguments that hold tensors of a checkpoint."""
_LOADS = re.compile(
    r"load|permute|remap|preprocess|split|merge|pad|adapt|transpose|repack|interleave|consolidate|iter_"
)
"""Functions whose arguments they are."""
_ROLE = re.compile(r"(?:.*[._])?(?:weight|weight_packed|weight_scale\w*)")
"""Constants that are compared with the end of a tensor's name."""
_OTHER_DEVICES = re.compile(r"/(?:amd|cpu|xpu|ops|specialized_decode|cutedsl)/")
_LINEAR = re.compile(r"(?:\w*Linear|FusedMoE\w*)")
Place = tuple[str, str]
"""A file and a function or attribute in it."""


def files(version: str) -> Iterator[tuple[str, Path]]:
    """Yield the model files of a version that a Hopper GPU may run, as `source_file` takes them."""
    base = sources(version) / "vllm"
    layers = base / "model_executor" / "layers" / "mamba"
    for folder, start in ((base / "model_executor" / "models", None), (base / "models", base), (layers, layers.parent)):
        for path in sorted(folder.rglob("*.py")):
            name = str(path.relative_to(start or folder))
            if not _OTHER_DEVICES.search(f"/{name}"):
                yield name, path


@dataclass
class Scan:
    """What one version of vLLM does.

    loaders: the functions that reshape tensors of a checkpoint, or treat some by their roles, each with a checksum of
        the expressions that do so: it changes with what a function does to tensors, and not otherwise.
    unquantized: the linear layers and modules that are made without the quantization that their class could take.
    merged: the layers that are merged out of several: name and shards, as models list them.
    """

    loaders: dict[Place, str] = field(default_factory=dict)
    unquantized: set[Place] = field(default_factory=set)
    merged: set[tuple[str, frozenset[str]]] = field(default_factory=set)


@cache
def scan(version: str) -> Scan:
    """Read all model files of a version, each once."""
    found = Scan()
    takes: set[str] = set()
    made: list[tuple[Place, str]] = []
    for file, path in files(version):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for name, function in _functions(tree):
            if expressions := sorted({ast.unparse(node) for node in _shaping(function)}):
                found.loaders[file, name] = f"{zlib.crc32(' '.join(expressions).encode()):08x}"
        stacked: dict[str, set[str]] = defaultdict(set)
        for owner, node in _owned(tree):
            match node:
                case ast.FunctionDef(name="__init__") if owner:
                    if "quant_config" in {argument.arg for argument in [*node.args.args, *node.args.kwonlyargs]}:
                        takes.add(owner)
                case ast.Assign(targets=[target, *_], value=ast.Call() as call) if owner:
                    if not _passes_quantization(call):
                        attribute = ast.unparse(target).removeprefix("self.")
                        made.append(((file, f"{owner}.{attribute}"), _name(call.func)))
                case _:
                    pass
            for name, value in _assigned(node):
                if "packed_modules_mapping" in name:
                    found.merged.update(_packed(value))
                elif "stacked" in name:
                    for merged, shard in _stacked(value):
                        stacked[merged].add(shard)
        found.merged.update((name, frozenset(shards)) for name, shards in stacked.items())
    found.unquantized = {place for place, kind in made if kind in takes or _LINEAR.fullmatch(kind)}
    found.merged = {(name, shards) for name, shards in found.merged if len(shards) > 1}
    return found


def _owned(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """Yield all parts of a file, each with the class that it is in."""
    for top in tree.body:
        owner = top.name if isinstance(top, ast.ClassDef) else ""
        yield from ((owner, node) for node in ast.walk(top))


def _functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Yield the functions and methods of a file that load something; those within functions belong to them."""
    for node in tree.body:
        for part in node.body if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(part, ast.FunctionDef) and _LOADS.search(part.name):
                yield (part.name if part is node else f"{getattr(node, 'name', '')}.{part.name}"), part


def _shaping(function: ast.FunctionDef) -> Iterator[ast.expr]:
    held = _tensors(function)
    if not held:
        return
    for node in ast.walk(function):
        match node:
            case ast.Call(func=ast.Attribute(attr=attr)) if _SHAPING.fullmatch(attr) and _names(node) & held:
                if not _of_text(node):
                    yield node
            case ast.Attribute(attr="T" | "mT", value=value) if _names(value) & held:
                yield node
            case ast.Subscript(value=ast.Name(id=name), ctx=ast.Load()) if name in held:
                yield node
            case ast.BinOp(left=ast.Name(id=name), op=ast.Add() | ast.Sub() | ast.Mult()) if name in held:
                yield node
            case ast.Call(func=ast.Name(), args=arguments) if any(map(_is_role, arguments)) and _names(node) & held:
                yield node
            case ast.Compare() | ast.Call(func=ast.Attribute(attr="endswith")) if any(map(_is_role, ast.walk(node))):
                yield node
            case _:
                pass


def _tensors(function: ast.FunctionDef) -> set[str]:
    """Return the names that hold tensors of a checkpoint, or what is made of them."""
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    inner = [node for node in ast.walk(function) if isinstance(node, ast.FunctionDef) and node is not function]
    arguments += [argument for node in inner for argument in node.args.args]
    held = {argument.arg for argument in arguments if _WEIGHTS.fullmatch(argument.arg) or argument.arg == "w"}
    for _ in range(4):
        for node in ast.walk(function):
            match node:
                case ast.For(target=target, iter=source) | ast.comprehension(target=target, iter=source):
                    held |= (_names(target) if _names(source) & held else set()) - {"name"}
                case ast.Assign(targets=targets, value=value) if _names(value) & held:
                    held |= {name for target in targets for name in _names(target)}
                case _:
                    pass
    return held - {"self", "name", "loader", "loaded_params", "params_dict", "param", "weight_loader"}


def _names(node: ast.AST) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _is_role(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and _ROLE.fullmatch(node.value) is not None


def _of_text(call: ast.Call) -> bool:
    """Whether a `split` is one of text."""
    return any(isinstance(argument, ast.Constant) and isinstance(argument.value, str) for argument in call.args)


def _passes_quantization(call: ast.Call) -> bool:
    for keyword in call.keywords:
        if keyword.arg is None:
            return True
        if keyword.arg == "quant_config":
            return "None" not in ast.unparse(keyword.value)
    return any("quant_config" in ast.unparse(argument) for argument in call.args)


def _assigned(node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    match node:
        case ast.Assign(targets=[target, *_], value=value):
            yield ast.unparse(target), value
        case ast.AnnAssign(target=target, value=ast.expr() as value):
            yield ast.unparse(target), value
        case ast.keyword(arg=str(name), value=value):
            yield name, value
        case _:
            pass


def _packed(value: ast.expr) -> Iterator[tuple[str, frozenset[str]]]:
    for node in ast.walk(value):
        if isinstance(node, ast.Dict):
            for key, shards in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(shards, ast.List):
                    yield str(key.value), frozenset(ast.literal_eval(shards))


def _stacked(value: ast.expr) -> Iterator[tuple[str, str]]:
    """Yield (merged, shard) of `(merged, shard, id)` in a list and of `shard: (merged, id)` in a dictionary."""
    for node in ast.walk(value):
        match node:
            case ast.Tuple(elts=[ast.Constant(value=str(name)), ast.Constant(value=str(shard)), _]):
                yield name.strip("."), shard.strip(".")
            case ast.Dict():
                for key, entry in zip(node.keys, node.values, strict=True):
                    match key, entry:
                        case ast.Constant(value=str(shard)), ast.Tuple(elts=[ast.Constant(value=str(name)), _]):
                            yield name.strip("."), shard.strip(".")
                        case _:
                            pass
            case _:
                pass
