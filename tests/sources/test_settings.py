"""Settings of all formats: what tools write is known; what means other bytes is refused, the rest is named."""

from pathlib import Path
from typing import Any

import pytest
from checkpoint_edits import edit_json, edit_quantization, write_case
from factories import CASES, Case
from layer_specs import find_layers

from convert_w4a8.checkpoint.directory import open_checkpoint
from convert_w4a8.conversion.plan import make_plan
from convert_w4a8.errors import PlanError
from convert_w4a8.options import Options
from convert_w4a8.sources import find_notes, find_source
from convert_w4a8.sources.settings import any_of, named, only, setting_notes, setting_problems, tables_of

GROUP = ("quantization_config", "config_groups", "group_0")
INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def notes(path: Path) -> list[str]:
    """Return what the plan has to say of a checkpoint's settings."""
    checkpoint = open_checkpoint(path)
    return list(find_notes(find_source(checkpoint), checkpoint))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_what_tools_write_is_known(case: Case, tmp_path: Path) -> None:
    """Nothing is said of the settings of checkpoints as the tools write them."""
    assert notes(case.write(tmp_path / "in").path) == []


REAL: dict[str, tuple[str, dict[str, Any]]] = {
    "autogptq": (
        "gptq-v1",
        {
            "damp_percent": 0.01,
            "static_groups": False,
            "true_sequential": True,
            "model_name_or_path": "m",
            "model_file_base_name": "model",
            "is_marlin_format": False,
        },
    ),
    "optimum": (
        "gptq-v1",
        {
            "batch_size": 1,
            "block_name_to_quantize": None,
            "cache_block_outputs": True,
            "dataset": None,
            "exllama_config": {"version": 1},
            "max_input_length": None,
            "model_seqlen": None,
            "module_name_preceding_first_block": None,
            "modules_in_block_to_quantize": [["self_attn.q_proj"]],
            "pad_token_id": None,
            "tokenizer": None,
            "use_cuda_fp16": False,
            "use_exllama": True,
        },
    ),
    "auto-round-gptq": (
        "gptq-signed",
        {"autoround_version": "0.9.0", "provider": "auto-round", "data_type": "int", "iters": 200, "lr": 0.005},
    ),
    "autoawq": ("awq-signed", {"backend": "autoawq", "do_fuse": False, "fuse_max_seq_len": None, "version": "GEMM"}),
    "auto-round-awq": ("awq-signed", {"sym": True, "provider": "auto-round", "enable_quanted_input": False}),
    "llm-compressor": ("ct-w4a16", {"version": "0.20.0", "global_compression_ratio": 1.5}),
    "llm-compressor-2024": ("ct-w4a16", {"quantization_status": "frozen", "sparsity_config": {"format": "dense"}}),
}  # fmt: skip


@pytest.mark.parametrize(("case", "values"), REAL.values(), ids=REAL)
def test_settings_of_real_files_pass(case: str, values: dict[str, Any], tmp_path: Path) -> None:
    """What tools write beside the settings that count is neither refused nor named."""
    written = write_case(case, tmp_path / "in")
    edit_quantization(written.path, **values)
    assert not find_layers(written.path)[1]
    assert notes(written.path) == []


