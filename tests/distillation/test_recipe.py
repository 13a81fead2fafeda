"""What config.json and the card say of a training: by what somebody can repeat it."""

import json
from pathlib import Path
from typing import Any

import pytest
from small_training import FEW, distill, run

from convert_w4a8.distillation.linear import Preset
from convert_w4a8.distillation.options import DistillOptions
from convert_w4a8.distillation.recipe import record, section
from convert_w4a8.distillation.result import DistillResult

RESULT = DistillResult(
    curve=(),
    best_step=80,
    before=0.03,
    after=0.02,
    change=-0.01,
    change_error=0.001,
    domains=(),
    tokens=123_456,
    seconds=1.0,
    times={"chat": 2.5, "code": 0.2},
)
ALWAYS = ["preset", "steps", "tokens", "held_out_kl", "data_sha256"]
ALWAYS += ["planned_steps", "batch_tokens", "rate", "warmup", "every", "seed"]


@pytest.mark.parametrize(
    ("chosen", "more"),
    [
        ({}, {}),
        ({"steps": 3000}, {"damping": 0.5, "springs": "curvature"}),
        ({"steps": 3000, "damping": 0}, {}),
        (
            {"damping": 1.25, "seed": 7, "rate": 2.0, "batch_tokens": 512, "warmup": 0.1, "every": 5},
            {"damping": 1.25, "springs": "curvature"},
        ),
        (
            {"preset": Preset.WEIGHTS, "towards": 0.5, "hidden_weight": 0.25, "patience": 3},
            {"patience": 3, "towards": 0.5, "hidden_weight": 0.25},
        ),
    ],
)
def test_options_that_bytes_depend_on_are_recorded(chosen: dict[str, Any], more: dict[str, Any]) -> None:
    """In this order; of what does nothing, nothing."""
    options = DistillOptions(**chosen)
    found = record(options, "abc", RESULT)
    assert list(found) == [*ALWAYS, *more]
    assert found["steps"] == 80
    assert found["planned_steps"] == options.steps
    names = ("batch_tokens", "rate", "warmup", "every", "seed")
    assert {name: found[name] for name in names} == {name: getattr(options, name) for name in names}
    assert {name: found[name] for name in more} == more
    assert json.loads(json.dumps(found)) == found


def test_several_gpus_are_recorded() -> None:
    """They add up in another order than one, and each with a part of the layers in another than with all."""
    found = record(DistillOptions(), "abc", RESULT, gpus=2, replicate=True)
    assert list(found) == [*ALWAYS, "gpus", "replicate"]
    assert (found["gpus"], found["replicate"]) == (2, True)


def test_every_option_is_recorded_or_changes_nothing() -> None:
    """A new one has to be thought of here: what is computed again is the same, to the last bit."""
    chosen = DistillOptions(
        Preset.WEIGHTS, patience=1, towards=0.5, hidden_weight=0.5, embeddings=True, damping=0.5, recompute=True
    )
    left_out = set(vars(chosen)) - set(record(chosen, "abc", RESULT, embeddings=["lm_head.weight"]))
    assert left_out == {"recompute"}


def test_the_card_says_how() -> None:
    card = section(DistillOptions(steps=3000, batch_tokens=4096, rate=1.5, seed=3, hidden_weight=0.5), RESULT)
    rows = [line for line in card.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[1:]] == [
        *("| trained", "| tokens", "| text", "| steps", "| springs", "| hidden states"),
        "| KL of held-out samples, nats per token",
    ]
    assert "| steps | 4,096 tokens each, rates × 1.5, seed 3 |" in rows
    assert "| springs | damping 0.5, of the curvature |" in rows
    assert "| hidden states | in the loss with weight 0.5 |" in rows
    card = section(DistillOptions(), RESULT)
    assert "| trained | FP8 tables, channel scales, norms and biases; the INT4 codes are those that came in |" in card
    assert "| text | trained on `chat 2.5 times, code 0.2 times` |" in card
    assert "| springs | none |" in card
    assert "hidden states" not in card


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("tables", "norms and biases, embeddings and lm_head; the INT4 codes are those that came in |"),
        ("weights", "FP8 tables, channel scales, norms and biases, embeddings and lm_head |"),
    ],
)
def test_the_card_says_that_embeddings_were_trained(preset: Preset, expected: str) -> None:
    assert expected in section(DistillOptions(preset=preset, embeddings=True), RESULT)


def test_an_output_says_how_it_was_trained(model: Path, start: Path, data: list[Path], tmp_path: Path) -> None:
    """Those of the command, and `verify` takes them as they are."""
    pytest.importorskip("transformers")
    out = tmp_path / "out"
    result = distill(start, model, data, out, "--rate", "4", "--damping", "0.01", "--seed", 5)
    assert result.exit_code == 0, result.output
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    found = config["quantization_config"]["conversion"]["distillation"]
    assert list(found) == [*ALWAYS, "damping", "springs"]
    given = dict(zip(FEW[::2], FEW[1::2], strict=True))
    assert (found["planned_steps"], found["every"]) == (int(given["--steps"]), int(given["--every"]))
    assert (found["rate"], found["seed"], found["damping"], found["springs"]) == (4, 5, 0.01, "curvature")
    assert "| springs | damping 0.01, of the curvature |" in (out / "README.md").read_text(encoding="utf-8")
    assert run("verify", out, "--source", start).exit_code == 0
