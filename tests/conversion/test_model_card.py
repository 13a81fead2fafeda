"""The model card: metadata that the Hub reads, figures of the conversion, the card of the source below."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from checkpoint_edits import case_named, write_case
from click.testing import CliRunner

from convert_w4a8.checkpoint.directory import Checkpoint, open_checkpoint
from convert_w4a8.cli.convert import convert_command as convert
from convert_w4a8.cli.main import main
from convert_w4a8.conversion.model_card import hub_id, model_card
from convert_w4a8.conversion.plan import make_plan
from convert_w4a8.conversion.run import carry_out
from convert_w4a8.options import Options, ScalesMode
from convert_w4a8.quantization.layer import LayerStats
from convert_w4a8.version import INSTALL_NOTE, install_command

SOURCE_CARD = """\
---
license: other
license_name: llama3
license_link: LICENSE
language:
- en
- no
pipeline_tag: text-generation
tags: [AWQ, 4-bit, chat, w4a8]
base_model: meta-llama/Meta-Llama-3-8B
library_name: transformers
model-index:
- name: results of the source
---
# Llama 3, AWQ

| a | b |
|---|---|

---
The end.
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a checkpoint without a card."""
    return write_case("gptq-v1", tmp_path_factory.mktemp("card") / "Tiny-GPTQ").path


@pytest.fixture
def card(source: Path) -> Any:
    """Return a maker of cards for a source card, without converting: the layers' statistics are invented."""

    def make(text: str | bytes | None = None, **options: Any) -> str:
        file = source / "README.md"
        file.unlink(missing_ok=True)
        if text is not None:
            file.write_bytes(text if isinstance(text, bytes) else text.encode())
        checkpoint = open_checkpoint(source)
        plan = make_plan(checkpoint, Options(**options))
        stats = [LayerStats(True, 1000.0, 1.0 + index, 40) for index in range(len(plan.layers))]
        return model_card(checkpoint, plan, stats)

    return make


def metadata(card: str) -> dict[str, Any]:
    """Read a card's metadata as huggingface_hub does."""
    found: dict[str, Any] = huggingface_hub.ModelCard(card).data.to_dict()  # type: ignore[no-untyped-call]
    return found


def table(card: str) -> dict[str, str]:
    """Read the rows of the table of figures."""
    section = card.partition("## What was done")[2].partition("##")[0]
    return dict(re.findall(r"(?m)^\| (\S.*?) \| (.*) \|$", section))


# Metadata.


def test_metadata_is_carried_over(card: Any) -> None:
    """Licence, language, task and base model are the source's; what is no longer true is not there."""
    assert metadata(card(SOURCE_CARD)) == {
        "base_model": "meta-llama/Meta-Llama-3-8B",
        "base_model_relation": "quantized",
        "library_name": "vllm",
        "license": "other",
        "license_name": "llama3",
        "license_link": "LICENSE",
        "language": ["en", "no"],
        "pipeline_tag": "text-generation",
        "tags": ["w4a8", "int4", "fp8", "vllm", "hopper", "4-bit", "chat"],
    }


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "# No metadata\n\n---\n",
        "---\n---\n",
        "---\n- a list\n---\n",
        "---\nlicense: [unclosed\n---\n# Text\n",
        "---\nlicense: &a [*a, {b: c}]\ntags: {a: b}\nbase_model: ../../etc/passwd\n---\n",
        "---\nlicense: " + "[" * 20_000 + "\n---\n",
        "---\na: " + "x" * 70_000 + "\nlicense: mit\n---\n",
        b"---\nlicense: \xff\xfe\n---\n\xff",
        b"\x00\x01\x02",
    ],
    ids=[
        "no-card", "empty", "no-metadata", "empty-metadata", "list", "broken", "wrong-types", "deep", "huge", "latin",
        "binary",
    ],
)  # fmt: skip
def test_any_card_of_the_source_is_survived(card: Any, text: Any) -> None:
    """Metadata that is absent, broken or of other types is left out; the result is metadata that the Hub can read."""
    found = metadata(card(text))
    assert found["tags"] == ["w4a8", "int4", "fp8", "vllm", "hopper"]
    assert found.keys() <= {"library_name", "tags", "license"}
    assert all(isinstance(value, str | list) for value in found.values())


def test_line_ends_of_windows_are_understood(card: Any) -> None:
    """CRLF and a byte order mark do not hide the metadata."""
    found = card(b"\xef\xbb\xbf---\r\nlicense: mit\r\n---\r\n# Title\r\n")
    assert metadata(found)["license"] == "mit"
    assert found.endswith("# Title\n")


def test_base_model_is_the_source_where_it_came_from_the_hub(source: Path, tmp_path: Path) -> None:
    """A snapshot in the Hub's cache is known by its path; a directory elsewhere is nobody's base model."""
    snapshot = tmp_path / "models--org--Tiny-GPTQ" / "snapshots" / "0123abc"
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(source)
    (source / "README.md").unlink(missing_ok=True)
    checkpoint = open_checkpoint(snapshot)
    plan = make_plan(checkpoint, Options())
    text = model_card(checkpoint, plan, [None] * len(plan.layers))
    assert metadata(text)["base_model"] == "org/Tiny-GPTQ"
    assert "[org/Tiny-GPTQ](https://huggingface.co/org/Tiny-GPTQ)" in text
    assert hub_id(open_checkpoint(source)) is None


# Text.


def test_card_of_the_source_stays_below_ours(card: Any) -> None:
    """The source's text is kept whole, behind a line that says what it is."""
    text = card(SOURCE_CARD)
    ours, theirs = text.split("\n---\n\n*What follows is the model card of the source.*\n\n")
    assert theirs == SOURCE_CARD.partition("---\n# ")[2].join(["# ", ""])
    assert ours.count("\n# ") == 1
    assert "What follows" not in card(None)