REFUSED: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "gptq-marlin": ("gptq-v1", {"is_marlin_format": True}, "is_marlin_format", "Marlin's own layout"),
    "gptq-planar": ("gptq-v1", {"checkpoint_format": "gptq_p"}, "checkpoint_format", "'gptq_p'"),
    "gptq-format": ("gptq-v1", {"checkpoint_format": None, "format": "bitblas"}, "format", "'bitblas'"),
    "gptq-version": ("gptq-v1", {"version": "marlin"}, "version", "'marlin', Marlin's own layout"),
    "gptq-pack-dtype": ("gptq-v1", {"pack_dtype": "int16"}, "pack_dtype", "each int32 word"),
    "gptq-rotation": ("gptq-v1", {"rotation": "hadamard"}, "rotation", "rotations"),
    "gptq-adapter": ("gptq-v1", {"adapter": {"name": "lora", "path": "eora"}}, "adapter", "changes what the model"),
    "gptq-dynamic-adapter": (
        "gptq-v1",
        {"dynamic": {".*q_proj": {"adapter": {"rank": 8}}}},
        "dynamic: .*q_proj: adapter",
        "changes what",
    ),
    "gptq-data-type": ("gptq-v1", {"data_type": "mx_fp"}, "data_type", "only integers"),
    "gptq-act-bits": ("gptq-v1", {"act_bits": 8}, "act_bits", "activations are quantized"),
    "gptq-order": ("gptq-v1", {"packing_order": "interleaved"}, "packing_order", "may mean another layout"),
    "gptq-layout": ("gptq-v1", {"weight_layout": {"rows": 4}}, "weight_layout", "may mean another layout"),
    "gptq-unlike": (
        "gptq-v1-asymmetric",
        {"checkpoint_format": "gptq_v2"},
        "",
        "contradicts itself: checkpoint_format gptq_v2 and format gptq",
    ),
    "awq-llm-awq": ("awq-zero-points", {"backend": "llm-awq"}, "backend", "another"),
    "awq-ipex": ("awq-zero-points", {"version": "ipex"}, "version", "'ipex'"),
    "awq-format": ("awq-gptqmodel-zero-points", {"checkpoint_format": "gemv"}, "checkpoint_format", "'gemv'"),
    "awq-tile": ("awq-zero-points", {"tile_size": 16}, "tile_size", "may mean another layout"),
    "ct-marlin": ("ct-w4a16", {"format": "marlin-24"}, "format", "'marlin-24': its layout"),
    "ct-sparse": ("ct-w4a16", {"format": "sparse-24-bitmask"}, "format", "its layout"),
    "ct-pruned": ("ct-w4a16", {"moe_sparsity_config": {"method": "prune"}}, "moe_sparsity_config", "experts"),
}  # fmt: skip


@pytest.mark.parametrize(("case", "values", "key", "reason"), REFUSED.values(), ids=REFUSED)
def test_settings_that_mean_other_bytes_are_refused(
    case: str, values: dict[str, Any], key: str, reason: str, tmp_path: Path
) -> None:
    """One problem, that names the setting and its value; the layers do not say it again."""
    written = write_case(case, tmp_path / "in")
    edit_quantization(written.path, **values)
    with pytest.raises(PlanError) as caught:
        make_plan(open_checkpoint(written.path), Options())
    (problem,) = caught.value.problems
    assert problem.subject == (f"quantization_config: {key}" if key else "quantization_config")
    assert reason in problem.reason
    assert problem.remedy


CT_GROUP: dict[str, tuple[tuple[str, ...], dict[str, Any], str, str]] = {
    "format": ((), {"format": "nvfp4-pack-quantized"}, "format", "its layout"),
    "outputs": ((), {"output_activations": INT8}, "output_activations", "outputs of layers"),
    "dynamic": (("weights",), {"dynamic": True}, "weights: dynamic", "at run time"),
    "actorder": (("weights",), {"actorder": "sideways"}, "weights: actorder", "order of the input channels"),
}


@pytest.mark.parametrize(("place", "values", "key", "reason"), CT_GROUP.values(), ids=CT_GROUP)
def test_settings_of_config_groups(
    place: tuple[str, ...], values: dict[str, Any], key: str, reason: str, tmp_path: Path
) -> None:
    """The same within config_groups."""
    written = write_case("ct-w4a16", tmp_path / "in")
    edit_json(written.path / "config.json", *GROUP, *place, **values)
    (problem,) = find_layers(written.path)[1]
    assert problem.subject == f"quantization_config: config_groups: group_0: {key}"
    assert reason in problem.reason


