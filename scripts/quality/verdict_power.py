"""How often the verdict of `w4a8 evaluate` is right: a known drop is injected into simulated answers.

Prompts differ in difficulty: the baseline passes each with a chance drawn from Beta(4, 1.5), about 73 % on average. The
candidate changes sides both ways on a share of all prompts (`--churn`), and loses the drop beside. Verdicts are
counted, at a tolerance of `--tolerance`; the right one is ship where the drop is smaller, do not ship where it is
larger, and neither where it is equal. With `--graded` scores are any numbers from 0 to 1, as those of ROUGE-L. Where
the verdict is that it cannot tell, as many prompts are added as it asks for, and it is counted how often they decide.

    python scripts/quality/verdict_power.py --keep verdict-power
"""

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))
import results

from convert_w4a8.evaluation import paired
from convert_w4a8.evaluation.verdict import Pair, Tolerance, decide

QUESTION = "How often is the verdict right, where the candidate loses a known share?"
COUNTS = (50, 100, 200, 400)
DROPS = (0.0, 0.02, 0.05, 0.1, 0.2)
MOST_ADDED = 4000


def draw(rng: np.random.Generator, count: int, drop: float, churn: float, *, graded: bool) -> list[Pair]:
    """Return the scores of prompts of which the candidate loses `drop` on average."""
    easy = rng.beta(4, 1.5, count)
    chance = 4 / 5.5
    if graded:
        before = np.clip(easy + rng.normal(0, 0.02, count), 0, 1)
        left = np.clip(before - np.where(rng.random(count) < drop / chance, before, 0), 0, 1)
        return [Pair("", (), float(a), float(b), None) for a, b in zip(before, left, strict=True)]
    passes = rng.random(count) < easy
    lost = passes & (rng.random(count) < (drop + churn) / chance)
    won = ~passes & (rng.random(count) < churn / (1 - chance))
    after = (passes & ~lost) | won
    return [Pair("", (), float(a), float(b), (bool(a), bool(b))) for a, b in zip(passes, after, strict=True)]


def count_verdicts(rng: np.random.Generator, count: int, drop: float, args: argparse.Namespace) -> dict[str, Any]:
    """Return a row of figures."""
    tolerance = Tolerance(args.tolerance, args.tolerance, {})
    found: Counter[str] = Counter()
    asked = decided = 0
    for repeat in range(args.repeats):
        pairs = draw(rng, count, drop, args.churn, graded=args.graded)
        verdict = decide(pairs, tolerance)
        found[verdict.decision] += 1
        more = verdict.groups[0].more
        if verdict.decision == "cannot tell" and more is not None and more <= MOST_ADDED and repeat < args.added:
            asked += 1
            added = draw(rng, more, drop, args.churn, graded=args.graded)
            decided += decide([*pairs, *added], tolerance).decision != "cannot tell"
    share = {name: found[name] / args.repeats for name in ("ship", "do not ship", "cannot tell")}
    right = {-1: "ship", 0: "", 1: "do not ship"}[int(np.sign(drop - args.tolerance))]
    return {
        "drop": drop,
        "prompts": count,
        "ship": share["ship"],
        "do_not_ship": share["do not ship"],
        "cannot_tell": share["cannot tell"],
        "wrong": sum(value for name, value in share.items() if name not in (right, "cannot tell")),
        "right": share.get(right, "-"),
        "decided": decided / asked if asked else "-",
    }


def main() -> None:
    """Simulate, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=200, help="evaluations for each row")
    parser.add_argument("--added", type=int, default=50, help="of these, how many may ask for more prompts")
    parser.add_argument("--tolerance", type=float, default=0.05)
    parser.add_argument("--churn", type=float, default=0.03)
    parser.add_argument("--draws", type=int, default=4000, help="of the bootstrap; fewer than the program's, for speed")
    parser.add_argument("--graded", action="store_true")
    results.add_options(parser)
    args = parser.parse_args()
    paired.DRAWS = args.draws
    rng = np.random.default_rng(1)
    rows = []
    for drop in DROPS:
        for count in COUNTS:
            rows.append(count_verdicts(rng, count, drop, args))
            print(rows[-1], flush=True)
    settings = {name: getattr(args, name) for name in ("repeats", "tolerance", "churn", "draws", "graded")}
    results.save(args, QUESTION, rows, settings=settings)


if __name__ == "__main__":
    main()
