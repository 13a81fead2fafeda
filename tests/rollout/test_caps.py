"""The cap on the length of answers, whatever a request's JSON looks like."""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from proxy_client import CHAT, Reply, ask, connect
from rollout_proxy import Proxy
from streaming_server import StreamingServer

CAP = 100
ANSWERS = 128
"""As the guide has it."""
COMPLETIONS, MESSAGES, RESPONSES = "/v1/completions", "/v1/messages", "/v1/responses"


@pytest.fixture(scope="module")
def server() -> Iterator[StreamingServer]:
    with StreamingServer("baseline", tokens=1) as running:
        yield running


@pytest.fixture(scope="module")
def capped(tmp_path_factory: pytest.TempPathFactory, server: StreamingServer) -> Iterator[Proxy]:
    """Cap answers at CAP tokens."""
    with Proxy(tmp_path_factory.mktemp("caps") / "nginx", server.port, server.port, max_tokens=CAP) as running:
        yield running


def limit(path: str, body: dict[str, Any]) -> Any:
    """Return how many tokens vLLM makes at most for a body; None: as many as fit.

    From vllm/entrypoints/openai/{chat_completion,completion,responses}/protocol.py and serving.py of 0.25.1 and 0.33.0.
    """
    if path == CHAT:
        first = body.get("max_completion_tokens")
        return first if first is not None else body.get("max_tokens")
    if path == COMPLETIONS:
        return body.get("max_tokens", 16)
    return body.get("max_output_tokens" if path == RESPONSES else "max_tokens")


def error_of(reply: Reply) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(reply.body)["error"]
    assert found["code"] == reply.status == 400
    return found


