"""Many calls on a cluster: a bounded number side by side, tried again where a worker or a node is lost."""

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from convert_w4a8.cluster.answers import packed_call, remote_function, value_of, why_lost
from convert_w4a8.cluster.greetings import check_version
from convert_w4a8.cluster.here import Here
from convert_w4a8.cluster.nodes import SEES_ALL_GPUS, Cluster, Node
from convert_w4a8.cluster.record import Ran
from convert_w4a8.errors import ClusterError
from convert_w4a8.text import counted, human_bytes

ATTEMPTS = 4
"""How often a task is tried, where a worker or a node is lost."""
SLOW = 3.0
"""A task that takes so many times as long as the median is begun a second time, where there is nothing else to do."""
PATIENCE_SECONDS = 30.0
"""But not before this time; and so long may there be no node that is large enough, after some were lost."""
_POLL_SECONDS = 0.5
_OURS_SECONDS = 0.05
"""How long Ray is asked for what ended before this process's own task is looked at."""


@dataclass(frozen=True)
class Task:
    """A call of a function of this package, and what it takes of a node. memory: in bytes.

    name: for messages. arguments: called before each attempt with its number, from 0. here: what does the same in this
    process, if it may.
    """

    name: str
    function: Callable[..., Any]
    arguments: Callable[[int], tuple[Any, ...]]
    cpus: int
    memory: int
    gpus: int = 0
    here: Callable[..., Any] | None = None


@dataclass
class _State:
    """A task on its way. failures, lost: attempts that were lost, and how. running: numbers of those under way."""

    task: Task
    memory: int
    begun: int = 0
    failures: int = 0
    lost: list[str] = field(default_factory=list)
    running: dict[Any, int] = field(default_factory=dict)


