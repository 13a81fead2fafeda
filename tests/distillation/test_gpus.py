"""A training spread over processes: two of them on this CPU, which find each other by gloo, as GPUs do by NCCL."""

import json
import os
import pickle
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import active_children
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from process_jobs import raise_something, refuse, say_and_wait, stop
from safetensors.torch import load_file, save_file
from small_training import distill, run, tensors
from tiny_models import VOCABULARY
from torch import nn

from convert_w4a8 import api
from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.distillation import curvature, fused
from convert_w4a8.distillation.curvature import sampled
from convert_w4a8.distillation.data import Batch, make_batch
from convert_w4a8.distillation.data_parallel import ReplicatedTrainer, part_of
from convert_w4a8.distillation.hidden import blocks_of
from convert_w4a8.distillation.linear import Preset
from convert_w4a8.distillation.loss import counted
from convert_w4a8.distillation.mix import TrainingData, hold_out, mixed
from convert_w4a8.distillation.options import DistillOptions
from convert_w4a8.distillation.processes import Place, run_on_all
from convert_w4a8.distillation.sharded import ShardedTrainer, check_gpus, shard, shard_student
from convert_w4a8.distillation.student import load_student, load_teacher, logits_of
from convert_w4a8.distillation.teacher import LiveTeacher
from convert_w4a8.distillation.train import Trainer, mean
from convert_w4a8.errors import ConvertError, DiskError
from convert_w4a8.samples.read import read_samples
from convert_w4a8.samples.sample import Sample

pytest.importorskip("transformers")

CPU = torch.device("cpu")
STEPS = 4
LOOK = 2
"""Steps from one look at the curvature to the next."""


@dataclass(frozen=True)
class Case:
    """A training of some steps. tokens: of a batch; samples have 40 to 42. fused: by what kernels compute on a GPU.

    resumed: continued half-way from its state.
    """

    preset: Preset
    tokens: int = 256
    recompute: bool = False
    hidden_weight: float = 0.0
    fused: bool = False
    damping: float = 0.0
    replicate: bool = False
    embeddings: bool = False
    resumed: bool = False

    @property
    def options(self) -> DistillOptions:
        """As options."""
        return DistillOptions(
            self.preset,
            steps=STEPS,
            batch_tokens=self.tokens,
            recompute=self.recompute,
            hidden_weight=self.hidden_weight,
            damping=self.damping,
            embeddings=self.embeddings,
            rate=4.0,
            seed=3,
        )


CASES = (
    Case(Preset.TABLES),
    Case(Preset.WEIGHTS),
    Case(Preset.TABLES, tokens=42),  # one sample: the first process has none
    Case(Preset.WEIGHTS, tokens=130, recompute=True),  # three samples: one and two
    Case(Preset.TABLES, hidden_weight=0.5),
    Case(Preset.TABLES, fused=True),
    Case(Preset.WEIGHTS, fused=True),
    Case(Preset.TABLES, recompute=True, fused=True),
    Case(Preset.TABLES, damping=20.0, resumed=True),
    Case(Preset.WEIGHTS, damping=20.0),
    Case(Preset.TABLES, replicate=True),
    Case(Preset.TABLES, tokens=42, damping=20.0, replicate=True, resumed=True),
    Case(Preset.TABLES, tokens=130, damping=20.0, hidden_weight=0.5, recompute=True),
    Case(Preset.WEIGHTS, tokens=42, damping=20.0, replicate=True),
    Case(Preset.WEIGHTS, tokens=130, embeddings=True, fused=True, replicate=True),
    Case(Preset.TABLES, hidden_weight=0.5, replicate=True),
    Case(Preset.TABLES, damping=20.0, embeddings=True, fused=True, replicate=True),
)


@contextmanager
def fusing(case: Case) -> Iterator[None]:
    """Replace parts of models as on a GPU, where a case says so."""
    with ExitStack() as stack:
        if case.fused:
            stack.enter_context(patch.object(fused, "why_not_compiled", lambda _device: None))
        yield


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
        if case.replicate:
            found.append(replicated(place, case, checkpoint, source, data, out / f"{number}-{place.rank}.safetensors"))
            continue
        models = load_student(checkpoint, source, case.preset, CPU), load_teacher(source, CPU)
        with fusing(case):
            student, spread = shard_student(models[0], place), shard(models[1], place)
        for model_ in (student.model, spread):
            assert {type(module).__name__ for module in model_.modules() if "forward" in vars(module)} == (
                {"LlamaMLP", "LlamaRMSNorm"} if case.fused else set()
            )
        assert all(parameter.is_floating_point() for parameter in student.model.parameters())  # else torch 2.11 fails
        teacher = LiveTeacher(spread)
        trainer, losses = trained_by(partial(ShardedTrainer, student, teacher, case.options, place), case, data)
        found.append(losses)
        measured = trainer.measure(read_samples(data, None, vocab_size=VOCABULARY).samples)
        save_file(trainer.state() | {"measured": measured}, out / f"{number}-{place.rank}.safetensors")
    return found


