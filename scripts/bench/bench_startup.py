#!/usr/bin/env python3
"""Time what a command does before it converts: `--help`, and `--dry-run` of checkpoints with up to a million tensors.

They are made of headers and holes (sparse_checkpoints.py): a GB of disk for each million tensors.

    python scripts/bench/bench_startup.py --rounds 3
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from results import add_options, line, save
from table_columns import COLUMNS
from tables import table

OURS = "from convert_w4a8.cli.convert import convert_command; convert_command()"
MAKE = str(Path(__file__).with_name("sparse_checkpoints.py"))
CHECKPOINTS = (("gptq", 100_000), ("kimi-k2", 100_000), ("kimi-k2", 1_000_000))


def timed(arguments: list[str]) -> tuple[float, float, float]:
    """Run our command and return its wall and CPU seconds, and its largest resident set in MiB."""
    command, started = [sys.executable, "-c", OURS, *arguments], time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def main() -> None:
    """Make the checkpoints, run, print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="where the checkpoints are made; else that for temporary files")
    add_options(parser)
    args = parser.parse_args()
    rows = []

    def measure(title: str, arguments: list[str]) -> None:
        runs = [timed(arguments) for _ in range(args.rounds)]
        wall, cpu, rss = (statistics.median(figures) for figures in zip(*runs, strict=True))
        rows.append({"command": title, "runs": args.rounds, "wall_s": wall, "cpu_s": cpu, "rss_mib": rss})

    measure("--help", ["--help"])
    for kind, tensors in CHECKPOINTS:
        with tempfile.TemporaryDirectory(dir=args.directory) as name:
            # Not in this process, which has to stay small: what it starts begins with its resident set.
            subprocess.run([sys.executable, MAKE, name, f"--kind={kind}", f"--tensors={tensors}"], check=True)
            options = ["--dry-run", *(["--group-size", "requantize"] if kind == "kimi-k2" else [])]
            measure(f"--dry-run, {kind}, {tensors:,} tensors", [name, f"{name}-out", *options])
    print(line(save(args, "How long does a command take before it converts?", rows)))
    print(*table(COLUMNS["startup"], rows), sep="\n")


if __name__ == "__main__":
    main()
