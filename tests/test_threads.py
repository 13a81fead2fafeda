"""One thread an operation, from whatever thread, and as many as before when nobody needs that any more."""

import threading
from collections.abc import Iterator

import pytest
import torch

from convert_w4a8.threads import one_thread_each, side_by_side


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    """Let torch use three threads, and put its number back afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_it_may_be_nested() -> None:
    """The number comes back at the outermost end, also after an error."""

    def work() -> None:
        with one_thread_each() as before:
            assert before == 3
            with one_thread_each():
                assert torch.get_num_threads() == 1
            assert torch.get_num_threads() == 1
            raise KeyError

    with pytest.raises(KeyError):
        work()
    assert torch.get_num_threads() == 3


def test_a_thread_that_has_used_several_uses_one() -> None:
    """Each thread has a number of its own in torch."""
    seen = []

    def work() -> None:
        torch.ones(100_000).sum()
        seen.append(torch.get_num_threads())
        with one_thread_each():
            seen.append(torch.get_num_threads())

    with one_thread_each():
        pass
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [3, 1]


def test_parts_run_side_by_side_with_one_thread_each() -> None:
    """As many as torch may use threads: three that wait for each other come through."""
    barrier = threading.Barrier(3, timeout=20)
    numbers = []

    def work(part: int) -> None:
        barrier.wait()
        numbers.append((part, torch.get_num_threads()))

    side_by_side(work, range(3))
    assert sorted(numbers) == [(0, 1), (1, 1), (2, 1)]
    assert torch.get_num_threads() == 3


def test_inside_one_thread_they_run_in_turns() -> None:
    """In order, and the first error ends all."""
    done = []

    def work(part: int) -> None:
        if part == 2:
            raise ValueError(part)
        done.append(part)

    with one_thread_each(), pytest.raises(ValueError, match="2"):
        side_by_side(work, range(4))
    assert done == [0, 1]
    with pytest.raises(ValueError, match="2"):
        side_by_side(work, range(4))
    assert torch.get_num_threads() == 3
