"""The forms in which a linear layer exists here: as a checkpoint stores it, and as the kernel takes it.

Input formats end in `W4Linear` or `DenseLinear`, output formats start from `W4A8Linear`, that of W4A16 from `W4Linear`;
nothing else passes between them.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

GROUP_SIZE = 128
"""Input channels that share one scale in vLLM's W4A8 kernels; nothing else is built."""


SYMMETRIC_ZERO = 8
"""The zero-point that unsigned INT4 storage has when the quantization is symmetric."""


@dataclass(frozen=True)
class Packing:
    """How eight unsigned 4-bit codes u (value = u − zero-point) lie in each int32 word of a matrix.

    name: which kernels unpack it; a packing that has none is unpacked by torch.
    axes: what the rows and the columns of the matrix number: "kn" or "nk", n output channels and k input channels.
    along: "k" or "n", the channels of which a word holds eight.
    order: nibble i of word w, low nibble first, is channel 8·w + order[i].
    """

    name: str
    axes: str
    along: str
    order: tuple[int, ...] = tuple(range(8))

    GPTQ: ClassVar["Packing"]
    """`qweight` int32 [K/8, N]."""
    AWQ: ClassVar["Packing"]
    """`qweight` int32 [K, N/8], the columns of a word in the order 0 2 4 6 1 3 5 7."""
    PACK_QUANTIZED: ClassVar["Packing"]
    """`weight_packed` int32 [N, K/8] of compressed-tensors."""

    def __str__(self) -> str:
        return self.name

    def shape_nk(self, packed: torch.Size) -> tuple[int, int]:
        """Return (N, K) = (out_features, in_features) of a packed tensor of this shape."""
        sizes = dict(zip(self.axes, packed, strict=True))
        sizes[self.along] *= 8
        return sizes["n"], sizes["k"]

    def slice_inputs(self, packed: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Return the packed codes of the input channels start … stop, both multiples of 8."""
        return self._slice(packed, "k", start, stop)

    def slice_outputs(self, packed: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Return the packed codes of the output channels start … stop, both multiples of 8."""
        return self._slice(packed, "n", start, stop)

    def _slice(self, packed: torch.Tensor, axis: str, start: int, stop: int) -> torch.Tensor:
        unit = 8 if axis == self.along else 1
        part = slice(start // unit, stop // unit)
        return packed[part] if self.axes[0] == axis else packed[:, part]


Packing.GPTQ = Packing("gptq", "kn", "k")
Packing.AWQ = Packing("awq", "kn", "n", (0, 2, 4, 6, 1, 3, 5, 7))
Packing.PACK_QUANTIZED = Packing("pack_quantized", "nk", "k")


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

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.packed.device

    def to(self, device: torch.device) -> "W4Linear":
        """Return the layer on another device."""
        return replace(
            self,
            packed=self.packed.to(device),
            scales=self.scales.to(device),
            zeros=None if self.zeros is None else self.zeros.to(device),
            g_idx=None if self.g_idx is None else self.g_idx.to(device),
        )

    def output_channels(self, start: int, stop: int) -> "W4Linear":
        """Return the layer's output channels start … stop, both multiples of 8."""
        zeros = None if self.zeros is None else self.zeros[:, start:stop]
        packed = self.packing.slice_outputs(self.packed, start, stop)
        return replace(self, packed=packed, scales=self.scales[:, start:stop], zeros=zeros)

    @property
    def is_kernel_ready(self) -> bool:
        """Whether the kernel takes codes and scales as they are: symmetric, contiguous groups of 128."""
        return self.zeros is None and self.g_idx is None and self.group_size == GROUP_SIZE


@dataclass(frozen=True)
class DenseLinear:
    """A linear layer that is not quantized yet. weight: bfloat16, float16 or float32 [N, K]."""

    weight: torch.Tensor

    @property
    def shape_nk(self) -> tuple[int, int]:
        """(N, K) = (out_features, in_features)."""
        n, k = self.weight.shape
        return n, k

    @property
    def device(self) -> torch.device:
        """Where its weight is."""
        return self.weight.device

    def to(self, device: torch.device) -> "DenseLinear":
        """Return the layer on another device."""
        return DenseLinear(self.weight.to(device))

    def output_channels(self, start: int, stop: int) -> "DenseLinear":
        """Return the layer's output channels start … stop."""
        return DenseLinear(self.weight[start:stop])


def kept_groups(w: W4Linear | DenseLinear) -> torch.Tensor:
    """Return which groups of 128 keep the values of their codes in a conversion, bool [N, K/128].

    This is the one definition of kept codes. The kernel knows symmetric codes in contiguous groups of 128. Groups of a
    multiple of 128 repeat their scale. A zero-point of 8 keeps codes and scale; one of 7 stands for the values −7 … 8,
    which are −8 … 7 of the negated scale. All other codes are chosen anew. K is a multiple of 128.
    """
    n, k = w.shape_nk
    groups = k // GROUP_SIZE
    if isinstance(w, DenseLinear) or has_activation_order(w) or w.group_size % GROUP_SIZE:
        return torch.zeros(n, groups, dtype=torch.bool, device=w.device)
    if w.zeros is None:
        return torch.ones(n, groups, dtype=torch.bool, device=w.device)
    return kept_zeros(w.zeros).t().repeat_interleave(w.group_size // GROUP_SIZE, dim=1)


def has_activation_order(w: W4Linear) -> bool:
    """Whether a g_idx says more than k // group_size."""
    if w.g_idx is None:
        return False
    contiguous = torch.arange(len(w.g_idx), device=w.g_idx.device) // w.group_size
    return not torch.equal(w.g_idx.long(), contiguous)


def kept_zeros(zeros: torch.Tensor) -> torch.Tensor:
    """Return under which zero-points, uint8 [G, N], the kernel has all values of the codes: bool [G, N]."""
    return (zeros == SYMMETRIC_ZERO) | (zeros == SYMMETRIC_ZERO - 1)


def keeps_codes(w: W4Linear | DenseLinear) -> bool:
    """Whether all codes of a layer keep their values in a conversion (`kept_groups`)."""
    return bool(kept_groups(w).all())


@dataclass(frozen=True)
class W4A8Linear:
    """A linear layer as vLLM's W4A8 kernel takes it: symmetric INT4 codes, FP8 tables, FP32 channel scales.

    What the tensor core multiplies by is entry(g, n, code)·channel_scale[n]; `encoding/tables.py` says how the eight
    entries of a table come from a group scale.

    packed: int32, unsigned codes (value = u − 8) in `packing`.
    group_scale: float8_e4m3fn [K/128, N], with the 1/8 inside: |group_scale|·8 ≤ 448. None if `entries` is given.
    entries: float8_e4m3fn [K/128, N, 8], the table entries for codes −8 … −1 where they are stored; else None.
    channel_scale: float32 [N].
    source_scale: bfloat16 [K/128, N], only for output formats that leave the FP8 quantization to vLLM: the
        scales from which vLLM computes exactly `group_scale` and `channel_scale`.
    """

    packed: torch.Tensor
    packing: Packing
    group_scale: torch.Tensor | None
    entries: torch.Tensor | None
    channel_scale: torch.Tensor
    source_scale: torch.Tensor | None = None

    @property
    def shape_nk(self) -> tuple[int, int]:
        """(N, K) = (out_features, in_features)."""
        return self.packing.shape_nk(self.packed.shape)

    def output_channels(self, start: int, stop: int) -> "W4A8Linear":
        """Return the layer's output channels start … stop, both multiples of 8."""

        def part(scale: torch.Tensor | None) -> torch.Tensor | None:
            return None if scale is None else scale[:, start:stop]

        return W4A8Linear(
            packed=self.packing.slice_outputs(self.packed, start, stop),
            packing=self.packing,
            group_scale=part(self.group_scale),
            entries=part(self.entries),
            channel_scale=self.channel_scale[start:stop],
            source_scale=part(self.source_scale),
        )


ServedLinear = W4A8Linear | W4Linear
"""A layer of an output: W4A8 as the kernel takes it, or W4A16, symmetric and in groups of 128."""
