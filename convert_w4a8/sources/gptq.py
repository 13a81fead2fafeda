"""GPTQ as AutoGPTQ, GPTQModel and optimum write it, `checkpoint_format` gptq (v1) and gptq_v2.

`qweight` int32 [K/8, N], `qzeros` int32 [G, N/8], `scales` [G, N], `g_idx` int32 [K]. Version 1 stores each
zero-point less one, subtracted from the packed word as a whole: a zero-point of 0 borrows from its neighbour, so
the 1 must be added to the word as well (0x11111111, modulo 2³²). Nothing in the tensors tells v1 from v2.
"""

from collections.abc import Mapping
from typing import Any

import torch

from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.checkpoint.safetensors_file import Reader
from convert_w4a8.errors import ConvertError, Problem
from convert_w4a8.linear import Packing, W4Linear
from convert_w4a8.sources.base import LayerSpec
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
from convert_w4a8.sources.patterns import matches as matches_pattern

NAME = "gptq"
ROLES = ("qweight", "qzeros", "scales", "g_idx")
ANCHOR = "qweight"

_ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}
_ONE_IN_EVERY_NIBBLE = 0x11111111


def matches(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint's quantization_config is of this format."""
    return checkpoint.quantization_config.get("quant_method") == "gptq"


def find_layers(checkpoint: Checkpoint, problems: list[Problem]) -> list[LayerSpec]:
    """Return the quantized layers, from headers alone; what cannot be read is appended to `problems`."""
    config = checkpoint.quantization_config
    stored_format = config.get("checkpoint_format") or config.get("format") or "gptq"
    if not isinstance(stored_format, str) or stored_format not in _ZERO_OFFSETS:
        problems.append(
            Problem(
                "quantization_config: checkpoint_format",
                f"is {stored_format!r}",
                "save the model in one of " + ", ".join(_ZERO_OFFSETS),
            )
        )
        return []
    layers = []
    for module in checkpoint.modules_with(ANCHOR):
        try:
            layers.append(_describe(checkpoint, module, _overridden(config, module), _ZERO_OFFSETS[stored_format]))
        except ConvertError as error:
            problems.append(error.problem)
    return layers


def _overridden(config: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """Apply GPTQModel's `dynamic`: the first pattern that matches a module's name overrides the configuration.

    A pattern may begin with "+:"; one that begins with "-:" excludes modules, which then have no qweight.
    """
    dynamic = setting(config, "dynamic", dict, {})
    for pattern in dynamic:
        if pattern.startswith("-:"):
            continue
        if matches_pattern(pattern.removeprefix("+:"), module, "dynamic"):
            return {**config, **setting(dynamic, pattern, dict, {}, "quantization_config: dynamic")}
    return config


def _describe(checkpoint: Checkpoint, module: str, config: Mapping[str, Any], zero_offset: int) -> LayerSpec:
    parts = collect_parts(checkpoint, module, ROLES)
    check_bits(module, config.get("bits", 4))
    words, out_features = check_rank_two(parts["qweight"], "I32")
    in_features = words * 8
    group_size, groups = resolve_groups(module, setting(config, "group_size", int, 128), in_features)
    if out_features % 8:
        raise ConvertError(module, f"out_features = {out_features} is not a multiple of 8", "check the checkpoint")
    check_tensor(module, parts, "qzeros", ("I32",), (groups, out_features // 8), "[K/group_size, N/8]")
    check_tensor(module, parts, "scales", ("F16", "BF16", "F32"), (groups, out_features), "[K/group_size, N]")
    act_order = setting(config, "desc_act", bool, default=False)
    if "g_idx" in parts or (act_order and not setting(config, "static_groups", bool, default=False)):
        check_tensor(module, parts, "g_idx", ("I32",), (in_features,), "[K]")
    return LayerSpec(
        name=module,
        source=NAME,
        out_features=out_features,
        in_features=in_features,
        group_size=group_size,
        symmetric=setting(config, "sym", bool, default=True),
        act_order=act_order and "g_idx" in parts,
        parts=parts,
        has_zeros=True,
        has_g_idx="g_idx" in parts,
        zero_offset=zero_offset,
    )


def read_zeros(spec: LayerSpec, read: Reader) -> torch.Tensor | None:
    """Read one layer's zero-points uint8 [G, N]; None where all are 8."""
    qzeros = read(spec.parts["qzeros"])
    return real_zeros(unpack_words(qzeros + spec.zero_offset * _ONE_IN_EVERY_NIBBLE))  # int32 addition wraps around


def read_g_idx(spec: LayerSpec, read: Reader) -> torch.Tensor | None:
    """Read one layer's g_idx int32 [K]; None where it says only k // group_size."""
    info = spec.parts.get("g_idx")
    return None if info is None else real_g_idx(info, read(info), spec)


def read_layer(spec: LayerSpec, read: Reader) -> W4Linear:
    """Read one layer's tensors."""
    w = W4Linear(
        packed=read(spec.parts["qweight"]),
        packing=Packing.GPTQ,
        scales=check_scales(spec.parts["scales"], read(spec.parts["scales"])),
        zeros=read_zeros(spec, read),
        g_idx=read_g_idx(spec, read),
        group_size=spec.group_size,
    )
    return check_content(spec.parts["qweight"], spec.parts["scales"], w)
