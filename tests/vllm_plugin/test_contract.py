"""What we use of vLLM is still there, by its sources alone: nothing of vLLM is imported.

The tables below list every name, call and attribute that the plugin and the GPU scripts use. A new import of vLLM in
the plugin that is not listed fails too.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from paths import ROOT
from vllm_sources import VERSIONS, sources

PLUGIN = ROOT / "convert_w4a8" / "vllm_plugin"

_LAYERS = "vllm.model_executor.layers"
_MOE = f"{_LAYERS}.fused_moe"
_LINEAR = f"{_LAYERS}.linear"
_QUANT = f"{_LAYERS}.quantization"
_BASE = f"{_QUANT}.base_config"
_UTILS = f"{_QUANT}.utils.quant_utils"
_CT = f"{_QUANT}.compressed_tensors.compressed_tensors"
_PARAMETER = "vllm.model_executor.parameter"
_OPS = "vllm._custom_ops"
_METHOD = f"{_MOE}.fused_moe_method_base"


@dataclass(frozen=True)
class Call:
    """A function or class, and how we call it: the number of positional arguments and the keywords."""

    module: str
    name: str
    positional: int = 0
    keywords: str = ""

    def __str__(self) -> str:
        return f"{self.name}({self.positional}{', ' * bool(self.keywords)}{self.keywords})"


CALLS = (
    Call("vllm.logger", "init_logger", 1),
    Call(_BASE, "QuantizationConfig"),
    Call(_QUANT, "register_quantization_config", 1),
    Call(_LINEAR, "UnquantizedLinearMethod"),
    Call(_LINEAR, "register_weight_loader_v2_supported_method", 1),
    Call(_MOE, "UnquantizedFusedMoEMethod", 1),
    Call(f"{_QUANT}.input_quant_fp8", "QuantFP8", 0, "static group_shape"),
    Call(_PARAMETER, "PackedvLLMParameter", 0, "data input_dim output_dim packed_dim packed_factor weight_loader"),
    Call(_PARAMETER, "GroupQuantScaleParameter", 0, "data input_dim output_dim weight_loader"),
    Call(_PARAMETER, "ChannelQuantScaleParameter", 0, "data output_dim weight_loader"),
    Call("vllm.model_executor.utils", "replace_parameter", 3),
    Call("vllm.model_executor.utils", "set_weight_attrs", 2),
    Call(_OPS, "cutlass_w4a8_mm", 0, "a b_q b_group_scales b_group_size a_token_scales b_channel_scales"),
    Call(_OPS, "cutlass_encode_and_reorder_int4b_grouped", 1),
    Call(
        f"{_MOE}.config",
        "int4_w4afp8_moe_quant_config",
        0,
        "w1_scale w2_scale g1_alphas g2_alphas per_act_token_quant per_out_ch_quant",
    ),
    Call(
        f"{_MOE}.experts.cutlass_moe",
        "CutlassExpertsW4A8Fp8",
        0,
        "moe_config quant_config b_strides1 b_strides2 group_size",
    ),
    Call(f"{_MOE}.experts.cutlass_moe", "CutlassExpertsW4A8Fp8.is_supported_config", 5),
    Call(
        f"{_MOE}.all2all_utils", "maybe_make_prepare_finalize", 0, "moe quant_config routing_tables allow_new_interface"
    ),
    Call(f"{_MOE}.modular_kernel", "FusedMoEKernel", 2),
    Call(
        f"{_MOE}.modular_kernel",
        "FusedMoEKernel.apply",
        1,
        "hidden_states w1 w2 topk_weights topk_ids activation global_num_experts expert_map"
        " apply_router_weight_on_input shared_experts shared_experts_input",
    ),
    Call("vllm.model_executor.models.utils", "WeightsMapper.apply_list", 2),
    Call(f"{_MOE}.routed_experts", "RoutedExperts._expert_routing_tables", 1),
    Call(_CT, "CompressedTensorsConfig.from_config", 2),
    Call(_CT, "CompressedTensorsConfig.apply_vllm_mapper", 2),
    Call(_CT, "CompressedTensorsConfig.get_quant_method", 3),
    Call(_CT, "CompressedTensorsConfig.get_scheme_dict", 3),
    Call(_CT, "CompressedTensorsConfig.has_blocked_weights", 1),
    # scripts/
    Call(_OPS, "cutlass_encode_and_reorder_int4b", 1),
    Call(_OPS, "cutlass_pack_scale_fp8", 1),
    Call(_OPS, "cutlass_w4a8_moe_mm", 13),
    Call(_UTILS, "convert_packed_uint4b8_to_signed_int4_inplace", 1),
    Call(_UTILS, "convert_bf16_scales_to_fp8", 2),
    Call("vllm.config", "set_current_vllm_config", 1),
    Call("vllm.model_executor.model_loader.base_loader", "process_weights_after_loading", 3),
    Call("vllm.model_executor.model_loader.base_loader", "BaseModelLoader.load_model", 3),
)

NAMES = (
    (_QUANT, "QUANTIZATION_METHODS"),
    (_UTILS, "GroupShape.PER_TOKEN"),
    (_UTILS, "kInt4Static"),
    (_UTILS, "kFp8DynamicTokenSym"),
    (_LINEAR, "ColumnParallelLinear"),
    (_LINEAR, "LinearBase"),
    (_LINEAR, "LinearMethodBase"),
    (_LINEAR, "MergedColumnParallelLinear"),
    (_LINEAR, "QKVParallelLinear"),
    (_LINEAR, "ReplicatedLinear"),
    (_LINEAR, "RowParallelLinear"),
    (_CT, "CompressedTensorsConfig"),
    (f"{_LAYERS}.vocab_parallel_embedding", "ParallelLMHead"),
    (_MOE, "RoutedExperts"),
    (_MOE, "FusedMoEMethodBase"),
    (_MOE, "FusedMoeWeightScaleSupported.GROUP"),
    (_MOE, "FusedMoeWeightScaleSupported.CHANNEL"),
    (_MOE, "FusedMoEActivationFormat.Standard"),
    (_MOE, "FusedMoEActivationFormat.BatchedExperts"),
    ("vllm.platforms.interface", "DeviceCapability.major"),
    ("vllm.platforms.interface", "DeviceCapability.minor"),
    ("vllm.config", "VllmConfig"),
)
"""Classes that we subclass or test for, and constants."""

ELSEWHERE = {("vllm", "_custom_ops"), ("vllm.platforms", "current_platform")}
"""Imports that are modules, or made at run time; what is used of them is above."""

ATTRIBUTES = (
    (_LINEAR, "LinearBase", "prefix tp_size disable_tp output_size"),
    (_LINEAR, "MergedColumnParallelLinear", "output_sizes"),
    (_LINEAR, "QKVParallelLinear", "head_size v_head_size total_num_heads total_num_kv_heads"),
    (
        f"{_MOE}.routed_experts",
        "RoutedExperts",
        "layer_name moe_config ckpt_gate_proj_name ckpt_down_proj_name ckpt_up_proj_name activation"
        " global_num_experts expert_map apply_router_weight_on_input",
    ),
    (
        f"{_MOE}.config",
        "FusedMoEConfig",
        "num_logical_experts intermediate_size tp_size moe_parallel_config in_dtype activation swiglu_limit"
        " is_act_and_mul has_bias is_lora_enabled",
    ),
    (f"{_MOE}.config", "FusedMoEParallelConfig", "use_batched_activation_format use_all2all_kernels dp_size"),
    (_BASE, "QuantizationConfig", "packed_modules_mapping"),
    ("vllm.platforms.interface", "Platform", "get_device_capability is_rocm"),
    # scripts/
    (
        "vllm.engine.arg_utils",
        "EngineArgs",
        "model tensor_parallel_size skip_tokenizer_init dtype enforce_eager gpu_memory_utilization seed max_model_len"
        " kv_cache_memory_bytes compilation_config disable_custom_all_reduce max_num_seqs max_num_batched_tokens"
        " enable_prefix_caching async_scheduling generation_config disable_log_stats",
    ),
    ("vllm.config.compilation", "CompilationConfig", "custom_ops cudagraph_capture_sizes"),
    ("vllm.outputs", "RequestOutput", "outputs prompt_logprobs metrics"),
    ("vllm.logprobs", "Logprob", "logprob rank"),
    ("vllm.v1.metrics.stats", "RequestStateStats", "first_token_latency first_token_ts last_token_ts"),
)
"""What we read from objects that vLLM hands us."""

OVERRIDES = (
    (_BASE, "QuantizationConfig", "config.py", "W4A8LutConfig"),
    (_LINEAR, "LinearMethodBase", "linear.py", "W4A8LutLinearMethod"),
    (_METHOD, "FusedMoEMethodBase", "moe.py", "W4A8LutMoEMethod"),
)
"""Base classes whose methods vLLM calls on our classes, some of them by keyword."""


class Sources:
    """The parsed modules of one unpacked vLLM."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.tree = cache(self._tree)

    def _tree(self, module: str) -> ast.Module:
        base = self.root.joinpath(*module.split("."))
        path = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
        return ast.parse(path.read_text())

    def find(self, module: str, name: str) -> ast.stmt | None:
        """Return the statement that defines `NAME` or `CLASS.MEMBER`, following re-exports and base classes."""
        outer, _, member = name.partition(".")
        found = self._top_level(module, outer)
        if not member or not isinstance(found, ast.ClassDef):
            return None if member else found
        return next((m for _, cls in self.lineage(module, outer) for m in _members(cls) if _names(m) == member), None)

    def lineage(self, module: str, name: str) -> Iterator[tuple[str, ast.ClassDef]]:
        """Yield a class and its base classes, with the modules that define them."""
        found, where = self._top_level(module, name), self._home(module, name)
        if isinstance(found, ast.ClassDef):
            yield where, found
            for base in found.bases:
                yield from self.lineage(where, ast.unparse(base).rpartition(".")[2])

    def _top_level(self, module: str, name: str) -> ast.stmt | None:
        module = self._home(module, name)
        return next((s for s in _statements(self.tree(module)) if _names(s) == name), None) if module else None

    def _home(self, module: str, name: str) -> str:
        """Return the module that defines a name which `module` may only import."""
        for statement in _statements(self.tree(module)):
            if isinstance(statement, ast.ImportFrom):
                for alias in statement.names:
                    if (alias.asname or alias.name) == name and (statement.module or "").startswith("vllm"):
                        return self._home(statement.module or "", alias.name)
                    if (alias.asname or alias.name) == name and statement.level == 1:
                        return self._home(f"{module}.{statement.module}", alias.name)
        return module


