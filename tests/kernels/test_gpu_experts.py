"""The kernels of experts against their reference and float64: interpreted without a GPU, compiled with one."""

import functools
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from paths import ROOT

from convert_w4a8.kernels.gemm import grouped_reference, reference

pytest.importorskip("triton", reason="Triton is not installed")
KERNELS: Any = importlib.import_module("convert_w4a8.kernels.gemm.grouped")
LAUNCHES: Any = importlib.import_module("convert_w4a8.kernels.gemm.grouped_launch")
COUNTERS: int = importlib.import_module("convert_w4a8.kernels.gemm.workspace").COUNTERS
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GAP = 0.01 if DEVICE == "cuda" else 0.001
"""How far results may be from the reference, as a share of their length: where a sum rounds the other way, so may a
byte between the projections, by up to a sixteenth of it."""


def random_layer(experts: int, n: int, k: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Return codes, tables of entries of either sign, and channel scales."""
    packed = torch.randint(-(2**31), 2**31, (experts, k // 32, 4 * n), generator=generator).int()
    tables = torch.randn(experts, k // 128, n, 8, generator=generator).mul(20).to(torch.float8_e4m3fn)
    return packed, tables, torch.rand(experts, n, generator=generator) / 200


def random_case(
    m: int, experts: int, choices: int, hidden: int, intermediate: int, *, others: int = 0, seed: int = 0
) -> list[Any]:
    """Return arguments of `experts`, without the activation.

    others: experts of other ranks, on odd places until there are no more; with them, one choice is of no expert.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, hidden, generator=generator).bfloat16()
    ids = torch.rand(m, experts + others, generator=generator).argsort(1)[:, :choices].int()
    weights = torch.rand(m, choices, generator=generator)
    gate_up = random_layer(experts, 2 * intermediate, hidden, generator)
    down = random_layer(experts, hidden, intermediate, generator)
    places = None
    if others:
        here = [place for place in range(experts + others) if place % 2 == 0 or place >= 2 * others][:experts]
        places = torch.full((experts + others,), -1, dtype=torch.int32)
        places[here] = torch.arange(len(here), dtype=torch.int32)
        ids[0, 0] = -1
    return [x, weights, ids, gate_up, down, places]


def run(case: list[Any], activation: str = "silu", launches: Any = None) -> torch.Tensor:
    def moved(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(moved, value))
        return None if value is None else value.to(DEVICE)

    found: torch.Tensor = KERNELS.experts(*map(moved, case), activation, launches)
    return found.cpu()


def assert_right(case: list[Any], found: torch.Tensor, activation: str = "silu") -> None:
    expected = grouped_reference.experts(*[*case, activation])
    assert not found.isnan().any()
    assert (found.float() - expected.float()).norm() <= GAP * expected.float().norm()


