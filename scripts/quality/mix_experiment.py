"""Does mix by drop recover a domain that quantization hurt better than a uniform mix? Trains with both, and compares.

    mix_experiment.py train TEACHER OUT_W4A8 DIR FILE [--presets weights tables] [--seeds 0 1] [--steps 500]
    mix_experiment.py compare FILE ... [--json FILE]

DIR has for each domain NAME.train.jsonl, NAME.held.jsonl and NAME.test.jsonl of `make_training.py` (each may end in
.gz), of different files each. `train` measures the drop of each domain on NAME.held, trains with each mix from
OUT_W4A8 to the last step, and measures on NAME.test: a line of JSON in FILE for each training, as it ends. No new pair
of trainings begins if it would not end within --budget seconds. `compare` pairs the trainings of a preset and a seed,
which see the same samples of a domain in the same order, one mix more of them than the other.
"""

import argparse
import gc
import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from convert_w4a8.checkpoint.directory import open_checkpoint
from convert_w4a8.distillation.linear import Preset
from convert_w4a8.distillation.mix import DROP, UNIFORM, by_tag, mixed, shares, tag_of
from convert_w4a8.distillation.options import DistillOptions
from convert_w4a8.distillation.student import load_student, load_teacher
from convert_w4a8.distillation.teacher import LiveTeacher
from convert_w4a8.distillation.train import Trainer, mean
from convert_w4a8.samples.read import read_samples
from convert_w4a8.samples.sample import Sample
from convert_w4a8.samples.tokenizer import Tokenizer, open_tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
from results import PACKAGES, add_options, save

Row = dict[str, Any]


def read(directory: Path, kind: str, tokenizer: Tokenizer) -> tuple[Sample, ...]:
    """Return the windows of all domains; the tag of each is the name of its domain."""
    return read_samples(sorted(directory.glob(f"*.{kind}.jsonl*")), tokenizer).samples


def train(args: argparse.Namespace) -> Iterator[Row]:
    """Yield a row for each training."""
    began = time.monotonic()
    device = torch.device(args.device)
    source, start = open_checkpoint(args.teacher), open_checkpoint(args.student)
    tokenizer = open_tokenizer(source.root)
    samples, held_out, test = (read(args.directory, kind, tokenizer) for kind in ("train", "held", "test"))
    teacher = LiveTeacher(load_teacher(source, device))
    longest = 0.0
    before: torch.Tensor | None = None
    for preset, seed in ((preset, seed) for preset in args.presets for seed in args.seeds):
        if time.monotonic() - began + longest > args.budget:
            return
        pair = time.monotonic()
        for mix in (DROP, UNIFORM):
            options = DistillOptions(
                preset=Preset(preset), steps=args.steps, batch_tokens=args.batch_tokens, seed=seed, rate=args.rate
            )
            trainer = Trainer(load_student(start, source, options.preset, device), teacher, options, device)
            measured = trainer.measure(held_out)
            drops = {tag: mean(measured[numbers]) for tag, numbers in by_tag(held_out).items()}
            parts = shares(drops) if mix == DROP else dict.fromkeys(drops, 1 / len(drops))
            before = trainer.measure(test) if before is None else before
            batch = mixed(samples, parts, options)
            seen: dict[str, int] = defaultdict(int)
            at = time.monotonic()
            for step in range(args.steps):
                one = batch(step)
                trainer.train(one)
                for sample in one.samples:
                    seen[tag_of(sample)] += len(sample)
            seconds = time.monotonic() - at
            after = trainer.measure(test)
            del trainer
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            yield {
                "preset": preset,
                "seed": seed,
                "mix": mix,
                "seconds": seconds,
                "tokens": dict(seen),
                "shares": parts,
                "drops": drops,
                "before": {tag: kl_of(before, numbers) for tag, numbers in by_tag(test).items()},
                "after": {tag: kl_of(after, numbers) for tag, numbers in by_tag(test).items()},
            }
        longest = max(longest, time.monotonic() - pair)


