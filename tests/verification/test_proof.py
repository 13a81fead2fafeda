"""`verify` must pass what is right, and above all must not pass what is wrong."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_edits import Tensors, edit_json, edit_quantization, edit_tensors, write_case

from convert_w4a8.checkpoint.directory import open_checkpoint
from convert_w4a8.cli.render import verification_dict, verification_text
from convert_w4a8.conversion import run
from convert_w4a8.conversion.plan import make_plan
from convert_w4a8.encoding import dequantize
from convert_w4a8.encoding.tables import count_clipped
from convert_w4a8.errors import ConvertError
from convert_w4a8.linear import Packing, W4A8Linear
from convert_w4a8.options import Options, ScalesMode, Unsupported
from convert_w4a8.verification import files, proof
from convert_w4a8.verification.proof import Verification

MODULE, OTHER = "model.layers.0.mlp.gate_proj", "model.layers.1.mlp.gate_proj"
NORM = "model.layers.0.input_layernorm.weight"
FORMATS = ("lut", "compressed-tensors")

Pair = tuple[Path, Path]


def run_convert(source: Path, out: Path, **options: object) -> None:
    """Convert a checkpoint on the CPU."""
    checkpoint = open_checkpoint(source)
    plan = make_plan(checkpoint, Options(**({"scales": ScalesMode.REFERENCE} | options)))  # type: ignore[arg-type]
    run.carry_out(checkpoint, plan, out, device=torch.device("cpu"))


def check(pair: Pair, min_sqnr_db: float | None = None) -> Verification:
    """Verify an output against its source."""
    source, out = pair
    return proof.verify(open_checkpoint(out), open_checkpoint(source), min_sqnr_db=min_sqnr_db)


def subjects(pair: Pair) -> set[str]:
    """Return what verification has to complain about; the rendering must agree that it failed."""
    found = check(pair)
    assert verification_text(found).endswith("FAILED" if found.problems else "accounted for")
    document = json.loads(json.dumps(verification_dict(found), allow_nan=False))
    assert document["ok"] == (not found.problems)
    assert [problem["subject"] for problem in document["problems"]] == [problem.subject for problem in found.problems]
    assert all(problem.reason and problem.remedy for problem in found.problems)
    return {problem.subject for problem in found.problems}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """Convert one checkpoint into each format, tables stored directly included, and one with layers left in BF16."""
    root = tmp_path_factory.mktemp("originals")
    pairs = {}
    source = write_case("gptq-v1", root / "in").path
    for name, options in {
        "lut": {"format": "lut"},
        "compressed-tensors": {"format": "compressed-tensors"},
        "direct": {"format": "lut", "scales": ScalesMode.DIRECT},
    }.items():
        run_convert(source, root / name, **options)
        pairs[name] = source, root / name
    odd = write_case("awq-odd-n", root / "odd-in").path
    run_convert(odd, root / "odd", unsupported=Unsupported.DEQUANTIZE)
    return pairs | {"odd": (odd, root / "odd")}


@pytest.fixture
def pair(request: pytest.FixtureRequest, originals: dict[str, Pair], tmp_path: Path) -> Pair:
    """Return a copy of one of the originals, to be damaged; `lut` unless the test asks for another."""
    source, out = originals[getattr(request, "param", "lut")]
    shutil.copytree(source, tmp_path / "in")
    shutil.copytree(out, tmp_path / "out")
    return tmp_path / "in", tmp_path / "out"


both_formats = pytest.mark.parametrize("pair", FORMATS, indirect=True)


# What is right.


@pytest.mark.parametrize("pair", [*FORMATS, "direct", "odd"], indirect=True)
def test_a_right_conversion_passes(pair: Pair) -> None:
    """Nothing to complain about, and figures that a healthy conversion has."""
    assert subjects(pair) == set()
    found = check(pair)
    source = open_checkpoint(pair[0])
    kept = {name for name in source.tensors if name.endswith(".qweight")}
    if "odd" not in str(found.layers):
        assert len(found.layers) <= len(kept)
    for layer in found.layers:
        assert layer.codes_kept
        assert 25 < layer.sqnr_db < 60
        assert 0 < layer.max_error < 0.1
        assert layer.clipped == 0


@pytest.mark.parametrize("pair", ["lut"], indirect=True)
def test_figures_are_those_of_the_weights(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQNR and largest error are the same whether a layer is compared at once or in blocks of 16 channels."""
    whole = check(pair)
    monkeypatch.setattr(dequantize, "BLOCK_WEIGHTS", 1)
    blocks = check(pair)
    for a, b in zip(whole.layers, blocks.layers, strict=True):
        assert b.sqnr_db == pytest.approx(a.sqnr_db, abs=1e-9)
        assert replace(b, sqnr_db=a.sqnr_db) == a


