"""Springs as stiff as the divergence bends: how that is found, what they do, and a training that is continued."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_training import random_layer
from tiny_models import VOCABULARY

from convert_w4a8 import api
from convert_w4a8.distillation import curvature
from convert_w4a8.distillation.linear import LutLinear, Preset
from convert_w4a8.distillation.loss import counted, divergence
from convert_w4a8.distillation.mix import mixed
from convert_w4a8.distillation.options import DistillOptions, rates_for
from convert_w4a8.distillation.student import load_student, load_teacher, logits_of
from convert_w4a8.distillation.tables import round_to_e4m3
from convert_w4a8.distillation.teacher import LiveTeacher
from convert_w4a8.distillation.train import Trainer
from convert_w4a8.samples.read import read_samples

CPU = torch.device("cpu")


def test_looks_find_the_second_derivative_of_the_divergence() -> None:
    """Of a teacher that is the student: there the Gauss-Newton curvature is the whole of it."""
    generator = torch.Generator().manual_seed(3)
    inputs, start = torch.randn(6, 4, generator=generator), torch.randn(4, 5, generator=generator)
    teacher = inputs @ start

    def loss(weights: torch.Tensor) -> torch.Tensor:
        log_p, log_q = teacher.log_softmax(-1), (inputs @ weights.view(4, 5)).log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1).mean()

    other = start + torch.randn(4, 5, generator=generator)
    assert torch.allclose(loss(other.flatten()), divergence(inputs @ other, teacher).mean(), rtol=1e-5)
    exact = torch.func.hessian(loss)(start.flatten()).diagonal().view(4, 5)
    known = curvature.Curvature({"a": torch.zeros(4, 5)})
    count = 20_000
    total = torch.zeros(4, 5, dtype=torch.float64)
    for seed in range(count):
        gradient = inputs.T @ curvature.sampled(teacher, seed)
        total += gradient.square() * len(teacher)
        if seed < 50:
            known.note("a", gradient, len(teacher))
            assert torch.allclose(known.known["a"].double(), total / (seed + 1), rtol=1e-4, atol=1e-7)
    assert torch.allclose((total / count).float(), exact, rtol=0.06)


def test_logits_are_looked_at_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row is that of its own draw: less 1 at one token."""
    monkeypatch.setattr(curvature, "LOGITS_AT_ONCE", 14)
    logits = torch.randn(9, 7, generator=torch.Generator().manual_seed(0))
    drawn = logits.softmax(-1) - 9 * curvature.sampled(logits, 5)
    assert torch.allclose(drawn.sort(dim=1).values, torch.tensor([0.0] * 6 + [1.0]).expand(9, 7), atol=1e-5)
    assert len(set(drawn.argmax(1).tolist())) > 1


def test_a_look_is_one_percent_of_what_is_known_after_a_hundred() -> None:
    known = curvature.Curvature({"a": torch.zeros(2), "b": torch.zeros(2)})
    for _ in range(500):
        known.note("a", torch.full((2,), 3**0.5), 1)
    known.note("a", torch.tensor([0.0, 2.0]), 5)
    assert torch.allclose(known.known["a"], torch.tensor([3.0 * 0.99, 3.0 * 0.99 + 20 * 0.01]))
    known.note("b", torch.tensor([0.0, 2.0]), 5)  # an expert that no token went to until then
    assert known.known["b"].tolist() == [0.0, 20.0]
    assert known.state()["looks"].tolist() == [501, 1]


def test_springs_grow_sixteen_times_as_stiff() -> None:
    assert [curvature.stiffness(0.5, done) for done in (0.0, 0.5, 1.0, 1.1)] == [0.125, 0.5, 2.0, 2.0]


@given(st.integers(0, 1000), st.floats(0, 8))
def test_entries_go_a_part_of_the_way_and_stay_what_they_are(seed: int, part: float) -> None:
    layer = LutLinear(random_layer(seed), None, Preset.TABLES)
    generator = torch.Generator().manual_seed(seed)
    layer.entries.data.add_(torch.randn(layer.entries.shape, generator=generator) * 0.7)
    h, size = (torch.rand(layer.entries.shape, generator=generator) for _ in range(2))
    h[0] = 0
    known = curvature.Curvature({"a": layer.entries})
    known.known["a"].copy_(h)
    was, before = layer.entries.detach().clone(), layer.current()[0]
    nearest = (before - layer.start) / layer.step
    known.pull("a", layer, size.square(), part, lambda tensor: tensor.detach())
    way = (part * h / (size + 1e-12)).clamp(max=0.5)
    assert torch.allclose(layer.entries, was + way * (nearest - was), rtol=1e-4, atol=1e-5)
    assert torch.equal(layer.entries[0], was[0])
    assert torch.equal(layer.current()[0], before)


