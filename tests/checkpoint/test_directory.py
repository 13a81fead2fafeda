"""Checkpoint directories: what belongs together is opened, what does not is one clear refusal."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_edits import REMOVE, edit_json, snapshot, write_case
from safetensors.torch import load_file, save_file

from convert_w4a8.checkpoint.directory import open_checkpoint
from convert_w4a8.checkpoint.files import INDEX
from convert_w4a8.checkpoint.json_file import read_json
from convert_w4a8.checkpoint.safetensors_file import read_tensor
from convert_w4a8.errors import ConvertError

SHARDED = "awq-symmetric-fp16-sharded"
SHARD_1, SHARD_2 = "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"


def read_index(path: Path) -> dict[str, str]:
    """Return the weight_map of a checkpoint."""
    weight_map: dict[str, str] = json.loads((path / INDEX).read_text())["weight_map"]
    return weight_map


def redirect(path: Path, name: str, shard: object) -> None:
    """Let the index say that a tensor lies in another file."""
    edit_json(path / INDEX, "weight_map", **{name: shard})


def replace_file(path: Path, make: Callable[[Path], object]) -> None:
    """Put something else in a file's place."""
    path.unlink()
    make(path)


def redirect_outside(path: Path) -> None:
    """Let the index name a shard in the directory above, which exists."""
    save_file({"x": torch.ones(1)}, path.parent / "x.safetensors")
    redirect(path, "x", "../x.safetensors")


@pytest.mark.parametrize("case", ["gptq-v1", SHARDED])
def test_every_tensor_is_found_and_read(case: str, tmp_path: Path) -> None:
    """One file or shards: the tensors are those that the library reads, bit for bit, and sizes add up."""
    source = write_case(case, tmp_path / "in")
    expected: dict[str, torch.Tensor] = {}
    for file in source.path.glob("*.safetensors"):
        expected |= load_file(file)
    checkpoint = open_checkpoint(source.path)
    assert checkpoint.tensors.keys() == expected.keys()
    assert all(torch.equal(read_tensor(checkpoint.tensors[name]), tensor) for name, tensor in expected.items())
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in expected.values())


def test_any_name_of_a_single_file_is_accepted(tmp_path: Path) -> None:
    """AutoGPTQ names its file gptq_model-4bit-128g.safetensors."""
    source = write_case("gptq-v1", tmp_path / "in")
    (source.path / "model.safetensors").rename(source.path / "gptq_model-4bit-128g.safetensors")
    assert open_checkpoint(source.path).tensors


def test_opening_reads_headers_only(tmp_path: Path) -> None:
    """Damaged data does not matter until a tensor is read: nothing but headers is touched."""
    source = write_case("gptq-v1", tmp_path / "in")
    file = source.path / "model.safetensors"
    size = file.stat().st_size
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    os.truncate(file, header)
    os.truncate(file, size)  # a hole instead of the data
    checkpoint = open_checkpoint(source.path)
    assert not read_tensor(checkpoint.tensors["model.embed_tokens.weight"]).any()


# The index.

