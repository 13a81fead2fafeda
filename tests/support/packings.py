"""Packings of INT4 codes: those that have kernels, others that have none, and codes packed word by word."""

import numpy as np
import numpy.typing as npt
import torch

from convert_w4a8.linear import Packing

WITH_KERNELS = (Packing.GPTQ, Packing.AWQ, Packing.PACK_QUANTIZED)
WITHOUT_KERNELS = (
    Packing("nk_n", "nk", "n", (3, 1, 4, 0, 5, 7, 2, 6)),
    Packing("kn_k", "kn", "k", (0, 2, 4, 6, 1, 3, 5, 7)),
    Packing("awq", "kn", "n"),  # AWQ's name is not enough: its order is another
)
"""The last pair of axes, orders that are not their own inverses, and a name that promises a kernel."""
ALL = WITH_KERNELS + WITHOUT_KERNELS


def packing_id(packing: Packing) -> str:
    """Return a packing's name in the names of tests."""
    return packing.name if packing in WITH_KERNELS else f"other_{packing.name}"


def random_codes(n: int, k: int, seed: int = 0) -> torch.Tensor:
    """Return unsigned codes, uint8 [N, K]."""
    return torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def pack(codes: torch.Tensor, packing: Packing) -> torch.Tensor:
    """Pack codes uint8 [N, K] nibble by nibble: as its tools do, where there are some, else by a packing's fields."""
    u = codes.numpy().astype(np.uint32)
    match packing:
        case Packing.GPTQ:
            words = _join([u.T[i::8] for i in range(8)])
        case Packing.AWQ:
            words = _join([u.T[:, column::8] for column in (0, 2, 4, 6, 1, 3, 5, 7)])
        case Packing.PACK_QUANTIZED:
            words = _join([u[:, i::8] for i in range(8)])
        case _:
            return pack_by_fields(codes, packing)
    return torch.from_numpy(words).clone(memory_format=torch.contiguous_format)


def pack_by_fields(codes: torch.Tensor, packing: Packing) -> torch.Tensor:
    """Pack codes uint8 [N, K] as the documentation of `Packing` says."""
    u = codes.numpy().astype(np.uint32)
    channels = u if packing.along == "n" else u.T
    words = _join([channels[channel::8] for channel in packing.order])
    by_axes = words if packing.axes[0] == packing.along else words.T
    return torch.from_numpy(by_axes).clone(memory_format=torch.contiguous_format)


def _join(nibbles: list[npt.NDArray[np.uint32]]) -> npt.NDArray[np.int32]:
    """Return words of eight nibbles, the lowest first."""
    words = np.zeros(nibbles[0].shape, np.uint32)
    for i, nibble in enumerate(nibbles):
        words |= nibble << np.uint32(4 * i)
    return words.view(np.int32)


def random_words(packing: Packing, n: int, k: int) -> torch.Tensor:
    """Return random codes of an [N, K] layer, packed; every int32 is eight codes."""
    sizes = {"n": n, "k": k}
    sizes[packing.along] //= 8
    shape = tuple(sizes[axis] for axis in packing.axes)
    generator = torch.Generator().manual_seed(n * k)
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, generator=generator)
