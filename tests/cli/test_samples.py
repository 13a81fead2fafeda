"""`w4a8 samples`: what calibration data hold, on the trained Llama's tokenizer."""

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoint_edits import snapshot
from click.testing import CliRunner, Result

from convert_w4a8.cli.main import main


@pytest.fixture
def model(shared: Path) -> Path:
    """Return a directory with a tokenizer and a template."""
    pytest.importorskip("transformers", reason="the extra `quantize` is not installed")
    return shared / "models" / "llama-31m-bf16"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Write two traces that begin alike."""
    prompt = {"role": "system", "content": " ".join(f"Rule {n}: be brief." for n in range(20))}
    rows = [{"messages": [prompt, {"role": "user", "content": f"What is {n} + {n}?"}]} for n in (1, 2)]
    path = tmp_path / "traces.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def samples(*words: Any) -> Result:
    """Run the command."""
    return CliRunner().invoke(main, ["samples", *map(str, words)], catch_exceptions=False)


def test_counts_are_printed(model: Path, data: Path) -> None:
    """As a table, and as JSON with the same numbers."""
    printed = samples(model, "--data", data, "--mask", "template,repeated")
    assert printed.exit_code == 0
    found = json.loads(samples(model, "--data", data, "--mask", "template,repeated", "--json").stdout)
    (row,) = (line.split()[2:] for line in printed.stdout.splitlines() if line.startswith("system prompt"))
    numbers = found["kinds"]["system"]
    repeated = numbers["masked"]["repeated"]
    assert repeated == numbers["kept"]
    assert row == [str(numbers["seen"]), str(numbers["kept"]), str(repeated), "repeated", str(repeated)]
    assert printed.stdout.splitlines()[-1] == (
        f"2 samples of up to {found['longest_sample']} tokens, {found['tokens']['run']} in all"
    )


def test_a_page_and_a_picture_are_written(model: Path, data: Path, tmp_path: Path) -> None:
    """Where they are asked for; the model is only read."""
    pytest.importorskip("matplotlib", reason="the extra `report` is not installed")
    before = snapshot(model)
    page, picture = tmp_path / "new" / "samples.html", tmp_path / "samples.png"
    assert samples(model, "--data", data, "--html", page, "--png", picture).exit_code == 0
    assert "What is 1 + 1?" in page.read_text(encoding="utf-8")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--mask", "sytem"], 2, "'sytem' is no mask; there are template, system, tools"),
        (["--max-tokens", "0"], 2, "--max-tokens"),
        (["--mask", "template,system", "--max-tokens", "5"], 1, "all of its 5 tokens are masked"),
    ],
)
def test_what_is_wrong_is_one_line(model: Path, data: Path, options: list[str], code: int, said: str) -> None:
    """A usage error exits 2, data that do not do 1."""
    found = samples(model, "--data", data, *options)
    assert found.exit_code == code
    assert said in found.stderr
    assert "Traceback" not in found.output


def test_a_bad_line_is_named(model: Path, data: Path) -> None:
    """By file and number."""
    data.write_text('{"text": "a"}\n{"text": 1}\n', encoding="utf-8")
    found = samples(model, "--data", data)
    assert found.exit_code == 1
    assert f"{data} line 2: text is a number, not a string" in found.stderr
    assert len(found.stderr.splitlines()) == 1
    assert samples(model).exit_code == 2
