# ruff: noqa: PTH115, PTH118, PTH112, PTH113, PTH114, PTH119, PTH120, PTH208  (names as bytes)
"""What a run may do, whatever it was given: how it ends, what it prints, reads, writes and takes.

Used by fuzz_classes.py. A case is one command line in a directory of its own; `run_case` runs it, and `faults` says
which promises it broke.
"""

import ctypes
import hashlib
import json
import os
import re
import resource
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import click
from sandbox import TIMEOUT, Outcome, run
from watching import Watch, log_openings

from convert_w4a8.cli.main import main as command

MAX_SECONDS = 10.0
MAX_MIB = 1024
"""Beyond what the process takes that does nothing but import."""
MAX_LINE = 2000
CLOSED_PIPE = 141
_REPOSITORY = Path(__file__).resolve().parents[2]
W4A8 = Path(sys.prefix) / "bin" / "w4a8"
_CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""What a terminal obeys instead of showing it, newlines apart."""
_EXPECTED = re.compile(r"libgomp: |(convert|verify|report|check) +\d+%, |(numba|Triton) cannot be used \(")
"""Lines on stderr of a run that succeeds: of the OpenMP library before we begin, of progress, of slower kernels."""
_SYSTEM = ("/proc", "/sys", "/dev", "/etc", "/usr", "/lib")
_PRIVATE = re.compile("/etc/passwd|/proc/.*/(environ|mem)|.*/secret/.*")
"""Files of the machine that no case gives, but to which links of some lead."""
SECRET = "not for anybody else"
"""What a file says that lies beside the case, and that must not get anywhere."""
_OWN = ("output", "opened", "tmp", "secret")
"""What the judge keeps beside the case."""
_CACHES = ("~/.cache", "~/.config")
_KERNELS = _REPOSITORY / "convert_w4a8" / "kernels"
"""Where numba keeps what it compiles."""


@dataclass
class Case:
    """One run. Paths are absolute; the place of the case is the directory above IN.

    arguments: of `w4a8`. writes: what it may change (OUT, FILE). reads: what it may open besides IN and `writes`.
    prepare: called in the child. environment: of the child. cwd: where it begins. fresh: an interpreter of its own, for
    what is decided when one starts; `prepare` is called before it.
    codes: how it may end. quiet: whether nothing can be read of what it prints (streams that are closed).
    left: whether OUT may be there after a failure (stdout fails when the work is done).
    """

    label: str
    arguments: list[str]
    writes: tuple[Path, ...] = ()
    reads: tuple[Path, ...] = ()
    prepare: Callable[[], object] = lambda: None
    environment: Mapping[str, str | None] = field(default_factory=dict)
    cwd: Path | None = None
    fresh: bool = False
    codes: tuple[int, ...] = (0, 1, 2)
    quiet: bool = False
    left: bool = False


def picture(place: Path) -> dict[str, str]:
    """Return what every file, link and directory around a case is, and when it changed; content if it is small."""
    found, root = {}, place.parent
    for directory, folders, files in os.walk(root):
        if directory == str(root):
            folders[:] = [name for name in folders if name not in _OWN]
        for name in (*folders, *(files if directory != str(root) else ())):
            path = os.path.join(directory, name)
            status = os.lstat(path)
            content = ""
            if stat.S_ISREG(status.st_mode) and status.st_size < 1 << 26:
                content = hashlib.sha256(Path(path).read_bytes()).hexdigest()
            elif stat.S_ISLNK(status.st_mode):
                content = os.readlink(path)
            kind = "directory" if stat.S_ISDIR(status.st_mode) else "other"
            relative = os.path.relpath(path, root)
            found[relative] = f"{kind} {stat.filemode(status.st_mode)} {status.st_size} {content} {status.st_mtime_ns}"
    return found


def drop_capabilities() -> None:
    """Let file modes hold for root as well: give up CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, for good."""
    if os.geteuid():
        return
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in (1, 2):
        libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP: not regained by exec either
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    data = (ctypes.c_uint32 * 6)()
    libc.capget(header, data)
    for place in (0, 1, 2):  # effective, permitted, inheritable
        data[place] &= ~0b110
    libc.capset(header, data)


def furnish(place: Path) -> None:
    """Make what a case has around it: the directory that it begins in, and a file that is none of its business."""
    for name in ("tmp", "cwd", "secret"):
        (place.parent / name).mkdir(exist_ok=True)
    (place.parent / "secret" / "private").write_text(SECRET)


def run_case(case: Case, place: Path, command: click.Command = command) -> tuple[Outcome, list[str]]:
    """Run a case; return how it ended and what it opened, made or removed."""
    temporary = place.parent / "tmp"
    environment = {"TMPDIR": str(temporary), "HF_HUB_OFFLINE": "1", **case.environment}
    watch = Watch([place.parent / "secret", *_directories_outside(case, place)])
    if case.fresh:
        return _run_fresh(case, place, environment), ["r" + path for path in watch.close()]
    log = place.parent / "opened"

    def prepare() -> None:
        for name, value in environment.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        tempfile.tempdir = None
        os.chdir(case.cwd or place.parent / "cwd")
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        case.prepare()
        log_openings(descriptor)

    outcome = run(command, case.arguments, place.parent / "output", prepare)
    opened = log.read_bytes().decode("utf-8", "surrogateescape").split("\0") if log.exists() else []
    return outcome, [line for line in opened if line] + ["r" + path for path in watch.close()]


def _directories_outside(case: Case, place: Path) -> list[Path]:
    """Return the directories around IN and OUT, where nothing is to be opened."""
    inside = [place / "in", *case.writes, *case.reads, *(place.parent / name for name in _OWN)]
    found = []
    for directory, folders, _ in os.walk(place.parent):
        folders[:] = [name for name in folders if Path(directory, name) not in inside]
        found.append(Path(directory))
    return [directory for directory in found if directory != place.parent]


def _run_fresh(case: Case, place: Path, environment: Mapping[str, str | None]) -> Outcome:
    output = place.parent / "output"
    output.mkdir(exist_ok=True)
    merged = {**os.environ, **{name: value for name, value in environment.items() if value is not None}}
    merged = {name: value for name, value in merged.items() if environment.get(name, "") is not None}
    merged["PYTHONPATH"] = str(_REPOSITORY)  # what is attacked is this checkout, whatever is installed
    started = time.monotonic()
    with (output / "stdout").open("wb") as stdout, (output / "stderr").open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, str(W4A8), *case.arguments],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            env=merged,
            cwd=case.cwd or place.parent / "cwd",
            preexec_fn=case.prepare,  # noqa: PLW1509 - no threads here
        )
        try:
            _, status, usage = _wait(process.pid)
        finally:
            process.returncode = 0  # it has been waited for
    out, err = [(output / name).read_text(encoding="utf-8", errors="replace") for name in ("stdout", "stderr")]
    seconds, cpu = time.monotonic() - started, usage.ru_utime + usage.ru_stime
    return Outcome(os.waitstatus_to_exitcode(status), out, err, seconds, usage.ru_maxrss / 1024, cpu)


def seconds_of(outcome: Outcome) -> float:
    """Return how long a run took by the clock; where others' work waits for the same cores, by the processor's.

    A run that waits for something takes the processor no time: it is ended at last, and has taken until then.
    """
    is_crowded = os.getloadavg()[0] > (os.cpu_count() or 1) + 1 and outcome.seconds < TIMEOUT
    return outcome.cpu_seconds if is_crowded else outcome.seconds


def _wait(pid: int) -> tuple[int, int, resource.struct_rusage]:
    deadline = time.monotonic() + TIMEOUT
    while True:
        found = os.wait4(pid, os.WNOHANG)
        if found[0]:
            return found
        if time.monotonic() > deadline:
            os.kill(pid, 9)
        time.sleep(0.01)


def faults(
    case: Case, outcome: Outcome, opened: Iterable[str], place: Path, before: Mapping[str, str], base_mib: float
) -> list[str]:
    """Return which promises a run broke, a line each."""
    found = []
    if "Traceback (most recent call last)" in outcome.stderr:
        found.append("traceback: " + " | ".join(outcome.lines[-6:])[-600:])
    elif outcome.code not in case.codes:
        found.append(f"ended with {outcome.code}: {outcome.stderr[-600:]!r}")
    elif not case.quiet:
        found += _wrong_output(case, outcome)
    if (seconds := seconds_of(outcome)) > MAX_SECONDS:
        found.append(f"took {seconds:.1f} s")
    if outcome.mib > base_mib + MAX_MIB:
        found.append(f"took {outcome.mib:.0f} MiB")
    found += _outside(case, opened, place)
    found += _leaks(case, outcome, place)
    root = place.parent
    allowed = tuple(os.path.relpath(path, root) for path in case.writes)
    if "--resume continues" in outcome.stderr:  # a disk that fails: what is finished is kept, and that is said
        allowed += tuple(os.path.relpath(path.parent / f".{path.name}.w4a8-partial", root) for path in case.writes)
    after = picture(place)
    changed = {name for name, _ in set(after.items()) ^ set(before.items())}
    changed = {name for name in changed if not any(name == p or name.startswith(p + "/") for p in allowed)}
    # a directory's time changes with what may be written into it
    changed = {name for name in changed if not (before.get(name, "").startswith("directory") and name in after)}
    if changed:
        found.append(f"written outside OUT: {sorted(changed)[:4]!r}")
    new = [name for name in after if name.startswith("place/") and name not in before and ".w4a8-partial" not in name]
    if outcome.code and not case.left and new:
        found.append(f"left behind: {new[:4]!r}")
    if left := os.listdir(root / "tmp"):
        found.append(f"left in TMPDIR: {left[:4]!r}")
    return found


def _wrong_output(case: Case, outcome: Outcome) -> list[str]:
    found = []
    for name, text in (("stdout", outcome.stdout), ("stderr", outcome.stderr)):
        if match := _CONTROL.search(text):
            found.append(f"{name} speaks to the terminal: {text[max(0, match.start() - 60) : match.end() + 60]!r}")
        if (
            (longest := max(map(len, text.split("\n")))) > MAX_LINE
            and outcome.code != 2
            and "--json" not in case.arguments
        ):
            found.append(f"{name} has a line of {longest} characters: {text[:200]!r}")
    if outcome.code == 1:
        listed = re.match(r"Error: \d+ problems?; nothing was written", outcome.stderr)
        one = outcome.stderr.startswith("Error: ") and (len(outcome.lines) == 1 or listed)
        if not one and not (not outcome.stderr and case.arguments[0] in ("verify", "check") and outcome.stdout):
            found.append(f"not one line: {outcome.stderr[-600:]!r}")
    if outcome.code == 2 and not re.search(r"^Error: ", outcome.stderr, re.MULTILINE):
        found.append(f"wrong usage without a reason: {outcome.stderr[-600:]!r}")
    said = [line for line in outcome.lines if line and not _EXPECTED.match(line)]
    if outcome.code == 0 and said and "--verbose" not in case.arguments:
        found.append(f"succeeded, but says {outcome.stderr[-600:]!r}")
    if "--json" in case.arguments and outcome.code in (0, 1):
        try:
            json.loads(outcome.stdout, parse_constant=_no_constant)
        except ValueError as error:
            found.append(f"stdout is no JSON document ({error}): {outcome.stdout[:200]!r}")
    return found


def _leaks(case: Case, outcome: Outcome, place: Path) -> list[str]:
    """Return where the secret went."""
    found = [name for name in ("stdout", "stderr") if SECRET in getattr(outcome, name)]
    for written in (path for path in case.writes if place in path.parents):
        files = [Path(written, name) for name in _files(written)] if os.path.isdir(written) else [written]
        found += [str(file) for file in files if _holds_secret(file)]
    return [f"reads outside: the secret is in {name!r}" for name in found]


def _files(directory: Path) -> Iterable[str]:
    for folder, _, files in os.walk(directory):
        yield from (os.path.join(folder, name) for name in files)


def _holds_secret(file: Path) -> bool:
    is_small = os.path.isfile(file) and not os.path.islink(file) and file.stat().st_size < 1 << 26
    return is_small and SECRET.encode() in file.read_bytes()


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _outside(case: Case, opened: Iterable[str], place: Path) -> list[str]:
    """Return what was opened that is none of the case's business."""
    work = tuple(path.parent / f".{path.name}.w4a8-partial" for path in case.writes)
    written = (*case.writes, *work, place.parent / "tmp", "/dev", "/proc", _REPOSITORY / "kernels", _KERNELS)
    read = (*written, place / "in", *case.reads, *_SYSTEM, sys.prefix, sys.base_prefix, _REPOSITORY)
    # Flushed, and looked at; the working directory, which is gone back to.
    directories = [*(str(path.parent) for path in case.writes), str(case.cwd or place.parent / "cwd")]
    found = []
    for line in opened:
        mark, path = line[0], os.path.normpath(line[1:])
        allowed = [*map(str, written if mark == "w" else read), *map(os.path.expanduser, _CACHES)]
        inside = any(path == prefix or path.startswith(prefix.rstrip("/") + "/") for prefix in allowed)
        private = mark == "r" and _PRIVATE.fullmatch(path) and path not in map(str, case.reads)
        new = os.path.dirname(path) in directories and os.path.basename(path).startswith(".w4a8-")  # takes its place
        if (private or not inside) and path not in directories and not new:
            found.append(f"{'writes' if mark == 'w' else 'reads'} outside: {path!r}")
    return sorted(set(found))[:4]
