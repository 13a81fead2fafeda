"""The kernels that train layers: against torch."""

import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from convert_w4a8.fp8 import quantize_tokens, to_e4m3
from convert_w4a8.kernels.training import reference

pytest.importorskip("triton", reason="Triton is not installed")
KERNELS = importlib.import_module("convert_w4a8.kernels.training.gpu")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(m=st.integers(1, 4), groups=st.integers(1, 3), seed=st.integers(0, 99))
def test_quantize_is_vllms(m: int, groups: int, seed: int) -> None:
    """Bit for bit `quantize_tokens`, rows of very different sizes and zeros among them."""
    x = torch.randn(m, 128 * groups, generator=generator(seed))
    x *= torch.randn(m, 1, generator=generator(seed + 1)).mul(8).exp2()
    x[:, ::7] *= 2.0**-9
    x[0] *= seed % 2
    tokens, wide, scale = (each.cpu() for each in KERNELS.quantize(x.bfloat16().to(DEVICE)))
    expected, expected_scale = quantize_tokens(x.bfloat16())
    assert torch.equal(scale, expected_scale)
    assert torch.equal(tokens.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(wide, expected.bfloat16())


def test_widen_is_exact() -> None:
    """Every number of E4M3."""
    tokens = torch.tensor([byte for byte in range(256) if byte & 127 != 127] * 5, dtype=torch.uint8).view(
        torch.float8_e4m3fn
    )
    assert torch.equal(KERNELS.widen(tokens.to(DEVICE)).cpu(), tokens.bfloat16())


@given(m=st.integers(1, 4), n=st.sampled_from([16, 1030]), seed=st.integers(0, 99))
def test_scaled_sums_and_gradients(m: int, n: int, seed: int) -> None:
    """Bit for bit."""
    sums = torch.randn(m, n, generator=generator(seed))
    token, channel = torch.rand(m, 1, generator=generator(seed)), torch.rand(n, generator=generator(seed))
    found = KERNELS.scale_outputs(sums.to(DEVICE), token.to(DEVICE), channel.to(DEVICE))
    assert torch.equal(found.cpu(), reference.scale_outputs(sums, token, channel))
    gradient = sums.bfloat16()
    pair = KERNELS.scale_gradients(gradient.to(DEVICE), token.to(DEVICE), channel.to(DEVICE))
    for ours, theirs in zip(pair, reference.scale_gradients(gradient, token, channel), strict=True):
        assert torch.equal(ours.cpu(), theirs)


@given(n=st.integers(1, 5), groups=st.integers(1, 3), seed=st.integers(0, 99))
def test_tables(n: int, groups: int, seed: int) -> None:
    """Look-ups and choices bit for bit, equal entries and ties among them; sums of integers exactly."""
    entries = to_e4m3(torch.randn(n, groups, 8, generator=generator(seed)).mul(3)).float()
    entries[0, 0, 3:5] = entries[0, 0, 2]
    codes = torch.randint(0, 16, (n, 128 * groups), generator=generator(seed)).to(torch.uint8)
    found = KERNELS.look_up(entries.to(DEVICE), codes.to(DEVICE)).cpu()
    assert torch.equal(found, reference.look_up(entries, codes))
    weights = torch.randn(codes.shape, generator=generator(seed)).mul(8).round_().div_(4)
    factor = torch.tensor([1.0, 0.7, 1.3, 1.0, 1.1])[:n]
    pair = KERNELS.choose(weights.to(DEVICE), factor.to(DEVICE), entries.to(DEVICE))
    for ours, theirs in zip(pair, reference.choose(weights, factor, entries), strict=True):
        assert torch.equal(ours.cpu(), theirs)
    gradient = torch.randint(-9, 9, codes.shape, generator=generator(seed)).float()
    found = KERNELS.sum_by_entry(gradient.to(DEVICE), codes.to(DEVICE)).cpu()
    assert torch.equal(found, reference.sum_by_entry(gradient, codes))


@pytest.mark.parametrize("vocabulary", [33, 4096, 5000])
@pytest.mark.parametrize("with_gradient", [True, False])
def test_divergence(vocabulary: int, with_gradient: bool) -> None:
    """Within float32's rounding, tokens masked to minus infinity in both among them."""
    student = torch.randn(5, vocabulary, generator=generator(0)) * 4
    teacher = student + torch.randn(5, vocabulary, generator=generator(1)) / 8
    student[1, :3] = 0
    teacher[1, :3] = -torch.inf
    values, gradient = KERNELS.divergence(student.to(DEVICE), teacher.to(DEVICE), with_gradient=with_gradient)
    theirs = teacher.double().log_softmax(-1)
    ours = student.double().log_softmax(-1)
    expected = torch.where(theirs.exp() > 0, theirs.exp() * (theirs - ours), 0.0).sum(-1)
    torch.testing.assert_close(values.cpu(), expected.float(), rtol=1e-4, atol=1e-6)
    assert (gradient is not None) == with_gradient
    if gradient is not None:
        torch.testing.assert_close(gradient.cpu(), (ours.exp() - theirs.exp()).float(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("rounded", [True, False])
def test_adam(rounded: bool) -> None:
    """Three steps are those of torch's own optimizer."""
    value = torch.randn(1100, generator=generator(0))
    theirs = value.clone().requires_grad_()
    optimizer = torch.optim.Adam([theirs], lr=0.02, betas=(0.9, 0.99), eps=1e-8)
    ours = value.to(DEVICE)
    first, second = torch.zeros_like(ours), torch.zeros_like(ours)
    copy = torch.zeros_like(ours, dtype=torch.bfloat16) if rounded else None
    for step in range(1, 4):
        gradient = torch.randn(1100, generator=generator(step))
        theirs.grad = gradient
        optimizer.step()
        numbers = [0.02 / (1 - 0.9**step), 0.1, 0.01, (1 - 0.99**step) ** -0.5, 1e-8]
        device_numbers = torch.tensor(numbers, device=DEVICE)
        KERNELS.adam(ours, gradient.to(DEVICE), first, second, copy, device_numbers)
    torch.testing.assert_close(ours.cpu(), theirs.detach(), rtol=1e-5, atol=1e-6)
    if copy is not None:
        assert torch.equal(copy.cpu(), ours.bfloat16().cpu())


@given(st.integers(1, 300), st.integers(0, 1000), st.floats(0, 8))
def test_pull(tables: int, seed: int, part: float) -> None:
    """Bit for bit the reference's, to every E4M3 number and from beyond the largest, without a curvature too."""
    numbers = torch.tensor([byte for byte in range(256) if byte & 127 != 127], dtype=torch.uint8)
    place = torch.randint(0, len(numbers), (tables, 1, 8), generator=generator(seed))
    start = numbers[place].view(torch.float8_e4m3fn).float()
    step = torch.exp2(torch.randint(-9, 6, start.shape, generator=generator(seed)).float())
    entries, h, second = (torch.randn(start.shape, generator=generator(seed + i)) for i in range(3))
    second.square_()
    h.relu_()
    second[:1], h[:, :, :2] = 0, 0
    found, expected = entries.to(DEVICE), entries.clone()
    KERNELS.pull(found, start.to(DEVICE), step.to(DEVICE), h.to(DEVICE), second.to(DEVICE), part)
    reference.pull(expected, start, step, h, second, part)
    assert torch.equal(found.cpu(), expected)
    assert torch.equal(expected[:, :, :2], entries[:, :, :2])
