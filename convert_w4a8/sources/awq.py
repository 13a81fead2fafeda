"""AutoAWQ's GEMM format, as AutoAWQ and GPTQModel write it.

`qweight` int32 [K, N/8], `qzeros` int32 [G, N/8], both with the columns of a word in the order 0 2 4 6 1 3 5 7;
`scales` [G, N]. Zero-points are stored as they are. `version` "gemm" is the layout that every current tool writes;
gemv, gemv_fast, exllama and marlin are others.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.checkpoint.safetensors_file import Reader
from convert_w4a8.errors import Problem
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
    never,
    setting_notes,
    setting_problems,
    tables_of,
)

NAME = "awq"
ROLES = ("qweight", "qzeros", "scales")
ANCHOR = "qweight"

SETTINGS: Table = {
    **OF_AUTO_ROUND,
    **OF_TOOLS,
    **any_of("zero_point w_bit q_group_size"),
    "backend": never("llm-awq", reason="its layout is another", remedy="save the model in AWQ's GEMM version"),
    "dynamic": tables_of({**OF_AUTO_ROUND, **OF_TOOLS}),
}

# Column c of a word lies in nibble _NIBBLE_OF_COLUMN[c]: the inverse of the order above.
_NIBBLE_OF_COLUMN = [0, 4, 1, 5, 2, 6, 3, 7]


def matches(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint's quantization_config is of this format."""
    return str(checkpoint.quantization_config.get("quant_method")).lower() == NAME


def find_notes(checkpoint: Checkpoint) -> Iterable[str]:
    """Yield what the plan has to say of the settings."""
    return setting_notes(checkpoint.quantization_config, SETTINGS)


def find_layers(checkpoint: Checkpoint, problems: list[Problem]) -> list[LayerSpec]:
    """Return the quantized layers, from headers alone; what cannot be read is appended to `problems`."""
    config = checkpoint.quantization_config
    wrong = [*_version_problems(config), *layout_problems(config, SETTINGS)]
    problems.extend([*wrong, *setting_problems(config, SETTINGS)])
    if wrong:
        return []
    return describe_all(checkpoint, problems, lambda module: overridden(config, module))


def _version_problems(config: Mapping[str, Any]) -> Iterator[Problem]:
    for key in ("version", "checkpoint_format", "format"):
        version = str(config.get(key) or "gemm").lower()
        if version != "gemm":
            yield Problem(f"quantization_config: {key}", f"is {version!r}", "save the model in AWQ's GEMM version")
            return


def describe_all(
    checkpoint: Checkpoint, problems: list[Problem], settings: Callable[[str], Mapping[str, Any]]
) -> list[LayerSpec]:
    """Return the layers; what cannot be read is appended to `problems`. settings: those of a module, by its name."""
    modules = checkpoint.modules_with(ANCHOR)
    return describe_each(modules, lambda module: _describe(checkpoint, module, settings(module)), problems)


def _describe(checkpoint: Checkpoint, module: str, config: Mapping[str, Any]) -> LayerSpec:
    parts = collect_parts(checkpoint, module, ROLES)
    check_bits(module, config.get("bits", config.get("w_bit", 4)))
    in_features, words = check_rank_two(parts["qweight"], "I32")
    out_features = words * 8
    stored = setting(config, "group_size", int, setting(config, "q_group_size", int, 128))
    group_size, groups = resolve_groups(module, stored, in_features)
    check_tensor(module, parts, "qzeros", ("I32",), (groups, words), "[K/group_size, N/8]")
    check_tensor(module, parts, "scales", ("F16", "BF16", "F32"), (groups, out_features), "[K/group_size, N]")
    return LayerSpec(
        name=module,
        source=NAME,
        out_features=out_features,
        in_features=in_features,
        group_size=group_size,
        symmetric=not setting(config, "zero_point", bool, default=True),
        act_order=False,
        parts=parts,
        has_zeros=True,
    )


def read_zeros(spec: LayerSpec, read: Reader) -> torch.Tensor | None:
    """Read one layer's zero-points uint8 [G, N]; None where all are 8."""
    qzeros = read(spec.parts["qzeros"])
    return real_zeros(unpack_words(qzeros).view(*qzeros.shape, 8)[..., _NIBBLE_OF_COLUMN].flatten(-2))


def read_g_idx(spec: LayerSpec, read: Reader) -> None:
    """Return None: AWQ has no activation order."""


def read_layer(spec: LayerSpec, read: Reader) -> W4Linear:
    """Read one layer's tensors."""
    w = W4Linear(
        packed=read(spec.parts["qweight"]),
        packing=Packing.AWQ,
        scales=check_scales(spec.parts["scales"], read(spec.parts["scales"])),
        zeros=read_zeros(spec, read),
        g_idx=None,
        group_size=spec.group_size,
    )
    return check_content(spec.parts["qweight"], spec.parts["scales"], w)
