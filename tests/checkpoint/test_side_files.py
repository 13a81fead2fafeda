"""What is copied beside the weights, what is left out, and why."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from checkpoint_edits import write_case
from safetensors.torch import load_file, save_file

from convert_w4a8.checkpoint.directory import open_checkpoint
from convert_w4a8.checkpoint.files import INDEX

PICKLE = "may be a pickle, which can run code"
OTHER_FORM = "the weights in another form"
OTHER_FORMAT = "weights in another format"
MISTRAL = "Mistral's own form of the model"

PLAIN = {"mtp.fc.weight": torch.ones(2, 2)}
INT4 = {"mtp.fc.qweight": torch.ones(2, 2, dtype=torch.int32)}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Write a checkpoint with an index."""
    return write_case("awq-symmetric-fp16-sharded", tmp_path / "in").path


def add(root: Path, name: str, content: bytes | Mapping[str, torch.Tensor] = b"x") -> None:
    """Add a file."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        save_file(dict(content), path)


def copied(root: Path) -> set[str]:
    """Return the side files that are not those of every checkpoint here."""
    usual = {"chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    return {str(path) for path in open_checkpoint(root).side_files} - usual


def left_out(root: Path) -> dict[str, str]:
    """Return file → reason."""
    return {item.path: item.reason for item in open_checkpoint(root).left_out}


COPIED = [
    "mtp.safetensors",
    "model-mtp.safetensors",
    "adapter_model.safetensors",
    "vision-lora/adapter_model.safetensors",
    "2_Dense/model.safetensors",
    "speech_tokenizer/model.safetensors",
    "deep/er/some.safetensors",
]


@pytest.mark.parametrize("name", COPIED)
def test_what_belongs_to_the_model_is_copied(name: str, source: Path) -> None:
    """Layers beside the weights, adapters, modules of sentence-transformers, parts that code loads by name."""
    add(source, name, PLAIN)
    assert copied(source) == {name}
    assert left_out(source) == {}
    assert open_checkpoint(source).tensors.keys() & PLAIN.keys() == set()


LEFT_OUT = {
    "pytorch_model.bin": PICKLE,
    "spk_dict.pt": PICKLE,
    "original/consolidated.00.pth": PICKLE,
    "2_Dense/pytorch_model.bin": PICKLE,
    "rng.pkl": PICKLE,
    "model.Q4_K_M.gguf": OTHER_FORMAT,
    "onnx/model.onnx": OTHER_FORMAT,
    "onnx/model.onnx_data": OTHER_FORMAT,
    "tf_model.h5": OTHER_FORMAT,
    "flax_model.msgpack": OTHER_FORMAT,
    "trt/rank0.engine": OTHER_FORMAT,
    "rust_model.ot": OTHER_FORMAT,
    "consolidated.safetensors": MISTRAL,
    "sub/consolidated-00001-of-00002.safetensors": MISTRAL,
    "consolidated.safetensors.index.json": MISTRAL,
    "original/model.safetensors": OTHER_FORM,
    "metal/deep/model.safetensors": OTHER_FORM,
    ".hidden": "hidden",
    "broken.safetensors": "header length",
}


@pytest.mark.parametrize(("name", "reason"), LEFT_OUT.items())
def test_what_is_no_part_of_the_model_is_left_out(name: str, reason: str, source: Path) -> None:
    """By name, with the reason, unopened."""
    add(source, name)
    assert copied(source) == set()
    assert list(left_out(source)) == [name]
    assert left_out(source)[name].startswith(reason)


def test_other_copies_of_the_weights_are_left_out(source: Path) -> None:
    """Beside the index's files most modules tell; in a directory, all that is not quantized."""
    tensors = load_file(source / "model-00001-of-00003.safetensors")
    first = next(name for name in tensors if name.endswith("norm.weight"))
    add(source, "model.safetensors", {first: tensors[first]})
    add(source, "model.fp16.safetensors", {first: tensors[first]})
    everything: dict[str, torch.Tensor] = {}
    for path in source.glob("model-*.safetensors"):
        everything |= load_file(path)
    names = list(everything)
    add(source, "checkpoint-500/model-00001-of-00002.safetensors", {n: everything[n] for n in names[::2]})
    add(source, "checkpoint-500/model-00002-of-00002.safetensors", {n: everything[n] for n in names[1::2]})
    add(source, f"checkpoint-500/{INDEX}", b"{}")
    assert copied(source) == set()
    assert left_out(source) == dict.fromkeys(
        (
            "checkpoint-500/model-00001-of-00002.safetensors",
            "checkpoint-500/model-00002-of-00002.safetensors",
            "model.fp16.safetensors",
            "model.safetensors",
        ),
        OTHER_FORM,
    )


