"""What the output of a conversion depends on."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.checkpoint.files import CARD, CONFIG, SETTINGS_FILES
from convert_w4a8.checkpoint.journal import VERSION
from convert_w4a8.errors import ConvertError
from convert_w4a8.version import __version__


def fingerprint(checkpoint: Checkpoint, options: Any, device: str | None = None) -> dict[str, Any]:
    """Describe a conversion by all that its output depends on, as JSON; `options` is a dataclass.

    Weights count by size, time of change and header: reading them all would take as long as converting them.
    device: the kind (`devices.kind_of`) where the bytes depend on it, as those of `codebooks` do; None where all
    devices write the same.
    """
    found: dict[str, Any] = {VERSION: __version__}
    for key, value in asdict(options).items():
        found[f"--{key.replace('_', '-')}"] = value
    if device is not None:
        found["device"] = device
    relatives = {path.relative_to(checkpoint.root) for path in {info.path for info in checkpoint.tensors.values()}}
    relatives |= {*checkpoint.side_files, *map(Path, (CONFIG, *SETTINGS_FILES, CARD))}
    for relative in sorted(relatives):
        path = checkpoint.root / relative
        if path.is_file():
            status = path.stat()
            found[str(relative)] = [status.st_size, status.st_mtime_ns]
    infos = sorted(checkpoint.tensors.values(), key=lambda info: info.name)
    found["headers"] = _digest((info.name, info.dtype, info.shape, info.path.name, info.start) for info in infos)
    found["configuration"] = _digest([checkpoint.config, checkpoint.quantization_config])
    return found


def check_unchanged(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Raise ConvertError where the input is not what it was when the conversion began."""
    for key in before.keys() | after.keys():
        if before.get(key) != after.get(key):
            raise ConvertError(
                key, "changed while it was converted", "wait until nothing writes to the input, and convert it again"
            )


def _digest(values: Iterable[object]) -> str:
    """Return a digest of JSON values, one after another: all headers at a time may be hundreds of megabytes."""
    found = hashlib.sha256()
    for value in values:
        found.update(json.dumps(value).encode() + b"\n")
    return found.hexdigest()
