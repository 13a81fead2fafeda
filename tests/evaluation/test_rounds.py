"""Directories that take turns, and the Python function; with servers that stand for those of the directories."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from chat_server import Behaviour, chat_server

from convert_w4a8 import EvaluateOptions, evaluate
from convert_w4a8.errors import ConvertError
from convert_w4a8.evaluation import run
from convert_w4a8.evaluation.metrics import Room, as_dict, merged

PROMPTS = 8


def metrics(usage: float, preemptions: int) -> str:
    return (
        'vllm:cache_config_info{kv_cache_size_tokens="100",block_size="16",num_gpu_blocks="9"} 1.0\n'
        f"vllm:kv_cache_usage_perc {usage}\nvllm:num_preemptions_total {preemptions}\n"
    )


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Make two directories, and have them served; what was started is noted."""
    pytest.importorskip("openai", reason="the extra `evaluate` is not installed")
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    lines = [{"prompt": f"p{n}", "checks": [{"type": "contains", "value": f"p{n}"}]} for n in range(PROMPTS)]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    found: dict[str, Any] = {"prompts": prompts, "started": [], "asked": {}}

    @contextmanager
    def serve(side: str, directory: Path, *_: Any) -> Iterator[str]:
        behaviour = Behaviour(
            token_ids=True,
            models=(str(directory),),
            metrics=metrics(0.25, 3),
            logprobs=lambda ids: [None, *({str(token): {"logprob": -1.0}} for token in ids[1:])],
        )
        found["started"].append(side)
        with chat_server(behaviour) as url:
            yield url
        asked = [request["prompt"] for request in behaviour.seen if "prompt_logprobs" not in request]
        found["asked"].setdefault(side, []).append([prompt for prompt in asked if not prompt.startswith("(")])

    monkeypatch.setattr(run, "serve", serve)
    monkeypatch.setattr("convert_w4a8.evaluation.evaluate.find_server", lambda _wanted: "vllm")
    for side in ("baseline", "candidate"):
        found[side] = tmp_path / side
        found[side].mkdir()
        (found[side] / "config.json").write_text("{}")
    return found


@pytest.mark.parametrize(
    ("rounds", "order"),
    [
        (1, ["baseline", "candidate"]),
        (2, ["candidate", "baseline", "candidate"]),
        (3, ["baseline", "candidate", "baseline", "candidate"]),
        (4, ["candidate", "baseline", "candidate", "baseline", "candidate"]),
    ],
)
def test_they_take_turns(models: dict[str, Any], rounds: int, order: list[str]) -> None:
    """Every prompt is asked once, each side has its turn first as often, and the candidate reads every answer."""
    options = EvaluateOptions(rounds=rounds)
    found = evaluate(models["baseline"], str(models["candidate"]), models["prompts"], options)
    assert models["started"] == order
    for side in ("baseline", "candidate"):
        assert sorted(prompt for turn in models["asked"][side] for prompt in turn) == [f"p{n}" for n in range(PROMPTS)]
        assert found.room[side]["preemptions"] == 0  # of each server, since it was started
    assert len(found.losses) == PROMPTS
    assert found.missing == ()
    assert found.verdict.decision == "cannot tell"


def test_what_a_turn_lacks_is_asked_again_and_read(models: dict[str, Any], tmp_path: Path) -> None:
    """An answer that the baseline gives later is read by the candidate, whose own answers are all there."""
    out, options = tmp_path / "out", EvaluateOptions(rounds=2)
    evaluate(models["baseline"], models["candidate"], models["prompts"], options, out=out)
    file = out / "answers.jsonl"
    entries = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    lost = ({"side": "baseline", "prompt": "3"}, "logprobs baseline 3", "logprobs candidate 3")
    entries = [
        entry
        for entry in entries
        if entry.get("note") not in lost
        and {key: entry.get("answer", {}).get(key) for key in ("side", "prompt")} not in lost
    ]
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    models["started"].clear()
    models["asked"].clear()
    found = evaluate(models["baseline"], models["candidate"], models["prompts"], options, out=out, resume=True)
    assert models["started"] == ["baseline", "candidate"]
    assert models["asked"] == {"baseline": [["p2"]], "candidate": [[]]}
    assert len(found.losses) == PROMPTS


def test_answers_of_another_server_are_not_mixed(
    models: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor those of sequences of another length, which are cut elsewhere."""
    places = (models["baseline"], models["candidate"], models["prompts"])
    out = tmp_path / "out"
    evaluate(*places, out=out)
    with pytest.raises(ConvertError, match="answers were given with another max_model_len"):
        evaluate(*places, EvaluateOptions(max_model_len=9), out=out, resume=True)
    monkeypatch.setattr("convert_w4a8.evaluation.evaluate.find_server", lambda _wanted: "transformers")
    with pytest.raises(ConvertError, match="answers were given with another server"):
        evaluate(*places, out=out, resume=True)


def test_looks_at_metrics_are_merged() -> None:
    """The largest usage, all preemptions, whatever was missing."""
    one = as_dict(Room(100, 0.5, 2, ("a",), 10, 5))
    assert merged(None, one) == one
    assert merged(one, as_dict(Room(missing=("a", "b")))) == as_dict(Room(100, 0.5, 2, ("a", "b"), 10, 5))
    assert merged(one, as_dict(Room(90, 0.25, 1, (), 7, 0))) == as_dict(Room(90, 0.5, 3, ("a",), 17, 5))


@pytest.mark.parametrize("wrong", [{"samples": 2}, {"tolerance": 2}, {"rounds": 0}, {"tag_tolerance": {"a": -1}}])
def test_options_that_cannot_be(wrong: dict[str, Any]) -> None:
    """Are a ValueError."""
    with pytest.raises(ValueError, match=r"samples need a temperature|not from 0 to 1|not 1 or more"):
        EvaluateOptions(**wrong)
