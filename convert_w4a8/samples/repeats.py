"""Spans of tokens that recur across samples, found without knowing what wrote them: `--mask repeated`.

Every n-gram gets a 64-bit hash; sorting brings equal ones together. An n-gram counts as a repetition only if its tokens
are those of the first one with its hash, so a collision of hashes may hide a repetition, but never makes one.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_ODD = np.uint64(0x9E3779B97F4A7C15)
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
"""Multipliers of SplitMix64 (Steele, Lea and Flood 2014)."""
_ROWS = 1 << 14
"""N-grams that are compared at a time."""


def repeated(
    samples: Sequence[npt.NDArray[np.int32]],
    *,
    ngram: int,
    min_samples: int,
    keep_first: bool,
    kept: Sequence[npt.NDArray[np.bool_]] | None = None,
) -> list[npt.NDArray[np.bool_]]:
    """Return for each sample which of its tokens lie in a repeated span, bool [T].

    samples: token ids. A span of `ngram` tokens is repeated if at least `min_samples` samples hold it.
    keep_first: not in the first sample that holds it, and nowhere else those of its tokens that do not count there.
    kept: which tokens count, bool [T] of each sample; all of them by default.

    Time is that of a sort, and memory some 50 bytes a token.
    """
    lengths = np.array([len(tokens) for tokens in samples], np.int64)
    ends = np.cumsum(lengths)
    marked = np.zeros(int(lengths.sum()), np.bool_)
    if (lengths >= ngram).sum() >= 2:
        tokens = np.concatenate(samples)
        starts, first = _repeated_starts(tokens, lengths, ngram, min_samples, keep_first=keep_first)
        change = np.zeros(len(tokens) + 1, np.int8)  # spans of one length: at most one begins and one ends at a place
        change[starts] += 1
        change[starts + ngram] -= 1
        marked = np.cumsum(change[:-1], dtype=np.int32) > 0
        if keep_first and kept is not None and len(starts):
            marked &= np.concatenate(kept)[_sources(starts, first, len(tokens))]
    return np.split(marked, ends[:-1])


def _repeated_starts(
    tokens: npt.NDArray[np.int32], lengths: npt.NDArray[np.int64], ngram: int, min_samples: int, *, keep_first: bool
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return where the repeated n-grams begin in the concatenation of all samples, and the first of each: int64 [R]."""
    owner = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    places = np.flatnonzero(owner[ngram - 1 :] == owner[: len(owner) - ngram + 1])  # whole within one sample
    hashes = _hashes(tokens, ngram)[places]
    order = np.argsort(hashes, kind="stable")
    hashes, places = hashes[order], places[order]
    del order
    same = np.concatenate(([False], hashes[1:] == hashes[:-1]))
    del hashes
    several = same | np.concatenate((same[1:], [False]))
    places, begins = places[several], np.flatnonzero(~same[several])
    if not len(places):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    group = np.cumsum(~same[several]) - 1
    first = places[begins][group]
    equal = _equal_ngrams(tokens, places, first, ngram)
    places, group, first = places[equal], group[equal], first[equal]
    held = owner[places]
    another = np.concatenate(([True], (group[1:] != group[:-1]) | (held[1:] != held[:-1])))
    enough = np.bincount(group, weights=another)[group] >= min_samples
    found = enough & (held != owner[first]) if keep_first else enough
    return places[found], first[found]


def _sources(starts: npt.NDArray[np.int64], first: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.int64]:
    """Return for each token the one that it repeats by the last n-gram that begins at or before it, int64 [T].

    It is of use for tokens in an n-gram only.
    """
    order = np.argsort(starts)
    starts, first = starts[order], first[order]
    place = np.arange(length)
    last = np.maximum(np.searchsorted(starts, place, side="right") - 1, 0)
    found: npt.NDArray[np.int64] = np.clip(place + first[last] - starts[last], 0, length - 1)
    return found


def _hashes(tokens: npt.NDArray[np.int32], ngram: int) -> npt.NDArray[np.uint64]:
    """Return a hash of each n-gram, uint64 [T − ngram + 1]: those of twice the length from pairs, by doubling."""
    found, length = _mixed(tokens.astype(np.uint64)), 1
    while length < ngram:
        step = min(length, ngram - length)
        found = _mixed(found[:-step] * _ODD + found[step:])
        length += step
    return found


def _mixed(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return SplitMix64's finalizer of each number."""
    x = x + _ODD
    x = (x ^ (x >> np.uint64(30))) * _MIX[0]
    x = (x ^ (x >> np.uint64(27))) * _MIX[1]
    return x ^ (x >> np.uint64(31))


def _equal_ngrams(
    tokens: npt.NDArray[np.int32], one: npt.NDArray[np.int64], other: npt.NDArray[np.int64], ngram: int
) -> npt.NDArray[np.bool_]:
    """Return whether the n-grams that begin at two lists of places are the same, bool [R]."""
    windows = np.lib.stride_tricks.sliding_window_view(tokens, ngram)
    found = np.empty(len(one), np.bool_)
    for start in range(0, len(one), _ROWS):
        rows = slice(start, start + _ROWS)
        found[rows] = (windows[one[rows]] == windows[other[rows]]).all(1)
    return found
