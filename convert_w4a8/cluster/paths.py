"""Whether every node sees the files of an input and can write to an output: a shared file system is needed."""

import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from convert_w4a8.cluster.nodes import Cluster
from convert_w4a8.errors import ClusterError

_MOUNT = "mount it there under the same path, or take the node out"


def check_inputs(cluster: Cluster, states: Mapping[str, tuple[int, int]]) -> None:
    """Check that every node sees the files of an input as we do. states: size and time of change in ns, by path.

    Raises:
        ClusterError: a node does not; it is named.

    """
    for node, found in cluster.ask_all(_looking(), list(states)):
        for path, state in states.items():
            seen = found.get(path)
            if seen is None or tuple(seen) != tuple(state):
                reason = f"sees another {path}" if seen else f"cannot see {path}"
                raise ClusterError(f"node {node.name}", reason, _MOUNT)


def check_output(cluster: Cluster, directory: Path) -> None:
    """Check that every node can write into a directory, and that what it writes is seen here. Nothing is left there.

    Raises:
        ClusterError: a node cannot; it is named.

    """
    token = f"probe-{secrets.token_hex(8)}"
    ours = directory / token
    ours.write_text(token)
    try:
        for node, problem in cluster.ask_all(_writing(), str(directory), token):
            theirs = directory / f"{token}-{node.id}"
            if problem or not theirs.is_file():
                reason = (
                    f"cannot write into {directory} ({problem})" if problem else f"writes elsewhere than {directory}"
                )
                raise ClusterError(f"node {node.name}", reason, _MOUNT)
            theirs.unlink()
    finally:
        for path in directory.glob(f"{token}*"):
            path.unlink(missing_ok=True)


def states_of(paths: Mapping[Path, Any] | set[Path]) -> dict[str, tuple[int, int]]:
    """Return size and time of change of files, by path."""
    found = {}
    for path in sorted(paths):
        status = os.stat(path)  # noqa: PTH116
        found[str(path)] = status.st_size, status.st_mtime_ns
    return found


def _looking() -> Callable[[list[str]], dict[str, tuple[int, int]]]:
    def look(paths: list[str]) -> dict[str, tuple[int, int]]:
        import os as system  # noqa: PLC0415

        found = {}
        for path in paths:
            try:
                status = system.stat(path)  # noqa: PTH116
            except OSError:
                continue
            found[path] = status.st_size, status.st_mtime_ns
        return found

    return look


def _writing() -> Callable[[str, str], str]:
    def write(directory: str, token: str) -> str:
        """Return why a file cannot be written beside another one; "" where it is."""
        import ray  # noqa: PLC0415

        path = f"{directory}/{token}"
        try:
            with open(path) as file:  # noqa: PTH123
                if file.read() != token:
                    return "it is another directory"
            with open(f"{path}-{ray.get_runtime_context().get_node_id()}", "x"):  # noqa: PTH123
                return ""
        except OSError as error:
            return error.strerror or str(error)

    return write
