"""What the torture programs promise to notice, they notice: each wrong-doing, done on purpose."""

import gc
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import judge
import pytest
import torch
from judge import Case, faults, furnish, picture, run_case
from safetensors.torch import load_file, save_file
from sandbox import run

Deed = Callable[[Path], object]


def place_of(tmp_path: Path) -> Path:
    """Return the place of a case, with IN and some neighbours."""
    place = tmp_path / "place"
    (place / "in").mkdir(parents=True)
    (place / "in" / "config.json").write_text("{}")
    (place / "beside").write_text("x")
    save_file({"x": torch.ones(1)}, place / "beside.safetensors")
    (place / "in" / "link").symlink_to("../beside")
    furnish(place)
    return place


def found(deed: Deed, place: Path, **keywords: object) -> list[str]:
    """Run a command that does something; return what the judge says of it."""

    @click.command()
    @click.argument("words", nargs=-1)
    def command(words: tuple[str, ...]) -> None:  # noqa: ARG001
        deed(place)

    case = Case("a case", ["convert"], (place / "out",), **keywords)  # type: ignore[arg-type]
    before = picture(place)
    outcome, opened = run_case(case, place, command)
    nothing = run(click.Command("nothing"), [], place.parent / "output").mib
    return faults(case, outcome, opened, place, before, nothing)


def refuse(message: str, code: int = 1) -> Deed:
    """Return a deed that prints something on stderr and fails."""

    def deed(_place: Path) -> None:
        click.echo(message, err=True)
        sys.exit(code)

    return deed


def leave(place: Path) -> None:
    """Make OUT, and fail."""
    (place / "out").mkdir()
    sys.exit("Error: x")


def bug(_place: Path) -> None:
    """Fail as programs with bugs do."""
    raise RuntimeError("a bug")


DEEDS: dict[str, tuple[Deed, str]] = {
    "traceback": (bug, "traceback"),
    "exit code": (refuse("Error: x", 70), "ended with 70"),
    "two lines": (refuse("Error: x\nError: y"), "not one line"),
    "no line": (refuse("oops"), "not one line"),
    "usage without a reason": (refuse("Usage: x", 2), "wrong usage without a reason"),
    "says something": (lambda _: click.echo("hm", err=True), "succeeded, but says"),
    "terminal": (lambda _: click.echo("\x1b[2J", color=True), "stdout speaks to the terminal"),
    "long line": (lambda _: click.echo("x" * 3000), "stdout has a line of 3000 characters"),
    "time": (lambda _: time.sleep(0.5), "took"),
    "memory": (lambda _: torch.ones(200 << 18), "took "),
    "memory, for a moment": (lambda _: [torch.ones(200 << 18), None].pop(0), "took "),
    "writes beside IN": (lambda place: (place / "new").touch(), "written outside OUT: ['place/new']"),
    "changes IN": (lambda place: (place / "in" / "config.json").write_text("[]"), "written outside OUT"),
    "touches IN": (lambda place: os.utime(place / "in" / "config.json"), "written outside OUT"),
    "writes into the working directory": (lambda _: Path("new").touch(), "written outside OUT: ['cwd/new']"),
    "writes far away": (lambda _: Path(f"/var/tmp/{os.getpid()}").mkdir(), "writes outside: '/var/tmp/"),
    "removes": (lambda place: (place / "beside").unlink(), "written outside OUT"),
    "leaves OUT": (leave, "left behind: ['place/out']"),
    "leaves temporary files": (lambda place: (place.parent / "tmp" / "x").touch(), "left in TMPDIR"),
    "reads beside IN": (lambda place: (place / "beside").read_text(), "reads outside"),
    "reads through a link": (lambda place: (place / "in" / "link").read_text(), "reads outside"),
    "reads by a library": (lambda place: load_file(place / "beside.safetensors"), "reads outside"),
    "reads the machine": (lambda _: Path("/etc/passwd").read_text(), "reads outside: '/etc/passwd'"),
    "reads a secret": (lambda place: (place.parent / "secret" / "private").read_text(), "reads outside"),
    "prints a secret": (lambda _: click.echo(judge.SECRET), "reads outside: the secret is in 'stdout'"),
    "carries a secret": (lambda place: (place / "out").write_text(judge.SECRET), "reads outside: the secret is in"),
}  # fmt: skip


@pytest.mark.parametrize("name", DEEDS)
def test_what_is_wrong_is_noticed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time and memory with smaller bounds, so that this ends."""
    deed, line = DEEDS[name]
    monkeypatch.setattr(judge, "MAX_SECONDS", 0.45 if name == "time" else 60)
    monkeypatch.setattr(judge, "MAX_MIB", 100)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    said = found(deed, place_of(tmp_path))
    assert any(one.startswith(line) for one in said), said
    for path in Path("/var/tmp").iterdir():
        if path.name.isdigit() and not Path(f"/proc/{path.name}").exists():
            path.rmdir()


def free_memory() -> list[bytes]:
    """Free memory below some that is not free, so that it stays with this process; return what holds it."""
    below = [bytes(100_000) for _ in range(3000)]
    above = [bytes(100_000) for _ in range(20)]
    del below
    return above


def garbage() -> list[bytes]:
    """Leave a cycle with memory to the collector."""
    cycle: list[object] = [torch.ones(200 << 18)]
    cycle.append(cycle)
    return []


@pytest.mark.parametrize("leave_behind", [free_memory, garbage])
def test_memory_does_not_hide_in_what_earlier_tests_left(
    leave_behind: Callable[[], list[bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fork starts with what its parent has: it could use memory that is free there, or collect what is garbage."""
    monkeypatch.setattr(judge, "MAX_MIB", 100)

    def take(_place: Path) -> None:
        gc.collect()
        torch.ones(200 << 18)

    gc.collect()
    gc.disable()
    try:
        held = leave_behind()
        said = found(take, place_of(tmp_path))
    finally:
        gc.enable()
    assert any(one.startswith("took ") for one in said), said
    del held


def test_what_is_right_is_not(tmp_path: Path) -> None:
    """IN is read, OUT is written, a refusal is one line."""

    def work(place: Path) -> None:
        (place / "in" / "config.json").read_text()
        (place / "out").mkdir()
        (place / "out" / "x").write_text("x")
        click.echo("done")

    assert found(work, place_of(tmp_path / "work")) == []
    assert found(refuse("Error: x"), place_of(tmp_path / "refuse")) == []


def test_interpreters_of_their_own_are_watched_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they read and write around IN; how long they take, and how much."""
    place = place_of(tmp_path)
    program = tmp_path / "program.py"
    program.write_text(
        "import os\nopen('new', 'w').close()\n"
        f"os.close(os.open({str(place / 'beside')!r}, os.O_RDONLY))\n"
        "x = bytearray(200 << 20)\nraise RuntimeError('a bug')\n"
    )
    monkeypatch.setattr(judge, "W4A8", program)
    monkeypatch.setattr(judge, "MAX_MIB", 100)
    said = found(bug, place, fresh=True)
    for line in ("traceback", "reads outside", "written outside OUT: ['cwd/new']"):
        assert any(one.startswith(line) for one in said), said
    assert (judge.run_case(Case("", [], fresh=True), place)[0].mib) > 200
