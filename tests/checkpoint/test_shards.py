"""Output files: which tensors lie in which, and one of them written in any order, from any thread."""

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from convert_w4a8.checkpoint import shards
from convert_w4a8.checkpoint.checksum import is_intact
from convert_w4a8.checkpoint.safetensors_file import DTYPE_NAMES, TensorSpec, layout_file
from convert_w4a8.checkpoint.shards import ShardPlan, ShardWriter, plan_shards
from convert_w4a8.errors import DiskError

TENSORS = {
    "b.weight": torch.arange(12, dtype=torch.int32).view(3, 4),
    "a.weight": torch.linspace(0, 1, 10).bfloat16(),
    "empty": torch.empty(0, 7),
    "scalar": torch.tensor(3.5, dtype=torch.float64),
    "scale": torch.arange(16, dtype=torch.uint8).view(torch.float8_e4m3fn).view(2, 8),
    "mask": torch.tensor([True, False, True]),
}


def plan_of(tensors: dict[str, torch.Tensor]) -> ShardPlan:
    """Return a plan of one file for some tensors."""
    specs = (TensorSpec(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items())
    return ShardPlan("model.safetensors", tuple(specs))


def write_all(directory: Path, tensors: dict[str, torch.Tensor]) -> ShardWriter:
    """Write tensors into a finished file; return what wrote it."""
    writer = ShardWriter(directory, plan_of(tensors))
    for name, tensor in tensors.items():
        writer.write(name, [tensor])
    writer.finish()
    return writer


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether dtype, shape and bytes are equal."""
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(
        a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)
    )


# Which tensors lie in which.


def test_no_header_is_longer_than_the_library_reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Many small tensors take more files, although the bytes would fit into one; names count in UTF-8."""
    monkeypatch.setattr(shards, "_HEADER_BYTES", 1000)
    specs = [TensorSpec(f"{name * 20}{i}", "U8", (2**62, 1)) for i, name in enumerate("aé😀" * 5)]
    plans = plan_shards(specs, 2**70)
    assert [spec for plan in plans for spec in plan.specs] == specs
    assert len(plans) > 1
    assert all(len(layout_file(tmp_path / "x", plan.specs)[0]) <= 1000 for plan in plans)


@given(sizes=st.lists(st.integers(0, 50), max_size=30), limit=st.integers(1, 100))
def test_shards_hold_every_tensor_once_in_order_under_the_limit(sizes: list[int], limit: int) -> None:
    """No tensor is lost, doubled or moved; a shard is over the limit only if it has a single tensor that is."""
    specs = [TensorSpec(f"t{i}", "U8", (size,)) for i, size in enumerate(sizes)]
    plans = plan_shards(specs, limit)
    assert [spec for plan in plans for spec in plan.specs] == specs
    for plan in plans:
        assert plan.nbytes == sum(spec.nbytes for spec in plan.specs)
        assert plan.nbytes <= limit or sum(spec.nbytes > 0 for spec in plan.specs) == 1
    names = [plan.file_name for plan in plans]
    if len(plans) == 1:
        assert names == ["model.safetensors"]
    else:
        assert names == [f"model-{i:05d}-of-{len(plans):05d}.safetensors" for i in range(1, len(plans) + 1)]
    for plan, following in itertools.pairwise(plans):
        assert plan.nbytes + following.specs[0].nbytes > limit


def test_a_tensor_that_fits_exactly_stays_in_the_shard() -> None:
    """The limit itself is allowed."""
    specs = [TensorSpec("a", "U8", (5,)), TensorSpec("b", "U8", (5,))]
    assert len(plan_shards(specs, 10)) == 1
    assert len(plan_shards(specs, 9)) == 2


# What is written.


def test_the_library_reads_what_was_written(tmp_path: Path) -> None:
    """Every tensor bit for bit, with the metadata that the field's tools expect; the size is the one foretold."""
    writer = write_all(tmp_path, TENSORS)
    with safe_open(writer.path, "pt") as handle:
        assert handle.metadata() == {"format": "pt"}
        found = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - not a dict
    assert found.keys() == TENSORS.keys()
    assert all(same_bytes(found[name], tensor) for name, tensor in TENSORS.items())
    assert writer.path.stat().st_size == writer.size


def test_the_order_of_writing_does_not_show(tmp_path: Path) -> None:
    """Whoever comes first: the same bytes."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    forwards = write_all(tmp_path / "a", TENSORS)
    backwards = ShardWriter(tmp_path / "b", plan_of(TENSORS))
    for name in reversed(TENSORS):
        backwards.write(name, [TENSORS[name]])
    backwards.finish()
    assert backwards.path.read_bytes() == forwards.path.read_bytes()


def test_the_last_tensor_is_told(tmp_path: Path) -> None:
    """`write` returns whether the file is complete, which the last tensor alone makes it."""
    writer = ShardWriter(tmp_path, plan_of(TENSORS))
    told = [writer.write(name, [tensor]) for name, tensor in TENSORS.items()]
    assert told == [False] * (len(TENSORS) - 1) + [True]
    writer.finish()


def test_a_tensor_is_written_once(tmp_path: Path) -> None:
    """A second tensor of a name is a bug of the caller, and does not make the file complete."""
    writer = ShardWriter(tmp_path, plan_of(TENSORS))
    writer.write("mask", [TENSORS["mask"]])
    with pytest.raises(KeyError, match="mask"):
        writer.write("mask", [TENSORS["mask"]])
    writer.close()


def test_tensors_that_are_not_contiguous_are_written_as_they_look(tmp_path: Path) -> None:
    """A transposed view is stored in the order of its own shape."""
    tensor = torch.arange(6, dtype=torch.int32).view(2, 3)
    writer = write_all(tmp_path, {"t": tensor.t()})
    assert torch.equal(load_file(writer.path)["t"], tensor.t())


@pytest.mark.parametrize("flat", [False, True], ids=["rows", "flat"])
@pytest.mark.parametrize("rows", [(3,), (1, 2), (0, 1, 0, 1, 1)], ids=str)
def test_a_tensor_may_come_in_parts(rows: tuple[int, ...], flat: bool, tmp_path: Path) -> None:
    """Parts lie one behind the other, rows or flat pieces of any length."""
    tensor = torch.arange(12, dtype=torch.int32).view(3, 4)
    parts = torch.split(tensor.flatten(), [4 * row for row in rows]) if flat else torch.split(tensor, list(rows))
    writer = ShardWriter(tmp_path, plan_of({"t": tensor}))
    writer.write("t", iter(parts))
    writer.finish()
    assert torch.equal(load_file(writer.path)["t"], tensor)


def test_a_tensor_without_bytes_may_come_in_no_parts(tmp_path: Path) -> None:
    """A copy of an empty tensor has no chunk; a file of nothing else is made all the same."""
    writer = ShardWriter(tmp_path, plan_of({"empty": torch.empty(0, 7)}))
    assert writer.write("empty", [])
    writer.finish()
    assert load_file(writer.path)["empty"].shape == (0, 7)


def test_a_file_without_tensors_is_made(tmp_path: Path) -> None:
    """A checkpoint may hold nothing."""
    assert load_file(write_all(tmp_path, {}).path) == {}


def test_many_threads_write_pieces_in_any_order(tmp_path: Path) -> None:
    """Whole tensors and pieces of tensors, from eight threads, land where they belong."""
    generator = torch.Generator().manual_seed(0)
    tensors = {f"t{i}": torch.randint(0, 256, (3001 + i,), dtype=torch.uint8, generator=generator) for i in range(60)}
    writer = ShardWriter(tmp_path, plan_of(tensors))

    def write(name: str) -> bool:
        return writer.write(name, [tensors[name]] if int(name[1:]) % 2 else torch.split(tensors[name], 500))

    with ThreadPoolExecutor(8) as pool:
        told = list(pool.map(write, reversed(tensors)))
    assert told.count(True) == 1
    pieces = writer.finish()
    found = load_file(writer.path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert is_intact(writer.path, pieces, writer.size)


def test_writing_goes_on_after_short_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An operating system that takes five bytes at a time still gets them all."""
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: whole(fd, data[:5], offset))
    found = load_file(write_all(tmp_path, TENSORS).path)
    assert all(same_bytes(found[name], tensor) for name, tensor in TENSORS.items())


