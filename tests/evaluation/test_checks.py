"""Checks: what passes, what does not, and the libraries' own scores."""

import signal
import threading
import unicodedata
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convert_w4a8.errors import ConvertError
from convert_w4a8.evaluation import checks, library
from convert_w4a8.evaluation.checks import Call, parse_check, score
from convert_w4a8.evaluation.words import words


def value(
    check: dict[str, Any], text: str = "", calls: tuple[Call, ...] = (), reference: tuple[str, ...] = ()
) -> float:
    return score(parse_check("line", "check", check, reference), text, calls).value


@pytest.mark.parametrize(
    ("check", "text", "passes"),
    [
        ({"type": "exact", "value": "Yes"}, " Yes\n", True),
        ({"type": "exact", "value": "Yes"}, "yes", False),
        ({"type": "exact", "value": ["No", "yes"], "ignore_case": True}, "YES", True),
        ({"type": "contains", "value": ["a", "b"]}, "b and a", True),
        ({"type": "contains", "value": ["a", "c"]}, "b and a", False),
        ({"type": "regex", "pattern": r"^\d{4}$"}, "2026", True),
        ({"type": "regex", "pattern": r"^\d{4}$"}, "in 2026", False),
        ({"type": "number", "value": 1234.5}, "3 times, so 1,234.5.", True),
        ({"type": "number", "value": -2, "within": 0.1}, "it is -2.05", True),
        ({"type": "number", "value": 2}, "2 or 3", False),
        ({"type": "number", "value": -5}, "x = \u22125", True),
        ({"type": "number", "value": 2024}, "in 2020-2024", True),
        ({"type": "number", "value": 5}, "10 - 5", True),
        ({"type": "number", "value": -5}, "(-5)", True),
        ({"type": "number", "value": 0.3, "within": 0.1}, "0.4", True),
        ({"type": "number", "value": 0.3, "within": 0.1}, "0.4001", False),
        ({"type": "number", "value": 0.3}, "0.3000001", False),
        ({"type": "number", "value": 2}, "none at all.", False),
        ({"type": "number", "value": 1.5e-3}, "1.5e-3", True),
    ],
)
def test_checks_of_texts(check: dict[str, Any], text: str, passes: bool) -> None:
    """They pass or fail."""
    assert value(check, text) == float(passes)


def test_the_reference_is_what_exact_wants() -> None:
    """Any of them."""
    assert value({"type": "exact"}, "b", reference=("a", "b")) == 1
    assert value({"type": "exact"}, "c", reference=("a", "b")) == 0


@pytest.mark.parametrize(
    ("calls", "passes"),
    [
        ([("weather", '{"city": "Oslo"}')], True),
        ([("clock", "{}"), ("weather", '{ "city":"Oslo" }')], True),
        ([("weather", '{"city": "Rome"}')], False),
        ([("weather", "Oslo")], False),
        ([("clock", '{"city": "Oslo"}')], False),
        ([], False),
    ],
)
def test_tool_calls(calls: list[tuple[str, str]], passes: bool) -> None:
    """Name and arguments, however these are written."""
    check = {"type": "tool_call", "name": "weather", "arguments": {"city": "Oslo"}}
    assert value(check, calls=tuple(Call(*call) for call in calls)) == float(passes)


def test_a_call_without_arguments() -> None:
    """Some servers write nothing, others an empty object."""
    for arguments in ("", "{}"):
        assert value({"type": "tool_call", "name": "now", "arguments": {}}, calls=(Call("now", arguments),)) == 1


