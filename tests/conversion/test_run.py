"""The conversion itself: bytes, memory, policies, and that it can be repeated. Weights are tested end to end."""

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_edits import REMOVE, edit_json, edit_tensors, snapshot, write_case
from safetensors.torch import load_file, save_file

from convert_w4a8.checkpoint.directory import open_checkpoint
from convert_w4a8.checkpoint.safetensors_file import read_into
from convert_w4a8.conversion import jobs
from convert_w4a8.conversion.plan import LayerPlan, make_plan
from convert_w4a8.conversion.result import Result
from convert_w4a8.conversion.run import carry_out
from convert_w4a8.encoding import dequantize
from convert_w4a8.errors import ConvertError, DiskError, PlanError
from convert_w4a8.options import Options, Policy, ScalesMode, Unsupported

FORMATS = ("lut", "compressed-tensors")


def run(source: Path, out: Path, *, overwrite: bool = False, **options: Any) -> Result:
    """Convert a checkpoint on the CPU."""
    checkpoint = open_checkpoint(source)
    plan = make_plan(checkpoint, Options(**({"scales": ScalesMode.REFERENCE} | options)))
    return carry_out(checkpoint, plan, out, device=torch.device("cpu"), overwrite=overwrite)


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """Read every tensor of a directory with the safetensors library."""
    found: dict[str, torch.Tensor] = {}
    for file in path.glob("*.safetensors"):
        found |= load_file(file)
    return found