def test_pieces_are_checksums_of_the_whole_file(tmp_path: Path) -> None:
    """Every byte belongs to one piece, the header too; another byte anywhere is noticed."""
    writer = ShardWriter(tmp_path, plan_of(TENSORS))
    for name, tensor in TENSORS.items():
        writer.write(name, [tensor])
    pieces = writer.finish()
    content = writer.path.read_bytes()
    assert is_intact(writer.path, pieces, writer.size)
    with writer.path.open("r+b", buffering=0) as file:
        for place, byte in enumerate(content):
            os.pwrite(file.fileno(), bytes([byte ^ 1]), place)
            assert not is_intact(writer.path, pieces, writer.size), place
            os.pwrite(file.fileno(), bytes([byte]), place)
    assert is_intact(writer.path, pieces, writer.size)


def test_a_file_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    """Another's file of the same name is nobody's to fill."""
    (tmp_path / "model.safetensors").write_bytes(b"another's")
    with pytest.raises(DiskError, match=r"model\.safetensors: cannot be written \(File exists\)"):
        write_all(tmp_path, TENSORS)
    assert (tmp_path / "model.safetensors").read_bytes() == b"another's"


# What is refused.


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(3, 4),
        torch.zeros(4, 3, dtype=torch.int32),
        torch.zeros(1, 3, 4, dtype=torch.int32),
        torch.zeros(2, 4, dtype=torch.int32),
        torch.zeros(4, 4, dtype=torch.int32),
        torch.zeros(11, dtype=torch.int32),
        torch.zeros(13, dtype=torch.int32),
    ],
    ids=["dtype", "transposed", "deeper", "short", "long", "short-and-flat", "long-and-flat"],
)
def test_a_tensor_that_differs_from_the_plan_is_a_bug(tensor: torch.Tensor, tmp_path: Path) -> None:
    """Dtype, shape and length must be the planned ones: the header is already written."""
    writer = ShardWriter(tmp_path, plan_of(TENSORS))
    with pytest.raises(ValueError, match=r"b\.weight is .*planned I32 \(3, 4\)"):
        writer.write("b.weight", [tensor])
    writer.close()