NAMED: dict[str, tuple[str, dict[str, Any], str]] = {
    "new": ("gptq-v1", {"clip_ratio": 0.9}, "not known, and are passed over: clip_ratio = 0.9"),
    "new-object": ("awq-zero-points", {"smoothing": {"a": 1}}, "smoothing = an object of 1"),
    "many": ("gptq-v1", {f"x{i}": i + 1 for i in range(9)}, "x4 = 5, x5 = 6 and 3 more"),
    "off": ("gptq-v1", {"clip_ratio": None, "experimental": False, "extra": {}}, ""),
    "long": ("gptq-v1", {"note": "x" * 500}, f"note = '{'x' * 59}…"),
    "activation": ("gptq-v1", {"activation": {"mode": "w4afp8"}}, "activation is an object of 1: the source's own way"),
    "kv": ("gptq-v1", {"static_kv_dtype": "fp8"}, "static_kv_dtype is 'fp8': the output does not say"),
    "dynamic": ("gptq-v1", {"dynamic": {".*q_proj": {"clip": 1}}}, "dynamic: .*q_proj: clip = 1"),
    "percentile": ("awq-zero-points", {"percentile": 99, "information": "x"}, "percentile = 99, information = 'x'"),
}  # fmt: skip


@pytest.mark.parametrize(("case", "values", "said"), NAMED.values(), ids=NAMED)
def test_settings_that_are_not_known_are_named(case: str, values: dict[str, Any], said: str, tmp_path: Path) -> None:
    """What cannot mean other bytes by its name is converted, and named in the plan; what is off is not."""
    written = write_case(case, tmp_path / "in")
    edit_quantization(written.path, **values)
    warnings = make_plan(open_checkpoint(written.path), Options()).warnings
    assert [said in warning for warning in warnings] == ([True] if said else [])


def test_int8_activations_are_named(tmp_path: Path) -> None:
    """W4A8 for INT8 kernels has the same weights; that its activations become FP8 is said."""
    written = write_case("ct-w4a16", tmp_path / "in")
    edit_json(written.path / "config.json", *GROUP, input_activations=INT8)
    assert notes(written.path) == [
        "quantization_config: config_groups: group_0: input_activations: type is 'int': activations become FP8"
    ]


def test_weights_that_are_not_compressed_are_one_problem(tmp_path: Path) -> None:
    """A frozen checkpoint: rounded weights of 16 bits beside their scales, which save_compressed would pack."""
    written = write_case("ct-w4a16", tmp_path / "in")

    def freeze(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.endswith("weight_packed")]:
            module = name.removesuffix(".weight_packed")
            del tensors[name], tensors[f"{module}.weight_shape"]
            tensors[f"{module}.weight"] = tensors["model.embed_tokens.weight"]

    edit_tensors_of(written.path, freeze)
    edit_quantization(written.path, quantization_status="frozen")
    (problem,) = find_layers(written.path)[1]
    assert "14 weights of 16 or 32 bits beside scales, quantization_status 'frozen'" in problem.reason


def edit_tensors_of(path: Path, edit: Any) -> None:
    """Rewrite tensors that may share their memory."""
    from checkpoint_edits import edit_tensors

    edit_tensors(path, lambda tensors: (edit(tensors), tensors.update({k: v.clone() for k, v in tensors.items()})))


TABLE = any_of("a b") | {
    "only": only("x", 4, reason="r", remedy="m"),
    "named": named(True, reason="n"),
    "each": tables_of(any_of("inner") | {"only": only(reason="r", remedy="m")}),
}


@pytest.mark.parametrize(
    ("config", "problems", "said"),
    [
        ({"a": 1, "b": [[[]]], "only": "X", "named": True}, [], []),
        ({"only": 4, "each": {"g": {"inner": 1}, "h": None, "i": 3}}, [], []),
        ({"only": "y"}, ["quantization_config: only: is 'y': r; m"], []),
        ({"only": ["x"]}, ["quantization_config: only: is a list of 1: r; m"], []),
        ({"only": 0, "named": None}, [], []),
        ({"named": "no"}, [], ["quantization_config: named is 'no': n"]),
        ({"each": {"g": {"only": 1}}}, ["quantization_config: each: g: only: is 1: r; m"], []),
        ({"each": {"g": {"new": 1}}}, [], ["settings that are not known, and are passed over: each: g: new = 1"]),
        ({"each": [1]}, [], []),
    ],
)
def test_tables(config: dict[str, Any], problems: list[str], said: list[str]) -> None:
    """Values that are off or known pass; others are refused or named with the place where they stand."""
    assert [str(problem) for problem in setting_problems(config, TABLE)] == problems
    assert list(setting_notes(config, TABLE)) == said
