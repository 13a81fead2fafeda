# ruff: noqa: T201  (a program, which prints)
"""Kill conversions, cut their power, let their disk fail; then resume and compare with an undisturbed conversion.

Every run converts a small checkpoint into several files in a forked child whose calls of the operating system are
counted. After each disturbance OUT must be absent, the old one, or whole; IN untouched; nothing else written. Then
`--resume` (itself disturbed now and then) must give the bytes of an undisturbed conversion. Kinds:

    kill         SIGKILL before, after or in the middle of the n-th call that changes the disk
    late kill    SIGKILL after a random time
    power cut    the same, and then everything that was not flushed may be lost: bytes, names, the last rename
    Ctrl-C       SIGINT at the n-th call
    ENOSPC, ...  the n-th call fails, or it and all later ones of its kind
    short        every write and read does only part of what it was asked to
    race         two conversions into one OUT at the same time

    python tests/torture/fault_injection.py --kills 200 --faults 100 --races 20 --seed 0
"""

import argparse
import errno
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from faulty_disk import CALLS, Disk
from sandbox import Outcome, digest, finish, run, start, table

from convert_w4a8.checkpoint.journal import work_path
from convert_w4a8.cli import render as _render  # noqa: F401
from convert_w4a8.cli.convert import convert_command as command
from convert_w4a8.conversion import run as _convert  # noqa: F401  (imported once, for all children)

from factories import CASES  # isort: skip  (sandbox makes it importable)

FAULTS = {
    "ENOSPC": (errno.ENOSPC, ("mkdir", "open", "pwrite", "write", "sendfile", "truncate", "fsync")),
    "EIO, write": (errno.EIO, ("pwrite", "write", "fsync", "fdatasync", "rename")),
    "EIO, read": (errno.EIO, ("preadv",)),
    "EACCES": (errno.EACCES, ("mkdir", "open", "rename")),
    "short": (0, ("pwrite", "write", "preadv")),
}
KILLS = ("kill", "kill", "kill", "late kill", "power cut", "power cut", "Ctrl-C")
SCENARIOS = (
    ("awq-symmetric-fp16-sharded", ("--max-shard-size", "150kB")),
    ("gptq-v1-asymmetric", ("--max-shard-size", "100kB", "--scales", "search")),
    ("ct-w4a16-sharded-untied", ("--format", "compressed-tensors", "--max-shard-size", "120kB")),
    ("gptq-odd-k", ("--unsupported", "dequantize", "--max-shard-size", "200kB", "--scales", "direct")),
    ("gptq-side-files", ()),
)
OLD = ("--scales", "reference")
"""How the output was converted that is replaced in some of the trials."""


@dataclass
class Scenario:
    """A checkpoint, how it is converted, and what must come of it."""

    source: Path
    old: Path
    options: tuple[str, ...]
    expected: dict[str, str]
    before: dict[str, str]
    calls: dict[tuple[str, ...], int]
    seconds: float


class WrongError(Exception):
    """A promise was broken."""


def make_scenario(place: Path, name: str, options: tuple[str, ...], names: Sequence[Sequence[str]]) -> Scenario:
    """Write a checkpoint, and convert it undisturbed, counting calls."""
    source = next(case for case in CASES if case.id == name).write(place / "in").path
    calls, seconds = {}, 0.0
    arguments = [source, place / "out", *options, "--quiet", "--overwrite", "--device", "cpu"]
    for chosen in names:
        disk = Disk(place, tuple(chosen))
        outcome = run(command, arguments, place / "output", disk.install)
        if outcome.code:
            raise WrongError(outcome.stderr)
        calls[tuple(chosen)], seconds = disk.calls, outcome.seconds
    old = place / "old"
    outcome = run(command, [source, old, *options, *OLD, "--quiet", "--device", "cpu"], place / "output")
    if outcome.code or digest(old) == digest(place / "out"):
        raise WrongError(f"no other output to replace: {outcome.stderr}")
    return Scenario(source, old, options, digest(place / "out"), digest(source, times=True), calls, seconds)


