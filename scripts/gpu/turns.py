"""Engines that start side by side and then take turns, so that what is measured has the GPU to itself."""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any


def wait_for(turn: Path) -> None:
    """Say that this process is ready, and wait until it may go on."""
    _ready(turn).touch()
    while not turn.exists():
        time.sleep(0.1)


def _ready(turn: Path) -> Path:
    return turn.with_suffix(".ready")


def by_turns(
    names: Sequence[str],
    run: Callable[[str, Path], Any],
    patience: float = 3600,
    before: Callable[[], Any] = lambda: None,
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield each name with a function that returns what its engine found, or raises.

    run: starts an engine in a process of its own, which waits for the file it is given, and returns what that found.
    patience: seconds; engines that are not ready then go on starting while others are measured, and come last.
    before: is called, and waited for, before the first has its turn, while they start.
    """
    deadline = time.monotonic() + patience
    with tempfile.TemporaryDirectory(prefix="w4a8-turns-") as directory, ThreadPoolExecutor(len(names)) as pool:
        turns = {name: Path(directory) / f"{number}.turn" for number, name in enumerate(names)}
        running: dict[str, Future[Any]] = {name: pool.submit(run, name, turn) for name, turn in turns.items()}
        before()

        def missing() -> list[str]:
            return [name for name, turn in turns.items() if not (running[name].done() or _ready(turn).exists())]

        while missing() and time.monotonic() < deadline:
            time.sleep(0.1)
        late = missing()
        print(f"ready or failed: {[name for name in names if name not in late]}, not yet: {late}", flush=True)
        for name in [name for name in names if name not in late] + late:
            turns[name].touch()
            running[name].exception()  # waits for it
            yield name, running[name].result
