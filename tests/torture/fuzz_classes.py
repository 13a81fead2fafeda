# ruff: noqa: T201  (a program, which prints)
"""Attack every command by class: numbers, text, paths, streams, environment. Nobody says here what must be refused.

Whatever is given, a run must end with exit code 0, 1 or 2 and without a traceback; a refusal is one line, or a list of
problems; nothing that is printed speaks to the terminal, and what --json prints is a JSON document; it takes less than
10 s and less than 1 GiB beyond what an import takes; it writes nothing outside OUT, leaves nothing there unless it
succeeds, and opens nothing outside IN (`judge.py`). What converts must pass `w4a8 verify`.

Runs are forked from one process that has imported everything, and watched by an audit hook; those of the environment,
and some of the streams, are interpreters of their own. File modes hold, also where the user is root.

    python tests/torture/fuzz_classes.py --cases 2000 --seed 0
"""

import argparse
import io
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from class_environment import environment
from class_numbers import numbers
from class_paths import paths
from class_streams import streams
from class_text import text
from judge import Case, faults, furnish, picture, run_case, seconds_of
from sandbox import run, table

from convert_w4a8.cli import render as _render  # noqa: F401
from convert_w4a8.cli.main import main as command
from convert_w4a8.conversion import run as _convert  # noqa: F401  (imported once, for all children)
from convert_w4a8.regression import check as _check  # noqa: F401
from convert_w4a8.regression import text as _text  # noqa: F401
from convert_w4a8.report import html as _html  # noqa: F401
from convert_w4a8.report import inspection as _inspection  # noqa: F401
from convert_w4a8.report.drawing import require_matplotlib

from factories import CASES  # isort: skip  (sandbox makes it importable)

CLASSES: dict[str, Callable[[Path, Path, random.Random, list[str]], Case]] = {
    "numbers": numbers,
    "text": text,
    "paths": paths,
    "streams": streams,
    "environment": environment,
}
SHARES = {"numbers": 14, "text": 14, "paths": 10, "streams": 6, "environment": 2}
"""How many of 46 cases each class has: an interpreter of its own takes some thirty times as long as a fork."""
BASES = (
    "awq-zero-points",
    "gptq-v1",
    "gptq-dynamic",
    "gptq-quantize-config-only",
    "ct-two-groups",
    "ct-asymmetric",
    "awq-symmetric-fp16-sharded",
    "gptq-desc-act",
)


@dataclass
class Row:
    """What came of one class."""

    cases: int = 0
    refused: int = 0
    succeeded: int = 0
    tracebacks: int = 0
    unbounded: int = 0
    writes: int = 0
    reads: int = 0
    other: int = 0
    seconds: float = 0
    mib: float = 0

    def add(self, found: list[str]) -> None:
        """Count broken promises by kind, a case once in each."""
        self.tracebacks += any(line.startswith("traceback") for line in found)
        self.unbounded += any(line.startswith("took") for line in found)
        self.writes += any(line.startswith(("written", "writes", "left")) for line in found)
        self.reads += any(line.startswith("reads") for line in found)
        kinds = ("traceback", "took", "written", "writes", "left", "reads")
        self.other += any(not line.startswith(kinds) for line in found)


def prepare_bases(cache: Path) -> float:
    """Write the checkpoints, conversions and baselines that cases begin with; return MiB of a run that does nothing."""
    for name in BASES:
        case = next(case for case in CASES if case.id == name)
        case.write(cache / name / "in")
        out, needs = cache / name / "out", list(case.needs)
        done = run(command, ["convert", cache / name / "in", out, *needs, "--quiet"], cache / "output")
        baseline = ["--write-baseline", cache / name / "baseline.json"]
        checked = run(command, ["check", cache / name / "in", "--sample", *needs, *baseline], cache / "output")
        if done.code or checked.code:
            sys.exit(f"{name} does not convert: {done.stderr}{checked.stderr}{checked.stdout}")
        # In this process: what is compiled and loaded once is there for all that are forked from it.
        again = ["convert", cache / name / "in", cache / name / "warm", *needs, "--quiet", "--workers", "1"]
        warm = [
            "report",
            cache / name / "out",
            "--source",
            cache / name / "in",
            "--html",
            cache / "warm.html",
            "--json",
        ]
        for arguments in (again, warm):
            with redirect_stdout(io.StringIO()):
                command.main(list(map(str, arguments)), standalone_mode=False)
    return run(command, ["--version"], cache / "output").mib


