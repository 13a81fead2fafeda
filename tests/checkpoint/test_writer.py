"""The checkpoint writer: whole or nothing, any order, any thread; files that the safetensors library reads."""

import itertools
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from checkpoint_edits import snapshot
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from convert_w4a8.checkpoint import writer
from convert_w4a8.checkpoint.disk import check_destination
from convert_w4a8.checkpoint.safetensors_file import DTYPE_NAMES, TensorSpec
from convert_w4a8.checkpoint.shards import ShardPlan, plan_shards
from convert_w4a8.checkpoint.writer import CheckpointWriter
from convert_w4a8.errors import ConvertError, DiskError

TENSORS = {
    "b.weight": torch.arange(12, dtype=torch.int32).view(3, 4),
    "a.weight": torch.linspace(0, 1, 10).bfloat16(),
    "empty": torch.empty(0, 7),
    "scalar": torch.tensor(3.5, dtype=torch.float64),
    "scale": torch.arange(16, dtype=torch.uint8).view(torch.float8_e4m3fn).view(2, 8),
    "mask": torch.tensor([True, False, True]),
}
SPECS = tuple(TensorSpec(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in TENSORS.items())


def write_all(out: Path, *, max_shard_size: int = 1 << 30, overwrite: bool = False) -> None:
    """Write and commit TENSORS."""
    with CheckpointWriter(out, plan_shards(SPECS, max_shard_size), overwrite=overwrite) as w:
        for name, tensor in TENSORS.items():
            w.write(name, [tensor])
        w.commit()


def fail_half_way(out: Path, *, overwrite: bool = False) -> None:
    """Raise RuntimeError when some of TENSORS are written."""
    with CheckpointWriter(out, plan_shards(SPECS, 40), overwrite=overwrite) as w:
        w.write("a.weight", [TENSORS["a.weight"]])
        w.write_json("config.json", {})
        raise RuntimeError("half-way")


def open_descriptors() -> int:
    """Count this process's open files; 0 where the system does not tell."""
    directory = Path("/proc/self/fd")
    return len(list(directory.iterdir())) if directory.is_dir() else 0


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether dtype, shape and bytes are equal."""
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(
        a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)
    )


# Shards.


@given(sizes=st.lists(st.integers(0, 50), max_size=30), limit=st.integers(1, 100))
def test_shards_hold_every_tensor_once_in_order_under_the_limit(sizes: list[int], limit: int) -> None:
    """No tensor is lost, doubled or moved; a shard is over the limit only if it has a single tensor that is."""
    specs = [TensorSpec(f"t{i}", "U8", (size,)) for i, size in enumerate(sizes)]
    shards = plan_shards(specs, limit)
    assert [spec for shard in shards for spec in shard.specs] == specs
    for shard in shards:
        assert shard.nbytes == sum(spec.nbytes for spec in shard.specs)
        assert shard.nbytes <= limit or sum(spec.nbytes > 0 for spec in shard.specs) == 1
    names = [shard.file_name for shard in shards]
    if len(shards) == 1:
        assert names == ["model.safetensors"]
    else:
        assert names == [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for shard, following in itertools.pairwise(shards):
        assert shard.nbytes + following.specs[0].nbytes > limit


def test_a_tensor_that_fits_exactly_stays_in_the_shard() -> None:
    """The limit itself is allowed."""
    specs = [TensorSpec("a", "U8", (5,)), TensorSpec("b", "U8", (5,))]
    assert len(plan_shards(specs, 10)) == 1
    assert len(plan_shards(specs, 9)) == 2


# What is written.


def test_one_file_without_index(tmp_path: Path) -> None:
    """A checkpoint that fits is one file, read bit for bit by the library, without an index."""
    write_all(tmp_path / "out")
    assert sorted(snapshot(tmp_path / "out")) == ["model.safetensors"]
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == TENSORS.keys()
    assert all(same_bytes(found[name], tensor) for name, tensor in TENSORS.items())


def test_shards_with_index(tmp_path: Path) -> None:
    """Shards come with an index whose total_size and weight_map are what the library finds in the files."""
    write_all(tmp_path / "out", max_shard_size=40)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    found: dict[str, str] = {}
    for file in sorted((tmp_path / "out").glob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            assert handle.metadata() == {"format": "pt"}
            for name in handle.keys():  # noqa: SIM118 - not a dict
                assert same_bytes(handle.get_tensor(name), TENSORS[name])
                found[name] = file.name
    assert len(set(found.values())) > 2
    assert index["weight_map"] == found
    assert list(index["weight_map"]) == sorted(found)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in TENSORS.values())


def test_tensors_that_are_not_contiguous_are_written_as_they_look(tmp_path: Path) -> None:
    """A transposed view is stored in the order of its own shape."""
    tensor = torch.arange(6, dtype=torch.int32).view(2, 3)
    with CheckpointWriter(tmp_path / "out", plan_shards([TensorSpec("t", "I32", (3, 2))], 100)) as w:
        w.write("t", [tensor.t()])
        w.commit()
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["t"], tensor.t())


@pytest.mark.parametrize("rows", [(3,), (1, 2), (0, 1, 0, 1, 1)], ids=str)
def test_a_tensor_may_come_in_parts(rows: tuple[int, ...], tmp_path: Path) -> None:
    """Parts lie one behind the other."""
    tensor = torch.arange(12, dtype=torch.int32).view(3, 4)
    with CheckpointWriter(tmp_path / "out", plan_shards([TensorSpec("t", "I32", (3, 4))], 100)) as w:
        w.write("t", tensor.split(rows))
        w.commit()
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["t"], tensor)


def test_many_threads_write_pieces_in_any_order(tmp_path: Path) -> None:
    """Whole tensors and pieces of tensors, from eight threads, land where they belong."""
    generator = torch.Generator().manual_seed(0)
    tensors = {f"t{i}": torch.randint(0, 256, (3001 + i,), dtype=torch.uint8, generator=generator) for i in range(60)}
    specs = [TensorSpec(name, "U8", tuple(tensor.shape)) for name, tensor in tensors.items()]
    with CheckpointWriter(tmp_path / "out", plan_shards(specs, 50_000)) as w:

        def write(name: str) -> None:
            tensor = tensors[name]
            if int(name[1:]) % 2:
                w.write(name, [tensor])
                return
            for start in reversed(range(0, len(tensor), 500)):
                w.write_bytes(name, tensor[start : start + 500].numpy().data, start)
            w.mark_written(name)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(write, reversed(tensors)))
        w.commit()
    found: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        found |= load_file(file)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_writing_goes_on_after_short_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An operating system that takes five bytes at a time still gets them all."""
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: whole(fd, data[:5], offset))
    write_all(tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(same_bytes(found[name], tensor) for name, tensor in TENSORS.items())


def test_json_and_side_files(tmp_path: Path) -> None:
    """JSON is UTF-8 and readable; side files keep their bytes and their sub-directories."""
    content = bytes(range(256)) * 3
    (tmp_path / "source").write_bytes(content)
    with CheckpointWriter(tmp_path / "out", plan_shards([], 1)) as w:
        w.write_json("config.json", {"name": "é", "list": [1, 2]})
        w.copy_file(tmp_path / "source", Path("assets/deep/a.bin"))
        w.commit()
    raw = (tmp_path / "out" / "config.json").read_bytes()
    assert json.loads(raw) == {"name": "é", "list": [1, 2]}
    assert "é".encode() in raw
    assert raw.endswith(b"}\n")
    assert (tmp_path / "out" / "assets" / "deep" / "a.bin").read_bytes() == content


def test_modes_are_those_of_ordinary_files(tmp_path: Path) -> None:
    """Whoever may read the directory's parent may read the output: not the 0700 of a temporary directory."""
    write_all(tmp_path / "out")
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode & 0o044 == 0o044


# Whole or nothing.


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    """When the work fails half-way, neither OUT nor a temporary directory is left, and no descriptor is open."""
    descriptors = open_descriptors()
    with pytest.raises(RuntimeError, match="half-way"):
        fail_half_way(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    assert open_descriptors() == descriptors


def test_leaving_without_commit_leaves_nothing(tmp_path: Path) -> None:
    """Only `commit` makes OUT appear."""
    with CheckpointWriter(tmp_path / "out", plan_shards(SPECS, 40)) as w:
        for name, tensor in TENSORS.items():
            w.write(name, [tensor])
        assert not (tmp_path / "out").exists()
    assert list(tmp_path.iterdir()) == []


def test_commit_refuses_missing_tensors(tmp_path: Path) -> None:
    """A tensor that was never written, or only in part, is named; OUT does not appear."""
    with CheckpointWriter(tmp_path / "out", plan_shards(SPECS, 40)) as w:
        for name, tensor in TENSORS.items():
            if name != "b.weight":
                w.write(name, [tensor])
        w.write_bytes("b.weight", memoryview(bytes(8)), 0)
        with pytest.raises(ValueError, match=r"never written: \['b\.weight'\]"):
            w.commit()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(3, 4),
        torch.zeros(4, 3, dtype=torch.int32),
        torch.zeros(12, dtype=torch.int32),
        torch.zeros(2, 4, dtype=torch.int32),
        torch.zeros(4, 4, dtype=torch.int32),
    ],
    ids=["dtype", "transposed", "flat", "short", "long"],
)
def test_a_tensor_that_differs_from_the_plan_is_a_bug(tensor: torch.Tensor, tmp_path: Path) -> None:
    """Dtype and shape must be the planned ones: the header is already written."""
    with (
        CheckpointWriter(tmp_path / "out", plan_shards(SPECS, 40)) as w,
        pytest.raises(ValueError, match=r"b\.weight is .*planned I32 \(3, 4\)"),
    ):
        w.write("b.weight", [tensor])


