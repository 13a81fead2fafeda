"""Parts of blocks that are one kernel each: they compute what transformers does, and so do their gradients."""

from pathlib import Path

import pytest
import torch
from tiny_models import write_model
from torch import nn

from convert_w4a8.checkpoint.directory import open_checkpoint
from convert_w4a8.distillation import fused
from convert_w4a8.distillation.fused import replace, rotations
from convert_w4a8.distillation.student import load_teacher, logits_of

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


def test_other_norms_and_gates_stay() -> None:
    """Gemma's norm multiplies by one more than its weight, and its gate is another."""
    config = gemma.GemmaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, head_dim=16, vocab_size=50
    )
    model = gemma.GemmaForCausalLM(config).bfloat16().eval()
    replace(model)
    assert not [module for module in model.modules() if "forward" in vars(module)]


def test_rotations_of_a_part_of_each_head_stay(tmp_path: Path) -> None:
    """The same function of transformers turns whole heads of one model, and the first half of each of another."""
    positions = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    directory = write_model(tmp_path / "phi", "Phi3ForCausalLM", "Phi3Config", rope_parameters=positions)
    ids = torch.arange(24).view(2, 12)
    whole, parts = (load_teacher(open_checkpoint(directory), CPU) for _ in range(2))
    replace(parts)
    assert torch.equal(logits_of(parts, ids), logits_of(whole, ids))


class CutGate(llama.LlamaMLP):  # type: ignore[misc, name-defined]
    """A gate whose activations have a limit, which those of everyday inputs do not reach."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute it."""
        gates = self.gate_proj(x).clamp(max=7)
        found: torch.Tensor = self.down_proj(self.act_fn(gates) * self.up_proj(x))
        return found


def test_a_gate_with_a_limit_stays() -> None:
    """As DeepSeek V4's."""
    config = llama.LlamaConfig(hidden_size=32, intermediate_size=64)
    gates = nn.ModuleList([CutGate(config), llama.LlamaMLP(config)]).bfloat16().eval()
    replace(gates)
    assert ["forward" in vars(gate) for gate in gates] == [False, True]


def test_a_norm_of_float32_is_not_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is for BF16: what a model normalizes in float32 is left to transformers."""
    norm = llama.LlamaRMSNorm(32).bfloat16()
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    expected = norm(x)
    replace(norm)
    assert "forward" in vars(norm)
    monkeypatch.setattr(fused, "blocks", lambda _device: pytest.fail("a kernel was called"))
    assert torch.equal(norm(x), expected)
