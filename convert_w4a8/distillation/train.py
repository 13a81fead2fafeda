"""The training: Adam on the divergence of predictions, held-out measurements, and what a run continues from."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from convert_w4a8.devices import training
from convert_w4a8.distillation import curvature, damping
from convert_w4a8.distillation.data import Batch, by_length, in_batches, make_batch
from convert_w4a8.distillation.fused import rotations
from convert_w4a8.distillation.graphs import Passes
from convert_w4a8.distillation.hidden import block_outputs, blocks_of, difference_of_hidden
from convert_w4a8.distillation.loss import counted
from convert_w4a8.distillation.machine import upload
from convert_w4a8.distillation.options import DistillOptions, Rates, rates_for
from convert_w4a8.distillation.student import Student, logits_of
from convert_w4a8.distillation.teacher import Teacher
from convert_w4a8.samples.sample import Sample

_BETAS = (0.9, 0.99)
_EPSILON = 1e-12


@dataclass
class Trained:
    """A trained parameter: its float32 values, Adam's moments, and how long a step of rate 1 is.

    rounded: where a copy in BF16 is what the model computes with; None where the values are.
    """

    value: torch.Tensor
    rounded: nn.Parameter | None
    kind: str
    unit: float
    first: torch.Tensor
    second: torch.Tensor

    @property
    def parameter(self) -> torch.Tensor:
        """What has the gradient."""
        return self.value if self.rounded is None else self.rounded


class Trainer:
    """A training that can be stopped and continued between any two steps."""

    _rank = 0
    """Of this process among those that share batches."""

    def __init__(
        self,
        student: Student,
        teacher: Teacher,
        options: DistillOptions,
        device: torch.device,
        rates: Rates | None = None,
    ) -> None:
        """Begin. rates: instead of those for the preset and the steps."""
        self.student, self.teacher, self.options = student, teacher, options
        self._device = device
        self._rates = rates or rates_for(options.preset, options.steps)
        self.trained = {name: _trained(name, parameter) for name, parameter in student.trained()}
        self._passes = Passes(student.model, [one.parameter for one in self.trained.values()], device)
        self.step = 0
        self._curvature: curvature.Curvature | None = None
        if options.springs_of_curvature:
            entries = {name: self.trained[f"{name}.entries"].value for name in student.layers}
            self._curvature = curvature.Curvature(entries)
        if options.recompute:
            recompute_blocks(student.model)

    @torch.no_grad()
    def divergences(self, batch: Batch) -> torch.Tensor:
        """Return the divergence at each token of a batch that counts, float32 [C]."""
        target = self.teacher.target(batch, self._device)
        return target.divergence(counted(logits_of(self.student.model, upload(batch.ids, self._device)), batch.counts))

    def train(self, batch: Batch) -> float:
        """Take one step; return the mean divergence of its batch before it, in nats per token."""
        if self._curvature is not None and self.step % curvature.LOOK == 0:
            self._look(self._curvature, batch)
        self._forget()
        loss, found = self._losses(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        self._passes.backward()
        self._update(self.factor(self.step))
        self.step += 1
        return float(found.detach())

    def _forget(self) -> None:
        for one in self.trained.values():
            one.parameter.grad = None

    def _part(self, batch: Batch) -> tuple[Batch, float]:
        """Return what this process computes of a batch, and which part of the tokens that count is its own."""
        return batch, 1.0

    def _look(self, known: curvature.Curvature, batch: Batch) -> None:
        """Look at how the divergence bends along each entry."""
        self._forget()
        part, share = self._part(batch)
        ids = upload(part.ids, self._device)
        logits = counted(self._passes.forward(ids, counts=False), part.counts)
        upstream = curvature.sampled(logits.detach(), self.options.seed, self.step, self._rank)
        logits.backward(upstream.mul_(share))  # type: ignore[no-untyped-call]
        self._passes.backward()
        tokens = int(batch.counts.sum())
        for name in self.student.layers:
            gradient = self.trained[f"{name}.entries"].parameter.grad
            if gradient is not None:
                known.note(name, gradient, tokens)

    def _losses(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss of a batch, and its mean divergence alone."""
        weight, ids = self.options.hidden_weight, upload(batch.ids, self._device)
        target = self.teacher.target(batch, self._device, hidden=weight > 0)
        if not weight:
            found = target.divergence(counted(self._passes.forward(ids), batch.counts)).mean()
            return found, found
        with block_outputs(self.student.model) as outputs:
            logits = logits_of(self.student.model, ids)
        found = target.divergence(counted(logits, batch.counts)).mean()
        ours = [counted(output, batch.counts) for output in outputs]
        return found + weight * difference_of_hidden(ours, target.hidden), found

    @property
    def progress(self) -> float:
        """The part of the training that is done."""
        return self.step / self.options.steps

    def factor(self, step: int) -> float:
        """Return what the rates are multiplied by at a step: a linear rise, and half a cosine down to nothing."""
        rise = min(1.0, (step + 1) / max(1.0, self.options.warmup * self.options.steps))
        return self.options.rate * rise * 0.5 * (1 + math.cos(math.pi * step / self.options.steps))

    @torch.no_grad()
    def _update(self, factor: float) -> None:
        """Take one step of Adam, and draw values towards what they are rounded to."""
        first, second = (1 - beta ** (self.step + 1) for beta in _BETAS)
        ones = [one for one in self.trained.values() if one.parameter.grad is not None]
        sizes = [factor * getattr(self._rates, one.kind) * one.unit / first for one in ones]
        rest = [1 - _BETAS[0], 1 - _BETAS[1], second**-0.5, _EPSILON]
        numbers = upload(torch.tensor([[size, *rest] for size in sizes]), self._device)
        operations = training(self._device)
        for one, own in zip(ones, numbers, strict=True):
            gradient = one.parameter.grad
            assert gradient is not None
            operations.adam(one.value, gradient, one.first, one.second, one.rounded, own)
        if self._curvature is not None:
            part = curvature.stiffness(self.options.damping or 0.0, self.progress) * factor * self._rates.entries
            for name, layer in self.student.layers.items():
                one = self.trained[f"{name}.entries"]
                if one.parameter.grad is not None:
                    self._curvature.pull(name, layer, one.second, part * second**0.5, self._own)
            return
        if not self.options.damping or self.step % damping.EVERY:
            return
        stiff = damping.EVERY * factor * damping.stiffness(self.options.damping, self.progress)
        for name, layer in self.student.layers.items():
            if self.trained[f"{name}.entries"].parameter.grad is None:
                continue  # an expert without tokens stays as it is
            damping.pull(layer, stiff * self._rates.entries, stiff * self._rates.weight, self._own)

    @staticmethod
    def _own(tensor: torch.Tensor) -> torch.Tensor:
        """Return what this process has of a layer's tensor."""
        return tensor

    @torch.no_grad()
    def measure(self, samples: Sequence[Sample]) -> torch.Tensor:
        """Return of each sample the sum of its divergences and how many tokens they are, float64 [samples, 2]."""
        found = torch.zeros(len(samples), 2, dtype=torch.float64)
        for numbers in in_batches(samples, by_length(samples), self.options.batch_tokens):
            batch = make_batch(samples, numbers)
            values = torch.zeros(batch.counts.shape, dtype=torch.float64)
            values[batch.counts] = self.divergences(batch).double().cpu()
            found[numbers] = torch.stack((values.sum(1), batch.counts.sum(1).double()), dim=1)
        return found

    def state(self) -> dict[str, torch.Tensor]:
        """Return copies of all that training changes, on the CPU, but for the number of the step."""
        found = {}
        for name, one in self.trained.items():
            for part in ("value", "first", "second"):
                found[f"{part}.{name}"] = getattr(one, part).detach().cpu().clone()
        return found | ({} if self._curvature is None else self._curvature.state())

    def values(self) -> dict[str, torch.Tensor]:
        """Return copies of the trained values alone, on the CPU."""
        return {name: one.value.detach().cpu().clone() for name, one in self.trained.items()}

    @torch.no_grad()
    def restore(self, state: Mapping[str, torch.Tensor], step: int) -> None:
        """Continue from a `state`."""
        for name, one in self.trained.items():
            for part in ("value", "first", "second"):
                getattr(one, part).copy_(state[f"{part}.{name}"])
        if self._curvature is not None:
            self._curvature.restore(state)
        self._round()
        self.step = step

    @torch.no_grad()
    def set_values(self, values: Mapping[str, torch.Tensor]) -> None:
        """Put trained values in their place."""
        for name, one in self.trained.items():
            one.value.copy_(values[name])
        self._round()

    def _round(self) -> None:
        for one in self.trained.values():
            if one.rounded is not None:
                one.rounded.copy_(one.value)


