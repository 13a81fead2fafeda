"""A client of OpenAI-compatible servers: one streamed answer at a time, with the times of its tokens.

Every way in which a request can fail has a name, which stands at the beginning of `Answer.failure`:

dead: no connection, or it broke off · hung: no end within the time limit · 4xx, 5xx: the server's status ·
truncated: the stream ended without a reason to finish, or because the server gave up, or with what is not a stream ·
refused: an error within a stream.
"""

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from convert_w4a8.errors import ConvertError
from convert_w4a8.evaluation.answer import Answer, Side
from convert_w4a8.evaluation.library import library
from convert_w4a8.evaluation.prompts import Prompt
from convert_w4a8.evaluation.stream import ODD, Parts
from convert_w4a8.text import printable

_OPTIONAL: dict[str, Any] = {"stream_options": {"include_usage": True}, "return_token_ids": True}
"""What is asked for beyond the common core, and no more once a server refuses it by name."""

_SECRET = 8
"""Characters of a key; a shorter one is a word."""


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled, the same on both sides. samples: answers of each prompt, with seeds from 0 on."""

    max_tokens: int = 256
    samples: int = 1
    temperature: float = 0.0


def is_local(url: str) -> bool:
    """Whether a server is on this machine, where no proxy leads."""
    return urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")


def endpoint_url(url: str) -> str:
    """Return the address of a server's API, which ends in `/v1`."""
    base = url.rstrip("/")
    return base if base.endswith("/v1") else f"{base}/v1"


