"""Stands for a connection to a cluster, and for Ray: what becomes of each attempt is given."""

import pickle
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from convert_w4a8.cluster.nodes import Node
from convert_w4a8.cluster.record import Ran
from convert_w4a8.cluster.tasks import Task
from convert_w4a8.version import __version__

GB = 10**9


class RayError(Exception):
    """Base of what Ray raises."""


LOST = {
    name: type(name, (RayError,), {})
    for name in ("WorkerCrashedError", "OutOfMemoryError", "NodeDiedError", "ObjectLostError", "RaySystemError")
}
RayTaskError = type("RayTaskError", (RayError,), {})


class Remote:
    """A function of the stand-in; what it is asked for is kept."""

    def __init__(self, asked: list[dict[str, Any]], options: dict[str, Any] | None = None) -> None:
        self._asked, self._options = asked, options

    def options(self, **options: Any) -> "Remote":
        """Do as Ray does."""
        return Remote(self._asked, options)

    def remote(self, version: str, payload: bytes, apart: list[Any]) -> int:
        """Do as Ray does."""
        function, arguments = pickle.loads(payload, buffers=apart)
        assert version == __version__
        self._asked.append({**(self._options or {}), "call": (function, arguments)})
        return len(self._asked) - 1


class StandIn:
    """Stands for a connection, and for Ray: `outcomes` decide, attempt by attempt, what becomes of it."""

    def __init__(
        self, outcomes: Sequence[Any], nodes: Sequence[Node] = (Node("a" * 9, "10.0.0.1", 4, 0, 8 * GB),)
    ) -> None:
        self.outcomes, self.all_nodes = list(outcomes), list(nodes)
        self.asked: list[dict[str, Any]] = []
        self.ran: list[Ran] = []
        self.ray, self.is_local = self, False
        self.exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError, **LOST)
        strategy = SimpleNamespace(NodeAffinitySchedulingStrategy=lambda node, soft: (node, soft))
        self.util = SimpleNamespace(scheduling_strategies=strategy)

    def nodes(self) -> list[Node]:
        """Do as Ray does."""
        return self.all_nodes

    def expected_nodes(self) -> list[Node]:
        """Do as Ray does."""
        return self.all_nodes

    def name(self, node_id: str) -> str:
        """Do as Ray does."""
        return next(node.name for node in self.all_nodes if node.id == node_id)

    def remote(self, **_options: Any) -> Callable[[Any], Remote]:
        """Do as Ray does."""
        return lambda _function: Remote(self.asked)

    def wait(self, references: list[int], **_options: Any) -> tuple[list[int], list[int]]:
        """Do as Ray does."""
        ready = [reference for reference in references if self.outcomes[reference] is not None][:1]
        return ready, [reference for reference in references if reference not in ready]

    def get(self, reference: int) -> Any:
        """Do as Ray does."""
        outcome = self.outcomes[reference]
        if isinstance(outcome, Exception):
            raise outcome
        return {"node": self.all_nodes[0].id, "version": __version__, "broken": "", "seconds": 1.0, **outcome}


def task(name: str = "model-00001-of-00001.safetensors", **keywords: Any) -> Task:
    """Return a task that needs a CPU and a gigabyte."""
    return Task(name, len, lambda number: (f"{number}",), **{"cpus": 1, "memory": GB, **keywords})


class Dropped(list[tuple[str, int]]):
    """Attempts that a runner drops."""

    def __call__(self, attempts: Sequence[tuple[Task, int]]) -> None:
        """Drop some."""
        self.extend((dropped.name, number) for dropped, number in attempts)


class Held(StandIn):
    """A stand-in whose CPUs are free or not; what happens is kept in order. here: the id of this process's node."""

    def __init__(
        self,
        outcomes: Sequence[Any],
        nodes: Sequence[Node] = (Node("a" * 9, "10.0.0.1", 4, 0, 8 * GB),),
        *,
        here: str = "a" * 9,
        free: bool = True,
        local: bool = False,
    ) -> None:
        super().__init__(outcomes, nodes)
        self.here, self.free, self.is_local = here, free, local
        self.happened: list[Any] = []

    def node_id(self) -> str:
        """Do as a cluster does."""
        return self.here

    def check_versions(self) -> None:
        """Do as a cluster does."""

    def reserve(self, cpus: int, memory: int, _seconds: int) -> Callable[[], None] | None:
        """Do as a cluster does."""
        self.happened.append(("reserved", cpus, memory))
        return (lambda: self.happened.append("given back")) if self.free else None
