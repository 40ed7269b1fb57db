"""How request bodies are read: what would be ignored is refused by name."""

from __future__ import annotations

from itertools import islice
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ModelWrapValidatorHandler,
    Strict,
    ValidationError,
    model_validator,
)
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, core_schema

from nightschool.server.errors import nearest_name


def whole(value: Any) -> Any:
    """A number without a fraction as an integer: to JSON, 3.0 is one."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


# JSON's own types and nothing that could be turned into them: true is not a number, and "5" is none either.
Integer = Annotated[int, BeforeValidator(whole), Strict()]
Number = Annotated[float, Strict()]
# With the bound inside: outside of an `Integer` it would miss the OpenAPI document.
AtLeastOne = Annotated[int, Field(ge=1), BeforeValidator(whole), Strict()]
Flag = Annotated[bool, Strict()]


_MOST_UNKNOWN = 20


def bounded(most: int, *, least: int = 1) -> Any:
    """What every list of a body is annotated with: how long it may be, and that its first wrong element is the end.

    Without that, a body of two megabytes with half a million wrong elements makes half a million error messages.
    """
    return Field(min_length=least, max_length=most, fail_fast=True)


class Body(BaseModel):
    """A request body. A field that it does not know is an error that names the nearest one that it knows."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="wrap")
    @classmethod
    def _known_fields(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        known = list(cls.model_fields)
        names = value if isinstance(value, dict) else ()
        unknown = list(islice((str(name) for name in names if name not in cls.model_fields), _MOST_UNKNOWN))
        if unknown:
            raise ValidationError.from_exception_data(cls.__name__, [_unknown(name, known) for name in unknown])
        return handler(value)


def _unknown(name: str, known: list[str]) -> InitErrorDetails:
    error = PydanticCustomError(
        "extra_forbidden", "There is no such parameter.{hint}", {"hint": nearest_name(name, known)}
    )
    return InitErrorDetails(type=error, loc=(name,), input=None)


class Only:
    """Accept only values that change nothing; any other is refused, because it would have to be ignored.

    The field stays known, so that clients which always send its neutral value keep working.
    """

    def __init__(self, *neutral: Any) -> None:
        self._neutral = neutral

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": list(self._neutral)}

    def _check(self, value: Any) -> Any:
        if any(type(value) is type(allowed) and value == allowed for allowed in self._neutral):
            return value
        raise PydanticCustomError("unsupported_parameter", "This server does not support it. Leave it out.")
