"""One layer alone, from a reader to tensors: no file is touched, and the tensors are those of a whole conversion."""

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_edits import snapshot, write_case
from safetensors.torch import load_file

from convert_w4a8.checkpoint.directory import open_checkpoint
from convert_w4a8.checkpoint.safetensors_file import DTYPE_NAMES, TORCH_DTYPES, TensorInfo, TensorSpec
from convert_w4a8.conversion import layer as conversion
from convert_w4a8.conversion.layer import convert_layer, copy_tensor
from convert_w4a8.conversion.plan import Codes, LayerPlan, TensorPlan, make_plan
from convert_w4a8.conversion.run import carry_out
from convert_w4a8.encoding import tables
from convert_w4a8.errors import ConvertError
from convert_w4a8.linear import DenseLinear
from convert_w4a8.options import Options, Policy, ScalesMode, Unsupported
from convert_w4a8.quantization.layer import to_w4a8
from convert_w4a8.sources import LayerSpec
from convert_w4a8.targets import target_named

CPU = torch.device("cpu")
NOWHERE = Path("/nowhere/model.safetensors")


class Memory:
    """Reads tensors out of a dict, whole ones and parts; counts what it was asked for."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = tensors
        self.asked: list[str] = []

    def __call__(self, info: TensorInfo) -> torch.Tensor:
        """Return a copy of what lies where `info` says."""
        whole = info.whole or info
        tensor = self.tensors[whole.name]
        assert (DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) == (whole.dtype, whole.shape)
        self.asked.append(info.name)
        flat = tensor.contiguous().flatten().view(torch.uint8)
        start = info.start - whole.start
        return flat[start : start + info.nbytes].clone().view(TORCH_DTYPES[info.dtype]).view(info.shape)


def info_of(name: str, tensor: torch.Tensor, start: int = 0) -> TensorInfo:
    """Return where a tensor would lie, if there were a file."""
    return TensorInfo(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), NOWHERE, start)


def joined(tensors: Mapping[str, Iterable[torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Put the parts of tensors together."""
    return {name: torch.cat(list(parts)) for name, parts in tensors.items()}


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether dtype, shape and bytes are equal."""
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(
        a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8)
    )


def assert_same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Assert that tensors are the same, byte for byte."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert same_bytes(found[name], tensor), name


# The same tensors as a whole conversion.

LAYERS = [
    ("awq-zero-points", {}),
    ("awq-zero-points", {"scales": "direct"}),
    ("awq-zero-points", {"format": "compressed-tensors"}),
    ("gptq-v1", {}),
    ("gptq-v1", {"scales": "reference"}),
    ("gptq-desc-act", {"act_order": Policy.REQUANTIZE}),
    ("gptq-mixtral", {"format": "compressed-tensors"}),
    ("awq-odd-n", {"unsupported": Unsupported.DEQUANTIZE}),
    ("ct-int8-storage-asymmetric", {}),
    ("ct-g64", {"group_size": Policy.REQUANTIZE}),
]


@pytest.mark.parametrize(("case", "changes"), LAYERS, ids=str)
def test_layers_alone_are_those_of_a_whole_conversion(case: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """Same names, dtypes, shapes, bytes and statistics, although IN and OUT are gone: only the reader is asked."""
    source, options = write_case(case, tmp_path / "in").path, Options(**changes)
    checkpoint = open_checkpoint(source)
    plan = make_plan(checkpoint, options)
    result = carry_out(checkpoint, plan, tmp_path / "out", device=CPU)
    tensors, expected = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    for directory in ("in", "out"):
        shutil.rmtree(tmp_path / directory)
    found: dict[str, torch.Tensor] = {}
    for layer, whole in zip(plan.layers, result.layers, strict=True):
        read = Memory(tensors)
        parts, stats = convert_layer(layer, read, options, CPU)
        assert stats == whole.stats
        assert parts.keys() == {spec.name for spec in layer.specs}
        found |= joined(parts)
        assert sorted(read.asked) == sorted(part.name for part in layer.spec.parts.values())
    for tensor in plan.tensors:
        flat = torch.cat(list(copy_tensor(tensor, memory_into(tensors))))
        found[tensor.output.name] = flat.view(tensor.output.shape)
    assert_same(found, expected)
    assert snapshot(tmp_path) == {}


def memory_into(tensors: Mapping[str, torch.Tensor]) -> Any:
    """Return what fills a buffer with bytes of a tensor of a dict."""

    def read_into(info: TensorInfo, buffer: torch.Tensor, offset: int) -> None:
        buffer.copy_(tensors[info.name].flatten().view(torch.uint8)[offset : offset + len(buffer)])

    return read_into


def test_the_specs_of_the_plan_are_what_comes(tmp_path: Path) -> None:
    """Dtypes and shapes are laid out before anything is converted."""
    source = write_case("awq-zero-points", tmp_path / "in").path
    tensors = load_file(source / "model.safetensors")
    for form, scales in (("lut", "search"), ("lut", "direct"), ("compressed-tensors", "reference")):
        options = Options(format=form, scales=ScalesMode(scales))
        layer = make_plan(open_checkpoint(source), options).layers[0]
        found = joined(convert_layer(layer, Memory(tensors), options, CPU)[0])
        assert {TensorSpec(name, DTYPE_NAMES[t.dtype], tuple(t.shape)) for name, t in found.items()} == set(layer.specs)


# Layers that are not quantized yet, and layers that are part of a larger tensor.

N, K, EXPERTS = 48, 256, 3


class DenseSource:
    """A format that the package does not have: its layers are plain weights."""

    @staticmethod
    def read_layer(spec: LayerSpec, read: Memory) -> DenseLinear:
        """Read one layer's weight."""
        return DenseLinear(read(spec.parts["weight"]))


