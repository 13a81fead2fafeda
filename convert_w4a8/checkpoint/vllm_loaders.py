"""Layers whose converted tensors vLLM's model code reshapes, permutes, splits or leaves out while it loads them.

Such code was written for a 16-bit `weight` of [N, K]. It was read, and most of it was run, as it is in vLLM 0.25.1 and
0.33.0 (tests/checkpoint/test_vllm_models_witness.py). A row that holds for one of the two holds for both: who serves a
checkpoint, and with which vLLM, is not known when it is written.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class Effect(StrEnum):
    """What becomes of a layer."""

    SILENT = "silent"
    """vLLM starts, and multiplies by other weights than the checkpoint's."""
    DIES = "dies"
    """vLLM stops with an error while it loads the model."""


@dataclass(frozen=True)
class Touched:
    """Layers of some models that vLLM's code for these models loads wrongly.

    models: names in a config.json that tell the models: `architectures` or `model_type`, of parts of it too; empty
        where all are meant.
    modules: pattern, searched for in the name that a module has in the checkpoint.
    effects: output format → what becomes of the layer in it; a format that is not named is loaded right.
    reason: why, in one line for users.
    file: where it was seen, below `vllm/model_executor/models` or, with `models/`, below `vllm`.
    remedy: whether vLLM loads the layer right where it is kept in BF16.
    settings: what a model must also have, if anything: any of these keys of config.json with the value 1.
    split: whether it is only so at tensor-parallel sizes above 1.
    """

    models: tuple[str, ...]
    modules: str
    effects: Mapping[str, Effect]
    reason: str
    file: str
    remedy: bool = True
    settings: tuple[str, ...] = ()
    split: bool = False

    def holds(self, module: str, target: str) -> bool:
        """Whether a module is touched in an output format."""
        target = _SAME_TENSORS.get(target, target)
        return target in self.effects and re.search(self.modules, module) is not None


_SAME_TENSORS = {"w4a16": "compressed-tensors"}
"""Formats whose tensors are called and shaped as those of another one."""


def _both(effect: Effect) -> dict[str, Effect]:
    return {"lut": effect, "compressed-tensors": effect}


