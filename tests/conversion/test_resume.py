"""Interrupted conversions: what is kept, what is trusted, who may touch it, and that the end is the same bytes."""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from checkpoint_edits import case_named, edit_json, snapshot
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from convert_w4a8.checkpoint.checksum import checksum, is_intact
from convert_w4a8.checkpoint import disk
from convert_w4a8.checkpoint import journal as resume
from convert_w4a8.checkpoint.journal import work_path
from convert_w4a8.cli import main
from convert_w4a8.conversion import run as conversion
from convert_w4a8.errors import ConvertError

CASE = "awq-symmetric-fp16-sharded"
OPTIONS = ("--max-shard-size", "150kB", "--quiet", "--device", "cpu")


def run(source: Path, out: Path, *more: str) -> Result:
    """Convert on the command line."""
    return CliRunner().invoke(main.convert, [str(source), str(out), *OPTIONS, *more])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a checkpoint that becomes several files."""
    return case_named(CASE).write(tmp_path_factory.mktemp("resume") / "in").path


@pytest.fixture(scope="module")
def undisturbed(source: Path) -> dict[str, bytes]:
    """Return what a conversion gives that nothing disturbs."""
    out = source.parent / "undisturbed"
    assert run(source, out).exit_code == 0
    return snapshot(out)


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, BaseException], None]]:
    """Return what lets the n-th layer of the next conversion raise an exception."""

    def after(layers: int, error: BaseException) -> None:
        whole, count = conversion.to_w4a8, 0

        def failing(*args: object, **kwargs: object) -> object:
            nonlocal count
            count += 1
            if count == layers:
                monkeypatch.setattr(conversion, "to_w4a8", whole)
                raise error
            return whole(*args, **kwargs)  # type: ignore[arg-type]

        monkeypatch.setattr(conversion, "to_w4a8", failing)

    return after


@pytest.fixture
def interrupted(source: Path, tmp_path: Path, interrupt: Callable[[int, BaseException], None]) -> Path:
    """OUT of a conversion that was interrupted when some of its files were finished."""
    interrupt(10, KeyboardInterrupt())
    assert run(source, tmp_path / "out").exit_code == 130
    assert finished(tmp_path / "out")
    return tmp_path / "out"


def finished(out: Path) -> list[Path]:
    """Return the finished files of an interrupted conversion, by its journal."""
    lines = (work_path(out) / "journal").read_text().splitlines()
    return [work_path(out) / "checkpoint" / entry["file"] for entry in map(json.loads, lines) if "file" in entry]


# What is kept.


def test_ctrl_c_says_how_to_resume(
    source: Path, tmp_path: Path, interrupt: Callable[[int, BaseException], None]
) -> None:
    """Exit code 130 and one line; OUT is absent and the finished files are kept."""
    interrupt(10, KeyboardInterrupt())
    result = run(source, tmp_path / "out")
    assert result.exit_code == 130
    assert result.stderr.startswith("Interrupted; ")
    assert "files are finished; --resume continues from there\n" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == [".out.w4a8-partial"]


def test_ctrl_c_with_nothing_to_keep_leaves_nothing(
    source: Path, tmp_path: Path, interrupt: Callable[[int, BaseException], None]
) -> None:
    """Before the first file is finished there is nothing to resume, and nothing is left."""
    interrupt(1, KeyboardInterrupt())
    result = run(source, tmp_path / "out")
    assert (result.exit_code, result.stderr) == (130, "Interrupted; nothing was written\n")
    assert list(tmp_path.iterdir()) == []


def test_a_fault_of_the_input_leaves_nothing(
    source: Path, tmp_path: Path, interrupt: Callable[[int, BaseException], None]
) -> None:
    """What could never succeed is not kept."""
    interrupt(10, ConvertError("a", "b", "c"))
    result = run(source, tmp_path / "out")
    assert (result.exit_code, result.stderr) == (1, "Error: a: b; c\n")
    assert list(tmp_path.iterdir()) == []


def test_a_bug_keeps_what_is_finished(
    source: Path, tmp_path: Path, interrupt: Callable[[int, BaseException], None]
) -> None:
    """Whatever else goes wrong, such as a GPU out of memory, may not go wrong again on another device."""
    interrupt(10, RuntimeError("CUDA error"))
    result = run(source, tmp_path / "out")
    assert isinstance(result.exception, RuntimeError)
    assert "--resume continues" in result.exception.__notes__[0]
    assert finished(tmp_path / "out")


# What comes of it.


def test_resume_gives_the_same_bytes(source: Path, interrupted: Path, undisturbed: dict[str, bytes]) -> None:
    """The output is that of an undisturbed conversion, and finished files were not written again."""
    before = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in finished(interrupted)}
    assert run(source, interrupted, "--resume").exit_code == 0
    assert snapshot(interrupted) == undisturbed
    assert {name: ((p := interrupted / name).stat().st_ino, p.stat().st_mtime_ns) for name in before} == before
    assert [path.name for path in interrupted.parent.iterdir()] == ["out"]


def test_resume_reports_all_layers(source: Path, interrupted: Path, tmp_path: Path) -> None:
    """The report of a resumed conversion is that of an undisturbed one, apart from the time it took."""
    resumed = json.loads(run(source, interrupted, "--resume", "--json").stdout)
    whole = json.loads(run(source, tmp_path / "whole", "--json").stdout)
    different = {key for key in whole if resumed[key] != whole[key]}
    assert different <= {"seconds", "megabytes_per_second", "out", "output"}


def test_resume_without_anything_to_resume_converts(
    source: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    """--resume may always be given, so that a job can be started again by the same command."""
    assert run(source, tmp_path / "out", "--resume").exit_code == 0
    assert snapshot(tmp_path / "out") == undisturbed


def test_without_resume_the_user_is_asked(source: Path, interrupted: Path) -> None:
    """What was interrupted is neither continued nor thrown away unasked."""
    before = snapshot(work_path(interrupted))
    result = run(source, interrupted)
    assert result.exit_code == 1
    assert "finished files; pass --resume to continue it, or --overwrite to begin again" in result.stderr
    assert snapshot(work_path(interrupted)) == before


def test_overwrite_begins_again(source: Path, interrupted: Path, undisturbed: dict[str, bytes]) -> None:
    """With --overwrite the finished files are written anew."""
    before = {path.name: path.stat().st_mtime_ns for path in finished(interrupted)}
    assert run(source, interrupted, "--overwrite").exit_code == 0
    assert snapshot(interrupted) == undisturbed
    assert all((interrupted / name).stat().st_mtime_ns > time for name, time in before.items())


def test_an_old_output_returns_if_resumed_between_the_renames(
    source: Path, tmp_path: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the old OUT was moved away and before the new one came: --resume finishes it."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")

    def killed(_new: Path, out: Path, old: Path) -> None:
        out.rename(old)
        raise KeyboardInterrupt

    monkeypatch.setattr("convert_w4a8.checkpoint.directory.writer.replace_directory", killed)
    assert run(source, tmp_path / "out", "--overwrite").exit_code == 130
    assert not (tmp_path / "out").exists()
    assert (work_path(tmp_path / "out") / "replaced" / "old").read_text() == "old"
    monkeypatch.undo()
    assert run(source, tmp_path / "out", "--overwrite", "--resume").exit_code == 0
    assert snapshot(tmp_path / "out") == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# What is trusted.


def flip(path: Path) -> None:
    """Change one bit in the middle of a file, and not its times."""
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "one-bit": flip,
    "cut": lambda path: os.truncate(path, path.stat().st_size - 1),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "a-hole": lambda path: (size := path.stat().st_size, os.truncate(path, 5000), os.truncate(path, size)),
    "empty": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
    "a-directory": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_finished_file_that_changed_is_written_again(
    damage: Callable[[Path], object], source: Path, interrupted: Path, undisturbed: dict[str, bytes]
) -> None:
    """A file is trusted only with the bytes that it had when it was finished."""
    damage(finished(interrupted)[0])
    assert run(source, interrupted, "--resume").exit_code == 0
    assert snapshot(interrupted) == undisturbed


def test_a_journal_may_end_anywhere(
    source: Path, interrupted: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    """Whatever part of the journal survives a power loss, and whatever stands behind it, the end is the same."""
    work, journal = work_path(interrupted), (work_path(interrupted) / "journal").read_bytes()
    ends = [len(journal) * i // 8 for i in range(8)]
    for number, (end, rest) in enumerate((end, rest) for end in ends for rest in (b"", b"\0" * 100)):
        out = tmp_path / f"out{number}"
        shutil.copytree(work, work_path(out))
        (work_path(out) / "journal").write_bytes(journal[:end] + rest)
        assert run(source, out, "--resume").exit_code == 0
        assert snapshot(out) == undisturbed


CHANGES: dict[str, tuple[Callable[[Path], object], tuple[str, ...], str]] = {
    "scales": (lambda _: None, ("--scales", "direct"), "out: --scales"),
    "format": (lambda _: None, ("--format", "compressed-tensors"), "out: --format"),
    "shard-size": (lambda _: None, ("--max-shard-size", "100kB"), "out: --max-shard-size"),
    "config": (lambda p: edit_json(p / "config.json", hidden_act="gelu"), (), "out: config.json"),
    "weights": (
        lambda p: os.utime(p / "model-00002-of-00003.safetensors"),
        (),
        "out: model-00002-of-00003.safetensors",
    ),
    "side-file": (lambda p: (p / "tokenizer.json").write_text("{}"), (), "out: tokenizer.json"),
    "new-side-file": (lambda p: (p / "merges.txt").write_text("x"), (), "out: merges.txt"),
    "lost-side-file": (lambda p: (p / "tokenizer.json").unlink(), (), "out: tokenizer.json"),
    "card": (lambda p: (p / "README.md").write_text("# Model"), (), "out: README.md"),
}


@pytest.mark.parametrize(("change", "options", "subject"), CHANGES.values(), ids=CHANGES)
def test_another_conversion_is_not_resumed(
    change: Callable[[Path], object],
    options: tuple[str, ...],
    subject: str,
    source: Path,
    tmp_path: Path,
    interrupt: Callable[[int, BaseException], None],
) -> None:
    """Input and options must be those of the interrupted conversion; what differs is named, and nothing is lost."""
    copy, out = tmp_path / "in", tmp_path / "out"
    shutil.copytree(source, copy)
    interrupt(10, KeyboardInterrupt())
    run(copy, out)
    before = snapshot(work_path(out))
    change(copy)
    result = run(copy, out, "--resume", *options)
    assert result.exit_code == 1
    assert f"{subject}: is not what it was in the conversion that was interrupted" in result.stderr
    assert snapshot(work_path(out)) == before


def test_another_version_is_not_resumed(source: Path, interrupted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of two versions of this program are not mixed."""
    monkeypatch.setattr(resume, "__version__", "99")
    assert "out: version of w4a8-convert: is not what it was" in run(source, interrupted, "--resume").stderr


