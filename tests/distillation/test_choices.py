"""Choices that do not go together are refused, by the command and by the Python function, in the same words."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_training import distill, run
from tiny_models import VOCABULARY

from convert_w4a8 import api
from convert_w4a8.distillation.linear import Preset
from convert_w4a8.distillation.options import DistillOptions
from convert_w4a8.distillation.student import load_student
from convert_w4a8.errors import ConvertError
from convert_w4a8.samples.read import read_samples

pytest.importorskip("transformers")

CPU = torch.device("cpu")
CHOICES: list[tuple[dict[str, Any], str]] = [
    ({"replicate": True}, "--replicate goes with --gpus"),
    ({"replicate": True, "gpus": 1}, "--replicate goes with --gpus"),
    ({"top_k": 3}, "--top-k goes with --teacher-logits"),
    ({"top_k": 0}, "--top-k goes with --teacher-logits"),
    ({"gpus": 2, "teacher_device": "cpu"}, "--teacher-device does not go with --gpus: the teacher is on all of them"),
]


@pytest.mark.parametrize(("chosen", "words"), CHOICES, ids=["-".join(chosen) for chosen, _ in CHOICES])
def test_what_would_have_no_effect(
    chosen: dict[str, Any], words: str, model: Path, start: Path, data: list[Path], tmp_path: Path
) -> None:
    """It is said before anything is read or written."""
    out, samples = tmp_path / "out", read_samples(data, None, vocab_size=VOCABULARY)
    with pytest.raises(ValueError, match=words):
        api.distill(start, model, out, samples, DistillOptions(steps=1), device="cpu", **chosen)
    more = [
        part
        for name, value in chosen.items()
        for part in (f"--{name.replace('_', '-')}", *(() if value is True else (value,)))
    ]
    refused = distill(start, model, data, out, *more)
    assert refused.exit_code == 2
    assert words in refused.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("chosen", [{"gpus": 0}, {"gpus": -1}, {"top_k": -1}])
def test_numbers_that_are_too_small(
    chosen: dict[str, Any], model: Path, start: Path, data: list[Path], tmp_path: Path
) -> None:
    """The command line has bounds of its own for them."""
    samples = read_samples(data, None, vocab_size=VOCABULARY)
    if "top_k" in chosen:
        chosen = chosen | {"teacher_logits": tmp_path / "logits"}
    with pytest.raises(ValueError, match="or more"):
        api.distill(start, model, tmp_path / "out", samples, DistillOptions(steps=1), device="cpu", **chosen)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("steps", 0), ("batch_tokens", 0), ("every", 0), ("patience", -1), ("seed", -1)),
        *(("rate", 0.0), ("rate", -1.0), ("warmup", -0.1), ("hidden_weight", -0.5)),
    ],
)
def test_options_that_are_too_small(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value}, not"):
        DistillOptions(**{name: value})  # type: ignore[arg-type]


def test_beginning_towards_the_teacher_needs_latent_weights() -> None:
    with pytest.raises(ValueError, match="towards goes with the preset weights"):
        DistillOptions(towards=0.5)
    assert DistillOptions(Preset.WEIGHTS, towards=0.5).towards == 0.5


@pytest.mark.parametrize("shape", [None, (4, 4)])
def test_beginning_towards_a_teacher_of_another_shape_is_refused(
    shape: tuple[int, int] | None, model: Path, start: Path, tmp_path: Path
) -> None:
    """Its layers could only begin where they would without."""
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    (teacher / "config.json").write_bytes((model / "config.json").read_bytes())
    (file,) = model.glob("*.safetensors")
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors.pop(name)
    if shape is not None:
        tensors[name] = torch.zeros(shape, dtype=torch.bfloat16)
    save_file(tensors, teacher / file.name)
    checkpoints = api.open_checkpoint(start), api.open_checkpoint(teacher)
    load_student(*checkpoints, Preset.WEIGHTS, CPU)
    with pytest.raises(ConvertError, match=r"has no weights of .* for model\.layers\.1\.mlp\.up_proj"):
        load_student(*checkpoints, Preset.WEIGHTS, CPU, towards=0.5)


def test_bounds_of_a_conversion_are_not_for_a_distilled_checkpoint(
    model: Path, start: Path, data: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert distill(start, model, data, out, "--rate", "4").exit_code == 0
    words = "{} is not for what w4a8 distill wrote"
    with pytest.raises(ValueError, match=words.format("--min-sqnr-db")):
        api.verify(out, start, min_sqnr_db=30.0)
    with pytest.raises(ValueError, match=words.format("--ray")):
        api.verify(out, start, ray="local")
    for more in (("--min-sqnr-db", 30), ("--ray", "local")):
        refused = run("verify", out, "--source", start, *more)
        assert refused.exit_code == 2
        assert words.format(more[0]) in refused.stderr
    assert not api.verify(out, start).problems
