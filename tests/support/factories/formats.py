"""The input formats: which tensors a quantized layer becomes, and what config.json says about it.

Each class answers three questions: `scheme` (how a module is quantized, None where it is not), `tensors` and
`config`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch

from factories.layers import BORROW, Layer, Scheme, pack_codes, pack_columns, pack_columns_awq

Tensors = dict[str, torch.Tensor]


class Format(Protocol):
    """What a format must answer."""

    @property
    def name(self) -> str:
        """`quant_method`, as config.json calls it."""

    def scheme(self, module: str) -> Scheme | None:
        """Return how this module is quantized, or None where the tool leaves it alone."""

    def tensors(self, module: str, layer: Layer) -> Tensors:
        """Return the tensors that stand for this layer."""

    def config(self) -> dict[str, Any]:
        """Return the block `quantization_config` of config.json."""


@dataclass(frozen=True)
class Awq:
    """AutoAWQ's GEMM version: six keys of config, float16 scales."""

    default: Scheme = field(default_factory=lambda: Scheme(symmetric=False))
    skip: tuple[str, ...] = ()
    """`modules_to_not_convert`: parts of module names."""
    name: str = "awq"

    def scheme(self, module: str) -> Scheme | None:
        """Return the one scheme, or None for the head and where a part of the name is to be skipped."""
        return None if any(part in module for part in ("lm_head", *self.skip)) else self.default

    def tensors(self, module: str, layer: Layer) -> Tensors:
        """Return qweight [K, N/8], qzeros [G, N/8] (always there) and scales [G, N]."""
        return {
            f"{module}.qweight": torch.from_numpy(pack_columns_awq(np.ascontiguousarray(layer.codes.T))),
            f"{module}.qzeros": torch.from_numpy(pack_columns_awq(layer.zeros)),
            f"{module}.scales": layer.scales,
        }

    def config(self) -> dict[str, Any]:
        """Return the six keys that AutoAWQ writes."""
        return {
            "bits": 4,
            "group_size": self.default.group_size,
            "modules_to_not_convert": list(self.skip) or None,
            "quant_method": "awq",
            "version": "gemm",
            "zero_point": not self.default.claims_symmetric,
        }


@dataclass(frozen=True)
class AwqOfGptqModel(Awq):
    """GPTQModel's AWQ: scales in the model's dtype, other keys of config."""

    default: Scheme = field(default_factory=lambda: Scheme(scale_dtype=torch.bfloat16))

    def config(self) -> dict[str, Any]:
        """Return GPTQModel's keys: no `sym`, no `modules_to_not_convert`."""
        return {
            "bits": 4,
            "checkpoint_format": "gemm",
            "format": "gemm",
            "group_size": self.default.group_size,
            "lm_head": False,
            "meta": {"quantizer": ["gptqmodel:7.6.0"]},
            "method": "awq",
            "pack_dtype": "int32",
            "quant_method": "awq",
            "version": "gemm",
            "zero_point": not self.default.claims_symmetric,
        }


