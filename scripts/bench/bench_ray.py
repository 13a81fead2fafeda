#!/usr/bin/env python3
"""Conversions on Ray clusters of several nodes on this machine, as real processes: bytes, kills, time, memory.

    python scripts/bench/bench_ray.py equality --gigabytes 2 --keep ray-equality
    python scripts/bench/bench_ray.py kills --gigabytes 0.2 --runs 30 --keep ray-kills
    python scripts/bench/bench_ray.py overhead --gigabytes 4 --rounds 2 --keep ray-overhead
    python scripts/bench/bench_ray.py memory --keep ray-memory
    python scripts/bench/bench_ray.py gpus --gigabytes 4 --keep ray-gpus
    python scripts/bench/bench_ray.py cores --input awq-zp --gigabytes 4 --shard-size 100MB --keep ray-cores

equality: digests of a conversion here, on 1 worker, on 4 workers of 2 nodes, with a node killed half-way, and with the
driver killed half-way and resumed. kills: a worker, a node or the driver is killed at a random time; what is not
finished is resumed. overhead: the same conversion with and without `--ray`, in turn, on all cores. memory: the largest
resident size of the driver, by the number of tensors. gpus, cores: how time falls with their number. Seconds of
processors are those of all processes of a run.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from results import ROOT, add_options, save, visible_gpus
from synthetic import layer_tensors, make_checkpoint, quantization_config

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


def equality(args: argparse.Namespace, root: Path) -> None:
    """Compare digests."""
    source, size = root / "in", f"{args.gigabytes * 100:.0f}MB"
    make_checkpoint(source, args.input, args.gigabytes)
    options = ("--max-shard-size", size, "--quiet")
    rows: list[dict[str, Any]] = []

    def add(what: str, seconds: float, attempts: int = 0, again: int = 0) -> None:
        value = digest(root / "out")
        same = not rows or value == rows[0]["sha256"]
        files = len(list((root / "out").glob("*.safetensors")))
        rows.append({"run": what, "sha256": value, "short": value[:12], "same": "yes" if same else "NO"}
                    | {"files": files, "wall_s": seconds, "again": attempts, "resumed": again})  # fmt: skip
        print(rows[-1], file=sys.stderr, flush=True)
        shutil.rmtree(root / "out")

    add("here, without Ray", convert(source, root / "out", *options).seconds)
    on_ray = ("--max-shard-size", size, "--json", "--workers", 1, "--ray")
    with cluster(1) as made:
        add("1 worker", convert(source, root / "out", *on_ray, made.address).seconds)
    with cluster(2, 2) as made:
        add("4 workers on 2 nodes", convert(source, root / "out", *on_ray, made.address).seconds)
        node = add_node(made, 2)
        command = Command(source, root / "out", *on_ray, made.address)
        wait_for(root / "out", 4, command)
        kill_node(node)
        outcome = command.wait()
        if outcome.code:
            sys.exit(f"a node killed half-way: exit code {outcome.code}: {outcome.stderr}")
        tasks = json.loads(outcome.stdout)["ray"]["tasks"]
        add("a node killed half-way", outcome.seconds, sum(task["attempts"] - 1 for task in tasks))
        for what, more in (("on Ray", [*on_ray, made.address]), ("without Ray", list(options))):
            command = Command(source, root / "out", *on_ray, made.address)
            wait_for(root / "out", 4, command)
            command.process.kill()
            seconds, kept = command.wait().seconds, finished(root / "out")
            seconds += convert(source, root / "out", *more, "--resume").seconds
            add(f"the driver killed half-way, resumed {what}", seconds, again=kept)
    save(args, "Are the bytes the same, whoever writes them and whoever is killed?", rows, packages=PACKAGES)


def kills(args: argparse.Namespace, root: Path) -> None:
    """Kill at random."""
    source, rng = root / "in", random.Random(args.seed)
    make_checkpoint(source, args.input, args.gigabytes)
    size = f"{args.gigabytes * 50:.0f}MB"
    expected, runs = "", []
    with cluster(2, 2) as made:
        on_ray = ("--max-shard-size", size, "--json", "--workers", 1, "--ray", made.address)
        undisturbed = convert(source, root / "out", *on_ray).seconds
        expected = digest(root / "out")
        shutil.rmtree(root / "out")
        for number in range(args.runs):
            victim = rng.choice(["worker", "worker", "node", "driver"])
            command = Command(source, root / "out", *on_ray)
            started, delay = time.monotonic(), rng.random() * undisturbed
            while time.monotonic() < started + delay and command.process.poll() is None:
                time.sleep(0.01)
            hit = _strike(victim, made, command, rng)
            outcome = command.wait()
            run: dict[str, Any] = {"victim": victim, "hit": hit, "code": outcome.code, "seconds": outcome.seconds}
            run["half_written"] = (root / "out").exists() and digest(root / "out") != expected
            run["kept"] = finished(root / "out")
            if not (root / "out").exists():
                run["resumed"] = True
                again = Command(source, root / "out", *on_ray, "--resume").wait()
                run["resume_code"] = again.code
            run["lost"] = not (root / "out").exists() or digest(root / "out") != expected
            run["left"] = (root / ".out.w4a8-partial").exists()
            if outcome.code and victim != "driver":
                run["said"] = outcome.stderr[-300:]
            runs.append(run)
            print(number, run, file=sys.stderr, flush=True)
            shutil.rmtree(root / "out", ignore_errors=True)
            if victim == "node" and hit:
                add_node(made, 2)
            _save_kills(args, runs)


def _save_kills(args: argparse.Namespace, runs: list[dict[str, Any]]) -> None:
    """Save what was found so far."""
    rows = []
    for victim in ("worker", "node", "driver"):
        ours = [run for run in runs if run["victim"] == victim]
        rows.append(
            {
                "victim": victim,
                "hit": sum(run["hit"] for run in ours),
                "by_itself": sum(run["code"] == 0 for run in ours),
                "resumed": sum(run.get("resumed", False) for run in ours),
                "files_kept": sum(run["kept"] for run in ours),
                "lost": sum(run["lost"] for run in ours),
                "half_written": sum(run["half_written"] for run in ours),
                "left": sum(run["left"] for run in ours),
                "runs": len(ours),
            }
        )
    settings = {"seed": args.seed, "runs": runs}
    save(args, "What is lost when something is killed at a random time?", rows, packages=PACKAGES, settings=settings)


def _strike(victim: str, made: Any, command: Command, rng: random.Random) -> bool:
    """Kill; whether there was something to kill."""
    if command.process.poll() is not None:
        return False
    if victim == "driver":
        command.process.kill()
        return True
    if victim == "node":
        kill_node(rng.choice(list(made.worker_nodes)))
        return True
    while command.process.poll() is None:  # until a task is under way
        if found := workers(made):
            with suppress(ProcessLookupError):
                os.kill(rng.choice(found), signal.SIGKILL)
                return True
        time.sleep(0.01)
    return False


def overhead(args: argparse.Namespace, root: Path) -> None:
    """Time conversions with and without Ray, in turn. One that is not counted comes first: it compiles kernels.

    The cluster that runs is a single node, as after `ray start --head`.
    """
    before: list[dict[str, Any]] = []
    make_checkpoint(root / "small", "awq-zp", 0.05)
    convert(root / "small", root / "out", "--quiet")
    shutil.rmtree(root / "out")
    for kind in args.inputs:
        source = args.source or root / kind
        if not args.source:
            make_checkpoint(source, kind, args.gigabytes)
        runs: dict[str, list[Outcome]] = {"without": [], "local": [], "running": []}
        cores = len(os.sched_getaffinity(0))
        options = ("--max-shard-size", args.shard_size, "--workers", min(4, cores))
        with cluster(head_cpus=cores) as made:
            kinds = [("without", ()), ("local", ("--ray",)), ("running", ("--ray", made.address))]
            for round_ in range(-args.warm_up, args.rounds):
                for number in range(len(kinds)):
                    name, more = kinds[(number + round_) % len(kinds)]  # each comes first, second and last in turn
                    time.sleep(args.rest)
                    outcome = convert(source, root / "out", "--quiet", *options, *more)
                    shutil.rmtree(root / "out")
                    print(
                        kind,
                        name,
                        f"{outcome.seconds:.1f} s",
                        f"{outcome.cpu_seconds:.1f} s",
                        file=sys.stderr,
                        flush=True,
                    )
                    if round_ >= 0:
                        runs[name].append(outcome)
                if round_ >= 0:
                    _save_overhead(args, kind, cores, runs, before)
        if not args.source:
            shutil.rmtree(source)


def _save_overhead(
    args: argparse.Namespace, kind: str, cores: int, runs: dict[str, list[Outcome]], before: list[dict[str, Any]]
) -> None:
    """Save what was measured so far. before: the rows of inputs that are done, to which those of this one come."""
    before[:] = [row for row in before if row["input"] != kind]
    walls = {name: statistics.median(run.seconds for run in ours) for name, ours in runs.items()}
    for name, words in (("without", "without Ray"), ("local", "`--ray`"), ("running", "`--ray ADDRESS`, one node")):
        before.append(
            {
                "input": kind,
                "gigabytes": args.gigabytes,
                "cores": cores,
                "run": words,
                "wall_s": walls[name],
                "cpu_s": statistics.median(run.cpu_seconds for run in runs[name]) if name != "running" else None,
                "more": walls[name] / walls["without"] - 1 if name != "without" else None,
                "driver_mib": statistics.median(run.driver_mib for run in runs[name]),
                "walls": [run.seconds for run in runs[name]],
                "cpu_seconds": [run.cpu_seconds for run in runs[name]],
            }
        )
    question = "How much longer does it take on Ray, with as many cores?"
    save(args, question, before, packages=PACKAGES, settings={"load": os.getloadavg()})


def memory(args: argparse.Namespace, root: Path) -> None:
    """Measure the driver's memory by the number of tensors. On Ray, it plans only: its node has no CPUs."""
    rows = []
    with cluster(2) as made:
        for tensors in args.tensors:
            source = root / f"in-{tensors}"
            bytes_in = make_small_experts(source, tensors)
            for words, more in (("without Ray", ()), ("`--ray ADDRESS`", ("--ray", made.address))):
                outcome = convert(source, root / "out", "--quiet", "--max-shard-size", "20MB", *more)
                files = len(list((root / "out").glob("*.safetensors")))
                shutil.rmtree(root / "out")
                rows.append(
                    {"tensors": tensors, "bytes_in": bytes_in, "files": files, "run": words}
                    | {"driver_mib": outcome.driver_mib, "largest_mib": outcome.largest_mib, "wall_s": outcome.seconds}
                )
                print(rows[-1], file=sys.stderr, flush=True)
            shutil.rmtree(source)
    save(args, "What does the driver need for an index of many tensors?", rows, packages=PACKAGES)


