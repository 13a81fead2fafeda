"""What every test needs before its import: the Triton interpreter, Hypothesis profiles, the shared data."""

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import hypothesis
import pytest
import torch
from code_groups import switch_kernels_off
from paths import SHARED

# Triton decides between interpreter and compiler when `@triton.jit` runs, so this stands before any kernel
# is imported. It holds in xdist workers too: each of them imports this file.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

hypothesis.settings.register_profile(
    "default", deadline=None, max_examples=25, derandomize="CI" in os.environ, print_blob=True
)
hypothesis.settings.register_profile("thorough", parent=hypothesis.settings.get_profile("default"), max_examples=500)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_configure() -> None:
    """Use one thread: the tensors are small, and idle threads that spin on busy cores make the tests slower."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Golden vectors and real checkpoints, in a directory beside the repository; skips without it."""
    if not SHARED.is_dir():
        pytest.skip(f"no {SHARED.name}/ directory beside the repository (golden vectors, real checkpoints)")
    return SHARED


@pytest.fixture(scope="module", params=["compiled", "plain"])
def cpu_path(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run what asks for it twice: with the kernels that numba compiles, and with torch alone."""
    if request.param == "compiled" and find_spec("numba") is None:
        pytest.skip("numba is not installed")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "plain":
            switch_kernels_off(patch)
        yield
