"""What tensor names tell: which modules vLLM merges, which are experts, which it cannot quantize, what it calls them.

Architectures are recognised by these names alone; no model code is run.
"""

import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from convert_w4a8.checkpoint.safetensors_file import TensorInfo, TensorSpec

_NUMBER = re.compile(r"\d+")
_EXPERT = re.compile(r"^(?P<layer>.+)\.experts\.(?P<expert>\d+)\.(?P<projection>[^.]+)$")


# Shards that vLLM merges into one parallel linear layer (its models' packed_modules_mapping).
_MERGED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
    "w1": "w13",
    "w3": "w13",
}


# vLLM's Mixtral knows its experts by Mistral's names only; transformers 5 and GPTQModel write Llama's.
_MIXTRAL_RENAMES = (
    (re.compile(r"\.mlp\.gate(?=\.|$)"), ".block_sparse_moe.gate"),
    (re.compile(r"\.mlp\.experts\.(\d+)\.gate_proj(?=\.|$)"), r".block_sparse_moe.experts.\1.w1"),
    (re.compile(r"\.mlp\.experts\.(\d+)\.down_proj(?=\.|$)"), r".block_sparse_moe.experts.\1.w2"),
    (re.compile(r"\.mlp\.experts\.(\d+)\.up_proj(?=\.|$)"), r".block_sparse_moe.experts.\1.w3"),
)


def is_expert(module: str) -> bool:
    """Whether a linear module is one projection of one expert of a mixture."""
    return _EXPERT.match(module) is not None


def is_lm_head(module: str) -> bool:
    """Whether a linear module is the output projection, which vLLM's W4A8 kernels do not serve."""
    return module.rpartition(".")[2] == "lm_head"


def merged_name(module: str) -> str:
    """Return the name under which vLLM merges a module with its siblings; its own name if it stays alone."""
    parent, dot, leaf = module.rpartition(".")
    return f"{parent}{dot}{_MERGED.get(leaf, leaf)}"


def fusion_key(module: str) -> str:
    """Return the name of all that must be quantized alike: a merged linear layer, or all experts of a layer."""
    match = _EXPERT.match(module)
    return f"{match['layer']}.experts" if match else merged_name(module)


def output_name(name: str, config: Mapping[str, Any]) -> str:
    """Return the name under which vLLM looks for a tensor or module of this model."""
    if config.get("model_type") == "mixtral":
        for pattern, replacement in _MIXTRAL_RENAMES:
            name = pattern.sub(replacement, name)
    return name


def natural_key(name: str) -> str:
    """Sort key that orders layers.2 before layers.10, however long a number is.

    A number becomes its length and its digits, behind what sorts before every letter. A string is compared many times
    as fast as a list of parts, and takes a fifth of its memory: there may be a million.
    """
    return _NUMBER.sub(_number_key, name)


def _number_key(match: re.Match[str]) -> str:
    digits = match[0].lstrip("0")
    return f"\0{chr(min(len(digits), sys.maxunicode))}{digits}"


def linear_modules(tensors: Iterable[TensorInfo | TensorSpec]) -> set[str]:
    """Return the modules with an unquantized matrix that vLLM holds in a linear layer; lm_head also if it is tied."""
    modules = {"lm_head"}
    for tensor in tensors:
        module, _, role = tensor.name.rpartition(".")
        leaf = module.rpartition(".")[2]
        if role == "weight" and len(tensor.shape) == 2 and not re.search(r"embed|norm|wte|wpe", leaf):
            modules.add(module)
    return modules
