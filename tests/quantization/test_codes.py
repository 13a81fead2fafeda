"""New codes: what must stay exact, and that what cannot is as near as brute force gets it."""

import itertools
from pathlib import Path

import pytest
import torch
from code_groups import dense_layer, fit_symmetric
from hypothesis import given
from hypothesis import strategies as st

from convert_w4a8 import devices
from convert_w4a8.checkpoint.directory import open_checkpoint
from convert_w4a8.checkpoint.safetensors_file import read_tensor
from convert_w4a8.encoding import dequantize as dequantize_module
from convert_w4a8.encoding.dequantize import dequantize
from convert_w4a8.encoding.packing import pack_codes, unpack_codes
from convert_w4a8.fp8 import E4M3
from convert_w4a8.linear import DenseLinear, Packing, W4Linear
from convert_w4a8.quantization.codes import expand_groups, input_energies, to_symmetric
from convert_w4a8.sources import find_source

pytestmark = pytest.mark.usefixtures("cpu_path")

N, K = 32, 512
CPU = torch.device("cpu")


def generator(seed: int) -> torch.Generator:
    """Return a seeded generator."""
    return torch.Generator().manual_seed(seed)


def layer(
    zeros: torch.Tensor | int | None = None, *, group_size: int = 128, g_idx: torch.Tensor | None = None, seed: int = 0
) -> W4Linear:
    """Make a layer [32, 512] with random codes and scales."""
    groups = K // group_size
    codes = torch.randint(0, 16, (N, K), generator=generator(seed), dtype=torch.uint8)
    scales = 0.001 + 0.01 * torch.rand(groups, N, generator=generator(seed + 1)).half()
    if isinstance(zeros, int):
        zeros = torch.full((groups, N), zeros, dtype=torch.uint8)
    return W4Linear(pack_codes(codes), Packing.PACK_QUANTIZED, scales, zeros, g_idx, group_size)


