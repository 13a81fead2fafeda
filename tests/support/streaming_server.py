"""A small OpenAI-style server that streams token by token, counts what it was asked, and can hang, break or die."""

import contextlib
import json
import select
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, Self

Mood = Literal["well", "hangs", "breaks"]


@dataclass
class Asked:
    """One request. body: as it came. ended: how it went for the server; None while it works."""

    path: str
    body: bytes
    headers: dict[str, str]
    ended: Literal["whole", "aborted"] | None = None

    @property
    def json(self) -> dict[str, Any]:
        """The body, as Python's json (and so vLLM) reads it."""
        found: dict[str, Any] = json.loads(self.body)
        return found


@dataclass
class StreamingServer:
    """name: its answers say it. tokens, seconds: of an answer, and between two of its tokens."""

    name: str
    tokens: int = 3
    seconds: float = 0.0
    mood: Mood = "well"
    asked: list[Asked] = field(default_factory=list)
    port: int = 0
    _server: ThreadingHTTPServer | None = None
    _connections: set[socket.socket] = field(default_factory=set)

    def start(self) -> Self:
        """Listen, on the same port as before if it was stopped."""
        self._server = _server(self)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def stop(self) -> None:
        """Close everything, as a process does that is killed: clients see resets."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
        for connection in list(self._connections):
            with contextlib.suppress(OSError):  # closed already
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.shutdown(socket.SHUT_RDWR)
                connection.close()

    def __enter__(self) -> Self:
        """Start."""
        return self.start()

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self.stop()


def _server(state: StreamingServer) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            super().setup()
            state._connections.add(self.connection)

        def finish(self) -> None:
            with contextlib.suppress(OSError):
                super().finish()
            state._connections.discard(self.connection)

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            self._reply(json.dumps({"object": "list", "data": [{"id": state.name, "object": "model"}]}).encode())

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            asked = Asked(self.path, body, dict(self.headers.items()))
            state.asked.append(asked)
            try:
                self._answer(asked)
                asked.ended = "whole"
            except OSError:
                asked.ended = "aborted"
                self.close_connection = True

        def _answer(self, asked: Asked) -> None:
            try:
                stream = bool(asked.json.get("stream"))
            except ValueError:
                self._reply(b'{"error": {"message": "no JSON"}}', 400)
                return
            pieces = [f"{state.name} {number} " for number in range(state.tokens)]
            if not stream:
                for _ in pieces:
                    self._pause()
                self._reply(json.dumps({"choices": [{"message": {"content": "".join(pieces)}}]}).encode())
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            chunked = self.request_version != "HTTP/1.0"  # as uvicorn does it
            if chunked:
                self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for number, piece in enumerate(pieces):
                self._chunk(json.dumps({"choices": [{"delta": {"content": piece}}]}), chunked)
                if state.mood == "breaks" and number == 1:
                    raise ConnectionError("broken in the middle, as was wanted")
                self._pause()
            self._chunk("[DONE]", chunked)
            if chunked:
                self.wfile.write(b"0\r\n\r\n")

        def _pause(self) -> None:
            """Wait as long as a token takes; raise if the client hangs up meanwhile, or the server is stopped."""
            end = time.monotonic() + state.seconds
            while state.mood == "hangs" or time.monotonic() < end:
                left = 0.05 if state.mood == "hangs" else end - time.monotonic()
                readable, _, _ = select.select([self.connection], [], [], max(0, min(left, 0.05)))
                if readable and not self.connection.recv(1, socket.MSG_PEEK):
                    raise ConnectionError("the client is gone")

        def _chunk(self, text: str, chunked: bool) -> None:
            data = f"data: {text}\n\n".encode()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data) if chunked else data)
            self.wfile.flush()

        def _reply(self, body: bytes, status: int = 200) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 256

        def handle_error(self, *_: Any) -> None:
            pass  # a client that hung up

    return Server(("127.0.0.1", state.port), Handler)