def trained_by(make: Callable[[], Trainer], case: Case, data: list[Path]) -> tuple[Trainer, list[float]]:
    """Train; return what has done so and the divergences."""
    trainer, losses = make(), list[float]()
    with patch.object(curvature, "LOOK", LOOK):
        for batch in batches(data, case.options):
            if case.resumed and trainer.step == STEPS // 2:
                first, trainer = trainer, make()
                for name, one in trainer.trained.items():
                    one.unit = first.trained[name].unit  # of the values that came in, which are not there any more
                trainer.restore(first.state(), first.step)
            losses.append(trainer.train(batch))
    return trainer, losses


def replicated(
    place: Place, case: Case, checkpoint: Checkpoint, source: Checkpoint, data: list[Path], file: Path
) -> list[float]:
    """Train a case with the whole of both models in each process."""
    with fusing(case):
        student = load_student(checkpoint, source, case.preset, CPU, embeddings=case.embeddings)
        teacher = LiveTeacher(load_teacher(source, CPU))
    trainer, losses = trained_by(partial(ReplicatedTrainer, student, teacher, case.options, place), case, data)
    measured = trainer.measure(read_samples(data, None, vocab_size=VOCABULARY).samples)
    save_file(trainer.state() | {"measured": measured}, file)
    return losses


