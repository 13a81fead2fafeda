"""Warnings: what is kept in BF16 although nobody asked for it, what is not carried over, and infinities."""

import json
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath

from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.checkpoint.files import INDEX, SINGLE_FILE, is_adapter, needs_index
from convert_w4a8.checkpoint.names import is_expert, merged_name
from convert_w4a8.conversion.layers import Kept, LayerPlan
from convert_w4a8.errors import Problem
from convert_w4a8.text import counted, shortened

_MODULES = "modules.json"
_MAX_MODULES_BYTES = 1 << 20


def width_warnings(layers: Iterable[LayerPlan]) -> Iterable[str]:
    """Yield which layers are kept in BF16 since their sizes would not be served, or not on several GPUs."""
    wide: dict[str, str] = {}
    experts: list[str] = []
    for layer in layers:
        if layer.kept is not Kept.WIDTH:
            continue
        if is_expert(layer.module):
            experts.append(str(layer.dequantize))
        else:
            wide.setdefault(merged_name(layer.module), str(layer.dequantize))
    if wide:
        yield f"{counted(len(wide), 'layer')} of {next(iter(wide.values()))}; kept in BF16"
    if experts:
        yield f"{counted(len(experts), 'expert layer')} of {experts[0]}; kept in BF16"


def left_out_warnings(checkpoint: Checkpoint) -> Iterable[str]:
    """Yield what of the input is neither read nor copied, by the reason."""
    by_reason: dict[str, list[str]] = {}
    for item in checkpoint.left_out:
        by_reason.setdefault(item.reason, []).append(item.path)
    for reason, paths in by_reason.items():
        yield f"not carried over: {shortened(paths)} ({reason})"


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


def infinity_warnings(infinities: Mapping[str, int]) -> tuple[str, ...]:
    """Return what there is to say of tensors that hold so many infinities, by name."""
    if not infinities:
        return ()
    name, count = next(iter(infinities.items()))
    values = "an infinity" if count == 1 else f"{count:,} infinities"
    others = len(infinities) - 1
    more = f", and {counted(others, 'other tensor')} too" if others else ""
    return (f"{name} holds {values}{more}: as a mask may, but a weight may not",)
