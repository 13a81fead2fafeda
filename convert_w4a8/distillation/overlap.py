"""Which samples are the beginning of which others: the calls of one conversation, logged one by one, grow so."""

from collections.abc import Iterator, Sequence

from convert_w4a8.samples.sample import Sample


def beginnings(samples: Sequence[Sample]) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Yield the number of each sample, and those of the samples that it begins with, the shortest first.

    Of equal samples, each begins with those before it.
    """
    texts = [sample.tokens.tobytes() for sample in samples]
    above: list[int] = []
    for number in sorted(range(len(texts)), key=texts.__getitem__):
        while above and not texts[number].startswith(texts[above[-1]]):
            above.pop()
        yield number, tuple(above)
        above.append(number)


def conversations(samples: Sequence[Sample]) -> list[int]:
    """Return the numbers of the longest sample of each conversation, in the order in which these begin.

    Samples are of one conversation if they begin with the same sample.
    """
    longest: dict[int, int] = {}
    earliest: dict[int, int] = {}
    for number, begins in beginnings(samples):
        root = begins[0] if begins else number
        longest[root] = max(longest.get(root, number), number, key=lambda each: len(samples[each]))
        earliest[root] = min(earliest.get(root, number), number)
    return [longest[root] for root in sorted(longest, key=earliest.__getitem__)]


def last_calls(samples: Sequence[Sample]) -> list[int]:
    """Return the numbers of the samples that are the beginning of no other one; of equal ones, that of the last."""
    begun = {begins[-1] for _, begins in beginnings(samples) if begins}
    return [number for number in range(len(samples)) if number not in begun]


def overlapping(samples: Sequence[Sample], others: Sequence[Sample]) -> set[int]:
    """Return the numbers of the samples that begin with one of the others, or that one of the others begins with."""
    found: set[int] = set()
    count = len(samples)
    for number, begins in beginnings([*samples, *others]):
        if number >= count:
            found.update(begins)
        elif any(each >= count for each in begins):
            found.add(number)
    return {number for number in found if number < count}
