"""A training spread over the GPUs of one machine, by torch's FSDP2: each process has a part of every tensor.

Both models are sharded block by block: of each tensor of the quantized layers, what is trained and what is not, and of
the teacher's matrices and all embeddings, a process has a part of the rows; they are brought together for a block's
passes, and gradients are summed where their rows are. Norms and biases, of one dimension, are whole in every process.

Each process computes a part of every batch, as in `data_parallel`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import nn

from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.checkpoint.names import is_expert
from convert_w4a8.checkpoint.safetensors_file import read_tensor
from convert_w4a8.distillation.data_parallel import DataParallelTrainer, add_up
from convert_w4a8.distillation.embeddings import EMBEDDINGS
from convert_w4a8.distillation.fused import fuse
from convert_w4a8.distillation.hidden import blocks_of
from convert_w4a8.distillation.linear import LutLinear, Preset
from convert_w4a8.distillation.options import DistillOptions
from convert_w4a8.distillation.processes import Place
from convert_w4a8.distillation.state import StateDirectory
from convert_w4a8.distillation.student import Student, logits_of
from convert_w4a8.distillation.teacher import Teacher
from convert_w4a8.errors import ConvertError
from convert_w4a8.linear import W4A8Linear
from convert_w4a8.targets import find_target

OPTION = "--gpus"
_LEAVES = ("entries", "scale", "weight")
_FIXED = ("codes", "start", "step", "channel_scale")
"""Buffers of a `LutLinear`."""


def check_gpus(
    start: Checkpoint,
    gpus: int,
    device: torch.device,
    *,
    embeddings: bool = False,
    replicate: bool = False,
) -> None:
    """Check that a training of a checkpoint can be spread over so many GPUs, or on a CPU processes.

    replicate: whether each of them has the whole of both models.

    Raises:
        ConvertError: there are fewer GPUs, others are named, embeddings are to be trained in parts, or the model is a
            mixture of experts.

    """
    if gpus == 1:
        return
    if embeddings and not replicate:
        reason = "embeddings are trained where each GPU has the whole of them"
        raise ConvertError(f"{OPTION} {gpus}", reason, f"give --replicate, or leave out {EMBEDDINGS}")
    if device.index:
        remedy = "choose GPUs with CUDA_VISIBLE_DEVICES"
        raise ConvertError(f"{OPTION} {gpus}", "trains on the first GPUs", remedy)
    if device.type == "cuda" and gpus > torch.cuda.device_count():
        there = torch.cuda.device_count()
        raise ConvertError(f"{OPTION} {gpus}", f"there are {there} CUDA devices", f"give {OPTION} {there}")
    if any(map(is_expert, find_target(start).find_layers(start))):
        reason = "a mixture of experts is trained on one GPU only: processes would differ in the experts they use"
        raise ConvertError(f"{OPTION} {gpus}", reason, f"leave out {OPTION}")


@dataclass(frozen=True)
class ShardedStudent(Student):
    """A student of which this process has a part. parts: of the layers' trained parameters, by names."""

    parts: dict[str, nn.Parameter]

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield what this process trains: its rows of layers' parameters, and all of the others."""
        yield from self.parts.items()
        yield from self.others.items()


def shard_student(student: Student, place: Place) -> ShardedStudent:
    """Spread a student on the CPU over the processes, each of which calls this with the same one."""
    for layer in student.layers.values():
        is_latent = layer.weight is not None
        for name in _FIXED:
            buffer = getattr(layer, name)
            delattr(layer, name)
            if is_latent and name == "codes":  # they are chosen anew
                layer.register_buffer(name, buffer.new_empty(0), persistent=False)
                continue
            if name == "codes":  # bytes as they are, of a type that a parameter may be of: torch 2.11 takes no others
                buffer = buffer.view(torch.float8_e4m3fn)
            layer.register_parameter(name, nn.Parameter(buffer, requires_grad=False))
    whole = {
        id(parameter) for layer in student.layers.values() for parameter in layer.parameters() if parameter is not None
    }
    biases = {id(layer.bias) for layer in student.layers.values()}
    shard(student.model, place, whole - biases)
    parts = {}
    for name, leaf, parameter in _sharded(student):
        parts[f"{name}.{leaf}"] = nn.Parameter(_local(parameter))
    return ShardedStudent(student.model, student.layers, student.others, student.again, parts)


