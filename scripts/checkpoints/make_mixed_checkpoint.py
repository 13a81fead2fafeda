"""Make a checkpoint of mixed precision from one in 16 bits: `make_mixed_checkpoint.py BF16_DIR OUT_DIR [options]`.

The MLPs, or experts, become INT4 (compressed-tensors, pack-quantized, groups of 128, symmetric), the attention FP8 by
block, output channel or tensor, or stays in BF16; in the files and settings of llm-compressor, format mixed-precision.
Weights are rounded to nearest, without a search, and nothing is taken from the package that converts them. With static
activations the input scales are those of inputs of at most --input-amax, which nothing has measured.
"""

import argparse
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

GROUP_SIZE = 128
FP8_MAX = 448.0
KINDS = ("fp8-block", "fp8-channel", "fp8-tensor", "bf16")
INT4_LAYERS = r".*\.(mlp|block_sparse_moe)\.(experts\.\d+\.|shared_experts?\.)?(gate|up|down)_proj"
ATTENTION = r".*\.self_attn\.[a-z_]+_proj"


def read_tensors(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of all files of a checkpoint, by name."""
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                yield name, file.get_tensor(name)


def to_int4(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Round [N, K] to nearest: weight_packed int32 [N, K/8] (code + 8, low nibble first), weight_scale [N, K/128]."""
    n, k = weight.shape
    groups = weight.float().view(n, k // GROUP_SIZE, GROUP_SIZE)
    scale = (groups.abs().amax(dim=-1).clamp(min=1e-8) / 7.5).bfloat16()
    codes = (groups / scale.float()[..., None]).round().clamp(-8, 7).to(torch.int64).view(n, k) + 8
    shifts = torch.arange(0, 32, 4)
    words = (codes.view(n, k // 8, 8) << shifts).sum(dim=-1)
    return {
        "weight_packed": torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32),
        "weight_scale": scale,
        "weight_shape": torch.tensor([n, k], dtype=torch.int64),
    }


def to_fp8(weight: torch.Tensor, kind: str, input_amax: float) -> dict[str, torch.Tensor]:
    """Round [N, K] to nearest: weight float8_e4m3fn [N, K], weight_scale, and for static activations input_scale."""
    n, k = weight.shape
    rows, columns = {"fp8-block": (128, 128), "fp8-channel": (1, k), "fp8-tensor": (n, k)}[kind]
    if n % rows or k % columns:
        sys.exit(f"a weight of {[n, k]} has no whole blocks of {[rows, columns]}")
    blocks = weight.float().view(n // rows, rows, k // columns, columns)
    scale = (blocks.abs().amax(dim=(1, 3)).clamp(min=1e-8) / FP8_MAX).bfloat16()
    codes = (blocks / scale.float()[:, None, :, None]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    tensors = {"weight": codes.view(n, k), "weight_scale": scale.view(1) if kind == "fp8-tensor" else scale}
    if kind == "fp8-tensor":
        tensors["input_scale"] = torch.tensor([input_amax / FP8_MAX], dtype=torch.bfloat16)
    return tensors


def quantization_args(**changes: Any) -> dict[str, Any]:
    """Return the settings of weights or activations as compressed-tensors writes them."""
    return {
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
        "group_size": None,
        "num_bits": 8,
        "observer": None,
        "observer_kwargs": {},
        "scale_dtype": None,
        "strategy": "tensor",
        "symmetric": True,
        "type": "float",
        "zp_dtype": None,
    } | changes


def config_groups(kind: str, *, fp8_activations: bool) -> dict[str, Any]:
    """Return a group for the INT4 layers, and one for the attention unless it stays in BF16."""
    token = quantization_args(strategy="token", dynamic=True)
    int4 = quantization_args(num_bits=4, type="int", strategy="group", group_size=GROUP_SIZE)
    groups = {
        "group_0": {
            "format": "pack-quantized",
            "input_activations": token if fp8_activations else None,
            "output_activations": None,
            "targets": [f"re:{INT4_LAYERS}$"],
            "weights": int4,
        }
    }
    if kind == "bf16":
        return groups
    strategy = kind.removeprefix("fp8-")
    weights = quantization_args(strategy=strategy, block_structure=[128, 128] if strategy == "block" else None)
    activations = {
        "block": quantization_args(strategy="group", group_size=128, dynamic=True),
        "channel": token,
        "tensor": quantization_args(),
    }[strategy]
    groups["group_1"] = {
        "format": "float-quantized",
        "input_activations": activations,
        "output_activations": None,
        "targets": ["re:.*self_attn.*"],
        "weights": weights,
    }
    return groups


def main() -> None:
    """Write the checkpoint, replacing an older one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("source", type=Path, help="a checkpoint in 16 bits: Llama, Qwen, a mixture of experts")
    parser.add_argument("out", type=Path)
    parser.add_argument("--attention", choices=KINDS, default="fp8-block")
    parser.add_argument("--fp8-activations", action="store_true", help="say W4A8 of the INT4 layers, not W4A16")
    parser.add_argument("--input-amax", type=float, default=32.0, help="of the inputs of attention, for fp8-tensor")
    args = parser.parse_args()
    config = json.loads((args.source / "config.json").read_text())
    if "quantization_config" in config:
        parser.error(f"{args.source} is quantized")
    if args.out.exists() and not (args.out / "config.json").is_file():
        parser.error(f"{args.out} exists and is not a checkpoint; choose another directory")
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)

    tensors: dict[str, torch.Tensor] = {}
    counts = {"INT4": 0, args.attention: 0}
    for name, tensor in read_tensors(args.source):
        module = name.removesuffix(".weight")
        if re.fullmatch(INT4_LAYERS, module):
            parts, kind = to_int4(tensor), "INT4"
        elif re.fullmatch(ATTENTION, module) and args.attention != "bf16":
            parts, kind = to_fp8(tensor, args.attention, args.input_amax), args.attention
        else:
            tensors[name] = tensor
            continue
        counts[kind] += 1
        tensors |= {f"{module}.{role}": part.contiguous() for role, part in parts.items()}
    save_file(tensors, args.out / "model.safetensors", {"format": "pt"})
    groups = config_groups(args.attention, fp8_activations=args.fp8_activations)
    config["quantization_config"] = {
        "config_groups": groups,
        "format": "mixed-precision" if len(groups) > 1 else "pack-quantized",
        "global_compression_ratio": None,
        "ignore": ["lm_head", "re:.*mlp.gate$", *(["re:.*self_attn.*"] if args.attention == "bf16" else [])],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.20.0",
    }
    (args.out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for path in args.source.iterdir():
        ours = path.name in {"config.json", "README.md"} or path.name.endswith((".safetensors", ".index.json"))
        if path.is_file() and not ours:
            shutil.copy(path, args.out)
    size = (args.out / "model.safetensors").stat().st_size
    said = ", ".join(f"{count} layers {kind}" for kind, count in counts.items() if count)
    print(f"{args.out}: {said}; the rest in 16 bits; {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
