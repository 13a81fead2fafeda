"""What the pass makes of a graph: the same numbers, fewer launches for small batches, none of ours for large ones."""

import importlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm_sources
from torch import fx
from torch._decomp import core_aten_decompositions
from torch._dynamo.backends.common import aot_autograd
from vllm_layers import ON_BOTH

from convert_w4a8.kernels.activations import reference as activations
from convert_w4a8.kernels.gemm import reference

ON_ONE = pytest.mark.parametrize("vllm", vllm_sources.VERSIONS[:1], indirect=True)
HIDDEN, INNER = 256, 384
EPSILON = 1e-5
IR = torch.library.Library("vllm_ir", "FRAGMENT")  # type: ignore[no-untyped-call]
"""Stands in for `vllm.ir.ops`, whose sources `test_the_norms_of_vllm_are_these` reads."""


def _rms_norm(x: Any, weight: Any, epsilon: float, variance_size: int | None = None) -> torch.Tensor:
    assert variance_size is None
    return activations._normed(x.float(), weight, epsilon)


def _fused_add_rms_norm(x: Any, x_residual: Any, weight: Any, epsilon: float, variance_size: int | None = None) -> Any:
    total = x.float() + x_residual.float()
    return _rms_norm(total, weight, epsilon, variance_size), total.bfloat16()


