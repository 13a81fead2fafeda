"""Second moments made ready, targets between two models, and scales of input channels."""

import pytest
import torch
from inputs import moment, noise, weight

from convert_w4a8.codebooks import FAST, Tables, awq_exponent, curvature, mixed_target, quantize_matrix
from convert_w4a8.encoding.tables import decode


@pytest.mark.parametrize("k", [128, 256, 640])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_factor_is_one_of_the_damped_moment(k: int, dtype: torch.dtype) -> None:
    """H + damping·I = R·Rᵀ with R = M·diag(r), upper triangular; the moment is left as it was."""
    h = moment(k).to(dtype)
    before = h.clone()
    known = curvature(h, 0.05)
    assert torch.equal(h, before)
    assert known.damping == pytest.approx(0.05 * float(h.diagonal().mean()))
    assert known.factor is not None
    assert torch.equal(known.factor, known.factor.triu())
    assert torch.equal(known.factor.diagonal(), torch.ones(k))
    r = known.factor.double() * known.importance.sqrt()
    torch.testing.assert_close(r @ r.t(), h.double() + known.damping * torch.eye(k), rtol=1e-4, atol=1e-5)


def test_float32_is_enough_where_float64_would_take_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above 8192 inputs."""
    h = moment(640)
    exact = curvature(h, 0.05)
    monkeypatch.setattr("convert_w4a8.codebooks.moments._EXACT", 0)
    rough = curvature(h, 0.05)
    assert exact.factor is not None
    assert rough.factor is not None
    assert not torch.equal(rough.factor, exact.factor)
    torch.testing.assert_close(rough.factor, exact.factor, rtol=0, atol=1e-3)


def test_the_importance_is_what_gptq_divides_by() -> None:
    """R[k, k]² = 1 / (H⁻¹'s Cholesky factor)[k, k]², and the factor's rows are those of GPTQ's, signs changed."""
    h = moment(256).double()
    known = curvature(h, 0.05)
    damped = h + known.damping * torch.eye(256)
    u = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    torch.testing.assert_close(known.importance, u.diagonal() ** -2, rtol=1e-6, atol=0)
    assert known.factor is not None
    inverse = torch.linalg.inv(known.factor.double())
    torch.testing.assert_close(inverse, u / u.diagonal()[:, None], rtol=0, atol=1e-3)


def test_damping_rises_until_there_is_a_factor() -> None:
    """A moment that a sum of rounding errors left indefinite; nothing helps where energies hide the worst."""
    h = moment(256)
    known = curvature(h - 0.2 * h.diagonal().mean() * torch.ones(256, 256) / 256 - 0.01 * torch.eye(256), 0.0)
    assert known.damping > 0
    indefinite = torch.ones(256, 256) * -1e9
    indefinite.fill_diagonal_(1.0)
    with pytest.raises(ValueError, match="not positive definite, whatever is added"):
        curvature(indefinite, 0.05)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_mixed_target_gives_the_original_outputs(alpha: float) -> None:
    """W + α·W·(C − H)·H⁻¹; at 1 no other matrix gives W·x from x̂ with less error. The weight is left as it was."""
    k = 256
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(1000, k, generator=generator) @ torch.randn(k, k, generator=generator) / 16
    seen = x + 0.2 * torch.randn(1000, k, generator=generator)
    h, cross, w = seen.t() @ seen / 1000, x.t() @ seen / 1000, weight(24, k)
    before = w.clone()
    found = mixed_target(w, h, cross, alpha, 0.01)
    assert torch.equal(w, before)
    assert torch.equal(mixed_target(w, curvature(h, 0.01), cross, alpha, 1.0), found)
    damped = h.double() + 0.01 * h.diagonal().double().mean() * torch.eye(k)
    expected = w.double() + alpha * w.double() @ (cross.double() - h.double()) @ torch.linalg.inv(damped)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)
    if alpha == 1:
        error, plain = ((x @ w.t() - seen @ target.t()).square().mean() for target in (found, w))
        assert error < 0.9 * plain


def test_scaling_helps_uniform_tables_where_inputs_differ_in_size() -> None:
    """The chosen exponent is the best of those tried; scales are powers of two whose mean keeps weights as they are."""
    h, w = moment(256), weight(64, 256)
    method = FAST.__class__(Tables.SCALE, feedback=False, sweeps=0)
    errors = []
    for ratio in (0.0, 0.3, 0.6):
        s, chosen = awq_exponent([w], h, method, [ratio])
        assert chosen == ratio
        assert float(s.log2().mean()) == pytest.approx(0, abs=0.1)
        assert torch.equal(s.log2(), s.log2().round())
        layer, _ = quantize_matrix(w * s, h.diagonal() / s.square(), method)
        errors.append(noise(decode(layer) / s - w, h))
    _, ratio = awq_exponent([w], h, method, [0.0, 0.3, 0.6])
    assert ratio == (0.0, 0.3, 0.6)[errors.index(min(errors))]


def test_tied_channels_get_the_same_scale() -> None:
    """Also from energies alone, and where some are zero."""
    energies = moment(256).diagonal().clone()
    energies[7] = 0
    tie = torch.arange(256) % 64
    s, _ = awq_exponent([weight(16, 256)], energies, FAST, [0.5], tie)
    assert torch.equal(s.view(4, 64), s[:64].expand(4, 64))
    assert torch.isfinite(s).all()
    assert float(s.min()) >= 1 / 8
