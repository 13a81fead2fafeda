"""The report: its numbers against plain arithmetic on known weights, its HTML and pictures as files, its command."""

import base64
import json
import shutil
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from factories import CASES, Checkpoint
from factories.layers import Layer
from numpy.typing import NDArray

from convert_w4a8 import __version__
from convert_w4a8.checkpoint.directory import open_checkpoint
from convert_w4a8.cli.convert import convert_command as convert
from convert_w4a8.cli.main import main
from convert_w4a8.conversion.plan import make_plan
from convert_w4a8.encoding.packing import pack_codes
from convert_w4a8.linear import Packing, W4A8Linear, W4Linear
from convert_w4a8.options import Options, ScalesMode
from convert_w4a8.report import html as report_html
from convert_w4a8.report.collect import Report, aggregate, as_dict, collect, short_kinds
from convert_w4a8.report.layers import LABELS, Distributions, Histogram, LayerReport, measure_layer
from convert_w4a8.report.memory import kv_cache, weight_memory
from convert_w4a8.report.pictures import _draw_sqnr, _wrapped, draw
from convert_w4a8.verification.proof import verify

PNG = b"\x89PNG\r\n\x1a\n"
NO_PICTURES = dict.fromkeys(("scales", "products", "sqnr"), PNG)
DENSE, MOE = ("gptq-v1", "gptq-qwen3-moe-sharded")
Doubles = NDArray[np.float64]


def e4m3(x: torch.Tensor) -> torch.Tensor:
    """Round to FP8, saturating, in float32."""
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).float()


def dense_weights(codes: torch.Tensor, f: torch.Tensor, channel: torch.Tensor) -> Doubles:
    """Return e4m3(f·v)·channel for unsigned codes [N, K], FP8 scales float32 [G, N]; float64 [N, K]."""
    per_weight = f.t().repeat_interleave(128, dim=1)
    entries = e4m3(per_weight * (codes.float() - 8))
    return (entries.double() * channel.double()[:, None]).numpy()


def naive(codes: torch.Tensor, scales: torch.Tensor) -> Doubles:
    """Return the weights after casting scales [G, N] to FP8 as they are (at most 448/8)."""
    return dense_weights(codes, e4m3(scales.float().clamp(max=56)), torch.ones(scales.shape[1]))


def reference(codes: torch.Tensor, scales: torch.Tensor) -> Doubles:
    """Return the weights after vLLM's column quantization."""
    c = (scales.float().amax(0) / 448).clamp(min=1 / (448 * 512))
    return dense_weights(codes, e4m3(e4m3(scales.float() / c) / 8), 8 * c)


def decibels(weights: Doubles, result: Doubles) -> float:
    """Return signal over noise in dB."""
    return float(10 * np.log10((weights**2).sum() / ((result - weights) ** 2).sum()))


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Checkpoint, Path]]:
    """Write and convert a dense model and a mixture of experts: the source and the output's path."""
    cases = {case.id: case for case in CASES}
    found = {}
    for name, scales in ((DENSE, "reference"), (MOE, "search")):
        root = tmp_path_factory.mktemp(name)
        source = cases[name].write(root / "in")
        run(convert, source.path, root / "out", "--scales", scales, "--quiet")
        found[name] = source, root / "out"
    return found


