"""What holds entries on the E4M3 grid costs, and what other ways of rounding them gain. Prints a JSON line a training.

    rounding_experiment.py TEACHER OUT_W4A8 --data FILE ... --held-out FILE ... --evaluation FILE --runs NAME:KEY=VALUE,...

Keys of a run, beside names of `DistillOptions` and factors of its rates (entries, scale, other, weight):

    mode=ste    entries are rounded in every forward pass, gradients pass (what `w4a8 distill` does); also
         free   they are not rounded, until the end
         prox   not rounded, but drawn to the nearest E4M3 number by up to mu·rate a step, which rises from `begin` on,
                as share^power of the way, or exponentially from `low` with power=0 (ProxQuant, Bai et al. 2019)
         ada    likewise, by mu·rate·(1 − 2d)^(β − 1) at a distance d, β falling from 20 to 2 (AdaRound's regularizer)
         alpha  r + α(round(r) − r), α rising from 0 at `begin` to 1 at `end`
         inq    at begin, ... those nearest to the grid are rounded and stay: half, half of the rest, ... (INQ)
    before=free the mode until `begin`
    regrid=A/B  after these parts of the steps channel scales and entries are chosen anew by the error of the layer's
                outputs (`regrid`), of `search` scales; keep=1: entries stay, only the grid is another
    embeddings=F  they are trained too, at F times the rate of norms
    vote=A      also measure entries at the mean of what they were rounded to in the last A of the steps
    seconds=S   the schedule goes by time, not by steps. save=DIR: the result as a checkpoint
"""

import argparse
import gc
import json
import math
import secrets
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from distill_sweep import read
from torch import nn

from convert_w4a8.checkpoint.directory import Checkpoint, open_checkpoint
from convert_w4a8.checkpoint.writer import CheckpointWriter
from convert_w4a8.devices import training
from convert_w4a8.distillation import linear, train
from convert_w4a8.distillation.data import in_batches, make_batch
from convert_w4a8.distillation.linear import LutLinear, Preset
from convert_w4a8.distillation.machine import deterministic
from convert_w4a8.distillation.mix import by_tag, mixed
from convert_w4a8.distillation.options import DistillOptions, Rates, rates_for
from convert_w4a8.distillation.output import plan_files, write_output
from convert_w4a8.distillation.student import Student, load_student, load_teacher, logits_of
from convert_w4a8.distillation.tables import round_to_e4m3, spacing
from convert_w4a8.distillation.teacher import LiveTeacher
from convert_w4a8.distillation.train import Trainer, difference, mean
from convert_w4a8.fp8 import E4M3_MAX
from convert_w4a8.linear import GROUP_SIZE
from convert_w4a8.samples.sample import Sample
from convert_w4a8.samples.tokenizer import open_tokenizer

NUMBERS = {
    "mtok": 10.0, "begin": 0.0, "end": 1.0, "mu": 1.0, "search": 32.0, "keep": 0.0, "embeddings": 0.0, "seconds": 0.0,
    "beta1": 0.9, "beta2": 0.99, "entries": 1.0, "scale": 1.0, "other": 1.0, "weight": 1.0, "points": 4.0, "sweeps": 4.0,
    "latent": 0.0, "last": 0.0, "power": 1.0, "low": 0.02, "final": 0.0, "calib": 131072.0, "center": 0.0, "vote": 0.0, "staged": 0.0,
}  # fmt: skip
WORDS = {"mode": "ste", "before": "free", "regrid": "", "save": "", "preset": "tables"}


def parse_run(text: str) -> dict[str, Any]:
    """Read NAME:KEY=VALUE,..."""
    name, _, rest = text.partition(":")
    given = dict(part.split("=") for part in rest.split(",") if part)
    found: dict[str, Any] = {"name": name} | NUMBERS | WORDS
    kinds = {f.name: type(getattr(DistillOptions(), f.name)) for f in fields(DistillOptions)}
    for key, value in given.items():
        kind = str if key in WORDS else float if key in NUMBERS else kinds.get(key)
        if kind is None:
            raise argparse.ArgumentTypeError(f"{text}: no such key: {key}")
        found[key] = kind(value)
    return found


