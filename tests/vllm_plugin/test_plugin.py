"""The vLLM plugin on CPU: the format's problems, and loading through vLLM's own layers and loaders, in isolation."""

import importlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import vllm_sources
from vllm_layers import (
    BLOCK,
    BOTH_TABLES,
    MIXTRAL,
    ON_BOTH,
    QWEN,
    TP,
    Weight,
    join,
    linear_classes,
    load,
    make_config,
    make_experts,
    make_moe_config,
    part_of,
)

from convert_w4a8.encoding.tables import decode, expand_tables, gemm
from convert_w4a8.lut_format import METHOD, LutFormat, TableForm
from convert_w4a8.options import ScalesMode
from convert_w4a8.targets import lut
from convert_w4a8.vllm_plugin import compat, partition

# ---------------------------------------------------------------------------------------------------- without vLLM


def test_importing_the_plugin_needs_neither_vllm_nor_triton() -> None:
    """The package that registers the plugin imports where vLLM and Triton do not exist, and imports no CUDA."""
    code = (
        "import sys; sys.modules['vllm'] = sys.modules['triton'] = None;"
        "from convert_w4a8.vllm_plugin import register; import torch; assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_entry_point_leads_to_register() -> None:
    """What vLLM looks up is what the package installs."""
    points = importlib.metadata.entry_points(group="vllm.general_plugins")
    if "w4a8_lut" not in points.names:
        pytest.skip("the package is not installed, only importable")
    assert points["w4a8_lut"].load() is importlib.import_module("convert_w4a8.vllm_plugin").register


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("version", 3, "the checkpoint has format version 3, this plugin reads up to 2; upgrade it: pip install"),
        ("version", None, "version: None is not an integer from 1 to 2"),
        ("carried", ["q_proj"], "carried: ['q_proj'] is not a block of compressed-tensors"),
        ("carried", {"config_groups": None}, "carried: {'config_groups': None} is not a block"),
        ("version", "1", "version: '1' is not an integer"),
        ("layout", "cutlass_sm100", "layout: 'cutlass_sm100' is not 'cutlass_sm90_16x32'"),
        ("bits", 8, "bits: 8 is not 4"),
        ("group_size", 64, "group_size: 64 is not 128"),
        ("tables", "lut", "tables: 'lut' is not 'scale' or 'entries'"),
        ("tables", ["scale"], "tables: ['scale'] is not"),
        ("ignore", "lm_head", "ignore: 'lm_head' is not a list of strings"),
        ("ignore", [1], "ignore: [1] is not a list of strings"),
        ("ignore", ["re:("], "is not a regular expression"),
    ],
)
def test_a_block_that_cannot_be_served_is_refused_in_one_line(field: str, value: object, says: str) -> None:
    """Every field that decides how bytes are read is checked, and a newer format asks for a newer plugin."""
    with pytest.raises(ValueError, match="w4a8_lut: quantization_config") as error:
        LutFormat.parse(BLOCK | {field: value})
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_the_block_of_the_documentation_is_read() -> None:
    """Fields that no reader depends on are not looked at."""
    assert LutFormat.parse(BLOCK) == LutFormat(TableForm.SCALE, frozenset({"lm_head"}))
    assert LutFormat.parse(BLOCK | {"tables": "entries", "ignore": None}) == LutFormat(TableForm.ENTRIES, frozenset())


FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def _ignoring(*names: str) -> LutFormat:
    return LutFormat(TableForm.SCALE, frozenset(names))


def test_modules_are_ignored_by_exact_name() -> None:
    """A prefix, a suffix or a layer number that merely looks alike does not count."""
    form = _ignoring("model.layers.1.mlp.down_proj", "lm_head")
    assert form.is_ignored("model.layers.1.mlp.down_proj", FUSED)
    assert form.is_ignored("lm_head", FUSED)
    for other in ("model.layers.11.mlp.down_proj", "model.layers.1.mlp.down_proj.x", "layers.1.mlp.down_proj"):
        assert not form.is_ignored(other, FUSED)


