"""Programs of the GEMM over experts for Hopper, without a GPU: each launch has room, and all groups are shared out."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from convert_w4a8.kernels.gemm.grouped_launch import choose_launches, most_blocks
from convert_w4a8.kernels.gemm.tuned_experts import LAUNCHES

grouped_hopper = pytest.importorskip("convert_w4a8.kernels.gemm.grouped_hopper", reason="Triton has no Gluon here")
_SIZES = st.integers(1, 100).map(lambda blocks: 128 * blocks)


@given(pairs=st.integers(1, 20_000), experts=st.integers(1, 300), hidden=_SIZES, intermediate=_SIZES)
@example(32, 8, 4096, 14336)
def test_a_multiprocessor_has_room(pairs: int, experts: int, hidden: int, intermediate: int) -> None:
    """For one program at least, and not for more threads than it has."""
    for launch in choose_launches(pairs, experts, hidden, intermediate, 132, hopper=True):
        programs = grouped_hopper.resident(launch)
        assert 1 <= programs <= 2048 // (32 * launch.warps)
        assert programs * grouped_hopper.registers(launch) * 32 * launch.warps <= 65536


@pytest.mark.parametrize("key", LAUNCHES)
def test_measured_launches_have_room(key: tuple[int, int, int, int]) -> None:
    """And counters, where they cut blocks, for all of their programs."""
    experts, hidden, intermediate, pairs = key
    for launch, n in zip(
        choose_launches(pairs, experts, hidden, intermediate, 132, hopper=True), (2 * intermediate, hidden), strict=True
    ):
        programs = 132 * grouped_hopper.resident(launch)
        if launch.splits > 1:
            programs = most_blocks(pairs, experts, launch.block_m) * (n // launch.block_n) * launch.splits
        assert launch.splits == 1 or programs <= 4096
