"""The verdict: what the statistics say, and that they are what they claim to be."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convert_w4a8.evaluation import paired
from convert_w4a8.evaluation.verdict import EXIT_CODES, Pair, Tolerance, decide


def pairs(lost: int, won: int, same: int, tag: str = "") -> list[Pair]:
    kinds = [(True, False)] * lost + [(False, True)] * won + [(True, True)] * same
    return [Pair(str(n), (tag,) if tag else (), float(a), float(b), (a, b)) for n, (a, b) in enumerate(kinds)]


TOLERANCE = Tolerance(0.05, 0.05, {})


@pytest.mark.parametrize(
    ("found", "decision"),
    [
        (pairs(0, 0, 100), "ship"),
        (pairs(0, 0, 20), "cannot tell"),
        (pairs(3, 40, 100), "ship"),
        (pairs(30, 2, 100), "do not ship"),
        (pairs(8, 1, 100), "cannot tell"),
        (pairs(3, 0, 3), "cannot tell"),
    ],
)
def test_verdicts(found: list[Pair], decision: str) -> None:
    """Of passed and failed prompts."""
    assert decide(found, TOLERANCE).decision == decision


@pytest.mark.parametrize("score", [0.0, 0.01, 0.05])
@pytest.mark.parametrize("tag", ["", "niche"])
def test_nothing_to_lose_is_no_proof(score: float, tag: str) -> None:
    """Where the baseline scores no more than may be lost, as with a wrong reference, anything would be shipped."""
    empty = [Pair(f"x{n}", (tag,) if tag else (), score, score, None) for n in range(400)]
    found = empty + (pairs(0, 0, 4000) if tag else [])
    verdict = decide(found, TOLERANCE)
    assert verdict.decision == "cannot tell"
    assert len(verdict.reasons) == 1
    assert f"the baseline scores {100 * score:.1f} points, and 5.0 points may be lost" in verdict.reasons[0]
    assert verdict.groups[-1].more is None
    above = [replace(pair, baseline=pair.baseline + 0.06, candidate=pair.candidate + 0.06) for pair in empty]
    assert decide(above + found[400:], TOLERANCE).decision == "ship"
    assert decide(found, Tolerance(1, 1, {})).decision == "ship"  # all may be lost: nobody asks for quality


@settings(max_examples=60)
@given(
    st.lists(st.sampled_from([0.0, 0.02, 0.1, 0.5, 1.0]), min_size=1, max_size=80),
    st.sampled_from([0.0, 0.01, 0.05, 0.3, 0.99]),
    st.integers(1, 40),
)
def test_a_candidate_that_answers_nothing_right_is_never_shipped(
    scores: list[float], tolerance: float, times: int
) -> None:
    """Whatever the baseline scores, the tolerance is, and however many prompts there are."""
    found = [Pair(str(n), ("t",) if n % 2 else (), score, 0.0, None) for n, score in enumerate(scores * times)]
    assert decide(found, Tolerance(tolerance, tolerance, {})).decision != "ship"


def test_exit_codes() -> None:
    """0 for ship alone; 1 and 2 are errors'."""
    assert EXIT_CODES == {"ship": 0, "do not ship": 3, "cannot tell": 4}


def test_a_tag_can_forbid_what_the_whole_allows() -> None:
    """A loss in one tag is not outweighed by the others."""
    found = pairs(0, 0, 2000, "easy") + pairs(20, 0, 40, "niche")
    verdict = decide(found, TOLERANCE)
    assert {group.name: group.decision for group in verdict.groups} == {
        "": "ship",
        "easy": "ship",
        "niche": "do not ship",
    }
    assert verdict.decision == "do not ship"
    assert verdict.reasons[0].startswith("tag niche: at least")


def test_a_small_tag_keeps_it_open_unless_it_may() -> None:
    """Ten prompts of a tag show little; a tolerance of its own says that this is enough."""
    found = pairs(0, 0, 200, "many") + pairs(0, 0, 10, "few")
    verdict = decide(found, TOLERANCE)
    assert verdict.decision == "cannot tell"
    assert "tag few" in verdict.reasons[0]
    assert "more prompts would decide" in verdict.reasons[0]
    assert decide(found, Tolerance(0.05, 0.05, {"few": 0.3})).decision == "ship"


