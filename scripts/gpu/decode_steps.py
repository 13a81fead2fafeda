"""What a GPU ran, as a profiler saw it, told apart by decode steps and by kernel.

Kernels overlap: with programmatic dependent launch one starts while the one before it still runs, and waits. So a
moment is the time of that kernel, of those that run, which ends first, and where none runs it is a gap: the times of a
step's kernels and gaps add up to the step.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import pairwise

CLASSES = {
    "experts": r"^_(prepare|grouped|activate|quantize_pairs|combine)_kernel|moe|Moe|expert|Expert|GroupProblemShape",
    "cache": r"reshape_and_cache|rotary|rope|triton_\w*(cat|split_with|cos|index_select_\d+)",
    "attention": r"flash|fmha|attention|attn",
    "gemms": r"^_gemm_kernel|humming|machete|marlin|GemmUniversal",
    "lm_head": r"nvjet|gemv|cublas|xmma|gemm|splitK",
    "activations": r"_quantize_kernel|quant|rsqrt|norm|silu|fp8|triton_\w*(mul|sigmoid)",
    "sampling": r"argmax|ArgMax|softmax|sampl|topk|reduce_kernel|logits",
}
"""Class → names of kernels, of which the first class that fits counts: routed experts and what sorts and adds up their
tokens, rotary embedding and cache, attention, GEMMs of layers, lm_head, norms with SwiGLU and quantization, sampling.
"""
REST, GAP = "rest", "gap"
MORE_STEPS = 8
"""Steps beyond those that a run needs: requests may begin one after the other."""


@dataclass(frozen=True)
class Event:
    """What ran on a GPU, by the profiler's clock in nanoseconds."""

    name: str
    begin: int
    end: int


def class_of(name: str) -> str:
    """Return the class of a kernel."""
    return next((group for group, names in CLASSES.items() if re.search(names, name)), REST)


def last_steps(events: Sequence[Event], steps: int, traced: int) -> list[Event]:
    """Return what ran in the last `steps` of about `traced` steps, from one step's end to another's.

    A step ends with the last of the kernels that ran once in each; that of the step before is the first event, cut to
    its last nanosecond. ValueError where no kernel ran once in each.
    """
    counts = Counter(event.name for event in events)
    once = {name for name, count in counts.items() if traced - 1 <= count <= traced + MORE_STEPS}
    if not once or traced <= steps:
        raise ValueError(f"no kernel ran once in each of {traced} steps: {counts.most_common(5)}")
    name = max(events, key=lambda event: (event.name in once, event.end)).name
    ends = sorted(event.end for event in events if event.name == name)
    begin, end = ends[-1 - steps], ends[-1]
    return [Event(name, begin - 1, begin), *(event for event in events if begin < event.end <= end)]


def times(events: Sequence[Event], steps: int) -> dict[str, tuple[float, float]]:
    """Return microseconds and launches a step of each kernel, and of the gaps. events: of so many whole steps."""
    found: dict[str, list[float]] = {GAP: [0.0, 0.0]}
    moments = sorted({*(event.begin for event in events), *(event.end for event in events)})
    waiting = sorted(events, key=lambda event: -event.begin)
    running: list[tuple[int, str]] = []
    gap = False
    for begin, end in pairwise(moments):
        while waiting and waiting[-1].begin <= begin:
            event = waiting.pop()
            heappush(running, (event.end, event.name))
            found.setdefault(event.name, [0.0, 0.0])[1] += 1
        while running and running[0][0] <= begin:
            heappop(running)
        found[running[0][1] if running else GAP][0] += end - begin
        found[GAP][1] += not running and not gap
        gap = not running
    return {name: (ns / 1e3 / steps, count / steps) for name, (ns, count) in found.items()}


def by_class(kernels: dict[str, tuple[float, float]]) -> dict[str, float]:
    """Return microseconds a step of each class of kernels, of the rest and of the gaps."""
    found = dict.fromkeys([*CLASSES, REST, GAP], 0.0)
    for name, (us, _) in kernels.items():
        found[GAP if name == GAP else class_of(name)] += us
    return found
