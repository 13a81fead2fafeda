"""The term for hidden states, in a training; and a training from Python."""

import json
from pathlib import Path

import pytest
import torch
from small_training import distill, run, write_data
from tiny_models import VOCABULARY, write_llama

from convert_w4a8 import ConvertError, DistillOptions, api
from convert_w4a8 import distill as distill_from_python
from convert_w4a8.distillation.data import make_batch
from convert_w4a8.distillation.hidden import block_outputs, blocks_of, difference_of_hidden
from convert_w4a8.distillation.linear import Preset
from convert_w4a8.distillation.student import load_student, load_teacher, logits_of
from convert_w4a8.distillation.teacher import LiveTeacher
from convert_w4a8.distillation.train import Trainer
from convert_w4a8.samples.read import read_samples

CPU = torch.device("cpu")


def test_it_brings_hidden_states_nearer(model: Path, start: Path, data: list[Path]) -> None:
    """With a large weight their difference falls further than without it, also where blocks are computed twice."""
    source = api.open_checkpoint(model)
    samples = read_samples(data, None, vocab_size=VOCABULARY).samples
    teacher = LiveTeacher(load_teacher(source, CPU))
    batch = make_batch(samples, range(6))
    target = teacher.target(batch, CPU, hidden=True)
    assert len(target.hidden) == 2
    assert target.hidden[0].shape == (int(batch.counts.sum()), 128)
    found = {}
    for name, weight, recompute in (("without", 0.0, False), ("with", 30.0, False), ("again", 30.0, True)):
        options = DistillOptions(rate=10, steps=12, hidden_weight=weight, recompute=recompute)
        student = load_student(api.open_checkpoint(start), source, Preset.TABLES, CPU)
        trainer = Trainer(student, teacher, options, CPU)

        def difference() -> float:
            with torch.no_grad(), block_outputs(student.model) as outputs:  # noqa: B023
                logits_of(student.model, batch.ids)  # noqa: B023
            return float(difference_of_hidden([each[batch.counts] for each in outputs], target.hidden))

        before = difference()
        first = trainer.train(batch)
        for _ in range(11):
            trainer.train(batch)
        found[name] = first, difference() / before
    assert found["with"][0] == found["without"][0]  # what is reported is the divergence alone
    assert found["with"][1] < 0.8 * found["without"][1]
    assert found["again"] == pytest.approx(found["with"])


def test_other_blocks_are_refused(start: Path, data: list[Path], tmp_path: Path) -> None:
    """A teacher of other depth can teach predictions, and no hidden states; that is known before models are loaded."""
    other = write_llama(tmp_path / "other", layers=1)
    for more in ((), ("--dry-run",)):
        refused = distill(start, other, data, tmp_path / "out", "--hidden-weight", "1", *more)
        assert refused.exit_code == 1
        assert "the teacher has 1 of 128 channels, OUT_W4A8 2 of 128" in refused.stderr
        assert not (tmp_path / "out").exists()
    assert distill(start, other, data, tmp_path / "out", "--dry-run").exit_code == 0


def test_another_vocabulary_is_refused(start: Path, data: list[Path], tmp_path: Path) -> None:
    """Before anything is loaded, too."""
    other = write_llama(tmp_path / "other", layers=1)
    path = other / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "vocab_size": VOCABULARY + 1}))
    refused = distill(start, other, data, tmp_path / "out", "--dry-run")
    assert refused.exit_code == 1
    assert f"predicts {VOCABULARY + 1} tokens, and OUT_W4A8 {VOCABULARY}" in refused.stderr


@pytest.mark.parametrize("option", ["--recompute", "--hidden-weight"])
def test_blocks_that_are_elsewhere(option: str) -> None:
    """GPT-2 has them as `h`; the option is named that has to be left out."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=9, n_positions=8)
    with pytest.raises(ConvertError, match=f"{option}: .*GPT2LMHeadModel .*; leave out {option}"):
        blocks_of(transformers.GPT2LMHeadModel(config), option)


def test_from_python(model: Path, start: Path, tmp_path: Path) -> None:
    """The same bytes as the command's, with drops given; what cannot be done is a ConvertError."""
    files = [write_data(tmp_path / f"{name}.jsonl", seed) for seed, name in enumerate(("one", "two"))]
    samples = read_samples(files, None, vocab_size=VOCABULARY)
    options = DistillOptions("tables", steps=8, every=2, batch_tokens=256, rate=4)  # type: ignore[arg-type]
    assert options.preset is Preset.TABLES
    for name in ("rate", "hidden_weight"):
        with pytest.raises(ValueError, match=f"{name} is not a finite number"):
            DistillOptions(**{name: float("nan")})  # type: ignore[arg-type]
    steps: list[int] = []
    result = distill_from_python(
        start,
        str(model),
        tmp_path / "python",
        samples,
        options,
        mix={"one": 3, "two": 1},
        device="cpu",
        teacher_logits=tmp_path / "logits",
        top_k=0,
        progress=lambda step, _divergence: steps.append(step),
    )
    assert steps == list(range(1, 9))
    assert result.after < result.before
    assert {domain.tag: domain.share for domain in result.domains} == {"one": 0.6875, "two": 0.3125}
    assert not api.verify(tmp_path / "python", start).problems
    drops = tmp_path / "drops.json"
    drops.write_text('{"one": 3, "two": 1}')
    more = ("--rate", "4", "--mix", drops, "--teacher-logits", tmp_path / "logits", "--top-k", 0)
    shown = distill(start, model, files, tmp_path / "command", *more)
    assert shown.exit_code == 0, shown.output
    ours, theirs = (
        {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.safetensors")}
        for name in ("python", "command")
    )
    assert ours == theirs
    with pytest.raises(ConvertError, match="two: is absent"):
        distill_from_python(start, model, tmp_path / "no", samples, options, mix={"one": 1}, device="cpu")
    assert run("verify", tmp_path / "command", "--source", start).exit_code == 0