def as_awq(w: W4Linear) -> W4Linear:
    """Pack the codes of a layer as AWQ does."""
    columns = unpack_codes(w.packed, w.packing).t().view(K, N // 8, 8).int()
    packed = torch.zeros(K, N // 8, dtype=torch.int32)
    for nibble, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        packed |= columns[..., column] << 4 * nibble
    return W4Linear(packed, Packing.AWQ, w.scales, w.zeros, w.g_idx, w.group_size)


def relative_error(w: W4Linear | DenseLinear, result: W4Linear) -> float:
    """Return noise over signal energy."""
    source = dequantize(w)
    return float((dequantize(result) - source).square().sum() / source.square().sum())


@pytest.mark.parametrize("group_size", [256, 512])
@pytest.mark.parametrize("zeros", [None, 8], ids=["symmetric", "zeros_of_8"])
def test_longer_groups_keep_codes_and_repeat_scales(group_size: int, zeros: int | None) -> None:
    """Groups of a multiple of 128, one a channel included, change nothing but how often a scale is written."""
    w = layer(zeros, group_size=group_size)
    result, exact = to_symmetric(w)
    assert exact
    assert result.is_kernel_ready
    assert result.packed is w.packed
    assert result.scales.dtype == w.scales.dtype
    assert torch.equal(dequantize(result), dequantize(w))


def test_a_g_idx_that_says_nothing_is_dropped() -> None:
    """GPTQ writes g_idx = k // group_size where nothing is reordered; the codes are kept."""
    for group_size in (128, 256):
        w = layer(group_size=group_size, g_idx=torch.arange(K, dtype=torch.int32) // group_size)
        result, exact = to_symmetric(w)
        assert exact
        assert result.packed is w.packed
        assert result.is_kernel_ready


def test_expanding_leaves_real_structure_alone() -> None:
    """A permutation, real zero-points and groups of 32 stay for `to_symmetric` to deal with."""
    permuted = layer(g_idx=(torch.arange(K, dtype=torch.int32) // 128).flip(0))
    assert expand_groups(permuted).g_idx is permuted.g_idx
    assert expand_groups(layer(5)).zeros is not None
    assert expand_groups(layer(group_size=32)).group_size == 32


@pytest.mark.parametrize("zero", [7, 8])
@pytest.mark.parametrize("group_size", [128, 256])
def test_zero_points_of_7_and_8_are_exact(zero: int, group_size: int) -> None:
    """A zero-point of 7 means values −7 … 8, which are −8 … 7 times the negated scale."""
    zeros = torch.full((K // group_size, N), zero, dtype=torch.uint8)
    zeros[0, 0] = 15 - zero
    w = layer(zeros, group_size=group_size)
    result, exact = to_symmetric(w)
    assert exact
    assert result.is_kernel_ready
    assert torch.equal(dequantize(result), dequantize(w))


def test_each_group_is_judged_by_itself() -> None:
    """One group with another zero-point is requantized; all others keep codes and scales bit for bit."""
    zeros = torch.full((K // 128, N), 8, dtype=torch.uint8)
    zeros[2, 5] = 3
    w = layer(zeros)
    result, exact = to_symmetric(w)
    assert not exact
    before, after = (unpack_codes(x.packed, x.packing).view(N, -1, 128) for x in (w, result))
    kept = (zeros == 8).t()
    assert torch.equal(before[kept], after[kept])
    assert torch.equal(result.scales[kept.t()], w.scales.float()[kept.t()])
    source, new = (dequantize(x).view(N, -1, 128)[5, 2] for x in (w, result))
    assert 0 < (new - source).square().sum() < 0.02 * source.square().sum()


@pytest.mark.parametrize("packing", [Packing.PACK_QUANTIZED, Packing.AWQ], ids=str)
def test_values_that_fit_are_found_exactly(packing: Packing) -> None:
    """A zero-point of 5 whose upper codes are not used has values that symmetric codes can hold."""
    w = layer(5)
    codes = unpack_codes(w.packed, w.packing).clamp(max=12)
    codes[:, ::128] = 12  # the largest value, 7
    w = W4Linear(pack_codes(codes), Packing.PACK_QUANTIZED, w.scales, w.zeros, None, 128)
    result, exact = to_symmetric(as_awq(w) if packing is Packing.AWQ else w)
    assert not exact
    assert relative_error(w, result) < 1e-12


@pytest.mark.parametrize(
    "w",
    [
        pytest.param(layer(torch.randint(0, 16, (4, N), generator=generator(3), dtype=torch.uint8)), id="zeros"),
        pytest.param(layer(g_idx=torch.randperm(K, generator=generator(4)).int() // 128), id="act_order"),
        pytest.param(layer(group_size=32), id="group_32"),
        pytest.param(layer(6, group_size=64), id="group_64_zeros"),
        pytest.param(layer(4, group_size=256, g_idx=torch.arange(K).int() % 2), id="zeros_act_order_group_256"),
        pytest.param(dense_layer((N, K)), id="dense"),
    ],
)
def test_any_layer_becomes_kernel_ready_in_blocks(w: W4Linear | DenseLinear, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the source, the result is symmetric, near it, and does not depend on the blocks it was worked in."""
    result, exact = to_symmetric(w)
    assert not exact
    assert result.is_kernel_ready
    assert result.shape_nk == (N, K)
    assert relative_error(w, result) < 0.04
    monkeypatch.setattr(dequantize_module, "BLOCK_WEIGHTS", 16 * K)
    blocks, _ = to_symmetric(w)
    assert torch.equal(blocks.packed, result.packed)
    assert torch.equal(blocks.scales, result.scales)


def test_a_k_that_is_not_a_multiple_of_128_is_refused() -> None:
    """There is no group to put the rest into."""
    packed = torch.zeros(16, 96 // 8, dtype=torch.int32)
    w = W4Linear(packed, Packing.PACK_QUANTIZED, torch.ones(3, 16), None, None, 32)
    with pytest.raises(ValueError, match="K = 96 is not a multiple of 128"):
        to_symmetric(w)


def symmetric_error(values: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the squared error of each group, float64 [R]."""
    return ((codes.double() - 8) * scale.double()[:, None] - values.double()).square().sum(1)


@pytest.mark.parametrize("kind", ["gauss", "one_sided", "heavy"])
def test_the_scale_is_as_good_as_brute_force(kind: str) -> None:
    """400 scales of either sign with nearest codes are at most 1 % better over 64 groups, 10 % in any of them."""
    values = torch.randn(64, 128, generator=generator(5))
    if kind == "one_sided":
        values = values.abs()
    if kind == "heavy":
        values = values**3
    codes, scale = fit_symmetric(devices.codes(CPU), values, torch.ones_like(values))
    found = symmetric_error(values, codes, scale)
    best = torch.full((64,), torch.inf, dtype=torch.float64)
    for candidate in torch.linspace(0.03, 0.25, 400).tolist():
        for sign in (-1, 1):
            trial = values.abs().amax(1) * candidate * sign
            q = (values / trial[:, None]).round().clamp(-8, 7) + 8
            best = torch.minimum(best, symmetric_error(values, q, trial))
    assert found.sum() < 1.01 * best.sum()
    assert (found < 1.1 * best).all()


def test_the_scale_heeds_the_weights() -> None:
    """With all the weight on a few values these are met almost exactly; zero groups stay zero."""
    values = torch.randn(8, 128, generator=generator(6))
    values[3] = 0
    weights = torch.full((8, 128), 1e-6)
    weights[:, :4] = 1
    codes, scale = fit_symmetric(devices.codes(CPU), values, weights)
    plain_codes, plain_scale = fit_symmetric(devices.codes(CPU), values, torch.ones_like(values))
    error, plain = (
        (((c.float() - 8) * s[:, None] - values)[:, :4].square().sum())
        for c, s in ((codes, scale), (plain_codes, plain_scale))
    )
    assert error < 0.7 * plain
    assert (codes[3] == 8).all()


def test_energies_are_relative_to_their_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Energies of the dequantized input channels, mean 1; a layer of zeros gives zeros; blocks make no difference."""
    w = layer(6)
    energies = input_energies(w)
    expected = dequantize(w).square().sum(0)
    torch.testing.assert_close(energies, expected / expected.mean())
    monkeypatch.setattr(dequantize_module, "BLOCK_WEIGHTS", 16 * K)
    torch.testing.assert_close(input_energies(w), energies)
    zero = W4Linear(w.packed, w.packing, torch.zeros_like(w.scales), w.zeros, None, 128)
    assert (input_energies(zero) == 0).all()


tables = st.lists(st.integers(0, 255).filter(lambda b: b & 0x7F != 0x7F), min_size=8, max_size=8).map(
    lambda b: torch.tensor([b], dtype=torch.uint8).view(E4M3)
)


def fit(
    values: torch.Tensor, weights: torch.Tensor, tables: torch.Tensor, rounds: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes uint8 [R, V] and tables float8_e4m3fn [R, 8] that `refit` makes of groups, none of them kept."""
    codes, fitted = torch.zeros(values.shape, dtype=torch.uint8), tables.clone()
    ones, none = torch.ones(len(values)), torch.zeros(len(values), dtype=torch.bool)
    devices.codes(CPU).refit(values, torch.ones_like(values), weights, none, ones, codes, fitted, rounds)
    return codes, fitted


@given(table=tables, seed=st.integers(0, 99))
def test_codes_are_the_nearest_of_any_table(table: torch.Tensor, seed: int) -> None:
    """Tables in any order, of any signs: no other code is nearer to a value than the chosen one."""
    values = 100 * torch.randn(1, 128, generator=generator(seed))
    by_code = [*table[0].tolist(), 0.0, *(-table[0, j].item() for j in range(7, 0, -1))]
    distances = (values[0, :, None] - torch.tensor(by_code)).abs()
    codes, unchanged = fit(values, torch.ones_like(values), table, rounds=0)
    assert torch.equal(unchanged.view(torch.uint8), table.view(torch.uint8))
    chosen = distances.gather(1, codes.long().t())[:, 0]
    torch.testing.assert_close(chosen, distances.amin(1), rtol=1e-6, atol=1e-5)


@given(table=tables, seed=st.integers(0, 99))
def test_no_round_of_fitting_raises_the_error(table: torch.Tensor, seed: int) -> None:
    """The weighted squared error only falls, from whatever table it starts."""
    values = 100 * torch.randn(1, 128, generator=generator(seed))
    weights = torch.rand(1, 128, generator=generator(seed + 1))
    errors = []
    for rounds in range(4):
        codes, fitted = fit(values, weights, table, rounds)
        entries = fitted.float()[0]
        decoded = torch.cat((entries, torch.zeros(1), -entries[1:].flip(0)))[codes[0].long()]
        errors.append(float((weights * (decoded - values).square()).sum()))
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(errors))


def test_the_entry_of_minus_eight_is_free() -> None:
    """It takes the sign and size of a ninth magnitude that the other seven leave over."""
    magnitudes = torch.tensor([1.0, 2, 3, 4, 5, 6, 7])
    values = torch.cat((magnitudes, -magnitudes, torch.full((2,), 20.0), torch.zeros(112)))[None]
    start = torch.tensor([[10.0, -7, -6, -5, -4, -3, -2, -1]]).to(E4M3)
    codes, fitted = fit(values, torch.ones(1, 128), start, rounds=2)
    assert fitted.float().tolist() == [[20, -7, -6, -5, -4, -3, -2, -1]]
    assert codes[0, 14:16].tolist() == [0, 0]
    assert codes[0, :7].tolist() == [9, 10, 11, 12, 13, 14, 15]


def test_the_real_checkpoint_with_zero_points(shared: Path) -> None:
    """Three quarters of its groups are exact; what the others lose is far below the loss of 4-bit quantization."""
    checkpoint = open_checkpoint(shared / "models" / "llama-31m-awq-zp")
    source = find_source(checkpoint)
    w = source.read_layer(source.find_layers(checkpoint, [])[1], read_tensor)
    result, exact = to_symmetric(w)
    assert not exact
    same = (dequantize(result) == dequantize(w)).view(result.shape_nk[0], -1, 128).all(-1)
    assert same.float().mean() > 0.7
    assert relative_error(w, result) < 10**-3.2
