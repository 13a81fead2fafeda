"""Memory that is used again: nothing that is in use is given away, and what was used once is not asked for anew."""

import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from convert_w4a8.checkpoint.arena import Arena, Arenas
from convert_w4a8.checkpoint.safetensors_file import read_header, read_tensor


def test_an_arena_serves_one_layer_after_another(tmp_path: Path) -> None:
    """Tensors that live at the same time share no byte; after `clear` the same memory comes again, grown once."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{i}": torch.randint(-(2**31), 2**31, (1000 + i,), generator=generator, dtype=torch.int32) for i in range(5)
    }
    save_file(tensors, tmp_path / "a.safetensors")
    infos = read_header(tmp_path / "a.safetensors")[1]
    arena, places = Arena(), []
    for _ in range(3):
        arena.clear()
        found = {name: read_tensor(infos[name], arena) for name in tensors}
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
        assert all(tensor.data_ptr() % 64 == 0 for tensor in found.values())
        places.append([tensor.untyped_storage().data_ptr() for tensor in found.values()])
    assert len(set(places[0])) == len(tensors)
    assert len(set(places[1])) == 1
    assert places[1] == places[2]


def take(arenas: Arenas, nbytes: int) -> Arena:
    """Lend an arena for some bytes; return it when it is free again."""
    with arenas.lend() as arena:
        arena.take(nbytes)
    return arena


def test_threads_do_not_share_an_arena() -> None:
    """As many arenas as are lent at a time, and no more; one that comes back is lent again."""
    arenas = Arenas()
    barrier = threading.Barrier(3)
    lent: list[list[int]] = [[], [], []]

    def work(number: int) -> None:
        for _ in range(20):
            with arenas.lend() as arena:
                lent[number].append(id(arena))
                barrier.wait(10)  # all three have one now

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rounds = list(zip(*lent, strict=True))
    assert len(rounds) == 20
    assert all(len(set(ids)) == 3 for ids in rounds)
    assert len({one for ids in rounds for one in ids}) == 3


def test_the_largest_free_arena_is_lent() -> None:
    """A large layer after a small one must not make a second arena grow."""
    arenas = Arenas()
    with arenas.lend() as first, arenas.lend() as second:
        first.take(1000)
        second.take(100_000)
    for _ in range(3):
        assert take(arenas, 64) is second
    assert (len(first), len(second)) == (1024, 100_032)


def test_an_arena_comes_back_after_an_error() -> None:
    """A layer that is damaged costs no memory, and leaves the arena cleared."""
    arenas = Arenas()
    lent: list[Arena] = []

    def fail() -> None:
        with arenas.lend() as arena:
            lent.append(arena)
            arena.take(4096)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    (arena,) = lent
    with arenas.lend() as again:
        assert again is arena
        assert len(again) == 4096
        start = again.take(64).data_ptr()
    assert start == arena.take(1).data_ptr()
