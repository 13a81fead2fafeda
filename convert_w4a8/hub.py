"""Hub ids to local directories, through huggingface_hub."""

from pathlib import Path

from convert_w4a8.errors import ConvertError

# Weights in other formats are never read, so they are not fetched.
_NOT_NEEDED = ["*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "*.h5", "*.msgpack"]


def resolve_input(name: str) -> Path:
    """Return the directory that a path or a Hub id (`org/name`, `org/name@revision`) stands for.

    A local directory wins. A Hub id is downloaded into the Hub's cache, or found there without a network.

    Raises:
        ConvertError: there is no such directory, and the Hub has no such repository or cannot be reached.

    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    repo_id, _, revision = name.partition("@")
    if path.exists() or repo_id.count("/") != 1 or name.startswith((".", "/", "~")):
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