def test_a_file_that_is_not_complete_is_not_finished(tmp_path: Path) -> None:
    """Tensors that were never written, or only in part, are named."""
    writer = ShardWriter(tmp_path, plan_of(TENSORS))
    for name, tensor in TENSORS.items():
        if name != "b.weight":
            writer.write(name, [tensor])
    with pytest.raises(ValueError, match="is shorter than planned"):
        writer.write("b.weight", [TENSORS["b.weight"][:2]])
    with pytest.raises(ValueError, match=r"never written: \['b\.weight'\]"):
        writer.finish()
    writer.close()


# When it reaches the disk.


def test_what_waits_for_the_disk_runs_in_the_background(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After every so many bytes a flush is handed over, and not run by the thread that writes."""
    monkeypatch.setattr(shards, "_FLUSH_BYTES", 100)
    flushed: list[int] = []
    monkeypatch.setattr(os, "fdatasync", flushed.append)
    handed: list[Callable[[], None]] = []
    tensors = {f"t{i}": torch.zeros(40, dtype=torch.uint8) for i in range(8)}
    writer = ShardWriter(tmp_path, plan_of(tensors), handed.append)
    for name, tensor in tensors.items():
        writer.write(name, [tensor])
    assert len(handed) == 2  # 8·40 bytes, three tensors a time
    assert not flushed
    for run in handed:
        run()
    assert len(flushed) == 2
    writer.finish()


def test_a_lost_write_is_not_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux tells of it once; a later flush that succeeds does not bring the bytes back."""
    monkeypatch.setattr(shards, "_FLUSH_BYTES", 1)
    answers = iter([OSError(5, "Input/output error"), None, None, None])

    def flush(_descriptor: int) -> None:
        if (answer := next(answers)) is not None:
            raise answer

    monkeypatch.setattr(os, "fdatasync", flush)
    handed: list[Callable[[], None]] = []
    tensors = {f"t{i}": torch.zeros(40, dtype=torch.uint8) for i in range(3)}
    writer = ShardWriter(tmp_path, plan_of(tensors), handed.append)
    for name, tensor in tensors.items():
        writer.write(name, [tensor])
    with pytest.raises(DiskError, match="Input/output error"):
        handed[0]()
    handed[1]()
    with pytest.raises(DiskError, match="some of it was lost before"):
        writer.finish()


def test_a_flush_comes_after_the_file_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the background gets to only then has nothing left to do; the descriptor may be another file's by now."""
    monkeypatch.setattr(shards, "_FLUSH_BYTES", 1)
    handed: list[Callable[[], None]] = []
    writer = ShardWriter(tmp_path, plan_of({"t": torch.zeros(4)}), handed.append)
    writer.write("t", [torch.zeros(4)])
    writer.finish()
    monkeypatch.setattr(os, "fdatasync", lambda _descriptor: pytest.fail("flushed after it was closed"))
    for run in handed:
        run()
    assert handed


def test_a_finished_file_is_flushed_and_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`finish` returns when the bytes are on the disk."""
    synced: list[int] = []
    sync = os.fsync

    def recording(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", recording)
    writer = ShardWriter(tmp_path, plan_of(TENSORS))
    for name, tensor in TENSORS.items():
        writer.write(name, [tensor])
    assert not synced
    writer.finish()
    assert synced == [writer.path.stat().st_ino]
    writer.close()  # once more is harmless


@pytest.mark.parametrize("call", ["pwrite", "fsync", "open", "truncate"])
def test_a_disk_that_fails_is_one_line(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the system refuses, the file is named."""

    def failing(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, failing)
    with pytest.raises(DiskError, match=r"model\.safetensors: cannot be written \(No space left on device\); free sp"):
        write_all(tmp_path, TENSORS)