def mean(measured: torch.Tensor) -> float:
    """Return the mean divergence per token of what `Trainer.measure` found."""
    return float(measured[:, 0].sum() / measured[:, 1].sum().clamp(min=1))


def difference(measured: torch.Tensor, before: torch.Tensor) -> tuple[float, float]:
    """Return how much the mean divergence has changed, and the standard error of that, paired by sample."""
    tokens = measured[:, 1]
    total = tokens.sum().clamp(min=1)
    change = measured[:, 0] - before[:, 0]
    found = change.sum() / total
    count = len(tokens)
    if count < 2:
        return float(found), math.inf
    # The delta method for a ratio of sums over independent samples.
    error = (change - found * tokens).square().sum().mul(count / (count - 1)).sqrt() / total
    return float(found), float(error)


def _trained(name: str, parameter: nn.Parameter) -> Trained:
    leaf = name.rpartition(".")[2]
    own = parameter.dtype == torch.float32
    if own:
        kind = leaf if leaf in ("entries", "scale") else "weight"
    else:
        kind = "other" if parameter.dim() == 1 else "embedding"
    value = parameter.data if own else parameter.detach().float()
    unit = 1.0 if own else float(value.square().mean().sqrt().clamp(min=2.0**-7))
    zeros = torch.zeros_like(value)
    return Trained(parameter if own else value, None if own else parameter, kind, unit, zeros, zeros.clone())


def recompute_blocks(model: nn.Module) -> None:
    """Let the backward pass compute decoder blocks again."""
    for block in blocks_of(model, "--recompute"):
        block.forward = _checkpointed(model, block.forward)


def _checkpointed(model: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    def compute(*args: Any, **kwargs: Any) -> Any:
        with rotations(model):  # again, where the backward pass comes here
            return forward(*args, **kwargs)

    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(compute, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run
