"""Going back, and changing shares, while clients ask."""

from pathlib import Path

import pytest
from proxy_client import Load, ask
from rollout_proxy import Proxy, until
from streaming_server import StreamingServer

KEPT = pytest.mark.parametrize("kept", [False, True], ids=["new connections", "kept connections"])


@KEPT
def test_back_at_once_under_load(
    proxy: Proxy, baseline: StreamingServer, candidate: StreamingServer, kept: bool
) -> None:
    """Without the flag the candidate gets neither requests nor copies; what it began, it ends; nothing fails."""
    proxy.script("canary", "50")
    proxy.script("shadow", "100")
    baseline.seconds = candidate.seconds = 0.01
    with Load(proxy.port, kept=kept) as load:
        both = load.more(60)
        assert both["baseline"]
        assert both["candidate"]
        assert "ROLLED BACK" in proxy.script("back").stdout
        load.more(6 * load.clients)  # these include all that was asked before
        until(lambda: all(asked.ended for asked in candidate.asked), "the candidate ends what it began")
        asked = len(candidate.asked)
        assert set(+load.more(60)) == {"baseline"}
        assert len(candidate.asked) == asked
        assert proxy.script("forward").stdout == "canary 50 %, shadow 100 %\n"
        assert load.more(60)["candidate"]
    assert (load.failures, load.closed) == ([], 0)
    assert {asked.ended for asked in [*baseline.asked, *candidate.asked]} <= {"whole", None}


@KEPT
def test_reloads_under_load(proxy: Proxy, baseline: StreamingServer, candidate: StreamingServer, kept: bool) -> None:
    """Shares grow and shrink, a rollback with a reload among them; no request fails, or is asked twice.

    nginx 1.22 closes kept connections at a reload, some when a request is on its way; clients open another one.
    """
    baseline.seconds = candidate.seconds = 0.02
    with Load(proxy.port, kept=kept) as load:
        for words in ("shadow 50", "canary 10", "canary 50", "back", "shadow 50", "forward", "canary 100", "shadow 0"):
            assert proxy.script(*words.split()).returncode == 0
            load.more(20)
        load.more(6 * load.clients)
        assert set(+load.more(40)) == {"candidate"}
        proxy.script("back")
        proxy.script("canary", "0")
        load.more(6 * load.clients)
        assert set(+load.more(40)) == {"baseline"}
    assert load.failures == []
    assert kept or load.closed == 0
    assert len({asked.headers["X-Request-Id"] for asked in [*baseline.asked, *candidate.asked]}) == load.answers.total()


def test_the_candidate_is_killed_while_it_gets_copies(
    proxy: Proxy, baseline: StreamingServer, candidate: StreamingServer
) -> None:
    """Clients do not notice, neither when it goes nor when it is back."""
    proxy.script("shadow", "100")
    baseline.seconds, candidate.seconds = 0.01, 0.1
    with Load(proxy.port, kept=True) as load:
        load.more(60, done=lambda: len(candidate.asked) > 20)
        candidate.stop()
        load.more(100)
        asked = len(candidate.asked)
        candidate.start()
        load.more(20, done=lambda: len(candidate.asked) > asked)
    assert (load.failures, load.closed) == ([], 0)
    assert set(load.answers) == {"baseline"}
    assert len(baseline.asked) == load.answers.total()
    assert "aborted" in {asked.ended for asked in candidate.asked}  # it did die while it worked


def test_back_whatever_is_missing(proxy: Proxy, tmp_path: Path) -> None:
    """Without a file of shares it goes back nevertheless; a directory that nginx does not look at is no success."""
    proxy.script("canary", "100")
    assert ask(proxy.port).who == "candidate"
    (proxy.settings / "shares.conf").unlink()
    result = proxy.script("back")
    assert (result.returncode, "ROLLED BACK" in result.stdout, result.stderr) == (0, True, "")
    assert ask(proxy.port).who == "baseline"
    assert proxy.script("status").returncode == 1
    proxy.settings.rename(tmp_path / "elsewhere")
    result = proxy.script("back")
    assert (result.returncode, result.stdout) == (1, "")
    assert "NOTHING WENT BACK" in result.stderr