class Rounding:
    """How far rounding is on: 0 not at all, 1 wholly. On the device, where CUDA graphs read it."""

    def __init__(self, device: torch.device) -> None:
        self.part = torch.ones((), device=device)

    def set(self, part: float) -> None:
        self.part.fill_(part)

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        return torch.lerp(values.clamp(-E4M3_MAX, E4M3_MAX), round_to_e4m3(values), self.part)


def latent_operand(rounding: Rounding, layer: LutLinear) -> tuple[torch.Tensor, ...]:
    """Stand in for `LutLinear.operand` where codes are rounded as far as entries are."""
    with torch.no_grad():
        entries = rounding(layer.start + layer.entries * layer.step)
        scale = layer.channel_scale * layer.scale.exp()
        factor = layer.unit * layer.channel_scale / scale
        codes, values = training(entries.device).choose(layer.weight, factor, entries)
        return entries, scale, codes, torch.lerp(layer.weight * factor[:, None], values.float(), rounding.part).bfloat16()


# --- channel scales and entries by the error of a layer's outputs ---


@torch.no_grad()
def second_moments(student: Student, samples: Sequence[Sample], tokens: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Return E[x xᵀ], float32 [K, K], of the FP8 inputs of each layer."""
    found: dict[str, torch.Tensor] = {}

    def note(name: str, _module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        _, wide, scale = training(device).quantize(inputs[0].flatten(0, -2))
        x = wide.float() * scale
        found[name] = found.get(name, 0) + x.T @ x

    hooks = [layer.register_forward_pre_hook(partial(note, name)) for name, layer in student.layers.items()]
    count = 0
    for numbers in in_batches(samples, range(len(samples)), 8192):
        batch = make_batch(samples, numbers)
        logits_of(student.model, batch.ids.to(device))
        count += batch.ids.numel()
        if count >= tokens:
            break
    for hook in hooks:
        hook.remove()
    return {name: moment / count for name, moment in found.items()}


def of_entries(
    codes: torch.Tensor, moment: torch.Tensor, gap: torch.Tensor | None, at_once: int = 128
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return Sᵀ H S of each channel, float32 [N, E, E], S [K, E] saying which weight is which entry, with its sign.

    gap: float32 [N, K]; return also Sᵀ H gap, [N, E].
    """
    n, k = codes.shape
    per = 8 * (k // GROUP_SIZE)
    group = torch.arange(k, device=codes.device) // GROUP_SIZE * 8
    code = codes.long()
    entry = torch.where(code > 8, 16 - code, code % 8) + group
    sign = torch.where(code > 8, -1.0, torch.where(code == 8, 0.0, 1.0))
    parts, pulls = [], []
    numbers = torch.arange(per, device=codes.device)
    for first in range(0, n, at_once):
        e, s = entry[first : first + at_once], sign[first : first + at_once]
        place = (e[..., None] == numbers) * s[..., None]
        parts.append(place.transpose(1, 2) @ (moment @ place))
        if gap is not None:
            pulls.append((place.transpose(1, 2) @ (gap[first : first + at_once] @ moment)[..., None])[..., 0])
    return torch.cat(parts), torch.cat(pulls) if pulls else None


def choose_grid(t: torch.Tensor, h: torch.Tensor, search: int, sweeps: int) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
    """Choose of each channel a factor f and E4M3 numbers q so that (q/f − t)ᵀ h (q/f − t) is small.

    t: float32 [N, E]. h: float32 [N, E, E]. Returns q [N, E], f [N], and sums of errors. Each f: GPTQ's rounding with
    compensation, then coordinate descent.
    """
    n, e = t.shape
    damped = h + torch.eye(e, device=h.device) * (h.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * 1e-3 + 1e-12)
    order = damped.diagonal(dim1=1, dim2=2).mul(t.square() + 1e-12).argsort(dim=1, descending=True)
    back = order.argsort(dim=1)
    damped = damped.gather(1, order[..., None].expand(-1, -1, e)).gather(2, order[:, None].expand(-1, e, -1))
    t = t.gather(1, order)
    # The first is a power of two, and leaves entries room to grow.
    room = torch.where(t.abs().amax(1, keepdim=True) > E4M3_MAX / 2, 0.5, 1.0)
    factors = room * 2.0 ** (-torch.arange(search, device=t.device) / search)  # [N, F]
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    wanted = t[:, None] * factors[..., None]  # [N, F, E]
    v, q = wanted.clone(), torch.empty_like(wanted)
    for i in range(e):
        q[..., i] = round_to_e4m3(v[..., i])
        error = (v[..., i] - q[..., i]) / upper[:, i, i, None]
        v[..., i:] -= error[..., None] * upper[:, i, None, i:]
    d = q - wanted
    g = d @ damped
    for _ in range(sweeps):
        for i in range(e):
            new = round_to_e4m3(q[..., i] - g[..., i] / damped[:, i, i, None])
            change = new - q[..., i]
            q[..., i] = new
            g += change[..., None] * damped[:, i, None]
    d = q - wanted
    errors = ((d @ damped) * d).sum(-1) / factors.square()
    nearest = round_to_e4m3(t) - t
    sums = {
        "energy": float(((t[:, None] @ damped)[:, 0] * t).sum()),
        "nearest": float(((nearest[:, None] @ damped)[:, 0] * nearest).sum()),
        "compensated": float(errors[:, 0].sum()),
        "searched": float(errors.min(1).values.sum()),
    }
    best = errors.argmin(1)
    rows = torch.arange(n, device=t.device)
    return q[rows, best].gather(1, back), factors[rows, best], sums


@torch.no_grad()
def regrid(trainer: "Experiment", samples: Sequence[Sample]) -> dict[str, float]:
    """Choose channel scales and entries of all layers anew; return errors by the energy of outputs, means of layers."""
    student, run = trainer.student, trainer.run
    names = list(student.layers)
    if run["staged"]:
        parts = len(run["regrid"].split("/"))
        names = names[trainer.staged * len(names) // parts : (trainer.staged + 1) * len(names) // parts]
        trainer.staged += 1
        trainer.fixed += [student.layers[name] for name in names]
    moments = second_moments(student, samples, int(run["calib"]), trainer._device)
    total: dict[str, float] = {}
    for name in names:
        layer = student.layers[name]
        _, channel, codes, _ = layer.operand()
        t = (layer.start + layer.entries * layer.step).clamp(-E4M3_MAX, E4M3_MAX)
        gap = None
        if run["center"]:  # the entries that are best for the teacher's weights, were they not rounded
            model: Any = trainer.teacher
            original = model.model.get_submodule(name).weight.float() / channel[:, None]
            gap = original - training(codes.device).look_up(t, codes).float()
        h, pull = of_entries(codes, moments[name], gap)
        if pull is not None:
            ridge = torch.eye(h.shape[1], device=h.device) * (h.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * 1e-2 + 1e-12)
            t = t + torch.linalg.solve(h + ridge, pull[..., None]).view(t.shape) * run["center"]
        q, f, sums = choose_grid(t.flatten(1), h, int(run["search"]), int(run["sweeps"]))
        for key in ("nearest", "compensated", "searched"):
            total[key] = total.get(key, 0.0) + sums[key] / sums["energy"] / len(names)
        q = q.view(t.shape)
        new_step, new_channel = spacing(q), channel / f
        ratio = (new_step * new_channel[:, None, None]) / (layer.step * channel[:, None, None])
        one = trainer.trained[f"{name}.entries"]
        one.first.mul_(ratio), one.second.mul_(ratio.square())
        if layer.weight is not None:
            by = (layer.channel_scale / new_channel)[:, None]
            latent = trainer.trained[f"{name}.weight"]
            latent.value.mul_(by), latent.first.div_(by), latent.second.div_(by.square())
        layer.entries.copy_((t * f[:, None, None] - q) / new_step if run["keep"] else torch.zeros_like(q))
        layer.start.copy_(q), layer.step.copy_(new_step), layer.channel_scale.copy_(new_channel), layer.scale.zero_()
    return total


@torch.no_grad()
def by_counts(layer: LutLinear, search: int) -> None:
    """Choose a layer's channel scales by the rounding errors of its weights alone, and round its entries."""
    _, channel, codes, _ = layer.operand()
    t = (layer.start + layer.entries * layer.step).clamp(-E4M3_MAX, E4M3_MAX)
    n, groups, _ = t.shape
    code = codes.view(n, groups, GROUP_SIZE)
    counts = torch.stack([((code == j) | ((code == 16 - j) & (j > 0))).sum(-1) for j in range(8)], dim=-1).float()
    room = torch.where(t.abs().amax((1, 2)) > E4M3_MAX / 2, 0.5, 1.0)
    best, chosen, factor = torch.full((n,), math.inf, device=t.device), t, torch.ones(n, device=t.device)
    for i in range(-1, search):
        f = torch.ones_like(room) if i < 0 else room * 2.0 ** (-i / search)
        q = round_to_e4m3(t * f[:, None, None])
        error = ((q / f[:, None, None] - t).square() * counts).sum((1, 2))
        better = error < best
        best, factor = torch.where(better, error, best), torch.where(better, f, factor)
        chosen = torch.where(better[:, None, None], q, chosen)
    layer.start.copy_(chosen), layer.step.copy_(spacing(chosen)), layer.entries.zero_()
    layer.channel_scale.copy_(channel / factor), layer.scale.zero_()
    if layer.weight is not None:
        layer.weight.mul_((channel * 0 + factor)[:, None])


# --- the training ---


class Experiment(Trainer):
    """A training whose entries are rounded in another way."""

    def __init__(self, run: dict[str, Any], rounding: Rounding, *args: Any) -> None:
        super().__init__(*args)
        self.run, self.rounding = run, rounding
        self.began = time.monotonic()
        self.frozen: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.stages = self.counted = self.staged = 0
        self.fixed: list[LutLinear] = []
        self.votes: dict[int, torch.Tensor] = {}

    @property
    def progress(self) -> float:
        by_step = self.step / self.options.steps
        return max(by_step, (time.monotonic() - self.began) / self.run["seconds"]) if self.run["seconds"] else by_step

    def factor(self, step: int) -> float:
        rise = min(1.0, (step + 1) / max(1.0, self.options.warmup * self.options.steps))
        done = min(1.0, self.progress)
        last = self.run["last"]  # the part at the end whose rate does not fall below `power` of ...
        return self.options.rate * rise * max(0.5 * (1 + math.cos(math.pi * done)), last * (done < 0.97))

    def set_part(self) -> None:
        """Say how far entries are rounded in the next forward pass."""
        run, done = self.run, self.progress
        mode = run["mode"] if done >= run["begin"] else run["before"]
        part = {"ste": 1.0, "alpha": min(1.0, ((done - run["begin"]) / max(1e-9, run["end"] - run["begin"])) ** run["power"])}
        self.rounding.set(part.get(mode, 0.0) if done < 1 - run["final"] else 1.0)

    def _update(self, factor: float) -> None:
        super()._update(factor)
        self.pull(factor)

    @torch.no_grad()
    def pull(self, factor: float) -> None:
        run, done = self.run, self.progress
        for layer in self.fixed:
            layer.entries.zero_()
        if run["vote"] and done >= 1 - run["vote"]:
            self.counted += 1
            for layer in self.student.layers.values():
                center = (round_to_e4m3(layer.start + layer.entries * layer.step) - layer.start) / layer.step
                self.votes.setdefault(id(layer), torch.zeros_like(center)).lerp_(center, 1 / self.counted)
        if run["mode"] not in ("prox", "ada", "inq") or done < run["begin"]:
            return
        share = min(1.0, (done - run["begin"]) / (run["end"] - run["begin"]))
        rise = share ** run["power"] if run["power"] else run["low"] ** (1 - share)
        amount = run["mu"] * rise * factor * self._rates.entries
        layers = list(self.student.layers.values())
        if run["mode"] == "inq":
            if share >= self.stages / 6:
                self.stages += 1
                self.freeze(layers, 1 - 0.5**self.stages if self.stages < 6 else 1.0)
            for layer, (mask, value) in zip(layers, self.frozen, strict=True):
                layer.entries.copy_(torch.where(mask, value, layer.entries))
            return
        for layer in layers:
            nearest = (round_to_e4m3(layer.start + layer.entries * layer.step) - layer.start) / layer.step
            d = layer.entries - nearest
            if run["mode"] == "ada":
                beta = 20 - 18 * share
                d = d.clamp(-amount, amount) * (1 - 2 * d.abs()).clamp(min=0) ** (beta - 1)
            else:
                d = d.clamp(-amount, amount)
            layer.entries.sub_(d)

    def freeze(self, layers: Sequence[LutLinear], part: float) -> None:
        self.frozen = []
        for layer in layers:
            nearest = (round_to_e4m3(layer.start + layer.entries * layer.step) - layer.start) / layer.step
            d = (layer.entries - nearest).abs()
            limit = d.flatten().sort().values[max(1, int(part * d.numel())) - 1]
            self.frozen.append((d <= limit, nearest))


class _Embedding(torch.autograd.Function):
    """A look-up whose gradient is a product, in a fixed order, which a CUDA graph can hold."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(ids)
        ctx.count = len(weight)
        return weight[ids]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (ids,) = ctx.saved_tensors
        which = ids.flatten()[:, None] == torch.arange(ctx.count, device=ids.device)
        return which.to(gradient.dtype).T @ gradient.flatten(0, -2), None


def train_embeddings(student: Student) -> str:
    """Have the embeddings, which are those of lm_head too, trained like norms."""
    model: Any = student.model
    module = model.get_input_embeddings()
    name = next(name for name, parameter in model.named_parameters() if parameter is module.weight)
    module.weight.requires_grad_()
    module.forward = lambda ids: _Embedding.apply(module.weight, ids)
    student.others[name] = module.weight
    return name


def save_checkpoint(start: Checkpoint, student: Student, out: Path) -> None:
    plan = plan_files(start)
    marks = {shard.file_name: secrets.token_hex(8) for shard in plan}
    with CheckpointWriter(out, plan, fingerprint={}, fingerprints=marks, overwrite=True, resume=False) as writer:
        write_output(writer, start, student.layers.items(), student.others, {"experiment": out.name}, "")
        writer.commit()


def one_run(run: dict[str, Any], args: argparse.Namespace, parts: dict[str, Any]) -> dict[str, Any]:
    """Train once."""
    device, rounding = parts["device"], parts["rounding"]
    preset = Preset(run["preset"])
    steps = int(run["mtok"] * 1e6 / args.batch_tokens)
    given = {f.name: run[f.name] for f in fields(DistillOptions) if f.name in run and f.name != "preset"}
    options = DistillOptions(preset=preset, **({"steps": steps, "batch_tokens": args.batch_tokens} | given))
    rates = Rates(**{name: rate * run[name] for name, rate in asdict(rates_for(preset, steps)).items()})
    student = load_student(parts["start"], parts["source"], preset, device, options.towards)
    embeddings = train_embeddings(student) if run["embeddings"] else ""
    if run["latent"]:
        for layer in student.layers.values():
            layer.operand = partial(latent_operand, rounding, layer)  # type: ignore[method-assign]
    trainer = Experiment(run, rounding, student, parts["teacher"], options, device, rates)
    if embeddings:
        trainer.trained[embeddings].unit *= run["embeddings"]
    samples, held_out, evaluation = parts["samples"], parts["held_out"], parts["evaluation"]
    batch = mixed(samples, {tag: 1 / len(by_tag(samples)) for tag in by_tag(samples)}, options)
    tags = by_tag(held_out)
    row: dict[str, Any] = {**run, "steps": steps, "rates": asdict(rates), "curve": [], "regrids": []}

    def measure(part: float, *, whole: bool = True) -> list[float]:
        rounding.set(part)
        measured = trainer.measure(held_out)
        return [mean(measured[numbers]) for numbers in tags.values()] + (
            [mean(trainer.measure(evaluation))] if whole else []
        )

    rounding.set(1.0)
    first = trainer.measure(evaluation)
    row["before"] = measure(1.0)
    began = trainer.began = time.monotonic()
    left = sorted(float(part) for part in run["regrid"].split("/") if part)
    points = [(i + 1) / run["points"] for i in range(int(run["points"]) - 1)]
    losses: list[float] = []

    def events() -> None:
        nonlocal losses
        while left and trainer.progress >= left[0]:
            found: dict[str, Any] = {"at": left.pop(0), "free": measure(0.0), "nearest": measure(1.0)}
            trainer.set_part()
            if not run["staged"]:
                parts_ = ("start", "step", "channel_scale", "scale", "entries", "weight")
                kept = [
                    (t, t.detach().clone()) for layer in student.layers.values() for t in (getattr(layer, p) for p in parts_) if t is not None
                ]
                for layer in student.layers.values():
                    by_counts(layer, int(run["search"]))
                found["by_counts"] = measure(1.0)
                with torch.no_grad():
                    for tensor, before in kept:
                        tensor.copy_(before)
                trainer.set_part()
            then = time.monotonic()
            found |= {"errors": regrid(trainer, samples[:: max(1, len(samples) // 400)]), "seconds": time.monotonic() - then}
            found["after"] = measure(1.0)
            row["regrids"].append(found)
            print(run["name"], json.dumps(found), flush=True)
        if points and trainer.progress >= points[0]:
            points.pop(0)
            row["curve"].append(
                {
                    "step": trainer.step,
                    "training": sum(losses) / max(1, len(losses)),
                    "rounded": measure(1.0, whole=False),
                    "free": measure(0.0, whole=False),
                }
            )
            print(run["name"], round(time.monotonic() - began), json.dumps(row["curve"][-1]), flush=True)
            losses = []

    while trainer.step < options.steps and trainer.progress < 1:
        events()
        trainer.set_part()
        losses.append(trainer.train(batch(trainer.step)))
    row |= {"seconds": time.monotonic() - began, "done": trainer.step, "free": measure(0.0)}
    row["last"] = {"step": trainer.step, "training": sum(losses) / max(1, len(losses)), "nearest": measure(1.0)}
    events()
    if trainer.votes:
        kept = {name: one.value.detach().clone() for name, one in trainer.trained.items()}
        with torch.no_grad():
            for layer in student.layers.values():
                layer.entries.copy_(trainer.votes[id(layer)])
        row["vote_result"] = {"nearest": measure(1.0), "free": measure(0.0)}
        trainer.set_values(kept)
    rounding.set(1.0)
    last = trainer.measure(evaluation)
    row["after"] = measure(1.0)
    row["evaluation"] = [mean(first), mean(last), difference(last, first)[1]]
    with torch.no_grad():
      moved = torch.cat([(layer.entries - (round_to_e4m3(layer.start + layer.entries * layer.step) - layer.start) / layer.step).abs().flatten() for layer in student.layers.values()])
    row["off_grid"] = [float(moved.mean()), float((moved > 0.05).float().mean())]
    row["flips"] = float(torch.cat([(layer.entries.abs() > 0.5).float().flatten() for layer in student.layers.values()]).mean())
    if run["save"]:
        save_checkpoint(parts["start"], student, Path(run["save"]))
    return row


def main() -> int:
    """Train once for each of --runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("student", type=Path)
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--held-out", type=Path, nargs="+", required=True)
    parser.add_argument("--held-out-tokens", type=int, default=32_768, help="of each file")
    parser.add_argument("--evaluation", type=Path, nargs="+", required=True)
    parser.add_argument("--evaluation-tokens", type=int, default=61_440)
    parser.add_argument("--tokens", type=int, default=1 << 30, help="at most of each file")
    parser.add_argument("--runs", type=parse_run, nargs="+", required=True)
    parser.add_argument("--batch-tokens", type=int, default=16384)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines")
    parser.add_argument("--until", type=float, default=math.inf, help="no run begins that would be done after so many seconds")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    began = time.monotonic()
    device = torch.device(args.device)
    source, start = open_checkpoint(args.teacher), open_checkpoint(args.student)
    tokenizer = open_tokenizer(source.root)
    rounding = Rounding(device)
    parts = {
        "source": source,
        "start": start,
        "device": device,
        "rounding": rounding,
        "samples": read(args.data, tokenizer, args.tokens, args.window),
        "held_out": read(args.held_out, tokenizer, args.held_out_tokens, args.window),
        "evaluation": read(args.evaluation, tokenizer, args.evaluation_tokens, args.window),
        "teacher": LiveTeacher(load_teacher(source, device)),
    }
    longest = 0.0
    with deterministic(device):
        for run in args.runs:
            then = time.monotonic()
            if then - began + max(longest, run["seconds"]) > args.until:
                print(f"{run['name']}: no time", flush=True)
                continue
            try:
                with ExitStack() as changed:
                    changed.enter_context(patch.object(linear, "round_to_e4m3", rounding))
                    changed.enter_context(patch.object(train, "_BETAS", (run["beta1"], run["beta2"])))
                    row = one_run(run, args, parts)
                longest = max(longest, time.monotonic() - then)
            except Exception as error:
                traceback.print_exc()
                row = {**run, "error": repr(error)[:400]}
            with args.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps({k: row.get(k) for k in ("name", "seconds", "done", "free", "last", "after", "error")}), flush=True)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
