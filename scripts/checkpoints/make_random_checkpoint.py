"""Make large random checkpoints of known shapes: `make_random_checkpoint.py SHAPE OUT_DIR [--layers N]`.

Writes OUT_DIR/w4a16 and OUT_DIR/stock, compressed-tensors with the same tensors (hard links) and without or with FP8
activations, and OUT_DIR/lut, our format with the same codes and vLLM's own scales. They say nothing sensible, have no
tokenizer, and time what depends on shapes only. On a GPU where there is one.
"""

import argparse
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from convert_w4a8.encoding.lut_layout import reorder
from convert_w4a8.linear import GROUP_SIZE, Packing
from convert_w4a8.options import ScalesMode
from convert_w4a8.quantization.baselines import quantize_reference
from convert_w4a8.targets import lut as targets_lut

FORMATS = ("w4a16", "stock", "lut")


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama, or with experts of a Qwen3-MoE."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    head_dim: int = 128
    experts: int = 0
    experts_per_token: int = 8


SHAPES = {
    "llama-8b": Shape(4096, 14336, 32, 32, 8, 128256),
    # One block of Cohere's Command A, as a Llama: its attention and MLP have these linear layers.
    "command-a-block": Shape(12288, 33792, 1, 96, 8, 1024),
    "qwen3-30b-a3b": Shape(2048, 768, 48, 32, 4, 151936, experts=128),
    "qwen3-moe": Shape(2048, 768, 4, 32, 4, 4096, experts=32),
    # Each rank's part is a multiple of 128 (256 for experts) at tensor-parallel sizes 1, 2 and 4, with too few KV heads
    # for the last.
    "tp4": Shape(512, 1024, 4, 8, 2, 4096),
    "tp4-moe": Shape(512, 1024, 4, 8, 2, 4096, experts=8, experts_per_token=4),
    "tiny": Shape(256, 512, 2, 4, 2, 512, head_dim=64),
    "tiny-moe": Shape(256, 512, 2, 4, 2, 512, head_dim=64, experts=4),
}


def device() -> str:
    """Return where to make the weights. Not asked at import: who has asked cannot fork a process that uses CUDA."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def linears(shape: Shape, layer: int) -> Iterator[tuple[str, int, int]]:
    """Yield name, N and K of one decoder layer's quantized linear layers."""
    prefix = f"model.layers.{layer}"
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield f"{prefix}.self_attn.q_proj", q, shape.hidden
    yield f"{prefix}.self_attn.k_proj", kv, shape.hidden
    yield f"{prefix}.self_attn.v_proj", kv, shape.hidden
    yield f"{prefix}.self_attn.o_proj", shape.hidden, q
    for mlp in [f"mlp.experts.{expert}" for expert in range(shape.experts)] or ["mlp"]:
        yield f"{prefix}.{mlp}.gate_proj", shape.intermediate, shape.hidden
        yield f"{prefix}.{mlp}.up_proj", shape.intermediate, shape.hidden
        yield f"{prefix}.{mlp}.down_proj", shape.hidden, shape.intermediate


def plain(shape: Shape, layer: int) -> dict[str, torch.Tensor]:
    """Return one decoder layer's unquantized tensors."""
    prefix = f"model.layers.{layer}"
    norms = {f"{prefix}.{name}_layernorm.weight": shape.hidden for name in ("input", "post_attention")}
    if shape.experts:
        norms |= {f"{prefix}.self_attn.{name}_norm.weight": shape.head_dim for name in "qk"}
    tensors = {name: torch.ones(size, dtype=torch.bfloat16) for name, size in norms.items()}
    if shape.experts:
        tensors[f"{prefix}.mlp.gate.weight"] = gaussian(shape.experts, shape.hidden)
    return tensors


def gaussian(n: int, k: int) -> torch.Tensor:
    """Return a random bfloat16 [N, K] that keeps the size of what it multiplies."""
    return (torch.randn(n, k, device=device()) / math.sqrt(k)).bfloat16().cpu()


