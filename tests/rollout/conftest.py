"""nginx before a baseline and a candidate."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from rollout_proxy import Proxy
from streaming_server import StreamingServer


@pytest.fixture
def baseline() -> Iterator[StreamingServer]:
    """Start what serves now."""
    with StreamingServer("baseline") as server:
        yield server


@pytest.fixture
def candidate() -> Iterator[StreamingServer]:
    """Start what is to take its place."""
    with StreamingServer("candidate") as server:
        yield server


@pytest.fixture
def proxy(tmp_path: Path, baseline: StreamingServer, candidate: StreamingServer) -> Iterator[Proxy]:
    """Start nginx before both, with the configuration of the guide."""
    with Proxy(tmp_path / "nginx", baseline.port, candidate.port) as running:
        yield running