@dataclass(frozen=True)
class Gptq:
    """GPTQModel's GPTQ, both zero-point conventions."""

    default: Scheme = field(default_factory=Scheme)
    v2: bool = False
    desc_act: bool = False
    lm_head: bool = False
    dynamic: Mapping[str, Mapping[str, Any]] | None = None
    """Pattern → overrides; `-:` before a pattern leaves the modules alone. First match counts."""
    name: str = "gptq"

    def scheme(self, module: str) -> Scheme | None:
        """Return the scheme after the first matching `dynamic` pattern."""
        if module == "lm_head" and not self.lm_head:
            return None
        for pattern, overrides in (self.dynamic or {}).items():
            if pattern.startswith("-:"):
                if re.match(pattern.removeprefix("-:"), module):
                    return None
            elif re.match(pattern.removeprefix("+:"), module):
                known = {"bits": "bits", "group_size": "group_size", "sym": "symmetric"}
                return replace(self.default, **{known[key]: value for key, value in overrides.items()})
        return self.default

    def tensors(self, module: str, layer: Layer) -> Tensors:
        """Return qweight [K/8, N], qzeros [G, N/8], scales [G, N] and g_idx [K], always all four."""
        bits = layer.scheme.bits
        qzeros = pack_columns(layer.zeros, bits).view(np.uint32)
        if not self.v2:
            qzeros = qzeros - np.uint32(BORROW[bits])
        return {
            f"{module}.g_idx": torch.from_numpy(layer.groups),
            f"{module}.scales": layer.scales,
            f"{module}.qweight": torch.from_numpy(pack_codes(np.ascontiguousarray(layer.codes.T), bits)),
            f"{module}.qzeros": torch.from_numpy(qzeros.view(np.int32)),
        }

    def config(self) -> dict[str, Any]:
        """Return GPTQModel's keys."""
        version = "gptq_v2" if self.v2 else "gptq"
        block = {
            "bits": self.default.bits,
            "checkpoint_format": version,
            "desc_act": self.desc_act or self.default.act_order,
            "format": version,
            "group_size": self.default.group_size,
            "lm_head": self.lm_head,
            "meta": {"quantizer": ["gptqmodel:7.6.0"]},
            "method": "gptq",
            "pack_dtype": "int32",
            "quant_method": "gptq",
            "sym": self.default.claims_symmetric,
        }
        if self.dynamic is not None:
            block["dynamic"] = {pattern: dict(overrides) for pattern, overrides in self.dynamic.items()}
        return block


@dataclass(frozen=True)
class AutoRound:
    """AutoRound's own format, in any of its packings."""

    default: Scheme = field(default_factory=lambda: Scheme(signed=True))
    packing: str = "auto_round:auto_gptq"
    extra: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """`extra_config`: name, end of a name or pattern → overrides."""
    method: str = "auto-round"
    key: str = "packing_format"
    """Before 0.5 `backend`."""
    name: str = "auto-round"

    def scheme(self, module: str) -> Scheme | None:
        """Return the scheme after the overrides of extra_config; None where those leave 16 bits."""
        entry = self._entry(module)
        if entry is None and module == "lm_head":
            return None
        entry = entry or {}
        if entry.get("bits", 4) >= 16:
            return None
        known = {"bits": "bits", "group_size": "group_size", "sym": "symmetric"}
        changes = {known[key]: value for key, value in entry.items() if key in known}
        scheme = replace(self.default, **changes)
        return scheme if scheme.symmetric else replace(scheme, signed=False)

    def _entry(self, module: str) -> Mapping[str, Any] | None:
        if module in self.extra:
            return self.extra[module]
        for key, entry in self.extra.items():
            if module.endswith(f".{key}") or (set(key) & set("*+?^$()[]{}|\\") and re.search(key, module)):
                return entry
        return None

    def tensors(self, module: str, layer: Layer) -> Tensors:
        """Return the tensors that AutoRound's packers make: GPTQ's without g_idx, or AWQ's."""
        if "awq" in self.packing:
            return Awq().tensors(module, layer)
        less_one = "gptq" in self.packing and "gptqmodel" not in self.packing
        tensors = Gptq(v2=not less_one).tensors(module, layer)
        del tensors[f"{module}.g_idx"]
        return tensors

    def config(self) -> dict[str, Any]:
        """Return the keys that AutoRound leaves when it filters its settings."""
        block: dict[str, Any] = {
            "autoround_version": "0.9.0",
            "batch_size": 4,
            "bits": self.default.bits,
            "block_name_to_quantize": "model.layers",
            "data_type": "int",
            "enable_quanted_input": False,
            "group_size": self.default.group_size,
            "iters": 50,
            "low_gpu_mem_usage": True,
            "nsamples": 32,
            self.key: self.packing,
            "quant_method": self.method,
            "sym": self.default.symmetric,
        }
        return block | ({"extra_config": {key: dict(entry) for key, entry in self.extra.items()}} if self.extra else {})