def test_a_fused_module_is_ignored_if_all_its_shards_are() -> None:
    """The checkpoint names q, k and v; vLLM asks for qkv."""
    form = _ignoring(*(f"m.attn.{x}_proj" for x in "qkv"), "m.up.qkv_proj")
    assert form.is_ignored("m.attn.qkv_proj", FUSED)
    assert form.is_ignored("m.up.qkv_proj", FUSED), "fused in the checkpoint itself"
    assert not form.is_ignored("m.mlp.gate_up_proj", FUSED)
    assert _ignoring("q_proj", "k_proj", "v_proj").is_ignored("qkv_proj", FUSED)


def test_a_half_ignored_fused_module_is_refused() -> None:
    """One weight in vLLM for the three; it cannot be quantized in part."""
    with pytest.raises(ValueError, match=r"m\.qkv_proj: 1 of the 3 layers.*\(first: m\.k_proj\)"):
        _ignoring("m.k_proj").is_ignored("m.qkv_proj", FUSED)


def test_experts_are_ignored_together() -> None:
    """All experts of a MoE layer, by the checkpoint's names for the projections, or none."""
    names = ("w1", "w2", "w3")
    every = [f"m.experts.{e}.{p}" for e in range(2) for p in names]
    assert _ignoring(*every).are_experts_ignored("m.experts", 2, names)
    assert _ignoring("m.experts").are_experts_ignored("m.experts", 2, names)
    assert not _ignoring("m.gate").are_experts_ignored("m.experts", 2, names)
    with pytest.raises(ValueError, match="5 of the 6 layers"):
        _ignoring(*every[1:]).are_experts_ignored("m.experts", 2, names)


def test_renaming_sees_tensor_names() -> None:
    """Mappers of vLLM match tensor names, some with a trailing dot; a dropped module is dropped."""

    def mapper(names: list[str]) -> list[str]:
        kept = [name for name in names if not name.startswith("visual.")]
        return [name.replace("lm_head.", "language_model.lm_head.") for name in kept]

    assert _ignoring("lm_head", "visual.proj").renamed(mapper) == _ignoring("language_model.lm_head")


def test_the_tested_range_is_that_of_the_contract() -> None:
    """What the plugin says was tested is what these tests read."""
    assert (vllm_sources.VERSIONS[0], vllm_sources.VERSIONS[-1]) == compat.TESTED


@pytest.mark.parametrize(
    ("version", "tested"),
    [
        ("0.25.1", True),
        ("0.33.0", True),
        ("0.27.0.post1", True),
        ("0.33.0rc2+cu130", True),
        ("0.25.0", False),
        ("0.33.1", False),
        ("1.0.0", False),
        ("dev", False),
    ],
)
def test_a_vllm_outside_the_tested_range_is_named(version: str, tested: bool) -> None:
    """The warning says which versions were tested; inside the range there is none."""
    message = compat.untested(version)
    assert (message is None) == tested
    if message:
        assert version in message
        assert "0.25.1 to 0.33.0" in message


@pytest.mark.parametrize(
    ("k", "shards", "problem", "cutlass_problem"),
    [
        (128, (128,), None, None),
        (256, (112, 16), None, None),
        (7168, (1536, 576), None, "2112 output channels are not a multiple of 128"),
        (128, (64, 32), None, "96 output channels are not a multiple of 128"),
        (192, (128,), "192 input channels are not a multiple of 128", None),
        (128, (136,), "136 output channels are not a multiple of 16", "136 output channels are not a multiple of 128"),
        (128, (120, 8), "merged shards of 120, 8 output channels are not multiples of 16", None),
    ],
)
def test_what_the_kernels_take(
    k: int, shards: tuple[int, ...], problem: str | None, cutlass_problem: str | None
) -> None:
    """K in multiples of 128; shards in whole tiles of 16, or vLLM would slice beside them; N of 128 for CUTLASS."""
    part = partition.Partition(k, shards)
    assert (part.problem, part.cutlass_problem) == (problem, cutlass_problem)


