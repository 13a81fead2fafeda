"""Files that commands write where an option or a variable says: pipes, links, devices, disks that are full."""

import os
import socket
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoint_edits import snapshot

from convert_w4a8.cli.files import append_to_file, check_writable, write_files
from convert_w4a8.errors import ConvertError

Write = Callable[[Path], None]
WRITE: dict[str, Write] = {
    "write": lambda path: write_files({path: b"new"}),
    "append": lambda path: append_to_file(path, b"new"),
}


@pytest.fixture(params=WRITE)
def write(request: pytest.FixtureRequest) -> Write:
    """Return each way to write."""
    return WRITE[request.param]


def make(kind: str, place: Path) -> Path:
    """Make something that is no file to write to; return its path."""
    path = place / "report.html"
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "link to a pipe":
            os.mkfifo(place / "pipe")
            path.symlink_to("pipe")
        case "link to nothing":
            path.symlink_to("nowhere")
        case "link to a file":
            (place / "somebody's").write_bytes(b"theirs")
            path.symlink_to("somebody's")
        case "link in a circle":
            path.symlink_to("report.html")
        case "directory":
            path.mkdir()
        case "socket":
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(str(path))
        case "below a file":
            path.write_bytes(b"x")
            path = path / "x"
    return path


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("pipe", "nobody reads from it"),
        ("link to a pipe", "nobody reads from it"),
        ("link to nothing", "it is a link; name the file that it leads to"),
        ("link to a file", "it is a link; name the file that it leads to"),
        ("link in a circle", "Too many levels of symbolic links"),
        ("directory", "it is a directory"),
        ("socket", "it is a socket"),
        ("below a file", "Not a directory"),
    ],
)
def test_what_is_no_file_is_neither_waited_for_nor_followed(
    kind: str, reason: str, write: Write, tmp_path: Path
) -> None:
    """One line, at once, and nothing has changed; all but pipes are found before the work."""
    path = make(kind, tmp_path)
    before = snapshot(tmp_path)
    if "pipe" not in kind:
        with pytest.raises(ConvertError, match="cannot be written"):
            check_writable(path)
    with pytest.raises(ConvertError, match=r"cannot be written") as caught:
        write(path)
    assert f"({reason})" in caught.value.problem.reason or kind == "below a file"
    assert snapshot(tmp_path) == before


def test_a_pipe_that_is_read_is_written_to(write: Write, tmp_path: Path) -> None:
    """As `--html >(gzip > report.gz)` makes one."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with (reader := os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")):
        check_writable(path)
        write(path)
        assert reader.read() == b"new"


def test_much_goes_through_a_pipe(tmp_path: Path) -> None:
    """More than one holds: what writes waits for what reads."""
    path, content, found = tmp_path / "pipe", bytes(1 << 20), bytearray()
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(reader, True)

    def read() -> None:
        while len(found) < len(content):
            found.extend(os.read(reader, 4096))  # empty before there is a writer

    thread = threading.Thread(target=read)
    thread.start()
    write_files({path: content})
    thread.join()
    os.close(reader)
    assert found == content


def test_devices_and_open_files_are_written_to(write: Write, tmp_path: Path) -> None:
    """/dev/null, and /dev/fd/N, which is a link."""
    write(Path(os.devnull))
    with (tmp_path / "file").open("wb") as file:
        path = Path(f"/dev/fd/{file.fileno()}")
        check_writable(path)
        write(path)
    assert (tmp_path / "file").read_bytes() == b"new"


def test_a_full_device_is_one_line(write: Write) -> None:
    """Whatever is in the way, the line says."""
    with pytest.raises(ConvertError, match=r"/dev/full: cannot be written \(No space left on device\)"):
        write(Path("/dev/full"))


def test_a_file_is_replaced_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its mode stays; a disk that fills up leaves the old one, and nothing beside it."""
    path = tmp_path / "a" / "baseline.json"
    write_files({path: b"old"})
    path.chmod(0o640)
    write_files({path: b"new"})
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640

    def full(*_: object) -> int:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(ConvertError, match="No space left"):
        write_files({path: b"newer"})
    monkeypatch.undo()
    assert path.read_bytes() == b"new"
    assert [found.name for found in path.parent.iterdir()] == ["baseline.json"]


@pytest.mark.parametrize("number", [13, 16, 30])
def test_a_file_in_a_directory_that_may_not_change_is_written_in_place(
    number: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A file that was mounted into a container cannot be replaced, and one in a directory of others neither."""
    path = tmp_path / "baseline.json"
    path.write_bytes(b"a longer one")

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "replace", refuse)
    write_files({path: b"new"})
    assert path.read_bytes() == b"new"
    assert [found.name for found in tmp_path.iterdir()] == ["baseline.json"]


def test_a_new_file_has_the_mode_of_new_files(write: Write, tmp_path: Path) -> None:
    """As the umask says."""
    old = os.umask(0o027)
    try:
        write(tmp_path / "file")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_what_is_there_stays_when_something_is_appended(tmp_path: Path) -> None:
    """A job's summary has what other steps wrote."""
    (tmp_path / "file").write_bytes(b"old ")
    append_to_file(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old new"
