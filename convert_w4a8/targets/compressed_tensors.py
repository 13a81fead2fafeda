"""compressed-tensors W4A8, which vLLM loads without a plugin: it quantizes the scales and repacks at every start.

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
from convert_w4a8.linear import GROUP_SIZE, Packing, ServedLinear, W4A8Linear
from convert_w4a8.options import ScalesMode
from convert_w4a8.quantization.baselines import quantize_reference
from convert_w4a8.targets.base import CUTLASS_MULTIPLE, check_tensors, kernel_problem, packed_shape

NAME = "compressed-tensors"
SCHEME = "W4A8"
SCALES_AT_LOAD = True
unsupported_size = kernel_problem
MODES = (ScalesMode.REFERENCE, ScalesMode.SEARCH)
EXPERT_MULTIPLE = 256


def matches(quantization_config: Mapping[str, Any]) -> bool:
    """Whether a checkpoint with this quantization_config is of this format."""
    return quantization_config.get("quant_method") == "compressed-tensors"


def unserved_width(widths: Mapping[str, int]) -> str | None:
    """Return which kind of width keeps layers that vLLM merges in BF16; None if it can serve them."""
    if sum(widths.values()) % CUTLASS_MULTIPLE:
        return f"a width that is no multiple of {CUTLASS_MULTIPLE}, which vLLM's kernel needs"
    return None


def tensor_specs(module: str, n: int, k: int, mode: ScalesMode) -> tuple[TensorSpec, ...]:  # noqa: ARG001
    """Return the tensors that a layer with N = n and K = k becomes."""
    return (
        TensorSpec(f"{module}.weight_packed", "I32", (n, k // 8)),
        TensorSpec(f"{module}.weight_scale", "BF16", (n, k // GROUP_SIZE)),
        TensorSpec(f"{module}.weight_shape", "I64", (2,)),
    )


def find_problems(source_config: Mapping[str, Any]) -> Iterable[Problem]:  # noqa: ARG001
    """Yield nothing: what a source's quantization_config may hold besides the weights, this format can express."""
    return ()


def encode(module: str, w: ServedLinear) -> dict[str, Iterable[torch.Tensor]]:
    """Return a layer's tensors by name, in parts along their first dimension.

    Raises ValueError unless the layer was quantized for vLLM's load-time path.
    """
    assert isinstance(w, W4A8Linear)
    if w.source_scale is None:
        raise ValueError(f"{module} has no scales for vLLM to quantize")
    return {
        f"{module}.weight_packed": packing.to_pack_quantized_parts(w.packed, w.packing),
        f"{module}.weight_scale": [w.source_scale.t().contiguous()],
        f"{module}.weight_shape": [torch.tensor(w.shape_nk, dtype=torch.int64)],
    }


def find_layers(checkpoint: Checkpoint) -> list[str]:
    """Return the converted modules of a checkpoint of this format."""
    return checkpoint.modules_with("weight_packed")


def decode(checkpoint: Checkpoint, module: str, read: Reader) -> W4A8Linear:
    """Read a layer back as vLLM loads it: the FP8 scales are those that vLLM computes from the stored ones.

    Raises:
        ConvertError: a tensor is missing or has another shape than the format prescribes.

    """
    n, words = packed_shape(checkpoint, module, "[N, K/8]")
    check_tensors(checkpoint, tensor_specs(module, n, words * 8, ScalesMode.REFERENCE))
    shape = read(checkpoint.tensors[f"{module}.weight_shape"]).tolist()
    if shape != [n, words * 8]:
        raise ConvertError(f"{module}.weight_shape", f"says {shape}, not {[n, words * 8]}", "convert it again")
    source_scale = read(checkpoint.tensors[f"{module}.weight_scale"]).t().contiguous()
    if not bool(torch.isfinite(source_scale).all()):
        raise ConvertError(f"{module}.weight_scale", "holds NaN or infinite scales", "convert the checkpoint again")
    group_scale, channel_scale = quantize_reference(source_scale)
    return W4A8Linear(
        packed=read(checkpoint.tensors[f"{module}.weight_packed"]),
        packing=Packing.PACK_QUANTIZED,
        group_scale=group_scale,
        entries=None,
        channel_scale=channel_scale,
        source_scale=source_scale,
    )


def stored_mode(checkpoint: Checkpoint) -> ScalesMode:  # noqa: ARG001
    """Return a mode whose tensors a checkpoint of this format holds: all modes have the same."""
    return ScalesMode.SEARCH


def quantization_config(
    source_config: Mapping[str, Any],
    ignore: Sequence[str],
    mode: ScalesMode,  # noqa: ARG001  (part of the Target interface)
    conversion: Mapping[str, Any],  # noqa: ARG001  (readers of this format reject keys that they do not know)
    mixture: Mixture | None = None,
) -> dict[str, Any]:
    """Return the quantization_config block of the output's config.json."""
    scheme = {
        "format": "pack-quantized",
        "weights": {
            "num_bits": 4,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": GROUP_SIZE,
            "dynamic": False,
        },
        "input_activations": {
            "num_bits": 8,
            "type": "float",
            "symmetric": True,
            "strategy": "token",
            "dynamic": True,
        },
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


def card_section(again: str = "w4a8-convert") -> str:
    """Return what the model card says of serving, in Markdown. again: the command that writes another format."""
    return f"""\
## Serve it

```
vllm serve ORG/NAME    # this repository, or a directory with its files
```

No plugin is needed: this is the compressed-tensors format, which vLLM repacks for its W4A8 kernel at every start.\
 `{again} --format lut` writes the kernel's own layout, which saves that, and needs a plugin."""
