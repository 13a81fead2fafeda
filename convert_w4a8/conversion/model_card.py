"""The model card, README.md: what the checkpoint is, how it was made, how to serve it; the source's card below.

Metadata as in https://huggingface.co/docs/hub/model-cards.
"""

import math
import os
import re
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import yaml

from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.checkpoint.files import CARD
from convert_w4a8.conversion.plan import Plan
from convert_w4a8.conversion.result import Recipe
from convert_w4a8.errors import ConvertError
from convert_w4a8.options import ScalesMode
from convert_w4a8.quantization.layer import LayerStats
from convert_w4a8.text import counted, human_bytes, markdown_code, printable
from convert_w4a8.version import __version__

_FRONT_MATTER = re.compile(r"\A\ufeff?---[ \t]*\r?\n(?P<yaml>.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
_FRONT_MATTER_CHARS = 1 << 16
_LISTED = 6
_CARD_BYTES = 1 << 20
"""As much of the source's card is carried over."""
_CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag")
_TAGS = {"W4A8": ("w4a8", "int4", "fp8", "vllm", "hopper"), "W4A16": ("w4a16", "int4", "vllm")}
_SCHEMES = {
    "W4A8": "INT4 weights and FP8 activations (W4A8) for vLLM on NVIDIA Hopper (H100, H200, GH200).",
    "W4A16": "INT4 weights and 16-bit activations (W4A16) in the compressed-tensors format.",
}
_OUTDATED_TAGS = frozenset({"awq", "autoawq", "gptq", "autogptq", "auto-gptq", "gptqmodel", "w4a16", "int8"})
"""Tags that name the format or the tool of the source."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SCALES = {
    ScalesMode.REFERENCE: "reference: bit for bit as vLLM computes them at load",
    ScalesMode.SEARCH: "search: chosen for the least squared error of the final weights",
    ScalesMode.DIRECT: "direct: table entries chosen one by one",
}


def model_card(
    checkpoint: Checkpoint, plan: Plan, stats: Sequence[LayerStats | None], recipe: Recipe | None = None
) -> str:
    """Return the README.md of a conversion.

    stats: of `plan.layers`, in their order; None where a layer was kept in BF16. recipe: how its numbers were chosen.
    """
    metadata, body = _source_card(checkpoint)
    front = yaml.safe_dump(_metadata(checkpoint, metadata, plan.target.SCHEME), sort_keys=False, allow_unicode=True)
    parts = [
        f"---\n{front}---",
        _introduction(checkpoint, plan, recipe),
        _figures(plan, stats, recipe),
        _serving(plan, recipe),
    ]
    if body:
        parts += ["---\n\n*What follows is the model card of the source.*", body]
    return "\n\n".join(parts) + "\n"


def hub_id(checkpoint: Checkpoint) -> str | None:
    """Return org/name for a snapshot in the Hub's cache (…/models--org--name/snapshots/commit); None elsewhere."""
    snapshots = checkpoint.root.absolute().parent
    prefix, *names = snapshots.parent.name.split("--")
    return "/".join(names) if snapshots.name == "snapshots" and prefix == "models" and len(names) == 2 else None


def _serving(plan: Plan, recipe: Recipe | None) -> str:
    return plan.target.card_section() if recipe is None else plan.target.card_section(recipe.command)


def _source_card(checkpoint: Checkpoint) -> tuple[Mapping[str, Any], str]:
    """Return the metadata and the text of the source's card; metadata that cannot be read is dropped."""
    path = checkpoint.root / CARD
    if not path.is_file():
        return {}, ""
    try:
        with path.open("rb") as file:
            content = file.read(_CARD_BYTES + 1)
    except OSError as error:
        raise ConvertError(str(path), f"cannot be read ({error.strerror})", "check the file") from error
    text = content[:_CARD_BYTES].decode("utf-8", errors="replace")
    if len(content) > _CARD_BYTES:
        text += "\n\n*The source's card is longer than this.*"
    match = _FRONT_MATTER.match(text)
    if match is None:
        return {}, text.strip()
    metadata = None
    if len(match["yaml"]) <= _FRONT_MATTER_CHARS:
        try:
            # BaseLoader knows strings, lists and mappings only: `language: no` stays Norwegian.
            metadata = yaml.load(match["yaml"], Loader=yaml.BaseLoader)  # noqa: S506
        except (yaml.YAMLError, RecursionError):
            metadata = None
    return metadata if isinstance(metadata, dict) else {}, text[match.end() :].strip()


def _metadata(checkpoint: Checkpoint, source: Mapping[str, Any], scheme: str) -> dict[str, Any]:
    """Return our metadata: base model, licence, language and task of the source, and tags of both."""
    found: dict[str, Any] = {}
    # The source's own base model, where it names one, puts this one beside it among the quantizations of that.
    base = [name for name in _strings(source.get("base_model")) if _HUB_ID.fullmatch(name)]
    base = base or [name for name in [hub_id(checkpoint)] if name]
    if base:
        found |= {"base_model": base if len(base) > 1 else base[0], "base_model_relation": "quantized"}
    found["library_name"] = "vllm"
    for key in _CARRIED:
        values = _strings(source.get(key))
        if values:
            found[key] = values[0] if len(values) == 1 else values
    tags = (tag for tag in _strings(source.get("tags")) if tag.lower() not in _OUTDATED_TAGS)
    found["tags"] = list(dict.fromkeys((*_TAGS[scheme], *tags)))
    return found


def _strings(value: object) -> list[str]:
    """Return a metadata value that is a string or a list of strings as a list, without what is too long to be one."""
    values = value if isinstance(value, list) else [value]
    return [item for item in values if isinstance(item, str) and 0 < len(item) <= 200][:100]


def _introduction(checkpoint: Checkpoint, plan: Plan, recipe: Recipe | None) -> str:
    source = hub_id(checkpoint)
    # A name may be no UTF-8, or no text where Python takes the system's names for ASCII.
    here = os.fsencode(checkpoint.root.resolve().name).decode(errors="replace")
    name = source.rpartition("/")[2] if source else here
    link = f"[{source}](https://huggingface.co/{source})" if source else f"`{name}`"
    return (
        f"# {name}, {plan.target.SCHEME}\n\n"
        f"{_SCHEMES[plan.target.SCHEME]}"
        f" {'Converted' if recipe is None else 'Quantized'} from {link}"
        f" ({plan.source.NAME}) by w4a8-convert {__version__};"
        f" {'no calibration data was used.' if recipe is None else recipe.sentence}"
    )


def _figures(plan: Plan, stats: Sequence[LayerStats | None], recipe: Recipe | None) -> str:
    converted = [(layer, s) for layer, s in zip(plan.layers, stats, strict=True) if s is not None]
    kept_codes = sum(s.codes_kept for _, s in converted)
    new = len(converted) - kept_codes
    rows = [
        ("layers converted", counted(len(converted), "layer")),
        ("INT4 codes kept, value for value", counted(kept_codes, "layer")),
    ]
    if new:
        rows.append(
            (
                "new INT4 codes",
                f"{counted(new, 'layer')}; error {_error([s for _, s in converted if not s.codes_kept])}",
            )
        )
    kept = len(stats) - len(converted)
    if kept:
        rows.append(("kept in BF16", counted(kept, "layer")))
        rows += [
            (f"… {_cell(kind.kind)}", f"{counted(kind.count, 'layer')}, first {markdown_code(kind.names[0])}")
            for kind in plan.sixteen_bits
            if not kind.of_source
        ]
    if plan.carried:
        rows.append(("carried over in FP8, byte for byte", counted(len(plan.carried), "layer")))
    rows += [("FP8 scales", _SCALES[plan.options.scales])] if recipe is None else recipe.rows
    if converted:
        worst, least = min(converted, key=lambda pair: pair[1].sqnr_db)
        rows += [
            ("error of all layers converted", _error([s for _, s in converted])),
            ("worst layer", f"{markdown_code(worst.module)}, {_decibels(least.sqnr_db)}"),
        ]
    if plan.left_out:
        rows.append(("files of the source that are not here", _left_out(plan)))
    rows += [
        ("size of the tensors", f"{human_bytes(plan.nbytes_in)} before, {human_bytes(plan.nbytes_out)} now"),
        ("weights in GPU memory", human_bytes(plan.serving_nbytes)),
    ]
    return (
        "## What was done\n\n"
        + _table(rows)
        + "\n\nErrors are signal-to-noise ratios of the weights that the GPU multiplies by against the source's"
        " weights, estimated from a sample of the codes: 30 dB is a relative error of 3.2 %, 20 dB one of 10 %."
    )


def _left_out(plan: Plan) -> str:
    more = f" and {len(plan.left_out) - _LISTED} more" if len(plan.left_out) > _LISTED else ""
    return ", ".join(markdown_code(item.path) for item in plan.left_out[:_LISTED]) + more


def _error(stats: Sequence[LayerStats]) -> str:
    finite = [s.sqnr_db for s in stats if math.isfinite(s.sqnr_db)]
    return f"mean {_decibels(fmean(finite))}, worst {_decibels(min(finite))}" if finite else "none"


def _decibels(value: float) -> str:
    return f"{value:.1f} dB" if math.isfinite(value) else "no error"


def _cell(text: str) -> str:
    return re.sub(r"[|`<>\[\]]", "?", printable(text))


def table_row(name: str, value: str) -> str:
    """Return a row of a card's table."""
    return f"| {name} | {value} |"


def _table(rows: Sequence[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(table_row(*row) for row in rows)])
