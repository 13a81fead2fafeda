"""Input formats: one contract over all of them, then what each of them must refuse, with numbers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_edits import REMOVE, Tensors, edit_json, edit_quantization, edit_tensors, write_case
from factories import CASES, Case
from factories.layers import BORROW, nibbles, pack_columns
from safetensors.torch import save_file

from convert_w4a8.checkpoint.directory import open_checkpoint
from convert_w4a8.encoding.dequantize import dequantize, output_blocks
from convert_w4a8.errors import ConvertError, PlanError, Problem
from convert_w4a8.sources import SOURCES, LayerSpec, find_source, gptq
from convert_w4a8.sources.checks import setting, unpack_words

Q_PROJ = "model.layers.0.self_attn.q_proj"
K_PROJ = "model.layers.0.self_attn.k_proj"
V_PROJ = "model.layers.0.self_attn.v_proj"
DOWN = "model.layers.1.mlp.down_proj"

# A group size that does not divide K, and 8 bits, are not for a reader; test_plan.py has the first.
READABLE = [pytest.param(case, id=case.id) for case in CASES if not case.refused and not case.id.endswith("-odd-k")]


def find_layers(path: Path) -> tuple[list[LayerSpec], list[Problem]]:
    """Return what the format of a checkpoint finds in it."""
    checkpoint = open_checkpoint(path)
    problems: list[Problem] = []
    return find_source(checkpoint).find_layers(checkpoint, problems), problems


def read_all(path: Path) -> None:
    """Read every layer of a checkpoint whose headers are in order."""
    checkpoint = open_checkpoint(path)
    source = find_source(checkpoint)
    problems: list[Problem] = []
    specs = source.find_layers(checkpoint, problems)
    assert not problems
    for spec in specs:
        source.read_layer(checkpoint, spec)


@pytest.mark.parametrize("case", READABLE)
def test_contract(case: Case, tmp_path: Path) -> None:
    """Headers find exactly the quantized layers; their tensors give exactly the weights that were written."""
    written = case.write(tmp_path / "in")
    checkpoint = open_checkpoint(written.path)
    source = find_source(checkpoint)
    assert [s.NAME for s in SOURCES if s.matches(checkpoint.quantization_config)] == [written.format]
    problems: list[Problem] = []
    specs = source.find_layers(checkpoint, problems)
    assert not problems
    assert [spec.name for spec in specs] == sorted(written.layers)
    parts = [name for spec in specs for name in spec.parts.values()]
    assert len(parts) == len(set(parts))
    assert set(parts) | written.dense.keys() == checkpoint.tensors.keys()
    for spec in specs:
        layer = written.layers[spec.name]
        n, k = layer.codes.shape
        size = k if layer.scheme.group_size == -1 else layer.scheme.group_size
        assert (spec.out_features, spec.in_features, spec.group_size) == (n, k, size)
        assert spec.symmetric == layer.scheme.claims_symmetric
        assert set(spec.parts) <= set(source.ROLES)

        w = source.read_layer(checkpoint, spec)
        assert w.shape_nk == (n, k)
        assert np.array_equal(dequantize(w).double().numpy(), layer.weight)
        assert (w.zeros is None) == bool((layer.zeros == 8).all())
        assert (w.g_idx is None) == bool((layer.groups == np.arange(k) // size).all())
        assert w.is_kernel_ready == (w.zeros is None and w.g_idx is None and size == 128)
        assert torch.equal(w.scales, layer.scales)
        for alone, read in ((source.read_zeros, w.zeros), (source.read_g_idx, w.g_idx)):
            again = alone(checkpoint, spec)
            assert (again is None) == (read is None)
            assert again is None or read is None or torch.equal(again, read)


@pytest.mark.parametrize("case", ["awq-zero-points", "gptq-desc-act-asymmetric", "ct-asymmetric", "ct-int8-storage"])
def test_output_channels_can_be_taken_apart(case: str, tmp_path: Path) -> None:
    """Any slice of a layer, in multiples of 8 channels, dequantizes to the slice of its weights, also when small."""
    written = write_case(case, tmp_path / "in")
    checkpoint = open_checkpoint(written.path)
    source = find_source(checkpoint)
    for spec in source.find_layers(checkpoint, []):
        w = source.read_layer(checkpoint, spec)
        for start, stop in ((0, 8), (8, 24), (spec.out_features - 8, spec.out_features)):
            part = dequantize(w.output_channels(start, stop)).double().numpy()
            assert np.array_equal(part, written.layers[spec.name].weight[start:stop])


@pytest.mark.parametrize(("n", "k"), [(8, 128), (16, 1 << 23), (136, 1 << 20), (100_000, 128), (4096, 12288)])
def test_output_blocks_cover_all_channels_once(n: int, k: int) -> None:
    """Blocks follow each other without gap, in multiples of 16 channels, and are small or one tile high."""
    blocks = list(output_blocks(n, k))
    assert [start for start, _ in blocks] == [0, *(stop for _, stop in blocks[:-1])]
    assert blocks[-1][1] == n
    assert all(start % 16 == 0 and ((stop - start) * k <= 1 << 23 or stop - start <= 16) for start, stop in blocks)


# GPTQ's zero-points.


def write_gptq_layer(path: Path, qzeros: np.ndarray[Any, np.dtype[np.int32]], version: str) -> None:
    """Write a GPTQ checkpoint of one layer [N, 128] with these qzeros [1, N/8]."""
    n = qzeros.shape[1] * 8
    path.mkdir()
    tensors = {
        "x.qweight": torch.zeros(16, n, dtype=torch.int32),
        "x.qzeros": torch.from_numpy(qzeros),
        "x.scales": torch.ones(1, n, dtype=torch.float16),
    }
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text("{}")
    (path / "quantize_config.json").write_text("{}")
    edit_json(path / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    edit_quantization(path, group_size=128, checkpoint_format=version)


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_every_pair_of_neighbouring_zero_points(version: str, tmp_path: Path) -> None:
    """All 256 pairs in each of the 8 places of a word, with the borrow of v1 where the lower one is 0."""
    pairs = np.stack(np.meshgrid(np.arange(16), np.arange(16), indexing="ij"), -1).reshape(256, 2)
    zeros = np.full((256, 8, 8), 8, dtype=np.uint8)
    for place in range(8):
        zeros[:, place, place] = pairs[:, 0]
        zeros[:, place, (place + 1) % 8] = pairs[:, 1]
    packed = pack_columns(zeros.reshape(1, -1)).view(np.uint32)
    stored = packed - np.uint32(BORROW[4]) if version == "gptq" else packed
    write_gptq_layer(tmp_path / "in", stored.view(np.int32), version)
    checkpoint = open_checkpoint(tmp_path / "in")
    (spec,) = gptq.find_layers(checkpoint, [])
    found = gptq.read_zeros(checkpoint, spec)
    assert found is not None
    assert np.array_equal(found.numpy(), zeros.reshape(1, -1))


@pytest.mark.parametrize(("word", "version"), [(0x77777777, "gptq"), (-0x77777778, "gptq_v2")])
def test_symmetric_zero_points_are_none(word: int, version: str, tmp_path: Path) -> None:
    """The nibble of a symmetric file is 7 in v1 and 8 in v2; both mean that there are no zero-points."""
    write_gptq_layer(tmp_path / "in", np.full((1, 2), word, dtype=np.int32), version)
    checkpoint = open_checkpoint(tmp_path / "in")
    (spec,) = gptq.find_layers(checkpoint, [])
    assert gptq.read_zeros(checkpoint, spec) is None


def test_unpack_words_takes_the_low_nibble_first() -> None:
    """Every byte value in every place of a word, against plain numpy."""
    words = np.arange(256, dtype=np.uint32)[:, None] << (8 * np.arange(4, dtype=np.uint32))
    signed = np.ascontiguousarray(words).view(np.int32)
    assert np.array_equal(unpack_words(torch.from_numpy(signed)).numpy(), nibbles(signed).reshape(256, 32))


def test_g_idx_may_be_absent(tmp_path: Path) -> None:
    """Old GPTQ files without g_idx have contiguous groups."""
    written = write_case("gptq-v1", tmp_path / "in")
    edit_tensors(written.path, lambda t: [t.pop(name) for name in list(t) if name.endswith("g_idx")])
    checkpoint = open_checkpoint(written.path)
    for spec in gptq.find_layers(checkpoint, []):
        w = gptq.read_layer(checkpoint, spec)
        assert w.g_idx is None
        assert np.array_equal(dequantize(w).double().numpy(), written.layers[spec.name].weight)


# `dynamic` of GPTQModel: like its own function, the first matching pattern decides.


@pytest.mark.parametrize(
    ("dynamic", "group_sizes"),
    [
        pytest.param({}, (128, 128), id="empty"),
        pytest.param({r".*q_proj": {"group_size": 64}}, (64, 128), id="bare"),
        pytest.param({r"+:.*q_proj": {"group_size": 64}}, (64, 128), id="plus"),
        pytest.param({r"q_proj": {"group_size": 64}}, (128, 128), id="matches-from-the-start"),
        pytest.param({r".*q_proj": {"group_size": 64}, r".*": {"group_size": 32}}, (64, 32), id="first-wins"),
        pytest.param({r".*": {"group_size": 32}, r".*q_proj": {"group_size": 64}}, (32, 32), id="order-counts"),
        pytest.param({r".*q_proj": {}, r".*": {"group_size": 32}}, (128, 32), id="empty-override-wins"),
    ],
)
def test_dynamic_overrides(dynamic: dict[str, Any], group_sizes: tuple[int, int], tmp_path: Path) -> None:
    """Overrides decide the expected number of groups: a wrong one is refused by the shape of qzeros."""
    written = write_case("gptq-v1", tmp_path / "in")

    def regroup(tensors: Tensors) -> None:
        for module, size in zip((Q_PROJ, K_PROJ), group_sizes, strict=True):
            for role in ("qzeros", "scales"):
                columns = tensors[f"{module}.{role}"].shape[1]
                tensors[f"{module}.{role}"] = tensors[f"{module}.{role}"][:1].expand(256 // size, columns)

    def keep_two(tensors: Tensors) -> None:
        for name in list(tensors):
            if name.endswith(("qweight", "qzeros", "scales", "g_idx")) and not name.startswith((Q_PROJ, K_PROJ)):
                del tensors[name]

    edit_tensors(written.path, regroup)
    edit_tensors(written.path, keep_two)
    edit_quantization(written.path, dynamic=dynamic)
    specs, problems = find_layers(written.path)
    assert not problems
    assert {spec.name: spec.group_size for spec in specs} == dict(zip((Q_PROJ, K_PROJ), group_sizes, strict=True))


# Configurations that lie. Every one must be a Problem or a ConvertError, never another exception.


LIES: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "gptq-bits-8": ("gptq-v1", {"bits": 8}, Q_PROJ, "has 8 bits"),
    "gptq-bits-text": ("gptq-v1", {"bits": "4"}, Q_PROJ, "has '4' bits"),
    "gptq-bits-null": ("gptq-v1", {"bits": None}, Q_PROJ, "has None bits"),
    "gptq-bits-list": ("gptq-v1", {"bits": [4]}, Q_PROJ, "has [4] bits"),
    "gptq-group-0": ("gptq-v1", {"group_size": 0}, Q_PROJ, "group_size 0 does not divide in_features = 256"),
    "gptq-group-minus-7": ("gptq-v1", {"group_size": -7}, Q_PROJ, "group_size -7 does not divide"),
    "gptq-group-100": ("gptq-v1", {"group_size": 100}, Q_PROJ, "group_size 100 does not divide in_features = 256"),
    "gptq-group-huge": ("gptq-v1", {"group_size": 10**30}, Q_PROJ, "does not divide in_features = 256"),
    "gptq-group-text": ("gptq-v1", {"group_size": "128"}, "quantization_config: group_size", "is '128', not int"),
    "gptq-group-inf": ("gptq-v1", {"group_size": float("inf")}, "quantization_config: group_size", "is inf, not int"),
    "gptq-group-float": ("gptq-v1", {"group_size": 128.0}, "quantization_config: group_size", "is 128.0, not int"),
    "gptq-group-true": ("gptq-v1", {"group_size": True}, "quantization_config: group_size", "is True, not int"),
    "gptq-group-of-another": (
        "gptq-v1",
        {"group_size": 64},
        f"{Q_PROJ}.qzeros",
        "is I32 [2, 32], not I32 [4, 32] = [K/group_size, N/8]",
    ),
    "gptq-marlin": ("gptq-v1", {"checkpoint_format": "marlin"}, "quantization_config: checkpoint_format", "'marlin'"),
    "gptq-format-list": (
        "gptq-v1",
        {"checkpoint_format": ["gptq"]},
        "quantization_config: checkpoint_format",
        "['gptq']",
    ),
    "gptq-sym-text": ("gptq-v1", {"sym": "yes"}, "quantization_config: sym", "is 'yes', not bool"),
    "gptq-desc-act-number": ("gptq-v1", {"desc_act": 1}, "quantization_config: desc_act", "is 1, not bool"),
    "gptq-dynamic-list": ("gptq-v1", {"dynamic": ["x"]}, "quantization_config: dynamic", "is ['x'], not dict"),
    "gptq-dynamic-regex": (
        "gptq-v1",
        {"dynamic": {"+:(": {"bits": 4}}},
        "quantization_config: dynamic",
        "'(' is not a regular expression",
    ),
    "gptq-dynamic-number": (
        "gptq-v1",
        {"dynamic": {".*": 4}},
        "quantization_config: dynamic: .*",
        "is 4, not dict",
    ),
    "gptq-dynamic-bits": ("gptq-v1", {"dynamic": {r".*q_proj": {"bits": 8}}}, Q_PROJ, "has 8 bits"),
    "gptq-dynamic-sym": (
        "gptq-v1",
        {"dynamic": {r".*": {"sym": 1}}},
        "quantization_config: sym",
        "is 1, not bool",
    ),
    "awq-bits-3": ("awq-zero-points", {"bits": 3}, Q_PROJ, "has 3 bits"),
    "awq-group-0": ("awq-zero-points", {"group_size": 0}, Q_PROJ, "group_size 0 does not divide"),
    "awq-group-text": ("awq-zero-points", {"group_size": "128"}, "quantization_config: group_size", "not int"),
    "awq-group-of-another": (
        "awq-zero-points",
        {"group_size": 256},
        f"{Q_PROJ}.qzeros",
        "is I32 [2, 32], not I32 [1, 32] = [K/group_size, N/8]",
    ),
    "awq-gemv": ("awq-zero-points", {"version": "gemv"}, "quantization_config: version", "is 'gemv'"),
    "awq-gemv-fast": ("awq-zero-points", {"version": "GEMV_FAST"}, "quantization_config: version", "'gemv_fast'"),
    "awq-marlin": ("awq-zero-points", {"version": "marlin"}, "quantization_config: version", "is 'marlin'"),
    "awq-version-list": ("awq-zero-points", {"version": ["gemm"]}, "quantization_config: version", "gemm"),
    "awq-zero-point-text": ("awq-zero-points", {"zero_point": "no"}, "quantization_config: zero_point", "not bool"),
    "ct-groups-list": ("ct-w4a16", {"config_groups": [1]}, "quantization_config: config_groups", "not dict"),
    "ct-groups-empty": ("ct-w4a16", {"config_groups": {}}, Q_PROJ, "no config group targets it"),
    "ct-groups-absent": ("ct-w4a16", {"config_groups": REMOVE}, Q_PROJ, "no config group targets it"),
    "ct-groups-null": ("ct-w4a16", {"config_groups": {"group_0": None}}, Q_PROJ, "no config group targets it"),
    "ct-transform": (
        "ct-w4a16",
        {"transform_config": {"config_groups": {"R1": {}}}},
        "quantization_config: transform_config",
        "rotations",
    ),
    "ct-sparse": (
        "ct-w4a16",
        {"sparsity_config": {"format": "sparse-24-bitmask"}},
        "quantization_config: sparsity_config",
        "sparse",
    ),
}

CT_WEIGHTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "bits-8": ({"num_bits": 8}, Q_PROJ, "has 8 bits"),
    "bits-absent": ({"num_bits": REMOVE}, Q_PROJ, "has None bits"),
    "float": ({"type": "float"}, Q_PROJ, "has float weights, not INT4"),
    "tensor-group": ({"strategy": "tensor_group"}, Q_PROJ, "strategy 'tensor_group' is not supported"),
    "block": ({"strategy": "block"}, Q_PROJ, "strategy 'block' is not supported"),
    "strategy-list": ({"strategy": ["group"]}, Q_PROJ, "strategy ['group'] is not supported"),
    "group-0": ({"group_size": 0}, Q_PROJ, "group_size 0 does not divide"),
    "group-text": ({"group_size": "128"}, "group_size", "is '128', not int"),
    "group-inf": ({"group_size": float("inf")}, "group_size", "is inf, not int"),
    "group-of-another": (
        {"group_size": 64},
        f"{Q_PROJ}.weight_scale",
        "is BF16 [256, 2], not F16 or BF16 or F32 [256, 4]",
    ),
    "channel": ({"strategy": "channel"}, f"{Q_PROJ}.weight_scale", "is BF16 [256, 2], not F16 or BF16 or F32 [256, 1]"),
    "asymmetric": ({"symmetric": False}, f"{Q_PROJ}.weight_zero_point", "is missing"),
}

CT_TARGETS: dict[str, tuple[Any, str, str]] = {
    "nothing": ([], Q_PROJ, "no config group targets it"),
    "null": (None, Q_PROJ, "no config group targets it"),
    "number": (7, "targets", "is 7, not list"),
    "text": ("Linear", "targets", "is 'Linear', not list"),
    "regex": (["re:("], "targets", "'(' is not a regular expression"),
    "other-class": (["Conv2d"], Q_PROJ, "no config group targets it"),
}


def assert_refused(path: Path, subject: str, reason: str) -> None:
    """Assert that finding the layers gives or raises a refusal of this subject and reason, and no other exception."""
    try:
        found = find_layers(path)[1]
    except ConvertError as error:
        found = [error.problem]
    hits = [refusal for refusal in found if refusal.subject.endswith(subject)]
    assert hits, found
    assert reason in hits[0].reason
    assert hits[0].remedy
    assert "\n" not in str(hits[0])


@pytest.mark.parametrize(("case", "changes", "subject", "reason"), LIES.values(), ids=LIES)
def test_configuration_that_lies_is_refused(
    case: str, changes: dict[str, Any], subject: str, reason: str, tmp_path: Path
) -> None:
    """A setting that cannot be, or that the tensors contradict, is refused with its name and its value."""
    written = write_case(case, tmp_path / "in")
    edit_quantization(written.path, **changes)
    assert_refused(written.path, subject, reason)


@pytest.mark.parametrize(("changes", "subject", "reason"), CT_WEIGHTS.values(), ids=CT_WEIGHTS)
def test_config_group_that_lies_is_refused(changes: dict[str, Any], subject: str, reason: str, tmp_path: Path) -> None:
    """The same within a config group of compressed-tensors."""
    written = write_case("ct-w4a16", tmp_path / "in")
    place = ("quantization_config", "config_groups", "group_0", "weights")
    edit_json(written.path / "config.json", *place, **changes)
    assert_refused(written.path, subject, reason)


@pytest.mark.parametrize(("targets", "subject", "reason"), CT_TARGETS.values(), ids=CT_TARGETS)
def test_targets_that_name_no_layer_are_refused(targets: object, subject: str, reason: str, tmp_path: Path) -> None:
    """Targets of another type, or that match nothing, are refused."""
    written = write_case("ct-w4a16", tmp_path / "in")
    edit_json(written.path / "config.json", "quantization_config", "config_groups", "group_0", targets=targets)
    assert_refused(written.path, subject, reason)


def test_the_most_specific_target_wins(tmp_path: Path) -> None:
    """A module's name goes before a pattern, a pattern before a class, whatever the order of the groups."""
    written = write_case("ct-w4a16", tmp_path / "in")
    groups = {
        "a": {"targets": ["Linear"], "weights": {"num_bits": 8}},
        "b": {"targets": [Q_PROJ], "weights": {"num_bits": 4, "strategy": "group", "group_size": 128}},
        "c": {"targets": ["re:.*self_attn.*"], "weights": {"num_bits": 3}},
    }
    edit_quantization(written.path, config_groups=groups)
    specs, problems = find_layers(written.path)
    assert [spec.name for spec in specs] == [Q_PROJ]
    reasons = {refusal.subject: refusal.reason for refusal in problems}
    assert reasons[K_PROJ].startswith("has 3 bits")
    assert reasons[DOWN].startswith("has 8 bits")


