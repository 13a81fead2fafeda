"""What makes steps fast must not change them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from convert_w4a8.checkpoint.directory import open_checkpoint
from convert_w4a8.distillation import graphs
from convert_w4a8.distillation.graphs import Passes
from convert_w4a8.distillation.linear import Preset
from convert_w4a8.distillation.options import RATES, rates_for
from convert_w4a8.distillation.student import load_student, load_teacher, logits_of

masks = pytest.importorskip("transformers.masking_utils")


def test_attention_has_no_mask_while_a_graph_is_captured(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then transformers says of itself that it is traced; with a mask attention would take the slow way."""
    teacher = load_teacher(open_checkpoint(model), torch.device("cpu"))
    ids = torch.arange(12).view(2, 6)
    expected = logits_of(teacher, ids)
    given: list[Any] = []
    attention: Any = torch.nn.functional.scaled_dot_product_attention

    def watched(*arguments: torch.Tensor, **options: Any) -> Any:
        given.append(options.get("attn_mask"))
        return attention(*arguments, **options)

    def traced(*_: Any) -> bool:
        return True

    monkeypatch.setattr(masks, "is_tracing", traced)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    assert torch.equal(logits_of(teacher, ids), expected)
    assert given == [None] * len(given) != []
    assert masks.is_tracing is traced


def test_padding_does_not_reach_what_is_before_it(model: Path) -> None:
    """Causal attention needs no mask for it."""
    teacher = load_teacher(open_checkpoint(model), torch.device("cpu"))
    ids = torch.arange(1, 13).view(2, 6)
    cut = ids.clone()
    cut[1, 3:] = 0
    assert torch.equal(logits_of(teacher, ids)[1, :3], logits_of(teacher, cut)[1, :3])


def test_passes_without_a_gpu_are_the_models_own(model: Path) -> None:
    """Nothing is captured, however often a shape comes, and autograd has done all."""
    teacher = load_teacher(open_checkpoint(model), torch.device("cpu"))
    passes = Passes(teacher, (), torch.device("cpu"))
    ids = torch.arange(12).view(2, 6)
    for _ in range(3):
        assert torch.equal(passes.forward(ids), logits_of(teacher, ids))
        passes.backward()


def test_rates_follow_the_steps() -> None:
    """As one by the square root, and no more than twice those of the table."""
    usual = RATES[Preset.WEIGHTS]
    assert rates_for(Preset.WEIGHTS, 1000) == usual
    assert rates_for(Preset.WEIGHTS, 4000).weight == usual.weight / 2
    assert rates_for(Preset.WEIGHTS, 3).entries == usual.entries * 2


@pytest.mark.parametrize("preset", list(Preset))
def test_codes_count_as_weights(preset: Preset, model: Path, start: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A student of tables has most of its weights in codes, which are no parameters."""
    student = load_student(open_checkpoint(start), open_checkpoint(model), preset, torch.device("cpu"))
    codes = sum(layer.codes.numel() for layer in student.layers.values())
    trained = [parameter for _, parameter in student.trained()]
    for most, captured in ((codes, False), (1 << 30, True)):
        monkeypatch.setattr(graphs, "MOST_WEIGHTS", most)
        assert bool(Passes(student.model, trained, torch.device("cuda"))._most) is captured


def test_what_cannot_be_captured_keeps_nothing(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs of other shapes are let go of, since the steps have to do without them in the memory that they have."""
    teacher = load_teacher(open_checkpoint(model), torch.device("cpu"))
    passes = Passes(teacher, (), torch.device("cuda"))

    class Captured:
        def __init__(self, _model: Any, _parameters: Any, ids: torch.Tensor, _pool: Any) -> None:
            if ids.shape[0] > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            self.forward = lambda ids: logits_of(teacher, ids)

    monkeypatch.setattr(graphs, "_Captured", Captured)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    for rows, kept in ((1, 0), (1, 1), (2, 1), (2, 0), (1, 0), (1, 0)):
        ids = torch.arange(6 * rows).view(rows, 6)
        assert torch.equal(passes.forward(ids), logits_of(teacher, ids))
        assert torch.equal(passes.forward(ids, counts=False), logits_of(teacher, ids))  # looks make no shape frequent
        assert len(passes._captured) == kept
    assert passes._pool is None