def shard(model: nn.Module, place: Place, also: set[int] | None = None) -> nn.Module:
    """Spread a model's matrices over the processes, and what is in `also`: ids of other parameters.

    A block is on the device as a whole before it is spread: then `fuse` sees what kernels can compute of it.

    Raises:
        ConvertError: where its blocks are is not known.

    """
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415  (a second, for those who need it)
    from torch.distributed.fsdp import FSDPModule, fully_shard  # noqa: PLC0415

    kept = {
        parameter for parameter in model.parameters() if parameter.dim() < 2 and id(parameter) not in (also or set())
    }
    mesh = init_device_mesh(place.device.type, (place.ranks,))
    blocks = blocks_of(model, OPTION)
    inside = {module for block in blocks for module in block.modules()}
    for module in model.modules():
        if module not in inside and not any(module.children()):
            fuse(model, place.device, module.to(place.device))
    for module in (*blocks, model):
        if module is not model:
            fuse(model, place.device, module.to(place.device))
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=kept)
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)  # gradients are summed, and losses weighted
        module.set_force_sum_reduction_for_comms(True)
    for parameter in kept:
        parameter.data = parameter.data.to(place.device)
    return model


def _sharded(student: Student) -> Iterator[tuple[str, str, Any]]:
    """Yield the trained parameters of the layers, which are DTensors between passes, with their names."""
    for name, layer in student.layers.items():
        for leaf in _LEAVES:
            parameter = getattr(layer, leaf)
            if parameter is not None:
                yield name, leaf, parameter


def _local(tensor: Any) -> torch.Tensor:
    found: torch.Tensor = tensor.to_local().detach()
    return found


class _Passes:
    """A sharded student's passes, for a `Trainer`."""

    def __init__(self, student: ShardedStudent) -> None:
        self._student = student

    def forward(self, ids: torch.Tensor, *, counts: bool = True) -> torch.Tensor:  # noqa: ARG002  (as `Passes`)
        """Return the logits bfloat16 [B, T, V] of token ids [B, T]."""
        return logits_of(self._student.model, ids)

    @torch.no_grad()
    def backward(self) -> None:
        """Give the parts their gradients, and sum those of the others over the processes, in float32."""
        student = self._student
        for name, leaf, parameter in _sharded(student):
            if parameter.grad is not None:
                student.parts[f"{name}.{leaf}"].grad = _local(parameter.grad)
                parameter.grad = None
        add_up([other.grad for other in student.others.values() if other.grad is not None])


class ShardedTrainer(DataParallelTrainer):
    """A `DataParallelTrainer` whose state is of this process."""

    _own = staticmethod(_local)

    def __init__(self, student: ShardedStudent, teacher: Teacher, options: DistillOptions, place: Place) -> None:
        super().__init__(student, teacher, options, place)
        self._passes = _Passes(student)  # type: ignore[assignment]


class ShardedState(StateDirectory):
    """The state of a training in parts, a file for each process; the first one's notes say that all are there."""

    def __init__(self, out: Path, place: Place) -> None:
        super().__init__(out)
        self._place = place

    def _files(self, step: int) -> list[Path]:
        return part_files(self.path, step, self._place.ranks)

    def file(self, step: int) -> Path:
        """See `StateDirectory`."""
        return self._files(step)[self._place.rank]

    def _finish(self, step: int, notes: Any) -> None:
        dist.barrier()  # all parts are on the disk
        if self._place.is_first:
            super()._finish(step, notes)
        dist.barrier()


def part_files(directory: Path, step: int, ranks: int) -> list[Path]:
    """Return where the parts of a state lie, in the order of the processes."""
    return [directory / f"state-{step}-{rank + 1}-of-{ranks}.safetensors" for rank in range(ranks)]


class BestValues:
    """The best values of a training that is done, read from the parts of its last state, a layer at a time."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files: list[Any] = [safe_open(file, framework="pt") for file in files]

    def layers(self, start: Checkpoint, preset: Preset, device: torch.device) -> Iterator[tuple[str, LutLinear]]:
        """Yield every layer of the checkpoint that was trained, with its values, on a device."""
        target = find_target(start)
        for name in target.find_layers(start):
            w = target.decode(start, name, read_tensor)
            assert isinstance(w, W4A8Linear)
            layer = LutLinear(w, None, preset)
            for leaf in _LEAVES:
                parameter = getattr(layer, leaf)
                if parameter is not None:
                    parts = [file.get_tensor(f"best.{name}.{leaf}") for file in self._files]
                    parameter.data.copy_(torch.cat(parts))
            yield name, layer.to(device)

    def others(self, start: Checkpoint) -> dict[str, torch.Tensor]:
        """Return norms and biases, bfloat16, which every part has whole."""
        first = self._files[0]
        names = [name.removeprefix("best.") for name in first.keys() if name.startswith("best.")]  # noqa: SIM118
        return {name: first.get_tensor(f"best.{name}").bfloat16() for name in names if name in start.tensors}
