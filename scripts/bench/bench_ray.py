#!/usr/bin/env python3
"""Conversions on Ray clusters of several nodes on this machine, as real processes: bytes, kills, time, memory.

    python scripts/bench/bench_ray.py equality --gigabytes 2 --keep ray-equality
    python scripts/bench/bench_ray.py kills --gigabytes 0.2 --runs 30 --keep ray-kills
    python scripts/bench/bench_ray.py overhead --gigabytes 4 --rounds 2 --keep ray-overhead
    python scripts/bench/bench_ray.py memory --keep ray-memory

equality: digests of a conversion here, on 1 worker, on 4 workers of 2 nodes, with a node killed half-way, and with the
driver killed half-way and resumed. kills: a worker, a node or the driver is killed at a random time; what is not
finished is resumed. overhead: the same conversion with and without `--ray`, in turn, on all cores. memory: the largest
resident size of the driver, by the number of tensors. Seconds of processors are those of all processes of a run.
`bench_ray_speed.py` says how time falls with GPUs and cores.
"""

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from ray_runs import (
    PACKAGES,
    Command,
    Outcome,
    add_node,
    cluster,
    convert,
    digest,
    finished,
    kill_node,
    run_chosen,
    wait_for,
    workers,
)
from results import save
from synthetic import layer_tensors, make_checkpoint, quantization_config


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


def make_small_experts(directory: Path, tensors: int) -> int:
    """Write a mixture of tiny experts with so many tensors; return the bytes of its files."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True)
    in_file, total = 4096, 0
    weight_map: dict[str, str] = {}
    layers = []
    for n in range(tensors // 12 * 3):  # a layer has four tensors, an expert three layers, a block 384 experts
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
    parser.add_argument("what", choices=["equality", "kills", "overhead", "memory"])
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the input")
    parser.add_argument("--input", default="gptq", help="its format, for equality and kills")
    parser.add_argument("--inputs", nargs="+", default=["gptq", "awq-zp"], help="its formats, for overhead")
    parser.add_argument("--runs", type=int, default=30, help="kills")
    parser.add_argument("--rounds", type=int, default=2, help="of overhead")
    parser.add_argument("--source", type=Path, help="of overhead: a checkpoint that is there, of that format and size")
    parser.add_argument("--warm-up", type=int, default=1, help="rounds of overhead that are not counted")
    parser.add_argument("--rest", type=float, default=2.0, help="seconds between runs of overhead")
    parser.add_argument("--shard-size", default="5GB", help="of overhead")
    parser.add_argument("--tensors", type=int, nargs="+", default=[10_000, 100_000], help="of memory")
    parser.add_argument("--seed", type=int, default=0)
    run_chosen(parser, globals())


if __name__ == "__main__":
    main()
