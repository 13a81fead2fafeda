"""A teacher's logits on the disk: what is read is what the teacher gave, and nothing of another teacher is used."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_training import distill, run, tensors, write_data
from tiny_models import VOCABULARY, samples_of

from convert_w4a8 import api
from convert_w4a8.distillation import first_pass, state
from convert_w4a8.distillation.data import make_batch
from convert_w4a8.distillation.first_pass import stored_teacher
from convert_w4a8.distillation.state import save_tensors
from convert_w4a8.distillation.student import load_teacher
from convert_w4a8.distillation.teacher import LiveTeacher, Logits
from convert_w4a8.distillation.top_k import TopK
from convert_w4a8.errors import ConvertError, DiskError

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("top_k", [0, 5])
def test_what_is_stored_is_what_the_teacher_gives(
    top_k: int, dtype: torch.dtype, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For batches of any samples in any order, over several files; masked tokens have no rows.

    Some models give their logits, which they have computed in BF16, in float32.
    """
    target = LiveTeacher.target
    monkeypatch.setattr(LiveTeacher, "target", lambda *args: Logits(target(*args).logits.to(dtype)))
    monkeypatch.setattr(first_pass, "_FILE_BYTES", 800)
    source = api.open_checkpoint(model)
    samples = samples_of([40, 9, 17, 33, 9, 2], masked=[0, 4, 16, 2, 0, 0]).samples
    calls: list[tuple[int, int]] = []
    stored = stored_teacher(
        source,
        samples,
        tmp_path / "logits",
        top_k,
        device=CPU,
        batch_tokens=1,
        progress=lambda done, of: calls.append((done, of)),
    )
    assert calls[-1] == (110, 110)
    assert len(list((tmp_path / "logits").glob("*.safetensors"))) > 1
    assert stored.vocabulary == VOCABULARY
    live = LiveTeacher(load_teacher(source, CPU))
    for numbers in ([0, 1], [3], [5, 2, 4]):
        found = stored.target(make_batch(samples, numbers), CPU)
        alone = [live.target(make_batch(samples, [number]), CPU).logits for number in numbers]
        expected = torch.cat(alone).bfloat16()
        assert [len(each) for each in alone] == [int(samples[number].kept[1:].sum()) for number in numbers]
        if top_k:
            assert isinstance(found, TopK)
            logits = torch.randn(len(expected), VOCABULARY, generator=torch.Generator().manual_seed(0))
            assert torch.equal(found.tokens, expected.topk(5).indices)
            assert torch.equal(found.divergence(logits), TopK.of(expected, 5).divergence(logits))
        else:
            assert isinstance(found, Logits)
            assert torch.equal(found.logits, expected)


def test_training_from_the_disk(model: Path, start: Path, data: list[Path], tmp_path: Path) -> None:
    """All logits give what the teacher beside the student gives; with top-k the report is of that; no pass is twice."""
    results = {}
    for name, more in (
        ("live", ()),
        ("all", ("--teacher-logits", tmp_path / "a", "--top-k", 0)),
        ("again", ("--teacher-logits", tmp_path / "a", "--top-k", 0)),
        ("top", ("--teacher-logits", tmp_path / "t", "--top-k", 40)),
    ):
        before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("a/*")}
        result = distill(start, model, data, tmp_path / name, "--rate", "4", "--json", *more)
        assert result.exit_code == 0, result.output
        results[name] = json.loads(result.stdout)
        assert before.items() <= {path: path.stat().st_mtime_ns for path in tmp_path.glob("a/*")}.items()
    assert results["all"]["after"] == pytest.approx(results["live"]["after"], rel=0.02)
    assert results["again"]["after"] == results["all"]["after"]
    again = tensors(tmp_path / "again")
    assert all(torch.equal(value, again[name]) for name, value in tensors(tmp_path / "all").items())
    assert results["top"]["top_k"] == 40
    assert results["live"]["top_k"] == results["all"]["top_k"] == 0
    assert results["top"]["before"] < results["live"]["before"]
    conversion = json.loads((tmp_path / "top" / "config.json").read_text())["quantization_config"]["conversion"]
    assert conversion["distillation"]["top_k"] == 40
    assert "40 likeliest tokens" in (tmp_path / "top" / "README.md").read_text()
    assert run("verify", tmp_path / "top", "--source", start).exit_code == 0


