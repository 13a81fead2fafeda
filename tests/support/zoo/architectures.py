"""The architectures of the zoo, and what makes a tiny model of each load."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """A model type of transformers.

    given: arguments of the configuration, for parts of it that are not there unless they are asked for.
    settings: what replaces the sizes of `sizes`; a mapping goes into a configuration's part of that name.
    saved: keys that are put into the saved config.json.
    files: other JSON files of the checkpoint.
    renames: (pattern, replacement) of tensors' names, where published checkpoints have others than transformers saves.
    transposed: pattern of tensors whose last two dimensions published checkpoints have the other way round.
    split_experts: whether the tool that quantizes writes fused experts [E, K, N] as one layer each.
    """

    model_type: str
    given: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    saved: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Any] = field(default_factory=dict)
    renames: tuple[tuple[str, str], ...] = ()
    transposed: str | None = None
    split_experts: bool = False


_SIGLIP = (
    (r"vision_tower\.(embeddings|encoder|post_layernorm|pre_layrnorm|head)(?=\.)", r"vision_tower.vision_model.\1"),
)

_QWEN2_AUDIO = ((r"language_model\.model\.model\.", "language_model.model."),)

_LFM2: dict[str, Any] = {
    "block_dim": 256,
    "conv_dim": 256,
    "conv_dim_out": 256,
    "block_ff_dim": 512,
    "block_auto_adjust_ff_dim": False,
    "block_multiple_of": 128,
    "block_ffn_dim_multiplier": 1.0,
}

_SPECIAL: dict[str, dict[str, Any]] = {
    "afmoe": {
        "saved": {"score_func": "sigmoid", "route_norm": True, "route_scale": 1.0, "n_group": 1, "topk_group": 1}
    },
    "audioflamingo3": {"renames": _QWEN2_AUDIO},
    "cohere2_vision": {"renames": _SIGLIP},
    "dbrx": {
        "settings": {
            "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2},
            "ffn_config": {"hidden_size": 256, "ffn_hidden_size": 512, "moe_num_experts": 4, "moe_top_k": 2},
            "d_model": 256,
            "vocab_size": 512,
            "n_layers": 2,
            "n_heads": 4,
            "max_seq_len": 512,
        }
    },
    "deepseek_v2": {"saved": {"topk_method": "greedy", "n_group": 1, "topk_group": 1}},
    "deepseek_v3": {"saved": {"topk_method": "noaux_tc"}},
    "deepseek_v32": {"saved": {"topk_method": "noaux_tc"}},
    "dots1": {"settings": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}},
    "ernie4_5_moe": {"settings": {"moe_layer_start_index": 0, "moe_layer_end_index": 1, "moe_layer_interval": 1}},
    "falcon": {"settings": {"new_decoder_architecture": True, "ffn_hidden_size": 1024}},
    "gemma3n_text": {"settings": {"activation_sparsity_pattern": [0.0, 0.0]}},
    "gemma3": {"renames": _SIGLIP},
    "gemma4": {
        "given": {"vision_config": {"model_type": "gemma4_vision"}},
        "saved": {"text_config": {"per_layer_config": None}},
    },
    "gemma4_text": {"saved": {"per_layer_config": None}},
    "gemma4_unified": {
        "given": {"vision_config": {"model_type": "gemma4_unified_vision"}},
        "saved": {"text_config": {"per_layer_config": None}},
    },
    "glm4_moe": {"saved": {"head_dim": 64}},
    "glm4_moe_lite": {"saved": {"first_k_dense_replace": 1}},
    "glm4v_moe": {"saved": {"text_config": {"head_dim": 64, "use_qk_norm": False}}},
    "glm5_next": {"settings": {"text_config": {"num_key_value_heads": 4}}},
    "glm_moe_dsa": {"saved": {"first_k_dense_replace": 1, "topk_method": "noaux_tc"}},
    "hunyuan_v1_dense": {"saved": {"use_qk_norm": True}},
    "hunyuan_v1_moe": {
        "saved": {
            "use_qk_norm": True,
            "moe_intermediate_size": [512, 512],
            "use_mixed_mlp_moe": True,
            "num_shared_expert": [1, 1],
        }
    },
    "hunyuan_vl": {"files": {"preprocessor_config.json": {"image_processor_type": "HunYuanVLImageProcessor"}}},
    "hy_v3": {"saved": {"first_k_dense_replace": 1, "expert_hidden_dim": 512, "qk_norm": True, "route_norm": True}},
    "inkling_text": {"saved": {"padded_vocab_size": 512}},
    "internvl": {"settings": {"vision_config": {"image_size": [56, 56], "patch_size": [14, 14]}}},
    "kimi_linear": {
        "renames": ((r"\.block_sparse_moe\.(gate|up|down)_proj", r".mlp.\1_proj"),),
        "saved": {
            "mla_use_nope": True,
            "first_k_dense_replace": 1,
            "linear_attn_config": {
                "kda_layers": [1],
                "full_attn_layers": [2],
                "num_heads": 32,
                "head_dim": 128,
                "short_conv_kernel_size": 4,
            },
        },
    },
    "laguna": {"settings": {"num_attention_heads_per_layer": [4, 4]}},
    "lfm2": {"saved": _LFM2},
    "lfm2_moe": {"settings": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}},
    "lfm2_vl": {
        "settings": {"vision_config": {"vision_use_head": False}},
        "saved": {"text_config": _LFM2},
        "renames": _SIGLIP,
    },
    "llama4": {"split_experts": True},
    "llava": {"renames": _SIGLIP},
    "llava_next": {"renames": _SIGLIP},
    "llava_onevision": {"renames": _SIGLIP},
    "longcat_flash": {"saved": {"mla_scale_q_lora": True, "mla_scale_kv_lora": True, "zero_expert_type": "identity"}},
    "mamba2": {"settings": {"num_heads": 8, "head_dim": 64, "state_size": 64, "n_groups": 1}},
    "mimo_v2_flash": {
        "saved": {
            "hybrid_layer_pattern": [0, 1],
            "moe_layer_freq": [0, 1],
            "layernorm_epsilon": 1e-5,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 64,
            "swa_v_head_dim": 64,
            "swa_rope_theta": 10000.0,
            "sliding_window_size": 128,
        }
    },
    "minimax_m3_vl": {
        "settings": {
            "projector_hidden_size": 256,
            "merged_hidden_size": 1024,
            "text_config": {"dense_intermediate_size": 512},
        }
    },
    "minimax_m2": {"saved": {"rotary_dim": 32, "scoring_func": "sigmoid", "use_routing_bias": True}},
    "molmo2": {"settings": {"adapter_config": {"vision_feature_layer": [0, 0], "text_hidden_size": 256}}},
    "nemotron": {"settings": {"head_dim": 64, "num_key_value_heads": 2}},
    "nemotron_h": {"settings": {"layers_block_type": ["linear_attention", "full_attention"]}},
    "olmo": {"settings": {"num_key_value_heads": 4}},
    "paligemma": {
        "settings": {"projection_dim": 256, "hidden_size": 256, "vision_config": {"projection_dim": 256}},
        "renames": _SIGLIP,
    },
    "phi": {"settings": {"intermediate_size": 1024, "num_key_value_heads": 4}},
    "qwen2_audio": {"renames": _QWEN2_AUDIO},
    "qwen3_vl_moe": {
        "transposed": r"\.experts\.(gate_up|down)_proj$",
        "saved": {"text_config": {"norm_topk_prob": True}},
    },
    "zamba2": {
        "settings": {
            "attention_hidden_size": 512,
            "attention_head_dim": 128,
            "num_key_value_heads": 4,
            "hybrid_layer_ids": [1],
        }
    },
}

_TYPES = """
 afmoe apertus arcee aria audioflamingo3 bamba bloom cohere cohere2 cohere2_moe cohere2_vision dbrx deepseek_v2
