"""Requests of production: what a log gives, what is left out, and whole evaluations from logs."""

import gzip
import json
from pathlib import Path
from typing import Any

import click.testing
import pytest
from chat_server import Behaviour, chat_server
from paths import ROOT

from convert_w4a8.cli.main import main
from convert_w4a8.errors import ConvertError
from convert_w4a8.evaluation.checks import Call, score
from convert_w4a8.evaluation.logs import read_logs
from convert_w4a8.evaluation.recorded import recorded, seconds, status

pytest.importorskip("jsonschema", reason="the extra `evaluate` is not installed")

TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]


def chat(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": text}], **more}


def line(name: str | int, side: str, request: Any, **more: Any) -> dict[str, Any]:
    """Return a line as nginx writes it: the request as a string."""
    found: dict[str, Any] = {
        "id": name,
        "side": side,
        "path": "/v1/chat/completions",
        "status": "200",
        "seconds": "0.5",
    }
    return found | {"request": json.dumps(request) if isinstance(request, dict) else request} | more


def write(path: Path, *lines: Any) -> Path:
    text = "".join((one if isinstance(one, str) else json.dumps(one, ensure_ascii=False)) + "\n" for one in lines)
    path.write_text(text, encoding="utf-8")
    return path


def response(text: str, **more: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": text, **more}
    usage = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    return {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": usage}


def stream(*texts: str) -> str:
    chunks: list[dict[str, Any]] = [
        {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]} for text in texts
    ]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"


def test_a_request_is_asked_as_it_was(tmp_path: Path) -> None:
    """All but how it was sampled and sent; what only the copy says, such as a cap, is taken too."""
    mine = chat("Hi\u2028there", stream=True, temperature=0.9, stop=["\n"], tools=TOOLS, user="u")
    copy = chat("Hi\u2028there", temperature=0.9, stop=["\n"], tools=TOOLS, max_tokens=77)
    found = read_logs(
        [write(tmp_path / "l.jsonl", line("a", "candidate", copy), line("a", "baseline", mine))], 5, answered=False
    )
    (prompt,) = found.prompts.prompts
    assert prompt.messages == mine["messages"]
    assert prompt.tools == TOOLS
    assert prompt.extra == {"stop": ["\n"]}
    assert prompt.max_tokens == 77
    assert [check.type for check in prompt.checks] == ["valid_calls"]
    assert found.notes == ()
    assert {side: (one.requests, one.failed, one.seconds) for side, one in found.production.items()} == {
        "baseline": (1, 0, [0.5]),
        "candidate": (1, 0, [0.5]),
    }


@pytest.mark.parametrize(
    ("form", "schema"),
    [
        ({"type": "json_object"}, {"type": "object"}),
        ({"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "array"}}}, {"type": "array"}),
        ({"type": "json_schema", "json_schema": {"schema": {"$ref": "http://far/away"}}}, None),
        ({"type": "text"}, None),
    ],
)
def test_checks_come_from_the_request(tmp_path: Path, form: Any, schema: Any) -> None:
    """A schema that cannot be checked is none; one's own checks come after."""
    own = {"checks": [{"type": "contains", "value": "x"}], "tags": ["t"]}
    log = write(tmp_path / "l.jsonl", line("a", "baseline", chat("Hi", response_format=form), **own))
    (prompt,) = read_logs([log], 5, answered=False).prompts.prompts
    kinds = [(check.type, check.settings.get("schema")) for check in prompt.checks]
    assert kinds == [*([("json", schema)] if schema else []), ("contains", None)]
    assert prompt.extra == {"response_format": form}
    assert prompt.tags == ("t",)


@pytest.mark.parametrize(
    ("calls", "value"),
    [
        ([], 1),
        ([("weather", '{"city": "Oslo"}')], 1),
        ([("weather", '{"town": "Oslo"}')], 0),
        ([("weather", '{"city": "Os')], 0),
        ([("weather", '{"city": "Oslo"}'), ("news", "{}")], 0),
    ],
)
def test_valid_calls(tmp_path: Path, calls: Any, value: int) -> None:
    """Of the tools that there are, with arguments as their schemas want."""
    log = write(tmp_path / "l.jsonl", line("a", "baseline", chat("Hi", tools=TOOLS)))
    (prompt,) = read_logs([log], 5, answered=False).prompts.prompts
    assert score(prompt.checks[0], "", [Call(*call) for call in calls]).value == value


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    """With where it was first; nothing of it is asked."""
    good = [line(f"g{n}", "baseline", chat(f"q{n}")) for n in range(3)]
    log = write(
        tmp_path / "l.jsonl",
        *good,
        '{"id": "cut sho',
        line("e", "baseline", ""),
        line("j", "baseline", '{"messages": ['),
        line("p", "baseline", {"input": "x"}, path="/v1/responses"),
        line("o", "baseline", {"input": "x"}),
        line("r", "baseline", chat("bad"), status="400"),
        line("s", "third", chat("x")),
        line("m", "baseline", {"messages": "x"}),
        line("same", "baseline", chat("q1", model="other", temperature=1)),
        line("c", "candidate", chat("only the candidate's"), status="502"),
        line("busy", "baseline", chat("later"), status=429),
    )
    found = read_logs([log], 100, answered=False)
    assert sorted(prompt.id for prompt in found.prompts.prompts) == ["busy", "c", "g0", "g1", "g2"]
    notes = "\n".join(found.notes)
    for what in (
        f"1 line left out: not readable (the first: {log} line 4 is not JSON",
        "left out: no request (",
        "left out: a request that is no JSON (",
        "left out: of another path than completions (",
        "left out: a request that is none of completions (",
        "left out: refused in production (4xx) (",
        "left out: a side that is neither baseline nor candidate (",
        "left out: cannot be asked again (",
        "left out: the same as another one (",
    ):
        assert what in notes
    assert len(found.notes) == 9
    assert found.production["candidate"].failed == 1


def test_the_same_requests_are_drawn_again(tmp_path: Path) -> None:
    """Whatever else the log has, in whatever order; rotated files too."""
    lines = [line(f"r{n}", side, chat(f"q{n}")) for n in range(60) for side in ("baseline", "candidate")]
    one = read_logs([write(tmp_path / "a.jsonl", *lines)], 10, answered=False)
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress("\n".join(map(json.dumps, lines[:50])).encode()))
    other = read_logs([packed, write(tmp_path / "c.jsonl", *reversed(lines[50:]))], 10, answered=False)
    assert len(one.prompts.prompts) == 10
    assert one.prompts.digest == other.prompts.digest
    assert [p.id for p in one.prompts.prompts] != [f"r{n}" for n in range(10)]


def test_nothing_to_compare(tmp_path: Path) -> None:
    """Is one line, with the reason."""
    with pytest.raises(ConvertError, match=r"nothing in them can be compared \(they are empty\)"):
        read_logs([write(tmp_path / "l.jsonl")], 5, answered=False)
    log = write(tmp_path / "m.jsonl", line("a", "baseline", chat("Hi")))
    with pytest.raises(ConvertError, match=r"1 line left out: no answer \(body\)"):
        read_logs([log], 5, answered=True)


def test_how_nginx_writes_numbers() -> None:
    """Several servers that were tried, and none."""
    assert [seconds(value) for value in ("0.1, 0.25", "-", "", None, 2, "1.5", True)] == [
        0.35,
        None,
        None,
        None,
        2,
        1.5,
        None,
    ]
    assert [status({"status": value}) for value in ("502, 200", "000", "-", 204, "")] == [200, None, None, 204, None]
    assert status({"body": {}}) == 200
    assert status({"status": 200, "error": "reset"}) is None


@pytest.mark.parametrize(
    "body",
    [response("four words are here"), json.dumps(response("four words are here")), stream("four words ", "are here")],
)
def test_recorded_answers(body: Any) -> None:
    """A response, its JSON, and a stream."""
    found = recorded("baseline", "a", {"body": body, "seconds": "2.5", "first_token_seconds": 0.5})
    assert (found.text, found.finish, found.failure) == ("four words are here", "stop", None)
    assert (found.first_token, found.last_token) == (0.5, 2.5)


def test_recorded_calls() -> None:
    """Of a response, where they have no index."""
    calls = [{"id": "1", "type": "function", "function": {"name": n, "arguments": "{}"}} for n in ("f", "g")]
    found = recorded("candidate", "a", {"body": response("", content=None, tool_calls=calls)})
    assert [call.name for call in found.calls] == ["f", "g"]
    assert found.tokens == 4


@pytest.mark.parametrize(
    ("entry", "failure"),
    [
        ({"status": "503", "body": ""}, "5xx: status 503, as the log says"),
        ({"status": "-", "body": ""}, "dead: no answer, as the log says"),
        ({"error": "reset by peer", "body": ""}, "dead: reset by peer, as the log says"),
        ({"body": "<html>"}, "truncated: no response in the log"),
        ({"body": stream("a", "b")[:70]}, "truncated: "),
        ({"body": {"error": {"message": "too long"}}}, "refused: too long"),
        ({"body": {"choices": [{"text": "", "finish_reason": "abort"}]}}, "truncated: the server gave up"),
        ({"body": {"choices": []}}, "truncated: no finish_reason came, as the log says"),
    ],
)
def test_recorded_failures_have_names(entry: Any, failure: str) -> None:
    """As those of servers have."""
    assert str(recorded("candidate", "a", entry).failure).startswith(failure)


def run(*arguments: str) -> click.testing.Result:
    return click.testing.CliRunner().invoke(main, ["evaluate", *arguments])


def test_requests_are_asked_of_both_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The verdict from traffic: JSON that a request wants, tokens, how it went in production."""
    pytest.importorskip("openai", reason="the extra `evaluate` is not installed")
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    form = {"response_format": {"type": "json_object"}, "temperature": 1}
    own = {"checks": [{"type": "contains", "value": '{"a": 1'}]}
    lines = [
        line(f"r{n}", side, chat(f"q{n}", **form), **own, seconds="0.2" if side == "baseline" else "0.1")
        for n in range(80)
        for side in ("baseline", "candidate")
    ]
    log = str(write(tmp_path / "l.jsonl", *lines))
    good = Behaviour(answer=lambda _prompt: '{"a": 1}')
    with (
        chat_server(good) as a,
        chat_server(Behaviour(answer=good.answer)) as same,
        chat_server(Behaviour(answer=lambda _prompt: '{"a": 1')) as b,
    ):
        result = run("--logs", log, "--baseline", a, "--candidate", same, "--json")
        bad = run("--logs", log, "--requests", "50", "--baseline", a, "--candidate", b)
    found = json.loads(result.stdout)
    assert result.exit_code == 0, result.output
    assert found["verdict"]["groups"][0]["prompts"] == 80
    assert found["production"]["candidate"]["seconds"]["median"] == 0.1
    assert found["length"]["baseline"]["cut_off"] == 0
    assert {request["temperature"] for request in good.seen} == {0}
    assert {json.dumps(request["response_format"]) for request in good.seen} == {'{"type": "json_object"}'}
    assert bad.exit_code == 3
    assert "In production" in bad.stdout


def test_answers_in_the_log_need_no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paired by id; failures of the candidate stop it, those of the baseline are left out."""
    pytest.importorskip("openai", reason="the extra `evaluate` is not installed")
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    check = {"checks": [{"type": "contains", "value": "yes"}]}

    def pairs(count: int, said: str, **of_last: Any) -> list[dict[str, Any]]:
        found = []
        for n in range(count):
            more = of_last if n == count - 1 else {}
            found.append(line(f"r{n}", "candidate", chat(f"q{n}"), body=response(said), **more))
            found.append(line(f"r{n}", "baseline", chat(f"q{n}", stream=True), body=stream("yes"), **check))
        return found

    out = tmp_path / "out"
    good = write(tmp_path / "good.jsonl", *pairs(80, "oh yes"), line("x", "baseline", chat("x"), body="", status=500))
    result = run("--logs", str(good), "--out", str(out))
    assert result.exit_code == 0, result.output
    found = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    assert found["baseline"] == "what good.jsonl has"
    assert found["predicted"] == {"baseline": {}, "candidate": {}}
    assert any("an answer of one side only" in entry for entry in found["missing"])
    assert found["speed"]["rate"]["candidate"]["median"] == 8
    bad = run("--logs", str(write(tmp_path / "bad.jsonl", *pairs(50, "no"))))
    assert bad.exit_code == 3
    failing = run("--logs", str(write(tmp_path / "failing.jsonl", *pairs(80, "yes", status="503"))))
    assert failing.exit_code == 4
    assert "1 of 80 answers of the candidate are missing: as the logs say" in failing.stdout


def test_a_candidate_that_failed_in_production_is_not_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However well it answers now; one request more or less is chance."""
    pytest.importorskip("openai", reason="the extra `evaluate` is not installed")
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    form = {"response_format": {"type": "json_object"}}
    good = Behaviour(answer=lambda _prompt: "{}")
    with chat_server(good) as url, chat_server(good) as other:
        for failed, status_, code in ((1, "502", 0), (8, "400", 4), (8, "502", 4)):
            own = {"checks": [{"type": "exact", "value": "{}"}]}
            lines = [line(f"r{n}", "baseline", chat(f"q{n}", **form), **own) for n in range(80)]
            lines += [
                line(f"r{n}", "candidate", chat(f"q{n}", **form), status=status_ if n < failed else "200")
                for n in range(80)
            ]
            log = write(tmp_path / f"{failed}.jsonl", *lines)
            result = run("--logs", str(log), "--baseline", url, "--candidate", other)
            assert result.exit_code == code, result.output
    assert "in production the candidate failed 8 requests that the baseline answered" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "give either prompts or logs"),
        (("--prompts", "p", "--logs", "l"), "give either prompts or logs"),
        (("--prompts", "p"), "give both baseline and candidate"),
        (("--logs", "l", "--baseline", "http://a"), "give both baseline and candidate"),
        (("--logs", "l", "--samples", "2", "--temperature", "1"), "several samples need servers"),
        (("--logs", "l", "--serve-options", "'"), "No closing quotation"),
    ],
)
def test_usage(arguments: tuple[str, ...], said: str) -> None:
    """What does not go together is a usage error."""
    pytest.importorskip("openai", reason="the extra `evaluate` is not installed")
    result = run(*arguments)
    assert result.exit_code == 2
    assert said in result.stderr


def test_what_nginx_wrote() -> None:
    """The log of the rollout kit's nginx, byte by byte: its escapes, its numbers, both sides of a request."""
    log = ROOT / "tests" / "data" / "shadow.jsonl"
    found = read_logs([log], 100, answered=False)
    asked = {prompt.shown: prompt for prompt in found.prompts.prompts}
    assert sorted(asked) == [
        '[user] Sag "Grüße" \U0001f600 \u2028 \\ \0',
        "[user] What is 2 + 2?",
        "[user] json",
        "[user] the candidate is dead",
        "[user] weather",
        "def f(",
        "stray",
    ]
    assert [asked[text].max_tokens for text in ("[user] What is 2 + 2?", "[user] json", "def f(")] == [64, 2048, 32]
    assert asked["def f("].extra == {"stop": ["\n\n"]}
    assert [check.type for text in ("[user] json", "[user] weather") for check in asked[text].checks] == [
        "json",
        "valid_calls",
    ]
    assert (found.lost, found.won) == (1, 0)
    assert (found.production["baseline"].failed, found.production["candidate"].failed) == (0, 1)
    assert found.notes == (f"logs: 2 lines left out: of another path than completions (the first: {log} line 11)",)


def test_a_log_that_does_not_say_how_it_went(tmp_path: Path) -> None:
    """Is no log of failures."""
    lines = [{"id": "a", "side": side, "request": chat("Hi")} for side in ("baseline", "candidate")]
    found = read_logs([write(tmp_path / "l.jsonl", *lines, {"request": {"prompt": "x"}})], 5, answered=False)
    assert len(found.prompts.prompts) == 2
    assert [one.requests for one in found.production.values()] == [0, 0]
    assert (found.lost, found.won) == (0, 0)


def paired(count: int, baseline: Any, candidate: Any, **more: Any) -> list[dict[str, Any]]:
    """Return lines of both sides with answers; more: of the request."""
    return [
        line(f"r{n}", side, chat(f"q{n}", **more), body=body)
        for n in range(count)
        for side, body in (("baseline", baseline), ("candidate", candidate))
    ]


@pytest.fixture
def verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return how to get the verdict of lines."""
    pytest.importorskip("openai", reason="the extra `evaluate` is not installed")
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)

    def decide(lines: list[dict[str, Any]], *arguments: str) -> click.testing.Result:
        return run("--logs", str(write(tmp_path / "l.jsonl", *lines)), *arguments)

    return decide


USAGE = {"usage": {"completion_tokens": 3}}
CALL = {"tool_calls": [{"id": "1", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}]}


@pytest.mark.parametrize(
    ("baseline", "candidate", "request_", "code"),
    [
        (response("", **CALL), response("!!!!!!"), {"tools": TOOLS}, 3),
        (response("It rains"), response("!!!!!!"), {"tools": TOOLS}, 4),
        (response('{"a": 1}'), response("{}"), {"response_format": {"type": "json_object"}}, 4),
        (response('{"a": 1}'), response("{"), {"response_format": {"type": "json_object"}}, 3),
    ],
)
def test_the_form_alone_is_not_shipped(verdict: Any, baseline: Any, candidate: Any, request_: Any, code: int) -> None:
    """It says what is bad, and never that it is good; a few checks of one's own are not enough either."""
    lines = paired(80, baseline, candidate, **request_)
    result = verdict(lines)
    assert result.exit_code == code, result.output
    lines[0]["checks"] = [{"type": "regex", "pattern": ""}]
    result = verdict(lines)
    assert result.exit_code == code, result.output
    if code == 4:
        assert "all prompts: only 1 of 80 prompts have checks of their own or a rating" in result.stdout
        for one in lines:
            one["checks"] = [{"type": "regex", "pattern": ""}]
        assert verdict(lines).exit_code == 0


def test_calls_that_the_baseline_does_not_make_win_nothing(verdict: Any) -> None:
    """They would outweigh what a check of one's own says of them."""
    lines = paired(80, response("It rains"), response("", **CALL), tools=TOOLS)
    for one in lines:
        one["checks"] = [{"type": "contains", "value": "rains"}]
    result = verdict(lines)
    assert result.exit_code == 3, result.output


@pytest.mark.parametrize("how", [{"error": "reset"}, {"status": "502"}, {"status": "-"}, {"status": 400}])
def test_a_failure_without_a_body_is_one(verdict: Any, how: dict[str, Any]) -> None:
    """A proxy has none to write then."""
    lines = paired(75, response("yes"), response("yes"))
    for number, one in enumerate(lines):
        one["checks"] = [{"type": "contains", "value": "yes"}]
        if one["side"] == "candidate" and number < 10:
            del one["body"]
            one.update(how)
    result = verdict(lines)
    assert result.exit_code == 4, result.output
    assert "5 of 75 answers of the candidate are missing" in result.stdout


def test_what_only_the_candidate_refuses_is_a_failure(tmp_path: Path) -> None:
    """4xx; where the baseline refuses it too, the request is at fault, and too many requests are nobody's."""
    lines = [line(f"r{n}", side, chat(f"q{n}")) for n in range(5) for side in ("baseline", "candidate")]
    lines[1]["status"] = 400
    lines[2]["status"] = lines[3]["status"] = 400
    lines[5]["status"] = 429
    lines[6]["status"] = 400
    found = read_logs([write(tmp_path / "l.jsonl", *lines)], 9, answered=False)
    assert (found.lost, found.won, found.production["candidate"].failed) == (1, 0, 1)


def test_ids_that_are_used_again_are_not_paired(tmp_path: Path) -> None:
    """Answers to different requests say nothing of each other."""
    lines = [line("a", "baseline", chat("one")), line("a", "candidate", chat("two"))]
    lines += [line("b", "baseline", chat("x", tools=TOOLS)), line("b", "candidate", chat("x"))]
    lines += [line(7, "baseline", chat("x", max_tokens=3)), line(7, "candidate", chat("x", max_tokens=2))]
    for one in lines:
        one["body"] = response("yes")
    found = read_logs([write(tmp_path / "l.jsonl", *lines)], 9, answered=True)
    assert [prompt.id for prompt in found.prompts.prompts] == ["7"]
    assert found.notes[0].startswith("logs: 2 lines left out: another request on the other side")


@pytest.mark.parametrize(
    "body",
    [
        {"choices": [{"message": {"content": "a"}, "finish_reason": {"a": 1}}]},
        {"choices": [{"message": {"content": "a"}, "finish_reason": "stop", "token_ids": [{"a": 1}]}]},
        {"choices": [{"text": "a", "finish_reason": "stop", "prompt_token_ids": "ab"}]},
        {"choices": [{"text": "a", "finish_reason": "stop"}], "usage": {"completion_tokens": 10**400}},
        '{"choices": [{"text": "a", "finish_reason": "stop"}], "usage": {"completion_tokens": 1e999}}',
        response("", tool_calls=[{"index": i, "function": {"name": "f", "arguments": "{}"}} for i in ("a", 1)]),
    ],
)
def test_odd_answers_are_no_tracebacks(tmp_path: Path, body: Any) -> None:
    """But answers that are missing."""
    assert str(recorded("candidate", "a", {"body": body}).failure).startswith("truncated: ")
    lines = [line("a", "baseline", chat("x"), body=response("y")), line("a", "candidate", chat("x"), body=body)]
    assert len(read_logs([write(tmp_path / "l.jsonl", *lines)], 9, answered=True).answers) == 2


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"checks": 5}, "checks is a number, not a list"),
        ({"request": {"messages": [{"role": "user", "tool_calls": 7}]}}, "a message has tool_calls that are no list"),
    ],
)
def test_odd_lines_are_left_out(tmp_path: Path, more: dict[str, Any], said: str) -> None:
    """With the reason."""
    log = write(tmp_path / "l.jsonl", line("a", "baseline", chat("x")) | more, line("b", "baseline", chat("y")))
    found = read_logs([log], 9, answered=False)
    assert [prompt.id for prompt in found.prompts.prompts] == ["b"]
    assert said in found.notes[0]


def test_odd_numbers() -> None:
    """Of which a time or a status is none."""
    assert [seconds(value) for value in (5e-05, "5e-05", -1, 10**400, "9" * 400, "1, " + "9" * 400)] == [
        5e-05,
        5e-05,
        None,
        None,
        None,
        None,
    ]
    assert [status({"status": value}) for value in ("9" * 400, 10**400, 1e300, 7)] == [None] * 4


def test_of_several_choices_the_first_counts() -> None:
    """They are not joined; what they took together is not the tokens of one."""
    pieces = [{"index": i, "delta": {"content": f"{i}"}, "finish_reason": "stop"} for i in (1, 0, 1)]
    for body in (
        "".join(f"data: {json.dumps({'choices': [piece], 'usage': {'completion_tokens': 3}})}\n\n" for piece in pieces),
        {"choices": [{"index": i, "text": f"{i}", "finish_reason": "stop"} for i in (1, 0)], **USAGE},
    ):
        found = recorded("baseline", "a", {"body": body})
        assert (found.text, found.tokens, found.failure) == ("0", None, None)
