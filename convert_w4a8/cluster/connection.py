"""A Ray cluster, or a local Ray that lives as long as a command: its nodes, and whether they can do our work."""

import contextlib
import os
import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert_w4a8.cluster.greetings import check_version, gpu_names, greeting, holder, name_of_gpu, one_line
from convert_w4a8.cluster.local import lean
from convert_w4a8.cluster.quiet import muted, undisturbed
from convert_w4a8.cluster.record import Ran
from convert_w4a8.errors import ClusterError, ConvertError
from convert_w4a8.version import __version__, install_command

LOCAL = "local"
"""The address of a Ray that is started on this machine, and ends with the command."""
_GREETING_SECONDS = 120.0
"""How long a node may take to say which version it has; it imports torch meanwhile."""


_NOTED = Path("/tmp/ray/ray_current_cluster")  # noqa: S108 - where Ray notes the address of a cluster on this machine
_ANSWER_SECONDS = 10.0
_START = "start the cluster (`ray start`), or give the host:port of its head"
MOST_THREADS = 4
"""Threads of a task, at most, unless somebody asks for more; so many CPUs are one process of a node."""
_NOTICE_SECONDS = 40.0
"""How long Ray may take to notice that a node is lost."""


SEES_ALL_GPUS = {"env_vars": {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}}
"""With it, Ray says which GPU a task has, and does not hide the others from its process."""


@dataclass(frozen=True)
class Node:
    """A node of a cluster and all of its resources, whether or not they are in use; memory in bytes.

    name: its address; with the beginning of its id where several nodes are on one machine.
    """

    id: str
    name: str
    cpus: float
    gpus: float
    memory: float

    def has(self, cpus: float, gpus: float, memory: float) -> bool:
        """Whether a task of this size fits."""
        return self.cpus >= cpus and self.gpus >= gpus and self.memory >= memory


