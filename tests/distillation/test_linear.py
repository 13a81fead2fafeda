"""One layer: the kernel's arithmetic, and gradients against those that autograd finds without any rounding."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from small_training import GROUPS, N, random_layer

from convert_w4a8.distillation.linear import LutLinear, Preset
from convert_w4a8.distillation.loss import counted, divergence
from convert_w4a8.distillation.tables import nearest_within_cells, round_to_e4m3, spacing
from convert_w4a8.encoding import lut_layout
from convert_w4a8.encoding.tables import decode, expand_tables, gemm
from convert_w4a8.kernels.training.reference import by_code, choose, look_up, sum_by_entry
from convert_w4a8.linear import GROUP_SIZE, Packing, W4A8Linear

TOKENS = 11


def random_activations(seed: int = 1) -> torch.Tensor:
    """Return bfloat16 [TOKENS, K]."""
    return torch.randn(TOKENS, GROUPS * GROUP_SIZE, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("preset", list(Preset))
def test_forward_is_the_kernels(preset: Preset) -> None:
    """Bit for bit the reference of the operator, whose own witness is vLLM's."""
    w, x = random_layer(), random_activations()
    layer = LutLinear(w, None, preset)
    assert torch.equal(layer(x), gemm(x, w))
    assert layer(x.view(1, TOKENS, -1)).shape == (1, TOKENS, N)


@pytest.mark.parametrize("case", ["gauss", "tiny", "edge"])
@pytest.mark.parametrize("tokens", [1, 17, 64])
def test_forward_against_vllms_operator(case: str, tokens: int, shared: Path) -> None:
    """Golden vectors of `cutlass_w4a8_mm` on an H200: apart by BF16's last bit, or what its 13-bit sums lose."""
    found = load_file(shared / "golden" / "vllm_w4a8_dense.safetensors")
    group_scale = found[f"{case}.fp8_group_scale"].view(torch.float8_e4m3fn).t().contiguous()
    n = group_scale.shape[1]
    packed = lut_layout.restore(found[f"{case}.lut_weight_bytes"].view(torch.int32).view(-1, 4 * n))
    w = W4A8Linear(
        packed, Packing.PACK_QUANTIZED, None, expand_tables(group_scale), found[f"{case}.channel_scale"].float()
    )
    layer = LutLinear(w, None, Preset.TABLES)
    ours = layer(found[f"{case}.m{tokens}.act"]).detach().float()
    theirs = found[f"{case}.m{tokens}.out"].float()
    step = torch.exp2(torch.floor(torch.log2(theirs.abs().clamp(min=2.0**-120))) - 7)
    # The tensor cores cut terms and sums 13 bits below the largest (tests/encoding/test_tables.py has it exactly).
    size = found[f"{case}.m{tokens}.act"].float().abs() @ decode(w).abs().t()
    assert bool(((ours - theirs).abs() <= step + 2.0**-13 * size).all())
    assert float((ours != theirs).float().mean()) < 0.1
    assert float((ours - theirs).norm() / theirs.norm()) < 0.007


def test_gradients_are_those_without_rounding() -> None:
    """Of inputs, entries, scales and latent weights: as if the rounded numbers were real ones."""
    w, x = random_layer(), random_activations().requires_grad_()
    layer = LutLinear(w, torch.zeros(N), Preset.WEIGHTS)
    layer.start.copy_(torch.arange(8.0, 0, -1) * 4)  # no two codes mean the same: a gradient has one entry to go to
    assert layer.weight is not None
    layer.weight.data.copy_(look_up(layer.start, layer.codes).float() / layer.unit)
    layer.step.copy_(spacing(layer.start))
    upstream = torch.randn(TOKENS, N, generator=torch.Generator().manual_seed(2)).bfloat16()
    (layer(x) * upstream).sum().backward()

    plain = x.detach().float().requires_grad_()
    entries = layer.start.clone().requires_grad_()
    scale = layer.channel_scale.clone().requires_grad_()
    latent = torch.zeros(N, GROUPS * GROUP_SIZE, requires_grad=True)
    grouped = layer.codes.view(N, GROUPS, GROUP_SIZE).long()
    weights = by_code(entries).gather(-1, grouped).flatten(1) * scale[:, None] + latent
    ((plain @ weights.t()) * upstream.float()).sum().backward()  # type: ignore[no-untyped-call]

    def close(ours: torch.Tensor | None, theirs: torch.Tensor) -> None:
        assert ours is not None
        assert float((ours.float() - theirs).norm() / theirs.norm()) < 0.05  # FP8 rounding of x alone is 2.6 %

    assert entries.grad is not None
    assert scale.grad is not None
    assert latent.grad is not None
    assert plain.grad is not None
    assert layer.weight is not None
    close(x.grad, plain.grad)
    close(layer.entries.grad, entries.grad * layer.step)
    close(layer.scale.grad, scale.grad * layer.channel_scale)
    close(layer.weight.grad, latent.grad * layer.unit * layer.channel_scale[:, None])
    assert layer.bias is not None
    close(layer.bias.grad, upstream.float().sum(0))


