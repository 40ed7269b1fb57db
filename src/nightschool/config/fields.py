"""What settings are made of: numbers with units, texts that say something, sections without unknown keys."""

from __future__ import annotations

from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    PlainSerializer,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)

from nightschool.units import Every, parse_bytes, parse_seconds, parse_share, parse_tokens


def _written(kind: Literal["number", "integer"], *examples: str) -> WithJsonSchema:
    """In JSON, a bare number or a text with its unit."""
    return WithJsonSchema({"anyOf": [{"type": kind}, {"type": "string"}], "examples": list(examples)})


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("is blank; write a text, or leave the key out")
    return text


def _parted(names: Any) -> Any:
    return [name.strip() for name in names.split(",")] if isinstance(names, str) else names


Tokens = Annotated[int, BeforeValidator(parse_tokens), _written("integer", "2048", "16k tokens")]
Seconds = Annotated[float, BeforeValidator(parse_seconds), _written("number", "90s", "10m", "24h", "7d")]
ByteCount = Annotated[int, BeforeValidator(parse_bytes), _written("integer", "20 MB", "50 GB")]
Share = Annotated[float, BeforeValidator(parse_share), _written("number", "5%", "0.05")]
NotBlank = Annotated[str, AfterValidator(_not_blank)]
Names = Annotated[
    list[NotBlank],
    BeforeValidator(_parted),
    WithJsonSchema(
        {"anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "string"}], "examples": ["a, b"]}
    ),
]
"""A list, or a text with commas."""
Rhythm = Annotated[
    Every,
    BeforeValidator(Every.parse),
    PlainSerializer(str, return_type=str),
    _written("integer", "500 steps", "2 epochs", "10m"),
]

Milestone = Annotated[
    Every,
    BeforeValidator(Every.parse),
    PlainSerializer(str, return_type=str),
    _written("integer", "1000 steps", "5 epochs"),
]


class Section(BaseModel):
    """Unknown keys are errors, and nothing changes after parsing."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        # Python counts true as 1, so `epochs: true` would be one epoch.
        if (
            isinstance(value, bool)
            and info.field_name
            and bool not in plain_types(cls.model_fields[info.field_name].annotation)
        ):
            raise ValueError(f"{str(value).lower()} is neither a number nor a text")
        return value


def plain_types(annotation: Any) -> Iterator[Any]:
    """The types that an annotation is made of, without `None`, `Annotated` and the element types of lists."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from plain_types(get_args(annotation)[0])
    elif origin in (Union, UnionType):
        for part in get_args(annotation):
            yield from plain_types(part)
    elif origin is Literal:
        yield from {type(value) for value in get_args(annotation)}
    elif annotation is not type(None):
        yield origin or annotation
