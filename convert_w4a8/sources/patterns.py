"""Regular expressions from a configuration. They may be hostile, and made to take for ever."""

import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from convert_w4a8.errors import ConvertError, PlanError, Problem
from convert_w4a8.sources.checks import setting
from convert_w4a8.time_limit import time_limit

_SECONDS = 0.5
"""The longest that one pattern may take for one text."""
_SECONDS_TOGETHER = 5.0
"""The longest that slow patterns may take for all texts."""
_SLOW = 0.01
"""Seconds of processor time. Patterns that people write take some millionths."""
_TEXTS = 1000
"""So many texts may take as much again."""
_spent = 0.0


def matches(pattern: str, text: str, key: str, *, anywhere: bool = False) -> bool:
    """Whether a pattern of a setting matches at the beginning of a text, or anywhere in it.

    Raises:
        ConvertError: it is no regular expression.
        PlanError: it takes longer than half a second (noticed in the main thread only), or patterns together take
            longer than five. They would for other texts, too.

    """
    return first_match(pattern, (text,), key, anywhere=anywhere) is not None


def first_match(pattern: str, texts: Iterable[str], key: str, *, anywhere: bool = False) -> str | None:
    """Return the first of some texts that a pattern of a setting matches, as `matches` does; None if it matches none.

    Raises what `matches` raises; half a second is for all texts together.
    """
    global _spent  # noqa: PLW0603 - of all settings and checkpoints of a process
    began = time.thread_time()
    text = ""
    try:
        with time_limit(_SECONDS):
            compiled = re.compile(pattern)
            match = compiled.search if anywhere else compiled.match
            found, count = None, 0
            for count, text in enumerate(texts, start=1):  # noqa: B007
                if match(text) is not None:
                    found = text
                    break
        seconds = time.thread_time() - began
        _spent += seconds if seconds > _SLOW * (1 + count / _TEXTS) else 0.0
        if _spent > _SECONDS_TOGETHER:
            _spent = 0.0
            raise TimeoutError  # noqa: TRY301
        return found  # noqa: TRY300
    except (re.error, RecursionError, OverflowError) as error:
        reason = f"{pattern!r} is not a regular expression ({error})"
        raise ConvertError(f"quantization_config: {key}", reason, "repair the pattern") from error
    except TimeoutError as error:
        reason = f"{pattern!r} takes too long to match {text!r}"
        raise PlanError([Problem(f"quantization_config: {key}", reason, "repair the pattern")]) from error


@dataclass(frozen=True)
class Exclusion:
    """Something that a source's settings exclude from quantization: the setting, what it says, and what that means.

    entries: the same as entries of compressed-tensors' `ignore` (names, and `re:` patterns), which vLLM matches with
        its own module names. The later ones match less, for where the first also match what is quantized.
    """

    setting: str
    value: str
    entries: tuple[str, ...]


def find_exclusions(config: Mapping[str, Any]) -> Iterator[Exclusion]:
    """Yield what a quantization_config excludes, whatever its format, as vLLM 0.25.1 to 0.33.0 reads it.

    `ignore` (compressed-tensors): names and patterns. `modules_to_not_convert` (AWQ, `is_layer_skipped`): any part of a
    name. `dynamic` (GPTQModel): patterns that begin with `-:`.
    """
    for entry in _strings(config.get("ignore")):
        yield Exclusion("ignore", entry, (entry,))
    for entry in _strings(config.get("modules_to_not_convert")):
        part = re.escape(entry)
        yield Exclusion("modules_to_not_convert", entry, (f"re:.*{part}", rf"re:(?:.*\.)?{part}(?:\.|$)"))
    for entry in _strings(config.get("dynamic")):
        if entry.startswith("-:"):
            yield Exclusion("dynamic", entry, (f"re:{entry.removeprefix('-:')}",))


def _strings(value: object) -> list[str]:
    return [item for item in value if isinstance(item, str) and item] if isinstance(value, list | dict) else []


def overridden(config: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """Apply GPTQModel's `dynamic`: the first pattern that matches a module's name overrides the configuration.

    A pattern may begin with "+:"; one that begins with "-:" excludes modules, which then have no qweight.
    """
    dynamic = setting(config, "dynamic", dict, {})
    for pattern in dynamic:
        if pattern.startswith("-:"):
            continue
        if matches(pattern.removeprefix("+:"), module, "dynamic"):
            return {**config, **setting(dynamic, pattern, dict, {}, "quantization_config: dynamic")}
    return config
