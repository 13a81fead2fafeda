"""A matrix as a whole: what is said of it is so, better presets are better, and nothing depends on threads."""

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from code_groups import same_layer, switch_kernels_off
from hypothesis import given
from hypothesis import strategies as st
from inputs import moment, noise, weight

from convert_w4a8.codebooks import (
    FAST,
    FULL,
    NO_DATA,
    Method,
    Moment,
    Tables,
    curvature,
    quantize_matrices,
    quantize_matrix,
    w4a16,
)
from convert_w4a8.codebooks.matrix import _together
from convert_w4a8.encoding.dequantize import dequantize
from convert_w4a8.encoding.tables import decode
from convert_w4a8.fp8 import E4M3_NAN
from convert_w4a8.linear import W4A8Linear
from convert_w4a8.quantization.baselines import quantize_reference

N, K = 136, 384
H, W = moment(K), weight(N, K)
PRESETS: dict[str, tuple[Method, Moment]] = {
    "none": (NO_DATA, None),
    "fast": (FAST, H.diagonal()),
    "feedback": (replace(FULL, sweeps=0), H),
    "full": (FULL, H),
}
BOTH = pytest.mark.parametrize("tables", list(Tables))
EVERY = pytest.mark.parametrize("preset", PRESETS)


def quantize(preset: str, tables: Tables = Tables.FREE, matrix: torch.Tensor = W) -> W4A8Linear:
    """Return what a preset makes of a matrix."""
    method, known = PRESETS[preset]
    return quantize_matrix(matrix, known, replace(method, tables=tables))[0]


@pytest.fixture
def threads() -> Iterator[None]:
    """Put torch's number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@BOTH
def test_each_step_lowers_the_error_of_the_outputs(tables: Tables) -> None:
    """No data > energies > feedback > feedback and descent, by far."""
    errors = [noise(decode(quantize(preset, tables)) - W, H) for preset in PRESETS]
    assert all(after < 0.85 * before for before, after in itertools.pairwise(errors))


@EVERY
def test_free_tables_are_better_than_scales(preset: str) -> None:
    """They can be everything that a scale can."""
    known = H if PRESETS[preset][1] is not None else torch.eye(K)
    free, scale = (noise(decode(quantize(preset, tables)) - W, known) for tables in (Tables.FREE, Tables.SCALE))
    assert free < 0.8 * scale


@BOTH
@EVERY
def test_the_stats_are_those_of_the_layer(preset: str, tables: Tables) -> None:
    """Measured in the layer's own decoded weights."""
    method, known = PRESETS[preset]
    target = W + 0.02 * W.roll(1, 0)
    layer, stats = quantize_matrix(W, known, replace(method, tables=tables), target)
    under = {"none": torch.eye(K), "fast": H.diagonal().diag()}.get(preset, H)
    difference = decode(layer) - target
    assert stats.noise == pytest.approx(noise(difference, under), rel=1e-3)
    assert stats.signal == pytest.approx(noise(target, under), rel=1e-4)
    assert stats.weight_noise == pytest.approx(float(difference.double().square().sum()), rel=1e-4)
    assert stats.relative_error == pytest.approx(stats.noise / stats.signal)
    damped = under + stats.damping * torch.eye(K)
    assert stats.objective == pytest.approx(noise(difference, damped), rel=1e-3)


@given(seed=st.integers(0, 999), tokens=st.integers(20, 600), spread=st.floats(0, 3))
def test_sweeps_never_raise_the_objective(seed: int, tokens: int, spread: float) -> None:
    """Whatever the inputs: few tokens, one direction above all others."""
    h = moment(256, seed, tokens)
    direction = torch.randn(256, generator=torch.Generator().manual_seed(seed))
    h += (10**spread - 1) * h.diagonal().mean() * torch.outer(direction, direction)
    w, known = weight(8, 256, seed), curvature(h, FULL.damping)
    found = [quantize_matrix(w, known, replace(FULL, sweeps=sweeps))[1].objective for sweeps in (0, 1, 3)]
    assert max(found[1:]) <= found[0] * (1 + 1e-4)


