"""Reading both checkpoints through the safetensors library, so that the proof does not share the converter's reader."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from convert_w4a8.checkpoint.safetensors_file import TORCH_DTYPES, TensorInfo
from convert_w4a8.errors import ConvertError


class LibraryReader:
    """Reads tensors as the library finds them. They are views of mapped files: only what is looked at is read."""

    def __init__(self) -> None:
        self._files: dict[Path, Any] = {}

    def __call__(self, info: TensorInfo) -> torch.Tensor:
        """Return a tensor, or part of one.

        Raises:
            ConvertError: the library cannot read it, or finds another dtype or shape than our own header check.

        """
        whole = info.whole or info
        try:
            if info.path not in self._files:
                self._files[info.path] = safe_open(info.path, framework="pt")
            tensor: torch.Tensor = self._files[info.path].get_tensor(whole.name)
        except (SafetensorError, OSError) as error:
            raise ConvertError(
                f"{info.path}: tensor {whole.name!r}",
                f"cannot be read by the safetensors library ({error})",
                "download or write the file again",
            ) from error
        if (tensor.dtype, tuple(tensor.shape)) != (TORCH_DTYPES[whole.dtype], whole.shape):
            raise ConvertError(
                f"{info.path}: tensor {whole.name!r}",
                f"is {tensor.dtype} {list(tensor.shape)} for the safetensors library, not {whole.dtype}"
                f" {list(whole.shape)}",
                "download or write the file again",
            )
        if info is whole:
            return tensor
        first = (info.start - whole.start) // tensor.itemsize
        return tensor.reshape(-1)[first : first + info.nbytes // tensor.itemsize].view(info.shape)

    def flat_bytes(self, info: TensorInfo) -> torch.Tensor:
        """Return a tensor's bytes, uint8 [nbytes]."""
        return self(info).reshape(-1).view(torch.uint8)
