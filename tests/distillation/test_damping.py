"""Springs: what they draw values to, how stiff they are, and what a training with them is like."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_training import random_layer
from tiny_models import VOCABULARY

from convert_w4a8 import api
from convert_w4a8.distillation.damping import pull, stiffness
from convert_w4a8.distillation.linear import LutLinear, Preset
from convert_w4a8.distillation.mix import mixed
from convert_w4a8.distillation.options import DistillOptions
from convert_w4a8.distillation.student import load_student, load_teacher
from convert_w4a8.distillation.teacher import LiveTeacher
from convert_w4a8.distillation.train import Trainer
from convert_w4a8.fp8 import E4M3_MAX
from convert_w4a8.samples.read import read_samples


def shaken(seed: int) -> LutLinear:
    """Return a layer whose trained values are off what they are rounded to."""
    layer = LutLinear(random_layer(seed), None, Preset.WEIGHTS)
    generator = torch.Generator().manual_seed(seed)
    for value in (layer.entries, layer.scale, layer.weight):
        if value is not None:
            value.data.add_(torch.randn(value.shape, generator=generator) * (0.1 if value is layer.scale else 0.7))
    return layer


@given(st.integers(0, 1000), st.floats(0, 0.5), st.floats(0, 0.2))
def test_values_go_a_part_of_the_way(seed: int, entries: float, weights: float) -> None:
    layer = shaken(seed)
    assert layer.weight is not None
    before = [part.clone() for part in layer.operand()]
    was = (layer.start + layer.entries * layer.step).detach()
    latent = layer.weight.detach().clone()
    pull(layer, entries, weights)
    now = (layer.start + layer.entries * layer.step).detach()
    torch.testing.assert_close(now, torch.lerp(was, before[0], entries), rtol=1e-5, atol=1e-4)
    for after, same in zip(layer.operand(), before, strict=True):
        assert torch.equal(after, same)  # what the layer computes is what it was
    values = before[3].float() * (before[1] / (layer.channel_scale * layer.unit))[:, None]
    wanted = torch.lerp(latent, values, min(0.5, weights * 3))
    torch.testing.assert_close(layer.weight.detach(), wanted, rtol=1e-5, atol=1e-5)


def test_entries_beyond_e4m3_come_back() -> None:
    layer = LutLinear(random_layer(), None, Preset.WEIGHTS)
    layer.entries.data.fill_(1e4)
    for _ in range(60):
        pull(layer, 1.0, 0.0)
    assert float((layer.start + layer.entries * layer.step).detach().max()) == pytest.approx(E4M3_MAX)


@pytest.mark.parametrize(("done", "expected"), [(0, 0.01), (0.5, 0.5 * 0.02**0.5), (1, 0.5), (1.5, 0.5)])
def test_springs_become_stiff(done: float, expected: float) -> None:
    assert stiffness(0.5, done) == pytest.approx(expected)


@pytest.mark.parametrize(("steps", "expected"), [(1000, 0.0), (2000, 0.0), (2001, 0.5)])
def test_short_trainings_have_none(steps: int, expected: float) -> None:
    assert DistillOptions(steps=steps).damping == expected
    assert DistillOptions(steps=steps, damping=0.25).damping == 0.25


def test_what_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="damping is not a finite number"):
        DistillOptions(damping=float("nan"))
    with pytest.raises(ValueError, match="damping is less than 0"):
        DistillOptions(damping=-0.5)


def test_a_layer_without_gradients_stays(model: Path, start: Path) -> None:
    """As an expert that no token of a batch went to."""
    pytest.importorskip("transformers")
    source, cpu = api.open_checkpoint(model), torch.device("cpu")
    student = load_student(api.open_checkpoint(start), source, Preset.WEIGHTS, cpu)
    options = DistillOptions(Preset.WEIGHTS, damping=100.0)
    trainer = Trainer(student, LiveTeacher(load_teacher(source, cpu)), options, cpu)
    still = next(iter(student.layers))
    for name, one in trainer.trained.items():
        if one.rounded is None and not name.endswith(".scale"):
            one.value.data.add_(0.2)
        one.parameter.grad = None if name.startswith(f"{still}.") else torch.zeros_like(one.parameter)
    before = {name: one.value.clone() for name, one in trainer.trained.items()}
    trainer._update(1.0)
    for name, layer in student.layers.items():
        for leaf, value in (("entries", layer.entries), ("weight", layer.weight)):
            assert value is not None
            assert torch.equal(value, before[f"{name}.{leaf}"]) == (name == still)


@pytest.mark.parametrize("preset", list(Preset))
def test_stiff_springs_keep_what_came_in(preset: Preset, model: Path, start: Path, data: list[Path]) -> None:
    """The same steps change fewer entries and codes with stiff springs, of one device as of the command."""
    pytest.importorskip("transformers")
    checkpoint, source, cpu = api.open_checkpoint(start), api.open_checkpoint(model), torch.device("cpu")
    samples = read_samples(data, None, vocab_size=VOCABULARY).samples
    changed = []
    for damping in (0.0, 100.0):
        options = DistillOptions(preset, steps=24, rate=3, batch_tokens=256, damping=damping)
        student = load_student(checkpoint, source, preset, cpu)
        trainer = Trainer(student, LiveTeacher(load_teacher(source, cpu)), options, cpu)
        before = [layer.current() for layer in student.layers.values()]
        batch = mixed(samples, {"one": 0.5, "two": 0.5}, options)
        while trainer.step < options.steps:
            trainer.train(batch(trainer.step))
        after = [layer.current() for layer in student.layers.values()]
        changed.append(
            sum(
                int((new[0] != old[0]).sum() + (new[2] != old[2]).sum()) for new, old in zip(after, before, strict=True)
            )
        )
    assert 0 < changed[1] < changed[0] / 2
