"""compressed-tensors W4A8, which vLLM loads without a plugin: it quantizes the scales and repacks at every start.

The tensors are those of `pack_quantized`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.checkpoint.mixture import Mixture
from convert_w4a8.checkpoint.safetensors_file import Reader
from convert_w4a8.errors import ConvertError
from convert_w4a8.linear import Packing, ServedLinear, W4A8Linear
from convert_w4a8.options import ScalesMode
from convert_w4a8.quantization.baselines import quantize_reference
from convert_w4a8.targets import pack_quantized
from convert_w4a8.targets.base import kernel_problem

NAME = "compressed-tensors"
SCHEME = "W4A8"
SCALES_AT_LOAD = True
MODES = (ScalesMode.REFERENCE, ScalesMode.SEARCH)
EXPERT_MULTIPLE = 256
unsupported_size = kernel_problem
tensor_specs = pack_quantized.tensor_specs
find_problems = pack_quantized.find_problems
find_layers = pack_quantized.find_layers
stored_mode = pack_quantized.stored_mode
serve_command = pack_quantized.serve_command


def matches(quantization_config: Mapping[str, Any]) -> bool:
    """Whether a checkpoint with this quantization_config is of this format."""
    return quantization_config.get("quant_method") == "compressed-tensors"


def unserved_width(widths: Mapping[str, int]) -> str | None:
    """Return which kind of width keeps layers that vLLM merges in BF16; None if it can serve them."""
    return pack_quantized.unserved_width(widths, "vLLM's kernel needs")


def encode(module: str, w: ServedLinear) -> dict[str, Iterable[torch.Tensor]]:
    """Return a layer's tensors by name, in parts along their first dimension.

    Raises ValueError unless the layer was quantized for vLLM's load-time path.
    """
    assert isinstance(w, W4A8Linear)
    if w.source_scale is None:
        raise ValueError(f"{module} has no scales for vLLM to quantize")
    return pack_quantized.tensors(module, w, w.source_scale)


def decode(checkpoint: Checkpoint, module: str, read: Reader) -> W4A8Linear:
    """Read a layer back as vLLM loads it: the FP8 scales are those that vLLM computes from the stored ones.

    Raises:
        ConvertError: a tensor is missing or has another shape than the format prescribes.

    """
    packed, source_scale = pack_quantized.read_layer(checkpoint, module, read, "convert it again")
    if not bool(torch.isfinite(source_scale).all()):
        raise ConvertError(f"{module}.weight_scale", "holds NaN or infinite scales", "convert the checkpoint again")
    group_scale, channel_scale = quantize_reference(source_scale)
    return W4A8Linear(
        packed=packed,
        packing=Packing.PACK_QUANTIZED,
        group_scale=group_scale,
        entries=None,
        channel_scale=channel_scale,
        source_scale=source_scale,
    )


def quantization_config(
    source_config: Mapping[str, Any],
    ignore: Sequence[str],
    mode: ScalesMode,  # noqa: ARG001  (part of the Target interface)
    conversion: Mapping[str, Any],  # noqa: ARG001  (readers of this format reject keys that they do not know)
    mixture: Mixture | None = None,
) -> dict[str, Any]:
    """Return the quantization_config block of the output's config.json."""
    per_token = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
    return pack_quantized.quantization_config(source_config, ignore, per_token, mixture)


def card_section(again: str = "w4a8-convert") -> str:
    """Return what the model card says of serving, in Markdown. again: the command that writes another format."""
    return f"""\
## Serve it

```
vllm serve ORG/NAME    # this repository, or a directory with its files
```

No plugin is needed: this is the compressed-tensors format, which vLLM repacks for its W4A8 kernel at every start.\
 `{again} --format lut` writes the kernel's own layout, which saves that, and needs a plugin."""