@pytest.fixture
def _dense_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put DenseSource in the place of all formats."""
    monkeypatch.setattr(conversion, "source_named", lambda name: {"dense": DenseSource}[name])


def dense_plan(weight: TensorInfo, options: Options, dequantize: str | None = None) -> LayerPlan:
    """Plan the conversion of a weight [N, K]."""
    spec = LayerSpec("x", "dense", N, K, 128, False, False, {"weight": weight}, dense=True)
    specs = target_named(options.format).tensor_specs("x", N, K, options.scales)
    if dequantize:
        specs = (TensorSpec("x.weight", "BF16", (N, K)),)
    return LayerPlan(spec, "x", dequantize, Codes.NEW, "not quantized in the source", specs)


def stack(dtype: torch.dtype) -> torch.Tensor:
    """Return the weights of some experts, [E, N, K]."""
    generator = torch.Generator().manual_seed(0)
    return (0.02 * torch.randn(EXPERTS, N, K, generator=generator)).to(dtype)


@pytest.mark.usefixtures("_dense_source")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "changes", [{}, {"scales": "direct"}, {"scales": "reference"}, {"format": "compressed-tensors"}], ids=str
)
def test_a_dense_layer_gets_codes(changes: dict[str, Any], dtype: torch.dtype) -> None:
    """The codes are new, and the tensors are what `to_w4a8` and the format make of the weight, which they resemble."""
    weight, options = stack(dtype)[1], Options(**changes)
    target = target_named(options.format)
    plan = dense_plan(info_of("x.weight", weight), options)
    parts, stats = convert_layer(plan, Memory({"x.weight": weight}), options, CPU)
    w4a8, expected = to_w4a8(DenseLinear(weight.clone()), options.scales, stock=target.SCALES_AT_LOAD)
    assert stats == expected
    assert stats is not None
    assert not stats.codes_kept
    assert_same(joined(parts), joined(target.encode("x", w4a8)))
    noise = (tables.decode(w4a8) - weight.float()).square().sum()
    assert 10 * torch.log10(weight.float().square().sum() / noise) > 18


@pytest.mark.usefixtures("_dense_source")
@pytest.mark.parametrize("expert", range(EXPERTS))
@pytest.mark.parametrize("dequantize", [None, "the kernel cannot take it"], ids=["converted", "in-bf16"])
def test_an_expert_of_a_stack_is_a_layer(dequantize: str | None, expert: int) -> None:
    """A slice of [E, N, K] is read alone, and becomes what the same weight becomes that lies alone."""
    weights, options = stack(torch.bfloat16), Options()
    whole = info_of("experts", weights, start=800)
    read = Memory({"experts": weights})
    layer = dense_plan(whole.part(expert), options, dequantize)
    assert layer.spec.nbytes == 2 * N * K
    parts, stats = convert_layer(layer, read, options, CPU)
    alone = {"x.weight": weights[expert].clone()}
    alone_plan = dense_plan(info_of("x.weight", alone["x.weight"]), options, dequantize)
    expected, expected_stats = convert_layer(alone_plan, Memory(alone), options, CPU)
    assert stats == expected_stats
    found = joined(parts)
    assert_same(found, joined(expected))
    if dequantize:
        assert stats is None
        assert_same(found, {"x.weight": weights[expert]})


def test_quantized_experts_of_a_stack_are_layers(tmp_path: Path) -> None:
    """The same for all tensors of a quantized layer: three layers in one tensor each role become what they were."""
    source, options = write_case("awq-zero-points", tmp_path / "in").path, Options()
    tensors = load_file(source / "model.safetensors")
    names = [f"model.layers.0.self_attn.{name}" for name in ("q_proj", "o_proj")] + ["model.layers.1.self_attn.q_proj"]
    layers = {layer.module: layer for layer in make_plan(open_checkpoint(source), options).layers}
    roles = layers[names[0]].spec.parts
    stacks = {role: torch.stack([tensors[f"{name}.{role}"] for name in names]) for role in roles}
    infos = {role: info_of(role, tensor, start=64) for role, tensor in stacks.items()}
    for number, name in enumerate(names):
        parts = {role: info.part(number) for role, info in infos.items()}
        plan = replace(layers[name], spec=replace(layers[name].spec, parts=parts))
        found, stats = convert_layer(plan, Memory(stacks), options, CPU)
        expected, expected_stats = convert_layer(layers[name], Memory(tensors), options, CPU)
        assert stats == expected_stats
        assert_same(joined(found), joined(expected))


# What is damaged.


def test_damage_is_found_by_whoever_reads() -> None:
    """An error of the reader passes through as it is."""

    def read(info: TensorInfo) -> torch.Tensor:
        raise ConvertError(info.name, "is damaged", "mend it")

    parts = {role: info_of(f"x.{role}", torch.zeros(1)) for role in ("qweight", "qzeros", "scales")}
    spec = LayerSpec("x", "gptq", N, K, 128, True, False, parts, has_zeros=True, zero_offset=1)
    with pytest.raises(ConvertError, match=r"x\.qweight: is damaged; mend it"):
        convert_layer(LayerPlan(spec, "x", None, Codes.KEPT, None, ()), read, Options(), CPU)


# Tensors that are copied.


def copied(tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    """Copy a tensor, which has another dtype in the output perhaps."""
    info = info_of("t", tensor)
    plan = TensorPlan(info, TensorSpec("t", dtype, info.shape))
    return torch.cat([*copy_tensor(plan, memory_into({"t": tensor})), torch.empty(0, dtype=TORCH_DTYPES[dtype])])


@pytest.mark.parametrize("chunk", [8, 1000, 1 << 20])
def test_a_copy_is_made_in_chunks(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their size, all bytes come, in order; half precision becomes bfloat16."""
    monkeypatch.setattr(conversion, "CHUNK_BYTES", chunk)
    numbers = torch.arange(300, dtype=torch.float32).view(3, 100)
    assert same_bytes(copied(numbers, "F32"), numbers.flatten())
    assert same_bytes(copied(numbers.half(), "BF16"), numbers.half().bfloat16().flatten())
    assert same_bytes(copied(torch.empty(0, 4), "F32"), torch.empty(0))


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32", "F64"])
@pytest.mark.parametrize("place", [0, 150, 299])
def test_a_copy_holds_no_nan(place: int, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In whichever chunk it lies; infinities are some models' way to say so."""
    monkeypatch.setattr(conversion, "CHUNK_BYTES", 64)
    numbers = torch.zeros(300, dtype=TORCH_DTYPES[dtype])
    numbers[place] = torch.inf
    assert copied(numbers, dtype)[place] == torch.inf
    numbers[place] = torch.nan
    with pytest.raises(ConvertError, match="t: holds NaN; the checkpoint is damaged"):
        copied(numbers, dtype)


def test_statistics_are_those_of_the_tensors(tmp_path: Path) -> None:
    """Signal and noise are measured where codes are new: what is read back from the parts has them."""
    source, options = write_case("awq-zero-points", tmp_path / "in"), Options()
    checkpoint = open_checkpoint(source.path)
    layer = make_plan(checkpoint, options).layers[0]
    parts, stats = convert_layer(layer, Memory(load_file(source.path / "model.safetensors")), options, CPU)
    assert stats is not None
    tensors = joined(parts)
    out = replace(checkpoint, tensors={name: info_of(name, tensor) for name, tensor in tensors.items()})
    found = tables.decode(target_named("lut").decode(out, layer.module, Memory(tensors))).double().numpy()
    truth = source.layers[layer.spec.name].weight
    assert stats.noise == pytest.approx(((found - truth) ** 2).sum(), rel=1e-4)
    assert stats.signal == pytest.approx((truth**2).sum(), rel=1e-4)