def random_linear(name: str, n: int, k: int, lut: bool, stock: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the tensors of one quantized layer, in compressed-tensors' form and in ours."""
    words = torch.randint(-(1 << 31), 1 << 31, (n, k // 8), dtype=torch.int64, device=device()).to(torch.int32)
    spread = 1 + torch.rand(n, k // GROUP_SIZE, device=device())
    scales = (spread * 0.15 / math.sqrt(k)).bfloat16()
    theirs, ours = {}, {}
    if stock:
        theirs = {
            f"{name}.weight_packed": words.cpu(),
            f"{name}.weight_scale": scales.cpu(),
            f"{name}.weight_shape": torch.tensor([n, k]),
        }
    if lut:
        group, channel = quantize_reference(scales.t().contiguous())
        ours = {
            f"{name}.weight_packed": reorder(words, Packing.PACK_QUANTIZED).cpu(),
            f"{name}.weight_scale": group.contiguous().cpu(),
            f"{name}.weight_chan_scale": channel.cpu(),
        }
    return theirs, ours


def model_config(shape: Shape) -> dict[str, Any]:
    """Return config.json without the quantization."""
    moe = {
        "num_experts": shape.experts,
        "num_experts_per_tok": min(shape.experts_per_token, shape.experts),
        "moe_intermediate_size": shape.intermediate,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    }
    return {
        "architectures": ["Qwen3MoeForCausalLM" if shape.experts else "LlamaForCausalLM"],
        "model_type": "qwen3_moe" if shape.experts else "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocabulary,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "dtype": "bfloat16",
        **(moe if shape.experts else {}),
    }


def quantization_config(kind: str, shape: Shape) -> dict[str, Any]:
    """Return the block that says what the tensors are."""
    gates = [f"model.layers.{layer}.mlp.gate" for layer in range(shape.layers)] if shape.experts else []
    ignore = ["lm_head", *gates]
    if kind == "lut":
        conversion = {"tool": "make_random_checkpoint.py"}
        return targets_lut.quantization_config({}, ignore, ScalesMode.REFERENCE, conversion)
    symmetric = {"symmetric": True, "observer": None}
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP_SIZE, "dynamic": False}
    tokens = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True} | symmetric
    group = {
        "targets": ["Linear"],
        "format": "pack-quantized",
        "weights": weights | symmetric,
        "input_activations": tokens if kind == "stock" else None,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ignore,
        "config_groups": {"group_0": group},
    }


def make(shape: Shape, out: Path, formats: tuple[str, ...] = FORMATS) -> dict[str, Path]:
    """Write the checkpoints and return their directories by format."""
    torch.manual_seed(0)
    directories = {kind: out / kind for kind in formats}
    for kind, directory in directories.items():
        directory.mkdir(parents=True)
        config = model_config(shape) | {"quantization_config": quantization_config(kind, shape)}
        (directory / "config.json").write_text(json.dumps(config, indent=1))
    first_stock = next((kind for kind in formats if kind != "lut"), None)
    index: dict[str, dict[str, str]] = {kind: {} for kind in formats}

    def write(file: str, tensors: dict[str, dict[str, torch.Tensor]]) -> None:
        for kind, named in tensors.items():
            if named:
                save_file(named, directories[kind] / file, metadata={"format": "pt"})
        for kind in formats:
            if kind not in tensors and first_stock:
                os.link(directories[first_stock] / file, directories[kind] / file)
            index[kind] |= dict.fromkeys(tensors.get(kind, tensors.get(first_stock or "", {})), file)

    written = [kind for kind in (first_stock, "lut" if "lut" in formats else None) if kind]
    ends = {
        "model.embed_tokens.weight": gaussian(shape.vocabulary, shape.hidden) * math.sqrt(shape.hidden),
        # Large enough that some tokens are likely, as in a trained model: log-probabilities then tell something.
        "lm_head.weight": gaussian(shape.vocabulary, shape.hidden) * 4,
        "model.norm.weight": torch.ones(shape.hidden, dtype=torch.bfloat16),
    }
    write("model-ends.safetensors", dict.fromkeys(written, ends))
    for layer in range(shape.layers):
        common = plain(shape, layer)
        tensors = {kind: dict(common) for kind in written}
        for name, n, k in linears(shape, layer):
            theirs, ours = random_linear(name, n, k, lut="lut" in written, stock=first_stock is not None)
            for kind in written:
                tensors[kind] |= ours if kind == "lut" else theirs
        write(f"model-{layer:03}.safetensors", tensors)
    for kind, directory in directories.items():
        total = disk_size(directory)
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index[kind]})
        (directory / "model.safetensors.index.json").write_text(text)
    return directories


def ensure(name: str, root: Path, layers: int | None = None) -> dict[str, Path]:
    """Make all formats of a shape (with at most so many layers) below `root` unless they are there; say how large."""
    shape = replace(SHAPES[name], layers=min(layers or SHAPES[name].layers, SHAPES[name].layers))
    out = root / f"{name}-{shape.layers}"
    start = time.perf_counter()
    if not out.is_dir():
        part = out.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        make(shape, part)
        part.rename(out)
    directories = {kind: out / kind for kind in FORMATS}
    sizes = ", ".join(f"{kind} {disk_size(directory) / 1e9:.2f} GB" for kind, directory in directories.items())
    print(f"{out.name}: {sizes}; {time.perf_counter() - start:.1f} s", flush=True)
    return directories


def disk_size(directory: Path) -> int:
    """Return the bytes of a checkpoint's shards."""
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def main() -> None:
    """Make the checkpoints and say how large they are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--vocabulary", type=int)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    shape = replace(shape, layers=args.layers or shape.layers, vocabulary=args.vocabulary or shape.vocabulary)
    start = time.perf_counter()
    for kind, directory in make(shape, args.out, tuple(args.formats)).items():
        print(f"{kind}: {directory}, {disk_size(directory) / 1e9:.2f} GB")
    print(f"{time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
