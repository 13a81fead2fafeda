"""The script that compares served checkpoints with the 16-bit model, with a stand-in for vLLM."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

VLLM = '''
import json
from pathlib import Path
from types import SimpleNamespace

import torch


class SamplingParams:
    def __init__(self, **settings):
        assert settings["prompt_logprobs"] == 1


class LLM:
    """Token 0 has twice the probability of each other one, or what config.json says; logits of all tokens at once."""

    def __init__(self, model, **settings):
        self.config = json.loads((Path(model) / "config.json").read_text())
        self.model = SimpleNamespace(compute_logits=self.compute)

    def compute(self, hidden):
        row = torch.zeros(4)
        row[0] = self.config["logit"]
        return row.expand(len(hidden), 4).bfloat16()

    def apply_model(self, function):
        return [function(self.model)]

    def generate(self, prompts, params, use_tqdm):
        (prompt,) = prompts
        tokens = prompt["prompt_token_ids"]
        self.model.compute_logits(tokens[-1:])
        logits = self.model.compute_logits(tokens if self.config["all"] else tokens[:-1])
        logprobs = logits.float().log_softmax(-1) + self.config.get("lie", 0)
        entries = [
            {token: SimpleNamespace(logprob=float(row[token]), rank=1)} for row, token in zip(logprobs, tokens[1:])
        ]
        return [SimpleNamespace(prompt_logprobs=[None, *entries])]
'''


def checkpoint(directory: Path, logit: float, **more: object) -> str:
    """Write a checkpoint of the stand-in."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"logit": logit, "all": True, **more}))
    return str(directory)


def run(tmp_path: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run the script over two windows of 16 tokens."""
    (tmp_path / "site" / "vllm").mkdir(parents=True, exist_ok=True)
    (tmp_path / "site" / "vllm" / "__init__.py").write_text(VLLM)
    (tmp_path / "tokens.json").write_text(json.dumps([i % 4 for i in range(40)]))
    script = ROOT / "scripts" / "gpu" / "compare_logprobs.py"
    command = [sys.executable, str(script), *arguments, "--tokens-file", str(tmp_path / "tokens.json")]
    command += ["--window", "16", "--json", str(tmp_path / "out"), "--base-logits", str(tmp_path / "base")]
    env = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_divergence_by_the_engines_own_logits(tmp_path: Path) -> None:
    """Logits of all tokens of a prompt or of all but the last; a second run adds rows without serving the model."""
    model = checkpoint(tmp_path / "model", math.log(2), all=False)
    w4a16 = checkpoint(tmp_path / "rival", math.log(8), quantization_config={"quant_method": "gptq"})
    done = run(tmp_path, model, f"near={w4a16}")
    assert done.returncode == 0, done.stdout + done.stderr
    (tmp_path / "model" / "config.json").write_text(json.dumps({"logit": 100, "all": True}))
    ours = checkpoint(tmp_path / "ours", math.log(2), quantization_config={"quant_method": "w4a8_lut"})
    done = run(tmp_path, model, ours, "--append")
    assert done.returncode == 0, done.stdout + done.stderr
    base, rival, last = json.loads((tmp_path / "out").read_text())["rows"]
    expected = 0.4 * math.log(0.4 / (8 / 11)) + 0.6 * math.log(0.2 / (1 / 11))
    assert rival["kl"] == pytest.approx(expected, rel=0.01)
    assert base["perplexity"] == pytest.approx(math.exp(-(3 * math.log(0.4) + 12 * math.log(0.2)) / 15), rel=0.01)
    assert (base["kl"], last["kl"], last["agreement"]) == (0, 0, 1)
    assert last["kl_difference"] == pytest.approx(-rival["kl"], rel=1e-4)
    assert [(row["kind"], row["activations"]) for row in (base, rival, last)] == [
        ("BF16", "bf16"),
        ("W4A16", "bf16"),
        ("W4A8 lut", "fp8"),
    ]


def test_logits_that_are_not_those_of_the_answer_are_an_error(tmp_path: Path) -> None:
    """One engine fails, the others count."""
    model = checkpoint(tmp_path / "model", 1)
    good, bad = checkpoint(tmp_path / "good", 2), checkpoint(tmp_path / "bad", 2, lie=0.1)
    done = run(tmp_path, model, bad, good)
    assert done.returncode == 1
    assert "are not those of vLLM's log-probabilities" in done.stderr
    assert [row["weights"] for row in json.loads((tmp_path / "out").read_text())["rows"]] == ["model", "good"]
