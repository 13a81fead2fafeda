# ruff: noqa: PTH104, PTH208  (names as bytes)
"""Directories and names that the system or a library cannot read: one line, before anything is written."""

import os
from pathlib import Path

import pytest
from checkpoint_edits import write_case

from convert_w4a8 import ConvertError, convert, open_checkpoint
from convert_w4a8.hub.repository import is_hub_id, resolve_input


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Write a checkpoint."""
    return write_case("gptq-v1", tmp_path / "in").path


def refusal(source: Path) -> str:
    """Return why a checkpoint cannot be opened."""
    with pytest.raises(ConvertError) as caught:
        open_checkpoint(source)
    return str(caught.value)


@pytest.mark.parametrize("name", ["README.md", "config.json", "model.safetensors.index.json", "extra.json"])
def test_links_in_a_circle(source: Path, name: str) -> None:
    """A link to itself leads nowhere: Python says so by an error of its own."""
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(name)
    if name == "extra.json":  # is left out, as any link to nothing
        assert list(map(str, open_checkpoint(source).left_out)) == ["extra.json (a link to nothing)"]
    else:
        assert f"{source / name}: is a link that leads nowhere" in refusal(source)


@pytest.mark.parametrize("path", ["d" * 300, "/".join(["d" * 200] * 25)], ids=["name", "path"])
def test_names_that_are_too_long(tmp_path: Path, path: str) -> None:
    """What cannot be a path is no directory."""
    for resolve in (resolve_input, open_checkpoint):
        with pytest.raises(ConvertError, match="is not a directory"):
            resolve(str(tmp_path / path))


def test_a_home_that_there_is_not() -> None:
    """Neither a path nor an id."""
    assert not is_hub_id("~nosuchuser/name")
    with pytest.raises(ConvertError, match="is not a directory"):
        resolve_input("~nosuchuser/name")


def test_weights_whose_name_is_not_utf8(source: Path) -> None:
    """The safetensors library, by which the output is verified, opens no such file."""
    os.rename(source / "model.safetensors", os.fsencode(source) + b"/caf\xe9.safetensors")
    assert "has a name that is not UTF-8" in (line := refusal(source))
    assert line.isprintable()


def test_other_names_that_are_not_utf8_are_copied(source: Path, tmp_path: Path) -> None:
    """Names of side files are bytes, and stay them."""
    path = os.fsencode(source) + b"/caf\xe9.txt"
    Path(os.fsdecode(path)).write_bytes(b"x")
    convert(source, tmp_path / "out")
    assert b"caf\xe9.txt" in os.listdir(os.fsencode(tmp_path / "out"))


def test_an_output_whose_name_is_not_utf8(source: Path, tmp_path: Path) -> None:
    """It could not be verified: that is said before the work."""
    out = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    with pytest.raises(ConvertError, match="is not UTF-8"):
        convert(source, out)
    assert os.listdir(tmp_path) == ["in"]


def test_an_output_behind_links_in_a_circle(source: Path, tmp_path: Path) -> None:
    """OUT is not followed to where it leads, as it leads nowhere."""
    (tmp_path / "loop").symlink_to("loop")
    for out in (tmp_path / "loop", tmp_path / "loop" / "out"):
        with pytest.raises(ConvertError, match=r"leads nowhere|not a directory"):
            convert(source, out)


def test_what_may_not_be_read_is_said_before_the_work(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a side file too, which is copied when all layers are converted. Played, since root may read everything."""
    secret = source / "tokenizer.json"
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != secret and allowed(path, mode))
    assert f"{secret}: cannot be read (Permission denied)" in refusal(source)


def test_a_directory_that_may_not_be_looked_into(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the system refuses within IN is one line."""

    def fail(_self: Path) -> None:
        raise PermissionError(13, "Permission denied", str(source / "sub"))

    monkeypatch.setattr(Path, "iterdir", fail)
    assert f"{source / 'sub'}: cannot be read (Permission denied)" in refusal(source)


def test_headers_of_tensors_without_a_byte(source: Path) -> None:
    """A file of kilobytes could hold millions of them, each of which would be planned and copied."""
    path = source / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    entries = ",".join(f'"n{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for i in range(20_000))
    header = b"{" + entries.encode() + b"," + raw[9 : 8 + length]
    path.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])
    assert "holds 20,000 tensors without a byte" in refusal(source)