@pytest.mark.parametrize("pair", ["odd"], indirect=True)
def test_dequantized_weights_are_compared_block_by_block(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 16 channels each find their own place in the file, and a change in the last one is found."""
    monkeypatch.setattr(dequantize, "BLOCK_WEIGHTS", 1)
    assert subjects(pair) == set()
    name = "model.layers.0.self_attn.v_proj.weight"
    edit_tensors(pair[1], lambda t: t[name].view(torch.uint8)[-1, -1:].bitwise_xor_(1))
    assert subjects(pair) == {name}


def test_progress_counts_every_byte_of_the_source_once(pair: Pair) -> None:
    """The bar ends at the size of the source."""
    source, out = open_checkpoint(pair[0]), open_checkpoint(pair[1])
    seen: list[int] = []
    proof.verify(out, source, progress=seen.append)
    assert sum(seen) == source.nbytes


def test_the_threshold_can_be_set(pair: Pair) -> None:
    """--min-sqnr-db replaces the built-in thresholds, upwards and downwards; the message has both figures."""
    assert not check(pair, -10).problems
    found = check(pair, 100)
    assert len(found.problems) == len(found.layers) == 14
    assert "under 100 dB" in found.problems[0].reason
    assert check(pair, math.nan).problems


# Layers that are wrong.


@both_formats
def test_wrong_nibble_order_fails(pair: Pair) -> None:
    """A layer whose codes lie in another order within their words is far from the source."""
    name = f"{MODULE}.weight_packed"

    def swap_nibbles(t: Tensors) -> None:
        data = t[name].view(torch.uint8)
        t[name] = (data << 4 | data >> 4).view(torch.int32)

    edit_tensors(pair[1], swap_nibbles)
    assert subjects(pair) == {MODULE}
    found = next(layer for layer in check(pair).layers if layer.module == MODULE)
    assert found.sqnr_db < 10


def test_a_small_region_of_wrong_codes_fails(pair: Pair) -> None:
    """Two of 32 columns of tiles with their signs flipped are found: not only whole layers count."""
    edit_tensors(pair[1], lambda t: t[f"{MODULE}.weight_packed"][:, ::16].bitwise_xor_(0x08080808))
    assert subjects(pair) == {MODULE}


@both_formats
def test_swapped_layers_fail(pair: Pair) -> None:
    """Two layers of equal shape under each other's names are both wrong."""

    def swap(t: Tensors) -> None:
        for name in [name for name in t if name.startswith(f"{MODULE}.")]:
            other = name.replace(MODULE, OTHER)
            t[name], t[other] = t[other], t[name]

    edit_tensors(pair[1], swap)
    assert subjects(pair) == {MODULE, OTHER}


@both_formats
def test_shifted_channels_fail(pair: Pair) -> None:
    """Scales that are off by one output channel are wrong."""
    dim = 1 if (pair[1] / "config.json").read_text().count("w4a8_lut") else 0
    name = f"{MODULE}.weight_scale"
    edit_tensors(pair[1], lambda t: t.update({name: t[name].view(torch.uint8).roll(16, dim).view(t[name].dtype)}))
    assert subjects(pair) == {MODULE}


def test_dropped_zero_points_fail(tmp_path: Path) -> None:
    """An output made from the codes and scales alone, as if there were no zero-points, is wrong in every layer."""
    source = write_case("awq-zero-points", tmp_path / "in")
    shutil.copytree(source.path, tmp_path / "symmetric")
    word = torch.tensor(-0x77777778, dtype=torch.int32)
    edit_tensors(tmp_path / "symmetric", lambda t: [v.copy_(word) for k, v in t.items() if k.endswith("qzeros")])
    run_convert(tmp_path / "symmetric", tmp_path / "out")
    assert subjects((tmp_path / "in", tmp_path / "out")) == source.layers.keys()
    assert not subjects((tmp_path / "symmetric", tmp_path / "out"))


def test_wrong_zero_rule_fails(tmp_path: Path) -> None:
    """A GPTQ v1 file that was read as v2 has every zero-point off by one."""
    source = write_case("gptq-v2", tmp_path / "in")
    shutil.copytree(source.path, tmp_path / "misread")
    run_convert(tmp_path / "in", tmp_path / "out")
    edit_quantization(tmp_path / "misread", checkpoint_format="gptq")
    found = check((tmp_path / "misread", tmp_path / "out"), 15)
    assert {problem.subject for problem in found.problems} == source.layers.keys()


def test_ignored_order_fails(tmp_path: Path) -> None:
    """An output made as if g_idx did not permute is wrong in every layer."""
    source = write_case("gptq-desc-act", tmp_path / "in")
    shutil.copytree(source.path, tmp_path / "contiguous")
    edit_tensors(tmp_path / "contiguous", lambda t: [t.pop(name) for name in list(t) if name.endswith("g_idx")])
    edit_quantization(tmp_path / "contiguous", desc_act=False)
    run_convert(tmp_path / "contiguous", tmp_path / "out")
    assert subjects((tmp_path / "in", tmp_path / "out")) == source.layers.keys()


def set_bytes(name: str, value: int) -> Callable[[Tensors], object]:
    """Return an edit that sets some entries of an FP8 tensor to a bit pattern."""

    def edit(t: Tensors) -> None:
        t[name].view(torch.uint8).view(-1)[3:5] = value

    return edit


@pytest.mark.parametrize(
    ("pair", "edit"),
    [
        pytest.param("lut", set_bytes(f"{MODULE}.weight_scale", 0x7F), id="nan"),
        pytest.param("lut", set_bytes(f"{MODULE}.weight_scale", 0xFF), id="negative-nan"),
        pytest.param("lut", set_bytes(f"{MODULE}.weight_scale", 0x7E), id="448"),
        pytest.param("lut", set_bytes(f"{MODULE}.weight_scale", 0x67), id="60-of-56"),
        pytest.param("direct", set_bytes(f"{MODULE}.weight_lut", 0x7F), id="nan-entry"),
    ],
    indirect=["pair"],
)
def test_clipped_and_nan_tables_fail_whatever_the_threshold(pair: Pair, edit: Callable[[Tensors], object]) -> None:
    """Two entries among thousands are counted, though the SQNR of the layer may still be high."""
    edit_tensors(pair[1], edit)
    found = check(pair, -1000)
    hits = [problem for problem in found.problems if problem.subject == MODULE and "clip" in problem.reason]
    assert hits
    assert next(layer for layer in found.layers if layer.module == MODULE).clipped >= 2


def test_every_fp8_scale_clips_exactly_beyond_56() -> None:
    """Over all 256 bytes: a group scale clips if 8 times its magnitude is beyond 448, or if it is NaN."""
    scale = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    for byte in range(256):
        part = scale[byte : byte + 1].expand(1, 16).contiguous()
        w = W4A8Linear(torch.zeros(16, 16, dtype=torch.int32), Packing.PACK_QUANTIZED, part, None, torch.ones(16))
        value = float(scale[byte])
        assert (count_clipped(w) > 0) == (math.isnan(value) or abs(value) > 56)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("pair", "part"), [("lut", "weight_chan_scale"), ("compressed-tensors", "weight_scale")], indirect=["pair"]
)
def test_scales_that_are_no_numbers_fail(pair: Pair, part: str, value: float) -> None:
    """One NaN or infinite scale fails the layer, and the JSON stays valid."""

    def edit(t: Tensors) -> None:
        t[f"{MODULE}.{part}"].view(-1)[5] = value

    edit_tensors(pair[1], edit)
    assert any(subject.startswith(MODULE) for subject in subjects(pair))


