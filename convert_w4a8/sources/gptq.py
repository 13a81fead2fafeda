"""GPTQ as AutoGPTQ, GPTQModel and optimum write it, `checkpoint_format` gptq (v1) and gptq_v2.

`qweight` int32 [K/8, N], `qzeros` int32 [G, N/8], `scales` [G, N], `g_idx` int32 [K]. Version 1 stores each
zero-point less one, subtracted from the packed word as a whole: a zero-point of 0 borrows from its neighbour, so
the 1 must be added to the word as well (0x11111111, modulo 2³²). Nothing in the tensors tells v1 from v2.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
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
    describe_each,
    real_g_idx,
    real_zeros,
    resolve_groups,
    setting,
    unpack_words,
)
from convert_w4a8.sources.patterns import overridden
from convert_w4a8.sources.settings import (
    OF_AUTO_ROUND,
    OF_TOOLS,
    Table,
    any_of,
    layout_problems,
    only,
    setting_notes,
    setting_problems,
    tables_of,
)

NAME = "gptq"
ROLES = ("qweight", "qzeros", "scales", "g_idx")
ANCHOR = "qweight"

_ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}
_ONE_IN_EVERY_NIBBLE = 0x11111111
_FORMATS = ("checkpoint_format", "format", "version")
"""Settings that name the format, in the order in which they count."""

SETTINGS: Table = {
    **OF_AUTO_ROUND,
    **OF_TOOLS,
    "is_marlin_format": only(
        reason="the tensors are in Marlin's own layout",
        remedy="give the GPTQ checkpoint that it was made from",
        layout=True,
    ),
    "dynamic": tables_of({**OF_AUTO_ROUND, **OF_TOOLS}),
    **any_of("zero_point w_bit wbits q_group_size"),
}


def matches(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint's quantization_config is of this format."""
    return str(checkpoint.quantization_config.get("quant_method")).lower() in _ZERO_OFFSETS


def find_notes(checkpoint: Checkpoint) -> Iterable[str]:
    """Yield what the plan has to say of the settings."""
    return setting_notes(checkpoint.quantization_config, SETTINGS)


def find_layers(checkpoint: Checkpoint, problems: list[Problem]) -> list[LayerSpec]:
    """Return the quantized layers, from headers alone; what cannot be read is appended to `problems`."""
    config = checkpoint.quantization_config
    wrong = [*_format_problems(config), *layout_problems(config, SETTINGS)]
    problems.extend([*wrong, *setting_problems(config, SETTINGS)])
    if wrong:
        return []
    zero_offset = _ZERO_OFFSETS[next(_formats(config), (None, str(config.get("quant_method")).lower()))[1]]
    return describe_all(checkpoint, problems, lambda module: overridden(config, module), zero_offset)


def _formats(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key in _FORMATS:
        value = config.get(key)
        if value:
            yield key, value.lower() if isinstance(value, str) else value


def _format_problems(config: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield a format that is another, or that two settings contradict each other about."""
    found = dict(_formats(config))
    for key, value in found.items():
        if not isinstance(value, str) or value not in _ZERO_OFFSETS:
            of_marlin = ", Marlin's own layout" if value == "marlin" else ""
            yield Problem(
                f"quantization_config: {key}",
                f"is {value!r}{of_marlin}",
                "give the checkpoint that it was made from, or save the model in one of " + ", ".join(_ZERO_OFFSETS),
            )
            return
    # Of a symmetric model the zero-points tell which of the two it is, and the plan says so.
    if len(set(found.values())) > 1 and config.get("sym") is not True:
        said = " and ".join(f"{key} {value}" for key, value in found.items())
        yield Problem("quantization_config", f"contradicts itself: {said}", "keep the one in which the model was saved")


def describe_all(
    checkpoint: Checkpoint,
    problems: list[Problem],
    settings: Callable[[str], Mapping[str, Any]],
    zero_offset: int,
) -> list[LayerSpec]:
    """Return the layers; what cannot be read is appended to `problems`. settings: those of a module, by its name."""
    modules = checkpoint.modules_with(ANCHOR)
    zeros_stored = any(f"{module}.qzeros" in checkpoint.tensors for module in modules)
    return describe_each(
        modules,
        lambda module: _describe(checkpoint, module, settings(module), zero_offset, zeros_stored=zeros_stored),
        problems,
    )


def _describe(
    checkpoint: Checkpoint, module: str, config: Mapping[str, Any], zero_offset: int, *, zeros_stored: bool
) -> LayerSpec:
    parts = collect_parts(checkpoint, module, ROLES)
    check_bits(module, next((config[key] for key in ("bits", "w_bit", "wbits") if key in config), 4))
    words, out_features = check_rank_two(parts["qweight"], "I32")
    in_features = words * 8
    stored = setting(config, "group_size", int, setting(config, "q_group_size", int, 128))
    group_size, groups = resolve_groups(module, stored, in_features)
    if out_features % 8:
        raise ConvertError(module, f"out_features = {out_features} is not a multiple of 8", "check the checkpoint")
    symmetric = setting(config, "sym", bool, default=True)
    if zeros_stored or config.get("sym") is not True:  # some tools leave them out of a symmetric model
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
        symmetric=symmetric,
        act_order=act_order and "g_idx" in parts,
        parts=parts,
        has_zeros="qzeros" in parts,
        has_g_idx="g_idx" in parts,
        zero_offset=zero_offset,
    )


def read_zeros(spec: LayerSpec, read: Reader) -> torch.Tensor | None:
    """Read one layer's zero-points uint8 [G, N]; None where all are 8.

    They are 8 also where a symmetric layer has nothing but zeros stored: those were never filled in, and no kernel of a
    symmetric layer reads them.
    """
    if "qzeros" not in spec.parts:
        return None
    qzeros = read(spec.parts["qzeros"])
    if spec.symmetric and not bool(qzeros.any()):
        return None
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
