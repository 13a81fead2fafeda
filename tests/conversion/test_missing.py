"""Layers that are not there: vLLM would serve what the memory held, and says nothing where a model is quantized."""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_edits import Tensors, edit_json, edit_tensors
from tiny_models import write_llama, write_mixtral, write_qwen3_moe

from convert_w4a8.calibration.options import QuantizeOptions
from convert_w4a8.calibration.plan import plan_quantization
from convert_w4a8.checkpoint.directory import open_checkpoint
from convert_w4a8.errors import PlanError

MIXTURES = ("mlp", "block_sparse_moe")


def take_away(model: Path, is_gone: Callable[[str], bool]) -> Path:
    """Take tensors away."""

    def take(tensors: Tensors) -> None:
        gone = list(filter(is_gone, tensors))
        assert gone
        for name in gone:
            del tensors[name]

    edit_tensors(model, take)
    return model


def without(model: Path, names: Iterable[str]) -> Path:
    """Take tensors away, by the ends of what is before `.weight`."""
    ends = tuple(names)
    return take_away(model, lambda name: name.removesuffix(".weight").endswith(ends))


def without_parts(model: Path, name: str) -> Path:
    """Take away all tensors of a module, which is given by the end of its name."""
    return take_away(model, lambda key: f".{name}." in f".{key}")


def merge_block_1(tensors: Tensors) -> None:
    """Merge queries, keys and values, and gate and up, of one block."""
    for part, merged, leaves in (
        ("self_attn", "qkv_proj", ("q_proj", "k_proj", "v_proj")),
        ("mlp", "gate_up_proj", ("gate_proj", "up_proj")),
    ):
        rows = [tensors.pop(f"model.layers.1.{part}.{leaf}.weight") for leaf in leaves]
        tensors[f"model.layers.1.{part}.{merged}.weight"] = torch.cat(rows)


def write_other(directory: Path, renames: Mapping[str, str] | None = None) -> Path:
    """Write a model of three blocks and of a type of which nothing is known. renames: pattern → instead."""

    def rename(tensors: Tensors) -> None:
        for pattern, instead in (renames or {}).items():
            for name in list(tensors):
                tensors[re.sub(pattern, instead, name)] = tensors.pop(name)

    model = write_llama(directory, layers=3)
    edit_json(model / "config.json", model_type="other", architectures=["OtherForCausalLM"])
    edit_tensors(model, rename)
    return model


def problems(model: Path) -> list[str]:
    """Return what a plan refuses."""
    try:
        plan_quantization(open_checkpoint(model), QuantizeOptions())
    except PlanError as error:
        return list(map(str, error.problems))
    return []


def warnings(model: Path) -> list[str]:
    """Return what a plan warns of that is missing."""
    found = plan_quantization(open_checkpoint(model), QuantizeOptions()).warnings
    return [text for text in found if ": wrong, unless" in text]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["0.mlp.up_proj"], "model.layers.0.mlp: has no up_proj"),
        (["1.mlp.gate_proj", "1.mlp.down_proj"], "model.layers.1.mlp: has no down_proj and gate_proj"),
        (["0.self_attn.q_proj"], "model.layers.0.self_attn: has no q_proj"),
        (["1.self_attn.o_proj", "1.self_attn.k_proj"], "model.layers.1.self_attn: has no k_proj and o_proj"),
    ],
)
def test_half_of_a_pair(names: list[str], said: str, tmp_path: Path) -> None:
    """Gate without up is refused, and so is what else others like it have."""
    model = write_llama(tmp_path / "in")
    assert problems(model) == []
    (found,) = problems(without(model, names))
    assert found.startswith(f"{said}, which others like it have; download")


@pytest.mark.parametrize(("write", "up"), [(write_mixtral, "w3"), (write_qwen3_moe, "up_proj")])
def test_experts(write: Callable[..., Path], up: str, tmp_path: Path) -> None:
    """A projection of one; one in the middle; the last one of a layer, which models may do without."""
    assert problems(write(tmp_path / "whole", layers=2)) == []
    (found,) = problems(without(write(tmp_path / "half", layers=2), [f"0.{end}.experts.2.{up}" for end in MIXTURES]))
    assert f".experts.2: has no {up}, which" in found
    leaves = ("w1", "w2", "w3", "gate_proj", "up_proj", "down_proj")
    names = [f"1.{end}.experts.1.{leaf}" for end in MIXTURES for leaf in leaves]
    middle = without(write(tmp_path / "middle", layers=2), names)
    (found,) = problems(middle)
    assert ".experts: has no 1, but a 3; download" in found
    last = without(write(tmp_path / "last", layers=2), [name.replace("experts.1", "experts.3") for name in names])
    warnings = plan_quantization(open_checkpoint(last), QuantizeOptions()).warnings
    assert any(".experts: 3 experts, others 4: wrong" in text for text in warnings)