@settings(max_examples=8)
@given(
    m=st.integers(1, 20),
    experts=st.integers(1, 7),
    others=st.integers(0, 3),
    choices=st.integers(1, 4),
    hidden=st.sampled_from([128, 256, 384]),
    intermediate=st.sampled_from([128, 256]),
    whole=st.sampled_from([128, 2048]),
    splits=st.tuples(st.integers(1, 3), st.integers(1, 2)),
    block_m=st.sampled_from([16, 32]),
    block_n=st.sampled_from([64, 128]),
    columns=st.sampled_from([None, 1, 3]),
    activation=st.sampled_from(sorted(grouped_reference.ACTIVATIONS)),
)
@example(1, 8, 0, 8, 128, 128, 2048, (1, 1), 16, 64, None, "silu")
@example(20, 2, 2, 3, 384, 256, 128, (3, 1), 16, 64, 3, "gelu_tanh")
def test_any_mixture_however_it_is_cut(
    m: int,
    experts: int,
    others: int,
    choices: int,
    hidden: int,
    intermediate: int,
    whole: int,
    splits: tuple[int, int],
    block_m: int,
    block_n: int,
    columns: int | None,
    activation: str,
) -> None:
    """Experts without tokens, of other ranks, of several blocks; parts of K; every activation, at once or in parts."""
    case = random_case(m, experts, min(choices, experts), hidden, intermediate, others=others, seed=m + experts)
    first = KERNELS.Launch(block_m, min(splits[0], hidden // 128), block_n, columns=columns)
    second = replace(first, splits=min(splits[1], intermediate // 128), block_n=64)
    with mock.patch.multiple(KERNELS, _WHOLE=whole, _PART=128):
        assert_right(case, run(case, activation, (first, second)), activation)


def test_what_is_computed_in_float64() -> None:
    """Without quantization or rounding between: the definition, within what FP8 activations lose."""
    x, weights, ids, gate_up, down, _ = case = random_case(6, 3, 2, 256, 128)
    exact = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(6):
        for weight, expert in zip(weights[token].double(), ids[token].tolist(), strict=True):
            w1, w2 = (
                reference.weights(packed[expert], tables[expert]).double() * channel[expert, :, None]
                for packed, tables, channel in (gate_up, down)
            )
            gate, up = (w1 @ x[token].double()).chunk(2)
            exact[token] += weight * (w2 @ (gate * gate.sigmoid() * up))
    assert (run(case).double() - exact).norm() < 0.06 * exact.norm()


@pytest.mark.parametrize("block_m", [16, 64])
def test_all_tokens_of_one_expert(block_m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More pairs than a block, or than the sort looks at at once, and others without any."""
    monkeypatch.setattr(KERNELS, "_CHUNK", 128)
    case = random_case(70, 5, 2, 128, 128)
    case[2] = torch.tensor([3, 1], dtype=torch.int64).repeat(70, 1)
    launch = KERNELS.Launch(block_m, 1, chain=block_m == 64)
    assert_right(case, run(case, launches=(launch, launch)))


def test_blocks_of_any_size_get_their_pairs() -> None:
    """Each pair that has an expert here is in a block of its, and the rest of a block is told from pairs."""
    block_m, experts, choices, hidden = 24, 5, 2, 128
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(-1, experts, (70, choices), generator=generator).int()
    pairs = ids.numel()
    blocks = LAUNCHES.most_blocks(pairs, experts, block_m)
    rows, of_block = torch.full((blocks * block_m,), -7).int(), torch.full((blocks,), -7).int()
    arguments = torch.randn(70, hidden).bfloat16(), ids, torch.empty(70, hidden).to(torch.float8_e4m3fn)
    given = [tensor.to(DEVICE) for tensor in (*arguments, torch.empty(70), rows, of_block)]
    constants = {"BLOCK_M": block_m, "LEAST": 32, "BINS": 128, "CHUNK": 128, "ONE_CHUNK": False, "BLOCK_K": hidden}
    KERNELS._prepare_kernel[(experts + 70,)](
        *given,
        *(hidden, pairs, experts, blocks, given[1]),
        MAPPED=False,
        EARLY=False,
        INTERPRETED=KERNELS.INTERPRETED,
        **constants,
    )
    used, rows = given[5].cpu(), given[4].cpu().view(blocks, block_m)
    for expert in range(experts):
        mine = rows[used == expert].flatten()
        assert mine[mine < pairs].tolist() == (ids.flatten() == expert).nonzero().flatten().tolist()
        assert (mine >= 0).all()
        assert len(mine) - (mine < pairs).sum() < block_m
    assert ((used == -1) | (used >= 0)).all()


def test_nothing_else_is_written_or_read(assert_untouched: Callable[[], None]) -> None:
    """Outputs are as long as they are said to be; results of experts that are elsewhere are never read."""
    case = random_case(5, 2, 3, 128, 128, others=2)
    found = run(case)
    assert_untouched()
    assert_right(case, found)


def test_every_code_and_every_byte_of_a_table() -> None:
    """All 16 codes on all 256 bytes of an entry, NaN apart: a single 1 picks each weight of an expert."""
    byte = torch.arange(256, dtype=torch.uint8)
    byte[(byte & 0x7F) == 0x7F] = 0
    n, k = 256, 128
    tables = byte.view(n, 1).expand(n, 8).contiguous().view(torch.float8_e4m3fn).view(1, 1, n, 8)
    words = (torch.arange(16).repeat(k * n // 16).view(-1, 8) << (4 * torch.arange(8))).sum(1).to(torch.int32)
    packed = words.view(1, k // 32, 4 * n)
    layer = [torch.cat([torch.zeros_like(tensor), tensor]).to(DEVICE) for tensor in (packed, tables, torch.ones(1, n))]
    tokens = torch.eye(k).to(torch.float8_e4m3fn).to(DEVICE)
    found = torch.empty(k, n, dtype=torch.bfloat16, device=DEVICE)
    rows, of_block = torch.arange(k, dtype=torch.int32, device=DEVICE), torch.ones(8, dtype=torch.int32, device=DEVICE)
    scales = torch.ones(k, device=DEVICE)
    launch = KERNELS.Launch(16, 1)
    KERNELS._multiply(tokens, scales, layer, found, rows, of_block, 1, launch)
    expected = reference.weights(packed[0], tables[0])
    assert len(set(expected.flatten().tolist())) > 200
    assert torch.equal(found.cpu().t().float(), expected)


def test_results_do_not_depend_on_who_is_last() -> None:
    """Parts of K and experts are added in order: the same bytes run after run, whatever the blocks of pairs."""
    case = random_case(4, 2, 2, 256, 256)
    launches = KERNELS.Launch(16, 2), KERNELS.Launch(16, 2)
    first = run(case, launches=launches)
    for _ in range(1 if DEVICE == "cpu" else 200):
        assert torch.equal(run(case, launches=launches), first)
    wide = tuple(replace(launch, block_m=32, columns=2) for launch in launches)
    assert torch.equal(run(case, launches=wide), first)


def test_no_tokens_and_what_is_refused() -> None:
    """An empty batch gives an empty result; other activations and sizes are refused."""
    case = random_case(1, 2, 1, 128, 128)
    assert run([tensor[:0] for tensor in case[:3]] + case[3:]).shape == (0, 128)
    with pytest.raises(ValueError, match="the activation relu2"):
        run(case, "relu2")
    launch = KERNELS.Launch(16, 2)
    with pytest.raises(ValueError, match="some are empty"):
        run(random_case(1, 2, 1, 128, 128), launches=(launch, launch))
    with pytest.raises(ValueError, match="not multiples of 128"):
        run(random_case(1, 2, 1, 96, 128))


@pytest.mark.parametrize("hopper", [False, True])
@pytest.mark.parametrize("whole", [2048, 128])
def test_grids_of_many_pairs_are_possible(whole: int, hopper: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of as many tokens as vLLM gives at once: CUDA takes 65,535 programs along all dimensions but the first."""
    m, choices, hidden, intermediate = 16_384, 8, 256, 256
    grids: list[tuple[int, ...]] = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            grids.append(grid)
            return lambda *_arguments, **_constants: None

    if hopper:
        name = "convert_w4a8.kernels.gemm.grouped_hopper_kernel"
        monkeypatch.setattr(pytest.importorskip(name, reason="Triton has no Gluon"), "_grouped_kernel", Recorder())
    for name in ("_prepare_kernel", "_grouped_kernel", "_activate_kernel", "_quantize_pairs_kernel", "_combine_kernel"):
        monkeypatch.setattr(KERNELS, name, Recorder())
    monkeypatch.setattr(KERNELS, "_WHOLE", whole)
    monkeypatch.setattr(KERNELS, "_PART", 128)
    empty = functools.partial(torch.empty, device="meta")
    layers = [
        (empty(4, k // 32, 4 * n, dtype=torch.int32), empty(4, k // 128, n, 8, dtype=torch.uint8), empty(4, n))
        for n, k in ((2 * intermediate, hidden), (hidden, intermediate))
    ]
    x, ids = empty(m, hidden, dtype=torch.bfloat16), empty(m, choices, dtype=torch.int32)
    KERNELS.experts(x, empty(m, choices), ids, *layers, None, "silu", hopper=hopper)
    assert len(grids) >= 5
    assert max(size for grid in grids for size in grid[1:] or (1,)) <= 65_535


@given(counts=st.lists(st.integers(0, 60), min_size=1, max_size=12), block_m=st.sampled_from([16, 24, 64, 80]))
def test_there_are_never_more_blocks_than_are_launched(counts: list[int], block_m: int) -> None:
    """However the pairs are spread."""
    needed = sum(-(-count // block_m) for count in counts)
    assert needed <= LAUNCHES.most_blocks(sum(counts), len(counts), block_m)


@given(
    pairs=st.integers(1, 100_000),
    experts=st.integers(1, 512),
    hidden=st.integers(1, 300),
    intermediate=st.integers(1, 300),
    sms=st.integers(1, 200),
    hopper=st.booleans(),
)
@example(16, 8, 32, 112, 132, True)
def test_launches_are_possible(
    pairs: int, experts: int, hidden: int, intermediate: int, sms: int, hopper: bool
) -> None:
    """Whatever the sizes: no part of K is empty, and both GEMMs agree on the blocks of pairs."""
    hidden, intermediate = 128 * hidden, 128 * intermediate
    both = LAUNCHES.choose_launches(pairs, experts, hidden, intermediate, sms, hopper=hopper)
    assert_possible(both, hidden, intermediate)


def assert_possible(launches: Any, hidden: int, intermediate: int) -> None:
    assert launches[0].block_m == launches[1].block_m
    for launch, n, k in zip(launches, (2 * intermediate, hidden), (hidden, intermediate), strict=True):
        assert n % launch.block_n == 0
        assert 1 <= launch.splits <= k // 128
        power = launch.block_m & (launch.block_m - 1) == 0
        assert power or (launch.overlap == 3 and launch.splits == 1)
        assert launch.chain or launch.overlap != 3


def test_measured_launches_are_possible() -> None:
    """And chosen for as many pairs, and for a few less."""
    measured = importlib.import_module("convert_w4a8.kernels.gemm.tuned_experts").LAUNCHES
    for (experts, hidden, intermediate, pairs), (block_m, *_) in measured.items():
        for fewer in {pairs, pairs // 2 + 1}:
            both = LAUNCHES.choose_launches(fewer, experts, hidden, intermediate, 132, hopper=True)
            assert both[0].block_m == block_m
            assert_possible(both, hidden, intermediate)
            blocks = LAUNCHES.most_blocks(fewer, experts, block_m)
            for launch, n in zip(both, (2 * intermediate, hidden), strict=True):  # or K would not be split after all
                assert launch.splits == 1 or blocks * (n // launch.block_n) <= COUNTERS


@pytest.mark.parametrize("capability", [89, 90, 100, 120])
def test_kernels_compile_to_lookups_and_fp8_products(capability: int) -> None:
    """For each kind of GPU, without one: weights reach the tensor core in FP8, by registers; few spill, if limited."""
    program = ROOT / "tests" / "support" / "compile_grouped.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(program), str(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    products = {89: "QMMA", 90: "QGMMA", 100: "UTCQMMA", 120: "QMMA"}[capability]
    lines = done.stdout.splitlines()
    assert ("ACQBULK=1" in done.stdout) == (capability == 90)  # waits for the kernel before
    assert {line.split()[0] for line in lines} == {
        f"_{name}_kernel" for name in ("prepare", "grouped", "activate", "quantize_pairs", "combine")
    }
    for line in lines:
        counts = {name: int(count) for name, count in re.findall(r"(\w+)=(\d+)", line)}
        assert counts["LDL"] + counts["STL"] <= (32 if counts["limited"] else 0), line
        assert counts["shared"] <= (227 if capability == 90 else 99) * 1024, line
        assert counts.get("HAZARDS", 0) == 0, line
        if line.startswith("_grouped"):
            assert counts[products] >= 4, line
            assert counts["HMMA"] == 0, line
            assert counts["PRMT"] >= (32 if counts["apart"] else 48), line
