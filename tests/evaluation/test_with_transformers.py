"""Whole evaluations with real servers: `transformers serve`, of models in BF16 and of our output, on a CPU."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest
from paths import ROOT

from convert_w4a8.api import convert
from convert_w4a8.evaluation import servers
from convert_w4a8.options import Options

pytestmark = pytest.mark.slow
NEEDED = ("transformers", "fastapi", "uvicorn", "accelerate", "compressed_tensors", "rouge_score")


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"REAL SERVERS NOT RUN: {', '.join(missing)} missing; pip install 'transformers[serving]'")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def kept(out: Path) -> list[tuple[str, str]]:
    """Return side and failure of the answers that were kept, as they came."""
    lines = (out / "answers.jsonl").read_text(encoding="utf-8").splitlines() if out.exists() else []
    answers = [entry["answer"] for entry in map(json.loads, lines) if "answer" in entry]
    return [(answer["side"], answer["failure"] or "") for answer in answers]


def test_bf16_against_our_output(shared: Path, evaluate: Any, tmp_path: Path) -> None:
    """Both are started, answer, and are stopped; a model of code continues it alike."""
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
    assert len(kept(evaluate.out)) == 6


def test_a_server_that_is_killed_and_then_resumed(
    evaluate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The candidate's server is killed while it answers: that is said, what is there is kept, and --resume goes on."""
    script = ROOT / "scripts" / "checkpoints" / "make_demo_checkpoint.py"
    subprocess.run([sys.executable, script, tmp_path / "demo"], check=True, capture_output=True)
    convert(tmp_path / "demo", tmp_path / "w4a8", Options(format="compressed-tensors"))
    # The model is random: it is to go on until max_tokens.
    generation = tmp_path / "w4a8" / "generation_config.json"
    generation.write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 287, "pad_token_id": 0}))
    evaluate.lines = [
        {"prompt": f"{n} + {n} =", "checks": [{"type": "contains", "value": ""}], "max_tokens": 4} for n in range(12)
    ]
    running: list[subprocess.Popen[bytes]] = []
    start = servers._process

    @contextmanager
    def process(command: list[str], log: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
        with start(command, log) as found:
            running.append(found)
            yield found

    def kill() -> None:
        until = time.monotonic() + 300
        while [side for side, _ in kept(evaluate.out)].count("candidate") < 3 and time.monotonic() < until:
            time.sleep(0.05)
        os.killpg(running[1].pid, signal.SIGKILL)

    monkeypatch.setattr(servers, "_process", process)
    arguments = ["--server", "transformers", "--out", str(evaluate.out), "--tolerance", "0.3"]
    both = [str(tmp_path / "w4a8"), str(shutil.copytree(tmp_path / "w4a8", tmp_path / "copy"))]
    killer = threading.Thread(target=kill)
    killer.start()
    first = evaluate(*both, *arguments)
    killer.join()
    assert first.exit_code == 1, first.output
    assert "candidate http://127.0.0.1:" in first.stderr
    assert "(5 times in a row); start it again, then pass --resume" in first.stderr
    before = [side for side, failure in kept(evaluate.out) if not failure]
    assert before.count("baseline") == 12
    assert 3 <= before.count("candidate") <= 7
    second = evaluate(*both, *arguments, "--resume")
    assert second.exit_code == 0, second.output
    assert len(running) == 3  # the baseline's was not started again
    assert evaluate.document()["failures"] == []
    assert evaluate.document()["agreement"]["identical"] == 1
    assert [side for side, failure in kept(evaluate.out) if not failure].count("candidate") == 12
    assert all(found.poll() is not None for found in running)
