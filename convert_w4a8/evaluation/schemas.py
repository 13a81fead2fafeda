"""JSON schemas: whether one can be used at all, and what is wrong with a value.

A schema may come from anybody, with a logged request. What would fail while a value is compared is found before, and
nothing is fetched.
"""

from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from typing import Any

from convert_w4a8.errors import ConvertError
from convert_w4a8.evaluation.library import library
from convert_w4a8.samples.lines import a_json

_MEND = "mend the line, or leave it out"
_REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")
_IN_PLACE = ("allOf", "anyOf", "oneOf", "not", "if", "then", "else", "dependentSchemas", "dependencies", "extends")
"""Keys whose schemas, alone, in a list or by name, are of the same value as the schema that has them."""


def check_schema(origin: str, name: str, schema: Any) -> None:
    """Raise ConvertError, which names the line, where a schema cannot be used."""
    if not isinstance(schema, dict | bool):
        raise ConvertError(origin, f"{name} is {a_json(schema)}, not a JSON schema", _MEND)
    if isinstance(schema, dict) and not isinstance(schema.get("$schema", ""), str):
        raise ConvertError(origin, f"{name} has a $schema that is no string", _MEND)
    try:
        _check(origin, name, schema)
    except RecursionError as error:
        raise ConvertError(origin, f"{name} is nested too deep", _MEND) from error


def first_error(schema: Any, value: Any) -> str | None:
    """Return what is wrong with a value first, and where; None where it is as the schema wants.

    schema: one that `check_schema` takes.
    """
    registry = library("referencing", "jsonschema").Registry()  # one that fetches nothing
    try:
        error = next(_validator(schema)(schema, registry=registry).iter_errors(value), None)
    except RecursionError:
        return "is nested too deep to be compared"
    except ArithmeticError:
        return "has a number that is too large to be compared"
    return None if error is None else f"{error.json_path}: {error.message}"


def _validator(schema: Any) -> Any:
    jsonschema = library("jsonschema", "jsonschema")
    return jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)


def _check(origin: str, name: str, schema: Any) -> None:
    jsonschema, referencing = library("jsonschema", "jsonschema"), library("referencing", "jsonschema")
    dialects = library("referencing.jsonschema", "jsonschema")
    validator = _validator(schema)
    dialect = dialects.specification_with(validator.META_SCHEMA["$schema"], default=dialects.DRAFT202012)
    todo = [(schema, referencing.Registry().resolver_with_root(dialect.create_resource(schema)), True)]
    leads_to: dict[int, list[int]] = {}
    while todo:
        place, resolver, to_check = todo.pop()
        if to_check:
            try:
                validator.check_schema(place)
            except jsonschema.exceptions.SchemaError as error:
                raise ConvertError(origin, f"{name} is no JSON schema ({error.message})", _MEND) from error
        if id(place) in leads_to or not isinstance(place, dict):
            continue
        leads_to[id(place)] = [id(part) for part in _in_place(place)]
        for ref in [place[key] for key in _REFERENCES if isinstance(place.get(key), str)]:
            if not ref.startswith("#"):
                remedy = "put what it refers to into $defs; nothing is fetched"
                raise ConvertError(origin, f"{name} refers to {ref}", remedy)
            try:
                found = resolver.lookup(ref)
            except referencing.exceptions.Unresolvable as error:
                raise ConvertError(origin, f"{name} refers to {ref}, which it does not have", _MEND) from error
            leads_to[id(place)].append(id(found.contents))
            todo.append((found.contents, found.resolver, True))
        parts = [dialect.create_resource(part) for part in dialect.subresources_of(place)]
        todo += [(part.contents, resolver.in_subresource(part), False) for part in parts]
    try:
        TopologicalSorter(leads_to).prepare()
    except CycleError as error:
        raise ConvertError(origin, f"{name} refers to itself without end", "mend the schema") from error


def _in_place(schema: dict[str, Any]) -> Iterator[Any]:
    """Yield the schemas within one that are of the same value."""
    for key in _IN_PLACE:
        found = schema.get(key)
        if key in ("dependentSchemas", "dependencies") and isinstance(found, dict):
            yield from found.values()
        elif isinstance(found, list):
            yield from found
        elif found is not None:
            yield found
