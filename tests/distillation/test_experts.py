"""Experts in one tensor: the student's are the kernel's arithmetic for each expert, are trained, and are written."""

from pathlib import Path

import pytest
import torch
from small_training import distill, quantized, run, tensors, write_data
from tiny_models import samples_of, write_mixtral, write_qwen3_moe

from convert_w4a8 import api
from convert_w4a8.checkpoint.safetensors_file import read_tensor
from convert_w4a8.distillation.data import make_batch
from convert_w4a8.distillation.experts import LutExperts, place_experts
from convert_w4a8.distillation.linear import Preset
from convert_w4a8.distillation.student import load_student, load_teacher, logits_of
from convert_w4a8.encoding.tables import gemm
from convert_w4a8.errors import ConvertError
from convert_w4a8.linear import W4A8Linear
from convert_w4a8.targets import find_target

CPU = torch.device("cpu")
NAMES = {
    "qwen3_moe": ("model.layers.0.mlp.experts.{}.{}", ("gate_proj", "up_proj", "down_proj")),
    "mixtral": ("model.layers.0.block_sparse_moe.experts.{}.{}", ("w1", "w3", "w2")),
}


@pytest.fixture(scope="module", params=["qwen3_moe", "mixtral"])
def mixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """Write a mixture of experts, and quantize it."""
    directory = tmp_path_factory.mktemp(request.param)
    write = {"qwen3_moe": write_qwen3_moe, "mixtral": write_mixtral}[request.param]
    model = write(directory / "model")
    return request.param, model, quantized(model, directory / "start")


def test_experts_compute_as_the_kernel(mixture: tuple[str, Path, Path]) -> None:
    """Bit for bit what the operator's reference gives for each expert, summed in float32 as vLLM does it."""
    kind, model, start = mixture
    checkpoint = api.open_checkpoint(start)
    student = load_student(checkpoint, api.open_checkpoint(model), Preset.TABLES, CPU)
    experts = student.model.get_submodule("model.layers.0.mlp.experts")
    assert isinstance(experts, LutExperts)
    pattern, leaves = NAMES[kind]
    target = find_target(checkpoint)

    def layer(expert: int, leaf: str) -> W4A8Linear:
        found = target.decode(checkpoint, pattern.format(expert, leaf), read_tensor)
        assert isinstance(found, W4A8Linear)
        return found

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 256, generator=generator).bfloat16()
    index = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(9)])
    weights = torch.rand(9, 2, generator=generator).bfloat16()
    expected = torch.zeros(9, 256)
    for token in range(9):
        order = index[token].argsort()  # sums in the order of the experts
        for choice in order.tolist():
            gate, up, down = (layer(int(index[token, choice]), leaf) for leaf in leaves)
            row = x[token : token + 1]
            inner = torch.nn.functional.silu(gemm(row, gate)) * gemm(row, up)
            expected[token] += gemm(inner, down)[0].float() * weights[token, choice].float()
    assert torch.equal(experts(x, index, weights), expected.bfloat16())


def test_the_student_is_near_its_teacher(mixture: tuple[str, Path, Path]) -> None:
    """Experts, and their projections, are not mixed up: the whole model predicts as the teacher does."""
    _, model, start = mixture
    source = api.open_checkpoint(model)
    student, teacher = load_student(api.open_checkpoint(start), source, Preset.WEIGHTS, CPU), load_teacher(source, CPU)
    ids = make_batch(samples_of([40]).samples, [0]).ids
    with torch.no_grad():
        ours, theirs = logits_of(student.model, ids).float(), logits_of(teacher, ids).float()
    cosine = torch.nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0)
    assert float(cosine) > 0.97


@pytest.mark.parametrize("preset", ["tables", "weights"])
def test_they_are_trained_and_verify(preset: str, mixture: tuple[str, Path, Path], tmp_path: Path) -> None:
    """Tables of every expert change, the output verifies, and is what the training measured."""
    kind, model, start = mixture
    data = [write_data(tmp_path / "text.jsonl", 0, count=160)]
    result = distill(start, model, data, tmp_path / "out", "--rate", "6", "--preset", preset)
    assert result.exit_code == 0, result.output
    verified = run("verify", tmp_path / "out", "--source", start)
    assert verified.exit_code == 0, verified.output
    before, after = tensors(start), tensors(tmp_path / "out")
    pattern, leaves = NAMES[kind]
    for expert in range(4):
        for leaf in leaves:
            name = f"{pattern.format(expert, leaf)}.weight_chan_scale"
            assert not torch.equal(before[name], after[name]), name


def test_experts_that_are_not_all_quantized_are_refused(mixture: tuple[str, Path, Path]) -> None:
    """One line, whichever is missing; and experts that no layer stands for stay as they are."""
    kind, model, start = mixture
    source = api.open_checkpoint(model)
    layers = load_student(api.open_checkpoint(start), source, Preset.TABLES, CPU).layers
    pattern, leaves = NAMES[kind]
    expected = {pattern.format(expert, leaf) for expert in range(4) for leaf in leaves}
    assert place_experts(load_teacher(source, CPU), layers) == expected
    assert place_experts(load_teacher(source, CPU), {}) == set()
    fewer = {name: layer for name, layer in layers.items() if name != pattern.format(3, leaves[1])}
    with pytest.raises(ConvertError, match="not all of them are quantized"):
        place_experts(load_teacher(source, CPU), fewer)
