"""The order in which jobs run, and how many of them at a time."""

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from convert_w4a8.conversion import jobs
from convert_w4a8.conversion.jobs import Job, run_jobs

WORKERS = pytest.mark.parametrize("workers", [1, 2, 4])


class Recorder:
    """Makes jobs that note what ran beside them."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.beside: list[list[tuple[str, int, str]]] = []
        self._running: list[tuple[str, int, str]] = []
        self._lock = threading.Lock()

    def job(self, name: str, memory: int = 1, file: str = "a") -> Job:
        """Return a job that takes a moment."""

        def run() -> None:
            with self._lock:
                self.begun.append(name)
                self._running.append((name, memory, file))
                self.beside.append(list(self._running))
            time.sleep(0.002)
            with self._lock:
                self._running.remove((name, memory, file))

        return Job(run, memory, file)


@WORKERS
def test_every_job_runs_once_and_no_more_than_fit(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small jobs share the memory; one that is larger than all of it runs alone."""
    monkeypatch.setattr(jobs, "_MAX_WORKERS", workers)
    monkeypatch.setattr(jobs, "MEMORY_BYTES", 100)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    recorder = Recorder()
    sizes = [30, 60, 30, 500, 99, 1, 30, 30, 30, 100] * 3
    run_jobs(recorder.job(str(i), size, f"{i // 10}") for i, size in enumerate(sizes))
    assert sorted(recorder.begun, key=int) == [str(i) for i in range(30)]
    for running in recorder.beside:
        assert len(running) <= workers
        assert len(running) == 1 or sum(memory for _, memory, _ in running) <= 100
    assert any(len(running) > 1 for running in recorder.beside) == (workers > 1)


def test_one_worker_keeps_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """File after file."""
    monkeypatch.setattr(jobs, "_MAX_WORKERS", 1)
    recorder = Recorder()
    names = [f"{file}{i}" for file in "abc" for i in range(5)]
    run_jobs([recorder.job(name, file=name[0]) for name in names])
    assert recorder.begun == names


@pytest.mark.parametrize("workers", [2, 4])
def test_threads_write_to_two_files_and_no_third(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next file but one waits until the first is through, so that little is lost when a conversion ends early."""
    monkeypatch.setattr(jobs, "_MAX_WORKERS", workers)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    recorder = Recorder()
    run_jobs([recorder.job(f"{file}{i}", file=file) for file in "abcd" for i in range(8)])
    together = [{file for _, _, file in running} for running in recorder.beside]
    assert {"a", "b"} in together
    assert all(len(files) <= 3 for files in together)  # a file's last job may still run when the next but one begins
    begun = {name: place for place, name in enumerate(recorder.begun)}  # threads may overtake each other as they begin
    assert begun["c0"] + workers > min(begun["a7"], begun["b7"])
    assert begun["d0"] + workers > begun["a7"]


def test_jobs_are_asked_for_when_their_file_comes() -> None:
    """A million jobs do not wait in memory: only those of the next two files, and the first of the one behind them."""
    drawn: list[str] = []
    ahead: list[int] = []

    def jobs_of_files() -> Iterator[Job]:
        for file in "abcdef":
            for number in range(10):
                drawn.append(f"{file}{number}")
                yield Job(lambda: ahead.append(len(drawn) - len(ahead)), 1, file)

    with jobs.use_workers(1):
        run_jobs(jobs_of_files())
    assert len(ahead) == 60
    assert max(ahead) <= 22


def test_torch_uses_one_thread_each_and_as_many_as_before_afterwards() -> None:
    """An error changes nothing about that."""
    before, seen = torch.get_num_threads(), []

    def failing() -> None:
        seen.append(torch.get_num_threads())
        raise ZeroDivisionError

    torch.set_num_threads(2)
    try:
        with pytest.raises(ZeroDivisionError):
            run_jobs([Job(failing, 1, "a")])
        assert seen == [1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
