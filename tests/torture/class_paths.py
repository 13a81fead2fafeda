# ruff: noqa: PTH102, PTH106, PTH109  (descriptors, and names that no Path takes)
"""Paths that are not what they should be: every kind of file and directory, in every place that takes a path."""

import os
import random
import socket
from pathlib import Path

from judge import Case, drop_capabilities

_LONG = "d" * 200


def _furnish(place: Path) -> dict[str, Path]:
    """Make one of everything that a path can be; return them by kind."""
    kinds = {name: place / name for name in ("absent", "file", "empty", "full", "dangling", "loop", "fifo", "locked")}
    kinds["file"].write_bytes(b"x")
    kinds["empty"].mkdir()
    kinds["full"].mkdir()
    (kinds["full"] / "x").write_bytes(b"x")
    kinds["dangling"].symlink_to("nowhere")
    kinds["loop"].symlink_to("loop")
    os.mkfifo(kinds["fifo"])
    kinds["locked"].mkdir()
    (kinds["locked"] / "x").write_bytes(b"x")
    kinds["locked"].chmod(0)
    kinds["unreadable"] = place / "unreadable"
    kinds["unreadable"].write_bytes(b"{}")
    kinds["unreadable"].chmod(0)
    kinds["read-only"] = place / "read-only"
    kinds["read-only"].mkdir()
    kinds["read-only"].chmod(0o500)
    kinds["link"] = place / "link"
    kinds["link"].symlink_to("in")
    kinds["up"] = place / "up"
    kinds["up"].symlink_to(".")
    server = socket.socket(socket.AF_UNIX)
    here = os.getcwd()
    os.chdir(place)
    server.bind("socket")
    os.chdir(here)
    server.close()
    kinds |= {
        "socket": place / "socket",
        "in a file": kinds["file"] / "x",
        "in a locked directory": kinds["locked"] / "x",
        "in a read-only directory": kinds["read-only"] / "x",
        "below a loop": kinds["loop"] / "x",
        "below absent ones": place / "a" / "b" / "c",
        "name too long": place / ("x" * 300),
        "path too long": Path(str(place) + f"/{_LONG}" * 25),
        "null": Path("/dev/null"),
        "zero": Path("/dev/zero"),
        "full device": Path("/dev/full"),
        "root": Path("/"),
        "proc": Path("/proc/self/mem"),
        "proc directory": Path("/proc/1"),
        "dots": place / "in" / ".." / "in",
        "itself": place / "in",
        "a config": place / "in" / "config.json",
        "above": place,
    }
    return kinds


_SPELLED = (
    "",
    " ",
    ".",
    "..",
    "~nosuchuser",
    "~nosuchuser/x",
    "~",
    "-",
    "--",
    "@",
    "/",
    "//",
    "org/name",
    "a/b@c",
    "file:///x",
)
_FILES = {"--html", "--png-dir", "--baseline", "--write-baseline", "GITHUB_STEP_SUMMARY"}