@pytest.mark.parametrize("method", ["bitsandbytes", "fp8", None, 7, ["gptq"], "w4a8_lut"])
def test_unknown_methods_are_refused(method: object, tmp_path: Path) -> None:
    """A quantization of another kind is one line that names it and lists what is supported."""
    written = write_case("gptq-v1", tmp_path / "in")
    edit_quantization(written.path, quant_method=method)
    with pytest.raises(ConvertError) as caught:
        find_source(open_checkpoint(written.path))
    assert caught.value.refusal.reason == f"{method!r} is not supported"
    assert "awq, gptq, compressed-tensors" in caught.value.refusal.remedy


def test_all_refusals_are_found_at_once(tmp_path: Path) -> None:
    """One damaged layer does not hide the next, nor the healthy ones."""
    written = write_case("gptq-v1", tmp_path / "in")

    def damage(t: Tensors) -> None:
        del t[f"{Q_PROJ}.qzeros"]
        t[f"{K_PROJ}.scales"] = t[f"{K_PROJ}.scales"].double()
        t[f"{DOWN}.g_idx"] = t[f"{DOWN}.g_idx"][:-1]

    edit_tensors(written.path, damage)
    specs, problems = find_layers(written.path)
    assert [str(refusal) for refusal in problems] == [
        f"{K_PROJ}.scales: is F64 [2, 128], not F16 or BF16 or F32 [2, 128] = [K/group_size, N]; "
        "check that the configuration belongs to this checkpoint",
        f"{Q_PROJ}.qzeros: is missing; download or write the checkpoint again",
        f"{DOWN}.g_idx: is I32 [511], not I32 [512] = [K]; check that the configuration belongs to this checkpoint",
    ]
    assert {spec.name for spec in specs} == written.layers.keys() - {Q_PROJ, K_PROJ, DOWN}


