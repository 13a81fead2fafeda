"""Codes and tables of GPUs are as good as a CPU's, and others: one output is the work of one kind of device."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from checkpoint_edits import snapshot
from tiny_models import write_llama

from convert_w4a8.calibration.options import QuantizeOptions
from convert_w4a8.calibration.plan import plan_quantization
from convert_w4a8.calibration.run import quantize, quantize_shard
from convert_w4a8.checkpoint.directory import open_checkpoint
from convert_w4a8.checkpoint.writer import CheckpointWriter
from convert_w4a8.conversion.shard import ShardTask
from convert_w4a8.errors import ConvertError

CPU = torch.device("cpu")


class Interrupted:
    """Writes two files on devices of some kind, and is interrupted."""

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def kind_of_device(self) -> str:
        """Return the kind."""
        return self._kind

    def __call__(self, tasks: Sequence[ShardTask], writer: CheckpointWriter) -> None:
        """Write two files."""
        for task in tasks[:2]:
            result = quantize_shard(task, writer.directory, CPU, lambda _nbytes: None)
            writer.note(result.file_name, result.pieces, result.notes)
        raise KeyboardInterrupt


@pytest.mark.parametrize("kind", ["cpu", "cuda (NVIDIA H100 80GB HBM3)"])
def test_only_the_same_kind_of_device_goes_on(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one is refused, since layers may lie in several files; what is finished stays."""
    (tmp_path / "model").mkdir()
    checkpoint = open_checkpoint(write_llama(tmp_path / "model", layers=1))
    plan = plan_quantization(checkpoint, QuantizeOptions(max_shard_size=100_000))
    quantize(checkpoint, plan, tmp_path / "expected", None, device=CPU)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        quantize(checkpoint, plan, out, None, device=CPU, write_shards=Interrupted(kind))
    others = {"cpu", "cuda (NVIDIA H100 80GB HBM3)", "cuda (NVIDIA H200)"} - {kind}
    for other in sorted(others):
        monkeypatch.setattr("convert_w4a8.calibration.run.kind_of", lambda _device, other=other: other)
        with pytest.raises(ConvertError, match="out: device: is not what it was"):
            quantize(checkpoint, plan, out, None, device=CPU, resume=True)
    monkeypatch.setattr("convert_w4a8.calibration.run.kind_of", lambda _device: kind)
    quantize(checkpoint, plan, out, None, device=CPU, resume=True)
    assert snapshot(out) == snapshot(tmp_path / "expected")
