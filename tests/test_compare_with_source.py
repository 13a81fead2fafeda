"""The script that serves a source and its conversions, with a stand-in for vLLM; and the maker of what it serves."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

from convert_w4a8 import api
from convert_w4a8.options import Options

VLLM = '''
import json
from pathlib import Path
from types import SimpleNamespace


class SamplingParams:
    def __init__(self, **settings):
        assert settings["prompt_logprobs"] == 1


class LLM:
    """Every token has the log-probability that config.json says, and is the likeliest unless that is below -5."""

    def __init__(self, model, **settings):
        self.value = json.loads((Path(model) / "config.json").read_text())["value"]

    def generate(self, prompts, params, use_tqdm):
        return [SimpleNamespace(prompt_logprobs=[None, *map(self._entry, p["prompt_token_ids"][1:])]) for p in prompts]

    def _entry(self, token):
        found = {token: SimpleNamespace(logprob=self.value, rank=1 if self.value > -5 else 2)}
        return found if self.value > -5 else found | {-1: SimpleNamespace(logprob=-1.0, rank=1)}
'''


def run(tmp_path: Path, *outputs: float) -> tuple[int, list[dict[str, object]], str]:
    """Compare checkpoints that give these log-probabilities with a source that gives −1."""
    (tmp_path / "site" / "vllm").mkdir(parents=True)
    (tmp_path / "site" / "vllm" / "__init__.py").write_text(VLLM)
    names = []
    for i, value in enumerate((-1.0, *outputs)):
        path = tmp_path / f"checkpoint-{i}"
        path.mkdir()
        (path / "config.json").write_text(json.dumps({"value": value, "vocab_size": 100}))
        names.append(str(path))
    script = ROOT / "scripts" / "gpu" / "compare_with_source.py"
    command = [sys.executable, str(script), *names, "--tokens", "64", "--window", "16", "--json", str(tmp_path / "out")]
    env = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert (tmp_path / "out").is_file(), done.stdout + done.stderr
    return done.returncode, json.loads((tmp_path / "out").read_text())["rows"], done.stdout


def test_an_output_that_costs_little_meets_the_demands(tmp_path: Path) -> None:
    """Nats per token over the source, and the gap of each token."""
    code, (row,), text = run(tmp_path, -1.01)
    assert code == 0, text
    assert row["nats_per_token"] == pytest.approx(0.01)
    assert row["mean_gap"] == pytest.approx(0.01)
    assert (row["agreement"], row["met"]) == (1.0, True)
    assert "60 tokens scored" in text


def test_one_that_does_not_is_an_error(tmp_path: Path) -> None:
    """Too many nats; or another token the likeliest, whatever the nats are."""
    code, rows, text = run(tmp_path, -1.01, -1.5, -6.0)
    assert code == 1
    assert [row["met"] for row in rows] == [True, False, False]
    assert rows[2]["agreement"] == 0
    assert text.count("NOT MET") == 2


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["fp8-block", "fp8-channel", "fp8-tensor", "bf16"])
def test_the_checkpoint_that_is_to_be_compared_converts(attention: str, shared: Path, tmp_path: Path) -> None:
    """Made of a BF16 model: INT4 MLPs, attention in FP8 or BF16."""
    script = ROOT / "scripts" / "checkpoints" / "make_mixed_checkpoint.py"
    source, out = tmp_path / "in", tmp_path / "out"
    bf16 = shared / "models" / "llama-31m-bf16"
    subprocess.run([sys.executable, str(script), str(bf16), str(source), "--attention", attention], check=True)
    plan = api.convert(source, out, Options(format="compressed-tensors")).plan
    assert len(plan.converted) == 12
    assert len(plan.carried) == (0 if attention == "bf16" else 16)
    assert not api.verify(out, source).problems