# Tensors that contradict the format.

BAD_HEADERS: dict[str, tuple[str, str, Callable[[torch.Tensor], torch.Tensor] | None, str]] = {
    "gptq-qweight-int64": ("gptq-v1", "qweight", lambda t: t.long(), "is I64 [32, 256], not a I32 matrix"),
    "gptq-qweight-vector": ("gptq-v1", "qweight", lambda t: t.flatten(), "is I32 [8192], not a I32 matrix"),
    "gptq-qweight-empty": ("gptq-v1", "qweight", lambda t: t[:0], "is I32 [0, 256], not a I32 matrix"),
    "gptq-qweight-cut": ("gptq-v1", "qweight", lambda t: t[:16], "is I32 [2, 32], not I32 [1, 32]"),
    "gptq-qzeros-absent": ("gptq-v1", "qzeros", None, "is missing"),
    "gptq-scales-absent": ("gptq-v1", "scales", None, "is missing"),
    "gptq-scales-int": ("gptq-v1", "scales", lambda t: t.int(), "is I32 [2, 256], not F16 or BF16 or F32 [2, 256]"),
    "gptq-scales-transposed": (
        "gptq-v1",
        "scales",
        lambda t: t.t(),
        "is F16 [256, 2], not F16 or BF16 or F32 [2, 256]",
    ),
    "gptq-g-idx-int64": ("gptq-v1", "g_idx", lambda t: t.long(), "is I64 [256], not I32 [256] = [K]"),
    "awq-qweight-cut": ("awq-zero-points", "qweight", lambda t: t[:128], "is I32 [2, 32], not I32 [1, 32]"),
    "awq-qzeros-absent": ("awq-zero-points", "qzeros", None, "is missing"),
    "awq-scales-absent": ("awq-zero-points", "scales", None, "is missing"),
    "awq-scales-cut": (
        "awq-zero-points",
        "scales",
        lambda t: t[:, :8],
        "is F16 [2, 8], not F16 or BF16 or F32 [2, 256]",
    ),
    "ct-packed-int8": ("ct-w4a16", "weight_packed", lambda t: t.to(torch.int8), "is I8 [256, 32], not a I32 matrix"),
    "ct-packed-absent": ("ct-w4a16", "weight_packed", None, "has a weight_scale but no weight"),
    "ct-weight-int16": ("ct-int8-storage", "weight", lambda t: t.short(), "is I16 [256, 256], not a I8 matrix"),
    "ct-zero-points-not-packed": (
        "ct-asymmetric",
        "weight_zero_point",
        lambda t: t.repeat_interleave(8, 0),
        "is I32 [256, 2], not I32 [32, 2] = [N/8, G]",
    ),
    "ct-int8-zero-points-packed": (
        "ct-int8-storage-asymmetric",
        "weight_zero_point",
        lambda t: t[::8].int(),
        "is I32 [32, 2], not I8 [256, 2] = [N, G]",
    ),
    "ct-shape-of-three": (
        "ct-w4a16",
        "weight_shape",
        lambda t: torch.cat((t, t[:1])),
        "is I64 [3], not I64 or I32 [2]",
    ),
    "ct-g-idx-cut": ("ct-g-idx", "weight_g_idx", lambda t: t[:-1], "is I32 [255], not I32 [256] = [K]"),
}


