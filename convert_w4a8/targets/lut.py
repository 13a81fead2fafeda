"""The `w4a8_lut` format (docs/reference/format.md): codes in the kernel's order, loaded by our vLLM plugin."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.checkpoint.mixture import Mixture
from convert_w4a8.checkpoint.safetensors_file import Reader, TensorSpec
from convert_w4a8.encoding import lut_layout
from convert_w4a8.errors import ConvertError, Problem
from convert_w4a8.linear import GROUP_SIZE, Packing, ServedLinear, W4A8Linear
from convert_w4a8.lut_format import LAYOUT, METHOD, TILE_K, TILE_N, TableForm, reordered_shape, version_for
from convert_w4a8.options import ScalesMode
from convert_w4a8.targets.base import CUTLASS_MULTIPLE, check_tensors, kernel_problem, packed_shape
from convert_w4a8.version import INSTALL_NOTE, install_command

NAME = "lut"
SCHEME = "W4A8"
SCALES_AT_LOAD = False
unsupported_size = kernel_problem
MODES = tuple(ScalesMode)
EXPERT_MULTIPLE = 128  # our kernel's; CUTLASS takes half of these


def matches(quantization_config: Mapping[str, Any]) -> bool:
    """Whether a checkpoint with this quantization_config is of this format."""
    return quantization_config.get("quant_method") == METHOD


def unserved_width(widths: Mapping[str, int]) -> str | None:
    """Return which kind of width keeps layers that vLLM merges in BF16; None if it can serve them.

    Every multiple of a tile is served. But narrow layers, and `in_proj` of state spaces and linear attention, have a
    channel for each head, whose number is soon split within a tile.
    """
    by_heads = min(widths.values()) < CUTLASS_MULTIPLE or any(name.startswith("in_proj") for name in widths)
    if sum(widths.values()) % CUTLASS_MULTIPLE and by_heads:
        return f"a narrow or per-head width, which tensor parallelism may not split into tiles of {TILE_N}"
    return None


def tensor_specs(module: str, n: int, k: int, mode: ScalesMode) -> tuple[TensorSpec, ...]:
    """Return the tensors that a layer with N = n and K = k becomes."""
    groups = k // GROUP_SIZE
    if mode is ScalesMode.DIRECT:
        tables = TensorSpec(f"{module}.weight_lut", "F8_E4M3", (groups, 8 * n))
    else:
        tables = TensorSpec(f"{module}.weight_scale", "F8_E4M3", (groups, n))
    return (
        TensorSpec(f"{module}.weight_packed", "I32", reordered_shape(n, k)),
        tables,
        TensorSpec(f"{module}.weight_chan_scale", "F32", (n,)),
    )


def find_problems(source_config: Mapping[str, Any]) -> Iterable[Problem]:
    """Yield what in a source's quantization_config the format cannot express."""
    if source_config.get("kv_cache_scheme"):
        yield Problem(
            "quantization_config: kv_cache_scheme", "is not part of --format lut", "use --format compressed-tensors"
        )


def encode(module: str, w: ServedLinear) -> dict[str, Iterable[torch.Tensor]]:
    """Return a layer's tensors by name, in parts along their first dimension."""
    assert isinstance(w, W4A8Linear)
    tensors: dict[str, Iterable[torch.Tensor]] = {
        f"{module}.weight_packed": lut_layout.reorder_parts(w.packed, w.packing),
        f"{module}.weight_chan_scale": [w.channel_scale],
    }
    if w.entries is not None:
        tensors[f"{module}.weight_lut"] = [w.entries.flatten(1)]
    elif w.group_scale is not None:
        tensors[f"{module}.weight_scale"] = [w.group_scale]
    return tensors


def find_layers(checkpoint: Checkpoint) -> list[str]:
    """Return the converted modules of a checkpoint of this format."""
    return checkpoint.modules_with("weight_packed")


def decode(checkpoint: Checkpoint, module: str, read: Reader) -> W4A8Linear:
    """Read a layer back, from the bytes of the checkpoint alone.

    Raises:
        ConvertError: a tensor is missing or has another shape than the format prescribes.

    """
    has_entries = f"{module}.weight_lut" in checkpoint.tensors
    rows, columns = packed_shape(checkpoint, module, "[K/32, 4·N]")
    n, k = columns // 4, rows * TILE_K
    if n % TILE_N or columns % 4:
        raise ConvertError(f"{module}.weight_packed", f"has {columns} columns, not 4·N", "convert the checkpoint again")
    check_tensors(checkpoint, tensor_specs(module, n, k, ScalesMode.DIRECT if has_entries else ScalesMode.REFERENCE))
    entries = read(checkpoint.tensors[f"{module}.weight_lut"]).view(-1, n, 8) if has_entries else None
    return W4A8Linear(
        packed=lut_layout.restore(read(checkpoint.tensors[f"{module}.weight_packed"])),
        packing=Packing.PACK_QUANTIZED,
        group_scale=None if has_entries else read(checkpoint.tensors[f"{module}.weight_scale"]),
        entries=entries,
        channel_scale=read(checkpoint.tensors[f"{module}.weight_chan_scale"]),
    )


def stored_mode(checkpoint: Checkpoint) -> ScalesMode:
    """Return a mode whose tensors a checkpoint of this format holds."""
    has_entries = any(name.endswith(".weight_lut") for name in checkpoint.tensors)
    return ScalesMode.DIRECT if has_entries else ScalesMode.SEARCH


def quantization_config(
    source_config: Mapping[str, Any],  # noqa: ARG001  (part of the Target interface)
    ignore: Sequence[str],
    mode: ScalesMode,
    conversion: Mapping[str, Any],
    mixture: Mixture | None = None,
) -> dict[str, Any]:
    """Return the quantization_config block of the output's config.json."""
    return {
        "quant_method": METHOD,
        "version": version_for(ignore, carried=mixture is not None),
        "layout": LAYOUT,
        "bits": 4,
        "group_size": GROUP_SIZE,
        "tables": str(TableForm.ENTRIES if mode is ScalesMode.DIRECT else TableForm.SCALE),
        "activations": {"type": "float8_e4m3fn", "strategy": "token", "dynamic": True},
        "ignore": list(ignore),
        **({"carried": _carried(mixture)} if mixture else {}),
        "conversion": dict(conversion),
    }


def _carried(mixture: Mixture) -> dict[str, Any]:
    """Return the block of compressed-tensors from which vLLM serves the layers that are carried over."""
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "ignore": [],
        "config_groups": mixture.groups(None),
    }


def serve_command(name: str) -> str:
    """Return how to serve a checkpoint, in one line."""
    return f"vllm serve {name}, with this package installed beside vLLM"


def card_section(again: str = "w4a8-convert IN OUT") -> str:
    """Return what the model card says of serving, in Markdown. again: the command that writes another format."""
    return f"""\
## Serve it

```
{install_command()}    # into vLLM's own environment: it brings the plugin that reads this format
vllm serve ORG/NAME    # this repository, or a directory with its files
```

{INSTALL_NOTE}.

Without the plugin vLLM stops with `Unknown quantization method: {METHOD}`. To serve without it, convert the source\
 with `{again} --format compressed-tensors`: vLLM reads that as it is, and repacks the weights at\
 every start."""
