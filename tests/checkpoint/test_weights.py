"""Which safetensors files are the weights: those of the index, or, without one, what vLLM would load."""

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from convert_w4a8.checkpoint.files import INDEX
from convert_w4a8.checkpoint.weights import Weights, files_in_index, read_weights
from convert_w4a8.errors import ConvertError


def write(root: Path, **files: Iterable[str]) -> None:
    """Write safetensors files of these tensors; a key `a__b` stands for a/b."""
    for key, names in files.items():
        path = root / (key.replace("__", "/") + ".safetensors")
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: torch.ones(1) for name in names}, path)


def write_index(root: Path, name: str, **files: Iterable[str]) -> None:
    """Write files and an index of them."""
    write(root, **files)
    listed = {tensor: key.replace("__", "/") + ".safetensors" for key, names in files.items() for tensor in names}
    (root / name).write_text(json.dumps({"weight_map": listed}))


def names_of(weights: Weights) -> set[str]:
    """Return the files of the weights."""
    return {str(path) for path in weights.files}


@pytest.mark.parametrize(
    "index",
    [INDEX, "gptq_model-4bit-128g.safetensors.index.json", "model.safetensors.index.fp16.json"],
)
def test_the_only_index_is_taken(index: str, tmp_path: Path) -> None:
    """By whatever name; those of pickles and of Mistral's own form are none."""
    write_index(tmp_path, index, one=["a"], two=["b", "c"])
    (tmp_path / "pytorch_model.bin.index.json").write_text("{}")
    (tmp_path / "consolidated.safetensors.index.json").write_text("{}")
    found = read_weights(tmp_path)
    assert found.index == index
    assert found.tensors.keys() == {"a", "b", "c"}
    assert names_of(found) == {"one.safetensors", "two.safetensors"}


def test_the_usual_index_wins(tmp_path: Path) -> None:
    """It is the one that vLLM reads."""
    write_index(tmp_path, "other.safetensors.index.json", old=["b"])
    write_index(tmp_path, INDEX, new=["a"])
    assert read_weights(tmp_path).index == INDEX


@pytest.mark.parametrize("index", [None, "gptq_model.safetensors.index.json"])
def test_an_index_of_other_weights(index: str | None, tmp_path: Path) -> None:
    """It names no file that is there: the message says what is there, and removing the index helps."""
    if index is None:
        write(tmp_path, model=["a"])
    else:
        write_index(tmp_path, index, one=["a"], two=["b"])
    stale = tmp_path / INDEX
    stale.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}}))
    write(tmp_path, adapter_model=["x"])
    with pytest.raises(ConvertError) as error:
        read_weights(tmp_path)
    there = "model.safetensors" if index is None else "one.safetensors, two.safetensors"
    assert error.value.problem.subject == str(stale)
    assert error.value.problem.reason == (
        f"names no file that is there (model-00001-of-00001.safetensors), but there is {there}"
    )
    assert error.value.problem.remedy.startswith("remove it if these are the weights")
    stale.unlink()
    assert "a" in read_weights(tmp_path).tensors


def test_several_other_indexes_are_refused(tmp_path: Path) -> None:
    """By name, with what to do."""
    write_index(tmp_path, "a.safetensors.index.json", one=["a"])
    write_index(tmp_path, "b.safetensors.index.json", two=["b"])
    with pytest.raises(ConvertError) as caught:
        read_weights(tmp_path)
    names = "a.safetensors.index.json, b.safetensors.index.json"
    assert caught.value.problem.reason == f"has 2 indexes ({names}), and none is {INDEX}"
    assert caught.value.problem.remedy == f"rename the one of the weights to {INDEX}, or remove the others"
    (tmp_path / "b.safetensors.index.json").rename(tmp_path / INDEX)
    assert read_weights(tmp_path).index == INDEX


@pytest.mark.parametrize("index", [INDEX, "gptq_model.safetensors.index.json"])
def test_an_index_out_of_the_checkpoint_is_refused(index: str, tmp_path: Path) -> None:
    """As every link."""
    write_index(tmp_path, "x.safetensors.index.json", in__one=["a"])
    (tmp_path / "in" / index).symlink_to("../x.safetensors.index.json")
    with pytest.raises(ConvertError, match="is a link out of the checkpoint"):
        read_weights(tmp_path / "in")


