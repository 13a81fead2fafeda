"""`w4a8 distill` as a whole, on tiny models: it trains, what it writes verifies, and it never writes what is worse."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_training import distill, run, tensors, write_data
from tiny_models import VOCABULARY

from convert_w4a8 import api
from convert_w4a8.distillation.linear import Preset
from convert_w4a8.distillation.mix import apart, by_tag, check_domains, hold_out, training_data
from convert_w4a8.distillation.options import DistillOptions
from convert_w4a8.distillation.student import load_student, load_teacher
from convert_w4a8.distillation.teacher import LiveTeacher
from convert_w4a8.distillation.train import Trainer, mean
from convert_w4a8.errors import ConvertError
from convert_w4a8.samples.read import read_samples
from convert_w4a8.samples.sample import Sample

pytest.importorskip("transformers")


@pytest.mark.parametrize("preset", ["tables", "weights"])
def test_it_trains_and_verifies(preset: str, model: Path, start: Path, data: list[Path], tmp_path: Path) -> None:
    """The divergence falls; the output verifies against what was trained, and says how it was made."""
    result = distill(start, model, data, tmp_path / "out", "--preset", preset, "--rate", "4", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["after"] < found["before"]
    assert {domain["tag"] for domain in found["domains"]} == {"one", "two"}
    assert sum(domain["share"] for domain in found["domains"]) == pytest.approx(1)
    verified = run("verify", tmp_path / "out", "--source", start)
    assert verified.exit_code == 0, verified.output
    refused = run("verify", tmp_path / "out", "--source", model)
    assert "is not the W4A8 checkpoint that out was trained from; give that to --source" in refused.stderr
    before, after = tensors(start), tensors(tmp_path / "out")
    same = {
        name for name, value in before.items() if torch.equal(value.view(torch.uint8), after[name].view(torch.uint8))
    }
    packed = {name for name in before if name.endswith("weight_packed")}
    assert packed <= same if preset == "tables" else packed - same
    assert "model.embed_tokens.weight" in same
    assert not {name for name in before if name.endswith("weight_chan_scale")} & same
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["conversion"]["distillation"]["preset"] == preset
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.index("error mean") < card.index("## Distillation") < card.index("the checkpoint before the training")


@pytest.mark.parametrize("preset", ["tables", "weights"])
def test_the_written_weights_are_the_trained_ones(
    preset: str, model: Path, start: Path, data: list[Path], tmp_path: Path
) -> None:
    """Measured again from the output's bytes, the divergence is what the training said, to the last bit."""
    result = distill(start, model, data, tmp_path / "out", "--preset", preset, "--rate", "4", "--json")
    source, cpu = api.open_checkpoint(model), torch.device("cpu")
    _, held_out = hold_out(read_samples(data, None, vocab_size=VOCABULARY).samples)
    options = DistillOptions(batch_tokens=256)
    student = load_student(api.open_checkpoint(tmp_path / "out"), source, Preset.TABLES, cpu)
    measured = Trainer(student, LiveTeacher(load_teacher(source, cpu)), options, cpu).measure(held_out)
    assert mean(measured) == json.loads(result.stdout)["after"]


