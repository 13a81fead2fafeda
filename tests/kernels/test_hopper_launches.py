"""How the GEMM for Hopper is cut, without a GPU: everything in the table can be launched, and everything else too."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

hopper = pytest.importorskip("convert_w4a8.kernels.gemm.hopper", reason="Triton has no Gluon here")
SHARED = 227 * 1024
"""Bytes of shared memory that a block may have (CUDA C++ Programming Guide, compute capability 9.0)."""


def assert_possible(launch: "hopper.Launch", m: int, n: int, k: int, terms: int) -> None:  # type: ignore[name-defined]
    """Tokens and channels fit, no part of K is empty, and what is copied ahead has a place."""
    assert launch.block_m >= m
    assert launch.block_m & (launch.block_m - 1) == 0
    assert launch.block_n in (64, 128)
    assert n % launch.block_n == 0
    assert 1 <= launch.splits <= k // 128
    assert launch.stages >= 2
    tokens = 128 * launch.block_m * terms
    assert launch.stages * (tokens + 73 * launch.block_n) + launch.overlap * tokens <= SHARED
    if launch.cluster:  # sums take the place of copies
        assert launch.clusters(terms)
        assert launch.share * launch.splits >= launch.block_m


def test_launches_that_were_measured() -> None:
    """Of the table: its keys say the tokens of a block."""
    for n, k, block_m, terms in hopper.LAUNCHES:
        assert_possible(hopper.choose_launch(block_m, n, k, 132, terms), block_m, n, k, terms)


def test_no_tokens() -> None:
    """Of one term or two: nothing is launched, and there is no row of the product."""
    packed, tables = torch.zeros(4, 4 * 64, dtype=torch.int32), torch.zeros(1, 64, 8).to(torch.float8_e4m3fn)
    tokens, scale = torch.zeros(0, 128).to(torch.float8_e4m3fn), torch.zeros(0, 1)
    product = hopper.gemm(tokens, scale, packed, tables, torch.ones(64))
    assert (product.shape, product.dtype) == ((0, 64), torch.bfloat16)


def test_no_sums_are_sent_twice() -> None:
    """Eight warps have room for 16 tokens: of eight tokens, two warps would have the same."""
    assert hopper.Launch(8, 4, warps=4).clusters(1)
    assert not hopper.Launch(8, 4, block_n=128, warps=8).clusters(1)


@given(
    m=st.integers(1, hopper.MAX_TOKENS),
    n=st.integers(1, 1200).map(lambda blocks: 64 * blocks),
    k=st.integers(1, 400).map(lambda groups: 128 * groups),
    sms=st.integers(1, 200),
    terms=st.sampled_from([1, 2]),
)
def test_launches_of_any_size(m: int, n: int, k: int, sms: int, terms: int) -> None:
    """By the rule."""
    if terms == 2:
        m = min(m, hopper.MAX_TOKENS_OF_TWO_TERMS)
    assert_possible(hopper.choose_launch(m, n, k, sms, terms), m, n, k, terms)
