"""Repeated spans, against a search that compares tokens one by one."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convert_w4a8.samples import repeats
from convert_w4a8.samples.repeats import repeated


def searched(samples: list[list[int]], ngram: int, min_samples: int, *, keep_first: bool) -> list[list[bool]]:
    """Do it plainly."""
    places: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for number, tokens in enumerate(samples):
        for start in range(len(tokens) - ngram + 1):
            places.setdefault(tuple(tokens[start : start + ngram]), []).append((number, start))
    found = [[False] * len(tokens) for tokens in samples]
    for held in places.values():
        if len({number for number, _ in held}) >= min_samples:
            for number, start in held:
                if not keep_first or number != held[0][0]:
                    found[number][start : start + ngram] = [True] * ngram
    return found


def arrays(samples: list[list[int]]) -> list[npt.NDArray[np.int32]]:
    """Return samples as the room has them."""
    return [np.array(tokens, np.int32) for tokens in samples]


CASES: dict[str, st.SearchStrategy[Any]] = {
    "samples": st.lists(st.lists(st.integers(0, 2), max_size=20), min_size=1, max_size=5),
    "ngram": st.integers(4, 9),
    "min_samples": st.integers(2, 3),
    "keep_first": st.booleans(),
}


@given(**CASES)
def test_spans_are_those_of_a_plain_search(
    samples: list[list[int]], ngram: int, min_samples: int, *, keep_first: bool
) -> None:
    """Also of samples that are empty or shorter than a span."""
    found = repeated(arrays(samples), ngram=ngram, min_samples=min_samples, keep_first=keep_first)
    assert [spans.tolist() for spans in found] == searched(samples, ngram, min_samples, keep_first=keep_first)


@given(**CASES)
def test_colliding_hashes_mask_nothing_that_is_not_repeated(
    samples: list[list[int]], ngram: int, min_samples: int, *, keep_first: bool
) -> None:
    """With a hash of one bit almost all n-grams collide."""
    with pytest.MonkeyPatch.context() as patch:
        hashes = repeats._hashes
        patch.setattr(repeats, "_hashes", lambda tokens, length: hashes(tokens, length) & np.uint64(1))
        found = repeated(arrays(samples), ngram=ngram, min_samples=min_samples, keep_first=keep_first)
    for spans, plain in zip(found, searched(samples, ngram, min_samples, keep_first=keep_first), strict=True):
        assert not (spans & ~np.array(plain, np.bool_)).any()


def test_equal_hashes_are_of_equal_ngrams() -> None:
    """All 65,536 n-grams of 16 bits have different hashes, whichever their length is made of."""
    bits = (np.arange(1 << 16)[:, None] >> np.arange(16)) & 1
    for ngram in (16, 13, 8, 5, 4):
        rows = np.unique(bits[:, :ngram], axis=0)
        joined = np.ascontiguousarray(rows, np.int32).reshape(-1)
        assert len(np.unique(repeats._hashes(joined, ngram)[::ngram])) == len(rows)


def test_the_same_prompt_in_every_sample() -> None:
    """It is masked, but in the first one if that is kept; what is new is not."""
    random = np.random.default_rng(0)
    prompt = random.integers(0, 50_000, 300, np.int32)
    samples = [np.concatenate((prompt, random.integers(0, 50_000, 100, np.int32))) for _ in range(20)]
    for keep_first in (True, False):
        first, *others = repeated(samples, ngram=32, min_samples=2, keep_first=keep_first)
        assert first.sum() == (0 if keep_first else 300)
        assert all(spans[:300].all() and not spans[300:].any() for spans in others)


def test_what_does_not_count_in_the_first_sample_counts_in_the_next() -> None:
    """A span whose first copy is masked, by a loss_mask, say, is not lost: its other copies are not masked for it."""
    prompt = list(range(100, 120))
    samples = arrays([[1, *prompt, 2], [3, 4, *prompt, 5], [*prompt, 6]])
    kept = [np.ones(len(tokens), np.bool_) for tokens in samples]
    kept[0][8:15] = False
    found = repeated(samples, ngram=8, min_samples=2, keep_first=True, kept=kept)
    assert not found[0].any()
    for spans, start in ((found[1], 2), (found[2], 0)):
        assert spans[start : start + 20].tolist() == kept[0][1:21].tolist()
        assert spans.sum() == 13


@given(samples=CASES["samples"], ngram=CASES["ngram"], data=st.data())
def test_masked_tokens_only_take_from_what_is_masked(samples: list[list[int]], ngram: int, data: st.DataObject) -> None:
    """With tokens that do not count, no more is masked; with all that count, the same."""
    found = repeated(arrays(samples), ngram=ngram, min_samples=2, keep_first=True)
    counts = [data.draw(st.lists(st.booleans(), min_size=len(tokens), max_size=len(tokens))) for tokens in samples]
    kept = [np.array(row, np.bool_) for row in counts]
    fewer = repeated(arrays(samples), ngram=ngram, min_samples=2, keep_first=True, kept=kept)
    assert all(not (one & ~other).any() for one, other in zip(fewer, found, strict=True))
    everything = [np.ones(len(tokens), np.bool_) for tokens in samples]
    same = repeated(arrays(samples), ngram=ngram, min_samples=2, keep_first=True, kept=everything)
    assert [spans.tolist() for spans in same] == [spans.tolist() for spans in found]
