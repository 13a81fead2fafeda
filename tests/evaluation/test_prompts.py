"""Prompts files: what is read, and how a bad line is named."""

import json
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT

from convert_w4a8.errors import ConvertError
from convert_w4a8.evaluation.prompts import read_prompts


def write(path: Path, *lines: Any) -> Path:
    path.write_text(
        "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines), encoding="utf-8"
    )
    return path


def test_a_whole_line_is_read(tmp_path: Path) -> None:
    """Every column, and what stands for those that are absent."""
    chat = {
        "id": "a",
        "messages": [{"role": "user", "content": "Weather in Oslo?"}],
        "tools": [{"type": "function", "function": {"name": "weather"}}],
        "checks": [{"type": "tool_call", "name": "weather", "arguments": {"city": "Oslo"}}],
        "tags": ["tools", "tools", "short"],
        "max_tokens": 7,
    }
    found = read_prompts(write(tmp_path / "p.jsonl", chat, "\n", {"prompt": "def f():"})).prompts
    assert [prompt.id for prompt in found] == ["a", "2"]
    assert found[0].tags == ("tools", "short")
    assert found[0].max_tokens == 7
    assert found[0].checks[0].settings == {"name": "weather", "arguments": {"city": "Oslo"}}
    assert found[0].shown == "[user] Weather in Oslo?"
    assert (found[1].prompt, found[1].messages, found[1].checks, found[1].max_tokens) == ("def f():", None, (), None)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{oops\n", "is not JSON"),
        ([1], "is a list, not an object"),
        ({}, "has neither prompt nor messages"),
        ({"prompt": "a", "messages": []}, "has both prompt and messages"),
        ({"prompt": " "}, "prompt is empty"),
        ({"prompt": 3}, "prompt is a number, not a string"),
        ({"messages": [{"role": "nobody", "content": "a"}]}, "has the role 'nobody'"),
        ({"prompt": "a", "tools": [{}]}, "has tools beside prompt"),
        ({"prompt": "a", "check": []}, "has 'check', which is not known"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens is 0, not a whole number from 1"),
        ({"prompt": "a", "max_tokens": True}, "max_tokens is true or false"),
        ({"prompt": "a", "tags": "x"}, "tags is a string, not a list"),
        ({"prompt": "a", "checks": [{"type": "exact"}]}, "needs a reference"),
        ({"prompt": "a", "checks": ["exact"]}, "checks[0] is a string"),
        ({"prompt": "a", "checks": [{"type": "exactly"}]}, "has the type 'exactly'"),
        ({"prompt": "a", "checks": [{"type": "contains"}]}, "has no value"),
        ({"prompt": "a", "checks": [{"type": "contains", "value": []}]}, "not a string or a list of strings"),
        ({"prompt": "a", "checks": [{"type": "regex", "pattern": "("}]}, "is not a regular expression"),
        ({"prompt": "a", "checks": [{"type": "number", "value": "4"}]}, "is a string, not a number"),
        ({"prompt": "a", "checks": [{"type": "number", "value": 4, "within": -1}]}, "is negative"),
        ({"prompt": "a", "checks": [{"type": "number", "value": 4, "tolerance": 1}]}, "has 'tolerance'"),
        ({"prompt": "a", "checks": [{"type": "tool_call", "name": "f", "arguments": "x"}]}, "not an object"),
        ({"id": "1", "prompt": "a"}, "has the id '1', as"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: Any, reason: str) -> None:
    """By its number, with what is wrong."""
    path = write(tmp_path / "p.jsonl", {"prompt": "fine"}, "\n", line)
    with pytest.raises(ConvertError) as caught:
        read_prompts(path)
    assert str(caught.value).startswith(f"{path} line 3: ")
    assert reason in str(caught.value)


def test_a_schema_is_checked_and_nothing_is_fetched(tmp_path: Path) -> None:
    """A schema that is none, and one that refers to another place, are refused."""
    pytest.importorskip("jsonschema", reason="the extra `evaluate` is not installed")
    for schema, reason in (
        ({"type": "nothing"}, "is no JSON schema"),
        ({"properties": {"a": {"$ref": "http://localhost:1/x"}}}, "refers to http://localhost:1/x"),
    ):
        line = {"prompt": "a", "checks": [{"type": "json", "schema": schema}]}
        with pytest.raises(ConvertError, match=reason):
            read_prompts(write(tmp_path / "p.jsonl", line))


def test_no_prompts_and_no_file_are_refused(tmp_path: Path) -> None:
    """With the name of the file."""
    with pytest.raises(ConvertError, match="holds no prompts"):
        read_prompts(write(tmp_path / "p.jsonl", "\n"))
    with pytest.raises(ConvertError, match="cannot be read"):
        read_prompts(tmp_path / "none.jsonl")


def test_the_example_of_the_documents_can_be_read() -> None:
    """40 prompts, with every kind of check."""
    for name in ("jsonschema", "sacrebleu", "rouge_score"):
        pytest.importorskip(name, reason="the extra `evaluate` is not installed")
    found = read_prompts(ROOT / "docs" / "examples" / "prompts.jsonl").prompts
    assert len(found) == 40
    assert all(prompt.checks and prompt.tags for prompt in found)
    kinds = {check.type for prompt in found for check in prompt.checks}
    assert kinds == {"exact", "contains", "regex", "number", "json", "tool_call", "bleu", "rouge_l"}


def test_the_same_prompt_twice_is_named(tmp_path: Path) -> None:
    """It counts once: the same answer again is no more evidence."""
    path = tmp_path / "prompts.jsonl"
    lines: list[dict[str, Any]] = [{"prompt": "a"}, {"messages": [{"role": "user", "content": "a"}]}]
    lines.append({"messages": [{"role": "user", "content": "a"}], "tools": [{"function": {"name": "f"}}]})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert len(read_prompts(path).prompts) == 3
    again = {"id": "x", "max_tokens": 3, "messages": [{"content": "a", "role": "user"}], "tags": ["b"]}
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, again]), encoding="utf-8")
    with pytest.raises(
        ConvertError, match=r"line 4: asks the same as .*line 2, which tells nothing more; leave it out"
    ):
        read_prompts(path)
