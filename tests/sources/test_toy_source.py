"""A new input format is one file: a toy of one, put beside the others, converts and verifies without another change.

It is what the package may read one day: models that are not quantized, the experts of a block in one tensor [E, N, K].
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoint_edits import edit_tensors
from click.testing import CliRunner
from factories.models import Model, qwen3_moe
from safetensors.torch import load_file, save_file

from convert_w4a8 import api, sources
from convert_w4a8.checkpoint.directory import Checkpoint, open_checkpoint
from convert_w4a8.checkpoint.safetensors_file import DTYPE_NAMES, TensorInfo, read_tensor
from convert_w4a8.cli.convert import convert_command as convert
from convert_w4a8.cli.main import main
from convert_w4a8.conversion.layer import convert_layer
from convert_w4a8.conversion.plan import Codes, kinds, make_plan
from convert_w4a8.encoding import tables
from convert_w4a8.errors import ConvertError, PlanError
from convert_w4a8.options import Options, Unsupported
from convert_w4a8.targets import find_target

TOY = '''
"""Checkpoints that are not quantized; the experts of a block may lie in one tensor [E, N, K]."""

import torch

from convert_w4a8.linear import DenseLinear
from convert_w4a8.sources.base import LayerSpec
from convert_w4a8.sources.checks import check_tensor

NAME = "toy"
ROLES = ("weight",)
ANCHOR = "weight"


def matches(checkpoint):
    return not checkpoint.quantization_config and any(name.endswith("_proj.weight") for name in checkpoint.tensors)


def find_layers(checkpoint, problems):
    layers = []
    for name, info in checkpoint.tensors.items():
        parent, _, leaf = name.rpartition(".")
        if name.endswith("_proj.weight"):
            layers.append(_layer(parent, info))
        elif parent.endswith(".experts"):
            layers += [_layer(f"{parent}.{expert}.{leaf}", info.part(expert)) for expert in range(info.shape[0])]
    return layers


def _layer(module, info):
    n, k = info.shape
    return LayerSpec(module, NAME, n, k, 128, False, False, {"weight": info}, dense=True)


def read_zeros(spec, read):
    return None


def read_g_idx(spec, read):
    return None


def read_layer(spec, read):
    return DenseLinear(read(spec.parts["weight"]))
'''
STACKED = ("gate_proj", "up_proj", "down_proj")


@pytest.fixture
def _toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Put the toy into a folder that counts as one of input formats, and take it away again."""
    folder = tmp_path_factory.mktemp("formats")
    (folder / "toy.py").write_text(TOY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "__path__", [*sources.__path__, str(folder)])
        sources.sources.cache_clear()
        yield
    sources.sources.cache_clear()
    sys.modules.pop("convert_w4a8.sources.toy", None)
    vars(sources).pop("toy", None)


