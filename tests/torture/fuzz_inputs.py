# ruff: noqa: T201  (a program, which prints)
"""Damage checkpoints in every way that fuzz_mutations.py and fuzz_directories.py know, and watch the converter.

A damaged or hostile input must end in exit code 1 and one line (or a list of problems) that names the file or tensor,
without a traceback; nothing may be left of OUT, nothing written elsewhere, IN not touched; time and memory are bounded.
Where damage cannot be noticed, the output must at least pass `w4a8 verify`. Also wrong paths, and damaged outputs given
to `inspect` and `verify`.

    python tests/torture/fuzz_inputs.py --cases 1000 --seed 0
"""

import argparse
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import fuzz_directories as directories
import fuzz_mutations as weights
import torch
from sandbox import Outcome, digest, run, table

from convert_w4a8.cli import render as _render  # noqa: F401
from convert_w4a8.cli.main import main as command
from convert_w4a8.conversion import run as _convert  # noqa: F401  (imported once, for all children)
from convert_w4a8.report import inspection as _inspection  # noqa: F401

from factories import CASES  # isort: skip  (sandbox makes it importable)

MAX_SECONDS, MAX_MIB = 30, 512
BASES = (
    "awq-symmetric-fp16-sharded",
    "awq-zero-points",
    "gptq-v1",
    "gptq-desc-act",
    "gptq-dynamic",
    "gptq-quantize-config-only",
    "gptq-qwen3-moe-sharded",
    "gptq-signed",
    "auto-round",
    "auto-round-awq-asymmetric",
    "auto-round-extra-config",
    "ct-w4a16-sharded-untied",
    "ct-asymmetric",
    "ct-g-idx",
    "ct-int8-storage",
    "ct-two-groups",
)
OPTIONS = (
    (),
    ("--scales", "search"),
    ("--scales", "direct"),
    ("--format", "compressed-tensors"),
    ("--max-shard-size", "100kB"),
)


@dataclass
class Row:
    """What came of one kind of damage."""

    cases: int = 0
    refused: int = 0
    accepted: int = 0
    wrong: int = 0
    seconds: float = 0
    mib: float = 0


class WrongError(Exception):
    """A promise was broken."""


def check_refusal(outcome: Outcome, names: tuple[str, ...]) -> None:
    """Check that a run ended with exit code 1 and with lines that name what is wrong."""
    if outcome.code != 1 or "Traceback" in outcome.stderr:
        raise WrongError(f"ended with {outcome.code}: {outcome.stderr[-1500:]}")
    listed = re.match(r"Error: \d+ problems?; nothing was written", outcome.stderr)
    if not outcome.stderr.startswith("Error: ") or (len(outcome.lines) > 1 and not listed):
        raise WrongError(f"not one line: {outcome.stderr[-1500:]}")
    if not any(name in outcome.stderr for name in names):
        raise WrongError(f"none of {names} is named: {outcome.stderr[-1500:]}")
    if any(len(line) > 2000 for line in outcome.lines):
        raise WrongError(f"a line of {max(map(len, outcome.lines))} characters")


def check_bounds(outcome: Outcome, row: Row) -> None:
    """Check time and memory of a run."""
    row.seconds, row.mib = max(row.seconds, outcome.seconds), max(row.mib, outcome.mib)
    if outcome.seconds > MAX_SECONDS or outcome.mib > MAX_MIB:
        raise WrongError(f"took {outcome.seconds:.1f} s and {outcome.mib:.0f} MiB")


def damaged_input(root: Path, rng: random.Random, row: Row, mutation: weights.Mutation, cache: Path) -> None:
    """Convert (or inspect) one damaged checkpoint."""
    chosen = rng.choice(BASES)
    case = next(case for case in CASES if case.id == chosen)
    shutil.copytree(prepared(case.id, cache), root / "in")
    expect = mutation(root / "in", rng)
    before = digest(root, times=True)
    options = rng.choice(OPTIONS)
    arguments = ["convert", root / "in", root / "out", *case.needs, "--quiet", "--device", "cpu", *options]
    outcome = run(command, arguments, root.parent / "output")
    after = digest(root, times=True)
    if outcome.code == 0 and not expect.refused:
        verified = run(command, ["verify", root / "out", "--source", root / "in"], root.parent / "output")
        if verified.code:
            raise WrongError(f"converted, but does not verify: {verified.stdout[-500:]}{verified.stderr[-500:]}")
        after = {name: found for name, found in after.items() if name.split("/")[0] != "out"}
    check_bounds(outcome, row)
    if after != before:
        raise WrongError(f"written or changed: {sorted(set(after.items()) ^ set(before.items()))[:4]}")
    if outcome.code or expect.refused:
        check_refusal(outcome, expect.names)
        row.refused += 1
    else:
        row.accepted += 1
    if rng.random() < 0.2:
        inspected = run(command, ["inspect", root / "in"], root.parent / "output")
        check_bounds(inspected, row)
        if inspected.code:
            check_refusal(inspected, (*expect.names, "model.", "config"))


