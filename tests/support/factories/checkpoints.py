"""Whole checkpoint directories on disk, small but complete, with the truth about what they hold."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from factories.formats import Format
from factories.layers import Layer, quantize
from factories.models import Model

SIDE_FILES: Mapping[str, bytes] = {
    "chat_template.jinja": b"{% for m in messages %}{{ m.content }}\r\n{% endfor %}",
    "generation_config.json": b'{"bos_token_id": 0,\n  "eos_token_id": [1, 2]}',
    "tokenizer.json": '{"version": "1.0", "model": {"vocab": {"é": 0}}}\n'.encode(),
    "tokenizer_config.json": b'{"tokenizer_class": "PreTrainedTokenizerFast"}',
}
"""Files that must come out byte for byte."""


@dataclass(frozen=True)
class Checkpoint:
    """A directory and what it means.

    layers: module → quantized layer. dense: tensor → value as stored, whatever is not quantized.
    side_files: path within the directory → bytes, to be copied. stale: files that must not be copied.
    """

    path: Path
    model: Model
    format: str
    layers: dict[str, Layer]
    dense: dict[str, torch.Tensor]
    side_files: dict[str, bytes]
    stale: tuple[str, ...]


@dataclass(frozen=True)
class Options:
    """How a checkpoint is written, apart from its format."""

    dtype: torch.dtype = torch.bfloat16
    """Of everything that is not quantized, and of config.json."""
    shards: int = 1
    dtype_key: str = "dtype"
    """transformers 5 writes `dtype`, 4 `torch_dtype`."""
    config_in_quantize_config: bool = False
    """Leave `quantization_config` out of config.json and write quantize_config.json alone."""
    side_files: Mapping[str, bytes] = field(default_factory=lambda: dict(SIDE_FILES))
    stale: Mapping[str, bytes] = field(default_factory=dict)
    """Files that a converter must drop."""
    metadata: Mapping[str, str] = field(default_factory=lambda: {"format": "pt"})
    seed: int = 0


def write(path: Path, model: Model, form: Format, options: Options | None = None) -> Checkpoint:
    """Write a checkpoint of this model in this format to `path`, which must not exist."""
    options = options or Options()
    path.mkdir(parents=True)
    rng = np.random.default_rng(options.seed)
    layers: dict[str, Layer] = {}
    dense: dict[str, torch.Tensor] = {}
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in model.dense.items():
        scheme = form.scheme("lm_head") if name == "lm_head.weight" else None
        if scheme is not None and len(shape) == 2:
            layers["lm_head"] = quantize(rng, shape[0], shape[1], scheme)
        else:
            dense[name] = _dense(rng, name, shape, options.dtype)
    for module, (n, k) in model.linears.items():
        scheme = form.scheme(module)
        if scheme is None:
            dense[f"{module}.weight"] = _dense(rng, f"{module}.weight", (n, k), options.dtype)
        else:
            layers[module] = quantize(rng, n, k, scheme)
    for module, layer in layers.items():
        tensors |= form.tensors(module, layer)
    tensors |= dense
    _write_tensors(path, tensors, options)

    config = model.config | {options.dtype_key: str(options.dtype).removeprefix("torch.")}
    if options.config_in_quantize_config:
        _write_json(path / "quantize_config.json", form.config())
    else:
        config |= {"quantization_config": form.config()}
    _write_json(path / "config.json", config)
    for name, content in (dict(options.side_files) | dict(options.stale)).items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(content)
    stale = tuple(options.stale) + (("quantize_config.json",) if options.config_in_quantize_config else ())
    return Checkpoint(path, model, form.name, layers, dense, dict(options.side_files), stale)


def _dense(rng: np.random.Generator, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Make a tensor that is not quantized: norms near 1, everything else near 0."""
    values = rng.standard_normal(shape) * (0.1 if len(shape) == 1 else shape[-1] ** -0.5)
    if name.endswith("norm.weight"):
        values += 1
    return torch.from_numpy(values).to(dtype)


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor], options: Options) -> None:
    """Write one file, or deal the tensors out over shards, so that the parts of a layer lie far apart."""
    metadata = dict(options.metadata) or None
    if options.shards == 1:
        save_file(tensors, path / "model.safetensors", metadata)
        return
    weight_map: dict[str, str] = {}
    names = list(tensors)
    for shard in range(options.shards):
        file = f"model-{shard + 1:05d}-of-{options.shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[shard :: options.shards]}
        save_file(part, path / file, metadata)
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(path / "model.safetensors.index.json", index)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")
