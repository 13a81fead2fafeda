"""Which kernels run the experts of a layer: ours at few tokens, and where vLLM's cannot run; vLLM's otherwise."""

import importlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm_sources
from vllm_layers import BOTH_TABLES, ON_BOTH, QWEN, Weight, make_config, make_experts, make_moe_config

from convert_w4a8.kernels.gemm import grouped_reference
from convert_w4a8.lut_format import TableForm

pytest.importorskip("triton", reason="Triton is not installed")
HIDDEN = 256


@pytest.fixture
def vllm(request: pytest.FixtureRequest) -> Iterator[vllm_sources.Ranks]:
    """Import the loading code of one version of vLLM, with stand-ins for the rest."""
    with vllm_sources.loading(request.param) as ranks:
        yield ranks


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the reference stand in for our kernels, on any device; the names of those that ran."""
    names: list[str] = []

    def ours(*arguments: Any, hopper: bool) -> torch.Tensor:
        names.append("hopper" if hopper else "ours")
        return grouped_reference.experts(*arguments)

    monkeypatch.setattr("convert_w4a8.kernels.gemm.grouped.experts", ours)
    return names


def make_layer(
    monkeypatch: pytest.MonkeyPatch,
    *,
    intermediate: int = 256,
    tables: TableForm = TableForm.SCALE,
    has_kernels: bool = True,
    **changes: Any,
) -> Any:
    """Return a layer of four experts; changes: of what vLLM says about it."""
    moe_module = importlib.import_module("convert_w4a8.vllm_plugin.moe")
    monkeypatch.setattr(moe_module, "decode_kernel", lambda _device: has_kernels)
    monkeypatch.setattr(moe_module.warm_up, "experts", lambda *_: None)  # it launches what needs a GPU
    if has_kernels:
        monkeypatch.setattr(moe_module, "require_ours", lambda *_: None)
    moe = make_moe_config(4, HIDDEN, intermediate, 1, 0)
    vars(moe).update({name: value for name, value in changes.items() if name in vars(moe)})
    vars(moe.moe_parallel_config).update({name: value for name, value in changes.items() if name not in vars(moe)})
    return make_experts(make_config(tables), moe, QWEN)


def load(layer: Any, tables: TableForm, intermediate: int) -> None:
    """Fill a layer with random experts, and process them."""
    gate, down, up = QWEN
    for expert in range(4):
        for seed, (name, n, k) in enumerate(
            ((gate, intermediate, HIDDEN), (up, intermediate, HIDDEN), (down, HIDDEN, intermediate))
        ):
            weight = Weight(n, k, tables, 10 * expert + seed)
            list(layer.load_weights((f"{expert}.{name}.{t}", v) for t, v in weight.tensors().items()))
    layer.quant_method.process_weights_after_loading(layer)


def routed(m: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = torch.rand(m, 4).argsort(1)[:, :2].int()
    return torch.randn(m, HIDDEN).bfloat16(), torch.rand(m, 2, dtype=torch.float32), ids


def watch(layer: Any, ran: list[str]) -> list[dict[str, Any]]:
    """Let vLLM's kernel note that it ran, and with what."""
    given: list[dict[str, Any]] = []

    def apply(**arguments: Any) -> torch.Tensor:
        ran.append("vllm")
        given.append(arguments)
        return torch.zeros_like(arguments["hidden_states"])

    experts = SimpleNamespace(consumes_expert_mask=False)
    layer.quant_method.moe_kernel = SimpleNamespace(apply=apply, fused_experts=experts)
    return given


