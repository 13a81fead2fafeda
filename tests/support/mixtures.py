"""Checkpoints with INT4 layers beside FP8 ones: what the factories left in 16 bits becomes FP8."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from checkpoint_edits import edit_tensors
from compressed_tensors.quantization import preset_name_to_scheme
from factories.checkpoints import Options, write
from factories.formats import CompressedTensors
from factories.layers import Scheme
from factories.models import Model

ATTENTION = r".*self_attn\.[qkvo]_proj$"
PRESETS = ("FP8", "FP8_DYNAMIC", "FP8_BLOCK")
"""Per tensor with static activations, per output channel and per block with dynamic ones."""
MAX = 448.0
INPUT_SCALE = 0.25


def write_mixture(
    path: Path,
    model: Model,
    preset: str = "FP8_BLOCK",
    *,
    fp8: str = ATTENTION,
    plain: str = "lm_head",
    int4: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, torch.Tensor]:
    """Write a checkpoint whose modules matching `fp8` are FP8; return what their weights mean, float32 [N, K].

    plain: pattern of modules in 16 bits. int4: target of the INT4 group, a pattern of all the others by default.
    """
    others = f"re:(?!{fp8}|{plain}).*"
    form = CompressedTensors({others: Scheme(scale_dtype=dtype)}, ignore=(f"re:{fp8}", f"re:{plain}"))
    write(path, model, form, Options(dtype))
    return add_fp8(path, fp8, preset, int4=int4)


def add_fp8(path: Path, fp8: str, preset: str, *, int4: str | None = None) -> dict[str, torch.Tensor]:
    """Make the 16-bit modules that match FP8, in a config group of their own; return what their weights mean."""
    meant: dict[str, torch.Tensor] = {}

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        names = [name.removesuffix(".weight") for name, tensor in tensors.items() if tensor.is_floating_point()]
        for module in (name for name in names if f"{name}.weight" in tensors and re.match(fp8, name)):
            found = quantize(tensors.pop(f"{module}.weight"), preset)
            meant[module] = found.pop("meant")
            tensors |= {f"{module}.{role}": tensor for role, tensor in found.items()}

    edit_tensors(path, edit)
    config = json.loads((path / "config.json").read_text())
    block = config["quantization_config"]
    number = len(block["config_groups"])
    block["config_groups"][f"group_{number}"] = config_group(preset, [f"re:{fp8}"])
    block["format"] = "mixed-precision"
    block["ignore"] = [entry for entry in block["ignore"] if entry != f"re:{fp8}"]
    if int4 is not None:
        block["config_groups"]["group_0"]["targets"] = [int4]
    (path / "config.json").write_text(json.dumps(config))
    return meant


def config_group(preset: str, targets: list[str]) -> dict[str, Any]:
    """Return the config group that llm-compressor writes for a preset."""
    group: dict[str, Any] = preset_name_to_scheme(preset, targets).model_dump(mode="json")
    return group | {"format": "float-quantized"}


def quantize(weight: torch.Tensor, preset: str) -> dict[str, torch.Tensor]:
    """Return the tensors of an FP8 layer, and `meant`, what they mean."""
    n, k = weight.shape
    rows, columns = {"FP8": (n, k), "FP8_DYNAMIC": (1, k), "FP8_BLOCK": (128, 128)}[preset]
    padded = torch.zeros(-(-n // rows) * rows, -(-k // columns) * columns)
    padded[:n, :k] = weight.float()
    blocks = padded.view(-(-n // rows), rows, -(-k // columns), columns)
    scale = (blocks.abs().amax(dim=(1, 3)) / MAX).to(weight.dtype)
    codes = (blocks / scale.float()[:, None, :, None]).clamp(-MAX, MAX).to(torch.float8_e4m3fn)
    meant = (codes.float() * scale.float()[:, None, :, None]).view(padded.shape)[:n, :k]
    found = {
        "weight": codes.view(padded.shape)[:n, :k].contiguous(),
        "weight_scale": scale.view(1) if preset == "FP8" else scale,
        "meant": meant.contiguous(),
    }
    if preset == "FP8":
        found["input_scale"] = torch.tensor([INPUT_SCALE], dtype=weight.dtype)
    return found
