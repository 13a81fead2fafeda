"""Random layers of one shape, in the LUT layout and as W4A16 checkpoints have them, made when first asked for."""

import math
from functools import cached_property

import torch

from convert_w4a8.encoding.tables import index_scales, multiply_tables
from convert_w4a8.kernels.gemm import reference

GROUP = 128


class Layers:
    """So many random layers of one shape, by default as many as exceed the L2 four times."""

    def __init__(self, n: int, k: int, count: int | None = None, *, device: str = "cuda") -> None:
        self.n, self.k, self.device = n, k, device
        self.nbytes = n * k // 2 + n * k // GROUP
        """Of the codes, and of a byte for each group: an index, or a scale of FP8."""
        self.count = count or max(3, math.ceil(4 * torch.cuda.get_device_properties(0).L2_cache_size / self.nbytes))

    @cached_property
    def packed(self) -> list[torch.Tensor]:
        """Return codes in the LUT layout, int32 [K/32, 4·N]."""
        return [self._words(self.k // 32, 4 * self.n) for _ in range(self.count)]

    @cached_property
    def tables(self) -> list[torch.Tensor]:
        """Return tables float8_e4m3fn [K/128, N, 8], multiples of group scales of either sign."""
        return [multiply_tables(index.view(torch.float8_e4m3fn)) for index in self.index]

    @cached_property
    def index(self) -> list[torch.Tensor]:
        """Return the same as indices into `distinct`, uint8 [K/128, N]: the bytes of the scales."""
        size = (self.k // GROUP, self.n)
        random = (torch.randn(size, device=self.device).mul(8).clamp(-56, 56) for _ in range(self.count))
        return [scales.to(torch.float8_e4m3fn).view(torch.uint8) for scales in random]

    @cached_property
    def distinct(self) -> torch.Tensor:
        """Return the tables that a byte can stand for, float8_e4m3fn [256, 8]."""
        return index_scales(self.index[0].view(torch.float8_e4m3fn))[1]

    @cached_property
    def channel(self) -> torch.Tensor:
        """Return channel scales, float32 [N]."""
        return torch.rand(self.n, device=self.device) / 64

    @cached_property
    def words(self) -> list[torch.Tensor]:
        """Return codes of a W4A16 checkpoint, int32 [N, K/8], in the order of K from the lowest nibble, with bias 8."""
        return [self._words(self.n, self.k // 8) for _ in range(self.count)]

    @cached_property
    def scales(self) -> torch.Tensor:
        """Return scales of a W4A16 checkpoint, bfloat16 [N, K/128]."""
        return (torch.rand(self.n, self.k // GROUP, device=self.device) / 64).bfloat16()

    @cached_property
    def lut_weights(self) -> torch.Tensor:
        """Return what the first layer in the LUT layout stands for, float32 [N, K], without the channel scales."""
        return reference.weights(self.packed[0], self.tables[0])

    @cached_property
    def w4a16_weights(self) -> torch.Tensor:
        """Return what the first W4A16 layer stands for, float32 [N, K]."""
        return w4a16_weights(self.words[0], self.scales)

    def _words(self, rows: int, columns: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31, (rows, columns), dtype=torch.int32, device=self.device)


def w4a16_weights(words: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return float32 [N, K] of codes int32 [N, K/8] and scales [N, K/128], as `Layers` has them."""
    nibbles = (words[..., None] >> (4 * torch.arange(8, device=words.device))) & 15
    codes = nibbles.flatten(1).float() - 8
    return codes * scales.float().repeat_interleave(GROUP, 1)
