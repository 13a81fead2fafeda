"""What converts, but cannot be served as it is, and what is not carried over: a plan's warnings."""

import json
from collections.abc import Iterable
from pathlib import PurePosixPath

from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.checkpoint.files import INDEX, SINGLE_FILE, is_adapter, needs_index
from convert_w4a8.checkpoint.names import is_expert, merged_name
from convert_w4a8.errors import Problem
from convert_w4a8.sources import LayerSpec
from convert_w4a8.text import counted

_LISTED = 6
_MODULES = "modules.json"
_MAX_MODULES_BYTES = 1 << 20


def size_warnings(layers: Iterable[tuple[str, LayerSpec]]) -> Iterable[str]:
    """Yield what converts, but cannot be served: layers (name in the output, spec) of a size that vLLM refuses."""
    merged: dict[str, int] = {}
    experts = []
    for module, spec in layers:
        if not is_expert(module):
            name = merged_name(module)
            merged[name] = merged.get(name, 0) + spec.out_features
        elif spec.out_features % 256 or spec.in_features % 256:
            experts.append(module)
    wide = {name: width for name, width in merged.items() if width % 128}
    if wide:
        name, width = next(iter(wide.items()))
        yield (
            f"{counted(len(wide), 'layer')} of a width that is no multiple of 128, which vLLM's kernel needs:"
            f" {name} has N = {width}"
        )
    if experts:
        yield (
            f"{counted(len(experts), 'expert layer')} of a size that is no multiple of 256, which vLLM's kernel needs:"
            f" {experts[0]}"
        )


def left_out_warnings(checkpoint: Checkpoint) -> Iterable[str]:
    """Yield what of the input is neither read nor copied, by the reason."""
    by_reason: dict[str, list[str]] = {}
    for item in checkpoint.left_out:
        by_reason.setdefault(item.reason, []).append(item.path)
    for reason, paths in by_reason.items():
        more = f" and {len(paths) - _LISTED} more" if len(paths) > _LISTED else ""
        yield f"not carried over: {', '.join(paths[:_LISTED])}{more} ({reason})"


def unlisted_warnings(checkpoint: Checkpoint) -> Iterable[str]:
    """Yield weights that are copied as they are, and that vLLM does not load."""
    files = [str(file) for file in checkpoint.side_files if needs_index(file) and not is_adapter(file.name)]
    if files:
        yield f"copied as it is, and not loaded by vLLM: {', '.join(files)} (not in {checkpoint.index or INDEX})"


def module_problems(checkpoint: Checkpoint) -> Iterable[Problem]:
    """Yield modules of sentence-transformers whose weights are not carried over, without which vLLM would serve it.

    It loads those of type Dense, and goes on where it finds no weights (`_load_st_projector` in models/adapters.py).
    """
    for module in _modules(checkpoint):
        folder, kind = module.get("path"), module.get("type")
        if isinstance(folder, str) and isinstance(kind, str) and kind.endswith(".Dense"):
            weights = PurePosixPath(folder, SINGLE_FILE)
            if str(weights) not in map(str, checkpoint.side_files):
                yield Problem(
                    f"{_MODULES}: {folder}",
                    f"has no {SINGLE_FILE}, and weights in another format are not carried over: vLLM would serve the"
                    " model without this module",
                    f"save the module's weights as {weights}",
                )


def _modules(checkpoint: Checkpoint) -> list[dict[str, object]]:
    """Return the modules of a model of sentence-transformers; none where it is no such model."""
    path = checkpoint.root / _MODULES
    if not path.is_file() or path.stat().st_size > _MAX_MODULES_BYTES:
        return []
    try:
        modules = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return []
    return [module for module in modules if isinstance(module, dict)] if isinstance(modules, list) else []
