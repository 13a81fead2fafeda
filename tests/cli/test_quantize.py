"""`w4a8 quantize` on the command line: plan, result, JSON, data without a tokenizer, exit codes."""

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoint_edits import snapshot
from click.testing import CliRunner, Result
from tiny_models import VOCABULARY, write_llama

from convert_w4a8.calibration.walk import Walk
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


def test_w4a16_beside_it(model: Path, data: Path, tmp_path: Path) -> None:
    """Two outputs, both planned and verified; --resume goes on to the second one, and finds both finished."""
    out, kept = tmp_path / "out", tmp_path / "w4a16"
    options = ("--data", data, "--preset", "fast", "--keep-w4a16", kept)
    plan = json.loads(run(model, out, *options, "--dry-run", "--json").stdout)
    assert (plan["target"], plan["w4a16"]["target"]) == ("lut", "w4a16")
    assert not out.exists()
    assert run(model, out, "--data", data, "--preset", "fast").exit_code == 0
    first = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert run(model, out, *options).exit_code == 1
    assert not kept.exists()
    second = run(model, out, *options, "--resume", "--json")
    found = json.loads(second.stdout)
    assert found["finished_before"]
    assert found["w4a16"]["output"] == str(kept)
    assert len(found["w4a16"]["layers"]) == 7
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == first
    again = run(model, out, *options, "--resume")
    assert again.stdout.count("is this quantization already") == 2
    other = run(model, out, *options, "--resume", "--max-tokens", "50")
    assert other.exit_code == 1
    card = (kept / "README.md").read_text()
    assert ", W4A16" in card
    assert "FP8" not in card
    size = sum(path.stat().st_size for path in kept.glob("*.safetensors"))
    assert plan["w4a16"]["bytes_out"] < size < plan["w4a16"]["bytes_out"] + 20_000
    for path in (out, kept):
        checked = CliRunner().invoke(main, ["verify", str(path), "--source", str(model)])
        assert checked.exit_code == 0, checked.output


def test_outputs_may_not_overlap(model: Path, tmp_path: Path) -> None:
    """One within the other, or the same: refused before anything is written."""
    for place in ("out", "out/w4a16", ""):
        result = run(model, tmp_path / "out", "--keep-w4a16", tmp_path / place)
        assert result.exit_code == 1, place
        assert "overlaps the output" in result.stderr or "is not empty" in result.stderr, (place, result.stderr)
        assert not (tmp_path / "out").exists()


def test_overwrite_replaces_no_w4a16_of_others(model: Path, tmp_path: Path) -> None:
    """Other tools write the same format: only a model card of ours says that it is ours."""
    out, kept = tmp_path / "out", tmp_path / "w4a16"
    assert run(model, out, "--keep-w4a16", kept).exit_code == 0
    assert run(model, out, "--keep-w4a16", kept, "--overwrite").exit_code == 0
    (kept / "README.md").write_text("# A model\n")
    result = run(model, out, "--keep-w4a16", kept, "--overwrite")
    assert result.exit_code == 1
    assert "is not an output of w4a8-convert" in result.stderr


def test_a_page_of_the_data(shared: Path, tmp_path: Path) -> None:
    """Written before the work: counts by kind, and a sample with what is masked struck out; without data, no page."""
    path, page = tmp_path / "data.jsonl", tmp_path / "page.html"
    lines = [
        {"messages": [{"role": "system", "content": "Be <brief>."}, {"role": "user", "content": f"What is {n}?"}]}
        for n in range(2)
    ]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    model = shared / "models" / "llama-31m-bf16"
    result = run(model, tmp_path / "out", "--data", path, "--mask", "system", "--html", page, "--dry-run")
    assert result.exit_code == 0, result.output
    text = page.read_text(encoding="utf-8")
    assert "<td>system prompt</td>" in text
    assert 'class="masked"' in text
    assert "Be &lt;brief&gt;." in text
    assert "What is 0?" in text
    assert run(model, tmp_path / "out", "--html", page).exit_code == 2


def test_an_interrupted_w4a16_is_continued(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OUT is whole by then, and stays as it is; DIR is not there until it is whole, and has the same bytes."""
    model = write_llama(tmp_path / "in", layers=2)
    options = ("--data", data, "--preset", "fast", "--keep-w4a16")
    assert run(model, tmp_path / "a", *options, tmp_path / "b").exit_code == 0
    original = Walk.quantize

    def interrupted(self: Walk, number: int, *args: Any, **more: Any) -> Any:
        for done in original(self, number, *args, **more):
            if number == 1 and self._options.is_w4a16:
                raise KeyboardInterrupt
            yield done

    with monkeypatch.context() as patch:
        patch.setattr(Walk, "quantize", interrupted)
        assert run(model, tmp_path / "out", *options, tmp_path / "kept").exit_code != 0
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "a")
    assert not (tmp_path / "kept").exists()
    assert run(model, tmp_path / "out", *options, tmp_path / "kept", "--resume").exit_code == 0
    assert snapshot(tmp_path / "kept") == snapshot(tmp_path / "b")
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "a")
    assert {path.name for path in tmp_path.iterdir()} == {"in", "a", "b", "out", "kept", data.name}
