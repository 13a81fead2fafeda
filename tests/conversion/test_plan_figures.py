"""What a plan tells: how many layers of which kind, what becomes of their codes, sizes, files, warnings."""

from collections.abc import Callable
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

import pytest
from checkpoint_edits import write_case
from factories import CASES, SEVENS, Case, Checkpoint, Options
from factories.formats import Awq, Gptq
from factories.layers import Scheme
from factories.models import Model, llama, qwen3_moe

from convert_w4a8.checkpoint.directory import open_checkpoint
from convert_w4a8.checkpoint.names import natural_key
from convert_w4a8.checkpoint.safetensors_file import read_tensor
from convert_w4a8.conversion.plan import Codes, Plan, kinds, make_plan
from convert_w4a8.linear import keeps_codes
from convert_w4a8.options import Options as PlanOptions
from convert_w4a8.options import Policy, Unsupported

ALL_REQUANTIZED = PlanOptions(
    act_order=Policy.REQUANTIZE, group_size=Policy.REQUANTIZE, unsupported=Unsupported.DEQUANTIZE
)


def plan(source: Checkpoint, options: PlanOptions = ALL_REQUANTIZED) -> Plan:
    """Plan a conversion; with every policy that converts, unless told otherwise."""
    return make_plan(open_checkpoint(source.path), options)


def written_as(form: Any, model: Model, path: Path) -> Checkpoint:
    """Write a checkpoint of a model in a format."""
    return Case("", form, lambda: model, Options()).write(path)


# Figures.


KINDS = ("converted", "experts", "codes_kept", "codes_new", "codes_decided_when_read", "in_bf16")


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("ct-w4a16", (14, 0, 14, 0, 0, 0)),
        ("ct-qwen3-moe", (32, 24, 32, 0, 0, 0)),
        ("ct-per-channel-odd-k", (12, 0, 12, 0, 0, 2)),
        ("gptq-v1", (14, 0, 0, 0, 14, 0)),  # zero-points are stored, and may be anything
        ("gptq-qwen3-moe-sharded", (32, 24, 0, 0, 32, 0)),
        ("gptq-g32", (14, 0, 0, 14, 0, 0)),
        ("awq-odd-n", (8, 0, 0, 0, 8, 6)),
        ("awq-zero-points", (14, 0, 0, 0, 14, 0)),
    ],
)
def test_layers_are_counted_by_what_becomes_of_them(case: str, expected: tuple[int, ...], tmp_path: Path) -> None:
    """Converted and of experts, by what headers tell of the codes, and those that are not converted."""
    assert dict(kinds(plan(write_case(case, tmp_path / "in")))) == dict(zip(KINDS, expected, strict=True))


@pytest.mark.parametrize(
    ("case", "codes", "why"),
    [
        ("ct-w4a16", Codes.KEPT, None),
        ("ct-int8-storage", Codes.KEPT, None),
        ("ct-g64", Codes.NEW, "group size 64"),
        ("gptq-g32", Codes.NEW, "group size 32"),
        ("gptq-v1", Codes.UNDECIDED, "kept, if the layer is symmetric as the configuration says"),
        ("awq-per-channel", Codes.UNDECIDED, "kept, if the layer is symmetric as the configuration says"),
        ("awq-zero-points", Codes.UNDECIDED, "zero-points: kept where all are 8 or 7"),
        ("awq-zero-points-all-8", Codes.UNDECIDED, "zero-points: kept where all are 8 or 7"),
        ("ct-asymmetric", Codes.UNDECIDED, "zero-points: kept where all are 8 or 7"),
        ("gptq-desc-act-trivial", Codes.UNDECIDED, "activation order: new, unless g_idx is trivial"),
        ("ct-g-idx", Codes.UNDECIDED, "activation order: new, unless g_idx is trivial"),
    ],
)
def test_the_plan_says_of_codes_what_headers_tell(case: str, codes: Codes, why: str | None, tmp_path: Path) -> None:
    """Kept or new where that is sure, and otherwise what will decide."""
    layers = plan(write_case(case, tmp_path / "in")).layers
    assert {(layer.codes, layer.why) for layer in layers} == {(codes, why)}


@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in (*CASES, *SEVENS) if not case.refused])
def test_what_the_plan_is_sure_of_is_so(case: Case, tmp_path: Path) -> None:
    """A layer whose codes are kept, or new, by the headers is so by its tensors."""
    source = case.write(tmp_path / "in")
    p = plan(source)
    for layer in p.converted:
        kept = keeps_codes(p.source.read_layer(layer.spec, read_tensor))
        assert kept != case.requantized
        assert layer.codes in {Codes.UNDECIDED, Codes.KEPT if kept else Codes.NEW}


