"""What the checkpoint lacks is refused, what it has is known without asking the device: through vLLM's own loaders."""

import gc
import importlib
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm_sources
from vllm_layers import (
    BOTH_TABLES,
    ON_BOTH,
    QWEN,
    TP,
    Weight,
    linear_classes,
    load,
    make_config,
    make_experts,
    make_moe_config,
)

from convert_w4a8.encoding.tables import expand_tables
from convert_w4a8.lut_format import TableForm
from convert_w4a8.vllm_plugin.loading import noting_experts, noting_shards

LACKING = "the checkpoint has no weight_chan_scale for it"


@pytest.fixture
def vllm(request: pytest.FixtureRequest) -> Iterator[vllm_sources.Ranks]:
    """Import the loading code of one version of vLLM, with stand-ins for the rest."""
    with vllm_sources.loading(request.param) as ranks:
        yield ranks


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Return a function that processes a layer, and fails if that asks for a value of a tensor."""

    def ask(*_: object) -> None:
        pytest.fail("the contents of a tensor were asked for: on a GPU, that waits for all work before")

    def process(layer: Any) -> None:
        with monkeypatch.context() as patch:
            for name in ("isnan", "any", "all", "item", "tolist", "__bool__", "nan_to_num_"):
                patch.setattr(torch.Tensor, name, ask)
            layer.quant_method.process_weights_after_loading(layer)

    return process


# --------------------------------------------------------------------------------------------------------- dense layers

KINDS: dict[str, tuple[tuple[Any, ...], dict[Any, tuple[int, int]]]] = {
    "ReplicatedLinear": ((256, 512), {(): (512, 256)}),
    "ColumnParallelLinear": ((256, 512), {(): (512, 256)}),
    "RowParallelLinear": ((512, 128), {(): (128, 512)}),
    "MergedColumnParallelLinear": ((256, [1024, 512]), {(0,): (1024, 256), (1,): (512, 256)}),
    "QKVParallelLinear": ((256, 64, 8, 2), {("q",): (512, 256), ("k",): (128, 256), ("v",): (128, 256)}),
}
"""Class → its arguments, and N and K of the weights that the checkpoint has for it, by what loaders are told of them.

