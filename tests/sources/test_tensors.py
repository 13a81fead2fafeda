"""Tensors that contradict their format, by their headers or by what they hold."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_edits import Tensors, edit_tensors, write_case
from layer_specs import find_layers, opened

from convert_w4a8.checkpoint.safetensors_file import read_tensor
from convert_w4a8.encoding.dequantize import dequantize
from convert_w4a8.errors import ConvertError

Q_PROJ = "model.layers.0.self_attn.q_proj"


def read_all(path: Path) -> None:
    """Read every layer of a checkpoint whose headers are in order."""
    _, source, specs = opened(path)
    for spec in specs:
        source.read_layer(spec, read_tensor)


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
        f"{case}-scale-{value}": (case, role, value, "NaN or infinite")
        for case, role in (("gptq-v1", "scales"), ("awq-zero-points", "scales"), ("ct-w4a16", "weight_scale"))
        for value in (float("nan"), float("inf"), float("-inf"))
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
    assert caught.value.problem.subject == name
    assert reason in caught.value.problem.reason


EIGHTS = -0x77777778
"""An int32 word of the symmetric code for 0."""


@pytest.mark.parametrize(("case", "role"), [("gptq-v1", "scales"), ("ct-w4a16", "weight_scale")])
def test_scales_of_zero_are_a_layer_of_zeros(case: str, role: str, tmp_path: Path) -> None:
    """A pruned layer has scales of 0 and the code for 0: unusual, but nothing is damaged."""
    written = write_case(case, tmp_path / "in")
    codes = "qweight" if role == "scales" else "weight_packed"
    edit_tensors(written.path, lambda t: (t[f"{Q_PROJ}.{role}"].zero_(), t[f"{Q_PROJ}.{codes}"].fill_(EIGHTS)))
    _, source, specs = opened(written.path)
    spec = next(spec for spec in specs if spec.name == Q_PROJ)
    assert not dequantize(source.read_layer(spec, read_tensor)).any()


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
