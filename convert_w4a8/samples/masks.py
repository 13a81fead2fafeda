"""Which tokens are kept out of statistics: `--mask` as options, and what they do to a sample."""

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from convert_w4a8.samples.sample import REASONS, TokenKind


class Which(StrEnum):
    """Which occurrences of a thing are masked."""

    NONE = "none"
    ALL = "all"
    FIRST = "first"
    """The first one in each sample, up to the next words of somebody."""
    LATER = "later"
    """All but those in the first sample that has it."""


KINDS = {"template": TokenKind.TEMPLATE, "system": TokenKind.SYSTEM, "tools": TokenKind.TOOLS}
"""The masks of kinds of tokens."""
_WORDS = (TokenKind.TEXT, TokenKind.USER, TokenKind.ASSISTANT, TokenKind.TOOL)
_CHOICES = {**dict.fromkeys(KINDS, (Which.ALL, Which.FIRST)), "repeated": (Which.LATER, Which.ALL)}
"""Mask → what may follow it after a colon; the first is meant where nothing does."""
_NUMBERS = {"ngram": (4, 4096), "samples": (2, 1_000_000)}
"""Settings of `repeated` → least and largest value."""
SYNTAX = "template, system, tools (each also with :first), repeated (also with :all, :ngram=N, :samples=N)"


@dataclass(frozen=True)
class MaskOptions:
    """What `--mask` says. The column `loss_mask` is obeyed besides."""

    template: Which = Which.NONE
    system: Which = Which.NONE
    tools: Which = Which.NONE
    repeated: Which = Which.NONE
    ngram: int = 32
    """A span is repeated from this many tokens on."""
    samples: int = 2
    """A span is repeated if at least so many samples hold it."""

    @property
    def need_kinds(self) -> tuple[str, ...]:
        """The masks for which it must be known what each token is."""
        return tuple(name for name in KINDS if getattr(self, name) is not Which.NONE)

    def __str__(self) -> str:
        """Render as `parse_mask` reads it; empty if nothing is masked."""
        parts = []
        for name, choices in _CHOICES.items():
            which = getattr(self, name)
            if which is not Which.NONE:
                parts.append(name if which is choices[0] else f"{name}:{which}")
        if self.repeated is not Which.NONE:
            default = MaskOptions()
            numbers = {name: getattr(self, name) for name in _NUMBERS}
            parts[-1] += "".join(f":{k}={v}" for k, v in numbers.items() if v != getattr(default, k))
        return ",".join(parts)


NO_MASK = MaskOptions()


def parse_mask(text: str) -> MaskOptions:
    """Read the value of `--mask`: names with commas between, each followed by settings with colons before them.

    Raises:
        ValueError: the text is none. The message says what is wrong, and what there is.

    """
    options, seen = NO_MASK, set()
    for item in text.split(","):
        name, *settings = (part.strip() for part in item.split(":"))
        if name not in _CHOICES:
            raise ValueError(f"{name!r} is no mask; there are {SYNTAX}")
        if name in seen:
            raise ValueError(f"{name!r} is there twice")
        seen.add(name)
        which, numbers = _settings(name, settings)
        changes: dict[str, Any] = {name: which, **numbers}
        options = replace(options, **changes)
    return options


def _settings(name: str, settings: list[str]) -> tuple[Which, dict[str, int]]:
    """Read what follows a mask's name."""
    which: Which | None = None
    numbers: dict[str, int] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals and setting in _CHOICES[name] and which is None:
            which = Which(setting)
        elif equals and name == "repeated" and key in _NUMBERS and key not in numbers:
            least, most = _NUMBERS[key]
            if not (value.isascii() and value.isdigit() and len(value) < 10 and least <= int(value) <= most):
                raise ValueError(f"{setting!r}: {key} is a whole number from {least:,} to {most:,}")
            numbers[key] = int(value)
        else:
            raise ValueError(f"{setting!r} cannot follow {name!r}; there are {SYNTAX}")
    return which or _CHOICES[name][0], numbers


def mask_kinds(kinds: npt.NDArray[np.uint8], masked_by: npt.NDArray[np.uint8], options: MaskOptions) -> None:
    """Mask tokens of a sample in place by what they are, but those that are masked already. Both arrays are [T]."""
    for name in options.need_kinds:
        found = kinds == KINDS[name]
        if getattr(options, name) is Which.FIRST:
            found &= _before_words(kinds, found)
        masked_by[found & (masked_by == 0)] = 1 + REASONS.index(name)


def _before_words(kinds: npt.NDArray[np.uint8], found: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Return which tokens stand before the first words that come after a found token, bool [T].

    Words are those of users, the model and tools. So a list of tools is one occurrence with the line in the header that
    says that there are tools, and a system prompt with what the template puts into it.
    """
    words = np.isin(kinds, _WORDS)
    begun = np.cumsum(found) > 0
    before: npt.NDArray[np.bool_] = np.cumsum(words & begun) == 0
    return before
