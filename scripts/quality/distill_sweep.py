"""How fast may tables and weights be trained? Trains from one checkpoint with many rates, and prints a JSON line each.

    distill_sweep.py TEACHER OUT_W4A8 --data FILE ... --held-out TEXT --rates 'tables:entries=0.01,scale=3e-4'

--rates PRESET:NAME=VALUE,... is one run, in units of `Rates`; what is not named is 0, so that a run may train channel
scales alone. Each line has the curve of the divergence on held-out samples.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from convert_w4a8.checkpoint.directory import open_checkpoint
from convert_w4a8.distillation.linear import Preset
from convert_w4a8.distillation.mix import by_tag, mixed
from convert_w4a8.distillation.options import DistillOptions, Rates
from convert_w4a8.distillation.student import load_student, load_teacher
from convert_w4a8.distillation.teacher import LiveTeacher
from convert_w4a8.distillation.train import Trainer, difference, mean
from convert_w4a8.samples.read import read_samples
from convert_w4a8.samples.tokenizer import open_tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
from results import add_options, save


def parse_rates(text: str) -> tuple[Preset, Rates, float]:
    """Read PRESET:NAME=VALUE,...; `towards` may be among the names."""
    preset, _, rest = text.partition(":")
    given = dict(part.split("=") for part in rest.split(",") if part)
    towards = float(given.pop("towards", 0))
    rates = Rates(**{f.name: float(given.pop(f.name, 0)) for f in fields(Rates)})
    if given:
        raise argparse.ArgumentTypeError(f"{text}: no such rate: {next(iter(given))}")
    return Preset(preset), rates, towards


def main() -> int:
    """Train once for each --rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("student", type=Path)
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--held-out", type=Path, nargs="+", required=True)
    parser.add_argument("--held-out-tokens", type=int, default=30_000)
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
    need = args.steps * args.batch_tokens
    samples = read_samples(args.data, tokenizer, max_tokens=need, max_length=args.window).samples
    held_out = read_samples(args.held_out, tokenizer, max_tokens=args.held_out_tokens, max_length=args.window).samples
    teacher = LiveTeacher(load_teacher(source, device))
    tags = by_tag(samples)
    shares = {tag: 1 / len(tags) for tag in tags}
    rows: list[dict[str, Any]] = []
    for preset, rates, towards in args.rates:
        options = DistillOptions(
            preset=preset,
            steps=args.steps,
            batch_tokens=args.batch_tokens,
            every=args.every,
            recompute=args.recompute,
            towards=towards,
        )
        student = load_student(start, source, preset, device, towards)
        trainer = Trainer(student, teacher, options, device, rates)
        batch = mixed(samples, shares, options)
        before = trainer.measure(held_out)
        began = time.monotonic()
        curve, losses = [(0, mean(before))], []
        while trainer.step < args.steps:
            losses.append(trainer.train(batch(trainer.step)))
            if trainer.step % args.every == 0:
                curve.append((trainer.step, mean(trainer.measure(held_out))))
        change, error = difference(trainer.measure(held_out), before)
        means = [sum(losses[i : i + args.every]) / args.every for i in range(0, args.steps, args.every)]
        row = {"preset": str(preset), **{name: rate for name, rate in asdict(rates).items() if rate}}
        row |= {"towards": towards} if towards else {}
        row |= {"steps": args.steps, "tokens": args.steps * args.batch_tokens, "seconds": time.monotonic() - began}
        row |= {"training": means[-1], "training_curve": means, "held_out": curve}
        row |= {"change": change, "change_standard_error": error}
        rows.append(row)
        print(json.dumps(row), flush=True)
    save(args, "How fast may tables and weights be trained?", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
