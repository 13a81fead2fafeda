"""What a converted checkpoint needs at serving time: weights from its tensors, KV cache from its config.json.

The KV cache is computed only where the configuration says how. What it leaves open is named, never guessed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from convert_w4a8.linear import GROUP_SIZE
from convert_w4a8.lut_format import TABLE_BYTES

KV_BYTES = {"BF16": 2, "FP8": 1}
"""Bytes of one cached value; FP8's scales, one or two a layer, do not show."""
_LENGTHS = (4096, 32768)
_TEXT_CONFIGS = ("text_config", "llm_config", "language_config")
# With one of these set, layers differ in a way that has no common convention, or keep something else than keys and
# values: state-space and linear-attention hybrids, caches shared between layers, sparse attention with an index.
_UNKNOWN = (
    "attn_layer_period",
    "attn_type_list",
    "block_configs",
    "cross_attention_layers",
    "full_attention_interval",
    "hybrid_override_pattern",
    "index_topk",
    "layers_block_type",
    "num_global_key_value_heads",
    "num_kv_shared_layers",
    "swa_num_key_value_heads",
)


@dataclass(frozen=True)
class WeightMemory:
    """Bytes of all weights. `rest` is what is not quantized, in every figure as OUT stores it.

    bf16: as if the quantized layers were in 16 bits. int8: in 8 bits, with an FP32 scale an output channel.
    int4: as W4A8 serves them, 4 bits, a table of 8 bytes a group and an FP32 scale an output channel.
    """

    quantized_weights: int
    rest: int
    bf16: int
    int8: int
    int4: int


@dataclass(frozen=True)
class KvCache:
    """KV cache of one sequence. `lengths` are in tokens, the figures in values (numbers cached), not bytes.

    per_token: while every layer still keeps every token. unknown: why there are no figures, or None.
    note: how to read them.
    """

    per_token: int
    per_sequence: Mapping[int, int]
    unknown: str | None
    note: str


def weight_memory(shapes: Sequence[tuple[int, int]], rest: int) -> WeightMemory:
    """Add up layers of these (N, K) and `rest` bytes of everything else."""
    weights = sum(n * k for n, k in shapes)
    channels = 4 * sum(n for n, _ in shapes)
    return WeightMemory(
        quantized_weights=weights,
        rest=rest,
        bf16=2 * weights + rest,
        int8=weights + channels + rest,
        int4=weights // 2 + TABLE_BYTES * weights // GROUP_SIZE + channels + rest,
    )


def kv_cache(config: Mapping[str, Any]) -> KvCache:
    """Compute the KV cache from a config.json; of its language part, where that is nested."""
    text = _text_config(config)
    layers = text.get("num_hidden_layers")
    odd = [key for key in _UNKNOWN if text.get(key)]
    if odd:
        return _unknown(f"config.json sets {odd[0]}, whose cache this report does not know")
    if not _is_size(layers):
        return _unknown("config.json has no num_hidden_layers")
    values = _values_per_layer(text)
    if isinstance(values, str):
        return _unknown(values)
    note = f"{layers} layers × {values[1]}"
    kinds = text.get("layer_types")
    window = text.get("sliding_window")
    slides = _is_size(window) and text.get("use_sliding_window") is not False
    sliding = 0
    if isinstance(kinds, list):
        strange = sorted({str(kind) for kind in kinds} - {"full_attention", "sliding_attention"})
        if strange or len(kinds) != layers:
            return _unknown(
                f"layer_types has {', '.join(strange) or len(kinds)}, whose cache this report does not know"
            )
        sliding = kinds.count("sliding_attention")
        if sliding and not slides:
            return _unknown("layer_types has sliding_attention, but there is no sliding_window")
    elif slides:
        note += (
            f". An upper bound: sliding_window is {window:,}, but without layer_types it is not known which layers"
            " forget what is outside it"
        )
    reach = window if sliding and _is_size(window) else 0
    if sliding:
        note += f"; {sliding} of the layers keep only a window of {reach:,} tokens"
    per_layer = values[0]
    longest = text.get("max_position_embeddings")
    lengths = {length for length in _LENGTHS if length < longest} | {longest} if _is_size(longest) else _LENGTHS
    per_sequence = {
        length: per_layer * ((layers - sliding) * length + sliding * min(length, reach)) for length in sorted(lengths)
    }
    return KvCache(per_layer * layers, per_sequence, None, note)


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    for key in _TEXT_CONFIGS:
        nested = config.get(key)
        if isinstance(nested, Mapping):
            return nested
    return config


def _values_per_layer(text: Mapping[str, Any]) -> tuple[int, str] | str:
    """Return how many values a layer caches for one token, and in words; or why that is not known."""
    latent, rope = text.get("kv_lora_rank"), text.get("qk_rope_head_dim")
    if latent is not None:
        if not (_is_size(latent) and _is_size(rope)):
            return "config.json has kv_lora_rank, but no qk_rope_head_dim"
        # vLLM's latent-attention backends keep the compressed vector and the rotary part, once for all heads.
        return latent + rope, f"(kv_lora_rank {latent} + qk_rope_head_dim {rope}), multi-head latent attention"
    heads, attention_heads = text.get("num_key_value_heads"), text.get("num_attention_heads")
    if heads is None and text.get("model_type") == "llama":
        heads = attention_heads  # LlamaConfig's default; other architectures have others
    if not _is_size(heads):
        return "config.json has no single num_key_value_heads"
    head_dim, hidden = text.get("head_dim"), text.get("hidden_size")
    if head_dim is None and _is_size(hidden) and _is_size(attention_heads) and hidden % attention_heads == 0:
        head_dim = hidden // attention_heads
    if not _is_size(head_dim):
        return "config.json has neither head_dim nor hidden_size and num_attention_heads that give it"
    return 2 * heads * head_dim, f"2 (K, V) × {heads} KV heads × head_dim {head_dim}"


def _is_size(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _unknown(reason: str) -> KvCache:
    return KvCache(0, {}, reason, "")
