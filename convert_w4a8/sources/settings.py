"""What the settings of a quantization may say: each format has a table of the keys that its tools write.

A key of the table says which values leave the bytes what the format's reader takes them for. Another value is refused,
or named in the plan where it changes only what is not carried over. A key that is in no table is named, too; refused is
one whose name speaks of a layout.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from convert_w4a8.errors import Problem
from convert_w4a8.text import shortened

Table = Mapping[str, "Setting"]

_OFF: tuple[object, ...] = (None, False, "", [], {})
"""What a setting says that is not used; 0 is among them, since it equals False."""
_LAYOUT = re.compile(
    r"(?:^|[_-])(?:pack\w*|layout|\w*format|order(?:ing)?|marlin|interleav\w*|swizzl\w*|shuffl\w*|perm(?:ut\w*)?"
    r"|rotat\w*|hadamard|transforms?|tile[sd]?|tiling)(?=$|[_-])"
)
_LONGEST = 60
"""Characters of a value or a key that are shown."""


@dataclass(frozen=True)
class Setting:
    """A known key.

    values: those beside "off" that are as read here; None where any is. Text is compared in lower case.
    wrong: those that are not, where all others are.
    reason, remedy: what another value means, and what to do; it is named only, not refused, where there is no remedy.
    layout: whether another value means that tensors have other names, dtypes or shapes.
    table: the keys of an object. of_each: whether it holds objects with these keys, by names that are free.
    """

    values: tuple[object, ...] | None = None
    wrong: tuple[object, ...] = ()
    reason: str = ""
    remedy: str = ""
    layout: bool = False
    table: Table | None = None
    of_each: bool = False


ANY = Setting()
"""Read by the format itself, which checks it, or without a bearing on the bytes."""


def only(*values: object, reason: str, remedy: str, layout: bool = False) -> Setting:
    """Return a key of which other values are refused."""
    return Setting(values, reason=reason, remedy=remedy, layout=layout)


def never(*values: object, reason: str, remedy: str) -> Setting:
    """Return a key of which these values are refused, since they mean another layout."""
    return Setting(wrong=values, reason=reason, remedy=remedy, layout=True)


def named(*values: object, reason: str) -> Setting:
    """Return a key of which other values are named in the plan."""
    return Setting(values, reason=reason)


def table_of(table: Table) -> Setting:
    """Return a key that holds an object."""
    return Setting(table=table)


def tables_of(table: Table) -> Setting:
    """Return a key that holds objects by free names, such as config_groups."""
    return Setting(table=table, of_each=True)


def any_of(keys: str) -> dict[str, Setting]:
    """Return a table of keys, parted by blanks, of which any value will do."""
    return dict.fromkeys(keys.split(), ANY)


def layout_problems(config: Mapping[str, Any], table: Table) -> Iterator[Problem]:
    """Yield the settings because of which there is no use in looking at the tensors."""
    unknown: dict[str, object] = {}
    for place, key, value, known in _deviations(config, table):
        if known is not None and known.layout:
            yield _problem(place, key, value, known)
        elif known is None and _LAYOUT.search(key.lower()):
            unknown.setdefault(key, value)
    for key, value in unknown.items():
        yield Problem(
            f"quantization_config: {_shortened(key)}",
            f"is {_shown(value)}, which no known tool writes, and may mean another layout of the bytes",
            "if the tensors are laid out as usual, remove the setting from the configuration",
        )


def setting_problems(config: Mapping[str, Any], table: Table) -> Iterator[Problem]:
    """Yield the other settings that say that the tensors are not all that there is to the layers."""
    for place, key, value, known in _deviations(config, table):
        if known is not None and known.remedy and not known.layout:
            yield _problem(place, key, value, known)


def _problem(place: str, key: str, value: object, known: Setting) -> Problem:
    return Problem(f"quantization_config: {place}{key}", f"is {_shown(value)}: {known.reason}", known.remedy)


def setting_notes(config: Mapping[str, Any], table: Table) -> Iterator[str]:
    """Yield what the plan has to name: values that change what is not carried over, and keys that are not known."""
    unknown: dict[str, str] = {}
    for place, key, value, known in _deviations(config, table):
        if known is None:
            if not _LAYOUT.search(key.lower()):
                unknown.setdefault(f"{_shortened(place + key)} = {_shown(value)}", key)
        elif not known.remedy:
            yield f"quantization_config: {place}{key} is {_shown(value)}: {known.reason}"
    if unknown:
        yield f"settings that are not known, and are passed over: {shortened(list(unknown))}"


def _deviations(
    config: Mapping[str, Any], table: Table, place: str = ""
) -> Iterator[tuple[str, str, object, Setting | None]]:
    """Yield (place, key, value, what is known of the key) for all values that are not as read here."""
    for key, value in config.items():
        known = table.get(key)
        if _is_one_of(value, _OFF):
            continue
        if known is None:
            yield place, key, value, None
        elif known.table is not None:
            inner = f"{place}{key}: "
            if not isinstance(value, dict):
                continue  # the format's reader says what is wrong
            if not known.of_each:
                yield from _deviations(value, known.table, inner)
                continue
            for name, entry in value.items():
                if isinstance(entry, dict):
                    yield from _deviations(entry, known.table, f"{inner}{_shortened(name)}: ")
        elif _is_one_of(value, known.wrong) or (known.values is not None and not _is_one_of(value, known.values)):
            yield place, key, value, known


def _is_one_of(value: object, values: Iterable[object]) -> bool:
    value = value.lower() if isinstance(value, str) else value
    return any(value == other for other in values)


def _shown(value: object) -> str:
    if isinstance(value, list | dict):  # which may be of any depth
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    return _shortened(repr(value))


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def without(config: Mapping[str, Any], key: str, drop: Callable[[Any], bool]) -> Mapping[str, Any]:
    """Return a configuration without those entries of the object at `key` of which `drop` says so."""
    entries = config.get(key)
    if not isinstance(entries, dict):
        return config
    return {**config, key: {name: entry for name, entry in entries.items() if not drop(entry)}}


# What several tools write beside the settings of their formats.

_BESIDE = "it changes what the model computes, and vLLM does not apply it"
ROTATION = only(
    reason="the weights are rotated, and need rotations of the activations that vLLM does not make",
    remedy="quantize the model again without rotations",
)
ADAPTER = only(
    reason=f"an adapter beside the weights; {_BESIDE}",
    remedy="remove the setting from the configuration to convert the weights without it",
)
PACKED_IN_INT32 = only(
    "int32",
    "torch.int32",
    reason="eight codes are read from each int32 word",
    remedy="save the model with pack_dtype int32",
    layout=True,
)

OF_TOOLS: Table = any_of(
    # GPTQModel, AutoGPTQ, AutoAWQ, optimum, transformers
    "quant_method method bits group_size sym desc_act static_groups lm_head meta backend checkpoint_format format"
    " version damp_percent damp_auto_increment true_sequential mse act_group_aware mock_quantization hyb_act uri"
    " model_name_or_path model_file_base_name quantizer tokenizer dataset model_seqlen batch_size pad_token_id"
    " max_input_length cache_block_outputs block_name_to_quantize module_name_preceding_first_block"
    " modules_in_block_to_quantize modules_to_not_convert modules_to_fuse do_fuse fuse_max_seq_len use_cuda_fp16"
    " use_exllama disable_exllama exllama_config max_memory hf_device_map compute_dtype parallel_packing"
) | {"rotation": ROTATION, "adapter": ADAPTER, "pack_dtype": PACKED_IN_INT32} | {
    "activation": named(reason="the source's own way to quantize activations, which become FP8 here"),
}  # fmt: skip

_W4A16 = "export the model with AutoRound's scheme W4A16"
OF_AUTO_ROUND: Table = any_of(
    "bits group_size sym act_group_size act_sym act_dynamic amp batch_size enable_minmax_tuning enable_norm_bias_tuning"
    " enable_quanted_input gradient_accumulate_steps iters lr low_gpu_mem_usage minmax_lr nsamples scale_dtype seqlen"
    " dataset provider autoround_version to_quant_block_names block_name_to_quantize regex_config quant_block_list"
    " supported_types static_kv_granularity static_attention_granularity vllm_backend momentum not_use_best_mse"
    " sampler seed"
) | {
    "data_type": only(
        *("int", "int_sym", "int_asym"), reason="only integers of 4 bits are read", remedy=_W4A16, layout=True
    ),
    "act_bits": only(
        *(16, 32),
        reason="activations are quantized, with scales and weights that are made for this",
        remedy=_W4A16,
    ),
    "act_data_type": ANY,
    "super_bits": only(reason="the scales are quantized themselves", remedy=_W4A16),
    "super_group_size": only(reason="the scales are quantized themselves", remedy=_W4A16),
    "rotation_config": ROTATION,
    "rotation_configs": ROTATION,
    "static_kv_dtype": named(reason="the output does not say how the KV cache is quantized"),
    "static_attention_dtype": named(reason="the output does not quantize attention"),
}  # fmt: skip
