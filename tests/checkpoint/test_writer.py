"""The checkpoint writer: whole or nothing; what is finished is kept for the next time, if it can be trusted."""

import json
import os
import shutil
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_edits import snapshot
from safetensors import safe_open
from safetensors.torch import load_file

from convert_w4a8.checkpoint import journal, shards
from convert_w4a8.checkpoint.disk import check_destination
from convert_w4a8.checkpoint.journal import Notes, work_path
from convert_w4a8.checkpoint.safetensors_file import DTYPE_NAMES, TensorSpec
from convert_w4a8.checkpoint.shards import ShardPlan, ShardWriter, plan_shards
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


def write_files(w: CheckpointWriter, plans: Iterable[ShardPlan], layers: Mapping[str, object] | None = None) -> None:
    """Write those of some files that are not finished yet, from TENSORS, and hand them over with notes on layers."""
    for plan in plans:
        if plan.file_name not in w.unfinished:
            continue
        shard = w.shard_writer(plan.file_name)
        for spec in plan.specs:
            shard.write(spec.name, [TENSORS[spec.name]])
        w.finish(shard, Notes(dict(layers or {})))


def write_all(out: Path, *, max_shard_size: int = 1 << 30, overwrite: bool = False) -> None:
    """Write and commit TENSORS."""
    plans = plan_shards(SPECS, max_shard_size)
    with CheckpointWriter(out, plans, overwrite=overwrite) as w:
        write_files(w, plans)
        w.commit()


def fail_half_way(out: Path, *, overwrite: bool = False) -> None:
    """Raise RuntimeError when some of TENSORS are written, but no file is finished."""
    plans = plan_shards(SPECS, 40)
    with CheckpointWriter(out, plans, overwrite=overwrite) as w:
        shard = w.shard_writer(plans[1].file_name)
        shard.write(plans[1].specs[0].name, [TENSORS[plans[1].specs[0].name]])
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


def test_json_and_side_files(tmp_path: Path) -> None:
    """JSON is UTF-8 and readable; side files keep their bytes and their sub-directories."""
    content = bytes(range(256)) * 3
    (tmp_path / "source").write_bytes(content)
    plans = plan_shards([], 1)
    with CheckpointWriter(tmp_path / "out", plans) as w:
        write_files(w, plans)
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
    plans = plan_shards(SPECS, 40)
    with CheckpointWriter(tmp_path / "out", plans) as w:
        write_files(w, plans)
        w.wait()
        assert not w.unfinished
        assert not (tmp_path / "out").exists()
    assert list(tmp_path.iterdir()) == []


def test_commit_refuses_missing_files(tmp_path: Path) -> None:
    """A file that was never handed over is named; OUT does not appear."""
    plans = plan_shards(SPECS, 40)
    with CheckpointWriter(tmp_path / "out", plans) as w:
        write_files(w, plans[1:])
        with pytest.raises(ValueError, match=r"never finished: \['model-00001-of-00003\.safetensors'\]"):
            w.commit()
    assert list(tmp_path.iterdir()) == []