@BOTH
@EVERY
def test_bytes_do_not_depend_on_the_number_of_threads(preset: str, tables: Tables, threads: None) -> None:  # noqa: ARG001
    """One, two and five; with K so large that a library would share a product."""
    layers = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        layers.append(quantize(preset, tables))
        assert torch.get_num_threads() == count
    assert all(same_layer(layers[0], layer) for layer in layers[1:])


def test_the_factor_does_not_depend_on_the_number_of_threads(threads: None) -> None:  # noqa: ARG001
    """Of a moment of several blocks."""
    h = moment(640)
    found = []
    for count in (1, 3):
        torch.set_num_threads(count)
        found.append(curvature(h, 0.05))
    assert torch.equal(found[0].factor, found[1].factor)  # type: ignore[arg-type]
    assert torch.equal(found[0].importance, found[1].importance)


@BOTH
@EVERY
def test_permuted_rows_give_permuted_results(preset: str, tables: Tables) -> None:
    """No output channel knows of the others."""
    order = torch.randperm(N, generator=torch.Generator().manual_seed(3))
    a, b = decode(quantize(preset, tables)), decode(quantize(preset, tables, W[order]))
    torch.testing.assert_close(a[order], b, rtol=0, atol=1e-6 * float(W.abs().max()))


@BOTH
def test_numba_and_torch_alone_give_the_same_bytes(tables: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where numba cannot be used, only time is lost."""
    pytest.importorskip("numba", reason="numba is not installed")
    method, h, w = replace(FULL, tables=tables, sweeps=1), moment(256), weight(8, 256)
    compiled = quantize_matrix(w, h, method)
    switch_kernels_off(monkeypatch)
    plain = quantize_matrix(w, h, method)
    assert same_layer(compiled[0], plain[0])
    assert compiled[1] == plain[1]


@BOTH
@EVERY
def test_rows_and_inputs_of_zeros_do_no_harm(preset: str, tables: Tables) -> None:
    """An output that is zero stays zero; inputs that were never seen get near codes all the same."""
    method, known = PRESETS[preset]
    if known is not None:
        known = H.clone()
        known[:130] = 0
        known[:, :130] = 0
    w = W.clone()
    w[3] = 0
    layer, stats = quantize_matrix(w, known, replace(method, tables=tables))
    found = decode(layer)
    assert torch.isfinite(found).all()
    assert (found[3] == 0).all()
    assert layer.entries is None or (layer.entries.view(torch.uint8) & 0x7F != E4M3_NAN).all()
    assert noise(found[:, :128] - w[:, :128], torch.eye(128)) < 0.05 * noise(w[:, :128], torch.eye(128))
    assert 0 < stats.relative_error < 0.05


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12, 1e30])
def test_weights_of_any_size(size: float) -> None:
    """Relative errors do not depend on it."""
    layer, _ = quantize_matrix(W * size, None, NO_DATA)
    expected = decode(quantize("none"))
    assert torch.isfinite(decode(layer)).all()
    if size > 1e-20:
        torch.testing.assert_close(decode(layer) / size, expected, rtol=0.2, atol=0.02)


@pytest.mark.parametrize("preset", ["none", "fast", "full"])
def test_vllm_computes_the_scales_from_those_that_are_stored(preset: str) -> None:
    """`stock`: bit for bit, by vLLM's own arithmetic; a channel of zeros and tiny channels too."""
    method, known = PRESETS[preset]
    w = W.clone()
    w[3] = 0
    w[4:9] *= torch.tensor([1e-3, 1e-5, 1e-7, 1e-9, 1e3])[:, None]
    layer, stats = quantize_matrix(w, known, replace(method, tables=Tables.SCALE), stock=True)
    assert layer.source_scale is not None
    assert layer.source_scale.dtype == torch.bfloat16
    group_scale, channel = quantize_reference(layer.source_scale)
    assert torch.equal(group_scale.float(), layer.group_scale.float())  # type: ignore[union-attr]
    assert torch.equal(channel, layer.channel_scale)
    ours = noise(decode(quantize_matrix(w, known, replace(method, tables=Tables.SCALE))[0]) - w, H)
    assert noise(decode(layer) - w, H) < 1.3 * ours
    assert stats.relative_error < 0.05


def test_w4a16_is_symmetric_and_better_with_feedback() -> None:
    """Positive BF16 scales; what a W4A16 kernel needs no more than."""
    errors = []
    for method in (FAST, replace(FULL, sweeps=0), FULL):
        layer = w4a16(W.bfloat16(), H, method)
        assert layer.is_kernel_ready
        assert layer.scales.dtype == torch.bfloat16
        assert (layer.scales >= 0).all()
        errors.append(noise(dequantize(layer) - W.bfloat16().float(), H))
    assert errors[2] < 0.85 * errors[1] < 0.85 * 0.85 * errors[0]


BAD = torch.tensor(float("nan"))


@pytest.mark.parametrize(
    ("matrix", "known", "method", "stock", "said"),
    [
        (W.index_fill(0, torch.tensor([2]), float("nan")), None, NO_DATA, False, "384 of 52224 weights are not finite"),
        (W.index_fill(1, torch.tensor([2]), float("inf")), H, FULL, False, "136 of 52224 weights are not finite"),
        (W[:, :200], None, NO_DATA, False, "K = 200 is not a multiple of 128"),
        (W, H[:128, :128], FULL, False, "the statistics are of 128 inputs, the matrix has 384"),
        (W, H[:, :128], FULL, False, "is not square"),
        (W, H.diagonal(), FULL, False, "need the second moment"),
        (W, None, FULL, False, "need the second moment"),
        (W, H * BAD, FULL, False, "the second moment of the inputs is not finite"),
        (W, -H, FULL, False, "negative energies"),
        (W, -H.diagonal(), FAST, False, "the energies of the inputs are not finite, or negative"),
        (W, H.diagonal() * BAD, FAST, False, "the energies of the inputs are not finite, or negative"),
        (W, H, FULL, True, "stock vLLM cannot load tables"),
        (W, H - 5 * torch.eye(K) * H.diagonal(), FULL, False, "negative energies"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(
    matrix: torch.Tensor, known: Moment, method: Method, stock: bool, said: str
) -> None:
    """Callers name the tensor."""
    with pytest.raises(ValueError, match=said) as raised:
        quantize_matrix(matrix, known, method, stock=stock)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("preset", ["fast", "full"])
def test_several_matrices_are_quantized_as_each_alone(preset: str) -> None:
    """On a CPU the same bytes; worked together, as on a GPU, hardly a code differs; stats are each one's own."""
    method, _ = PRESETS[preset]
    weights = [weight(24, K, seed) * 10.0**seed for seed in range(3)]
    moments = [moment(K, seed) * 10.0**-seed for seed in range(3)]
    known: list[Moment] = [curvature(h, method.damping) if method.feedback else h.diagonal() for h in moments]
    alone = [quantize_matrix(w, h, method) for w, h in zip(weights, known, strict=True)]
    targets = [None, weights[1], None]
    found = quantize_matrices([weights[0], W[:24], weights[2]], known, method, targets)
    assert all(
        same_layer(ours[0], theirs[0]) and ours[1] == theirs[1] for ours, theirs in zip(found, alone, strict=True)
    )
    for (layer, stats), (theirs, expected) in zip(_together(weights, known, method), alone, strict=True):
        assert (layer.packed != theirs.packed).double().mean() < 0.05
        assert stats.noise == pytest.approx(expected.noise, rel=0.02)
        assert stats.signal == pytest.approx(expected.signal, rel=1e-4)
        assert layer.channel_scale.shape == theirs.channel_scale.shape