def test_a_copy_in_16_bits_is_one(source: Path) -> None:
    """Its tensors have other names than the quantized ones, but those of the same modules."""
    modules = [name.removesuffix(".qweight") for name in open_checkpoint(source).tensors if name.endswith(".qweight")]
    add(source, "fp16.safetensors", {f"{module}.weight": torch.ones(1) for module in modules})
    assert left_out(source) == {"fp16.safetensors": OTHER_FORM}


def test_one_shared_tensor_makes_no_copy(source: Path) -> None:
    """Layers for multi-token prediction may have the embeddings with them."""
    add(source, "mtp.safetensors", {**PLAIN, "mtp.norm.weight": torch.ones(2), "lm_head.weight": torch.ones(2)})
    assert copied(source) == {"mtp.safetensors"}


def test_a_smaller_model_in_a_directory_is_no_copy(source: Path) -> None:
    """A draft model has names of the model's, but not all of them. Its index comes with it."""
    add(source, "draft/model-00001-of-00001.safetensors", {"model.embed_tokens.weight": torch.ones(2)})
    add(source, f"draft/{INDEX}", b"{}")
    add(source, f"empty/{INDEX}", b"{}")
    assert copied(source) == {"draft/model-00001-of-00001.safetensors", f"draft/{INDEX}"}


def test_weights_that_the_old_settings_describe_are_left_out(source: Path) -> None:
    """INT4 tensors mean nothing without settings: those of the source are gone. A directory may have its own."""
    add(source, "mtp.safetensors", INT4)
    add(source, "draft/model.safetensors", INT4)
    reasons = {
        "draft/model.safetensors": "INT4 weights without settings",
        "mtp.safetensors": f"INT4 weights that {INDEX} does not list: list them there to have them converted",
    }
    assert (copied(source), left_out(source)) == (set(), reasons)
    add(source, "draft/config.json", json.dumps({"quantization_config": {"quant_method": "gptq"}}).encode())
    assert copied(source) == {"draft/config.json", "draft/model.safetensors"}
    add(source, "draft/config.json", b"{")
    assert copied(source) == {"draft/config.json"}
    add(source, "draft/quantize_config.json", b'{"bits": 4}')
    add(source, "draft/config.json", b"{}")
    assert copied(source) == {"draft/config.json", "draft/quantize_config.json", "draft/model.safetensors"}


@pytest.mark.parametrize("name", ["model.safetensors", "model-00007-of-00007.safetensors"])
def test_names_of_an_outputs_weights_are_not_taken(name: str, source: Path) -> None:
    """The output may write a file of that name itself."""
    add(source, name, PLAIN)
    assert (copied(source), left_out(source)) == (set(), {name: f"weights that {INDEX} does not list"})


def test_mistrals_settings_go_with_its_weights(source: Path) -> None:
    """params.json describes consolidated.safetensors, and is another file's name elsewhere."""
    add(source, "params.json")
    add(source, "sub/params.json")
    assert copied(source) == {"params.json", "sub/params.json"}
    add(source, "consolidated.safetensors")
    assert copied(source) == {"sub/params.json"}


@pytest.mark.parametrize(
    "name", ["quantize_config.json", "quant_config.json", "quantization_config.json", "hf_quant_config.json"]
)
def test_old_settings_are_not_copied(name: str, source: Path) -> None:
    """They would describe the output wrongly; the output's own are in config.json."""
    add(source, name, b"{}")
    assert (copied(source), left_out(source)) == (set(), {})


@pytest.mark.parametrize("name", ["mtp.safetensors", "sub/model.safetensors", "adapter_model.safetensors"])
def test_links_to_weights_out_of_the_checkpoint(name: str, source: Path, tmp_path: Path) -> None:
    """Are refused, under whatever name."""
    add(tmp_path, "secret.safetensors", PLAIN)
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).symlink_to(tmp_path / "secret.safetensors")
    with pytest.raises(Exception, match="is a link out of the checkpoint"):
        open_checkpoint(source)