class Accumulated(Trainer):
    """A whole model which computes the parts of a batch one after the other, and adds up their gradients."""

    ranks = 2

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.copies = [block.register_forward_pre_hook(_pass_on) for block in blocks_of(self.student.model, "")]

    def train(self, batch: Batch) -> float:
        """Take one step."""
        parts = [part_of(batch, rank, self.ranks) for rank in range(self.ranks)]
        weights = [(tokens.stop - tokens.start) / int(batch.counts.sum()) for _, tokens in parts]
        if self._curvature is not None and self.step % LOOK == 0:
            logits = [counted(logits_of(self.student.model, part.ids), part.counts) for part, _ in parts]
            seeds = [(self.options.seed, self.step, rank) for rank in range(self.ranks)]
            upstream = [sampled(each.detach(), *seed) for each, seed in zip(logits, seeds, strict=True)]
            self._add_up(
                [(each, gradient * weight) for each, gradient, weight in zip(logits, upstream, weights, strict=True)]
            )
            for name, layer in self.student.layers.items():
                assert layer.entries.grad is not None
                self._curvature.note(name, layer.entries.grad, int(batch.counts.sum()))
        losses = [self._losses(part) for part, _ in parts]
        self._add_up([(loss * weight, None) for (loss, _), weight in zip(losses, weights, strict=True)])
        self._update(self.factor(self.step))
        self.step += 1
        return float(sum(found.detach() * weight for (_, found), weight in zip(losses, weights, strict=True)))

    def _add_up(self, passes: list[tuple[torch.Tensor, torch.Tensor | None]]) -> None:
        sums: dict[str, torch.Tensor] = {}
        for output, gradient in passes:
            for one in self.trained.values():
                one.parameter.grad = None
            output.backward(gradient)  # type: ignore[no-untyped-call]
            for name, one in self.trained.items():
                assert one.parameter.grad is not None
                sums[name] = sums.get(name, 0.0) + one.parameter.grad.float()
        for name, one in self.trained.items():
            one.parameter.grad = sums[name].to(one.parameter.dtype)


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
    with fusing(case):
        teacher = LiveTeacher(load_teacher(source, CPU))
        students = [load_student(checkpoint, source, case.preset, CPU, embeddings=case.embeddings) for _ in range(2)]
        added = Accumulated(students[0], teacher, case.options, CPU)
    if case.replicate:
        for hook in added.copies:
            hook.remove()
    with patch.object(curvature, "LOOK", LOOK):
        assert [added.train(batch) for batch in batches(data, case.options)] == losses[number]
    parts = [load_file(out / f"{number}-{rank}.safetensors") for rank in range(2)]
    others = set(added.student.others)
    for name, value in added.state().items():
        leaf = name.partition(".")[2]
        is_whole = case.replicate or leaf in others or name == "looks"
        found = parts[0][name] if is_whole else torch.cat([part[name] for part in parts])
        assert torch.equal(found, value), name
        assert not is_whole or torch.equal(parts[1][name], value)
    samples = read_samples(data, None, vocab_size=VOCABULARY).samples
    assert torch.equal(parts[0]["measured"], parts[1]["measured"])
    assert torch.allclose(parts[0]["measured"], added.measure(samples), rtol=1e-5, atol=0)
    if "looks" in parts[0]:
        assert set(parts[0]["looks"].tolist()) == {STEPS // LOOK}
    _, whole = trained_by(partial(Trainer, students[1], teacher, case.options, CPU), replace(case, resumed=False), data)
    assert whole == pytest.approx(losses[number], rel=0.02)


@pytest.mark.parametrize("replicate", [False, True])
def test_a_killed_process_is_one_line_and_resumed(
    replicate: bool, model: Path, start: Path, data: list[Path], tmp_path: Path
) -> None:
    """It ends the others, leaves nothing in OUT, and --resume on as many goes on to the bytes of a whole training."""
    same = ("--rate", "4", "--preset", "weights", *(["--embeddings"] if replicate else []))
    more = (*same, "--gpus", 2, *(["--replicate"] if replicate else []))
    whole = distill(start, model, data, tmp_path / "whole", *more, "--json")
    assert whole.exit_code == 0, whole.output
    samples = read_samples(data, None, vocab_size=VOCABULARY)
    options = DistillOptions(Preset.WEIGHTS, steps=8, every=2, batch_tokens=256, rate=4.0, embeddings=replicate)
    train = partial(api.distill, start, model, tmp_path / "out", samples, options, device="cpu", gpus=2)

    def kill(step: int, _loss: float) -> None:
        if step == 5:
            os.kill(max(process.pid or 0 for process in active_children()), signal.SIGKILL)

    with pytest.raises(DiskError, match=r"process [12] of the training: was ended by signal 9; .* --resume"):
        train(progress=kill, replicate=replicate)
    assert active_children() == []
    assert not (tmp_path / "out").exists()
    one = distill(start, model, data, tmp_path / "out", *same, "--resume")
    assert one.exit_code == 1
    assert "out: --gpus: is not what it was in the training that was interrupted" in one.stderr
    kept = tmp_path / ".out.w4a8-distill"
    step = json.loads((kept / "state.json").read_text(encoding="utf-8"))["step"]
    assert step in (4, 6)
    assert {path.name for path in kept.glob(f"state-{step}-*")} == {
        f"state-{step}-{part}-of-2.safetensors" for part in (1, 2) if not replicate
    }
    continued = distill(start, model, data, tmp_path / "out", *more, "--resume")
    assert continued.exit_code == 0, continued.output
    ours, theirs = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("out", "whole"))
    assert ours == theirs
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    verified = run("verify", tmp_path / "out", "--source", start)
    assert verified.exit_code == 0, verified.output


@pytest.mark.slow
@pytest.mark.parametrize("replicate", [(), ("--replicate",)])
def test_three_processes_and_stored_logits(
    replicate: tuple[str, ...], model: Path, start: Path, data: list[Path], tmp_path: Path
) -> None:
    """Rows that three do not share evenly; the output is what was measured, to the last bit."""
    more = ("--rate", "4", "--teacher-logits", tmp_path / "logits", "--top-k", 0, "--gpus", 3, *replicate, "--json")
    result = distill(start, model, data, tmp_path / "out", *more)
    assert result.exit_code == 0, result.output
    source = api.open_checkpoint(model)
    _, held_out = hold_out(read_samples(data, None, vocab_size=VOCABULARY).samples)
    student = load_student(api.open_checkpoint(tmp_path / "out"), source, Preset.TABLES, CPU)
    options = DistillOptions(batch_tokens=256)
    measured = Trainer(student, LiveTeacher(load_teacher(source, CPU)), options, CPU).measure(held_out)
    assert mean(measured) == pytest.approx(json.loads(result.stdout)["after"], rel=1e-6)
    before, after = tensors(start), tensors(tmp_path / "out")
    assert {name for name in before if not torch.equal(before[name], after[name])} >= {
        name for name in before if name.endswith(("weight_lut", "weight_chan_scale"))
    }