@pytest.mark.parametrize("preset", ["tables", "weights"])
def test_resume_gives_the_same_bytes(
    preset: str, model: Path, start: Path, data: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted between two measurements, and continued from the earlier one."""
    options = ("--preset", preset, "--rate", "4")
    whole = distill(start, model, data, tmp_path / "whole", *options)
    assert whole.exit_code == 0, whole.output
    train = Trainer.train

    def interrupted(self: Trainer, batch: Any) -> float:
        if self.step == 5:
            raise KeyboardInterrupt
        return train(self, batch)

    monkeypatch.setattr(Trainer, "train", interrupted)
    stopped = distill(start, model, data, tmp_path / "out", *options)
    assert stopped.exit_code == 130
    assert "step 4 of 8 is kept; --resume continues from there" in stopped.stderr
    monkeypatch.undo()
    refused = distill(start, model, data, tmp_path / "out", *options)
    assert "pass --resume" in refused.stderr
    other = distill(start, model, data, tmp_path / "out", *options, "--seed", "1", "--resume")
    assert other.exit_code == 1
    assert "--seed" in other.stderr
    continued = distill(start, model, data, tmp_path / "out", *options, "--resume")
    assert continued.exit_code == 0, continued.output
    ours, theirs = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("out", "whole"))
    assert ours == theirs
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_what_does_not_help_is_not_written(model: Path, start: Path, data: list[Path], tmp_path: Path) -> None:
    """A rate that is far too high raises the divergence: exit code 1, and nothing is left."""
    result = distill(start, model, data, tmp_path / "out", "--rate", "100000")
    assert result.exit_code == 1
    assert "nothing was written" in result.stderr or "does not converge" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_picture(model: Path, start: Path, data: list[Path], tmp_path: Path) -> None:
    """A PNG of the curve."""
    pytest.importorskip("matplotlib")
    distill(start, model, data, tmp_path / "out", "--rate", "4", "--png", tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_recomputed_blocks_give_the_same_bytes(model: Path, start: Path, data: list[Path], tmp_path: Path) -> None:
    """What blocks computed may be kept or computed again."""
    for name, more in (("kept", ()), ("again", ("--recompute",))):
        result = distill(start, model, data, tmp_path / name, "--rate", "4", *more)
        assert result.exit_code == 0, result.output
    assert all(
        torch.equal(value.view(torch.uint8), tensors(tmp_path / "again")[name].view(torch.uint8))
        for name, value in tensors(tmp_path / "kept").items()
    )


def test_drops_from_a_file(model: Path, start: Path, data: list[Path], tmp_path: Path) -> None:
    """Shares follow the file, with a floor; a domain that it does not name is refused."""
    drops = tmp_path / "drops.json"
    drops.write_text('{"drops": {"one": 3, "two": 1}}', encoding="utf-8")
    found = json.loads(distill(start, model, data, tmp_path / "a", "--rate", "4", "--mix", drops, "--json").stdout)
    assert {domain["tag"]: domain["share"] for domain in found["domains"]} == {
        "one": pytest.approx(0.125 + 0.75 * 0.75),
        "two": pytest.approx(0.125 + 0.75 * 0.25),
    }
    trained = training_data(read_samples(data, None, vocab_size=VOCABULARY).samples, None, "drop").samples
    tokens = {tag: sum(len(trained[number]) for number in numbers) for tag, numbers in by_tag(trained).items()}
    for domain in found["domains"]:
        assert found["times"][domain["tag"]] * tokens[domain["tag"]] == pytest.approx(domain["share"] * found["tokens"])
    drops.write_text('{"one": 3}', encoding="utf-8")
    refused = distill(start, model, data, tmp_path / "b", "--mix", drops)
    assert refused.exit_code == 1
    assert "two: is absent, or not a number" in refused.stderr


def test_refusals(model: Path, start: Path, data: list[Path], tmp_path: Path) -> None:
    """A teacher that is quantized, a student that is not, tables of a scale, an output in an input."""
    out = tmp_path / "out"
    assert "is quantized; give the model" in distill(start, start, data, out).stderr
    assert "is not quantized; quantize it first" in distill(model, model, data, out).stderr
    assert "overlaps" in distill(start, model, data, start / "out").stderr
    assert run("quantize", model, tmp_path / "scale", "--tables", "scale", "--device", "cpu").exit_code == 0
    assert "--tables free" in distill(tmp_path / "scale", model, data, out).stderr
    assert not out.exists()


@pytest.mark.parametrize("damage", ["lut", "code", "scale", "norm", "embedding", "config"])
def test_verify_sees_damage(
    damage: str, model: Path, start: Path, data: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Each kind of tensor, and the settings."""
    done = model.parent / "distilled"
    if not done.exists():
        assert distill(start, model, data, done, "--rate", "4").exit_code == 0
    out = tmp_path_factory.mktemp("damaged") / "out"
    shutil.copytree(done, out)
    if damage == "config":
        path = out / "config.json"
        path.write_text(path.read_text().replace('"rms_norm_eps": 1e-0', '"rms_norm_eps": 2e-0'))
    else:
        endings = {"lut": "q_proj.weight_lut", "code": "q_proj.weight_packed", "scale": "q_proj.weight_chan_scale"}
        endings |= {"norm": "input_layernorm.weight", "embedding": "embed_tokens.weight"}
        path, name = next(
            (path, name)
            for path in out.glob("*.safetensors")
            for name in load_file(path)
            if name.endswith(endings[damage])
        )
        found = load_file(path)
        raw = found[name].view(torch.uint8).view(-1)
        if damage == "lut":
            raw[0] = 0x7F
        elif damage == "scale":
            found[name][0] = -found[name][0]
        elif damage == "norm":
            found[name] *= 3
        else:
            raw[0] ^= 1
        save_file(found, path, metadata={"format": "pt"})
    result = run("verify", out, "--source", start)
    assert result.exit_code == 1
    assert not api.verify(done, start).problems


def test_domains_without_held_out_text_need_drops(model: Path, start: Path, data: list[Path], tmp_path: Path) -> None:
    """What a domain lost is measured on its own held-out text; that there is none is said before anything is loaded."""
    for more in ((), ("--dry-run",)):
        result = distill(
            start, model, data, tmp_path / "out", "--held-out", write_data(tmp_path / "one.jsonl", 7), *more
        )
        assert result.exit_code == 1
        assert result.stderr.count("two") == 1


def test_one_domain_needs_no_drop(model: Path, start: Path, data: list[Path], tmp_path: Path) -> None:
    """All is of it, so text to measure on may be of any name."""
    result = distill(start, model, data[:1], tmp_path / "out", "--held-out", data[1], "--rate", "4", "--json")
    assert result.exit_code == 0, result.output
    assert [domain["tag"] for domain in json.loads(result.stdout)["domains"]] == ["two"]


def test_held_out_samples_count_once() -> None:
    """Copies would make the standard error of a change smaller than it is; one sample many times shows none."""
    samples = [sample_of("chat", 10, n) for n in range(40)]
    found = training_data(samples[2:], [*samples[:2], *samples[:2] * 20], "uniform")
    assert [sample.tokens[0] for sample in found.held_out] == [0, 1]
    with pytest.raises(ConvertError, match="is one sample"):
        training_data(samples[2:], samples[:1] * 20, "uniform")


def test_a_mix_that_there_is_not(model: Path, start: Path, data: list[Path], tmp_path: Path) -> None:
    """A name that is mistyped is no file."""
    result = distill(start, model, data, tmp_path / "out", "--mix", "unifrom")
    assert result.exit_code == 1
    assert "give drop, uniform, or a JSON file" in result.stderr


def test_samples_without_predictions_are_left_out(model: Path, start: Path, data: list[Path], tmp_path: Path) -> None:
    """A sample of one token has none: a batch of such samples only would have no divergence. None left is one line."""
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(['{"input_ids": [3]}'] * 30) + "\n")
    more = ("--rate", "4", "--batch-tokens", "1", "--mix", "uniform", "--held-out", data[1], "--held-out", few)
    result = distill(start, model, [data[0], few], tmp_path / "out", *more)
    assert result.exit_code == 0, result.output
    for files, held_out in (([few], data[1]), ([data[0]], few)):
        result = distill(start, model, files, tmp_path / "no", "--held-out", held_out, "--dry-run")
        assert result.exit_code == 1
        assert "has no sample in which the prediction of a token counts" in result.stderr


