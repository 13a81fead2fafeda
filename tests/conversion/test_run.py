"""The conversion itself: bytes, memory, policies, and that it can be repeated. Weights are tested end to end."""

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_edits import REMOVE, edit_json, edit_tensors, snapshot, write_case
from factories import Checkpoint
from safetensors.torch import load_file, save_file

from convert_w4a8.checkpoint.directory import open_checkpoint
from convert_w4a8.conversion import jobs
from convert_w4a8.conversion import run as convert
from convert_w4a8.conversion.plan import make_plan
from convert_w4a8.conversion.result import Result
from convert_w4a8.conversion.run import check_paths
from convert_w4a8.devices import resolve_device
from convert_w4a8.encoding import dequantize
from convert_w4a8.errors import ConvertError, PlanError
from convert_w4a8.options import Options, Policy, ScalesMode, Unsupported

FORMATS = ("lut", "compressed-tensors")


def run(source: Path, out: Path, *, overwrite: bool = False, **options: Any) -> Result:
    """Convert a checkpoint on the CPU."""
    checkpoint = open_checkpoint(source)
    plan = make_plan(checkpoint, Options(**({"scales": ScalesMode.REFERENCE} | options)))
    return convert.convert(checkpoint, plan, out, device=torch.device("cpu"), overwrite=overwrite)


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
    options = {"format": form, "unsupported": Unsupported.DEQUANTIZE, "max_shard_size": 200_000}
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
    monkeypatch.setattr(dequantize, "_BLOCK_WEIGHTS", 1)
    monkeypatch.setattr(convert, "_CHUNK_BYTES", 1000)
    run(source.path, tmp_path / "pieces", unsupported=Unsupported.DEQUANTIZE)
    assert snapshot(tmp_path / "pieces") == snapshot(tmp_path / "whole")


def test_copies_are_read_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An embedding is never in memory as a whole: no read is larger than the chunk, and all of it is read."""
    source = write_case("gptq-v1", tmp_path / "in")
    edit_tensors(source.path, lambda t: t.update({"model.embed_tokens.weight": torch.randn(1000, 256).bfloat16()}))
    monkeypatch.setattr(convert, "_CHUNK_BYTES", 10_000)
    sizes: list[int] = []
    lock = threading.Lock()
    read_into = convert.read_into

    def recording(info: Any, buffer: torch.Tensor, offset: int) -> None:
        with lock:
            sizes.append(buffer.numel())
        read_into(info, buffer, offset)

    monkeypatch.setattr(convert, "read_into", recording)
    run(source.path, tmp_path / "out")
    copied = {name: t for name, t in tensors_of(source.path).items() if name.endswith(".weight")}
    assert max(sizes) == 10_000
    assert sum(sizes) == sum(tensor.nbytes for tensor in copied.values())
    found = tensors_of(tmp_path / "out")
    assert all(torch.equal(found[name], tensor) for name, tensor in copied.items())


def test_few_layers_are_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many layers there are, no more are under way than there are workers."""
    source = write_case("gptq-qwen3-moe-sharded", tmp_path / "in")
    running, most = 0, 0
    lock = threading.Lock()
    convert_layer = convert._convert_layer

    def counting(*arguments: Any) -> Any:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        try:
            return convert_layer(*arguments)
        finally:
            with lock:
                running -= 1

    monkeypatch.setattr(convert, "_convert_layer", counting)
    run(source.path, tmp_path / "out")
    assert 1 <= most <= jobs._MAX_WORKERS


def test_progress_counts_every_byte_of_the_input_once(tmp_path: Path) -> None:
    """The bar ends at the size of the input."""
    source = write_case("gptq-qwen3-moe-sharded", tmp_path / "in")
    checkpoint = open_checkpoint(source.path)
    plan = make_plan(checkpoint, Options(scales=ScalesMode.REFERENCE))
    seen: list[int] = []
    convert.convert(checkpoint, plan, tmp_path / "out", device=torch.device("cpu"), progress=seen.append)
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
    with pytest.raises(PlanError) as caught:
        run(source.path, tmp_path / "sub" / "out", **{policy: Policy.ERROR})
    assert {refusal.subject for refusal in caught.value.problems} == source.layers.keys()
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("case", ["gptq-desc-act-trivial", "ct-g-idx-trivial", "awq-zero-points-all-8"])
def test_policy_error_passes_what_is_exact(case: str, tmp_path: Path) -> None:
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