At tensor-parallel size 4, two ranks of the last share each of its KV heads."""
ALL_KINDS = pytest.mark.parametrize("kind", KINDS)


def _make(kind: str, tables: TableForm = TableForm.SCALE) -> Any:
    args: dict[str, Any] = {"bias": False, "params_dtype": torch.bfloat16, "quant_config": make_config(tables)}
    return getattr(linear_classes(), kind)(*KINDS[kind][0], prefix="m.name", **args)


def _load_shards(kind: str, layer: Any, shards: list[Any]) -> None:
    for shard in shards:
        load(layer, Weight(*KINDS[kind][1][shard], layer.quant_method.tables, 0), *shard)


@ON_BOTH
@BOTH_TABLES
@TP
@ALL_KINDS
def test_a_loaded_layer_is_known_to_be(
    vllm: vllm_sources.Ranks, tables: TableForm, tp: int, kind: str, silent: Callable[[Any], None]
) -> None:
    """The loader saw every shard; processing does not look."""
    vllm.size = tp
    for vllm.rank in range(tp):
        layer = _make(kind, tables)
        _load_shards(kind, layer, list(KINDS[kind][1]))
        silent(layer)


@ON_BOTH
@TP
@ALL_KINDS
def test_a_shard_that_was_not_loaded_is_noticed(vllm: vllm_sources.Ranks, tp: int, kind: str) -> None:
    """A checkpoint that lacks tensors is no error for vLLM. Another shard, loaded twice, does not make up for it."""
    vllm.size, vllm.rank = tp, tp - 1
    for missing in KINDS[kind][1]:
        layer = _make(kind)
        _load_shards(kind, layer, 2 * [shard for shard in KINDS[kind][1] if shard != missing])
        with pytest.raises(ValueError, match=rf"m\.name: {LACKING}") as error:
            layer.quant_method.process_weights_after_loading(layer)
        assert "\n" not in str(error.value)


@ON_BOTH
@TP
@pytest.mark.parametrize("kind", ["MergedColumnParallelLinear", "QKVParallelLinear"])
def test_a_layer_that_is_fused_in_the_checkpoint_is_known(
    vllm: vllm_sources.Ranks, tp: int, kind: str, silent: Callable[[Any], None]
) -> None:
    """One tensor without a shard fills all of them."""
    vllm.size = tp
    layer = _make(kind)
    sizes = KINDS[kind][1].values()
    load(layer, Weight(sum(n for n, _ in sizes), 256, TableForm.SCALE, 0))
    silent(layer)


@ON_BOTH
def test_shards_that_are_fused_in_the_checkpoint_count_each(
    vllm: vllm_sources.Ranks,  # noqa: ARG001
    silent: Callable[[Any], None],
) -> None:
    """Some models load several shards at once: the loader is told of a tuple of them."""

    def make() -> Any:
        args: dict[str, Any] = {"params_dtype": torch.bfloat16, "quant_config": make_config(TableForm.SCALE)}
        return linear_classes().MergedColumnParallelLinear(256, [128, 256, 128], bias=False, prefix="m.name", **args)

    layer = make()
    load(layer, Weight(384, 256, TableForm.SCALE, 0), (0, 1))
    with pytest.raises(ValueError, match=LACKING):
        layer.quant_method.process_weights_after_loading(layer)
    layer = make()
    load(layer, Weight(384, 256, TableForm.SCALE, 0), (0, 1))
    load(layer, Weight(128, 256, TableForm.SCALE, 0), 2)
    silent(layer)


@ON_BOTH
@ALL_KINDS
def test_a_layer_that_was_filled_otherwise_is_looked_at(vllm: vllm_sources.Ranks, kind: str) -> None:  # noqa: ARG001
    """`--load-format dummy` and sharded states write into the parameters: their values show that they are there."""
    layer = _make(kind)
    layer.weight_chan_scale.data.uniform_(-1e-3, 1e-3)
    layer.quant_method.process_weights_after_loading(layer)


def test_a_loader_that_is_no_method_is_used_as_it_is() -> None:
    """Nothing is known of what it fills."""
    assert noting_shards(load) is load
    assert noting_experts(load) is load


# -------------------------------------------------------------------------------------------------------------- experts

HIDDEN, INTERMEDIATE = 256, 1024
SIZES = {"gate_proj": (INTERMEDIATE, HIDDEN), "up_proj": (INTERMEDIATE, HIDDEN), "down_proj": (HIDDEN, INTERMEDIATE)}


def _experts(
    tp: int = 1,
    rank: int = 0,
    local: tuple[int, ...] | None = None,
    experts: int = 2,
    tables: TableForm = TableForm.SCALE,
) -> Any:
    moe = make_moe_config(experts, HIDDEN, INTERMEDIATE, tp, rank)
    return make_experts(make_config(tables), moe, QWEN, local)


def _load_experts(
    layer: Any, experts: int = 2, missing: tuple[str, ...] = (), tables: TableForm = TableForm.SCALE
) -> None:
    stored = [
        (f"{expert}.{name}.{tensor}", value)
        for expert in range(experts)
        for name in QWEN
        if f"{expert}.{name}" not in missing
        for tensor, value in Weight(*SIZES[name], tables, 0).tensors().items()
    ]
    list(layer.load_weights(iter(stored)))


@ON_BOTH
@TP
def test_loaded_experts_are_known_to_be(vllm: vllm_sources.Ranks, tp: int, silent: Callable[[Any], None]) -> None:
    """The loader saw every projection of every expert; processing does not look."""
    vllm.size = tp
    for vllm.rank in range(tp):
        layer = _experts(tp, vllm.rank)
        _load_experts(layer)
        silent(layer)


@ON_BOTH
@TP
@pytest.mark.parametrize("missing", [f"{expert}.{name}" for expert in range(2) for name in QWEN])
def test_an_expert_that_was_not_loaded_is_noticed(vllm: vllm_sources.Ranks, tp: int, missing: str) -> None:
    """Names that match nothing are dropped by vLLM's loader without a word."""
    vllm.size, vllm.rank = tp, tp - 1
    layer = _experts(tp, tp - 1)
    _load_experts(layer, missing=(missing,))
    with pytest.raises(ValueError, match=rf"layers\.0\.mlp\.experts: {LACKING}"):
        layer.quant_method.process_weights_after_loading(layer)


@ON_BOTH
def test_only_the_experts_of_a_rank_are_expected(
    vllm: vllm_sources.Ranks,  # noqa: ARG001
    silent: Callable[[Any], None],
) -> None:
    """With expert parallelism, the others are another rank's; one that is lacking is still noticed."""
    layer = _experts(local=(1, 3), experts=4)
    _load_experts(layer, 4)
    silent(layer)
    layer = _experts(local=(1, 3), experts=4)
    _load_experts(layer, 4, missing=tuple(f"{expert}.{name}" for expert in (0, 2) for name in QWEN))
    silent(layer)
    layer = _experts(local=(1, 3), experts=4)
    _load_experts(layer, 4, missing=("3.up_proj",))
    with pytest.raises(ValueError, match=LACKING):
        layer.quant_method.process_weights_after_loading(layer)


