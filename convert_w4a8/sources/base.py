"""What every input format offers, and the header checks that all of them share."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.errors import Refusal
from convert_w4a8.linear import W4Linear


@dataclass(frozen=True)
class LayerSpec:
    """One quantized linear layer, as headers and configuration describe it.

    group_size: input channels a group, already resolved (−1 in a configuration is all of K).
    symmetric, act_order: what the configuration says. The tensors decide when they are read.
    parts: role (qweight, scales, …) → tensor name.
    zero_offset: what the stored zero-points lack (1 for GPTQ v1).
    """

    name: str
    out_features: int
    in_features: int
    group_size: int
    symmetric: bool
    act_order: bool
    parts: Mapping[str, str]
    zero_offset: int = 0


class Source(Protocol):
    """An input format: a module with these names. `sources/__init__.py` lists them."""

    @property
    def NAME(self) -> str:  # noqa: N802  (a module constant where it is implemented)
        """Short name, as it appears in reports."""

    @property
    def ROLES(self) -> tuple[str, ...]:  # noqa: N802
        """The tensors of a quantized layer, apart from its bias."""

    @property
    def ANCHOR(self) -> str:  # noqa: N802
        """The one of them by which layers are found; the others cannot stand without it."""

    def matches(self, quantization_config: Mapping[str, Any]) -> bool:
        """Whether a quantization_config is of this format."""

    def find_layers(self, checkpoint: Checkpoint, refusals: list[Refusal]) -> list[LayerSpec]:
        """Return the quantized layers, from headers alone; what cannot be read is appended to `refusals`."""

    def read_zeros(self, checkpoint: Checkpoint, spec: LayerSpec) -> torch.Tensor | None:
        """Read one layer's zero-points uint8 [G, N]; None where all are 8."""

    def read_g_idx(self, checkpoint: Checkpoint, spec: LayerSpec) -> torch.Tensor | None:
        """Read one layer's g_idx int32 [K]; None where it says only k // group_size."""

    def read_layer(self, checkpoint: Checkpoint, spec: LayerSpec) -> W4Linear:
        """Read one layer's tensors."""
