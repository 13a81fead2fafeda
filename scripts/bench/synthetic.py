"""Synthetic checkpoints to time conversions of: the layer shapes of Llama-8B, or many small experts, random weights."""

import json
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

GROUP = 128
SHARDS = 4
# (name, out_features, in_features) of one Llama-3.1-8B block.
LLAMA_8B = (
    ("self_attn.q_proj", 4096, 4096),
    ("self_attn.k_proj", 1024, 4096),
    ("self_attn.v_proj", 1024, 4096),
    ("self_attn.o_proj", 4096, 4096),
    ("mlp.gate_proj", 14336, 4096),
    ("mlp.up_proj", 14336, 4096),
    ("mlp.down_proj", 4096, 14336),
)
EXPERTS, EXPERT_HIDDEN, EXPERT_INTERMEDIATE = 128, 2048, 768  # Qwen3-30B-A3B
MOE = tuple(
    (f"mlp.experts.{expert}.{name}", n, k)
    for expert in range(EXPERTS)
    for name, n, k in (
        ("gate_proj", EXPERT_INTERMEDIATE, EXPERT_HIDDEN),
        ("up_proj", EXPERT_INTERMEDIATE, EXPERT_HIDDEN),
        ("down_proj", EXPERT_HIDDEN, EXPERT_INTERMEDIATE),
    )
)
INPUTS = ("awq", "awq-zp", "gptq", "compressed-tensors", "moe")
"""awq: every zero-point is 8; awq-zp: random zero-points, as AutoAWQ's own; moe: GPTQ experts."""


def random_words(*shape: int) -> "torch.Tensor":
    """Return int32 words of which every bit is random."""
    import torch

    return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32)


def layer_tensors(kind: str, name: str, n: int, k: int) -> Iterator[tuple[str, "torch.Tensor"]]:
    """Yield one layer's tensors in the input format `kind`."""
    import torch

    groups = k // GROUP
    scales = torch.rand(groups, n).mul_(0.01).add_(0.002).half()
    if kind.startswith("awq"):
        yield f"{name}.qweight", random_words(k, n // 8)
        zeros = random_words(groups, n // 8) if kind == "awq-zp" else torch.full((groups, n // 8), -0x77777778)
        yield f"{name}.qzeros", zeros.to(torch.int32)
        yield f"{name}.scales", scales
    elif kind == "compressed-tensors":
        yield f"{name}.weight_packed", random_words(n, k // 8)
        yield f"{name}.weight_scale", scales.t().contiguous().bfloat16()
        yield f"{name}.weight_shape", torch.tensor([n, k])
    else:
        yield f"{name}.qweight", random_words(k // 8, n)
        yield f"{name}.qzeros", torch.full((groups, n // 8), 0x77777777, dtype=torch.int32)
        yield f"{name}.scales", scales
        yield f"{name}.g_idx", (torch.arange(k) // GROUP).int()


def quantization_config(kind: str) -> dict[str, object]:
    """Return the quantization_config block that the tool which writes `kind` leaves."""
    if kind.startswith("awq"):
        return {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
    if kind == "compressed-tensors":
        weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
        group = {"targets": ["Linear"], "weights": weights}
        return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}
    return {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False}


def make_checkpoint(directory: Path, kind: str, gigabytes: float) -> None:
    """Write a synthetic checkpoint of about this size in 4 shards."""
    import torch
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    block = MOE if kind == "moe" else LLAMA_8B
    block_bytes = sum(n * k // 2 for _, n, k in block) * 1.04
    blocks = max(1, round(gigabytes * 1e9 / block_bytes))
    layers = [(f"model.layers.{i}.{name}", n, k) for i in range(blocks) for name, n, k in block]
    weight_map = {}
    for shard in range(SHARDS):
        file_name = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        chosen = layers[shard * len(layers) // SHARDS : (shard + 1) * len(layers) // SHARDS]
        tensors = {key: value for layer in chosen for key, value in layer_tensors(kind, *layer)}
        if shard == 0:
            tensors["model.embed_tokens.weight"] = torch.randn(1024, 4096).half()
        save_file(tensors, directory / file_name, {"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file_name))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float16"}
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": quantization_config(kind)}))


def repeat_block(directory: Path, gigabytes: float) -> None:
    """Let a checkpoint of `make_checkpoint` that is one block have as many as make this size, with the same numbers.

    They are a file each, which is made as fast as files are copied.
    """
    index = directory / "model.safetensors.index.json"
    weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
    files = sorted({directory / name for name in weight_map.values()})
    blocks = max(1, round(gigabytes * 1e9 / sum(path.stat().st_size for path in files)))
    for path in files:
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        header: dict[str, Any] = json.loads(data[8:start])
        parts = {name: info for name, info in header.items() if "layers.0." in name}
        places = [slice(start + low, start + high) for low, high in (info["data_offsets"] for info in parts.values())]
        stops = list(accumulate(place.stop - place.start for place in places))
        for block in range(1, blocks):
            ours = {
                name.replace("layers.0.", f"layers.{block}."): {**info, "data_offsets": [low, high]}
                for (name, info), low, high in zip(parts.items(), [0, *stops], stops, strict=False)
            }
            text = json.dumps({**ours, "__metadata__": {"format": "pt"}}).encode()
            text += b" " * (-len(text) % 8)
            file_name = f"{path.stem}-{block:05d}.safetensors"
            with (directory / file_name).open("wb") as file:
                file.write(len(text).to_bytes(8, "little") + text)
                file.writelines(memoryview(data)[place] for place in places)
            weight_map |= dict.fromkeys(ours, file_name)
    index.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