def kl_of(measured: torch.Tensor, numbers: Sequence[int]) -> list[float]:
    """Return the mean divergence of each window, of what `Trainer.measure` found."""
    chosen = measured[numbers]
    return [float(f"{value:.6g}") for value in (chosen[:, 0] / chosen[:, 1]).tolist()]


def compare(rows: Sequence[Row]) -> list[Row]:
    """Return for each preset and domain what the two mixes did, and their difference, paired by window and seed."""
    runs: dict[str, dict[int, dict[str, Row]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        runs[row["preset"]][row["seed"]][row["mix"]] = row
    found = []
    for preset, by_seed in runs.items():
        pairs = [pair for pair in by_seed.values() if DROP in pair and UNIFORM in pair]
        tags = pairs[0][DROP]["before"] if pairs else ()
        found += [{"preset": preset, "domain": tag, **_compared(pairs, tag)} for tag in tags]
    return found


def _compared(pairs: Sequence[Mapping[str, Row]], tag: str) -> Row:
    drop, uniform = (torch.tensor([pair[mix]["after"][tag] for pair in pairs]).double() for mix in (DROP, UNIFORM))
    before = torch.tensor(pairs[0][DROP]["before"][tag]).double()
    change, change_error = _mean_and_error(drop - before)
    difference, error = _mean_and_error(drop - uniform)
    first = pairs[0]
    return {
        "seeds": len(pairs),
        "tokens": sum(first[DROP]["tokens"].values()),
        "seconds": max(row["seconds"] for pair in pairs for row in pair.values()),
        "share": first[DROP]["shares"][tag],
        "share_uniform": first[UNIFORM]["shares"][tag],
        "before": float(before.mean()),
        "drop": float(drop.mean()),
        "uniform": float(uniform.mean()),
        "change": change,
        "change_standard_error": change_error,
        "difference": difference,
        "difference_standard_error": error,
        "difference_by_seed": [float(f"{value:.4g}") for value in (drop - uniform).mean(1).tolist()],
    }


def _mean_and_error(values: torch.Tensor) -> tuple[float, float]:
    """Return the mean of values [seeds, windows], and its standard error: of windows, and of seeds beside it."""
    seeds, windows = values.shape
    of_windows = float(values.mean(0).std()) / math.sqrt(windows)
    of_seeds = float(values.mean(1).std()) / math.sqrt(seeds) if seeds > 1 else 0.0
    return float(values.mean()), math.hypot(of_windows, of_seeds)


def main() -> int:
    """Train, or compare trainings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train")
    training.add_argument("teacher", type=Path)
    training.add_argument("student", type=Path)
    training.add_argument("directory", type=Path)
    training.add_argument("out", type=Path)
    training.add_argument("--presets", nargs="+", default=["weights", "tables"], choices=list(Preset))
    training.add_argument("--seeds", nargs="+", type=int, default=[0])
    training.add_argument("--steps", type=int, default=500)
    training.add_argument("--batch-tokens", type=int, default=8192)
    training.add_argument("--rate", type=float, default=1.0)
    training.add_argument("--budget", type=float, default=math.inf, help="seconds")
    training.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    comparison = commands.add_parser("compare")
    comparison.add_argument("files", type=Path, nargs="+")
    add_options(comparison)
    parser.epilog = f"{training.format_help()}\n{comparison.format_help()}"
    args = parser.parse_args()
    if args.command == "train":
        with args.out.open("a", encoding="utf-8") as file:
            for row in train(args):
                file.write(json.dumps(row) + "\n")
                file.flush()
                print(row["preset"], row["seed"], row["mix"], f"{row['seconds']:.0f} s", flush=True)
        return 0
    rows = [json.loads(line) for path in args.files for line in path.read_text(encoding="utf-8").splitlines()]
    found = compare(rows)
    for row in found:
        print({key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()})
    save(args, "Does mix by drop recover a hurt domain better?", found, packages=(*PACKAGES, "transformers"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
