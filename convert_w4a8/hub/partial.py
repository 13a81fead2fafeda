"""Parts of a checkpoint on the Hub, for those who need few of its tensors: headers first, then chosen tensors.

Each safetensors file becomes a local file of the same size with holes where nothing was fetched, so that all that works
on a directory works here, as long as it reads no other tensors.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert_w4a8.checkpoint.directory import Checkpoint, open_checkpoint
from convert_w4a8.checkpoint.files import SAFETENSORS, describes
from convert_w4a8.checkpoint.weights import files_in_index
from convert_w4a8.errors import ConvertError

_PIECE = 64 << 20
_MAX_HEADER_BYTES = 100_000_000
"""As safetensors itself allows."""
_NAME = re.compile(r"[^\x00-\x1f\x7f\ud800-\udfff]{1,200}")
"""Names of weights, in characters; the system allows 255 bytes."""
_TOTAL = re.compile(r"/([0-9]{1,18})\Z")
"""The size of the whole file at the end of a Content-Range."""


@dataclass(frozen=True)
class RemoteCheckpoint:
    """A checkpoint whose headers are here, and whose tensors are on the Hub until `fetch` brings them."""

    checkpoint: Checkpoint
    repo_id: str
    commit: str

    def fetch(self, names: Iterable[str]) -> None:
        """Bring tensors, one after another.

        Raises:
            ConvertError: the Hub cannot be reached, or sends something else.

        """
        for name in names:
            info = self.checkpoint.tensors[name]
            remote = info.path.relative_to(self.checkpoint.root).as_posix()
            with info.path.open("r+b") as file:
                file.seek(info.start)
                for start in range(info.start, info.start + info.nbytes, _PIECE):
                    size = min(_PIECE, info.start + info.nbytes - start)
                    file.write(_read(self.repo_id, self.commit, remote, start, size)[0])


def open_remote(name: str, directory: Path) -> RemoteCheckpoint:
    """Bring the configuration, the index and the headers of org/name[@revision] into an empty directory.

    Raises:
        ConvertError: the Hub cannot be reached, has no such repository, or its files are damaged.

    """
    from huggingface_hub import HfApi  # noqa: PLC0415  (slow to import)

    repo_id, _, revision = name.partition("@")
    try:
        commit = str(HfApi().model_info(repo_id, revision=revision or None).sha)
        files = HfApi().list_repo_files(repo_id, revision=commit)
    except Exception as error:
        raise _unreachable(name, error) from error
    at_the_top = [file for file in files if "/" not in file and (describes(file) or file.endswith(SAFETENSORS))]
    _check_names(name, at_the_top)
    for file in at_the_top:
        if describes(file):
            (directory / file).write_bytes(_read(repo_id, commit, file)[0])
        else:
            _write_header(repo_id, commit, directory, file)
    below = sorted(file for file in files_in_index(directory) & set(files) if "/" in file)
    _check_names(name, below)
    for file in below:
        (directory / file).parent.mkdir(parents=True, exist_ok=True)
        _write_header(repo_id, commit, directory, file)
    return RemoteCheckpoint(open_checkpoint(directory), repo_id, commit)


def _check_names(name: str, files: Iterable[str]) -> None:
    """Raise ConvertError for names that are no file names here, whatever the Hub says."""
    for file in files:
        if not all(map(_NAME.fullmatch, file.split("/"))):
            raise ConvertError(f"{name}: {file}", "is no name of a file", "rename it on the Hub")


def _write_header(repo_id: str, commit: str, directory: Path, file: str) -> None:
    path = directory / file
    prefix, total = _read(repo_id, commit, file, 0, 8)
    length = int.from_bytes(prefix, "little")
    if not 2 <= length <= min(total - 8, _MAX_HEADER_BYTES):
        raise ConvertError(
            f"{repo_id}: {file}", f"header length {length} does not fit a file of {total} bytes", "upload it again"
        )
    header, _ = _read(repo_id, commit, file, 8, length)
    with path.open("wb") as stream:
        stream.write(prefix + header)
        try:
            stream.truncate(total)
        except (OSError, OverflowError) as error:
            reason = f"has {total} bytes, as the Hub says, which no file here can have"
            raise ConvertError(f"{repo_id}: {file}", reason, "check the file on the Hub") from error


def _read(repo_id: str, commit: str, file: str, start: int = 0, size: int | None = None) -> tuple[bytes, int]:
    """Return some of a file's bytes, or all of them, and the size of the file."""
    from huggingface_hub import hf_hub_url, utils  # noqa: PLC0415  (slow to import)

    try:
        headers: dict[str, Any] = utils.build_hf_headers()  # type: ignore[attr-defined]
        if size is not None:
            headers["Range"] = f"bytes={start}-{start + size - 1}"
        url = hf_hub_url(repo_id, file, revision=commit)
        response = utils.http_backoff("GET", url, headers=headers)  # type: ignore[attr-defined]
        utils.hf_raise_for_status(response)  # type: ignore[attr-defined]
    except Exception as error:
        raise _unreachable(f"{repo_id}: {file}", error) from error
    content: bytes = response.content
    if size is None:
        return content, len(content)
    total = _TOTAL.search(response.headers.get("Content-Range", ""))
    if response.status_code != 206 or len(content) != size or total is None:
        raise ConvertError(f"{repo_id}: {file}", "cannot be fetched in parts", "download the checkpoint first")
    return content, int(total[1])


def _unreachable(subject: str, error: Exception) -> ConvertError:
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return ConvertError(
        subject, f"cannot be fetched ({reason})", "check the id, the revision, `hf auth` and the network"
    )