def _statements(tree: ast.Module) -> Iterator[ast.stmt]:
    for statement in tree.body:
        yield statement
        if isinstance(statement, ast.If):
            yield from statement.body


def _members(cls: ast.ClassDef) -> list[ast.stmt]:
    return cls.body


def _names(statement: ast.stmt) -> str | None:
    """Return the one name that a statement defines."""
    match statement:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return name
        case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
            return name
    return None


def _refuses(arguments: ast.arguments, positional: int, keywords: set[str]) -> str | None:
    """Return why a call does not fit a signature; None if it does."""
    ordered = [a.arg for a in (*arguments.posonlyargs, *arguments.args)]
    if positional > len(ordered) and arguments.vararg is None:
        return f"takes {len(ordered)} positional arguments, we pass {positional}"
    named = set(ordered[positional:]) | {a.arg for a in arguments.kwonlyargs}
    if arguments.kwarg is None and (unknown := keywords - named):
        return f"has no {sorted(unknown)}"
    required = set(ordered[positional : len(ordered) - len(arguments.defaults)])
    required |= {a.arg for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if d is None}
    return f"requires {sorted(required - keywords)}" if required - keywords else None


@pytest.mark.parametrize(
    ("signature", "positional", "keywords", "reason"),
    [
        ("a, b=1", 1, {"b"}, None),
        ("a, *, b", 1, {"b"}, None),
        ("*args, **kwargs", 3, {"x"}, None),
        ("a", 2, set(), "takes 1 positional arguments, we pass 2"),
        ("a, b=1", 1, {"c"}, "has no ['c']"),
        ("a, b=1", 2, {"b"}, "has no ['b']"),
        ("a, b, c=1", 1, set(), "requires ['b']"),
        ("a, *, b", 1, set(), "requires ['b']"),
    ],
)
def test_a_call_that_would_fail_is_seen(
    signature: str, positional: int, keywords: set[str], reason: str | None
) -> None:
    """The check itself: missing, unknown, doubled and surplus arguments."""
    function = ast.parse(f"def f({signature}): pass").body[0]
    assert isinstance(function, ast.FunctionDef)
    assert _refuses(function.args, positional, keywords) == reason