# Repeatable.


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("case", ["gptq-qwen3-moe-sharded", "awq-odd-n"])
def test_two_runs_give_the_same_bytes(case: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads finish in any order, and one or four of them work; the files do not show it."""
    source = write_case(case, tmp_path / "in")
    options: dict[str, Any] = {"format": form, "unsupported": Unsupported.DEQUANTIZE, "max_shard_size": 200_000}
    run(source.path, tmp_path / "a", **options)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    run(source.path, tmp_path / "b", **options)
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")


def test_shards_of_the_input_do_not_show_in_the_output(tmp_path: Path) -> None:
    """A checkpoint in one file and the same in three, a layer's parts far apart, give the same bytes."""
    source = write_case("awq-symmetric-fp16-sharded", tmp_path / "in")
    whole = tmp_path / "whole" / source.path.name
    whole.mkdir(parents=True)
    for file in source.path.iterdir():
        if not file.name.startswith("model"):
            (whole / file.name).write_bytes(file.read_bytes())
    save_file(tensors_of(source.path), whole / "model.safetensors")
    run(source.path, tmp_path / "a", max_shard_size=100_000)
    run(whole, tmp_path / "b", max_shard_size=100_000)
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 3
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")


def test_the_input_is_not_touched(tmp_path: Path) -> None:
    """Neither bytes nor times of the input change."""
    source = write_case("gptq-side-files", tmp_path / "in")
    before = snapshot(source.path)
    times = {file: file.stat().st_mtime_ns for file in source.path.rglob("*")}
    run(source.path, tmp_path / "out")
    assert snapshot(source.path) == before
    assert {file: file.stat().st_mtime_ns for file in source.path.rglob("*")} == times


# Blocks and chunks.


def test_pieces_do_not_show_in_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dequantization in blocks of 16 channels and copies in chunks of 1,000 bytes give the bytes of whole ones."""
    source = write_case("awq-odd-n", tmp_path / "in")
    run(source.path, tmp_path / "whole", unsupported=Unsupported.DEQUANTIZE)
    monkeypatch.setattr(dequantize, "BLOCK_WEIGHTS", 1)
    monkeypatch.setattr("convert_w4a8.conversion.layer.CHUNK_BYTES", 1000)
    run(source.path, tmp_path / "pieces", unsupported=Unsupported.DEQUANTIZE)
    assert snapshot(tmp_path / "pieces") == snapshot(tmp_path / "whole")


def test_copies_are_read_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An embedding is never in memory as a whole: no read is larger than the chunk, and all of it is read."""
    source = write_case("gptq-v1", tmp_path / "in")
    edit_tensors(source.path, lambda t: t.update({"model.embed_tokens.weight": torch.randn(1000, 256).bfloat16()}))
    monkeypatch.setattr("convert_w4a8.conversion.layer.CHUNK_BYTES", 10_000)
    sizes: list[int] = []
    lock = threading.Lock()

    def recording(info: Any, buffer: torch.Tensor, offset: int) -> None:
        with lock:
            sizes.append(buffer.numel())
        read_into(info, buffer, offset)

    monkeypatch.setattr("convert_w4a8.conversion.shard.read_into", recording)
    run(source.path, tmp_path / "out")
    copied = {name: t for name, t in tensors_of(source.path).items() if name.endswith(".weight")}
    assert max(sizes) == 10_000
    assert sum(sizes) == sum(tensor.nbytes for tensor in copied.values())
    found = tensors_of(tmp_path / "out")
    assert all(torch.equal(found[name], tensor) for name, tensor in copied.items())


def test_progress_counts_every_byte_of_the_input_once(tmp_path: Path) -> None:
    """The bar ends at the size of the input."""
    source = write_case("gptq-qwen3-moe-sharded", tmp_path / "in")
    checkpoint = open_checkpoint(source.path)
    plan = make_plan(checkpoint, Options(scales=ScalesMode.REFERENCE))
    seen: list[int] = []
    carry_out(checkpoint, plan, tmp_path / "out", device=torch.device("cpu"), progress=seen.append)
    assert sum(seen) == plan.nbytes_in == checkpoint.nbytes


def test_sizes_are_those_of_the_plan(tmp_path: Path) -> None:
    """What the plan says about sizes is what is on the disk, apart from headers, index and config.json."""
    source = write_case("gptq-qwen3-moe-sharded", tmp_path / "in")
    plan = run(source.path, tmp_path / "out", max_shard_size=300_000).plan
    assert {shard.file_name for shard in plan.shards} == {
        file.name for file in (tmp_path / "out").glob("*.safetensors")
    }
    for shard in plan.shards:
        file = tmp_path / "out" / shard.file_name
        header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        assert file.stat().st_size == header + shard.nbytes
    assert plan.nbytes_out == sum(tensor.nbytes for tensor in tensors_of(tmp_path / "out").values())


def test_threads_of_torch_are_put_back(tmp_path: Path) -> None:
    """A caller's torch has as many threads after a conversion as before, also when the conversion fails."""
    source = write_case("gptq-v1", tmp_path / "in")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run(source.path, tmp_path / "out")
        assert torch.get_num_threads() == 2
        edit_tensors(source.path, lambda t: t["model.layers.0.mlp.up_proj.scales"].fill_(float("nan")))
        with pytest.raises(ConvertError):
            run(source.path, tmp_path / "bad")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


# BF16.


def test_half_precision_becomes_bfloat16(tmp_path: Path) -> None:
    """All FP16 numbers, and infinities, become what torch makes of them; other dtypes keep their bytes."""
    source = write_case("gptq-v1", tmp_path / "in")
    halves = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16).view(256, 256)
    halves = halves.masked_fill(halves.isnan(), 0)
    kept = {
        "model.a.weight": torch.randn(3, 5),
        "model.b": torch.arange(3),
        "model.c": torch.tensor([True, False]),
        "model.d": torch.tensor(1.5, dtype=torch.float64),
        "model.e": torch.empty(0, 4, dtype=torch.float16),
    }
    edit_tensors(source.path, lambda t: t.update({"model.all_halves.weight": halves} | kept))
    run(source.path, tmp_path / "out")
    found = tensors_of(tmp_path / "out")
    assert torch.equal(found["model.all_halves.weight"].view(torch.int16), halves.bfloat16().view(torch.int16))
    assert found["model.e"].dtype == torch.bfloat16
    assert found["model.e"].shape == (0, 4)
    for name in ("model.a.weight", "model.b", "model.c", "model.d"):
        assert found[name].dtype == kept[name].dtype
        assert torch.equal(found[name], kept[name])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param({"dtype": "float16"}, {"dtype": "bfloat16"}, id="dtype"),
        pytest.param(
            {"dtype": REMOVE, "torch_dtype": "float16"}, {"dtype": None, "torch_dtype": "bfloat16"}, id="torch_dtype"
        ),
        pytest.param(
            {"dtype": "float32", "torch_dtype": "float16"}, {"dtype": "bfloat16", "torch_dtype": "bfloat16"}, id="both"
        ),
        pytest.param({"dtype": REMOVE}, {"dtype": None, "torch_dtype": "bfloat16"}, id="neither"),
        pytest.param({"dtype": None}, {"dtype": "bfloat16"}, id="null"),
        pytest.param(
            {"text_config": {"dtype": "float16", "hidden_size": 8, "deep": {"torch_dtype": "float16"}}},
            {"text_config": {"dtype": "bfloat16", "hidden_size": 8, "deep": {"torch_dtype": "bfloat16"}}},
            id="nested",
        ),
        pytest.param({"name": "dtype", "list": [1, {"a": 2}]}, {"name": "dtype", "list": [1, {"a": 2}]}, id="others"),
    ],
)
def test_config_says_bfloat16(changes: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    """Dtype and torch_dtype, those of sub-models too, become bfloat16; one is added where there is none."""
    source = write_case("gptq-v1", tmp_path / "in")
    edit_json(source.path / "config.json", **changes)
    run(source.path, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: config.get(key) for key in expected} == expected
    original = json.loads((source.path / "config.json").read_text())
    same = set(original) - {"dtype", "torch_dtype", "quantization_config", *expected}
    assert {key: config[key] for key in same} == {key: original[key] for key in same}


def test_quantize_config_does_not_survive(tmp_path: Path) -> None:
    """The old quantization is nowhere in the output: vLLM would read quantize_config.json."""
    source = write_case("gptq-quantize-config-only", tmp_path / "in")
    run(source.path, tmp_path / "out")
    assert not (tmp_path / "out" / "quantize_config.json").exists()
    assert (
        "gptq" not in json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["quant_method"]
    )


# What happens to layers.


@pytest.mark.parametrize(
    ("case", "dequantized"),
    [
        ("awq-odd-n", ("q_proj", "k_proj", "v_proj")),
        ("gptq-odd-k", ("down_proj",)),
        ("ct-per-channel-odd-k", ("down_proj",)),
    ],
)
def test_layers_kept_in_bf16_are_the_dequantized_ones(case: str, dequantized: tuple[str, ...], tmp_path: Path) -> None:
    """Bit for bit (code − zero)·scale in BF16, under `weight`; the result counts them."""
    source = write_case(case, tmp_path / "in")
    result = run(source.path, tmp_path / "out", unsupported=Unsupported.DEQUANTIZE)
    found = tensors_of(tmp_path / "out")
    kept = {name: layer for name, layer in source.layers.items() if name.endswith(dequantized)}
    assert {layer.plan.module for layer in result.layers if layer.stats is None} == kept.keys()
    for name, layer in kept.items():
        assert torch.equal(found[f"{name}.weight"], torch.from_numpy(layer.weight).bfloat16())
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["conversion"]["layers_in_bf16"] == len(kept)
    assert config["conversion"]["layers_with_codes_kept"] == len(source.layers) - len(kept)
    assert kept.keys() <= set(config["ignore"])


@pytest.mark.parametrize(
    ("case", "policy"),
    [("gptq-desc-act", "act_order"), ("ct-g-idx", "act_order"), ("awq-zero-points", "asymmetric")],
)
def test_policy_error_refuses_before_anything_is_written(case: str, policy: str, tmp_path: Path) -> None:
    """All layers at once, by name; no directory appears, not even a temporary one."""
    source = write_case(case, tmp_path / "in")
    options: dict[str, Any] = {policy: Policy.ERROR}
    with pytest.raises(PlanError) as caught:
        run(source.path, tmp_path / "sub" / "out", **options)
    assert {problem.subject for problem in caught.value.problems} == source.layers.keys()
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("case", ["gptq-desc-act-trivial", "ct-g-idx-trivial", "awq-zero-points-all-8"])
def test_policy_error_passes_what_keeps_its_codes(case: str, tmp_path: Path) -> None:
    """A flag in the configuration alone refuses nothing, and the codes are kept."""
    source = write_case(case, tmp_path / "in")
    result = run(source.path, tmp_path / "out", act_order=Policy.ERROR, asymmetric=Policy.ERROR)
    assert len(result.converted) == len(source.layers)
    assert all(stats.codes_kept for _, stats in result.converted)


def test_results_come_in_the_order_of_the_plan(tmp_path: Path) -> None:
    """Whoever finishes first, the result lists layers in their order."""
    source = write_case("gptq-qwen3-moe-sharded", tmp_path / "in")
    result = run(source.path, tmp_path / "out")
    assert [layer.plan for layer in result.layers] == list(result.plan.layers)


# Failures.


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_damage_found_late_leaves_nothing(bad: float, tmp_path: Path) -> None:
    """A scale that cannot be is found while layers are being written; it is named, and OUT does not appear."""
    source = write_case("gptq-v1", tmp_path / "in")
    name = "model.layers.1.self_attn.v_proj.scales"
    edit_tensors(source.path, lambda t: t[name][0, :1].fill_(bad))
    with pytest.raises(ConvertError, match=name):
        run(source.path, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_bug_of_ours_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception from a worker thread ends the conversion as it is, and cleans up."""
    source = write_case("gptq-v1", tmp_path / "in")

    def failing(*_: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("convert_w4a8.conversion.shard.copy_tensor", failing)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        run(source.path, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_after_an_error_no_more_layers_are_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first error ends all: a hundred gigabytes are not converted in vain."""
    source = write_case("gptq-qwen3-moe-sharded", tmp_path / "in")
    begun: list[str] = []

    def failing(plan: LayerPlan, *_: Any) -> None:
        begun.append(plan.module)
        raise ZeroDivisionError

    monkeypatch.setattr("convert_w4a8.conversion.shard.convert_layer", failing)
    with pytest.raises(ZeroDivisionError):
        run(source.path, tmp_path / "out")
    assert len(begun) <= 2 * jobs._MAX_WORKERS


@pytest.mark.parametrize(
    "place",
    [
        "convert_w4a8.conversion.layer.to_w4a8",
        "convert_w4a8.encoding.lut_layout.reorder",  # which `reorder_parts` calls when it is asked for a part
    ],
)
def test_a_gpu_that_is_too_small(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory is the user's matter, not a bug of ours: one error that names the layer, and nothing is left."""
    source = write_case("gptq-v1", tmp_path / "in")
    before = snapshot(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(place, full)
    with pytest.raises(DiskError, match=r"model\.layers\.0.* does not fit into the free memory.*--device cpu"):
        run(source.path, tmp_path / "out")
    assert snapshot(tmp_path) == before
