"""One file of the output alone: plain data in, the file and plain data out, in any process, with the same bytes."""

import errno
import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from checkpoint_edits import edit_quantization, edit_tensors, write_case

from convert_w4a8.checkpoint import shards
from convert_w4a8.checkpoint.checksum import is_intact
from convert_w4a8.checkpoint.directory import open_checkpoint
from convert_w4a8.checkpoint.shards import ShardWriter
from convert_w4a8.checkpoint.writer import CheckpointWriter
from convert_w4a8.conversion.fingerprint import fingerprint
from convert_w4a8.conversion.plan import Plan, make_plan
from convert_w4a8.conversion.result import Result
from convert_w4a8.conversion.run import carry_out
from convert_w4a8.conversion.shard import ShardTask, convert_shard, shard_tasks
from convert_w4a8.errors import ConvertError, DiskError
from convert_w4a8.options import Options, ScalesMode
from convert_w4a8.quantization.layer import LayerStats

CPU = torch.device("cpu")
SHARDED = "awq-mixtral-w1-w2-w3"
"""New codes, experts, two input files; FP16 that becomes BF16."""
SMALL = 60_000
"""Bytes of an output file: less than the tensors of most layers, which straddle files then."""


def plan_of(path: Path, **changes: int | str) -> Plan:
    """Plan a conversion into small files."""
    options = replace(Options(max_shard_size=SMALL), **changes)  # type: ignore[arg-type]
    return make_plan(open_checkpoint(path), options)


def sha256(path: Path) -> str:
    """Return the digest of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    """Convert a checkpoint into many files, as one conversion; return what was done and where it is."""
    root = tmp_path_factory.mktemp("shard")
    source = write_case(SHARDED, root / "in").path
    plan = plan_of(source)
    return carry_out(open_checkpoint(source), plan, root / "out", device=CPU), root / "out"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Write a checkpoint in three files."""
    return write_case("awq-symmetric-fp16-sharded", tmp_path / "in").path


def straddling(tasks: list[ShardTask]) -> set[str]:
    """Return the layers of which more than one task has tensors."""
    modules = [layer.module for task in tasks for layer in task.layers]
    return {module for module in modules if modules.count(module) > 1}


# Cutting a plan into tasks.


def test_tasks_are_the_files_of_the_plan(whole: tuple[Result, Path]) -> None:
    """Every tensor of the output is one task's; a task has what its file needs, and nothing else."""
    plan = whole[0].plan
    tasks = shard_tasks(plan)
    assert tuple(task.shard for task in tasks) == plan.shards
    for task in tasks:
        names = {spec.name for spec in task.shard.specs}
        assert [layer for layer in plan.layers if names & {spec.name for spec in layer.specs}] == sorted(
            task.layers, key=plan.layers.index
        )
        assert {tensor for tensor in plan.tensors if tensor.output.name in names} == set(task.tensors)
        needed = {part.path for layer in task.layers for part in layer.spec.parts.values()}
        needed |= {tensor.info.path for tensor in task.tensors}
        states = {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in needed}
        assert task.inputs == states
        assert task.options == plan.options
    assert len(tasks) > 10
    assert len(straddling(tasks)) > 10


def test_a_task_names_only_the_files_that_it_reads(source: Path) -> None:
    """A worker need not have the whole checkpoint."""
    tasks = shard_tasks(plan_of(source, max_shard_size=1))
    assert {len(task.inputs) for task in tasks} == {1, 3}  # a copied tensor, and a layer dealt out over three files


def test_tasks_survive_pickle(whole: tuple[Result, Path], tmp_path: Path) -> None:
    """A task is equal to its copy, and so is what comes of it; notes on layers are JSON, too."""
    tasks = shard_tasks(whole[0].plan)
    copies = [pickle.loads(pickle.dumps(task)) for task in tasks]
    assert copies == tasks
    assert [copy.fingerprint() for copy in copies] == [task.fingerprint() for task in tasks]
    result = convert_shard(copies[0], tmp_path, CPU)
    assert pickle.loads(pickle.dumps(result)) == result
    assert json.loads(json.dumps(result.notes.layers)) == result.notes.layers


# In another process.


