"""Files of an output, each by a task of its own: the driver alone plans, notes what is finished, and commits.

Every attempt writes into a directory of its own, in `states/` of the work directory. The driver moves the file of the
first attempt that succeeds to where it belongs, so that one that was thought lost, and is not, harms nothing.
"""

import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from convert_w4a8.checkpoint.disk import disk_errors
from convert_w4a8.checkpoint.shards import ShardWriter
from convert_w4a8.checkpoint.writer import CheckpointWriter
from convert_w4a8.cluster.connection import MOST_THREADS, Cluster, Node
from convert_w4a8.cluster.paths import check_inputs, check_output
from convert_w4a8.cluster.tasks import PATIENCE_SECONDS, Runner, Task
from convert_w4a8.conversion.jobs import MEMORY_BYTES, use_workers
from convert_w4a8.conversion.layer import layer_memory
from convert_w4a8.conversion.shard import Progress, ShardResult, ShardTask, convert_shard
from convert_w4a8.devices import resolve_device
from convert_w4a8.errors import ClusterError, ConvertError

Convert = Callable[[ShardTask, Path, torch.device, Progress], ShardResult]
"""Carries out one task, such as `convert_shard`: a function that a node can import."""
PROCESS_BYTES = 700 << 20
"""What a worker takes beside the layers: torch and what it compiles, and parts of files."""
_PROGRESS = "progress.json"
_PROGRESS_SECONDS = 0.5
_REMOVALS = 20


class ShardsOnCluster:
    """Writes files of an output on a cluster; can be given to `carry_out` as `write`.

    device: "auto", "cpu" or "cuda". workers: layers that a task converts at a time; None: one a core, up to 4.
    function: what carries out a task. bytes_per_weight: memory that it takes beside a layer, if that is not of codes.
    """

    def __init__(
        self,
        cluster: Cluster,
        *,
        device: str = "auto",
        workers: int | None = None,
        progress: Progress = lambda _nbytes: None,
        function: Convert = convert_shard,
        bytes_per_weight: int = 0,
        patience: float = PATIENCE_SECONDS,
    ) -> None:
        if device not in ("auto", "cpu", "cuda"):
            raise ConvertError(f"--device {device}", "does not go with --ray, which chooses GPUs", "use --device cuda")
        self._cluster, self._device, self._workers, self._progress = cluster, device, workers, progress
        self._function, self._bytes_per_weight, self._patience = function, bytes_per_weight, patience

    def __call__(self, tasks: Sequence[ShardTask], writer: CheckpointWriter) -> None:
        """Write the unfinished ones of some files.

        Raises:
            W4A8Error: the input is at fault, a node cannot see a path or has another version, or nodes fail too often.

        """
        unfinished = set(writer.unfinished)
        wanted = [task for task in tasks if task.shard.file_name in unfinished]
        bars = _Bars(tasks, wanted, self._progress)
        if not wanted:
            return
        self._cluster.check_versions()
        states: dict[str, tuple[int, int]] = {}
        for task in wanted:
            states |= task.inputs
        check_inputs(self._cluster, states)
        with writer.states() as directory:
            check_output(self._cluster, directory)
            attempts = _Attempts(directory, bars)
            runner = Runner(
                self._cluster,
                poll=attempts.poll,
                where=attempts.where,
                drop=attempts.drop,
                patience=self._patience,
            )
            nodes = self._cluster.nodes()
            device, gpus = self._device_on(nodes)
            cpus = threads_of(nodes, self._workers)
            by_name = {task.shard.file_name: task for task in wanted}
            calls = [
                Task(
                    name,
                    write_on_node,
                    lambda number, task=task: (self._function, task, attempts.make(task, number), device, cpus),  # type: ignore[misc]
                    cpus,
                    self._memory(task),
                    gpus,
                )
                for name, task in by_name.items()
            ]
            with closing(runner.run(calls)) as finished:
                for call, number, result in finished:
                    path = attempts.path(call.name, number)
                    with disk_errors(path):
                        if path.stat().st_size != ShardWriter(path.parent, by_name[call.name].shard).size:
                            raise ClusterError(str(path), "is not here what the node wrote", "look at the file system")
                        path.replace(writer.directory / call.name)
                    writer.note(call.name, result.pieces, result.layers, result.infinities)
                    bars.finish(call.name)

    def _device_on(self, nodes: Sequence[Node]) -> tuple[str, int]:
        """Return the device of a task, and how many GPUs to ask for."""
        has_gpus = any(node.gpus >= 1 for node in nodes)
        if self._device == "cuda" and not has_gpus:
            raise ClusterError("--device cuda", "no node of the cluster has a GPU", "use --device cpu")
        return ("cuda", 1) if has_gpus and self._device != "cpu" else ("cpu", 0)

    def _memory(self, task: ShardTask) -> int:
        """Return the bytes that a task takes of its node: of its layers as many as go side by side."""
        layers = [layer_memory(layer) for layer in task.layers]
        if self._bytes_per_weight:
            specs = [layer.spec for layer in task.layers]
            layers = [spec.nbytes + self._bytes_per_weight * spec.out_features * spec.in_features for spec in specs]
        return PROCESS_BYTES + max(min(sum(layers), MEMORY_BYTES), max(layers, default=0))


