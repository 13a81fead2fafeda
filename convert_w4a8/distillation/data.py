"""Samples as batches for training: whole samples, right-padded, of some tokens together."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from convert_w4a8.samples.sample import Sample


@dataclass(frozen=True)
class Batch:
    """Some samples.

    ids: int64 [B, T], zeros behind the end of a sample. counts: bool [B, T], whether the prediction made at a token
    counts: that of a next token which is there and is not masked. samples: themselves; none where they are not known.
    """

    ids: torch.Tensor
    counts: torch.Tensor
    samples: tuple[Sample, ...] = ()


def rows_of(sample: Sample) -> int:
    """Return of how many tokens of a sample the prediction counts."""
    return int(sample.kept[1:].sum())


def make_batch(samples: Sequence[Sample], numbers: Sequence[int]) -> Batch:
    """Return some samples as a batch."""
    longest = max(len(samples[number]) for number in numbers)
    ids = torch.zeros(len(numbers), longest, dtype=torch.int64)
    counts = torch.zeros(len(numbers), longest, dtype=torch.bool)
    for row, number in enumerate(numbers):
        sample = samples[number]
        ids[row, : len(sample)] = torch.from_numpy(sample.tokens.astype(np.int64))
        counts[row, : len(sample) - 1] = torch.from_numpy(sample.kept[1:])
    return Batch(ids, counts, tuple(samples[number] for number in numbers))


def in_batches(samples: Sequence[Sample], order: Iterable[int], tokens: int) -> Iterator[list[int]]:
    """Yield numbers of samples that follow each other in an order, up to `tokens` with the padding together."""
    batch: list[int] = []
    longest = 0
    for number in order:
        longest = max(longest, len(samples[number]))
        if batch and longest * (len(batch) + 1) > tokens:
            yield batch
            batch, longest = [], len(samples[number])
        batch.append(number)
    if batch:
        yield batch


def by_length(samples: Sequence[Sample]) -> list[int]:
    """Return the numbers of samples in the order of their lengths, so that batches of them have little padding."""
    return sorted(range(len(samples)), key=lambda number: len(samples[number]))
