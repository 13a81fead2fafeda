"""How fast may tables and weights be trained? Trains from one checkpoint with many rates, and prints a JSON line each.

    distill_sweep.py TEACHER OUT_W4A8 --data FILE ... --held-out FILE --rates 'tables:entries=0.01,scale=3e-4'

--rates PRESET:NAME=VALUE,... is one run, in units of `Rates`; a rate that is not named is 0, so that a run may train
channel scales alone. Names of `DistillOptions` (steps, batch_tokens, ...) may be among them, and beta2 of Adam;
unrounded=1: entries are not rounded to E4M3, which no checkpoint can hold, but shows what rounding costs; average=A:
also measure --evaluation with values averaged over about the last A of the steps. FILE is text or JSON lines
as for `w4a8 distill`, or a .npy of windows of tokens, uint16 [W, T]. Each line has the curve of the divergence on
--held-out, and before and after training those on --evaluation.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from convert_w4a8.checkpoint.directory import open_checkpoint
from convert_w4a8.distillation import linear, train
from convert_w4a8.distillation.linear import Preset
from convert_w4a8.distillation.machine import deterministic
from convert_w4a8.distillation.mix import by_tag, mixed
from convert_w4a8.distillation.options import DistillOptions, Rates
from convert_w4a8.distillation.student import load_student, load_teacher
from convert_w4a8.distillation.teacher import LiveTeacher
from convert_w4a8.distillation.train import Trainer, difference, mean
from convert_w4a8.fp8 import E4M3_MAX
from convert_w4a8.samples.read import read_samples
from convert_w4a8.samples.sample import Sample
from convert_w4a8.samples.tokenizer import Tokenizer, open_tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
from results import add_options, save
from windows import load_windows

OTHERS: dict[str, type] = {"beta2": float, "unrounded": int, "average": float}
"""What may be named beside rates and `DistillOptions`."""


def parse_rates(text: str) -> tuple[Preset, Rates, dict[str, float]]:
    """Read PRESET:NAME=VALUE,...; return the rates, and what else is named."""
    preset, _, rest = text.partition(":")
    given = {name: float(value) for name, value in (part.split("=") for part in rest.split(",") if part)}
    rates = Rates(**{f.name: given.pop(f.name, 0.0) for f in fields(Rates)})
    kinds = OTHERS | {f.name: type(getattr(DistillOptions(), f.name)) for f in fields(DistillOptions)}
    if wrong := next((name for name in given if kinds.get(name) not in (int, float)), None):
        raise argparse.ArgumentTypeError(f"{text}: no such rate: {wrong}")
    return Preset(preset), rates, {name: kinds[name](value) for name, value in given.items()}


def batched(values: Sequence[float], count: int) -> Iterator[Sequence[float]]:
    """Yield so many values at a time (itertools has it from Python 3.12 on)."""
    return (values[i : i + count] for i in range(0, len(values), count))


def read(paths: Sequence[Path], tokenizer: Tokenizer, tokens: int, window: int) -> list[Sample]:
    """Return samples of files of any kind, up to so many tokens of each."""
    found: list[Sample] = []
    for path in paths:
        if path.suffix == ".npy":
            windows = load_windows(path)[: max(1, tokens // window)].astype(np.int32)
            nothing = np.zeros(windows.shape[1], np.uint8)
            found += [Sample(ids, nothing, nothing, f"{path} line {number}") for number, ids in enumerate(windows)]
        else:
            found += read_samples([path], tokenizer, max_tokens=tokens, max_length=window).samples
    return found


def run(
    trainer: Trainer,
    samples: Sequence[Sample],
    held_out: Sequence[Sample],
    evaluation: Sequence[Sample],
    average: float = 0.0,
) -> dict[str, Any]:
    """Train to the end, and return what is measured. average: the part of the steps that values are averaged over."""
    options = trainer.options
    tags = by_tag(samples)
    batch = mixed(samples, {tag: 1 / len(tags) for tag in tags}, options)
    before, first = trainer.measure(held_out), trainer.measure(evaluation)
    began = time.monotonic()
    curve, losses = [(0, mean(before))], []
    averages = {name: one.value.detach().clone() for name, one in trainer.trained.items()} if average else {}
    while trainer.step < options.steps:
        losses.append(trainer.train(batch(trainer.step)))
        weight = max(1 / max(1.0, average * options.steps), 1 / (trainer.step + 1))
        for name, kept in averages.items():
            kept.lerp_(trainer.trained[name].value.detach(), weight)
        if trainer.step % options.every == 0:
            curve.append((trainer.step, mean(trainer.measure(held_out))))
            print(
                f"step {trainer.step}: {curve[-1][1]:.5f}, {time.monotonic() - began:.1f} s",
                file=sys.stderr,
                flush=True,
            )
    seconds = time.monotonic() - began
    change, error = difference(trainer.measure(held_out), before)
    means = [sum(part) / len(part) for part in batched(losses, options.every)]
    row: dict[str, Any] = {"steps": options.steps, "tokens": options.steps * options.batch_tokens, "seconds": seconds}
    row |= {"training": means[-1], "training_curve": means, "held_out": curve}
    row |= {"change": change, "change_standard_error": error}
    if evaluation:
        last = trainer.measure(evaluation)
        row |= {"evaluation": [mean(first), mean(last)], "evaluation_standard_error": difference(last, first)[1]}
        if averages:
            trainer.set_values(averages)
            row["averaged"] = mean(trainer.measure(evaluation))
    return row


def not_rounded(values: torch.Tensor) -> torch.Tensor:
    """Stand in for `round_to_e4m3`."""
    return values.clamp(-E4M3_MAX, E4M3_MAX)


def main() -> int:
    """Train once for each --rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("student", type=Path)
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--held-out", type=Path, nargs="+", required=True)
    parser.add_argument("--held-out-tokens", type=int, default=30_000, help="of each file")
    parser.add_argument("--evaluation", type=Path, nargs="*", default=[])
    parser.add_argument("--evaluation-tokens", type=int, default=61_440)
    parser.add_argument("--rates", type=parse_rates, nargs="+", required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int)
    add_options(parser)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    source, start = open_checkpoint(args.teacher), open_checkpoint(args.student)
    tokenizer = open_tokenizer(source.root)
    held_out = read(args.held_out, tokenizer, args.held_out_tokens, args.window)
    evaluation = read(args.evaluation, tokenizer, args.evaluation_tokens, args.window)
    teacher = LiveTeacher(load_teacher(source, device))
    rows: list[dict[str, Any]] = []
    with deterministic(device):
        for preset, rates, given in args.rates:
            defaults = {"steps": args.steps, "batch_tokens": args.batch_tokens, "every": args.every}
            chosen = {name: value for name, value in given.items() if name not in OTHERS}
            options = DistillOptions(preset=preset, recompute=args.recompute, **(defaults | chosen))
            samples = read(args.data, tokenizer, options.steps * options.batch_tokens, args.window)
            student = load_student(start, source, preset, device, options.towards)
            with ExitStack() as changed:
                if given.get("unrounded"):
                    changed.enter_context(patch.object(linear, "round_to_e4m3", not_rounded))
                if "beta2" in given:
                    changed.enter_context(patch.object(train, "_BETAS", (0.9, given["beta2"])))
                trainer = Trainer(student, teacher, options, device, rates)
                row = run(trainer, samples, held_out, evaluation, given.get("average", 0.0))
            rows.append(
                {"preset": str(preset), **{name: rate for name, rate in asdict(rates).items() if rate}} | given | row
            )
            print(json.dumps(rows[-1]), flush=True)
    save(args, "How fast may tables and weights be trained?", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