class Runner:
    """Carries out tasks. poll: called twice a second with the attempts that are under way, as (task, number).

    where: returns the id of the node that has an attempt, if that is known. drop: called with attempts that are not
    needed any more, so that they end; Ray ends the others with the connection. (Its own `cancel` may end the driver:
    "Tried to complete task that was not pending", 2.60.) here: this process, where it carries out tasks, too.
    """

    def __init__(
        self,
        cluster: Cluster,
        *,
        poll: Callable[[Sequence[tuple[Task, int]]], None] = lambda _attempts: None,
        where: Callable[[Task, int], str | None] = lambda _task, _number: None,
        drop: Callable[[Sequence[tuple[Task, int]]], None] = lambda _attempts: None,
        patience: float = PATIENCE_SECONDS,
        here: Here | None = None,
    ) -> None:
        self._cluster, self._here = cluster, here
        self._poll, self._where, self._drop, self._patience = poll, where, drop, patience
        self._feasible_at = time.monotonic()
        self._seconds: list[float] = []
        self._seen: dict[tuple[str, int], float] = {}

    def run(
        self, tasks: Sequence[Task], check: Callable[[], None] = lambda: None
    ) -> Generator[tuple[Task, int, Any], None, None]:
        """Carry out tasks, and yield each with the attempt that counts and its result, as they come.

        check: called before anything is sent to a node, when this process has begun the first task, where it does any.

        Raises:
            W4A8Error: what a task or `check` raised, or ClusterError where a task was lost too often or fits nowhere.

        """
        waiting = deque(_State(task, task.memory) for task in tasks)
        running: dict[Any, _State] = {}
        cpus = max(1, min((task.cpus for task in tasks), default=1))
        polled_at = -math.inf
        try:
            self._begin_here(waiting, running)
            check()
            if self._here is None:
                nodes = self._cluster.nodes()
                for task in tasks:
                    self._check_fits(nodes, task, task.memory)
            while waiting or running:
                self._begin_here(waiting, running)
                nodes = self._cluster.expected_nodes()
                window = self._window(nodes, cpus)
                while waiting and len(running) < window:
                    self._begin(waiting.popleft(), running)
                ready = self._wait(running)
                now = time.monotonic()
                if now - polled_at >= _POLL_SECONDS:
                    polled_at = now
                    self._poll([(state.task, state.running[reference]) for reference, state in running.items()])
                for reference in ready:
                    state = running.pop(reference)
                    number = state.running.pop(reference)
                    answer = self._answer(reference, state, number)
                    if answer is None:
                        if not state.running:
                            waiting.appendleft(state)
                        continue
                    for other in state.running:  # a second attempt, which is not needed any more
                        running.pop(other)
                    self._drop([(state.task, other) for other in state.running.values()])
                    self._seconds.append(answer["seconds"])
                    by_command = isinstance(reference, Future)
                    ran = Ran(state.task.name, answer["node"], answer["seconds"], state.begun, by_command)
                    value = value_of(answer)
                    self._cluster.ran.append(ran)
                    yield state.task, number, value
                if not ready:
                    self._look_after(nodes, waiting, running)
        except Exception as error:
            names = {kind.__name__ for kind in type(error).__mro__}  # Ray may not have been needed yet
            if "RayError" not in names or "RayTaskError" in names:  # the latter is a bug of ours, with its traceback
                raise
            reason = f"cannot be reached any more ({type(error).__name__})"
            raise ClusterError("Ray cluster", reason, "look at its head, and continue with --resume") from error
        finally:
            self._drop([(state.task, state.running[reference]) for reference, state in running.items()])
            self._leave()

    @property
    def _ray(self) -> Any:
        return self._cluster.ray

    def _window(self, nodes: Sequence[Node], cpus: int) -> int:
        """Return how many attempts may be under way: two a place, so that no place is idle between them.

        While this process works, one a place beside it, so that what is left is its own.
        """
        if self._here is None:
            return max(2, 2 * int(sum(node.cpus for node in nodes)) // cpus)
        return 1 + self._here.places_beside(nodes, cpus)

    def _begin_here(self, waiting: deque[_State], running: dict[Any, _State]) -> None:
        """Begin a task in this process, if it has none; where there is none left for it, its CPUs are for others."""
        if self._here is None or self._here.is_busy or any(isinstance(reference, Future) for reference in running):
            return
        state = next((state for state in waiting if state.task.here and state.memory <= self._here.memory), None)
        if state is None:
            self._leave()
            return
        waiting.remove(state)
        task, number = state.task, state.begun
        state.begun += 1
        assert task.here is not None
        with self._dropped_if_not_begun(task, number):
            reference = self._here.begin(task.here, task.arguments(number))
            state.running[reference] = number
            running[reference] = state

    @contextmanager
    def _dropped_if_not_begun(self, task: Task, number: int) -> Iterator[None]:
        """Drop an attempt where a signal, or a full disk, comes before it is among those that are under way."""
        try:
            yield
        except BaseException:
            self._drop([(task, number)])
            raise

    def _leave(self) -> None:
        """Work no longer in this process."""
        if self._here is not None:
            self._here.close()
            self._here = None

    def _wait(self, running: dict[Any, _State]) -> list[Any]:
        """Wait until an attempt has ended, for half a second at most; returns those that have."""
        ours = [reference for reference in running if isinstance(reference, Future)]
        others = [reference for reference in running if not isinstance(reference, Future)]
        if not others:
            wait(ours, _POLL_SECONDS)
        ready: list[Any] = [reference for reference in ours if reference.done()]
        if others and not ready:
            seconds = _POLL_SECONDS if not ours else _OURS_SECONDS
            ready, _ = self._ray.wait(others, num_returns=1, timeout=seconds)
        return ready

    def _begin(self, state: _State, running: dict[Any, _State], node: Node | None = None) -> None:
        if self._here is not None:
            self._here.hold()
        task, number = state.task, state.begun
        state.begun += 1
        strategies = self._ray.util.scheduling_strategies
        strategy = "SPREAD" if node is None else strategies.NodeAffinitySchedulingStrategy(node.id, soft=True)
        options: dict[str, Any] = {"num_cpus": task.cpus, "num_gpus": task.gpus, "memory": state.memory}
        if task.gpus:  # a process keeps the GPU that CUDA saw first, and may be given another one with its next task
            options["runtime_env"] = SEES_ALL_GPUS
        remote = remote_function(self._ray).options(**options, scheduling_strategy=strategy, name=task.name)
        with self._dropped_if_not_begun(task, number):
            reference = remote.remote(*packed_call(task.function, task.arguments(number)))
            state.running[reference] = number
            running[reference] = state

    def _answer(self, reference: Any, state: _State, number: int) -> dict[str, Any] | None:
        """Return what an attempt answers; None where it was lost, and may be tried again."""
        if isinstance(reference, Future):
            assert self._here is not None
            return self._here.answer(reference)
        errors = self._ray.exceptions
        try:
            answer: dict[str, Any] = self._ray.get(reference)
        except errors.RayTaskError:
            raise
        except errors.RayError as error:
            state.failures += 1
            self._poll([(state.task, number)])
            why, where = why_lost(error), self._where(state.task, number)
            self._drop([(state.task, number)])
            state.lost.append(why + (f" on node {self._cluster.name(where)}" if where else ""))
            if isinstance(error, errors.OutOfMemoryError):
                able = [node.memory for node in self._cluster.nodes() if node.has(state.task.cpus, state.task.gpus, 0)]
                state.memory = max(state.memory, min(2 * state.memory, int(max(able, default=0))))
            if state.failures >= ATTEMPTS and not state.running:
                reasons = ", ".join(dict.fromkeys(state.lost))
                raise ClusterError(
                    state.task.name,
                    f"was begun {state.begun} times and lost each time ({reasons})",
                    "look at the nodes (`ray status`), take out those that fail, and continue with --resume",
                ) from error
            return None
        answer["node"] = self._cluster.name(answer["node"])
        check_version(answer["node"], answer["version"], answer["broken"])
        return answer

    def _look_after(self, nodes: Sequence[Node], waiting: deque[_State], running: dict[Any, _State]) -> None:
        """Begin what is slow a second time, and see that there is still a node for every task."""
        now = time.monotonic()
        states = list({id(state): state for state in running.values()}.values())
        if all(any(_fits(node, state.task, state.memory) for node in nodes) for state in (*states, *waiting)):
            self._feasible_at = now
        elif now - self._feasible_at > self._patience:
            for state in (*states, *waiting):
                self._check_fits(nodes, state.task, state.memory)
        if waiting or not self._seconds:
            return
        limit = max(self._patience, SLOW * statistics.median(self._seconds))
        for state in states:
            (number, *others) = state.running.values()
            ours = any(isinstance(reference, Future) for reference in state.running)
            at = self._here.node if ours and self._here else self._where(state.task, number)
            if not at or others or state.begun > ATTEMPTS:  # the time until it is known where counts for nothing
                continue
            free = [node for node in nodes if at != node.id and _fits(node, state.task, state.memory)]
            if free and now - self._seen.setdefault((state.task.name, number), now) > limit:
                busy = [place for other in states if (place := self._where(other.task, other.begun - 1))]
                self._begin(state, running, min(free, key=lambda node: busy.count(node.id)))

    def _check_fits(self, nodes: Sequence[Node], task: Task, memory: int) -> None:
        if any(_fits(node, task, memory) for node in nodes):
            return
        needs = f"{counted(task.cpus, 'CPU')}, {human_bytes(memory)} of memory" + (", a GPU" if task.gpus else "")
        have = max(
            nodes,
            key=lambda node: (node.gpus >= task.gpus, node.cpus >= task.cpus, node.memory, node.cpus),
            default=None,
        )
        has = (
            "there is no node"
            if have is None
            else f"the largest node offers {have.cpus:g} CPUs, {human_bytes(have.memory)}, {have.gpus:g} GPUs"
        )
        remedy = "add a larger node (memory: `ray start --memory`)"
        if self._cluster.is_local:
            few = not any(node.cpus >= task.cpus for node in nodes)
            remedy = "give fewer --workers, or leave out --ray" if few else "leave out --ray"
        raise ClusterError(task.name, f"needs {needs}; {has}", remedy)


def _fits(node: Node, task: Task, memory: int) -> bool:
    return node.has(task.cpus, task.gpus, memory)