@pytest.mark.parametrize(
    ("path", "body", "passed_on"),
    [
        (CHAT, '{"max_tokens": 100}', '{"max_tokens": 100}'),
        (CHAT, '{"a": 9007199254740993, "a": "\\ud800", "b": 1.0}\n', None),  # what was asked goes on to the letter
        (CHAT, "{}", '{"max_tokens":100}'),
        (CHAT, "{ }  ", '{ "max_tokens":100}'),
        (CHAT, '{"max_tokens":1e2}', '{"max_tokens":1e2}'),
        (CHAT, '{"max_completion_tokens":null,"max_tokens":7}', '{"max_completion_tokens":null,"max_tokens":7}'),
        (CHAT, '{"max_tokens":null}', '{"max_tokens":null,"max_tokens":100}'),
        (CHAT, '{"max_tokens":5,"max_tokens":null}', '{"max_tokens":5,"max_tokens":null,"max_tokens":100}'),
        (CHAT, '{"messages":[{"max_tokens":5}]}', '{"messages":[{"max_tokens":5}],"max_tokens":100}'),
        (CHAT, '{"__proto__":{"max_tokens":5}}', '{"__proto__":{"max_tokens":5},"max_tokens":100}'),
        (CHAT, '{"a":"max_tokens\\":5}"}', '{"a":"max_tokens\\":5}","max_tokens":100}'),
        (COMPLETIONS, '{"prompt":"a"}', '{"prompt":"a"}'),  # vLLM makes 16
        (COMPLETIONS, '{"max_tokens":null}', '{"max_tokens":null,"max_tokens":100}'),
        (MESSAGES, "{}", "{}"),  # an error, which the server gives
        (RESPONSES, "{}", '{"max_output_tokens":100}'),
    ],
)
def test_what_is_passed_on(capped: Proxy, server: StreamingServer, path: str, body: str, passed_on: str | None) -> None:
    """As it came; the cap is added at the end where a server would have none."""
    server.asked.clear()
    assert ask(capped.port, body.encode(), path).status == 200
    passed_on = passed_on or body.rstrip()[:-1] + ',"max_tokens":100}'
    assert server.asked[0].body.decode() == passed_on
    assert limit(path, json.loads(passed_on)) in (*range(CAP + 1), *([None] if path == MESSAGES else []))


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        (CHAT, '{"max_tokens":101}', "max_tokens"),
        (CHAT, '{"max_tokens":1e3}', "max_tokens"),
        (CHAT, '{"max_tokens":99999999999999999999999}', "max_tokens"),
        (CHAT, '{"max_tokens":"99999"}', "max_tokens"),  # which pydantic takes for a number
        (CHAT, '{"max_tokens":true}', "max_tokens"),
        (CHAT, '{"max_tokens":[101]}', "max_tokens"),
        (CHAT, '{"max\\u005ftokens":101}', "max_tokens"),
        (CHAT, '{"max_tokens":5,"max_tokens":101}', "max_tokens"),
        (CHAT, '{"max_tokens":5,"max_completion_tokens":101}', "max_completion_tokens"),
        (CHAT, '{"max_tokens":101,"max_completion_tokens":5}', "max_tokens"),
        ("/v1/chat/%63ompletions", '{"max_tokens":101}', "max_tokens"),
        ("//v1//chat/completions?a=b", '{"max_tokens":101}', "max_tokens"),
        (COMPLETIONS, '{"max_tokens":101}', "max_tokens"),
        (MESSAGES, '{"max_tokens":101}', "max_tokens"),
        (RESPONSES, '{"max_output_tokens":101}', "max_output_tokens"),
    ],
)
def test_who_asks_for_too_much_is_told(
    capped: Proxy, server: StreamingServer, path: str, body: str, named: str
) -> None:
    """The error is one that OpenAI's clients understand."""
    server.asked.clear()
    error = error_of(ask(capped.port, body.encode(), path))
    assert error["message"] == f"{named} must be a number of at most {CAP}"
    assert error["param"] == named
    assert not server.asked


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        (CHAT, {"n": 129}, "n"),
        (CHAT, {"n": 100000}, "n"),
        (CHAT, {"n": "129"}, "n"),  # which pydantic takes for a number
        (CHAT, {"n": [129]}, "n"),
        (CHAT, {"n": True}, "n"),
        (CHAT, {"best_of": 129}, "best_of"),
        (COMPLETIONS, {"n": 129, "prompt": "a"}, "n"),
        (COMPLETIONS, {"prompt": ["a"] * 129}, "prompt"),
        (COMPLETIONS, {"prompt": [[1, 2]] * 129}, "prompt"),
        (COMPLETIONS, {"prompt": ["a"] * 65, "n": 2}, "prompt"),
        (COMPLETIONS, {"prompt": ["a"] * 65, "best_of": 2, "n": 1}, "prompt"),
        (COMPLETIONS, {"prompt_embeds": ["a"] * 129}, "prompt_embeds"),
    ],
)
def test_who_asks_for_too_many_is_told(
    capped: Proxy, server: StreamingServer, path: str, body: dict[str, Any], named: str
) -> None:
    """However a request multiplies its answers."""
    server.asked.clear()
    error = error_of(ask(capped.port, {"max_tokens": 1} | body, path))
    assert error["param"] == named
    assert str(ANSWERS) in error["message"]
    assert not server.asked


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"n": ANSWERS}),
        (CHAT, {"n": None, "best_of": None}),
        (COMPLETIONS, {"n": 2, "prompt": ["a"] * 64}),
        (COMPLETIONS, {"n": 2, "prompt": list(range(1000))}),  # one prompt, as tokens
        (COMPLETIONS, {"n": ANSWERS, "prompt": "a" * 1000}),
        (COMPLETIONS, {"n": 2, "prompt": []}),  # an error, which the server gives
    ],
)
def test_as_many_as_may_be(capped: Proxy, server: StreamingServer, path: str, body: dict[str, Any]) -> None:
    """What is not over the number is passed on as it came."""
    server.asked.clear()
    assert ask(capped.port, {"max_tokens": 1} | body, path).status == 200
    assert server.asked[0].json == {"max_tokens": 1} | body


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[1]",
        b'"a"',
        b'{"max_tokens":NaN}',  # Python's json reads this
        b'{"a":1} ,"max_tokens":101}',
        '{"max_tokens":101}'.encode("utf-16"),  # and this
        b"\xef\xbb\xbf{}",  # and this
        b'{"a":' + b"[" * 40 + b"]" * 40 + b"}",
        b'{"a":' + b"[" * 100000,
        b"\x1f\x8b\x08\x00",
    ],
    ids=lambda body: repr(body[:20]),
)
def test_what_cannot_be_read_is_not_passed_on(capped: Proxy, server: StreamingServer, body: bytes) -> None:
    """A server might read it otherwise."""
    server.asked.clear()
    assert "JSON" in error_of(ask(capped.port, body))["message"]
    assert not server.asked


