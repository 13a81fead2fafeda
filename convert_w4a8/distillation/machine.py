"""What a training asks of the machine: the same bytes from run to run, and memory."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from convert_w4a8.errors import ConvertError


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turn a failed allocation, on whatever device, into one line.

    Raises:
        ConvertError: there is not enough memory.

    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if type(error) is RuntimeError and "allocate memory" not in str(error):
            raise
        reason = "does not fit into the memory that there is: the models, their gradients and moments, and a batch"
        remedy = "give fewer --batch-tokens, --max-length, --recompute, or a --teacher-device of its own"
        raise ConvertError("the training", reason, remedy) from error


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Have a GPU give the same bytes from run to run: of attention, without the kernels that add in any order."""
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before cuBLAS is first used
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(mode=True)
    try:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
            yield
    finally:
        torch.use_deterministic_algorithms(mode=before)
