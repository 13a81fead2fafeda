"""Text that the teacher writes is of the distribution that it predicts, and `w4a8 distill` reads it."""

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
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


def test_windows_go_on_behind_an_end_of_text(teacher: Path) -> None:
    """Every window has its whole length, begins with real tokens, and is the same of the same seed."""
    model: Any = AutoModelForCausalLM.from_pretrained(teacher)
    samples: list[sample_teacher.Tokens] = [np.arange(10, dtype=np.uint16), np.arange(20, 26, dtype=np.int32)]
    first, second = (next(sample_teacher.sampled(model, samples, 6, 40, 16, seed=1)) for _ in range(2))
    assert first.shape == (16, 40)
    assert (first == second).all()
    starts = {tuple(window[:6]) for window in first.tolist()}
    assert starts <= {tuple(range(at, at + 6)) for at in (0, 1, 2, 3, 4, 20)}
    assert len(starts) > 2
    other = next(sample_teacher.sampled(model, samples, 6, 40, 16, seed=2))
    assert (first != other).any()


@pytest.mark.parametrize("name", ["own.jsonl", "own.jsonl.gz", "own.npy"])
def test_what_is_written_is_read(
    name: str, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of windows of tokens to JSON lines for `w4a8 distill`, or to windows again; it says how far it is."""
    np.save(tmp_path / "real.npy", np.arange(60, dtype=np.uint16).reshape(3, 20))
    out = tmp_path / name
    arguments = ["--data", str(tmp_path / "real.npy"), "--tokens", "300", "--window", "24", "--kept", "8"]
    monkeypatch.setattr(sys, "argv", ["x", str(teacher), str(out), *arguments, "--batch", "8", "--device", "cpu"])
    assert sample_teacher.main() == 0
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
