"""A further term of the loss: how far the outputs of the student's decoder blocks are from those of the teacher's."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from convert_w4a8.errors import ConvertError

_HIDDEN = "--hidden-weight"


def blocks_of(model: nn.Module, option: str) -> nn.ModuleList:
    """Return the decoder blocks of a model of transformers, which an option needs.

    Raises:
        ConvertError: it has them elsewhere than most models, as Falcon and GPT-2 do.

    """
    part: Any = model
    decoder = part.get_decoder() if hasattr(model, "get_decoder") else None
    found = getattr(decoder, "layers", None)
    if not isinstance(found, nn.ModuleList):
        reason = f"needs the blocks of the model, and where transformers' {type(model).__name__} has them is not known"
        raise ConvertError(option, reason, f"leave out {option}")
    return found


@contextmanager
def block_outputs(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Catch the outputs [B, T, H] of decoder blocks while a model runs, in their order."""
    outputs: list[torch.Tensor] = []

    def catch(_module: nn.Module, _inputs: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    hooks = [block.register_forward_hook(catch) for block in blocks_of(model, _HIDDEN)]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def difference_of_hidden(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return ‖h_s − h_t‖² / ‖h_t‖², the mean over tokens and blocks, of hidden states [C, H] of each block."""
    found = []
    for student, teacher in zip(ours, theirs, strict=True):
        reference = teacher.float()
        size = reference.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
        found.append(((student.float() - reference).square().sum(-1) / size).mean())
    return torch.stack(found).mean()


def sizes_of_blocks(model: nn.Module) -> tuple[int, int]:
    """Return how many blocks a model has, and how many channels."""
    return len(blocks_of(model, _HIDDEN)), _width(model)


def check_blocks(ours: Sequence[int | None], theirs: Sequence[int | None]) -> None:
    """Check that blocks of two models, of which number and channels are given, can be compared.

    Raises:
        ConvertError: they are of other number or size.

    """
    if list(ours) != list(theirs):
        raise ConvertError(
            _HIDDEN,
            f"compares blocks; the teacher has {theirs[0]} of {theirs[1]} channels, OUT_W4A8 {ours[0]} of {ours[1]}",
            "leave it out, or give the model that OUT_W4A8 was made from as --teacher",
        )


def _width(model: nn.Module) -> int:
    part: Any = model
    size: int = part.get_input_embeddings().weight.shape[1]
    return size