def run(command: Any, *arguments: object) -> Result:
    """Run a command that must succeed."""
    result = CliRunner().invoke(command, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def report_of(pair: tuple[Checkpoint, Path]) -> Report:
    """Collect the report of a converted checkpoint."""
    source, out = pair
    return collect(open_checkpoint(out), open_checkpoint(source.path))


@pytest.fixture(scope="module")
def dense(converted: dict[str, tuple[Checkpoint, Path]]) -> Report:
    """Return the report of the dense model."""
    return report_of(converted[DENSE])


@pytest.fixture(scope="module")
def moe(converted: dict[str, tuple[Checkpoint, Path]]) -> Report:
    """Return the report of the mixture of experts."""
    return report_of(converted[MOE])


def codes_and_scales(layer: Layer) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a symmetric layer's unsigned codes [N, K] and group scales [G, N]."""
    return torch.from_numpy(layer.codes), layer.scales


def test_sqnr_is_that_of_dense_arithmetic(converted: dict[str, tuple[Checkpoint, Path]], dense: Report) -> None:
    """Naive, reference and output (converted with reference scales) agree with the weights worked out one by one."""
    source, _ = converted[DENSE]
    assert {layer.module for layer in dense.layers} == set(source.layers)
    for layer in dense.layers:
        truth = source.layers[layer.module]
        codes, scales = codes_and_scales(truth)
        assert layer.sqnr_db["naive"] == pytest.approx(decibels(truth.weight, naive(codes, scales)), abs=1e-4)
        expected = decibels(truth.weight, reference(codes, scales))
        assert layer.sqnr_db["reference"] == pytest.approx(expected, abs=1e-4)
        assert layer.sqnr_db["output"] == pytest.approx(expected, abs=1e-4)
        assert layer.codes_kept


def test_sqnr_is_that_of_verify(converted: dict[str, tuple[Checkpoint, Path]], moe: Report) -> None:
    """What OUT holds is measured as `verify` measures it, which decodes every weight."""
    source, out = converted[MOE]
    checks = {c.module: c.sqnr_db for c in verify(open_checkpoint(out), open_checkpoint(source.path)).layers}
    assert {layer.module: layer.sqnr_db["output"] for layer in moe.layers} == pytest.approx(checks, abs=1e-3)


def test_scale_figures_are_those_of_the_bytes(converted: dict[str, tuple[Checkpoint, Path]], dense: Report) -> None:
    """Histogram, FP8 counts and distinct values of the source's scales come from every scale of every layer."""
    source, _ = converted[DENSE]
    scales = torch.cat([layer.scales.flatten() for layer in source.layers.values()]).float()
    bins = dense.distributions.scales["source"].bins()
    edges = np.array([low for low, _, _ in bins] + [bins[-1][1]])
    counts = np.bincount(np.digitize(scales.numpy(), edges, right=True) - 1, minlength=len(bins))
    assert [count for _, _, count in bins] == counts.tolist()
    values, times = torch.unique(e4m3(scales.clamp(max=56)), return_counts=True)
    assert as_dict(dense)["fp8_scales"]["naive"] == list(zip(values.tolist(), times.tolist(), strict=True))
    for layer in dense.layers:
        own = source.layers[layer.module].scales.float()
        assert layer.distinct["source"] == len(np.unique(own.numpy()))
        assert layer.distinct["naive"] == len(np.unique(e4m3(own).numpy()))
        c = own.amax(0) / 448
        assert layer.distinct["output"] == len(np.unique((e4m3(e4m3(own / c) / 8) * (8 * c)).numpy()))


def test_products_are_those_of_every_weight(converted: dict[str, tuple[Checkpoint, Path]], dense: Report) -> None:
    """|code|·s/c of every weight: how many there are, how many are 0, how many clip without and with the 1/8."""
    source, _ = converted[DENSE]
    products = []
    for layer in source.layers.values():
        codes, scales = codes_and_scales(layer)
        x = (scales.double() / (scales.double().amax(0) / 448)).t().repeat_interleave(128, dim=1)
        products.append((x * (codes.double() - 8).abs()).flatten())
    every = torch.cat(products)
    histogram = dense.distributions.products
    assert histogram.total == every.numel()
    assert histogram.zeros == int((every == 0).sum())
    beyond = 448 * (1 + 1e-6)
    assert histogram.share_above(448) == pytest.approx(float((every > beyond).double().mean()), rel=1e-12)
    assert 0.3 < histogram.share_above(448) < 0.9
    assert as_dict(dense)["products"]["clipped_with_eighth"] == 0
    assert dense.distributions.clipped == 0


KINDS = {
    "symmetric": {},
    "groups-of-256": {"group_size": 256},
    "zero-points": {"zeros": True},
    "groups-of-64": {"group_size": 64},
    "activation-order": {"g_idx": True},
}


def random_layer(*, group_size: int = 128, zeros: bool = False, g_idx: bool = False) -> tuple[W4Linear, Doubles]:
    """Return a random layer of 32 × 512 and its weights in float64."""
    generator = torch.Generator().manual_seed(group_size + zeros + 2 * g_idx)
    n, k = 32, 512
    groups = k // group_size
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=generator)
    scales = (torch.rand(groups, n, generator=generator) * 0.01 + 0.001).half()
    points = torch.randint(0, 16, (groups, n), dtype=torch.uint8, generator=generator) if zeros else None
    index = torch.arange(k) // group_size
    if g_idx:
        index = index[torch.randperm(k, generator=generator)]
    layer = W4Linear(
        pack_codes(codes), Packing.PACK_QUANTIZED, scales, points, index.int() if g_idx else None, group_size
    )
    offset = torch.full((groups, n), 8.0) if points is None else points.float()
    weights = (codes.double() - offset.double()[index].t()) * scales.double()[index].t()
    return layer, weights.numpy()