def test_commit_refuses_missing_tensors(tmp_path: Path) -> None:
    """A file that lacks a tensor, or part of one, is not finished, and OUT does not appear."""
    plans = plan_shards(SPECS, 40)
    with CheckpointWriter(tmp_path / "out", plans) as w:
        write_files(w, plans[1:])
        shard = w.shard_writer(plans[0].file_name)
        with pytest.raises(ValueError, match="is shorter than planned"):
            shard.write("b.weight", [TENSORS["b.weight"][:2]])
        w.finish(shard, Notes())
        with pytest.raises(ValueError, match=r"never written: \['b\.weight'\]"):
            w.commit()
    assert list(tmp_path.iterdir()) == []


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
    plans = plan_shards(SPECS, 40)
    with CheckpointWriter(tmp_path / "out", plans) as w:
        write_files(w, plans)
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
    plans = plan_shards(SPECS, 1000)
    with CheckpointWriter(tmp_path / "out", plans) as w:
        write_files(w, plans)
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

    monkeypatch.setattr(shards, "_FLUSH_BYTES", 1)
    monkeypatch.setattr(os, "fdatasync", failing)
    with pytest.raises(DiskError, match="Input/output error"):
        write_all(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_interrupt_does_not_come_between_a_file_and_its_note(tmp_path: Path) -> None:
    """What another process wrote, and was handed over, is finished."""
    (plan,) = plan_shards(SPECS, 10**9)

    def interrupted() -> None:
        with CheckpointWriter(tmp_path / "out", [plan]) as w:
            writer = ShardWriter(w.directory, plan)
            for spec in plan.specs:
                writer.write(spec.name, [TENSORS[spec.name]])
            w.note_later(plan.file_name, writer.finish(), Notes())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        interrupted()
    assert caught.value.__notes__ == ["1 of 1 files are finished; --resume continues from there"]


def test_what_went_wrong_in_the_background_is_told_at_the_next_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full is noticed before the rest of a hundred gigabytes is converted."""
    plans, taken = plan_shards(SPECS, 40), []
    sync = os.fsync

    def full(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").readlink().suffix == ".safetensors":
            raise OSError(28, "No space left on device")
        sync(descriptor)

    def write_one_by_one() -> None:
        with CheckpointWriter(tmp_path / "out", plans) as w:
            monkeypatch.setattr(os, "fsync", full)
            for plan in plans:
                write_files(w, [plan])
                taken.append(plan.file_name)
                w._background[0].exception()  # it is over

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc to name descriptors")
    with pytest.raises(DiskError, match="No space left"):
        write_one_by_one()
    assert taken == [plans[0].file_name]
    assert list(tmp_path.iterdir()) == []


# What is kept of one that was interrupted.

FINGERPRINTS = {f"model-0000{i}-of-00003.safetensors": f"shard {i}" for i in (1, 2, 3)}


def read_journal(out: Path) -> list[dict[str, Any]]:
    """Return the lines of a journal, each of which has a checksum before it."""
    found = []
    for line in (work_path(out) / "journal").read_bytes().splitlines():
        sum_, _, text = line.partition(b" ")
        assert int(sum_, 16) == zlib.crc32(text)
        found.append(json.loads(text))
    return found


def write_journal(out: Path, entries: Iterable[Mapping[str, Any]], *, with_sums: bool = True) -> None:
    """Write lines of a journal."""
    texts = [json.dumps(entry).encode() for entry in entries]
    lines = [b"%08x %s\n" % (zlib.crc32(text), text) if with_sums else text + b"\n" for text in texts]
    (work_path(out) / "journal").write_bytes(b"".join(lines))


def interrupted(out: Path, count: int = 2) -> tuple[ShardPlan, ...]:
    """Finish some of three files, and then be interrupted; return the plan of all."""
    plans = plan_shards(SPECS, 40)

    def write() -> None:
        with CheckpointWriter(out, plans, fingerprint={"a": 1}, fingerprints=FINGERPRINTS) as w:
            for number, plan in enumerate(plans[:count]):
                write_files(w, [plan], {f"layer {number}": {"noise": number / 3}, "both": number})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    return plans


def test_finished_files_and_notes_are_kept(tmp_path: Path) -> None:
    """What is finished is not written again, and what was noted of its layers is there; the end is the same bytes."""
    write_all(tmp_path / "whole", max_shard_size=40)
    plans = interrupted(tmp_path / "out")
    directory = work_path(tmp_path / "out") / "checkpoint"
    before = {path.name: path.stat().st_ino for path in directory.iterdir()}
    assert before.keys() == {plan.file_name for plan in plans[:2]}
    with CheckpointWriter(tmp_path / "out", plans, fingerprint={"a": 1}, fingerprints=FINGERPRINTS, resume=True) as w:
        assert w.unfinished == [plans[2].file_name]
        assert w.layers == {"layer 0": {"noise": 0.0}, "layer 1": {"noise": 1 / 3}, "both": 1}
        write_files(w, plans, {"layer 2": None})
        w.commit()
        assert w.layers == {"layer 0": {"noise": 0.0}, "layer 1": {"noise": 1 / 3}, "both": 1, "layer 2": None}
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")
    assert {name: (tmp_path / "out" / name).stat().st_ino for name in before} == before


def test_a_file_of_another_fingerprint_is_written_again(tmp_path: Path) -> None:
    """What a file is made of may change although the conversion as a whole claims to be the same."""
    plans = interrupted(tmp_path / "out")
    changed = {**FINGERPRINTS, plans[0].file_name: "another"}
    with CheckpointWriter(tmp_path / "out", plans, fingerprint={"a": 1}, fingerprints=changed, resume=True) as w:
        assert w.unfinished == [plans[0].file_name, plans[2].file_name]
        assert w.layers == {"layer 1": {"noise": 1 / 3}, "both": 1}
        assert [path.name for path in w.directory.iterdir()] == [plans[1].file_name]
        write_files(w, plans)
        w.commit()
    assert load_file(tmp_path / "out" / plans[0].file_name).keys() == {"b.weight"}


def test_the_journal_may_be_written_again(tmp_path: Path) -> None:
    """What the tests below change is what counts: the same lines are trusted."""
    plans = interrupted(tmp_path / "out")
    write_journal(tmp_path / "out", read_journal(tmp_path / "out"))
    assert resumed(tmp_path / "out", plans) == [plans[2].file_name]


def resumed(out: Path, plans: tuple[ShardPlan, ...]) -> list[str]:
    """Go on with a conversion; return what is not finished, of which nothing is left."""
    with CheckpointWriter(out, plans, fingerprint={"a": 1}, fingerprints=FINGERPRINTS, resume=True) as w:
        finished = {plan.file_name for plan in plans} - set(w.unfinished)
        assert {path.name for path in w.directory.iterdir()} == finished
        assert bool(w.layers) == bool(finished)
        return w.unfinished


@pytest.mark.parametrize("with_sums", [False, True])
def test_a_journal_of_the_earlier_form_is_not_trusted(with_sums: bool, tmp_path: Path) -> None:
    """Lines without the fingerprint of a shard, or without their checksum, as they were once: it begins again."""
    plans = interrupted(tmp_path / "out")
    lines = [{key: value for key, value in line.items() if key != "shard"} for line in read_journal(tmp_path / "out")]
    write_journal(tmp_path / "out", [*lines, {"layer": "x", "value": None}], with_sums=with_sums)
    assert resumed(tmp_path / "out", plans) == [plan.file_name for plan in plans]


def test_a_journal_without_checksums_is_not_trusted(tmp_path: Path) -> None:
    """Whole lines of JSON count only with the checksum that they were written with."""
    plans = interrupted(tmp_path / "out")
    write_journal(tmp_path / "out", read_journal(tmp_path / "out"), with_sums=False)
    assert resumed(tmp_path / "out", plans) == [plan.file_name for plan in plans]


def test_a_line_that_changed_ends_the_journal(tmp_path: Path) -> None:
    """One digit of one checksum of a piece is enough; what stands before it is trusted, and nothing behind it."""
    plans = interrupted(tmp_path / "out")
    journal = work_path(tmp_path / "out") / "journal"
    head, first, second = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(head + first + second.replace(b'"pieces": [[0', b'"pieces": [[1'))
    assert resumed(tmp_path / "out", plans) == [plans[1].file_name, plans[2].file_name]
    assert second.count(b'"pieces": [[0') == 1


def test_the_journal_has_a_line_for_each_finished_file(tmp_path: Path) -> None:
    """Its form is what the next process relies on."""
    plans = interrupted(tmp_path / "out", count=1)
    (shard,) = [plan for plan in plans if plan.file_name == "model-00001-of-00003.safetensors"]
    first, second = read_journal(tmp_path / "out")
    assert first == {"fingerprint": {"a": 1}}
    assert second.keys() == {"file", "shard", "pieces", "layers", "infinities"}
    assert (second["file"], second["shard"]) == (shard.file_name, "shard 1")
    assert second["layers"] == {"layer 0": {"noise": 0.0}, "both": 0}
    size = (work_path(tmp_path / "out") / "checkpoint" / shard.file_name).stat().st_size
    assert sum(length for _, length, _ in second["pieces"]) == size


def test_nothing_finished_is_nothing_to_keep(tmp_path: Path) -> None:
    """An interrupt before the first file is finished leaves no trace."""
    interrupted(tmp_path / "out", count=0)
    assert list(tmp_path.iterdir()) == []


def test_what_a_dead_process_still_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its workers may live a little longer: a directory that could not be emptied is taken as it is."""
    with CheckpointWriter(tmp_path / "out", []) as writer:
        late = work_path(tmp_path / "out") / "states" / "0"
        late.mkdir(parents=True)
        with monkeypatch.context() as patch:
            patch.setattr("shutil.rmtree", lambda *_arguments, **_keywords: None)
            with writer.states() as directory:
                assert directory == late.parent
        with writer.states() as directory:
            assert list(directory.iterdir()) == []
    assert list(tmp_path.iterdir()) == []


def test_a_signal_while_the_journal_is_put_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it says is finished by then, and is not removed: the main thread notes files that other processes write."""
    plans = plan_shards(SPECS, 1 << 30)

    def interrupted(_descriptor: int) -> None:
        raise KeyboardInterrupt

    def write(out: Path) -> None:
        with CheckpointWriter(out, plans, fingerprint={}) as w:
            shard = w.shard_writer(plans[0].file_name)
            for spec in plans[0].specs:
                shard.write(spec.name, [TENSORS[spec.name]])
            pieces = shard.finish()
            monkeypatch.setattr(journal, "fsync", lambda _path: None)
            monkeypatch.setattr(os, "fsync", interrupted)
            w.note(plans[0].file_name, pieces, Notes())

    with pytest.raises(KeyboardInterrupt) as raised:
        write(tmp_path / "out")
    monkeypatch.undo()
    assert raised.value.__notes__ == ["1 of 1 files are finished; --resume continues from there"]
    with CheckpointWriter(tmp_path / "out", plans, fingerprint={}, resume=True) as w:
        assert w.unfinished == []