def test_everything_is_flushed_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file of OUT is on the disk before OUT appears, and the rename after it."""
    events: list[str] = []
    sync, rename = os.fsync, Path.rename

    def recording_sync(descriptor: int) -> None:
        events.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        sync(descriptor)

    def recording_rename(self: Path, target: Path) -> Path:
        events.append("RENAME")
        return rename(self, target)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc to name descriptors")
    monkeypatch.setattr(os, "fsync", recording_sync)
    monkeypatch.setattr(Path, "rename", recording_rename)
    (tmp_path / "side").write_bytes(b"x")
    with CheckpointWriter(tmp_path / "out", plan_shards(SPECS, 40)) as w:
        for name, tensor in TENSORS.items():
            w.write(name, [tensor])
        w.copy_file(tmp_path / "side", Path("side.txt"))
        w.write_json("config.json", {})
        w.commit()
    flushed = set(events[: events.index("RENAME")])
    assert set(snapshot(tmp_path / "out")) | {"checkpoint"} <= flushed
    assert events[events.index("RENAME") + 1] == tmp_path.name


# The place.


def make_old(out: Path) -> None:
    """Put something at OUT."""
    (out / "sub").mkdir(parents=True)
    (out / "sub" / "old.txt").write_text("old")


def test_an_empty_directory_is_filled(tmp_path: Path) -> None:
    """OUT may exist if it is empty."""
    (tmp_path / "out").mkdir()
    write_all(tmp_path / "out")
    assert sorted(snapshot(tmp_path)) == ["out/model.safetensors"]


def test_missing_parents_are_made(tmp_path: Path) -> None:
    """OUT may lie in directories that do not exist yet."""
    write_all(tmp_path / "a" / "b" / "out")
    assert sorted(snapshot(tmp_path)) == ["a/b/out/model.safetensors"]


def test_overwrite_replaces_all(tmp_path: Path) -> None:
    """With `overwrite` the old content goes, all of it, and nothing is left beside OUT."""
    make_old(tmp_path / "out")
    write_all(tmp_path / "out", overwrite=True)
    assert sorted(snapshot(tmp_path)) == ["out/model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwrite_keeps_the_old_output_until_commit(tmp_path: Path) -> None:
    """A failed replacement leaves the old content as it was."""
    make_old(tmp_path / "out")
    with pytest.raises(RuntimeError, match="half-way"):
        fail_half_way(tmp_path / "out", overwrite=True)
    assert snapshot(tmp_path) == {"out/sub/old.txt": b"old"}


def test_output_that_was_taken_meanwhile_is_kept(tmp_path: Path) -> None:
    """Someone else's files that appear at OUT during the work are not replaced, and ours leave no trace."""
    with CheckpointWriter(tmp_path / "out", plan_shards(SPECS, 1000)) as w:
        for name, tensor in TENSORS.items():
            w.write(name, [tensor])
        make_old(tmp_path / "out")
        with pytest.raises(ConvertError, match="is not empty"):
            w.commit()
    assert snapshot(tmp_path) == {"out/sub/old.txt": b"old"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["file", "link-to-directory", "broken-link"])
