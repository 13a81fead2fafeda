"""Interrupted conversions: what is kept, what is trusted, who may touch it, and that the end is the same bytes."""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_edits import case_named, edit_json, snapshot
from click.testing import CliRunner, Result

from convert_w4a8.checkpoint.directory import open_checkpoint
from convert_w4a8.checkpoint.journal import work_path
from convert_w4a8.cli.convert import convert_command as convert
from convert_w4a8.conversion import fingerprint, layer
from convert_w4a8.conversion.layer import convert_layer
from convert_w4a8.conversion.plan import LayerPlan, make_plan
from convert_w4a8.conversion.run import carry_out
from convert_w4a8.conversion.shard import shard_tasks
from convert_w4a8.errors import ConvertError
from convert_w4a8.options import Options
from convert_w4a8.quantization.layer import to_w4a8
from convert_w4a8.version import __version__

CASE = "awq-symmetric-fp16-sharded"
OPTIONS = ("--max-shard-size", "150kB", "--quiet", "--device", "cpu")


def run(source: Path, out: Path, *more: str) -> Result:
    """Convert on the command line."""
    return CliRunner().invoke(convert, [str(source), str(out), *OPTIONS, *more])


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
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, BaseException], None]:
    """Return what lets the n-th layer of the next conversion raise an exception."""

    def after(layers: int, error: BaseException) -> None:
        count = 0

        def failing(*args: Any, **kwargs: Any) -> object:
            nonlocal count
            count += 1
            if count == layers:
                monkeypatch.setattr(layer, "to_w4a8", to_w4a8)
                raise error
            return to_w4a8(*args, **kwargs)

        monkeypatch.setattr(layer, "to_w4a8", failing)

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
    entries = [json.loads(line.partition(" ")[2]) for line in lines]  # behind its checksum
    return [work_path(out) / "checkpoint" / entry["file"] for entry in entries if "file" in entry]


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
    result = run(source, tmp_path / "out", "--workers", "1")  # of several, another may finish a file before
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


def test_progress_of_a_resumed_conversion_ends_at_the_whole(source: Path, interrupted: Path) -> None:
    """What is finished counts as done, once: a layer that has tensors in finished and in other files is done anew."""
    names = {path.name for path in finished(interrupted)}
    checkpoint = open_checkpoint(source)
    plan = make_plan(checkpoint, Options(max_shard_size=150_000))
    tasks = shard_tasks(plan)
    done, coming = (
        {layer.module for task in tasks if (task.shard.file_name in names) == kept for layer in task.layers}
        for kept in (True, False)
    )
    assert done & coming
    assert done - coming
    seen: list[int] = []
    device = torch.device("cpu")
    result = carry_out(checkpoint, plan, interrupted, device=device, resume=True, progress=seen.append)
    assert sum(seen) == plan.nbytes_in
    assert {layer.plan.module for layer in result.layers} == done | coming


def test_only_what_is_not_finished_is_converted(
    source: Path, interrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers whose files are all finished are not even read."""
    names = {path.name for path in finished(interrupted)}
    checkpoint = open_checkpoint(source)
    plan = make_plan(checkpoint, Options(max_shard_size=150_000))
    begun: list[str] = []

    def recording(plan: LayerPlan, *arguments: Any) -> object:
        begun.append(plan.module)
        return convert_layer(plan, *arguments)

    monkeypatch.setattr("convert_w4a8.conversion.shard.convert_layer", recording)
    carry_out(checkpoint, plan, interrupted, device=torch.device("cpu"), resume=True)
    wanted = {layer.module for task in shard_tasks(plan) if task.shard.file_name not in names for layer in task.layers}
    assert sorted(begun) == sorted(wanted)
    assert len(begun) < len(plan.layers)


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
    assert run(source, tmp_path / "out", "--scales", "reference").exit_code == 0
    before = snapshot(tmp_path / "out")
    assert before != undisturbed

    def killed(_new: Path, out: Path, old: Path) -> None:
        out.rename(old)
        raise KeyboardInterrupt

    monkeypatch.setattr("convert_w4a8.checkpoint.writer.replace_directory", killed)
    assert run(source, tmp_path / "out", "--overwrite").exit_code == 130
    assert not (tmp_path / "out").exists()
    assert snapshot(work_path(tmp_path / "out") / "replaced") == before
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


def make_hole(path: Path) -> None:
    """Leave a file's size and beginning, and nothing of the rest."""
    size = path.stat().st_size
    os.truncate(path, 5000)
    os.truncate(path, size)


def make_directory(path: Path) -> None:
    """Put a directory in a file's place."""
    path.unlink()
    path.mkdir()


DAMAGE: dict[str, Callable[[Path], object]] = {
    "one-bit": flip,
    "cut": lambda path: os.truncate(path, path.stat().st_size - 1),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "a-hole": make_hole,
    "empty": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
    "a-directory": make_directory,
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
    monkeypatch.setattr(fingerprint, "__version__", "99")
    said = run(source, interrupted, "--resume").stderr
    assert "out: version of w4a8-convert: is not what it was" in said
    assert f"resume with version {__version__}, or begin again" in said


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
    assert ".out.w4a8-partial: is a link, and not what a conversion leaves; remove it" in result.stderr
    assert list((tmp_path / "victim").iterdir()) == [tmp_path / "victim" / "checkpoint"]


def test_a_mount_point_is_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OUT is put in its place by a rename, which a mount point (a container's volume) does not allow."""
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda self: self.name == "out")
    result = run(source, tmp_path / "out")
    assert "out: is a mount point, which cannot be replaced; choose a directory inside it" in result.stderr
