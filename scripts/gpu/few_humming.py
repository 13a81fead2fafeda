"""A plugin for vLLM that spares humming most of its compiling: about 100 kernels for each dense layer's shape.

humming has a kernel for each of many ranges of batch sizes. Those that a benchmark does not come to are left out, and
their sizes go to the next range: what is measured runs as it would, and starts minutes earlier. Both layers of experts
get the same ranges, which end at the sizes themselves, since vLLM sorts tokens once for the two of them.
"""

import os
from collections.abc import Sequence
from typing import Any

SETTING = "W4A8_BENCH_TOKENS"
"""The environment variable with the batch sizes that will be measured, such as 1,8,8192."""
CHOICES = "W4A8_BENCH_CHOICES"
"""The environment variable with the number of experts that a token has: humming counts pairs of the two."""
MORE = "few_humming:register"
"""The entry point."""


def thinned(ranges: Sequence[Sequence[Any]], sizes: Sequence[int]) -> list[list[Any]]:
    """Return those ranges (more than a, at most b, what is used there) that have a size, grown to cover the others."""
    kept = [
        entry for i, entry in enumerate(ranges) if i == len(ranges) - 1 or any(entry[0] < m <= entry[1] for m in sizes)
    ]
    starts = [ranges[0][0], *(entry[1] for entry in kept[:-1])]
    return [[start, *entry[1:]] for start, entry in zip(starts, kept, strict=True)]


def ending_at(ranges: Sequence[Sequence[Any]], sizes: Sequence[int]) -> list[list[Any]]:
    """Return a range up to each size, as what is used there says, and one for what is beyond, as the last one says."""
    starts = [ranges[0][0], *sizes]
    used = [next(entry for entry in ranges if entry[0] < m <= entry[1]) for m in sizes]
    last = ranges[-1]
    return [
        *([start, m, *entry[2:]] for start, m, entry in zip(starts, sizes, used, strict=False)),
        [starts[-1], *last[1:]],
    ]


def register() -> None:
    """Let humming's heuristics answer with fewer ranges; nothing where it is not installed."""
    try:
        from humming.tune.base import DeviceHeuristics
    except ImportError:
        return
    sizes = [int(word) for word in os.environ[SETTING].split(",")]
    all_of_them = DeviceHeuristics.get_configs.__func__

    def get_configs(cls: type, /, **arguments: Any) -> Any:
        found = all_of_them(cls, **arguments)
        layer = arguments.get("meta") or arguments["layer_config"]
        if layer.num_experts:
            return ending_at(found, [m * int(os.environ[CHOICES]) for m in sizes])
        return thinned(found, sizes)

    DeviceHeuristics.get_configs = classmethod(get_configs)
