"""Independent calls, side by side on the nodes of a cluster and in this process: the matrices of a calibration.

This process keeps what the calls share: the model, hidden states, and a GPU, where there are any. Each task gets its
weights and moments, or the inputs of its experts, and gives back codes and tables.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from threading import Condition, Event
from typing import Any, TypeVar

import torch

from convert_w4a8.cluster.here import Here
from convert_w4a8.cluster.nodes import Cluster
from convert_w4a8.cluster.shards import (
    GPU_PROCESS_BYTES,
    PROCESS_BYTES,
    ShardsOnCluster,
    device_here,
    gpu_of_task,
    threads_of,
)
from convert_w4a8.cluster.tasks import Runner, Task
from convert_w4a8.cluster.tensors import Packed, packed, unpacked
from convert_w4a8.conversion.memory import memory_errors
from convert_w4a8.errors import ClusterError

_T = TypeVar("_T")
_BYTES_A_BYTE, _GPU_BYTES_A_BYTE = 8, 2
"""Memory of a node that a call takes at most for each byte that it is sent: weights in float32 are the most of that."""
_ASK_SECONDS = 1
"""How long Ray may take to give this process memory beside a GPU."""
_SENDERS = 2
"""Calls that are on their way for each place: one is made while the next is sent."""
_LAST = 4
"""As many of the last calls, at most, are kept until a place is free."""


class CallsOnCluster:
    """Makes calls on a cluster and here; can be given to `quantize` as `spread`.

    device: where this process works: a GPU that Ray gives to no task, or the CPU. `hold` comes before calls.
    """

    def __init__(self, cluster: Cluster, device: str = "auto") -> None:
        """Choose devices: "auto", "cpu" or "cuda".

        Raises:
            ClusterError: nodes have another version, or GPUs of several kinds, or there is none on this machine.

        """
        cluster.check_versions()
        self._cluster, self._kind = cluster, ShardsOnCluster(cluster, device=device).kind_of_device()
        self._gpus = 0 if self._kind == "cpu" else 1
        self._here: Here | None = None
        self._memory = 0
        self._cpus = threads_of(cluster.expected_nodes(), None)
        self.device = device_here(cluster.hold_gpu() if self._gpus else "cpu", self._kind)
        self._streams: list[Any] = []

    def hold(self, memory: int) -> None:
        """Take what this process needs itself from what tasks get, if it is free: bytes of memory, and CPUs."""
        self._memory = memory
        if self._gpus:
            self._cluster.reserve(0, memory, _ASK_SECONDS)
            return
        self._here = Here.on(self._cluster, torch.get_num_threads(), memory)
        if self._here is not None:
            self._cpus = threads_of(self._here.beside(self._cluster.expected_nodes()), None)

    def _slots(self) -> int:
        """Return how many calls may be under way elsewhere."""
        nodes = self._cluster.expected_nodes()
        if self._gpus:
            return sum(int(node.gpus) for node in nodes) - 1  # this process has one
        if self._here is None:
            number = nodes[0].id if self._cluster.is_local else self._cluster.node_id()
            left = [replace(node, memory=node.memory - self._memory * (node.id == number)) for node in nodes]
            return sum(max(0, int(min(node.cpus // self._cpus, node.memory // PROCESS_BYTES))) for node in left)
        slots = self._here.places_beside(nodes, self._cpus, PROCESS_BYTES)
        if slots:
            self._here.hold()
        return slots

    def __call__(self, function: Callable[..., _T], calls: Iterable[tuple[Any, ...]], /) -> Iterator[_T]:
        """Yield what a function returns for each of some arguments, in their order. Where others work, this one does.

        Whoever is free takes the next call: this process the first one, which need not be sent.

        Raises:
            W4A8Error: what the function raises; ClusterError: a call was lost too often.

        """
        slots = self._slots()
        first, *streams = self._beside(1 + _SENDERS * slots)
        ended, coming = Event(), _Coming(calls, slots, first)
        with ThreadPoolExecutor(max(1, len(streams))) as pool:
            try:
                sending: list[Future[None]] = []
                while (call := coming.take()) is not None:
                    if not sending:
                        sending = [pool.submit(self._send, function, coming, stream, ended) for stream in streams]
                    call.result.set_result(self._made_here(function, call.arguments))
                    while coming.taken and coming.taken[0].done():
                        yield self._found(coming.taken.popleft())
                while coming.taken:
                    yield self._found(coming.taken.popleft())
                for sender in sending:
                    sender.result()
            finally:
                ended.set()
                coming.close()

    def _made_here(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        return function(*arguments)

    def _found(self, result: Future[Any]) -> Any:
        """Wait for a result, and take it to the device that this process works on."""
        value = result.result()
        return unpacked(value, self.device) if isinstance(value, Packed) else value

    def _beside(self, count: int) -> list[Any]:
        """Return queues of a GPU's work beside what it is asked for here, after what that was so far; None on a CPU."""
        if self.device.type != "cuda":
            return [None] * count
        while len(self._streams) < count:  # kept, for what was in memory for one is free for that one only
            self._streams.append(torch.cuda.Stream(self.device))  # type: ignore[no-untyped-call]
        for stream in self._streams:
            stream.wait_stream(torch.cuda.current_stream(self.device))
        return self._streams[:count]

    def _send(self, function: Callable[..., Any], coming: "_Coming", stream: Any, ended: Event) -> None:
        """Take calls, and have them made elsewhere, until there are none. stream: of `_beside`."""
        with torch.cuda.stream(stream):
            while (call := coming.take_away()) is not None:
                try:
                    name, *_ = call.arguments
                    # Nothing keeps what was sent while the next call is packed: its memory is used again.
                    call.result.set_result(self._there(name, self._packed((function, call.arguments)), ended))
                except BaseException as error:  # noqa: BLE001 - whoever waits for the result raises it
                    call.result.set_exception(error)
                finally:
                    coming.come_back()

    def _packed(self, value: Any) -> Packed:
        return packed(value)

    def _there(self, name: str, call: Packed, ended: Event) -> Packed:
        """Make a call elsewhere. ended: set where nobody waits for it any more."""

        def look(_attempts: object) -> None:
            if ended.is_set():
                raise ClusterError(name, "is not needed any more", "look at others")

        kind, device = self._kind, "cuda" if self._gpus else "cpu"
        memory = PROCESS_BYTES + _BYTES_A_BYTE * call.nbytes
        if self._gpus:
            memory = GPU_PROCESS_BYTES + _GPU_BYTES_A_BYTE * call.nbytes
        task = Task(
            name, call_on_node, lambda _number: (call, name, device, self._cpus, kind), self._cpus, memory, self._gpus
        )
        with closing(Runner(self._cluster, poll=look).run([task])) as finished:
            ((_, _, result),) = finished
        found: Packed = result
        return found