@pytest.fixture(scope="module")
def elsewhere() -> Callable[..., ProcessPoolExecutor]:
    """Return what makes processes that know nothing of this one: started anew, not forked."""
    return lambda: ProcessPoolExecutor(2, mp_context=get_context("spawn"))


def test_other_processes_write_the_same_files(
    whole: tuple[Result, Path], elsewhere: Callable[..., ProcessPoolExecutor], tmp_path: Path
) -> None:
    """Each file by itself, by whichever process: the digests, and the notes on layers, are those of one conversion."""
    result, out = whole
    tasks = shard_tasks(result.plan)
    with elsewhere() as pool:
        fingerprints = list(pool.map(ShardTask.fingerprint, tasks))
        found = list(pool.map(convert_shard, tasks, [tmp_path] * len(tasks), [CPU] * len(tasks)))
    assert fingerprints == [task.fingerprint() for task in tasks]
    assert [shard.file_name for shard in found] == [task.shard.file_name for task in tasks]
    files = {path.name: sha256(path) for path in out.glob("*.safetensors")}
    assert {path.name: sha256(path) for path in tmp_path.iterdir()} == files
    assert len(files) == len(tasks)
    known = {layer.plan.module: layer.stats for layer in result.layers}
    for task, shard in zip(tasks, found, strict=True):
        notes = {module: None if note is None else LayerStats(**note) for module, note in shard.notes.layers.items()}
        assert notes == {layer.module: known[layer.module] for layer in task.layers}
        size = ShardWriter(tmp_path, task.shard).size
        assert is_intact(tmp_path / shard.file_name, shard.pieces, size)


@pytest.mark.parametrize("form", ["lut", "compressed-tensors"])
def test_a_file_alone_is_the_one_of_the_whole(form: str, source: Path, tmp_path: Path) -> None:
    """In this process, too; and progress counts what was read for it."""
    plan = plan_of(source, format=form)
    carry_out(open_checkpoint(source), plan, tmp_path / "out", device=CPU)
    (tmp_path / "alone").mkdir()
    for task in shard_tasks(plan):
        seen: list[int] = []
        convert_shard(task, tmp_path / "alone", CPU, seen.append)
        nbytes = sum(layer.spec.nbytes for layer in task.layers) + sum(tensor.info.nbytes for tensor in task.tensors)
        assert sum(seen) == nbytes
        name = task.shard.file_name
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_a_journal_takes_files_of_other_processes(whole: tuple[Result, Path], tmp_path: Path) -> None:
    """Some files are written elsewhere and noted; an ordinary `--resume` writes the others, to the same output."""
    plan = whole[0].plan
    (root,) = {info.info.path.parent for info in plan.tensors}
    checkpoint = open_checkpoint(root)
    tasks = shard_tasks(plan)
    prints = {task.shard.file_name: task.fingerprint() for task in tasks}
    found = fingerprint(checkpoint, plan.options)

    def write_every_other() -> None:
        with CheckpointWriter(tmp_path / "out", plan.shards, fingerprint=found, fingerprints=prints) as writer:
            for task in tasks[::2]:
                result = convert_shard(task, writer.directory, CPU)
                writer.note(result.file_name, result.pieces, result.notes)
            assert writer.unfinished == [task.shard.file_name for task in tasks[1::2]]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_every_other()
    carry_out(checkpoint, plan, tmp_path / "out", device=CPU, resume=True)
    assert {path.name: sha256(path) for path in (tmp_path / "out").iterdir()} == {
        path.name: sha256(path) for path in whole[1].iterdir()
    }


def test_a_task_may_be_moved(source: Path, tmp_path: Path) -> None:
    """The same files elsewhere, times included, have the same fingerprints: names count, not where they lie."""
    shutil.copytree(source, tmp_path / "moved")
    before, after = (shard_tasks(plan_of(path)) for path in (source, tmp_path / "moved"))
    assert [task.fingerprint() for task in after] == [task.fingerprint() for task in before]
    assert before != after


# What a file is made of.


def reading(tasks: list[ShardTask], name: str) -> list[bool]:
    """Return for each task whether it reads a file."""
    return [any(Path(path).name == name for path in task.inputs) for task in tasks]