def gpus(args: argparse.Namespace, root: Path) -> None:
    """Time conversions with new codes, and quantization without data, on one GPU and on all of them.

    Of two sizes each: what a small one takes is mostly the start, of processes and of Ray; what more bytes take is
    work. Before them a conversion compiles the kernels.
    """
    rows: list[dict[str, Any]] = []
    every = visible_gpus()
    runs: dict[str, tuple[str, tuple[object, ...], list[str]]] = {
        "one": ("1 GPU, without Ray", (), every[:1]),
        "several": (f"{len(every)} GPUs, `--ray`", ("--ray",), every),
        "ray": ("1 GPU, `--ray`", ("--ray",), every[:1]),
    }
    for command in args.commands:
        for gigabytes in (args.small, args.gigabytes):
            source = root / f"{command}-{gigabytes}"
            if command == "convert":
                make_checkpoint(source, "awq-zp", gigabytes)
            else:
                make_model(source, gigabytes)
        small = root / f"{command}-{args.small}"
        convert(small, root / "out", "--quiet", command=command, device="cuda", gpus=every[0])
        shutil.rmtree(root / "out")
        sizes = [args.small, *[args.gigabytes] * args.rounds]
        for gigabytes in sizes:
            for number, (words, more, visible) in runs.items():
                if number in (args.only or number):
                    row = {"command": command, "gigabytes": gigabytes, "run": words, "gpus": len(visible)}
                    rows.append(row | _on_gpus(root, command, gigabytes, more, visible))
                    compare(rows)
                    print(rows[-1], file=sys.stderr, flush=True)
                    save(args, "How much faster are two GPUs?", rows, packages=PACKAGES)