def test_json_by_schema() -> None:
    """As it is, or between fences; without a schema any JSON passes."""
    pytest.importorskip("jsonschema", reason="the extra `evaluate` is not installed")
    check = {"type": "json", "schema": {"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}}
    assert value(check, '{"a": 1}') == 1
    assert value(check, 'Here:\n```json\n{"a": 1}\n```\n') == 1
    assert value(check, '{"a": "1"}') == 0
    assert value(check, "{a: 1}") == 0
    assert value({"type": "json"}, "[1]") == 1


def test_bleu_is_sacrebleus_and_rouge_rouge_scores() -> None:
    """Graded without a minimum, passed or failed with one."""
    sacrebleu = pytest.importorskip("sacrebleu", reason="the extra `evaluate` is not installed")
    scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="the extra `evaluate` is not installed")
    text, reference = "the cat sat on a mat today", "the cat sat on the mat today"
    assert (
        value({"type": "bleu"}, text, reference=(reference,)) == sacrebleu.sentence_bleu(text, [reference]).score / 100
    )
    wanted = scorer.RougeScorer(["rougeL"]).score(reference, text)["rougeL"].fmeasure
    assert value({"type": "rouge_l"}, text, reference=("other", reference)) == wanted
    for minimum, passes in ((wanted - 0.01, 1.0), (wanted + 0.01, 0.0)):
        found = score(parse_check("l", "c", {"type": "rouge_l", "minimum": minimum}, (reference,)), text, ())
        assert (found.value, found.graded) == (passes, False)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the command that installs it, before anything is asked."""

    def nothing(_name: str) -> None:
        raise ImportError

    monkeypatch.setattr(library, "import_module", nothing)
    with pytest.raises(ConvertError, match=r"needs sacrebleu, which is not installed; pip install .*\[evaluate\]"):
        parse_check("line 1", "checks[0]", {"type": "bleu"}, ("a",))


@pytest.mark.parametrize("number", ["1" + "0" * 400, "-1" + "0" * 400])
def test_a_number_that_is_too_large(number: str) -> None:
    """A whole number may be larger than any float."""
    for key in ("value", "within"):
        check = {"type": "number", "value": 1, "within": 0} | {key: int(number)}
        with pytest.raises(ConvertError, match=rf"line: check.{key} is too large"):
            parse_check("line", "check", check, ())


@pytest.mark.parametrize(
    ("text", "passes"), [("[NaN]", False), ("[-Infinity]", False), ("```json\r\n[1]\r\n```", True), ("[null]", True)]
)
def test_what_is_json(text: str, passes: bool) -> None:
    """As programs read it, not as Python does."""
    pytest.importorskip("jsonschema", reason="the extra `evaluate` is not installed")
    assert value({"type": "json"}, text) == float(passes)
    calls = (Call("f", text),)
    if not text.startswith("`"):
        assert value({"type": "valid_calls", "tools": [{"function": {"name": "f"}}]}, calls=calls) == float(passes)


@pytest.mark.parametrize(
    ("reference", "near", "far"),
    [
        ("Столица Франции — Париж", "столица Франции: Лион", "Я не знаю"),
        ("法国的首都是巴黎。", "法国的首都是里昂。", "我不知道"),
        ("フランスの首都はパリです", "フランスの首都はリヨンです", "わかりません"),
        ("เมืองหลวงคือปารีส", "เมืองหลวงคือลียง", "ไม่รู้"),
        ("عاصمة فرنسا هي باريس", "عاصمة فرنسا هي ليون", "لا أعرف"),
        ("फ़्रांस की राजधानी पेरिस है", "फ़्रांस की राजधानी ल्यों है", "मुझे नहीं पता"),
        ("La société a été créée", "La societe a été créée", "Je ne sais pas"),
    ],
)
def test_texts_of_all_scripts_are_compared(reference: str, near: str, far: str) -> None:
    """The right answer has all points, another one fewer; rouge-score and sacrebleu alone give many of them none."""
    pytest.importorskip("sacrebleu", reason="the extra `evaluate` is not installed")
    for kind in ("rouge_l", "bleu"):
        right, less, none = (value({"type": kind}, text, reference=(reference,)) for text in (reference, near, far))
        assert right == pytest.approx(1)
        assert 0.95 > less > none + (0 if kind == "bleu" else 0.3)


def test_composed_and_decomposed_letters_are_the_same() -> None:
    """As they look the same."""
    pytest.importorskip("rouge_score", reason="the extra `evaluate` is not installed")
    assert value({"type": "rouge_l"}, unicodedata.normalize("NFD", "été"), reference=("été",)) == 1


@given(st.text(st.characters(max_codepoint=127), max_size=40), st.text(st.characters(max_codepoint=127), max_size=40))
def test_ascii_is_scored_as_rouge_score_does(reference: str, text: str) -> None:
    """To the last bit."""
    scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="the extra `evaluate` is not installed")
    if words(reference):
        wanted = scorer.RougeScorer(["rougeL"]).score(reference, text)["rougeL"].fmeasure
        assert value({"type": "rouge_l"}, text, reference=(reference,)) == wanted


def test_a_reference_without_words_is_refused() -> None:
    """Nothing would ever score."""
    pytest.importorskip("rouge_score", reason="the extra `evaluate` is not installed")
    with pytest.raises(ConvertError, match=r"reference '→ 🙂' has none; give another reference, or another check"):
        parse_check("line", "check", {"type": "rouge_l"}, ("a", "→ 🙂"))


def doubling(depth: int) -> dict[str, Any]:
    """Return a schema of few lines that asks the same 2^depth times."""
    parts = {f"a{n}": {"allOf": [{"$ref": f"#/$defs/a{n + 1}"}] * 2} for n in range(depth)}
    return {"$ref": "#/$defs/a0", "$defs": parts | {f"a{depth}": {}}}


@pytest.mark.parametrize(
    "check",
    [
        {"type": "regex", "pattern": "(a+)+$"},
        {"type": "json", "schema": {"pattern": "(a+)+$"}},
        {"type": "json", "schema": doubling(60)},
        {"type": "valid_calls", "tools": [{"function": {"name": "f", "parameters": doubling(60)}}]},
    ],
    ids=["regex", "pattern", "doubling", "calls"],
)
def test_a_check_that_takes_years_fails(monkeypatch: pytest.MonkeyPatch, check: dict[str, Any]) -> None:
    """A logged request may bring one, and the others are still to be compared."""
    pytest.importorskip("jsonschema", reason="the extra `evaluate` is not installed")
    monkeypatch.setattr(checks, "_SECONDS", 0.3)
    before = signal.getsignal(signal.SIGALRM)
    text = '"' + "a" * 60 + '!"'
    found = score(parse_check("line", "check", check, ()), text, (Call("f", text),))
    assert (found.value, found.detail) == (0, "was not compared within 0.3 s")
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    elsewhere: list[float] = []
    ordinary = parse_check("line", "check", {"type": "regex", "pattern": "a"}, ())
    thread = threading.Thread(target=lambda: elsewhere.append(score(ordinary, text, ()).value))
    thread.start()
    thread.join()
    assert elsewhere == [1]
