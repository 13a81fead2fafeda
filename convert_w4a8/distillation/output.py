"""The trained model as a checkpoint: that which came in, with new tables, scales, norms, biases, and perhaps codes."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.checkpoint.files import CARD, CONFIG
from convert_w4a8.checkpoint.journal import Notes
from convert_w4a8.checkpoint.safetensors_file import TensorSpec, read_tensor
from convert_w4a8.checkpoint.shards import ShardPlan
from convert_w4a8.checkpoint.writer import CheckpointWriter
from convert_w4a8.distillation.linear import LutLinear
from convert_w4a8.encoding.packing import pack_codes
from convert_w4a8.linear import Packing, W4A8Linear
from convert_w4a8.targets import find_target

_SERVING = re.compile(r"^## Serve it", re.MULTILINE)


def plan_files(checkpoint: Checkpoint) -> tuple[ShardPlan, ...]:
    """Return the files of the output: those that came in, with the same tensors."""
    files: dict[str, list[TensorSpec]] = {}
    for info in sorted(checkpoint.tensors.values(), key=lambda info: (info.path.name, info.start)):
        name = str(info.path.relative_to(checkpoint.root))
        files.setdefault(name, []).append(TensorSpec(info.name, info.dtype, info.shape))
    return tuple(ShardPlan(name, tuple(specs)) for name, specs in files.items())


def write_output(
    writer: CheckpointWriter,
    checkpoint: Checkpoint,
    layers: Iterable[tuple[str, LutLinear]],
    others: Mapping[str, torch.Tensor],
    record: Mapping[str, Any],
    section: str,
) -> None:
    """Write everything but the index.

    layers, others: what was trained, by names in the checkpoint. record: for config.json. section: of the card.
    """
    trained = _trained_tensors(checkpoint, layers, others)
    for plan in plan_files(checkpoint):
        shard = writer.shard_writer(plan.file_name)
        for spec in plan.specs:
            tensor = trained.get(spec.name)
            shard.write(spec.name, [read_tensor(checkpoint.tensors[spec.name]) if tensor is None else tensor])
        writer.finish(shard, Notes())
    for relative in checkpoint.side_files:
        writer.copy_file(checkpoint.root / relative, relative)
    block = dict(checkpoint.quantization_config)
    conversion = block.get("conversion")
    block["conversion"] = {**(conversion if isinstance(conversion, dict) else {}), "distillation": dict(record)}
    writer.write_json(CONFIG, {**checkpoint.config, "quantization_config": block})
    writer.write_text(CARD, _card(checkpoint.root / CARD, section))


def _trained_tensors(
    checkpoint: Checkpoint, layers: Iterable[tuple[str, LutLinear]], others: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return the tensors that are not those that came in, by name."""
    target = find_target(checkpoint)
    found = {name: parameter.detach().cpu() for name, parameter in others.items()}
    for name, layer in layers:
        entries, scale, codes = (part.cpu() for part in layer.current())
        w = W4A8Linear(
            packed=pack_codes(codes),
            packing=Packing.PACK_QUANTIZED,
            group_scale=None,
            entries=entries.transpose(0, 1).contiguous().to(torch.float8_e4m3fn),
            channel_scale=scale,
        )
        for tensor, parts in target.encode(name, w).items():
            found[tensor] = torch.cat(list(parts))
    return found


def _card(path: Path, section: str) -> str:
    """Return the card that came in, with a section before that about serving."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    place = _SERVING.search(text)
    if place is None:
        return f"{text.rstrip()}\n\n{section}\n" if text else f"{section}\n"
    return f"{text[: place.start()]}{section}\n\n{text[place.start() :]}"
