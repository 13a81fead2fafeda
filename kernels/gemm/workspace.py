"""What launches of the GEMMs share on a device: sums of parts of K, and counters of the blocks that left theirs."""

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Lock

import torch

_STREAMS = 64
COUNTERS = 4096
"""More than blocks that K is split for: a multiprocessor has several blocks long before."""
_arrivals: dict[torch.device, torch.Tensor] = {}
"""Counters of blocks that have arrived, int32 [_STREAMS, COUNTERS] a device, 0 between launches. Never freed: CUDA
graphs keep pointing at them."""
_slots: dict[torch.device, dict[int, int]] = {}
"""Of each stream of a device, which counters are its own. A CUDA graph keeps those of the stream on which it was
captured: two graphs of one stream may not be replayed at once on two streams."""
_lock = Lock()


@cache
def multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors a GPU has; 1 for other devices."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@cache
def is_hopper(device: torch.device) -> bool:
    """Whether a device is a GPU of compute capability 9.0."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def prepare(device: torch.device) -> None:
    """Allocate what launches on a device share. Not while a CUDA graph is captured: its memory is the graph's.

    A thread of its own does it: a server may have this one's allocations go to memory whose contents it will discard
    (vLLM's sleep mode does while weights are loaded), and counters must stay 0.
    """

    def allocate() -> torch.Tensor:
        counters = torch.zeros(_STREAMS, COUNTERS, dtype=torch.int32, device=device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return counters

    if device not in _arrivals:
        with ThreadPoolExecutor(1) as other:
            _arrivals[device] = other.submit(allocate).result()


def split(output: torch.Tensor, blocks: int, size: int, splits: int) -> tuple[int, torch.Tensor, torch.Tensor]:
    """Return how many parts of K a launch may have, where blocks leave their sums, and counters of those that did.

    blocks: of one part. size: float32 numbers that a block leaves. splits: the parts that are wished for; there is one,
    and `output` stands for what it does not use, where they are not, or where no counters are free.
    """
    counters = _counters(output.device, blocks) if splits > 1 else None
    if counters is None:
        return 1, output, output
    return splits, torch.empty(splits, blocks, size, dtype=torch.float32, device=output.device), counters


def _counters(device: torch.device, blocks: int) -> torch.Tensor | None:
    """Return counters that no launch on another stream uses; None where there are none, and K must not be split."""
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if not capturing:
        prepare(device)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    with _lock:
        slots = _slots.setdefault(device, {})
        slot = slots.setdefault(stream, len(slots))
    if device not in _arrivals or slot >= _STREAMS or blocks > COUNTERS:
        return None
    return _arrivals[device][slot]
