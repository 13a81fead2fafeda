"""compressed-tensors W4A16 and W4A8 checkpoints, as llm-compressor writes them.

pack-quantized: `weight_packed` int32 [N, K/8] (code + 8), `weight_scale` [N, G], `weight_zero_point` int32
[N/8, G] packed along N (zero + 8), `weight_shape`. int-quantized: `weight` int8 [N, K], `weight_zero_point` int8
[N, G]. `weight_g_idx` int32 [K] in files of older versions. Which layer has which scheme: `config_groups`; those of FP8
are carried over (`carried.py`).
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.checkpoint.safetensors_file import Reader, TensorInfo
from convert_w4a8.encoding.packing import pack_codes
from convert_w4a8.errors import ConvertError, Problem
from convert_w4a8.linear import SYMMETRIC_ZERO, Packing, W4Linear
from convert_w4a8.sources.base import LayerSpec
from convert_w4a8.sources.carried import CarriedLayer, find_by_groups, is_int4
from convert_w4a8.sources.checks import (
    check_bits,
    check_content,
    check_rank_two,
    check_scales,
    check_tensor,
    collect_parts,
    real_g_idx,
    real_zeros,
    resolve_groups,
    setting,
    unpack_words,
)
from convert_w4a8.sources.config_groups import group_of
from convert_w4a8.sources.ct_settings import SETTINGS, settings_of_int4
from convert_w4a8.sources.fused_experts import split_experts, stacks
from convert_w4a8.sources.settings import layout_problems, setting_notes, setting_problems
from convert_w4a8.text import counted

NAME = "compressed-tensors"

ROLES = ("weight_packed", "weight", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
ANCHOR = "weight_scale"


def matches(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint's quantization_config is of this format."""
    return checkpoint.quantization_config.get("quant_method") in ("compressed-tensors", "compressed_tensors")


def find_notes(checkpoint: Checkpoint) -> Iterable[str]:
    """Yield what the plan has to say of the settings."""
    return setting_notes(settings_of_int4(checkpoint.quantization_config), SETTINGS)


def _frozen(checkpoint: Checkpoint) -> Iterable[Problem]:
    """Yield a problem where quantized weights are stored in 16 bits: rounded, beside their scales, but not packed."""
    tensors = checkpoint.tensors
    frozen = [
        module
        for module in checkpoint.modules_with(ANCHOR)
        if (weight := tensors.get(f"{module}.weight")) is not None
        and weight.dtype in ("BF16", "F16", "F32")
        and f"{module}.weight_packed" not in tensors
    ]
    if frozen:
        yield Problem(
            f"{frozen[0]}.weight",
            f"is not compressed: {counted(len(frozen), 'weight')} of 16 or 32 bits beside scales,"
            f" quantization_status {checkpoint.quantization_config.get('quantization_status')!r}",
            "save the model with save_compressed=True",
        )


def find_layers(checkpoint: Checkpoint, problems: list[Problem]) -> list[LayerSpec]:
    """Return the quantized layers, from headers alone; what cannot be read is appended to `problems`."""
    config = checkpoint.quantization_config
    wrong = [*layout_problems(settings_of_int4(config), SETTINGS), *_frozen(checkpoint)]
    problems.extend([*wrong, *setting_problems(settings_of_int4(config), SETTINGS)])
    if wrong:
        return []
    layers = []
    stacked = stacks(checkpoint, ROLES)
    for module in checkpoint.modules_with(ANCHOR):
        if module in stacked:
            continue
        try:
            group = group_of(config, module)
            if is_int4(group):
                parts = collect_parts(checkpoint, module, ROLES)
                layers.append(_describe(module, parts, group["weights"]))
        except ConvertError as error:
            problems.append(error.problem)
    for stack, parts in stacked.items():
        try:
            scheme = group_of(config, stack)["weights"]
            experts = split_experts(stack, parts, checkpoint.config)
            layers += [_describe(module, of_expert, scheme) for module, of_expert in experts]
        except ConvertError as error:
            problems.append(error.problem)
    for name, info in checkpoint.tensors.items():
        if name.endswith(".weight") and info.dtype == "I8" and f"{name}_scale" not in checkpoint.tensors:
            problems.append(Problem(f"{name}_scale", "is missing", "download or write the checkpoint again"))
    return layers


def find_carried(checkpoint: Checkpoint, problems: list[Problem]) -> Iterable[CarriedLayer]:
    """Return the FP8 layers, which are carried over; other layers that are not INT4 are problems."""
    return find_by_groups(checkpoint, checkpoint.quantization_config, problems)


