"""Every kind of input that must convert, and a few that must be refused unless the user asks."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from factories.checkpoints import SIDE_FILES, Checkpoint, Options, write
from factories.formats import AutoRound, Awq, AwqOfGptqModel, CompressedTensors, Format, Gptq
from factories.layers import Scheme
from factories.models import Model, llama, mixtral, qwen2, qwen3_moe

BF16 = torch.bfloat16
PLAIN = Options()
AUTOAWQ = Options(
    dtype=torch.float16,
    dtype_key="torch_dtype",
    metadata={"format": "pt", "lm_head.weight": "model.embed_tokens.weight"},
)
REGROUP = ("--group-size", "requantize")
REORDER = ("--act-order", "requantize")
DEQUANTIZE = ("--unsupported", "dequantize")


@dataclass(frozen=True)
class Case:
    """One kind of checkpoint and what a converter should make of it.

    needs: command line without which the converter must refuse.
    requantized: whether codes change on the way (zero-points, act-order, small groups).
    dequantized: ends of the names of the modules that must come out in bfloat16.
    refused: ends of the names of the modules because of which nothing helps.
    """

    id: str
    form: Format
    model: Callable[[], Model] = llama
    options: Options = PLAIN
    needs: tuple[str, ...] = ()
    requantized: bool = False
    dequantized: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()

    def write(self, path: Path) -> Checkpoint:
        """Write the checkpoint to `path`."""
        return write(path, self.model(), self.form, self.options)


def _ct(**overrides: object) -> CompressedTensors:
    """Return compressed-tensors with one group for every linear layer."""
    return CompressedTensors({"Linear": Scheme(scale_dtype=BF16, **overrides)})  # type: ignore[arg-type]


CASES: tuple[Case, ...] = (
    # AWQ
    Case("awq-zero-points", Awq(), options=AUTOAWQ, requantized=True),
    Case("awq-symmetric-bf16", AwqOfGptqModel()),
    Case("awq-symmetric-fp16-sharded", Awq(Scheme()), options=Options(torch.float16, shards=3)),
    Case("awq-gptqmodel-zero-points", AwqOfGptqModel(Scheme(symmetric=False)), requantized=True),
    Case("awq-skip-down-proj", Awq(Scheme(), skip=("down_proj",)), options=AUTOAWQ),
    Case("awq-qwen2-bias", Awq(Scheme()), qwen2, AUTOAWQ),
    Case(
        "awq-mixtral-w1-w2-w3",
        Awq(skip=("gate",)),
        lambda: mixtral(block_sparse_names=True),
        Options(torch.float16, shards=2, dtype_key="torch_dtype"),
        requantized=True,
    ),
    Case("awq-zero-points-all-8", Awq(Scheme(says_asymmetric=True)), options=AUTOAWQ),
    Case("awq-per-channel", Awq(Scheme(group_size=-1)), options=AUTOAWQ),
    Case("awq-g64", Awq(Scheme(group_size=64)), options=AUTOAWQ, needs=REGROUP, requantized=True),
    Case(
        "awq-odd-n",
        Awq(Scheme()),
        lambda: llama(kv_dim=136),
        AUTOAWQ,
        needs=DEQUANTIZE,
        dequantized=("q_proj", "k_proj", "v_proj"),  # vLLM merges them: all or none
    ),
    # GPTQ
    Case("gptq-v1", Gptq()),
    Case("gptq-v2", Gptq(v2=True)),
    Case("gptq-v1-asymmetric", Gptq(Scheme(symmetric=False)), requantized=True),
    Case("gptq-v2-asymmetric", Gptq(Scheme(symmetric=False), v2=True), requantized=True),
    Case("gptq-v1-asymmetric-all-8", Gptq(Scheme(says_asymmetric=True))),
    Case("gptq-desc-act-trivial", Gptq(desc_act=True)),
    Case("gptq-desc-act", Gptq(Scheme(act_order=True)), needs=REORDER, requantized=True),
    Case(
        "gptq-desc-act-asymmetric",
        Gptq(Scheme(act_order=True, symmetric=False)),
        needs=REORDER,
        requantized=True,
    ),
    Case(
        "gptq-dynamic",
        Gptq(
            dynamic={
                r"-:.*\.layers\.1\.self_attn.*": {},
                r"+:.*\.gate_proj": {"group_size": 256},
                r".*\.layers\.1\.mlp\.down_proj": {"bits": 4, "group_size": -1},
            }
        ),
    ),
    Case(
        "gptq-dynamic-8-bit",
        Gptq(dynamic={r"+:.*\.down_proj": {"bits": 8}}),
        refused=("down_proj",),
    ),
    Case("gptq-lm-head", Gptq(lm_head=True), lambda: llama(tied=False), dequantized=("lm_head",)),
    Case("gptq-quantize-config-only", Gptq(), options=Options(config_in_quantize_config=True)),
    Case("gptq-qwen2-bias", Gptq(), qwen2),
    Case("gptq-qwen3-moe-sharded", Gptq(), qwen3_moe, Options(shards=3)),
    Case("gptq-mixtral", Gptq(), lambda: mixtral(block_sparse_names=False)),
    Case("gptq-g32", Gptq(Scheme(group_size=32)), needs=REGROUP, requantized=True),
    Case("gptq-g256", Gptq(Scheme(group_size=256))),
    Case("gptq-per-channel", Gptq(Scheme(group_size=-1))),
    Case(
        "gptq-odd-k",
        Gptq(),
        lambda: llama(intermediate=576),
        needs=DEQUANTIZE,
        dequantized=("down_proj",),
    ),
    Case("gptq-float32-dense", Gptq(), options=Options(torch.float32)),
    Case(
        "gptq-side-files",
        Gptq(v2=True),
        options=Options(
            side_files={
                **SIDE_FILES,
                "modeling_custom.py": b"class Model: ...\n",
                "preprocessor_config.json": b'{"size": 224}',
                "quant_log.csv": b"layer,loss\n0,0.1\n",
                "README.md": b"---\nlicense: mit\n---\n# A model\n",
                "assets/figure.png": bytes(range(256)),
            },
            stale={"quantize_config.json": b'{"bits": 4}', "pytorch_model.bin.index.json": b"{}"},
        ),
    ),
    # Negative scales, as AutoRound's exports to these formats have them
    Case("gptq-signed", Gptq(Scheme(signed=True))),
    Case(
        "gptq-signed-odd-k",
        Gptq(Scheme(signed=True)),
        lambda: llama(intermediate=576),
        PLAIN,
        DEQUANTIZE,
        dequantized=("down_proj",),
    ),
    Case("awq-signed", Awq(Scheme(signed=True)), options=AUTOAWQ),
    Case("ct-signed", _ct(signed=True)),
    Case("gptq-signed-g32", Gptq(Scheme(signed=True, group_size=32)), needs=REGROUP, requantized=True),
    # AutoRound
    Case("auto-round", AutoRound()),
    Case("auto-round-asymmetric", AutoRound(Scheme(symmetric=False), "auto_round:auto_gptq"), requantized=True),
    Case("auto-round-plain-asymmetric", AutoRound(Scheme(symmetric=False), "auto_round"), requantized=True),
    Case("auto-round-gptqmodel", AutoRound(packing="auto_round:gptqmodel", method="autoround")),
    Case("auto-round-awq", AutoRound(packing="auto_round:auto_awq"), options=AUTOAWQ),
    Case("auto-round-awq-asymmetric", AutoRound(Scheme(symmetric=False), "auto_round:auto_awq"), requantized=True),
    Case("auto-round-0.4", AutoRound(packing="auto_round:gptq:exllamav2", method="intel/auto-round", key="backend")),
    Case(
        "auto-round-extra-config",
        AutoRound(
            extra={
                "model.layers.0.mlp.up_proj": {"bits": 16, "data_type": "float"},
                "model.layers.0.mlp.gate_proj": {"bits": 16, "data_type": "float"},
                "o_proj": {"group_size": 256},
                r".*layers\.1\.mlp.*": {"group_size": -1},
                "lm_head": {"bits": 4, "group_size": 128, "sym": True, "data_type": "int"},
            }
        ),
        lambda: llama(tied=False),
        dequantized=("lm_head",),
    ),
    Case("auto-round-8-bit", AutoRound(extra={"down_proj": {"bits": 8}}), refused=("down_proj",)),
    Case("auto-round-qwen3-moe", AutoRound(), qwen3_moe, Options(shards=2)),
    # compressed-tensors
    Case("ct-w4a16", _ct()),
    Case("ct-w4a16-sharded-untied", _ct(), lambda: llama(tied=False), Options(shards=3)),
    Case("ct-asymmetric", _ct(symmetric=False), requantized=True),
    Case("ct-asymmetric-all-8", _ct(says_asymmetric=True)),
    Case("ct-w4a8", CompressedTensors(fp8_activations=True)),
    Case("ct-int8-storage", CompressedTensors(int8=True)),
    Case(
        "ct-int8-storage-asymmetric",
        CompressedTensors({"Linear": Scheme(symmetric=False, scale_dtype=BF16)}, int8=True),
        requantized=True,
    ),
    Case(
        "ct-ignore",
        CompressedTensors(ignore=("lm_head", "model.layers.0.self_attn.o_proj", r"re:.*layers\.1\.mlp\..*")),
    ),
    Case(
        "ct-two-groups",
        CompressedTensors(
            {
                "re:.*self_attn.*": Scheme(scale_dtype=BF16),
                "re:.*mlp.*": Scheme(group_size=-1, scale_dtype=BF16),
            }
        ),
    ),
    Case(
        "ct-two-groups-8-bit",
        CompressedTensors(
            {
                r"re:.*\.down_proj$": Scheme(bits=8, scale_dtype=BF16),
                r"re:.*\.(q|k|v|o|gate|up)_proj$": Scheme(scale_dtype=BF16),
            }
        ),
        refused=("down_proj",),
    ),
    Case(
        "ct-per-channel-odd-k",
        _ct(group_size=-1),
        lambda: llama(intermediate=576),
        needs=DEQUANTIZE,
        dequantized=("down_proj",),
    ),
    Case("ct-actorder-static", CompressedTensors(actorder="static")),
    Case("ct-g-idx-trivial", CompressedTensors(actorder="group", weight_g_idx=True)),
    Case(
        "ct-g-idx",
        CompressedTensors({"Linear": Scheme(act_order=True, scale_dtype=BF16)}, actorder="group", weight_g_idx=True),
        needs=REORDER,
        requantized=True,
    ),
    Case("ct-fp16-scales", CompressedTensors({"Linear": Scheme()}), options=Options(torch.float16, metadata={})),
    Case("ct-g64", _ct(group_size=64), needs=REGROUP, requantized=True),
    Case(
        "ct-qwen3-moe",
        CompressedTensors(ignore=("lm_head", r"re:.*mlp\.gate$"), fp8_activations=True),
        qwen3_moe,
    ),
)

SEVENS: tuple[Case, ...] = tuple(
    Case(f"{form.name}-zero-points-all-7", form, options=options)
    for form, options in (
        (Awq(Scheme(symmetric=False, zero=7)), AUTOAWQ),
        (Gptq(Scheme(symmetric=False, zero=7)), PLAIN),
        (CompressedTensors({"Linear": Scheme(symmetric=False, zero=7, scale_dtype=BF16)}), PLAIN),
    )
)
"""Every zero-point is 7: the values −7 … 8 are −8 … 7 of the negated scale, so that no code needs to change."""
