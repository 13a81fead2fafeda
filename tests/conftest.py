"""What every test needs before its import: the Triton interpreter, Hypothesis profiles, the shared data."""

import os
from pathlib import Path

import hypothesis
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"

# Triton decides between interpreter and compiler when `@triton.jit` runs, so this stands before any of our
# modules is imported. It holds in xdist workers too: each of them imports this file.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

hypothesis.settings.register_profile(
    "default", deadline=None, max_examples=25, derandomize="CI" in os.environ, print_blob=True
)
hypothesis.settings.register_profile("thorough", parent=hypothesis.settings.get_profile("default"), max_examples=500)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_configure() -> None:
    """Give each xdist worker one core: thread pools that share cores only wait for each other."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Golden vectors and real checkpoints, in a directory beside the repository; skips without it."""
    if not SHARED.is_dir():
        pytest.skip(f"no {SHARED.name}/ directory beside the repository (golden vectors, real checkpoints)")
    return SHARED