@ON_BOTH
def test_padding_holds_zeros(vllm: vllm_sources.Ranks, silent: Callable[[Any], None]) -> None:
    """Some backends round the hidden size up: what no tensor fills multiplies by 0, and never by NaN."""
    vllm.hidden_multiple = 512
    layer = _experts()
    _load_experts(layer)
    silent(layer)
    down = Weight(*SIZES["down_proj"], TableForm.SCALE, 0)
    assert layer.w2_weight_chan_scale.shape == (2, 512)
    assert layer.w2_weight_chan_scale[0, :HIDDEN].equal(down.channel)
    assert not layer.w2_weight_chan_scale[:, HIDDEN:].any()
    assert not layer.w13_weight_chan_scale.isnan().any()
    for name in ("w13_weight_scale", "w2_weight_scale"):
        assert not getattr(layer, name).float().isnan().any()


@ON_BOTH
def test_a_padded_expert_that_was_not_loaded_is_noticed(vllm: vllm_sources.Ranks) -> None:
    """Zeros in the padding do not hide it."""
    vllm.hidden_multiple = 512
    for missing in ("0.gate_proj", "0.up_proj", "1.down_proj"):
        layer = _experts()
        _load_experts(layer, missing=(missing,))
        with pytest.raises(ValueError, match=LACKING):
            layer.quant_method.process_weights_after_loading(layer)


@ON_BOTH
def test_experts_that_were_filled_otherwise_are_looked_at(vllm: vllm_sources.Ranks) -> None:  # noqa: ARG001
    """As dense layers."""
    layer = _experts()
    for name in ("w13_weight_chan_scale", "w2_weight_chan_scale"):
        getattr(layer, name).data.uniform_(-1e-3, 1e-3)
    layer.quant_method.process_weights_after_loading(layer)


@ON_BOTH
def test_the_moe_loader_tells_callers_what_it_did(vllm: vllm_sources.Ranks) -> None:  # noqa: ARG001
    """Models call it with and without `return_success`, and look for an attribute of it."""
    layer = _experts(local=(1,))
    parameter = layer.w13_weight_chan_scale
    assert parameter.weight_loader.supports_moe_loading
    channel = torch.ones(INTERMEDIATE, dtype=torch.float32)
    name = "w13_weight_chan_scale"
    assert parameter.weight_loader(parameter, channel, name, shard_id="w1", expert_id=1) is None
    assert parameter.weight_loader(parameter, channel, name, shard_id="w3", expert_id=1, return_success=True) is True
    assert parameter.weight_loader(parameter, channel, name, shard_id="w3", expert_id=0, return_success=True) is False


# ------------------------------------------------------------------------------------------------------------ reloading


