"""What clients of the proxy do: ask, over a connection that they may keep, and read streams to their end."""

import http.client
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Self

CHAT = "/v1/chat/completions"
SECONDS = 60.0
"""Until a client gives up."""


@dataclass(frozen=True)
class Reply:
    """status, and the whole body."""

    status: int
    body: bytes

    @property
    def who(self) -> str:
        """The name of the server that answered with 200, from the first of its tokens."""
        assert self.status == 200, (self.status, self.body)
        return self.body.decode().split('"content": "')[1].split(" ")[0]


def connect(port: int) -> "closing[http.client.HTTPConnection]":
    """Return a connection, to be closed at the end of the block."""
    return closing(http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS))


def send(
    connection: http.client.HTTPConnection, body: Any, path: str = CHAT, headers: dict[str, str] | None = None
) -> http.client.HTTPResponse:
    """Send a request, its body as JSON or as bytes; return what has come when the headers have."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", path, data, {"Content-Type": "application/json"} | (headers or {}))
    return connection.getresponse()


def ask(
    port: int,
    body: Any = None,
    path: str = CHAT,
    headers: dict[str, str] | None = None,
    kept: http.client.HTTPConnection | None = None,
) -> Reply:
    """Ask and read all of the answer: over a connection of its own, or one that is kept."""
    body = {"messages": []} if body is None else body
    if kept is not None:
        response = send(kept, body, path, headers)
        return Reply(response.status, response.read())
    with connect(port) as connection:
        response = send(connection, body, path, headers)
        return Reply(response.status, response.read())


@dataclass
class Load:
    """Clients that ask without a pause, every second one for a stream, each time as somebody else; within the block.

    answers: who gave how many. failures: whatever was no whole answer. kept: over one connection for each client;
    closed: how many of these the proxy had closed, and a new one was opened for the same request, as OpenAI's client
    does it.
    """

    port: int
    clients: int = 6
    kept: bool = False
    answers: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    closed: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> Self:
        """Begin."""
        self._threads = [threading.Thread(target=self._client, args=(n,), daemon=True) for n in range(self.clients)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End when all that was asked is answered."""
        self._stop.set()
        for thread in self._threads:
            thread.join(2 * SECONDS)

    def more(self, count: int, done: Callable[[], bool] = lambda: True) -> Counter[str]:
        """Wait until so many more were answered or have failed; return who gave how many of them."""
        before, end = self._seen(), time.monotonic() + 2 * SECONDS
        while (self._seen() - before).total() < count or not done():
            assert time.monotonic() < end, f"only {self._seen() - before}"
            time.sleep(0.01)
        return self._seen() - before

    def _seen(self) -> Counter[str]:
        with self._lock:
            return self.answers + Counter(failed=len(self.failures))

    def _client(self, number: int) -> None:
        with connect(self.port) as connection:
            asked = 0
            while not self._stop.is_set():
                asked += 1
                stream = asked % 2 == 0
                headers = {"X-Conversation-Id": f"{number}-{asked}"}
                try:
                    response = self._send(connection, {"messages": [], "stream": stream}, headers)
                    reply = Reply(response.status, response.read())
                    who = reply.who
                    if stream and not reply.body.endswith(b"data: [DONE]\n\n"):
                        who = self._failed("a stream without its end")
                except (OSError, http.client.HTTPException, AssertionError) as error:
                    connection.close()
                    self._failed(repr(error))
                    continue
                if not self.kept:
                    connection.close()
                if who:
                    with self._lock:
                        self.answers[who] += 1

    def _send(
        self, connection: http.client.HTTPConnection, body: Any, headers: dict[str, str]
    ) -> http.client.HTTPResponse:
        """Send, once more if the connection was kept and is closed now; what has begun to answer is not asked again."""
        kept = connection.sock is not None
        try:
            return send(connection, body, headers=headers)
        except ConnectionError:
            if not kept:
                raise
        with self._lock:
            self.closed += 1
        connection.close()
        return send(connection, body, headers=headers)

    def _failed(self, what: str) -> str:
        with self._lock:
            self.failures.append(what)
        return ""
