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


def by_turns(names: Sequence[str], run: Callable[[str, Path], Any]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield each name with a function that returns what its engine found, or raises.

    run: starts an engine in a process of its own, which waits for the file it is given, and returns what that found.
    """
    with tempfile.TemporaryDirectory(prefix="w4a8-turns-") as directory, ThreadPoolExecutor(len(names)) as pool:
        turns = {name: Path(directory) / f"{number}.turn" for number, name in enumerate(names)}
        running: dict[str, Future[Any]] = {name: pool.submit(run, name, turn) for name, turn in turns.items()}
        while not all(running[name].done() or _ready(turn).exists() for name, turn in turns.items()):
            time.sleep(0.1)
        print(f"all are ready, or have failed: {time.strftime('%X')}", flush=True)
        for name, turn in turns.items():
            turn.touch()
            running[name].exception()  # waits for it
            yield name, running[name].result