TOUCHED = (
    Touched(
        ("Llama4ForCausalLM", "Llama4ForConditionalGeneration", "EagleLlama4ForCausalLM", "llama4", "llama4_text"),
        r"^(?!.*vision).*(?:^|\.)(?:q_proj|k_proj|wq|wk)$",
        {"lut": Effect.SILENT},
        "vLLM's Llama 4 reorders the first dimension of q's and k's tensors for its rotary embedding, as if it were"
        " output channels; in this format it is input channels",
        "llama4.py",
    ),
    Touched(
        ("Glm5NextForCausalLM", "Glm5NextForConditionalGeneration", "Glm5NextMTPModel", "glm5_next", "glm5next"),
        r"\.(?:q_a_proj|kv_a_proj_with_mqa|q_b_proj|o_proj)$",
        _both(Effect.SILENT),
        "vLLM's GLM-5-Next takes weight_scale of this layer for that of an FP8 checkpoint, and never loads it",
        "models/glm5next/common/model.py",
    ),
    Touched(
        (
            *("MistralForCausalLM", "Ministral3ForCausalLM", "Mistral3ForConditionalGeneration"),
            *("PixtralForConditionalGeneration", "VoxtralForConditionalGeneration", "VoxtralRealtimeGeneration"),
            *("mistral", "ministral", "ministral3", "mistral3", "pixtral", "voxtral", "voxtral_realtime"),
        ),
        r"(?:^|\.)attention\.w[qk]$",
        _both(Effect.SILENT),
        "vLLM reorders the rows of wq and wk, as Mistral's own names say, only if they are called `weight`",
        "mistral.py",
    ),
    Touched(
        (
            *("WhisperForConditionalGeneration", "UltravoxModel", "GlmAsrForConditionalGeneration", "whisper"),
            *("MossTranscribeDiarizeForConditionalGeneration", "VoxtralForConditionalGeneration", "ultravox"),
            *("VoxtralRealtimeGeneration", "glmasr", "moss_transcribe_diarize", "voxtral", "voxtral_realtime"),
        ),
        r"(?:encoder|decoder|audio|whisper).*\.(?:k_proj|wk)$",
        _both(Effect.SILENT),
        "vLLM makes the bias of zeros that k has here only beside a tensor `weight`; k's bias stays what was in memory",
        "whisper.py",
    ),
    Touched(
        ("GptOssForCausalLM", "gpt_oss"),
        r"\.experts\.\d+\.",
        {"lut": Effect.DIES, "compressed-tensors": Effect.SILENT},
        "vLLM's gpt-oss loads experts from its own 3-D tensors only, and skips all others without a word",
        "gpt_oss.py",
        remedy=False,
    ),
    Touched(
        (),
        r"\.experts\.\d+\.(?:gate_up_proj|w13)$",
        {"lut": Effect.SILENT, "compressed-tensors": Effect.DIES},
        "vLLM halves every tensor of an expert's gate_up_proj along its first dimension",
        "../layers/fused_moe/routed_experts.py",
    ),
    Touched(
        ("JinaEmbeddingsV5Model",),
        r"\.layers\.\d+\.|^layers\.\d+\.",
        _both(Effect.SILENT),
        "vLLM adds the adapter of a task to tensors called `weight`, and leaves it out of quantized layers",
        "jina.py",
        remedy=False,
    ),
    Touched(
        ("MuseSparkForConditionalGeneration", "muse_spark", "muse_spark_text", "musespark1x_text"),
        "",
        _both(Effect.DIES),
        "vLLM's Muse Spark serves no other quantization than NVFP4",
        "models/muse_spark/nvidia/model.py",
        remedy=False,
    ),
    Touched(
        ("BloomForCausalLM", "bloom"),
        r"\.query_key_value$",
        {"lut": Effect.SILENT, "compressed-tensors": Effect.DIES},
        "vLLM's BLOOM reorders the first dimension of every tensor of query_key_value by heads, sizes and scales too",
        "bloom.py",
    ),
    Touched(
        ("TeleChatForCausalLM", "TeleChat2ForCausalLM", "telechat", "telechat2"),
        r"\.key_value$",
        _both(Effect.DIES),
        "vLLM's TeleChat splits every tensor of key_value along its first dimension by heads, sizes and scales too",
        "telechat2.py",
    ),
    Touched(
        ("Plamo2ForCausalLM", "plamo2"),
        r"\.mixer\.in_proj$",
        _both(Effect.DIES),
        "vLLM's PLaMo 2 transposes and splits every tensor of in_proj, sizes and scales too",
        "plamo2.py",
    ),
    Touched(
        ("Step3TextForCausalLM", "Step3VLForConditionalGeneration", "step3_text", "step3_vl"),
        r"\.self_attn\.[qkv]_proj$",
        {"compressed-tensors": Effect.DIES},
        "vLLM's Step3 copies q, k and v by their output dimension, which weight_shape does not have",
        "step3_text.py",
    ),
    Touched(
        ("Step3TextForCausalLM", "Step3VLForConditionalGeneration", "step3_text", "step3_vl"),
        r"\.moe\.experts\.\d+\.",
        _both(Effect.DIES),
        "vLLM's Step3 loads experts from 3-D tensors only",
        "step3_text.py",
        remedy=False,
    ),
    Touched(
        ("Step5ForCausalLM", "Step5ForConditionalGeneration", "step5", "step5_text"),
        r"\.self_attn\.(?:sparse_indexer_[qkz]|g_proj)$",
        _both(Effect.DIES),
        "vLLM's Step5 cuts every tensor of the sparse indexer along its first dimension, sizes and scales too",
        "models/step5/nvidia/model.py",
    ),
    Touched(
        ("K2HorizonForCausalLM", "k2_horizon", "k2horizon"),
        r"\.self_attn\.v_experts\.",
        _both(Effect.DIES),
        "vLLM's K2-Horizon multiplies by the `weight` of v's experts itself, which a quantized layer does not have",
        "k2_horizon.py",
    ),
    Touched(
        (
            *("HunYuanDenseV1ForCausalLM", "HunYuanMoEV1ForCausalLM", "HYV3MTPModel"),
            *("hunyuan", "hunyuan_v1_dense", "hunyuan_v1_moe"),
        ),
        r"\.(?:self_attn\.qkv_proj|gate_and_up_proj)$",
        _both(Effect.DIES),
        "vLLM's HunYuan splits merged tensors along their first dimension, sizes and scales too",
        "hunyuan_v1.py",
    ),
    Touched(
        ("NewModel", "GteNewModel", "NewForSequenceClassification", "GteNewForSequenceClassification", "new"),
        r"\.mlp\.up_gate_proj$",
        _both(Effect.DIES),
        "vLLM's GTE halves every tensor of up_gate_proj along its first dimension, sizes and scales too",
        "bert_with_rope.py",
    ),
    Touched(
        ("LongcatFlashForCausalLM", "LongCatFlashMTPModel", "longcat_flash"),
        r"(?:^|\.)mtp\.",
        _both(Effect.DIES),
        "vLLM's draft model of LongCat-Flash knows its tensors by whole names that end in `weight`",
        "longcat_flash_mtp.py",
    ),
    Touched(
        (
            *("Mamba2ForCausalLM", "FalconH1ForCausalLM", "GraniteMoeHybridForCausalLM", "Zamba2ForCausalLM"),
            *("NemotronHForCausalLM", "BambaForCausalLM", "NemotronHPuzzleForCausalLM"),
            *("mamba2", "falcon_h1", "granitemoehybrid", "zamba2", "nemotron_h", "bamba"),
        ),
        r"\.(?:mixer|mamba|mamba_decoder\.mamba)\.in_proj$",
        _both(Effect.DIES),
        "vLLM cannot split in_proj of a Mamba 2 layer with one group: it slices weight and weight_scale, but not"
        " weight_packed",
        "../layers/mamba/mamba_mixer2.py",
        settings=("n_groups", "mamba_n_groups", "mamba_ngroups"),
        split=True,
    ),
    Touched(
        ("MiMoV2FlashForCausalLM", "MiMoV2ForCausalLM", "MiMoV2OmniForCausalLM", "mimo_v2", "mimo_v2_flash"),
        r"(?:^|\.)mtp\..*\.qkv_proj$",
        _both(Effect.DIES),
        "vLLM's draft model of MiMo V2 cuts every tensor of qkv_proj along its first dimension, sizes and scales too",
        "mimo_v2_mtp.py",
        split=True,
    ),
    Touched(
        ("OpenPanguVLForConditionalGeneration",),
        r"(?:^|\.)visual\..*\.(?:gate_proj|up_proj|down_proj)$",
        _both(Effect.DIES),
        "vLLM's openPangu pads every tensor of the vision tower's MLP to a multiple of the GPUs, sizes and scales too",
        "openpangu_vl.py",
        split=True,
    ),
    Touched(
        ("InklingForCausalLM", "InklingForConditionalGeneration", "InklingMTPModel", "inkling"),
        r"\.attn\.w[kv]_dv$",
        _both(Effect.DIES),
        "vLLM's Inkling repeats key and value heads for more GPUs than heads only if tensors are called `weight`",
        "models/inkling/nvidia/model.py",
        split=True,
    ),
)
"""The most dangerous first."""