@pytest.fixture
def written(model: Path, start: Path, data: list[Path], tmp_path: Path) -> Path:
    """Write logits."""
    result = distill(start, model, data, tmp_path / "first", "--rate", "4", "--teacher-logits", tmp_path / "logits")
    assert result.exit_code == 0, result.output
    return tmp_path / "logits"


def test_another_teacher_tokenizer_mask_or_data_is_one_line(
    model: Path, start: Path, data: list[Path], written: Path, tmp_path: Path
) -> None:
    """Each is refused before anything is trained, and nothing is left."""
    other = tmp_path / "other"
    shutil.copytree(model, other)
    for path in other.glob("*.safetensors"):
        found = load_file(path)
        found["model.norm.weight"][0] += 1
        save_file(found, path, metadata={"format": "pt"})
    cut = tmp_path / "cut"
    shutil.copytree(model, cut)
    (cut / "tokenizer.json").write_text("{}")
    fewer = tmp_path / "new" / "one.jsonl"
    fewer.parent.mkdir()
    write_data(fewer, seed=9)
    with_logits = ("--teacher-logits", written)
    for teacher, files, more, said in (
        (other, data, (), "another --teacher"),
        (cut, data, (), "another tokenizer"),
        (model, [fewer, data[1]], (), "has no logits of"),
        (model, data, ("--max-length", 20), "has no logits of"),
        (model, data, ("--top-k", 3), "was written with --top-k 64, not 3"),
        (model, data, ("--hidden-weight", 1), "leave out one of the two"),
    ):
        result = distill(start, teacher, files, tmp_path / "out", *with_logits, *more)
        assert result.exit_code == 1
        assert said in result.stderr
        assert len(result.stderr.strip().splitlines()[-1].split("; ")) == 2
        assert not (tmp_path / "out").exists()
    part = distill(start, model, data[:1], tmp_path / "part", "--mix", "uniform", "--held-out", data[1], *with_logits)
    assert part.exit_code == 0 or "nothing was written" in part.stderr, part.output
    assert "has no logits" not in part.stderr


def test_wrong_directories(model: Path, start: Path, data: list[Path], written: Path, tmp_path: Path) -> None:
    """What holds something else, overlaps, or is damaged is refused; --top-k alone is an error of usage."""
    assert distill(start, model, data, tmp_path / "out", "--top-k", 3).exit_code == 2
    for wrong, said in ((tmp_path / "first", "is not empty, and holds no logits"), (start, "overlaps")):
        assert said in distill(start, model, data, tmp_path / "out", "--teacher-logits", wrong).stderr
    out = tmp_path / "out"
    assert "overlaps" in distill(start, model, data, out, "--teacher-logits", out / "logits").stderr
    file = next(written.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-8])
    assert "cannot be read" in distill(start, model, data, out, "--teacher-logits", written).stderr
    assert not out.exists()


def _no_more(found: dict[str, torch.Tensor]) -> None:
    found["rest"] = found["rest"][:-1].clone()


def _fewer_tokens(found: dict[str, torch.Tensor]) -> None:
    found["tokens"] = found["tokens"][:, :-1].contiguous()


def _falling(found: dict[str, torch.Tensor]) -> None:
    found["ends"][0] = found["ends"][1] + 1


def _before_the_first(found: dict[str, torch.Tensor]) -> None:
    found["ends"][0] = -1


def _other_rows(found: dict[str, torch.Tensor]) -> None:
    found["ends"][0] += 1


def _no_token(found: dict[str, torch.Tensor]) -> None:
    found["tokens"][3, 1] = VOCABULARY