def test_serving_memory_by_hand(tmp_path: Path) -> None:
    """Half a byte a weight, 8 bytes a group, 4 a channel; what stays in BF16 takes two bytes a weight."""
    source = write_case("awq-odd-n", tmp_path / "in")
    quantized = [(256, 256), (512, 256), (512, 256), (256, 512)]  # o, gate, up, down
    kept = [(256, 256), (136, 256), (136, 256)]  # q, k, v
    a_layer = sum(n * k // 2 + 8 * n * k // 128 + 4 * n for n, k in quantized) + sum(2 * n * k for n, k in kept)
    norms = 5 * 256 * 2
    embeddings = 64 * 256 * 2
    assert plan(source).serving_nbytes == 2 * a_layer + norms + embeddings


@pytest.mark.parametrize("limit", [1, 50_000, 300_000, 10**9])
def test_shards_are_cut_at_the_limit(limit: int, tmp_path: Path) -> None:
    """The sizes of the planned shards keep to --max-shard-size, unless one tensor alone is larger."""
    p = plan(write_case("gptq-v1", tmp_path / "in"), PlanOptions(max_shard_size=limit))
    assert all(shard.nbytes <= limit or len(shard.specs) == 1 for shard in p.shards)
    assert len(p.shards) >= min(ceil(p.nbytes_out / limit), len([spec for shard in p.shards for spec in shard.specs]))


def test_layers_come_in_natural_order(tmp_path: Path) -> None:
    """adapters.2 before adapters.10, so that a shard holds layers that follow each other."""
    model = llama()
    model.linears.update({f"model.adapters.{i}.o_proj": (256, 256) for i in (10, 2)})
    p = plan(written_as(Gptq(), model, tmp_path / "in"))
    order = [layer.module for layer in p.layers if layer.module.endswith("o_proj")]
    parts = ("adapters.2", "adapters.10", "layers.0.self_attn", "layers.1.self_attn")
    assert order == [f"model.{part}.o_proj" for part in parts]


@pytest.mark.parametrize("name", ["", "7", "a", "a.10.b", "10a", "²", "a.².b", "٣.x", "layers.007", "a." + "9" * 5000])
def test_any_name_can_be_sorted(name: str) -> None:
    """Digits of other scripts and superscripts do not stop the sort, and keys compare with each other."""
    assert sorted([name, "layers.2.x", "layers.10.x"], key=natural_key).index("layers.2.x") < 2
    assert natural_key("layers.2.x") < natural_key("layers.10.x")


# Warnings.


@pytest.mark.parametrize(
    ("make", "count", "names"),
    [
        pytest.param(lambda p: written_as(Gptq(), llama(), p), 0, "", id="all-fit"),
        pytest.param(
            lambda p: written_as(Awq(Scheme()), llama(kv_dim=144), p),
            1,
            "2 layers of a width that is no multiple of 128, which vLLM's kernel needs: "
            "model.layers.0.self_attn.qkv_proj has N = 544",
            id="merged-qkv",
        ),
        pytest.param(
            lambda p: written_as(Awq(Scheme()), llama(kv_dim=160), p),
            1,
            "2 layers of a width that is no multiple of 128, which vLLM's kernel needs: "
            "model.layers.0.self_attn.qkv_proj has N = 576",
            id="merged-qkv-a-multiple-of-64",
        ),
        pytest.param(
            lambda p: written_as(Gptq(), _wide_o_proj(320), p),
            1,
            "1 layer of a width that is no multiple of 128, which vLLM's kernel needs: "
            "model.layers.1.self_attn.o_proj has N = 320",
            id="alone-a-multiple-of-64",
        ),
        pytest.param(lambda p: written_as(Gptq(), _wide_o_proj(384), p), 0, "", id="alone-a-multiple-of-128"),
        pytest.param(lambda p: written_as(Awq(Scheme()), llama(kv_dim=192), p), 0, "", id="odd-parts-of-an-even-qkv"),
        pytest.param(lambda p: write_case("awq-odd-n", p), 0, "", id="odd-but-in-bf16"),
        pytest.param(
            lambda p: written_as(Gptq(), _narrow_experts(), p),
            1,
            "24 expert layers of a size that is no multiple of 256",
            id="experts",
        ),
    ],
)
def test_widths_that_vllm_cannot_serve_are_warned_of(
    make: Callable[[Path], Checkpoint], count: int, names: str, tmp_path: Path
) -> None:
    """CUTLASS needs merged q/k/v and gate/up in multiples of 128, and experts of 256; our kernels do not."""
    source = make(tmp_path / "in")
    warnings = plan(source, replace(ALL_REQUANTIZED, format="compressed-tensors")).warnings
    assert len(warnings) == count
    assert all(names in warning for warning in warnings)
    assert [warning for warning in plan(source).warnings if "multiple of" in warning] == []


def _wide_o_proj(n: int) -> Model:
    """Return a Llama with one layer of another width."""
    model = llama()
    model.linears["model.layers.1.self_attn.o_proj"] = (n, 256)
    return model


def _narrow_experts() -> Model:
    """Return a Qwen3-MoE whose experts are 384 wide: a multiple of 128, but not of 256."""
    model = qwen3_moe()
    for name, (n, k) in model.linears.items():
        if ".experts." in name:
            model.linears[name] = (256, 384) if n == 256 and name.endswith("down_proj") else (384, k)
    return model