@pytest.mark.parametrize("damping", [0.0, 1.0])
def test_an_entry_comes_to_rest_where_the_loss_is_least(damping: float) -> None:
    """Of ½·h·(e − t)², e what the entry is rounded to: springs of h end at t, none at the edge of rounding."""
    layer = LutLinear(random_layer(1), None, Preset.TABLES)
    h = torch.full(layer.entries.shape, 0.5)
    known = curvature.Curvature({"a": layer.entries})
    known.known["a"].copy_(h)
    goal = layer.start + 0.3 * layer.step
    for _ in range(400):
        rounded = round_to_e4m3(layer.start + layer.entries.detach() * layer.step)
        gradient = h * (rounded - goal) / layer.step
        layer.entries.data.sub_(0.05 * gradient)
        if damping:
            known.pull("a", layer, torch.ones_like(h), 0.05 * damping, lambda tensor: tensor.detach())
    small = (layer.start.abs() > 2**-6) & (layer.start.abs() < 400)  # normal numbers, which have room
    off = (layer.entries.detach() - 0.3).abs()[small]
    assert (off < 0.02).all() if damping else (off > 0.1).float().mean() > 0.8


@pytest.mark.parametrize("seed", [0, 1 << 32, (1 << 96) + 5])
def test_what_is_no_number_stays_so_and_every_seed_is_taken(seed: int) -> None:
    logits = torch.zeros(3, 5, dtype=torch.bfloat16)
    logits[1, 2] = torch.nan
    assert curvature.sampled(logits, seed).isnan().any(1).tolist() == [False, True, False]


def test_a_look_and_a_pull_are_those_of_the_formulas(model: Path, start: Path, data: list[Path]) -> None:
    """B·ĝ² by the entries, in units of `step`, and damping/4 · h · rate / √v at the first step."""
    pytest.importorskip("transformers")
    source = api.open_checkpoint(model)
    options = DistillOptions(Preset.TABLES, batch_tokens=256, damping=2.0, seed=3)
    student = load_student(api.open_checkpoint(start), source, Preset.TABLES, CPU)
    trainer = Trainer(student, LiveTeacher(load_teacher(source, CPU)), options, CPU)
    samples = read_samples(data, None, vocab_size=VOCABULARY).samples
    batch = mixed(samples, {"one": 0.5, "two": 0.5}, options)(0)
    assert trainer._curvature is not None
    trainer._look(trainer._curvature, batch)
    once = trainer.state()
    trainer.step = curvature.LOOK  # whose draws are others
    trainer._look(trainer._curvature, batch)
    for name, known in trainer.state().items():
        assert torch.equal(known, once[name]) == (not name.startswith(("curvature.", "looks")))
    trainer.step = 0
    logits = counted(logits_of(student.model, batch.ids), batch.counts)
    upstream = curvature.sampled(logits.detach(), 3, 0, 0)
    entries = [layer.entries for layer in student.layers.values()]
    found = torch.autograd.grad(logits, entries, upstream)
    for name, gradient, value in zip(student.layers, found, entries, strict=True):
        assert torch.allclose(once[f"curvature.{name}"], len(logits) * gradient.square(), rtol=1e-5)
        trainer._curvature.known[name].fill_(1500.0)
        trainer.trained[f"{name}.entries"].second.fill_(4.0)
        value.data.fill_(0.3)
    trainer._forget()
    for one in trainer.trained.values():
        one.parameter.grad = torch.zeros_like(one.parameter)
    nearest = [(layer.current()[0] - layer.start) / layer.step for layer in student.layers.values()]
    trainer._update(0.5)
    way = 2.0 / 4 * 1500.0 * 0.5 * rates_for(Preset.TABLES, 1000).entries * 0.01**0.5 / (4.0 * 0.99) ** 0.5
    for value, goal in zip(entries, nearest, strict=True):
        assert torch.allclose(value, 0.3 + way * (goal - 0.3), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("more", [{}, {"hidden_weight": 0.5}, {"recompute": True}])
def test_a_training_that_is_continued_has_the_same_values(
    more: dict[str, Any], model: Path, start: Path, data: list[Path]
) -> None:
    pytest.importorskip("transformers")
    checkpoint, source = api.open_checkpoint(start), api.open_checkpoint(model)
    samples = read_samples(data, None, vocab_size=VOCABULARY).samples
    teacher = LiveTeacher(load_teacher(source, CPU))
    options = DistillOptions(Preset.TABLES, steps=24, rate=3, batch_tokens=256, damping=1.0, **more)
    batch = mixed(samples, {"one": 0.5, "two": 0.5}, options)

    def trainer() -> Trainer:
        return Trainer(load_student(checkpoint, source, Preset.TABLES, CPU), teacher, options, CPU)

    whole, first, second = trainer(), trainer(), trainer()
    while whole.step < 24:
        whole.train(batch(whole.step))
    while first.step < 13:
        first.train(batch(first.step))
    second.restore(first.state(), 13)
    while second.step < 24:
        second.train(batch(second.step))
    state = whole.state()
    assert any(name.startswith("curvature.") and (part > 0).any() for name, part in state.items())
    assert set(state["looks"].tolist()) == {3}
    assert {name: part.tolist() for name, part in second.state().items()} == {n: p.tolist() for n, p in state.items()}


def test_latent_weights_and_trainings_without_springs_have_no_curvature(model: Path, start: Path) -> None:
    pytest.importorskip("transformers")
    checkpoint, source = api.open_checkpoint(start), api.open_checkpoint(model)
    teacher = LiveTeacher(load_teacher(source, CPU))
    for preset, damping in ((Preset.WEIGHTS, 1.0), (Preset.TABLES, 0.0)):
        student = load_student(checkpoint, source, preset, CPU)
        trainer = Trainer(student, teacher, DistillOptions(preset, damping=damping), CPU)
        assert not any(name.startswith("curvature.") for name in trainer.state())
