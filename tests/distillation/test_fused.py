"""Parts of blocks that are one kernel each: they compute what transformers does, and so do their gradients."""

from pathlib import Path

import pytest
import torch
from torch import nn

from convert_w4a8.checkpoint.directory import open_checkpoint
from convert_w4a8.distillation.fused import replace, rotations
from convert_w4a8.distillation.student import load_teacher, logits_of
from convert_w4a8.distillation.train import recompute_blocks

llama = pytest.importorskip("transformers.models.llama.modeling_llama")
gemma = pytest.importorskip("transformers.models.gemma.modeling_gemma")
CPU = torch.device("cpu")


def gradients(model: nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the logits, and what comes to every parameter of a gradient of ones."""
    model.requires_grad_()
    logits = logits_of(model, ids)
    return logits.detach(), list(torch.autograd.grad(logits.float().logsumexp(-1).sum(), list(model.parameters())))


def test_a_llama_computes_the_same(model: Path) -> None:
    """All of its norms, gates and rotations are replaced; the function of the module is back afterwards."""
    ids = torch.arange(24).view(2, 12)
    whole, parts = (load_teacher(open_checkpoint(model), CPU) for _ in range(2))
    replace(parts)
    replaced = [type(module).__name__ for module in parts.modules() if "forward" in vars(module)]
    assert sorted(replaced) == ["LlamaMLP"] * 2 + ["LlamaRMSNorm"] * 5
    rotate = llama.apply_rotary_pos_emb
    with rotations(parts):
        assert llama.apply_rotary_pos_emb is not rotate
    assert llama.apply_rotary_pos_emb is rotate
    (expected, theirs), (found, ours) = gradients(whole, ids), gradients(parts, ids)
    assert torch.equal(found, expected)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=2.0**-5, atol=float(other.abs().max()) * 2.0**-6)


def test_a_backward_pass_computes_blocks_as_the_forward_pass_did(model: Path) -> None:
    """Where blocks are computed again, which is outside of the passes, rotations are the kernel's too."""
    ids = torch.arange(24).view(2, 12)
    kept, again = (load_teacher(open_checkpoint(model), CPU) for _ in range(2))
    for each in (kept, again):
        replace(each)
    recompute_blocks(again)
    (expected, theirs), (found, ours) = gradients(kept, ids), gradients(again, ids)
    assert torch.equal(found, expected)
    assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))


def test_other_norms_and_gates_stay() -> None:
    """Gemma's norm multiplies by one more than its weight, and its gate is another."""
    config = gemma.GemmaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, head_dim=16, vocab_size=50
    )
    model = gemma.GemmaForCausalLM(config).bfloat16().eval()
    replace(model)
    assert not [module for module in model.modules() if "forward" in vars(module)]
