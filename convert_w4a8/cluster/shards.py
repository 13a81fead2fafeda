"""Files of an output, each by a task of its own: the driver alone plans, notes what is finished, and commits.

Every attempt writes into a directory of its own, in `states/` of the work directory. The driver moves the file of the
first attempt that succeeds to where it belongs, so that one that was thought lost, and is not, harms nothing.
"""

from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import torch

from convert_w4a8.checkpoint.disk import disk_errors
from convert_w4a8.checkpoint.shards import ShardWriter
from convert_w4a8.checkpoint.writer import CheckpointWriter
from convert_w4a8.cluster.attempts import Attempts, Bars, reporting
from convert_w4a8.cluster.greetings import name_of_gpu, one_line
from convert_w4a8.cluster.here import Here
from convert_w4a8.cluster.nodes import MOST_THREADS, Cluster, Node
from convert_w4a8.cluster.paths import check_inputs, check_output
from convert_w4a8.cluster.tasks import PATIENCE_SECONDS, Runner, Task
from convert_w4a8.conversion.jobs import MEMORY_BYTES, use_workers
from convert_w4a8.conversion.layer import layer_memory
from convert_w4a8.conversion.shard import Progress, ShardResult, ShardTask, convert_shard
from convert_w4a8.devices import kind_of, resolve_device
from convert_w4a8.errors import ClusterError, ConvertError

Convert = Callable[[ShardTask, Path, torch.device, Progress], ShardResult]
"""Carries out one task, such as `convert_shard`: a function that a node can import."""
PROCESS_BYTES = 700 << 20
"""What a worker takes beside the layers: torch and what it compiles, and parts of files."""
GPU_PROCESS_BYTES = 2000 << 20
"""The same where it has a GPU: CUDA's libraries, and what it keeps of a GPU with the host."""


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
        self._kind: str | None = None

    @property
    def device_type(self) -> str:
        """The type of the device that tasks take, as nodes are now: cpu or cuda."""
        return self._device_on(self._cluster.expected_nodes())[0]

    def kind_of_device(self) -> str:
        """Return the kind of device that all tasks run on from now on, as `devices.kind_of` calls it.

        Raises:
            ClusterError: the cluster has GPUs of several kinds, or such as torch cannot use.

        """
        self._kind = self.device_type
        if self._kind == "cuda":
            gpus = self._cluster.gpus()
            names = sorted({name for of_node in gpus.values() for name in of_node})
            if len(names) != 1:
                where = ", ".join(f"{node}: {' and '.join(sorted(set(gpus[node])))}" for node in sorted(gpus))
                reason = f"has GPUs of several kinds, whose codes and tables differ ({where or 'none any more'})"
                raise ClusterError("Ray cluster", reason, "take out nodes until one kind is left, or use --device cpu")
            self._kind = f"cuda ({names[0]})"
        return self._kind

    def __call__(self, tasks: Sequence[ShardTask], writer: CheckpointWriter) -> None:
        """Write the unfinished ones of some files.

        Raises:
            W4A8Error: the input is at fault, a node cannot see a path or has another version, or nodes fail too often.

        """
        unfinished = set(writer.unfinished)
        wanted = [task for task in tasks if task.shard.file_name in unfinished]
        bars = Bars(tasks, wanted, self._progress)
        if not wanted:
            return
        with writer.states() as directory:
            attempts = Attempts(directory, bars)
            nodes = self._cluster.expected_nodes()
            device, gpus = self._device_on(nodes)
            cpus = threads_of(nodes, self._workers)
            memory = max(map(self._memory, wanted))
            runner = Runner(
                self._cluster,
                poll=attempts.poll,
                where=attempts.where,
                drop=attempts.drop,
                patience=self._patience,
                here=None if gpus else Here.on(self._cluster, cpus, memory),
            )
            by_name = {task.shard.file_name: task for task in wanted}
            calls = [
                Task(
                    name,
                    write_on_node,
                    lambda number, task=task: (  # type: ignore[misc]
                        self._function,
                        task,
                        attempts.make(task, number),
                        device,
                        cpus,
                        self._kind,
                    ),
                    cpus,
                    self._memory(task, gpus),
                    gpus,
                    write_here,
                )
                for name, task in by_name.items()
            ]
            with closing(runner.run(calls, partial(self._check, wanted, directory))) as finished:
                for call, number, result in finished:
                    path = attempts.path(call.name, number)
                    with disk_errors(path):
                        if path.stat().st_size != ShardWriter(path.parent, by_name[call.name].shard).size:
                            raise ClusterError(str(path), "is not here what the node wrote", "look at the file system")
                        path.replace(writer.directory / call.name)
                    writer.note_later(call.name, result.pieces, result.notes)
                    bars.finish(call.name)
            writer.wait()

    def _check(self, tasks: Sequence[ShardTask], directory: Path) -> None:
        """Check that all nodes have this version, see the inputs as we do, and can write into a directory."""
        self._cluster.check_versions()
        states: dict[str, tuple[int, int]] = {}
        for task in tasks:
            states |= task.inputs
        check_inputs(self._cluster, states)
        check_output(self._cluster, directory)

    def _device_on(self, nodes: Sequence[Node]) -> tuple[str, int]:
        """Return the device of a task, and how many GPUs to ask for."""
        has_gpus = any(node.gpus >= 1 for node in nodes)
        if self._device == "cuda" and not has_gpus:
            raise ClusterError("--device cuda", "no node of the cluster has a GPU", "use --device cpu")
        return ("cuda", 1) if has_gpus and self._device != "cpu" else ("cpu", 0)

    def _memory(self, task: ShardTask, gpus: int = 0) -> int:
        """Return the bytes that a task takes of its node: of its layers as many as go side by side."""
        layers = [layer_memory(layer) for layer in task.layers]
        if self._bytes_per_weight:
            specs = [layer.spec for layer in task.layers]
            layers = [spec.nbytes + self._bytes_per_weight * spec.out_features * spec.in_features for spec in specs]
        process = GPU_PROCESS_BYTES if gpus else PROCESS_BYTES
        return process + max(min(sum(layers), MEMORY_BYTES), max(layers, default=0))