CHANGES: dict[str, Callable[[Path], object]] = {
    "time": os.utime,
    "size": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "absent": Path.unlink,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_an_input_that_changed_is_named(change: Callable[[Path], object], source: Path, tmp_path: Path) -> None:
    """Whoever carries out a task looks first whether its files are still those; nothing is written if not."""
    name = "model-00002-of-00003.safetensors"
    tasks = shard_tasks(plan_of(source, max_shard_size=1))
    for task in tasks:
        task.check_inputs()
    change(source / name)
    concerned = reading(tasks, name)
    assert True in concerned
    assert False in concerned
    (tmp_path / "out").mkdir()
    for task, changed in zip(tasks, concerned, strict=True):
        if not changed:
            task.check_inputs()
            continue
        with pytest.raises(ConvertError) as caught:
            convert_shard(task, tmp_path / "out", CPU)
        assert caught.value.problem.subject == str(source / name)
        assert caught.value.problem.reason == "has changed since the conversion was planned, or is absent"
    assert list((tmp_path / "out").iterdir()) == []


def test_fingerprints_differ_where_inputs_do(source: Path) -> None:
    """Of the tasks that read a file that changed, and of no others."""
    name = "model-00002-of-00003.safetensors"
    before = shard_tasks(plan_of(source, max_shard_size=1))
    os.utime(source / name)
    after = shard_tasks(plan_of(source, max_shard_size=1))
    changed = [a.fingerprint() != b.fingerprint() for a, b in zip(before, after, strict=True)]
    assert changed == reading(before, name)


def test_fingerprints_differ_where_the_work_does(source: Path) -> None:
    """Options, the version, what lies in the file."""
    task = shard_tasks(plan_of(source))[0]
    others = [
        shard_tasks(plan_of(source, scales="reference"))[0],
        shard_tasks(plan_of(source, scales="direct"))[0],
        shard_tasks(plan_of(source, format="compressed-tensors"))[0],
        replace(task, layers=task.layers[:-1]),
        replace(task, tensors=task.tensors[:-1]),
        replace(task, layers=(replace(task.layers[0], dequantize="why not"), *task.layers[1:])),
        replace(task, shard=replace(task.shard, specs=task.shard.specs[:-1])),
    ]
    assert len({task.fingerprint(), *(other.fingerprint() for other in others)}) == 1 + len(others)


def test_fingerprints_differ_where_the_meaning_of_the_bytes_does(tmp_path: Path) -> None:
    """The same tensors are other weights in another version of a format: nothing but config.json says so."""
    source = write_case("gptq-v1-asymmetric", tmp_path / "in").path
    before = [task.fingerprint() for task in shard_tasks(plan_of(source))]
    edit_quantization(source, checkpoint_format="gptq_v2", format="gptq_v2")
    after = [task.fingerprint() for task in shard_tasks(plan_of(source))]
    layers = [bool(task.layers) for task in shard_tasks(plan_of(source))]
    assert [a != b for a, b in zip(before, after, strict=True)] == layers


def test_an_error_closes_the_file(tmp_path: Path) -> None:
    """A layer that is damaged is named, and no descriptor stays open."""
    source = write_case("gptq-v1", tmp_path / "in").path
    name = "model.layers.0.mlp.down_proj.scales"
    edit_tensors(source, lambda t: t[name].fill_(torch.nan))
    (task,) = shard_tasks(make_plan(open_checkpoint(source), Options(scales=ScalesMode.REFERENCE)))
    descriptors = Path("/proc/self/fd")
    before = len(list(descriptors.iterdir()))
    with pytest.raises(ConvertError, match=name):
        convert_shard(task, tmp_path, CPU)
    assert len(list(descriptors.iterdir())) == before


def test_bytes_that_are_lost_in_the_background_fail_the_file(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system tells of a lost write once, and not whoever asks at the end."""
    task = shard_tasks(plan_of(source))[0]
    (tmp_path / "out").mkdir()
    told: list[int] = []

    def lose_once(descriptor: int) -> None:
        told.append(descriptor)
        if len(told) == 1:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(shards, "_FLUSH_BYTES", 1)
    monkeypatch.setattr(os, "fdatasync", lose_once)
    with pytest.raises(DiskError, match="Input/output error"):
        convert_shard(task, tmp_path / "out", CPU)
    assert told
