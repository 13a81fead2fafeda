"""What an interrupted training leaves beside OUT: `.OUT.w4a8-distill`, from which `--resume` continues.

    state.json               the fingerprint of the training, the last step, and the curve
    state-STEP.safetensors   values and moments at that step, the best values so far, and the first measurement;
                             of several processes with parts of the models state-STEP-I-of-N.safetensors, what each has

The JSON file is replaced when the tensors are on the disk, so the two always belong together. Nothing is unpickled.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from convert_w4a8.checkpoint.disk import disk_errors, fsync
from convert_w4a8.checkpoint.journal import BEGIN_AGAIN, check_same
from convert_w4a8.devices import is_out_of_memory
from convert_w4a8.errors import ConvertError, DiskError

_SUFFIX = ".w4a8-distill"
_NOTES = "state.json"


@dataclass(frozen=True)
class Saved:
    """A state that was kept: JSON notes and tensors."""

    notes: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]


class StateDirectory:
    """The directory of one output. Whoever uses it holds the lock of the output's work directory."""

    def __init__(self, out: Path) -> None:
        self.path = out.parent / f".{out.name}{_SUFFIX}"
        self._out = out

    @property
    def is_kept_here(self) -> bool:
        """Whether this process is one of those that keep tensors."""
        return True

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Refuse what another training left, unless it is to be continued or replaced.

        Raises:
            ConvertError: there is one, or what lies there is not ours.

        """
        if self.path.is_symlink() or (self.path.exists() and self.path.lstat().st_uid != os.geteuid()):
            raise ConvertError(
                str(self.path), "is not what a training leaves", "remove it, or choose another output path"
            )
        if (self.path / _NOTES).is_file() and not (resume or overwrite):
            raise ConvertError(
                str(self.path),
                f"is left of a training to {self._out.name} that was interrupted",
                "pass --resume to continue it, or --overwrite to begin again",
            )

    def load(self, fingerprint: Mapping[str, Any]) -> Saved | None:
        """Return the state that was kept, if there is one.

        Raises:
            ConvertError: it is of another training, or damaged.

        """
        notes = self.notes(fingerprint)
        if notes is None:
            return None
        try:
            return Saved(notes, load_file(self.file(int(notes["step"]))))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ConvertError(str(self.path), f"cannot be read ({error})", BEGIN_AGAIN) from error

    def notes(self, fingerprint: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Return the notes of the state that was kept, if there is one; raises as `load` does."""
        if not (self.path / _NOTES).is_file():
            return None
        try:
            notes: Mapping[str, Any] = json.loads((self.path / _NOTES).read_text(encoding="utf-8"))
            kept: Mapping[str, Any] = dict(notes["fingerprint"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConvertError(str(self.path), f"cannot be read ({error})", BEGIN_AGAIN) from error
        check_same(kept, fingerprint, self._out.name, "training")
        return notes

    @contextmanager
    def understood(self) -> Iterator[None]:
        """Turn into one line what a state raises that is not as this version of the package writes it.

        Raises:
            ConvertError: it is not.

        """
        try:
            yield
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            reason = "is not what this version keeps of a training, or is damaged"
            raise ConvertError(str(self.path), reason, BEGIN_AGAIN) from error

    def save(self, step: int, notes: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep a state, whole or not at all, and forget those before it."""
        with disk_errors(self.path):
            self.path.mkdir(mode=0o700, exist_ok=True)
            save_tensors(tensors, self.file(step))
            self._finish(step, notes)

    def _files(self, step: int) -> list[Path]:
        """Return where all tensors of a step are."""
        return [self.path / f"state-{step}.safetensors"]

    def file(self, step: int) -> Path:
        """Return where this process has those that it keeps."""
        return self._files(step)[0]

    def _finish(self, step: int, notes: Mapping[str, Any]) -> None:
        """Say that all tensors are there, and remove those of earlier steps."""
        replace_text(json.dumps({**notes, "step": step}), self.path / _NOTES)
        files = self._files(step)
        for old in self.path.glob("state-*.safetensors"):
            if old not in files:
                old.unlink()

    def remove(self) -> None:
        """Remove it, if there is one."""
        shutil.rmtree(self.path, ignore_errors=True)


def replace_text(text: str, file: Path) -> None:
    """Put a text in the place of a file's, whole or not at all, to survive a power loss; raises OSError."""
    new = file.with_name(f"{file.name}.new")
    new.write_text(text, encoding="utf-8")
    fsync(new)
    new.replace(file)
    fsync(file.parent)


def save_tensors(tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    """Write tensors to a file, to survive a power loss; raises DiskError where the system fails."""
    try:
        save_file(dict(tensors), file)
    except SafetensorError as error:  # the library's own word for what the system says
        file.unlink(missing_ok=True)
        raise DiskError(str(file), f"cannot be written ({error})", "free space, or choose another disk") from error
    with disk_errors(file):
        fsync(file)
