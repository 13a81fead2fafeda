"""Damage and lies for checkpoints that the factories wrote: change tensors or configuration in place."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from factories import CASES, Case, Checkpoint
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
REMOVE = object()
"""As a value in `edit_json`: take the key away."""


def case_named(name: str) -> Case:
    """Return the factories' case with this id."""
    return next(case for case in CASES if case.id == name)


def write_case(name: str, path: Path) -> Checkpoint:
    """Write the factories' case with this id."""
    return case_named(name).write(path)


def edit_tensors(path: Path, edit: Callable[[Tensors], object]) -> None:
    """Rewrite a checkpoint's only safetensors file after `edit` has changed its tensors in place."""
    file = path / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})


def set_zero_point(tensors: Tensors, module: str, zero: int) -> None:
    """Set the zero-point of a layer's first output channel and group, packed in the lowest nibble in every format.

    GPTQ tensors are taken to be of version 1, which stores one less.
    """
    role = "qzeros" if f"{module}.qzeros" in tensors else "weight_zero_point"
    stored = zero - 1 if f"{module}.g_idx" in tensors else zero
    words = tensors[f"{module}.{role}"]
    words[0, 0] = (int(words[0, 0]) & ~0xF) | stored


def edit_json(file: Path, *keys: str, **values: Any) -> None:
    """Set values in a JSON file, within the object that `keys` lead to."""
    document = json.loads(file.read_text())
    place = document
    for key in keys:
        place = place[key]
    for key, value in values.items():
        if value is REMOVE:
            place.pop(key, None)
        else:
            place[key] = value
    file.write_text(json.dumps(document))


def edit_quantization(path: Path, **values: Any) -> None:
    """Set values in the quantization_config of a checkpoint's config.json."""
    edit_json(path / "config.json", "quantization_config", **values)


def snapshot(path: Path) -> dict[str, bytes]:
    """Return every file below a directory and its content."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}
