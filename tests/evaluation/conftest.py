"""Whole evaluations against small servers."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click.testing
import pytest

from convert_w4a8.cli.main import main


def prompts(count: int) -> list[dict[str, Any]]:
    """Return sums to be asked for."""
    return [
        {
            "messages": [{"role": "user", "content": f"What is {n} + {n}?"}],
            "checks": [{"type": "number", "value": 2 * n}],
            "tags": ["even" if n % 2 == 0 else "odd"],
        }
        for n in range(count)
    ]


@dataclass
class Runner:
    """Runs `w4a8 evaluate` on a prompts file."""

    directory: Path
    lines: list[dict[str, Any]] = field(default_factory=lambda: prompts(8))

    @property
    def out(self) -> Path:
        """Where it writes."""
        return self.directory / "out"

    def __call__(self, baseline: str, candidate: str, *more: str) -> click.testing.Result:
        """Run it."""
        file = self.directory / "prompts.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in self.lines), encoding="utf-8")
        arguments = ["evaluate", "--baseline", baseline, "--candidate", candidate, "--prompts", str(file), *more]
        return click.testing.CliRunner().invoke(main, arguments)

    def document(self) -> dict[str, Any]:
        """Return evaluation.json."""
        found: dict[str, Any] = json.loads((self.out / "evaluation.json").read_text(encoding="utf-8"))
        return found


@pytest.fixture
def evaluate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return a runner; the answers of eight prompts are enough for it to decide with a tolerance of 1."""
    pytest.importorskip("openai", reason="the extra `evaluate` is not installed")
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    return Runner(tmp_path)
