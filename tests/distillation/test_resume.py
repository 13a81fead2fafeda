"""What a training depends on besides its inputs: where it runs."""

import json
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_training import distill
from tiny_models import VOCABULARY

from convert_w4a8 import DistillOptions, api
from convert_w4a8.distillation import run
from convert_w4a8.distillation.data import Batch
from convert_w4a8.distillation.machine import deterministic
from convert_w4a8.distillation.mix import training_data
from convert_w4a8.distillation.train import Trainer
from convert_w4a8.samples.read import read_samples

CPU, GPU, ANOTHER = torch.device("cpu"), torch.device("cuda:1"), torch.device("cuda:2")


@pytest.fixture(autouse=True)
def _gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that there are GPUs: two of one kind, and another one."""

    def name(device: torch.device) -> str:
        return "NVIDIA H200" if device == ANOTHER else "NVIDIA H100 80GB HBM3"

    monkeypatch.setattr(torch.cuda, "get_device_name", name)


def test_the_kind_of_device_is_part_of_a_training(model: Path, start: Path, data: list[Path]) -> None:
    """--resume elsewhere would give bytes that no whole training gives; another GPU of the same kind is the same."""
    checkpoints = api.open_checkpoint(start), api.open_checkpoint(model)
    samples = training_data(read_samples(data, None, vocab_size=VOCABULARY).samples, None, "drop")
    options = DistillOptions()
    places = [(CPU, CPU), (GPU, CPU), (CPU, GPU), (torch.device("cuda:0"), CPU), (ANOTHER, CPU), (CPU, ANOTHER)]
    first, *others = (run._fingerprint(*checkpoints, options, samples, *place) for place in places)
    differing = [{key for key in first if first[key] != other.get(key)} for other in others]
    assert differing == [{"--device"}, {"--teacher-device"}, {"--device"}, {"--device"}, {"--teacher-device"}]
    assert others[0] == others[2] != others[3]
    assert others[1] != others[4]


@pytest.mark.parametrize(("student", "teacher"), [(CPU, GPU), (GPU, CPU)])
def test_a_gpu_is_deterministic_whichever_model_is_there(
    student: torch.device,
    teacher: torch.device,
    model: Path,
    start: Path,
    data: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The teacher's logits decide about the bytes as the student's own do."""

    class EnteredError(Exception):
        pass

    def entered(*devices: torch.device) -> NoReturn:
        with deterministic(*devices):
            assert torch.are_deterministic_algorithms_enabled()
            assert torch.is_deterministic_algorithms_warn_only_enabled()  # linear attention has none that is
        raise EnteredError

    monkeypatch.setattr(run, "deterministic", entered)
    checkpoints = api.open_checkpoint(start), api.open_checkpoint(model)
    samples = training_data(read_samples(data, None, vocab_size=VOCABULARY).samples, None, "drop")
    with pytest.raises(EnteredError):
        run.distill(*checkpoints, samples, tmp_path / "out", DistillOptions(), device=student, teacher_device=teacher)
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()


def interrupt(monkeypatch: pytest.MonkeyPatch, start: Path, model: Path, data: list[Path], out: Path) -> Path:
    """Interrupt a training after its first state, and return the notes of that."""

    def interrupted(self: Trainer, batch: Batch) -> float:
        if self.step == 3:
            raise KeyboardInterrupt
        return train(self, batch)

    train = Trainer.train
    monkeypatch.setattr(Trainer, "train", interrupted)
    assert distill(start, model, data, out).exit_code == 130
    monkeypatch.setattr(Trainer, "train", train)
    return out.with_name(f".{out.name}.w4a8-distill") / "state.json"


@pytest.mark.parametrize("damage", ["moment", "size", "first measurement", "curve"])
def test_a_state_of_another_version_is_one_line(
    damage: str, model: Path, start: Path, data: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has other tensors or notes than this one keeps; it stays where it is."""
    notes = interrupt(monkeypatch, start, model, data, tmp_path / "out")
    (file,) = notes.parent.glob("*.safetensors")
    tensors = load_file(file)
    name = next(name for name in tensors if name.startswith("first."))
    if damage == "curve":
        notes.write_text(notes.read_text().replace("curve", "line"))
    elif damage == "size":
        tensors[name] = tensors[name].flatten()[1:].clone()
    else:
        del tensors[name if damage == "moment" else "before"]
    save_file(tensors, file)
    result = distill(start, model, data, tmp_path / "out", "--resume")
    assert result.exit_code == 1
    assert "is not what this version keeps of a training, or is damaged; begin again" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.w4a8-distill"]


@pytest.mark.parametrize(
    ("change", "more", "words"),
    [
        ({"--damping": ...}, (), "--damping: is an option that the interrupted training had not: another version"),
        (
            {"--damping": 1, "teacher: --damping": 1},
            ("--damping", 1),
            "--damping (of the curvature): is an option that the interrupted training had not",
        ),
        ({"--damping (of the curvature)": True}, (), "--damping (of the curvature): is an option that the interrupted"),
        ({"--damping": ...}, ("--damping", 0), "--damping: is an option that the interrupted training had not"),
        ({"--gpus": ...}, (), "--gpus: is an option that the interrupted training had not"),
        ({"--teacher-logits": ...}, (), "--teacher-logits: is an option that the interrupted training had not"),
        ({"--later": 1}, (), "--later: is an option that the interrupted training had, and there is none here"),
        ({"version of w4a8-convert": "0.0.9"}, (), "version of w4a8-convert: is not what it was in the training"),
        ({}, ("--damping", 1), "--damping: is not what it was in the training that was interrupted"),
    ],
)
def test_what_another_version_began_is_told_from_another_choice(
    change: dict[str, Any],
    more: tuple[object, ...],
    words: str,
    model: Path,
    start: Path,
    data: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A state without an option of today is none that was kept with another value of it; it stays where it is."""
    file = interrupt(monkeypatch, start, model, data, tmp_path / "out")
    notes = json.loads(file.read_text(encoding="utf-8"))
    changed = (notes["fingerprint"] | change).items()
    notes["fingerprint"] = {key: value for key, value in changed if value is not ...}
    file.write_text(json.dumps(notes), encoding="utf-8")
    result = distill(start, model, data, tmp_path / "out", *more, "--resume")
    assert result.exit_code == 1
    assert f"out: {words}" in result.stderr
    remedy = "version 0.0.9" if "version of w4a8-convert" in change else "that version and command" if change else "the"
    assert f"resume with {remedy}" in result.stderr
    assert "begin again with --overwrite and without --resume" in result.stderr
    assert file.exists()
