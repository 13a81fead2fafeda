"""The Hub, through huggingface_hub: ids to local directories, and converted checkpoints to repositories."""

import glob
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.checkpoint.files import CARD, CONFIG, INDEX, OTHER_FORMATS, PICKLES
from convert_w4a8.errors import ConvertError
from convert_w4a8.version import __version__

_NOT_NEEDED = [f"*{suffix}" for suffix in (*PICKLES, *OTHER_FORMATS)]
"""What is never read nor copied, and so not fetched either."""


def is_hub_id(name: str) -> bool:
    """Whether a name can be meant as org/name[@revision], rather than as a path; a path that exists wins."""
    is_path = os.path.exists(_expanded(name)) or name.startswith((".", "/", "~"))  # noqa: PTH110 - raises nothing
    return not is_path and name.partition("@")[0].count("/") == 1


def _expanded(name: str) -> str:
    return os.path.expanduser(name)  # noqa: PTH111 - leaves `~nosuchuser` as it is


def resolve_input(name: str) -> Path:
    """Return the directory that a path or a Hub id (`org/name`, `org/name@revision`) stands for.

    A local directory wins. A Hub id is downloaded into the Hub's cache, or found there without a network.

    Raises:
        ConvertError: there is no such directory, and the Hub has no such repository or cannot be reached.

    """
    path = Path(_expanded(name))
    if os.path.isdir(path):  # noqa: PTH112  (which takes names that cannot be, and directories that cannot be read)
        return path
    repo_id, _, revision = name.partition("@")
    if not is_hub_id(name):
        raise ConvertError(name, "is not a directory", "give a checkpoint directory or a Hub id (org/name[@revision])")
    from huggingface_hub import snapshot_download  # noqa: PLC0415  (slow to import, and rarely needed)
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError  # noqa: PLC0415

    try:
        return Path(snapshot_download(repo_id, revision=revision or None, ignore_patterns=_NOT_NEEDED))
    except LocalEntryNotFoundError as error:
        raise ConvertError(
            name, "is not in the Hub's cache, and the Hub cannot be reached", "check the id and the network"
        ) from error
    except (HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConvertError(
            name, f"cannot be downloaded ({reason})", "check the id, the revision and `hf auth`"
        ) from error
    except OSError as error:  # the cache, or the token in it
        reason = f"cannot be downloaded ({error.filename or 'the cache'}: {error.strerror or error})"
        raise ConvertError(name, reason, "check the directory of the Hub's cache (HF_HOME)") from error


@dataclass(frozen=True)
class Repository:
    """A model repository on the Hub. A revision is a branch or refs/pr/N; None is the main branch."""

    id: str
    revision: str | None

    @classmethod
    def parse(cls, name: str, revision: str | None = None) -> "Repository":
        """Read org/name or org/name@revision.

        Raises:
            ConvertError: it is neither.

        """
        repo_id, _, at = name.partition("@")
        if repo_id.count("/") != 1 or not all(repo_id.split("/")):
            raise ConvertError(name, "is not a repository on the Hub", "give org/name")
        return cls(repo_id, revision or at or None)


def prepare_repository(repository: Repository, *, private: bool, again: str) -> None:
    """Create the repository and the branch where they are absent, which shows whether the token may write there.

    private: of a new repository; otherwise the owner's default holds.
    again: the command that continues after a failure.

    Raises:
        ConvertError: the Hub cannot be reached or does not allow it.

    """
    from huggingface_hub import HfApi  # noqa: PLC0415  (slow to import)

    with _explained(repository, again):
        api = HfApi()
        api.create_repo(repository.id, private=private or None, exist_ok=True)
        if repository.revision and not repository.revision.startswith("refs/"):
            api.create_branch(repository.id, branch=repository.revision, exist_ok=True)


def upload(repository: Repository, out: Checkpoint, *, again: str, progress: bool) -> str:
    """Upload a converted checkpoint and return its address. Files that arrived in an earlier attempt are skipped.

    Only what belongs to a checkpoint is uploaded: no hidden files, no weights in other formats.

    Raises:
        ConvertError: the repository holds other weights, or the upload failed.

    """
    from huggingface_hub import HfApi  # noqa: PLC0415  (slow to import)
    from huggingface_hub.utils.tqdm import disable_progress_bars  # noqa: PLC0415

    if not progress:
        disable_progress_bars()
    files = {info.path.name for info in out.tensors.values()} | {str(path) for path in out.side_files}
    files |= {name for name in (CONFIG, INDEX, CARD) if (out.root / name).is_file()}
    with _explained(repository, again):
        api = HfApi()
        present = api.list_repo_files(repository.id, revision=repository.revision)
    foreign = sorted(name for name in present if name.endswith((".safetensors", INDEX)) and name not in files)
    if foreign:
        # vLLM would load them together with ours; deleting what may be somebody's only copy is not ours to do.
        raise ConvertError(
            f"{repository.id}: {foreign[0]}",
            f"is on the Hub, but not in {out.root} ({len(foreign)} such)",
            "push to another repository or --revision, or delete it there",
        )
    with _explained(repository, again):
        api.upload_folder(
            repo_id=repository.id,
            revision=repository.revision,
            folder_path=out.root,
            allow_patterns=sorted(map(glob.escape, files)),
            commit_message=f"Upload W4A8 checkpoint (w4a8-convert {__version__})",
        )
        branch = f"/tree/{repository.revision}" if repository.revision else ""
        return f"{api.endpoint}/{repository.id}{branch}"


@contextmanager
def _explained(repository: Repository, again: str) -> Iterator[None]:
    """Turn whatever the client raises into one line that says what to do.

    What that is depends on its version and on the protocol: errors of requests, httpx or hf_xet, some of them wrapped.
    """
    try:
        yield
    except KeyboardInterrupt as interrupt:
        interrupt.add_note(_continue(again))
        raise
    except Exception as error:
        raise _explain(error, repository.id, again) from error


def _explain(error: Exception, repo_id: str, again: str) -> ConvertError:
    response = getattr(error, "response", None)
    cause: BaseException = error
    while response is None and cause.__cause__ is not None:
        cause = cause.__cause__
        response = getattr(cause, "response", None)
    status = getattr(response, "status_code", None)
    if status == 401:
        return ConvertError(
            repo_id,
            "the Hub does not accept your token, or there is none (401)",
            f"run `hf auth login` or set HF_TOKEN, then: {again}",
        )
    if status == 403:
        owner = repo_id.partition("/")[0]
        return ConvertError(
            repo_id, "your token may not write there (403)", f"use a token with write access to {owner}, then: {again}"
        )
    if status == 404:
        return ConvertError(repo_id, "no such repository or revision on the Hub (404)", "check the name")
    if status is not None and (status == 429 or status >= 500):
        return ConvertError(repo_id, f"the Hub failed ({status})", _continue(again))
    if isinstance(cause, json.JSONDecodeError):  # an error page where the client expects JSON
        return ConvertError(repo_id, "the Hub failed (its answer is not JSON)", _continue(again))
    message = getattr(cause, "server_message", None) or str(cause)
    lines = _without_token(message).split("\n")
    detail = next((line.strip() for line in lines if line.strip()), type(cause).__name__)
    if status is not None or isinstance(cause, ValueError):
        return ConvertError(repo_id, f"the Hub refused ({detail})", f"mend that, then: {again}")
    return ConvertError(repo_id, f"the upload broke off ({type(cause).__name__}: {detail})", _continue(again))


def _continue(again: str) -> str:
    return f"run this to continue; what has arrived is not sent again: {again}"


def _without_token(text: str) -> str:
    from huggingface_hub import get_token  # noqa: PLC0415  (slow to import)

    token = get_token()
    return text.replace(token, "(token)") if token else text
