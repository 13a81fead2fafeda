"""What torch.compile makes of activations for small and for large batches: one graph, two ways to quantize.

A layer appears in the graph as `w4a8_lut.linear`, with its activations both as they are and quantized by torch's own
operations. Where batches are large, the first are left out: inductor puts the quantization into the kernels of norms
and activation functions. Where they are small, the second are: this package's kernels do norm or SwiGLU and
quantization in one launch, under which the GEMM already fetches weights. vLLM compiles a graph by ranges of batch
sizes, and lets passes work on each; to its ranges, one bound is added.
"""

import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import fx
from torch._subclasses.fake_tensor import unset_fake_temporarily
from vllm.compilation.passes.inductor_pass import InductorPass, get_pass_context
from vllm.config import get_current_vllm_config
from vllm.config.compilation import CompilationMode
from vllm.platforms import current_platform

from convert_w4a8.vllm_plugin import activations, gemm

_VIEWS = ("aten.view", "aten.reshape", "aten._unsafe_view")
_MOST_OPERATIONS = 24
"""More than silu and a product are made of."""
_SAMPLES = (3.0, 1e3)
"""Standard deviations of what a graph's activation function is tried on: as activations are, and beyond any limit at
which a model cuts them off."""


class DecodePass(InductorPass):  # type: ignore[misc]
    """Rewrites `w4a8_lut.linear` for one range of batch sizes."""

    def __init__(self, terms: int) -> None:
        self.terms = terms

    def uuid(self) -> str:
        """Return what the pass and the operators it writes depend on, for the caches of compiled graphs."""
        own = [Path(module.__file__ or "").read_text(encoding="utf-8") for module in (gemm, activations)]
        identity: str = self.hash_source(type(self), *own, Path(__file__).read_text(encoding="utf-8"), str(self.terms))
        return identity

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrite every layer of a graph."""
        largest = get_pass_context().compile_range.end
        terms = self.terms if largest <= gemm.TWO_TERMS_TOKENS else 1
        rewrite(graph, few=largest <= gemm.MORE_TOKENS, terms=terms)


def install() -> bool:
    """Have vLLM run the pass on what it compiles for the model that is being made; whether it will."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    if not gemm.decode_kernel(device):
        return False
    config = get_current_vllm_config().compilation_config
    if config.mode != CompilationMode.VLLM_COMPILE or config.backend not in ("", "inductor"):
        return False
    passes, key = config.inductor_compile_config, current_platform.pass_key
    if isinstance(passes.get(key), DecodePass):
        return True
    endpoints = config.compile_ranges_endpoints
    if key in passes or not endpoints:
        return False
    terms = gemm.terms(device)
    bounds = [gemm.MORE_TOKENS] + ([gemm.TWO_TERMS_TOKENS] if terms == 2 else [])
    config.compile_ranges_endpoints = sorted({*endpoints, *(bound for bound in bounds if bound < max(endpoints))})
    passes[key] = DecodePass(terms)
    return True


def rewrite(graph: fx.Graph, *, few: bool, terms: int = 1) -> None:
    """Replace every `linear`: by a GEMM of what torch quantized, or (few) of what this package's kernels quantize."""
    quantized: dict[Any, tuple[fx.Node, ...]] = {}
    for node in graph.find_nodes(op="call_function", target=gemm.LINEAR):
        x, tokens, scale, *weights = node.args
        if few:
            if x not in quantized:
                with graph.inserting_before(node):
                    quantized[x] = _add(graph, activations.OPERATORS.quantize.default, (x, terms))
            tokens, scale = quantized[x]
        with graph.inserting_before(node):
            product = graph.call_function(gemm.GEMM, (tokens, scale, *weights))
        product.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(product)
        graph.erase_node(node)
    graph.eliminate_dead_code()
    for x, (tokens, *_) in quantized.items():
        _fuse(graph, x, cast("fx.Node", tokens.args[0]), terms)
    graph.eliminate_dead_code()


def _add(graph: fx.Graph, target: Callable[..., Any], args: tuple[Any, ...]) -> tuple[fx.Node, ...]:
    """Insert a call with several results; return them, as nodes that know their shapes."""
    call = graph.call_function(target, args)
    values = [arg.meta["val"] if isinstance(arg, fx.Node) else arg for arg in args]
    with values[0].fake_mode:
        call.meta["val"] = target(*values)
    parts = []
    for place, value in enumerate(call.meta["val"]):
        part = graph.call_function(operator.getitem, (call, place))
        part.meta["val"] = value
        parts.append(part)
    return tuple(parts)