def test_a_refused_partition_names_the_layer_and_what_would_work() -> None:
    """Gate and up of 192 channels: parts of 24 at 8 ranks; whole tiles at 1, 2, 3, 4, 6 and 12."""

    def at(tp: int) -> partition.Partition | None:
        return partition.columns(512, (192, 192), tp)

    part = at(8)
    assert part == partition.Partition(512, (24, 24))
    with pytest.raises(ValueError, match=r"m\.gate_up_proj: at tensor-parallel size 8, merged shards of 24") as error:
        partition.check("m.gate_up_proj", part, 8, at)
    assert str(error.value).endswith("tensor-parallel sizes that work for this layer: 1, 2, 3, 4, 6, 12")


def test_a_layer_that_fits_no_tensor_parallel_size_is_told_so() -> None:
    """No advice that would not help."""
    with pytest.raises(ValueError, match="no tensor-parallel size works for it: convert"):
        partition.check("m", partition.Partition(192, (128,)), 1, lambda tp: partition.columns(192, (128,), tp))


# --------------------------------------------------------------------------- with vLLM's own layers and weight loaders


@pytest.fixture
def vllm(request: pytest.FixtureRequest) -> Iterator[vllm_sources.Ranks]:
    """Import the loading code of one version of vLLM, with stand-ins for the rest."""
    with vllm_sources.loading(request.param) as ranks:
        yield ranks