_REST = "Tensor? weight, float epsilon, int? variance_size=None"
for _schema, _run in (
    (f"rms_norm(Tensor x, {_REST}) -> Tensor", _rms_norm),
    (f"fused_add_rms_norm(Tensor x, Tensor x_residual, {_REST}) -> (Tensor, Tensor)", _fused_add_rms_norm),
):
    IR.define(_schema)  # type: ignore[no-untyped-call]
    IR.impl(_schema.partition("(")[0], _run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
OPS: Any = torch.ops


@pytest.fixture
def vllm(request: pytest.FixtureRequest) -> Iterator[vllm_sources.Ranks]:
    """Import the loading code of one version of vLLM, with stand-ins for the rest."""
    with vllm_sources.loading(request.param) as ranks:
        yield ranks


@pytest.fixture
def plugin(vllm: vllm_sources.Ranks, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the module of the pass, with references in place of kernels."""
    assert vllm.size == 1
    fusion = importlib.import_module("convert_w4a8.vllm_plugin.fusion")
    monkeypatch.setattr(fusion.gemm, "decode_kernel", lambda _device: True)
    monkeypatch.setattr(fusion.gemm, "takes", lambda _m, _n: True)
    monkeypatch.setattr("convert_w4a8.kernels.gemm.gpu.gemm", reference.gemm)
    return fusion


def layer(n: int, k: int) -> tuple[torch.Tensor, ...]:
    packed = torch.randint(-(2**31), 2**31, (k // 8, n), dtype=torch.int32)
    return packed, torch.randn(k // 128 * n * 8).mul(8).to(torch.float8_e4m3fn), torch.rand(n) / 300


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = (x.abs().max(-1)[0].unsqueeze(-1).float() / 448).clamp(min=activations.LEAST_SCALE)
    return (x.float() * scale.reciprocal()).clamp(-448, 448).to(torch.float8_e4m3fn), scale


class Block:
    """A decoder block as vLLM's compiler sees it between two attentions, and what may be different in one."""

    def __init__(self, act: Any = torch.nn.functional.silu, *, routed: bool = False) -> None:
        torch.manual_seed(0)
        self.act, self.routed = act, routed
        self.o, self.down = layer(HIDDEN, HIDDEN), layer(HIDDEN, INNER)
        self.gate_up, self.qkv = layer(2 * INNER, HIDDEN), layer(512, HIDDEN)
        self.norm = torch.rand(HIDDEN).bfloat16()

    def run(self, attended: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return what the next attention and the next block take."""

        def linear(x: torch.Tensor, weights: tuple[torch.Tensor, ...]) -> torch.Tensor:
            flat = x.reshape(-1, x.shape[-1])
            product: torch.Tensor = OPS.w4a8_lut.linear(flat, *quantize(flat), *weights)
            return product

        x, residual = OPS.vllm_ir.fused_add_rms_norm(linear(attended, self.o), residual, self.norm, EPSILON)
        gate_up = linear(x, self.gate_up)
        routed = (x * 2,) if self.routed else ()
        down = linear(self.act(gate_up[..., :INNER]) * gate_up[..., INNER:], self.down)
        x = OPS.vllm_ir.rms_norm(down, self.norm, EPSILON)
        x, residual = OPS.vllm_ir.fused_add_rms_norm(x, residual, self.norm, EPSILON)
        return (linear(x, self.qkv), residual, *routed)


def rewritten(
    plugin: Any, block: Block, **how: Any
) -> tuple[list[str], tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Return the operators of the rewritten graph, what it gives, and what the block gives as it is."""
    targets: list[str] = []

    def compiler(module: fx.GraphModule, _inputs: list[Any]) -> Any:
        plugin.rewrite(module.graph, **how)
        module.graph.lint()
        module.recompile()
        targets.extend(str(node.target) for node in module.graph.nodes if node.op == "call_function")
        return module.forward

    table = core_aten_decompositions()
    torch._dynamo.reset()
    compiled = torch.compile(block.run, backend=aot_autograd(fw_compiler=compiler, decompositions=table), dynamic=True)
    inputs = torch.randn(3, HIDDEN).bfloat16(), torch.randn(3, HIDDEN).bfloat16()
    with torch.no_grad():
        return targets, compiled(*inputs), block.run(*inputs)


def assert_same(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.float() - theirs.float()).norm() <= 2**-6 * theirs.float().norm()


@ON_BOTH
def test_small_batches_quantize_where_they_normalize(plugin: Any) -> None:
    """Every quantization but the one behind attention is part of what comes before it."""
    targets, found, expected = rewritten(plugin, Block(), few=True)
    ours = [target for target in targets if target.startswith(("w4a8_lut", "vllm_ir", "aten", "prims"))]
    ours = [target for target in ours if target != "aten.view.default"]
    assert ours == [
        *("w4a8_lut.quantize.default", "w4a8_lut.gemm.default"),
        *("w4a8_lut.add_norm_quantize.default", "w4a8_lut.gemm.default"),
        *("w4a8_lut.silu_quantize.default", "w4a8_lut.gemm.default"),
        *("vllm_ir.rms_norm.default", "w4a8_lut.add_norm_quantize.default", "w4a8_lut.gemm.default"),
    ]
    assert_same(found, expected)


@ON_BOTH
def test_large_batches_leave_it_to_inductor(plugin: Any) -> None:
    """Nothing of ours but the GEMM: norms, activation function and quantization are torch's to fuse."""
    targets, found, expected = rewritten(plugin, Block(), few=False)
    assert {target for target in targets if target.startswith("w4a8_lut")} == {"w4a8_lut.gemm.default"}
    assert sum(target == "vllm_ir.fused_add_rms_norm.default" for target in targets) == 2
    assert_same(found, expected)


@ON_ONE
def test_a_norm_that_others_need_stays(plugin: Any) -> None:
    """A router reads the same norm: it is computed once, and quantized by itself."""
    targets, found, expected = rewritten(plugin, Block(routed=True), few=True)
    assert targets.count("vllm_ir.fused_add_rms_norm.default") == 1
    assert targets.count("w4a8_lut.add_norm_quantize.default") == 1
    assert targets.count("w4a8_lut.quantize.default") == 2
    assert_same(found, expected)


@ON_ONE
@pytest.mark.parametrize(
    "act",
    [
        *(torch.nn.functional.gelu, torch.sigmoid, torch.relu, lambda x: torch.nn.functional.silu(1.02 * x)),
        *(lambda x, most=most: torch.nn.functional.silu(x).clamp(max=most) for most in (7.0, 16.0, 200.0)),
        lambda x: torch.nn.functional.silu(x.clamp(max=64.0)),
    ],
)
def test_other_activation_functions_are_not_taken_for_silu(plugin: Any, act: Any) -> None:
    """What a graph computes is tried, not guessed from its operators."""
    targets, found, expected = rewritten(plugin, Block(act), few=True)
    assert "w4a8_lut.silu_quantize.default" not in targets
    assert_same(found, expected)


@ON_ONE
def test_other_rows_than_the_norm_has_are_quantized_by_themselves(plugin: Any) -> None:
    """Two rows of a norm side by side are one row of the layer, as in the mergers of models that see."""

    class Merged(Block):
        def run(self, attended: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, ...]:
            x = OPS.vllm_ir.rms_norm(torch.cat((attended, residual)), self.norm, EPSILON).view(-1, 2 * HIDDEN)
            return (OPS.w4a8_lut.linear(x, *quantize(x), *wide),)

    wide = layer(256, 2 * HIDDEN)
    targets, found, expected = rewritten(plugin, Merged(), few=True)
    assert "w4a8_lut.norm_quantize.default" not in targets
    assert_same(found, expected)


@ON_ONE
def test_two_terms_reach_the_gemm(plugin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of both terms, and one scale a token."""
    seen: list[tuple[int, int]] = []

    def gemm(tokens: Any, scale: Any, packed: Any, tables: Any, channel: Any, *_: Any) -> torch.Tensor:
        m = len(scale)
        seen.append((len(tokens), m))
        return reference.gemm(tokens[:m], scale, packed, tables, channel)

    hopper = SimpleNamespace(suits=lambda *_: True, gemm=gemm)
    monkeypatch.setattr(plugin.gemm, "_hopper", lambda _device: hopper)
    rewritten(plugin, Block(), few=True, terms=2)
    assert seen[:4] == [(6, 3)] * 4


@pytest.mark.parametrize("version", vllm_sources.VERSIONS)
def test_the_norms_of_vllm_are_these(version: str) -> None:
    """Names, arguments and formulas of vLLM's own operators, by running them."""
    source = (vllm_sources.sources(version) / "vllm/ir/ops/layernorm.py").read_text(encoding="utf-8")
    found: dict[str, Any] = {}

    def register_op(function: Any = None, **_: Any) -> Any:
        if function is None:
            return register_op
        found[function.__name__] = function
        function.register_input_generator = function.override_tolerance = lambda *_a, **_k: lambda f: f
        return function

    source = source.replace("from ..op import register_op", "")
    exec(compile(source, "layernorm.py", "exec"), {"register_op": register_op})
    x, residual = torch.randn(3, 256).bfloat16(), torch.randn(3, 256).bfloat16()
    weight = torch.rand(256).bfloat16()
    assert torch.equal(found["rms_norm"](x, weight, EPSILON), OPS.vllm_ir.rms_norm(x, weight, EPSILON))
    ours = OPS.vllm_ir.fused_add_rms_norm(x, residual, weight, EPSILON)
    theirs = found["fused_add_rms_norm"](x, residual, weight, EPSILON)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    for name in ("rms_norm", "fused_add_rms_norm"):
        schema = getattr(OPS.vllm_ir, name).default._schema
        code = found[name].__code__
        assert [argument.name for argument in schema.arguments] == list(code.co_varnames[: code.co_argcount])
