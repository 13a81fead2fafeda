"""What tensor names tell: which modules vLLM merges, which are experts, which it cannot quantize, what it calls them.

Architectures are recognised by these names alone; no model code is run.
"""

import re
import sys
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from convert_w4a8.checkpoint.safetensors_file import TensorInfo, TensorSpec

_NUMBER = re.compile(r"\d+")
_EXPERT = re.compile(r"^(?P<layer>.+)\.experts\.(?P<expert>\d+)\.(?P<projection>[^.]+)$")

_MERGES: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("q_proj", "k_proj", "v_proj"), ("qkv_proj",)),
    (("gate_proj", "up_proj"), ("gate_up_proj",)),
    (("w1", "w3"), ("w13", "gate_up_proj")),
    (("q_a_proj", "kv_a_proj_with_mqa"), ("fused_qkv_a_proj",)),
    (("in_proj_qkv", "in_proj_z"), ("in_proj_qkvz",)),
    (("in_proj_b", "in_proj_a"), ("in_proj_ba",)),
    (("c_fc_0", "c_fc_1"), ("gate_up_proj",)),
    (("query", "key", "value"), ("qkv_proj",)),
    (("wq", "wk", "wv"), ("qkv_proj", "merged_qkv")),
)
"""Shards, and what vLLM calls the parallel linear layer into which it merges them: the `packed_modules_mapping` of its
models, 0.25.1 to 0.33.0. Models that give one layer another name differ in the second part only."""
_MERGE_OF = {shard: merge for merge in _MERGES for shard in merge[0]}

_LM_HEADS = frozenset({"lm_head", "embed_out"})
_TOP_LM_HEADS = frozenset({"output", "output_layer"})
"""Output projections too, where they lie outside the blocks: InternLM2's and ChatGLM's."""
_EMBEDDING = re.compile(r"embed_tokens\w*|embed_in|embeddings?|embed|word_embeddings|tok_embeddings|wte|wpe")
_ROUTER = re.compile(
    r"^(?:(?P<parent>.*?)\.)?(?:(?P<plain>gate|wg)|router|shared_experts?_gate|(?:text|vision)_experts_gate)"
    r"(?:\.(?:layer|proj|classifier|wg|linear))?$"
)
_EXPERT_COUNT = re.compile(r"(?:num|n)_(?:local_|routed_)?experts|moe_num_experts|num_moe_experts")

_BLOCK = re.compile(r"^(?P<above>(?:.*?\.)?(?:layers|h|blocks?|layer))\.(?P<number>\d+)(?=\.)")
_OTHER_PARTS = re.compile(r"vis|image|audio|speech|tower|encoder|projector|connector|talker|code2wav|resampler")
"""Parts of a model that are no language model, by words in the names of what is above their blocks."""

# vLLM's Mixtral knows its experts by Mistral's names only; transformers 5 and GPTQModel write Llama's.
_MIXTRAL_RENAMES = (
    (re.compile(r"\.mlp\.gate(?=\.|$)"), ".block_sparse_moe.gate"),
    (re.compile(r"\.mlp\.experts\.(\d+)\.gate_proj(?=\.|$)"), r".block_sparse_moe.experts.\1.w1"),
    (re.compile(r"\.mlp\.experts\.(\d+)\.down_proj(?=\.|$)"), r".block_sparse_moe.experts.\1.w2"),
    (re.compile(r"\.mlp\.experts\.(\d+)\.up_proj(?=\.|$)"), r".block_sparse_moe.experts.\1.w3"),
)


_LLAMA_NAMES = (
    (re.compile(r"(^|\.)block_sparse_moe\."), r"\1mlp."),
    (re.compile(r"(\.experts\.\d+)\.w1(?=\.|$)"), r"\1.gate_proj"),
    (re.compile(r"(\.experts\.\d+)\.w2(?=\.|$)"), r"\1.down_proj"),
    (re.compile(r"(\.experts\.\d+)\.w3(?=\.|$)"), r"\1.up_proj"),
)


def in_transformers(name: str) -> str:
    """Return what transformers calls a module or tensor: Mixtral's experts by Llama's names."""
    for pattern, replacement in _LLAMA_NAMES:
        name = pattern.sub(replacement, name)
    return name


def block_of(name: str) -> tuple[str, int] | None:
    """Return where the decoder block lies that a tensor or module belongs to: (`model.layers`, 3); None for others.

    Blocks of vision and audio towers are none of the language model.
    """
    match = _BLOCK.match(name)
    return None if match is None or _OTHER_PARTS.search(match["above"]) else (match["above"], int(match["number"]))


def is_expert(module: str) -> bool:
    """Whether a linear module is one projection of one expert of a mixture."""
    return _EXPERT.match(module) is not None


def is_lm_head(module: str) -> bool:
    """Whether a linear module is the output projection, which vLLM's W4A8 kernels do not serve."""
    parent, _, leaf = module.rpartition(".")
    if leaf == "head" and parent.endswith("shared_head"):  # DeepSeek's, of its MTP layers
        return True
    return leaf in _LM_HEADS or (leaf in _TOP_LM_HEADS and not re.search(r"\d", parent))


