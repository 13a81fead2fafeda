"""Nothing is lost: what may be replaced, who may read an output, and inputs and outputs that change meanwhile."""

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_edits import snapshot, write_case
from safetensors import SafetensorError

from convert_w4a8 import ConvertError, Options, convert, verify
from convert_w4a8.checkpoint import writer
from convert_w4a8.conversion import memory, shard
from convert_w4a8.conversion.layer import convert_layer
from convert_w4a8.errors import DiskError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Write a small checkpoint."""
    return write_case("gptq-side-files", tmp_path / "in").path


@pytest.fixture
def out(source: Path, tmp_path: Path) -> Path:
    """Convert it."""
    convert(source, tmp_path / "out", device="cpu")
    return tmp_path / "out"


# What may be replaced.


@pytest.mark.parametrize("output", ["lut", "compressed-tensors"])
def test_an_output_is_replaced(source: Path, tmp_path: Path, output: str) -> None:
    """Ours, of either format, by a conversion to either."""
    convert(source, tmp_path / "out", Options(format=output), device="cpu")
    convert(source, tmp_path / "out", Options(format="lut"), device="cpu", overwrite=True)
    assert verify(tmp_path / "out", source).problems == ()


def a_thesis(directory: Path, _source: Path) -> None:
    """Leave something that nobody has a copy of."""
    (directory / "thesis.tex").write_text("x")


def another_model(directory: Path, source: Path) -> None:
    """Leave a source checkpoint."""
    shutil.copytree(source, directory, dirs_exist_ok=True)


def an_output_and_more(directory: Path, source: Path) -> None:
    """Leave an output into which somebody put something."""
    directory.rmdir()
    convert(source, directory, device="cpu")
    (directory / "notes").mkdir()
    (directory / "notes" / "results.csv").write_text("x")


def an_output_and_a_link(directory: Path, source: Path) -> None:
    """Leave an output with a link to somewhere else."""
    directory.rmdir()
    convert(source, directory, device="cpu")
    (directory / "link").symlink_to(directory.parent)


@pytest.mark.parametrize("leave", [a_thesis, another_model, an_output_and_more, an_output_and_a_link])
def test_what_no_conversion_wrote_is_not_replaced(
    leave: Callable[[Path, Path], None], source: Path, tmp_path: Path
) -> None:
    """`--overwrite` deletes an output of ours, and nothing else."""
    directory = tmp_path / "precious"
    directory.mkdir()
    leave(directory, source)
    before = snapshot(directory)
    with pytest.raises(ConvertError, match=r"not replaced|would be deleted"):
        convert(source, directory, device="cpu", overwrite=True)
    assert snapshot(directory) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "precious"]


@pytest.mark.parametrize("where", [".", "..", "../..", ""])
def test_the_working_directory_is_no_output(
    where: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is one above it, empty or not: `$OUT` may be an empty string."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    for overwrite in (False, True):
        with pytest.raises(ConvertError, match=r"working directory|overlaps"):
            convert(source, where, device="cpu", overwrite=overwrite)
    assert (tmp_path / "a" / "b").is_dir()


# Who may read it.


@pytest.mark.parametrize(("directory", "file"), [(0o700, 0o600), (0o750, 0o640), (0o755, 0o644)], ids=oct)
def test_a_private_model_stays_private(directory: int, file: int, source: Path, tmp_path: Path) -> None:
    """Nobody may read the output who may not read the input."""
    for path in source.rglob("*"):
        path.chmod(directory if path.is_dir() else file)
    source.chmod(directory)
    before = os.umask(0o022)
    try:
        convert(source, tmp_path / "out", Options(max_shard_size=100_000), device="cpu")
    finally:
        os.umask(before)
    found = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert found == {file & ~0o022}
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == directory & ~0o022


def test_one_private_file_is_enough(source: Path, tmp_path: Path) -> None:
    """A side file keeps its own mode; weights go where the most private weight may go."""
    (source / "tokenizer.json").chmod(0o600)
    (source / "model.safetensors").chmod(0o600)
    convert(source, tmp_path / "out", device="cpu")
    assert stat.S_IMODE((tmp_path / "out" / "tokenizer.json").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "out" / "config.json").stat().st_mode) & 0o044
    assert stat.S_IMODE((tmp_path / "out" / "model.safetensors").stat().st_mode) == 0o600
    (source / "model.safetensors").chmod(0o640)
    convert(source, tmp_path / "out2", device="cpu")
    assert stat.S_IMODE((tmp_path / "out2" / "model.safetensors").stat().st_mode) == 0o640


# What changes meanwhile.


def test_an_input_that_changes_is_noticed(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A download that still runs: half of the one and half of the other never becomes an output."""
    count = 0
    original = convert_layer

    def changing(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == 5:
            new = tmp_path / "new"
            shutil.copy(source / "model.safetensors", new)
            new.rename(source / "model.safetensors")
        return original(*arguments)

    monkeypatch.setattr(shard, "convert_layer", changing)
    with pytest.raises(ConvertError, match=r"model\.safetensors: changed while it was converted"):
        convert(source, tmp_path / "out", device="cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_something_in_the_place_of_the_output_costs_no_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It appeared while the conversion ran: what is finished is kept, and `--resume` is named."""
    original = writer.CheckpointWriter.commit

    def late(self: writer.CheckpointWriter) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "other").write_text("x")
        original(self)

    with monkeypatch.context() as patch:
        patch.setattr(writer.CheckpointWriter, "commit", late)
        with pytest.raises(ConvertError, match="is not empty") as caught:
            convert(source, tmp_path / "out", device="cpu")
    assert any("--resume" in note for note in caught.value.__notes__)
    shutil.rmtree(tmp_path / "out")
    monkeypatch.setattr(shard, "convert_layer", None)  # nothing is converted again
    convert(source, tmp_path / "out", device="cpu", resume=True)
    assert verify(tmp_path / "out", source).problems == ()


def test_what_the_library_cannot_read_does_not_become_an_output(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file is opened with the safetensors library before the rename."""

    def broken(*_: Any, **__: Any) -> None:
        raise SafetensorError("a bug of ours")

    monkeypatch.setattr(writer, "safe_open", broken)
    with pytest.raises(SafetensorError):
        convert(source, tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


# Memory.


def test_a_layer_that_is_larger_than_the_memory_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is read, as a disk that is too small."""
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    with pytest.raises(ConvertError, match=r"needs [\d,]+ bytes of memory, there are 1,000"):
        convert(source, tmp_path / "out", device="cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")]
)
def test_a_failed_allocation_is_one_line(
    error: Exception, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layer is named, and it is no bug of ours."""

    def full(*_: Any) -> None:
        raise error

    monkeypatch.setattr(shard, "convert_layer", full)
    with pytest.raises(DiskError, match=r"model\.layers.*: does not fit into the memory"):
        convert(source, tmp_path / "out", device="cpu")


def test_the_memory_that_there_is_is_known() -> None:
    """On Linux, where the tests run."""
    found = memory.available_memory()
    assert found is not None
    assert 1 << 26 < found < 1 << 50
