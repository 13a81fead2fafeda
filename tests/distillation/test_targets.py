"""What the student is to predict: top-k and the rest, and the term for hidden states."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from convert_w4a8.distillation.hidden import difference_of_hidden
from convert_w4a8.distillation.loss import divergence
from convert_w4a8.distillation.teacher import Logits
from convert_w4a8.distillation.top_k import TopK


def random_logits(seed: int, vocabulary: int = 33, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a student's and a teacher's logits [7, V]."""
    generator = torch.Generator().manual_seed(seed)
    ours, theirs = (torch.randn(7, vocabulary, generator=generator) * scale for _ in range(2))
    return ours, theirs


def coarsened(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return log-probabilities float64 [C, k + 1] of some tokens, and of all others as one."""
    p = logits.double().softmax(-1)
    top = p.gather(-1, tokens)
    rest = p.scatter(-1, tokens, 0.0).sum(-1, keepdim=True)
    return torch.cat((top, rest), -1).log()


@given(st.integers(0, 1 << 30), st.integers(1, 32), st.sampled_from([0.1, 3.0, 20.0]))
def test_top_k_is_the_divergence_of_coarsened_predictions(seed: int, k: int, scale: float) -> None:
    """Values and gradients are those of torch's own KL of k tokens and the rest; it is never above that of all."""
    ours, theirs = random_logits(seed, scale=scale)
    target = TopK.of(theirs, k)
    again = ours.clone().requires_grad_()
    ours.requires_grad_()
    found = target.divergence(ours)
    p, q = coarsened(theirs, target.tokens), coarsened(again, target.tokens)
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    assert bool((found <= divergence(ours, theirs) * (1 + 1e-4) + 1e-4).all())
    (found * torch.arange(7)).sum().backward()  # type: ignore[no-untyped-call]
    (expected * torch.arange(7)).sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(ours.grad, again.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("k", [33, 100])
def test_all_tokens_are_the_whole_divergence(k: int) -> None:
    """With no rest, value and gradient are those of all logits."""
    ours, theirs = random_logits(0)
    grads = []
    values = []
    for target in (TopK.of(theirs, k), Logits(theirs)):
        one = ours.clone().requires_grad_()
        values.append(target.divergence(one))
        values[-1].sum().backward()  # type: ignore[no-untyped-call]
        grads.append(one.grad)
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-4)


def test_a_teacher_that_is_sure_has_no_rest() -> None:
    """Of infinite certainty nothing is left: finite values, and gradients without NaN."""
    theirs = torch.full((2, 9), -torch.inf)
    theirs[:, :3] = torch.tensor([1.0, 2.0, 3.0])
    ours = torch.randn(2, 9, generator=torch.Generator().manual_seed(0)).requires_grad_()
    found = TopK.of(theirs, 3).divergence(ours)
    torch.testing.assert_close(found, divergence(ours, theirs.clamp(min=-1e4)))
    found.sum().backward()  # type: ignore[no-untyped-call]
    assert ours.grad is not None
    assert bool(ours.grad.isfinite().all())


def test_tokens_that_the_teacher_excludes_count_nothing() -> None:
    """Logits of −∞, as models mask unused tokens: p·(log p − log q) is 0, not 0·∞; so are those among the k."""
    ours, theirs = random_logits(1)
    theirs[:, 3:] = -torch.inf
    for target in (TopK.of(theirs, 5), TopK.of(theirs, 3), Logits(theirs)):
        for masked in (False, True):
            student = ours.detach().clone()
            student[:, 3:] -= torch.inf if masked else 0
            student.requires_grad_()
            found = target.divergence(student)
            p, q = theirs[:, :3].float().softmax(-1), student.float().softmax(-1)[:, :3]
            torch.testing.assert_close(found, (p * (p / q).log()).sum(-1))
            found.sum().backward()  # type: ignore[no-untyped-call]
            assert student.grad is not None
            torch.testing.assert_close(student.grad[:, :3].float(), (q - p).detach(), atol=1e-2, rtol=0)


def test_the_rest_is_summed_some_tokens_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same numbers: no float32 copy of the logits of a batch."""
    _, theirs = random_logits(1)
    whole = TopK.of(theirs, 4)
    monkeypatch.setattr("convert_w4a8.distillation.top_k.LOGITS_AT_ONCE", 66)
    most: list[int] = []
    scatter = torch.Tensor.scatter

    def watched(self: torch.Tensor, *arguments: Any) -> torch.Tensor:
        most.append(self.numel())
        return scatter(self, *arguments)

    monkeypatch.setattr(torch.Tensor, "scatter", watched)
    parts = TopK.of(theirs, 4)
    assert max(most) <= 66
    assert torch.equal(parts.rest, whole.rest)
    assert torch.equal(parts.tokens, whole.tokens)


def test_parts_and_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some tokens at a time give what all give."""
    ours, theirs = random_logits(1)
    target = TopK.of(theirs, 4)
    whole = target.divergence(ours)
    parts = [target.part(slice(i, i + 3)).divergence(ours[i : i + 3]) for i in (0, 3, 6)]
    assert torch.equal(torch.cat(parts), whole)
    monkeypatch.setattr("convert_w4a8.distillation.top_k.LOGITS_AT_ONCE", 66)
    assert torch.equal(target.divergence(ours), whole)
    assert TopK.of(theirs[:0], 4).divergence(ours[:0]).shape == (0,)


def test_difference_of_hidden() -> None:
    """The mean over blocks and tokens of squared differences, each by its own reference; with the right gradient."""
    generator = torch.Generator().manual_seed(0)
    theirs = [torch.randn(5, 8, generator=generator) * 10**block for block in range(3)]
    factors = torch.tensor([1.0, 1.1, 0.8])
    ours = [(each * factor).requires_grad_() for each, factor in zip(theirs, factors, strict=True)]
    found = difference_of_hidden(ours, theirs)
    torch.testing.assert_close(found, (factors - 1).square().mean())
    found.backward()  # type: ignore[no-untyped-call]
    for student, teacher in zip(ours, theirs, strict=True):
        expected = 2 * (student.detach() - teacher) / teacher.square().sum(-1, keepdim=True) / 15
        torch.testing.assert_close(student.grad, expected)
