"""Ray clusters of several nodes on this machine, as real processes, and work on them that goes wrong on purpose.

The functions below are carried out by workers of such a cluster, which find this module on their path.
"""

import hashlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from paths import ROOT

from convert_w4a8.checkpoint.directory import open_checkpoint
from convert_w4a8.cluster.connection import connect
from convert_w4a8.cluster.quiet import load_ray, undisturbed
from convert_w4a8.cluster.shards import ShardsOnCluster, gpu_of_task
from convert_w4a8.conversion.plan import make_plan
from convert_w4a8.conversion.run import carry_out
from convert_w4a8.conversion.shard import Progress, ShardResult, ShardTask, convert_shard
from convert_w4a8.errors import ConvertError
from convert_w4a8.options import Options

MARKS = "W4A8_TEST_MARKS"
"""Names a directory in which functions below note what they did."""
STORE = 80 << 20
MEMORY = 8 << 30


def digests(path: Path) -> dict[str, str]:
    """Return the sha256 of every file of a directory."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in path.iterdir()}


def python_path() -> str:
    """Return a PYTHONPATH by which workers find this checkout and this module."""
    found = [str(ROOT), str(ROOT / "tests" / "support"), os.environ.get("PYTHONPATH", "")]
    return os.pathsep.join(filter(None, found))  # an empty entry would be the working directory


@dataclass(frozen=True)
class Nodes:
    """A cluster (ray.cluster_utils.Cluster), and Ray, which is connected to it."""

    cluster: Any
    ray: Any


@contextmanager
def connected() -> Iterator[Nodes]:
    """Start a head without work and two nodes for two workers each, and connect to them."""
    processes = start_head(0)
    try:
        for _ in range(2):
            add_node(processes, 2)
        with connect(processes.address) as cluster:
            yield Nodes(processes, cluster.ray)
    finally:
        processes.shutdown()


def start_head(cpus: int, **more: Any) -> Any:
    """Start a cluster that is one node, the head; return it (ray.cluster_utils.Cluster).

    Ray handles SIGTERM in a process that starts nodes. Tests of signals may follow in this one, so it does not.
    """
    load_ray()
    from ray.cluster_utils import Cluster

    head = {"num_cpus": cpus, "object_store_memory": STORE, "include_dashboard": False, **more}
    with undisturbed():
        return Cluster(initialize_head=True, head_node_args=head)


def add_node(cluster: Any, cpus: int, **more: Any) -> Any:
    """Add a node with memory for some tasks."""
    with undisturbed():
        return cluster.add_node(num_cpus=cpus, memory=MEMORY, object_store_memory=STORE, **more)


def kill_node(node: Any) -> None:
    """Kill all processes of a node at once, its workers too."""
    pids = [info.process.pid for infos in node.all_processes.values() for info in infos]
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if int((process / "stat").read_text().rpartition(")")[2].split()[1]) in pids:
                pids.append(int(process.name))
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def mark(name: str) -> bool:
    """Note something in the directory of marks; whether it is the first time."""
    try:
        os.close(os.open(Path(os.environ[MARKS], name), os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def marks(start: str) -> list[str]:
    """Return what was noted that begins like this."""
    return sorted(path.name for path in Path(os.environ[MARKS]).iterdir() if path.name.startswith(start))


def slow(task: ShardTask, directory: Path, device: torch.device, progress: Progress) -> ShardResult:
    """Take a second longer, and note on which node a file was begun."""
    import ray

    mark(f"begun-{ray.get_runtime_context().get_node_id()}-{task.shard.file_name}")
    time.sleep(1.0)
    return convert_shard(task, directory, device, progress)


def beside_another(task: ShardTask, directory: Path, device: torch.device, progress: Progress) -> ShardResult:
    """Wait until another node has begun one, too: Ray takes longer to start a worker than all files take."""
    import ray

    mark(f"node-{ray.get_runtime_context().get_node_id()}")
    deadline = time.monotonic() + 60
    while len(marks("node-")) < 2 and time.monotonic() < deadline:
        progress(0)
        time.sleep(0.05)
    return convert_shard(task, directory, device, progress)


def killed(task: ShardTask, directory: Path, device: torch.device, progress: Progress) -> ShardResult:
    """Be killed in the middle of the second file, always."""
    hit = task.shard.file_name.startswith("model-00002-")
    return convert_shard(task, directory, device, partial(_die, progress) if hit else progress)


def _die(progress: Progress, nbytes: int) -> None:
    progress(nbytes)
    os.kill(os.getpid(), signal.SIGKILL)


def killed_once(task: ShardTask, directory: Path, device: torch.device, progress: Progress) -> ShardResult:
    """Be killed in the middle of it once."""
    return (killed if mark(f"killed-{task.shard.file_name}") else convert_shard)(task, directory, device, progress)


def stuck_once(task: ShardTask, directory: Path, device: torch.device, progress: Progress) -> ShardResult:
    """Take for ever on one of the files, the first time."""
    if task.shard.file_name.startswith("model-00003-") and mark("stuck"):
        while True:
            progress(0)
            time.sleep(0.1)
    return convert_shard(task, directory, device, progress)


def doubled(name: str, value: torch.Tensor, parent: int) -> torch.Tensor:
    """Return twice a tensor. Elsewhere than in a process, be killed the first time with each name, or refuse one."""
    if os.getpid() != parent:
        if name == "refused":
            raise ConvertError(name, "is refused", "give another one")
        if mark(f"called-{name}"):
            os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.1)  # so that others take some
    return 2 * value


def long_elsewhere(name: str, parent: int) -> str:
    """Take long elsewhere, and refuse here, when it is begun there."""
    if os.getpid() != parent:
        mark(f"long-{name}")
        time.sleep(20)
        return name
    while not marks("long-"):
        time.sleep(0.05)
    raise ConvertError(name, "is refused", "give another one")


def gpu_for_a_while() -> tuple[str, str, int]:
    """Return the device that a task takes, the GPUs that its process sees, and the process."""
    time.sleep(0.3)
    return gpu_of_task(), os.environ["CUDA_VISIBLE_DEVICES"], os.getpid()


def main() -> None:
    """Convert IN OUT on a cluster at an address, slowly."""
    source, out, address, size = sys.argv[1:]
    checkpoint = open_checkpoint(Path(source))
    plan = make_plan(checkpoint, Options(max_shard_size=int(size)))
    with connect(address) as cluster:
        write = ShardsOnCluster(cluster, device="cpu", workers=1, function=slow)
        carry_out(checkpoint, plan, Path(out), device=torch.device("cpu"), resume=True, write=write)
