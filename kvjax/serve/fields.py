"""Types of single fields of a request: bounds that a schema can say, and errors that name the way out."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from kvjax.budget import LEAST_TOKEN_BUDGET
from kvjax.engine.request import MAX_LOGPROBS, MAX_STOP_LENGTH
from kvjax.serve.limits import MAX_CHOICES

INT32_MAX = 2**31 - 1
# marks in the document: what is known once there is a model is put in their place
TOKEN_ID_FORMAT = "token-id"
MODEL_FORMAT = "served-model"


def _integral(value: object) -> object:
    """In JSON 16.0 is an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _integrals(value: object) -> object:
    """The same for a list, which is long: looked at one by one only if a float is in it."""
    if isinstance(value, list) and any(type(each) is float for each in value):
        return [_integral(each) for each in value]
    return value


def together(field: str, reason: str) -> PydanticCustomError:
    """The error of a field that is wrong only beside another one."""
    return PydanticCustomError("together", "{reason}", {"field": field, "reason": f"{field}: {reason}"})


def unsupported(way_out: str, allowed: tuple[object, ...] = (None,)) -> BeforeValidator:
    """Refuses every value but `allowed`, with a sentence instead of a type error."""

    def check(value: object) -> object:
        # not `in`: to Python 0 is False
        if not any(type(value) is type(each) and value == each for each in allowed):
            raise PydanticCustomError("unsupported", "not supported here: {way_out}", {"way_out": way_out})
        return value

    return BeforeValidator(check)


Nothing = Annotated[None, unsupported("leave it out")]
TextOnly = Annotated[Literal["text"], unsupported("only 'text' is", ("text",))]
TokenId = Annotated[int, Field(ge=0, le=INT32_MAX, json_schema_extra={"format": TOKEN_ID_FORMAT})]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]

ModelName = Annotated[str, Field(json_schema_extra={"format": MODEL_FORMAT})]
Integral = BeforeValidator(_integral)
Integrals = BeforeValidator(_integrals)
LogprobCount = Annotated[int, Field(ge=0, le=MAX_LOGPROBS), Integral]
ChoiceCount = Annotated[int, Field(ge=1, le=MAX_CHOICES), Integral]
Natural = Annotated[int, Field(ge=0, le=INT32_MAX), Integral]
Positive = Annotated[int, Field(ge=1, le=INT32_MAX), Integral]
TokenBudget = Annotated[int, Field(ge=LEAST_TOKEN_BUDGET, le=INT32_MAX), Integral]
TopK = Annotated[int, Field(ge=-1, le=INT32_MAX), Integral]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1), Integral]