def _on_gpus(
    root: Path, command: str, gigabytes: float, more: tuple[object, ...], visible: list[str]
) -> dict[str, Any]:
    """Convert, and return how long that took and what the tasks of Ray did meanwhile."""
    size = ("--max-shard-size", f"{gigabytes * (50 if command == 'convert' else 15):.0f}MB")
    source, gpus = root / f"{command}-{gigabytes}", ",".join(visible)
    outcome = convert(source, root / "out", "--json", *size, *more, command=command, device="cuda", gpus=gpus)
    said = json.loads(outcome.stdout)
    found = {"wall_s": outcome.seconds, "work_s": said["seconds"], "cpu_s": outcome.cpu_seconds}
    found |= {"sha256": digest_of_weights(root / "out")}
    shutil.rmtree(root / "out")
    tasks = [task["seconds"] for task in said.get("ray", {}).get("tasks", [])]
    if not tasks:
        return found
    return found | {
        "tasks": len(tasks),
        "task_s": sum(tasks),
        "median_task_s": statistics.median(tasks),
        "longest_task_s": max(tasks),
    }


def compare(rows: list[dict[str, Any]]) -> None:
    """Say of the last row how much faster it is than the first of its command and size, and what more bytes take.

    start_s: what a command takes that converts nothing, by the times of two sizes; s_per_gb: what a GB takes.
    """
    row = rows[-1]
    alike = [other for other in rows if other["command"] == row["command"]]
    alone = next(other for other in alike if other["gigabytes"] == row["gigabytes"])
    row["same"] = "yes" if row["sha256"] == alone["sha256"] else "NO"
    row["faster"] = alone["wall_s"] / row["wall_s"] if row is not alone else None
    smaller = [other for other in alike if other["run"] == row["run"] and other["gigabytes"] < row["gigabytes"]]
    if smaller:
        (other, *_) = smaller
        row["s_per_gb"] = (row["wall_s"] - other["wall_s"]) / (row["gigabytes"] - other["gigabytes"])
        row["start_s"] = other["wall_s"] - row["s_per_gb"] * other["gigabytes"]
        if "s_per_gb" in alone and row is not alone:
            row["faster_per_gb"] = alone["s_per_gb"] / row["s_per_gb"]


