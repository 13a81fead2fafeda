"""`w4a8 evaluate` from the command line to its files, against servers that work and servers that fail."""

import json
import re
from pathlib import Path
from typing import Any

import click.testing
import pytest
from chat_server import Behaviour, chat_server

from convert_w4a8.cli.main import main
from convert_w4a8.evaluation.evaluate import contents
from convert_w4a8.evaluation.options import EvaluateOptions

METRICS = (
    'vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="1000"} 1.0\n'
    'vllm:kv_cache_usage_perc{engine="0"} 0.25\nvllm:num_preemptions_total{engine="0"} 3.0\n'
)


def number_of(prompt: str) -> int:
    found = re.search(r"(\d+) \+", prompt)
    assert found is not None
    return int(found[1])


def delta(said: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Return an odd chunk."""
    return {"choices": [{"index": 0, "delta": said, "finish_reason": None} | more]}


def is_warm_up(prompt: str) -> bool:
    return prompt.startswith("(")


def right(prompt: str) -> str:
    number = number_of(prompt)
    return f"The sum of {number} and {number} is {2 * number}"


def wrong(prompt: str) -> str:
    return right(prompt) + "1"


def logprobs(likely: float) -> Any:
    """Return what vLLM would: each token with this log-probability, and another one."""
    return lambda ids: [None, *({str(i): {"logprob": likely}, "7": {"logprob": -2.0}} for i in ids[1:])]


def test_equal_servers_ship(evaluate: Any) -> None:
    """Exit code 0, and every file."""
    with chat_server(Behaviour(answer=right)) as a, chat_server(Behaviour(answer=right)) as b:
        result = evaluate(a, b, "--out", str(evaluate.out), "--tolerance", "0.6", "--tag-tolerance", "1")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("verdict    ship\n")
    found = evaluate.document()
    assert found["verdict"]["decision"] == "ship"
    assert found["verdict"]["groups"][0]["mcnemar_p"] == 1
    assert found["agreement"]["identical"] == 1
    assert "All are the same: is the candidate what it should be?" in result.stdout
    assert found["speed"]["ttft"]["candidate"]["answers"] == 8
    assert (evaluate.out / "evaluation.md").read_text(encoding="utf-8").startswith("## w4a8 evaluate: ship\n")
    assert '<p class="verdict ship">ship</p>' in (evaluate.out / "evaluation.html").read_text(encoding="utf-8")


def test_a_worse_candidate_does_not(evaluate: Any, tmp_path: Path) -> None:
    """Exit code 3; with --json one document; what each tag lost."""
    drop = tmp_path / "drop.json"
    with chat_server(Behaviour(answer=right)) as a, chat_server(Behaviour(answer=wrong)) as b:
        result = evaluate(a, b, "--json", "--drop-by-tag", str(drop))
    assert result.exit_code == 3, result.output
    assert json.loads(result.stdout)["verdict"]["groups"][0]["losses"] == 8
    assert json.loads(drop.read_text()) == {"drops": {"even": 1.0, "odd": 1.0}, "unit": "score"}


def test_too_few_prompts_cannot_tell(evaluate: Any) -> None:
    """Exit code 4, and how many more would decide."""
    with chat_server(Behaviour(answer=right)) as a:
        result = evaluate(a, a)
    assert result.exit_code == 4
    assert re.search(r"all prompts: between .*; about \d+ more prompts would decide", result.stdout)


def test_both_sides_are_asked_alike_and_in_turn(evaluate: Any) -> None:
    """The same sampling, warm-up first, then alternating blocks."""
    order: list[str] = []

    def answering(name: str) -> Behaviour:
        def answer(prompt: str) -> str:
            order.append(name)
            return right(prompt)

        return Behaviour(answer=answer)

    sides = [answering(name) for name in "ab"]
    with chat_server(sides[0]) as a, chat_server(sides[1]) as b:
        evaluate(a, b, "--max-tokens", "33", "--samples", "2", "--temperature", "0.5")
    assert "".join(order) == "a" * 8 + "b" * 8 + "abba" * 8
    for seen in zip(sides[0].seen, sides[1].seen, strict=False):
        assert seen[0]["temperature"] == seen[1]["temperature"] == 0.5
    asked = [[(r["messages"], r["seed"], r["max_tokens"]) for r in side.seen[8:]] for side in sides]
    assert asked[0] == asked[1]
    assert {(seed, tokens) for _, seed, tokens in asked[0]} == {(0, 33), (1, 33)}


def test_what_a_server_refuses_is_left_out(evaluate: Any) -> None:
    """As `transformers serve`, which knows neither of the two; also with many requests at a time."""
    strict = Behaviour(answer=right, refuses=("stream_options", "return_token_ids"))
    with chat_server(Behaviour(answer=right)) as a, chat_server(strict) as b:
        result = evaluate(a, b, "--concurrency", "8", "--json")
    assert json.loads(result.stdout)["failures"] == []


@pytest.mark.parametrize(
    ("failure", "name"),
    [
        (500, "5xx: status 500, status 500 was wanted"),
        (400, "4xx: status 400"),
        ("cut", "truncated: no finish_reason came"),
        (delta({}, finish_reason="abort"), "truncated: the server gave up (finish_reason abort)"),
        (delta({}, finish_reason="error"), "truncated: the server gave up (finish_reason error)"),
        (delta({"content": 5}), "truncated: what came is not a stream of answers"),
        (delta({"content": {"a": [1]}}), "truncated: what came is not a stream of answers"),
        (delta({"tool_calls": 5}), "truncated: what came is not a stream of answers"),
        (b"5", "truncated: what came is not a stream of answers"),
        (b'"x"', "truncated: what came is not a stream of answers"),
        (b"[1]", "truncated: what came is not a stream of answers"),
        (b"null", "truncated: what came is not a stream of answers"),
        (b"[" * 100_000, "truncated: what came is not a stream of answers"),
        (b"\xff\xfe", "truncated: what came is not a stream of answers"),
        (delta({"tool_calls": [{"index": "a", "function": {}}]}), "truncated: what came is not a stream of answers"),
        (delta({}, finish_reason=[1]), "truncated: what came is not a stream of answers"),
        (delta({}, token_ids="ab"), "truncated: what came is not a stream of answers"),
        (delta({}, prompt_token_ids=[-1]), "truncated: what came is not a stream of answers"),
        ({"choices": 5}, "truncated: what came is not a stream of answers"),
        ({"choices": [], "usage": {"completion_tokens": "many"}}, "truncated: what came is not a stream of answers"),
        ({"choices": [], "usage": {"completion_tokens": -3}}, "truncated: what came is not a stream of answers"),
        ("garbage", "truncated: what came is not a stream of answers"),
        ("error", "the engine is dead"),
        ("drop", "dead: "),
        ("hang", "hung: no end of it within 3 s"),
    ],
)
def test_failures_have_names_and_are_asked_again(evaluate: Any, failure: Any, name: str) -> None:
    """One answer fails: nothing is shipped, the others are kept, and --resume asks for that one alone."""
    behaviour = Behaviour(answer=right, failure=lambda prompt: failure if "5 + 5" in prompt else None)
    arguments = ("--out", str(evaluate.out), "--tolerance", "1", "--timeout", "3" if failure == "hang" else "60")
    with chat_server(Behaviour(answer=right)) as a, chat_server(behaviour) as b:
        first = evaluate(a, b, *arguments)
        found = evaluate.document()
        asked = len(behaviour.seen)
        behaviour.failure = lambda _prompt: None
        second = evaluate(a, b, *arguments, "--resume")
    assert first.exit_code == 4, first.output
    assert "1 of 8 answers of the candidate are missing: --resume asks again" in first.stdout
    assert [entry["prompt"] for entry in found["failures"]] == ["6"]
    assert name in found["failures"][0]["failure"]
    assert second.exit_code == 0, second.output
    again = [request["messages"][-1]["content"] for request in behaviour.seen[asked:]]
    assert [prompt for prompt in again if not is_warm_up(prompt)] == ["What is 5 + 5?"]


@pytest.mark.parametrize(
    "listing", [{}, {"data": "abc"}, {"data": 5}, {"data": [5]}, {"data": [{"id": 5}]}, {"data": [{"id": ""}]}, [], "x"]
)
def test_odd_lists_of_models(evaluate: Any, listing: Any) -> None:
    """Are said, with what helps."""
    with chat_server(Behaviour(answer=right)) as a, chat_server(Behaviour(answer=right, listing=listing)) as b:
        result = evaluate(a, b)
        named = evaluate(a, b, "--candidate-model", "model", "--tolerance", "1")
    assert (result.exit_code, named.exit_code) == (1, 0), result.output
    assert result.exception.__class__ is SystemExit
    assert re.search("lists no model; name one with --candidate-model|is not a stream", result.stderr)


def test_a_server_that_dies_is_given_up(evaluate: Any) -> None:
    """Not asked a hundred times over; what was answered is kept."""
    behaviour = Behaviour(answer=right, failure=lambda prompt: "drop" if number_of(prompt) > 1 else None)
    with chat_server(Behaviour(answer=right)) as a, chat_server(behaviour) as b:
        result = evaluate(a, b, "--out", str(evaluate.out))
    assert result.exit_code == 1
    assert re.search(
        r"Error: candidate http.*: dead: .* \(5 times in a row\); start it again, then pass --resume; what was",
        result.stderr,
    )
    kept = [json.loads(line) for line in (evaluate.out / "answers.jsonl").read_text().splitlines()[1:]]
    assert sum(entry["answer"]["failure"] is None for entry in kept if "answer" in entry) >= 8


def test_a_server_that_is_not_there(evaluate: Any) -> None:
    """Is said before anything is asked."""
    with chat_server(Behaviour()) as a:
        pass
    result = evaluate(a, a)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: baseline {a}/v1: dead: ")


def test_no_proxy_leads_to_this_machine(evaluate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the environment names."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    with chat_server(Behaviour(answer=right, metrics=METRICS)) as a:
        found = json.loads(evaluate(a, a, "--json").stdout)
    assert found["failures"] == []
    assert found["room"]["baseline"]["kv_tokens"] == 16000


def test_a_wrong_model_is_said_at_once(evaluate: Any) -> None:
    """404 is the same for every prompt."""
    with chat_server(Behaviour(failure=lambda _prompt: 404)) as a:
        result = evaluate(a, a, "--baseline-model", "other")
    assert result.exit_code == 1
    assert "4xx: status 404" in result.stderr
    assert "--baseline-model" in result.stderr


def test_resume_asks_nothing_that_is_there(evaluate: Any) -> None:
    """And is refused for other settings; so is a run over another's answers."""
    behaviour = Behaviour(answer=right)
    with chat_server(behaviour) as a:
        evaluate(a, a, "--out", str(evaluate.out))
        asked = len(behaviour.seen)
        assert evaluate(a, a, "--out", str(evaluate.out), "--resume").exit_code == 4
        assert len(behaviour.seen) == asked
        other = evaluate(a, a, "--out", str(evaluate.out), "--resume", "--max-tokens", "9")
        assert "its answers were given with another max_tokens" in other.stderr
        assert "is there already; pass --resume" in evaluate(a, a, "--out", str(evaluate.out)).stderr


def test_another_model_at_the_same_address_is_refused(evaluate: Any) -> None:
    """Its answers would be mixed with those of the one before."""
    behaviour = Behaviour(answer=right, failure=lambda prompt: 500 if "5 + 5" in prompt else None)
    with chat_server(behaviour) as a:
        evaluate(a, a, "--out", str(evaluate.out))
        assert evaluate.document()["models"] == {"baseline": "model", "candidate": "model"}
        behaviour.models = ("other",)
        result = evaluate(a, a, "--out", str(evaluate.out), "--resume")
    assert result.exit_code == 1
    assert "serves other; what it answered before was model" in result.stderr


def test_a_line_that_was_not_finished_is_asked_again(evaluate: Any) -> None:
    """As after a power failure."""
    behaviour = Behaviour(answer=right)
    with chat_server(behaviour) as a:
        evaluate(a, a, "--out", str(evaluate.out))
        file = evaluate.out / "answers.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        file.write_text("".join(lines[:9]) + lines[9][:30], encoding="utf-8")
        assert evaluate(a, a, "--out", str(evaluate.out), "--resume").exit_code == 4
    assert len(evaluate.document()["prompts"]) == 8


def test_metrics_and_divergence_of_vllm(evaluate: Any, tmp_path: Path) -> None:
    """KV cache from /metrics; divergence from prompt_logprobs of the baseline's own tokens."""
    drop = tmp_path / "drop.json"
    better, worse = (
        Behaviour(answer=right, metrics=METRICS, token_ids=True, logprobs=logprobs(x)) for x in (-0.5, -0.75)
    )
    with chat_server(better) as a, chat_server(worse) as b:
        result = evaluate(a, b, "--json", "--drop-by-tag", str(drop))
    found = json.loads(result.stdout)
    assert found["room"]["candidate"] == {
        "kv_tokens": 16000,
        "kv_usage": 0.25,
        "preemptions": 0,
        "prefix_queries": None,
        "prefix_hits": None,
        "missing": [],
    }
    assert found["missing"] == []
    assert found["divergence"]["surprise"] == pytest.approx(0.25)
    assert 0 < found["divergence"]["kl"] < 0.25
    assert set(json.loads(drop.read_text())["drops"]) == {"even", "odd"}
    scored = [request["prompt"] for request in worse.seen if "prompt_logprobs" in request]
    assert scored[0] == [1, 2, *range(100, 108)]


def test_one_answer_that_is_too_long_is_left_out_alone(evaluate: Any) -> None:
    """The first of all, too; the others are scored."""
    refused = Behaviour(answer=right, token_ids=True)
    scored: list[int] = []

    def score(ids: list[int]) -> Any:
        scored.append(len(ids))
        return logprobs(-0.75)(ids) if len(scored) > 1 else ["too long"]

    refused.logprobs = score
    with chat_server(Behaviour(answer=right, token_ids=True, logprobs=logprobs(-0.5))) as a, chat_server(refused) as b:
        found = json.loads(evaluate(a, b, "--json").stdout)
    assert found["divergence"]["answers"] == 7
    assert any(line.startswith("candidate: divergence left out: of 1 of 8 answers: ") for line in found["missing"])


def test_what_is_missing_is_said_by_name(evaluate: Any) -> None:
    """usage, /metrics, prompt_logprobs: left out, and not a failure."""
    with chat_server(Behaviour(answer=right, usage=False)) as a, chat_server(Behaviour(answer=right)) as b:
        found = json.loads(evaluate(a, b, "--json").stdout)
    assert any(line.startswith("baseline: 8 of 8 answers came without usage") for line in found["missing"])
    assert any(line.startswith("candidate: divergence left out: ") for line in found["missing"])
    assert any(line.startswith("candidate: /metrics cannot be read") for line in found["missing"])
    assert found["speed"]["tpot"]["baseline"]["median"] is None
    assert found["failures"] == []


def test_tool_calls_are_put_together(evaluate: Any) -> None:
    """From the pieces of the stream."""
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    call = {"name": "weather", "arguments": '{"city": "Oslo"}'}
    check = {"type": "tool_call", "name": "weather", "arguments": {"city": "Oslo"}}
    evaluate.lines = [{"messages": [{"role": "user", "content": "Oslo?"}], "tools": [tool], "checks": [check]}]
    behaviour = Behaviour(answer=lambda _prompt: "", calls=lambda _prompt: [call])
    with chat_server(behaviour) as a:
        found = json.loads(evaluate(a, a, "--json").stdout)
    assert found["prompts"][0]["checks"] == [{"type": "tool_call", "baseline": 1.0, "candidate": 1.0}]
    assert behaviour.seen[0]["tools"] == [tool]


def test_ratings_are_checks(evaluate: Any, tmp_path: Path) -> None:
    """Of prompts that have none; ratings of other answers are refused, and no server is asked."""
    evaluate.lines = [{"prompt": f"What is {n} + {n}?", "id": f"p{n}"} for n in range(8)]
    ratings = tmp_path / "ratings.json"
    behaviour = Behaviour(answer=right)
    with chat_server(behaviour) as a, chat_server(Behaviour(answer=wrong)) as b:
        first = evaluate(a, b, "--out", str(evaluate.out))
        digest = re.search(r'"answers": "(\w+)"', (evaluate.out / "evaluation.html").read_text(encoding="utf-8"))
    assert first.exit_code == 4
    assert "no prompt has checks" in first.stdout
    assert digest is not None
    entries = [{"prompt": f"p{n}", "sample": 0, "preferred": "baseline"} for n in range(7)]
    ratings.write_text(json.dumps({"answers": digest[1], "ratings": entries}))
    second = evaluate(a, b, "--out", str(evaluate.out), "--ratings", str(ratings))
    assert second.exit_code == 3, second.output
    assert evaluate.document()["ratings"] == 7
    other = evaluate.directory / "other"
    none = evaluate(a, b, "--out", str(other), "--ratings", str(ratings))
    assert "has no answers that could be rated" in none.stderr
    assert (none.exit_code, other.exists()) == (1, False)
    ratings.write_text(json.dumps({"answers": "0", "ratings": entries}))
    assert "rates other answers" in evaluate(a, b, "--out", str(evaluate.out), "--ratings", str(ratings)).stderr


@pytest.mark.parametrize(
    "arguments",
    [["--resume"], ["--samples", "2"], ["--tag-tolerance", "x=2"], ["--tolerance", "2"], ["--concurrency", "0"]],
)
def test_usage_errors(evaluate: Any, arguments: list[str]) -> None:
    """Exit with 2."""
    assert evaluate("http://localhost:1", "http://localhost:1", *arguments).exit_code == 2


def test_a_tolerance_of_no_tag_is_refused(evaluate: Any) -> None:
    """A misspelt tag would silently have another tolerance."""
    result = evaluate("http://localhost:1", "http://localhost:1", "--tag-tolerance", "evn=0.1")
    assert result.exit_code == 1
    assert "--tag-tolerance evn: no prompt has this tag" in result.stderr


def test_the_summary_of_a_job(evaluate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is appended."""
    summary = tmp_path / "summary.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    with chat_server(Behaviour(answer=right)) as a:
        evaluate(a, a)
    assert summary.read_text(encoding="utf-8").startswith("## w4a8 evaluate: cannot tell\n")


def test_unrated_pairs_keep_it_open_and_equal_answers_count(evaluate: Any, tmp_path: Path) -> None:
    """What was not rated may be a loss; what is the same on both sides is none."""
    evaluate.lines = [{"prompt": f"What is {n} + {n}?", "id": f"p{n}"} for n in range(80)]
    ratings = tmp_path / "ratings.json"
    some = Behaviour(answer=lambda prompt: wrong(prompt) if "2 + 2" in prompt else right(prompt))
    with chat_server(Behaviour(answer=right)) as a, chat_server(some) as b:
        evaluate(a, b, "--out", str(evaluate.out))
        digest = re.search(r'"answers": "(\w+)"', (evaluate.out / "evaluation.html").read_text(encoding="utf-8"))
    assert digest is not None
    differ = [f"p{n}" for n in range(80) if "2 + 2" in f"What is {n} + {n}?"]
    assert len(differ) > 1
    entries = [{"prompt": name, "sample": 0, "preferred": "candidate"} for name in differ]
    for some_entries, code in ((entries[:1], 4), (entries, 0)):
        ratings.write_text(json.dumps({"answers": digest[1], "ratings": some_entries}))
        result = evaluate(a, b, "--out", str(evaluate.out), "--ratings", str(ratings), "--tolerance", "0.1")
        assert result.exit_code == code, result.output
        assert ("not rated" in result.output) == (code == 4)


@pytest.mark.parametrize(
    "url", ["http://u:secret@host:8000", "http://host:80a0", "http://[::1:8000", "http://h/?k=secret"]
)
def test_urls_that_are_none_or_hold_secrets(evaluate: Any, url: str) -> None:
    """One line, which does not repeat them."""
    result = evaluate(url, "http://127.0.0.1:1")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: --baseline: ")
    assert "secret" not in result.output


def test_a_directory_that_was_replaced_is_another(tmp_path: Path) -> None:
    """Resuming must not give its answers the name of the new one."""
    (tmp_path / "model.safetensors").write_bytes(b"1")
    before = contents(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").write_bytes(b"2")
    assert before
    assert contents(str(tmp_path)) != before


@pytest.mark.parametrize(("limit", "code"), [("0.001", 3), ("0.5", 0)])
def test_divergence_decides_where_nothing_is_checked(evaluate: Any, limit: str, code: int) -> None:
    """As of logs of production."""
    evaluate.lines = [{"prompt": f"What is {n} + {n}?"} for n in range(64)]
    better, worse = (Behaviour(answer=right, token_ids=True, logprobs=logprobs(x)) for x in (-0.5, -0.75))
    with chat_server(better) as a, chat_server(worse) as b:
        result = evaluate(a, b, "--json", "--max-divergence", limit)
    assert result.exit_code == code, result.output
    found = json.loads(result.stdout)["verdict"]["divergence"]
    assert found["answers"] == 64
    assert found["limit"] == float(limit)


def test_answers_without_a_divergence_are_not_shipped_over(evaluate: Any) -> None:
    """As where a server ran out of memory between; --resume has it read the others."""
    evaluate.lines = [{"prompt": f"What is {n} + {n}?"} for n in range(70)]
    scored: list[int] = []

    def fails_late(ids: list[int]) -> Any:
        scored.append(len(ids))
        return logprobs(-0.5)(ids) if len(scored) <= 64 or mended else ["out of memory"]

    mended: list[bool] = []
    a_side, b_side = (Behaviour(answer=right, token_ids=True, logprobs=f) for f in (logprobs(-0.5), fails_late))
    arguments = ("--out", str(evaluate.out), "--max-divergence", "0.5")
    with chat_server(a_side) as a, chat_server(b_side) as b:
        first = evaluate(a, b, *arguments)
        mended.append(True)
        asked = sum("prompt_logprobs" in request for request in b_side.seen)
        second = evaluate(a, b, *arguments, "--resume")
    assert first.exit_code == 4, first.output
    assert "divergence: 6 of 70 answers could not be scored: --resume tries again" in first.stdout
    assert second.exit_code == 0, second.output
    assert sum("prompt_logprobs" in request for request in b_side.seen) == asked + 6


@pytest.mark.parametrize(
    "odd",
    [
        {"server": "vlm"},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"timeout": 0},
        {"start_timeout": -1},
        {"max_model_len": 0},
    ],
)
def test_options_are_checked_in_python_too(odd: dict[str, Any]) -> None:
    """As the command line does; a misspelt server would be another one."""
    with pytest.raises(ValueError, match=f"{next(iter(odd))} is "):
        EvaluateOptions(**odd)


@pytest.mark.parametrize("of_logs", [True, False])
def test_what_users_wrote_is_for_the_owner(evaluate: Any, tmp_path: Path, of_logs: bool) -> None:
    """A directory that is made for answers to logged requests."""
    log = tmp_path / "log.jsonl"
    log.write_text(json.dumps({"request": {"prompt": "What is 1 + 1?"}}) + "\n")
    more = ["--logs", str(log)] if of_logs else ["--prompts", str(log)]
    if not of_logs:
        log.write_text(json.dumps({"prompt": "What is 1 + 1?"}) + "\n")
    with chat_server(Behaviour(answer=right)) as a:
        arguments = ["evaluate", "--baseline", a, "--candidate", a, *more, "--out", str(evaluate.out)]
        assert click.testing.CliRunner().invoke(main, arguments).exit_code == 4
    assert (evaluate.out.stat().st_mode & 0o077 == 0) == of_logs


def test_a_server_is_not_compared_with_itself(evaluate: Any) -> None:
    """An address that was given twice by mistake loses nothing; another model of the same server is another."""
    behaviour = Behaviour(answer=right, models=("a", "b"))
    with chat_server(behaviour) as url:
        same = evaluate(url, f"{url}/v1/", "--tolerance", "1")
        named = evaluate(url, url, "--tolerance", "1", "--candidate-model", "a")
        other = evaluate(url, url, "--tolerance", "1", "--candidate-model", "b")
    assert [result.exit_code for result in (same, named, other)] == [4, 4, 0]
    assert "the same server and model: this compares it with itself" in same.stdout


def test_a_tag_of_which_nothing_is_checked_is_not_shipped(evaluate: Any) -> None:
    """Scores of others say nothing of it; what is unchecked besides is said."""
    evaluate.lines += [{"prompt": f"1{n} + 1{n}", "tags": ["code"]} for n in range(3)]
    evaluate.lines += [{"prompt": "20 + 20"}, {"prompt": "21 + 21", "tags": ["odd"]}]
    with chat_server(Behaviour(answer=right)) as a, chat_server(Behaviour(answer=right)) as b:
        result = evaluate(a, b, "--tolerance", "1")
        evaluate.lines = [line for line in evaluate.lines if line.get("tags") != ["code"]]
        without = evaluate(a, b, "--tolerance", "1")
    assert result.exit_code == 4, result.output
    assert "tag code: none of 3 prompts has checks, a reference or a rating" in result.stdout
    assert "left out   quality: 5 of 13 prompts have no checks, reference or rating" in result.stdout
    assert without.exit_code == 0, without.output
    assert "left out   quality: 2 of 10 prompts" in without.stdout


def test_a_run_without_any_answer_leaves_nothing_in_the_way(evaluate: Any) -> None:
    """The same command, once the server is there; a file that is no run's stays as it is."""
    with chat_server(Behaviour(answer=right)) as a:
        with chat_server(Behaviour(answer=right)) as b:
            pass
        first = evaluate(a, b, "--out", str(evaluate.out), "--tolerance", "1")
        assert (first.exit_code, "start the server" in first.stderr) == (1, True), first.output
        with chat_server(Behaviour(answer=right)) as b:
            second = evaluate(a, b, "--out", str(evaluate.out), "--tolerance", "1")
            third = evaluate(a, b, "--out", str(evaluate.out), "--tolerance", "1")
            assert (second.exit_code, third.exit_code) == (0, 1), second.output
            assert "is there already; pass --resume" in third.stderr
            for text in ('{"answer": "yes"}\n', '{"a": 1}\n', "[]\n", "5\n", "settings\n"):
                (evaluate.out / "answers.jsonl").write_text(text, encoding="utf-8")
                assert "is there already" in evaluate(a, b, "--out", str(evaluate.out)).stderr
                assert (evaluate.out / "answers.jsonl").read_text(encoding="utf-8") == text
                assert "is damaged" in evaluate(a, b, "--out", str(evaluate.out), "--resume").stderr


def test_keys_are_not_written(evaluate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither that of the environment, which a server may say, nor one among the options of servers."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-1")
    error = {"error": {"message": "the key sk-secret-1 may not do this"}}
    behaviour = Behaviour(answer=right, failure=lambda prompt: None if is_warm_up(prompt) else error)
    with chat_server(Behaviour(answer=right)) as a, chat_server(behaviour) as b:
        result = evaluate(a, b, "--out", str(evaluate.out), "--serve-options", "--api-key sk-secret-2")
    written = "".join(path.read_text(encoding="utf-8") for path in evaluate.out.iterdir())
    assert "the key (the key) may not do this" in written
    assert "sk-secret" not in written + result.output


@pytest.mark.parametrize("settings", [5, [], "x", None, {"prompts": {}}])
def test_odd_settings_of_a_run(evaluate: Any, settings: Any) -> None:
    """Are no traceback."""
    evaluate.out.mkdir()
    (evaluate.out / "answers.jsonl").write_text(json.dumps({"settings": settings}) + "\n", encoding="utf-8")
    result = evaluate("http://127.0.0.1:9", "http://127.0.0.1:8", "--out", str(evaluate.out), "--resume")
    assert re.search("is damaged|were given with another", result.stderr)
    assert (result.exit_code, type(result.exception)) == (1, SystemExit)
