"""Streams that are closed, full, broken or not for writing."""

import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

from judge import CLOSED_PIPE, Case

_STREAMS = ("stdin", "stdout", "stderr")


def _onto(file: int, descriptor: int) -> None:
    """Let a stream be another file, with an object of Python's for it as if it had always been that."""
    os.dup2(file, descriptor)
    if descriptor:
        setattr(sys, _STREAMS[descriptor], open(descriptor, "w", encoding="utf-8", closefd=False))  # noqa: SIM115


def _full(descriptor: int) -> Callable[[], None]:
    return lambda: _onto(os.open("/dev/full", os.O_WRONLY), descriptor)


def _closed(descriptor: int) -> Callable[[], None]:
    def prepare() -> None:
        os.close(descriptor)
        setattr(sys, _STREAMS[descriptor], None)  # as an interpreter finds it that starts so

    return prepare


def _pipe(descriptor: int) -> Callable[[], None]:
    def prepare() -> None:
        ours, theirs = os.pipe()
        os.close(ours)
        _onto(theirs, descriptor)

    return prepare


def _read_only(descriptor: int) -> Callable[[], None]:
    return lambda: _onto(os.open("/dev/null", os.O_RDONLY), descriptor)


def commands(place: Path, base: Path, rng: random.Random, needs: list[str]) -> tuple[list[str], tuple[Path, ...]]:
    source, out, html = place / "in", place / "out", place / "report.html"
    convert = ["convert", str(source), str(out), "--device", "cpu", *needs]
    return rng.choice(
        (
            (convert, (out,)),
            ([*convert, "--verbose"], (out,)),
            ([*convert, "--dry-run"], ()),
            (["convert", str(place / "absent"), str(out)], ()),
            (["inspect", str(source)], ()),
            (["verify", str(base / "out"), "--source", str(source)], ()),
            (["report", str(base / "out"), "--source", str(source), "--html", str(html)], (html,)),
            (["check", str(source), "--sample", "--device", "cpu", *needs], ()),
            (["env"], ()),
            (["--help"], ()),
            (["convert", "--help"], ()),
            (["--version"], ()),
            (["nonsense"], ()),
        )
    )


def streams(place: Path, base: Path, rng: random.Random, needs: list[str]) -> Case:
    """Make a case: stdin, stdout or stderr, or several of them, are closed, full or broken."""
    command, may = commands(place, base, rng, needs)
    kinds = {"full": _full, "closed": _closed, "pipe without reader": _pipe, "read-only": _read_only}
    chosen = [
        (descriptor, rng.choice(list(kinds))) for descriptor in rng.choice(((1,), (1,), (2,), (1, 2), (0,), (0, 1, 2)))
    ]

    def prepare() -> None:
        for descriptor, kind in chosen:
            kinds[kind](descriptor)()

    label = ", ".join(f"descriptor {descriptor} {kind}" for descriptor, kind in chosen) + f": {command[0]}"
    extra = (
        ["--json"] * rng.randrange(2)
        if command[0] in ("convert", "inspect", "verify", "report", "check") and "--help" not in command
        else []
    )
    fresh = rng.random() < 0.15  # what Python does with the streams before and after our code
    return Case(
        label,
        [*command, *extra],
        may,
        (base,),
        prepare,
        fresh=fresh,
        codes=(0, 1, 2, CLOSED_PIPE),
        quiet=True,
        left=True,
    )
