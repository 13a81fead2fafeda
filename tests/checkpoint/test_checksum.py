"""Checksums of what was written: every byte counts, in its place."""

from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st

from convert_w4a8.checkpoint.checksum import checksum, is_intact


@given(data=st.binary(max_size=20_000), cut=st.integers(0, 4))
def test_checksums_of_pieces_add_up(data: bytes, cut: int) -> None:
    """Split at a multiple of 4 KiB, the sums of both parts make that of the whole."""
    at = min(cut * 4096, len(data))
    parts = checksum(memoryview(data[:at])) + checksum(memoryview(data[at:]), cut)
    assert at < cut * 4096 or parts % 2**64 == checksum(memoryview(data))


@given(data=st.binary(min_size=1, max_size=20_000), place=st.integers(0), change=st.integers(1, 255))
def test_checksums_notice_a_changed_byte(data: bytes, place: int, change: int) -> None:
    """One byte that differs, at any place, gives another sum."""
    changed = bytearray(data)
    changed[place % len(data)] ^= change
    assert checksum(memoryview(changed)) != checksum(memoryview(data))


def test_checksums_notice_misplaced_blocks() -> None:
    """Two blocks that changed places, and a block that is there twice, are noticed."""
    blocks = [bytes(torch.randint(0, 256, (4096,), dtype=torch.uint8).tolist()) for _ in range(3)]
    sums = {checksum(memoryview(b"".join(blocks[i] for i in order))) for order in ((0, 1, 2), (1, 0, 2), (0, 0, 2))}
    assert len(sums) == 3


def test_a_file_that_is_not_covered_by_its_pieces_is_not_intact(tmp_path: Path) -> None:
    """Every byte must be accounted for, once."""
    data = memoryview(b"abcdefgh")
    (tmp_path / "file").write_bytes(data)
    halves = [(0, 4, checksum(data[:4])), (4, 4, checksum(data[4:]))]
    assert is_intact(tmp_path / "file", halves, 8)
    assert not is_intact(tmp_path / "file", halves[:1], 8)
    assert not is_intact(tmp_path / "file", halves[1:], 8)
    assert not is_intact(tmp_path / "file", [*halves, (8, 1, 0)], 9)
