"""Calibration samples in batches, and the hidden states of all their tokens: in memory, or on the disk past a limit."""

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from convert_w4a8.checkpoint.disk import disk_errors
from convert_w4a8.devices import locked_memory
from convert_w4a8.samples.sample import Sample

BATCH_TOKENS = 4096
"""Tokens that go through a block at a time, of samples that are equally long; a longer sample goes alone."""

_PIECE = 1 << 27
"""Numbers of hidden states, at most, that are locked at once."""


@dataclass(frozen=True)
class Batch:
    """Samples of one length. tokens: int64 [B, T]. kept: bool [B, T], the tokens that count in statistics."""

    tokens: torch.Tensor
    kept: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T)."""
        count, length = self.tokens.shape
        return count, length


def batches(samples: Sequence[Sample]) -> list[Batch]:
    """Put samples of one length together, the shortest first; samples of which no token is kept are left out."""
    by_length: dict[int, list[Sample]] = {}
    for sample in samples:
        if bool(np.asarray(sample.kept).any()):
            by_length.setdefault(len(sample.tokens), []).append(sample)
    found = []
    for length in sorted(by_length):
        alike = by_length[length]
        step = max(1, BATCH_TOKENS // length)
        for start in range(0, len(alike), step):
            part = alike[start : start + step]
            tokens = torch.stack([torch.as_tensor(sample.tokens).long() for sample in part])
            found.append(Batch(tokens, torch.stack([torch.as_tensor(sample.kept).bool() for sample in part])))
    return found


class States:
    """The hidden states of each batch, bfloat16 [B, T, H], as a model in BF16 has them between its blocks.

    limit: bytes that are held in memory; what is beyond that lies in files of `directory`. Memory is written again and
    again, not given back in between: new pages cost more than what is copied into them. It is locked where a GPU copies
    from and to it.
    """

    def __init__(self, directory: Path, name: str, limit: int) -> None:
        self._directory, self._name, self._limit = directory, name, limit
        self._held: dict[int, torch.Tensor] = {}
        self._shapes: dict[int, torch.Size] = {}
        self._nbytes = 0
        self._locked = _Locked()
        self._spare = torch.empty(0, dtype=torch.bfloat16)

    def put(self, batch: int, states: torch.Tensor) -> None:
        """Set the hidden states of a batch."""
        self._shapes[batch] = states.shape
        held = self._held.get(batch)
        if held is not None and held.shape != states.shape:
            self._nbytes -= self._held.pop(batch).nbytes
            held = None
        if held is None and self._nbytes + 2 * states.numel() <= self._limit:
            memory = self._locked.take(states.numel()) if states.is_cuda else None
            memory = torch.empty(states.numel(), dtype=torch.bfloat16) if memory is None else memory
            held = self._held[batch] = memory.view(states.shape)
            self._nbytes += held.nbytes
        if held is not None:
            held.copy_(states)
            return
        path = self._path(batch)
        with disk_errors(path):
            self._spare_for(batch).copy_(states).view(torch.int16).numpy().tofile(path)

    def get(self, batch: int) -> torch.Tensor:
        """Return the hidden states of a batch, which hold until the next call."""
        held = self._held.get(batch)
        if held is not None:
            return held
        path, states = self._path(batch), self._spare_for(batch)
        with disk_errors(path), path.open("rb") as file:
            if file.readinto(states.view(torch.int16).numpy().data) != states.nbytes:
                raise OSError(errno.EIO, "it is shorter than what was written")
        return states

    def _spare_for(self, batch: int) -> torch.Tensor:
        """Return memory for the hidden states of a batch that lie on the disk."""
        shape = self._shapes[batch]
        if self._spare.numel() < shape.numel():
            self._spare = torch.empty(shape.numel(), dtype=torch.bfloat16)
        return self._spare[: shape.numel()].view(shape)

    def _path(self, batch: int) -> Path:
        return self._directory / f"{self._name}-{batch}"


class _Locked:
    """Memory of the host that is locked for a GPU, bfloat16, in parts of a power of two."""

    def __init__(self) -> None:
        self._left = torch.empty(0, dtype=torch.bfloat16)
        self._most = 0
        """Numbers of the last piece."""

    def take(self, count: int) -> torch.Tensor | None:
        """Return memory for so many numbers; None where they are too many for a piece, or the host does not give it."""
        if count > len(self._left):
            if count > _PIECE:
                return None
            self._most = min(_PIECE, max(2 * self._most, 1 << (count - 1).bit_length()))
            piece = locked_memory(self._most, torch.bfloat16)
            if piece is None:
                return None
            self._left = piece
        found, self._left = self._left[:count], self._left[count:]
        return found
