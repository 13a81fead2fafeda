"""A training spread over processes: two of them on this CPU, which find each other by gloo, as GPUs do by NCCL."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import VOCABULARY
from torch import nn

from convert_w4a8 import api
from convert_w4a8.distillation.data import Batch
from convert_w4a8.distillation.hidden import blocks_of
from convert_w4a8.distillation.linear import Preset
from convert_w4a8.distillation.mix import mixed
from convert_w4a8.distillation.options import DistillOptions
from convert_w4a8.distillation.processes import Place, run_on_all
from convert_w4a8.distillation.sharded import ShardedTrainer, part_of, shard, shard_student
from convert_w4a8.distillation.student import load_student, load_teacher
from convert_w4a8.distillation.teacher import LiveTeacher
from convert_w4a8.distillation.train import Trainer
from convert_w4a8.samples.read import read_samples

pytest.importorskip("transformers")

CPU = torch.device("cpu")
STEPS = 4


@dataclass(frozen=True)
class Case:
    """A training of some steps. tokens: of a batch; samples have 40 to 42."""

    preset: Preset
    tokens: int = 256
    recompute: bool = False
    hidden_weight: float = 0.0

    @property
    def options(self) -> DistillOptions:
        """As options."""
        return DistillOptions(
            self.preset,
            steps=STEPS,
            batch_tokens=self.tokens,
            recompute=self.recompute,
            hidden_weight=self.hidden_weight,
            rate=4.0,
        )


CASES = (
    Case(Preset.TABLES),
    Case(Preset.WEIGHTS),
    Case(Preset.TABLES, tokens=42),  # one sample: the first process has none
    Case(Preset.WEIGHTS, tokens=130, recompute=True),  # three samples: one and two
    Case(Preset.TABLES, hidden_weight=0.5),
)


def batches(data: list[Path], options: DistillOptions) -> Iterator[Batch]:
    """Yield the batches of a training."""
    samples = read_samples(data, None, vocab_size=VOCABULARY).samples
    batch = mixed(samples, {"one": 0.5, "two": 0.5}, options)
    yield from (batch(step) for step in range(options.steps))


def in_process(place: Place, start: Path, model: Path, data: list[Path], out: Path) -> list[list[float]]:
    """Train every case in one of the processes, write what it has, and return the divergences."""
    checkpoint, source = api.open_checkpoint(start), api.open_checkpoint(model)
    found = []
    for number, case in enumerate(CASES):
        student = shard_student(load_student(checkpoint, source, case.preset, CPU), place)
        teacher = LiveTeacher(shard(load_teacher(source, CPU), place))
        trainer = ShardedTrainer(student, teacher, case.options, place)
        found.append([trainer.train(batch) for batch in batches(data, case.options)])
        measured = trainer.measure(read_samples(data, None, vocab_size=VOCABULARY).samples)
        save_file(trainer.state() | {"measured": measured}, out / f"{number}-{place.rank}.safetensors")
    return found


class Accumulated(Trainer):
    """A whole model which computes the parts of a batch one after the other, and adds up their gradients."""

    ranks = 2

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        for block in blocks_of(self.student.model, ""):
            block.register_forward_pre_hook(_pass_on)

    def train(self, batch: Batch) -> float:
        """Take one step."""
        sums: dict[str, torch.Tensor] = {}
        divergence = torch.zeros(())
        for rank in range(self.ranks):
            part, tokens = part_of(batch, rank, self.ranks)
            weight = (tokens.stop - tokens.start) / int(batch.counts.sum())
            loss, found = self._losses(part)
            for one in self.trained.values():
                one.parameter.grad = None
            (loss * weight).backward()  # type: ignore[no-untyped-call]
            divergence = divergence + found.detach() * weight
            for name, one in self.trained.items():
                assert one.parameter.grad is not None
                sums[name] = sums.get(name, 0.0) + one.parameter.grad.float()
        for name, one in self.trained.items():
            one.parameter.grad = sums[name].to(one.parameter.dtype)
        self._update(self.factor(self.step))
        self.step += 1
        return float(divergence)


def _pass_on(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Have a block's gradients by its input added up before those of others that use it, as FSDP2 does: in BF16."""
    return inputs[0].view_as(inputs[0]), *inputs[1:]


@pytest.fixture(scope="module")
def trained(
    model: Path, start: Path, data: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[list[float]]]:
    """Train every case in two processes."""
    out = tmp_path_factory.mktemp("parts")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return out, run_on_all(in_process, (start, model, data, out), 2, "cpu", lambda _message: None)
    finally:
        torch.set_num_threads(threads)


@pytest.fixture
def _one_thread() -> Iterator[None]:
    """Compute as each of the processes does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("number", range(len(CASES)))
def test_processes_compute_what_one_does(
    number: int, trained: tuple[Path, list[list[float]]], model: Path, start: Path, data: list[Path]
) -> None:
    """Bit for bit what one process computes that adds up the gradients of the parts; a whole batch differs in rounding.

    A whole batch's gradients are sums over all its tokens in one order; those of parts are rounded before they are
    added, norms' and biases' to BF16.
    """
    out, losses = trained
    case = CASES[number]
    checkpoint, source = api.open_checkpoint(start), api.open_checkpoint(model)
    teacher = LiveTeacher(load_teacher(source, CPU))
    added = Accumulated(load_student(checkpoint, source, case.preset, CPU), teacher, case.options, CPU)
    assert [added.train(batch) for batch in batches(data, case.options)] == losses[number]
    parts = [load_file(out / f"{number}-{rank}.safetensors") for rank in range(2)]
    others = set(added.student.others)
    for name, whole in added.state().items():
        leaf = name.partition(".")[2]
        found = parts[0][name] if leaf in others else torch.cat([part[name] for part in parts])
        assert torch.equal(found, whole), name
        assert leaf not in others or torch.equal(parts[1][name], whole)
    samples = read_samples(data, None, vocab_size=VOCABULARY).samples
    assert torch.equal(parts[0]["measured"], parts[1]["measured"])
    assert torch.allclose(parts[0]["measured"], added.measure(samples), rtol=1e-5, atol=0)
    whole = Trainer(load_student(checkpoint, source, case.preset, CPU), teacher, case.options, CPU)
    assert [whole.train(batch) for batch in batches(data, case.options)] == pytest.approx(losses[number], rel=0.02)
