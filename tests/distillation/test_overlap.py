"""Text to measure on is apart from what is trained on, also where samples are the beginnings of others."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convert_w4a8.distillation.mix import hold_out, training_data
from convert_w4a8.distillation.overlap import beginnings, conversations, last_calls, overlapping
from convert_w4a8.errors import ConvertError
from convert_w4a8.samples.sample import Sample

TEXTS = st.lists(st.lists(st.sampled_from([0, 1, 256]), min_size=1, max_size=5), max_size=12)


def samples_of(texts: Sequence[Sequence[int]]) -> list[Sample]:
    zeros = [np.zeros(len(text), dtype=np.uint8) for text in texts]
    return [
        Sample(np.array(text, dtype=np.int32), none, none, "chat line 1")
        for text, none in zip(texts, zeros, strict=True)
    ]


def begins(text: Sequence[int], start: Sequence[int]) -> bool:
    return list(text[: len(start)]) == list(start)


@given(texts=TEXTS, others=TEXTS)
def test_overlaps_by_definition(texts: list[list[int]], others: list[list[int]]) -> None:
    """Whatever lies between in the order by tokens, and however many are equal."""
    samples = samples_of(texts)
    for number, found in beginnings(samples):
        expected = {
            each
            for each, text in enumerate(texts)
            if begins(texts[number], text) and (text != texts[number] or each < number)
        }
        assert set(found) == expected
    assert overlapping(samples, samples_of(others)) == {
        number for number, text in enumerate(texts) if any(begins(text, o) or begins(o, text) for o in others)
    }
    assert last_calls(samples) == [
        number
        for number, text in enumerate(texts)
        if not any(begins(o, text) and (o != text or each > number) for each, o in enumerate(texts))
    ]
    roots = [text for text in texts if not any(begins(text, o) and o != text for o in texts)]
    assert len(conversations(samples)) == len({tuple(root) for root in roots})


def conversation(number: int, calls: int) -> list[list[int]]:
    """Return the calls of a conversation, as they are logged one by one: each has all before it."""
    whole = [number, *range(1000, 1000 + 3 * calls)]
    return [whole[: 4 + 3 * call] for call in range(calls)]


def test_conversations_are_held_out_whole() -> None:
    """Of each that is held out the last call, with all turns; none of its calls is trained on."""
    samples = samples_of([call for number in range(48) for call in conversation(number, 5)])
    data = training_data(samples, None, "drop")
    held = {int(sample.tokens[0]) for sample in data.held_out}
    assert len(held) == len(data.held_out) == 8
    assert {len(sample) for sample in data.held_out} == {16}
    assert not held & {int(sample.tokens[0]) for sample in data.samples}
    assert len(data.samples) == 40 * 5
    chosen = training_data(samples[:200], samples[200:], "drop")
    assert [len(sample) for sample in chosen.held_out] == [16] * 8


def test_samples_that_are_apart_are_held_out_one_by_one() -> None:
    """Every sixteenth of many; of fewer eight, but not more than every fourth."""
    for count, first, step in ((160, 8, 16), (128, 8, 16), (40, 2, 5), (20, 2, 4), (3, 2, 4)):
        samples = samples_of([[number, 5, 6] for number in range(count)])
        left, held = hold_out(samples)
        assert [int(sample.tokens[0]) for sample in held] == [*range(first, count, step)]
        assert len(left) == count - len(held)


def test_one_conversation_is_not_enough() -> None:
    """Its beginnings would be measured on what they go on to."""
    with pytest.raises(ConvertError, match="or beginnings of one"):
        training_data(samples_of(conversation(0, 30)), None, "drop")
