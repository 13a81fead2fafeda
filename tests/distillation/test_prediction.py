"""Predictions of a training against what was measured, whose file a table of the documents is made of."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT
from small_training import run
from tiny_models import VOCABULARY

from convert_w4a8 import api
from convert_w4a8.distillation import prediction
from convert_w4a8.distillation.curvature import LOOK
from convert_w4a8.distillation.linear import Preset
from convert_w4a8.distillation.mix import training_data
from convert_w4a8.distillation.options import DistillOptions
from convert_w4a8.distillation.prediction import predict, predict_cost, sizes_of
from convert_w4a8.distillation.student import load_student
from convert_w4a8.distillation.train import Trainer
from convert_w4a8.samples.read import read_samples

sys.path.append(str(ROOT / "scripts" / "gpu"))
from predict_distill import MODELS, sizes

ROWS: list[dict[str, Any]] = json.loads(
    (ROOT / "docs" / "benchmarks" / "results" / "distill-block.json").read_text(encoding="utf-8")
)["rows"]
"""Of each way to train: seconds and bytes of one more block of Llama 8B."""
MEASURED = MODELS["Llama 8B"] | {"vocabulary": 8192, "tied": True}


@pytest.mark.parametrize("row", [pytest.param(row, id=f"{row['preset']}-{row['recompute']}") for row in ROWS])
def test_a_block_takes_what_is_predicted(row: dict[str, Any]) -> None:
    """Time within a quarter; what is kept, which must not be too little, within a quarter."""
    options = DistillOptions(Preset(row["preset"]), batch_tokens=row["tokens"], recompute=row["recompute"])
    models = (sizes(**(MEASURED | {"blocks": blocks})) for blocks in (1, 2))
    one, two = (predict_cost(model, options, teacher_bytes=2 * model.weights) for model in models)
    assert two.seconds_per_step - one.seconds_per_step == pytest.approx(row["seconds_per_block"], rel=0.25)
    more = two.gpu_memory - one.gpu_memory
    assert 0.95 * row["bytes_kept_per_block"] < more + 0.25 * row["bytes_kept_per_block"]
    assert more == pytest.approx(row["peak_bytes_per_block"], rel=0.25)


@pytest.mark.parametrize("damping", [0.0, 1.0])
@pytest.mark.parametrize("preset", list(Preset))
def test_what_is_trained_is_counted(preset: Preset, damping: float, model: Path, start: Path) -> None:
    """From headers alone, what the trainer has; so is what it writes at every measurement."""
    import torch

    cpu = torch.device("cpu")
    options = DistillOptions(preset, damping=damping)
    checkpoint = api.open_checkpoint(start)
    cost = predict_cost(sizes_of(checkpoint), options, teacher_bytes=0)
    student = load_student(checkpoint, api.open_checkpoint(model), preset, cpu)
    assert cost.trained == sum(parameter.numel() for _, parameter in student.trained())
    trainer = Trainer(student, None, options, cpu)  # type: ignore[arg-type]
    state = trainer.state()
    state.pop("looks", None)
    assert cost.state == sum(value.nbytes for value in (*state.values(), *trainer.values().values()))


def test_dry_run(model: Path, start: Path, data: list[Path], tmp_path: Path) -> None:
    """Says what is trained and what it takes, opens no weights, and leaves nothing."""
    more = ("--teacher-logits", tmp_path / "logits", "--top-k", 8, "--dry-run", "--out", tmp_path / "out")
    arguments = ("distill", start, "--teacher", model, "--data", data[0], "--data", data[1], *more)
    shown = run(*arguments)
    assert shown.exit_code == 0, shown.output
    assert "predicted" in shown.stdout
    assert list(tmp_path.iterdir()) == []
    found = json.loads(run(*arguments, "--json").stdout)
    rows = sum(40 + i % 3 - 1 for i in range(120)) * 2
    assert found["predicted_logits"] == rows * (8 * 6 + 4)
    assert found["predicted_trained"] > 0
    assert found["domains"] == ["one", "two"]


@pytest.mark.parametrize(
    ("more", "words", "expected"),
    [
        ((), ("train      tables: up to 1,000 steps", "springs    none\n"), (0, 1, False, False)),
        (("--steps", 3000), ("springs    damping 0.5, of the curvature\n",), (0.5, 1, False, False)),
        (("--steps", 3000, "--damping", 0), ("springs    none\n",), (0, 1, False, False)),
        (("--damping", 1.25), ("springs    damping 1.25, of the curvature\n",), (1.25, 1, False, False)),
        (("--gpus", 2), ("shared     by 2 processes, each with a part of both models\n",), (0, 2, False, False)),
        (
            ("--gpus", 2, "--replicate", "--preset", "weights", "--embeddings"),
            (
                "train      weights with embeddings and lm_head: up to 1,000 steps",
                "shared     by 2 processes, each with the whole of both models\n",
            ),
            (0, 2, True, True),
        ),
    ],
)
def test_the_plan_names_what_is_chosen(
    more: tuple[object, ...],
    words: tuple[str, ...],
    expected: tuple[object, ...],
    model: Path,
    start: Path,
    data: list[Path],
    tmp_path: Path,
) -> None:
    """Springs, how models are spread, and embeddings; in JSON too."""
    named = ("--data", data[0], "--data", data[1], "--out", tmp_path / "out", "--device", "cpu", "--dry-run")
    arguments = ("distill", start, "--teacher", model, *named, *more)
    shown = run(*arguments)
    assert shown.exit_code == 0, shown.output
    assert all(word in shown.stdout for word in words)
    assert ("shared" in shown.stdout) == ("--gpus" in more)
    found = json.loads(run(*arguments, "--json").stdout)
    assert tuple(found[key] for key in ("damping", "gpus", "replicate", "embeddings")) == expected
    assert found["times"] == found["steps"] * found["batch_tokens"] / found["tokens"]
    assert f"; trained on {found['times']:,.1f} times on average, padding counted\n" in shown.stdout


def test_memory_of_graphs_and_of_the_first_pass(model: Path, start: Path, data: list[Path]) -> None:
    """Small models keep logits of several shapes; a teacher whose logits are stored has to fit alone."""
    samples = training_data(read_samples(data, None, vocab_size=VOCABULARY).samples, None, "drop")
    checkpoints = api.open_checkpoint(start), api.open_checkpoint(model)

    def memory(**how: Any) -> int:
        options = DistillOptions(batch_tokens=1 << 22, hidden_weight=how.pop("hidden_weight", 0.0))
        return predict(*checkpoints, samples, options, **how).gpu_memory

    assert memory() - memory(hidden_weight=1) > 3 * 6 * (1 << 22) * VOCABULARY
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prediction, "_LOSS_BYTES", 0)
        patch.setattr(prediction, "_first_pass_memory", lambda *_: 1 << 50)
        assert memory(top_k=8) == 1 << 50
        assert memory(top_k=8, together=False) < 1 << 50
        assert memory() < 1 << 50


@pytest.mark.parametrize("preset", list(Preset))
def test_gpus_share_what_is_kept(preset: Preset, model: Path, start: Path, data: list[Path]) -> None:
    """Each has its part of the models and of a batch, and some blocks whole; the teacher is never whole."""
    size = sizes(**MODELS["Llama 8B"])
    options = DistillOptions(preset, batch_tokens=16384, recompute=True)

    def memory(gpus: int, teacher: int) -> int:
        each = replace(options, batch_tokens=options.batch_tokens // gpus)
        return predict_cost(size, each, teacher_bytes=teacher, gpus=gpus).gpu_memory

    one, *several = (memory(gpus, 2 * size.weights) for gpus in (1, 2, 4, 8))
    assert one > several[0] > several[1] > several[2] > one / 8
    assert memory(8, 2 * size.weights) - memory(8, 0) == pytest.approx(2 * size.weights / 8, rel=1e-6)
    samples = training_data(read_samples(data, None, vocab_size=VOCABULARY).samples, None, "drop")
    checkpoints = api.open_checkpoint(start), api.open_checkpoint(model)
    two = predict(*checkpoints, samples, DistillOptions(preset, batch_tokens=1 << 22), gpus=2)
    half = predict(*checkpoints, samples, DistillOptions(preset, batch_tokens=1 << 21))
    assert two.trained == half.trained
    assert two.gpu_memory < half.gpu_memory  # which keeps several shapes of batches besides


@pytest.mark.parametrize("preset", list(Preset))
def test_gpus_with_the_whole_of_both_models(preset: Preset, model: Path, start: Path, data: list[Path]) -> None:
    """Each takes what one does for its part of a batch, and adds up all gradients in float32."""
    samples = training_data(read_samples(data, None, vocab_size=VOCABULARY).samples, None, "drop")
    checkpoints = api.open_checkpoint(start), api.open_checkpoint(model)
    one = predict(*checkpoints, samples, DistillOptions(preset, batch_tokens=8192))
    each = predict(*checkpoints, samples, DistillOptions(preset, batch_tokens=4 * 8192), gpus=4, replicate=True)
    assert (each.trained, each.state) == (one.trained, one.state)
    with_springs = [
        predict(
            *checkpoints,
            samples,
            DistillOptions(preset, batch_tokens=gpus * 8192, damping=1.0),
            gpus=gpus,
            replicate=gpus > 1,
        )
        for gpus in (1, 4)
    ]
    assert with_springs[1].state == with_springs[0].state
    if preset is Preset.WEIGHTS:  # springs without looks cost nothing to speak of
        assert with_springs == [one, each]
    else:  # every look adds up gradients, too
        more = with_springs[0].seconds_per_step - one.seconds_per_step
        looks = 4 * one.trained * 2 * 3 / 4 / prediction.LINK / LOOK
        assert with_springs[1].seconds_per_step == pytest.approx(each.seconds_per_step + more + looks)
        assert with_springs[1].gpu_memory == each.gpu_memory + with_springs[0].gpu_memory - one.gpu_memory
    assert each.gpu_memory == one.gpu_memory + 4 * one.trained
    added = 4 * one.trained * 2 * 3 / 4 / prediction.LINK
    assert each.seconds_per_step == pytest.approx(one.seconds_per_step + added)
    assert 1000 * each.seconds_per_step < each.seconds < one.seconds + 1000 * added  # measurements are shared too
