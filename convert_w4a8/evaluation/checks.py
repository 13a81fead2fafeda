"""Checks of an answer: what a line of a prompts file may ask for, and what an answer gets for it.

A check gives a score from 0 to 1. All but BLEU and ROUGE-L without a `minimum` are passed or failed: 1 or 0.
"""

import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from convert_w4a8.errors import ConvertError
from convert_w4a8.evaluation.library import library
from convert_w4a8.evaluation.schemas import check_schema, first_error
from convert_w4a8.evaluation.words import as_ascii, is_unspaced, words
from convert_w4a8.samples.lines import a_json
from convert_w4a8.time_limit import time_limit

_MEND = "mend the line, or leave it out"
_SECONDS = 10.0
"""For a check of an answer: patterns that repeat what repeats, and schemas that double, take years."""
_NUMBER = re.compile(r"(?:(?<![\w.])[-+])?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][-+]?\d+)?")
_FENCE = re.compile(r"```(?:json)?[ \t]*\r?\n(.*?)\n?[ \t]*```", re.DOTALL)


@dataclass(frozen=True)
class Call:
    """A tool call as an answer has it; `arguments` is JSON, if the model wrote JSON."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Check:
    """One check. settings: the other keys of its object; references: the line's `reference`, as a list.

    derived: from the request itself, which shows that an answer is bad, but not that it is good.
    """

    type: str
    settings: Mapping[str, Any]
    references: tuple[str, ...]
    derived: bool = False


@dataclass(frozen=True)
class Score:
    """What a check says of an answer. value: from 0 to 1. graded: neither passed nor failed. detail: why, in words."""

    type: str
    value: float
    graded: bool
    detail: str


def parse_check(origin: str, name: str, value: Any, references: tuple[str, ...]) -> Check:
    """Read one check of a line. Raises ConvertError, which names the line, where it is none."""
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in _KINDS:
        what = f"is {a_json(value)}" if not isinstance(value, dict) else f"has the type {kind!r}"
        raise ConvertError(origin, f"{name} {what}", f"a check is an object whose type is one of {', '.join(_KINDS)}")
    settings = {key: item for key, item in value.items() if key != "type"}
    known = _KINDS[kind]
    odd = sorted(settings.keys() - known.settings.keys())
    if odd:
        raise ConvertError(
            origin, f"{name} ({kind}) has {odd[0]!r}", f"{kind} takes {', '.join(known.settings) or 'nothing'}"
        )
    for key, setting in settings.items():
        wrong = known.settings[key](setting)
        if wrong:
            raise ConvertError(origin, f"{name}.{key} {wrong}", _MEND)
    missing = next((key for key in known.required if key not in settings), None)
    if missing:
        raise ConvertError(origin, f"{name} ({kind}) has no {missing}", _MEND)
    if (kind in ("bleu", "rouge_l") or (kind == "exact" and "value" not in settings)) and not references:
        raise ConvertError(origin, f"{name} ({kind}) needs a reference", "give the line a reference, or another check")
    if kind == "rouge_l" and (empty := next((text for text in references if not words(text)), None)) is not None:
        remedy = "give another reference, or another check, such as exact"
        raise ConvertError(origin, f"{name} (rouge_l) counts words, and the reference {empty!r} has none", remedy)
    if known.library:
        library(*known.library)
    if kind == "json" and "schema" in settings:
        check_schema(origin, f"{name}.schema", settings["schema"])
    for place, tool in enumerate(settings["tools"] if kind == "valid_calls" else []):
        check_schema(origin, f"{name}.tools[{place}].function.parameters", tool["function"].get("parameters") or True)
    return Check(kind, settings, references)


def score(check: Check, text: str, calls: Sequence[Call]) -> Score:
    """Return what an answer gets. text: what the model said; calls: the tools that it called."""
    try:
        with time_limit(_SECONDS):
            value, detail = _KINDS[check.type].score(check, text, calls)
    except TimeoutError:
        return Score(check.type, 0.0, False, f"was not compared within {_SECONDS:g} s")
    minimum = check.settings.get("minimum")
    if minimum is not None:
        return Score(check.type, float(value >= minimum), False, f"{detail}, at least {minimum:g} wanted")
    return Score(check.type, value, check.type in ("bleu", "rouge_l"), detail)


def _exact(check: Check, text: str, _calls: Sequence[Call]) -> tuple[float, str]:
    wanted = _strings(check.settings["value"]) if "value" in check.settings else list(check.references)
    found = _fold(check, text.strip())
    same = any(_fold(check, item.strip()) == found for item in wanted)
    return float(same), "as wanted" if same else "another text than wanted"


def _contains(check: Check, text: str, _calls: Sequence[Call]) -> tuple[float, str]:
    folded = _fold(check, text)
    missing = [item for item in _strings(check.settings["value"]) if _fold(check, item) not in folded]
    return float(not missing), f"lacks {missing[0]!r}" if missing else "has all of it"


def _regex(check: Check, text: str, _calls: Sequence[Call]) -> tuple[float, str]:
    match = re.search(check.settings["pattern"], text)
    return float(match is not None), "matches" if match else "does not match"


def _number(check: Check, text: str, _calls: Sequence[Call]) -> tuple[float, str]:
    """Compare the last number of an answer: reasoning comes before it."""
    found = [match for match in _NUMBER.findall(text.replace("\u2212", "-")) if any(map(str.isdigit, match))]
    if not found:
        return 0.0, "has no number"
    number = float(found[-1].replace(",", ""))
    off, most = abs(number - check.settings["value"]), check.settings.get("within", 0)
    near = off <= most or math.isclose(off, most)  # 0.4 is within 0.1 of 0.3
    return float(near), f"says {number:g}, {check.settings['value']:g} is wanted"


def _json(check: Check, text: str, _calls: Sequence[Call]) -> tuple[float, str]:
    """Parse an answer, or what it has between ``` fences, and compare it with a schema."""
    fenced = _FENCE.search(text)
    try:
        found = json.loads(fenced[1] if fenced else text, parse_constant=_no_json)
    except (ValueError, RecursionError) as error:
        return 0.0, f"is not JSON ({error})"
    wrong = first_error(check.settings.get("schema", True), found)
    return float(wrong is None), wrong or "as the schema wants it"


def _tool_call(check: Check, _text: str, calls: Sequence[Call]) -> tuple[float, str]:
    name, arguments = check.settings["name"], check.settings.get("arguments")
    alike = [call for call in calls if call.name == name]
    if not alike:
        return 0.0, f"calls {', '.join(call.name for call in calls) or 'no tool'}, {name} is wanted"
    if arguments is None or any(_parsed(call.arguments) == arguments for call in alike):
        return 1.0, f"calls {name}"
    return 0.0, f"calls {name} with {alike[0].arguments}"


def _valid_calls(check: Check, _text: str, calls: Sequence[Call]) -> tuple[float, str]:
    """Compare every call with the tools; an answer without calls passes."""
    tools = {tool["function"]["name"]: tool["function"].get("parameters") or True for tool in check.settings["tools"]}
    for call in calls:
        if call.name not in tools:
            return 0.0, f"calls {call.name}, which is none of the tools"
        found = _parsed(call.arguments)
        wrong = "no JSON" if found is None else first_error(tools[call.name], found)
        if wrong is not None:
            return 0.0, f"calls {call.name} with {call.arguments}: {wrong}"
    return 1.0, f"{len(calls)} calls, as the tools are"


def _bleu(check: Check, text: str, _calls: Sequence[Call]) -> tuple[float, str]:
    """Score with sacrebleu's sentence BLEU, as a share of 1; by characters, where references have no spaces."""
    by = {"tokenize": "char"} if any(map(is_unspaced, check.references)) else {}
    found = library("sacrebleu", "sacrebleu").sentence_bleu(text, list(check.references), **by).score / 100
    return min(1.0, max(0.0, found)), f"BLEU {found:.3f}"


def _rouge_l(check: Check, text: str, _calls: Sequence[Call]) -> tuple[float, str]:
    """Score with rouge-score's F-measure of ROUGE-L, against the nearest of the references."""
    scorer = library("rouge_score.rouge_scorer", "rouge-score").RougeScorer(["rougeL"])
    said = as_ascii(text)
    found = float(max(scorer.score(as_ascii(wanted), said)["rougeL"].fmeasure for wanted in check.references))
    return found, f"ROUGE-L {found:.3f}"


def _fold(check: Check, text: str) -> str:
    return text.casefold() if check.settings.get("ignore_case") else text


def _strings(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def _no_json(name: str) -> None:
    raise ValueError(f"it holds {name}")


def _parsed(arguments: str) -> Any:
    try:
        return json.loads(arguments or "{}", parse_constant=_no_json)
    except (ValueError, RecursionError):
        return None


# What a setting must be: each returns what is wrong with a value, or nothing.


def _is_text(value: Any) -> str:
    return "" if isinstance(value, str) else f"is {a_json(value)}, not a string"


def _is_texts(value: Any) -> str:
    whole = isinstance(value, str) or (isinstance(value, list) and value and all(isinstance(v, str) for v in value))
    return "" if whole else f"is {a_json(value)}, not a string or a list of strings"


def _is_pattern(value: Any) -> str:
    if wrong := _is_text(value):
        return wrong
    try:
        re.compile(value)
    except (re.error, RecursionError, OverflowError) as error:
        return f"is not a regular expression ({error})"
    return ""


def _is_number(value: Any) -> str:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return f"is {a_json(value)}, not a number"
    return "" if abs(value) <= sys.float_info.max else "is too large"


def _is_distance(value: Any) -> str:
    return _is_number(value) or ("is negative" if value < 0 else "")


def _is_share(value: Any) -> str:
    return _is_number(value) or ("" if 0 <= value <= 1 else "is not between 0 and 1")


def _is_flag(value: Any) -> str:
    return "" if isinstance(value, bool) else f"is {a_json(value)}, not true or false"


def _is_object(value: Any) -> str:
    return "" if isinstance(value, dict) else f"is {a_json(value)}, not an object"


def _is_schema(value: Any) -> str:
    return "" if isinstance(value, dict | bool) else f"is {a_json(value)}, not a JSON schema"


def _is_tools(value: Any) -> str:
    functions = [tool.get("function") for tool in value if isinstance(tool, dict)] if isinstance(value, list) else []
    named = all(isinstance(function, dict) and isinstance(function.get("name"), str) for function in functions)
    return "" if functions and named and len(functions) == len(value) else "is not a list of functions with names"


@dataclass(frozen=True)
class _Kind:
    score: Callable[[Check, str, Sequence[Call]], tuple[float, str]]
    settings: Mapping[str, Callable[[Any], str]]
    required: tuple[str, ...] = ()
    library: tuple[str, str] | None = None
    """Module and package, of the extra `evaluate`."""


_KINDS = {
    "exact": _Kind(_exact, {"value": _is_texts, "ignore_case": _is_flag}),
    "contains": _Kind(_contains, {"value": _is_texts, "ignore_case": _is_flag}, ("value",)),
    "regex": _Kind(_regex, {"pattern": _is_pattern}, ("pattern",)),
    "number": _Kind(_number, {"value": _is_number, "within": _is_distance}, ("value",)),
    "json": _Kind(_json, {"schema": _is_schema}, library=("jsonschema", "jsonschema")),
    "tool_call": _Kind(_tool_call, {"name": _is_text, "arguments": _is_object}, ("name",)),
    "valid_calls": _Kind(_valid_calls, {"tools": _is_tools}, ("tools",), ("jsonschema", "jsonschema")),
    "bleu": _Kind(_bleu, {"minimum": _is_share}, library=("sacrebleu", "sacrebleu")),
    "rouge_l": _Kind(_rouge_l, {"minimum": _is_share}, library=("rouge_score.rouge_scorer", "rouge-score")),
}