def test_nothing_is_shipped_while_answers_are_missing() -> None:
    """However good the others are; what is bad is bad all the same."""
    verdict = decide(pairs(0, 0, 200), TOLERANCE, ["3 answers are missing"])
    assert (verdict.decision, verdict.reasons) == ("cannot tell", ("3 answers are missing",))
    assert decide(pairs(60, 0, 60), TOLERANCE, ["3 answers are missing"]).decision == "do not ship"


def test_without_scores_it_cannot_tell() -> None:
    """And says what to give."""
    assert "no prompt has checks" in decide([], TOLERANCE).reasons[0]


@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_is_the_binomial_test(losses: int, wins: int) -> None:
    """Two-sided, by summing what is no likelier, as far as the distribution is symmetric."""
    total = losses + wins
    chances = [math.comb(total, k) / 2**total for k in range(total + 1)]
    wanted = math.fsum(chance for chance in chances if chance <= chances[losses] * (1 + 1e-9))
    assert paired.mcnemar(losses, wins) == pytest.approx(wanted)


@pytest.mark.parametrize("count", [20, 60, 100, 300])
def test_without_any_loss_the_bound_is_the_rule_of_three(count: int) -> None:
    """The exact bound of a share that was never seen is 1 - 0.05^(1/N)."""
    exact = 1 - 0.05 ** (1 / count)
    assert -paired.bounds(np.zeros(count)).lower == pytest.approx(exact, rel=0.06)


@pytest.mark.parametrize(
    ("tolerance", "counts"), [(0.05, (60, 80, 93, 126, 200, 300)), (0.02, (150, 200, 206)), (0.1, (40,)), (0.2, (85,))]
)
def test_where_nothing_is_won_ship_is_wrong_up_to_9_percent(tolerance: float, counts: tuple[int, ...]) -> None:
    """The exact chance to see so few losses that it is shipped, where the true loss is the tolerance itself."""
    assert max(_wrong(tolerance, counts)) <= 0.09


def test_of_few_prompts_that_may_lose_half_it_is_wrong_up_to_11_percent() -> None:
    """The worst tolerance for each number of losses: just what its bound allows."""
    chances = [0.0]
    for count in range(1, 11):
        for lost in range(count):
            most = -paired.bounds(np.array([-1.0] * lost + [0.0] * (count - lost))).lower
            if most < 1:
                chances += [_binomial(count, lost + 1, most)]
    assert 0.11 < max(chances) < 0.112


def _wrong(tolerance: float, counts: tuple[int, ...]) -> list[float]:
    chances = []
    for count in counts:
        shipped = 0
        while paired.bounds(np.array([-1.0] * shipped + [0.0] * (count - shipped))).lower > -tolerance:
            shipped += 1
        chances.append(_binomial(count, shipped, tolerance))
    return chances


def _binomial(count: int, below: int, share: float) -> float:
    """Return the chance that fewer than `below` of `count` are lost."""
    return sum(math.comb(count, n) * share**n * (1 - share) ** (count - n) for n in range(below))


@settings(max_examples=30)
@given(st.lists(st.sampled_from([-1.0, -0.5, 0.0, 0.25, 1.0]), min_size=2, max_size=60))
def test_bounds_enclose_the_mean(values: list[float]) -> None:
    """Whatever the scores are."""
    found = paired.bounds(np.array(values))
    assert found.lower <= found.mean <= found.upper


@pytest.mark.parametrize("values", [[-1.0] * 5 + [0.0] * 50 + [1.0] * 12, [0.0] * 30 + [0.25] * 40 + [-0.5] * 20])
def test_exchanging_the_sides_exchanges_the_bounds(values: list[float]) -> None:
    """Up to the luck of the draws."""
    found, other = (paired.bounds(sign * np.array(values)) for sign in (1, -1))
    assert found.lower == pytest.approx(-other.upper, abs=0.01)