class Endpoint:
    """One side's server. Used as an asynchronous context manager.

    url: with or without `/v1`. model: as the server names it; None: the first that it lists. timeout: seconds that an
    answer may take. The key of the server is read from OPENAI_API_KEY.
    """

    def __init__(self, side: Side, url: str, model: str | None, timeout: float) -> None:
        self.side: Side = side
        self.base_url = endpoint_url(url)
        self.model = model or ""
        self.timeout = timeout
        self._openai = library("openai", "openai")
        self._key = os.environ.get("OPENAI_API_KEY", "")
        self._client: Any = None
        self._refused: set[str] = set()

    async def __aenter__(self) -> Self:
        own = {"http_client": self._openai.DefaultAsyncHttpxClient(trust_env=False)} if is_local(self.base_url) else {}
        self._client = self._openai.AsyncOpenAI(
            base_url=self.base_url, api_key=self._key or "none", max_retries=0, timeout=self.timeout, **own
        )
        return self

    async def __aexit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        await self._client.close()

    async def find_model(self) -> None:
        """Ask the server for its model, unless one was named. Raises ConvertError where that fails."""
        if self.model:
            return
        try:
            async with asyncio.timeout(min(60.0, self.timeout)):
                listed = await self._client.models.list()
        except Exception as error:
            if not self._is_failure(error):
                raise
            remedy = "start the server, or check the address and OPENAI_API_KEY"
            raise ConvertError(f"{self.side} {self.base_url}", self._failure(error), remedy) from error
        models = getattr(listed, "data", None)
        names = [getattr(model, "id", None) for model in models] if isinstance(models, list) else []
        if not names or not isinstance(names[0], str) or not names[0]:
            raise ConvertError(f"{self.side} {self.base_url}", "lists no model", f"name one with --{self.side}-model")
        self.model = names[0]

    async def ask(self, prompt: Prompt, sample: int, sampling: Sampling) -> Answer:
        """Return the answer to a prompt; what fails is in it, by name."""
        blank = Answer(self.side, prompt.id, sample)
        while True:
            parts = Parts(blank)
            optional = {key: value for key, value in _OPTIONAL.items() if key not in self._refused}
            try:
                async with asyncio.timeout(self.timeout):
                    await self._stream(prompt, sample, sampling, parts, optional)
            except Exception as error:
                if self._learn(error, optional):
                    continue
                if not self._is_failure(error):
                    raise
                return replace(parts.whole(), failure=printable(self._failure(error)))
            why = parts.unfinished
            return replace(parts.whole(), failure=f"truncated: {why}" if why else None)

    async def score_tokens(self, token_ids: list[int], top: int) -> list[dict[str, Any] | None]:
        """Return vLLM's `prompt_logprobs` of a sequence: for each token {id: {"logprob", "rank", …}}.

        Raises ConvertError where the server does not give them, or fails.
        """
        try:
            async with asyncio.timeout(self.timeout):
                found = await self._client.completions.create(
                    model=self.model, prompt=token_ids, max_tokens=1, temperature=0, extra_body={"prompt_logprobs": top}
                )
        except Exception as error:
            if not self._is_failure(error):
                raise
            raise ConvertError(
                f"{self.side} {self.base_url}", f"gives no prompt_logprobs ({self._failure(error)})", ""
            ) from error
        listed = getattr(found.choices[0], "prompt_logprobs", None) if getattr(found, "choices", None) else None
        if not isinstance(listed, list) or len(listed) != len(token_ids):
            raise ConvertError(f"{self.side} {self.base_url}", "gives no prompt_logprobs", "")
        return listed

    async def _stream(
        self, prompt: Prompt, sample: int, sampling: Sampling, parts: Parts, optional: Mapping[str, Any]
    ) -> None:
        request: dict[str, Any] = {
            "model": self.model,
            "max_tokens": prompt.max_tokens or sampling.max_tokens,
            "temperature": sampling.temperature,
            "seed": sample,
            "stream": True,
        }
        extra = {**prompt.extra, **optional}
        started = time.perf_counter()
        if prompt.messages is None:
            stream = await self._client.completions.create(prompt=prompt.prompt, extra_body=extra, **request)
        else:
            if prompt.tools:
                request["tools"] = prompt.tools
            stream = await self._client.chat.completions.create(
                messages=[_as_sent(message) for message in prompt.messages], extra_body=extra, **request
            )
        async for chunk in _checked(stream):
            parts.take(chunk, time.perf_counter() - started)

    def _learn(self, error: Exception, sent: Mapping[str, Any]) -> bool:
        """Note what a server refuses by name; whether that was among what was sent, and may be left out."""
        if not isinstance(error, self._openai.APIStatusError) or error.status_code not in (400, 422):
            return False
        said = _said(error)
        found = {key for key in sent if key in said}
        self._refused |= found
        return bool(found)

    def _is_failure(self, error: Exception) -> bool:
        network = (self._openai.OpenAIError, TimeoutError, OSError, *ODD)
        return isinstance(error, network) or type(error).__module__.partition(".")[0].startswith("http")

    def _failure(self, error: Exception) -> str:
        """Name a failure; a server may say the key that it was shown."""
        named = self._named(error)
        return named.replace(self._key, "(the key)") if len(self._key) >= _SECRET else named

    def _named(self, error: Exception) -> str:
        if isinstance(error, TimeoutError | self._openai.APITimeoutError) or "Timeout" in type(error).__name__:
            return f"hung: no end of it within {self.timeout:g} s"
        if isinstance(error, self._openai.APIStatusError):
            return f"{error.status_code // 100}xx: status {error.status_code}, {_first_line(_said(error))}"
        if isinstance(error, ODD):
            return f"truncated: what came is not a stream of answers ({_first_line(str(error))})"
        if isinstance(error, self._openai.APIConnectionError):
            return f"dead: {_first_line(str(error.__cause__ or error))}"
        if isinstance(error, self._openai.APIError):
            return f"refused: {_first_line(error.message)}"
        return f"dead: {_first_line(str(error) or type(error).__name__)}"


async def _checked(stream: Any) -> AsyncIterator[Any]:
    if not hasattr(stream, "__aiter__"):
        raise TypeError(type(stream).__name__)
    async for chunk in stream:
        if not hasattr(chunk, "choices"):
            raise TypeError(str(chunk))
        yield chunk


def _as_sent(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message as the protocol has it: arguments of tool calls are JSON in a string."""
    if not isinstance(message.get("tool_calls"), list):
        return message
    calls = [
        {"type": "function", "id": f"call_{number}", **call} | {"function": _as_called(call["function"])}
        for number, call in enumerate(message["tool_calls"])
    ]
    return message | {"tool_calls": calls}


def _as_called(function: dict[str, Any]) -> dict[str, Any]:
    arguments = function.get("arguments")
    return function if isinstance(arguments, str) else function | {"arguments": json.dumps(arguments or {})}


def _said(error: Any) -> str:
    """Return what a server says of a status: its message, or all of what it sent."""
    body = error.body if isinstance(error.body, dict) else {}
    return str(body.get("message") or body.get("detail") or error.response.text or error.message)


def _first_line(text: str) -> str:
    return printable(text.strip().partition("\n")[0])[:300]