@pytest.mark.parametrize("value", [0.0, 2.0, -1.0])
def test_one_wrong_channel_scale_fails(pair: Pair, value: float) -> None:
    """A single channel of 512 that is zero, doubled or negated is found."""

    def edit(t: Tensors) -> None:
        t[f"{MODULE}.weight_chan_scale"][int(t[f"{MODULE}.weight_chan_scale"].argmax())] *= value

    edit_tensors(pair[1], edit)
    assert subjects(pair) == {MODULE}


# Forms that are wrong.


def reshaped(role: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], object]:
    """Return an edit of one tensor of MODULE."""
    return lambda t: t.update({f"{MODULE}.{role}": change(t[f"{MODULE}.{role}"])})


WRONG_FORMS: dict[str, tuple[str, Callable[[Tensors], object]]] = {
    "lut-packed-flat": ("lut", reshaped("weight_packed", lambda t: t.flatten())),
    "lut-packed-transposed": ("lut", reshaped("weight_packed", lambda t: t.t())),
    "lut-packed-cut": ("lut", reshaped("weight_packed", lambda t: t[:4])),
    "lut-packed-cut-inside-a-group": ("lut", reshaped("weight_packed", lambda t: t[:5])),
    "lut-packed-cut-inside-a-tile": ("lut", reshaped("weight_packed", lambda t: t[:, :100])),
    "lut-packed-empty": ("lut", reshaped("weight_packed", lambda t: t[:0])),
    "lut-packed-int64": ("lut", reshaped("weight_packed", lambda t: t.long())),
    "lut-scale-cut": ("lut", reshaped("weight_scale", lambda t: t[:1])),
    "lut-scale-f16": ("lut", reshaped("weight_scale", lambda t: t.half())),
    "lut-channel-matrix": ("lut", reshaped("weight_chan_scale", lambda t: t[None])),
    "lut-channel-absent": ("lut", lambda t: t.pop(f"{MODULE}.weight_chan_scale")),
    "lut-scale-absent": ("lut", lambda t: t.pop(f"{MODULE}.weight_scale")),
    "lut-packed-absent": ("lut", lambda t: t.pop(f"{MODULE}.weight_packed")),
    "direct-tables-cut": ("direct", reshaped("weight_lut", lambda t: t[:, :-8])),
    "direct-tables-three-dimensional": ("direct", reshaped("weight_lut", lambda t: t.view(t.shape[0], -1, 8))),
    "ct-packed-flat": ("compressed-tensors", reshaped("weight_packed", lambda t: t.flatten())),
    "ct-packed-cut": ("compressed-tensors", reshaped("weight_packed", lambda t: t[:-16])),
    "ct-packed-empty": ("compressed-tensors", reshaped("weight_packed", lambda t: t[:0])),
    "ct-shape-lies": ("compressed-tensors", reshaped("weight_shape", lambda t: t.flip(0))),
    "ct-shape-absent": ("compressed-tensors", lambda t: t.pop(f"{MODULE}.weight_shape")),
    "ct-scale-f32": ("compressed-tensors", reshaped("weight_scale", lambda t: t.float())),
}


