"""What the schema knows about every setting: for the loader, the reference page and `nightschool config schema`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, get_args

from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo

from nightschool.config.fields import plain_types
from nightschool.config.recipe import Recipe
from nightschool.units import parse_seconds

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Setting:
    """One place in a recipe.

    `key` is dotted, with `*` for an index: `data.*.path`. A section or a list of sections has `section` and holds
    further settings; `is_list` is true for lists only.
    """

    key: str
    name: str
    field: FieldInfo
    section: type[BaseModel] | None
    is_list: bool

    @property
    def description(self) -> str:
        return self.field.description or ""

    @property
    def default(self) -> Any:
        """The default as plain JSON; None if the setting is required."""
        if self.field.is_required():
            return None
        return adapter(self.field).dump_python(
            self.field.get_default(call_default_factory=True), mode="json", by_alias=True
        )

    @property
    def takes_text(self) -> bool:
        """Whether a scalar is meant as text, whatever YAML would make of it (`path=2024`, `new_facts=>= 50%`)."""
        types = set(plain_types(self.field.annotation))
        return str in types and not types & {bool, int, float}

    @property
    def is_duration(self) -> bool:
        """Whether it is held in seconds."""
        return parse_seconds in {getattr(part, "func", None) for part in self.field.metadata}

    def parsed(self, value: Any) -> Any:
        """The value as the recipe would hold it.

        Raises:
            pydantic.ValidationError: If it cannot hold it.
        """
        return adapter(self.field).validate_python(value)


def adapter(field: FieldInfo) -> TypeAdapter[Any]:
    return TypeAdapter(field.rebuild_annotation(), config={"arbitrary_types_allowed": True})


def _section_of(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    is_list = list in plain_types(annotation)
    element = get_args(annotation)[0] if is_list and get_args(annotation) else None
    return (element, True) if isinstance(element, type) and issubclass(element, BaseModel) else (None, is_list)


def _walk(model: type[BaseModel], prefix: str) -> Iterator[Setting]:
    for python_name, field in model.model_fields.items():
        name = field.alias or python_name
        section, is_list = _section_of(field.annotation)
        setting = Setting(f"{prefix}{name}", name, field, section, is_list)
        yield setting
        if section is not None:
            yield from _walk(section, f"{setting.key}.*." if is_list else f"{setting.key}.")


@cache
def settings() -> Mapping[str, Setting]:
    """Every setting and section under its dotted key, in the order of the schema."""
    return {setting.key: setting for setting in _walk(Recipe, "")}


def find(path: Sequence[str | int]) -> Setting | None:
    """The setting at a path such as `("data", 0, "path")`; None if there is none."""
    if any(isinstance(part, str) and ("." in part or part == "*") for part in path):
        return None
    return settings().get(".".join("*" if isinstance(part, int) else part for part in path))


def children(path: Sequence[str | int]) -> list[str]:
    """The names that may stand below a path."""
    prefix = "".join(("*" if isinstance(part, int) else part) + "." for part in path)
    return [s.name for s in settings().values() if s.key.startswith(prefix) and "." not in s.key[len(prefix) :]]


def dotted(path: Sequence[str | int]) -> str:
    return ".".join(map(str, path))


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe, for editors and for the HTTP interface."""
    schema = _known_words(Recipe.model_json_schema(by_alias=True))
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _known_words(schema: Any) -> Any:
    """Without the bounds that pydantic leaves under its own names where a text with a unit is allowed too."""
    if isinstance(schema, dict):
        return {key: _known_words(value) for key, value in schema.items() if key not in ("gt", "ge", "lt", "le")}
    return [_known_words(value) for value in schema] if isinstance(schema, list) else schema
