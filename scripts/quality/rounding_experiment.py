"""What rounding entries to E4M3 costs a training, and other ways of doing it. Prints a JSON line a training.

    rounding_experiment.py TEACHER OUT_W4A8 --data FILE ... --held-out FILE ... --evaluation FILE
        --runs NAME:KEY=VALUE,...

Keys of a run, beside names of `DistillOptions` and factors of its rates (entries, scale, other, weight, embedding):

    mode=ste    entries are rounded in every forward pass, and gradients pass (what `w4a8 distill` does); also
         free   they are not rounded
         alpha  r + α(round(r) − r), α rising from 0 to 1 at the part `end` of the steps
         prox   not rounded, but drawn to the nearest E4M3 number, from the part `begin` of the steps on, by up to
                mu·rate a step, which rises exponentially to that from a fiftieth (ProxQuant, Bai et al. 2019)
    first=free  the mode until `begin`
    regrid=A/B  after these parts of the steps channel scales and entries are chosen anew, by the error of the layers'
                outputs, with `search` scales to choose from. staged=1: of the first of the layers at A, of the next at
                B, ...; their entries stay, and all else is trained on
    fall=P      rates fall as (1 − t)^P, not as a cosine
    damping=μ   how stiff springs are, as `w4a8 distill --damping`; none if nothing is said, however many the steps
    biases=1    layers without a bias get one, of zeros, which is trained
    seconds=S   the schedule goes by time, not by steps

Each line has divergences of all files of --held-out and of --evaluation: before, after, and after without rounding.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from distill_sweep import read
from torch import nn

from convert_w4a8.checkpoint.directory import open_checkpoint
from convert_w4a8.devices import training
from convert_w4a8.distillation import linear
from convert_w4a8.distillation.data import in_batches, make_batch
from convert_w4a8.distillation.linear import LutLinear
from convert_w4a8.distillation.machine import deterministic
from convert_w4a8.distillation.mix import by_tag, mixed
from convert_w4a8.distillation.options import DistillOptions, Rates, rates_for
from convert_w4a8.distillation.student import Student, load_student, load_teacher, logits_of
from convert_w4a8.distillation.tables import round_to_e4m3, spacing
from convert_w4a8.distillation.teacher import LiveTeacher
from convert_w4a8.distillation.train import Trainer, difference, mean
from convert_w4a8.fp8 import E4M3_MAX
from convert_w4a8.linear import GROUP_SIZE
from convert_w4a8.samples.sample import Sample
from convert_w4a8.samples.tokenizer import open_tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
from results import add_options, save

NUMBERS = {"mtok": 10.0, "begin": 0.0, "end": 1.0, "mu": 2.0, "search": 64.0, "staged": 0.0, "seconds": 0.0}
NUMBERS |= {"fall": 0.0, "damping": 0.0, "biases": 0.0} | {f.name: 1.0 for f in fields(Rates)}
WORDS = {"mode": "ste", "first": "free", "regrid": ""}
LOW = 0.02
"""Where the pull of `prox` begins, of mu."""
DAMPING = 1e-3
"""Of the mean curvature, added to each."""
SWEEPS = 4
"""Of coordinate descent."""


def parse_run(text: str) -> dict[str, Any]:
    """Read NAME:KEY=VALUE,..."""
    name, _, rest = text.partition(":")
    found: dict[str, Any] = {"name": name} | NUMBERS | WORDS
    kinds: dict[str, Any] = {f.name: type(getattr(DistillOptions(), f.name)) for f in fields(DistillOptions)}
    for key, value in (part.split("=") for part in rest.split(",") if part):
        kind = str if key in WORDS else float if key in NUMBERS else kinds.get(key)
        if kind is None:
            raise argparse.ArgumentTypeError(f"{text}: no such key: {key}")
        found[key] = bool(int(value)) if kind is bool else kind(value)
    return found


class Rounding:
    """How far entries are rounded: 0 not at all, 1 wholly. On the device, where CUDA graphs read it."""

    def __init__(self, device: torch.device) -> None:
        self.part = torch.ones((), device=device)

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        """Stand in for `round_to_e4m3`."""
        return torch.lerp(values.clamp(-E4M3_MAX, E4M3_MAX), round_to_e4m3(values), self.part)


@torch.no_grad()
def second_moments(student: Student, samples: Sequence[Sample], device: torch.device) -> dict[str, torch.Tensor]:
    """Return the sums of x xᵀ, float32 [K, K], of the FP8 inputs x of each layer."""
    found: dict[str, torch.Tensor] = {}

    def note(name: str, _module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        _, wide, scale = training(device).quantize(inputs[0].flatten(0, -2))
        x = wide.float() * scale
        found[name] = found.get(name, 0) + x.T @ x

    hooks = [layer.register_forward_pre_hook(partial(note, name)) for name, layer in student.layers.items()]
    for numbers in in_batches(samples, range(len(samples)), 8192):
        logits_of(student.model, make_batch(samples, numbers).ids.to(device))
    for hook in hooks:
        hook.remove()
    return found


def of_entries(codes: torch.Tensor, moment: torch.Tensor, at_once: int = 128) -> torch.Tensor:
    """Return Sᵀ H S of each channel, float32 [N, E, E], S [K, E] saying which weight is which entry, with its sign."""
    k = codes.shape[1]
    code = codes.long()
    entry = torch.where(code > 8, 16 - code, code % 8) + torch.arange(k, device=codes.device) // GROUP_SIZE * 8
    sign = torch.where(code > 8, -1.0, torch.where(code == 8, 0.0, 1.0))
    numbers = torch.arange(8 * (k // GROUP_SIZE), device=codes.device)
    parts = []
    for e, s in zip(torch.split(entry, at_once), torch.split(sign, at_once), strict=True):
        place = (e[..., None] == numbers) * s[..., None]
        parts.append(place.transpose(1, 2) @ (moment @ place))
    return torch.cat(parts)


def choose_grid(t: torch.Tensor, h: torch.Tensor, search: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose of each channel a factor f and E4M3 numbers q, so that (q/f − t)ᵀ h (q/f − t) is small: q [N, E], f [N].

    t: float32 [N, E]. h: float32 [N, E, E]. For each f: GPTQ's rounding with compensation, then coordinate descent.
    """
    width = t.shape[1]
    curvature = h.diagonal(dim1=1, dim2=2)
    damped = h + torch.eye(width, device=h.device) * (curvature.mean(1)[:, None, None] * DAMPING + 1e-12)
    order = (curvature * t.square()).argsort(dim=1, descending=True)
    damped = damped.gather(1, order[..., None].expand_as(h)).gather(2, order[:, None].expand_as(h))
    room = torch.where(t.abs().amax(1, keepdim=True) > E4M3_MAX / 2, 0.5, 1.0)  # for entries to grow
    factors = room * 2.0 ** (-torch.arange(search, device=t.device) / search)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    wanted = t.gather(1, order)[:, None] * factors[..., None]  # [N, F, E]
    v, q = wanted.clone(), torch.empty_like(wanted)
    for i in range(width):
        q[..., i] = round_to_e4m3(v[..., i])
        v[..., i:] -= ((v[..., i] - q[..., i]) / upper[:, i, i, None])[..., None] * upper[:, i, None, i:]
    g = (q - wanted) @ damped
    for i in list(range(width)) * SWEEPS:
        new = round_to_e4m3(q[..., i] - g[..., i] / damped[:, i, i, None])
        g += (new - q[..., i])[..., None] * damped[:, i, None]
        q[..., i] = new
    d = q - wanted
    best = (((d @ damped) * d).sum(-1) / factors.square()).argmin(1)
    rows = torch.arange(len(t), device=t.device)
    return q[rows, best].gather(1, order.argsort(dim=1)), factors[rows, best]