@dataclass(frozen=True)
class _Call:
    """A call that somebody has taken. result: what it gives, packed if it was made elsewhere."""

    arguments: tuple[Any, ...]
    result: Future[Any]


class _Coming:
    """Calls that several threads take, each the next one. taken: what becomes of them, in their order.

    slots: how many can be made elsewhere at a time. Others may be sent there meanwhile, but not the last ones: those
    are for whoever is free first. stream: where a GPU makes what calls hold, which waits for no other call.
    """

    def __init__(self, calls: Iterable[tuple[Any, ...]], slots: int, stream: Any) -> None:
        self._calls, self._slots, self._stream = iter(calls), slots, stream
        self._last = min(slots, _LAST)
        self._next = deque[tuple[Any, ...]]()
        self._away = 0
        self._changed = Condition()
        self.taken = deque[Future[Any]]()

    def take(self) -> _Call | None:
        """Take a call; None where there is none left."""
        with self._changed:
            return self._take()

    def take_away(self) -> _Call | None:
        """Take a call that is to be made elsewhere, until `come_back`."""
        with self._changed:
            self._look_ahead()
            while self._next and self._away >= self._slots and len(self._next) <= self._last:
                self._changed.wait()
            call = self._take()
            self._away += call is not None
            return call

    def come_back(self) -> None:
        """Say that a call was made elsewhere."""
        with self._changed:
            self._away -= 1
            self._changed.notify_all()

    def close(self) -> None:
        """Let nobody take anything any more."""
        with self._changed:
            self._next.clear()
            self._calls = iter(())
            self._changed.notify_all()

    def _take(self) -> _Call | None:
        self._look_ahead()
        if not self._next:
            return None
        call = _Call(self._next.popleft(), Future())
        self.taken.append(call.result)
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        self._look_ahead()
        self._changed.notify_all()
        return call

    def _look_ahead(self) -> None:
        with torch.cuda.stream(self._stream):
            while len(self._next) <= self._last and (arguments := next(self._calls, None)) is not None:
                self._next.append(arguments)


def call_on_node(call: Packed, name: str, device: str, threads: int, kind: str) -> Packed:
    """Make a call on a node, and return what it gives.

    Raises:
        W4A8Error: what the function raises; ClusterError: the node lacks a device of this kind.

    """
    on = device_here(gpu_of_task() if device == "cuda" else device, kind)
    torch.set_num_threads(threads)
    with memory_errors(name, of_gpu=True):
        function, arguments = unpacked(call, on)
        return packed(function(*arguments))