@pytest.fixture(params=VERSIONS)
def vllm(request: pytest.FixtureRequest) -> Sources:
    """Parse the sources of one version."""
    return _parsed(sources(request.param))


@cache
def _parsed(root: Path) -> Sources:
    return Sources(root)


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_calls_fit_the_signatures(vllm: Sources, call: Call) -> None:
    """Every argument that we pass exists, and every argument without a default is passed."""
    found = vllm.find(call.module, call.name)
    positional = call.positional
    if isinstance(found, ast.ClassDef):
        found = vllm.find(call.module, f"{call.name}.__init__")
        positional += 1  # self
        if found is None:  # object's
            assert (positional, call.keywords) == (1, "")
            return
    assert isinstance(found, ast.FunctionDef), f"{call.module}.{call.name} is gone"
    assert _refuses(found.args, positional, set(call.keywords.split())) is None


@pytest.mark.parametrize(("module", "name"), NAMES, ids=[name for _, name in NAMES])
def test_names_exist(vllm: Sources, module: str, name: str) -> None:
    """Classes, enum members and constants are where we import them from."""
    assert vllm.find(module, name) is not None


@pytest.mark.parametrize(("module", "owner", "names"), ATTRIBUTES, ids=[owner for _, owner, _ in ATTRIBUTES])
def test_attributes_exist(vllm: Sources, module: str, owner: str, names: str) -> None:
    """Each is a field, a property or a method, or is set on `self`, in the class or a base of it."""
    known: set[str | None] = set()
    for _, cls in vllm.lineage(module, owner):
        known |= {_names(member) for member in cls.body}
        for node in ast.walk(cls):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                known.add(node.attr)
    assert set(names.split()) <= known