def test_bounds_are_wrong_as_seldom_as_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """On simulated prompts, of which a share is lost and won; 5 % and the luck of 400 draws."""
    monkeypatch.setattr(paired, "DRAWS", 4000)
    rng = np.random.default_rng(3)
    for count, lost, won in ((50, 0.1, 0.05), (200, 0.1, 0.02)):
        wrong = 0
        for _ in range(400):
            u = rng.random(count)
            found = paired.bounds(np.where(u < lost, -1.0, np.where(u < lost + won, 1.0, 0.0)))
            wrong += found.lower > won - lost
        assert wrong <= 400 * 0.05 + 3 * math.sqrt(400 * 0.05 * 0.95)


def test_more_prompts_are_enough_and_not_far_too_many() -> None:
    """Of equal answers 3 over the tolerance are needed, less those that there are."""
    assert paired.more_prompts(np.zeros(40), 0.05) == pytest.approx(3 / 0.05 - 40, abs=3)
    found = np.array([-1.0] * 20 + [0.0] * 80)
    more = paired.more_prompts(found, 0.1)
    assert more is not None
    assert decide(pairs(20 + more // 5, 0, 80 + 4 * more // 5), Tolerance(0.1, 0.1, {})).decision == "do not ship"


def test_a_loss_of_the_tolerance_is_never_decided() -> None:
    """No number of prompts tells equal things apart."""
    assert paired.more_prompts(np.array([-1.0] * 5 + [0.0] * 95), 0.05) is None


def drifts(mean: float, count: int, seed: int = 0) -> list[tuple[float, int]]:
    """Return divergences as they were measured of a checkpoint: skewed, with a spread of 0.5 in their logarithm."""
    rng = np.random.default_rng(seed)
    values = mean * np.exp(0.5 * rng.standard_normal(count) - 0.125)
    return [(float(value), int(tokens)) for value, tokens in zip(values, rng.integers(10, 100, count), strict=True)]


@pytest.mark.parametrize(
    ("found", "losses", "decision", "reason"),
    [
        ([], drifts(0.003, 100), "ship", "divergence: at most 0.00"),
        ([], drifts(0.03, 100), "do not ship", "divergence: at least 0.02"),
        ([], drifts(0.01, 100), "cannot tell", "divergence: between 0.0"),
        ([], drifts(0.003, 59), "cannot tell", "divergence: 59 answers tell nothing; 60 are needed"),
        ([], [], "cannot tell", "divergence: no log-probabilities were to be had"),
        (pairs(0, 0, 100), drifts(0.003, 100), "ship", "all prompts: at most"),
        (pairs(0, 0, 100), drifts(0.03, 100), "do not ship", "divergence: at least 0.02"),
        (pairs(30, 2, 100), drifts(0.003, 100), "do not ship", "all prompts: at least"),
        (pairs(0, 0, 100), [], "cannot tell", "divergence: no log-probabilities"),
    ],
)
def test_a_divergence_that_is_not_to_be_exceeded(
    found: list[Pair], losses: list[tuple[float, int]], decision: str, reason: str
) -> None:
    """With checks both must hold; without any it decides alone."""
    tolerance = replace(TOLERANCE, divergence=0.01)
    verdict = decide(found, tolerance, (), losses)
    assert verdict.decision == decision
    assert verdict.reasons[0].startswith(reason)
    assert decide(found, tolerance, ("something is missing",), losses).decision != "ship"


def test_equal_models_have_no_divergence() -> None:
    """And bounds without width."""
    assert decide([], replace(TOLERANCE, divergence=0.001), (), [(0.0, 5)] * 60).decision == "ship"


def test_bounds_of_divergences_are_wrong_as_seldom_as_they_say() -> None:
    """Of skewed ones; 5 % and the luck of 200 draws, each way."""
    high = low = 0
    for seed in range(200):
        values, tokens = (np.array(column, dtype=float) for column in zip(*drifts(1.0, 60, seed), strict=True))
        found = paired.ratio_bounds(values, tokens)
        high += found.upper < 1
        low += found.lower > 1
    assert high <= 20
    assert low <= 20
