"""Commands of ours as processes that are watched, clusters of several nodes on this machine, what conversions wrote."""

import argparse
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from results import ROOT, add_options

PACKAGES = ("torch", "numpy", "numba", "safetensors", "ray")
MARK = "W4A8_BENCH_RUN"
"""In the environment of a command and of all that it starts."""
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Watched:
    """Processes of a run: seconds of processors and the largest resident KiB, by process."""

    seconds: dict[int, float] = field(default_factory=dict)
    kib: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How a command ended. driver_mib: the largest resident size of its own process."""

    code: int
    seconds: float
    cpu_seconds: float
    driver_mib: float
    largest_mib: float
    stdout: str
    stderr: str


def _look(mark: str, found: Watched) -> None:
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError, IndexError):
            if f"{MARK}={mark}" not in (process / "environ").read_text(errors="replace"):
                continue
            pid, parts = int(process.name), (process / "stat").read_text().rpartition(")")[2].split()
            found.seconds[pid] = (int(parts[11]) + int(parts[12])) / TICKS
            status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines() if ":" in line)
            found.kib[pid] = int(status["VmHWM"].split()[0])


class Command:
    """`w4a8-convert` as a process of its own, and what it starts."""

    def __init__(
        self, source: Path, out: Path, *options: object, command: str = "convert", device: str = "cpu", gpus: str = ""
    ) -> None:
        self.mark = f"{os.getpid()}-{time.monotonic_ns()}"
        self._watched, self._ended = Watched(), threading.Event()
        arguments = [sys.executable, "-P", "-m", "convert_w4a8", command, source, out, "--device", device, *options]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        environment = {**os.environ, MARK: self.mark, "PYTHONPATH": path}
        environment |= {"CUDA_VISIBLE_DEVICES": gpus} if gpus else {}
        self._started = time.monotonic()
        self.process = subprocess.Popen(
            [*map(str, arguments)], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()

    def _watch(self) -> None:
        while not self._ended.wait(0.1):
            _look(self.mark, self._watched)

    def wait(self) -> Outcome:
        """Wait until it ends."""
        stdout, stderr = self.process.communicate()
        seconds = time.monotonic() - self._started
        self._ended.set()
        self._watcher.join()
        kib = self._watched.kib
        return Outcome(
            self.process.returncode,
            seconds,
            sum(self._watched.seconds.values()),
            kib.get(self.process.pid, 0) / 1024,
            max(kib.values(), default=0) / 1024,
            stdout,
            stderr,
        )


def convert(source: Path, out: Path, *options: object, **more: str) -> Outcome:
    """Convert and wait; SystemExit where that fails."""
    outcome = Command(source, out, *options, **more).wait()
    if outcome.code:
        sys.exit(f"{options}: exit code {outcome.code}: {outcome.stderr}")
    return outcome


def digest(directory: Path) -> str:
    """Return one sha256 of all names and contents."""
    found = hashlib.sha256()
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                found.update(
                    f"{path.relative_to(directory)} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode()
                )
    return found.hexdigest()


def finished(out: Path) -> int:
    """Return how many files of an output are finished."""
    journal = out.parent / f".{out.name}.w4a8-partial" / "journal"
    with suppress(OSError):
        return journal.read_bytes().count(b'{"file"')
    return 0


@contextmanager
def cluster(*cpus: int, head_cpus: int = 0) -> Iterator[Any]:
    """Start a head, by default without work, and nodes with so many CPUs each. Commands here are on the head's node."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    from ray.cluster_utils import Cluster

    head = {"num_cpus": head_cpus, "object_store_memory": 80 << 20, "include_dashboard": False}
    head |= {"memory": 8 << 30} if head_cpus else {}
    made = Cluster(initialize_head=True, head_node_args=head)
    try:
        for count in cpus:
            add_node(made, count)
        yield made
    finally:
        made.shutdown()


def add_node(made: Any, cpus: int) -> Any:
    """Add a node."""
    return made.add_node(num_cpus=cpus, memory=8 << 30, object_store_memory=80 << 20)


def kill_node(node: Any) -> None:
    """Kill all processes of a node, its workers too, without a word."""
    pids = [info.process.pid for infos in node.all_processes.values() for info in infos]
    for pid in [*children(*pids), *pids]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def children(*parents: int) -> list[int]:
    """Return the processes that some processes started."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError):
            if int((process / "stat").read_text().rpartition(")")[2].split()[1]) in parents:
                found.append(int(process.name))
    return found


def workers(made: Any) -> list[int]:
    """Return the processes that carry out our tasks."""
    raylets = [
        info.process.pid for node in made.list_all_nodes() for infos in node.all_processes.values() for info in infos
    ]
    found = []
    for pid in children(*raylets):
        with suppress(OSError):
            if b"ray::model-" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def wait_for(out: Path, count: int, command: Command) -> None:
    """Wait until so many files are finished."""
    while finished(out) < count and command.process.poll() is None:
        time.sleep(0.02)


def digest_of_weights(directory: Path) -> str:
    """Return one sha256 of the safetensors files."""

    def of_file(path: Path) -> bytes:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()

    with ThreadPoolExecutor() as pool:
        return hashlib.sha256(b"".join(pool.map(of_file, sorted(directory.glob("*.safetensors"))))).hexdigest()


def run_chosen(parser: argparse.ArgumentParser, functions: Mapping[str, Any]) -> None:
    """Parse what is left to parse, and call the function that `what` names, with a directory of its own."""
    parser.add_argument("--directory", type=Path, help="where checkpoints are made; a temporary one by default")
    add_options(parser)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="w4a8-ray-", dir=args.directory) as root:
        functions[args.what](args, Path(root))
