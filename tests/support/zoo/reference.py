"""The BF16 twin of any INT4 checkpoint on disk, with plain arithmetic: nothing of the converter.

A module is read by the names of its tensors: `weight_packed` (compressed-tensors), `qweight` with `g_idx` or in GPTQ's
shape, `qweight` in AWQ's shape, FP8 weights with scales of rows or blocks. All other tensors stay as they are.
"""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

_ROLES = (
    "qweight",
    "qzeros",
    "scales",
    "g_idx",
    "weight",
    "weight_packed",
    "weight_scale",
    "weight_scale_inv",
    "input_scale",
    "weight_zero_point",
    "weight_shape",
    "weight_g_idx",
)
_CONFIG_KEYS = ("quantization_config", "compression_config")
_NOT_COPIED = ("config.json", "quantize_config.json", "quant_config.json", "model.safetensors.index.json")
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where, of the eight nibbles of a word from the lowest, output channels 0 … 7 lie."""
_MIXTRAL = (
    (r"\.mlp\.gate\.", ".block_sparse_moe.gate."),
    (r"\.mlp\.experts\.(\d+)\.gate_proj\.", r".block_sparse_moe.experts.\1.w1."),
    (r"\.mlp\.experts\.(\d+)\.down_proj\.", r".block_sparse_moe.experts.\1.w2."),
    (r"\.mlp\.experts\.(\d+)\.up_proj\.", r".block_sparse_moe.experts.\1.w3."),
)
"""vLLM's Mixtral knows its experts by Mistral's names, in 16 bits too."""


def write_twin(source: Path, twin: Path) -> None:
    """Write the BF16 checkpoint that a source stands for."""
    config = json.loads((source / "config.json").read_text())
    settings = _settings(source, config)
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(source.glob("*.safetensors")):
        tensors |= load_file(file)
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, role = name.rpartition(".")
        if role in _ROLES:
            modules.setdefault(module, {})[role] = tensor
    plain = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[2] not in _ROLES}
    for module, parts in modules.items():
        plain[f"{module}.weight"] = dequantize(parts, settings)
    if config.get("model_type") == "mixtral":
        for pattern, replacement in _MIXTRAL:
            plain = {re.sub(pattern, replacement, name): tensor for name, tensor in plain.items()}
    plain = {name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in plain.items()}
    twin.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in plain.items()}, twin / "model.safetensors")
    (twin / "config.json").write_text(json.dumps(_without_quantization(config)))
    for file in source.iterdir():
        if file.suffix in {".json", ".txt", ".model", ".jinja"} and file.name not in _NOT_COPIED:
            shutil.copy(file, twin / file.name)


def dequantize(parts: Mapping[str, torch.Tensor], settings: Mapping[str, Any]) -> torch.Tensor:
    """Return the weight of a module as bfloat16 [N, K] (or what is stored, where it is not quantized)."""
    if "weight_packed" in parts:
        codes = nibbles(parts["weight_packed"])
        zeros = torch.full_like(parts["weight_scale"], 8).float()
        if "weight_zero_point" in parts:
            zeros = nibbles(parts["weight_zero_point"].t().contiguous()).t()[: len(codes)].float()
        return _apply(codes, parts["weight_scale"].float(), zeros, parts.get("weight_g_idx"))
    if "qweight" in parts:
        words, scales = parts["qweight"], parts["scales"].float().t()
        n = scales.shape[0]
        if words.shape[1] == n:
            # GPTQ: [K/8, N] with codes along K, zeros [G, N/8]; version 1 has taken 1 from each, with a borrow.
            # AutoRound has packings of both kinds.
            packing = str(settings.get("packing_format", settings.get("backend"))).removeprefix("auto_round:")
            is_v2 = settings.get("checkpoint_format") == "gptq_v2" or packing in ("auto_round", "gptqmodel")
            offset = 0 if is_v2 else 0x11111111
            codes = nibbles(words.t().contiguous())
            return _apply(codes, scales, nibbles(parts["qzeros"] + offset).float().t(), parts.get("g_idx"))
        codes = _awq_order(nibbles(words)).t()
        zeros = _awq_order(nibbles(parts["qzeros"])).t()
        return _apply(codes, scales, zeros.float(), None)
    weight = parts["weight"]
    if weight.dtype == torch.int8 and "weight_scale" in parts:
        zero = parts.get("weight_zero_point", torch.zeros_like(parts["weight_scale"]))
        return _apply(weight, parts["weight_scale"].float(), zero.float(), parts.get("weight_g_idx"))
    scale = parts.get("weight_scale_inv", parts.get("weight_scale"))
    if scale is None or weight.dtype != torch.float8_e4m3fn:
        return weight
    rows, columns = (-(-size // count) for size, count in zip(weight.shape, _matrix_shape(scale), strict=True))
    spread = scale.float().view(_matrix_shape(scale)).repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return (weight.float() * spread[: weight.shape[0], : weight.shape[1]]).bfloat16()


def nibbles(words: torch.Tensor) -> torch.Tensor:
    """Return the eight 4-bit numbers of each int32, lowest first, along the last dimension, uint8."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    return ((words[..., None] >> shifts) & 15).flatten(-2).to(torch.uint8)


def _awq_order(codes: torch.Tensor) -> torch.Tensor:
    """Return the nibbles of AWQ's words, uint8 [rows, N], in the order of their output channels."""
    return codes.view(len(codes), -1, 8)[..., list(_AWQ_ORDER)].flatten(1)


def _apply(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, g_idx: torch.Tensor | None) -> torch.Tensor:
    """Return (code − zero)·scale, bfloat16 [N, K]; scale and zero: [N, G]."""
    k, groups = codes.shape[1], scale.shape[1]
    if g_idx is None or bool((g_idx < 0).all()):
        g_idx = torch.arange(k) // -(-k // groups)
    group = g_idx.long()
    return ((codes.float() - zero[:, group]) * scale[:, group]).bfloat16()


def _matrix_shape(scale: torch.Tensor) -> tuple[int, int]:
    if scale.dim() == 2:
        return scale.shape[0], scale.shape[1]
    return max(1, scale.numel()), 1


def _settings(source: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the quantization settings of a source, wherever they stand."""
    for holder in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in _CONFIG_KEYS:
            if isinstance(holder.get(key), dict):
                return dict(holder[key])
    for name in ("quantize_config.json", "quant_config.json"):
        if (source / name).is_file():
            return dict(json.loads((source / name).read_text()))
    return {}


def _without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_quantization(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _CONFIG_KEYS
    }
