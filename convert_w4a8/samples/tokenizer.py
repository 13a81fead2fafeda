"""The model's own tokenizer and chat template, through transformers."""

import importlib.util
from pathlib import Path
from typing import Any

from convert_w4a8.errors import ConvertError
from convert_w4a8.version import install_command

Tokenizer = Any
"""A fast tokenizer of transformers (`PreTrainedTokenizerBase`)."""


def open_tokenizer(directory: Path) -> Tokenizer:
    """Open the tokenizer of a checkpoint. No code of the checkpoint is run, and nothing is downloaded.

    Raises:
        ConvertError: transformers is not installed, or there is no tokenizer that it can open.

    """
    missing = [name for name in ("transformers", "jinja2") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConvertError("--data", f"tokens need {' and '.join(missing)}", install_command("quantize"))
    from transformers import AutoTokenizer  # noqa: PLC0415
    from transformers.utils import logging  # noqa: PLC0415

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        found = AutoTokenizer.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False, use_fast=True
        )
    except Exception as error:
        reason = f"has no tokenizer that transformers opens ({first_line(error)})"
        raise ConvertError(str(directory), reason, "give the data as input_ids, or add tokenizer.json") from error
    if not getattr(found, "is_fast", False):
        reason = f"its tokenizer ({type(found).__name__}) does not tell where in the text a token stands"
        raise ConvertError(str(directory), reason, "add a tokenizer.json, as `AutoTokenizer.save_pretrained` writes it")
    return found


def first_line(error: BaseException) -> str:
    """Return what an exception of another library says, as far as one line holds it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
