"""No file of the machine gets into an output through a link, and what is left out is said."""

from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoint_edits import write_case
from safetensors.torch import load_file

from convert_w4a8 import ConvertError, convert, make_plan, open_checkpoint


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Write a checkpoint beside a secret."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.json").write_text('{"secret": 1}')
    return write_case("gptq-side-files", tmp_path / "in").path


def weights(source: Path) -> None:
    """Let the weights lie elsewhere."""
    (source / "model.safetensors").rename(source.parent / "outside" / "model.safetensors")
    (source / "model.safetensors").symlink_to("../outside/model.safetensors")


def hidden_weights(source: Path) -> None:
    """Do the same under a hidden name, which no listing shows."""
    (source / "model.safetensors").rename(source.parent / "outside" / "model.safetensors")
    (source / ".model.safetensors").symlink_to("../outside/model.safetensors")


def hidden_shard(source: Path) -> None:
    """Do the same, and name it in an index."""
    hidden_weights(source)
    names = load_file(source.parent / "outside" / "model.safetensors")
    entries = ", ".join(f'"{name}": ".model.safetensors"' for name in names)
    (source / "model.safetensors.index.json").write_text('{"weight_map": {' + entries + "}}")


def by_way_of_a_hidden_directory(source: Path) -> None:
    """Link within the checkpoint to a link out of it."""
    (source / ".private").symlink_to("../outside")
    (source / "extra.json").symlink_to(".private/secret.json")


def configuration(source: Path) -> None:
    """Let config.json lie elsewhere."""
    (source / "config.json").rename(source.parent / "outside" / "config.json")
    (source / "config.json").symlink_to("../outside/config.json")


def side_directory(source: Path) -> None:
    """Let a directory of side files lie elsewhere."""
    (source / "more").symlink_to("../outside")


@pytest.mark.parametrize(
    "plant", [weights, hidden_weights, hidden_shard, by_way_of_a_hidden_directory, configuration, side_directory]
)
def test_links_out_of_the_checkpoint_are_refused(plant: Callable[[Path], None], source: Path, tmp_path: Path) -> None:
    """Each is checked where it would be opened, under whatever name."""
    plant(source)
    with pytest.raises(ConvertError, match="is a link out of the checkpoint"):
        convert(source, tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


def test_links_within_the_checkpoint_are_files(source: Path, tmp_path: Path) -> None:
    """As the Hub's cache has them."""
    (source / "again.json").symlink_to("tokenizer.json")
    convert(source, tmp_path / "out", device="cpu")
    assert (tmp_path / "out" / "again.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert not (tmp_path / "out" / "again.json").is_symlink()


def test_what_is_left_out_is_said(source: Path) -> None:
    """Hidden files, links to nothing, weights in other formats; not what tools leave for themselves."""
    (source / ".chat_template").write_text("x")
    (source / "adapter.bin").write_bytes(b"x")
    (source / "gone.json").symlink_to("nothing")
    (source / "inner").mkdir()
    (source / "linked").symlink_to("inner")
    (source / ".gitattributes").write_text("x")
    (source / ".git").mkdir()
    (source / ".git" / "HEAD").write_text("x")
    expected = {
        ".chat_template (hidden)",
        "adapter.bin (may be a pickle, which can run code)",
        "gone.json (a link to nothing)",
        "linked (a link to a directory)",
    }
    found = set(map(str, open_checkpoint(source).left_out))
    assert expected <= found
    assert not any(".git" in line for line in found)
    warnings = [line for line in make_plan(source).warnings if line.startswith("not carried over: ")]
    assert len(warnings) == len(expected)
    assert "not carried over: .chat_template (hidden)" in warnings
