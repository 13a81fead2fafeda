#!/usr/bin/env python3
"""Time whole conversions against `cp -r` and compressed-tensors' converter, alternating, in one run.

Makes synthetic checkpoints once (Llama-8B layer shapes, or a mixture of many small experts), then runs every
contender in turn for several rounds, each as a process of its own, from a warm page cache. Prints medians: wall and
CPU seconds, peak memory of the process, MB/s of input, and the ratios to `cp -r`, which leaves its copy in the page
cache, and to `cp -r` with the copy on the disk, where a conversion's output is. A tiny conversion comes first, and is
not counted: the first of a machine compiles kernels.

    python scripts/bench/bench_convert.py --gigabytes 2 --rounds 5
    python scripts/bench/bench_convert.py --inputs awq gptq moe --peer-python .venv/bin/python --json result.json
    python scripts/bench/bench_convert.py --gigabytes 1 4 16 --inputs gptq --formats lut --scales search
    python scripts/bench/bench_convert.py --inputs gptq --against ../older-checkout

The peer is compressed-tensors, which `scripts/setup.sh test` installs; or name the Python of another environment.

With --against, this checkout and another one take turns instead, in the same environment. Printed are the ratios of
their medians, this one's to the other's, and the least and the greatest ratio of the two runs of a round. A difference
that is smaller than that spread says nothing.
"""

import argparse
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from results import ROOT, add_options, commit, line, save
from synthetic import INPUTS, make_checkpoint
from table_columns import COPY, Columns
from tables import table

COMMANDS = {
    "convert_w4a8/cli/convert.py": "from convert_w4a8.cli.convert import convert_command; convert_command()",
    "convert_w4a8/cli.py": "from convert_w4a8.cli import convert; convert()",
}
"""A file of a checkout → its command `w4a8-convert`. The second is that of older ones."""
PEER_NAME = "compressed-tensors' converter"
PEER = """
import sys
from compressed_tensors.entrypoints.convert import AutoAWQConverter, convert_checkpoint
convert_checkpoint(sys.argv[1], sys.argv[2], AutoAWQConverter(), max_workers=int(sys.argv[3]), device="cpu")
"""
PEER_VERSION = "from importlib.metadata import version; print(version('compressed-tensors'))"
COLUMNS: Columns = (("input", "{input}"), ("GB", "{gigabytes:g}"), ("contender", "{contender}"), *COPY)
AGAINST: Columns = (
    *COLUMNS[:3],
    ("wall s, this", "{wall_s:.2f}"),
    ("other", "{other_wall_s:.2f}"),
    ("this / other", "{wall_ratio:.3f}"),
    ("of a round", "{wall_ratio_least:.3f} to {wall_ratio_greatest:.3f}"),
    ("CPU s, this", "{cpu_s:.2f}"),
    ("other", "{other_cpu_s:.2f}"),
    ("this / other", "{cpu_ratio:.3f}"),
    ("of a round", "{cpu_ratio_least:.3f} to {cpu_ratio_greatest:.3f}"),
    ("peak MiB, this", "{rss_mib:.0f}"),
    ("other", "{other_rss_mib:.0f}"),
)


@dataclass(frozen=True)
class Run:
    """What one process cost: seconds, and its peak resident memory in MiB."""

    wall: float
    cpu: float
    rss: float


@dataclass(frozen=True)
class Command:
    """A process that writes `out`, and the checkout that it imports; None for what imports none."""

    words: list[str]
    checkout: Path | None = None


