"""transformers' classes for a checkpoint, by its config.json alone; no code of the checkpoint is run."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.checkpoint.files import CONFIG
from convert_w4a8.devices import is_out_of_memory
from convert_w4a8.errors import ConvertError, W4A8Error
from convert_w4a8.version import install_command


@contextmanager
def transformers_for(checkpoint: Checkpoint, asked_by: str, remedy: str) -> Iterator[tuple[Any, Any]]:
    """Give transformers and its configuration of a checkpoint, to make the model with.

    asked_by: what needs it. remedy: what helps where transformers does not know the model, beside another transformers.

    Raises:
        ConvertError: there is no transformers, or it cannot make the model.
        MemoryError, RuntimeError: there is not enough memory (`is_out_of_memory`).

    """
    try:
        import transformers  # noqa: PLC0415  (an extra; it takes seconds)
    except ImportError as error:
        reason = "needs transformers, which is not installed"
        raise ConvertError(asked_by, reason, install_command("quantize")) from error
    try:
        yield transformers, transformers.AutoConfig.from_pretrained(checkpoint.root, trust_remote_code=False)
    except W4A8Error:
        raise
    except Exception as error:  # transformers raises of any kind, for settings that do not go together
        if is_out_of_memory(error):
            raise
        line = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ConvertError(
            f"{CONFIG}: model_type {checkpoint.config.get('model_type')!r}",
            f"cannot be built by transformers {transformers.__version__} ({line})",
            f"install another transformers, or {remedy}",
        ) from error
