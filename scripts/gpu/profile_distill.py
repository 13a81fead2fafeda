"""Measure what a step of a training takes, by kernels: `profile_distill.py OUT_W4A8 --teacher MODEL --data FILE...`.

Milliseconds of the GPU a step, of matrix products, attention, kernels of this project, and all others; also with
transformers' own norms, gates and rotary positions, which are many kernels each.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
from results import PACKAGES, add_options, line, save

from convert_w4a8.checkpoint.directory import open_checkpoint
from convert_w4a8.distillation import student as models
from convert_w4a8.distillation.fused import fuse
from convert_w4a8.distillation.linear import Preset
from convert_w4a8.distillation.machine import deterministic
from convert_w4a8.distillation.mix import by_tag, mixed
from convert_w4a8.distillation.options import DistillOptions
from convert_w4a8.distillation.teacher import LiveTeacher
from convert_w4a8.distillation.train import Trainer
from convert_w4a8.samples.read import read_samples
from convert_w4a8.samples.tokenizer import open_tokenizer

DEVICE = torch.device("cuda")
KINDS = {
    "attention": re.compile("flash"),
    "products": re.compile("nvjet|gemm|xmma|splitK|cutlass"),
    "ours": re.compile(r"^_\w+$"),
}
"""How kernels are called; what none of these finds is of others."""
WARM, STEPS = 6, 3


def kind_of(kernel: str) -> str:
    """Return which of `KINDS` a kernel is of."""
    return next((kind for kind, pattern in KINDS.items() if pattern.search(kernel)), "others")


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for each preset, with and without fused kernels."""
    start, source = open_checkpoint(args.start), open_checkpoint(args.teacher)
    samples = read_samples(args.data, open_tokenizer(source.root), max_tokens=500_000, max_length=512).samples
    shares = dict.fromkeys(by_tag(samples), 1.0)
    for blocks in ("one by one", "fused"):
        with patch.object(models, "fuse", fuse if blocks == "fused" else lambda *_: None), deterministic(DEVICE):
            teacher = LiveTeacher(models.load_teacher(source, DEVICE))
            for preset in Preset:
                options = DistillOptions(preset=preset, batch_tokens=args.tokens)
                batch = mixed(samples, shares, options)
                trainer = Trainer(models.load_student(start, source, preset, DEVICE), teacher, options, DEVICE)
                for step in range(WARM):
                    trainer.train(batch(step))
                with profile(activities=[ProfilerActivity.CUDA]) as found:
                    for step in range(WARM, WARM + STEPS):
                        trainer.train(batch(step))
                    torch.cuda.synchronize()
                row: dict[str, Any] = {"preset": str(preset), "blocks": blocks, "tokens": args.tokens, "launches": 0}
                row |= dict.fromkeys((*KINDS, "others", "all"), 0.0)
                for event in found.key_averages():
                    spent: float = event.self_device_time_total / (1000 * STEPS)
                    if spent:
                        row["launches"] += round(event.count / STEPS)
                        row[kind_of(event.key)] += spent
                        row["all"] += spent
                yield row


def main() -> int:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("start", type=Path, metavar="OUT_W4A8")
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--tokens", type=int, default=16384, help="of a step")
    add_options(parser)
    args = parser.parse_args()
    rows = []
    for row in measure(args):
        rows.append(row)
        print(row, flush=True)
    document = save(args, "What does a step of the 31M Llama take, teacher included?", rows, packages=PACKAGES)
    print(line(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
