"""Architectures by their tensor names: which linear layers the tools quantize, and what else a checkpoint holds."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

HIDDEN = 256
HEADS = 4
HEAD_DIM = 64
VOCAB = 64
LAYERS = 2


@dataclass(frozen=True)
class Model:
    """Names and shapes of one architecture.

    linears: module → (N, K), the layers that the tools quantize.
    dense: tensor → shape, everything else.
    """

    config: dict[str, Any]
    linears: dict[str, tuple[int, int]]
    dense: dict[str, tuple[int, ...]]


def _decoder(
    mlps: dict[str, tuple[int, int]],
    routers: Mapping[str, tuple[int, ...]],
    *,
    config: dict[str, Any],
    kv_dim: int = 128,
    tied: bool,
    bias: bool = False,
    qk_norm: bool = False,
) -> Model:
    """Put attention, norms and embeddings around the given MLP modules, each named within its layer."""
    attention = {"q_proj": HIDDEN, "k_proj": kv_dim, "v_proj": kv_dim}
    linears: dict[str, tuple[int, int]] = {}
    dense: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for name, width in attention.items():
            linears[f"{prefix}self_attn.{name}"] = (width, HIDDEN)
            if bias:
                dense[f"{prefix}self_attn.{name}.bias"] = (width,)
        linears[prefix + "self_attn.o_proj"] = (HIDDEN, HIDDEN)
        linears |= {prefix + name: shape for name, shape in mlps.items()}
        dense |= {prefix + name: shape for name, shape in routers.items()}
        dense[prefix + "input_layernorm.weight"] = (HIDDEN,)
        dense[prefix + "post_attention_layernorm.weight"] = (HIDDEN,)
        if qk_norm:
            dense[prefix + "self_attn.q_norm.weight"] = (HEAD_DIM,)
            dense[prefix + "self_attn.k_norm.weight"] = (HEAD_DIM,)
    dense["model.norm.weight"] = (HIDDEN,)
    if not tied:
        dense["lm_head.weight"] = (VOCAB, HIDDEN)
    common = {
        "bos_token_id": 0,
        "eos_token_id": 1,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "max_position_embeddings": 512,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": kv_dim // HEAD_DIM or 1,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": tied,
        "vocab_size": VOCAB,
    }
    return Model(common | config, linears, dense)


def _gated_mlp(prefix: str, intermediate: int) -> dict[str, tuple[int, int]]:
    return {
        prefix + "gate_proj": (intermediate, HIDDEN),
        prefix + "up_proj": (intermediate, HIDDEN),
        prefix + "down_proj": (HIDDEN, intermediate),
    }


def llama(*, intermediate: int = 512, kv_dim: int = 128, tied: bool = True) -> Model:
    """Llama, dense, with tied embeddings unless told otherwise."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "intermediate_size": intermediate,
        "attention_bias": False,
        "mlp_bias": False,
    }
    return _decoder(_gated_mlp("mlp.", intermediate), {}, config=config, kv_dim=kv_dim, tied=tied)


def qwen2() -> Model:
    """Qwen2: biases on q, k and v."""
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "intermediate_size": 512,
        "use_sliding_window": False,
    }
    return _decoder(_gated_mlp("mlp.", 512), {}, config=config, tied=True, bias=True)


def qwen3_moe(*, experts: int = 4) -> Model:
    """Qwen3-MoE: one set of tensors per expert, an unquantized router, norms on q and k."""
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "intermediate_size": 512,
        "moe_intermediate_size": 256,
        "num_experts": experts,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    }
    mlps: dict[str, tuple[int, int]] = {}
    for expert in range(experts):
        mlps |= _gated_mlp(f"mlp.experts.{expert}.", 256)
    routers = {"mlp.gate.weight": (experts, HIDDEN)}
    return _decoder(mlps, routers, config=config, tied=False, qk_norm=True)


def mixtral(*, experts: int = 4, block_sparse_names: bool) -> Model:
    """Mixtral as AutoAWQ names it (block_sparse_moe … w1, w2, w3) or as GPTQModel does (mlp … gate_proj)."""
    config = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "intermediate_size": 512,
        "num_local_experts": experts,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    }
    moe = "block_sparse_moe." if block_sparse_names else "mlp."
    mlps: dict[str, tuple[int, int]] = {}
    for expert in range(experts):
        if block_sparse_names:
            prefix = f"{moe}experts.{expert}."
            mlps |= {prefix + "w1": (512, HIDDEN), prefix + "w2": (HIDDEN, 512), prefix + "w3": (512, HIDDEN)}
        else:
            mlps |= _gated_mlp(f"{moe}experts.{expert}.", 512)
    return _decoder(mlps, {moe + "gate.weight": (experts, HIDDEN)}, config=config, tied=False)