@ON_BOTH
@pytest.mark.parametrize("kind", [*KINDS, "experts", "experts with indices"])
def test_weights_can_be_reloaded(
    vllm: vllm_sources.Ranks,  # noqa: ARG001
    kind: str,
    silent: Callable[[Any], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """VLLM's layerwise reloading wraps our loaders, replays them, and processes anew: twice, as training does."""
    has_indices = kind == "experts with indices"
    if has_indices:
        module = importlib.import_module("convert_w4a8.vllm_plugin.moe")
        monkeypatch.setattr(module, "decode_kernel", lambda _device: True)
        monkeypatch.setattr(module.warm_up, "experts", lambda *_: None)  # it launches what needs a GPU
        monkeypatch.setattr("convert_w4a8.vllm_plugin.indices.reads_indices", lambda _device: True)
        kind = "experts"
    layerwise = importlib.import_module("vllm.model_executor.model_loader.reload.layerwise")

    def load_all(layer: Any) -> None:
        if kind == "experts":
            _load_experts(layer)
        else:
            _load_shards(kind, layer, list(KINDS[kind][1]))

    layer = _experts() if kind == "experts" else _make(kind)
    layerwise.record_metadata_for_reloading(layer)
    load_all(layer)
    silent(layer)
    loaded = {name: parameter.data.clone() for name, parameter in layer.named_parameters()}
    assert ("w13_weight_table_index" in loaded) == ("w2_weight_distinct_tables" in loaded) == has_indices
    for _ in range(2):
        for parameter in layer.parameters():
            parameter.data.zero_()
        layerwise.initialize_layerwise_reload(layer)
        assert not any(vars(parameter).get("w4a8_filled") for parameter in layer.parameters()), "nothing of this one"
        load_all(layer)
        layerwise.finalize_layerwise_reload(layer, SimpleNamespace(dtype=torch.bfloat16))
        for name, parameter in layer.named_parameters():
            assert torch.equal(parameter.view(torch.uint8), loaded[name].view(torch.uint8)), name


@ON_BOTH
@BOTH_TABLES
def test_experts_of_group_scales_have_indices(
    vllm: vllm_sources.Ranks,  # noqa: ARG001
    tables: TableForm,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Others have none, however few their tables are: their kernel counts on multiples of a scale."""
    module = importlib.import_module("convert_w4a8.vllm_plugin.moe")
    monkeypatch.setattr(module, "decode_kernel", lambda _device: True)
    monkeypatch.setattr(module.warm_up, "experts", lambda *_: None)  # it launches what needs a GPU
    monkeypatch.setattr("convert_w4a8.vllm_plugin.indices.reads_indices", lambda _device: True)
    layer = _experts(tables=tables)
    _load_experts(layer, tables=tables)
    layer.quant_method.process_weights_after_loading(layer)
    found = {name for name, _ in layer.named_parameters() if name.endswith(("table_index", "distinct_tables"))}
    assert len(found) == (4 if tables is TableForm.SCALE else 0)


@ON_BOTH
@BOTH_TABLES
def test_layers_with_few_tables_have_indices(
    vllm: vllm_sources.Ranks,  # noqa: ARG001
    tables: TableForm,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where the kernel reads them; reloaded in place, since graphs point there, and refused if they no longer fit."""
    module = importlib.import_module("convert_w4a8.vllm_plugin.linear")
    monkeypatch.setattr(module, "decode_kernel", lambda _device: True)
    monkeypatch.setattr("convert_w4a8.vllm_plugin.indices.reads_indices", lambda _device: True)
    layerwise = importlib.import_module("vllm.model_executor.model_loader.reload.layerwise")
    layer = linear_classes().ReplicatedLinear(
        256, 512, bias=False, prefix="m", quant_config=make_config(tables), params_dtype=torch.bfloat16
    )
    layerwise.record_metadata_for_reloading(layer)
    load(layer, Weight(512, 256, tables, 1))
    layer.quant_method.process_weights_after_loading(layer)
    places = {name: parameter.data_ptr() for name, parameter in layer.named_parameters()}
    assert {"weight_table_index", "weight_distinct_tables"} < places.keys()
    for seed in (1, 2):
        if seed > 1:
            layerwise.initialize_layerwise_reload(layer)
            load(layer, Weight(512, 256, tables, seed))
            layerwise.finalize_layerwise_reload(layer, SimpleNamespace(dtype=torch.bfloat16))
        expected = expand_tables(Weight(512, 256, tables, seed).scale).view(torch.uint8)
        found = layer.weight_distinct_tables.data.view(torch.uint8)[layer.weight_table_index.data.long()]
        assert torch.equal(found, expected)
        assert torch.equal(getattr(layer, layer.quant_method.table_name).data.view(torch.uint8), expected.flatten())
        assert {name: parameter.data_ptr() for name, parameter in layer.named_parameters()} == places
    if tables is TableForm.ENTRIES:
        other = Weight(512, 256, tables, 3)
        many = other.tensors() | {"weight_lut": torch.randn(2, 512 * 8).to(torch.float8_e4m3fn)}
        monkeypatch.setattr(other, "tensors", lambda: many)
        layerwise.initialize_layerwise_reload(layer)
        with pytest.raises(ValueError, match="m: it had few distinct tables, and has many now"):
            load(layer, other)
        fresh = linear_classes().ReplicatedLinear(
            256, 512, bias=False, prefix="m", quant_config=make_config(tables), params_dtype=torch.bfloat16
        )
        load(fresh, other)
        fresh.quant_method.process_weights_after_loading(fresh)
        assert not hasattr(fresh, "weight_table_index")


@ON_BOTH
@pytest.mark.parametrize("kind", [*KINDS, "experts"])
def test_a_model_that_is_deleted_is_gone(vllm: vllm_sources.Ranks, kind: str) -> None:  # noqa: ARG001
    """What vLLM keeps for reloading does not hold on to the layer, and so not to its memory on the GPU."""
    if kind == "ReplicatedLinear":
        plain = weakref.ref(getattr(linear_classes(), kind)(*KINDS[kind][0], bias=False))
        gc.collect()
        if plain() is not None:
            pytest.skip("with this Python, vLLM's own layer without quantization stays, too")
    layerwise = importlib.import_module("vllm.model_executor.model_loader.reload.layerwise")
    layer = _experts() if kind == "experts" else _make(kind)
    layerwise.record_metadata_for_reloading(layer)
    gone = weakref.ref(layer)
    del layer
    gc.collect()
    assert gone() is None
