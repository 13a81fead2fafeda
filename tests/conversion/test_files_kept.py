"""Directories that hold more than a model's weights, or its settings elsewhere: what OUT has, and what vLLM loads."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_edits import REMOVE, edit_json, write_case
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from vllm_loader import loaded_files
from vllm_sources import VERSIONS

from convert_w4a8 import Options, PlanError, convert, make_plan, open_checkpoint, verify
from convert_w4a8.checkpoint.files import INDEX
from convert_w4a8.cli.main import main
from convert_w4a8.conversion.destination import is_finished
from convert_w4a8.conversion.plan import Plan

MTP = {"mtp.fc.weight": torch.ones(128, 256, dtype=torch.bfloat16)}


def settings_places(config: Any, place: str = "") -> list[str]:
    """Return the places of everything that is called like settings of a quantization."""
    if isinstance(config, list):
        return [found for item in config for found in settings_places(item, f"{place}[]")]
    if not isinstance(config, dict):
        return []
    ours = [place + key for key in config if key in ("quantization_config", "compression_config", "sparsity_config")]
    return ours + [
        found
        for key, value in config.items()
        if key != "quantization_config"
        for found in settings_places(value, f"{place}{key}.")
    ]


def convert_and_verify(source: Path, out: Path, options: Options | None = None) -> Plan:
    """Convert; the proof passes; config.json has one quantization_config, at the top; no other settings are there."""
    result = convert(source, out, options or Options(), device="cpu")
    assert verify(out, source).problems == ()
    assert settings_places(json.loads((out / "config.json").read_text())) == ["quantization_config"]
    assert not {path.name for path in out.rglob("*quant*.json")}
    assert is_finished(out, open_it(source), result.plan)
    return result.plan


def open_it(source: Path) -> Any:
    """Open a checkpoint."""
    from convert_w4a8 import open_checkpoint

    return open_checkpoint(source)


def hide_settings(root: Path, place: str) -> None:
    """Move quantization_config to another place: a.b in config.json, or a file."""
    block = json.loads((root / "config.json").read_text())["quantization_config"]
    edit_json(root / "config.json", quantization_config=REMOVE)
    if place.endswith(".json"):
        (root / place).write_text(json.dumps(block))
        return
    nested: Any = block
    for key in reversed(place.split(".")):
        nested = {key: nested}
    edit_json(root / "config.json", **nested)


@pytest.mark.parametrize("output", ["lut", "compressed-tensors"])
@pytest.mark.parametrize(
    ("case", "place"),
    [
        ("awq-zero-points-all-8", "llm_config.quantization_config"),
        ("gptq-v2", "thinker_config.text_config.quantization_config"),
        ("ct-w4a16", "compression_config"),
        ("gptq-v2", "quantize_config.json"),
        ("awq-zero-points-all-8", "quant_config.json"),
        ("ct-w4a16", "quantization_config.json"),
    ],
)
def test_settings_move_to_the_top(case: str, place: str, output: str, tmp_path: Path) -> None:
    """Where vLLM looks first; what the output holds does not depend on where they were."""
    source = write_case(case, tmp_path / "in").path
    convert_and_verify(source, tmp_path / "plain", Options(format=output))
    hide_settings(source, place)
    if place == "quant_config.json":  # as AutoAWQ's first versions name them
        names = {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}
        (source / place).write_text(json.dumps(names))
    convert_and_verify(source, tmp_path / "out", Options(format=output))
    for name in ("model.safetensors", "config.json"):
        ours, plain = ((tmp_path / folder / name).read_bytes() for folder in ("out", "plain"))
        if name == "config.json":
            ours, plain = (json.loads(text.decode())["quantization_config"] for text in (ours, plain))
        assert ours == plain


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("shard_size", [5 * 10**9, 300_000], ids=["one-file", "shards"])
def test_weights_beside_the_index_are_not_loaded(version: str, shard_size: int, tmp_path: Path) -> None:
    """Copied byte for byte; vLLM loads them from the output as little as from the source."""
    source = write_case("awq-symmetric-fp16-sharded", tmp_path / "in").path
    for name in ("mtp.safetensors", "adapter_model.safetensors", "2_Dense/model.safetensors"):
        (source / name).parent.mkdir(exist_ok=True)
        save_file(MTP, source / name)
    (source / "consolidated.safetensors").write_bytes(b"x")
    (source / "original").mkdir()
    (source / "original" / "consolidated.safetensors").write_bytes(b"x")
    out = tmp_path / "out"
    plan = convert_and_verify(source, out, Options(max_shard_size=shard_size))
    assert any("not loaded by vLLM: mtp.safetensors (not in" in warning for warning in plan.warnings)
    for name in ("mtp.safetensors", "adapter_model.safetensors", "2_Dense/model.safetensors"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    shards = sorted(shard.file_name for shard in plan.shards)
    assert (
        loaded_files(out, version)
        == shards
        == sorted(set(json.loads((out / INDEX).read_text())["weight_map"].values()))
    )


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("shard_size", [5 * 10**9, 300_000], ids=["one-file", "shards"])
@pytest.mark.parametrize("quantized", [False, True])
def test_weights_without_index_are_one_set(version: str, shard_size: int, quantized: bool, tmp_path: Path) -> None:
    """VLLM loads every file of both; they keep their names, and INT4 layers are converted."""
    source = write_case("gptq-v1", tmp_path / "in").path
    extra = dict(MTP)
    if quantized:
        tensors = load_file(source / "model.safetensors")
        module = "model.layers.1.mlp.gate_proj"
        extra |= {name.replace("model.layers.1", "mtp.0"): t for name, t in tensors.items() if name.startswith(module)}
    save_file(extra, source / "mtp.safetensors")
    out = tmp_path / "out"
    plan = convert_and_verify(source, out, Options(max_shard_size=shard_size))
    assert "mtp.safetensors" in loaded_files(out, version)
    assert len(loaded_files(out, version)) == len(plan.shards)
    kept = load_file(out / "mtp.safetensors")
    assert torch.equal(kept["mtp.fc.weight"], MTP["mtp.fc.weight"])
    assert ("mtp.0.mlp.gate_proj.weight_packed" in kept) == quantized
    assert "mtp.fc" in plan.ignore


def test_files_of_an_index_in_directories_come_to_the_top(tmp_path: Path) -> None:
    """VLLM loads no weights from directories: the source cannot be served, and the output can."""
    source = write_case("awq-symmetric-fp16-sharded", tmp_path / "in").path
    convert_and_verify(source, tmp_path / "plain")
    (source / "parts").mkdir()
    index = json.loads((source / INDEX).read_text())
    for path in source.glob("model-*.safetensors"):
        path.rename(source / "parts" / path.name)
    index["weight_map"] = {name: f"parts/{file}" for name, file in index["weight_map"].items()}
    (source / INDEX).write_text(json.dumps(index))
    convert_and_verify(source, tmp_path / "out")
    assert not (tmp_path / "out" / "parts").exists()
    plain = (tmp_path / "plain" / "model.safetensors").read_bytes()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == plain


def test_plan_and_proof_name_every_file(tmp_path: Path) -> None:
    """In text and in JSON: what is copied, and what is left out, with the reason. So does the model card."""
    source = write_case("gptq-v1", tmp_path / "in").path
    (source / "spk_dict.pt").write_bytes(b"x")
    (source / "lora").mkdir()
    save_file(MTP, source / "lora" / "adapter_model.safetensors")
    reason = "may be a pickle, which can run code"

    def run(*arguments: object) -> str:
        result = CliRunner().invoke(main, list(map(str, arguments)), catch_exceptions=False)
        assert result.exit_code == 0
        return result.stdout

    text = run("convert", source, tmp_path / "out", "--device", "cpu")
    assert "5 side files byte for byte, weights among them: lora/adapter_model.safetensors" in text
    assert f"warning    not carried over: spk_dict.pt ({reason})" in text
    plan = json.loads(run("convert", source, tmp_path / "other", "--dry-run", "--json"))
    assert plan["left_out_files"] == {"spk_dict.pt": reason}
    assert "lora/adapter_model.safetensors" in plan["side_files"]
    text = run("verify", tmp_path / "out", "--source", source)
    assert f"left out   spk_dict.pt ({reason})" in text
    assert "copied     lora/adapter_model.safetensors: weights beside those of the model" in text
    found = json.loads(run("verify", tmp_path / "out", "--source", source, "--json"))
    assert found["left_out_files"] == {"spk_dict.pt": reason}
    assert found["copied_weights"] == ["lora/adapter_model.safetensors"]
    assert "| files of the source that are not here | `spk_dict.pt` |" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("weights", [[], ["pytorch_model.bin"]])
def test_modules_without_weights_are_refused(weights: list[str], tmp_path: Path) -> None:
    """VLLM would serve other embeddings, and say so in a log only."""
    source = write_case("gptq-v1", tmp_path / "in").path
    kind = "sentence_transformers.models."
    modules = [{"path": "", "type": f"{kind}Transformer"}, {"path": "1_Pooling", "type": f"{kind}Pooling"}]
    (source / "modules.json").write_text(json.dumps([*modules, {"path": "2_Dense", "type": f"{kind}Dense"}]))
    (source / "2_Dense").mkdir()
    for name in weights:
        (source / "2_Dense" / name).write_bytes(b"x")
    with pytest.raises(PlanError, match=r"modules.json: 2_Dense: has no model.safetensors"):
        make_plan(source)
    save_file({"linear.weight": torch.ones(2, 2)}, source / "2_Dense" / "model.safetensors")
    assert Path("2_Dense/model.safetensors") in make_plan(source).side_files


# Checkpoints of public bug reports, written by scripts in `shared`.

_ADAPTER = ("config.json", "model.safetensors")
CASES: dict[str, tuple[str, set[str], set[str]]] = {
    "03-internvl-nested-awq": ("config.json: llm_config.quantization_config", set(), set()),
    "05-awq-quant-config-json": ("quant_config.json", set(), set()),
    "06-autogptq-sharded-names": ("config.json: quantization_config", set(), set()),
    "10-mtp-sidecar": ("config.json: quantization_config", {"mtp.safetensors"}, set()),
    "13-mistral-consolidated": (
        "config.json: quantization_config",
        {"tekken.json"},
        {"consolidated.safetensors", "params.json"},
    ),
    "18-compression-config-key": ("config.json: compression_config", set(), set()),
    "23-adapters-beside-the-weights": (
        "config.json: quantization_config",
        {f"{folder}adapter_{kind}" for folder in ("", "vision-lora/", "speech-lora/") for kind in _ADAPTER},
        {"spk_dict.pt"},
    ),
}
"""Case → where the settings are, which files are copied, which are left out."""


@pytest.mark.parametrize(("case", "expected"), CASES.items(), ids=CASES)
def test_case(case: str, expected: tuple[str, set[str], set[str]], shared: Path, tmp_path: Path) -> None:
    """Converted and right; vLLM loads the output's weights and nothing else."""
    script = shared / "cases" / f"{case}.py"
    if not script.is_file():
        pytest.skip(f"no {script.name} in {shared}")
    source, out = tmp_path / "in", tmp_path / "out"
    subprocess.run([sys.executable, str(script), str(source)], check=True)
    place, copied, left_out = expected
    checkpoint = open_checkpoint(source)
    assert checkpoint.settings_place == place
    assert {str(path) for path in checkpoint.side_files} == copied
    assert {item.path for item in checkpoint.left_out} == left_out
    plan = convert_and_verify(source, out)
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    shards = {shard.file_name for shard in plan.shards}
    index = {INDEX} if any(name.endswith(".safetensors") and "/" not in name for name in copied) else set()
    assert files == {"README.md", "config.json"} | shards | copied | index
    assert json.loads((out / "config.json").read_text())["quantization_config"]
    for version in VERSIONS:
        assert set(loaded_files(out, version)) == shards
