"""Schema of a profile's file: pydantic models of each version, and their errors as a path and a bound.

Imported where a file is read alone: pydantic takes longer to import than all else of this package.
`python -m kvjax.budget.schema` prints `schema.json`.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
)
from pydantic_core import PydanticCustomError


def _no_bool(value: object) -> object:
    if type(value) is bool:  # equal to 1, which a literal is compared with
        raise PydanticCustomError("literal_error", "true and false are no versions")
    return value


_Positive = Annotated[int, Field(ge=1)]
_Name = Annotated[str, Field(min_length=1)]
_Heads = Annotated[list[_Positive], Field(min_length=1)]
_Options = dict[str, StrictBool | StrictInt | StrictFloat | StrictStr]


class _Fields(BaseModel):
    """Fields that are all known, of exactly their types: true is no integer."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _Model(_Fields):
    """Sizes that a model must share to use the profile."""

    family: _Name
    layers: _Positive
    kv_heads: _Positive
    head_dim: _Positive
    weights: _Name = Field("", description="Digest of the checkpoint, if no other will do.")


class _LayerV1(_Fields):
    """One layer of version 1, whose options are fields."""

    capacity: _Positive
    stage2_tokens: _Positive | None
    page_size: _Positive
    head_dims: _Positive | None
    observation_window: _Positive | None
    pooling_kernel: _Positive
    sinks: _Positive = 1
    head_tokens: _Heads = []


class _Layer(_Fields):
    """One layer's budget."""

    capacity: _Positive = Field(description="KV entries that a view holds for each kv head.")
    selected_tokens: _Positive | None = Field(
        description="Tokens that a decode step attends to exactly; null reads the whole view."
    )
    page_size: _Positive = Field(description="Entries that share one summary; 1 without a selection.")
    head_tokens: _Heads = Field(
        [], description="Tokens of a prompt that each kv head keeps; left out where all keep as many."
    )
    eviction_options: _Options | None = Field(
        description="Options of the method's eviction, {} for its defaults; null where nothing is evicted."
    )
    selection_options: _Options = Field({}, description="Options of the method's selection.")


class _ProfileV1(_Fields):
    """A profile's file of version 1, which is read and no longer written."""

    schema_id: Literal["urn:kvjax:budget-profile:1"] = Field(alias="$schema")
    version: Annotated[Literal[1], BeforeValidator(_no_bool)]
    model: _Model
    provenance: dict[str, Any] = {}
    layers: Annotated[list[_LayerV1], Field(min_length=1)]


class _Profile(_Fields):
    """Tokens of KV that each layer of one model keeps and reads."""

    schema_id: Literal["urn:kvjax:budget-profile:2"] = Field(alias="$schema")
    version: Annotated[Literal[2], BeforeValidator(_no_bool)]
    model: _Model
    provenance: dict[str, Any] = Field({}, description="The profile's origin, for readers and plots; any values.")
    layers: Annotated[list[_Layer], Field(min_length=1)] = Field(
        description="One budget a layer, from the first layer to the last."
    )


_VERSIONS: Mapping[int, type[_Fields]] = {1: _ProfileV1, 2: _Profile}


def schema(version: int = 2) -> dict[str, Any]:
    """The JSON schema of a profile's file."""
    made = _VERSIONS[version].model_json_schema()
    rules = {name.lstrip("_"): rule for name, rule in made.pop("$defs").items()}
    made = json.loads(json.dumps(made | {"$defs": rules}).replace("#/$defs/_", "#/$defs/"))
    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": made["properties"]["$schema"]["const"],
        "title": "Budget profile",
    }
    return head | {name: rule for name, rule in _without_titles(made).items() if name not in head}


def faults(document: object, version: int = 2) -> list[str]:
    """Errors of a document, each with the path of its field; none if it follows the schema."""
    try:
        _VERSIONS[version].model_validate(document)
    except ValidationError as error:
        rules = schema(version)
        return list(dict.fromkeys(_fault(fault, rules) for fault in error.errors(include_url=False)))
    return []


def _fault(error: Any, rules: Mapping[str, Any]) -> str:
    """One error of pydantic: the path, the value in JSON, and the rule it breaks."""
    path, rule, parent = "", dict(rules), dict(rules)
    for step in error["loc"]:
        if isinstance(step, str) and step not in rule.get("properties", {}) and "additionalProperties" not in rule:
            break  # names of union members, which are not in the document
        parent = rule
        path += f"[{step}]" if isinstance(step, int) else f"{'.' if path else ''}{step}"
        rule = rule["items"] if isinstance(step, int) else rule.get("properties", {}).get(step) or _values(rule)
        rule = _followed(rule, rules)
    shown, value = path or "the document", _short(error["input"])
    match error["type"]:
        case "missing":
            return f"{shown} is missing"
        case "extra_forbidden":
            return f"{shown} is unknown (known: {', '.join(parent['properties'])})"
        case "literal_error":
            return f"{shown} is {value}, must be {json.dumps(rule['const'])}"
        case "greater_than_equal":
            return f"{shown} is {value}, must be at least {error['ctx']['ge']}"
        case "string_too_short" | "too_short":
            return f"{shown} is empty"
        case _:
            types = [member["type"] for member in rule.get("anyOf", [rule]) if "type" in member]
            return f"{shown} is {value}, must be {' or '.join(types)}"


def _values(rule: Mapping[str, Any]) -> Any:
    """The rule of the values of an object whose names are free."""
    values = rule.get("additionalProperties")
    return values if isinstance(values, dict) else {}


def _followed(rule: Mapping[str, Any], rules: Mapping[str, Any]) -> dict[str, Any]:
    """A rule, or what its reference names; of an object or null the object, whose fields a path goes on with."""
    if "$ref" in rule:
        rule = rules["$defs"][rule["$ref"].removeprefix("#/$defs/")]
    inner = [member for member in rule.get("anyOf", []) if member.get("type") == "object"]
    return dict(rule) | ({"additionalProperties": inner[0]["additionalProperties"]} if inner else {})


def _without_titles(rule: Any) -> Any:
    """A rule without the titles that pydantic makes out of field names, and the defaults of fields left out."""
    if isinstance(rule, list):
        return [_without_titles(inner) for inner in rule]
    if not isinstance(rule, dict):
        return rule
    return {
        name: {field: _without_titles(inner) for field, inner in value.items()}
        if name in ("properties", "$defs")
        else _without_titles(value)
        for name, value in rule.items()
        if name not in ("title", "default")
    }


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


if __name__ == "__main__":
    print(json.dumps(schema(), indent=2))