def test_what_is_no_directory_is_never_replaced(kind: str, overwrite: bool, tmp_path: Path) -> None:
    """A file or a link at OUT is refused, with `overwrite` too."""
    out = tmp_path / "out"
    match kind:
        case "file":
            out.write_bytes(b"x")
        case "link-to-directory":
            (tmp_path / "elsewhere").mkdir()
            out.symlink_to("elsewhere")
        case _:
            out.symlink_to("nowhere")
    with pytest.raises(ConvertError, match="exists and is not a directory; choose another output path"):
        check_destination(out, overwrite=overwrite)


def test_a_full_directory_needs_overwrite(tmp_path: Path) -> None:
    """A directory with files is refused with the option that would replace it."""
    make_old(tmp_path / "out")
    with pytest.raises(ConvertError, match="is not empty; choose another path, or pass --overwrite"):
        check_destination(tmp_path / "out", overwrite=False)
    check_destination(tmp_path / "out", overwrite=True)
    check_destination(tmp_path / "absent", overwrite=False)


def test_a_failure_while_the_files_are_laid_out_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full before the first tensor leaves no temporary directory behind."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with (
        pytest.raises(DiskError, match="No space left"),
        CheckpointWriter(tmp_path / "out", [ShardPlan("model.safetensors", SPECS)]),
    ):
        pytest.fail("the block must not be entered")
    assert list(tmp_path.iterdir()) == []