def paths(place: Path, base: Path, rng: random.Random, needs: list[str]) -> Case:
    """Make a case: one path of a command line or of the environment is wrong in one way."""
    source, out = place / "in", place / "out"
    kinds = _furnish(place)
    role = rng.choice(
        (
            *("IN", "IN", "OUT", "OUT", "--html", "--png-dir", "--baseline", "--write-baseline", "GITHUB_STEP_SUMMARY"),
            *("inside", "inside", "TMPDIR", "HF_HOME", "cwd"),
        )
    )
    kind, value = rng.choice(list(kinds.items()))
    given = str(value)
    if role not in ("inside", "cwd") and rng.random() < 0.15:
        kind = given = rng.choice(_SPELLED)
        value = place.parent / "cwd" / given
    may: tuple[Path, ...]
    json_too = ["--json"] * rng.randrange(2)
    label = f"{role} is {kind!r}"
    reads = (value, Path(os.path.realpath(value)), base)  # what the user names is theirs to name
    convert = ["convert", str(source), str(out), "--device", "cpu", *needs]
    drop = drop_capabilities
    match role:
        case "IN":
            command = rng.choice(
                (
                    ["convert", given, str(out)],
                    ["inspect", given],
                    ["check", given, "--sample"],
                    ["verify", str(base / "out"), "--source", given],
                    ["verify", given, "--source", str(source)],
                    ["report", given, "--source", str(source)],
                )
            )
            return Case(label, [*command, *json_too], (out,), reads, drop)
        case "OUT":
            flags = rng.choice(([], ["--overwrite"], ["--resume"], ["--dry-run"]))
            # What OUT is may be replaced or made by --overwrite, if it is not somebody's: then nothing may change.
            may = (
                (value,)
                if kind in ("absent", "empty", "read-only", "below absent ones", "in a read-only directory", ".", "..")
                else ()
            )
            may += (place / "a",) if kind == "below absent ones" else ()
            if given in (" ", "-", "org/name", "a/b@c", "file:///x", "@"):
                may = _made(value, place)
            return Case(
                label, ["convert", str(source), given, "--device", "cpu", *needs, *flags, *json_too], may, reads, drop
            )
        case "--html" | "--png-dir":
            may = _made(value, place)
            # Pictures are written through links to directories, and beside what is there.
            real = Path(os.path.realpath(value))
            may += (
                tuple(real / f"{picture}.png" for picture in ("products", "scales", "sqnr"))
                if role == "--png-dir"
                else ()
            )
            command = ["report", str(base / "out"), "--source", str(source), f"{role}={given}"]
            home = place.parent / "home"
            return Case(label, [*command, *json_too], (*may, home), reads, drop, {"HOME": str(home)}, left=True)
        case "--baseline" | "--write-baseline":
            command = ["check", str(source), "--sample", "--device", "cpu", *needs, f"{role}={given}"]
            may = _made(value, place) if role == "--write-baseline" else ()
            home = place.parent / "home"
            return Case(label, [*command, *json_too], (*may, home), reads, drop, {"HOME": str(home)}, left=True)
        case "GITHUB_STEP_SUMMARY":
            command = ["check", str(source), "--sample", "--device", "cpu", *needs, *json_too]
            return Case(label, command, (value,), reads, drop, {role: given}, left=True)
        case "TMPDIR" | "HF_HOME":
            command = rng.choice(
                (
                    ["check", str(source), "--sample", "--device", "cpu", *needs],
                    ["inspect", "org/name"],
                    ["check", "org/name", "--sample"],
                )
            )
            elsewhere = Path("/tmp"), Path("/var/tmp")  # where Python looks when TMPDIR is none
            may = (value, *elsewhere, *place.parents[:1]) if role == "TMPDIR" else (value,)
            return Case(label, [*command, *json_too], may, reads, drop, {role: given})
        case "cwd":
            os.mkdir(place.parent / "gone")

            def go() -> None:
                os.chdir(place.parent / "gone")
                if rng.random() < 0.5:
                    os.rmdir(place.parent / "gone")
                drop_capabilities()

            command = rng.choice(
                (convert, ["inspect", str(source)], ["convert", "../place/in", str(out)], ["inspect", "."], ["env"])
            )
            return Case("working directory is gone", [*command, *json_too], (out, place.parent / "gone"), reads, go)
        case _:
            said = _inside(source, rng)
            command = rng.choice((convert, convert, ["inspect", str(source)], ["check", str(source), "--sample"]))
            return Case(said, [*command, *json_too], (out,), (), drop)


def _made(value: Path, place: Path) -> tuple[Path, ...]:
    """Return what may be made for a file: itself, and the directories above it that are not there yet."""
    above = [path for path in value.parents if place.parent in path.parents and not os.path.lexists(path)]
    return (value, *above)


def _inside(source: Path, rng: random.Random) -> str:
    """Replace a file of IN by, or add to IN, something that is no file; nest directories."""
    if rng.random() < 0.25:
        depth = rng.choice((5, 17, 40, 900))
        here = os.open(source, os.O_RDONLY)
        for _ in range(depth):
            os.mkdir("d", dir_fd=here)
            below = os.open("d", os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = below
        os.close(here)
        return f"{depth} directories within each other"
    names = [path.name for path in source.iterdir()] + [
        "README.md",
        "model.safetensors.index.json",
        "x.json",
        "quantize_config.json",
    ]
    target = source / rng.choice(names)
    target.unlink(missing_ok=True)
    kind = rng.choice(
        ("fifo", "link to fifo", "loop", "directory", "unreadable", "locked", "out", "dangling", "device", "hole")
    )
    match kind:
        case "fifo":
            os.mkfifo(target)
        case "link to fifo":
            target.symlink_to("../fifo")
        case "loop":
            target.symlink_to(target.name)
        case "directory":
            target.mkdir()
        case "unreadable":
            target.write_bytes(b"{}")
            target.chmod(0)
        case "locked":
            target.mkdir()
            (target / "x").write_bytes(b"x")
            target.chmod(0)
        case "out":
            target.symlink_to(rng.choice(("/etc/passwd", "../file", "../full", "/", "../../secret/private")))
        case "dangling":
            target.symlink_to("nowhere")
        case "device":
            target.symlink_to(rng.choice(("/dev/zero", "/dev/null", "/dev/stdin", "/proc/self/environ")))
        case _:
            with target.open("wb") as file:
                file.truncate(rng.choice((1, 1 << 20, 1 << 33, 1 << 40)))
    return f"{target.name} is a {kind}"
