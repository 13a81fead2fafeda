"""A work directory that somebody else made or changed: nothing elsewhere is read, written, made or deleted."""

import os
import zlib
from pathlib import Path
from typing import Any

import pytest
from checkpoint_edits import snapshot, write_case

from convert_w4a8 import ConvertError, Options, convert, verify
from convert_w4a8.checkpoint.journal import CHECKPOINT, JOURNAL, LOCK, REPLACED, work_path
from convert_w4a8.conversion import shard
from convert_w4a8.conversion.layer import convert_layer

OPTIONS = Options(max_shard_size=100_000)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Write a small checkpoint beside something precious."""
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "precious").write_text("precious")
    return write_case("gptq-v1", tmp_path / "in").path


@pytest.fixture
def interrupted(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Leave the work directory of a conversion that was interrupted half-way."""
    count, original = 0, convert_layer

    def stopping(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count > 9:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(shard, "convert_layer", stopping)
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "out", OPTIONS, device="cpu")
    work = work_path(tmp_path / "out")
    assert len((work / JOURNAL).read_bytes().splitlines()) > 2
    return work


@pytest.mark.parametrize("name", [LOCK, JOURNAL, CHECKPOINT, REPLACED])
@pytest.mark.parametrize("target", ["../victim", "../victim/precious", "../absent"])
def test_links_in_a_new_work_directory(name: str, target: str, source: Path, tmp_path: Path) -> None:
    """None of them is followed."""
    work = work_path(tmp_path / "out")
    work.mkdir()
    (work / name).symlink_to(target)
    before = snapshot(tmp_path / "victim")
    for resume in (False, True):
        with pytest.raises(ConvertError, match="not what a conversion leaves"):
            convert(source, tmp_path / "out", OPTIONS, device="cpu", resume=resume)
    assert snapshot(tmp_path / "victim") == before
    assert not (tmp_path / "absent").exists()
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_swapped(interrupted: Path, source: Path, tmp_path: Path) -> None:
    """`checkpoint` becomes a link: what it leads to is not emptied, and does not become OUT."""
    (interrupted / CHECKPOINT).rename(tmp_path / "elsewhere")
    (interrupted / CHECKPOINT).symlink_to(tmp_path / "victim")
    with pytest.raises(ConvertError, match="is a link"):
        convert(source, tmp_path / "out", OPTIONS, device="cpu", resume=True)
    assert (tmp_path / "victim" / "precious").read_text() == "precious"
    assert not (tmp_path / "out").exists()


def test_a_pipe_does_not_block(source: Path, tmp_path: Path) -> None:
    """Opening one for reading would wait for ever."""
    work = work_path(tmp_path / "out")
    work.mkdir()
    os.mkfifo(work / JOURNAL)
    with pytest.raises(ConvertError, match="is not a file"):
        convert(source, tmp_path / "out", OPTIONS, device="cpu")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give directories away")
def test_somebody_else_s_directory(source: Path, tmp_path: Path) -> None:
    """Where OUT's parent is writable for others, as /tmp is."""
    work = work_path(tmp_path / "out")
    work.mkdir()
    os.chown(work, 12345, 12345)
    with pytest.raises(ConvertError, match="belongs to another user"):
        convert(source, tmp_path / "out", OPTIONS, device="cpu")


def test_nobody_else_looks_into_ours(interrupted: Path) -> None:
    """Nor into the journal."""
    assert interrupted.stat().st_mode & 0o077 == 0
    assert (interrupted / JOURNAL).stat().st_mode & 0o077 == 0


def test_every_byte_of_the_journal_counts(interrupted: Path, source: Path, tmp_path: Path) -> None:
    """Whatever a byte becomes: the conversion ends right, or says in one line why not; never with other statistics."""
    convert(source, tmp_path / "expected", OPTIONS, device="cpu")
    expected = snapshot(tmp_path / "expected")
    whole = snapshot(interrupted)
    journal = whole[JOURNAL]
    for place in range(0, len(journal), max(1, len(journal) // 16)):
        for byte in (journal[place] ^ 1, ord("9")):
            (interrupted / JOURNAL).write_bytes(journal[:place] + bytes([byte]) + journal[place + 1 :])
            refused = ""
            try:
                convert(source, tmp_path / "out", OPTIONS, device="cpu", resume=True)
            except ConvertError as error:
                refused = str(error)
            if refused:  # the first line, which says what was converted
                assert "interrupted" in refused
            else:
                assert snapshot(tmp_path / "out") == expected
            _restore(tmp_path, interrupted, whole)


def _restore(directory: Path, work: Path, whole: dict[str, bytes]) -> None:
    """Put the work directory back as it was, and take the output away."""
    for path in sorted((directory / "out").rglob("*"), reverse=True):
        path.unlink()
    if (directory / "out").exists():
        (directory / "out").rmdir()
    (work / CHECKPOINT).mkdir(parents=True, exist_ok=True)
    for name, content in whole.items():
        (work / name).write_bytes(content)


def test_a_journal_with_right_checksums_and_wrong_content(interrupted: Path, source: Path, tmp_path: Path) -> None:
    """Somebody who can compute CRC-32 can lie about a file; its own checksums still tell."""
    lines = (interrupted / JOURNAL).read_bytes().splitlines()
    text = lines[1].partition(b" ")[2].replace(b'"pieces": [[0,', b'"pieces": [[1,', 1)
    lines[1] = b"%08x %s" % (zlib.crc32(text), text)
    (interrupted / JOURNAL).write_bytes(b"\n".join(lines) + b"\n")
    convert(source, tmp_path / "out", OPTIONS, device="cpu", resume=True)
    assert verify(tmp_path / "out", source).problems == ()
