"""The proxy of docs/guides/rollout before two servers: copies, shares, streams, failures."""

import http.client
import json
import re
from collections import Counter
from math import comb
from pathlib import Path

import pytest
from proxy_client import CHAT, ask, connect, send
from rollout_proxy import KIT, Proxy, until
from streaming_server import StreamingServer


def probable(found: int, of: int, share: float) -> bool:
    """Whether a count is one that a binomial distribution has but for a chance of one in a million on either side."""
    chances = [comb(of, n) * share**n * (1 - share) ** (of - n) for n in range(of + 1)]
    return sum(chances[: found + 1]) > 1e-6 and sum(chances[found:]) > 1e-6


def side_of(proxy: Proxy, headers: dict[str, str]) -> str:
    """Return who answers a client."""
    return ask(proxy.port, headers=headers).who


def test_tokens_come_as_they_are_made(proxy: Proxy, baseline: StreamingServer) -> None:
    """The first one is here while the server makes the second; the end is the server's."""
    baseline.mood = "hangs"  # after each token
    with connect(proxy.port) as connection:
        response = send(connection, {"messages": [], "stream": True})
        first = response.readline()
        assert b"baseline 0" in first
        assert baseline.asked[0].ended is None
        baseline.mood = "well"
        assert response.read().endswith(b"data: [DONE]\n\n")
        assert response.getheader("Content-Type") == "text/event-stream"


def test_copies_are_answered_whole_and_thrown_away(
    proxy: Proxy, baseline: StreamingServer, candidate: StreamingServer
) -> None:
    """The candidate is asked the same, in one piece; its answer is waited for, by nobody whom it could hold up."""
    candidate.seconds = 0.1
    assert proxy.script("shadow", "100").returncode == 0
    request = {"messages": [{"role": "user", "content": 'é"\n'}], "temperature": 0.7, "seed": 3}
    streamed = request | {"stream": True, "stream_options": {"include_usage": True}}
    for body in (request, streamed):
        assert ask(proxy.port, body, headers={"Authorization": "Bearer secret"}).who == "baseline"
    until(lambda: [asked.ended for asked in candidate.asked] == ["whole"] * 2, "copies are answered")
    served, copied = ([asked.json for asked in server.asked] for server in (baseline, candidate))
    assert served == [request | {"max_tokens": 2048}, streamed | {"max_tokens": 2048}]
    assert copied == [request | {"max_tokens": 2048, "stream": False}] * 2
    assert {asked.headers["Authorization"] for asked in candidate.asked} == {"Bearer secret"}
    ids = [[asked.headers["X-Request-Id"] for asked in server.asked] for server in (baseline, candidate)]
    assert sorted(ids[0]) == sorted(ids[1])
    assert len(set(ids[0])) == 2


def test_the_log_has_both_sides_of_what_was_copied(
    proxy: Proxy, baseline: StreamingServer, candidate: StreamingServer
) -> None:
    """And of nothing else; each line is a JSON object, whatever the request holds; no key of a client."""
    odd = {"messages": [{"role": "user", "content": '\x00\x1f\x7f "\\ \u2028 é 😀 </script> $request_body'}]}
    ask(proxy.port, odd)
    proxy.script("shadow", "100")
    ask(proxy.port, odd, headers={"Authorization": "Bearer secret"})
    ask(proxy.port, {"prompt": "a"}, "/v1/completions?b=c")
    ask(proxy.port, {"input": "a"}, "/v1/responses")
    lines: list[dict[str, str]] = []

    def logged() -> bool:
        lines[:] = map(json.loads, filter(None, proxy.shadow_log.read_text(encoding="utf-8").split("\n")))
        return len(lines) >= 4

    until(logged, "lines of both sides")
    assert Counter((line["side"], line["path"].partition("?")[0]) for line in lines) == {
        (side, path): 1 for side in ("baseline", "candidate") for path in (CHAT, "/v1/completions")
    }
    for line in lines:
        server = baseline if line["side"] == "baseline" else candidate
        (asked,) = (asked for asked in server.asked if asked.headers["X-Request-Id"] == line["id"])
        assert json.loads(line["request"]) == asked.json
        assert line["status"] == "200"
        assert float(line["seconds"]) >= 0
    assert "secret" not in proxy.shadow_log.read_text(encoding="utf-8")
    assert len({line["id"] for line in lines}) == 2


def test_the_share_of_copies(proxy: Proxy, candidate: StreamingServer) -> None:
    """Of requests, drawn anew for each."""
    proxy.script("shadow", "30")
    with connect(proxy.port) as kept:
        assert {ask(proxy.port, kept=kept).who for _ in range(300)} == {"baseline"}
    with connect(proxy.port) as kept:  # what was accepted before this, was before this at the candidate
        ask(proxy.port, kept=kept)
    until(lambda: probable(len(candidate.asked), 300, 0.3), "so many copies")
    assert all(asked.json["stream"] is False for asked in candidate.asked)