# Who may touch it.


def test_the_second_conversion_is_told(source: Path, interrupted: Path, undisturbed: dict[str, bytes]) -> None:
    """While a process holds the lock, others change nothing, whatever they are asked."""
    before = snapshot(work_path(interrupted))
    with (work_path(interrupted) / "lock").open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for more in ((), ("--resume",), ("--overwrite",)):
            result = run(source, interrupted, *more)
            assert result.exit_code == 1
            assert f"{interrupted}: is being written by another conversion" in result.stderr
    assert snapshot(work_path(interrupted)) == before
    assert run(source, interrupted, "--resume").exit_code == 0
    assert snapshot(interrupted) == undisturbed


def test_a_file_system_without_locks_is_used_without(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some network file systems refuse flock; that is no reason to refuse the conversion."""

    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    assert run(source, tmp_path / "out").exit_code == 0


def test_a_link_in_the_place_of_the_work_directory_is_not_followed(source: Path, tmp_path: Path) -> None:
    """In a directory that others can write to, a link could lead to files that are not ours to remove."""
    (tmp_path / "victim" / "checkpoint").mkdir(parents=True)
    work_path(tmp_path / "out").symlink_to("victim")
    result = run(source, tmp_path / "out", "--overwrite")
    assert "is a link, not the work directory of a conversion; remove it" in result.stderr
    assert list((tmp_path / "victim").iterdir()) == [tmp_path / "victim" / "checkpoint"]


def test_a_mount_point_is_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OUT is put in its place by a rename, which a mount point (a container's volume) does not allow."""
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(disk.Path, "is_mount", lambda self: self.name == "out")
    result = run(source, tmp_path / "out")
    assert "out: is a mount point, which cannot be replaced; choose a directory inside it" in result.stderr


# Checksums.


@given(data=st.binary(max_size=20_000), cut=st.integers(0, 4))
def test_checksums_of_pieces_add_up(data: bytes, cut: int) -> None:
    """Split at a multiple of 4 KiB, the sums of both parts make that of the whole."""
    at = min(cut * 4096, len(data))
    parts = checksum(memoryview(data[:at])) + checksum(memoryview(data[at:]), cut)
    assert at < cut * 4096 or parts % 2**64 == checksum(memoryview(data))


@given(data=st.binary(min_size=1, max_size=20_000), place=st.integers(0), change=st.integers(1, 255))
def test_checksums_notice_a_changed_byte(data: bytes, place: int, change: int) -> None:
    """One byte that differs, at any place, gives another sum."""
    changed = bytearray(data)
    changed[place % len(data)] ^= change
    assert checksum(memoryview(changed)) != checksum(memoryview(data))


def test_checksums_notice_misplaced_blocks() -> None:
    """Two blocks that changed places, and a block that is there twice, are noticed."""
    blocks = [bytes(torch.randint(0, 256, (4096,), dtype=torch.uint8).tolist()) for _ in range(3)]
    sums = {checksum(memoryview(b"".join(blocks[i] for i in order))) for order in ((0, 1, 2), (1, 0, 2), (0, 0, 2))}
    assert len(sums) == 3


def test_a_file_that_is_not_covered_by_its_pieces_is_not_intact(tmp_path: Path) -> None:
    """Every byte must be accounted for, once."""
    data = memoryview(b"abcdefgh")
    (tmp_path / "file").write_bytes(data)
    halves = [(0, 4, checksum(data[:4])), (4, 4, checksum(data[4:]))]
    assert is_intact(tmp_path / "file", halves, 8)
    assert not is_intact(tmp_path / "file", halves[:1], 8)
    assert not is_intact(tmp_path / "file", halves[1:], 8)
    assert not is_intact(tmp_path / "file", [*halves, (8, 1, 0)], 9)
