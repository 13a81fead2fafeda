#!/usr/bin/env python3
"""Make a checkpoint of as many tensors as the largest have, from headers and holes: its files take little space.

    python scripts/bench/sparse_checkpoints.py OUT --kind kimi-k2 --tensors 1000000

Layers are small, so that the disk that a conversion asks for is there. The layers that a plan reads to predict the
error of new codes are filled with random weights; all others are holes, which a conversion would refuse as damaged.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from convert_w4a8.checkpoint.directory import open_checkpoint
from convert_w4a8.checkpoint.safetensors_file import TORCH_DTYPES, TensorInfo
from convert_w4a8.conversion.plan import make_plan
from convert_w4a8.conversion.prediction import sample
from convert_w4a8.options import Options, Policy

N = K = 256
EXPERTS = 384
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
TENSORS_PER_SHARD = 4096
Parts = Mapping[str, tuple[str, tuple[int, ...]]]
"""Name → dtype and shape."""


@dataclass(frozen=True)
class Kind:
    """A kind of checkpoint: the tensors of an expert's projection, those of a block beside its experts, settings."""

    parts: Parts
    others: Parts
    config: Mapping[str, Any]


KINDS = {
    # Kimi-K2: INT4 experts in groups of 32, everything else in 16 bits. The real one has 60 such blocks.
    "kimi-k2": Kind(
        parts={
            "weight_packed": ("I32", (N, K // 8)),
            "weight_scale": ("BF16", (N, K // 32)),
            "weight_shape": ("I32", (2,)),
        },
        others={
            "input_layernorm.weight": ("BF16", (K,)),
            "post_attention_layernorm.weight": ("BF16", (K,)),
            **{
                f"{name}.weight": ("BF16", (N, K))
                for name in (
                    *(f"self_attn.{part}" for part in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")),
                    "self_attn.o_proj",
                    "mlp.gate",
                    *(f"mlp.shared_experts.{projection}" for projection in PROJECTIONS),
                )
            },
        },
        config={
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            "quantization_config": {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|down)_proj.*"],
                "config_groups": {
                    "group_0": {
                        "targets": ["Linear"],
                        "weights": {
                            "num_bits": 4,
                            "type": "int",
                            "symmetric": True,
                            "strategy": "group",
                            "group_size": 32,
                        },
                    }
                },
            },
        },
    ),
    # A Qwen3-MoE in GPTQ, one group a channel, for which a g_idx of zeros is right.
    "gptq": Kind(
        parts={
            "qweight": ("I32", (K // 8, N)),
            "qzeros": ("I32", (1, N // 8)),
            "scales": ("F16", (1, N)),
            "g_idx": ("I32", (K,)),
        },
        others={"input_layernorm.weight": ("BF16", (K,)), "mlp.gate.weight": ("BF16", (N, K))},
        config={
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "quantization_config": {
                "quant_method": "gptq",
                "bits": 4,
                "group_size": K,
                "sym": True,
                "desc_act": False,
            },
        },
    ),
}


def tensors_of(kind: Kind) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    """Yield the tensors of block after block, for ever: name, dtype and shape."""
    block = 0
    while True:
        prefix = f"model.layers.{block}"
        yield from ((f"{prefix}.{name}", part) for name, part in kind.others.items())
        for expert in range(EXPERTS):
            for projection in PROJECTIONS:
                for role, part in kind.parts.items():
                    yield f"{prefix}.mlp.experts.{expert}.{projection}.{role}", part
        block += 1


def make_checkpoint(directory: Path, kind: Kind, tensors: int) -> int:
    """Write whole blocks with at least so many tensors into an existing directory; return how many there are."""
    per_block = len(kind.others) + EXPERTS * len(PROJECTIONS) * len(kind.parts)
    total = -(-tensors // per_block) * per_block
    shards = -(-total // TENSORS_PER_SHARD)
    weight_map: dict[str, str] = {}
    named = tensors_of(kind)
    for shard in range(shards):
        file_name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        header, end = {}, 0
        for _ in range(min(TENSORS_PER_SHARD, total - len(weight_map))):
            name, (dtype, shape) = next(named)
            nbytes = TORCH_DTYPES[dtype].itemsize * prod(shape)
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (end, end + nbytes)}
            weight_map[name] = file_name
            end += nbytes
        raw = json.dumps(header).encode()
        with (directory / file_name).open("wb") as file:
            file.write(len(raw).to_bytes(8, "little") + raw)
            file.truncate(8 + len(raw) + end)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(kind.config))
    fill_sample(directory)
    return total


def fill_sample(directory: Path) -> None:
    """Write random weights into the layers that a plan reads."""
    generator = torch.Generator().manual_seed(0)
    plan = make_plan(open_checkpoint(directory), Options(group_size=Policy.REQUANTIZE))
    for layer in sample(plan):
        for role, info in layer.spec.parts.items():
            if role in ("weight_packed", "qweight"):
                words = torch.randint(-(2**31), 2**31, info.shape, generator=generator)
                _write(info, words.int())
            elif role in ("weight_scale", "scales"):
                values = torch.rand(info.shape, generator=generator) * 0.01 + 0.005
                _write(info, values.to(TORCH_DTYPES[info.dtype]))
            elif role == "qzeros":  # 8, as version 1 stores it: the codes are kept
                _write(info, torch.full(info.shape, 0x77777777, dtype=torch.int32))
            elif role == "weight_shape":
                _write(info, torch.tensor([N, K], dtype=TORCH_DTYPES[info.dtype]))


def _write(info: TensorInfo, tensor: torch.Tensor) -> None:
    with info.path.open("r+b") as file:
        file.seek(info.start)
        file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())


def main(arguments: Sequence[str] | None = None) -> None:
    """Make a checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--kind", choices=sorted(KINDS), default="kimi-k2")
    parser.add_argument("--tensors", type=int, default=1_000_000, help="at least so many")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    print(f"{make_checkpoint(args.out, KINDS[args.kind], args.tensors):,} tensors in {args.out}")


if __name__ == "__main__":
    main()
