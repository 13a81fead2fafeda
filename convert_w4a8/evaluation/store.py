"""Answers on the disk, a line each as they come, so that what is finished is not asked again."""

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Self

from convert_w4a8.errors import ConvertError
from convert_w4a8.evaluation.answer import Answer

FILE = "answers.jsonl"
Key = tuple[str, str, int]


class Store:
    """Answers by side, prompt and sample; without a directory, in memory only. Used as a context manager.

    settings: what answers depend on, JSON-ready. Answers to other settings are never mixed with these. private: whether
    a directory that is made is for its owner only.
    """

    def __init__(
        self, directory: Path | None, settings: Mapping[str, Any], *, resume: bool, private: bool = False
    ) -> None:
        self._directory = directory
        self._settings = dict(settings)
        self._resume = resume
        self._mode = 0o700 if private else 0o777
        self._file: IO[bytes] | None = None
        self.answers: dict[Key, Answer] = {}
        self.noted: dict[str, Any] = {}
        """What else was measured, by name."""

    def __enter__(self) -> Self:
        """Open or make the file. Raises ConvertError where that is not possible, or another run works on it."""
        if self._directory is None:
            return self
        path = self._directory / FILE
        try:
            self._directory.mkdir(self._mode, parents=True, exist_ok=True)
            self._file = path.open("ab+")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConvertError(
                str(path), "another evaluation works on it", "wait for it, or choose another --out"
            ) from error
        except OSError as error:
            raise ConvertError(str(path), f"cannot be written ({error.strerror})", "choose another --out") from error
        try:
            self._read(path, self._file)
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def add(self, answer: Answer) -> None:
        """Keep an answer, or a failure, at once."""
        self.answers[answer.key] = answer
        self._write({"answer": answer.as_dict()})

    def note(self, name: str, value: Any) -> None:
        """Keep something else that was measured, JSON-ready."""
        self.noted[name] = value
        self._write({"note": name, "value": value})

    def has(self, key: Key) -> bool:
        """Whether there is a whole answer."""
        return key in self.answers and self.answers[key].failure is None

    def digest(self) -> str:
        """Return a SHA-256 of all whole answers, in whatever order they came."""
        found = hashlib.sha256()
        for key in sorted(key for key in self.answers if self.has(key)):
            answer = self.answers[key]
            found.update(json.dumps([*key, answer.shown], ensure_ascii=True).encode() + b"\n")
        return found.hexdigest()

    def _read(self, path: Path, file: IO[bytes]) -> None:
        """Read what an earlier run left; of a line that was not finished, nothing."""
        file.seek(0)
        lines = file.read().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            file.truncate(sum(map(len, lines[:-1])))
            lines.pop()
        if not lines or (not self._resume and _without_answers(lines)):
            file.truncate(0)
            self._write({"settings": self._settings})
            return
        if not self._resume:
            raise ConvertError(str(path), "is there already", "pass --resume to go on with it, or choose another --out")
        try:
            documents = [json.loads(line) for line in lines]
            settings = dict(documents[0]["settings"])
            for document in documents[1:]:
                if "note" in document:
                    self.noted[document["note"]] = document["value"]
                else:
                    answer = Answer.from_dict(document["answer"])
                    self.answers[answer.key] = answer
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ConvertError(str(path), f"is damaged ({error!r})", "choose another --out") from error
        differ = sorted(key for key in {*settings, *self._settings} if settings.get(key) != self._settings.get(key))
        if differ:
            reason = f"its answers were given with another {', '.join(differ)}"
            raise ConvertError(str(path), reason, "use the settings of that run, or choose another --out")

    def _write(self, document: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        try:
            self._file.write(json.dumps(document, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")
            self._file.flush()
            os.fdatasync(self._file.fileno())
        except OSError as error:
            raise ConvertError(
                str(self._file.name), f"cannot be written ({error.strerror})", "free space, then --resume"
            ) from error


def _without_answers(lines: Sequence[bytes]) -> bool:
    """Whether this is the file of a run that got no answer, of which nothing is worth keeping."""
    try:
        documents = [json.loads(line) for line in lines]
        return "settings" in documents[0] and not any("answer" in document for document in documents)
    except (ValueError, TypeError, RecursionError):
        return False
