"""A teacher's logits on the disk, found by what a sample holds: the directory of `--teacher-logits`.

    teacher.json             whose logits these are, how many of each token, and the names of the other files
    logits-NNNNN.safetensors
        samples  uint8 [S, 16]   BLAKE2b of each sample's tokens and mask (`key_of`)
        ends     int64 [S]       behind the last row of each sample; rows are of the tokens whose predictions count
        tokens   int32 [R, k]    the k likeliest tokens of each row; absent with all logits
        logits   bfloat16 [R, k] theirs, as the teacher gave them, or all of them [R, V]
        rest     float32 [R]     the logarithm of the sum of exponentials of the others; absent with all logits

`teacher.json` is replaced when a file of logits is on the disk, so a pass that was interrupted goes on from there.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.distillation.data import Batch, rows_of
from convert_w4a8.distillation.teacher import Logits, Target
from convert_w4a8.distillation.top_k import TopK
from convert_w4a8.errors import ConvertError
from convert_w4a8.samples.sample import Sample

NOTES = "teacher.json"
KEY_BYTES = 16
_FORMAT = "w4a8 distill: logits of a teacher, 1"
_TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja")
_DTYPES = {"samples": "U8", "ends": "I64", "tokens": "I32", "logits": "BF16", "rest": "F32"}
_AGAIN = "remove the directory, and begin it again"
_ANOTHER = "give the same as before, or another directory to --teacher-logits"


@dataclass(frozen=True)
class Identity:
    """Whose logits are stored. teacher, tokenizer: SHA-256. top_k: how many of each token; 0 for all."""

    teacher: str
    tokenizer: str
    top_k: int

    def check(self, wanted: "Identity", directory: Path) -> None:
        """Raise ConvertError where another one is wanted."""
        name = str(directory)
        if self.teacher != wanted.teacher:
            raise ConvertError(name, "holds the logits of another --teacher", _ANOTHER)
        if self.tokenizer != wanted.tokenizer:
            raise ConvertError(name, "holds logits of text that another tokenizer cut", _ANOTHER)
        if self.top_k != wanted.top_k:
            raise ConvertError(name, f"was written with --top-k {self.top_k}, not {wanted.top_k}", _ANOTHER)


def identity_of(teacher: Checkpoint, top_k: int) -> Identity:
    """Return the identity of a teacher: of its weights every byte counts, so it takes as long as reading them."""
    files = sorted({info.path for info in teacher.tensors.values()})
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(_digest_of, files))
    found = hashlib.sha256(json.dumps(teacher.config, sort_keys=True).encode())
    for path, digest in zip(files, digests, strict=True):
        found.update(f"\n{path.relative_to(teacher.root)} {digest}".encode())
    of_tokenizer = hashlib.sha256()
    for name in _TOKENIZER:
        if (teacher.root / name).is_file():
            of_tokenizer.update(f"{name} {_digest_of(teacher.root / name)}\n".encode())
    return Identity(found.hexdigest(), of_tokenizer.hexdigest(), top_k)


def _digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def key_of(sample: Sample) -> bytes:
    """Return what a sample is found by."""
    found = hashlib.blake2b(sample.tokens.astype("<i4").tobytes(), digest_size=KEY_BYTES)
    found.update(sample.kept.tobytes())
    return found.digest()


def row_bytes(vocabulary: int, top_k: int) -> int:
    """Return the bytes of a row."""
    return 6 * min(top_k, vocabulary) + 4 if top_k else 2 * vocabulary


@dataclass(frozen=True)
class Notes:
    """What `teacher.json` says. complete: whether the pass that wrote it came to its end."""

    identity: Identity
    vocabulary: int
    files: tuple[str, ...]
    complete: bool

    def as_json(self) -> str:
        """Return the file's text."""
        return json.dumps({"format": _FORMAT, **asdict(self)}, indent=1) + "\n"


