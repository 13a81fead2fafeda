"""The two models have the checkpoints' numbers, in the dtypes that they are computed in."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_training import quantized, run
from tiny_models import write_gemma_that_sees, write_model

from convert_w4a8.checkpoint.directory import open_checkpoint
from convert_w4a8.distillation.linear import LutLinear, Preset
from convert_w4a8.distillation.student import load_student, load_teacher, logits_of

llama = pytest.importorskip("transformers.models.llama.modeling_llama")
CPU = torch.device("cpu")


def test_what_is_kept_in_float32_is_not_rounded(tmp_path: Path) -> None:
    """A router chooses by scores and a correction of many bits, which vLLM has in float32, as the checkpoint does."""
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "moe_intermediate_size": 256, "num_experts_per_tok": 2}
    more = {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
    model = write_model(tmp_path / "model", "Glm4MoeForCausalLM", "Glm4MoeConfig", **sizes, **more)
    found = load_file(model / "model.safetensors")
    (name,) = (name for name in found if name.endswith("e_score_correction_bias"))
    found[name] = correction = torch.tensor([9.001, 9.002, 9.003, 9.004])
    save_file(found, model / "model.safetensors", metadata={"format": "pt"})
    start = open_checkpoint(quantized(model, tmp_path / "start"))
    assert start.tensors[name].dtype == "F32"
    teacher = open_checkpoint(model)
    for each in (load_teacher(teacher, CPU), load_student(start, teacher, Preset.TABLES, CPU).model):
        assert torch.equal(each.get_buffer(name), correction)


def test_a_decoder_that_transformers_has_elsewhere(tmp_path: Path) -> None:
    """Layers, norms and all are found by the checkpoint's names, under which they are written."""
    model = write_gemma_that_sees(tmp_path / "model")
    assert run("quantize", model, tmp_path / "start", "--device", "cpu").exit_code == 0
    start, teacher = open_checkpoint(tmp_path / "start"), open_checkpoint(model)
    student = load_student(start, teacher, Preset.TABLES, CPU)
    assert student.layers.keys() == {name.removesuffix(".weight_lut") for name in start.tensors if "_lut" in name}
    assert sum(isinstance(module, LutLinear) for module in student.model.modules()) == len(student.layers)
    decoder = "language_model.model."
    assert {name for name in start.tensors if name.startswith(decoder) and "norm" in name} <= student.others.keys()
    assert student.others.keys() <= start.tensors.keys()
    ids = torch.arange(24)[None]
    with torch.no_grad():
        ours, theirs = (logits_of(each, ids).float() for each in (student.model, load_teacher(teacher, CPU)))
    assert float(torch.nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0)) > 0.9


def test_vectors_that_are_computed_in_float32_are_not_trained(
    model: Path, start: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would be taken for weights or entries of layers; they are written as they are."""
    monkeypatch.setattr(llama.LlamaForCausalLM, "_keep_in_fp32_modules_strict", ["post_attention_layernorm"])
    student = load_student(open_checkpoint(start), open_checkpoint(model), Preset.WEIGHTS, CPU)
    assert student.model.get_parameter("model.layers.0.post_attention_layernorm.weight").dtype is torch.float32
    assert {name.split(".")[-2] for name in student.others} == {"input_layernorm", "norm"}
