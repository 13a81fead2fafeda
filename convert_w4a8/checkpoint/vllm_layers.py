"""Layers that vLLM never quantizes whatever the checkpoint says, and layers that it merges, by model.

As seen in vLLM 0.25.1 and 0.33.0 (tests/checkpoint/test_vllm_models_sources.py reads their sources). Names are those
that modules have in checkpoints.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Unquantized:
    """Layers that vLLM makes without a quantization method.

    models: names in a config.json that tell the models (`architectures`, `model_type`); empty where all are meant.
    modules: pattern, searched for in the module's name.
    what: what they are, for a list of them.
    """

    models: tuple[str, ...]
    modules: str
    what: str


_PROJECTORS = (
    *("AriaForConditionalGeneration", "AudioFlamingo3ForConditionalGeneration", "BeeForConditionalGeneration"),
    *("Cohere2VisionForConditionalGeneration", "CohereCompassForConditionalGeneration", "RForConditionalGeneration"),
    *("InternS1ForConditionalGeneration", "InternVLForConditionalGeneration", "KimiVLForConditionalGeneration"),
    *("Lfm2VlForConditionalGeneration", "Llama4ForConditionalGeneration", "LlavaNextVideoForConditionalGeneration"),
    *("LlavaOnevisionForConditionalGeneration", "PaliGemmaForConditionalGeneration"),
    *("Qwen2AudioForConditionalGeneration", "UltravoxModel"),
)
_AUDIO = (
    *("Qwen3OmniMoeForConditionalGeneration", "Qwen3ASRForConditionalGeneration", "Qwen3ASRRealtimeGeneration"),
    *("Qwen3ASRForcedAlignerForTokenClassification", "FunASRForConditionalGeneration"),
    *("FunAudioChatForConditionalGeneration", "FireRedASR2ForConditionalGeneration", "MiMoV2OmniForCausalLM"),
    *("MoonshotKimiaForCausalLM", "Phi4MMForCausalLM", "VoxtralForConditionalGeneration"),
    *("VoxtralRealtimeGeneration",),
)
_VISUAL = (
    *("InternS1ProForConditionalGeneration", "Glm5NextForConditionalGeneration", "MiMoV2OmniForCausalLM"),
    *("LlavaOnevision2ForConditionalGeneration",),
)

UNQUANTIZED = (
    Unquantized((), r"(?:^|\.)shared_expert_gate$", "gates of shared experts"),
    Unquantized((), r"\.router\.(?:layer|proj|classifier)$", "routers"),
    Unquantized((), r"(?:^|\.)(?:eh_proj|mtp_linear_proj)$|\.mtp_layers\.\d+\.input_proj$", "inputs of MTP layers"),
    Unquantized(
        (),
        r"(?:^|\.)(?:score|classifier|v_head|custom_text_proj|text_projection|visual_projection|pooler\.dense)$",
        "heads of classifiers, reward and embedding models",
    ),
    Unquantized((), r"(?:^|\.)gate_projections\.|\.sparse_indexer_w$", "gates of attention"),
    Unquantized((), r"\.indexer\.(?:wk|weights_proj)$|\.compressor\.(?:wkv|wgate)$", "sparse attention's indexers"),
    Unquantized(
        ("MambaForCausalLM", "FalconMambaForCausalLM", "JambaForCausalLM", "JambaForSequenceClassification"),
        r"\.(?:mixer|mamba)\.(?:in_proj|x_proj|dt_proj|out_proj)$",
        "Mamba 1 layers",
    ),
    Unquantized(
        ("Lfm2ForCausalLM", "Lfm2MoeForCausalLM", "Lfm2VlForConditionalGeneration", "Lfm2BidirectionalModel"),
        r"\.conv\.(?:in_proj|out_proj)$",
        "short convolutions (vLLM 0.25.1)",
    ),
    Unquantized(
        ("MiniCPMForCausalLM", "ArcticForCausalLM", "FlexOlmoForCausalLM"), r"\.experts\.\d+\.", "experts of old code"
    ),
    Unquantized(("ModernBertModel", "ModernBertForSequenceClassification"), r"\.(?:Wqkv|Wo|Wi)$", "encoders"),
    Unquantized(_PROJECTORS, r"(?:^|\.)multi_modal_projector\.", "projectors"),
    Unquantized(
        ("Mistral3ForConditionalGeneration", "LightOnOCRForConditionalGeneration"), r"\.merging_layer$", "projectors"
    ),
    Unquantized(("PaddleOCRVLForConditionalGeneration",), r"(?:^|\.)mlp_AR\.", "projectors"),
    Unquantized(("HCXVisionForCausalLM", "HCXVisionV2ForCausalLM"), r"(?:^|\.)mm_projector(?:\.|$)", "projectors"),
    Unquantized(("DeepseekVLV2ForCausalLM",), r"(?:^|\.)projector\.", "projectors"),
    Unquantized(
        ("DeepseekOCRForCausalLM", "DeepseekOCR2ForCausalLM", "UnlimitedOCRForCausalLM"),
        r"(?:^|\.)(?:sam_model|projector)\.",
        "vision towers",
    ),
    Unquantized(("Blip2ForConditionalGeneration",), r"^(?:qformer|language_projection)(?:\.|$)", "projectors"),
    Unquantized(
        ("GraniteSpeechForConditionalGeneration", "GraniteSpeechPlusForConditionalGeneration"),
        r"^(?:encoder|projector)\.",
        "audio towers",
    ),
    Unquantized(
        ("Granite4VisionForConditionalGeneration",), r"(?:^|\.)(?:layerwise|spatial)_projectors\.", "projectors"
    ),
    Unquantized(
        ("Gemma3nForConditionalGeneration", "Gemma4UnifiedForConditionalGeneration"),
        r"\.embedding_projection$",
        "projectors",
    ),
    Unquantized(("DiffusionGemmaForBlockDiffusion",), r"(?:^|\.)self_conditioning\.", "self-conditioning"),
    Unquantized(("Ernie4_5_VLMoeForConditionalGeneration",), r"(?:^|\.)resampler_model\.", "projectors"),
    Unquantized(
        ("MiniCPMV4_6ForConditionalGeneration", "MiniCPMV4_7ForConditionalGeneration"),
        r"(?:^|\.)(?:vit_)?merger\.",
        "projectors",
    ),
    Unquantized(("MiniCPMO",), r"^(?:apm|audio_projection_layer)\.", "audio towers"),
    Unquantized(
        ("Llama4ForConditionalGeneration", "Step3VLForConditionalGeneration", "NemotronH_Nano_VL_V2"),
        r"(?:^|\.)(?:vision_model|vit_large_projector)(?:\.|$)",
        "vision towers",
    ),
    Unquantized(
        (
            "InternS1ForConditionalGeneration",
            "InternVLForConditionalGeneration",
            "KimiVLForConditionalGeneration",
            "MuseGlimmerForConditionalGeneration",
        ),
        r"(?:^|\.)vision_(?:tower|adapter|projection)(?:\.|$)",
        "vision towers",
    ),
    Unquantized(
        ("KimiK25ForConditionalGeneration", "KimiK3ForConditionalGeneration"),
        r"(?:^|\.)(?:vision_tower|mm_projector)\.",
        "vision towers, in compressed-tensors only",
    ),
    Unquantized(
        ("PixtralForConditionalGeneration",),
        r"^(?:vision_encoder|vision_language_adapter|patch_merger)\.",
        "vision towers",
    ),
    Unquantized(_VISUAL, r"(?:^|\.)visual\.", "vision towers"),
    Unquantized(_AUDIO, r"(?:^|\.)(?:\w*audio\w*|whisper_encoder|vq_adaptor)\.", "audio towers"),
)


@dataclass(frozen=True)
class Merged:
    """Layers that vLLM loads into one, beyond q/k/v, gate/up and w1/w3 (`names.py`), and so quantizes alike.

    models: names in a config.json that tell the models; empty where all are meant.
    shards: ends of the names of the merged modules, with the dots between their parts.
    name: the same end in the name of the module that vLLM makes of them. With one shard: it is renamed only.
    """

    models: tuple[str, ...]
    shards: tuple[str, ...]
    name: str


MERGED = (
    Merged((), ("q_a_proj", "kv_a_proj_with_mqa"), "fused_qkv_a_proj"),
    Merged((), ("in_proj_qkv", "in_proj_z"), "in_proj_qkvz"),
    Merged((), ("in_proj_b", "in_proj_a"), "in_proj_ba"),
    Merged((), ("c_fc_0", "c_fc_1"), "gate_up_proj"),
    Merged((), ("attn.q", "attn.k", "attn.v"), "attn.qkv"),
    Merged((), ("attention.self.query", "attention.self.key", "attention.self.value"), "attention.self.qkv_proj"),
    Merged((), ("encoder_attn.k_proj", "encoder_attn.v_proj"), "encoder_attn.kv_proj"),
    Merged(
        (),
        ("first_sub_layer.query_net", "first_sub_layer.key_net", "first_sub_layer.value_net"),
        "first_sub_layer.qkv_proj",
    ),
    Merged((), ("second_sub_layer.key_net", "second_sub_layer.value_net"), "second_sub_layer.kv_proj"),
    Merged((), ("wq_a", "wkv"), "fused_wqa_wkv"),
    Merged((), ("wq_du", "wk_dv", "wv_dv", "wr_du"), "qkvr"),
    Merged(
        ("InternLM2ForCausalLM", "InternLM2ForRewardModel", "internlm2"),
        ("feed_forward.w1", "feed_forward.w3"),
        "feed_forward.gate_up_proj",
    ),
    Merged(("DeepseekV4ForCausalLM", "DeepseekV41ForCausalLM"), ("w1", "w3"), "gate_up_proj"),
    Merged(
        ("TeleChatForCausalLM", "TeleChat2ForCausalLM", "telechat", "telechat2"),
        ("self_attention.query", "self_attention.key_value"),
        "self_attention.qkv_proj",
    ),
    Merged(
        ("OlmoHybridForCausalLM", "olmo_hybrid"),
        ("linear_attn.q_proj", "linear_attn.k_proj", "linear_attn.v_proj", "linear_attn.g_proj"),
        "linear_attn.in_proj_qkvg",
    ),
    Merged(
        ("AliceAIForCausalLM", "alice_ai"),
        (
            "linear_attn.q_proj",
            "linear_attn.k_proj",
            "linear_attn.v_proj",
            "linear_attn.b_proj",
            "linear_attn.f_a_proj",
        ),
        "linear_attn.in_proj_qkvgfab",
    ),
    Merged(
        ("KimiLinearForCausalLM", "KimiK3ForConditionalGeneration", "kimi_linear"),
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.b_proj", "self_attn.f_a_proj"),
        "self_attn.in_proj_qkvgfab",
    ),
    Merged(
        ("KimiK3ForConditionalGeneration",),
        ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa", "self_attn.g_proj"),
        "self_attn.fused_qkv_a_g_proj",
    ),
    Merged(
        ("Glm5NextForCausalLM", "Glm5NextForConditionalGeneration"),
        (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.b_proj",
            "self_attn.f_a_proj",
            "self_attn.g_a_proj",
        ),
        "self_attn.in_proj_qkvbfg_a",
    ),
    Merged(
        ("BailingMoeV3ForCausalLM", "BailingMoeV3VLForConditionalGeneration"),
        ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.b_proj"),
        "attention.qkvb_proj",
    ),
    Merged(
        ("MiniMaxM3SparseForConditionalGeneration",),
        (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.index_q_proj",
            "self_attn.index_k_proj",
        ),
        "self_attn.qkv_proj",
    ),
    Merged(
        ("BeamForCausalLM",),
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.gate_proj"),
        "self_attn.qkv_gate_proj",
    ),
    Merged(
        ("Qwen4ExpForCausalLM", "Qwen4ExpForConditionalGeneration"),
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.indexer.index_qk_proj"),
        "self_attn.qkv_proj",
    ),
    Merged(
        ("Qwen4ExpForCausalLM", "Qwen4ExpForConditionalGeneration"), ("ple.key_proj", "ple.value_proj"), "ple.kv_proj"
    ),
    Merged(("GLM4VForCausalLM",), ("linear_proj.gate_proj", "linear_proj.dense_h_to_4h"), "linear_proj.merged_proj"),
    Merged(("DotsOCRForCausalLM", "Ovis", "Ovis2_5"), ("fc1", "fc3"), "fc13"),
    Merged(("Molmo2ForConditionalGeneration",), ("wq", "wk", "wv"), "merged_qkv"),
    Merged(
        ("Glm4vForConditionalGeneration", "Glm4vMoeForConditionalGeneration", "GlmOcrForConditionalGeneration"),
        ("attn.qkv",),
        "attn.qkv_proj",
    ),
    Merged(("MiniCPM3ForCausalLM", "minicpm3"), ("q_a_proj",), "q_a_proj"),
    Merged(("MiniCPM3ForCausalLM", "minicpm3"), ("kv_a_proj_with_mqa",), "kv_a_proj_with_mqa"),
)
"""Of rows that fit one module, the last counts."""