def one_case(
    number: int, seed: int, kinds: list[str], directory: Path, base_mib: float
) -> tuple[str, str, list[str], float, float, int]:
    """Make and run a case; return class, label, broken promises, seconds, MiB, exit code."""
    rng = random.Random(f"{seed} {number}")
    kind = kinds[number % len(kinds)]
    base = directory / "cache" / rng.choice(BASES)
    needs = list(next(case for case in CASES if case.id == base.name).needs)
    place = directory / f"case{number}" / "place"
    place.mkdir(parents=True)
    shutil.copytree(base / "in", place / "in")
    furnish(place)
    try:
        case = CLASSES[kind](place, base, rng, needs)
        before = picture(place)
        outcome, opened = run_case(case, place)
        found = faults(case, outcome, opened, place, before, base_mib)
        if (
            outcome.code == 0
            and case.arguments[0] == "convert"
            and not found
            and (place / "out").is_dir()
            and (place / "in").is_dir()
            and kind in ("numbers", "text")
        ):
            proof = run(command, ["verify", place / "out", "--source", place / "in"], place.parent / "output")
            if proof.code:
                found.append(f"converted, but does not verify: {proof.stdout[-400:]}{proof.stderr[-400:]}")
        return (
            kind,
            f"{base.name}: {case.label}: w4a8 {' '.join(case.arguments)[:300]}",
            found,
            seconds_of(outcome),
            outcome.mib,
            outcome.code,
        )
    finally:
        for path in (place, place.parent):
            _unlock(path)
        shutil.rmtree(place.parent, ignore_errors=True)


def _unlock(root: Path) -> None:
    for name in ("locked", "read-only"):
        if (root / name).is_dir():
            (root / name).chmod(0o700)


def work(worker: int, args: argparse.Namespace, kinds: list[str], directory: Path, base_mib: float) -> None:
    """Run every so many-th case, and write down what came of it."""
    with (directory / f"results{worker}").open("w", encoding="utf-8") as results:
        for number in range(worker, args.cases, args.processes):
            found = one_case(number, args.seed, kinds, directory, base_mib)
            results.write(json.dumps([number, *found]) + "\n")
            results.flush()
            if found[2]:
                lines = "\n    ".join(found[2])
                print(
                    f"case {number} ({found[0]}): {found[1]!r}\n    {lines}\n".encode(
                        "ascii", "backslashreplace"
                    ).decode(),
                    file=sys.stderr,
                )


def main() -> None:
    """Run all cases and print the table; exit code 1 if a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(CLASSES))
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    require_matplotlib()
    import matplotlib.pyplot as plt  # noqa: F401

    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.pop("GITHUB_STEP_SUMMARY", None)
    os.umask(0o022)
    # Shuffled once, so that a short run has all classes and each seed the same shares.
    kinds = [name for name, share in SHARES.items() for _ in range(share)]
    random.Random(0).shuffle(kinds)
    kinds = [args.only] if args.only else kinds
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="w4a8-classes-", ignore_cleanup_errors=True) as name:
        directory = Path(name)
        base_mib = prepare_bases(directory / "cache")
        children = []
        for worker in range(args.processes):
            pid = os.fork()
            if not pid:
                code = 1
                try:
                    work(worker, args, kinds, directory, base_mib)
                    code = 0
                except BaseException:  # noqa: BLE001
                    import traceback

                    traceback.print_exc()
                finally:
                    os._exit(code)
            children.append(pid)
        failed = [pid for pid in children if os.waitpid(pid, 0)[1]]
        rows = {kind: Row() for kind in dict.fromkeys(CLASSES) if kind in kinds}
        for worker in range(args.processes):
            for line in (directory / f"results{worker}").read_text().splitlines():
                _, kind, _, found, seconds, mib, code = json.loads(line)
                row = rows[kind]
                row.cases += 1
                row.refused += code != 0
                row.succeeded += code == 0
                row.seconds, row.mib = max(row.seconds, seconds), max(row.mib, mib)
                row.add(found)
    rows["together"] = Row(
        **{
            key: (max if key in ("seconds", "mib") else sum)(asdict(row)[key] for row in rows.values())
            for key in asdict(Row())
        }
    )
    head = (
        "class",
        "cases",
        "refused",
        "succeeded",
        "tracebacks",
        "beyond bounds",
        "writes outside",
        "reads outside",
        "other",
        "most s",
        "most MiB",
    )
    print(
        table(
            [
                (name, *list(asdict(row).values())[:-2], f"{row.seconds:.1f}", f"{row.mib:.0f}")
                for name, row in rows.items()
            ],
            head,
        )
    )
    print(f"\n{rows['together'].cases} cases, seed {args.seed}, {time.monotonic() - started:.0f} s")
    wrong = rows["together"]
    sys.exit(bool(failed or wrong.tracebacks + wrong.unbounded + wrong.writes + wrong.reads + wrong.other))


if __name__ == "__main__":
    main()
