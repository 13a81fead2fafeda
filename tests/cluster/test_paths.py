"""A file system that nodes do not share: they are named, whatever it is that they do not see."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from ray_nodes import Nodes

from convert_w4a8.cluster.connection import connect
from convert_w4a8.cluster.nodes import Cluster, Node
from convert_w4a8.cluster.paths import check_inputs, check_output, states_of
from convert_w4a8.errors import ClusterError, ConvertError

pytestmark = [
    pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed"),
    pytest.mark.filterwarnings("ignore"),  # Ray's own
]


def test_a_file_that_nodes_do_not_see(nodes: Nodes, tmp_path: Path) -> None:
    """Or that is another one there: its size and time of change tell."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"x")
    cluster, states = Cluster(nodes.ray), states_of({file})
    check_inputs(cluster, states)
    with pytest.raises(ClusterError, match=r"node [\d.]+ \(\w+\): sees another .*/model\.safetensors; mount it there"):
        check_inputs(cluster, {str(file): (1, 1)})
    file.unlink()
    with pytest.raises(ClusterError, match=r"node [\d.]+ \(\w+\): cannot see .*/model\.safetensors; mount it there"):
        check_inputs(cluster, states)


def test_a_directory_that_nodes_can_write_to(nodes: Nodes, tmp_path: Path) -> None:
    """Nothing is left in it."""
    check_output(Cluster(nodes.ray), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("elsewhere", ["absent", "other"])
def test_a_directory_that_nodes_see_as_another(
    elsewhere: str, nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or not at all: as on a machine where nothing, or another file system, is mounted."""
    cluster = Cluster(nodes.ray)
    ask = cluster.ask_all
    (tmp_path / "other").mkdir()

    def ask_elsewhere(function: Callable[..., Any], directory: str, token: str) -> list[tuple[Node, Any]]:
        if elsewhere == "other":
            (tmp_path / "other" / token).write_text("something else")
        return ask(function, f"{directory}/{elsewhere}", token)

    monkeypatch.setattr(cluster, "ask_all", ask_elsewhere)
    reason = "it is another directory" if elsewhere == "other" else "No such file or directory"
    with pytest.raises(ClusterError, match=rf"node [\d.]+ \(\w+\): cannot write into .* \({reason}\)"):
        check_output(cluster, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("ray://127.0.0.1:10001", "sees no files of the cluster"),
        ("127.0.0.1:1", r"cannot be reached \(Connection refused\); start the cluster"),
        ("no-such-host.invalid:6379", "cannot be reached"),
        ("127.0.0.1:99999", "cannot be reached"),
        ("auto", "this process uses Ray already"),
    ],
)
def test_connections_that_are_refused(address: str, expected: str, nodes: Nodes) -> None:  # noqa: ARG001
    """Ray's client; where nobody listens; a process that uses Ray already."""
    with pytest.raises(ConvertError, match=expected), connect(address):
        pass
