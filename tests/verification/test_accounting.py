"""The proof looks at both directories itself: every file of the source is in the output, or there is a good reason."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_edits import edit_json, write_case
from safetensors.torch import load_file, save_file

from convert_w4a8 import convert, open_checkpoint
from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.checkpoint.files import INDEX
from convert_w4a8.errors import Problem
from convert_w4a8.verification import proof

Pair = tuple[Path, Path]
MTP = {"mtp.fc.weight": torch.ones(2, 2)}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Convert a checkpoint with all kinds of files."""
    root = tmp_path_factory.mktemp("original")
    source = write_case("awq-symmetric-fp16-sharded", root / "in").path
    for name in ("sub", "original", "draft"):
        (source / name).mkdir()
    save_file(MTP, source / "mtp.safetensors")
    save_file(MTP, source / "sub" / "adapter_model.safetensors")
    save_file(MTP, source / "original" / "model.safetensors")
    save_file({"a.qweight": torch.ones(1)}, source / "int4.safetensors")
    save_file({"a.qweight": torch.ones(1)}, source / "draft" / "model.safetensors")
    save_file({"model.norm.weight": torch.ones(1)}, source / "model.safetensors")
    for name in ("a.pt", "b.gguf", "consolidated.safetensors", "params.json", ".hidden", "broken.safetensors"):
        (source / name).write_bytes(b"x")
    (source / f"draft/{INDEX}").write_text("{}")
    for name in ("quantize_config.json", "pytorch_model.bin.index.json", ".gitattributes"):
        (source / name).write_text("{}")
    (source / "gone").symlink_to("nowhere")
    (source / "linked").symlink_to("sub")
    convert(source, root / "out", device="cpu")
    return source, root / "out"


@pytest.fixture
def pair(original: Pair, tmp_path: Path) -> Pair:
    """Return copies to be damaged."""
    for path, name in zip(original, ("in", "out"), strict=True):
        shutil.copytree(path, tmp_path / name, symlinks=True)
    return tmp_path / "in", tmp_path / "out"


def check(pair: Pair) -> proof.Verification:
    """Verify."""
    return proof.verify(open_checkpoint(pair[1]), open_checkpoint(pair[0]))


def test_all_that_is_left_out_is_found(original: Pair) -> None:
    """The proof finds by itself what the converter says."""
    found = check(original)
    assert found.problems == ()
    assert found.added == ()
    assert found.copied_weights == ("mtp.safetensors", "sub/adapter_model.safetensors")
    said = {item.path for item in open_checkpoint(original[0]).left_out}
    assert {item.path for item in found.left_out} == {*said, f"draft/{INDEX}"}
    assert all(item.reason for item in found.left_out)


def test_the_converters_list_is_not_asked(pair: Pair) -> None:
    """What the opened checkpoint says of side files and of what is left out does not matter."""
    source = replace(open_checkpoint(pair[0]), side_files=(), left_out=())
    (pair[1] / "tokenizer.json").unlink()
    (pair[1] / "mtp.safetensors").unlink()
    found = proof.verify(open_checkpoint(pair[1]), source)
    assert {problem.subject for problem in found.problems} == {"tokenizer.json", "mtp.safetensors"}
    assert {problem.reason for problem in found.problems} == {"is not in the output, and nothing says why"}


DAMAGE: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "weights-beside-changed": (
        lambda out: save_file({"mtp.fc.weight": torch.zeros(2, 2)}, out / "mtp.safetensors"),
        "mtp.safetensors",
        "differs from the source",
    ),
    "adapter-absent": (
        lambda out: (out / "sub" / "adapter_model.safetensors").unlink(),
        "sub/adapter_model.safetensors",
        "is not in the output, and nothing says why",
    ),
    "index-absent": (
        lambda out: (out / INDEX).rename(out.parent / INDEX),
        INDEX,
        "is absent, and vLLM would load all of model.safetensors, mtp.safetensors",
    ),
    "mistrals-form": (
        lambda out: (out / "consolidated.safetensors").write_bytes(b"x"),
        "consolidated.safetensors",
        "is in the output, and is never copied, and may run code",
    ),
    "pickle": (
        lambda out: (out / "a.pt").write_bytes(b"x"),
        "a.pt",
        "is in the output, and is never copied, and may run code",
    ),
    "old-settings": (
        lambda out: (out / "quantize_config.json").write_text("{}"),
        "quantize_config.json",
        "describes other weights than the output's",
    ),
    "old-index": (
        lambda out: (out / "pytorch_model.bin.index.json").write_text("{}"),
        "pytorch_model.bin.index.json",
        "describes other weights than the output's",
    ),
    "weights-nobody-has": (
        lambda out: save_file({"x": torch.ones(1)}, out / "sub" / "x.safetensors"),
        "sub/x.safetensors",
        "is in the output, but not in the source, and may run code",
    ),
}


@pytest.mark.parametrize(("damage", "subject", "reason"), DAMAGE.values(), ids=DAMAGE)
def test_files_that_are_wrong_fail(damage: Callable[[Path], object], subject: str, reason: str, pair: Pair) -> None:
    """Each by its name."""
    damage(pair[1])
    found = [problem for problem in check(pair).problems if problem.subject == subject]
    assert [problem.reason for problem in found] == [reason]


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_other_settings_in_the_configuration_fail(key: str, pair: Pair) -> None:
    """VLLM may read them, or the next version of it."""
    edit_json(pair[1] / "config.json", text_config={key: {"quant_method": "awq"}})
    subjects = {problem.subject for problem in check_config(pair)}
    assert f"config.json: text_config.{key}" in subjects


def check_config(pair: Pair) -> list[Problem]:
    """Return the problems of an output's config.json, which an opened checkpoint would refuse as a whole."""
    out = open_checkpoint_as_it_is(pair[1])
    return list(proof.verify(out, open_checkpoint(pair[0])).problems)


def open_checkpoint_as_it_is(root: Path) -> Checkpoint:
    """Open an output, its config.json as it is there, whatever settings are in parts of it."""
    config = json.loads((root / "config.json").read_text())
    edit_json(root / "config.json", text_config=None)
    return replace(open_checkpoint(root), config=config)


def test_an_index_is_not_needed_for_one_file(tmp_path: Path) -> None:
    """As ever."""
    source = write_case("gptq-v1", tmp_path / "in").path
    convert(source, tmp_path / "out", device="cpu")
    assert not (tmp_path / "out" / INDEX).exists()
    assert check((source, tmp_path / "out")).problems == ()


def test_shards_need_an_index_of_the_usual_name(tmp_path: Path) -> None:
    """VLLM and transformers look for no other."""
    source = write_case("awq-symmetric-fp16-sharded", tmp_path / "in").path
    convert(source, tmp_path / "out", device="cpu")
    out = tmp_path / "out"
    tensors = load_file(out / "model.safetensors")
    names = sorted(tensors)
    for number, part in enumerate((names[::2], names[1::2]), 1):
        save_file({name: tensors[name] for name in part}, out / f"model-{number}-of-2.safetensors")
    (out / "model.safetensors").unlink()
    index = {name: f"model-{1 + names.index(name) % 2}-of-2.safetensors" for name in names}
    (out / INDEX).write_text(json.dumps({"weight_map": index}))
    assert check((source, out)).problems == ()
    (out / INDEX).rename(out / "other.safetensors.index.json")
    found = {problem.subject for problem in check((source, out)).problems}
    assert found == {INDEX, "other.safetensors.index.json"}
