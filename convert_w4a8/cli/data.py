"""Text that commands read by a model's tokenizer, and the page that shows what counts of it."""

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convert_w4a8.checkpoint.directory import Checkpoint
    from convert_w4a8.samples.masks import MaskOptions
    from convert_w4a8.samples.sample import SampleSet


class _Tokenizer:
    """The tokenizer of a checkpoint, opened when something asks for it: data of input_ids need none."""

    def __init__(self, root: Path) -> None:
        self._root = root

    @cached_property
    def _opened(self) -> Any:
        from convert_w4a8.samples.tokenizer import open_tokenizer

        return open_tokenizer(self._root)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._opened, name)

    def __call__(self, *args: Any, **more: Any) -> Any:
        return self._opened(*args, **more)

    def __len__(self) -> int:
        return len(self._opened)


def read_data(
    checkpoint: "Checkpoint",
    data: tuple[Path, ...],
    mask: "MaskOptions | None",
    max_tokens: int | None = None,
    max_length: int | None = None,
) -> "SampleSet":
    """Read data with the tokenizer of a checkpoint. max_tokens, max_length: as for `read_samples`."""
    from convert_w4a8.samples.masks import NO_MASK
    from convert_w4a8.samples.read import read_samples

    return read_samples(
        data,
        _Tokenizer(checkpoint.root),
        mask or NO_MASK,
        max_tokens=max_tokens,
        max_length=max_length,
        vocab_size=checkpoint.number("vocab_size"),
    )


def page_of(samples: "SampleSet", checkpoint: "Checkpoint") -> bytes:
    """Return an HTML page of the counts of tokens and one sample, coloured. It needs the tokenizer to show text."""
    from convert_w4a8.report import tokens
    from convert_w4a8.samples.tokenizer import open_tokenizer

    return tokens.page(samples, open_tokenizer(checkpoint.root)).encode(errors="backslashreplace")