def _same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert torch.equal(actual.detach().contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


@ON_BOTH
@BOTH_TABLES
@TP
def test_merged_columns_are_sharded_by_output_channels(vllm: vllm_sources.Ranks, tables: TableForm, tp: int) -> None:
    """Gate and up of unequal sizes: each rank holds its rows of both, repacked side by side."""
    gate, up = Weight(1024, 256, tables, 1), Weight(512, 256, tables, 2)
    vllm.size = tp
    for vllm.rank in range(tp):
        layer = linear_classes().MergedColumnParallelLinear(
            256,
            [1024, 512],
            bias=False,
            params_dtype=torch.bfloat16,
            quant_config=make_config(tables),
            prefix="m.gate_up",
        )
        load(layer, gate, 0)
        load(layer, up, 1)
        expected = join([gate.tensors(part_of(1024, vllm.rank, tp)), up.tensors(part_of(512, vllm.rank, tp))])
        for name, tensor in expected.items():
            _same(getattr(layer, name), tensor)


@ON_BOTH
@BOTH_TABLES
@TP
def test_qkv_is_sharded_by_heads_and_kv_heads_are_replicated(
    vllm: vllm_sources.Ranks, tables: TableForm, tp: int
) -> None:
    """Eight heads of 64 and two KV heads: at TP 4 two ranks share each KV head."""
    q, k, v = (Weight(n, 256, tables, seed) for seed, n in enumerate((512, 128, 128)))
    vllm.size = tp
    for vllm.rank in range(tp):
        layer = linear_classes().QKVParallelLinear(
            256,
            64,
            8,
            2,
            bias=False,
            params_dtype=torch.bfloat16,
            quant_config=make_config(tables),
            prefix="m.qkv_proj",
        )
        for weight, shard in ((q, "q"), (k, "k"), (v, "v")):
            load(layer, weight, shard)
        groups = min(tp, 2)
        kv_rows = part_of(128, vllm.rank * groups // tp, groups)
        expected = join([q.tensors(part_of(512, vllm.rank, tp)), k.tensors(kv_rows), v.tensors(kv_rows)])
        for name, tensor in expected.items():
            _same(getattr(layer, name), tensor)


@ON_BOTH
@BOTH_TABLES
@TP
def test_qkv_fused_on_disk_is_split_by_the_loader(vllm: vllm_sources.Ranks, tables: TableForm, tp: int) -> None:
    """Phi-3 stores q, k and v as one linear; vLLM cuts it into shards before slicing."""
    weight = Weight(768, 256, tables, 3)
    vllm.size = tp
    vllm.rank = tp - 1
    layer = linear_classes().QKVParallelLinear(
        256, 64, 8, 2, bias=False, params_dtype=torch.bfloat16, quant_config=make_config(tables), prefix="m.qkv_proj"
    )
    load(layer, weight)
    last = min(tp, 2)
    rows = [(0, 512, tp), (512, 128, last), (640, 128, last)]
    expected = join([weight.tensors(slice(at + size - size // parts, at + size)) for at, size, parts in rows])
    for name, tensor in expected.items():
        _same(getattr(layer, name), tensor)


@ON_BOTH
@BOTH_TABLES
@TP
def test_rows_are_sharded_by_input_channels(vllm: vllm_sources.Ranks, tables: TableForm, tp: int) -> None:
    """Each rank holds its input channels' tiles and groups, and all channel scales."""
    weight = Weight(128, 512, tables, 4)
    vllm.size = tp
    for vllm.rank in range(tp):
        layer = linear_classes().RowParallelLinear(
            512, 128, bias=False, params_dtype=torch.bfloat16, quant_config=make_config(tables), prefix="m.down_proj"
        )
        load(layer, weight)
        for name, tensor in weight.tensors(columns=part_of(512, vllm.rank, tp)).items():
            _same(getattr(layer, name), tensor)


@ON_BOTH
@BOTH_TABLES
@TP
def test_the_parts_compute_the_layer(vllm: vllm_sources.Ranks, tables: TableForm, tp: int) -> None:
    """After loading, the op is called so that columns concatenate to, and rows add up to, the layer's own product.

    Columns, with a bias, must agree exactly. Rows quantize their slices of the tokens apart, as stock W4A8 does.
    """
    act = torch.randn(3, 5, 512, generator=torch.Generator().manual_seed(5)).bfloat16()
    up, down = Weight(512, 512, tables, 6), Weight(128, 512, tables, 7)
    bias = torch.linspace(-1, 1, 512).bfloat16()
    vllm.size = tp
    columns, rows = [], []
    for vllm.rank in range(tp):
        args = {"params_dtype": torch.bfloat16, "quant_config": make_config(tables)}
        column = linear_classes().ColumnParallelLinear(512, 512, bias=True, prefix="m.up_proj", **args)
        column.bias.weight_loader(column.bias, bias)
        row = linear_classes().RowParallelLinear(512, 128, bias=False, prefix="m.down_proj", **args)
        for layer, weight in ((column, up), (row, down)):
            load(layer, weight)
            layer.quant_method.process_weights_after_loading(layer)
        part = part_of(512, vllm.rank, tp)
        columns.append(column.quant_method.apply(column, act, column.bias))
        rows.append(row.quant_method.apply(row, act[..., part]).float())
        # Nothing was repacked: the op reads the buffer that the loader filled.
        _same(column.weight_packed.view(-1, 4 * 512 // tp), up.tensors(rows=part)["weight_packed"])
    flat = act.view(15, 512)
    expected = gemm(flat, up.layer()).view(3, 5, 512) + bias
    torch.testing.assert_close(torch.cat(columns, dim=-1), expected, rtol=0.01, atol=0.01)
    exact = (flat.float() @ decode(down.layer()).t()).view(3, 5, 128)
    assert (sum(rows) - exact).norm() / exact.norm() < 0.04


@ON_BOTH
def test_layers_get_the_method_they_need(vllm: vllm_sources.Ranks) -> None:  # noqa: ARG001
    """Quantized unless ignored, fused names by their shards, after the model's own renaming of modules."""
    linear = linear_classes()
    mapper = importlib.import_module("vllm.model_executor.models.utils").WeightsMapper(
        orig_to_new_prefix={"model.": "language_model.model.", "lm_head.": "language_model.lm_head."}
    )
    config = make_config(TableForm.SCALE, ignore=("lm_head", *(f"model.a.{x}_proj" for x in "qkv"), "model.mlp.gate"))
    config.packed_modules_mapping = FUSED
    config.apply_vllm_mapper(mapper)
    args: dict[str, Any] = {"bias": False, "params_dtype": torch.bfloat16, "quant_config": config}

    def method(name: str) -> str:
        kind = linear.QKVParallelLinear if name.endswith("qkv_proj") else linear.ReplicatedLinear
        sizes = (256, 64, 8, 2) if name.endswith("qkv_proj") else (256, 128)
        return type(kind(*sizes, prefix=name, **args).quant_method).__name__

    assert method("language_model.model.a.qkv_proj") == "UnquantizedLinearMethod"
    assert method("language_model.model.mlp.gate") == "UnquantizedLinearMethod"
    assert method("language_model.lm_head") == "UnquantizedLinearMethod"
    assert method("language_model.model.b.qkv_proj") == "W4A8LutLinearMethod"
    assert method("language_model.model.mlp.down_proj") == "W4A8LutLinearMethod"
    assert config.get_quant_method(torch.nn.Embedding(2, 2), "model.embed_tokens") is None


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Say why Triton cannot compile: under "why_not", None at first."""
    said: dict[str, str | None] = {"why_not": None}
    monkeypatch.setattr("convert_w4a8.devices.why_not_compiled", lambda _device: said["why_not"])
    return said


def _replicated(k: int, n: int, config: Any, dtype: torch.dtype = torch.bfloat16) -> Any:
    return linear_classes().ReplicatedLinear(k, n, bias=False, params_dtype=dtype, quant_config=config, prefix="m.out")


@ON_BOTH
@pytest.mark.parametrize("capability", [(8, 9), (10, 0), (10, 3), (12, 0), (12, 1)])
def test_other_gpus_need_our_kernel(
    vllm: vllm_sources.Ranks, triton: dict[str, str | None], capability: tuple[int, int]
) -> None:
    """Ada and Blackwell, for which CUTLASS has no such kernel: served where Triton compiles, refused where not."""
    vllm.capability = capability
    config = make_config(TableForm.SCALE)
    assert config.get_min_capability() <= 10 * capability[0] + capability[1]
    assert _replicated(256, 128, config).weight_packed.shape == (8, 512)
    triton["why_not"] = "there is no C compiler"
    with pytest.raises(ValueError, match=r"m\.out: vLLM's CUTLASS runs W4A8 on .* 9\.0") as error:
        _replicated(256, 128, config)
    assert f"this GPU has {capability[0]}.{capability[1]}, and Triton cannot compile" in str(error.value)
    assert "there is no C compiler" in str(error.value)
    assert "\n" not in str(error.value)


@ON_BOTH
def test_older_gpus_are_refused(vllm: vllm_sources.Ranks) -> None:
    """Ampere has no FP8."""
    vllm.capability = (8, 6)
    with pytest.raises(ValueError, match=r"compute capability 8\.6: W4A8 needs FP8 tensor cores, from 8\.9 on"):
        make_config(TableForm.SCALE)


@ON_BOTH
def test_a_launcher_without_a_gpu_passes_and_its_worker_is_asked_again(vllm: vllm_sources.Ranks) -> None:
    """The configuration is read where there may be no GPU; layers are made where there is one."""
    vllm.capability = None
    config = make_config(TableForm.SCALE)
    vllm.capability = (8, 0)
    with pytest.raises(ValueError, match="compute capability 8"):
        _replicated(256, 128, config)


@ON_BOTH
@BOTH_TABLES
def test_what_cutlass_cannot_take_is_loaded_for_our_kernel(
    vllm: vllm_sources.Ranks, triton: dict[str, str | None], tables: TableForm
) -> None:
    """DeepSeek's fused q_a and kv_a, 1536 + 576 channels, on every rank in full."""
    vllm.size = 2
    q_a, kv_a = Weight(1536, 256, tables, 1), Weight(576, 256, tables, 2)
    config = make_config(tables)

    def fused() -> Any:
        return linear_classes().MergedColumnParallelLinear(
            256,
            [1536, 576],
            bias=False,
            params_dtype=torch.bfloat16,
            quant_config=config,
            prefix="m.fused_qkv_a_proj",
            disable_tp=True,
        )

    layer = fused()
    for shard, weight in enumerate((q_a, kv_a)):
        load(layer, weight, shard)
    for name, expected in join([q_a.tensors(), kv_a.tensors()]).items():
        _same(getattr(layer, name), expected)
    triton["why_not"] = "there is no C compiler"
    with pytest.raises(ValueError, match=r"2112 output channels are not a multiple of 128, .*there is no C compiler"):
        fused()


@ON_BOTH
def test_a_state_space_of_one_group_is_refused_on_several_ranks(
    vllm: vllm_sources.Ranks,
    triton: dict[str, str | None],  # noqa: ARG001
) -> None:
    """The in_proj, merged elsewhere, then has a copy of the group for each rank, which vLLM's loader would not fill."""
    linear, config = linear_classes(), make_config(TableForm.SCALE)
    args: dict[str, Any] = {"bias": False, "params_dtype": torch.bfloat16, "quant_config": config}
    linear.ColumnParallelLinear(256, 1408, prefix="m.mixer.in_proj", **args)
    vllm.size = 2
    with pytest.raises(ValueError, match=r"m\.mixer\.in_proj: at tensor-parallel size 2, vLLM repeats .*\(--keep\)$"):
        linear.ColumnParallelLinear(256, 1408, prefix="m.mixer.in_proj", **args)
    linear.MergedColumnParallelLinear(256, [512, 512, 128, 128, 128], prefix="m.mixer.in_proj", **args)
    linear.ColumnParallelLinear(256, 256, prefix="m.mixer.proj", **args)


@ON_BOTH
def test_cutlass_alone_cannot_run_what_it_cannot_take(
    vllm: vllm_sources.Ranks,  # noqa: ARG001
    triton: dict[str, str | None],  # noqa: ARG001
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The variable is refused where it leaves no kernel, and obeyed elsewhere."""
    config = make_config(TableForm.SCALE)
    monkeypatch.setenv("W4A8_LUT_DECODE", "cutlass")
    _replicated(256, 128, config)
    with pytest.raises(
        ValueError, match=r"m\.out: 2112 .*W4A8_LUT_DECODE=cutlass leaves out .*; unset W4A8_LUT_DECODE$"
    ):
        _replicated(256, 2112, config)


@ON_BOTH
def test_layers_that_no_kernel_can_take_are_refused(
    vllm: vllm_sources.Ranks,
    triton: dict[str, str | None],  # noqa: ARG001
) -> None:
    """The error comes when the layer is made, names it, and says which tensor-parallel sizes would work."""
    linear = linear_classes()
    config = make_config(TableForm.SCALE)
    args: dict[str, Any] = {"bias": False, "params_dtype": torch.bfloat16, "quant_config": config}
    vllm.size = 4
    linear.QKVParallelLinear(768, 64, 12, 4, prefix="m.qkv_proj", **args)
    with pytest.raises(ValueError, match=r"m\.down_proj: at .* 4, 192 input .* this layer: 1, 2, 3, 6$"):
        linear.RowParallelLinear(768, 128, prefix="m.down_proj", **args)
    with pytest.raises(ValueError, match=r"m\.gate_up_proj: at .* 4, merged shards of 24, .* this layer: 1, 2, 3, 6$"):
        linear.MergedColumnParallelLinear(256, [96, 96], prefix="m.gate_up_proj", **args)
    with pytest.raises(ValueError, match=r"m\.out: at .* 4, 40 output channels .* no tensor-parallel size"):
        _replicated(256, 40, config)
    with pytest.raises(ValueError, match=r"its dtype is torch\.float16; the kernel writes bfloat16"):
        _replicated(256, 128, config, torch.float16)


@pytest.mark.parametrize("mode", list(ScalesMode))
def test_what_the_converter_writes_is_what_the_plugin_reads(mode: ScalesMode) -> None:
    """The block of every scales mode is understood, and its tables are the tensor that a layer has."""
    block = lut.quantization_config({}, ["lm_head"], mode, {})
    assert block["quant_method"] == METHOD
    form = LutFormat.parse(block)
    names = {spec.name.removeprefix("m.") for spec in lut.tensor_specs("m", 128, 256, mode)}
    assert names == set(Weight(128, 256, form.tables, 0).tensors())


@ON_BOTH
def test_registering_twice_registers_once(vllm: vllm_sources.Ranks) -> None:  # noqa: ARG001
    """The entry point is called in every process, and may be called again."""
    quantization = importlib.import_module("vllm.model_executor.layers.quantization")
    plugin = importlib.import_module("convert_w4a8.vllm_plugin")
    plugin.register()
    plugin.register()
    assert quantization.QUANTIZATION_METHODS.count("w4a8_lut") == 1
    config = quantization._CUSTOMIZED_METHOD_TO_QUANT_CONFIG["w4a8_lut"]
    assert config.get_name() == "w4a8_lut"


@ON_BOTH
@BOTH_TABLES
@TP
@pytest.mark.parametrize("names", [QWEN, MIXTRAL], ids=["qwen", "mixtral"])
def test_experts_are_sharded_by_the_moe_loader(
    vllm: vllm_sources.Ranks, tables: TableForm, tp: int, names: tuple[str, str, str]
) -> None:
    """Gate and up side by side in w13, down by input channels in w2; each expert at its own index."""
    experts, hidden, intermediate = 2, 256, 1024
    gate, down, up = names
    weights = {
        (expert, name): Weight(*((hidden, intermediate) if name == down else (intermediate, hidden)), tables, seed)
        for seed, (expert, name) in enumerate((e, n) for e in range(experts) for n in names)
    }
    vllm.size = tp
    for vllm.rank in range(tp):
        layer = make_experts(make_config(tables), make_moe_config(experts, hidden, intermediate, tp, vllm.rank), names)
        stored = [
            (f"{expert}.{name}.{tensor}", value)
            for (expert, name), weight in weights.items()
            for tensor, value in weight.tensors().items()
        ]
        loaded = list(layer.load_weights(iter(stored)))
        assert len(loaded) == len(stored), "every tensor found its parameter"
        part = part_of(intermediate, vllm.rank, tp)
        for expert in range(experts):
            w13 = join([weights[expert, gate].tensors(part), weights[expert, up].tensors(part)])
            w2 = weights[expert, down].tensors(columns=part)
            for name in w2:
                _same(getattr(layer, f"w13_{name}")[expert], w13[name])
                _same(getattr(layer, f"w2_{name}")[expert], w2[name])


@ON_BOTH
@BOTH_TABLES
def test_loaded_experts_are_shown_to_the_op_as_they_lie(vllm: vllm_sources.Ranks, tables: TableForm) -> None:  # noqa: ARG001
    """After loading: [E, N, K/8] views of the same bytes, eight table bytes per group and channel."""
    moe = make_moe_config(2, 256, 512, 1, 0)
    layer = make_experts(make_config(tables), moe, QWEN)
    weights = [Weight(512, 256, tables, seed) for seed in range(4)]
    stored = [
        (f"{i % 2}.{name}.{tensor}", value)
        for i, weight in enumerate(weights)
        for name in (("gate_proj", "up_proj")[i // 2],)
        for tensor, value in weight.tensors().items()
    ]
    list(layer.load_weights(iter(stored)))
    down = [(f"{e}.down_proj.{t}", v) for e in range(2) for t, v in Weight(256, 512, tables, e).tensors().items()]
    list(layer.load_weights(iter(down)))
    before = layer.w13_weight_packed.data.flatten().clone()
    layer.quant_method.process_weights_after_loading(layer)
    assert layer.w13_weight_packed.shape == (2, 1024, 32)
    assert layer.w2_weight_packed.shape == (2, 256, 64)
    _same(layer.w13_weight_packed.data.flatten(), before)
    table = getattr(layer, f"w13_{layer.quant_method.table_name}")
    expected = torch.stack(
        [torch.cat([expand_tables(weights[e].scale), expand_tables(weights[e + 2].scale)], dim=1) for e in range(2)]
    )
    _same(table.data, expected.flatten())
    kernel = layer.quant_method.moe_kernel.experts
    assert kernel.b_strides1.tolist() == [[64, 8, 32768]] * 2
    assert kernel.b_strides2.tolist() == [[16, 16, 8192]] * 2
    assert kernel.group_size == 128
    scales = layer.quant_method.moe_quant_config
    assert scales.w1_scale is table
    assert scales.w2_scale is getattr(layer, f"w2_{layer.quant_method.table_name}")
    assert scales.g1_alphas is layer.w13_weight_chan_scale
    assert scales.g2_alphas is layer.w2_weight_chan_scale
    assert kernel.quant_config is scales


@ON_BOTH
@BOTH_TABLES
@pytest.mark.parametrize("wrong", ["weight_packed", "table", "weight_chan_scale"])
@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_a_weight_of_another_dtype_never_reaches_the_op(
    vllm: vllm_sources.Ranks,  # noqa: ARG001
    tables: TableForm,
    wrong: str,
    kind: str,
) -> None:
    """The ops would read float32 from bfloat16 memory without a word."""
    if kind == "dense":
        args: dict[str, Any] = {"params_dtype": torch.bfloat16, "quant_config": make_config(tables)}
        layer = linear_classes().ReplicatedLinear(256, 128, bias=False, prefix="m", **args)
    else:
        layer = make_experts(make_config(tables), make_moe_config(2, 256, 512, 1, 0), QWEN)
    for name, parameter in layer.named_parameters():
        parameter.data = torch.zeros_like(parameter.data)
        if name.endswith(layer.quant_method.table_name if wrong == "table" else wrong):
            parameter.data = parameter.data.to(torch.int64 if wrong == "weight_packed" else torch.bfloat16)
    with pytest.raises(TypeError, match="the kernel cannot read"):
        layer.quant_method.process_weights_after_loading(layer)


@ON_BOTH
def test_experts_that_the_kernel_cannot_take_are_refused(vllm: vllm_sources.Ranks) -> None:
    """Multiples of 128 per rank, and the tensor-parallel sizes that give them."""
    vllm.size = 4
    with pytest.raises(ValueError, match=r"mlp\.experts: at .* 4, .* intermediate size of 192 .*: 1, 2, 3, 6$"):
        make_experts(make_config(TableForm.SCALE), make_moe_config(2, 256, 768, 4, 0), QWEN)
    with pytest.raises(ValueError, match=r"hidden size of 320 is not a multiple of 128 .* no tensor-parallel size"):
        make_experts(make_config(TableForm.SCALE), make_moe_config(2, 320, 1024, 4, 0), QWEN)


@ON_BOTH
def test_ignored_experts_are_unquantized(vllm: vllm_sources.Ranks) -> None:  # noqa: ARG001
    """All of them, by the names that the checkpoint has."""
    prefix = "model.layers.0.mlp.experts"
    ignore = tuple(f"{prefix}.{expert}.{name}" for expert in range(2) for name in QWEN)
    quantized = make_experts(make_config(TableForm.SCALE), make_moe_config(2, 256, 512, 1, 0), QWEN)
    method = make_config(TableForm.SCALE, ignore).get_quant_method(quantized, prefix)
    assert type(method).__name__ == "UnquantizedFusedMoEMethod"
