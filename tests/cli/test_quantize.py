"""`w4a8 quantize` on the command line: plan, result, JSON, data without a tokenizer, exit codes."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from tiny_models import VOCABULARY, write_llama

from convert_w4a8.cli.main import main


def run(*arguments: object) -> Result:
    """Run `w4a8 quantize`."""
    return CliRunner().invoke(main, ["quantize", *map(str, arguments), "--device", "cpu"])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a model without a tokenizer."""
    return write_llama(tmp_path_factory.mktemp("model") / "in", layers=1)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Write calibration data of token ids."""
    path = tmp_path / "data.jsonl"
    lines = [{"input_ids": [(7 * i + j) % VOCABULARY for i in range(40 + j)]} for j in range(3)]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return path


def test_with_token_ids_and_no_tokenizer(model: Path, data: Path, tmp_path: Path) -> None:
    """The whole of it: plan, progress, result; a second run with --resume finds it finished, other options do not."""
    result = run(model, tmp_path / "out", "--data", data, "--preset", "fast")
    assert result.exit_code == 0, result.output
    assert "data       3 samples, 123 tokens, of which 123 count; preset fast" in result.stdout
    assert "quantized  7 layers" in result.stdout
    again = run(model, tmp_path / "out", "--data", data, "--preset", "fast", "--resume")
    assert "is this quantization already" in again.stdout
    other = run(model, tmp_path / "out", "--resume", "--json")
    assert other.exit_code == 1
    assert not json.loads(other.stdout)["ok"]


def test_the_plan_alone(model: Path, data: Path, tmp_path: Path) -> None:
    """Writes nothing, and predicts time and memory."""
    result = run(model, tmp_path / "out", "--data", data, "--dry-run", "--json")
    plan = json.loads(result.stdout)
    assert plan["predicted_seconds"] > 0
    assert plan["predicted_memory_bytes"] > plan["bytes_in"]
    assert plan["data"]["samples"] == 3
    assert not (tmp_path / "out").exists()


def test_text_needs_a_tokenizer(model: Path, tmp_path: Path) -> None:
    """One line says so."""
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a"}\n', encoding="utf-8")
    result = run(model, tmp_path / "out", "--data", path)
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert "input_ids" in result.stderr


@pytest.mark.parametrize("arguments", [("--mask", "system"), ("--max-tokens", "5"), ("--mask", "nothing")])
def test_usage_errors(arguments: tuple[str, str], model: Path, tmp_path: Path) -> None:
    """Options of the data without data, and masks that there are not."""
    assert run(model, tmp_path / "out", *arguments).exit_code == 2
