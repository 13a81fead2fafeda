"""Run the command line in forked children, one import of torch for a thousand runs, and compare directories."""

import contextlib
import ctypes
import gc
import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

_TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_TESTS.parent), str(_TESTS / "support")]  # this checkout, whatever is installed

TIMEOUT = 180
"""Seconds after which a child is killed."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended: exit code, or minus the signal; what it printed; seconds; peak resident memory in MiB.

    cpu_seconds: of the processor, which others' work on the same machine does not lengthen.
    """

    code: int
    stdout: str
    stderr: str
    seconds: float
    mib: float
    cpu_seconds: float

    @property
    def lines(self) -> list[str]:
        """Lines on stderr."""
        return self.stderr.splitlines()


def start(
    command: click.Command, arguments: Sequence[object], output: Path, prepare: Callable[[], object] = lambda: None
) -> int:
    """Fork a child that runs a command after `prepare`, its streams in files under `output`; return its pid.

    What a child takes is not to hide in what this process had: memory that is free here is given back first, and
    garbage of here is not collected there.
    """
    output.mkdir(exist_ok=True)
    ctypes.CDLL(None).malloc_trim(0)
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        gc.freeze()
        signal.alarm(TIMEOUT)
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            file = os.open(output / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(file, descriptor)
            os.close(file)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        signal.signal(signal.SIGINT, signal.default_int_handler)
        prepare()
        command.main([str(argument) for argument in arguments], prog_name=command.name)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:  # noqa: BLE001 - as the interpreter would
        import traceback

        traceback.print_exc()
        code = 1
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    raise AssertionError


def finish(pid: int, output: Path, started: float) -> Outcome:
    """Wait for a child."""
    _, status, usage = os.wait4(pid, 0)
    stdout, stderr = (
        path.read_text(encoding="utf-8", errors="replace") if (path := output / name).exists() else ""
        for name in ("stdout", "stderr")
    )
    seconds = time.monotonic() - started
    code, cpu = os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime
    return Outcome(code, stdout, stderr, seconds, usage.ru_maxrss / 1024, cpu)


def run(
    command: click.Command, arguments: Sequence[object], output: Path, prepare: Callable[[], object] = lambda: None
) -> Outcome:
    """Run a command in a child and wait for it."""
    started = time.monotonic()
    return finish(start(command, arguments, output, prepare), output, started)


def digest(root: Path, *, times: bool = False) -> dict[str, str]:
    """Return a digest of every file, link and directory below a directory; with `times`, when they were changed too."""
    found = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        if path.is_symlink():
            content = f"link to {path.readlink()}"
        elif path.is_file():
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            content = "directory"
        found[str(path.relative_to(root))] = f"{content} {status.st_mtime_ns if times else ''}"
    return found


def table(rows: Sequence[Sequence[object]], head: Sequence[str]) -> str:
    """Return a Markdown table, numbers to the right."""
    lines = [
        "| " + " | ".join(head) + " |",
        "|" + "|".join("---" if column == 0 else "---:" for column in range(len(head))) + "|",
    ]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])