@pytest.mark.parametrize("norm", ["input_layernorm", "post_attention_layernorm"])
@pytest.mark.parametrize(
    ("write", "mlp"), [(write_llama, "mlp"), (write_mixtral, "block_sparse_moe"), (write_qwen3_moe, "mlp")]
)
def test_parts_of_alike_blocks(write: Callable[..., Path], mlp: str, norm: str, tmp_path: Path) -> None:
    """A block without attention, without an MLP, without a norm; a model without its last norm."""
    for number, (name, said) in enumerate(
        [
            (f"1.{norm}", f"model.layers.1: has no {norm},"),
            ("model.norm", "model: has no norm,"),
            ("model.embed_tokens", "model: has no embed_tokens,"),
            ("1.self_attn", "model.layers.1: has no self_attn,"),
            (f"1.{mlp}", f"model.layers.1: has no {mlp},"),
        ]
    ):
        model = write(tmp_path / f"{number}", layers=3)
        assert problems(model) == []
        (found,) = problems(without_parts(model, name))
        assert found.startswith(said)


def test_output_projection(tmp_path: Path) -> None:
    """Without one it is what the memory held, where the configuration says that it is not the embeddings."""
    model = without(write_llama(tmp_path / "in", layers=1), ["lm_head"])
    edit_json(model / "config.json", tie_word_embeddings=True)
    assert warnings(model) == []
    edit_json(model / "config.json", tie_word_embeddings=False)
    assert problems(model) == []
    (warning,) = warnings(model)
    assert warning.startswith("no lm_head, and tie_word_embeddings = false")
    edit_json(model / "config.json", architectures=["LlamaModel"])
    assert warnings(model) == []


def test_experts_of_a_block(tmp_path: Path) -> None:
    """All of a block, though its router is there, and one projection of all of them; a norm of queries."""
    model = write_qwen3_moe(tmp_path / "experts", layers=2)
    (found,) = problems(without_parts(model, "1.mlp.experts"))
    assert found.startswith("model.layers.1.mlp: has no experts,")
    model = write_qwen3_moe(tmp_path / "norm", layers=2)
    (found,) = problems(without_parts(model, "0.self_attn.k_norm"))
    assert found.startswith("model.layers.0.self_attn: has no k_norm,")
    model = write_qwen3_moe(tmp_path / "down", layers=2)
    assert len(problems(without(model, [f"1.mlp.experts.{number}.down_proj" for number in range(4)]))) == 4


def test_dense_blocks_among_mixtures(tmp_path: Path) -> None:
    """Each kind of block is compared with its own."""
    model = write_qwen3_moe(tmp_path / "whole", layers=4, mlp_only_layers=[0, 1])
    assert problems(model) == []
    assert warnings(model) == []
    (found,) = problems(without(model, ["1.mlp.up_proj"]))
    assert found.startswith("model.layers.1.mlp: has no up_proj,")


def test_merged_and_split(tmp_path: Path) -> None:
    """What is merged in one block and split in another is there in both."""
    model = write_llama(tmp_path / "in", layers=3)
    edit_tensors(model, merge_block_1)
    assert problems(model) == []
    assert warnings(model) == []
    (found,) = problems(without(model, ["1.mlp.gate_up_proj"]))
    assert found.startswith("model.layers.1.mlp: has no gate_proj and up_proj,")


@pytest.mark.parametrize("leaves", [("k_proj",), ("v_proj",), ("k_proj", "v_proj")])
@pytest.mark.parametrize("says", [{}, {"attention_k_eq_v": True, "num_kv_shared_layers": 1}])
def test_keys_and_values_of_alike_blocks(leaves: tuple[str, ...], says: dict[str, Any], tmp_path: Path) -> None:
    """A Llama has them in every block, whatever the configuration says."""
    model = without(write_llama(tmp_path / "in", layers=3), [f"2.self_attn.{leaf}" for leaf in leaves])
    edit_json(model / "config.json", text_config=says)
    (found,) = problems(model)
    assert found.startswith(f"model.layers.2.self_attn: has no {' and '.join(leaves)},")