def damaged_output(root: Path, rng: random.Random, row: Row, cache: Path) -> None:
    """Verify and inspect a conversion that was damaged afterwards."""
    name = rng.choice(BASES[:3])
    source = prepared(name, cache)
    form = rng.choice(("lut", "compressed-tensors"))
    converted = cache / f"{name}-{form}"
    if not converted.exists():
        run(command, ["convert", source, converted, "--format", form, "--quiet"], root.parent / "output")
    shutil.copytree(converted, root / "out")
    mutation = rng.choice((*weights.MUTATIONS[:7], *directories.MUTATIONS[1:4]))
    expect = mutation(root / "out", rng)
    before = digest(root, times=True)
    for arguments in (["verify", root / "out", "--source", source], ["inspect", root / "out"]):
        outcome = run(command, arguments, root.parent / "output")
        check_bounds(outcome, row)
        if outcome.code == 1 and outcome.stderr:
            check_refusal(outcome, (*expect.names, "model.", "config", "quant"))
        elif outcome.code not in (0, 1):
            raise WrongError(f"{arguments[0]} ended with {outcome.code}: {outcome.stderr[-1500:]}")
        if outcome.code == 0 and arguments[0] == "verify" and expect.refused:
            raise WrongError(f"{mutation.__name__} passes verification")
    row.refused += outcome.code
    row.accepted += not outcome.code
    if digest(root, times=True) != before:
        raise WrongError("verify or inspect changed something")


def wrong_paths(root: Path, rng: random.Random, row: Row, cache: Path) -> None:
    """Give paths that overlap, are taken, or cannot be written."""
    source, out = root / "in", root / "out"
    shutil.copytree(prepared("gptq-v1", cache), source)
    (root / "file").write_bytes(b"x")
    (root / "full").mkdir()
    (root / "full" / "x").write_bytes(b"x")
    (root / "link").symlink_to("in")
    (root / "up").symlink_to(".")
    (root / "dangling").symlink_to("nowhere")
    (root / "empty").mkdir()
    outs = (
        *(source, source / "out", source / "a" / "b", root, Path("/"), root / "in/../in/x"),
        *(root / name for name in ("link", "link/out", "up/in/out", "file", "file/out", "full", "dangling")),
        *(root / ("x" * 250), root / ("x" * 300), Path("/proc/no/out"), Path("/sys/out"), Path("/dev/null/x")),
    )
    wrong = [(source, taken) for taken in outs]
    wrong += [(root / name, out) for name in ("absent", "file", "empty", "dangling", "in/config.json")]
    wrong += [(root / "link", source / "out"), (root, source), (Path("/dev/null"), out)]
    given, taken = rng.choice(wrong)
    before = digest(root, times=True)
    flags = ("--overwrite",) if rng.random() < 0.3 and taken != root / "full" else ()
    outcome = run(command, ["convert", given, taken, "--quiet", *flags], root.parent / "output")
    check_bounds(outcome, row)
    check_refusal(outcome, (str(taken), str(given), str(taken.resolve().parent)))
    if digest(root, times=True) != before:
        raise WrongError(f"{given} to {taken} changed something")
    row.refused += 1


def prepared(name: str, cache: Path) -> Path:
    """Return an undamaged checkpoint, written once."""
    if not (cache / name).exists():
        next(case for case in CASES if case.id == name).write(cache / name)
    return cache / name


def main() -> None:
    """Run all cases and print the table; exit code 1 if a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="part of the name of a kind")
    parser.add_argument("--keep", type=Path, help="copy the directories of broken promises here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="w4a8-fuzz-") as directory:
        cache = Path(directory) / "cache"
        kinds: dict[str, Callable[[Path, random.Random, Row], None]] = {
            mutation.__name__.replace("_", " "): lambda root, rng, row, m=mutation: damaged_input(
                root, rng, row, m, cache
            )  # type: ignore[misc]
            for mutation in (*weights.MUTATIONS, *directories.MUTATIONS)
        }
        kinds["damaged output"] = lambda root, rng, row: damaged_output(root, rng, row, cache)
        kinds["wrong paths"] = lambda root, rng, row: wrong_paths(root, rng, row, cache)
        kinds = {name: kind for name, kind in kinds.items() if not args.only or args.only in name}
        rows = {name: Row() for name in kinds}
        for number in range(args.cases):
            name = list(kinds)[number % len(kinds)]
            rng = random.Random(f"{args.seed} {number}")
            root = Path(directory) / f"case{number}" / "place"
            root.mkdir(parents=True)
            rows[name].cases += 1
            try:
                kinds[name](root, rng, rows[name])
            except WrongError as error:
                rows[name].wrong += 1
                print(f"case {number} ({name}): {error}\n", file=sys.stderr)
                if args.keep:
                    shutil.copytree(root, args.keep / str(number), symlinks=True)
            shutil.rmtree(root.parent)
    head = ("damage", "cases", "refused", "accepted", "broken promises", "most s", "most MiB")
    cells = [
        (name, row.cases, row.refused, row.accepted, row.wrong, f"{row.seconds:.1f}", f"{row.mib:.0f}")
        for name, row in rows.items()
    ]
    print(table(cells, head))
    print(f"\n{args.cases} cases, seed {args.seed}, {time.monotonic() - started:.0f} s")
    sys.exit(any(row.wrong for row in rows.values()))


if __name__ == "__main__":
    main()