@dataclass
class Trial:
    """One OUT in a directory of its own, and what happened to it."""

    scenario: Scenario
    place: Path
    overwrite: bool

    def __post_init__(self) -> None:
        self.out = self.place / "out" / "out"
        self.out.parent.mkdir(parents=True)
        if self.overwrite:
            shutil.copytree(self.scenario.old, self.out)
        self.old = digest(self.out)

    def run(self, disk: Disk | None, *extra: str) -> Outcome:
        """Convert once."""
        return run(command, self.arguments(*extra), self.place / "output", disk.install if disk else lambda: None)

    def arguments(self, *extra: str) -> list[object]:
        """Return the command line."""
        flags = ("--overwrite",) if self.overwrite else ()
        return [self.scenario.source, self.out, *self.scenario.options, "--quiet", "--device", "cpu", *flags, *extra]

    def state(self) -> str:
        """Return whether OUT is "absent", "old" or "whole"; WrongError if it is neither or anything else changed."""
        if digest(self.scenario.source, times=True) != self.scenario.before:
            raise WrongError("IN was changed")
        others = {path.name for path in self.out.parent.iterdir()} - {"out", work_path(self.out).name}
        if others:
            raise WrongError(f"written beside OUT: {others}")
        if not self.out.exists():
            return "absent"
        found = digest(self.out)
        if found == self.scenario.expected:
            return "whole"
        if self.overwrite and found == self.old:
            return "old"
        raise WrongError("OUT is half-written")

    def resume(self) -> None:
        """Continue to the end; WrongError unless it gives what an undisturbed conversion gives, and nothing else."""
        was_whole = self.state() == "whole"
        outcome = self.run(None, "--resume")
        refused = outcome.code == 1 and "is not empty" in outcome.stderr and len(outcome.lines) == 1
        if outcome.code and not (was_whole and refused):
            raise WrongError(f"--resume ended with {outcome.code}: {outcome.stderr}")
        if self.state() != "whole":
            raise WrongError("the resumed output differs")
        if work_path(self.out).exists():
            raise WrongError("the work directory is left")

    def check_message(self, outcome: Outcome) -> None:
        """Check that a run which failed said so in one line, and told of --resume if there is something."""
        if (
            outcome.code not in (0, 1, 130)
            or "Traceback" in outcome.stderr
            or len(outcome.lines) != (outcome.code != 0)
        ):
            raise WrongError(f"ended with {outcome.code} and said: {outcome.stderr}")
        if outcome.code and ("--resume" in outcome.stderr) != work_path(self.out).exists():
            raise WrongError(f"work directory left: {work_path(self.out).exists()}, but it said: {outcome.stderr}")


def kill_once(trial: Trial, kind: str, rng: random.Random, *extra: str) -> None:
    """Disturb one run by a kind of kill."""
    scenario = trial.scenario
    if kind == "late kill":
        started = time.monotonic()
        pid = start(command, trial.arguments(*extra), trial.place / "output", Disk(trial.out.parent).install)
        time.sleep(rng.uniform(0, scenario.seconds))
        os.kill(pid, signal.SIGKILL)
        finish(pid, trial.place / "output", started)
        return
    at = rng.randint(1, scenario.calls[CALLS])
    moment = rng.choice(("before", "half", "after"))

    def disturb(number: int, _name: str) -> str | None:
        if number != at:
            return None
        if kind == "Ctrl-C":
            os.kill(os.getpid(), signal.SIGINT)
            return None
        return moment

    disk = Disk(trial.out.parent, disturb=disturb, power=rng if kind == "power cut" else None)
    outcome = trial.run(disk, *extra)
    if kind == "Ctrl-C" and trial.state() != "whole" and not extra:
        trial.check_message(outcome)


def fault_once(trial: Trial, kind: str, rng: random.Random) -> None:
    """Let calls fail in one run: one of them, or all from there on, or all in part."""
    number, names = FAULTS[kind]
    at, until = rng.randint(1, trial.scenario.calls[names]), rng.choice((1, 10**9))

    def disturb(n: int, name: str) -> str | None:
        if kind == "short":
            return "short"
        if at <= n < at + until and not (until > 1 and name == "open"):
            raise OSError(number, os.strerror(number))
        return None

    outcome = trial.run(Disk(trial.out.parent, names, disturb))
    whole = trial.state() == "whole"
    if kind == "short" and not (whole and outcome.code == 0):
        raise WrongError(f"short reads or writes ended with {outcome.code}: {outcome.stderr}")
    if not whole:
        trial.check_message(outcome)
        if not outcome.code:
            raise WrongError("exit code 0 without an output")


