"""Independent calls, side by side on the nodes of a cluster and in this process: the matrices of a calibration.

This process keeps what the calls share: the model, hidden states, and a GPU, where there are any. Each task gets its
weights and moments, or the inputs of its experts, and gives back codes and tables.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from threading import Event
from typing import Any, TypeVar

import torch

from convert_w4a8.cluster.connection import Cluster
from convert_w4a8.cluster.here import Here
from convert_w4a8.cluster.shards import PROCESS_BYTES, ShardsOnCluster, device_here, gpu_of_task, threads_of
from convert_w4a8.cluster.tasks import Runner, Task
from convert_w4a8.cluster.tensors import packed, unpacked
from convert_w4a8.conversion.memory import memory_errors
from convert_w4a8.errors import ClusterError

_T = TypeVar("_T")
_BYTES_A_BYTE = 4
"""Memory that a call takes for each byte that it is sent."""


class CallsOnCluster:
    """Makes calls on a cluster and here; can be given to `quantize` as `spread`.

    device: where this process works: a GPU that Ray gives to no task, or the CPU.
    """

    def __init__(self, cluster: Cluster, device: str = "auto") -> None:
        """Choose devices: "auto", "cpu" or "cuda".

        Raises:
            ClusterError: nodes have another version, or GPUs of several kinds, or there is none on this machine.

        """
        cluster.check_versions()
        self._cluster, self._kind = cluster, ShardsOnCluster(cluster, device=device).kind_of_device()
        self._gpus = 0 if self._kind == "cpu" else 1
        nodes = cluster.expected_nodes()
        self._here = None if self._gpus else Here.on(cluster, torch.get_num_threads(), PROCESS_BYTES)
        self._cpus = threads_of(nodes if self._here is None else self._here.beside(nodes), None)
        self.device = device_here(cluster.hold_gpu() if self._gpus else "cpu", self._kind)

    def _slots(self) -> int:
        """Return how many calls may be under way elsewhere."""
        nodes = self._cluster.expected_nodes()
        if self._gpus:
            return sum(int(node.gpus) for node in nodes) - 1  # this process has one
        if self._here is None:
            return sum(int(node.cpus) // self._cpus for node in nodes)
        slots = self._here.places_beside(nodes, self._cpus)
        if slots:
            self._here.hold()
        return slots

    def __call__(self, function: Callable[..., _T], calls: Iterable[tuple[Any, ...]], /) -> Iterator[_T]:
        """Yield what a function returns for each of some arguments, in their order. Where others work, this one does.

        Raises:
            W4A8Error: what the function raises; ClusterError: a call was lost too often.

        """
        ended = Event()
        coming, found = iter(calls), deque[tuple[Future[bytes] | None, Any]]()
        slots = self._slots()
        with ThreadPoolExecutor(max(1, slots)) as pool:
            try:
                arguments = next(coming, None)
                while arguments is not None:
                    after = next(coming, None)
                    busy = sum(future is not None and not future.done() for future, _ in found)
                    if after is not None and busy < slots:
                        call = packed((function, arguments))
                        found.append((pool.submit(self._there, arguments[0], call, ended), None))
                    else:
                        found.append((None, function(*arguments)))
                    arguments = after
                    while found and (found[0][0] is None or found[0][0].done()):
                        yield self._value(*found.popleft())
                while found:
                    yield self._value(*found.popleft())
            finally:
                ended.set()
                for future, _ in found:
                    if future is not None:
                        future.cancel()

    def _value(self, future: Future[bytes] | None, value: Any) -> Any:
        return value if future is None else unpacked(future.result(), self.device)

    def _there(self, name: str, call: bytes, ended: Event) -> bytes:
        """Make a call elsewhere. ended: set where nobody waits for it any more."""

        def look(_attempts: object) -> None:
            if ended.is_set():
                raise ClusterError(name, "is not needed any more", "look at others")

        kind, device = self._kind, "cuda" if self._gpus else "cpu"
        memory = PROCESS_BYTES + _BYTES_A_BYTE * len(call)
        task = Task(
            name, call_on_node, lambda _number: (call, name, device, self._cpus, kind), self._cpus, memory, self._gpus
        )
        with closing(Runner(self._cluster, poll=look).run([task])) as finished:
            ((_, _, result),) = finished
        found: bytes = result
        return found


def call_on_node(call: bytes, name: str, device: str, threads: int, kind: str) -> bytes:
    """Make a call on a node, and return what it gives as bytes.

    Raises:
        W4A8Error: what the function raises; ClusterError: the node lacks a device of this kind.

    """
    on = device_here(gpu_of_task() if device == "cuda" else device, kind)
    torch.set_num_threads(threads)
    with memory_errors(name, of_gpu=True):
        function, arguments = unpacked(call, on)
        return packed(function(*arguments))