def threads_of(nodes: Sequence[Node], workers: int | None) -> int:
    """Return the threads, and so the CPUs, of a task: up to 4, so that the fewest CPUs of the cluster stay idle."""
    if workers is not None:
        return workers
    used = {n: sum(int(node.cpus) // n * n for node in nodes) for n in range(1, MOST_THREADS + 1)}
    return max(used, key=lambda n: (used[n], n))


def write_on_node(function: Convert, task: ShardTask, directory: str, device: str, threads: int) -> ShardResult:
    """Carry out one task on a node, and say now and then how far it is.

    Raises:
        W4A8Error: what the function raises, or the node cannot see the directory.

    """
    for path in (directory, *task.inputs):
        if not Path(path).exists():
            raise ClusterError(path, "cannot be seen", "mount its file system there, or take the node out")
    device = gpu_of_task() if device == "cuda" else device
    with use_workers(threads), _reporting(Path(directory)) as progress:
        return function(task, Path(directory), resolve_device(device), progress)


def gpu_of_task() -> str:
    """Return the GPU that Ray gave to this task, as torch calls it in this process, which sees others, too."""
    import ray  # noqa: PLC0415

    (number,) = map(str, ray.get_gpu_ids())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return f"cuda:{visible.split(',').index(number) if visible else int(number)}"


@contextmanager
def _reporting(directory: Path) -> Iterator[Progress]:
    """Write now and then how many bytes are done with, and on which node, into a file of a directory.

    Raises:
        ClusterError: the directory is gone, in what is yielded.

    """
    import ray  # noqa: PLC0415

    node = ray.get_runtime_context().get_node_id()
    lock, done, last = threading.Lock(), 0, 0.0

    def write() -> None:
        with suppress(OSError):
            part = directory / f"{_PROGRESS}.part"
            part.write_text(json.dumps({"node": node, "done": done}))
            part.replace(directory / _PROGRESS)

    def update(nbytes: int) -> None:
        nonlocal done, last
        with lock:
            done += nbytes
            if time.monotonic() - last >= _PROGRESS_SECONDS:
                last = time.monotonic()
                write()
                if not directory.is_dir():
                    raise ClusterError(str(directory), "is gone: this attempt is not needed any more", "look at others")

    write()
    yield update


class _Attempts:
    """Directories of attempts, and what lies in them."""

    def __init__(self, directory: Path, bars: "_Bars") -> None:
        self._root, self._bars = directory / secrets.token_hex(4), bars  # a process that was killed has another one
        self._nodes: dict[tuple[str, int], str] = {}

    def path(self, name: str, number: int) -> Path:
        """Return where an attempt writes its file."""
        return self._root / f"{name}.{number}" / name

    def make(self, task: ShardTask, number: int) -> str:
        """Make a directory for an attempt."""
        directory = self.path(task.shard.file_name, number).parent
        directory.mkdir(parents=True)
        return str(directory)

    def drop(self, task: Task, number: int) -> None:
        """Remove the directory of an attempt, which ends it; it may write there in the meantime."""
        directory = self.path(task.name, number).parent
        for _ in range(_REMOVALS):
            shutil.rmtree(directory, ignore_errors=True)
            if not directory.exists():
                return
            time.sleep(0.05)

    def where(self, task: Task, number: int) -> str | None:
        """Return the id of the node that has an attempt, if that is known."""
        return self._nodes.get((task.name, number))

    def poll(self, attempts: Sequence[tuple[Task, int]]) -> None:
        """Look how far attempts are."""
        for task, number in attempts:
            with suppress(OSError, ValueError, KeyError):
                found: dict[str, Any] = json.loads((self.path(task.name, number).parent / _PROGRESS).read_bytes())
                self._nodes[task.name, number] = found["node"]
                self._bars.reach(task.name, found["done"])


class _Bars:
    """Tells one progress of all tasks. A layer that lies in several files counts in the first of them."""

    def __init__(self, tasks: Sequence[ShardTask], wanted: Sequence[ShardTask], progress: Progress) -> None:
        self._progress = progress
        self._shares: dict[str, int] = {}
        self._totals: dict[str, int] = {}
        self._done: dict[str, int] = {}
        counted: set[str] = set()
        names = {task.shard.file_name for task in wanted}
        for task in (*wanted, *(task for task in tasks if task.shard.file_name not in names)):
            name = task.shard.file_name
            copied = sum(tensor.info.nbytes for tensor in task.tensors)
            layers = {layer.module: layer.spec.nbytes for layer in task.layers}
            self._totals[name] = copied + sum(layers.values())
            self._shares[name] = copied + sum(nbytes for module, nbytes in layers.items() if module not in counted)
            counted |= layers.keys()
            self._done[name] = 0
            if name not in names:
                self.finish(name)

    def reach(self, name: str, done: int) -> None:
        """Note how many bytes a task has done; an attempt that begins again does not count backwards."""
        share = self._shares[name] * min(done, self._totals[name]) // max(1, self._totals[name])
        if share > self._done[name]:
            self._progress(share - self._done[name])
            self._done[name] = share

    def finish(self, name: str) -> None:
        """Note that a task is finished."""
        self._progress(self._shares[name] - self._done[name])
        self._done[name] = self._shares[name]