@pytest.mark.parametrize(("pair", "edit"), WRONG_FORMS.values(), ids=WRONG_FORMS, indirect=["pair"])
def test_a_layer_of_the_wrong_form_is_a_problem_like_others(pair: Pair, edit: Callable[[Tensors], object]) -> None:
    """A missing tensor, dtype or shape is listed with the layer's name, and the other layers are still checked."""
    edit_tensors(pair[1], edit)
    edit_tensors(pair[1], lambda t: t[NORM].add_(1))
    found = subjects(pair)
    assert NORM in found
    assert all(subject == NORM or subject.startswith(MODULE) for subject in found)
    assert len(found) > 1


@both_formats
def test_every_missing_tensor_is_noticed(pair: Pair) -> None:
    """Whichever tensor of the output is taken away, verification fails."""
    source, out = pair
    whole = open_checkpoint(out)
    names = [name for name in whole.tensors if ".1." not in name]  # the second layer is like the first
    assert len(names) > 20
    original = open_checkpoint(source)
    for name in names:
        part = replace(whole, tensors={key: info for key, info in whole.tensors.items() if key != name})
        found = proof.verify(part, original).problems
        assert any(problem.subject.startswith(name.rpartition(".")[0]) for problem in found), name


@both_formats
@pytest.mark.parametrize("name", ["model.extra.weight", f"{MODULE}.weight", f"{MODULE}.qweight", "x.weight_packed"])
def test_extra_tensors_fail(pair: Pair, name: str) -> None:
    """A tensor that stands for nothing in the source is named."""
    edit_tensors(pair[1], lambda t: t.update({name: torch.ones(16, 16, dtype=torch.int32)}))
    not_ignored = {"quantization_config: ignore"} if name == "model.extra.weight" else set()
    assert subjects(pair) == {name} | not_ignored


