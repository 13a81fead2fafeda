"""Text that is none for the models of a training is refused before anything is loaded, in one line."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from small_training import distill, write_data
from tiny_models import samples_of

from convert_w4a8.checkpoint.directory import open_checkpoint
from convert_w4a8.distillation.agreement import check_text
from convert_w4a8.errors import ConvertError

BYTES = {"a": 0, "b": 1}


def copied(root: Path, to: Path, settings: Mapping[str, Any] = {}, tokenizer: Mapping[str, Any] | None = None) -> Path:
    """Copy a checkpoint, with other settings and a tokenizer."""
    shutil.copytree(root, to)
    config = json.loads((to / "config.json").read_text()) | settings
    (to / "config.json").write_text(json.dumps(config))
    if tokenizer is not None:
        (to / "tokenizer.json").write_text(json.dumps(tokenizer))
    return to


def test_samples_longer_than_the_model_takes(model: Path, start: Path, tmp_path: Path) -> None:
    """Beyond its positions a teacher predicts nothing worth learning, and vLLM takes no such prompt."""
    teacher = copied(model, tmp_path / "teacher", {"max_position_embeddings": 41})
    out, data = tmp_path / "out", write_data(tmp_path / "one.jsonl", 0, 48)  # up to 42 tokens
    result = distill(start, teacher, [data], out, "--dry-run")
    assert result.exit_code == 1
    assert "one.jsonl line 3: has 42 tokens, and teacher takes 41; give --max-length 41" in result.stderr
    assert distill(start, teacher, [data], out, "--dry-run", "--max-length", 41).exit_code == 0


@pytest.mark.parametrize(
    ("settings", "fits"),
    [
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, True),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 1.5, "original_max_position_embeddings": 20}}, False),
        ({"rope_parameters": {"full_attention": {"factor": 1.5, "original_max_position_embeddings": 30}}}, True),
        ({"max_position_embeddings": None}, True),
        ({"rope_parameters": None}, False),
    ],
)
def test_positions_that_are_stretched(
    settings: Mapping[str, Any], fits: bool, model: Path, start: Path, tmp_path: Path
) -> None:
    """As vLLM finds out how long a prompt may be."""
    teacher = open_checkpoint(copied(model, tmp_path / "teacher", {"max_position_embeddings": 30, **settings}))
    samples = samples_of([45]).samples
    if fits:
        check_text(open_checkpoint(start), teacher, samples)
        return
    with pytest.raises(ConvertError, match="takes 30"):
        check_text(open_checkpoint(start), teacher, samples)


@pytest.mark.parametrize(
    ("tokenizer", "is_other"),
    [
        ({"model": {"vocab": {"a": 1, "b": 0}}}, True),
        ({"model": {"vocab": [["a", 0.0], ["b", -1.0]]}, "added_tokens": [{"id": 2, "content": "<new>"}]}, False),
        ({"model": {"vocab": BYTES}, "added_tokens": [{"id": 2, "content": "b"}]}, True),
        ({"model": {"vocab": {**BYTES, "c": 2}}, "truncation": None}, False),
        ({"model": 3, "added_tokens": [3]}, False),
        (None, False),
    ],
)
def test_tokenizers_that_contradict_each_other(
    tokenizer: Mapping[str, Any] | None, is_other: bool, model: Path, start: Path, tmp_path: Path
) -> None:
    """What is trained on is cut by the teacher's, and what is served by that of the output."""
    ours = open_checkpoint(copied(start, tmp_path / "start", tokenizer={"model": {"vocab": BYTES}}))
    teacher = open_checkpoint(copied(model, tmp_path / "teacher", tokenizer=tokenizer))
    if not is_other:
        check_text(ours, teacher, ())
        return
    with pytest.raises(ConvertError, match="has another tokenizer"):
        check_text(ours, teacher, ())
