"""Embeddings and lm_head, trained with weights, or with tables alone."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_training import distill, quantized, run, tensors
from tiny_models import VOCABULARY, write_llama

from convert_w4a8 import DistillOptions, api
from convert_w4a8.distillation import embeddings
from convert_w4a8.distillation.linear import Preset
from convert_w4a8.distillation.mix import hold_out
from convert_w4a8.distillation.student import load_student, load_teacher
from convert_w4a8.distillation.teacher import LiveTeacher
from convert_w4a8.distillation.train import Trainer, mean
from convert_w4a8.samples.read import read_samples

CPU = torch.device("cpu")
OPTIONS = ("--preset", "weights", "--embeddings", "--rate", "4")


@pytest.mark.parametrize("rows_at_once", [3, 64])
def test_gradient_is_torchs(rows_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of integers, so that sums are exact in any order; of tokens that come twice, and never."""
    ids = torch.tensor([[3, 1, 3, 0], [9, 9, 3, 1]])
    monkeypatch.setattr(embeddings, "_AT_ONCE", rows_at_once * ids.numel())
    weight = torch.randn(11, 4, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    upstream = torch.randint(-4, 5, (2, 4, 4), generator=torch.Generator().manual_seed(1)).bfloat16()
    ours = embeddings._LookUp.apply(weight, ids)  # type: ignore[no-untyped-call]
    theirs = torch.nn.functional.embedding(ids, weight)
    assert torch.equal(ours, theirs)
    (found,), (expected,) = (torch.autograd.grad(each, weight, upstream) for each in (ours, theirs))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("preset", list(Preset))
@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_are_trained_written_and_verified(
    tied: bool, preset: Preset, data: list[Path], tmp_path: Path
) -> None:
    """What is written predicts as was measured; `verify` lets embeddings change where the output says that they did."""
    model = write_llama(tmp_path / "teacher", layers=2, initializer_range=0.06, tie_word_embeddings=tied)
    start, out = quantized(model, tmp_path / "start"), tmp_path / "out"
    result = distill(start, model, data, out, *OPTIONS, "--preset", preset, "--json")
    assert result.exit_code == 0, result.output
    names = ["model.embed_tokens.weight"] + ([] if tied else ["lm_head.weight"])
    before, after = tensors(start), tensors(out)
    assert not any(torch.equal(before[name], after[name]) for name in names)
    packed = [name for name in before if name.endswith("weight_packed")]
    assert all(torch.equal(before[name], after[name]) for name in packed) == (preset is Preset.TABLES)
    config = out / "config.json"
    written = json.loads(config.read_text())
    assert written["quantization_config"]["conversion"]["distillation"]["embeddings"] == names
    assert "embeddings" in (out / "README.md").read_text()
    source = api.open_checkpoint(model)
    _, held_out = hold_out(read_samples(data, None, vocab_size=VOCABULARY).samples)
    student = load_student(api.open_checkpoint(out), source, Preset.TABLES, CPU)
    trainer = Trainer(student, LiveTeacher(load_teacher(source, CPU)), DistillOptions(batch_tokens=256), CPU)
    assert mean(trainer.measure(held_out)) == json.loads(result.stdout)["after"]

    assert run("verify", out, "--source", start).exit_code == 0
    for claim in (None, "model.embed_tokens.weight", 3, [names[0].upper()]):
        record = written["quantization_config"]["conversion"]["distillation"]
        record["embeddings"] = claim
        config.write_text(json.dumps(written))
        refused = run("verify", out, "--source", start)
        assert refused.exit_code == 1
        assert names[0] in refused.output


@pytest.mark.parametrize("which", ["all", "few"])
def test_embeddings_of_other_tokens_are_noticed(which: str, data: list[Path], tmp_path: Path) -> None:
    """All zeros, or rows of some tokens exchanged: neither is what a training does, however small the numbers are."""
    model = write_llama(tmp_path / "teacher", layers=1, initializer_range=0.014, tie_word_embeddings=True)
    start, out = quantized(model, tmp_path / "start"), tmp_path / "out"
    assert distill(start, model, data, out, "--preset", "weights", "--embeddings").exit_code == 0
    assert run("verify", out, "--source", start).exit_code == 0
    after, name = tensors(out), "model.embed_tokens.weight"
    before = after[name].clone()
    if which == "all":
        after[name].zero_()
    else:
        after[name][[7, 8]] = before[[8, 7]]
    (file,) = out.glob("*.safetensors")
    save_file(after, file, {"format": "pt"})
    refused = run("verify", out, "--source", start)
    assert refused.exit_code == 1
    assert f"{name}: has changed by" in refused.output


def _store_lm_head(path: Path, times: float = 1.0) -> None:
    """Store lm_head too, a multiple of the embeddings that it is tied to."""
    for file in path.glob("*.safetensors"):
        found = load_file(file)
        save_file(found | {"lm_head.weight": found["model.embed_tokens.weight"] * times}, file, {"format": "pt"})


def test_tied_embeddings_that_are_stored_twice_stay_tied(data: list[Path], tmp_path: Path) -> None:
    """Transformers ties only those that are the same; vLLM reads the embeddings alone."""
    model = write_llama(tmp_path / "teacher", layers=1, initializer_range=0.06, tie_word_embeddings=True)
    start, out = quantized(model, tmp_path / "start"), tmp_path / "out"
    _store_lm_head(start)
    assert distill(start, model, data, out, *OPTIONS).exit_code == 0
    after = tensors(out)
    assert not torch.equal(after["lm_head.weight"], tensors(start)["lm_head.weight"])
    assert torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
    verified = run("verify", out, "--source", start)
    assert verified.exit_code == 0, verified.output
    (file,) = out.glob("*.safetensors")
    save_file(after | {"lm_head.weight": tensors(start)["lm_head.weight"]}, file, {"format": "pt"})
    refused = run("verify", out, "--source", start)
    assert refused.exit_code == 1
    assert "lm_head.weight: is no longer what model.embed_tokens.weight is" in refused.output


def test_tied_embeddings_with_another_lm_head_are_refused(data: list[Path], tmp_path: Path) -> None:
    """Transformers does not tie them, so what is measured is not what vLLM would serve."""
    model = write_llama(tmp_path / "teacher", layers=1, initializer_range=0.06, tie_word_embeddings=True)
    start = quantized(model, tmp_path / "start")
    _store_lm_head(start, 2.0)
    refused = distill(start, model, data, tmp_path / "out", *OPTIONS)
    assert refused.exit_code == 1
    assert "ties embeddings and lm_head" in refused.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("which", ["model.embed_tokens.weight", "lm_head.weight"])
def test_tied_embeddings_in_two_types_are_refused(which: str, data: list[Path], tmp_path: Path) -> None:
    """One of them would stay as it was."""
    model = write_llama(tmp_path / "teacher", layers=1, initializer_range=0.06, tie_word_embeddings=True)
    start = quantized(model, tmp_path / "start")
    _store_lm_head(start)
    for file in start.glob("*.safetensors"):
        found = load_file(file)
        save_file(found | {which: found[which].float()}, file, {"format": "pt"})
    refused = distill(start, model, data, tmp_path / "out", *OPTIONS)
    assert refused.exit_code == 1
    assert "in other types than BF16" in refused.output
    assert not (tmp_path / "out").exists()


def test_resume_gives_the_same_bytes(
    model: Path, start: Path, data: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted between two measurements, and continued from the earlier one."""
    assert distill(start, model, data, tmp_path / "whole", *OPTIONS).exit_code == 0
    train = Trainer.train

    def interrupted(self: Trainer, batch: object) -> float:
        if self.step == 5:
            raise KeyboardInterrupt
        return train(self, batch)  # type: ignore[arg-type]

    with monkeypatch.context() as context:
        context.setattr(Trainer, "train", interrupted)
        assert distill(start, model, data, tmp_path / "out", *OPTIONS).exit_code != 0
    assert distill(start, model, data, tmp_path / "out", *OPTIONS, "--resume").exit_code == 0
    whole, out = tensors(tmp_path / "whole"), tensors(tmp_path / "out")
    assert all(torch.equal(value.view(torch.uint8), out[name].view(torch.uint8)) for name, value in whole.items())


def test_where_they_are_not_trained(model: Path, start: Path, data: list[Path], tmp_path: Path) -> None:
    """On several GPUs that have parts of them: refused before anything is read or written."""
    refused = distill(start, model, data, tmp_path / "out", *OPTIONS, "--gpus", "2")
    assert refused.exit_code == 1
    assert "give --replicate" in refused.output
    assert not (tmp_path / "out").exists()


def test_embeddings_in_other_types_are_refused(model: Path, start: Path, data: list[Path], tmp_path: Path) -> None:
    """They would be written in BF16."""
    other = tmp_path / "start"
    shutil.copytree(start, other)
    for path in other.glob("*.safetensors"):
        found = load_file(path)
        save_file(
            {name: value.float() if "embed" in name or "lm_head" in name else value for name, value in found.items()},
            path,
            metadata={"format": "pt"},
        )
    refused = distill(other, model, data, tmp_path / "out", *OPTIONS)
    assert refused.exit_code == 1
    assert "no embeddings in BF16" in refused.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("preset", list(Preset))
def test_they_are_predicted(preset: Preset, model: Path, start: Path, data: list[Path], tmp_path: Path) -> None:
    """How many numbers are trained."""
    found = [
        json.loads(
            distill(start, model, data, tmp_path / "out", "--preset", preset, *more, "--dry-run", "--json").stdout
        )
        for more in ((), ("--embeddings",))
    ]
    more = found[1]["predicted_trained"] - found[0]["predicted_trained"]
    student = load_student(api.open_checkpoint(start), api.open_checkpoint(model), preset, CPU, embeddings=True)
    assert more == sum(value.numel() for name, value in student.trained() if "embed" in name or "lm_head" in name) > 0
