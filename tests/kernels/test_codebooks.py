"""Codebooks: numba's and Triton's are those of the reference, whose fit is the best there is."""

import itertools
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest
import torch
from code_groups import KINDS, groups
from hypothesis import given, settings
from hypothesis import strategies as st

from convert_w4a8 import devices
from convert_w4a8.fp8 import E4M3, to_e4m3
from convert_w4a8.kernels.codebooks import reference
from convert_w4a8.kernels.codes.reference import nearest_codes, values_of

TABLES = st.lists(st.integers(0, 255).filter(lambda b: b & 0x7F != 0x7F), min_size=8, max_size=8)


@pytest.fixture(scope="module")
def compiled() -> ModuleType:
    """Return numba's kernels."""
    pytest.importorskip("numba", reason="numba is not installed")
    return import_module("convert_w4a8.kernels.codebooks.cpu")


def unit(kind: str, seed: int, rows: int = 24) -> torch.Tensor:
    """Return groups of values of the size that E4M3 numbers have."""
    values = groups(kind, 128, seed, rows).double()
    return (values * (100 / values.abs().max().clamp(min=1e-60))).float()


def shares(seed: int, rows: int = 3) -> torch.Tensor:
    """Return importances, float64 [rows, 128], some of them zero."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(rows, 128, generator=generator, dtype=torch.float64) - 0.1).clamp(min=0)


def second_moment(seed: int, dead: int | None = 5) -> torch.Tensor:
    """Return a block of a second moment, float64 [128, 128], with an input that is always zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(300, 128, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(128, 128, generator=generator, dtype=torch.float64) / 12
    if dead is not None:
        x[:, dead] = 0
    return x.t() @ x / 300


def errors_of(values: torch.Tensor, importance: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
    """Return the weighted squared errors of the nearest codes, float64 [R]."""
    values = values.double()
    d = values - values_of(entries, nearest_codes(values, entries))
    return (importance * d * d).sum(1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rounds", [0, 8])
def test_fit_is_the_reference_bit_for_bit(compiled: ModuleType, kind: str, rounds: int) -> None:
    """Equal magnitudes, groups of one sign, weights of zero and values of any size among them."""
    values, importance = groups(kind, 128, 1), shares(2)
    importance[1] = 0
    assert torch.equal(compiled.fit(values, importance, rounds), reference.fit(values, importance, rounds))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("passes", [0, 1, 3])
def test_refine_is_the_reference_bit_for_bit(compiled: ModuleType, kind: str, passes: int) -> None:
    """From the entries that the fit gives, and no pass raises the error."""
    values, importance = unit(kind, 3), shares(4)
    start = reference.fit(values, importance, 2)
    results = []
    for kernels in (compiled, reference):
        entries, codes = start.clone(), torch.full(values.shape, 99, dtype=torch.uint8)
        kernels.refine(values, importance, entries, codes, passes)
        results.append((entries, codes))
        assert torch.equal(codes, nearest_codes(values.double(), entries).to(torch.uint8))
        assert torch.equal(entries, to_e4m3(entries.float()).double())
        rounded, weights = to_e4m3(start.float()).double(), importance.repeat(8, 1)
        assert (errors_of(values, weights, entries) <= errors_of(values, weights, rounded) * (1 + 1e-12)).all()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_scales_are_those_of_the_reference(compiled: ModuleType, kind: str) -> None:
    """Of either sign, within limits, one of which leaves no choice."""
    values, importance = unit(kind, 5), shares(6)
    scales = torch.randn(len(values), generator=torch.Generator().manual_seed(7)) * 12
    limits = torch.tensor([[0, 102]], dtype=torch.uint8).repeat(len(values), 1)
    limits[3] = 102
    results = []
    for kernels in (compiled, reference):
        codes = torch.full(values.shape, 99, dtype=torch.uint8)
        results.append((kernels.fit_scale(values, importance, scales, limits, codes), codes))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    entries = results[0][0]
    f = entries[:, 0] / -8
    assert f.abs().max() <= 56
    assert float(f[3].abs()) == 56
    assert torch.equal(entries, to_e4m3((f[:, None] * torch.arange(-8, 0)).float()).double())


@settings(max_examples=8)
@given(rows=st.lists(TABLES, min_size=4, max_size=4), kind=st.sampled_from(KINDS), seed=st.integers(0, 99))
def test_feedback_and_descent_are_the_reference_bit_for_bit(
    compiled: ModuleType, rows: list[list[int]], kind: str, seed: int
) -> None:
    """From tables of any bytes."""
    entries = torch.tensor(rows, dtype=torch.uint8).view(E4M3).double()
    goal = unit(kind, seed, len(rows))
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(2, 128, 128, generator=generator, dtype=torch.float64).mul(0.1).triu(1)
    moment = torch.stack((second_moment(seed), second_moment(seed + 1)))
    for free in (True, False):
        results: list[tuple[torch.Tensor, ...]] = []
        for kernels in (compiled, reference):
            codes, errors = torch.full(goal.shape, 99, dtype=torch.uint8), torch.full_like(goal, 99)
            kernels.feedback(goal, goal, factor, entries, codes, errors)
            fed = codes.clone(), errors.clone()
            table, gradient = entries.clone(), errors @ moment[0].float()
            kernels.descend(goal, gradient, moment, table, codes, errors, 2, free)
            results.append((*fed, table, codes, errors))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@given(rows=st.lists(TABLES, min_size=1, max_size=4), kind=st.sampled_from(KINDS), seed=st.integers(0, 99))
def test_descent_never_raises_the_objective(compiled: ModuleType, rows: list[list[int]], kind: str, seed: int) -> None:
    """Whatever the tables and the codes it begins with; what it says of its errors is so."""
    entries = torch.tensor(rows, dtype=torch.uint8).view(E4M3).double()
    goal, moment = unit(kind, seed, len(rows)), second_moment(seed)
    codes = torch.randint(0, 16, goal.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))

    def objective() -> torch.Tensor:
        e = values_of(entries, codes) - goal
        return ((e @ moment) * e).sum(1)

    before = objective()
    errors = (values_of(entries, codes) - goal).float()
    gradient = (errors.double() @ moment).float()
    compiled.descend(goal, gradient, moment[None], entries, codes, errors, 3, True)
    assert (objective() <= before * (1 + 1e-6)).all()
    assert torch.equal(errors, (values_of(entries, codes) - goal).float())
    assert torch.equal(entries, to_e4m3(entries.float()).double())


def brute_force(values: list[float], weights: list[float], clusters: int) -> float:
    """Return the least error of magnitudes as zeros and some clusters: every assignment is tried."""
    best = float("inf")
    for assignment in itertools.product(range(clusters + 1), repeat=len(values)):
        total = 0.0
        for c in range(clusters + 1):
            chosen = [(v, w) for v, w, a in zip(values, weights, assignment, strict=True) if a == c]
            mass = sum(w for _, w in chosen)
            mean = sum(v * w for v, w in chosen) / mass if c and mass else 0.0
            total += sum(w * (v - mean) ** 2 for v, w in chosen)
        best = min(best, total)
    return best


@given(
    values=st.lists(st.floats(-10, 10, width=16), min_size=4, max_size=6),
    weights=st.lists(st.floats(0.125, 4, width=16), min_size=6, max_size=6),
)
def test_the_clusters_are_the_best_there_are(values: list[float], weights: list[float]) -> None:
    """With two clusters beside the zeros, among all assignments; the lone entry can only lower that."""
    w = torch.tensor([values])
    h = torch.tensor([weights[: len(values)]], dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:  # few values are too many for two magnitudes
        patch.setattr(reference, "_CLUSTERS", 2)
        entries = reference.fit(w, h, 0)
    without = entries.clone()
    without[:, 0] = 0
    least = brute_force([abs(v) for v in w[0].tolist()], h[0].tolist(), 2)
    assert float(errors_of(w, h, without)) == pytest.approx(least, abs=1e-9)
    assert float(errors_of(w, h, entries)) <= least + 1e-9


@pytest.mark.parametrize("count", [1, 4, 7])
def test_up_to_seven_magnitudes_are_found_exactly(compiled: ModuleType, count: int) -> None:
    """And, beside fewer of them, an eighth of one sign."""
    magnitudes = torch.arange(1, count + 1) * 3.0
    signs = torch.tensor([1.0, -1.0]).repeat(64)
    values = (magnitudes.repeat(128 // count + 1)[:128] * signs)[None].repeat(2, 1)
    values[1, 7] = -50.0
    entries = compiled.fit(values, torch.ones(1, 128, dtype=torch.float64), 8)
    assert (errors_of(values, torch.ones(2, 128), entries)[: 2 if count < 7 else 1] < 1e-9).all()
    assert float(entries[1].abs().max()) == pytest.approx(50)


def test_every_number_between_two_entries_is_rounded_as_torch_rounds_it(compiled: ModuleType) -> None:
    """All finite E4M3 numbers, and the floats around and between them: refining one entry is rounding it."""
    numbers = torch.arange(127, dtype=torch.uint8).view(E4M3).float()
    middles = (numbers[1:] + numbers[:-1]) / 2
    points = torch.cat((numbers, middles, middles.nextafter(numbers[1:]), middles.nextafter(numbers[:-1])))
    points = torch.cat((points, -points, torch.tensor([460.0, 465.0, 1e30, -1e30])))
    entries = torch.zeros(len(points), 8, dtype=torch.float64)
    entries[:, 0] = points
    nothing = torch.zeros(1, 128, dtype=torch.float64)
    compiled.refine(
        torch.zeros(len(points), 128), nothing, entries, torch.empty(len(points), 128, dtype=torch.uint8), 0
    )
    assert torch.equal(entries[:, 0], to_e4m3(points).double())


def interpreted() -> Any:
    """Return Triton's kernels."""
    pytest.importorskip("triton", reason="Triton is not installed")
    return import_module("convert_w4a8.kernels.codebooks.gpu")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gauss", "one-sided"])
def test_triton_does_what_the_reference_does(kind: str) -> None:
    """In float32: the same entries and codes here, where no choice is a close one."""
    kernels, device = interpreted(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    values, importance = unit(kind, 8, 4).to(device), shares(9).to(device)
    moment = torch.stack((second_moment(10), second_moment(11))).to(device)
    start = reference.fit(values, importance, 1)
    torch.testing.assert_close(kernels.fit(values, importance, 1), start, rtol=1e-3, atol=1e-2)
    results = []
    factor = moment.mul(0.1).triu(1)
    for module in (kernels, reference):
        entries, codes = start.clone(), torch.full(values.shape, 99, dtype=torch.uint8, device=device)
        module.refine(values, importance, entries, codes, 1)
        errors = torch.full_like(values, 99)
        module.feedback(values, values, factor, entries, codes, errors)
        fed = codes.clone(), errors.clone()
        module.descend(values, errors @ moment[0].float(), moment, entries, codes, errors, 1, True)
        results.append((*fed, entries, codes, errors))
    for ours, theirs in zip(*results, strict=True):
        assert (ours != theirs).double().mean() < 0.01


def test_the_table_of_operations_finds_numba(compiled: ModuleType) -> None:
    """What serves a CPU."""
    assert devices.codebooks(torch.device("cpu")) is compiled
