"""Random models of transformers in 16 bits, small enough to be quantized in seconds, and calibration data for them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from convert_w4a8.samples.sample import Sample, SampleSet, TokenKind, count

transformers = pytest.importorskip("transformers", reason="the extra `quantize` is not installed")

VOCABULARY = 256
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
}
_EXPERTS: dict[str, Any] = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}


def write_llama(directory: Path, layers: int = 2, dtype: torch.dtype = torch.bfloat16, **settings: Any) -> Path:
    """Write a Llama."""
    config = transformers.LlamaConfig(**{**_SIZES, "intermediate_size": 256, "num_hidden_layers": layers, **settings})
    return _write(transformers.LlamaForCausalLM, config, directory, dtype)


def write_qwen3_moe(directory: Path, layers: int = 1, **settings: Any) -> Path:
    """Write a Qwen3-MoE with four experts a block, of which two are chosen."""
    sizes = {"intermediate_size": 256, "moe_intermediate_size": 256, "num_experts": 4, "num_experts_per_tok": 2}
    config = transformers.Qwen3MoeConfig(**{**_SIZES, **_EXPERTS, **sizes, "num_hidden_layers": layers, **settings})
    return _write(transformers.Qwen3MoeForCausalLM, config, directory, torch.bfloat16)


def write_mixtral(directory: Path, layers: int = 1) -> Path:
    """Write a Mixtral with four experts a block, of which two are chosen."""
    sizes = {"intermediate_size": 256, "num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": layers}
    config = transformers.MixtralConfig(**{**_SIZES, **_EXPERTS, **sizes})
    return _write(transformers.MixtralForCausalLM, config, directory, torch.bfloat16)


def write_gemma(directory: Path) -> Path:
    """Write a Gemma 3, whose norms multiply by 1 + weight, with norms behind attention and MLP too."""
    sizes = {"intermediate_size": 256, "num_hidden_layers": 1, "query_pre_attn_scalar": 64}
    config = transformers.Gemma3TextConfig(**{**_SIZES, **sizes})
    return _write(transformers.Gemma3ForCausalLM, config, directory, torch.bfloat16)


def write_gemma_that_sees(directory: Path) -> Path:
    """Write a Gemma 3 with a vision tower, whose decoder is `language_model.model` in the checkpoint."""
    sizes = {"intermediate_size": 256, "num_hidden_layers": 1, "query_pre_attn_scalar": 64, "initializer_range": 0.06}
    tower = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config={**_SIZES, **sizes},
        vision_config={**tower, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=1,
        image_token_index=255,
    )
    return _write(transformers.Gemma3ForConditionalGeneration, config, directory, torch.bfloat16)


def write_model(directory: Path, kind: str, config: str, layers: int = 2, **settings: Any) -> Path:
    """Write a model of any class of transformers, by the names of the class and of its configuration."""
    sizes = {**_SIZES, "intermediate_size": 256, "num_hidden_layers": layers, "pad_token_id": 0, **settings}
    return _write(getattr(transformers, kind), getattr(transformers, config)(**sizes), directory, torch.bfloat16)


def _write(kind: Any, config: Any, directory: Path, dtype: torch.dtype) -> Path:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(config).to(dtype)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.data.uniform_(0.5, 1.5)
    model.save_pretrained(directory)
    return directory


def fuse_experts(tensors: dict[str, torch.Tensor]) -> None:
    """Put the experts of each block into one tensor a projection, as transformers 5 holds them, in place."""
    for stack in sorted({name.split(".experts.")[0] for name in tensors if ".experts." in name}):
        count = sum(name.startswith(f"{stack}.experts.") and "down_proj" in name for name in tensors)
        gate, up, down = (
            torch.stack([tensors.pop(f"{stack}.experts.{expert}.{leaf}.weight") for expert in range(count)])
            for leaf in ("gate_proj", "up_proj", "down_proj")
        )
        tensors[f"{stack}.experts.gate_up_proj"] = torch.cat((gate, up), dim=1)
        tensors[f"{stack}.experts.down_proj"] = down


def samples_of(lengths: Sequence[int], masked: Sequence[int] = (), seed: int = 0) -> SampleSet:
    """Return samples of random tokens; of each, the first `masked` do not count."""
    generator = np.random.default_rng(seed)
    found = []
    for number, length in enumerate(lengths):
        masked_by = np.zeros(length, np.uint8)
        masked_by[: masked[number] if masked else 0] = 1
        tokens = generator.integers(0, VOCABULARY, length).astype(np.int32)
        found.append(Sample(tokens, np.full(length, TokenKind.TEXT, np.uint8), masked_by, f"sample {number}"))
    return SampleSet(tuple(found), count(found))
