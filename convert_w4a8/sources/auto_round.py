"""AutoRound's own format: the tensors of GPTQ or of AWQ, as `packing_format` says (auto-round 0.2 to 0.16).

| packing_format | tensors | zero-points |
|---|---|---|
| auto_round:auto_gptq (before 0.5: auto_round:gptq) | GPTQ's, often without g_idx | less one, as in GPTQ v1 |
| auto_round, auto_round:gptqmodel | GPTQ's | as they are, as in GPTQ v2 |
| auto_round:auto_awq (auto_round:awq) | AWQ's, GEMM version | as they are |

Versions before 0.5 call the setting `backend`, and append the name of a kernel. Symmetric layers are packed with
auto_gptq, where about half of the scales are negative. `extra_config` has what is different for single layers, by name
or by pattern. Source: AutoRound's `export_to_autoround`, and vLLM's `quantization/inc`.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch

from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.checkpoint.safetensors_file import Reader
from convert_w4a8.errors import Problem
from convert_w4a8.linear import W4Linear
from convert_w4a8.sources import awq, gptq
from convert_w4a8.sources.base import LayerSpec
from convert_w4a8.sources.checks import setting
from convert_w4a8.sources.patterns import matches as matches_pattern
from convert_w4a8.sources.settings import (
    OF_AUTO_ROUND,
    Table,
    any_of,
    layout_problems,
    setting_notes,
    setting_problems,
    tables_of,
    without,
)

NAME = "auto-round"
ROLES = gptq.ROLES
ANCHOR = gptq.ANCHOR

SETTINGS: Table = {
    **OF_AUTO_ROUND,
    **any_of("quant_method packing_format backend modules_to_not_convert"),
    "extra_config": tables_of({**OF_AUTO_ROUND, **any_of("in_blocks fixed_by_user")}),
}

_PACKINGS: Mapping[str, tuple[ModuleType, int]] = {
    "": (gptq, 0),
    "gptqmodel": (gptq, 0),
    "auto_gptq": (gptq, 1),
    "gptq": (gptq, 1),
    "auto_awq": (awq, 0),
    "awq": (awq, 0),
}
"""What follows "auto_round:" → the format of the tensors, and what its zero-points lack."""
_KERNELS = frozenset({"exllamav1", "exllamav2", "triton", "tritonv2", "cuda", "qbits", "gemm"})
"""Names of kernels at the end of the setting, which say nothing of the layout."""
_PATTERN = re.compile(r"[*+?^$()\[\]{}|\\]")
"""What makes a pattern of a key of extra_config, as vLLM sees it."""
_BITS_16 = 16


def matches(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint's quantization_config is of this format."""
    method = str(checkpoint.quantization_config.get("quant_method")).lower().replace("_", "-")
    return method.removeprefix("intel/") in (NAME, "autoround")


def find_notes(checkpoint: Checkpoint) -> Iterable[str]:
    """Yield what the plan has to say of the settings."""
    return setting_notes(_quantized(checkpoint.quantization_config), SETTINGS)


def find_layers(checkpoint: Checkpoint, problems: list[Problem]) -> list[LayerSpec]:
    """Return the quantized layers, from headers alone; what cannot be read is appended to `problems`."""
    config = checkpoint.quantization_config
    key, packing = _packing(config)
    wrong = [*layout_problems(_quantized(config), SETTINGS)]
    if packing not in _PACKINGS:
        remedy = "export the model with AutoRound's format auto_round:auto_gptq, and scheme W4A16"
        wrong.append(Problem(f"quantization_config: {key}", f"is {config.get(key)!r}, which is not read", remedy))
    problems.extend([*wrong, *setting_problems(_quantized(config), SETTINGS)])
    if wrong:
        return []
    form, zero_offset = _PACKINGS[packing]

    def settings(module: str) -> Mapping[str, Any]:
        found = {**config, **_of_layer(config, module)}
        return {**found, "zero_point": not setting(found, "sym", bool, default=True), "desc_act": False}

    if form is awq:
        return [*_ours(awq.describe_all(checkpoint, problems, settings))]
    return [*_ours(gptq.describe_all(checkpoint, problems, settings, zero_offset))]


def _ours(specs: Iterable[LayerSpec]) -> Iterator[LayerSpec]:
    return (replace(spec, source=NAME) for spec in specs)


def _packing(config: Mapping[str, Any]) -> tuple[str, str]:
    """Return the setting that names the packing, and what it names, without the names of kernels."""
    stored = config.get("packing_format")
    if stored is None:
        backend = str(config.get("backend"))
        is_packing = backend.lower().replace("-", "_").startswith(("auto_round", "autoround", "gptq", "awq"))
        if not is_packing:
            return "packing_format", "auto_gptq"  # as vLLM takes it
        key, stored, kernels = "backend", backend, _KERNELS | {"marlin"}
    else:
        key, kernels = "packing_format", _KERNELS
    words = str(stored).lower().replace("-", "_").replace("autoround", "auto_round").split(":")
    return key, ":".join(word for word in words if word not in {"auto_round", *kernels})


def _is_16_bit(entry: Any) -> bool:
    bits = entry.get("bits") if isinstance(entry, dict) else None
    return isinstance(bits, int) and bits >= _BITS_16


def _quantized(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the settings without those of layers that are left in 16 bits."""
    return without(config, "extra_config", _is_16_bit)


def _of_layer(config: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """Return what extra_config says of a layer: under its name, the end of its name, or the first pattern in it."""
    extra = setting(config, "extra_config", dict, {})
    subject = "quantization_config: extra_config"
    if module in extra:
        return setting(extra, module, dict, {}, subject)  # type: ignore[no-any-return]
    tests: tuple[Callable[[str], bool], ...] = (
        lambda key: module.endswith(f".{key}"),
        lambda key: bool(_PATTERN.search(key)) and matches_pattern(key, module, "extra_config", anywhere=True),
    )
    for test in tests:
        key = next(filter(test, extra), None)
        if key is not None:
            return setting(extra, key, dict, {}, subject)  # type: ignore[no-any-return]
    return {}


def _format(spec: LayerSpec) -> ModuleType:
    """Return the format of a layer's tensors: only GPTQ's qweight has as many columns as there are output channels."""
    return gptq if spec.parts[ANCHOR].shape[1] == spec.out_features else awq


def read_zeros(spec: LayerSpec, read: Reader) -> torch.Tensor | None:
    """Read one layer's zero-points uint8 [G, N]; None where all are 8."""
    zeros: torch.Tensor | None = _format(spec).read_zeros(spec, read)
    return zeros


def read_g_idx(spec: LayerSpec, read: Reader) -> torch.Tensor | None:
    """Read one layer's g_idx int32 [K]; None where it says only k // group_size."""
    g_idx: torch.Tensor | None = _format(spec).read_g_idx(spec, read)
    return g_idx


def read_layer(spec: LayerSpec, read: Reader) -> W4Linear:
    """Read one layer's tensors."""
    w: W4Linear = _format(spec).read_layer(spec, read)
    return w
