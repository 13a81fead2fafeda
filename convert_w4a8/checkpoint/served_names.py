"""Under which names vLLM asks whether a layer is quantized, as far as the names of a checkpoint tell.

vLLM asks for merged layers and for the experts of a layer together, and its models put their language model under
another prefix than the checkpoint does. So an entry of `ignore` that is a pattern has to be tried on all of these.
"""

import re
from collections.abc import Collection, Iterable

from convert_w4a8.checkpoint.names import fusion_key, is_expert, merged_names
from convert_w4a8.checkpoint.vllm_models import VllmModel

_PROJECTIONS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
"""What vLLM's models call the projections of an expert. Of a layer's experts, compressed-tensors asks for the first."""
_PREFIXES = ("", "model.", "language_model.", "language_model.model.", "model.language_model.")
PREFIX_PARTS = frozenset({"model", "language_model"})
"""What the prefixes consist of, under which vLLM puts a language model."""
_ROOTS = frozenset({"model", "language_model", "text_model", "thinker", "transformer", "backbone", "llm", "vlm"})

_CALLED_OTHERWISE: tuple[tuple[frozenset[str], re.Pattern[str], str], ...] = (
    (
        frozenset({"granitemoehybrid", "falcon_h1", "jamba"}),
        re.compile(r"\.mamba(?=\.)"),
        ".mixer",
    ),
    (frozenset({"falcon_h1"}), re.compile(r"\.self_attn(?=\.)"), ""),
    (frozenset({"minimax_m2"}), re.compile(r"\.block_sparse_moe(?=\.)"), ".mlp"),
    (frozenset({"exaone"}), re.compile(r"^transformer(?=\.)"), "model"),
    # transformers' own model, which vLLM runs where it has none of that architecture
    (frozenset({"phimoe"}), re.compile(r"\.block_sparse_moe\.gate$"), ".mlp.router"),
    (frozenset({"whisper"}), re.compile(r"^(?:model\.)?((?:en|de)coder\.layers\.\d+)(?=\.)"), r".\1.layers"),
    (
        frozenset({"whisper"}),
        re.compile(r"^(?:model\.)?((?:en|de)coder\.layers\.\d+)\.(?=fc[12]$)"),
        r".\1.layers.mlp.",
    ),
    (
        frozenset({"gemma3n", "gemma3n_text"}),
        re.compile(r"\.(?=(?:per_layer_model_projection|altup_projections)(?:\.|$))"),
        ".self_decoder.",
    ),
    # vLLM's mapper takes the first `.model` out again.
    (
        frozenset({"aria"}),
        re.compile(r"^(?:model\.language_model|language_model\.model)(?=\.layers\.)"),
        "language_model.model.model",
    ),
)
"""Model types whose layers have another name where vLLM asks whether they are quantized (`prefix`) than where it loads
them, which no mapper of vLLM's says."""

_ZAMBA2_LAYER = re.compile(
    r"model\.layers\.(?P<number>\d{1,4})\.(?:(?P<block>shared_transformer\.(?:self_attn\.)?)|(?:mamba_decoder\.)?(?P<mixer>mamba\.))?"
    r"(?P<rest>.+)"
)

_MAPPED_AWAY: tuple[tuple[frozenset[str], re.Pattern[str]], ...] = (
    (frozenset({"gpt_oss"}), re.compile(r"\.experts\.0\.down_proj$")),
)
"""Names by which vLLM asks for layers of some model types, and which the mapper of their model changes in `ignore`."""


def also_called(model: VllmModel, modules: Collection[str]) -> set[str]:
    """Return the other names under which vLLM's model asks for some modules, and for what it alone merges them into."""
    merged = {name for module in modules if not is_expert(module) and (name := model.merged_in(module))}
    modules = {*modules, *merged}
    rules = [(pattern, new) for types, pattern, new in _CALLED_OTHERWISE if not types.isdisjoint(model.names)]
    found = merged | {
        other for module in modules for pattern, new in rules if (other := pattern.sub(new, module)) != module
    }
    if "zamba2" in model.names:
        found |= {name for module in modules if (name := _called_in_zamba2(module, model.hybrid_layers))}
    return found


def _called_in_zamba2(module: str, hybrid_layers: int) -> str | None:
    """Return how Zamba2 calls a layer: its blocks of attention all alike, other layers by a number behind these."""
    match = _ZAMBA2_LAYER.match(module)
    if match is None:
        return None
    if match["block"]:
        return f"model.{match['rest']}"
    return f"{hybrid_layers + int(match['number'])}.{'mixer.' if match['mixer'] else ''}{match['rest']}"


def said_by_patterns(model: VllmModel, modules: Iterable[str]) -> set[str]:
    """Return the modules that only a pattern can name, which vLLM's mappers leave alone."""
    rules = [pattern for types, pattern in _MAPPED_AWAY if not types.isdisjoint(model.names)]
    return {module for module in modules if any(rule.search(module) for rule in rules)}


def served_names(modules: Iterable[str]) -> set[str]:
    """Return all names under which vLLM may ask for linear modules that are quantized: merged, and moved."""
    return {prefix + core for name in asked_names(modules) for core in _cores(name) for prefix in _PREFIXES}


def asked_names(modules: Iterable[str]) -> set[str]:
    """Return the names under which vLLM asks for linear modules, where its model has the checkpoint's prefixes."""
    found: set[str] = set()
    experts: set[str] = set()
    for module in modules:
        key = fusion_key(module)
        if key.endswith(".experts"):
            experts.add(key)
        else:
            found.update((module, *merged_names(module)))
    return found.union(*map(expert_names, experts))


def expert_names(experts: str) -> tuple[str, ...]:
    """Return the names under which vLLM 0.25.1 to 0.33.0 asks for the experts of a layer, `….experts`."""
    return (experts, *(f"{experts}.0.{name}" for names in _PROJECTIONS for name in names))


def _cores(name: str) -> tuple[str, ...]:
    """Return a name as it is, and without what stands before its blocks."""
    parts = name.split(".")
    start = 0
    while start < len(parts) - 1 and parts[start] in _ROOTS:
        start += 1
    return (name, ".".join(parts[start:]))
