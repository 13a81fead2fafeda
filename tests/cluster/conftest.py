"""One cluster for all tests of this folder: what its workers import, they import once."""

import signal
from collections.abc import Iterator

import pytest
import ray_nodes


@pytest.fixture(scope="session")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ray_nodes.Nodes]:
    """Start two nodes for two workers each, and connect to them."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ray_nodes.MARKS, str(tmp_path_factory.mktemp("marks")))
        patch.setenv("PYTHONPATH", ray_nodes.python_path())
        patch.setenv("RAY_AUTH_MODE", "disabled")
        with ray_nodes.connected() as found:
            assert signal.getsignal(signal.SIGTERM) is before
            yield found


@pytest.fixture(autouse=True)
def _handler_of_sigterm_stays() -> Iterator[None]:
    """Check that neither Ray nor a test leaves a handler of its own to the tests that follow in this process."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    assert signal.getsignal(signal.SIGTERM) is before