def test_a_client_stays_where_it_is(proxy: Proxy) -> None:
    """By conversation, key or address; a share that grows keeps whom it had."""
    sides = []
    for percent, share in (("10", 0.1), ("40", 0.4)):
        assert proxy.script("canary", percent).returncode == 0
        found = [side_of(proxy, {"X-Conversation-Id": str(n), "Authorization": "one for all"}) for n in range(200)]
        assert probable(found.count("candidate"), 200, share)
        assert found[:20] == [side_of(proxy, {"X-Conversation-Id": str(n), "X-Api-Key": "x"}) for n in range(20)]
        sides.append({n for n, side in enumerate(found) if side == "candidate"})
    assert sides[0] < sides[1]
    for header in ("Authorization", "X-Api-Key"):
        by_key = [[side_of(proxy, {header: f"key {n}"}) for n in range(30)] for _ in range(2)]
        assert by_key[0] == by_key[1]
        assert set(by_key[0]) == {"baseline", "candidate"}
    assert len({side_of(proxy, {}) for _ in range(10)}) == 1
    proxy.script("canary", "100")
    assert side_of(proxy, {}) == "candidate"
    proxy.script("canary", "0")
    assert side_of(proxy, {"X-Conversation-Id": str(min(sides[0]))}) == "baseline"


def test_what_the_candidate_answers_is_not_copied_to_it(proxy: Proxy, candidate: StreamingServer) -> None:
    """A canary's requests are asked once."""
    proxy.script("shadow", "100")
    proxy.script("canary", "100")
    for _ in range(5):
        assert ask(proxy.port).who == "candidate"
    assert len(candidate.asked) == 5
    assert not proxy.shadow_log.read_text(encoding="utf-8")


def test_a_candidate_that_hangs_holds_up_nobody(
    proxy: Proxy, baseline: StreamingServer, candidate: StreamingServer
) -> None:
    """Not the next request on the same connection; and no more copies wait than the guide says."""
    candidate.mood = "hangs"
    proxy.script("shadow", "100")
    with connect(proxy.port) as kept:
        for number in range(80):
            assert ask(proxy.port, {"messages": [], "stream": number % 2 == 0}, kept=kept).who == "baseline"
    until(lambda: len(candidate.asked) == 64, "64 copies wait")
    assert all(asked.ended is None for asked in candidate.asked)
    assert len(baseline.asked) == 80
    candidate.mood = "well"
    until(lambda: all(asked.ended == "whole" for asked in candidate.asked), "copies are answered, though late")


def test_a_candidate_that_is_not_there(proxy: Proxy, baseline: StreamingServer, candidate: StreamingServer) -> None:
    """Copies are lost; requests of the canary's clients are answered by the baseline; it is found again."""
    candidate.stop()
    proxy.script("shadow", "100")
    assert ask(proxy.port).who == "baseline"
    proxy.script("canary", "100")
    for _ in range(5):
        assert ask(proxy.port).who == "baseline"
    assert len(baseline.asked) == 6
    access = proxy.directory / "log" / "w4a8-access.log"
    until(lambda: access.read_bytes().count(b"\n") == 6, "requests are logged")
    lines = list(map(json.loads, access.read_text(encoding="utf-8").splitlines()))
    assert [line["side"] for line in lines] == ["baseline"] + ["candidate"] * 5  # which was to answer
    assert {re.split(", | : ", line["upstream"])[-1] for line in lines} == {f"127.0.0.1:{proxy.baseline}"}  # which did
    candidate.start()
    until(lambda: ask(proxy.port).who == "candidate", "the candidate answers again")


@pytest.mark.parametrize("side", ["baseline", "candidate"])
def test_what_breaks_in_the_middle_is_not_asked_again(
    proxy: Proxy, baseline: StreamingServer, candidate: StreamingServer, side: str
) -> None:
    """And does not look like a whole answer."""
    proxy.script("canary", "100" if side == "candidate" else "0")
    baseline.mood = candidate.mood = "breaks"
    with connect(proxy.port) as connection:
        response = send(connection, {"messages": [], "stream": True})
        assert f"{side} 0".encode() in response.readline()
        with pytest.raises(http.client.IncompleteRead):
            response.read()
    assert len(baseline.asked) + len(candidate.asked) == 1


