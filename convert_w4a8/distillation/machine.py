"""What a training asks of the machine: the same bytes from run to run, and no waiting."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def deterministic(*devices: torch.device) -> Iterator[None]:
    """Have GPUs give the same bytes from run to run: of attention, without the kernels that add in any order.

    Where torch has no kernel that does, as for the cumulative sums of linear attention, it warns and takes another.
    """
    if not any(device.type == "cuda" for device in devices):
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before cuBLAS is first used
    settings: Any = torch.utils.deterministic
    before = {"mode": torch.are_deterministic_algorithms_enabled()}
    before["warn_only"] = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    settings.fill_uninitialized_memory = False  # nothing here reads what it did not write
    try:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
            yield
    finally:
        torch.use_deterministic_algorithms(**before)
        settings.fill_uninitialized_memory = filled


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor of the host on a device, without waiting until it is there."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
