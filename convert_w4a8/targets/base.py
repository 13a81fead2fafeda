"""What every output format offers."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch

from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.checkpoint.safetensors_file import TensorSpec
from convert_w4a8.errors import ConvertError
from convert_w4a8.linear import W4A8Linear
from convert_w4a8.options import ScalesMode


class Target(Protocol):
    """An output format: a module with these names. `targets/__init__.py` lists them."""

    @property
    def NAME(self) -> str:  # noqa: N802  (a module constant where it is implemented)
        """Short name: the value of --format."""

    @property
    def STOCK(self) -> bool:  # noqa: N802
        """Whether vLLM itself quantizes the scales at load, so that only what it reproduces may be chosen."""

    @property
    def MODES(self) -> tuple[ScalesMode, ...]:  # noqa: N802
        """The scale modes that the format can hold."""

    def matches(self, quantization_config: Mapping[str, Any]) -> bool:
        """Whether a checkpoint with this quantization_config is of this format."""

    def outputs(self, module: str, n: int, k: int, mode: ScalesMode) -> tuple[TensorSpec, ...]:
        """Return the tensors that a layer with N = n and K = k becomes."""

    def encode(self, module: str, w: W4A8Linear) -> dict[str, Iterable[torch.Tensor]]:
        """Return a layer's tensors by name, each in parts along its first dimension, which may be made when asked."""

    def find_layers(self, checkpoint: Checkpoint) -> list[str]:
        """Return the converted modules of a checkpoint of this format."""

    def decode(self, checkpoint: Checkpoint, module: str) -> W4A8Linear:
        """Read a layer back, from the bytes of the checkpoint alone."""

    def quantization_config(
        self, source_config: Mapping[str, Any], ignore: Sequence[str], mode: ScalesMode, conversion: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return the quantization_config block of the output's config.json."""


def check_outputs(checkpoint: Checkpoint, specs: Iterable[TensorSpec]) -> None:
    """Raise ConvertError unless a checkpoint has tensors of these names, dtypes and shapes."""
    for spec in specs:
        info = checkpoint.tensors.get(spec.name)
        if info is None or (info.dtype, info.shape) != (spec.dtype, spec.shape):
            raise ConvertError(spec.name, f"is not {spec.dtype} {list(spec.shape)}", "convert the checkpoint again")


def packed_shape(checkpoint: Checkpoint, module: str, formula: str) -> tuple[int, int]:
    """Return the shape of a module's weight_packed.

    Raises:
        ConvertError: it is not a non-empty matrix (`formula` says what it should be).

    """
    name = f"{module}.weight_packed"
    shape = checkpoint.tensors[name].shape
    if len(shape) != 2 or 0 in shape:
        raise ConvertError(name, f"has the shape {list(shape)}, not {formula}", "convert the checkpoint again")
    return shape[0], shape[1]
