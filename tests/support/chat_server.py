"""A small OpenAI-compatible server that says, or fails to say, what a test wants."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Request = dict[str, Any]


@dataclass
class Behaviour:
    """What the server does. answer: the text for a prompt. failure: the name of a failure, or nothing, for a prompt.

    failures: a number (status), "hang", "cut" (no finish_reason), "drop" (connection closed), "garbage", "error"; an
    object: the chunk that comes instead of the end; bytes: the event that comes instead of the answer.
    metrics: what /metrics says. logprobs: for token ids, vLLM's prompt_logprobs. refuses: fields that are refused.
    listing: what /v1/models says, if not `models`.
    """

    answer: Callable[[str], str] = lambda prompt: f"answer to {prompt}"
    calls: Callable[[str], list[dict[str, str]]] = lambda _prompt: []
    failure: Callable[[str], Any] = lambda _prompt: None
    usage: bool = True
    token_ids: bool = False
    metrics: str | None = None
    logprobs: Callable[[list[int]], Any] | None = None
    refuses: tuple[str, ...] = ()
    models: tuple[str, ...] = ("model",)
    listing: Any = None
    seen: list[Request] = field(default_factory=list)


@contextmanager
def chat_server(behaviour: Behaviour) -> Iterator[str]:
    """Serve within the block; yields the URL."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            if self.path == "/v1/models":
                listed = [{"id": name, "object": "model"} for name in behaviour.models]
                self._reply(200, {"object": "list", "data": listed} if behaviour.listing is None else behaviour.listing)
            elif self.path == "/metrics" and behaviour.metrics is not None:
                self._reply(200, behaviour.metrics)
            else:
                self._reply(404, {"error": {"message": "no such page"}})

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            behaviour.seen.append(request)
            odd = [name for name in behaviour.refuses if name in request]
            if odd:
                self._reply(422, {"detail": f"Unexpected fields in the request: {odd[0]}"})
            elif "prompt_logprobs" in request:
                self._score(request)
            else:
                self._stream(request)

        def _score(self, request: Request) -> None:
            if behaviour.logprobs is None:
                self._reply(400, {"error": {"message": "prompt_logprobs is not supported"}})
                return
            choice: dict[str, Any] = {"index": 0, "text": "", "finish_reason": "length"}
            choice["prompt_logprobs"] = behaviour.logprobs(request["prompt"])
            self._reply(
                200, {"id": "x", "object": "text_completion", "created": 1, "model": "model", "choices": [choice]}
            )

        def _stream(self, request: Request) -> None:
            chat = "messages" in request
            prompt = request["messages"][-1]["content"] if chat else request["prompt"]
            failure = behaviour.failure(prompt)
            if isinstance(failure, int):
                self._reply(failure, {"error": {"message": f"status {failure} was wanted"}})
                return
            if failure == "drop":
                self.close_connection = True
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            if failure == "garbage" or isinstance(failure, bytes):
                self.wfile.write(b"data: " + (failure if isinstance(failure, bytes) else b"{not json") + b"\n\n")
                return
            if failure == "error":
                self._chunk({"error": {"message": "the engine is dead", "type": "server_error", "code": 500}})
                return
            words = behaviour.answer(prompt).split(" ")
            for number, word in enumerate(words):
                piece = word if number == len(words) - 1 else word + " "
                part = {"delta": {"content": piece}} if chat else {"text": piece}
                extra = {"token_ids": [100 + number]} if behaviour.token_ids else {}
                first = {"prompt_token_ids": [1, 2]} if behaviour.token_ids and number == 0 else {}
                self._chunk({"choices": [{"index": 0, "finish_reason": None, **part, **extra, **first}]})
                if failure == "cut":
                    return
                if failure == "hang":
                    time.sleep(30)
            for number, call in enumerate(behaviour.calls(prompt)):
                part_of_call = {"index": number, "id": "c", "type": "function", "function": call}
                self._chunk({"choices": [{"index": 0, "finish_reason": None, "delta": {"tool_calls": [part_of_call]}}]})
            if isinstance(failure, dict):
                self._chunk(failure)
                return
            end: dict[str, Any] = {"delta": {}} if chat else {"text": ""}
            self._chunk({"choices": [{"index": 0, "finish_reason": "stop", **end}]})
            if behaviour.usage:
                usage = {"prompt_tokens": 2, "completion_tokens": len(words), "total_tokens": 2 + len(words)}
                self._chunk({"choices": [], "usage": usage})
            self.wfile.write(b"data: [DONE]\n\n")

        def _chunk(self, content: dict[str, Any]) -> None:
            common = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "model"}
            self.wfile.write(b"data: " + json.dumps(common | content).encode() + b"\n\n")
            self.wfile.flush()

        def _reply(self, status: int, content: Any) -> None:
            body = (content if isinstance(content, str) else json.dumps(content)).encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/plain" if isinstance(content, str) else "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            pass  # a client that hung up

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