@torch.no_grad()
def add_biases(student: Student, samples: Sequence[Sample], device: torch.device) -> dict[str, float]:
    """Give zeros as biases to layers that have none. Return the root mean squares of these layers' outputs."""
    found: dict[str, float] = {}

    def note(name: str, _module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        found[f"{name}.bias"] = float(output.float().square().mean().sqrt())

    without = {name: layer for name, layer in student.layers.items() if layer.bias is None}
    hooks = [layer.register_forward_hook(partial(note, name)) for name, layer in without.items()]
    logits_of(student.model, make_batch(samples, range(8)).ids.to(device))
    for hook in hooks:
        hook.remove()
    for name, layer in without.items():
        zeros = torch.zeros(len(layer.channel_scale), dtype=torch.bfloat16, device=device)
        layer.bias = student.others[f"{name}.bias"] = nn.Parameter(zeros)
    return found


class Experiment(Trainer):
    """A training whose entries are rounded in another way."""

    def __init__(self, run: dict[str, Any], rounding: Rounding, *args: Any) -> None:
        super().__init__(*args)
        self.run, self.rounding = run, rounding
        self.began = time.monotonic()
        self._stage = 0
        self._fixed: list[LutLinear] = []

    @property
    def progress(self) -> float:
        """The part of the training that is done."""
        passed = (time.monotonic() - self.began) / self.run["seconds"] if self.run["seconds"] else 0.0
        return max(self.step / self.options.steps, passed)

    def factor(self, step: int) -> float:
        """Let the rates fall as the training goes on, by steps or by time."""
        if self.run["fall"]:
            done = min(1.0, self.progress)
            rise = min(1.0, (done + 1e-4) / max(1e-4, self.options.warmup))
            return self.options.rate * rise * float((1 - done) ** self.run["fall"])
        return super().factor(max(step, int(min(1.0, self.progress) * self.options.steps)))

    def set_part(self) -> None:
        """Say how far entries are rounded in the next forward pass."""
        run = self.run
        mode = run["mode"] if self.progress >= run["begin"] else run["first"]
        self.rounding.part.fill_({"ste": 1.0, "alpha": min(1.0, self.progress / run["end"])}.get(mode, 0.0))

    @torch.no_grad()
    def _update(self, factor: float) -> None:
        super()._update(factor)
        for layer in self._fixed:
            layer.entries.zero_()
        run, done = self.run, self.progress
        if run["mode"] != "prox" or done < run["begin"]:
            return
        most = run["mu"] * LOW ** (1 - (done - run["begin"]) / (1 - run["begin"])) * factor * self._rates.entries
        for layer in self.student.layers.values():
            nearest = (round_to_e4m3(layer.start + layer.entries * layer.step) - layer.start) / layer.step
            layer.entries.sub_((layer.entries - nearest).clamp(-most, most))

    @torch.no_grad()
    def regrid(self, samples: Sequence[Sample]) -> None:
        """Choose channel scales and entries anew: of all layers, or of the next part of them, which are fixed then."""
        run, layers = self.run, list(self.student.layers.items())
        if run["staged"]:
            parts = len(run["regrid"].split("/"))
            first, last = (len(layers) * (self._stage + i) // parts for i in (0, 1))
            layers, self._stage = layers[first:last], self._stage + 1
            self._fixed += [layer for _, layer in layers]
        moments = second_moments(self.student, samples, self._device)
        for name, layer in layers:
            _, channel, codes, _ = layer.operand()
            t = (layer.start + layer.entries * layer.step).clamp(-E4M3_MAX, E4M3_MAX)
            q, f = choose_grid(t.flatten(1), of_entries(codes, moments[name]), int(run["search"]))
            if layer.weight is not None:
                layer.weight.mul_((layer.channel_scale * f / channel)[:, None])
            layer.start.copy_(q.view(t.shape))
            before = layer.step.clone()
            layer.step.copy_(spacing(layer.start))
            if self._curvature is not None:
                self._curvature.known[name].mul_((layer.step / before / f[:, None, None]).square())
            layer.channel_scale.copy_(channel / f)
            layer.entries.zero_()
            layer.scale.zero_()


def train(run: dict[str, Any], args: argparse.Namespace, parts: dict[str, Any]) -> dict[str, Any]:
    """Train once."""
    device, rounding = parts["device"], parts["rounding"]
    given = {f.name: run[f.name] for f in fields(DistillOptions) if f.name in run}
    options = DistillOptions(**{"steps": int(run["mtok"] * 1e6 / args.batch_tokens), **given})
    base = rates_for(options.preset, options.steps)
    rates = Rates(**{name: rate * run[name] for name, rate in asdict(base).items()})
    student = load_student(
        parts["start"], parts["source"], options.preset, device, options.towards, embeddings=options.embeddings
    )
    samples: list[Sample] = parts["samples"]
    sizes = add_biases(student, samples, device) if run["biases"] else {}
    trainer = Experiment(run, rounding, student, parts["teacher"], options, device, rates)
    for name, size in sizes.items():
        trainer.trained[name].unit = size
    batch = mixed(samples, dict.fromkeys(by_tag(samples), 1.0), options)

    def measure(part: float) -> Iterator[torch.Tensor]:
        rounding.part.fill_(part)
        yield from (trainer.measure(each) for each in (*parts["held_out"], parts["evaluation"]))

    before = list(measure(1.0))
    trainer.began = time.monotonic()
    curve: list[list[float]] = []
    left = sorted(float(part) for part in run["regrid"].split("/") if part)
    while trainer.progress < 1:
        while left and trainer.progress >= left[0]:
            left.pop(0)
            trainer.regrid(samples[:: max(1, len(samples) // 256)])
        if trainer.progress * 10 >= len(curve) + 1:
            rounding.part.fill_(1.0)
            curve.append([trainer.step, *(mean(trainer.measure(each)) for each in parts["held_out"])])
            print(run["name"], curve[-1], file=sys.stderr, flush=True)
        trainer.set_part()
        trainer.train(batch(trainer.step))
    row = run | {"preset": str(options.preset), "steps": trainer.step, "curve": curve, "rates": asdict(rates)}
    row |= {"seconds": time.monotonic() - trainer.began, "not_rounded": [mean(each) for each in measure(0.0)]}
    if left:
        trainer.regrid(samples[:: max(1, len(samples) // 256)])
    after = list(measure(1.0))
    row |= {"before": [mean(each) for each in before], "after": [mean(each) for each in after]}
    return row | {"evaluation_standard_error": difference(after[-1], before[-1])[1]}


def main() -> int:
    """Train once for each of --runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("student", type=Path)
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--held-out", type=Path, nargs="+", required=True)
    parser.add_argument("--evaluation", type=Path, nargs="+", required=True)
    parser.add_argument("--measured-tokens", type=int, default=61_440, help="of each file that is measured on")
    parser.add_argument("--tokens", type=int, default=1 << 30, help="at most of each file that is trained on")
    parser.add_argument("--runs", type=parse_run, nargs="+", required=True)
    parser.add_argument("--batch-tokens", type=int, default=16384)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_options(parser)
    args = parser.parse_args()
    device = torch.device(args.device)
    source = open_checkpoint(args.teacher)
    tokenizer = open_tokenizer(source.root)
    parts = {
        "source": source,
        "start": open_checkpoint(args.student),
        "device": device,
        "rounding": Rounding(device),
        "samples": read(args.data, tokenizer, args.tokens, args.window),
        "held_out": [read([path], tokenizer, args.measured_tokens, args.window) for path in args.held_out],
        "evaluation": read(args.evaluation, tokenizer, args.measured_tokens, args.window),
        "teacher": LiveTeacher(load_teacher(source, device)),
    }
    rows: list[dict[str, Any]] = []
    with deterministic(device), patch.object(linear, "round_to_e4m3", parts["rounding"]):
        for run in args.runs:
            rows.append(train(run, args, parts))
            print(json.dumps(rows[-1]), flush=True)
            gc.collect()  # of the CUDA graphs of the last
    save(args, "What do other ways of rounding entries gain, and embeddings that are trained?", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
