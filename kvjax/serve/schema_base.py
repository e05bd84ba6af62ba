"""Base of request models: strict types, unknown fields kept, and rules between fields for the OpenAPI document."""

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from kvjax.serve.refused_fields import HARMLESS, REFUSED


def only_if(field: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The JSON Schema of a field that wants another one: both map one name to a schema."""
    return {
        "if": {"properties": field, "required": list(field)},
        "then": {"properties": other, "required": list(other)},
    }


def _add_rules(document: dict[str, Any], model: type[Any]) -> None:
    if model.rules:
        document["allOf"] = list(model.rules)


class Body(BaseModel):
    """Strict types; unknown fields are kept, to be warned about.

    `rules` say in JSON Schema what the validators below check between fields.
    """

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=(), json_schema_extra=_add_rules)
    rules: ClassVar[tuple[dict[str, Any], ...]] = ()

    def unknown(self) -> list[str]:
        """Names of fields that are neither served nor known to change nothing."""
        return [name for name in self.model_extra or {} if name not in HARMLESS and name not in REFUSED]
