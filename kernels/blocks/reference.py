"""What transformers computes between the linear layers of Llama-like blocks, and its gradients, in torch.

Where transformers rounds to bfloat16, so do these; gradients are those that autograd finds of its code.
"""

import torch


def normalize(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return bf16(weight·bf16(x/‖x‖)), bfloat16 [M, H], and 1/‖x‖, float32 [M, 1], with ‖x‖² = mean x² + epsilon.

    x: bfloat16 [M, H]. weight: bfloat16 [H]. This is `LlamaRMSNorm`.
    """
    wide = x.float()
    inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * (wide * inverse).to(x.dtype), inverse


def normalize_gradients(
    gradient: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, inverse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of `normalize` by x, bfloat16 [M, H], and by the weight, float32 [H]."""
    normalized = x.float() * inverse
    of_weight = (gradient.float() * normalized.to(x.dtype)).sum(0)
    wide = (gradient * weight).float()
    return (inverse * (wide - normalized * (wide * normalized).mean(-1, keepdim=True))).to(x.dtype), of_weight


def gate(gates: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return bf16(bf16(silu(gates))·up), bfloat16 [M, H]."""
    return torch.nn.functional.silu(gates) * up


def gate_gradients(gradient: torch.Tensor, gates: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of `gate` by gates and up, bfloat16 [M, H]."""
    wide = gates.float()
    share = torch.sigmoid(wide)
    of_gates = (gradient * up).float() * (share * (1 + wide * (1 - share)))
    return of_gates.to(gates.dtype), gradient * torch.nn.functional.silu(gates)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, back: bool) -> torch.Tensor:
    """Return x·cos + (−x₂, x₁)·sin of halves x₁, x₂ of the last dimension, or, where `back` says so, its gradient by x.

    x: bfloat16 [B, heads, T, D]. cos, sin: bfloat16 [B or 1, T, D]. Products and sum are rounded.
    """
    half = x.shape[-1] // 2
    cos, sin = cos[:, None], sin[:, None]
    if back:
        turned = x * sin
        return x * cos + torch.cat((turned[..., half:], -turned[..., :half]), dim=-1)
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin
