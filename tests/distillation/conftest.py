"""A teacher, what it was quantized to, and two domains of random text."""

from pathlib import Path

import pytest
from small_training import quantized, write_data
from tiny_models import write_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the teacher."""
    return write_llama(tmp_path_factory.mktemp("model") / "teacher", layers=2, initializer_range=0.06)


@pytest.fixture(scope="module")
def start(model: Path) -> Path:
    """Quantize it."""
    return quantized(model, model.parent / "start")


@pytest.fixture(scope="module")
def data(model: Path) -> list[Path]:
    """Two domains."""
    return [write_data(model.parent / f"{name}.jsonl", seed) for seed, name in enumerate(("one", "two"))]
