"""Grammar fields: how a request says what its answer follows, in OpenAI's words, vLLM's and SGLang's."""

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from kvjax.engine.request import Constraint
from kvjax.serve.fields import together, unsupported
from kvjax.serve.limits import MAX_GRAMMAR
from kvjax.serve.schema_base import Body, only_if

ANY_OBJECT = {"type": "object"}
Grammar = Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR)]
Choices = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=1024)]


class JsonSchemaFormat(Body):
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = Field(None, description="Every answer follows its schema, whatever this says.")


class ResponseFormat(Body):
    type: Annotated[
        Literal["text", "json_object", "json_schema"],
        unsupported("choose text, json_object or json_schema", ("text", "json_object", "json_schema")),
    ]
    json_schema: JsonSchemaFormat | None = None

    rules: ClassVar = (only_if({"type": {"const": "json_schema"}}, {"json_schema": {"type": "object"}}),)

    @model_validator(mode="after")
    def _check_schema(self) -> "ResponseFormat":
        if self.type == "json_schema" and self.json_schema is None:
            raise together("json_schema", "type 'json_schema' wants one beside it")
        return self

    def grammar(self) -> Constraint | None:
        if self.type == "text":
            return None
        schema = None if self.json_schema is None else self.json_schema.schema_
        return Constraint("json", json.dumps(ANY_OBJECT if schema is None else schema))


class StructuredOutputs(Body):
    """One of the grammars that an answer can follow."""

    json_: Grammar | dict[str, Any] | None = Field(None, alias="json")
    regex: Grammar | None = None
    choice: Choices | None = None
    grammar: Grammar | None = Field(None, description="Lark, or GBNF.")
    json_object: bool | None = None