def timed(command: Command, out: Path, rest: float) -> Run:
    """Run a command that writes `out`, then remove `out`.

    A virtual machine may hand the memory of what is removed back to its host after a second or two, and take long to
    get it again. After a rest, every contender finds the same.
    """
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    time.sleep(rest)
    started = time.perf_counter()
    process = subprocess.Popen(
        command.words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment(command.checkout)
    )
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    if status:
        message = process.stderr.read().decode() if process.stderr else ""
        sys.exit(f"{' '.join(command.words)} failed:\n{message}")
    shutil.rmtree(out, ignore_errors=True)
    return Run(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def environment(checkout: Path | None) -> dict[str, str]:
    """Return this process's environment, in which a checkout's package comes before an installed one."""
    paths = [*([str(checkout)] if checkout else []), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def find_command(checkout: Path) -> str:
    """Return the Python code of a checkout's `w4a8-convert`, having made sure that it is what Python would import."""
    code = next((code for file, code in COMMANDS.items() if (checkout / file).is_file()), None)
    if code is None:
        sys.exit(f"{checkout} is no checkout of w4a8-convert: it has none of {', '.join(COMMANDS)}")
    ask = [sys.executable, "-P", "-c", "import convert_w4a8; print(convert_w4a8.__file__)"]
    found = subprocess.run(ask, env=environment(checkout), capture_output=True, text=True, check=True).stdout.strip()
    if Path(found).parents[1] != checkout:
        sys.exit(f"Python imports {found}, not what lies in {checkout}")
    return code


def conversions(checkout: Path, source: Path, out: Path, args: argparse.Namespace) -> dict[str, Command]:
    """Return a checkout's conversions of one input. `-P`: the working directory's package does not come first."""
    arguments = [str(source), str(out), "--quiet", "--device", args.device]
    words = [sys.executable, "-P", "-c", find_command(checkout), *arguments]
    return {
        f"{form}, {mode}": Command([*words, "--format", form, "--scales", mode], checkout)
        for mode in args.scales
        for form in args.formats
        if (form, mode) != ("compressed-tensors", "direct")
    }


def contenders(kind: str, source: Path, out: Path, args: argparse.Namespace) -> dict[str, Command]:
    """Return the commands to compare for one input, `cp -r` first."""
    commands = {
        "cp -r": Command(["cp", "-r", str(source), str(out)]),
        "cp -r, on the disk": Command(["sh", "-c", f'cp -r "{source}" "{out}" && sync "{out}"/*']),
        **conversions(ROOT, source, out, args),
    }
    if kind.startswith("awq") and args.peer_python:
        for workers in (1, 2):
            commands[f"{PEER_NAME}, {workers} worker" + "s" * (workers > 1)] = Command(
                [args.peer_python, "-c", PEER, str(source), str(out), str(workers)]
            )
    return commands


def prepare(kind: str, gigabytes: float, args: argparse.Namespace) -> tuple[Path, float]:
    """Make the checkpoint unless it is there, bring it into the page cache; return it and its size in MB."""
    source: Path = args.directory / f"{kind}-{gigabytes:g}"
    if not (source / "config.json").is_file():
        # In a process of its own: the peak memory of a forked child begins with its parent's.
        maker = multiprocessing.get_context("spawn").Process(target=make_checkpoint, args=(source, kind, gigabytes))
        maker.start()
        maker.join()
    for path in source.iterdir():
        subprocess.run(["cat", path], stdout=subprocess.DEVNULL, check=True)
    return source, sum(path.stat().st_size for path in source.iterdir()) / 1e6


def warm_up(kind: str, checkouts: list[Path], args: argparse.Namespace) -> None:
    """Convert the smallest checkpoint once in all ways, so that every kernel is compiled and every module cached."""
    (source, _), out = prepare(kind, 0, args), args.directory / "out"
    for checkout in checkouts:
        for name, command in conversions(checkout, source, out, args).items():
            print(f"not counted: {kind} {name}: {timed(command, out, 0).wall:.2f} s", file=sys.stderr)


def median(runs: list[Run]) -> Run:
    """Return the medians of seconds, and the largest peak."""
    wall, cpu = (statistics.median(values) for values in ((run.wall for run in runs), (run.cpu for run in runs)))
    return Run(wall, cpu, max(run.rss for run in runs))


def bench(kind: str, gigabytes: float, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time all contenders on one input and return a row for each."""
    source, megabytes = prepare(kind, gigabytes, args)
    out = args.directory / "out"
    commands = contenders(kind, source, out, args)
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for round_number in range(args.rounds):
        for name, command in commands.items():
            if name.startswith(PEER_NAME) and round_number >= args.peer_rounds:
                continue
            runs[name].append(timed(command, out, args.rest))
            print(f"{kind} {name}: {runs[name][-1].wall:.2f} s", file=sys.stderr)
    typical = {name: median(found) for name, found in runs.items()}
    copy, durable = (typical[name].wall for name in list(runs)[:2])
    peer = typical.get(f"{PEER_NAME}, 1 worker")
    return [
        {
            "input": kind,
            "gigabytes": gigabytes,
            "contender": name,
            "runs": len(runs[name]),
            "wall_s": run.wall,
            "cpu_s": run.cpu,
            "rss_mib": run.rss,
            "mb_per_s": megabytes / run.wall,
            "wall_to_cp": run.wall / copy,
            "wall_to_durable_cp": run.wall / durable,
            **({"times_peer": peer.wall / run.wall} if peer else {}),
        }
        for name, run in typical.items()
    ]


def compare(kind: str, gigabytes: float, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time both checkouts, this one and the other in turn, on one input; return a row for each conversion."""
    source, _ = prepare(kind, gigabytes, args)
    out = args.directory / "out"
    this, other = (conversions(checkout, source, out, args) for checkout in (ROOT, args.against))
    rows = []
    for name in this:
        pairs = []
        for _ in range(args.rounds):
            pairs.append((timed(this[name], out, args.rest), timed(other[name], out, args.rest)))
            ours, theirs = pairs[-1]
            print(f"{kind} {name}: {ours.wall:.2f} s, other {theirs.wall:.2f} s", file=sys.stderr)
        ours, theirs = (median([pair[i] for pair in pairs]) for i in (0, 1))
        row = {"input": kind, "gigabytes": gigabytes, "contender": name, "rounds": args.rounds}
        for prefix, run in (("", ours), ("other_", theirs)):
            row |= {f"{prefix}wall_s": run.wall, f"{prefix}cpu_s": run.cpu, f"{prefix}rss_mib": run.rss}
        figures: dict[str, Callable[[Run], float]] = {"wall": lambda run: run.wall, "cpu": lambda run: run.cpu}
        for what, figure in figures.items():
            ratios = [figure(a) / figure(b) for a, b in pairs]
            row |= {
                f"{what}_ratio": figure(ours) / figure(theirs),
                f"{what}_ratio_least": min(ratios),
                f"{what}_ratio_greatest": max(ratios),
            }
        rows.append(row)
    return rows


def main() -> None:
    """Parse the arguments, run, print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("bench-data"), help="where checkpoints are kept")
    parser.add_argument("--gigabytes", nargs="+", type=float, default=[2.0])
    parser.add_argument("--inputs", nargs="+", choices=INPUTS, default=["awq", "gptq", "compressed-tensors"])
    parser.add_argument("--scales", nargs="+", default=["reference", "search", "direct"])
    parser.add_argument("--formats", nargs="+", default=["lut", "compressed-tensors"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rest", type=float, default=4.0, help="seconds before each run")
    parser.add_argument("--peer-rounds", type=int, default=1, help="the peer takes minutes; fewer rounds suffice")
    parser.add_argument("--peer-python", help="Python of an environment with compressed-tensors")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="time another checkout in turn with this one")
    add_options(parser)
    args = parser.parse_args()
    versions = {}
    if args.peer_python:
        ask = [args.peer_python, "-c", PEER_VERSION]
        versions[PEER_NAME] = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    args.against = args.against and args.against.resolve()
    question, settings = "How long does a conversion take, beside a copy?", {}
    if args.against:
        question = "How long does a conversion take, beside that of another checkout?"
        settings = {"other": str(args.against), "other_commit": commit(args.against)}
    checkouts = [ROOT, *([args.against] if args.against else [])]
    for checkout in checkouts:
        find_command(checkout)
    for kind in args.inputs:
        warm_up(kind, checkouts, args)
    measure = compare if args.against else bench
    rows = [row for kind in args.inputs for gigabytes in args.gigabytes for row in measure(kind, gigabytes, args)]
    document = save(args, question, rows, versions=versions, settings=settings)
    print(line(document))
    if args.against:
        print(f"Other: {settings['other']}, commit {settings['other_commit']}")
    print(*table(AGAINST if args.against else COLUMNS, rows), sep="\n")


if __name__ == "__main__":
    main()
