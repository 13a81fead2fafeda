"""Parts of a checkpoint on the Hub, for those who need few of its tensors: headers first, then chosen tensors.

Each safetensors file becomes a local file of the same size with holes where nothing was fetched, so that all that works
on a directory works here, as long as it reads no other tensors.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert_w4a8.checkpoint.directory import CARD, CONFIG, INDEX, QUANTIZE_CONFIG, Checkpoint, open_checkpoint
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
            with info.path.open("r+b") as file:
                file.seek(info.start)
                for start in range(info.start, info.start + info.nbytes, _PIECE):
                    size = min(_PIECE, info.start + info.nbytes - start)
                    file.write(_read(self.repo_id, self.commit, info.path.name, start, size)[0])


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
    _check_names(name, files)
    for file in files:
        if file in (CONFIG, QUANTIZE_CONFIG, INDEX, CARD):
            (directory / file).write_bytes(_read(repo_id, commit, file)[0])
        elif file.endswith(".safetensors") and "/" not in file:
            _write_header(repo_id, commit, directory / file)
    return RemoteCheckpoint(open_checkpoint(directory), repo_id, commit)


def _check_names(name: str, files: Iterable[str]) -> None:
    """Raise ConvertError for names that are no file names here, whatever the Hub says."""
    for file in files:
        if file.endswith(".safetensors") and "/" not in file and not _NAME.fullmatch(file):
            raise ConvertError(f"{name}: {file}", "is no name of a file", "rename it on the Hub")


def _write_header(repo_id: str, commit: str, path: Path) -> None:
    prefix, total = _read(repo_id, commit, path.name, 0, 8)
    length = int.from_bytes(prefix, "little")
    if not 2 <= length <= min(total - 8, _MAX_HEADER_BYTES):
        raise ConvertError(
            f"{repo_id}: {path.name}", f"header length {length} does not fit a file of {total} bytes", "upload it again"
        )
    header, _ = _read(repo_id, commit, path.name, 8, length)
    with path.open("wb") as file:
        file.write(prefix + header)
        try:
            file.truncate(total)
        except (OSError, OverflowError) as error:
            reason = f"has {total} bytes, as the Hub says, which no file here can have"
            raise ConvertError(f"{repo_id}: {path.name}", reason, "check the file on the Hub") from error


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