BAD_INDEX: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "shard-absent": (lambda p: (p / SHARD_1).unlink(), SHARD_1, f"is named by {INDEX} but is absent"),
    "shard-a-directory": (
        lambda p: replace_file(p / SHARD_1, Path.mkdir),
        SHARD_1,
        f"is named by {INDEX} but is absent",
    ),
    "shard-a-broken-link": (
        lambda p: replace_file(p / SHARD_1, lambda shard: shard.symlink_to("nowhere")),
        SHARD_1,
        f"is named by {INDEX} but is absent",
    ),
    "shard-a-link-to-itself": (
        lambda p: replace_file(p / SHARD_1, lambda shard: shard.symlink_to(SHARD_1)),
        SHARD_1,
        f"is named by {INDEX} but is absent",
    ),
    "parent-directory": (
        redirect_outside,
        "'../x.safetensors'",
        "is not the name of a safetensors file beside it",
    ),
    "absolute-path": (
        lambda p: redirect(p, "x", str(p / SHARD_1)),
        SHARD_1,
        "is not the name of a safetensors file beside it",
    ),
    "sub-directory": (
        lambda p: redirect(p, "x", "sub/x.safetensors"),
        "sub/x.safetensors",
        f"is named by {INDEX} but is absent",
    ),
    "way-round": (
        lambda p: redirect(p, "x", f"sub/../{SHARD_1}"),
        f"'sub/../{SHARD_1}'",
        "is not the name of a safetensors file beside it",
    ),
    "dot": (lambda p: redirect(p, "x", f"./{SHARD_1}"), SHARD_1, "is not the name of a safetensors file beside it"),
    "pickle": (
        lambda p: redirect(p, "x", "pytorch_model.bin"),
        "'pytorch_model.bin'",
        "is not the name of a safetensors file beside it",
    ),
    "config-as-shard": (
        lambda p: redirect(p, "x", "config.json"),
        "'config.json'",
        "is not the name of a safetensors file beside it",
    ),
    "number-as-shard": (lambda p: redirect(p, "x", 7), "'7'", "is not the name of a safetensors file beside it"),
    "null-byte-in-name": (lambda p: redirect(p, "x", "a\0.safetensors"), "safetensors", "is absent"),
    "tensor-in-other-shard": (
        lambda p: redirect(
            p, "model.norm.weight", SHARD_1 if read_index(p)["model.norm.weight"] != SHARD_1 else SHARD_2
        ),
        "tensor 'model.norm.weight'",
        f"{INDEX} puts it into model-0000",
    ),
    "tensor-not-listed": (
        lambda p: redirect(p, "model.norm.weight", REMOVE),
        "tensor 'model.norm.weight'",
        f"{INDEX} does not list it",
    ),
    "tensor-not-in-shard": (
        lambda p: redirect(p, "model.extra.weight", SHARD_2),
        f"{SHARD_2}: tensor 'model.extra.weight'",
        f"is listed in {INDEX} but not in the shard (1 such)",
    ),
    "tensor-in-two-shards": (
        lambda p: (
            save_file(load_file(p / SHARD_2) | {"model.norm.weight": torch.ones(1)}, p / SHARD_2)
            if read_index(p)["model.norm.weight"] != SHARD_2
            else save_file(load_file(p / SHARD_1) | {"model.norm.weight": torch.ones(1)}, p / SHARD_1)
        ),
        "tensor 'model.norm.weight'",
        f"{INDEX} puts it into model-0000",
    ),
    "weight-map-absent": (lambda p: edit_json(p / INDEX, weight_map=REMOVE), "weight_map", "is missing"),
    "weight-map-empty": (lambda p: edit_json(p / INDEX, weight_map={}), "weight_map", "is missing"),
    "weight-map-a-list": (lambda p: edit_json(p / INDEX, weight_map=[SHARD_1]), "weight_map", "not an object"),
    "index-not-json": (lambda p: (p / INDEX).write_text("{"), INDEX, "is not valid JSON"),
    "index-empty": (lambda p: (p / INDEX).write_bytes(b""), INDEX, "is not valid JSON"),
    "shard-empty": (lambda p: (p / SHARD_1).write_bytes(b""), SHARD_1, "0 bytes"),
    "shard-truncated": (lambda p: os.truncate(p / SHARD_2, 5000), SHARD_2, "header"),
}


@pytest.mark.parametrize(("damage", "subject", "reason"), BAD_INDEX.values(), ids=BAD_INDEX)
def test_index_that_lies_is_refused(
    damage: Callable[[Path], object], subject: str, reason: str, tmp_path: Path
) -> None:
    """Index and shards must agree tensor by tensor, and no shard lies outside the directory."""
    source = write_case(SHARDED, tmp_path / "in")
    damage(source.path)
    with pytest.raises(ConvertError) as caught:
        open_checkpoint(source.path)
    assert subject in caught.value.problem.subject
    assert reason in caught.value.problem.reason
    assert caught.value.problem.remedy


# No index.


