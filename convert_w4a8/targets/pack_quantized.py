"""What compressed-tensors' `pack-quantized` prescribes, for the formats that are made of it.

Per layer `weight_packed` int32 [N, K/8] (code + 8, low nibble first), `weight_scale` bfloat16 [N, K/128] and
`weight_shape` int64 [N, K].
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.checkpoint.mixture import Mixture
from convert_w4a8.checkpoint.safetensors_file import Reader, TensorSpec
from convert_w4a8.encoding import packing
from convert_w4a8.errors import ConvertError, Problem
from convert_w4a8.linear import GROUP_SIZE, ServedLinear
from convert_w4a8.options import ScalesMode
from convert_w4a8.targets.base import CUTLASS_MULTIPLE, check_tensors, packed_shape

WEIGHTS: Mapping[str, Any] = {
    "num_bits": 4,
    "type": "int",
    "symmetric": True,
    "strategy": "group",
    "group_size": GROUP_SIZE,
    "dynamic": False,
}
"""How weights are quantized, as a scheme of `config_groups` says it."""


def unserved_width(widths: Mapping[str, int], why: str) -> str | None:
    """Return which kind of width keeps merged layers in BF16, and why; None if it can be served."""
    if sum(widths.values()) % CUTLASS_MULTIPLE:
        return f"a width that is no multiple of {CUTLASS_MULTIPLE}, which {why}"
    return None


def tensor_specs(module: str, n: int, k: int, mode: ScalesMode) -> tuple[TensorSpec, ...]:  # noqa: ARG001
    """Return the tensors that a layer with N = n and K = k becomes; all modes have the same."""
    return (
        TensorSpec(f"{module}.weight_packed", "I32", (n, k // 8)),
        TensorSpec(f"{module}.weight_scale", "BF16", (n, k // GROUP_SIZE)),
        TensorSpec(f"{module}.weight_shape", "I64", (2,)),
    )


def find_problems(source_config: Mapping[str, Any]) -> Iterable[Problem]:  # noqa: ARG001
    """Yield nothing: what a source's quantization_config may hold besides the weights, this format can express."""
    return ()


def tensors(module: str, w: ServedLinear, scales: torch.Tensor) -> dict[str, Iterable[torch.Tensor]]:
    """Return a layer's tensors by name, in parts along their first dimension. scales: bfloat16 [K/128, N]."""
    return {
        f"{module}.weight_packed": packing.to_pack_quantized_parts(w.packed, w.packing),
        f"{module}.weight_scale": [scales.t().contiguous()],
        f"{module}.weight_shape": [torch.tensor(w.shape_nk, dtype=torch.int64)],
    }


def find_layers(checkpoint: Checkpoint) -> list[str]:
    """Return the quantized modules of a checkpoint of this format."""
    return checkpoint.modules_with("weight_packed")


def read_layer(checkpoint: Checkpoint, module: str, read: Reader, remedy: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a layer's words int32 [N, K/8] and scales bfloat16 [K/128, N].

    Raises:
        ConvertError: a tensor is missing or has another shape than the format prescribes.

    """
    n, words = packed_shape(checkpoint, module, "[N, K/8]")
    check_tensors(checkpoint, tensor_specs(module, n, words * 8, ScalesMode.SEARCH))
    shape = read(checkpoint.tensors[f"{module}.weight_shape"]).tolist()
    if shape != [n, words * 8]:
        raise ConvertError(f"{module}.weight_shape", f"says {shape}, not {[n, words * 8]}", remedy)
    scales = read(checkpoint.tensors[f"{module}.weight_scale"]).t().contiguous()
    return read(checkpoint.tensors[f"{module}.weight_packed"]), scales


def stored_mode(checkpoint: Checkpoint) -> ScalesMode:  # noqa: ARG001
    """Return a mode whose tensors a checkpoint of this format holds: all modes have the same."""
    return ScalesMode.SEARCH


def quantization_config(
    source_config: Mapping[str, Any],
    ignore: Sequence[str],
    input_activations: Mapping[str, Any] | None,
    mixture: Mixture | None,
) -> dict[str, Any]:
    """Return the quantization_config block of a config.json. input_activations: None where they have 16 bits."""
    scheme = {
        "format": "pack-quantized",
        "weights": dict(WEIGHTS),
        "input_activations": input_activations,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision" if mixture else "pack-quantized",
        "quantization_status": "compressed",
        "ignore": list(ignore),
        "kv_cache_scheme": source_config.get("kv_cache_scheme"),
        "config_groups": mixture.groups(scheme) if mixture else {"group_0": {"targets": ["Linear"], **scheme}},
    }


def serve_command(name: str) -> str:
    """Return how to serve a checkpoint, in one line."""
    return f"vllm serve {name}"