@ON_BOTH
@BOTH_TABLES
def test_few_tokens_run_through_our_kernels(
    vllm: vllm_sources.Ranks,  # noqa: ARG001
    tables: TableForm,
    monkeypatch: pytest.MonkeyPatch,
    ran: list[str],
) -> None:
    """With the experts that were loaded; many tokens through vLLM's."""
    layer = make_layer(monkeypatch, tables=tables)
    load(layer, tables, 256)
    given = watch(layer, ran)
    few, many = routed(3), routed(4096)
    found = layer.quant_method.apply(layer, *few, None, None)
    layer.quant_method.apply(layer, *many, None, None)
    assert ran == ["ours", "vllm"]
    assert given[0]["hidden_states"] is many[0]
    names = ("weight_packed", layer.quant_method.table_name, "weight_chan_scale")
    w13, w2 = (tuple(getattr(layer, f"{w}_{name}").data for name in names) for w in ("w13", "w2"))
    gate_up = w13[0].view(4, HIDDEN // 32, -1), w13[1].view(4, HIDDEN // 128, 512, 8), w13[2]
    down = w2[0].view(4, 256 // 32, -1), w2[1].view(4, 256 // 128, HIDDEN, 8), w2[2]
    assert torch.equal(found, grouped_reference.experts(*few, gate_up, down, None, "silu"))
    assert found.norm() > 0


@ON_BOTH
@BOTH_TABLES
def test_experts_with_few_tables_have_indices(
    vllm: vllm_sources.Ranks,  # noqa: ARG001
    tables: TableForm,
    monkeypatch: pytest.MonkeyPatch,
    ran: list[str],
) -> None:
    """Where the kernel reads them, and tables are group scales: beside each layer's tables, the same ones."""
    for module in ("indices", "experts"):
        monkeypatch.setattr(f"convert_w4a8.vllm_plugin.{module}.reads_indices", lambda _device: True)
    given: list[Any] = []
    grouped = importlib.import_module("convert_w4a8.kernels.gemm.grouped")
    ours: Any = grouped.experts

    def watched(*arguments: Any, hopper: bool) -> torch.Tensor:
        given.extend(arguments)
        found: torch.Tensor = ours(*arguments, hopper=hopper)
        return found

    monkeypatch.setattr(grouped, "experts", watched)
    layer = make_layer(monkeypatch, tables=tables)
    load(layer, tables, 256)
    watch(layer, ran)
    layer.quant_method.apply(layer, *routed(3), None, None)
    assert ran == ["hopper"]
    if tables is TableForm.ENTRIES:
        assert [len(given[3]), len(given[4])] == [3, 3]
        return
    for n, k, (_, all_tables, _, index, distinct) in ((512, HIDDEN, given[3]), (HIDDEN, 256, given[4])):
        assert index.shape == (4, k // 128, n)
        assert torch.equal(distinct.view(torch.uint8)[index.long()], all_tables.view(torch.uint8))
        assert all_tables.view(torch.uint8).any()


@ON_BOTH
@pytest.mark.parametrize("m", [1, 4096])
def test_routers_weights_on_the_input_are_applied_once(
    vllm: vllm_sources.Ranks,  # noqa: ARG001
    m: int,
    monkeypatch: pytest.MonkeyPatch,
    ran: list[str],
) -> None:
    """Llama 4's way: tokens are weighted, results are not; vLLM's W4A8 experts would do both."""
    layer = make_layer(monkeypatch)
    load(layer, TableForm.SCALE, 256)
    layer.apply_router_weight_on_input = True
    given = watch(layer, ran)
    x, weights, ids = routed(m)
    weights, ids = weights[:, :1], ids[:, :1]
    found = layer.quant_method.apply(layer, x, weights, ids, None, None)
    weighted, ones = x * weights.bfloat16(), torch.ones_like(weights)
    if m == 1:
        layer.apply_router_weight_on_input = False
        assert torch.equal(found, layer.quant_method.apply(layer, weighted, ones, ids, None, None))
    else:
        assert torch.equal(given[0]["hidden_states"], weighted)
        assert torch.equal(given[0]["topk_weights"], ones)
        assert given[0]["apply_router_weight_on_input"] is False


@ON_BOTH
def test_sizes_that_cutlass_does_not_take_run_through_ours_alone(
    vllm: vllm_sources.Ranks,  # noqa: ARG001
    monkeypatch: pytest.MonkeyPatch,
    ran: list[str],
) -> None:
    """An intermediate size of 384, at any number of tokens; vLLM's kernel is not even made."""
    layer = make_layer(monkeypatch, intermediate=384)
    load(layer, TableForm.SCALE, 384)
    assert layer.quant_method.moe_kernel is None
    for m in (1, 300):
        layer.quant_method.apply(layer, *routed(m), None, None)
    assert ran == ["ours", "ours"]


@ON_BOTH
def test_sizes_that_no_kernel_takes_are_refused(
    vllm: vllm_sources.Ranks,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Multiples of 128, of which half can run through CUTLASS as well."""
    with pytest.raises(ValueError, match="intermediate size of 192 is not a multiple of 128"):
        make_layer(monkeypatch, intermediate=192)
    vllm.size = 2
    moe = make_moe_config(4, HIDDEN, 768, 2, 0)
    assert not make_experts(make_config(TableForm.SCALE), moe, QWEN).quant_method.cutlass


@ON_BOTH
@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (10, 0), (12, 0)])
def test_other_gpus_run_through_our_kernels_alone(
    vllm: vllm_sources.Ranks, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch, ran: list[str]
) -> None:
    """The experts of vLLM exist for Hopper."""
    vllm.capability = capability
    layer = make_layer(monkeypatch)
    load(layer, TableForm.SCALE, 256)
    assert layer.quant_method.cutlass == (capability == (9, 0))
    if capability != (9, 0):
        layer.quant_method.apply(layer, *routed(300), None, None)
        assert ran == ["ours"]


@ON_BOTH
def test_what_cutlass_cannot_run_is_refused_where_ours_cannot_either(
    vllm: vllm_sources.Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes, and GPUs: without Triton, or where it is left out."""
    with pytest.raises(ValueError, match=r"384 is not a multiple of 256.*and Triton cannot compile the kernel"):
        make_layer(monkeypatch, intermediate=384, has_kernels=False)
    monkeypatch.setenv("W4A8_LUT_DECODE", "cutlass")
    with pytest.raises(ValueError, match=r"384 is not a multiple of 256.*unset W4A8_LUT_DECODE"):
        make_layer(monkeypatch, intermediate=384, has_kernels=False)
    vllm.capability = (10, 0)
    with pytest.raises(ValueError, match=r"this GPU has 10\.0.*unset W4A8_LUT_DECODE"):
        make_layer(monkeypatch, has_kernels=False)


def test_few_tokens_are_few_for_each_expert() -> None:
    """Qwen3-30B-A3B's 128 experts, 8 a token, and Mixtral's 8, 2 a token."""
    takes = importlib.import_module("convert_w4a8.vllm_plugin.experts").takes
    assert takes(8 * 512, 128)
    assert not takes(8 * 513, 128)
    assert takes(2 * 128, 8)
    assert not takes(2 * 129, 8)


REASONS: dict[str, tuple[dict[str, Any], str]] = {
    "all to all": ({"use_all2all_kernels": True}, "tokens are sent to other ranks"),
    "data parallel": ({"dp_size": 2}, "tokens are sent to other ranks"),
    "passed through": ({"use_passthrough_all2all": True}, "tokens are sent to other ranks"),
    "activation": ({"activation": SimpleNamespace(value="swigluoai")}, "its activation is swigluoai"),
    "clamped": ({"swiglu_limit": 7.0}, "its activation is clamped"),
    "float16": ({"in_dtype": torch.float16}, "its dtype is torch.float16"),
    "biases": ({"has_bias": True}, "it has biases"),
    "lora": ({"is_lora_enabled": True}, "LoRA is enabled"),
}
"""What our kernels do not do."""


@ON_BOTH
@pytest.mark.parametrize("reason", REASONS)
def test_deployments_that_ours_do_not_serve_run_through_vllm(
    vllm: vllm_sources.Ranks,  # noqa: ARG001
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    ran: list[str],
) -> None:
    """Tokens of other ranks, other activations: whatever the number of tokens; refused where CUTLASS cannot, either."""
    changes, why = REASONS[reason]
    layer = make_layer(monkeypatch, **changes)
    load(layer, TableForm.SCALE, 256)
    watch(layer, ran)
    layer.quant_method.apply(layer, *routed(1), None, None)
    assert ran == ["vllm"]
    with pytest.raises(ValueError, match="intermediate size of 384 is not a multiple of 256"):
        make_layer(monkeypatch, intermediate=384, **changes)
    experts = importlib.import_module("vllm.model_executor.layers.fused_moe.experts.cutlass_moe").CutlassExpertsW4A8Fp8
    monkeypatch.setattr(experts, "is_supported_config", staticmethod(lambda *_: (False, "something")))
    with pytest.raises(ValueError, match=rf"refuse this deployment \(something\); for our kernels, {why}"):
        make_layer(monkeypatch, **changes)


@ON_BOTH
def test_what_cutlass_cannot_run_is_refused_without_our_kernels(
    vllm: vllm_sources.Ranks,  # noqa: ARG001
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An activation that only ours have, and no Triton."""
    experts = importlib.import_module("vllm.model_executor.layers.fused_moe.experts.cutlass_moe").CutlassExpertsW4A8Fp8
    monkeypatch.setattr(experts, "is_supported_config", staticmethod(lambda *_: (False, "gelu_tanh activation")))
    activation = SimpleNamespace(value="gelu_tanh")
    with pytest.raises(ValueError, match=r"gelu_tanh activation.*and Triton cannot compile"):
        make_layer(monkeypatch, activation=activation, has_kernels=False)
    assert not make_layer(monkeypatch, activation=activation).quant_method.cutlass


def test_torch_knows_the_result_without_running_it(ran: list[str]) -> None:
    """Shape and dtype, as torch compares them with a run."""
    operation = importlib.import_module("convert_w4a8.vllm_plugin.experts").lut_experts
    x, weights, ids = routed(3)
    arguments: list[Any] = [x, weights, ids % 2]
    for n, k in ((256, HIDDEN), (HIDDEN, 128)):
        arguments += [
            torch.randint(-(2**31), 2**31, (2, n, k // 8), dtype=torch.int32),
            torch.randn(2 * k // 128 * n * 8).to(torch.float8_e4m3fn),
            torch.rand(2, n) / 100,
        ]
    torch.library.opcheck(operation, (*arguments, None, "silu"), test_utils="test_faketensor")
    assert ran