@dataclass(frozen=True)
class CompressedTensors:
    """llm-compressor's output, packed or (`int8`) one signed code a byte."""

    groups: Mapping[str, Scheme] = field(
        default_factory=lambda: {"Linear": Scheme(scale_dtype=torch.bfloat16)},
    )
    """Target (class name, module name or `re:` pattern) → scheme; one config group each."""
    ignore: tuple[str, ...] = ("lm_head",)
    int8: bool = False
    fp8_activations: bool = False
    actorder: str | None = None
    weight_g_idx: bool = False
    """Write the group of each input channel, as files from before compressed-tensors 0.19 do."""
    name: str = "compressed-tensors"

    def scheme(self, module: str) -> Scheme | None:
        """Return the scheme of the first matching target, unless the module is ignored."""
        if any(_matches(pattern, module) for pattern in self.ignore):
            return None
        hits = (scheme for target, scheme in self.groups.items() if _matches(target, module))
        return next(hits, None)

    def tensors(self, module: str, layer: Layer) -> Tensors:
        """Return weight_packed [N, K/8] or weight [N, K], weight_scale [N, G], and what else there is."""
        bits = layer.scheme.bits
        middle = 2 ** (bits - 1)
        tensors: Tensors = {}
        if self.int8:
            signed = (layer.codes.astype(np.int16) - middle).astype(np.int8)
            tensors[f"{module}.weight"] = torch.from_numpy(signed)
        else:
            tensors[f"{module}.weight_packed"] = torch.from_numpy(pack_columns(layer.codes, bits))
            tensors[f"{module}.weight_shape"] = torch.tensor(layer.codes.shape, dtype=torch.int64)
        tensors[f"{module}.weight_scale"] = layer.scales.T.contiguous()
        if not layer.scheme.claims_symmetric:
            zeros = np.ascontiguousarray(layer.zeros.T)  # [N, G], packed along N
            signed = (zeros.astype(np.int16) - middle).astype(np.int8)
            tensors[f"{module}.weight_zero_point"] = torch.from_numpy(signed if self.int8 else pack_codes(zeros, bits))
        if self.weight_g_idx:
            tensors[f"{module}.weight_g_idx"] = torch.from_numpy(layer.groups)
        return tensors

    def config(self) -> dict[str, Any]:
        """Return llm-compressor's block."""
        form = "int-quantized" if self.int8 else "pack-quantized"
        activations = {
            "num_bits": 8,
            "type": "float",
            "strategy": "token",
            "dynamic": True,
            "symmetric": True,
            "group_size": None,
        }
        groups: dict[str, Any] = {
            f"group_{i}": {
                "format": form,
                "input_activations": activations if self.fp8_activations else None,
                "output_activations": None,
                "targets": [target],
                "weights": {
                    "actorder": self.actorder,
                    "block_structure": None,
                    "dynamic": False,
                    "group_size": None if scheme.group_size == -1 else scheme.group_size,
                    "num_bits": scheme.bits,
                    "observer": "memoryless_minmax",
                    "observer_kwargs": {},
                    "strategy": "channel" if scheme.group_size == -1 else "group",
                    "symmetric": scheme.claims_symmetric,
                    "type": "int",
                },
            }
            for i, (target, scheme) in enumerate(self.groups.items())
        }
        return {
            "config_groups": groups,
            "format": form,
            "global_compression_ratio": None,
            "ignore": list(self.ignore),
            "kv_cache_scheme": None,
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "sparsity_config": {},
            "transform_config": {},
            "version": "0.19.0",
        }


def _matches(pattern: str, module: str) -> bool:
    """Match a module as compressed-tensors does: `re:` from the start, otherwise name or class."""
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), module) is not None
    return pattern in {module, "Linear"}
