"""Checksums of what was written, to tell after an interruption whether a file still is that."""

from io import FileIO
from pathlib import Path

import numpy as np

Piece = tuple[int, int, int]
"""Bytes of a file as they were written: offset, length, checksum."""
_CHUNK_BYTES = 16 << 20
_BLOCK_BYTES = 4096


def checksum(data: memoryview, block: int = 0) -> int:
    """Sum up 64-bit words, each block of 4 KiB times an odd number of its own, modulo 2⁶⁴.

    A word that changed, a block that is lost, zeroed or in another place are found. It runs at the speed of memory,
    10 times as fast as CRC-32; it is not meant against malice. Sums of pieces add up: `block` numbers the first one.
    """
    blocks = len(data) // _BLOCK_BYTES
    whole = blocks * _BLOCK_BYTES
    sums = np.zeros(blocks + 1, np.uint64)
    if blocks:
        sums[:blocks] = np.frombuffer(data[:whole], np.uint64).reshape(blocks, -1).sum(axis=1)
    sums[blocks] = np.frombuffer(bytes(data[whole:]).ljust(_BLOCK_BYTES, b"\0"), np.uint64).sum()
    numbers = np.arange(block, block + blocks + 1, dtype=np.uint64)
    return int((sums * (2 * numbers + 1)).sum())


def is_intact(path: Path, pieces: list[Piece], size: int) -> bool:
    """Whether a file has this size, and exactly the bytes that were written to it. Reads all of it."""
    try:
        with path.open("rb", buffering=0) as file:
            position = 0
            for offset, length, expected in pieces:
                if offset != position or _checksum_of(file, length) != expected:
                    return False
                position += length
            return position == size and not file.read(1)
    except OSError:
        return False


def _checksum_of(file: FileIO, length: int) -> int:
    """Return the checksum of the next bytes of a file, or of fewer where it ends."""
    buffer = memoryview(bytearray(min(length, _CHUNK_BYTES)))
    total = done = 0
    while done < length:
        part = buffer[: min(length - done, _CHUNK_BYTES)]
        filled = 0
        while filled < len(part):
            count = file.readinto(part[filled:])
            if not count:
                return -1
            filled += count
        total += checksum(part, done // _BLOCK_BYTES)
        done += len(part)
    return total % 2**64