def test_spacing_of_all_e4m3_numbers() -> None:
    """The distance to the next number away from zero, for each that is not the last."""
    numbers = torch.arange(0, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert torch.equal(spacing(numbers[:-1]), numbers.diff())


@given(st.integers(0, 1 << 30))
def test_nearest_values(seed: int) -> None:
    """No code's value is nearer, and entries' own values come back; also where entries are equal, or zero."""
    generator = torch.Generator().manual_seed(seed)
    entries = round_to_e4m3(torch.randn(4, 2, 8, generator=generator).mul(3))
    entries[0, 0, 3:5] = entries[0, 0, 2]
    entries[1, 1] = 0
    weights = torch.randn(4, 2 * GROUP_SIZE, generator=generator) * 3
    one = torch.ones(4)
    codes, chosen = choose(weights, one, entries)
    assert torch.equal(chosen, look_up(entries, codes))
    distances = (weights.view(4, 2, -1, 1) - by_code(entries)[:, :, None]).abs()
    ours = (weights - look_up(entries, codes)).abs().view(4, 2, -1)
    assert torch.allclose(ours, distances.amin(-1), rtol=0, atol=1e-6)
    own = torch.randint(0, 16, weights.shape, generator=generator).to(torch.uint8)
    values = look_up(entries, own)
    assert torch.equal(choose(values.float(), one, entries)[1], values)
    moved = nearest_within_cells(weights, entries, own)
    assert torch.equal(choose(moved, one, entries)[1], values)
    inside = look_up(entries, codes) == values
    assert torch.equal(moved[inside & (ours.flatten(1) == 0)], weights[inside & (ours.flatten(1) == 0)])


def test_gradient_of_entries_is_exact() -> None:
    """Sums of integers are exact, so they equal autograd's to the last bit."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (5, 2 * GROUP_SIZE), generator=generator).to(torch.uint8)
    gradient = torch.randint(-9, 9, codes.shape, generator=generator).float()
    entries = torch.randn(5, 2, 8, generator=generator, requires_grad=True)
    grouped = codes.view(5, 2, GROUP_SIZE).long()
    (by_code(entries).gather(-1, grouped).flatten(1) * gradient).sum().backward()  # type: ignore[no-untyped-call]
    assert entries.grad is not None
    assert torch.equal(sum_by_entry(gradient, codes), entries.grad)


def test_divergence() -> None:
    """Values and gradients are those of torch's own KL, whatever the chunks."""
    generator = torch.Generator().manual_seed(0)
    ours = torch.randn(7, 33, generator=generator, requires_grad=True)
    theirs = torch.randn(7, 33, generator=generator)
    factors = torch.rand(7, generator=generator)
    (divergence(ours, theirs) * factors).sum().backward()  # type: ignore[no-untyped-call]
    found = ours.grad
    again = ours.detach().clone().requires_grad_()
    expected = torch.nn.functional.kl_div(
        again.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    (expected * factors).sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(divergence(ours, theirs), expected)
    torch.testing.assert_close(found, again.grad)


def test_logits_that_count() -> None:
    """Those of a boolean index, and its gradient."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 7, generator=generator, requires_grad=True)
    counts = torch.rand(3, 5, generator=generator) < 0.6
    factors = torch.randn(int(counts.sum()), 7, generator=generator)
    (expected,) = torch.autograd.grad((logits[counts] * factors).sum(), logits)
    found = counted(logits, counts)
    assert torch.equal(found, logits[counts])
    (gradient,) = torch.autograd.grad((found * factors).sum(), logits)
    assert torch.equal(gradient, expected)