@pytest.mark.parametrize("chunked", [False, True])
def test_large_bodies(capped: Proxy, server: StreamingServer, chunked: bool) -> None:
    """They are read whole, in one piece or in chunks; larger ones than the guide allows are refused as such."""
    server.asked.clear()

    def statuses(size: int, **fields: Any) -> int:
        data = json.dumps({"messages": [{"role": "user", "content": "é" * (size // 12)}]} | fields).encode()
        data += b" " * (size - len(data))
        with connect(capped.port) as connection:
            pieces = (data[n : n + 60000] for n in range(0, len(data), 60000))
            connection.request("POST", CHAT, pieces if chunked else data, encode_chunked=chunked, headers=headers)
            return connection.getresponse().status

    headers = {"Content-Type": "application/json"} | ({"Transfer-Encoding": "chunked"} if chunked else {})
    whole = 8 << 20
    assert statuses(whole - 100000, max_tokens=7) == 200
    assert statuses(whole - 100000) == 200
    assert statuses(whole - 100000, max_tokens=101) == 400
    assert [limit(CHAT, asked.json) for asked in server.asked] == [7, CAP]
    assert {len(asked.json["messages"][0]["content"]) for asked in server.asked} == {(whole - 100000) // 12}
    with suppress(BrokenPipeError, ConnectionResetError):  # nginx does not wait for the rest
        assert statuses(whole + 1) == 413
    assert len(server.asked) == 2


KEYS = st.sampled_from(
    ["max_tokens", "max_completion_tokens", "max_output_tokens", "a", "__proto__", "constructor", ""]
)
NUMBERS = st.sampled_from(["0", "-1", "99", "100", "100.0", "100.00000000000001", "101", "1e2", "1E+3", "1e400", "-0"])
VALUES = st.one_of(
    NUMBERS,
    st.integers(-5, 10**25).map(str),
    st.sampled_from(
        ["null", "true", "false", '""', '"101"', "[]", "[101]", "{}", '{"max_tokens":5}', "NaN", "Infinity"]
    ),
)


@st.composite
def bodies(draw: st.DrawFn) -> str:
    """Draw an object with these keys, repeated, spelled with escapes or not, with space around everything."""

    def spelled(key: str) -> str:
        letters = [f"\\u{ord(c):04x}" if draw(st.integers(0, 9)) == 0 else c for c in key]
        return '"' + "".join(letters) + '"'

    space = st.sampled_from(["", "", " ", "\n", "\t "])
    pairs = [
        draw(space) + spelled(key) + draw(space) + ":" + draw(space) + value + draw(space)
        for key, value in draw(st.lists(st.tuples(KEYS, VALUES), max_size=5))
    ]
    return draw(space) + "{" + (",".join(pairs) or draw(space)) + "}" + draw(space)


@settings(max_examples=150)
@given(path=st.sampled_from([CHAT, COMPLETIONS, RESPONSES]), body=bodies())
def test_nobody_gets_more(capped: Proxy, server: StreamingServer, path: str, body: str) -> None:
    """What reaches a server has a limit under the cap, as Python reads it; what does not was over it, or no JSON."""
    server.asked.clear()
    reply = ask(capped.port, body.encode(), path)
    if reply.status == 200:
        found = limit(path, server.asked[0].json)
        assert type(found) in {int, float}
        assert found <= CAP
    else:
        error = error_of(reply)
        assert not server.asked
        assert error["param"] in json.loads(body) or "NaN" in body or "Infinity" in body


def test_the_cap_that_comes_with_the_guide(tmp_path: Path, server: StreamingServer) -> None:
    """The cap of the guide holds where nobody edits it."""
    with Proxy(tmp_path / "nginx", server.port, server.port) as proxy:
        server.asked.clear()
        ask(proxy.port, {})
        assert server.asked[0].json == {"max_tokens": 2048}
