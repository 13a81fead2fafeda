#!/usr/bin/env python3
"""What a conversion on a Ray cluster takes, from measured constants: runs that were measured, and clusters on paper.

    python scripts/bench/predict_ray.py measured --keep ray-predicted
    python scripts/bench/predict_ray.py paper --keep ray-paper

The model: a beginning, which one process does (importing, planning by the number of tensors, connecting), then waves of
tasks. A task is a file of OUT; it takes its share of the seconds of processors that a GB takes, divided by its threads,
or as long as the file system needs for its bytes in and out, where that is longer. Waves end when the last task does.

measured: seconds of processors a GB are those of the run without Ray of the same benchmark, so that other work on the
machine counts in both; predicted is what the others then take. paper: constants of the kept results; file systems and
machines are assumptions, which are options.
"""

import argparse
import json
import math
from dataclasses import dataclass
from typing import Any

from results import RESULTS, add_options, save

PACKAGES = ("torch", "ray")
BYTES_PER_WEIGHT = 4 / 8 + 2 / 128
"""INT4, and a 16-bit scale for each group of 128."""
SECONDS_PER_FILE = 0.02
"""What the driver takes to note a file: a rename and three flushes."""


@dataclass(frozen=True)
class Machines:
    """A cluster. bandwidth: GB/s of the shared file system for one node, total: for all, in and out together."""

    nodes: int
    cores: int
    threads: int
    bandwidth: float = math.inf
    total: float = math.inf


def predict(gigabytes: float, files: int, core_seconds: float, begin: float, machines: Machines) -> tuple[float, str]:
    """Return seconds, and what limits them. core_seconds: of a GB."""
    slots = machines.nodes * (machines.cores // machines.threads)
    waves = math.ceil(files / slots)
    by_cores = waves * gigabytes / files * core_seconds / machines.threads
    busy = min(machines.nodes, files)
    by_disk = 2 * gigabytes / min(machines.total, busy * machines.bandwidth)
    noting = files * SECONDS_PER_FILE
    work = max(by_cores, by_disk, noting)
    limit = "cores" if work == by_cores else "file system" if work == by_disk else "noting files"
    if begin > work:
        limit = "the beginning"
    elif limit == "cores" and slots > files:
        limit = "one task"
    return begin + work, limit


def read(name: str) -> list[dict[str, Any]]:
    """Return the rows of a kept result."""
    rows: list[dict[str, Any]] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["rows"]
    return rows


def measured(args: argparse.Namespace) -> None:
    """Compare with runs that were measured."""
    rows: list[dict[str, Any]] = []
    overhead = read("ray-overhead") if (RESULTS / "ray-overhead.json").is_file() else []
    for kind, cores in dict.fromkeys((row["input"], row["cores"]) for row in overhead):
        ours = {row["run"]: row for row in overhead if (row["input"], row["cores"]) == (kind, cores)}
        alone = ours["without Ray"]
        rate = (alone["wall_s"] - args.begin) * cores / alone["gigabytes"]
        for name, begin in (
            ("`--ray`", args.begin),  # by the process of the command, which starts no Ray for so few cores
            ("`--ray ADDRESS`, one node", args.begin + args.join),
        ):
            seconds, _ = predict(alone["gigabytes"], 1, rate, begin, Machines(1, cores, cores))
            words = f"{alone['gigabytes']:g} GB of {kind} on {cores} cores, {name}"
            rows.append(_row(words, seconds, ours[name]["wall_s"]))
    equality = {row["run"]: row for row in read("ray-equality")}
    alone = equality["here, without Ray"]
    rate = (alone["wall_s"] - args.begin) * args.cores / args.gigabytes
    for name, machines in (("1 worker", Machines(1, 1, 1)), ("4 workers on 2 nodes", Machines(1, args.cores, 1))):
        begin = args.begin + args.connect
        seconds, _ = predict(args.gigabytes, alone["files"], rate, begin, machines)
        rows.append(_row(f"{args.gigabytes:g} GB of gptq, {name}", seconds, equality[name]["wall_s"]))
    save(args, "Does the model of cost predict what was measured?", rows, packages=PACKAGES)


def _row(run: str, predicted: float, wall: float) -> dict[str, Any]:
    return {"run": run, "predicted_s": predicted, "wall_s": wall, "ratio": predicted / wall}


def paper(args: argparse.Namespace) -> None:
    """Predict clusters that nobody measured."""
    (kept,) = (row for row in read("conversion") if (row["input"], row["contender"]) == ("gptq", "lut, search"))
    (new,) = (
        row for row in read("conversion-new-codes") if (row["input"], row["contender"]) == ("awq-zp", "lut, search")
    )
    plans = {row["command"]: row["wall_s"] for row in read("startup")}
    per_tensor = plans["--dry-run, kimi-k2, 1,000,000 tensors"] / 1e6
    rates = {"kept": kept["cpu_s"] / kept["gigabytes"], "new": new["cpu_s"] / new.get("gigabytes", 1)}
    rows = []
    for model, weights, tensors in (("111B, dense", 111e9, 2_000), ("1T, mixture", 1e12, 210_000)):
        gigabytes = weights * BYTES_PER_WEIGHT / 1e9
        files = math.ceil(gigabytes / args.shard)
        for codes, rate in rates.items():
            for nodes in (1, 8, 64):
                machines = Machines(nodes, args.node_cores, args.threads, args.bandwidth, args.total)
                begin = args.begin + args.connect + per_tensor * tensors
                seconds, limit = predict(gigabytes, files, rate, begin, machines)
                rows.append(
                    {
                        "model": model,
                        "codes": codes,
                        "gigabytes": gigabytes,
                        "files": files,
                        "nodes": nodes,
                        "minutes": seconds / 60,
                        "node_hours": nodes * seconds / 3600,
                        "limit": limit,
                    }
                )
    settings = {"core_seconds_per_gb": rates, "seconds_per_tensor": per_tensor} | {
        key: getattr(args, key) for key in ("node_cores", "threads", "bandwidth", "total", "shard", "begin", "connect")
    }
    save(args, "On paper: how long do large models take?", rows, packages=PACKAGES, settings=settings)


def main() -> None:
    """Predict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["measured", "paper"])
    parser.add_argument("--begin", type=float, default=2.0, help="seconds before a conversion without Ray converts")
    parser.add_argument("--connect", type=float, default=3.0, help="further ones with Ray, until a worker converts")
    parser.add_argument("--join", type=float, default=1.0, help="the same, until the process of the command converts")
    parser.add_argument("--cores", type=int, default=2, help="of the machine of ray-equality")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of ray-equality")
    parser.add_argument("--node-cores", type=int, default=16, help="of a node on paper")
    parser.add_argument("--threads", type=int, default=4, help="of a task")
    parser.add_argument("--bandwidth", type=float, default=1.0, help="GB/s of the file system for one node")
    parser.add_argument("--total", type=float, default=10.0, help="GB/s of the file system for all nodes")
    parser.add_argument("--shard", type=float, default=2.0, help="GB of a file of OUT")
    add_options(parser)
    args = parser.parse_args()
    globals()[args.what](args)


if __name__ == "__main__":
    main()
