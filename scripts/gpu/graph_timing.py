"""How long a call takes on a GPU, without what the host needs to launch it."""

import math
import statistics
from collections.abc import Callable, Sequence
from functools import cache, partial

import torch

Call = Callable[[], torch.Tensor]

REPLAYS = 21


def microseconds(calls: Sequence[Call], least: int = 1, replays: int = REPLAYS) -> float:
    """Return the median time of one of these calls, which follow each other in a CUDA graph, outputs in other memory.

    least: how many calls the graph has at least, by repeating all. replays: of the graph, of which the first does not
        count.
    """
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    repeats = max(1, math.ceil(least / len(calls)))
    with torch.cuda.graph(graph):
        outputs = [call() for _ in range(repeats) for call in calls]
    times: list[float] = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(outputs))
    del graph, outputs
    return statistics.median(times[1:])


@cache
def bytes_per_microsecond() -> float:
    """Return how fast a reduction of 2 GiB reads."""
    numbers = torch.ones(1 << 29, dtype=torch.float32, device="cuda")
    return numbers.nbytes / microseconds([partial(torch.sum, numbers)] * 2, 12)