def test_how_to_serve(card: Any) -> None:
    """Each format says what it needs: the plugin, and what is seen without it; or nothing."""
    lut, stock = card(format="lut"), card(format="compressed-tensors")
    assert install_command() in lut
    assert INSTALL_NOTE in lut
    assert "pip install w4a8-convert" not in lut  # the package index does not know the name: anybody could claim it
    assert "`Unknown quantization method: w4a8_lut`" in lut
    assert "--format compressed-tensors" in lut
    assert "pip install" not in stock
    assert "vllm serve" in lut.replace(" ORG", "")
    assert "vllm serve" in stock


def test_figures_are_those_of_the_statistics(card: Any, source: Path) -> None:
    """Mean and worst error, counts and sizes, from statistics that are known."""
    rows = table(card(None))
    db = [10 * math.log10(1000 / (1 + index)) for index in range(14)]
    plan = make_plan(open_checkpoint(source), Options())
    assert rows["layers converted"] == rows["INT4 codes kept, value for value"] == "14 layers"
    assert rows["error of all layers converted"] == f"mean {sum(db) / 14:.1f} dB, worst {db[-1]:.1f} dB"
    assert rows["worst layer"] == f"`{plan.layers[-1].module}`, {db[-1]:.1f} dB"
    assert "new INT4 codes" not in rows
    assert "kept in BF16" not in rows


def test_new_codes_layers_in_bf16_and_no_error_are_told(source: Path) -> None:
    """Each of them has a row; infinity is written as words."""
    checkpoint = open_checkpoint(source)
    plan = make_plan(checkpoint, Options(scales=ScalesMode.DIRECT))
    stats: list[LayerStats | None] = [None, LayerStats(False, 100.0, 1.0, 3), LayerStats(True, 1.0, 0.0, None)]
    short = replace(plan, layers=plan.layers[:3])
    rows = table(model_card(checkpoint, short, stats))
    assert rows["new INT4 codes"] == "1 layer; error mean 20.0 dB, worst 20.0 dB"
    assert rows["kept in BF16"] == "1 layer"
    assert rows["FP8 scales"].startswith("direct: ")
    assert rows["error of all layers converted"] == "mean 20.0 dB, worst 20.0 dB"
    lossless = table(model_card(checkpoint, short, [stats[2]] * 3))
    assert lossless["error of all layers converted"] == "none"
    assert lossless["worst layer"].endswith(", no error")
    assert "worst layer" not in table(model_card(checkpoint, short, [None] * 3))


def test_names_cannot_break_the_table(source: Path) -> None:
    """The name of a layer comes from a file that anybody may have written."""
    checkpoint = open_checkpoint(source)
    plan = make_plan(checkpoint, Options())
    evil = replace(plan, layers=(replace(plan.layers[0], module="a|b`\nc"),))
    assert table(model_card(checkpoint, evil, [LayerStats(True, 1.0, 0.1, 1)]))["worst layer"] == r"`a?b?\nc`, 10.0 dB"


# In a conversion.


def opened(path: Path, tmp_path: Path, *options: str) -> tuple[str, dict[str, Any]]:
    """Convert, and return the card and what `verify` measures."""
    out = tmp_path / "out"
    result = CliRunner().invoke(convert, [str(path), str(out), "--quiet", *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    verified = CliRunner().invoke(main, ["verify", str(out), "--source", str(path), "--json"])
    return (out / "README.md").read_text(encoding="utf-8"), json.loads(verified.stdout)


@pytest.mark.parametrize("case", ["gptq-v1", "awq-zero-points", "gptq-odd-k"])
def test_conversion_writes_the_card_that_verification_confirms(case: str, tmp_path: Path) -> None:
    """The figures, estimated while converting, are what the bytes on disk have, to within 0.3 dB.

    The estimate is from the layer's code histogram. A search that minimises just that is a little worse in fact, in
    layers as small as these by more than 0.3 dB; so the scales here are vLLM's.
    """
    source = write_case(case, tmp_path / "in")
    text, verified = opened(source.path, tmp_path, *case_named(case).needs, "--scales", "reference")
    assert verified["ok"]
    rows = table(text)
    layers = verified["layers"]
    assert rows["layers converted"] == f"{len(layers)} layers"
    assert rows["INT4 codes kept, value for value"] == f"{sum(layer['codes_kept'] for layer in layers)} layers"
    assert ("new INT4 codes" in rows) == case_named(case).requantized
    assert ("kept in BF16" in rows) == bool(case_named(case).dequantized)
    worst = min(layer["sqnr_db"] for layer in layers)
    (stated,) = re.findall(r"worst ([\d.]+) dB", rows["error of all layers converted"])
    assert float(stated) == pytest.approx(worst, abs=0.3)


def test_card_of_ours_may_be_edited(source: Path, tmp_path: Path) -> None:
    """The card belongs to its readers: verification does not compare it with anything."""
    (source / "README.md").write_text(SOURCE_CARD)
    opened(source, tmp_path)
    (tmp_path / "out" / "README.md").write_text("# Mine\n")
    result = CliRunner().invoke(main, ["verify", str(tmp_path / "out"), "--source", str(source)])
    assert result.exit_code == 0, result.output


def test_card_depends_on_nothing_but_the_conversion(source: Path, tmp_path: Path) -> None:
    """Converted twice, the card is the same, byte for byte."""
    checkpoint: Checkpoint = open_checkpoint(source)
    plan = make_plan(checkpoint, Options())
    for name in ("a", "b"):
        carry_out(checkpoint, plan, tmp_path / name, device=torch.device("cpu"))
    assert (tmp_path / "a" / "README.md").read_bytes() == (tmp_path / "b" / "README.md").read_bytes()
