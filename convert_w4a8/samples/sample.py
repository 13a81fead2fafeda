"""Tokens of calibration data, what each of them is, and what keeps it out of the statistics."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt


class TokenKind(IntEnum):
    """What a token is, as the chat template renders it."""

    TEXT = 0
    """Of a sample that is no chat, or whose chat template hides what is what."""
    TEMPLATE = 1
    """What the template adds: headers, ends of turns, special tokens."""
    SYSTEM = 2
    """The system prompt, also one that the template writes where the chat has none."""
    TOOLS = 3
    """The tools' descriptions, and what the template writes about them."""
    USER = 4
    ASSISTANT = 5
    """Answers, reasoning and tool calls of the model."""
    TOOL = 6
    """Results of tools."""


REASONS = ("loss_mask", "template", "system", "tools", "repeated")
"""What masks a token; `Sample.masked_by` is an index into it, plus 1. Of several reasons the first counts."""


@dataclass(frozen=True, eq=False)
class Sample:
    """One sample, and of each token what it is and whether it counts.

    Masked tokens are attended to like the others; they are left out of means, second moments and losses only.
    """

    tokens: npt.NDArray[np.int32]
    """[T]: ids in the model's vocabulary."""
    kinds: npt.NDArray[np.uint8]
    """[T]: `TokenKind`."""
    masked_by: npt.NDArray[np.uint8]
    """[T]: 0 for a token that counts, else 1 + the index of its reason in `REASONS`."""
    origin: str
    """FILE line N, or FILE document N."""

    @property
    def kept(self) -> npt.NDArray[np.bool_]:
        """Whether each token counts in statistics, bool [T]."""
        kept: npt.NDArray[np.bool_] = self.masked_by == 0
        return kept

    def __len__(self) -> int:
        """Return T."""
        return len(self.tokens)


@dataclass(frozen=True, eq=False)
class Joined:
    """Samples in few arrays. lengths: of each sample; arrays of `Sample`, one sample's after the other's."""

    lengths: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int32]
    kinds: npt.NDArray[np.uint8]
    masked_by: npt.NDArray[np.uint8]
    origins: tuple[str, ...]

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> "Joined":
        """Join samples."""
        return cls(
            np.array([len(sample) for sample in samples], np.int64),
            np.concatenate([np.zeros(0, np.int32), *(sample.tokens for sample in samples)]),
            np.concatenate([np.zeros(0, np.uint8), *(sample.kinds for sample in samples)]),
            np.concatenate([np.zeros(0, np.uint8), *(sample.masked_by for sample in samples)]),
            tuple(sample.origin for sample in samples),
        )

    def samples(self) -> tuple[Sample, ...]:
        """Return the samples, whose arrays are parts of these."""
        ends = np.cumsum(self.lengths).tolist()
        return tuple(
            Sample(self.tokens[begin:end], self.kinds[begin:end], self.masked_by[begin:end], origin)
            for begin, end, origin in zip([0, *ends][:-1], ends, self.origins, strict=True)
        )


@dataclass(frozen=True, eq=False)
class SampleSet:
    """The samples that calibration uses, and what was read to get them."""

    samples: tuple[Sample, ...]
    """At least one; each has a token that counts."""
    counts: npt.NDArray[np.int64]
    """[kinds, 1 + reasons]: tokens seen of each `TokenKind`, those that count in column 0, the others by reason."""
    wholly_masked: int = 0
    """Samples that are not used, because none of their tokens counts. `counts` has them."""
    cut: int = 0
    """Samples that were longer than allowed, and lost their end. `counts` has what is left."""

    @property
    def seen(self) -> int:
        """How many tokens were read."""
        return int(self.counts.sum())

    @property
    def kept(self) -> int:
        """How many tokens count in statistics."""
        return int(self.counts[:, 0].sum())

    @property
    def tokens(self) -> int:
        """How many tokens the model is run on: those of `samples`, masked or not."""
        return sum(map(len, self.samples))

    @cached_property
    def digest(self) -> str:
        """A SHA-256 of all that calibration can depend on: the samples' tokens and masks, in their order."""
        found = hashlib.sha256()
        for sample in self.samples:
            found.update(len(sample).to_bytes(8, "little"))
            found.update(sample.tokens.astype("<i4").tobytes())
            found.update(sample.kept.tobytes())
        return found.hexdigest()

    def as_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict of the counts."""
        kinds = {}
        for kind, row in zip(TokenKind, self.counts.tolist(), strict=True):
            if sum(row):
                masked = {reason: count for reason, count in zip(REASONS, row[1:], strict=True) if count}
                kinds[kind.name.lower()] = {"seen": sum(row), "kept": row[0], "masked": masked}
        return {
            "samples": len(self.samples),
            "samples_wholly_masked": self.wholly_masked,
            "samples_cut": self.cut,
            "longest_sample": max(map(len, self.samples)),
            "tokens": {"seen": self.seen, "kept": self.kept, "run": self.tokens},
            "kinds": kinds,
            "sha256": self.digest,
        }


def count(samples: list[Sample]) -> npt.NDArray[np.int64]:
    """Return the table of `SampleSet.counts`."""
    width = 1 + len(REASONS)
    found = np.zeros(len(TokenKind) * width, np.int64)
    for sample in samples:
        found += np.bincount(sample.kinds.astype(np.int64) * width + sample.masked_by, minlength=len(found))
    return found.reshape(len(TokenKind), width)
