"""Text that the teacher writes is of the distribution that it predicts, and `w4a8 distill` reads it."""

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tiny_models
import torch
from paths import ROOT

pytest.importorskip("transformers")

sys.path.append(str(ROOT / "scripts" / "quality"))
import sample_teacher
from transformers import AutoModelForCausalLM

from convert_w4a8.samples.lines import read_records


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """Return a tiny Llama whose generation_config.json asks for other text than it predicts."""
    directory = tiny_models.write_llama(tmp_path / "llama", layers=1, dtype=torch.float32, initializer_range=0.2)
    asked = {"do_sample": True, "temperature": 0.2, "top_k": 2, "top_p": 0.5, "repetition_penalty": 4.0}
    ends = {"eos_token_id": list(range(0, 64, 2)), "pad_token_id": 0, "suppress_tokens": list(range(1, 64, 2))}
    (directory / "generation_config.json").write_text(json.dumps(asked | ends))
    return directory


def test_tokens_are_drawn_as_they_are_predicted(teacher: Path) -> None:
    """Of 20,000 draws each token comes as often as softmax of the logits says, whatever the checkpoint asks for."""
    model: Any = AutoModelForCausalLM.from_pretrained(teacher)
    torch.manual_seed(0)
    count, begun = 20_000, torch.tensor([[3, 5, 7]])
    written = sample_teacher.continued(model, begun.expand(count, -1), 4)
    with torch.no_grad():
        expected = model(begun).logits[0, -1].softmax(-1) * count
    seen = torch.bincount(written[:, 3], minlength=len(expected))
    assert (expected > 5).sum() > 20  # many tokens that are likely enough to be counted
    assert ((seen - expected).abs() < 5 * expected.clamp(min=5).sqrt()).all()
    rare = expected.argsort()[expected.sort().values.cumsum(0) < count / 100]  # which top-p would leave out
    assert expected[rare].sum() > 100
    assert abs(seen[rare].sum() - expected[rare].sum()) < 5 * expected[rare].sum().sqrt()


def test_beginnings_come_from_any_place() -> None:
    """Of samples of 10, 6 and 7 tokens there are 5, 1 and 2 places for 6 tokens, each as likely."""
    samples: list[sample_teacher.Tokens] = [np.arange(10), np.arange(20, 26), np.arange(30, 37)]
    begun = next(sample_teacher.beginnings(samples, 6, 8000, np.random.default_rng(0)))
    rows, counts = np.unique(begun.numpy(), axis=0, return_counts=True)
    assert rows.tolist() == [list(range(at, at + 6)) for at in (0, 1, 2, 3, 4, 20, 30, 31)]
    assert (abs(counts - 1000) < 5 * 1000**0.5).all()


def test_windows_go_on_behind_an_end_of_text(teacher: Path) -> None:
    """Every window has its whole length, and is the same of the same seed."""
    model: Any = AutoModelForCausalLM.from_pretrained(teacher)
    samples: list[sample_teacher.Tokens] = [np.arange(10, dtype=np.uint16), np.arange(20, 26, dtype=np.int32)]
    first, second, other = (next(sample_teacher.sampled(model, samples, 6, 40, 16, seed)) for seed in (1, 1, 2))
    assert first.shape == (16, 40)
    assert (first == second).all()
    assert (first != other).any()


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run the script on a CPU."""
    monkeypatch.setattr(sys, "argv", ["x", *map(str, arguments), "--window", "24", "--kept", "8", "--device", "cpu"])
    return sample_teacher.main()


@pytest.mark.parametrize("name", ["own.jsonl", "own.jsonl.gz", "own.npy"])
def test_what_is_written_is_read(
    name: str, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of windows of tokens to JSON lines for `w4a8 distill`, or to windows again; it says how far it is."""
    np.save(tmp_path / "real.npy", np.arange(60, dtype=np.uint16).reshape(3, 20))
    out = tmp_path / name
    assert run(monkeypatch, teacher, out, "--data", tmp_path / "real.npy", "--tokens", 300, "--batch", 8) == 0
    if name == "own.npy":
        windows = np.load(out)
        assert windows.dtype == np.uint16
    else:
        assert out.read_bytes().startswith(b"\x1f\x8b" if name.endswith("gz") else b'{"input_ids":[')
        text = (gzip.decompress if name.endswith("gz") else bytes)(out.read_bytes())
        windows = np.array([json.loads(line)["input_ids"] for line in text.splitlines()])
        assert [record.input_ids for record in read_records([out])] == windows.tolist()
    assert windows.shape == (16, 24)
    assert "384 tokens" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"llama", "real.npy", name}


def test_lines_are_read_and_short_ones_left_out(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of JSON lines those of 8 tokens or more are gone on with; --seconds ends before --tokens are there."""
    monkeypatch.setattr(sample_teacher, "open_tokenizer", lambda _: range(256))
    data = tmp_path / "code.jsonl"
    data.write_text("".join(json.dumps({"input_ids": list(range(n, n + n))}) + "\n" for n in (7, 8)))
    out = tmp_path / "own.jsonl"
    assert run(monkeypatch, teacher, out, "--data", data, "--tokens", 2000, "--seconds", 0, "--batch", 4) == 0
    assert [record.input_ids[:8] for record in read_records([out]) if record.input_ids] == [list(range(8, 16))] * 4
    data.write_text(json.dumps({"input_ids": list(range(7))}) + "\n")
    with pytest.raises(SystemExit):
        run(monkeypatch, teacher, out, "--data", data)
    assert "no sample of --data has --kept 8 tokens" in capsys.readouterr().err


def test_what_was_sampled_before_an_interrupt_is_kept(tmp_path: Path) -> None:
    """Ctrl-C ends the sampling; another error leaves nothing under the name of the file."""

    def batches(error: type[BaseException]) -> Any:
        yield np.ones((2, 3), np.int64)
        raise error

    sample_teacher.write(sample_teacher.until(batches(KeyboardInterrupt), 100, 100.0), tmp_path / "own.npy")
    assert np.load(tmp_path / "own.npy").tolist() == [[1, 1, 1]] * 2
    with pytest.raises(OSError):  # noqa: PT011  # it is of this test
        sample_teacher.write(sample_teacher.until(batches(OSError), 100, 100.0), tmp_path / "other.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["own.npy"]


@pytest.mark.parametrize(
    ("out", "windows", "settings", "said"),
    [
        ("own.txt", np.zeros((2, 20), np.uint16), {}, "name a .npy, .jsonl or .jsonl.gz"),
        ("no/own.npy", np.zeros((2, 20), np.uint16), {}, "in a directory that is there"),
        ("own.npy", np.zeros(20, np.uint16), {}, "is uint16 [20]"),
        ("own.npy", np.zeros((2, 20)), {}, "is float64 [2, 20]"),
        ("own.npy", np.full((2, 20), 256), {}, "has tokens that the model does not"),
        ("own.npy", np.zeros((2, 20), np.uint16), {"vocab_size": 65_537}, "more than 65,536 tokens"),
        ("own.jsonl", np.zeros((2, 20), np.uint16), {"max_position_embeddings": 23}, "at most the 23 tokens"),
    ],
)
def test_what_cannot_be_done_is_said_first(
    out: str,
    windows: npt.NDArray[Any],
    settings: dict[str, Any],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line, exit code 2, and nothing is written."""
    np.save(tmp_path / "real.npy", windows)
    teacher = tiny_models.write_llama(tmp_path / "llama", layers=1, **settings)
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, teacher, tmp_path / out, "--data", tmp_path / "real.npy")
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"llama", "real.npy"}
