"""vLLM's `/metrics`: how many tokens fit in the KV cache, how full it was, and preemptions.

The names are those of vLLM 0.25 and 0.33 (`vllm/v1/metrics/loggers.py`). A server with several engines (data parallel)
has a line for each: `kv_cache_size_tokens` is what fits in one engine, which counts layers of different kinds (windows,
Mamba) right; `num_gpu_blocks`, where there is no such label, are those of all engines in every line
(`vllm/v1/engine/core_client.py`).
"""

import asyncio
import http.client
import math
import re
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self

from convert_w4a8.evaluation.client import is_local

_SAMPLE = re.compile(r"([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+([^\s]+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_CACHE, _USAGE, _PREEMPTIONS = "vllm:cache_config_info", "vllm:kv_cache_usage_perc", "vllm:num_preemptions_total"
_QUERIES, _HITS = "vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total"
_COUNTED = (_PREEMPTIONS, _QUERIES, _HITS)
_SECONDS = 0.5
"""Between two looks at a server that works."""


@dataclass(frozen=True)
class Room:
    """What a server says of its KV cache. kv_tokens: that fit. usage: the largest share seen. missing: by name, why.

    preemptions: during the evaluation. prefix_queries, prefix_hits: tokens of prompts, and those that the prefix cache
    had, during the evaluation; None where the server does not count them.
    """

    kv_tokens: int | None = None
    usage: float | None = None
    preemptions: int | None = None
    missing: tuple[str, ...] = ()
    prefix_queries: int | None = None
    prefix_hits: int | None = None


def parse(text: str) -> Room:
    """Read the Prometheus text format; what is counted is counted since the server's start."""
    tokens: list[int] = []
    blocks: list[int] = []
    usage: list[float] = []
    counted: dict[str, float] = {}
    for name, labels, value in _samples(text):
        if name == _CACHE:
            with suppress(KeyError, ValueError):
                blocks.append(int(labels["num_gpu_blocks"]) * int(labels["block_size"]))
            with suppress(KeyError, ValueError):
                tokens.append(int(labels["kv_cache_size_tokens"]))
        elif name == _USAGE and math.isfinite(value):
            usage.append(value)
        elif name in _COUNTED:
            counted[name] = counted.get(name, 0.0) + value
    fit = sum(tokens) if tokens else max(blocks, default=None)
    missing = [
        name
        for name, found in ((_CACHE, blocks or tokens), (_USAGE, usage), (_PREEMPTIONS, _PREEMPTIONS in counted))
        if not found
    ]
    return Room(
        fit,
        max(usage, default=None),
        _whole(counted.get(_PREEMPTIONS)),
        tuple(f"{name} is not in /metrics" for name in missing),
        _whole(counted.get(_QUERIES)),
        _whole(counted.get(_HITS)),
    )


def _whole(number: float | None) -> int | None:
    return None if number is None or not math.isfinite(number) else int(number)


def _samples(text: str) -> Iterator[tuple[str, dict[str, str], float]]:
    for line in text.splitlines():
        match = _SAMPLE.match(line)
        if match:
            with suppress(ValueError):
                yield match[1], dict(_LABEL.findall(match[2] or "")), float(match[3])


class Watch:
    """Looks at a server's metrics while it works. base_url: that of the API, ending in `/v1`."""

    def __init__(self, base_url: str) -> None:
        self._url = base_url.removesuffix("/v1") + "/metrics"
        self._first: Room | None = None
        self._usage: float | None = None
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Begin."""
        self._first = await self._look()
        if self._first.usage is not None:
            self._task = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    async def result(self) -> Room:
        """Return what was seen."""
        first, last = self._first or Room(), await self._look()
        return Room(
            last.kv_tokens,
            self._usage,
            _less(last.preemptions, first.preemptions),
            last.missing,
            _less(last.prefix_queries, first.prefix_queries),
            _less(last.prefix_hits, first.prefix_hits),
        )

    async def _watch(self) -> None:
        while True:
            await self._look()
            await asyncio.sleep(_SECONDS)

    async def _look(self) -> Room:
        found = await asyncio.to_thread(_fetch, self._url)
        if found.usage is not None:
            self._usage = max(self._usage or 0.0, found.usage)
        return found


def _less(now: int | None, before: int | None) -> int | None:
    return None if now is None or before is None else now - before


def opener(url: str) -> urllib.request.OpenerDirector:
    """Return what opens a URL: through a proxy, where the environment names one, but for this machine."""
    return urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if is_local(url) else []))


def _fetch(url: str) -> Room:
    try:
        with opener(url).open(url, timeout=10) as response:
            return parse(response.read(1 << 24).decode(errors="replace"))
    except (OSError, ValueError, http.client.HTTPException) as error:
        return Room(missing=(f"/metrics cannot be read ({getattr(error, 'reason', None) or error})",))


def as_dict(room: Room) -> dict[str, Any]:
    """Return a JSON-ready dict."""
    return {
        "kv_tokens": room.kv_tokens,
        "kv_usage": room.usage,
        "preemptions": room.preemptions,
        "prefix_queries": room.prefix_queries,
        "prefix_hits": room.prefix_hits,
        "missing": list(room.missing),
    }


def merged(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> dict[str, Any]:
    """Return what two looks at a side's servers saw, one after the other, as one."""
    if before is None:
        return dict(now)
    usage = [found["kv_usage"] for found in (before, now) if found["kv_usage"] is not None]
    sums = {}
    for name in ("preemptions", "prefix_queries", "prefix_hits"):
        known = [found[name] for found in (before, now) if found[name] is not None]
        sums[name] = sum(known) if known else None
    return {
        "kv_tokens": now["kv_tokens"] if now["kv_tokens"] is not None else before["kv_tokens"],
        "kv_usage": max(usage, default=None),
        **sums,
        "missing": list(dict.fromkeys([*before["missing"], *now["missing"]])),
    }
