"""The pass that writes a teacher's logits to the disk, before the first training that uses them."""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch

from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.checkpoint.disk import disk_errors
from convert_w4a8.distillation.data import by_length, in_batches, make_batch, rows_of
from convert_w4a8.distillation.options import DistillOptions
from convert_w4a8.distillation.state import replace_text, save_tensors
from convert_w4a8.distillation.stored import (
    NOTES,
    Notes,
    StoredTeacher,
    identity_of,
    key_of,
    names_of,
    read_notes,
    row_bytes,
)
from convert_w4a8.distillation.student import load_teacher
from convert_w4a8.distillation.teacher import LiveTeacher, Logits
from convert_w4a8.distillation.top_k import TopK
from convert_w4a8.errors import ConvertError
from convert_w4a8.samples.sample import Sample

_FILE_BYTES = 256 << 20
"""About how large a file of logits is."""


def check_stored(directory: Path, top_k: int, options: DistillOptions) -> None:
    """Check, without reading any weights, that a directory can be used or made.

    Raises:
        ConvertError: it holds something else, or logits of another --top-k, or more than logits is wanted.

    """
    if options.hidden_weight:
        reason = "needs the outputs of the teacher's blocks, and --teacher-logits holds its logits only"
        raise ConvertError("--hidden-weight", reason, "leave out one of the two")
    notes = read_notes(directory)
    if notes is not None:
        notes.identity.check(replace(notes.identity, top_k=top_k), directory)


def stored_teacher(
    checkpoint: Checkpoint,
    samples: Sequence[Sample],
    directory: Path,
    top_k: int,
    *,
    device: torch.device,
    batch_tokens: int,
    progress: Callable[[int, int], None] = lambda _done, _of: None,
) -> StoredTeacher:
    """Return a teacher whose logits for `samples` lie in a directory; what is not there yet is computed first.

    progress: called with how many tokens are done, and of how many.

    Raises:
        ConvertError: the directory is of another teacher, tokenizer, --top-k or data, or the disk is too small.

    """
    wanted = identity_of(checkpoint, top_k)
    with _made(directory), _locked(directory):
        notes = read_notes(directory)
        samples = list({key_of(sample): sample for sample in samples}.values())
        if notes is not None:
            notes.identity.check(wanted, directory)
            found = StoredTeacher(directory, notes)
            samples = found.missing(samples)
            if notes.complete:
                _refuse_other_data(directory, samples)
                return found
        teacher = LiveTeacher(load_teacher(checkpoint, device))
        _check_disk(directory, samples, row_bytes(teacher.vocabulary, top_k))
        files = list(notes.files) if notes is not None else []
        notes = Notes(wanted, teacher.vocabulary, tuple(files), complete=False)
        _write(notes, directory)
        for tensors in _computed(teacher, samples, top_k, batch_tokens, progress):
            files.append(f"logits-{len(files) + 1:05}.safetensors")
            save_tensors(tensors, directory / files[-1])
            notes = replace(notes, files=tuple(files))
            _write(notes, directory)
        notes = replace(notes, complete=True)
        _write(notes, directory)
        return StoredTeacher(directory, notes)


def _refuse_other_data(directory: Path, missing: Sequence[Sample]) -> None:
    if missing:
        raise ConvertError(
            str(directory),
            f"has no logits of {missing[0].origin}" + (f" and {len(missing) - 1:,} more" if len(missing) > 1 else ""),
            "give the --data, --held-out, --mask and --max-length that it was written with, or another directory",
        )


def _computed(
    teacher: LiveTeacher,
    samples: Sequence[Sample],
    top_k: int,
    batch_tokens: int,
    progress: Callable[[int, int], None],
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the tensors of each file."""
    rows: list[Mapping[str, torch.Tensor]] = []
    keys: list[bytes] = []
    ends: list[int] = []
    done, total = 0, sum(map(len, samples))
    device = next(teacher.model.parameters()).device
    for numbers in in_batches(samples, by_length(samples), batch_tokens):
        target = teacher.target(make_batch(samples, numbers), device)
        rows.append(_rows(target, top_k))
        for number in numbers:
            keys.append(key_of(samples[number]))
            ends.append((ends[-1] if ends else 0) + rows_of(samples[number]))
        done += sum(len(samples[number]) for number in numbers)
        progress(done, total)
        if ends[-1] * row_bytes(teacher.vocabulary, top_k) >= _FILE_BYTES or done == total:
            found = {name: torch.cat([part[name] for part in rows]) for name in names_of(top_k)}
            found["samples"] = torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(len(keys), -1)
            found["ends"] = torch.tensor(ends)
            yield found
            rows, keys, ends = [], [], []


def _rows(target: Logits, top_k: int) -> dict[str, torch.Tensor]:
    logits = target.logits.bfloat16()  # some models give theirs in float32
    if not top_k:
        return {"logits": logits.cpu()}
    top = TopK.of(logits, top_k)
    return {"tokens": top.tokens.int().cpu(), "logits": top.logits.cpu(), "rest": top.rest.cpu()}


def _check_disk(directory: Path, samples: Sequence[Sample], size: int) -> None:
    needed = sum(map(rows_of, samples)) * size
    free = shutil.disk_usage(directory).free
    if needed > free:
        reason = f"needs {needed:,} bytes for the teacher's logits, the disk has {free:,} free"
        raise ConvertError(str(directory), reason, "give less data, a lower --top-k, or another disk")


def _write(notes: Notes, directory: Path) -> None:
    with disk_errors(directory):
        replace_text(notes.as_json(), directory / NOTES)


@contextmanager
def _made(directory: Path) -> Iterator[None]:
    """Make a directory, readable by its owner only, if there is none; after an error nothing empty is left of it."""
    new = [path for path in (directory, *directory.parents) if not path.exists()]
    with disk_errors(directory):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with suppress(OSError):  # not empty, then
            for path in new:
                path.rmdir()
        raise


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Let one pass work on a directory at a time: the lock is on the directory itself."""
    with disk_errors(directory, "opened"):
        descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            remedy = "wait for it, or give another directory"
            raise ConvertError(str(directory), "another training writes the teacher's logits there", remedy) from error
        yield
    finally:
        os.close(descriptor)
