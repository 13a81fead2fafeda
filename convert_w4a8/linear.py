"""The two forms in which a linear layer exists here: as a checkpoint stores it, and as the kernel takes it.

Input formats end in `W4Linear`, output formats start from `W4A8Linear`; nothing else passes between them.
"""

from dataclasses import dataclass, replace
from enum import StrEnum

import torch

GROUP_SIZE = 128
"""Input channels that share one scale in vLLM's W4A8 kernels; nothing else is built."""


SYMMETRIC_ZERO = 8
"""The zero-point that unsigned INT4 storage has when the quantization is symmetric."""


class Packing(StrEnum):
    """How eight unsigned 4-bit codes u (value = u − zero-point) lie in each int32 word, low nibble first."""

    GPTQ = "gptq"
    """`qweight` int32 [K/8, N]: nibble i of word [w, n] is code [8w + i, n]."""
    AWQ = "awq"
    """`qweight` int32 [K, N/8]: nibble i of word [k, w] is code [k, 8w + (0, 2, 4, 6, 1, 3, 5, 7)[i]]."""
    ROWS = "rows"
    """`weight_packed` int32 [N, K/8] of compressed-tensors: nibble i of word [n, w] is code [n, 8w + i]."""

    def shape_nk(self, packed: torch.Size) -> tuple[int, int]:
        """Return (N, K) = (out_features, in_features) of a packed tensor of this shape."""
        rows, columns = packed
        match self:
            case Packing.GPTQ:
                return columns, rows * 8
            case Packing.AWQ:
                return columns * 8, rows
            case Packing.ROWS:
                return rows, columns * 8

    def slice_inputs(self, packed: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Return the packed codes of the input channels start … stop, both multiples of 8."""
        match self:
            case Packing.GPTQ:
                return packed[start // 8 : stop // 8]
            case Packing.AWQ:
                return packed[start:stop]
            case Packing.ROWS:
                return packed[:, start // 8 : stop // 8]

    def slice_outputs(self, packed: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Return the packed codes of the output channels start … stop, both multiples of 8."""
        match self:
            case Packing.GPTQ:
                return packed[:, start:stop]
            case Packing.AWQ:
                return packed[:, start // 8 : stop // 8]
            case Packing.ROWS:
                return packed[start:stop]


@dataclass(frozen=True)
class W4Linear:
    """An INT4 linear layer as its checkpoint means it: w[n, k] = (code[n, k] − zero[g, n])·scale[g, n].

    g is `g_idx[k]`, or k // group_size where `g_idx` is None.

    packed: int32, codes in the input's own packing.
    scales: float16, bfloat16 or float32 [G, N], with the values that were stored.
    zeros: uint8 [G, N], or None where every zero-point is 8 (symmetric).
    g_idx: int32 [K], or None where the groups are contiguous.
    group_size: input channels a group; G = K / group_size.
    """

    packed: torch.Tensor
    packing: Packing
    scales: torch.Tensor
    zeros: torch.Tensor | None
    g_idx: torch.Tensor | None
    group_size: int

    @property
    def shape_nk(self) -> tuple[int, int]:
        """(N, K) = (out_features, in_features)."""
        return self.packing.shape_nk(self.packed.shape)

    def outputs(self, start: int, stop: int) -> "W4Linear":
        """Return the layer's output channels start … stop, both multiples of 8."""
        zeros = None if self.zeros is None else self.zeros[:, start:stop]
        packed = self.packing.slice_outputs(self.packed, start, stop)
        return replace(self, packed=packed, scales=self.scales[:, start:stop], zeros=zeros)

    @property
    def is_kernel_ready(self) -> bool:
        """Whether the codes can be kept: symmetric, contiguous groups of 128."""
        return self.zeros is None and self.g_idx is None and self.group_size == GROUP_SIZE


@dataclass(frozen=True)
class W4A8Linear:
    """A linear layer as vLLM's W4A8 kernel takes it: symmetric INT4 codes, FP8 tables, FP32 channel scales.

    What the tensor core multiplies by is entry(g, n, code)·channel_scale[n]; `tables.py` says how the eight
    entries of a table come from a group scale.

    packed: int32, unsigned codes (value = u − 8) in `packing`.
    group_scale: float8_e4m3fn [K/128, N], with the 1/8 inside: |group_scale|·8 ≤ 448. None if `lut` is given.
    lut: float8_e4m3fn [K/128, N, 8], the entries for codes −8 … −1, where they are stored directly; else None.
    channel_scale: float32 [N].
    source_scale: bfloat16 [K/128, N], only for output formats that leave the FP8 quantization to vLLM: the
        scales from which vLLM computes exactly `group_scale` and `channel_scale`.
    """

    packed: torch.Tensor
    packing: Packing
    group_scale: torch.Tensor | None
    lut: torch.Tensor | None
    channel_scale: torch.Tensor
    source_scale: torch.Tensor | None = None

    @property
    def shape_nk(self) -> tuple[int, int]:
        """(N, K) = (out_features, in_features)."""
        return self.packing.shape_nk(self.packed.shape)

    def outputs(self, start: int, stop: int) -> "W4A8Linear":
        """Return the layer's output channels start … stop, both multiples of 8."""

        def part(scale: torch.Tensor | None) -> torch.Tensor | None:
            return None if scale is None else scale[:, start:stop]

        return W4A8Linear(
            packed=self.packing.slice_outputs(self.packed, start, stop),
            packing=self.packing,
            group_scale=part(self.group_scale),
            lut=part(self.lut),
            channel_scale=self.channel_scale[start:stop],
            source_scale=part(self.source_scale),
        )