def cores(args: argparse.Namespace, root: Path) -> None:
    """Time conversions with new codes on so many CPUs of one machine, as nodes of eight."""
    make_checkpoint(root / "in", args.input, args.gigabytes)
    rows: list[dict[str, Any]] = []
    convert(root / "in", root / "out", "--quiet")
    shutil.rmtree(root / "out")
    size = ("--max-shard-size", args.shard_size, "--json")

    def add(words: str, cpus: int, outcome: Outcome) -> None:
        said = json.loads(outcome.stdout)
        row = {"run": words, "cpus": cpus, "wall_s": outcome.seconds, "work_s": said["seconds"]}
        row |= {"tasks": len(said.get("ray", {}).get("tasks", [])), "sha256": digest_of_weights(root / "out")}
        row |= {"input": args.input, "gigabytes": args.gigabytes}
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
        shutil.rmtree(root / "out")

    for _ in range(args.rounds):
        add("without Ray", 4, convert(root / "in", root / "out", *size, "--workers", 4))
        for cpus in args.cpus:
            with cluster(*[min(cpus, 8)] * max(1, cpus // 8)) as made:
                add("`--ray ADDRESS`", cpus, convert(root / "in", root / "out", *size, "--ray", made.address))
        save(args, "How does the time fall with the CPUs of a cluster?", rows, packages=PACKAGES)


def digest_of_weights(directory: Path) -> str:
    """Return one sha256 of the safetensors files."""

    def of_file(path: Path) -> bytes:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()

    with ThreadPoolExecutor() as pool:
        return hashlib.sha256(b"".join(pool.map(of_file, sorted(directory.glob("*.safetensors"))))).hexdigest()


def make_model(directory: Path, gigabytes: float) -> None:
    """Write blocks with the layers of Llama-8B in BF16, of so many GB."""
    import torch
    from safetensors.torch import save_file
    from synthetic import LLAMA_8B

    directory.mkdir(parents=True)
    torch.manual_seed(0)
    blocks = max(1, round(gigabytes * 1e9 / sum(2 * n * k for _, n, k in LLAMA_8B)))
    weight_map: dict[str, str] = {}
    for block in range(blocks):
        name = f"model-{block + 1:05d}-of-{blocks:05d}.safetensors"
        found = {
            f"model.layers.{block}.{layer}.weight": torch.randn(n, k).mul_(0.02).bfloat16() for layer, n, k in LLAMA_8B
        }
        save_file(found, directory / name, {"format": "pt"})
        weight_map |= dict.fromkeys(found, name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16"}
    (directory / "config.json").write_text(json.dumps(config))


def make_small_experts(directory: Path, tensors: int) -> int:
    """Write a mixture of tiny experts with so many tensors; return the bytes of its files."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True)
    in_file, total = 4096, 0
    weight_map: dict[str, str] = {}
    layers = []
    for n in range(tensors // 4):  # a layer has four tensors, a block 384 experts
        projection = ("gate_proj", "up_proj", "down_proj")[n % 3]
        layers.append(f"model.layers.{n // 3 // 384}.mlp.experts.{n // 3 % 384}.{projection}")
    for number in range(0, len(layers), in_file):
        name = f"model-{number // in_file:05d}.safetensors"
        some = layers[number : number + in_file]
        found = {key: value for layer in some for key, value in layer_tensors("gptq", layer, 128, 128)}
        save_file(found, directory / name, {"format": "pt"})
        weight_map |= dict.fromkeys(found, name)
        total += (directory / name).stat().st_size
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "torch_dtype": "float16"}
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": quantization_config("gptq")}))
    return total


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["equality", "kills", "overhead", "memory", "gpus", "cores"])
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the input")
    parser.add_argument("--input", default="gptq", help="its format, for equality and kills")
    parser.add_argument("--inputs", nargs="+", default=["gptq", "awq-zp"], help="its formats, for overhead")
    parser.add_argument("--runs", type=int, default=30, help="kills")
    parser.add_argument("--rounds", type=int, default=2, help="of overhead")
    parser.add_argument("--source", type=Path, help="of overhead: a checkpoint that is there, of that format and size")
    parser.add_argument("--warm-up", type=int, default=1, help="rounds of overhead that are not counted")
    parser.add_argument("--rest", type=float, default=2.0, help="seconds between runs of overhead")
    parser.add_argument("--shard-size", default="5GB", help="of overhead")
    parser.add_argument("--cpus", type=int, nargs="+", default=[4, 8, 16], help="of cores")
    parser.add_argument("--only", nargs="+", choices=("one", "several", "ray"), help="of gpus: not all")
    parser.add_argument("--small", type=float, default=0.25, help="of gpus: GB of the smaller input")
    parser.add_argument("--commands", nargs="+", default=["convert", "quantize"], help="of gpus")
    parser.add_argument("--tensors", type=int, nargs="+", default=[10_000, 100_000], help="of memory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", type=Path, help="where checkpoints are made; a temporary one by default")
    add_options(parser)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="w4a8-ray-", dir=args.directory) as root:
        globals()[args.what](args, Path(root))


if __name__ == "__main__":
    main()