def read_notes(directory: Path) -> Notes | None:
    """Return what a directory says that it holds; None where there is none, or an empty one.

    Raises:
        ConvertError: it holds something else, or cannot be read.

    """
    try:
        if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
            return None
        return _parse(json.loads((directory / NOTES).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"is not empty, and holds no logits of a teacher that can be read ({_line(error)})"
        raise ConvertError(str(directory), reason, "give another directory to --teacher-logits") from error


def _parse(found: Any) -> Notes:
    if found["format"] != _FORMAT:
        raise ValueError("of another format")
    files = tuple(str(name) for name in found["files"])
    if any(Path(name).name != name for name in files):
        raise ValueError("names files elsewhere")
    return Notes(Identity(**found["identity"]), int(found["vocabulary"]), files, bool(found["complete"]))


class StoredTeacher:
    """Gives targets from a directory."""

    def __init__(self, directory: Path, notes: Notes) -> None:
        """Open the files that `notes` names.

        Raises:
            ConvertError: one is absent or damaged.

        """
        self.vocabulary = notes.vocabulary
        self.digest = hashlib.sha256(notes.as_json().encode()).hexdigest()
        self.top_k = notes.identity.top_k
        self._places: dict[bytes, tuple[int, int, int]] = {}
        self._files: list[Any] = []
        self._paths = [directory / name for name in notes.files]
        for name in notes.files:
            try:
                self._open(directory / name)
            except (OSError, SafetensorError, ValueError) as error:
                reason = f"cannot be read ({_line(error)})"
                raise ConvertError(str(directory / name), reason, _AGAIN) from error

    def _open(self, path: Path) -> None:
        file: Any = safe_open(path, framework="pt")
        keys, rising = file.get_tensor("samples"), file.get_tensor("ends")
        found = {name: file.get_slice(name) for name in ("samples", "ends", *names_of(self.top_k))}
        if rising.dim() != 1 or any(one.get_dtype() != _DTYPES[name] for name, one in found.items()):
            raise ValueError("its tensors are not of the types that they should have")
        ends = rising.tolist()
        if any(end < start for start, end in pairwise([0, *ends])):
            raise ValueError("its samples do not follow each other")
        rows, width = ends[-1] if ends else 0, min(self.top_k or self.vocabulary, self.vocabulary)
        sizes = {"samples": [len(ends), KEY_BYTES], "ends": [len(ends)], "rest": [rows]}
        if any(one.get_shape() != sizes.get(name, [rows, width]) for name, one in found.items()):
            raise ValueError("its tensors are not of the sizes that they should have")
        start = 0
        for key, end in zip(keys.numpy(), ends, strict=True):
            self._places[key.tobytes()] = len(self._files), start, end
            start = end
        self._files.append(file)

    def missing(self, samples: Iterable[Sample]) -> list[Sample]:
        """Return the samples whose logits are not here, each once.

        Raises:
            ConvertError: of one there are other rows than it has predictions.

        """
        found = {}
        for sample in samples:
            key = key_of(sample)
            if key not in self._places:
                found[key] = sample
                continue
            number, start, end = self._places[key]
            if end - start != rows_of(sample):
                raise self._damaged(number, f"{end - start} rows of a sample that has {rows_of(sample)}")
        return list(found.values())

    def _damaged(self, number: int, reason: str) -> ConvertError:
        return ConvertError(str(self._paths[number]), f"cannot be read ({reason})", _AGAIN)

    def target(self, batch: Batch, device: torch.device, *, hidden: bool = False) -> Target:
        """Return what is stored of the samples of a batch."""
        assert not hidden  # `--hidden-weight` is refused
        parts = [self._read(sample) for sample in batch.samples]
        logits = torch.cat([part["logits"] for part in parts]).to(device)
        if not self.top_k:
            return Logits(logits)
        tokens = torch.cat([part["tokens"] for part in parts]).to(device).long()
        return TopK(tokens, logits, torch.cat([part["rest"] for part in parts]).to(device))

    def _read(self, sample: Sample) -> Mapping[str, torch.Tensor]:
        number, start, end = self._places[key_of(sample)]
        file = self._files[number]
        found = {name: file.get_slice(name)[start:end] for name in names_of(self.top_k)}
        tokens = found.get("tokens")
        if tokens is not None and not bool(((tokens >= 0) & (tokens < self.vocabulary)).all()):
            raise self._damaged(number, f"a token that is none of {self.vocabulary:,}")
        return found


def names_of(top_k: int) -> Sequence[str]:
    """Return what is stored of each row."""
    return ("tokens", "logits", "rest") if top_k else ("logits",)


def _line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:200]
