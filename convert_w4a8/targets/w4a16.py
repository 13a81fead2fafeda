"""compressed-tensors W4A16, `pack-quantized`: what `w4a8 quantize --keep-w4a16` leaves, for any GPU and kernel.

Symmetric INT4 in groups of 128, and activations in 16 bits; the tensors are those of `pack_quantized`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.checkpoint.mixture import Mixture
from convert_w4a8.checkpoint.safetensors_file import Reader
from convert_w4a8.linear import GROUP_SIZE, Packing, ServedLinear, W4Linear
from convert_w4a8.options import ScalesMode
from convert_w4a8.targets import pack_quantized
from convert_w4a8.targets.base import kernel_problem

NAME = "w4a16"
SCHEME = "W4A16"
SCALES_AT_LOAD = False
MODES = (ScalesMode.SEARCH,)
EXPERT_MULTIPLE = 128
unsupported_size = kernel_problem
tensor_specs = pack_quantized.tensor_specs
find_problems = pack_quantized.find_problems
find_layers = pack_quantized.find_layers
stored_mode = pack_quantized.stored_mode
serve_command = pack_quantized.serve_command


def matches(quantization_config: Mapping[str, Any]) -> bool:
    """Whether a checkpoint with this quantization_config is of this format."""
    groups = quantization_config.get("config_groups")
    schemes = list(groups.values()) if isinstance(groups, Mapping) else []
    return (
        quantization_config.get("quant_method") == "compressed-tensors"
        and len(schemes) == 1
        and isinstance(schemes[0], Mapping)
        and schemes[0].get("weights") == pack_quantized.WEIGHTS
        and not schemes[0].get("input_activations")
    )


def unserved_width(widths: Mapping[str, int]) -> str | None:
    """Return which kind of width keeps layers that vLLM merges in BF16; None if it can serve them."""
    return pack_quantized.unserved_width(widths, "not every W4A16 kernel takes")


def encode(module: str, w: ServedLinear) -> dict[str, Iterable[torch.Tensor]]:
    """Return a layer's tensors by name, in parts along their first dimension."""
    assert isinstance(w, W4Linear)
    assert w.is_kernel_ready
    return pack_quantized.tensors(module, w, w.scales)


def decode(checkpoint: Checkpoint, module: str, read: Reader) -> W4Linear:
    """Read a layer back.

    Raises:
        ConvertError: a tensor is missing or has another shape than the format prescribes.

    """
    packed, scales = pack_quantized.read_layer(checkpoint, module, read, "quantize it again")
    return W4Linear(packed, Packing.PACK_QUANTIZED, scales, None, None, GROUP_SIZE)


def quantization_config(
    source_config: Mapping[str, Any],
    ignore: Sequence[str],
    mode: ScalesMode,  # noqa: ARG001  (part of the Target interface)
    conversion: Mapping[str, Any],  # noqa: ARG001  (readers of this format reject keys that they do not know)
    mixture: Mixture | None = None,
) -> dict[str, Any]:
    """Return the quantization_config block of the output's config.json."""
    return pack_quantized.quantization_config(source_config, ignore, None, mixture)


def card_section(again: str = "w4a8 quantize MODEL OUT") -> str:
    """Return what the model card says of serving, in Markdown. again: the command that writes another format."""
    return f"""\
## Serve it

```
vllm serve ORG/NAME    # this repository, or a directory with its files
```

No plugin is needed: this is the compressed-tensors format `pack-quantized`, symmetric INT4 in groups of 128 with BF16\
 scales. `w4a8-convert` makes W4A8 of it; `{again}` makes that from the model itself, which is better."""