@pytest.mark.parametrize(("module", "base", "file", "ours"), OVERRIDES, ids=[ours for *_, ours in OVERRIDES])
def test_overrides_have_the_arguments_of_what_they_override(
    vllm: Sources, module: str, base: str, file: str, ours: str
) -> None:
    """Names and order, as vLLM calls them; and every abstract method is there."""
    tree = ast.parse((PLUGIN / file).read_text())
    mine = next(s for s in tree.body if isinstance(s, ast.ClassDef) and s.name == ours)
    methods = {m.name: m for m in mine.body if isinstance(m, ast.FunctionDef)}
    abstract = set()
    for _, cls in vllm.lineage(module, base):
        for member in cls.body:
            if not isinstance(member, ast.FunctionDef):
                continue
            if any("abstractmethod" in ast.unparse(decorator) for decorator in member.decorator_list):
                abstract.add(member.name)
    assert abstract <= set(methods)
    for name, method in methods.items():
        theirs = vllm.find(module, f"{base}.{name}")
        if isinstance(theirs, ast.FunctionDef) and name != "__init__":
            assert _argument_names(method) == _argument_names(theirs), name


def _argument_names(function: ast.FunctionDef) -> list[str]:
    names = [argument.arg for argument in function.args.args if argument.arg not in {"self", "cls"}]
    return names + [argument.arg for argument in (function.args.kwarg,) if argument]


def test_the_loader_still_asks_for_what_the_expert_parameters_say(vllm: Sources) -> None:
    """`is_transposed` and `quant_method` are read from the parameters; our class name takes no special path."""
    loader = vllm.find(f"{_MOE}.routed_experts", "RoutedExperts.weight_loader")
    loaders = [
        m
        for _, c in vllm.lineage(f"{_MOE}.routed_experts", "RoutedExperts")
        for m in c.body
        if _names(m) == "weight_loader"
    ]
    text = "\n".join(map(ast.unparse, [*loaders, loader] if loader else loaders))
    assert "getattr(param, 'is_transposed', False)" in text
    assert "getattr(param, 'quant_method', None)" in text
    assert "W4A8LutMoEMethod" not in text


@pytest.mark.parametrize("version", VERSIONS)
def test_every_import_of_vllm_is_listed(version: str) -> None:
    """The tables above are complete: what the plugin imports from vLLM is in one of them, or is a name they lead to."""
    vllm = _parsed(sources(version))
    listed = {(call.module, call.name.partition(".")[0]) for call in CALLS}
    listed |= {(module, name.partition(".")[0]) for module, name in NAMES}
    for path in sorted(PLUGIN.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vllm"):
                for alias in node.names:
                    used = (node.module or "", alias.name)
                    assert used in listed | ELSEWHERE, f"{path.name} imports {used}"
                    if used not in ELSEWHERE:
                        assert vllm.find(*used) is not None, used