def _describe(module: str, parts: Mapping[str, TensorInfo], scheme: Mapping[str, Any]) -> LayerSpec:
    check_bits(module, scheme.get("num_bits"))
    if scheme.get("type", "int") != "int":
        raise ConvertError(module, f"has {scheme['type']} weights, not INT4", "only integer weights can be converted")
    packed = "weight_packed" in parts
    if packed and "weight" in parts:
        raise ConvertError(
            parts["weight"].name, "stands beside a packed weight of the same layer", "remove one of the two"
        )
    if packed:
        out_features, words = check_rank_two(parts["weight_packed"], "I32")
        in_features = words * 8
    elif "weight" in parts:
        out_features, in_features = check_rank_two(parts["weight"], "I8")
    else:
        raise ConvertError(module, "has a weight_scale but no weight", "download or write the checkpoint again")
    group_size, groups = _groups(module, scheme, in_features)
    check_tensor(module, parts, "weight_scale", ("F16", "BF16", "F32"), (out_features, groups), "[N, K/group_size]")
    if "weight_zero_point" in parts:
        if packed:
            check_tensor(module, parts, "weight_zero_point", ("I32",), (-(-out_features // 8), groups), "[N/8, G]")
        else:
            check_tensor(module, parts, "weight_zero_point", ("I8",), (out_features, groups), "[N, G]")
    elif not scheme.get("symmetric", True):
        raise ConvertError(f"{module}.weight_zero_point", "is missing", "download or write the checkpoint again")
    if "weight_g_idx" in parts:
        check_tensor(module, parts, "weight_g_idx", ("I32",), (in_features,), "[K]")
    if "weight_shape" in parts and parts["weight_shape"].whole is None:
        check_tensor(module, parts, "weight_shape", ("I64", "I32"), (2,), "[N, K]")
    return LayerSpec(
        name=module,
        source=NAME,
        out_features=out_features,
        in_features=in_features,
        group_size=group_size,
        symmetric="weight_zero_point" not in parts,
        act_order="weight_g_idx" in parts,
        parts=parts,
        has_zeros="weight_zero_point" in parts,
        has_g_idx="weight_g_idx" in parts,
    )


def _groups(module: str, scheme: Mapping[str, Any], in_features: int) -> tuple[int, int]:
    match scheme.get("strategy") or ("group" if scheme.get("group_size") else "channel"):
        case "channel":
            return in_features, 1
        case "group":
            return resolve_groups(module, setting(scheme, "group_size", int, 128), in_features)
        case strategy:
            raise ConvertError(module, f"strategy {strategy!r} is not supported", "use strategy group or channel")


def read_zeros(spec: LayerSpec, read: Reader) -> torch.Tensor | None:
    """Read one layer's zero-points uint8 [G, N]; None where all are 8."""
    info = spec.parts.get("weight_zero_point")
    if info is None:
        return None
    stored = read(info)
    if stored.dtype == torch.int8:
        return real_zeros(_unsigned(info, stored).t())
    return real_zeros(unpack_words(stored.t())[:, : spec.out_features])


def read_g_idx(spec: LayerSpec, read: Reader) -> torch.Tensor | None:
    """Read one layer's g_idx int32 [K]; None where it says only k // group_size.

    compressed-tensors begins with −1 and fills it in when a layer is calibrated; a −1 anywhere means that it was not.
    """
    info = spec.parts.get("weight_g_idx")
    if info is None:
        return None
    g_idx = read(info)
    return None if bool((g_idx == -1).any()) else real_g_idx(info, g_idx, spec)


def read_layer(spec: LayerSpec, read: Reader) -> W4Linear:
    """Read one layer's tensors.

    Raises:
        ConvertError: a tensor's content contradicts the headers.

    """
    parts = spec.parts
    if "weight_shape" in parts and parts["weight_shape"].whole is None:  # of a stack of experts it says nothing more
        shape = tuple(read(parts["weight_shape"]).tolist())
        if shape != (spec.out_features, spec.in_features):
            raise ConvertError(
                parts["weight_shape"].name,
                f"says {list(shape)}, the packed weight has {[spec.out_features, spec.in_features]}",
                "the checkpoint is damaged: download it again",
            )
    if "weight_packed" in parts:
        packed = read(parts["weight_packed"])
    else:
        packed = pack_codes(_unsigned(parts["weight"], read(parts["weight"])))
    scale = parts["weight_scale"]
    w = W4Linear(
        packed=packed,
        packing=Packing.PACK_QUANTIZED,
        scales=check_scales(scale, read(scale)).t().contiguous(),
        zeros=read_zeros(spec, read),
        g_idx=read_g_idx(spec, read),
        group_size=spec.group_size,
    )
    return check_content(parts["weight_packed" if "weight_packed" in parts else "weight"], scale, w)


def _unsigned(info: TensorInfo, values: torch.Tensor) -> torch.Tensor:
    """Return signed 4-bit values as unsigned codes, uint8.

    Raises:
        ConvertError: a value is outside −8 … 7.

    """
    codes = (values + SYMMETRIC_ZERO).view(torch.uint8)
    if bool((codes > 15).any()):
        raise ConvertError(info.name, "holds values outside −8 … 7", "the layer is not quantized to 4 bits")
    return codes