def test_what_dies_before_it_answers_is_not_asked_again(
    proxy: Proxy, baseline: StreamingServer, candidate: StreamingServer
) -> None:
    """The request was sent, so it may have had effects; the client is told, and may ask again."""
    proxy.script("canary", "100")
    candidate.mood = "hangs"
    with connect(proxy.port) as connection:
        connection.request("POST", CHAT, b'{"messages": []}', {"Content-Type": "application/json"})
        until(lambda: candidate.asked, "the candidate is asked")
        candidate.stop()
        assert connection.getresponse().status == 502
    assert not baseline.asked
    assert ask(proxy.port).who == "baseline"


def test_a_client_that_hangs_up_ends_the_work(
    proxy: Proxy, baseline: StreamingServer, candidate: StreamingServer
) -> None:
    """At the server that it asked; a copy is answered to its end."""
    proxy.script("shadow", "100")
    baseline.mood, candidate.seconds = "hangs", 0.3
    with connect(proxy.port) as connection:
        connection.request("POST", CHAT, b'{"messages": []}', {"Content-Type": "application/json"})
        until(lambda: baseline.asked and candidate.asked, "both are asked")
    until(lambda: baseline.asked[0].ended == "aborted", "the baseline hears of it")
    until(lambda: candidate.asked[0].ended == "whole", "the copy is answered")


def test_only_what_clients_need_is_passed_on(proxy: Proxy, baseline: StreamingServer) -> None:
    """Health and models, but neither metrics nor what operates a server."""
    with connect(proxy.port) as kept:
        for method, path, status in (
            ("GET", "/health", 200),
            ("GET", "/v1/models", 200),
            ("GET", CHAT, 200),
            ("GET", "/metrics", 404),
            ("POST", "/sleep", 404),
            ("POST", "/v1/load_lora_adapter", 404),
            ("POST", "/v1/chat/completions/batch", 404),
            ("POST", "/inference/v1/generate", 404),
            ("POST", "/_w4a8_copy", 404),
        ):
            kept.request(method, path, b"{}" if method == "POST" else None)
            response = kept.getresponse()
            response.read()
            assert response.status == status, path
    assert not baseline.asked


def test_without_sight_of_the_flag_the_baseline_answers(
    tmp_path: Path, baseline: StreamingServer, candidate: StreamingServer
) -> None:
    """Workers that may not see it, since somebody changed the directory's permissions, never ask the candidate."""
    with Proxy(tmp_path / "nginx", baseline.port, candidate.port, user="nobody nogroup") as proxy:
        proxy.script("canary", "50")
        proxy.script("shadow", "100")
        proxy.settings.chmod(0)
        assert {side_of(proxy, {"X-Conversation-Id": str(n)}) for n in range(20)} == {"baseline"}
        proxy.settings.chmod(0o755)
    assert not candidate.asked


def test_the_script_refuses_what_nginx_would(proxy: Proxy) -> None:
    """And what nginx refuses for another reason changes nothing."""
    for arguments in (
        ["canary", "101"],
        ["canary", "-1"],
        ["shadow", "0.001"],
        ["shadow"],
        ["canary", "5%"],
        ["on"],
        [],
    ):
        result = proxy.script(*arguments)
        assert (result.returncode, result.stdout) == (1, "")
        assert result.stderr.startswith("rollout.sh: ")
    assert proxy.script("canary", "0.25").stdout == "canary 0.25 %, shadow 0 %\n"
    assert proxy.script("shadow", "07").stdout == "canary 0.25 %, shadow 07 %\n"
    shares = (proxy.settings / "shares.conf").read_text(encoding="utf-8")
    servers = proxy.settings / "servers.conf"
    servers.write_text(servers.read_text(encoding="utf-8") + "nonsense;\n", encoding="utf-8")
    result = proxy.script("canary", "50")
    assert result.returncode == 1
    assert "nonsense" in result.stderr
    assert result.stderr.endswith("the shares are as they were\n")
    assert (proxy.settings / "shares.conf").read_text(encoding="utf-8") == shares
    assert {path.name for path in proxy.settings.iterdir()} == {
        path.name for path in (KIT / "nginx" / "w4a8").iterdir()
    } | {"go"}
    assert proxy.script("back").returncode == 0  # which needs no nginx that takes its configuration
    assert ask(proxy.port, headers={"X-Conversation-Id": "a"}).who == "baseline"


def test_the_shares_that_come_with_the_guide_are_none(proxy: Proxy) -> None:
    """They are what the script writes."""
    shipped = (KIT / "nginx" / "w4a8" / "shares.conf").read_text(encoding="utf-8")
    assert proxy.script("status").stdout == "canary 0 %, shadow 0 %\n"
    proxy.script("canary", "5")
    assert proxy.script("canary", "0").returncode == 0
    assert (proxy.settings / "shares.conf").read_text(encoding="utf-8") == shipped