def is_embedding(module: str) -> bool:
    """Whether a module is a table of embeddings, which is no linear layer."""
    return _EMBEDDING.fullmatch(module.rpartition(".")[2]) is not None


def is_router(module: str, mixtures: Collection[str]) -> bool:
    """Whether a linear module chooses experts; `mixtures` are the modules that have some (`find_mixtures`).

    vLLM builds most routers without the quantization, and all of them work without it.
    """
    match = None if ".experts." in module else _ROUTER.match(module)
    return match is not None and (match["plain"] is None or match["parent"] in mixtures)


def mixture_of(name: str) -> str | None:
    """Return the module that has the experts to which a module or tensor belongs: what is before `.experts`."""
    mixture, experts, _ = name.rpartition(".experts.")
    return mixture if experts else name.removesuffix(".experts") if name.endswith(".experts") else None


def find_mixtures(tensors: Iterable[TensorInfo | TensorSpec], config: Mapping[str, Any]) -> set[str]:
    """Return the modules that have experts, by the names of tensors; also those with experts in 3-D tensors."""
    counts = _expert_counts(config)
    found = set()
    for tensor in tensors:
        mixture = mixture_of(tensor.name)
        if mixture is None and _holds_experts(tensor, counts):
            mixture = _owner(tensor.name).rpartition(".")[0]
        if mixture:
            found.add(mixture)
    return found


def find_stacked_mixtures(tensors: Iterable[TensorInfo | TensorSpec], config: Mapping[str, Any]) -> dict[str, set[str]]:
    """Return mixture → tensors for the experts that lie in one tensor for all, as most models' do in transformers 5.

    vLLM calls the layer that they make `MIXTURE.experts`.
    """
    counts = _expert_counts(config)
    found: dict[str, set[str]] = {}
    for tensor in tensors:
        mixture = mixture_of(tensor.name)
        if mixture is not None:
            inside = tensor.name[len(mixture) + len(".experts.") :]
            if len(tensor.shape) >= 2 and not inside[:1].isdigit():
                found.setdefault(mixture, set()).add(tensor.name)
        elif _holds_experts(tensor, counts):
            found.setdefault(_owner(tensor.name).rpartition(".")[0], set()).add(tensor.name)
    return found


def _holds_experts(tensor: TensorInfo | TensorSpec, counts: Collection[int]) -> bool:
    """Whether a tensor outside `.experts` is [experts, N, K], such as Granite's `input_linear.weight`."""
    return len(tensor.shape) == 3 and tensor.shape[0] in counts and tensor.shape[1] > 1 and "conv" not in tensor.name


def _owner(tensor: str) -> str:
    """Return the module that a tensor belongs to: `x.y` of `x.y.weight`, and of a parameter `x.y` too."""
    return tensor.removesuffix(".weight")


def _expert_counts(config: Mapping[str, Any]) -> set[int]:
    """Return the numbers of experts that a model's configuration, or one of its parts, names."""
    found = set()
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= _expert_counts(value)
        elif isinstance(value, int) and value > 1 and _EXPERT_COUNT.fullmatch(str(key)):
            found.add(value)
    return found


def merged_name(module: str) -> str:
    """Return the name under which vLLM merges a module with its siblings; its own name if it stays alone."""
    return merged_names(module)[0]


def merged_names(module: str) -> tuple[str, ...]:
    """Return the names that vLLM's models give to what a module is merged into; its own name if it stays alone."""
    parent, dot, leaf = module.rpartition(".")
    names = _MERGE_OF[leaf][1] if leaf in _MERGE_OF else (leaf,)
    return tuple(f"{parent}{dot}{name}" for name in names)


def shards_of(module: str) -> tuple[str, ...]:
    """Return all modules that vLLM merges with this one, itself included, whether they exist or not."""
    parent, dot, leaf = module.rpartition(".")
    shards = _MERGE_OF[leaf][0] if leaf in _MERGE_OF else (leaf,)
    return tuple(f"{parent}{dot}{shard}" for shard in shards)


def fusion_key(module: str) -> str:
    """Return the name of all that must be quantized alike: a merged linear layer, or all experts of a layer."""
    match = _EXPERT.match(module) if ".experts." in module else None
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
    return {"lm_head", *(module for tensor in tensors if (module := linear_module(tensor)))}


def linear_module(tensor: TensorInfo | TensorSpec) -> str | None:
    """Return the module of which a tensor is the unquantized matrix, if vLLM holds that in a linear layer."""
    module, _, role = tensor.name.rpartition(".")
    if role != "weight" or len(tensor.shape) != 2:
        return None
    leaf = module.rpartition(".")[2]
    is_table = re.search(r"embed|norm|wte|wpe", leaf) and not leaf.endswith(("proj", "projection"))
    return None if is_table else module
