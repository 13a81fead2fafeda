"""A whole evaluation with real servers: `transformers serve`, of a model in BF16 and of our output, on a CPU."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from convert_w4a8.api import convert
from convert_w4a8.evaluation.servers import find_server
from convert_w4a8.options import Options

pytestmark = pytest.mark.slow
NEEDED = ("transformers", "fastapi", "uvicorn", "accelerate", "compressed_tensors", "rouge_score")


def test_bf16_against_our_output(shared: Path, evaluate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are started, answer, and are stopped; a model of code continues it alike."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"REAL SERVERS NOT RUN: {', '.join(missing)} missing; pip install 'transformers[serving]'")
    find_server("transformers")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    models, out = shared / "models", tmp_path / "w4a8"
    convert(models / "llama-31m-gptq", out, Options(format="compressed-tensors"))
    text = (models / "heldout_text.txt").read_text(encoding="utf-8").split("\0")
    evaluate.lines = [
        {"prompt": part[:300], "reference": part[300:360], "max_tokens": 8} for part in text if len(part) > 400
    ][:3]
    arguments = ["--server", "transformers", "--out", str(evaluate.out), "--tolerance", "1"]
    result = evaluate(str(models / "llama-31m-bf16"), str(out), *arguments)
    assert result.exit_code == 0, result.output
    found = evaluate.document()
    assert found["failures"] == []
    assert found["speed"]["tpot"]["candidate"]["answers"] == 3
    assert found["predicted"]["candidate"]["weight_bytes"] < found["predicted"]["baseline"]["weight_bytes"]
    assert any("divergence left out" in line for line in found["missing"])
    lines = (evaluate.out / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    assert sum("answer" in json.loads(line) for line in lines) == 6
