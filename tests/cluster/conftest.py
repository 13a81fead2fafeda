"""One cluster for all tests of this folder: what its workers import, they import once."""

from collections.abc import Iterator

import pytest
import ray_nodes


@pytest.fixture(scope="session")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ray_nodes.Nodes]:
    """Start two nodes for two workers each, and connect to them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ray_nodes.MARKS, str(tmp_path_factory.mktemp("marks")))
        patch.setenv("PYTHONPATH", ray_nodes.python_path())
        patch.setenv("RAY_AUTH_MODE", "disabled")
        with ray_nodes.connected() as found:
            yield found
