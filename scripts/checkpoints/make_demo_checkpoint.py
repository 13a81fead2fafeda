"""Make a small Llama checkpoint in AWQ's GEMM format: `make_demo_checkpoint.py OUT_DIR [--zero-points]`.

The model is random (channels of different sizes, a few large input features), so it says nothing sensible. The files
are what the tools write: tensor names, shapes, dtypes, nibble order, config keys, metadata. They are GPTQModel's, which
has symmetric AWQ, or with --zero-points AutoAWQ 0.2.9's. Weights are rounded with their arithmetic but without the
activation-aware search, and nothing is taken from the package that converts them.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 512, 1024, 2, 8, 4, 64
GROUP_SIZE = 128
VOCAB = 288  # 256 bytes, 2 special tokens, and room to a multiple of 32
NIBBLE_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def random_weight(rng: np.random.Generator, n: int, k: int) -> np.ndarray:
    """Return float32 [n, k]: Gaussian, output channels of different sizes, some input features larger."""
    rows = np.exp(0.5 * rng.standard_normal((n, 1)))
    columns = np.where(rng.random((1, k)) < 0.02, 4.0, 1.0)
    weight: np.ndarray = rng.standard_normal((n, k)) * rows * columns / np.sqrt(k)
    return weight.astype(np.float32)


def pack_awq(codes: np.ndarray) -> torch.Tensor:
    """Pack uint8 [rows, columns] into int32 [rows, columns/8], eight columns a word in AWQ's order."""
    eights = codes.reshape(len(codes), -1, 8)[..., NIBBLE_ORDER].astype(np.uint32)
    packed = np.zeros(eights.shape[:-1], dtype=np.uint32)
    for i in range(8):
        packed |= eights[..., i] << np.uint32(4 * i)
    return torch.from_numpy(packed.view(np.int32))


def quantize_awq(weight: np.ndarray, *, zero_points: bool) -> dict[str, torch.Tensor]:
    """Round [N, K] to nearest in groups: qweight [K, N/8], qzeros [G, N/8], scales float16 [G, N].

    zero_points: from each group's least and largest weight; otherwise all are 8, and the group is symmetric.
    """
    n, k = weight.shape
    groups = weight.reshape(n, k // GROUP_SIZE, GROUP_SIZE)
    low, high = groups.min(axis=-1), groups.max(axis=-1)
    if not zero_points:
        high = np.maximum(high, -low)
        low = -high
    scales = (np.maximum(high - low, 1e-5) / 15).astype(np.float16)
    step = scales.astype(np.float32)
    zeros = np.clip(-np.round(low / step), 0, 15) if zero_points else np.full_like(low, 8)
    codes = np.clip(np.round(groups / step[..., None]) + zeros[..., None], 0, 15).astype(np.uint8)
    return {
        "qweight": pack_awq(np.ascontiguousarray(codes.reshape(n, k).T)),
        "qzeros": pack_awq(np.ascontiguousarray(zeros.astype(np.uint8).T)),
        "scales": torch.from_numpy(np.ascontiguousarray(scales.T)),
    }


def make_tensors(rng: np.random.Generator, *, zero_points: bool) -> dict[str, torch.Tensor]:
    """Return every tensor of the checkpoint."""
    linears = {
        "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
        "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
    }
    tensors = {"model.embed_tokens.weight": torch.from_numpy(random_weight(rng, VOCAB, HIDDEN)).half()}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for name, (n, k) in linears.items():
            for part, tensor in quantize_awq(random_weight(rng, n, k), zero_points=zero_points).items():
                tensors[f"{prefix}{name}.{part}"] = tensor
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = torch.ones(HIDDEN, dtype=torch.float16)
    tensors["model.norm.weight"] = torch.ones(HIDDEN, dtype=torch.float16)
    return tensors


def config(*, zero_points: bool) -> dict[str, object]:
    """Return config.json as transformers 4.51 and AutoAWQ or GPTQModel write it."""
    common = {"bits": 4, "group_size": GROUP_SIZE, "quant_method": "awq", "version": "gemm", "zero_point": zero_points}
    auto_awq = {"modules_to_not_convert": None}
    gptq_model = {
        "checkpoint_format": "gemm",
        "format": "gemm",
        "lm_head": False,
        "meta": {"quantizer": ["gptqmodel:7.6.0"]},
        "method": "awq",
        "pack_dtype": "int32",
    }
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "max_position_embeddings": 2048,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV_HEADS,
        "quantization_config": common | (auto_awq if zero_points else gptq_model),
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
        "transformers_version": "4.51.3",
        "vocab_size": VOCAB,
    }


def tokenizer() -> dict[str, object]:
    """Return a tokenizer.json with one token per byte, each under the character that byte-level BPE gives it."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    special = ["<s>", "</s>"]
    vocab = {token: i for i, token in enumerate(special + [characters[byte] for byte in range(256)])}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token, **flags} for i, token in enumerate(special)],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }


def main() -> None:
    """Write the checkpoint, replacing an older one."""
    names = [word for word in sys.argv[1:] if word != "--zero-points"]
    zero_points = "--zero-points" in sys.argv[1:]
    if len(names) != 1 or names[0].startswith("-"):
        sys.exit(__doc__)
    out = Path(names[0])
    if out.exists() and not (out / "config.json").is_file():
        sys.exit(f"{out} exists and is not a checkpoint; choose another directory")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    metadata = {"format": "pt", "lm_head.weight": "model.embed_tokens.weight"}
    save_file(make_tensors(np.random.default_rng(0), zero_points=zero_points), out / "model.safetensors", metadata)
    files = {
        "config.json": config(zero_points=zero_points),
        "generation_config.json": {"_from_model_config": True, "bos_token_id": 0, "eos_token_id": 1},
        "tokenizer.json": tokenizer(),
        "tokenizer_config.json": {
            "bos_token": "<s>",
            "eos_token": "</s>",
            "model_max_length": 2048,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
        "special_tokens_map.json": {"bos_token": "<s>", "eos_token": "</s>"},
    }
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    size = (out / "model.safetensors").stat().st_size
    kind = "with zero-points" if zero_points else "symmetric"
    print(f"{out}: Llama, {LAYERS} layers, AWQ GEMM, {kind}, groups of {GROUP_SIZE}, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
