"""What decoder blocks lack as a whole, layers and norms, by comparison with the other blocks of a model."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from convert_w4a8.checkpoint.names import block_of
from convert_w4a8.conversion.contradictions import LLAMAS

REMEDY = "download or write the checkpoint again: vLLM would serve it with what the memory held"

_LLAMA_CLASS = re.compile(r"(?:Llama|LLaMA|Mistral|Mixtral|Qwen[23](?:Moe)?)(?:ForCausalLM|Model|For\w+Classification)")
"""Classes of these models whose blocks are alike; draft models for speculative decoding are not."""
_NORMS = {"input_layernorm", "post_attention_layernorm"}
_PARTS = re.compile(
    r"input_layernorm|post_attention_layernorm|self_attn(\.[qkvo]_proj|\.[qk]_norm)?"
    r"|(mlp|block_sparse_moe)(\.(gate|up|down)_proj|\.(gate|experts|shared_expert|shared_expert_gate)"
    r"|\.shared_expert\.(gate|up|down)_proj)?"
)
"""All that vLLM's classes of these models put into a block."""
_MIXTURE = re.compile(r"(mlp|block_sparse_moe)\.(gate|experts|shared_expert)")
_MERGED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def is_llama(config: Mapping[str, Any]) -> bool:
    """Whether vLLM builds all blocks of a model alike, or all mixtures and all others."""
    classes = config.get("architectures")
    return (
        str(config.get("model_type")) in LLAMAS
        and isinstance(classes, list)
        and all(_LLAMA_CLASS.fullmatch(str(name)) for name in classes)
    )


def lacking_of_llamas(modules: Iterable[str]) -> dict[str, set[str]]:
    """Return part of a model → what it lacks. modules: of a model of `LLAMAS`, whose blocks are alike."""
    modules = list(modules)
    found: dict[str, set[str]] = {}
    for above, blocks in _blocks(modules).items():
        kinds: dict[bool, set[str]] = {}
        for paths in blocks.values():
            kinds.setdefault(_is_mixture(paths), set()).update(filter(_PARTS.fullmatch, paths))
        common = {path for paths in kinds.values() for path in paths if path.startswith((*_NORMS, "self_attn"))}
        mlps = {path for paths in kinds.values() for path in paths if path in ("mlp", "block_sparse_moe")}
        for number, paths in blocks.items():
            own = {path for path in kinds[_is_mixture(paths)] if path.partition(".")[0] in paths & mlps}
            wanted = common | (own or mlps)  # of two names for the same, a block needs one
            found |= _by_part(f"{above}.{number}", _highest(wanted - paths))
        parent = above.rpartition(".")[0]
        around = {name.removeprefix(f"{parent}.") for name in modules if name.startswith(parent)}
        if common & _NORMS and not {"norm", "embed_tokens"} <= around:
            found[parent or "the model"] = {"norm", "embed_tokens"} - around
    return found


def lacking_of_blocks(modules: Iterable[str]) -> dict[str, set[str]]:
    """Return part of a model → what it lacks: of blocks that have a part of what a more frequent kind of block has."""
    found: dict[str, set[str]] = {}
    for above, blocks in _blocks(modules).items():
        kinds = Counter(map(frozenset, blocks.values()))
        for number, paths in blocks.items():
            fuller = [set(kind) for kind, count in kinds.items() if paths < kind and count > kinds[frozenset(paths)]]
            if fuller:
                found |= _by_part(
                    f"{above}.{number}", _highest(max(fuller, key=lambda kind: kinds[frozenset(kind)]) - paths)
                )
    return found


def listed(leaves: Iterable[str]) -> str:
    """Return names in words."""
    return " and ".join(sorted(leaves))


def _blocks(modules: Iterable[str]) -> dict[str, dict[int, set[str]]]:
    """Return above what → number of a block → what it has and what that is in. Experts are one thing.

    Merged layers count as what they are merged of.
    """
    found: dict[str, dict[int, set[str]]] = {}
    for module in modules:
        place = block_of(module)
        if place is not None:
            above, number = place
            paths = found.setdefault(above, {}).setdefault(number, set())
            paths.update(_paths(module.removeprefix(f"{above}.").partition(".")[2]))
    return found


def _paths(module: str) -> Iterator[str]:
    path = module.split(".")
    if "experts" in path:
        path = path[: path.index("experts") + 1]
    for leaf in _MERGED.get(path[-1], path[-1:]):
        yield ".".join((*path[:-1], leaf))
    yield from (".".join(path[:length]) for length in range(1, len(path)))


def _is_mixture(paths: Iterable[str]) -> bool:
    return any(map(_MIXTURE.fullmatch, paths))


def _highest(paths: set[str]) -> set[str]:
    """Return those that are in none of the others."""
    return {path for path in paths if not any(path.startswith(f"{other}.") for other in paths)}


def _by_part(block: str, paths: Iterable[str]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for path in sorted(paths):
        part, _, leaf = path.rpartition(".")
        found.setdefault(f"{block}.{part}" if part else block, set()).add(leaf)
    return found
