"""Every input format through every output format: convert, then read the output without this package.

The weights are known from the factories; the readers here are compressed-tensors and, for `lut`, the formulas of
docs/format.md written out element by element.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_name
from factories import CASES, SEVENS, Case, Checkpoint
from factories.layers import Layer
from numpy.typing import NDArray
from safetensors import safe_open

from convert_w4a8.cli.convert import convert_command as convert
from convert_w4a8.cli.main import main

FORMATS = ("lut", "compressed-tensors")
KEPT_DB = 25.0
"""Less than what is left where codes are kept and scales are rounded to FP8; with other codes it is under 10 dB."""


@dataclass(frozen=True)
class Converted:
    """A checkpoint, what became of it, and its tensors under the names that vLLM expects."""

    case: Case
    form: str
    source: Checkpoint
    out: Path
    tensors: dict[str, torch.Tensor]
    config: dict[str, Any]

    @property
    def layers(self) -> dict[str, Layer]:
        """The layers that must be W4A8 in the output, by their name there."""
        kept = {m: layer for m, layer in self.source.layers.items() if not m.endswith(self.case.dequantized or ("\0",))}
        return {served_name(m, self.source): layer for m, layer in kept.items()}


def served_name(name: str, source: Checkpoint) -> str:
    """Return the name that vLLM's model expects: its Mixtral knows only Mistral's own."""
    if source.model.config["model_type"] != "mixtral":
        return name
    own = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    name = re.sub(r"\.mlp\.experts\.(\d+)\.(\w+)", lambda m: f".block_sparse_moe.experts.{m[1]}.{own[m[2]]}", name)
    return name.replace(".mlp.gate", ".block_sparse_moe.gate")


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read every tensor of a directory with safetensors' own reader."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            assert handle.metadata() == {"format": "pt"}
            tensors |= {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - not a dict
    return tensors


def run_convert(*arguments: object) -> str:
    """Run `w4a8-convert` and return its standard output."""
    result = CliRunner().invoke(convert, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


WORKING = [case for case in (*CASES, *SEVENS) if not case.refused]


@pytest.fixture(
    scope="module",
    params=[pytest.param((case, form), id=f"{case.id}-to-{form}") for case in WORKING for form in FORMATS],
)
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """Convert one case into one format, by the command line."""
    case, form = request.param
    root = tmp_path_factory.mktemp("e2e")
    source = case.write(root / "in")
    out = root / "out"
    run_convert(source.path, out, "--format", form, "--scales", "reference", "--quiet", *case.needs)
    config = json.loads((out / "config.json").read_text())
    return Converted(case, form, source, out, read_tensors(out), config)


def decode_lut(
    packed: torch.Tensor, scale: torch.Tensor, channel: torch.Tensor
) -> tuple[NDArray[np.int8], torch.Tensor]:
    """Read one layer of the `lut` format by its specification: signed codes [N, K], and weights float32 [N, K]."""
    n, k = packed.shape[1] // 4, packed.shape[0] * 32
    memory = packed.numpy().view(np.uint8)
    rows, columns = np.arange(n)[:, None], np.arange(k)[None, :]
    r, c = rows % 16, columns % 32
    thread = (r % 8) * 4 + (c % 16) // 4
    value = (c % 4) + 4 * (r // 8) + 8 * (c // 16)
    index = (rows // 16 + (columns // 32) * (n // 16)) * 512 + thread * 16 + value
    nibble = (memory.ravel()[index // 2] >> (4 * (index % 2)).astype(np.uint8)) & 15
    # Two's complement, except that 1 … 7 are stored as 8 − v.
    signed = np.array([0, 7, 6, 5, 4, 3, 2, 1, -8, -7, -6, -5, -4, -3, -2, -1], dtype=np.int8)
    codes = signed[nibble]
    per_weight = scale.float().T.repeat_interleave(128, dim=1)
    entries = (per_weight * torch.from_numpy(codes.astype(np.float32))).to(torch.float8_e4m3fn).float()
    return codes, entries * channel[:, None]


def decode(converted: Converted, module: str) -> tuple[NDArray[np.int8], NDArray[np.float64]]:
    """Read one layer of the output: signed codes [N, K] and weights [N, K]."""
    t = converted.tensors
    if converted.form == "lut":
        parts = (f"{module}.weight_packed", f"{module}.weight_scale", f"{module}.weight_chan_scale")
        codes, weight = decode_lut(*(t[part] for part in parts))
        return codes, weight.double().numpy()
    shape = t[f"{module}.weight_shape"]
    unpacked = unpack_from_int32(t[f"{module}.weight_packed"], 4, torch.Size(shape.tolist()))
    scale = t[f"{module}.weight_scale"].double().repeat_interleave(128, dim=1)
    return unpacked.numpy(), (unpacked.double() * scale).numpy()


def sqnr_db(weight: NDArray[np.float64], truth: NDArray[np.float64]) -> float:
    """Signal-to-noise ratio against the truth, in dB."""
    noise = float(np.square(weight - truth).sum())
    return 10 * np.log10(np.square(truth).sum() / noise) if noise else np.inf


def round_symmetrically(weight: NDArray[np.float64]) -> NDArray[np.float64]:
    """Round to symmetric INT4 in groups of 128 in the simplest way: scale amax / 7.5, in full precision."""
    groups = weight.reshape(len(weight), -1, 128)
    scale = np.abs(groups).max(axis=-1, keepdims=True) / 7.5
    rounded: NDArray[np.float64] = np.clip(np.round(groups / scale), -8, 7) * scale
    return rounded.reshape(weight.shape)


def test_weights_are_the_ones_that_were_meant(converted: Converted) -> None:
    """Codes survive where they can, BF16 scales with them; where they cannot, the new ones are better than simple ones.

    That is so even after the scales are rounded to FP8, which the simple ones are spared. Zero-points of 7 turn the
    signs of both, and of nothing else.
    """
    assert converted.layers
    for module, layer in converted.layers.items():
        codes, weight = decode(converted, module)
        if converted.case.requantized:
            assert sqnr_db(weight, layer.weight) > sqnr_db(round_symmetrically(layer.weight), layer.weight), module
        else:
            negated = bool((layer.zeros == 7).all())
            values = layer.codes.astype(np.int8) - (7 if negated else 8)
            assert np.array_equal(codes, -values if negated else values), module
            assert sqnr_db(weight, layer.weight) > KEPT_DB, module
            if converted.form == "compressed-tensors":
                repeats = layer.codes.shape[1] // 128 // layer.scales.shape[0]
                scales = -layer.scales if negated else layer.scales
                expected = scales.bfloat16().T.repeat_interleave(repeats, dim=1)
                assert torch.equal(converted.tensors[f"{module}.weight_scale"], expected), module


def test_tensors_are_those_of_the_format_and_nothing_else(converted: Converted) -> None:
    """Each layer has the format's tensors in its dtypes and shapes; the others keep bytes, or FP16 becomes BF16."""
    rest = dict(converted.tensors)
    for module, layer in converted.layers.items():
        n, k = layer.codes.shape
        if converted.form == "lut":
            expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
                "weight_packed": (torch.int32, (k // 32, 4 * n)),
                "weight_scale": (torch.float8_e4m3fn, (k // 128, n)),
                "weight_chan_scale": (torch.float32, (n,)),
            }
        else:
            expected = {
                "weight_packed": (torch.int32, (n, k // 8)),
                "weight_scale": (torch.bfloat16, (n, k // 128)),
                "weight_shape": (torch.int64, (2,)),
            }
        for part, (dtype, shape) in expected.items():
            tensor = rest.pop(f"{module}.{part}")
            assert (tensor.dtype, tuple(tensor.shape)) == (dtype, shape), (module, part)
    for name, stored in converted.source.dense.items():
        tensor = rest.pop(served_name(name, converted.source))
        assert torch.equal(tensor, stored.bfloat16() if stored.dtype == torch.float16 else stored), name
    for module, layer in converted.source.layers.items():
        if module.endswith(converted.case.dequantized or ("\0",)):
            assert torch.equal(rest.pop(f"{module}.weight"), torch.from_numpy(layer.weight).bfloat16()), module
    assert not rest


def test_files_are_complete(converted: Converted) -> None:
    """Side files are byte for byte those of the source but for the card, stale ones are gone, and so is the index."""
    files = {str(p.relative_to(converted.out)): p for p in converted.out.rglob("*") if p.is_file()}
    side_files = dict(converted.source.side_files)
    card = files.pop("README.md").read_text(encoding="utf-8")
    assert "w4a8" in card
    assert side_files.pop("README.md", b"").decode().rpartition("---\n")[2] in card
    for name, content in side_files.items():
        assert files.pop(name).read_bytes() == content
    assert set(files) == {"config.json", "model.safetensors"}


def test_config_says_what_was_done(converted: Converted) -> None:
    """config.json differs from the source's in its dtype and quantization alone, and names what is not quantized."""
    source = json.loads((converted.source.path / "config.json").read_text())
    ours = dict(converted.config)
    block = ours.pop("quantization_config")
    source.pop("quantization_config", None)
    assert ours == source | {converted.case.options.dtype_key: "bfloat16"}
    modules = [name.removesuffix(".weight") for name, t in converted.tensors.items() if t.ndim == 2]
    plain = {name for name in modules if f"{name}.weight" in converted.tensors and "embed" not in name}
    if converted.form == "lut":
        assert (block["quant_method"], block["version"]) == ("w4a8_lut", 1)
        assert set(block["ignore"]) == plain | {"lm_head"}
        return
    parsed = QuantizationConfig.model_validate(block)
    scheme = parsed.config_groups["group_0"]
    assert (scheme.weights.num_bits, scheme.weights.group_size, scheme.weights.symmetric) == (4, 128, True)
    assert (scheme.input_activations.type, scheme.input_activations.dynamic) == ("float", True)
    ignored = {name for name in {*plain, *converted.layers} if any(match_name(name, entry) for entry in parsed.ignore)}
    assert ignored == plain


def test_verify_agrees(converted: Converted) -> None:
    """`w4a8 verify` passes, and measures what this file measures."""
    result = CliRunner().invoke(main, ["verify", str(converted.out), "--source", str(converted.source.path), "--json"])
    assert result.exit_code == 0, result.output
    found = {layer["module"]: layer for layer in json.loads(result.stdout)["layers"]}
    assert found.keys() == converted.layers.keys()
    for module, layer in converted.layers.items():
        assert found[module]["clipped"] == 0
        if converted.form == "lut":
            _, weight = decode(converted, module)
            assert found[module]["sqnr_db"] == pytest.approx(sqnr_db(weight, layer.weight), abs=1e-3)


def test_inspect_tells_what_the_tensors_hold(converted: Converted) -> None:
    """`w4a8 inspect` counts the layers of both directories and sees zero-points and act-order that are really there."""
    for path, layers in (
        (converted.source.path, list(converted.source.layers.values())),
        (converted.out, list(converted.layers.values())),
    ):
        result = CliRunner().invoke(main, ["inspect", str(path), "--json"])
        assert result.exit_code == 0, result.output
        kinds = json.loads(result.stdout)["layers"]
        assert sum(kind["count"] for kind in kinds) == len(layers)
        is_source = path == converted.source.path
        assert any(kind["zero_points"] for kind in kinds) == (is_source and not layers[0].scheme.symmetric)
        assert any(kind["act_order"] for kind in kinds) == (is_source and layers[0].scheme.act_order)


REFUSED = [pytest.param(case, id=case.id) for case in CASES if case.refused or case.needs]


@pytest.mark.parametrize("case", REFUSED)
def test_problems_name_every_layer_and_the_remedy(case: Case, tmp_path: Path) -> None:
    """Without the option that it needs, nothing is written; every layer in question, or the first, has the remedy."""
    source = case.write(tmp_path / "in")
    result = CliRunner().invoke(convert, [str(source.path), str(tmp_path / "out")])
    assert result.exit_code == 1
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
    # vLLM serves merged layers together: those that are at fault are named.
    at_fault = [m for m in source.layers if m.endswith(case.refused or case.dequantized or ("",))]
    at_fault = [m for m in at_fault if not (case.id == "awq-odd-n" and m.endswith("q_proj"))]
    assert at_fault
    if case.id == "ct-two-groups-8-bit":  # other than INT4 and FP8: one line for the kind
        assert f"{at_fault[0]} and {len(at_fault) - 1} more:" in result.stderr
        at_fault = []
    for module in at_fault:
        assert f"{module}:" in result.stderr
    assert " ".join(case.needs) in result.stderr


def by_tables(packed: torch.Tensor, lut: torch.Tensor, channel: torch.Tensor) -> NDArray[np.float64]:
    """Read one layer whose tables are stored entry by entry: weights float64 [N, K]."""
    codes, _ = decode_lut(packed, torch.zeros(len(lut), len(channel)), channel)
    tables = lut.float().view(len(lut), len(channel), 8).numpy()
    group, channels = np.arange(codes.shape[1])[None, :] // 128, np.arange(len(codes))[:, None]
    entries = tables[group, channels, 8 - np.maximum(np.abs(codes), 1)]
    signed = np.sign(codes) * -entries
    weights: NDArray[np.float64] = signed.astype(np.float64) * channel.double().numpy()[:, None]
    return weights


CHOOSING = [
    ("gptq-v1", "lut", "search"),
    ("gptq-v1", "lut", "direct"),
    ("gptq-v1", "compressed-tensors", "search"),
    ("ct-per-channel-odd-k", "lut", "direct"),
    ("ct-per-channel-odd-k", "compressed-tensors", "search"),
    ("awq-zero-points", "lut", "search"),
    ("awq-zero-points", "lut", "direct"),
]


@pytest.mark.parametrize(("case_id", "form", "mode"), CHOOSING, ids=lambda value: value)
def test_chosen_scales_beat_the_reference(case_id: str, form: str, mode: str, tmp_path: Path) -> None:
    """`--scales search` and `direct` lower the error of every layer, by `w4a8 verify` and by our own reading.

    New codes are fitted to the scales in either mode, which leaves little to choose: no layer loses, within 0.05 dB.
    """
    case = next(case for case in CASES if case.id == case_id)
    source = case.write(tmp_path / "in")
    errors = {}
    for scales in ("reference", mode):
        out = tmp_path / scales
        run_convert(source.path, out, "--format", form, "--scales", scales, "--quiet", *case.needs)
        result = CliRunner().invoke(main, ["verify", str(out), "--source", str(source.path), "--json"])
        assert result.exit_code == 0, result.output
        layers = json.loads(result.stdout)["layers"]
        # JSON has no infinity: null is a layer without any error, as one scale a channel can be.
        errors[scales] = {layer["module"]: np.inf if layer["sqnr_db"] is None else layer["sqnr_db"] for layer in layers}
    assert errors[mode].keys() == errors["reference"].keys()
    for module, decibels in errors[mode].items():
        assert decibels > errors["reference"][module] - 0.05 * case.requantized, module
    assert sum(errors[mode].values()) > sum(errors["reference"].values())
    if mode == "direct":
        tensors = read_tensors(tmp_path / mode)
        for module, decibels in errors[mode].items():
            weight = by_tables(
                *(tensors[f"{module}.{part}"] for part in ("weight_packed", "weight_lut", "weight_chan_scale"))
            )
            assert decibels == pytest.approx(sqnr_db(weight, source.layers[module].weight), abs=1e-3)


@pytest.mark.parametrize("form", FORMATS)
def test_shards_are_cut_and_indexed(form: str, tmp_path: Path) -> None:
    """A small --max-shard-size gives numbered files under that size and an index that is right."""
    case = next(case for case in CASES if case.id == "gptq-qwen3-moe-sharded")
    source = case.write(tmp_path / "in")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_convert(source.path, whole, "--format", form, "--quiet")
    run_convert(source.path, cut, "--format", form, "--quiet", "--max-shard-size", "300KB")
    index = json.loads((cut / "model.safetensors.index.json").read_text())
    shards = sorted(p.name for p in cut.glob("*.safetensors"))
    assert shards == [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    assert len(shards) > 2
    expected, tensors = read_tensors(whole), read_tensors(cut)
    assert tensors.keys() == expected.keys() == index["weight_map"].keys()
    assert all(torch.equal(tensors[name].view(torch.uint8), expected[name].view(torch.uint8)) for name in expected)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert index["metadata"]["total_size"] == total
    for shard in shards:
        with safe_open(cut / shard, "pt") as handle:
            names = set(handle.keys())
        assert names == {name for name, file in index["weight_map"].items() if file == shard}
        size = sum(tensors[name].numel() * tensors[name].element_size() for name in names)
        assert size <= 300_000 or len(names) == 1


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    """`--dry-run` prints the plan and leaves the disk alone."""
    source = CASES[0].write(tmp_path / "in")
    text = run_convert(source.path, tmp_path / "out", "--dry-run")
    assert "awq" in text.lower()
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