def test_the_old_output_returns_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the second of the two renames of a replacement fails, the old content is back at OUT."""
    make_old(tmp_path / "out")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == "checkpoint":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(DiskError, match=r"out: cannot be written \(Input/output") as caught:
        write_all(tmp_path / "out", overwrite=True)
    assert snapshot(tmp_path / "out") == {"sub/old.txt": b"old"}
    assert caught.value.__notes__ == ["1 of 1 files are finished; --resume continues from there"]


def test_leftovers_of_the_old_output_do_not_fail_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once OUT is replaced, the conversion has succeeded, even if the old files cannot all be removed."""
    make_old(tmp_path / "out")
    remove = shutil.rmtree

    def failing(path: Path, ignore_errors: bool = False) -> None:
        if path.name == "replaced" and not ignore_errors:
            raise PermissionError(13, "Permission denied")
        remove(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", failing)
    write_all(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_flush_that_fails_in_the_background_fails_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system reports a lost write once: whoever hears of it must not let OUT appear."""

    def failing(_descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(writer, "_FLUSH_BYTES", 1)
    monkeypatch.setattr(os, "fdatasync", failing)
    with pytest.raises(DiskError, match="Input/output error"):
        write_all(tmp_path / "out")
    assert not (tmp_path / "out").exists()