@pytest.mark.parametrize(
    ("leaves", "setting"), [(("v_proj",), "attention_k_eq_v"), (("k_proj", "v_proj"), "num_kv_shared_layers")]
)
def test_shared_keys_and_values(leaves: tuple[str, ...], setting: str, tmp_path: Path) -> None:
    """Models may do without; where the configuration does not say so it is a warning. Values alone none has."""
    model = without(write_other(tmp_path / "in"), [f"2.self_attn.{leaf}" for leaf in leaves])
    said = f"no {' and '.join(leaves)} in model.layers.2.self_attn, which others have: wrong, unless the model shares"
    other = "num_kv_shared_layers" if leaves == ("v_proj",) else "attention_k_eq_v"
    for settings in ({}, {other: 1}):
        edit_json(model / "config.json", text_config=settings)
        assert problems(model) == []
        (warning,) = warnings(model)
        assert warning.startswith(said)
    edit_json(model / "config.json", text_config={setting: 1})
    assert problems(model) == []
    assert warnings(model) == []


def test_values_without_keys(tmp_path: Path) -> None:
    """No model shares keys alone."""
    model = without(write_other(tmp_path / "in"), ["2.self_attn.k_proj"])
    edit_json(model / "config.json", attention_k_eq_v=True, num_kv_shared_layers=1)
    (found,) = problems(model)
    assert found.startswith("model.layers.2.self_attn: has no k_proj,")


def test_parts_of_other_models(tmp_path: Path) -> None:
    """Blocks of models that are not known to be alike: a warning, where most have all that the odd one has."""
    for number, (name, said) in enumerate(
        [
            ("1.self_attn", "no self_attn in model.layers.1, which most"),
            ("1.mlp", "no mlp in model.layers.1, which most"),
            ("2.input_layernorm", "no input_layernorm in model.layers.2, which most"),
        ]
    ):
        model = write_other(tmp_path / f"{number}")
        assert warnings(model) == []
        without_parts(model, name)
        assert problems(model) == []
        (warning,) = warnings(model)
        assert warning.startswith(said)


def test_sets_of_which_no_part_has_all(tmp_path: Path) -> None:
    """Attention whose output has another name, and experts without a gate."""
    model = write_other(tmp_path / "attention", {r"self_attn\.o_proj": "self_attn.out_proj"})
    assert problems(model) == []
    (found,) = problems(without(model, ["1.self_attn.q_proj"]))
    assert found.startswith("model.layers.1.self_attn: has no q_proj,")
    model = without(write_other(tmp_path / "mlp"), [f"{number}.mlp.gate_proj" for number in range(3)])
    assert problems(model) == []
    (found,) = problems(without(model, ["1.mlp.down_proj"]))
    assert found.startswith("model.layers.1.mlp: has no down_proj,")


@pytest.mark.parametrize(
    ("renames", "quiet"),
    [
        (
            {
                r"1\.self_attn\.k_proj": "1.self_attn.kv_a_proj_with_mqa",
                r"1\.self_attn\.v_proj": "1.self_attn.kv_b_proj",
            },
            True,
        ),
        ({r"1\.self_attn\.q_proj": "1.self_attn.q_a_proj"}, True),
        ({r"1\.self_attn\.q_proj": "1.self_attn.qkv_proj", r"1\.self_attn\.o_proj": "1.self_attn.out_proj"}, True),
        ({r"1\.mlp\.gate_proj": "1.mlp.gate_up_proj", r"1\.mlp\.up_proj": "1.mlp.norm"}, True),
        ({r"1\.self_attn\.k_proj": "1.self_attn.key"}, False),
    ],
)
def test_layers_of_another_kind(renames: dict[str, str], quiet: bool, tmp_path: Path) -> None:
    """Merged and latent attention beside others is another kind; other names that are not known are a warning."""
    model = write_other(tmp_path / "in", renames)
    assert problems(model) == []
    found = warnings(model)
    assert len(found) == (not quiet)
    assert all(text.endswith("unless these are layers of another kind") for text in found)


def test_a_block_more_of_another_kind(tmp_path: Path) -> None:
    """One block that has more than all others, as for multi-token prediction, says nothing of the others."""
    model = write_other(tmp_path / "in")
    edit_tensors(model, lambda tensors: tensors.update({"model.layers.2.enorm.weight": torch.ones(128)}))
    assert problems(model) == []
    assert warnings(model) == []