class Bomb:
    """An object whose unpickling leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_pickles_are_refused_unopened(file: str, tmp_path: Path) -> None:
    """Weights in a pickle are refused by name with the remedy; the pickle is never loaded."""
    source = write_case("gptq-v1", tmp_path / "in")
    (source.path / "model.safetensors").unlink()
    trace = tmp_path / "pickle-was-loaded"
    (source.path / file).write_bytes(pickle.dumps(Bomb(trace)))
    with pytest.raises(ConvertError) as caught:
        open_checkpoint(source.path)
    assert file in caught.value.problem.reason
    assert "pickle can run code" in caught.value.problem.reason
    assert "safe_serialization=True" in caught.value.problem.remedy
    assert not trace.exists()


def test_pickles_beside_safetensors_are_ignored(tmp_path: Path) -> None:
    """A repository that holds both kinds of weights is read from its safetensors; the pickles are not side files."""
    source = write_case("gptq-v1", tmp_path / "in")
    (source.path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "pickle-was-loaded")))
    checkpoint = open_checkpoint(source.path)
    assert checkpoint.tensors
    assert {str(file) for file in checkpoint.side_files} == source.side_files.keys()
    assert not (tmp_path / "pickle-was-loaded").exists()


def test_directory_without_weights_is_refused(tmp_path: Path) -> None:
    """A directory with a configuration and nothing else says that there is no safetensors file."""
    source = write_case("gptq-v1", tmp_path / "in")
    (source.path / "model.safetensors").unlink()
    with pytest.raises(ConvertError, match="no safetensors file;"):
        open_checkpoint(source.path)


def test_several_files_without_index_are_refused(tmp_path: Path) -> None:
    """Shards whose index is lost are counted, and the index is asked for."""
    source = write_case(SHARDED, tmp_path / "in")
    (source.path / INDEX).unlink()
    with pytest.raises(ConvertError, match=rf"3 safetensors files but no {INDEX} \({SHARD_1}, .*\); restore the index"):
        open_checkpoint(source.path)


# config.json and quantize_config.json.


def test_quantize_config_alone_is_gptq(tmp_path: Path) -> None:
    """AutoGPTQ's quantize_config.json stands in for quantization_config; without quant_method it means GPTQ."""
    source = write_case("gptq-quantize-config-only", tmp_path / "in")
    edit_json(source.path / "quantize_config.json", quant_method=REMOVE, meta=REMOVE)
    checkpoint = open_checkpoint(source.path)
    assert checkpoint.quantization_config["quant_method"] == "gptq"
    assert checkpoint.quantization_config["bits"] == 4


def test_config_json_wins_over_quantize_config(tmp_path: Path) -> None:
    """Where both exist, config.json is what transformers and vLLM read."""
    source = write_case("gptq-side-files", tmp_path / "in")
    edit_json(source.path / "quantize_config.json", bits=8, checkpoint_format="marlin")
    assert open_checkpoint(source.path).quantization_config["checkpoint_format"] == "gptq_v2"


BAD_CONFIG: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "absent": (lambda p: (p / "config.json").unlink(), "config.json", "cannot be read (No such file or directory)"),
    "a-directory": (
        lambda p: replace_file(p / "config.json", Path.mkdir),
        "config.json",
        "cannot be read (Is a directory)",
    ),
    "empty": (lambda p: (p / "config.json").write_bytes(b""), "config.json", "is not valid JSON"),
    "cut": (lambda p: os.truncate(p / "config.json", 100), "config.json", "is not valid JSON"),
    "not-utf-8": (lambda p: (p / "config.json").write_bytes(b'{"a": "\xff"}'), "config.json", "is not valid JSON"),
    "utf-16": (lambda p: (p / "config.json").write_bytes("{}".encode("utf-16")), "config.json", "is not valid JSON"),
    "deep": (lambda p: (p / "config.json").write_text("[" * 10**5 + "]" * 10**5), "config.json", "is not valid JSON"),
    "a-list": (lambda p: (p / "config.json").write_text("[]"), "config.json", "does not hold a JSON object"),
    "a-number": (lambda p: (p / "config.json").write_text("4"), "config.json", "does not hold a JSON object"),
    "quantization-a-string": (
        lambda p: edit_json(p / "config.json", quantization_config="gptq"),
        "config.json: quantization_config",
        "is not a JSON object",
    ),
    "quantization-a-list": (
        lambda p: edit_json(p / "config.json", quantization_config=[{"bits": 4}]),
        "config.json: quantization_config",
        "is not a JSON object",
    ),
}