def _negative_token(found: dict[str, torch.Tensor]) -> None:
    found["tokens"][3, 1] = -1


def _in_float32(found: dict[str, torch.Tensor]) -> None:
    found["logits"] = found["logits"].float()


def _ends_of_two(found: dict[str, torch.Tensor]) -> None:
    found["ends"] = found["ends"][:, None].clone()


DAMAGES = [
    _no_more,
    _fewer_tokens,
    _falling,
    _before_the_first,
    _other_rows,
    _no_token,
    _negative_token,
    _in_float32,
    _ends_of_two,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_one_line(damage: Callable[[dict[str, torch.Tensor]], None], model: Path, tmp_path: Path) -> None:
    """Tensors of other sizes or types, rows that do not follow each other, tokens that there are not."""
    source, samples = api.open_checkpoint(model), samples_of([20, 30, 40]).samples
    directory = tmp_path / "logits"

    def read() -> None:
        stored = stored_teacher(source, samples, directory, 4, device=CPU, batch_tokens=64)
        stored.target(make_batch(samples, [0, 1, 2]), CPU)

    read()
    file = next(directory.glob("*.safetensors"))
    found = load_file(file)
    damage(found)
    save_file(found, file)
    with pytest.raises(ConvertError, match=r"logits-00001\.safetensors: cannot be read .*; remove the directory"):
        read()


def test_a_teacher_that_cannot_be_built_leaves_no_directory(model: Path, tmp_path: Path) -> None:
    """Nor those above it; one that was there stays, with its mode."""
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    for path in broken.glob("*.safetensors"):
        save_file({**load_file(path), "model.more": torch.zeros(1)}, path, metadata={"format": "pt"})
    there = tmp_path / "there"
    there.mkdir(mode=0o750)
    for directory in (tmp_path / "a" / "b", there):
        with pytest.raises(ConvertError, match="has tensors other than"):
            stored_teacher(
                api.open_checkpoint(broken), samples_of([20]).samples, directory, 4, device=CPU, batch_tokens=64
            )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "there"]
    stored_teacher(api.open_checkpoint(model), samples_of([20]).samples, there, 4, device=CPU, batch_tokens=64)
    assert there.stat().st_mode & 0o777 == 0o750
    stored_teacher(api.open_checkpoint(model), samples_of([20]).samples, tmp_path / "c", 4, device=CPU, batch_tokens=64)
    assert (tmp_path / "c").stat().st_mode & 0o777 == 0o700


def test_a_pass_goes_on_where_it_was_interrupted(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is on the disk is not computed again; an interruption before the first file leaves a usable directory."""
    monkeypatch.setattr(first_pass, "_FILE_BYTES", 1)
    source, samples = api.open_checkpoint(model), samples_of([20, 30, 40, 50]).samples

    def interrupt(done: int, _of: int) -> None:
        if done == 50:
            raise KeyboardInterrupt

    directory = tmp_path / "logits"
    seen: list[tuple[int, int]] = []
    with pytest.raises(KeyboardInterrupt):
        stored_teacher(source, samples, directory, 4, device=CPU, batch_tokens=1, progress=interrupt)
    notes = json.loads((directory / "teacher.json").read_text())
    assert not notes["complete"]
    assert len(notes["files"]) == 1
    stored = stored_teacher(
        source, samples, directory, 4, device=CPU, batch_tokens=1, progress=lambda done, of: seen.append((done, of))
    )
    assert seen[-1] == (120, 120)
    assert not stored.missing(samples)


def test_a_disk_that_is_too_small(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is said before the pass."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(ConvertError, match="the disk has 1 free"):
        stored_teacher(
            api.open_checkpoint(model), samples_of([20]).samples, tmp_path / "l", 4, device=CPU, batch_tokens=64
        )


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the system notices it only as the file is synced."""

    def full(_path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(state, "fsync", full)
    with pytest.raises(DiskError, match=r"cannot be written \(No space left on device\); free space"):
        save_tensors({"x": torch.zeros(2)}, tmp_path / "logits-00001.safetensors")