def test_parts_of_a_batch() -> None:
    """All samples once, without padding that none of them needs, and the tokens of each where they are in the whole."""
    samples = tuple(map(without_second, (5, 7, 3, 6, 4)))
    batch = make_batch(samples, range(5))
    for ranks in range(1, 8):
        parts = [part_of(batch, rank, ranks) for rank in range(ranks)]
        assert [tokens.start for _, tokens in parts] == [0, *(tokens.stop for _, tokens in parts[:-1])]
        assert parts[-1][1].stop == int(batch.counts.sum())
        busy = [part for part, tokens in parts if tokens.stop > tokens.start]
        assert sum((part.samples for part in busy), ()) == samples
        for part, tokens in parts:
            assert part.ids.shape == (len(part.samples), max(map(len, part.samples)))
            assert tokens.stop - tokens.start in (0, int(part.counts.sum()))


def without_second(length: int) -> Sample:
    """Return a sample whose second token is masked."""
    masked = np.zeros(length, np.uint8)
    masked[1] = 1
    return Sample(np.arange(length, dtype=np.int32), np.zeros(length, np.uint8), masked, "x line 1")


@pytest.mark.parametrize(
    ("work", "hear", "error", "words"),
    [
        (refuse, print, DiskError, "a file: is full; make room"),
        (raise_something, print, RuntimeError, "process 2 of the training failed:(.|\n)*KeyError: 'a mistake of ours'"),
        (say_and_wait, stop, KeyboardInterrupt, "^$"),
    ],
)
def test_failures(work: Any, hear: Any, error: type[BaseException], words: str) -> None:
    """What failed first is raised, soon, and no process is left."""
    with pytest.raises(error, match=words):
        run_on_all(work, (), 2, "cpu", hear)
    assert active_children() == []


def test_refusals(model: Path, start: Path, data: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be spread is said before anything begins."""
    out = tmp_path / "out"
    refused = distill(start, model, data, out, "--gpus", 2, "--preset", "weights", "--embeddings")
    assert refused.exit_code == 1
    assert "give --replicate, or leave out --embeddings" in refused.stderr
    checkpoint = api.open_checkpoint(start)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConvertError, match="--gpus 3: there are 2 CUDA devices; give --gpus 2"):
        check_gpus(checkpoint, 3, torch.device("cuda"))
    check_gpus(checkpoint, 2, torch.device("cuda"))
    with pytest.raises(ConvertError, match="CUDA_VISIBLE_DEVICES"):
        check_gpus(checkpoint, 2, torch.device("cuda:1"))
    name = "model.layers.0.mlp.experts.0.up_proj.weight_packed"
    tensors = dict(checkpoint.tensors) | {name: next(iter(checkpoint.tensors.values()))}
    with pytest.raises(ConvertError, match="a mixture of experts is trained on one GPU only"):
        check_gpus(replace(checkpoint, tensors=tensors), 2, torch.device("cuda"))
    check_gpus(replace(checkpoint, tensors=tensors), 1, torch.device("cuda"))
    assert list(tmp_path.iterdir()) == []


def test_data_arrive_as_they_were_sent(data: list[Path]) -> None:
    """Samples, of other lengths and masks each, what is held out, and drops; also where nothing is held out."""
    samples = read_samples(data, None, vocab_size=VOCABULARY).samples
    masked = replace(samples[3], masked_by=np.arange(len(samples[3]), dtype=np.uint8) % 3)
    sent = TrainingData((*samples[:3], masked, *samples[4:9]), samples[9:], {"one": 0.5, "two": -1.0}, uniform=True)
    found = pickle.loads(pickle.dumps(sent))
    assert found.digest() == sent.digest()
    assert (found.drops, found.uniform) == (sent.drops, True)
    for before, after in zip((*sent.samples, *sent.held_out), (*found.samples, *found.held_out), strict=True):
        assert after.origin == before.origin
        for name in ("tokens", "kinds", "masked_by"):
            assert getattr(after, name).dtype == getattr(before, name).dtype
            assert np.array_equal(getattr(after, name), getattr(before, name))
    assert pickle.loads(pickle.dumps(replace(sent, held_out=()))).held_out == ()
