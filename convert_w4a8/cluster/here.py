"""The process of the command as one that carries out tasks: it has imported what they need before any other."""

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from threading import Thread
from typing import Any

from convert_w4a8.cluster.nodes import Cluster, Node
from convert_w4a8.errors import ClusterError, W4A8Error
from convert_w4a8.text import counted, human_bytes

_OURS_SECONDS = 30
"""How long a Ray that nobody else uses may take to give us CPUs."""
_ASK_SECONDS = 1
"""How long another one may take: where its CPUs are in use, this process only plans."""
_END_SECONDS = 10.0
"""How long a call that nobody needs any more may take to notice that; one that hangs never does."""


class Here:
    """Carries out a task at a time, in a thread, with CPUs and memory that Ray gives to nobody else meanwhile.

    A Ray that this process started gives its CPUs to nobody before the first task of ours is sent to it: so the work
    may begin before it has. cpus, memory (bytes): of each task, at most. node: the id of its node.
    """

    def __init__(self, cluster: Cluster, cpus: int, memory: int, node: str) -> None:
        self.cpus, self.memory, self.node = cpus, memory, node
        self._cluster = cluster
        self._call: Future[tuple[Any, float]] | None = None
        self._give_back: Callable[[], None] | None = None

    @classmethod
    def on(cls, cluster: Cluster, cpus: int, memory: int) -> "Here | None":
        """Return this process as one that works, if it is on a node of the cluster whose CPUs are free."""
        nodes = cluster.expected_nodes()
        number = nodes[0].id if cluster.is_local else cluster.node_id()
        if not any(node.id == number and node.has(cpus, 0, memory) for node in nodes):
            return None
        here = cls(cluster, cpus, memory, number)
        return here if cluster.is_local or here._take(_ASK_SECONDS) else None

    def beside(self, nodes: Sequence[Node]) -> list[Node]:
        """Return nodes with what this process leaves of its own one."""
        return [
            replace(node, cpus=node.cpus - self.cpus, memory=node.memory - self.memory)
            if node.id == self.node
            else node
            for node in nodes
        ]

    def places_beside(self, nodes: Sequence[Node], cpus: int, memory: int | None = None) -> int:
        """Return how many tasks nodes can carry out beside this process, of so many CPUs each and bytes of memory.

        memory: None for as much as this process takes.
        """
        each = self.memory if memory is None else memory
        return sum(int(min(node.cpus // cpus, node.memory // each)) for node in self.beside(nodes))

    def _take(self, seconds: int) -> bool:
        self.node = self._cluster.node_id()
        self._give_back = self._give_back or self._cluster.reserve(self.cpus, self.memory, seconds)
        return self._give_back is not None

    def hold(self) -> None:
        """Take what is needed from Ray, before tasks are sent to it; again, that does nothing.

        Raises:
            ClusterError: it is not to be had.

        """
        if self._take(_OURS_SECONDS):
            return
        needs = f"{counted(self.cpus, 'CPU')} and {human_bytes(self.memory)} of memory"
        has = next((node for node in self._cluster.nodes() if node.id == self.node), None)
        reason = f"does not give this process {needs} within {_OURS_SECONDS} s"
        if has is not None and not has.has(self.cpus, 0, self.memory):
            offers = f"{counted(int(has.cpus), 'CPU')} and {human_bytes(int(has.memory))}"
            reason = f"offers {offers} for tasks, and this process needs {needs}"
        raise ClusterError("Ray", reason, "leave out --ray")

    def begin(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> "Future[tuple[Any, float]]":
        """Begin a call; returns what it gives and the seconds that it takes, later."""
        self._call = Future()
        # A thread that does not keep this process from ending: a file system may never answer.
        Thread(target=_carry_out, args=(self._call, function, arguments), name="here", daemon=True).start()
        return self._call

    @property
    def is_busy(self) -> bool:
        """Whether a call is under way, be it one that nobody needs any more."""
        return self._call is not None and not self._call.done()

    def answer(self, future: "Future[tuple[Any, float]]") -> dict[str, Any]:
        """Return what a call gives, as the answer of a node.

        Raises:
            W4A8Error: what it raises, with the node.

        """
        name = self._cluster.name(self.node)
        try:
            value, seconds = future.result()
        except W4A8Error as error:
            error.add_note(f"on node {name}")
            raise
        return {"node": name, "value": value, "seconds": seconds}

    def close(self) -> None:
        """Give back what was taken, when the call that is under way has ended, or hangs.

        One that has not begun never does: its thread may be about to start when a signal ends the command.
        """
        try:
            if self._call is not None and not self._call.cancel():
                wait([self._call], _END_SECONDS)
                if not self._call.done():
                    message = "a task of this process has not ended for %.0f s, and is left to itself"
                    logging.getLogger("convert_w4a8").warning(message, _END_SECONDS)
        finally:  # whatever comes while it waits
            if self._give_back is not None:
                self._give_back()


def _carry_out(future: "Future[tuple[Any, float]]", function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    started = time.monotonic()
    try:
        future.set_result((function(*arguments), time.monotonic() - started))
    except BaseException as error:  # noqa: BLE001 - whoever asks for the result raises it
        future.set_exception(error)