@dataclass(frozen=True)
class Kept:
    """Layers that vLLM loads right where they are quantized, and wrongly where they are written in BF16 as [N, K]."""

    models: tuple[str, ...]
    modules: str
    reason: str
    file: str


_NAMELESS = "vLLM makes this layer without a name, so that no list can tell it that the layer is in 16 bits"

KEPT = (
    Kept(
        ("GPT2LMHeadModel", "GPT2ForSequenceClassification", "gpt2"),
        r"\.(?:c_attn|c_proj|c_fc)$",
        "vLLM's GPT-2 transposes every tensor `weight` of this layer, since transformers stores it as [K, N]",
        "gpt2.py",
    ),
    Kept(("DeepseekForCausalLM", "deepseek"), r"\.self_attn\.[qkvo]_proj$", _NAMELESS, "deepseek_v2.py"),
    Kept(("MiniCPM3ForCausalLM", "minicpm3"), r"\.self_attn\.q_a_proj$", _NAMELESS, "minicpm3.py"),
    Kept(
        ("Molmo2ForConditionalGeneration", "molmo2"),
        r"\.(?:att_proj|attn_out|ff_proj|ff_out)$",
        _NAMELESS,
        "molmo2.py",
    ),
    Kept(("FuyuForCausalLM", "fuyu"), r"(?:^|\.)vision_embed_tokens$", _NAMELESS, "fuyu.py"),
)