# Copies.


@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(lambda t: t[NORM].view(torch.uint8)[7:8].bitwise_xor_(1), id="one-bit"),
        pytest.param(lambda t: t.update({NORM: t[NORM].float()}), id="dtype"),
        pytest.param(lambda t: t.update({NORM: t[NORM].half()}), id="dtype-of-equal-size"),
        pytest.param(lambda t: t.update({NORM: t[NORM][None]}), id="shape"),
        pytest.param(lambda t: t.pop(NORM), id="absent"),
    ],
)
def test_changed_copies_fail(pair: Pair, edit: Callable[[Tensors], object]) -> None:
    """A tensor that is not quantized must be the source's, bit for bit."""
    edit_tensors(pair[1], edit)
    assert subjects(pair) == {NORM}


@pytest.mark.parametrize("pair", ["odd"], indirect=True)
def test_changed_dequantized_weights_fail(pair: Pair) -> None:
    """A layer that is kept in BF16 must be the dequantized weight, bit for bit; FP16 copies become BF16."""
    name = "model.layers.0.self_attn.k_proj.weight"
    edit_tensors(pair[1], lambda t: t[name].view(torch.uint8)[-1, -1:].bitwise_xor_(1))
    assert subjects(pair) == {name}
    edit_tensors(pair[1], lambda t: t.update({name: t[name][:-1]}))
    assert subjects(pair) == {name}
    edit_tensors(pair[1], lambda t: t.pop(name))
    assert subjects(pair) == {name}


def test_large_copies_are_compared_to_their_end(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors are compared piece by piece: a change in the last byte of the last piece is found."""
    monkeypatch.setattr(files, "_CHUNK_BYTES", 100)
    assert subjects(pair) == set()
    edit_tensors(pair[1], lambda t: t["model.embed_tokens.weight"].view(torch.uint8)[-1, -1:].bitwise_xor_(1))
    assert subjects(pair) == {"model.embed_tokens.weight"}


@pytest.mark.parametrize(
    ("damage", "subject"),
    [
        (
            lambda p: (p / "tokenizer.json").write_bytes((p / "tokenizer.json").read_bytes()[:-1] + b" "),
            "tokenizer.json",
        ),
        (lambda p: (p / "chat_template.jinja").write_bytes(b""), "chat_template.jinja"),
        (lambda p: (p / "generation_config.json").unlink(), "generation_config.json"),
    ],
    ids=["same-size", "empty", "absent"],
)
def test_changed_side_files_fail(pair: Pair, damage: Callable[[Path], object], subject: str) -> None:
    """Side files must be there, byte for byte."""
    damage(pair[1])
    assert subjects(pair) == {subject}


# Not a pair at all.


def test_arguments_the_wrong_way_round_are_refused(pair: Pair) -> None:
    """The source is no output of ours, which is said."""
    with pytest.raises(ConvertError, match="'gptq' is not an output format; convert it first"):
        check((pair[1], pair[0]))


@pytest.mark.parametrize("pair", ["lut"], indirect=True)
def test_another_model_is_not_the_source(pair: Pair, tmp_path: Path) -> None:
    """An output of one model fails against another of the same shape, in every layer and tensor."""
    other = write_case("gptq-per-channel", tmp_path / "other")
    found = subjects((other.path, pair[1]))
    assert other.layers.keys() <= found


def test_truncated_output_is_refused(pair: Pair) -> None:
    """A file that ends early is refused by its header before anything is compared."""
    file = pair[1] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ConvertError, match="is truncated"):
        check(pair)


def test_source_that_cannot_be_read_is_a_problem(pair: Pair) -> None:
    """Layers that the source's own configuration refuses are problems too: nothing passes unchecked."""
    edit_json(pair[0] / "config.json", "quantization_config", dynamic={r".*gate_proj": {"bits": 8}})
    assert {MODULE, OTHER} <= subjects(pair)