def race(trial: Trial, rng: random.Random) -> None:
    """Start two conversions, the second a little later: one writes OUT, the other is told."""
    pids, started = [], time.monotonic()
    for number in range(2):
        pids.append(start(command, trial.arguments(), trial.place / f"output{number}"))
        time.sleep(rng.uniform(0, trial.scenario.seconds / 2))
    outcomes = [finish(pid, trial.place / f"output{number}", started) for number, pid in enumerate(pids)]
    loser = next((outcome for outcome in outcomes if outcome.code), None)
    if [outcome.code for outcome in outcomes].count(0) != 1 and not trial.overwrite:
        raise WrongError(f"exit codes {[outcome.code for outcome in outcomes]}")
    if loser and not ("another conversion" in loser.stderr or "is not empty" in loser.stderr):
        raise WrongError(f"the second conversion was told: {loser.stderr}")
    if trial.state() != "whole" or work_path(trial.out).exists():
        raise WrongError("the output of a race is not whole and alone")


@dataclass
class Row:
    """What came of one kind of disturbance."""

    runs: int = 0
    absent: int = 0
    old: int = 0
    whole: int = 0
    kept: int = 0
    alike: int = 0
    wrong: int = 0


def disturb(trial: Trial, kind: str, rng: random.Random, row: Row) -> None:
    """Disturb a conversion, resume it, and count what came of it. Raises WrongError if a promise is broken."""
    row.runs += 1
    if kind == "race":
        race(trial, rng)
        row.whole += 1
        row.alike += 1
        return
    fault_once(trial, kind, rng) if kind in FAULTS else kill_once(trial, kind, rng)
    state = trial.state()
    setattr(row, state, getattr(row, state) + 1)
    row.kept += any((work_path(trial.out) / "checkpoint").glob("*.safetensors"))
    while kind not in FAULTS and trial.state() != "whole" and rng.random() < 0.3:  # the resumed run, too
        kill_once(trial, kind, rng, "--resume")
        trial.state()
    trial.resume()
    row.alike += 1


def main() -> None:
    """Run everything and print the table; exit code 1 if a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--races", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenarios", type=int, default=len(SCENARIOS), help="use the first of them only")
    args = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    kinds = [KILLS[i % len(KILLS)] for i in range(args.kills)]
    kinds += [list(FAULTS)[i % len(FAULTS)] for i in range(args.faults)] + ["race"] * args.races
    rows: dict[str, Row] = {kind: Row() for kind in dict.fromkeys(kinds)}
    with tempfile.TemporaryDirectory(prefix="w4a8-faults-") as directory:
        root = Path(directory)
        names = [CALLS, *(chosen for _, chosen in FAULTS.values())]
        chosen = SCENARIOS[: args.scenarios]
        scenarios = [make_scenario(root / name, name, options, names) for name, options in chosen]
        for number, kind in enumerate(kinds):
            rng = random.Random(f"{args.seed} {number}")
            scenario = scenarios[rng.randrange(len(scenarios))]
            trial = Trial(scenario, root / f"trial{number}", overwrite=rng.random() < 0.25)
            try:
                disturb(trial, kind, rng, rows[kind])
            except WrongError as error:
                rows[kind].wrong += 1
                print(f"run {number} ({kind}, {scenario.source.parent.name}): {error}", file=sys.stderr)
            shutil.rmtree(trial.place)
    head = (
        "disturbance",
        "runs",
        "OUT absent",
        "old",
        "whole",
        "files to resume",
        "same bytes at last",
        "broken promises",
    )
    cells = [(kind, r.runs, r.absent, r.old, r.whole, r.kept, r.alike, r.wrong) for kind, r in rows.items()]
    print(table(cells, head))
    print(f"\n{len(kinds)} disturbed conversions, seed {args.seed}, {time.monotonic() - started:.0f} s")
    sys.exit(any(row.wrong for row in rows.values()))


if __name__ == "__main__":
    main()