def test_memory_that_is_not_there_is_one_line(
    model: Path, start: Path, data: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU or a CPU, and nothing is left."""

    def full(*_: Any) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Trainer, "train", full)
    result = distill(start, model, data, tmp_path / "out")
    assert result.exit_code == 1
    assert "--batch-tokens" in result.stderr
    assert list(tmp_path.iterdir()) == []


def sample_of(name: str, length: int, first: int) -> Sample:
    """Return a sample of a domain."""
    zeros = np.zeros(length, dtype=np.uint8)
    return Sample(np.arange(first, first + length, dtype=np.int32), zeros, zeros, f"{name}.jsonl line 1")


def test_each_domain_is_measured_on_other_text() -> None:
    """Long samples of one domain do not keep another from being held out; what is held out is not trained on."""
    samples = [sample_of("chat", 10, n) for n in range(40)] + [sample_of("books", 50_000, n) for n in range(50, 70)]
    _, held_out = hold_out(samples)
    assert {sample.origin.partition(".")[0] for sample in held_out} == {"chat", "books"}
    assert len(apart([*samples, *held_out], held_out)) == len(samples) - len(held_out)
    for wrong in (samples[:1], samples):
        with pytest.raises(ConvertError):
            apart(samples, wrong)
    check_domains([Path("a.jsonl"), Path("b.jsonl")])
    with pytest.raises(ConvertError, match="two files"):
        check_domains([Path("code/train.jsonl"), Path("chat/train.jsonl.gz")])
