"""The kernels between linear layers: against torch."""

import importlib

import pytest
import torch

from convert_w4a8.kernels.blocks import reference

pytest.importorskip("triton", reason="Triton is not installed")
KERNELS = importlib.import_module("convert_w4a8.kernels.blocks.gpu")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Most numbers are the same, and the others differ by BF16's last bit: sums and exponentials are other ones."""
    torch.testing.assert_close(found.cpu(), expected, rtol=2.0**-7, atol=2.0**-20)
    assert (found.cpu() == expected).float().mean() > 0.97


@pytest.mark.parametrize(("m", "h"), [(1, 128), (70, 96), (3, 768)])
def test_norm(m: int, h: int) -> None:
    """Rows of very different sizes, widths that are no power of two, more rows than one program takes."""
    x, weight, gradient = numbers(m, h) * numbers(m, 1, seed=1).mul(4).exp2(), numbers(h, seed=2), numbers(m, h, seed=3)
    expected, inverse = reference.normalize(x, weight, 1e-5)
    found = KERNELS.normalize(x.to(DEVICE), weight.to(DEVICE), 1e-5)
    close(found[0], expected)
    torch.testing.assert_close(found[1].cpu(), inverse, rtol=1e-5, atol=0)
    ours = KERNELS.normalize_gradients(gradient.to(DEVICE), x.to(DEVICE), weight.to(DEVICE), inverse.to(DEVICE))
    of_x, of_weight = reference.normalize_gradients(gradient, x, weight, inverse)
    torch.testing.assert_close(ours[0].cpu(), of_x, rtol=2.0**-6, atol=float(of_x.abs().max()) * 2.0**-10)
    torch.testing.assert_close(ours[1].cpu(), of_weight, rtol=2.0**-6, atol=2.0**-8)


@pytest.mark.parametrize("m", [1, 9])
def test_gate(m: int) -> None:
    """Large gates among them, whose exponentials overflow."""
    gates, up, gradient = numbers(m, 160) * 8, numbers(m, 160, seed=1), numbers(m, 160, seed=2)
    gates[0, :2] = torch.tensor([-200.0, 200.0])
    close(KERNELS.gate(gates.to(DEVICE), up.to(DEVICE)), reference.gate(gates, up))
    ours = KERNELS.gate_gradients(gradient.to(DEVICE), gates.to(DEVICE), up.to(DEVICE))
    for found, expected in zip(ours, reference.gate_gradients(gradient, gates, up), strict=True):
        torch.testing.assert_close(found.cpu(), expected, rtol=2.0**-6, atol=2.0**-10)


@pytest.mark.parametrize(("heads", "width", "batches"), [(3, 64, 1), (1, 24, 2)])
@pytest.mark.parametrize("back", [False, True])
def test_rotation(*, heads: int, width: int, batches: int, back: bool) -> None:
    """Bit for bit, of heads that lie beside each other, as a projection leaves them, and others."""
    cos, sin = numbers(batches, 5, width, seed=1), numbers(batches, 5, width, seed=2)
    for x in (numbers(2, 5, heads, width).transpose(1, 2), numbers(2, heads, 5, width)):
        found = KERNELS.rotate(x.to(DEVICE), cos.to(DEVICE), sin.to(DEVICE), back=back).cpu()
        assert torch.equal(found, reference.rotate(x, cos, sin, back=back))