def test_an_index_may_list_files_in_directories(tmp_path: Path) -> None:
    """The output has them all beside its index, where vLLM looks for them."""
    write_index(tmp_path, INDEX, top=["a"], sub__deep__one=["b"])
    found = read_weights(tmp_path)
    assert names_of(found) == {"top.safetensors", "sub/deep/one.safetensors"} == files_in_index(tmp_path)
    assert found.tensors.keys() == {"a", "b"}


def test_a_listed_directory_out_of_the_checkpoint_is_refused(tmp_path: Path) -> None:
    """A link to a directory is one too."""
    write(tmp_path, outside__one=["a"])
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "sub").symlink_to("../outside")
    (tmp_path / "in" / INDEX).write_text(json.dumps({"weight_map": {"a": "sub/one.safetensors"}}))
    with pytest.raises(ConvertError, match="is a link out of the checkpoint"):
        read_weights(tmp_path / "in")


@pytest.mark.parametrize(
    "beside",
    ["consolidated", "consolidated-00001-of-00002", "consolidated.00", "adapter_model", "model.fp16"],
)
def test_other_forms_are_not_the_weights(beside: str, tmp_path: Path) -> None:
    """Mistral's own form, an adapter and a variant do not make model.safetensors unclear."""
    write(tmp_path, model=["a"], **{beside: ["a", "b"]})
    found = read_weights(tmp_path)
    assert (names_of(found), set(found.tensors), set(found.named)) == ({"model.safetensors"}, {"a"}, set())


def test_an_index_of_a_variant_is_not_that_of_the_weights(tmp_path: Path) -> None:
    """Transformers writes it beside the shards of the variant."""
    write(tmp_path, model=["a"])
    write_index(tmp_path, "model.safetensors.index.fp16.json", **{"model.fp16-00001-of-00001": ["a"]})
    assert names_of(read_weights(tmp_path)) == {"model.safetensors"}


def test_an_adapter_is_known_by_its_tensors(tmp_path: Path) -> None:
    """By whatever name, unless there is nothing else, as model.safetensors."""
    write(tmp_path, model=["a"], style=["base_model.a.lora_A.weight"])
    assert names_of(read_weights(tmp_path)) == {"model.safetensors"}
    write(tmp_path, model=["base_model.b.lora_A.weight"])
    with pytest.raises(ConvertError, match="adapters without their model"):
        read_weights(tmp_path)


@pytest.mark.parametrize(("main", "files"), [("model", ["model", "mtp"]), ("gptq_model", ["gptq_model", "mtp"])])
def test_files_without_index_are_one_set(main: str, files: list[str], tmp_path: Path) -> None:
    """As vLLM loads them; all but the largest, or model.safetensors, keep their names."""
    write(tmp_path, **{name: [f"{name}.{i}" for i in range(9 if name == main else 1)] for name in files})
    found = read_weights(tmp_path)
    assert names_of(found) == {f"{name}.safetensors" for name in files}
    assert found.named == {"mtp.safetensors"}
    assert len(found.tensors) == 10


REFUSED: dict[str, tuple[dict[str, list[str]], str]] = {
    "two-copies": ({"model": ["a", "b"], "second": ["b"]}, "model.safetensors and second.safetensors both hold 'b'"),
    "shards": (
        {"model-00001-of-00002": ["a"], "model-00002-of-00002": ["b"]},
        f"2 safetensors files but no {INDEX} (model-00001-of-00002.safetensors, model-00002-of-00002.safetensors)",
    ),
    "mistral-alone": (
        {"consolidated-00001-of-00002": ["a"], "consolidated-00002-of-00002": ["b"]},
        "has no weights but consolidated-00001-of-00002.safetensors, consolidated-00002-of-00002.safetensors,"
        " Mistral's own form of a model",
    ),
    "adapter-alone": ({"adapter_model": ["a"]}, "has no weights but adapter_model.safetensors, adapters without"),
}


@pytest.mark.parametrize(("files", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_clear_is_refused_by_name(files: dict[str, list[str]], reason: str, tmp_path: Path) -> None:
    """The files are named, and what to do."""
    write(tmp_path, **files)
    with pytest.raises(ConvertError) as caught:
        read_weights(tmp_path)
    assert reason in caught.value.problem.reason
    assert caught.value.problem.remedy
