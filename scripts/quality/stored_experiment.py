"""What do stored logits lose, and what does a term for hidden states gain? Trains with each, measures by all logits.

    stored_experiment.py TEACHER OUT_W4A8 --data FILE ... --evaluation FILE [--top-k 16 64 256] [--hidden 0.1 1]

Each training has the same batches. The first is beside the teacher with all its logits; then one for each --top-k, from
logits on the disk, and one for each --hidden weight beside the teacher. A line of JSON each. `bound` is the divergence
that a training from stored logits sees of the evaluation samples before it.
"""

import argparse
import gc
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from convert_w4a8.checkpoint.directory import open_checkpoint
from convert_w4a8.distillation.first_pass import stored_teacher
from convert_w4a8.distillation.linear import Preset
from convert_w4a8.distillation.machine import deterministic
from convert_w4a8.distillation.mix import by_tag, mixed
from convert_w4a8.distillation.options import DistillOptions
from convert_w4a8.distillation.student import load_student, load_teacher
from convert_w4a8.distillation.teacher import LiveTeacher, Teacher
from convert_w4a8.distillation.train import Trainer, difference, mean
from convert_w4a8.samples.read import read_samples
from convert_w4a8.samples.sample import Sample
from convert_w4a8.samples.tokenizer import open_tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
from results import PACKAGES, add_options, save

Row = dict[str, Any]


class Experiment:
    """Trainings of one student with one teacher."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device = torch.device(args.device)
        self.source, self.start = open_checkpoint(args.teacher), open_checkpoint(args.student)
        self.args = args
        tokenizer = open_tokenizer(self.source.root)
        need = args.steps * args.batch_tokens
        self.samples = read_samples(args.data, tokenizer, max_tokens=need, max_length=args.window).samples
        read = read_samples([args.evaluation], tokenizer, max_tokens=args.evaluation_tokens, max_length=args.window)
        self.evaluation = read.samples
        self.live = LiveTeacher(load_teacher(self.source, self.device))
        self.first: torch.Tensor | None = None

    def train(self, teacher: Teacher, hidden: float = 0.0) -> Row:
        """Train once; return what came of it, by all logits."""
        args = self.args
        options = DistillOptions(
            Preset(args.preset), steps=args.steps, batch_tokens=args.batch_tokens, hidden_weight=hidden
        )
        trainer = Trainer(
            load_student(self.start, self.source, options.preset, self.device), teacher, options, self.device
        )
        bound = mean(trainer.measure(self.evaluation))
        trainer.teacher = self.live
        before = trainer.measure(self.evaluation)
        trainer.teacher = teacher
        batch = mixed(self.samples, dict.fromkeys(by_tag(self.samples), 1.0), options)
        began = time.monotonic()
        for step in range(args.steps):
            trainer.train(batch(step))
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.monotonic() - began
        trainer.teacher = self.live
        after = trainer.measure(self.evaluation)
        del trainer
        gc.collect()
        if self.first is None:
            self.first = after
        change, error = difference(after, before)
        over, over_error = difference(after, self.first)
        return {
            "preset": args.preset,
            "tokens": args.steps * args.batch_tokens,
            "seconds": seconds,
            "bound": bound,
            "before": mean(before),
            "after": mean(after),
            "change": change,
            "change_standard_error": error,
            "over_live": over,
            "over_live_standard_error": over_error,
        }

    def stored(self, top_k: int, directory: Path) -> Row:
        """Train from stored logits, written first."""
        began = time.monotonic()
        samples: Sequence[Sample] = (*self.samples, *self.evaluation)
        teacher = stored_teacher(
            self.source, samples, directory, top_k, device=self.device, batch_tokens=self.args.batch_tokens
        )
        seconds = time.monotonic() - began
        nbytes = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
        row = {"top_k": top_k, "bytes_per_token": nbytes / sum(map(len, samples)), "pass_seconds": seconds}
        return row | self.train(teacher)


def main() -> int:
    """Train with each teacher."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("student", type=Path)
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--evaluation", type=Path, required=True)
    parser.add_argument("--evaluation-tokens", type=int, default=61_440)
    parser.add_argument("--top-k", type=int, nargs="*", default=[16, 64, 256])
    parser.add_argument("--hidden", type=float, nargs="*", default=[])
    parser.add_argument("--preset", choices=list(Preset), default="weights")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_options(parser)
    args = parser.parse_args()
    rows: list[Row] = []

    def add(row: Row) -> None:
        rows.append(row)
        print(json.dumps(row), flush=True)
        save(args, "What do stored logits lose?", rows, packages=(*PACKAGES, "transformers"))

    with deterministic(torch.device(args.device)):
        experiment = Experiment(args)
        add({"teacher": "beside the student"} | experiment.train(experiment.live))
        for weight in args.hidden:
            add({"teacher": "beside the student", "hidden": weight} | experiment.train(experiment.live, weight))
        for top_k in args.top_k:
            directory = Path(tempfile.mkdtemp())
            try:
                add({"teacher": "on the disk"} | experiment.stored(top_k, directory / "logits"))
            finally:
                shutil.rmtree(directory, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
