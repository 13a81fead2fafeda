"""How far two engines' answers to the same prompts are apart, and whether that is as far as vLLM is from itself.

An engine's answer to a prompt has its new tokens ("tokens"), the log-probabilities of the prompt's tokens ("prompt"),
and the likeliest token at each of its places ("best"): what greedy decoding would choose there.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

SLACK = 1.5
"""Two independent deviations add up to √2 of one."""
SIGMAS = 4
"""Of shifts. Chance alone goes beyond in one of 1,000 comparisons of 16 prompts."""
GAP_SIGMAS = 2
"""Of mean gaps. A damaged layer doubles them, so no more can be left to chance; more prompts leave less to it."""

Answers = Sequence[Mapping[str, Any]]
Row = Mapping[str, Any]


def compare(a: Answers, b: Answers) -> dict[str, Any]:
    """Return the gaps of log-probabilities, and how many choices differ.

    mean_gap: of |a − b|. shift: the mean of a − b. Both with their standard error; prompts are what is independent.
    """
    pairs = list(zip(a, b, strict=True))
    each = [[x - y for x, y in zip(left["prompt"], right["prompt"], strict=True)] for left, right in pairs]
    gaps = [abs(gap) for prompt in each for gap in prompt]
    mean_gap, mean_gap_error = _mean([list(map(abs, prompt)) for prompt in each])
    shift, shift_error = _mean(each)
    best = [x == y for left, right in pairs for x, y in zip(left["best"], right["best"], strict=True)]
    new = [x == y for left, right in pairs for x, y in zip(left["tokens"], right["tokens"], strict=True)]
    return {
        "identical": a == b,
        "prompt_logprobs": len(gaps),
        "prompt_logprobs_equal": sum(gap == 0 for gap in gaps),
        "mean_gap": mean_gap,
        "mean_gap_error": mean_gap_error,
        "max_gap": max(gaps),
        "shift": shift,
        "shift_error": shift_error,
        "choices_other": best.count(False),
        "tokens": len(new),
        "tokens_equal": sum(new),
    }


def _mean(prompts: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Return the mean over all tokens and its standard error, of numbers of each token of each prompt."""
    tokens = sum(map(len, prompts))
    mean = sum(map(sum, prompts)) / tokens
    spread = sum((sum(prompt) - mean * len(prompt)) ** 2 for prompt in prompts)
    return mean, math.sqrt(spread * len(prompts) / max(1, len(prompts) - 1)) / tokens


def is_within(row: Row, own: Sequence[Row]) -> bool:
    """Return whether a gap is one of those that vLLM has with itself (own), over the same prompts.

    Neither the mean gap nor the number of choices that differ may exceed the largest of them by more than `SLACK` and
    chance: a few tokens with large gaps carry a mean, where routers choose other experts. And the log-probabilities
    must not be higher or lower on the whole.
    """
    gap = SLACK * max(float(other["mean_gap"]) for other in own) + GAP_SIGMAS * float(row["mean_gap_error"])
    choices = SLACK * max(int(other["choices_other"]) for other in own)
    shift = max(SIGMAS * float(row["shift_error"]), SLACK * max(abs(float(other["shift"])) for other in own))
    return (
        float(row["mean_gap"]) <= gap
        and int(row["choices_other"]) <= choices + 3 * math.sqrt(choices + 1)
        and abs(float(row["shift"])) <= shift
    )
