"""Checks plain JSON values against `schema.json`, by those keywords of JSON schema that it uses.

The schema is what checks, so it and the code cannot differ.
"""

import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

KEYWORDS = {
    "$schema", "$id", "$defs", "title", "description",  # say nothing about a value
    "$ref", "type", "const", "minimum", "minLength", "minItems", "items", "required", "properties",
    "additionalProperties",
}  # fmt: skip
_PATH = Path(__file__).with_name("schema.json")
_TYPES = {"object": dict, "array": list, "string": str, "integer": int, "null": type(None)}


@functools.cache
def schema() -> dict[str, Any]:
    """The JSON schema of a profile's file."""
    return json.loads(_PATH.read_text("utf-8"))


def faults(document: object) -> list[str]:
    """What is wrong with a document, each with the path of its field; nothing if it follows the schema."""
    return list(_faults(document, schema(), ""))


def _faults(value: Any, rule: Mapping[str, Any], where: str) -> Iterator[str]:
    """What is wrong with a value, by those keywords of JSON schema that `schema.json` uses."""
    if "$ref" in rule:
        rule = schema()["$defs"][rule["$ref"].removeprefix("#/$defs/")]
    shown = where or "the document"
    if "const" in rule and not (type(value) is type(rule["const"]) and value == rule["const"]):
        yield f"{shown} is {_short(value)}, must be {_short(rule['const'])}"
        return
    types = rule.get("type", list(_TYPES))
    types = [types] if isinstance(types, str) else types
    if type(value) not in [_TYPES[name] for name in types]:  # not isinstance: true is no integer
        yield f"{shown} is {_short(value)}, must be {' or '.join(types)}"
        return
    if type(value) is int and value < rule.get("minimum", value):
        yield f"{shown} is {value}, must be at least {rule['minimum']}"
    elif isinstance(value, str | list) and len(value) < rule.get("minLength", rule.get("minItems", 0)):
        yield f"{shown} is empty"
    if type(value) is dict:
        prefix = f"{where}." if where else ""
        properties = rule.get("properties", {})
        for name in rule.get("required", []):
            if name not in value:
                yield f"{prefix}{name} is missing"
        for name, field in value.items():
            if name in properties:
                yield from _faults(field, properties[name], f"{prefix}{name}")
            elif rule.get("additionalProperties") is False:
                yield f"{prefix}{name} is unknown (known: {', '.join(properties)})"
    elif type(value) is list and "items" in rule:
        for index, item in enumerate(value):
            yield from _faults(item, rule["items"], f"{where}[{index}]")


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