def make_tensors(model: Model, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Return the tensors of a model: plain weights, those of its experts stacked."""
    generator = torch.Generator().manual_seed(0)

    def weight(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=generator).mul_(shape[-1] ** -0.5).to(dtype)

    tensors = {name: weight(shape) for name, shape in model.dense.items()}
    stacks: dict[str, list[torch.Tensor]] = {}
    for module, shape in model.linears.items():
        parent, _, leaf = module.rpartition(".")
        if ".experts." in module:
            stacks.setdefault(f"{parent.rpartition('.')[0]}.{leaf}", []).append(weight(shape))
        else:
            tensors[f"{module}.weight"] = weight(shape)
    return tensors | {name: torch.stack(stack) for name, stack in stacks.items()}


def write(path: Path, model: Model) -> dict[str, torch.Tensor]:
    """Write a checkpoint without a quantization; return its tensors."""
    path.mkdir()
    tensors = make_tensors(model)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(model.config | {"dtype": "bfloat16"}))
    (path / "tokenizer.json").write_text("{}")
    return tensors


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Write a mixture of experts."""
    write(tmp_path / "in", qwen3_moe())
    return tmp_path / "in"


def weight_of(module: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return a layer's weight [N, K] from the tensors that were written."""
    if f"{module}.weight" in tensors:
        return tensors[f"{module}.weight"]
    experts, _, leaf = module.rpartition(".")
    parent, _, number = experts.rpartition(".")
    return tensors[f"{parent}.{leaf}"][int(number)]


def test_without_the_file_it_is_refused(source: Path) -> None:
    """Nothing of a toy that was there before is left, and no format takes what is not quantized."""
    assert "toy" not in [source.NAME for source in sources.sources()]
    with pytest.raises(ConvertError, match="is not quantized"):
        api.make_plan(source)


@pytest.mark.usefixtures("_toy")
def test_the_plan_knows_what_it_is(source: Path) -> None:
    """A layer for each expert, none of whose codes are kept; routers, norms and embeddings are copied."""
    model = qwen3_moe()
    plan = api.make_plan(source)
    assert plan.source.NAME == "toy"
    assert {layer.module for layer in plan.layers} == model.linears.keys()
    assert {(layer.codes, layer.why) for layer in plan.layers} == {(Codes.NEW, "not quantized in the source")}
    assert kinds(plan)["experts"] == 24
    assert {tensor.info.name for tensor in plan.tensors} == model.dense.keys()
    assert plan.nbytes_in == sum(layer.spec.nbytes for layer in plan.layers) + sum(t.info.nbytes for t in plan.tensors)


@pytest.mark.usefixtures("_toy")
@pytest.mark.parametrize(
    "options",
    [
        Options(),
        Options(max_shard_size=100_000),
        Options(format="compressed-tensors"),
        Options(scales="direct"),  # type: ignore[arg-type]  # a string will do
    ],
    ids=["lut", "sharded", "compressed-tensors", "direct"],
)
def test_it_converts_and_verifies(options: Options, source: Path, tmp_path: Path) -> None:
    """Every weight comes out as near to what was written as INT4 allows, each expert its own; the rest bit for bit."""
    seen: list[int] = []
    result = api.convert(source, tmp_path / "out", options, device="cpu", progress=seen.append)
    assert sum(seen) == result.plan.nbytes_in
    assert not any(stats.codes_kept for _, stats in result.converted)
    verification = api.verify(tmp_path / "out", source)
    assert not verification.problems
    assert {check.module for check in verification.layers} == qwen3_moe().linears.keys()
    out, written = open_checkpoint(tmp_path / "out"), load_file(source / "model.safetensors")
    target = find_target(out)
    for module in target.find_layers(out):
        weight = weight_of(module, written).float()
        noise = (tables.decode(target.decode(out, module, read_tensor)) - weight).square().sum()
        assert 10 * torch.log10(weight.square().sum() / noise) > 18, module
    for tensor in result.plan.tensors:
        assert torch.equal(read_tensor(out.tensors[tensor.output.name]), written[tensor.info.name])


@pytest.mark.usefixtures("_toy")
def test_everything_else_knows_it_too(source: Path, tmp_path: Path) -> None:
    """The command line, the report and the check for CI."""
    out, runner = tmp_path / "out", CliRunner()
    commands = [
        (convert, [str(source), str(out), "--quiet"]),
        (main, ["inspect", str(source), "--json"]),
        (main, ["verify", str(out), "--source", str(source)]),
        (main, ["report", str(out), "--source", str(source), "--json"]),
        (main, ["check", str(source), "--json"]),
    ]
    printed = []
    for command, arguments in commands:
        result = runner.invoke(command, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        printed.append(result.stdout)
    inspected, report, whole = (json.loads(printed[index]) for index in (1, 3, 4))
    assert inspected["format"] == report["source"] == whole["figures"]["source"] == "toy"
    assert sum(kind["count"] for kind in inspected["layers"]) == len(report["layers"]) == 32
    assert len(whole["figures"]["layers"]) == 32


@pytest.mark.usefixtures("_toy")
def test_a_sample_is_enough_for_a_check(source: Path) -> None:
    """`check --sample` converts some layers of each kind, of which there are seven, three of them experts."""
    outcome = api.check(source, sample=True, device="cpu")
    assert not outcome.problems
    assert outcome.figures is not None
    modules = outcome.figures.layers.keys()
    assert {module.rpartition(".")[2] for module in modules} == {
        module.rpartition(".")[2] for module in qwen3_moe().linears
    }
    assert len(modules) < 32


@pytest.mark.usefixtures("_toy")
def test_layers_alone_are_those_of_the_whole(source: Path, tmp_path: Path) -> None:
    """A layer, a slice of a larger tensor or not, is converted from a dict as it is from a file."""
    options = Options()
    result = api.convert(source, tmp_path / "out", options, device="cpu")
    tensors, expected = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")

    def read(info: TensorInfo) -> torch.Tensor:
        whole = info.whole or info
        tensor = tensors[whole.name]
        assert (DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) == (whole.dtype, whole.shape)
        first = (info.start - whole.start) // tensor.itemsize
        return tensor.flatten()[first : first + info.nbytes // tensor.itemsize].clone().view(info.shape)

    for layer, stats in result.converted:
        found, its_stats = convert_layer(layer, read, options, torch.device("cpu"))
        assert its_stats == stats
        for name, parts in found.items():
            tensor = torch.cat(list(parts))
            assert tensor.shape == expected[name].shape
            assert torch.equal(tensor.view(torch.uint8), expected[name].view(torch.uint8)), name


@pytest.mark.usefixtures("_toy")
def test_an_expert_that_differs_is_noticed(source: Path, tmp_path: Path) -> None:
    """Verification reads slices where they lie: one weight of one expert, or two experts in each other's place."""
    api.convert(source, tmp_path / "out", device="cpu")
    name = "model.layers.1.mlp.experts.up_proj"
    edit_tensors(source, lambda t: t.update({name: t[name][[0, 2, 1, 3]]}))
    subjects = {problem.subject for problem in api.verify(tmp_path / "out", source).problems}
    assert subjects == {f"model.layers.1.mlp.experts.{expert}.up_proj" for expert in (1, 2)}


@pytest.mark.usefixtures("_toy")
def test_experts_that_the_kernel_cannot_take(tmp_path: Path) -> None:
    """They are refused by the name of each, or kept in BF16 as they are, one tensor each."""
    model = qwen3_moe()
    for module in list(model.linears):
        if ".0.mlp.experts." in module and module.endswith("up_proj"):
            model.linears[module] = (264, 256)
    tensors = write(tmp_path / "in", model)
    with pytest.raises(PlanError) as caught:
        api.make_plan(tmp_path / "in")
    assert {problem.subject for problem in caught.value.problems} == {
        f"model.layers.0.mlp.experts.{expert}.up_proj" for expert in range(4)
    }
    result = api.convert(tmp_path / "in", tmp_path / "out", Options(unsupported=Unsupported.DEQUANTIZE), device="cpu")
    assert not api.verify(tmp_path / "out", tmp_path / "in").problems
    kept = [layer.plan.module for layer in result.layers if layer.stats is None]
    assert len(kept) == 12  # all experts of the layer, which are served together
    out: Checkpoint = open_checkpoint(tmp_path / "out")
    for module in kept:
        assert torch.equal(read_tensor(out.tensors[f"{module}.weight"]), weight_of(module, tensors))


@pytest.mark.usefixtures("_toy")
def test_the_formats_beside_it_are_what_they_were(tmp_path: Path) -> None:
    """A file more changes nothing for the others."""
    names = ["auto-round", "awq", "compressed-tensors", "gptq", "toy", "w4afp8"]
    assert [source.NAME for source in sources.sources()] == names
    write(tmp_path / "in", qwen3_moe())
    (tmp_path / "in" / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ConvertError, match=r"'fp8' is not supported; supported are auto-round, awq, .*, toy"):
        make_plan(open_checkpoint(tmp_path / "in"), Options())
