"""What every input format offers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.checkpoint.safetensors_file import Reader, TensorInfo
from convert_w4a8.errors import Problem
from convert_w4a8.linear import DenseLinear, W4Linear


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One linear layer that is to be converted, as headers and configuration describe it.

    source: name of the input format, whose module reads the layer.
    group_size: input channels a group, already resolved (−1 in a configuration is all of K).
    symmetric, act_order: what the configuration says. The tensors decide when they are read.
    parts: role (qweight, scales, …) → where that tensor lies; it may be part of a larger one (experts in one tensor).
    dense: whether the layer is not quantized yet.
    has_zeros: whether there are stored zero-points, which decide when they are read.
    has_g_idx: the same of a g_idx.
    zero_offset: what the stored zero-points lack (1 for GPTQ v1).
    """

    name: str
    source: str
    out_features: int
    in_features: int
    group_size: int
    symmetric: bool
    act_order: bool
    parts: Mapping[str, TensorInfo]
    dense: bool = False
    has_zeros: bool = False
    has_g_idx: bool = False
    zero_offset: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(part.nbytes for part in self.parts.values())


class Source(Protocol):
    """An input format: a module of `sources/` with these names.

    One that describes FP8 layers as well has `find_carried`, too (`carried.py`).
    """

    @property
    def NAME(self) -> str:  # noqa: N802  (a module constant where it is implemented)
        """Short name, as it appears in reports."""

    @property
    def ROLES(self) -> tuple[str, ...]:  # noqa: N802
        """The tensors of a quantized layer, apart from its bias."""

    @property
    def ANCHOR(self) -> str:  # noqa: N802
        """The one of them by which layers are found; the others cannot stand without it."""

    def matches(self, checkpoint: Checkpoint) -> bool:
        """Whether a checkpoint is of this format, by its configuration and the names of its tensors."""

    def find_layers(self, checkpoint: Checkpoint, problems: list[Problem]) -> list[LayerSpec]:
        """Return the layers to be converted, from headers alone; what cannot be read is appended to `problems`."""

    def read_zeros(self, spec: LayerSpec, read: Reader) -> torch.Tensor | None:
        """Read one layer's zero-points uint8 [G, N]; None where all are 8."""

    def read_g_idx(self, spec: LayerSpec, read: Reader) -> torch.Tensor | None:
        """Read one layer's g_idx int32 [K]; None where it says only k // group_size."""

    def read_layer(self, spec: LayerSpec, read: Reader) -> W4Linear | DenseLinear:
        """Read one layer's tensors."""
