"""An INT4 checkpoint as llm-compressor writes it, and its BF16 twin, from a saved model. Nothing of the converter.

The twin has the values that the INT4 codes and scales stand for, under the model's own names, so it is what an
unquantized vLLM model loads.
"""

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from zoo.architectures import Architecture

GROUP = 128

_FUSED_EXPERTS = re.compile(r"(?P<module>.+\.experts)\.(?P<projection>gate_up_proj|down_proj)")

_KEPT = re.compile(
    r"lm_head|embed|norm(?!_attn|\.attn)|wpe|wte|mlp_AR|vision|visual|image|audio|speech|projector|merger|connector|mm_|resampler|abstractor|qformer"
    r"|multi_modal|encoder\.|mtp|\.gate\.weight$|router|shared_expert_gate|in_proj_(a|b|ba)\.|conv|x_proj|dt_proj"
    r"|per_layer|altup|laurel|indexer|weights_proj|eh_proj"
)
"""Names of tensors that quantization tools leave in 16 bits."""


def write_pair(saved: Path, source: Path, twin: Path, architecture: Architecture) -> None:
    """Write `source` (INT4) and `twin` (BF16) from a saved model."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(saved.glob("*.safetensors")):
        tensors |= load_file(file)
    for pattern, replacement in architecture.renames:
        tensors = {re.sub(pattern, replacement, name): tensor for name, tensor in tensors.items()}
    if (transposed := architecture.transposed) is not None:
        tensors = {name: tensor.mT if re.search(transposed, name) else tensor for name, tensor in tensors.items()}
    packed: dict[str, torch.Tensor] = {}
    plain: dict[str, torch.Tensor] = {}
    kept = ["lm_head"]
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and is_quantized(name, tensor):
            layer, plain[name] = quantized_layer(module, tensor)
            packed |= layer
        elif architecture.split_experts and (match := _FUSED_EXPERTS.fullmatch(name)):
            experts, plain[name] = _split(match["module"], match["projection"], tensor)
            packed |= experts
        else:
            packed[name] = plain[name] = tensor.contiguous()
            if tensor.dim() == 2 and name.endswith(".weight"):
                kept.append(module)
    config = json.loads((saved / "config.json").read_text())
    _write(saved, twin, plain, config)
    _write(saved, source, packed, config | {"quantization_config": quantization_config(sorted(set(kept)))})


def quantized_layer(module: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return a layer's tensors, and the weight that they stand for, bfloat16 [N, K]."""
    codes, scale = quantize(weight)
    tensors = {
        f"{module}.weight_packed": pack(codes),
        f"{module}.weight_scale": scale,
        f"{module}.weight_shape": torch.tensor(weight.shape),
    }
    return tensors, dequantize(codes, scale)


def _split(module: str, projection: str, fused: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return the layers of fused experts [E, K, N] (gate beside up along N), and the fused weight they stand for."""
    tensors: dict[str, torch.Tensor] = {}
    names = ("gate_proj", "up_proj") if projection == "gate_up_proj" else (projection,)
    twin = torch.empty_like(fused)
    for expert in range(len(fused)):
        width = fused.shape[2] // len(names)
        for index, name in enumerate(names):
            columns = slice(index * width, (index + 1) * width)
            layer, plain = quantized_layer(f"{module}.{expert}.{name}", fused[expert, :, columns].t().contiguous())
            tensors |= layer
            twin[expert, :, columns] = plain.t()
    return tensors, twin


def is_quantized(name: str, weight: torch.Tensor) -> bool:
    """Whether a tool would quantize the tensor of this name: a matrix of a language model whose groups fit."""
    return weight.dim() == 2 and not _KEPT.search(name) and weight.shape[0] % 8 == 0 and weight.shape[1] % GROUP == 0


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return unsigned codes uint8 [N, K] and scales bfloat16 [N, K/128], symmetric, nearest."""
    groups = weight.float().view(len(weight), -1, GROUP)
    scale = (groups.abs().amax(-1) / 7.5).clamp(min=1e-6).bfloat16()
    codes = (groups / scale.float()[..., None]).round().clamp(-8, 7) + 8
    return codes.to(torch.uint8).flatten(1), scale


def dequantize(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return (code − 8)·scale as bfloat16 [N, K]."""
    groups = codes.float().view(len(codes), -1, GROUP) - 8
    return (groups * scale.float()[..., None]).flatten(1).bfloat16()


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Pack codes uint8 [N, K] into int32 [N, K/8], low nibble first."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int64)
    words = (codes.long().view(len(codes), -1, 8) << shifts).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def quantization_config(ignore: list[str]) -> dict[str, object]:
    """Return the block that llm-compressor writes, with the names of what it left in 16 bits."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ignore,
        "config_groups": {"group_0": {"targets": ["Linear"], "input_activations": None, "weights": weights}},
    }


def _write(saved: Path, directory: Path, tensors: dict[str, torch.Tensor], config: dict[str, object]) -> None:
    directory.mkdir(parents=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    for file in saved.iterdir():
        if file.suffix == ".json" and file.name != "config.json" and "index" not in file.name:
            shutil.copy(file, directory / file.name)