@pytest.mark.parametrize("bad", [float("nan"), -1.0])
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

    monkeypatch.setattr(convert, "_copy_tensor", failing)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        run(source.path, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_after_an_error_no_more_layers_are_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first error ends all: a hundred gigabytes are not converted in vain."""
    source = write_case("gptq-qwen3-moe-sharded", tmp_path / "in")
    begun: list[str] = []

    def failing(_work: Any, layer: Any) -> None:
        begun.append(layer.module)
        raise ZeroDivisionError

    monkeypatch.setattr(convert, "_convert_layer", failing)
    with pytest.raises(ZeroDivisionError):
        run(source.path, tmp_path / "out")
    assert len(begun) <= 2 * jobs._MAX_WORKERS


# Places.


def place(source: Checkpoint, out: Path, *, overwrite: bool = False) -> None:
    """Check an output path for a conversion of a checkpoint."""
    checkpoint = open_checkpoint(source.path)
    check_paths(checkpoint, out, make_plan(checkpoint, Options()), overwrite=overwrite)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("where", ["in", "in/out", "in/a/b", ".", "in/../in", "link", "link/out", "sub/../in/out"])
def test_overlapping_paths_are_refused(where: str, overwrite: bool, tmp_path: Path) -> None:
    """OUT may be neither IN nor inside it nor around it, by whatever name; IN is not written to, nor replaced."""
    source = write_case("gptq-v1", tmp_path / "in")
    (tmp_path / "link").symlink_to("in")
    before = snapshot(tmp_path)
    with pytest.raises(ConvertError, match="overlaps the input directory; choose another output path"):
        place(source, tmp_path / where, overwrite=overwrite)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("where", ["in2", "out", "out/in", "in-", "other/../out"])
def test_paths_beside_the_input_are_allowed(where: str, tmp_path: Path) -> None:
    """A name that begins like IN's is another directory."""
    place(write_case("gptq-v1", tmp_path / "in"), tmp_path / where)


def test_the_target_of_links_into_the_input_is_found(tmp_path: Path) -> None:
    """IN given by a link overlaps with what lies in the directory behind the link."""
    source = write_case("gptq-v1", tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    checkpoint = open_checkpoint(tmp_path / "link")
    with pytest.raises(ConvertError, match="overlaps"):
        check_paths(checkpoint, source.path / "out", make_plan(checkpoint, Options()), overwrite=False)


def test_a_full_disk_is_noticed_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes that are needed and those that are free are both named, also where OUT's parents do not exist."""
    source = write_case("gptq-v1", tmp_path / "in")
    checkpoint = open_checkpoint(source.path)
    plan = make_plan(checkpoint, Options())

    def usage(path: Path) -> Any:
        assert path == tmp_path
        return type("Usage", (), {"free": free})

    monkeypatch.setattr(convert.shutil, "disk_usage", usage)
    free = plan.disk_nbytes - 1
    with pytest.raises(ConvertError, match=rf"needs {plan.disk_nbytes:,} bytes, the disk has {free:,} free"):
        check_paths(checkpoint, tmp_path / "a" / "b" / "out", plan, overwrite=False)
    free = plan.disk_nbytes
    check_paths(checkpoint, tmp_path / "a" / "b" / "out", plan, overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


# Devices.


def test_devices() -> None:
    """`auto` is CUDA where there is one; devices that do not exist are refused with what can be said instead."""
    assert resolve_device("cpu") == torch.device("cpu")
    for name in ("tpu", "cuda:99", "meta", "", "mps", "cuda:x"):
        with pytest.raises(ConvertError, match="--device"):
            resolve_device(name)


@pytest.mark.parametrize(
    ("capability", "expected"), [(None, "cpu"), ((7, 5), "cpu"), ((8, 0), "cuda"), ((9, 0), "cuda"), ((12, 1), "cuda")]
)
def test_auto_takes_gpus_that_triton_supports(
    capability: tuple[int, int] | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An old GPU, on which torch itself may not run, is left alone unless it is asked for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert resolve_device("auto").type == expected


def test_a_gpu_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory is the user's matter, not a bug of ours: one error that names the layer, and nothing is left."""
    source = write_case("gptq-v1", tmp_path / "in")
    before = snapshot(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(convert, "to_w4a8", full)
    with pytest.raises(ConvertError, match=r"model\.layers\.0.* does not fit into the free memory.*--device cpu"):
        run(source.path, tmp_path / "out")
    assert snapshot(tmp_path) == before
