"""`--mask` as text, and what it masks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convert_w4a8.samples.masks import NO_MASK, MaskOptions, Which, mask_kinds, parse_mask
from convert_w4a8.samples.sample import REASONS, TokenKind

KIND = st.sampled_from([Which.NONE, Which.ALL, Which.FIRST])
REPEATED = st.sampled_from([Which.LATER, Which.ALL])
OPTIONS = st.one_of(
    st.builds(MaskOptions, template=KIND, system=KIND, tools=KIND),
    st.builds(MaskOptions, KIND, KIND, KIND, REPEATED, ngram=st.integers(4, 4096), samples=st.integers(2, 1_000_000)),
).filter(lambda options: options != NO_MASK)


@given(OPTIONS)
def test_what_is_printed_can_be_read(options: MaskOptions) -> None:
    """Every combination."""
    assert parse_mask(str(options)) == options


def test_values_are_read() -> None:
    """As they are documented."""
    assert parse_mask("system, tools:first") == MaskOptions(system=Which.ALL, tools=Which.FIRST)
    assert parse_mask("repeated") == MaskOptions(repeated=Which.LATER)
    assert parse_mask("repeated:all:ngram=16:samples=5") == MaskOptions(repeated=Which.ALL, ngram=16, samples=5)
    assert str(NO_MASK) == ""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "'' is no mask; there are template, system, tools"),
        ("sytem", "'sytem' is no mask; there are template"),
        ("system,", "'' is no mask"),
        ("system,system:first", "'system' is there twice"),
        ("system:later", "'later' cannot follow 'system'"),
        ("repeated:first", "'first' cannot follow 'repeated'"),
        ("repeated:all:later", "'later' cannot follow 'repeated'"),
        ("system:ngram=8", "'ngram=8' cannot follow 'system'"),
        ("repeated:ngram=3", "'ngram=3': ngram is a whole number from 4 to 4,096"),
        ("repeated:ngram=²", "ngram is a whole number"),
        ("repeated:samples=1", "samples is a whole number from 2 to 1,000,000"),
        ("repeated:ngram=8:ngram=8", "'ngram=8' cannot follow 'repeated'"),
        ("repeated:", "'' cannot follow 'repeated'"),
    ],
)
def test_what_is_wrong_is_said(text: str, said: str) -> None:
    """A usage error can show the text as it is."""
    with pytest.raises(ValueError, match=r"^\S") as caught:
        parse_mask(text)
    assert said in str(caught.value)


def test_all_or_only_the_first() -> None:
    """The first of a kind in a sample, or every one; what is masked already keeps its reason."""
    kinds = np.array([1, 2, 2, 1, 4, 1, 2, 1], np.uint8)
    assert (TokenKind.TEMPLATE, TokenKind.SYSTEM, TokenKind.USER) == (1, 2, 4)
    template, system = (1 + REASONS.index(name) for name in ("template", "system"))

    def masked(text: str) -> list[int]:
        masked_by = np.zeros(8, np.uint8)
        masked_by[1] = 1
        mask_kinds(kinds, masked_by, parse_mask(text))
        return masked_by.tolist()

    assert masked("system") == [0, 1, system, 0, 0, 0, system, 0]
    assert masked("system:first") == [0, 1, system, 0, 0, 0, 0, 0]
    assert masked("template:first,system") == [template, 1, system, template, 0, 0, system, 0]
    assert masked("tools") == [0, 1, 0, 0, 0, 0, 0, 0]


def test_an_occurrence_ends_where_somebody_speaks() -> None:
    """A line in the header and the list before the question are one occurrence of tools; so is a prompt in parts."""
    order = "template tools system tools template system template tools user template assistant tools system user"
    kinds = np.array([TokenKind[name.upper()] for name in order.split()], np.uint8)
    for name, count in (("tools", 3), ("system", 2), ("template", 3)):
        masked_by = np.zeros(len(kinds), np.uint8)
        mask_kinds(kinds, masked_by, parse_mask(f"{name}:first"))
        assert np.flatnonzero(masked_by).tolist() == np.flatnonzero(kinds == TokenKind[name.upper()])[:count].tolist()