def _fuse(graph: fx.Graph, x: fx.Node, quantize: fx.Node, terms: int) -> None:
    """Put what made `x` into its quantization, where nobody else needs `x`."""
    source = _behind_views(x, quantize)
    if source is None or not _is_matrix(source):
        return
    if (norm := _norm(source)) is not None:
        with graph.inserting_before(source):
            made = _add(graph, activations.OPERATORS.norm_quantize.default, (*norm, terms))
    elif (norm := _add_norm(source)) is not None:
        node: fx.Node = source.args[0]  # type: ignore[assignment]
        with graph.inserting_before(node):
            made = _add(graph, activations.OPERATORS.add_norm_quantize.default, (*norm, terms))
        for user in list(node.users):
            if user.args[1] == 1:
                user.replace_all_uses_with(made[2])
    elif (gate_up := _silu_and_mul(source)) is not None:
        with graph.inserting_before(source):
            made = _add(graph, activations.OPERATORS.silu_quantize.default, (gate_up, terms))
    else:
        return
    for user in list(quantize.users):
        user.replace_all_uses_with(made[cast("int", user.args[1])])


def _behind_views(x: fx.Node, user: fx.Node) -> fx.Node | None:
    """Return what `x` shows in the same shape; None where others use it, or a view of it, as well."""
    width = x.meta["val"].shape[-1]
    while set(x.users) == {user}:
        if not str(x.target).startswith(_VIEWS):
            return x
        user, x = x, x.args[0]  # type: ignore[assignment]
        value = x.meta["val"]
        if value.dim() != 2 or value.shape[-1] != width:
            return None
    return None


def _is_matrix(x: fx.Node) -> bool:
    value = x.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dim() == 2 and value.dtype is torch.bfloat16


def _norm(x: fx.Node) -> tuple[Any, ...] | None:
    """Return input, weight and epsilon where `x` is an RMS norm of all channels."""
    return _norm_arguments(x, "vllm_ir.rms_norm.default", 1)


def _add_norm(x: fx.Node) -> tuple[Any, ...] | None:
    """Return input, residual, weight and epsilon where `x` is the RMS norm of a sum."""
    if x.target is not operator.getitem or x.args[1] != 0:
        return None
    return _norm_arguments(x.args[0], "vllm_ir.fused_add_rms_norm.default", 2)  # type: ignore[arg-type]


def _norm_arguments(node: fx.Node, target: str, inputs: int) -> tuple[Any, ...] | None:
    if str(node.target) != target or node.kwargs or any(arg is not None for arg in node.args[inputs + 2 :]):
        return None
    tensors = node.args[: inputs + 1]
    if not all(isinstance(arg, fx.Node) and arg.meta["val"].dtype is torch.bfloat16 for arg in tensors):
        return None
    if any(arg.meta["val"].dim() != 2 for arg in tensors[:inputs]):  # type: ignore[union-attr]
        return None
    return node.args[: inputs + 2]


def _silu_and_mul(x: fx.Node) -> fx.Node | None:
    """Return the [M, 2·K] of which `x` is silu(first half) · second half; found by trying what lies between."""
    inner: set[fx.Node] = set()
    sources: set[fx.Node] = set()
    waiting = [x]
    while waiting and len(inner) < _MOST_OPERATIONS:
        node = waiting.pop()
        if node.op == "call_function" and str(node.target).startswith(("aten.", "prims.")):
            inner.add(node)
            waiting += [arg for arg in node.all_input_nodes if arg not in inner]
        else:
            sources.add(node)
    if waiting or len(sources) != 1 or any(not set(node.users) <= inner for node in inner - {x}):
        return None
    (source,) = sources
    width = x.meta["val"].shape[1]
    if not _is_matrix(source) or source.meta["val"].shape[1] != 2 * width or not isinstance(width, int):
        return None
    with unset_fake_temporarily():
        generator = torch.Generator().manual_seed(0)
        numbers = torch.randn(1, 2 * width, generator=generator)
        same = all(_is_silu_and_mul(x, inner, source, numbers.mul(size).bfloat16()) for size in _SAMPLES)
    return source if same else None


def _is_silu_and_mul(x: fx.Node, inner: set[fx.Node], source: fx.Node, sample: torch.Tensor) -> bool:
    gate, up = sample.chunk(2, dim=-1)
    expected = torch.nn.functional.silu(gate) * up
    try:
        found = _run(x.graph, inner, {source: sample})[x]
    except (RuntimeError, TypeError, KeyError, IndexError):
        return False
    return found.shape == expected.shape and torch.allclose(found.float(), expected.float(), rtol=2**-6, atol=1e-6)


def _run(graph: fx.Graph, nodes: set[fx.Node], known: dict[fx.Node, Any]) -> dict[fx.Node, Any]:
    """Run some nodes of a graph, in its order."""
    for node in graph.nodes:
        if node in nodes:
            args = fx.map_arg(node.args, known.__getitem__)
            known[node] = node.target(*args, **fx.map_arg(node.kwargs, known.__getitem__))
    return known