@pytest.mark.parametrize(("case", "role", "change", "reason"), BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_tensor_of_the_wrong_form_is_refused(
    case: str, role: str, change: Callable[[torch.Tensor], torch.Tensor] | None, reason: str, tmp_path: Path
) -> None:
    """Dtypes and shapes are checked from headers; the message says what is there and what should be."""
    written = write_case(case, tmp_path / "in")
    name = f"{Q_PROJ}.{role}"

    def damage(tensors: Tensors) -> None:
        tensor = tensors.pop(name)
        if change is not None:
            tensors[name] = change(tensor)

    edit_tensors(written.path, damage)
    specs, problems = find_layers(written.path)
    assert len(problems) == 1
    assert problems[0].subject.startswith(Q_PROJ)
    assert reason in problems[0].reason
    assert Q_PROJ not in {spec.name for spec in specs}


def set_first(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return an edit that sets a tensor's first element."""

    def edit(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[0] = value
        return tensor

    return edit


BAD_CONTENT: dict[str, tuple[str, str, float, str]] = {
    **{
        f"{case}-scale-{value}": (case, role, value, "NaN or infinite" if value != -1 else "negative")
        for case, role in (("gptq-v1", "scales"), ("awq-zero-points", "scales"), ("ct-w4a16", "weight_scale"))
        for value in (float("nan"), float("inf"), -1.0)
        if value != -1 or case != "ct-w4a16"  # compressed-tensors files of this tool's own hold negative scales
    },
    "gptq-g-idx-beyond": ("gptq-v1", "g_idx", 2, "names groups 0 … 2, but there are 2"),
    "gptq-g-idx-negative": ("gptq-v1", "g_idx", -1, "names groups -1 … 1, but there are 2"),
    "ct-g-idx-beyond": ("ct-g-idx", "weight_g_idx", 99, "names groups 0 … 99, but there are 2"),
    "ct-shape-lies": ("ct-w4a16", "weight_shape", 255, "says [255, 256], the packed weight has [256, 256]"),
    "ct-weight-8": ("ct-int8-storage", "weight", 8, "holds values outside −8 … 7"),
    "ct-weight-minus-9": ("ct-int8-storage", "weight", -9, "holds values outside −8 … 7"),
    "ct-weight-127": ("ct-int8-storage", "weight", 127, "holds values outside −8 … 7"),
    "ct-zero-point-8": ("ct-int8-storage-asymmetric", "weight_zero_point", 8, "holds values outside −8 … 7"),
}


@pytest.mark.parametrize(("case", "role", "value", "reason"), BAD_CONTENT.values(), ids=BAD_CONTENT)
def test_tensor_with_impossible_content_is_refused(
    case: str, role: str, value: float, reason: str, tmp_path: Path
) -> None:
    """One element that cannot be right is found when the layer is read, and its tensor is named."""
    written = write_case(case, tmp_path / "in")
    name = f"{Q_PROJ}.{role}"
    edit_tensors(written.path, lambda t: t.update({name: set_first(value)(t[name])}))
    with pytest.raises(ConvertError) as caught:
        read_all(written.path)
    assert caught.value.refusal.subject == name
    assert reason in caught.value.refusal.reason


EIGHTS = -0x77777778
"""An int32 word of the symmetric code for 0."""


@pytest.mark.parametrize(("case", "role"), [("gptq-v1", "scales"), ("ct-w4a16", "weight_scale")])
def test_scales_of_zero_are_a_layer_of_zeros(case: str, role: str, tmp_path: Path) -> None:
    """A pruned layer has scales of 0 and the code for 0: unusual, but nothing is damaged."""
    written = write_case(case, tmp_path / "in")
    codes = "qweight" if role == "scales" else "weight_packed"
    edit_tensors(written.path, lambda t: (t[f"{Q_PROJ}.{role}"].zero_(), t[f"{Q_PROJ}.{codes}"].fill_(EIGHTS)))
    checkpoint = open_checkpoint(written.path)
    source = find_source(checkpoint)
    spec = next(spec for spec in source.find_layers(checkpoint, []) if spec.name == Q_PROJ)
    assert not dequantize(source.read_layer(checkpoint, spec)).any()


def test_some_scales_of_zero_are_dead_groups(tmp_path: Path) -> None:
    """A scale that underflowed makes zeros of its group here as it does in W4A16."""
    written = write_case("gptq-v1", tmp_path / "in")
    edit_tensors(written.path, lambda t: t[f"{Q_PROJ}.scales"][0].zero_())
    read_all(written.path)


@pytest.mark.parametrize(
    ("case", "role"),
    [
        ("gptq-v1", "scales"),
        ("gptq-v1", "qweight"),
        ("awq-zero-points", "qweight"),
        ("ct-w4a16", "weight_scale"),
        ("ct-w4a16", "weight_packed"),
    ],
)
def test_a_tensor_whose_bytes_never_came_is_refused(case: str, role: str, tmp_path: Path) -> None:
    """Scales of 0 for codes that mean something, or codes of 0 that do not mean 0: a hole in the file."""
    written = write_case(case, tmp_path / "in")
    edit_tensors(written.path, lambda t: t[f"{Q_PROJ}.{role}"].zero_())
    with pytest.raises(ConvertError, match=rf"{Q_PROJ}\.{role}: holds nothing but zeros"):
        read_all(written.path)


def test_g_idx_that_is_uneven_is_refused(tmp_path: Path) -> None:
    """Every group has as many input channels as the group size says, in whatever order."""
    written = write_case("gptq-desc-act", tmp_path / "in")
    edit_tensors(written.path, lambda t: t[f"{Q_PROJ}.g_idx"].copy_(t[f"{Q_PROJ}.g_idx"].clamp(max=0)))
    with pytest.raises(ConvertError, match=rf"{Q_PROJ}\.g_idx: does not name each group 128 times"):
        read_all(written.path)


def test_activation_order_without_g_idx_is_refused(tmp_path: Path) -> None:
    """With desc_act, g_idx is part of the meaning of the codes."""
    written = write_case("gptq-desc-act", tmp_path / "in")
    edit_tensors(written.path, lambda t: t.pop(f"{Q_PROJ}.g_idx"))
    assert_refused(written.path, f"{Q_PROJ}.g_idx", "is missing")


def test_int8_codes_without_a_scale_are_refused(tmp_path: Path) -> None:
    """A layer that lost its scale is not taken for one that was never quantized."""
    written = write_case("ct-int8-storage", tmp_path / "in")
    edit_tensors(written.path, lambda t: t.pop(f"{Q_PROJ}.weight_scale"))
    assert_refused(written.path, f"{Q_PROJ}.weight_scale", "is missing")


def test_a_pattern_that_takes_for_ever_is_refused(tmp_path: Path) -> None:
    """A regular expression with nested repetitions ends the search for layers at once."""
    written = write_case("gptq-v1", tmp_path / "in")
    edit_quantization(written.path, dynamic={"+:(([a-z_.0-9]+)+)+!": {"bits": 4}})
    with pytest.raises(PlanError, match=r"quantization_config: dynamic: .* takes too long to match"):
        find_layers(written.path)


@pytest.mark.parametrize("value", [None, 3])
def test_settings_of_the_right_type_pass(value: int | None) -> None:
    """Null and absence are the default; a number is itself."""
    assert setting({"a": value}, "a", int, 5) == (5 if value is None else 3)
    assert setting({}, "a", int, 5) == 5
    assert setting({"a": False}, "a", bool, default=True) is False
