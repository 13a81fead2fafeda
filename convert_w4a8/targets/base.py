"""What every output format offers."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch

from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.checkpoint.mixture import Mixture
from convert_w4a8.checkpoint.safetensors_file import Reader, TensorSpec
from convert_w4a8.errors import ConvertError, Problem
from convert_w4a8.linear import GROUP_SIZE, ServedLinear
from convert_w4a8.lut_format import TILE_N
from convert_w4a8.options import ScalesMode

CUTLASS_MULTIPLE = 128
"""What the width N of a layer, as vLLM merges it, is a multiple of for its own kernel (`cutlass_w4a8_mm`)."""


class Target(Protocol):
    """An output format: a module of `targets/` with these names. All that depends on the format is said here."""

    @property
    def NAME(self) -> str:  # noqa: N802  (a module constant where it is implemented)
        """Short name: the value of --format, and the name of its file with dashes."""

    @property
    def SCHEME(self) -> str:  # noqa: N802
        """What is quantized how: `W4A8` or `W4A16`."""

    @property
    def SCALES_AT_LOAD(self) -> bool:  # noqa: N802
        """Whether vLLM itself quantizes the scales at load, so that only what it reproduces may be chosen."""

    @property
    def MODES(self) -> tuple[ScalesMode, ...]:  # noqa: N802
        """The scale modes that the format can hold."""

    @property
    def EXPERT_MULTIPLE(self) -> int:  # noqa: N802
        """What N and K of an expert are multiples of for the kernels that serve the format."""

    def matches(self, quantization_config: Mapping[str, Any]) -> bool:
        """Whether a checkpoint with this quantization_config is of this format."""

    def find_problems(self, source_config: Mapping[str, Any]) -> Iterable[Problem]:
        """Yield what in a source's quantization_config the format cannot express."""

    def unsupported_size(self, n: int, k: int) -> str | None:
        """Return why a layer with N = n and K = k cannot be in this format; None if it can."""

    def unserved_width(self, widths: Mapping[str, int]) -> str | None:
        """Return which kind of width keeps layers that vLLM merges in BF16; None if it can serve them.

        widths: N of each, by the last part of its name.
        """

    def tensor_specs(self, module: str, n: int, k: int, mode: ScalesMode) -> tuple[TensorSpec, ...]:
        """Return the tensors that a layer with N = n and K = k becomes."""

    def encode(self, module: str, w: ServedLinear) -> dict[str, Iterable[torch.Tensor]]:
        """Return a layer's tensors by name, each in parts along its first dimension, which may be made when asked."""

    def find_layers(self, checkpoint: Checkpoint) -> list[str]:
        """Return the converted modules of a checkpoint of this format."""

    def decode(self, checkpoint: Checkpoint, module: str, read: Reader) -> ServedLinear:
        """Read a layer back, from the bytes of the checkpoint alone."""

    def stored_mode(self, checkpoint: Checkpoint) -> ScalesMode:
        """Return a mode whose tensors a checkpoint of this format holds."""

    def quantization_config(
        self,
        source_config: Mapping[str, Any],
        ignore: Sequence[str],
        mode: ScalesMode,
        conversion: Mapping[str, Any],
        mixture: Mixture | None = None,
    ) -> dict[str, Any]:
        """Return the quantization_config block of the output's config.json.

        mixture: given where layers are carried over beside those that are converted.
        """

    def serve_command(self, name: str) -> str:
        """Return how to serve a checkpoint, in one line."""

    def card_section(self, again: str = ...) -> str:
        """Return what the model card says of serving, in Markdown. again: the command that writes another format."""


def make_block(
    target: Target,
    source_config: Mapping[str, Any],
    ignore: Sequence[str],
    mode: ScalesMode,
    conversion: Mapping[str, Any],
    mixture: Mixture,
) -> dict[str, Any]:
    """Return the quantization_config block of an output. It names its layers only where some are carried over."""
    if mixture.carried:
        return target.quantization_config(source_config, ignore, mode, conversion, mixture)
    return target.quantization_config(source_config, ignore, mode, conversion)


def kernel_problem(n: int, k: int) -> str | None:
    """Return why vLLM's W4A8 kernels cannot take a layer with N = n and K = k; None if they can."""
    if n % TILE_N:
        return f"N = {n} is not a multiple of {TILE_N}"
    if k % GROUP_SIZE:
        return f"K = {k} is not a multiple of {GROUP_SIZE}"
    return None


def check_tensors(checkpoint: Checkpoint, specs: Iterable[TensorSpec]) -> None:
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
