"""OpenAI's own client and the proxy: streams, the error of the cap, and reloads while it keeps connections."""

import threading
from typing import Any

import pytest
from rollout_proxy import Proxy, until
from streaming_server import StreamingServer

MESSAGES: Any = [{"role": "user", "content": "a"}]


@pytest.fixture
def openai() -> Any:
    """Return the package."""
    return pytest.importorskip("openai", reason="the extra `evaluate` is not installed")


def test_the_error_of_the_cap(openai: Any, proxy: Proxy) -> None:
    """It is a bad request, with a message and the name of what is wrong."""
    with openai.OpenAI(base_url=f"http://127.0.0.1:{proxy.port}/v1", api_key="none") as client:
        with pytest.raises(openai.BadRequestError, match="max_tokens must be a number of at most 2048") as raised:
            client.chat.completions.create(model="m", messages=MESSAGES, max_tokens=5000)
        assert raised.value.param == "max_tokens"


def test_reloads_go_unnoticed(openai: Any, proxy: Proxy, baseline: StreamingServer, candidate: StreamingServer) -> None:
    """With its settings as they are: it opens another connection where one was closed."""
    baseline.seconds = candidate.seconds = 0.002
    stop, seen, failed = threading.Event(), [0] * 4, list[BaseException]()

    def ask(number: int) -> None:
        try:
            with openai.OpenAI(base_url=f"http://127.0.0.1:{proxy.port}/v1", api_key="none") as client:
                while not stop.is_set():
                    chunks = list(client.chat.completions.create(model="m", messages=MESSAGES, stream=True))
                    assert len(chunks) == 3
                    seen[number] += 1
        except BaseException as error:  # noqa: BLE001 - whatever it is, the test is to fail with it
            failed.append(error)

    threads = [threading.Thread(target=ask, args=(number,), daemon=True) for number in range(len(seen))]
    for thread in threads:
        thread.start()
    for percent in ("10", "50", "100", "0", "100", "0"):
        before = sum(seen)
        assert proxy.script("canary", percent).returncode == 0
        until(lambda before=before: failed or sum(seen) > before + 20, "answers")  # type: ignore[misc]
    stop.set()
    for thread in threads:
        thread.join(60)
    assert not failed
    assert all(seen)
    assert candidate.asked
