"""The nodes of a Ray cluster, or of a local Ray that lives as long as a command, and whether they can do our work."""

import contextlib
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from threading import RLock
from typing import Any

from convert_w4a8.cluster.greetings import check_version, gpu_names, greeting, holder, name_of_gpu
from convert_w4a8.cluster.local import STORE_BYTES, cores
from convert_w4a8.cluster.record import Ran
from convert_w4a8.errors import ClusterError, ConvertError
from convert_w4a8.version import __version__

LOCAL = "local"
"""The address of a Ray that is started on this machine, and ends with the command."""
MOST_THREADS = 4
"""Threads of a task, at most, unless somebody asks for more; so many CPUs are one process of a node."""
SEES_ALL_GPUS = {"env_vars": {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}}
"""With it, Ray says which GPU a task has, and does not hide the others from its process."""
_GREETING_SECONDS = 120.0
"""How long a node may take to say which version it has; it imports torch meanwhile."""
_NOTICE_SECONDS = 40.0
"""How long Ray may take to notice that a node is lost."""


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


class Cluster:
    """What a connection offers. Greets all nodes at once, so that they import what they need while we plan."""

    is_local = False
    """Whether it is a Ray that was started on this machine, for this command."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self.ran: list[Ran] = []
        """What was carried out, in the order in which it was finished."""
        self._names: dict[str, str] = {}
        self._greetings: list[tuple[Node, list[Any]]] = []
        if ray is not None:
            self._greet()

    @property
    def ray(self) -> Any:
        """Ray, connected."""
        return self._ray

    def _greet(self) -> None:
        """Let as many processes as will have tasks say their version, and import what tasks need.

        This process may be one of them, so of its own node there is one less.
        """
        here = self.node_id()
        for node in self.nodes():
            processes = max(1, int(node.cpus) // MOST_THREADS) - (node.id == here)
            self._greetings.append((node, [self._greeting(node, imports=True) for _ in range(processes)]))

    def _greeting(self, node: Node, *, imports: bool) -> Any:
        return self.on_node(node, greeting(), (__version__, imports))

    def node_id(self) -> str:
        """Return the id of the node that this process is on."""
        found: str = self.ray.get_runtime_context().get_node_id()
        return found

    def expected_nodes(self) -> list[Node]:
        """Return the nodes; of a Ray that was not needed yet, what it will have."""
        return self.nodes()

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

        A Ray that this process started is not asked whether its machine is like this one.

        Raises:
            ClusterError: a node does not answer.

        """
        nodes = [] if self.is_local else self.nodes()
        return self._answers([(node, self.on_node(node, function, arguments)) for node in nodes])

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
        affinity = self.ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(self.node_id(), soft=False)
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
        if self.is_local:
            return
        first = [(node, next(iter(asked), None)) for node, asked in self._greetings]
        for node, answer in self._answers(
            [(node, asked or self._greeting(node, imports=False)) for node, asked in first]
        ):
            check_version(node.name, *answer)

    def reserve(self, cpus: int, memory: int, seconds: int) -> Callable[[], None] | None:
        """Take CPUs and memory (bytes) of this process's node from what tasks get; returns what gives them back.

        None where they are not free within some seconds, of which Ray counts whole ones.
        """
        ray, selector = self.ray, [{"ray.io/node-id": self.node_id()}]
        bundle = {"memory": memory} | ({"CPU": cpus} if cpus else {})
        group = ray.util.placement_group([bundle], bundle_label_selector=selector)

        def give_back() -> None:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.util.remove_placement_group(group)

        with contextlib.suppress(ray.exceptions.RayError):
            if group.wait(seconds):
                return give_back
        give_back()
        return None


class LocalCluster(Cluster):
    """A Ray that this command started on this machine. connect: called when Ray is first needed; returns it."""

    is_local = True

    def __init__(self, connect: Callable[[], Any]) -> None:
        super().__init__(None)
        self._connect = connect
        self._connecting = RLock()

    @property
    def ray(self) -> Any:
        """Ray, connected; waits until it is.

        Raises:
            ClusterError: it cannot be started, perhaps in the middle of the work.

        """
        with self._connecting:
            if self._ray is None:
                try:
                    self._ray = self._connect()
                except ConvertError as error:
                    raise ClusterError(*astuple(error.problem)) from error
                self._greet()
            return self._ray

    def _greet(self) -> None:
        """Greet as many processes as will have tasks, but for those with GPUs: Ray starts others for them."""
        if not any(node.gpus >= 1 for node in self.nodes()):
            super()._greet()

    def expected_nodes(self) -> list[Node]:
        """Return the node; before Ray was needed, what it will find here."""
        if self._ray is not None:
            return self.nodes()
        import torch  # noqa: PLC0415

        from convert_w4a8.conversion.memory import available_memory  # noqa: PLC0415

        memory = max(0, (available_memory() or sys.maxsize) - STORE_BYTES)
        return [Node("", LOCAL, cores(), torch.cuda.device_count(), memory)]

    def name(self, _node_id: str) -> str:
        """Return what the node is called."""
        return LOCAL
