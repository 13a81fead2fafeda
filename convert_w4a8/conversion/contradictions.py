"""Settings that contradict the tensors: warnings, since the tensors count, and since a model may be made otherwise.

From headers, and from the small tensors of some layers (zero-points, g_idx), which are read for this.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.checkpoint.names import merged_name
from convert_w4a8.checkpoint.safetensors_file import read_tensor
from convert_w4a8.checkpoint.settings import Settings, contradictions
from convert_w4a8.errors import ConvertError
from convert_w4a8.linear import GROUP_SIZE, SYMMETRIC_ZERO
from convert_w4a8.sources import LayerSpec, Source
from convert_w4a8.text import counted
from convert_w4a8.threads import one_thread_each

_LAYERS_READ = 32
"""Layers whose small tensors are looked at: evenly spread, so that the time does not grow with the model."""
_BYTES_READ = 64 << 20
"""The largest small tensor: a header may say anything, and nothing has been compared with the memory yet."""
_BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d{1,6})\.")
_EXPERT = re.compile(r"\.experts\.(\d{1,6})\.")
_Widths = tuple[str, int | None, str, int | None]
_LARGEST = 1_000_000
"""Blocks or experts of a model: a larger number is another mistake, and is not counted up to."""

LLAMAS = frozenset({"llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"})
"""Models that vLLM builds from these settings alone, and for which therefore layers and shapes are known."""


def setting_warnings(checkpoint: Checkpoint, specs: Sequence[LayerSpec]) -> Iterable[str]:
    """Yield what config.json says and others do not: files beside it, and shapes; widths, blocks and experts."""
    config = checkpoint.config
    yield from contradictions(checkpoint.root, Settings(checkpoint.quantization_config, checkpoint.settings_place))
    wrong: dict[str, list[str]] = {}
    right: Counter[str] = Counter()
    if str(config.get("model_type")) in LLAMAS:
        widths = _widths(config)
        shapes = {name.removesuffix(".weight"): info.shape for name, info in checkpoint.tensors.items()}
        shapes |= {spec.name: (spec.out_features, spec.in_features) for spec in specs}
        for module, shape in shapes.items():
            leaf = module.rpartition(".")[2]
            expected = widths.get(leaf)
            if merged_name(leaf) != leaf and shape and shape[0] % GROUP_SIZE:
                continue  # of which the size itself is warned
            if expected and len(shape) == 2:
                for key, width, size in ((*expected[:2], shape[0]), (*expected[2:], shape[1])):
                    said = f"{key} = {width}"
                    if width == size:
                        right[said] += 1
                    elif width is not None:
                        wrong.setdefault(said, []).append(f"{module} is {list(shape)}")
    for said, found in wrong.items():
        if len(found) <= right[said]:
            continue  # an odd layer, which models have; of another config.json most are wrong
        yield f"{said} in config.json, but {found[0]}" + (f" ({len(found)} such)" if len(found) > 1 else "")
    yield from _missing(checkpoint.tensors, _BLOCK, _size(config, "num_hidden_layers"), "num_hidden_layers", "block")
    for key in ("num_experts", "num_local_experts"):
        yield from _missing(checkpoint.tensors, _EXPERT, _size(config, key), key, "expert")


def _size(config: Mapping[str, Any], key: str) -> int | None:
    value = config.get(key)
    is_size = isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _LARGEST
    return value if is_size else None


def _widths(config: Mapping[str, Any]) -> dict[str, _Widths]:
    """Return (setting, its value) of N and of K for each projection; None where a setting is absent or is no size."""
    hidden, heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
    dim = _size(config, "head_dim") or (hidden // heads if hidden and heads else None)
    kv_heads = _size(config, "num_key_value_heads") or heads
    queries = heads * dim if heads and dim else None
    keys = kv_heads * dim if kv_heads and dim else None
    h, q, kv = "hidden_size", "num_attention_heads × head_dim", "num_key_value_heads × head_dim"
    return {
        "embed_tokens": ("vocab_size", _size(config, "vocab_size"), h, hidden),
        "lm_head": ("vocab_size", _size(config, "vocab_size"), h, hidden),
        "q_proj": (q, queries, h, hidden),
        "k_proj": (kv, keys, h, hidden),
        "v_proj": (kv, keys, h, hidden),
        "o_proj": (h, hidden, q, queries),
    } | _mlp(config, hidden)


def _mlp(config: Mapping[str, Any], hidden: int | None) -> dict[str, _Widths]:
    """Return those of the MLP; of a mixture only K or N, as experts, shared experts and dense layers differ."""
    is_mixture = any(_size(config, key) for key in ("num_experts", "num_local_experts"))
    inner = None if is_mixture else _size(config, "intermediate_size")
    into, out_of = (
        ("intermediate_size", inner, "hidden_size", hidden),
        ("hidden_size", hidden, "intermediate_size", inner),
    )
    return {"gate_proj": into, "up_proj": into, "down_proj": out_of, "w1": into, "w3": into, "w2": out_of}


def _missing(names: Iterable[str], pattern: re.Pattern[str], size: int | None, key: str, what: str) -> Iterable[str]:
    """Yield what is missing of 0 … size − 1 in the names of tensors, where there are any such names."""
    found = set() if size is None else {int(match[1]) for name in names if (match := pattern.search(name))}
    if size is None or not found:
        return
    missing = [number for number in range(size) if number not in found]
    if missing:
        yield f"{key} = {size} in config.json, but there are no tensors of {what} {missing[0]}" + (
            f" ({counted(len(missing), what)} missing)" if len(missing) > 1 else ""
        )


def content_warnings(source: Source, specs: Sequence[LayerSpec]) -> Iterable[str]:
    """Yield what the quantization's settings say and the zero-points and g_idx of some layers do not.

    What cannot be read is left to the conversion, which reads all of it.
    """
    some = specs[:: max(1, -(-len(specs) // _LAYERS_READ))]
    found: dict[str, list[str]] = {}
    for spec in some:
        small = [part for role, part in spec.parts.items() if "zero" in role or "g_idx" in role]
        if spec.dense or any(part.nbytes > _BYTES_READ for part in small):
            continue
        try:
            for warning in _warnings_of(source, spec):
                found.setdefault(warning, []).append(spec.name)
        except ConvertError:
            continue
    for warning, names in found.items():
        yield f"{warning}: {names[0]}" + (
            f" and {len(names) - 1} more of {len(some)} looked at" if len(names) > 1 else ""
        )


@one_thread_each()  # so little work is slower on several, if other processes have the cores
def _warnings_of(source: Source, spec: LayerSpec) -> list[str]:
    return list(_of_layer(source, spec))


def _of_layer(source: Source, spec: LayerSpec) -> Iterable[str]:
    if spec.symmetric and spec.has_zeros:
        zeros = source.read_zeros(spec, read_tensor)
        if zeros is not None and bool((zeros == zeros[0, 0]).all()):
            zero = int(zeros[0, 0])
            said = f"the settings say symmetric, but every zero-point is {zero}, not {SYMMETRIC_ZERO}"
            if zero == SYMMETRIC_ZERO - 1 and spec.has_g_idx and not spec.zero_offset:
                yield f"{said}, as in a file of checkpoint_format gptq that is marked gptq_v2"
            elif zero == SYMMETRIC_ZERO + 1 and spec.zero_offset:
                yield f"{said}, as in a file of checkpoint_format gptq_v2 that is marked gptq"
            else:
                yield said
        elif zeros is not None:
            yield "the settings say symmetric, but there are zero-points other than 8, which count"
    if spec.has_g_idx and not spec.act_order and source.read_g_idx(spec, read_tensor) is not None:
        yield "desc_act is false, but g_idx reorders the input channels, which counts"