deepseek_v3 deepseek_v32 deepseek_v4 dots1 ernie4_5 ernie4_5_moe ernie4_5_vl_moe exaone4 exaone4_5 exaone_moe falcon
falcon_h1 falcon_mamba flex_olmo gemma gemma2 gemma3 gemma3_text gemma3n gemma3n_text gemma4 gemma4_text
gemma4_unified glm glm4 glm4_moe glm4_moe_lite glm4v glm4v_moe glm5_next glm_moe_dsa glm_ocr gpt_bigcode gpt_neox
gpt_oss gptj granite granite4_vision granite_speech granitemoe granitemoehybrid granitemoeshared hunyuan_v1_dense
hunyuan_v1_moe hunyuan_vl hy_v3 hyperclovax idefics3 inkling_text internvl jais2 jamba kimi_k25 kimi_linear laguna
lfm2 lfm2_moe lfm2_vl llama llama4 llava llava_next llava_onevision longcat_flash mamba mamba2 mimo_v2_flash minicpm3
minimax_m2 minimax_m3_vl ministral3 mistral mistral3 mixtral mllama molmo2 nemotron nemotron_h olmo olmo2 olmo3
olmo_hybrid olmoe opt paddleocr_vl paligemma persimmon phi phi3 phimoe qwen2 qwen2_5_omni qwen2_5_vl qwen2_audio
qwen2_moe qwen2_vl qwen3 qwen3_5 qwen3_5_moe qwen3_asr qwen3_moe qwen3_next qwen3_omni_moe qwen3_vl qwen3_vl_moe
seed_oss smollm3 smolvlm solar_open stablelm starcoder2 step3p7 vaultgemma voxtral whisper zamba2
"""

ARCHITECTURES: dict[str, Architecture] = {
    model_type: Architecture(model_type, **_SPECIAL.get(model_type, {})) for model_type in _TYPES.split()
}
