"""Where a conversion may write, and where its arithmetic runs."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_edits import snapshot, write_case
from factories import Checkpoint

from convert_w4a8.checkpoint.directory import open_checkpoint
from convert_w4a8.conversion.plan import make_plan
from convert_w4a8.conversion.run import check_paths
from convert_w4a8.devices import resolve_device
from convert_w4a8.errors import ConvertError
from convert_w4a8.options import Options

# Places.


def place(source: Checkpoint, out: Path, *, overwrite: bool = False) -> None:
    """Check an output path for a conversion of a checkpoint."""
    checkpoint = open_checkpoint(source.path)
    check_paths(checkpoint, out, make_plan(checkpoint, Options()), overwrite=overwrite)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("where", ["in", "in/out", "in/a/b", ".", "in/../in", "link", "link/out", "sub/../in/out"])
def test_overlapping_paths_are_refused(where: str, overwrite: bool, tmp_path: Path) -> None:
    """OUT may be neither IN nor inside it nor around it, by whatever name; IN is not written to, nor replaced."""
    source = write_case("gptq-v1", tmp_path / "in")
    (tmp_path / "link").symlink_to("in")
    before = snapshot(tmp_path)
    with pytest.raises(ConvertError, match="overlaps the input directory; choose another output path"):
        place(source, tmp_path / where, overwrite=overwrite)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("where", ["in2", "out", "out/in", "in-", "other/../out"])
def test_paths_beside_the_input_are_allowed(where: str, tmp_path: Path) -> None:
    """A name that begins like IN's is another directory."""
    place(write_case("gptq-v1", tmp_path / "in"), tmp_path / where)


def test_the_target_of_links_into_the_input_is_found(tmp_path: Path) -> None:
    """IN given by a link overlaps with what lies in the directory behind the link."""
    source = write_case("gptq-v1", tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    checkpoint = open_checkpoint(tmp_path / "link")
    with pytest.raises(ConvertError, match="overlaps"):
        check_paths(checkpoint, source.path / "out", make_plan(checkpoint, Options()), overwrite=False)


def test_a_full_disk_is_noticed_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes that are needed and those that are free are both named, also where OUT's parents do not exist."""
    source = write_case("gptq-v1", tmp_path / "in")
    checkpoint = open_checkpoint(source.path)
    plan = make_plan(checkpoint, Options())

    def usage(path: Path) -> Any:
        assert path == tmp_path
        return type("Usage", (), {"free": free})

    monkeypatch.setattr(shutil, "disk_usage", usage)
    free = plan.disk_nbytes - 1
    with pytest.raises(ConvertError, match=rf"needs {plan.disk_nbytes:,} bytes, the disk has {free:,} free"):
        check_paths(checkpoint, tmp_path / "a" / "b" / "out", plan, overwrite=False)
    free = plan.disk_nbytes
    check_paths(checkpoint, tmp_path / "a" / "b" / "out", plan, overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


# Devices.


def test_devices() -> None:
    """`auto` is CUDA where there is one; devices that do not exist are refused with what can be said instead."""
    assert resolve_device("cpu") == torch.device("cpu")
    for name in ("tpu", "cuda:99", "meta", "", "mps", "cuda:x"):
        with pytest.raises(ConvertError, match="--device"):
            resolve_device(name)
        with pytest.raises(ConvertError, match=r"^--teacher-device .*; use ") as refused:
            resolve_device(name, "--teacher-device")
        assert "--device" not in str(refused.value)


@pytest.mark.parametrize(
    ("capability", "expected"), [(None, "cpu"), ((7, 5), "cpu"), ((8, 0), "cuda"), ((9, 0), "cuda"), ((12, 1), "cuda")]
)
def test_auto_takes_gpus_that_triton_supports(
    capability: tuple[int, int] | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An old GPU, on which torch itself may not run, is left alone unless it is asked for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert resolve_device("auto").type == expected


def test_memory_counts_where_the_work_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that only plans needs none for layers."""
    checkpoint = open_checkpoint(write_case("gptq-v1", tmp_path / "in").path)
    plan = make_plan(checkpoint, Options())
    monkeypatch.setattr("convert_w4a8.conversion.memory.available_memory", lambda: 1000)
    check_paths(checkpoint, tmp_path / "out", plan, overwrite=False, works_here=False)
    with pytest.raises(ConvertError, match="bytes of memory"):
        check_paths(checkpoint, tmp_path / "out", plan, overwrite=False)