def load_ray() -> Any:
    """Import Ray, which is an extra.

    Raises:
        ConvertError: it is not installed, or cannot be imported.

    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray is imported and when it starts
    os.environ.setdefault("RAY_SCHEDULER_EVENTS", "0")
    try:
        import ray  # noqa: PLC0415  (an extra; it takes half a second)
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == "ray"
        reason = "is not installed" if absent else f"cannot be imported ({one_line(error)})"
        raise ConvertError("--ray", f"needs ray, which {reason}", install_command("ray")) from error
    return ray


@contextmanager
def connect(address: str) -> Iterator["Cluster"]:
    """Connect to a cluster, by host:port or "auto", or start a local Ray; nothing of that is left at the end.

    Raises:
        ConvertError: Ray is not installed, or there is no cluster at this address.

    """
    ray = load_ray()
    if address.startswith("ray://"):
        raise ConvertError(
            f"--ray {address}",
            "is for Ray's client, which sees no files of the cluster",
            "run this on a machine of the cluster, and give its host:port, or auto",
        )
    _check_answers(address)
    if ray.is_initialized():
        raise ConvertError("--ray", "this process uses Ray already", "call ray.shutdown() before")
    with muted(ray):
        _begin(ray, address)
        try:
            yield Cluster(ray, is_local=address == LOCAL)
        finally:
            ray.shutdown()


def _begin(ray: Any, address: str) -> None:
    """Have Ray connect to a cluster, or start one.

    Raises:
        ConvertError: that fails.

    """
    started: AbstractContextManager[dict[str, Any]] = lean(ray) if address == LOCAL else nullcontext({})
    with undisturbed(), started as keywords:
        try:
            ray.init(
                address=address,
                log_to_driver=False,
                configure_logging=False,
                namespace="w4a8-convert",
                **keywords,
            )
        except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
            with contextlib.suppress(Exception):
                ray.shutdown()
            remedy = "free memory and /dev/shm" if address == LOCAL else _START
            raise ConvertError(f"--ray {address}", f"cannot be reached ({one_line(error)})", remedy) from error


def _check_answers(address: str) -> None:
    """Raise ConvertError where nobody listens, which Ray tries for minutes; "auto" is what is noted on this machine."""
    noted = os.environ.get("RAY_ADDRESS", "")
    if address == "auto" and not noted:
        with contextlib.suppress(OSError, UnicodeError):
            noted = _NOTED.read_text().strip()
    host, _, port = (noted if address == "auto" else address).rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER_SECONDS).close()
    except (OSError, OverflowError, UnicodeError) as error:
        reason = f"cannot be reached ({getattr(error, 'strerror', None) or error})"
        raise ConvertError(f"--ray {address}", reason, _START) from error


class Cluster:
    """What a connection offers. Greets all nodes at once, so that they import what they need while we plan.

    is_local: whether it is a Ray that was started on this machine.
    """

    def __init__(self, ray: Any, *, is_local: bool = False) -> None:
        self.ray, self.is_local = ray, is_local
        self.ran: list[Ran] = []
        """What was carried out, in the order in which it was finished."""
        self._names: dict[str, str] = {}
        self._greetings = [
            (
                node,
                [self.on_node(node, greeting(), (__version__,)) for _ in range(max(1, int(node.cpus) // MOST_THREADS))],
            )
            for node in self.nodes()
        ]

    def nodes(self) -> list[Node]:
        """Return the nodes that are alive, by name."""
        found = []
        entries = self.ray.nodes()
        counts = Counter(entry["NodeManagerAddress"] for entry in entries)
        for entry in entries:
            address, number = entry["NodeManagerAddress"], entry["NodeID"]
            name = address if counts[address] == 1 else f"{address} ({number[:6]})"
            self._names[number] = name
            if entry["Alive"]:
                has = entry["Resources"].get
                found.append(Node(number, name, has("CPU", 0), has("GPU", 0), has("memory", 0)))
        return sorted(found, key=lambda node: node.name)

    def name(self, node_id: str) -> str:
        """Return what a node is called, whether or not it is alive."""
        if node_id not in self._names:
            self.nodes()
        return self._names.get(node_id, node_id[:6])

    def on_node(self, node: Node, function: Any, arguments: Sequence[Any], *, sees_gpus: bool = False) -> Any:
        """Call a function on one node, without asking for resources; returns Ray's reference to the result."""
        affinity = self.ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node.id, soft=False)
        remote = self.ray.remote(num_cpus=0, max_retries=1, max_calls=0)(function)
        options = {"runtime_env": SEES_ALL_GPUS} if sees_gpus else {}
        return remote.options(scheduling_strategy=affinity, **options).remote(*arguments)

    def ask_all(self, function: Any, *arguments: Any) -> list[tuple[Node, Any]]:
        """Call a function on every node that is alive, and return what they answer; nodes that get lost are left out.

        Raises:
            ClusterError: a node does not answer.

        """
        return self._answers([(node, self.on_node(node, function, arguments)) for node in self.nodes()])

    def _answers(self, asked: Sequence[tuple[Node, Any]]) -> list[tuple[Node, Any]]:
        found = []
        for node, reference in asked:
            try:
                found.append((node, self.ray.get(reference, timeout=_GREETING_SECONDS)))
            except self.ray.exceptions.GetTimeoutError as error:
                reason = f"did not answer for {_GREETING_SECONDS:.0f} s"
                raise ClusterError(f"node {node.name}", reason, "look at its load, or take it out") from error
            except self.ray.exceptions.RayTaskError:
                raise
            except self.ray.exceptions.RayError as error:
                if self._is_lost(node):
                    continue
                reason = f"does not answer ({type(error).__name__})"
                raise ClusterError(f"node {node.name}", reason, "look at its logs, or take it out") from error
        return found

    def _is_lost(self, node: Node) -> bool:
        """Whether a node is not alive; Ray takes some seconds to notice."""
        deadline = time.monotonic() + _NOTICE_SECONDS
        while any(other.id == node.id for other in self.nodes()):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.5)
        return True

    def gpus(self) -> dict[str, list[str]]:
        """Return the names of the GPUs of nodes that have any, as torch calls them, by the node's name.

        Raises:
            ClusterError: torch on a node cannot use them.

        """
        asked = [(node, self.on_node(node, gpu_names(), (), sees_gpus=True)) for node in self.nodes() if node.gpus >= 1]
        found = {}
        for node, (names, problem) in self._answers(asked):
            if not names:
                reason = f"has GPUs for Ray, but none that torch can use{problem and f' ({problem})'}"
                raise ClusterError(f"node {node.name}", reason, "mend that, take it out, or use --device cpu")
            found[node.name] = names
        return found

    def hold_gpu(self) -> str:
        """Take a GPU of this machine from what tasks get, until the connection ends; returns its name for torch here.

        Raises:
            ClusterError: this machine has none in the cluster.

        """
        node = self.ray.get_runtime_context().get_node_id()
        affinity = self.ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=False)
        options = {"num_cpus": 0, "num_gpus": 1, "scheduling_strategy": affinity, "runtime_env": SEES_ALL_GPUS}
        try:
            self._held = self.ray.remote(holder()).options(**options).remote()
            return name_of_gpu(self.ray.get(self._held.number.remote(), timeout=_GREETING_SECONDS))
        except (self.ray.exceptions.RayError, ValueError) as error:
            remedy = "give the command on a node with a GPU that is not in use, or use --device cpu"
            reason = f"has no GPU of the cluster for itself ({type(error).__name__})"
            raise ClusterError("this machine", reason, remedy) from error

    def check_versions(self) -> None:
        """Check that all nodes have this version of this package.

        Raises:
            ClusterError: a node has another one, none, or one that it cannot import.

        """
        for node, answer in self._answers([(node, first) for node, (first, *_) in self._greetings]):
            check_version(node.name, *answer)