def threads_of(nodes: Sequence[Node], workers: int | None) -> int:
    """Return the threads, and so the CPUs, of a task: up to 4, so that the fewest CPUs of the cluster stay idle."""
    if workers is not None:
        return workers
    used = {n: sum(int(node.cpus) // n * n for node in nodes) for n in range(1, MOST_THREADS + 1)}
    return max(used, key=lambda n: (used[n], n))


def write_on_node(
    function: Convert, task: ShardTask, directory: str, device: str, threads: int, kind: str | None = None
) -> ShardResult:
    """Carry out one task on a node, and say now and then how far it is. kind: of the device, where that counts.

    Raises:
        W4A8Error: what the function raises; ClusterError: the node lacks a path, or a device of this kind.

    """
    import ray  # noqa: PLC0415

    for path in (directory, *task.inputs):
        if not Path(path).exists():
            raise ClusterError(path, "cannot be seen", "mount its file system there, or take the node out")
    on = device_here(gpu_of_task() if device == "cuda" else device, kind)
    with use_workers(threads), reporting(Path(directory), ray.get_runtime_context().get_node_id()) as progress:
        return function(task, Path(directory), on, progress)


def write_here(
    function: Convert, task: ShardTask, directory: str, device: str, threads: int, kind: str | None = None
) -> ShardResult:
    """Carry out one task in the process of the command, as `write_on_node` does."""
    with use_workers(threads), reporting(Path(directory), "") as progress:
        return function(task, Path(directory), device_here(device, kind), progress)


def device_here(name: str, kind: str | None) -> torch.device:
    """Return a device of this node.

    Raises:
        ClusterError: there is none of this name, or it is of another kind.

    """
    try:
        device = resolve_device(name)
        found = kind and kind_of(device)
    except (ConvertError, RuntimeError, AssertionError) as error:  # torch raises the latter two
        reason = f"cannot be used on this node ({one_line(error)})"
        raise ClusterError(f"device {name}", reason, "mend or take out the node, or use --device cpu") from error
    if found != kind:
        raise ClusterError(f"device {name}", f"is {found} on this node, not {kind}", "take out the node")
    return device


def gpu_of_task() -> str:
    """Return the GPU that Ray gave to this task, as torch calls it in this process, which sees others, too."""
    import ray  # noqa: PLC0415

    (number,) = map(str, ray.get_gpu_ids())
    return name_of_gpu(number)
