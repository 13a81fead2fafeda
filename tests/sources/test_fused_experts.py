"""Packed experts in one tensor: read as those of their own, where the layout is known; else refused by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_edits import Tensors, edit_json, edit_tensors, write_case
from factories import Case
from factories.formats import CompressedTensors
from factories.layers import Scheme
from factories.models import qwen3_moe
from layer_specs import find_layers
from safetensors.torch import load_file

from convert_w4a8 import api
from convert_w4a8.errors import PlanError
from convert_w4a8.options import Options

IGNORE = ("lm_head", r"re:.*mlp\.gate$")
EXPERTS = "model.layers.0.mlp.experts"
NAMES = {"dotted": "{stack}.weight_{role}", "underscore": "{stack}_{role}"}
ROLES = ("packed", "scale", "zero_point")


def stack_experts(tensors: Tensors, name: str, *, shapes: bool = False) -> None:
    """Put the experts of each block into one tensor, gate above up."""
    for layer in range(2):
        experts = f"model.layers.{layer}.mlp.experts"
        for role in ROLES:
            each: dict[str, list[torch.Tensor]] = {"gate_up_proj": [], "down_proj": []}
            for expert in range(4):
                found = [
                    tensors.pop(f"{experts}.{expert}.{leaf}.weight_{role}", None)
                    for leaf in ("gate_proj", "up_proj", "down_proj")
                ]
                gate, up, down = found
                if gate is not None and up is not None and down is not None:
                    each["gate_up_proj"].append(torch.cat((gate, up)))
                    each["down_proj"].append(down)
            for leaf, parts in each.items():
                if parts:
                    tensors[name.format(stack=f"{experts}.{leaf}", role=role)] = torch.stack(parts)
        for key in [key for key in tensors if key.startswith(experts) and key.endswith("weight_shape")]:
            del tensors[key]
        if shapes:
            for leaf, rows in (("gate_up_proj", 512), ("down_proj", 256)):
                tensors[name.format(stack=f"{experts}.{leaf}", role="shape")] = torch.tensor([[rows, 256]] * 4)


def written(path: Path, *, symmetric: bool = True) -> Path:
    """Write a Qwen3-MoE with its experts apart."""
    scheme = Scheme(symmetric=symmetric, scale_dtype=torch.bfloat16)
    return Case("moe", CompressedTensors({"Linear": scheme}, ignore=IGNORE), qwen3_moe).write(path).path


def convert(source: Path, out: Path, form: str) -> dict[str, torch.Tensor]:
    """Convert a checkpoint, verify it and return its tensors."""
    api.convert(source, out, Options(format=form))
    assert not api.verify(out, source).problems
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize("form", ["lut", "compressed-tensors"])
@pytest.mark.parametrize(
    ("name", "symmetric", "shapes"),
    [("dotted", True, False), ("underscore", True, True), ("underscore", False, False)],
)
def test_stacked_experts_become_what_single_ones_do(
    name: str, symmetric: bool, shapes: bool, form: str, tmp_path: Path
) -> None:
    """Byte for byte the same output, under the same names, as from a checkpoint with each expert by itself."""
    source = written(tmp_path / "in", symmetric=symmetric)
    apart = convert(source, tmp_path / "apart", form)
    edit_tensors(source, lambda tensors: stack_experts(tensors, NAMES[name], shapes=shapes))
    together = convert(source, tmp_path / "together", form)
    assert together.keys() == apart.keys()
    assert all(torch.equal(together[key].view(torch.uint8), apart[key].view(torch.uint8)) for key in apart)


BAD: dict[str, tuple[dict[str, Any], Callable[[Tensors], object], str]] = {
    "gpt-oss": ({"model_type": "gpt_oss"}, lambda _t: None, "is not laid out as the experts of a block"),
    "transposed": ({"hidden_size": 512}, lambda _t: None, "hidden_size 512"),
    "no-hidden-size": ({"hidden_size": None}, lambda _t: None, "hidden_size None"),
    "four-dimensions": (
        {},
        lambda t: t.update({f"{EXPERTS}.down_proj_packed": t[f"{EXPERTS}.down_proj_packed"][None]}),
        "not [E, N, K/8]",
    ),
    "fewer-scales": (
        {},
        lambda t: t.update({f"{EXPERTS}.down_proj_scale": t[f"{EXPERTS}.down_proj_scale"][:3]}),
        "is BF16 [3, 256, 2], beside [4, 256, 32]",
    ),
    "other-scales": (
        {},
        lambda t: t.update({f"{EXPERTS}.down_proj_scale": t[f"{EXPERTS}.down_proj_scale"][..., :1]}),
        "is BF16 [256, 1], not F16 or BF16 or F32 [256, 2]",
    ),
    "g-idx": (
        {},
        lambda t: t.update({f"{EXPERTS}.down_proj_g_idx": torch.zeros(4, 256, dtype=torch.int32)}),
        "reorders the input channels",
    ),
    "scale-lost": ({}, lambda t: t.pop(f"{EXPERTS}.down_proj_scale"), "is missing"),
}


@pytest.mark.parametrize(("config", "damage", "reason"), BAD.values(), ids=BAD)
def test_other_layouts_are_refused(
    config: dict[str, Any], damage: Callable[[Tensors], object], reason: str, tmp_path: Path
) -> None:
    """Rows of gate and up by turns, transposed weights, and what does not fit together."""
    source = written(tmp_path / "in")
    edit_tensors(source, lambda tensors: stack_experts(tensors, NAMES["underscore"]))
    edit_tensors(source, damage)
    edit_json(source / "config.json", **config)
    problems = find_layers(source)[1]
    assert problems
    assert any(reason in problem.reason for problem in problems), problems
    assert all(problem.remedy for problem in problems)


@pytest.mark.parametrize("name", [f"{EXPERTS}.gate_up_proj.qweight", f"{EXPERTS}.gate_up_proj_packed"])
def test_stacked_experts_of_another_format_are_refused(name: str, tmp_path: Path) -> None:
    """Codes in one tensor beside GPTQ's layers are refused under their name, not copied."""
    source = write_case("gptq-v1", tmp_path / "in").path
    edit_tensors(source, lambda t: t.update({name: torch.zeros(4, 32, 512, dtype=torch.int32)}))
    with pytest.raises(PlanError) as caught:
        api.make_plan(source)
    (problem,) = caught.value.problems
    assert problem.subject == name


def test_stacked_experts_of_gptq_are_refused_by_what_they_are(tmp_path: Path) -> None:
    """Not as a matrix of the wrong shape."""
    source = write_case("gptq-mixtral", tmp_path / "in").path

    def stack(tensors: Tensors) -> None:
        for experts in {name.split(".experts.")[0] for name in tensors if ".experts." in name}:
            for name in [name for name in tensors if name.startswith(f"{experts}.experts.0.")]:
                parts = [tensors.pop(name.replace(".experts.0.", f".experts.{i}.")) for i in range(4)]
                tensors[name.replace(".experts.0.", ".experts.")] = torch.stack(parts)

    edit_tensors(source, stack)
    with pytest.raises(PlanError) as caught:
        api.make_plan(source)
    wanted = [problem for problem in caught.value.problems if problem.subject.endswith(".qweight")]
    assert wanted
    assert all("experts in one tensor" in problem.reason and "each expert" in problem.remedy for problem in wanted)