@pytest.mark.parametrize(("damage", "subject", "reason"), BAD_CONFIG.values(), ids=BAD_CONFIG)
def test_configuration_that_cannot_be_read_is_refused(
    damage: Callable[[Path], object], subject: str, reason: str, tmp_path: Path
) -> None:
    """A configuration that is missing, damaged or of another kind is one line that names the file."""
    source = write_case("gptq-v1", tmp_path / "in")
    damage(source.path)
    with pytest.raises(ConvertError) as caught:
        open_checkpoint(source.path)
    assert caught.value.problem.subject.endswith(subject)
    assert reason in caught.value.problem.reason
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [REMOVE, None], ids=["absent", "null"])
def test_a_checkpoint_need_not_be_quantized(value: object, tmp_path: Path) -> None:
    """Whether one is wanted that is not is for the formats to say: it opens, with an empty quantization_config."""
    source = write_case("gptq-v1", tmp_path / "in")
    edit_json(source.path / "config.json", quantization_config=value)
    checkpoint = open_checkpoint(source.path)
    assert checkpoint.quantization_config == {}
    assert "model.norm.weight" in checkpoint.tensors


@pytest.mark.parametrize("kind", ["absent", "file"])
def test_what_is_no_directory_is_refused(kind: str, tmp_path: Path) -> None:
    """A path that is not a directory is told what to give instead."""
    if kind == "file":
        (tmp_path / "in").write_bytes(b"")
    with pytest.raises(ConvertError, match="is not a directory; give a checkpoint directory or a Hub id"):
        open_checkpoint(tmp_path / "in")


def test_json_numbers_of_any_size_do_not_crash(tmp_path: Path) -> None:
    """An integer of ten thousand digits is not valid JSON to us, rather than a ValueError."""
    (tmp_path / "a.json").write_text('{"a": ' + "9" * 10_000 + "}")
    with pytest.raises(ConvertError, match="is not valid JSON"):
        read_json(tmp_path / "a.json")


# Side files.


def test_side_files_are_everything_else(tmp_path: Path) -> None:
    """Weights, indexes, hidden files and what is written anew are not copied; all else is, in sub-directories too."""
    source = write_case("gptq-v1", tmp_path / "in")
    copied = [
        "added_tokens.json",
        "code/README.md",
        "code/modeling_x.py",
        "code/deep/er.txt",
        "merges.txt",
        "tokenizer.model",
    ]
    dropped = [
        "README.md",
        "quantize_config.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "sub/adapter.safetensors",
        "sub/model.safetensors.index.json",
        "model.gguf",
        "onnx/model.onnx",
        "tf_model.h5",
        "flax_model.msgpack",
        ".gitattributes",
        ".cache/huggingface/download/config.json.metadata",
    ]
    for name in copied + dropped:
        (source.path / name).parent.mkdir(parents=True, exist_ok=True)
        (source.path / name).write_bytes(b"x")
    found = {str(file) for file in open_checkpoint(source.path).side_files}
    assert found == {*source.side_files, *copied}


def test_a_config_in_a_sub_directory_is_a_side_file(tmp_path: Path) -> None:
    """Only the checkpoint's own config.json is written anew; one of a sub-model is copied."""
    source = write_case("gptq-v1", tmp_path / "in")
    (source.path / "vision").mkdir()
    (source.path / "vision" / "config.json").write_text("{}")
    assert Path("vision/config.json") in open_checkpoint(source.path).side_files


def hub_snapshot(source: Path, cache: Path) -> Path:
    """Lay a checkpoint out as the Hub's cache does: blobs, and a snapshot of relative links."""
    root = cache / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    (cache / "blobs").mkdir(parents=True)
    for number, file in enumerate(sorted(source.rglob("*"))):
        if file.is_file():
            link = root / file.relative_to(source)
            link.parent.mkdir(parents=True, exist_ok=True)
            blob = cache / "blobs" / f"{number:040x}"
            blob.write_bytes(file.read_bytes())
            link.symlink_to(os.path.relpath(blob, link.parent))
    return root


@pytest.mark.parametrize("case", ["gptq-side-files", SHARDED])
def test_hub_snapshot_of_links_is_the_same_checkpoint(case: str, tmp_path: Path) -> None:
    """Files that are links into a blob store are read through: same tensors, same side files, same bytes."""
    source = write_case(case, tmp_path / "in")
    root = hub_snapshot(source.path, tmp_path / "models--org--name")
    plain, linked = open_checkpoint(source.path), open_checkpoint(root)
    assert linked.tensors.keys() == plain.tensors.keys()
    for name, info in plain.tensors.items():
        assert torch.equal(read_tensor(linked.tensors[name]), read_tensor(info))
    assert linked.side_files == plain.side_files
    assert snapshot(root) == snapshot(source.path)
