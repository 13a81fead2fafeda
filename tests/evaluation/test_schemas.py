"""JSON schemas: what cannot be used is found before anything is asked, whoever wrote it."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convert_w4a8.errors import ConvertError
from convert_w4a8.evaluation.checks import Call, parse_check, score
from convert_w4a8.evaluation.logs import read_logs
from convert_w4a8.evaluation.schemas import check_schema, first_error

pytest.importorskip("jsonschema", reason="the extra `evaluate` is not installed")

INTEGER = {"type": "integer"}
USABLE: tuple[Any, ...] = (
    True,
    {"$ref": "#/$defs/a~1b", "$defs": {"a/b": INTEGER}},
    {"$ref": "#/%24defs/a%25b", "$defs": {"a%b": INTEGER}},
    {"$ref": "#here", "$defs": {"x": {"$anchor": "here", **INTEGER}}},
    {"anyOf": [INTEGER, {"$ref": "#/anyOf/0"}]},
    {"type": "integer", "const": 3, "examples": [{"$ref": "nowhere"}]},
    {"$schema": "http://json-schema.org/draft-07/schema#", "$ref": "#/definitions/a", "definitions": {"a": INTEGER}},
    {"$id": "https://x.example/a", "$ref": "#/$defs/a", "$defs": {"a": {"$id": "b", **INTEGER}}},
)
OF_ITSELF: tuple[Any, ...] = (
    {"$ref": "#"},
    {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"allOf": [{}, {"$ref": "#/$defs/a"}]}}},
    {"anyOf": [INTEGER, {"$ref": "#"}]},
    {"not": {"if": {"$ref": "#"}}},
    {"dependentSchemas": {"a": {"$ref": "#"}}},
    {"$recursiveRef": "#", "$schema": "https://json-schema.org/draft/2019-09/schema"},
    {"$dynamicRef": "#a", "$dynamicAnchor": "a"},
)
OTHERS: tuple[tuple[Any, str], ...] = (
    ({"$ref": "#/components/schemas/Foo"}, "which it does not have"),
    ({"$ref": "#nowhere"}, "which it does not have"),
    ({"$ref": "#nowhere", "description": "nowhere"}, "which it does not have"),
    ({"anyOf": [INTEGER, {"$ref": "#/anyOf/7"}]}, "which it does not have"),
    # Within a schema that has an address of its own, # is that schema.
    ({"$defs": {"a": INTEGER}, "items": {"$id": "https://x.example/b", "$ref": "#/$defs/a"}}, "which it does not have"),
    ({"$ref": "https://x.example/a"}, "nothing is fetched"),
    ({"$ref": "a.json"}, "nothing is fetched"),
    ({"$schema": 5}, "has a $schema that is no string"),
    ({"$ref": "#/x", "x": {"type": "text"}}, "is no JSON schema"),
    ({"$ref": "#/x", "x": 5}, "is no JSON schema"),
    ({"pattern": "("}, "is no JSON schema"),
    (5, "is a number, not a JSON schema"),
    ([], "is a list, not a JSON schema"),
    ("x", "is a string, not a JSON schema"),
    *((schema, "refers to itself without end") for schema in OF_ITSELF),
)


@pytest.mark.parametrize("schema", USABLE, ids=str)
def test_what_can_be_used(schema: Any) -> None:
    """References lead where the standard says."""
    check_schema("line 1", "schema", schema)
    assert first_error(schema, 3) is None
    assert (first_error(schema, "3") is None) == (schema is True)


@pytest.mark.parametrize(("schema", "said"), OTHERS, ids=lambda value: str(value)[:60])
def test_what_cannot(tmp_path: Path, schema: Any, said: str) -> None:
    """It is said with the line; a request of production that has one is asked without that check."""
    with pytest.raises(ConvertError, match="line 1") as raised:
        check_schema("line 1", "schema", schema)
    assert said in str(raised.value)
    call = {"type": "function", "function": {"name": "f", "parameters": schema}}
    form = {"type": "json_schema", "json_schema": {"schema": schema}}
    request = {"messages": [{"role": "user", "content": "a"}], "tools": [call], "response_format": form}
    log = tmp_path / "log.jsonl"
    log.write_text(json.dumps({"id": "1", "side": "baseline", "status": 200, "request": request}))
    prompt = read_logs([log], 10, answered=False).prompts.prompts[0]
    assert [check.type for check in prompt.checks] == (["valid_calls"] if schema == [] else [])


def test_a_schema_that_is_nested_too_deep() -> None:
    """Deeper than any line of JSON can be read."""
    schema: dict[str, Any] = {}
    for _ in range(2000):
        schema = {"not": schema}
    with pytest.raises(ConvertError, match="line 1: schema is nested too deep"):
        check_schema("line 1", "schema", schema)


def test_nothing_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even what a part that is no schema by the standard has as its address."""

    def connect(*_: object) -> None:
        raise AssertionError("a connection was made")

    monkeypatch.setattr(socket.socket, "connect", connect)
    schema = {"$ref": "#/x", "x": {"$id": "http://127.0.0.1:9/a", "properties": {"b": {"$ref": "#/properties/c"}}}}
    with pytest.raises(ConvertError, match="which it does not have"):
        check_schema("line 1", "schema", schema)


def test_an_answer_that_is_nested_too_deep() -> None:
    """Fails: a model may open brackets without end, and the schema is not to blame."""
    lists = {"type": "array", "items": {"$ref": "#"}}
    deep = "[" * 700 + "]" * 700
    assert score(parse_check("l", "c", {"type": "json", "schema": lists}, ()), "[[], [[]]]", ()).value == 1
    assert score(parse_check("l", "c", {"type": "json", "schema": lists}, ()), deep, ()).value == 0
    tools = [{"function": {"name": "f", "parameters": lists}}]
    found = score(parse_check("l", "c", {"type": "valid_calls", "tools": tools}, ()), "", (Call("f", deep),))
    assert (found.value, "nested too deep" in found.detail) == (0, True)


@pytest.mark.parametrize("text", ["1" + "0" * 400, "1e400"])
def test_an_answer_whose_number_has_no_end(text: str) -> None:
    """Fails: it may be larger than any float."""
    assert score(parse_check("l", "c", {"type": "json", "schema": {"multipleOf": 0.5}}, ()), text, ()).value == 0


PLACES = st.sampled_from(["#", "#/x", "#/$defs/a", "#/$defs/b", "#n", "#/items", "#/anyOf/0"])
SCHEMAS = st.recursive(
    st.one_of(
        st.booleans(), st.just({}), st.just(INTEGER), PLACES.map(lambda ref: {"$ref": ref}), st.just({"type": 5})
    ),
    lambda parts: (
        st.dictionaries(
            st.sampled_from(["not", "items", "x", "if", "then", "additionalProperties", "contains"]), parts, max_size=3
        )
        | st.lists(parts, min_size=1, max_size=2).map(lambda found: {"anyOf": found})
        | st.builds(lambda a, b: {"$defs": {"a": a, "b": b}, "$ref": "#/$defs/a"}, parts, parts)
        | parts.map(lambda found: {"$id": "https://x.example/y", "$anchor": "n", "items": found})
    ),
    max_leaves=8,
)


@given(SCHEMAS, st.recursive(st.integers() | st.text(max_size=2), lambda v: st.lists(v, max_size=2), max_leaves=6))
def test_what_is_taken_does_not_fail_later(schema: Any, value: Any) -> None:
    """Whatever refers to whatever: a value is as the schema wants it or not."""
    try:
        check_schema("line 1", "schema", schema)
    except ConvertError:
        return
    assert "nested" not in (first_error(schema, value) or "")
