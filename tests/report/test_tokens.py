"""Calibration data as HTML and as a picture: the counts are those of the samples, and no text of theirs is markup."""

import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from convert_w4a8.report import tokens
from convert_w4a8.samples.sample import REASONS, Sample, SampleSet, TokenKind, count
from convert_w4a8.text import table

PNG = b"\x89PNG\r\n\x1a\n"
TEXTS = ["<script>alert(1)</script>", "\"&amp;'", "two\nlines\tand a tab", "\x1b[31mred\x07", "\u202eturned", "end"]


class Words:
    """A tokenizer whose tokens are the texts above."""

    def decode(self, ids: list[int]) -> str:
        """Join them."""
        return "".join(TEXTS[number % len(TEXTS)] for number in ids)


class Page(HTMLParser):
    """The elements of a page, and the text of the sample."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.spans: list[tuple[dict[str, str | None], str]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note a tag."""
        self.tags.add(tag)
        if tag == "span":
            self.spans.append((dict(attrs), ""))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """Take the innermost one away."""
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Add text to the span that it is in."""
        if "span" in self.open:
            attributes, text = self.spans[-1]
            self.spans[-1] = attributes, text + data


def sample(ids: list[int], kinds: list[int], masked_by: list[int], origin: str = "data line 1") -> Sample:
    """Make a sample."""
    return Sample(np.array(ids, np.int32), np.array(kinds, np.uint8), np.array(masked_by, np.uint8), origin)


def of(*samples: Sample) -> SampleSet:
    """Make a set."""
    return SampleSet(samples, count(list(samples)))


def test_every_stretch_is_a_span() -> None:
    """With its kind, its reason and its text, and in the order of the sample."""
    system, repeated = 1 + REASONS.index("system"), 1 + REASONS.index("repeated")
    found = of(sample([2, 3, 0, 1, 5], [2, 2, 4, 4, 4], [system, system, 0, 0, repeated]))
    page = Page(tokens.page(found, Words()))
    shown = [(attributes, text) for attributes, text in page.spans if "title" in attributes]
    assert [attributes["title"] for attributes, _ in shown] == [
        "system prompt, masked: system; 2 tokens",
        "user; 2 tokens",
        "user, masked: repeated; 1 tokens",
    ]
    assert [attributes.get("class") for attributes, _ in shown] == ["masked", None, "masked"]
    assert [text for _, text in shown] == ["two\nlines\tand a tab\\x1b[31mred\\x07", TEXTS[0] + TEXTS[1], "end"]


def test_nothing_of_the_data_is_markup() -> None:
    """Whatever texts and names hold."""
    found = of(sample(list(range(6)), [6] * 6, [0] * 6, "<img src=x onerror=y>\u202e\n line 1"))
    text = tokens.page(found, Words())
    page = Page(text)
    assert page.tags == {
        *("html", "head", "meta", "title", "style", "body", "h1", "div", "table", "thead", "tbody")
    } | {*("tr", "th", "td", "p", "span")}
    assert page.open == []
    assert re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202e]", text) is None
    assert "&lt;script&gt;" in text


def test_long_samples_are_shown_in_part() -> None:
    """Of a long stretch, and of many, the number of tokens left out is said."""
    long = sample([5] * 1000, [0] * 1000, [0] * 1000)
    (shown,) = (text for attributes, text in Page(tokens.fragment(of(long), Words())).spans if "title" in attributes)
    left_out = 1000 - shown.count("end")
    assert f" … {left_out} tokens … " in shown
    assert 700 < left_out < 900
    many = sample([5] * 1000, [4, 5] * 500, [0] * 1000)
    assert "… 600 more tokens" in tokens.fragment(of(many), Words())


def test_the_counts_are_those_of_all_samples() -> None:
    """Also of those that are wholly masked; the example is the sample with the most to see."""
    dull, other = sample([1, 2], [4, 4], [0, 0], "dull"), sample([1, 2, 3], [1, 4, 5], [2, 0, 5], "other")
    found = SampleSet((dull, other), count([dull, other, sample([1], [1], [2])]), wholly_masked=1)
    assert list(tokens.as_rows(found)) == [
        ("chat template", "2", "0", "2", "template 2"),
        ("user", "3", "3", "0", ""),
        ("assistant", "1", "0", "1", "repeated 1"),
        ("all", "6", "3", "3", ""),
    ]
    assert tokens.example(found) is other
    assert "chat template" in table(tokens.as_rows(found), tokens.HEADER)


@pytest.mark.parametrize("length", [1, 159, 161, 40_000])
def test_the_picture_has_a_cell_for_each_token(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the colour of its kind, pale if it is masked; of long samples, the first ones."""
    pytest.importorskip("matplotlib", reason="the extra `report` is not installed")
    images: list[Any] = []
    from matplotlib.axes import Axes

    imshow = Axes.imshow

    def watched(axes: Any, image: Any, **options: Any) -> Any:
        images.append(image)
        return imshow(axes, image, **options)

    monkeypatch.setattr(Axes, "imshow", watched)
    random = np.random.default_rng(length)
    made = sample([0] * length, random.integers(0, 7, length).tolist(), random.integers(0, 6, length).tolist())
    assert tokens.draw(of(made)).startswith(PNG)
    (image,) = images
    cells = image[3::6, 3::6].reshape(-1, 3)[:length]
    assert len(cells) == min(length, 16_000)
    colors = {(int(k), bool(kept)): set() for k in TokenKind for kept in (False, True)}  # type: ignore[var-annotated]
    for kind, kept, color in zip(made.kinds, made.kept, cells.tolist(), strict=False):
        colors[int(kind), bool(kept)].add(tuple(color))
    seen = [next(iter(found)) for found in colors.values() if found]
    assert all(len(found) <= 1 for found in colors.values())
    assert len(set(seen)) == len(seen)


def test_kinds_have_names_and_colours() -> None:
    """All of them."""
    assert set(tokens.NAMES) == set(TokenKind) == set(tokens._COLORS)