@pytest.mark.parametrize("stored_tables", [False, True], ids=["scales", "stored-tables"])
@pytest.mark.parametrize("kind", KINDS)
def test_any_layer_is_measured_against_its_own_weights(kind: str, *, stored_tables: bool) -> None:
    """Codes that OUT chose itself, and baselines from amax/7.5 where the source's codes cannot be kept."""
    w, weights = random_layer(**KINDS[kind])  # type: ignore[arg-type]
    n, k = w.shape_nk
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=generator)
    channel = torch.rand(n, generator=generator) * 1e-3
    if stored_tables:
        table = e4m3(-torch.rand(k // 128, n, 8, generator=generator) * 400)
        w4a8 = W4A8Linear(pack_codes(codes), Packing.PACK_QUANTIZED, None, table.to(torch.float8_e4m3fn), channel)
        by_code = torch.cat((table, torch.zeros(k // 128, n, 1), -table[..., 1:].flip(-1)), dim=-1).transpose(0, 1)
        entries = by_code.gather(-1, codes.view(n, -1, 128).long()).flatten(1)
        output = (entries.double() * channel.double()[:, None]).numpy()
    else:
        f = e4m3(torch.rand(k // 128, n, generator=generator) * 56)
        w4a8 = W4A8Linear(pack_codes(codes), Packing.PACK_QUANTIZED, f.to(torch.float8_e4m3fn), None, channel)
        output = dense_weights(codes, f, channel)
    measured = measure_layer("model.layers.3.mlp.experts.7.up_proj", w, w4a8, Distributions())
    assert measured.sqnr_db["output"] == pytest.approx(decibels(weights, output), abs=1e-4)
    assert (measured.kind, measured.block) == ("model.layers.mlp.experts.up_proj", 3)
    assert measured.codes_kept == (kind in {"symmetric", "groups-of-256"})
    if measured.codes_kept:
        own, scales = (
            torch.from_numpy(np.rint(weights / repeated(w)) + 8),
            w.scales.repeat_interleave(w.group_size // 128, 0),
        )
    else:
        groups = torch.from_numpy(weights).float().view(n, -1, 128)
        scales = (groups.abs().amax(-1) / 7.5).t()
        own = (groups / scales.t()[..., None]).round().clamp(-8, 7).flatten(1) + 8
    assert measured.sqnr_db["naive"] == pytest.approx(decibels(weights, naive(own, scales)), abs=1e-4)
    assert measured.sqnr_db["reference"] == pytest.approx(decibels(weights, reference(own, scales)), abs=1e-4)


def repeated(w: W4Linear) -> Doubles:
    """Return the scale of every weight, float64 [N, K], for contiguous groups."""
    return w.scales.double().t().repeat_interleave(w.group_size, dim=1).numpy()


def test_stored_tables_are_shown_by_their_nearest_scale() -> None:
    """A table of exact multiples of f counts as f times the channel scale; the FP8 counts are those of its entries."""
    w, _ = random_layer()
    f = torch.tensor([1.0, 0.5]).repeat(4, 16)
    table = (f[..., None] * torch.arange(-8, 0)).to(torch.float8_e4m3fn)
    figures = Distributions()
    measure_layer("a", w, W4A8Linear(w.packed, w.packing, None, table, torch.full((32,), 0.03)), figures)
    found = {
        low: count for low, high, count in figures.scales["output"].bins() for s in (0.03, 0.015) if low < s < high
    }
    assert list(found.values()) == [64, 64]
    assert int(figures.fp8["output"].sum()) == 8 * f.numel()
    assert int(figures.fp8["output"][0x50]) == 64  # 8.0, only from 1.0·8


def test_blocks_of_output_channels_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer measured 16 channels at a time gives the same numbers as in one piece."""
    w, _ = random_layer(zeros=True)
    f = torch.full((4, 32), 8.0).to(torch.float8_e4m3fn)
    w4a8 = W4A8Linear(w.packed, w.packing, f, None, torch.full((32,), 1e-3))
    whole, parts = Distributions(), Distributions()
    expected = measure_layer("a", w, w4a8, whole)
    monkeypatch.setattr("convert_w4a8.encoding.dequantize.BLOCK_WEIGHTS", 16 * 512)
    measured = measure_layer("a", w, w4a8, parts)
    assert measured.sqnr_db == pytest.approx(expected.sqnr_db, rel=1e-9)
    assert torch.equal(parts.products.counts, whole.products.counts)


def test_histogram_bins_hold_equally_many_numbers_of_every_format() -> None:
    """All positive finite FP8, BF16 and FP16 values: as many in each bin of an octave; the top is inclusive."""
    for dtype, per_bin in ((torch.bfloat16, 8), (torch.float16, 64)):
        octave = torch.tensor([1.0, 2.0], dtype=dtype).view(torch.int16)
        histogram = Histogram()
        histogram.add(torch.arange(int(octave[0]) + 1, int(octave[1]) + 1, dtype=torch.int16).view(dtype).float())
        assert histogram.bins() == [(1 + i / 16, 1 + (i + 1) / 16, per_bin) for i in range(16)]
    histogram = Histogram()
    histogram.add(torch.tensor([0.0, 448.0, 448.0001, 449.0]), torch.tensor([5.0, 2.0, 1.0, 1.0]))
    assert (histogram.zeros, histogram.total) == (5, 9)
    assert histogram.share_above(448) == pytest.approx(1 / 9)


def test_layers_are_gathered_by_projection_and_block(moe: Report) -> None:
    """Experts of a block are one spot with mean and least; attention comes before the experts, gate before down."""
    spots = aggregate(moe.layers)
    assert sum(spot.count for spot in spots) == len(moe.layers)
    for spot in spots:
        alike = [
            layer.sqnr_db["output"] for layer in moe.layers if (layer.kind, layer.block) == (spot.kind, spot.block)
        ]
        assert spot.mean["output"] == pytest.approx(sum(alike) / len(alike))
        assert spot.least["output"] == min(alike)
    names = list(short_kinds(moe.layers).values())
    assert names[:4] == [f"self_attn.{x}_proj" for x in "qkvo"]
    assert names[4:] == [f"mlp.experts.{x}_proj" for x in ("gate", "up", "down")]


def test_weight_memory_is_that_of_the_plan(converted: dict[str, tuple[Checkpoint, Path]], moe: Report) -> None:
    """Served size as the plan promised it; the 16-bit size from the source's shapes."""
    source, _ = converted[MOE]
    plan = make_plan(open_checkpoint(source.path), Options(scales=ScalesMode.SEARCH))
    assert moe.weights.int4 == plan.serving_nbytes
    weights = sum(layer.codes.size for layer in source.layers.values())
    rest = sum(2 * tensor.numel() for tensor in source.dense.values())
    assert moe.weights.bf16 == 2 * weights + rest
    assert moe.weights.int8 == weights + 4 * sum(len(layer.codes) for layer in source.layers.values()) + rest


LLAMA_3_8B = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "max_position_embeddings": 8192,
}
GEMMA_LIKE = {
    "num_hidden_layers": 6,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "sliding_window": 1024,
    "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
}


@pytest.mark.parametrize(
    ("config", "bytes_per_token"),
    [
        pytest.param(LLAMA_3_8B, 131_072, id="llama-3-8b"),
        pytest.param({"vision_config": {}, "text_config": LLAMA_3_8B}, 131_072, id="nested-text-config"),
        pytest.param({**LLAMA_3_8B, "num_key_value_heads": None}, 524_288, id="llama-without-kv-heads"),
        pytest.param(
            {"num_hidden_layers": 28, "num_key_value_heads": 4, "head_dim": 128, "sliding_window": 131072,
             "use_sliding_window": False},
            57_344,
            id="window-switched-off",
        ),
        # 70.272 kB a token: DeepSeek-V3's published figure.
        pytest.param(
            {"num_hidden_layers": 61, "num_key_value_heads": 128, "kv_lora_rank": 512, "qk_rope_head_dim": 64},
            70_272,
            id="deepseek-v3-latent",
        ),
    ],
)  # fmt: skip
def test_kv_cache_per_token(config: dict[str, Any], bytes_per_token: int) -> None:
    """Known models have their known KV cache in BF16."""
    kv = kv_cache(config)
    assert kv.unknown is None
    assert 2 * kv.per_token == bytes_per_token
    assert "upper bound" not in kv.note


def test_kv_cache_per_sequence_ends_at_the_longest_context() -> None:
    """4k and the model's own limit, not 32k where the model cannot go there."""
    assert kv_cache(LLAMA_3_8B).per_sequence == {4096: 4096 * 65_536, 8192: 8192 * 65_536}
    assert list(kv_cache({**LLAMA_3_8B, "max_position_embeddings": 131_072}).per_sequence) == [4096, 32768, 131_072]


def test_kv_cache_of_sliding_layers_stops_growing() -> None:
    """A layer with a window keeps the window; where it is not said which layers have one, a bound is given."""
    kv = kv_cache(GEMMA_LIKE)
    assert kv.per_sequence[32768] == 1024 * (32768 + 5 * 1024)
    assert "window of 1,024" in kv.note
    assert "upper bound" in kv_cache({**LLAMA_3_8B, "sliding_window": 4096}).note


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({}, id="empty"),
        pytest.param({**LLAMA_3_8B, "model_type": "falcon", "num_key_value_heads": None}, id="no-kv-heads"),
        pytest.param({**LLAMA_3_8B, "num_key_value_heads": [8, 4]}, id="kv-heads-by-layer"),
        pytest.param({**LLAMA_3_8B, "hidden_size": None}, id="no-head-dim"),
        pytest.param({**LLAMA_3_8B, "num_kv_shared_layers": 10}, id="shared-caches"),
        pytest.param({**GEMMA_LIKE, "layer_types": ["linear_attention"] * 6}, id="linear-attention"),
        pytest.param({**GEMMA_LIKE, "sliding_window": None}, id="sliding-without-window"),
        pytest.param({**GEMMA_LIKE, "layer_types": ["full_attention"]}, id="wrong-number-of-layers"),
        pytest.param({"num_hidden_layers": 61, "kv_lora_rank": 512}, id="latent-without-rope-dim"),
    ],
)
def test_kv_cache_is_not_guessed(config: dict[str, Any]) -> None:
    """What config.json does not tell is named, and no figure is given."""
    kv = kv_cache(config)
    assert kv.unknown
    assert not kv.per_sequence


class Page(HTMLParser):
    """Checks that tags close in order, and collects images, text and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[str] = []
        self.text = ""
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note a tag, and an image's source."""
        self.tags.add(tag)
        if tag not in {"meta", "img"}:
            self.open.append(tag)
        if tag == "img":
            assert dict(attrs)["alt"]
            self.images.append(dict(attrs)["src"] or "")

    def handle_endtag(self, tag: str) -> None:
        """Check that it closes the tag opened last."""
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Collect text."""
        self.text += data


@pytest.mark.parametrize("name", [DENSE, MOE])
def test_html_needs_nothing_else(name: str, converted: dict[str, tuple[Checkpoint, Path]], tmp_path: Path) -> None:
    """One file whose tags close, with three embedded PNGs, no script and no address; the same PNGs in a directory."""
    source, out = converted[name]
    html, pictures = tmp_path / "new" / "report.html", tmp_path / "png"
    result = run(main, "report", out, "--source", source.path, "--html", html, "--png-dir", pictures)
    assert "this checkpoint" in result.stdout
    text = html.read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    page.close()
    assert page.open == []
    assert not page.tags & {"script", "link", "iframe"}
    assert "http://" not in text
    assert "https://" not in text
    assert "url(" not in text
    embedded = [base64.b64decode(image.removeprefix("data:image/png;base64,"), validate=True) for image in page.images]
    assert all(image.startswith(PNG) for image in embedded)
    files = {path.name: path.read_bytes() for path in pictures.iterdir()}
    assert set(files) == {"scales.png", "products.png", "sqnr.png"}
    assert set(embedded) == set(files.values())
    assert f"{report_of(converted[name]).layers[0].sqnr_db['output']:.2f}" in page.text


def test_html_escapes_names(dense: Report) -> None:
    """A name is text, whatever it contains."""
    named = replace(dense, name="a<script>&b")
    page = Page()
    page.feed(report_html.render(named, NO_PICTURES))
    assert "script" not in page.tags
    assert "a<script>&b" in page.text


def test_pictures_are_drawn_of_a_layer_without_loss() -> None:
    """Infinite SQNR, a single layer and a single scale can be drawn; JSON has no infinity."""
    codes = torch.full((16, 128), 9, dtype=torch.uint8)
    w = W4Linear(pack_codes(codes), Packing.PACK_QUANTIZED, torch.full((1, 16), 0.5).half(), None, None, 128)
    w4a8 = W4A8Linear(
        pack_codes(codes),
        Packing.PACK_QUANTIZED,
        torch.full((1, 16), 0.5).to(torch.float8_e4m3fn),
        None,
        torch.ones(16),
    )
    figures = Distributions()
    layer: LayerReport = measure_layer("proj", w, w4a8, figures)
    assert layer.sqnr_db["output"] == float("inf")
    found = synthetic(layer, figures)
    assert all(png.startswith(PNG) for png in draw(found).values())
    assert json.loads(json.dumps(as_dict(found), allow_nan=False))["sqnr_db"]["output"]["mean"] is None


def synthetic(layer: LayerReport, figures: Distributions) -> Report:
    """Return a report of one layer."""
    return Report(
        name="one", source_name="in", converted_with=None, source_format="gptq", target_format="lut",
        scales_mode=None, layers=(layer,), dequantized=(), distributions=figures, stored_tables=False,
        weights=weight_memory([(16, 128)], 0), kv=kv_cache({}), nbytes_in=1, nbytes_out=1, warnings=(),
    )  # fmt: skip


def test_json_has_the_figures_and_needs_no_matplotlib(
    converted: dict[str, tuple[Checkpoint, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--json` alone prints one document with every layer, the histograms and the memory table."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    source, out = converted[DENSE]
    found = json.loads(run(main, "report", out, "--source", source.path, "--json").stdout)
    assert len(found["layers"]) == len(source.layers)
    groups = sum(layer.scales.numel() for layer in source.layers.values())
    for histogram in found["group_scales"].values():
        assert sum(count for _, _, count in histogram["bins"]) + histogram["zeros"] == groups
    assert sum(count for _, count in found["fp8_scales"]["output"]) == groups
    assert found["kv_cache"]["unknown"] is None


def test_missing_matplotlib_is_named(
    converted: dict[str, tuple[Checkpoint, Path]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without matplotlib the command says how to install it, before it reads anything."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    source, out = converted[DENSE]
    result = CliRunner().invoke(main, ["report", str(out), "--source", str(source.path), "--html", str(tmp_path / "r")])
    assert result.exit_code == 1
    assert "pip install './w4a8-convert[report]'" in result.stderr
    assert not (tmp_path / "r").exists()


def test_the_summary_is_text_and_needs_no_matplotlib(
    converted: dict[str, tuple[Checkpoint, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --html, --png-dir or --json it is all that is printed; no file is written."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    source, out = converted[DENSE]
    before = sorted(out.parent.rglob("*"))
    lines = run(main, "report", out, "--source", source.path).stdout.splitlines()
    assert lines[0].split() == ["scales", "mean", "dB", "least", "dB", "in"]
    assert [line.split("  ")[0] for line in lines[2:5]] == list(LABELS.values())
    assert lines[-1].startswith("memory ")
    assert sorted(out.parent.rglob("*")) == before


def test_the_page_says_where_it_is_from(dense: Report) -> None:
    """The source's name, what converted it, the date in UTC and our version; the JSON has all but the date."""
    made = datetime(2026, 1, 31, 23, 30, tzinfo=timezone(timedelta(hours=-2)))
    page = Page()
    page.feed(report_html.render(dense, NO_PICTURES, made))
    assert (
        f"Source: in, converted with w4a8-convert {__version__}. Measured on 2026-02-01 01:30 UTC with w4a8-convert"
        f" {__version__}."
    ) in page.text
    assert "converted with" not in report_html.render(replace(dense, converted_with=None), NO_PICTURES)
    today = datetime.now(UTC).strftime("%Y-%m-%d")
    assert f"Measured on {today}" in report_html.render(dense, NO_PICTURES)
    document = as_dict(dense)
    assert (document["source_name"], document["version"]) == ("in", __version__)


def test_a_checkpoint_in_the_hubs_cache_goes_by_its_id(
    converted: dict[str, tuple[Checkpoint, Path]], tmp_path: Path
) -> None:
    """Its directory there has the name of a commit."""
    source, out = converted[DENSE]
    snapshots = tmp_path / "models--org--some-name" / "snapshots"
    shutil.copytree(source.path, snapshots / ("0123456789abcdef" * 2))
    found = collect(open_checkpoint(out), open_checkpoint(snapshots / ("0123456789abcdef" * 2)))
    assert found.source_name == "org/some-name@0123456789ab"


EVIL = ["a$x_{\\frac", "$\\alpha$", "\x1b[31m\n\x00", "\u202eevil", "\u4e2d\u6587", "_x_", "x" * 1000]
"""Formulas that are and are none, controls, a change of writing direction, letters that the font lacks, a flood."""


@pytest.mark.slow
@pytest.mark.parametrize("name", EVIL, ids=ascii)
def test_any_name_can_be_shown(name: str, dense: Report) -> None:
    """In the pictures as it is, and never as a formula; in the page without control characters."""
    layers = tuple(
        replace(layer, kind=layer.kind.replace("mlp", name), module=layer.module.replace("mlp", name))
        for layer in dense.layers
    )
    evil = replace(dense, layers=layers, name=name, source_name=name)
    pictures = draw(evil)
    assert all(png.startswith(PNG) for png in pictures.values())
    text = report_html.render(evil, pictures)
    Page().feed(text)
    assert all(character.isprintable() or character == "\n" for character in text)


@pytest.mark.parametrize("name", ["$x$", "a_b", "\\alpha"])
def test_names_are_no_formulas(name: str, dense: Report) -> None:
    """The title of a picture is the name, letter by letter, and how many layers there are in a block."""
    figure = _draw_sqnr(replace(dense, layers=tuple(replace(x, kind=name) for x in dense.layers)))
    title = figure.axes[0].title
    assert not title.get_parse_math()
    assert title.get_text() == f"{name} × 7"


def test_controls_are_escaped_in_pictures(dense: Report) -> None:
    """A title is one text of printable characters, broken into four short lines at most."""
    for name in ("\x1b[31m\n\x00", "x" * 1000, "a." * 500):
        figure = _draw_sqnr(replace(dense, layers=tuple(replace(x, kind=name) for x in dense.layers)))
        lines = figure.axes[0].title.get_text().splitlines()
        assert len(lines) <= 4
        assert all(line.isprintable() and len(line) < 40 for line in lines)
    assert "\\x1b[31m\\n\\x00" in _wrapped("\x1b[31m\n\x00")


def limits(report: Report) -> list[Any]:
    """Return the lines at 25 dB that a picture has."""
    return [line for axes in _draw_sqnr(report).axes for line in axes.lines if list(line.get_ydata()) == [25.0, 25.0]]


def test_the_limit_is_drawn_where_it_holds(dense: Report) -> None:
    """One line in the picture of each projection whose codes are kept, named in the legend and under the picture."""
    kinds = {layer.kind for layer in dense.layers}
    assert len(limits(dense)) == len(kinds)
    legend = _draw_sqnr(dense).legends[0]
    assert "least with kept codes (25 dB)" in [text.get_text() for text in legend.get_texts()]
    assert "line at 25 dB" in report_html.render(dense, NO_PICTURES)
    new = replace(dense, layers=tuple(replace(layer, codes_kept=False) for layer in dense.layers))
    assert limits(new) == []
    assert "line at 25 dB" not in report_html.render(new, NO_PICTURES)
    first = dense.layers[0].kind
    mixed = replace(dense, layers=tuple(replace(x, codes_kept=x.kind == first) for x in dense.layers))
    assert len(limits(mixed)) == 1


def test_a_page_fits_a_telephone(dense: Report) -> None:
    """What is wider than the page scrolls by itself: every table and picture lies in such a box.

    That nothing sticks out at 390 pixels was seen in Chromium.
    """
    text = report_html.render(dense, NO_PICTURES)
    assert text.count("<table>") == text.count('<div class="scroll"><table>') > 3
    assert text.count("<img ") == text.count('<div class="scroll"><img ') == 3
    assert ".scroll { overflow-x: auto; }" in text
    assert "overflow-wrap: anywhere" in text
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text


def test_foreign_source_is_refused(converted: dict[str, tuple[Checkpoint, Path]]) -> None:
    """An output of another model is a user's error in one line."""
    (_, out), (foreign, _) = converted[DENSE], converted[MOE]
    result = CliRunner().invoke(main, ["report", str(out), "--source", str(foreign.path), "--json"])
    assert result.exit_code == 1
    assert "--source" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--html", "--png-dir"])
@pytest.mark.parametrize("place", ["file/report.html", "/proc/none/report", "/sys/report"])
def test_a_place_that_cannot_be_written_is_one_line(
    option: str, place: str, converted: dict[str, tuple[Checkpoint, Path]], tmp_path: Path
) -> None:
    """A file where a directory should be, and directories that nobody can write to."""
    source, out = converted[DENSE]
    (tmp_path / "file").write_text("")
    target = tmp_path / place
    result = CliRunner().invoke(main, ["report", str(out), "--source", str(source.path), option, str(target)])
    assert result.exit_code == 1
    assert "cannot be written" in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_a_place_that_cannot_be_written_is_seen_before_the_work(
    converted: dict[str, tuple[Checkpoint, Path]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And not after minutes of measuring, where the system says so in advance; nothing is made by looking."""
    monkeypatch.setattr("convert_w4a8.report.collect.collect", lambda *_, **__: pytest.fail("it was measured"))
    monkeypatch.setattr("os.access", lambda *_: False)
    source, out = converted[DENSE]
    result = CliRunner().invoke(
        main, ["report", str(out), "--source", str(source.path), "--html", str(tmp_path / "a" / "b")]
    )
    assert (result.exit_code, list(tmp_path.iterdir())) == (1, [])
    assert "cannot be written (Permission denied)" in result.stderr


def test_real_checkpoint_loses_what_was_measured(shared: Path, tmp_path: Path) -> None:
    """A real GPTQ mixture: the naive cast leaves a handful of scales and 8 dB less than vLLM's method."""
    source = shared / "models" / "tiny-qwen3moe-gptq"
    run(convert, source, tmp_path / "out", "--scales", "search", "--quiet")
    found = as_dict(collect(open_checkpoint(tmp_path / "out"), open_checkpoint(source)))
    assert len(found["fp8_scales"]["naive"]) == 6
    sqnr = {scheme: values["mean"] for scheme, values in found["sqnr_db"].items()}
    assert sqnr["reference"] - sqnr["naive"] > 8
    assert sqnr["output"] - sqnr["reference"] > 5
