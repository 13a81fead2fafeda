"""The tokenizer of the trained Llama; tests of chats are skipped without it, or without transformers."""

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def tokenizer(shared: Path) -> Any:
    """Open it once; tests change copies."""
    pytest.importorskip("transformers", reason="the extra `quantize` is not installed")
    from convert_w4a8.samples.tokenizer import open_tokenizer

    return open_tokenizer(shared / "models" / "llama-31m-bf16")
