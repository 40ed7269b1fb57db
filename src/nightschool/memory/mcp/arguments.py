"""What clients send to the tools, spelled as the reference server `server-memory` spells it, with the bounds of `/api/memories`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from nightschool.memory.facts.statements import MOST_CHARACTERS

MOST_AT_ONCE = 1000
Text = Annotated[str, Field(max_length=MOST_CHARACTERS)]
Name = Annotated[str, Field(max_length=500)]
Texts = Annotated[list[Text], Field(max_length=MOST_AT_ONCE, fail_fast=True)]
Names = Annotated[list[Name], Field(max_length=MOST_AT_ONCE, fail_fast=True)]


class _Given(BaseModel):
    model_config = ConfigDict(populate_by_name=True)

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, value: Any) -> Any:
        # One message, however many there are.
        known = [field.alias or name for name, field in cls.model_fields.items()]
        unknown = next((name for name in value if name not in known), None) if isinstance(value, dict) else None
        if unknown is not None:
            raise ValueError(f"there is no field {unknown[:80]!r}. There is {', '.join(known)}")
        return value


class Entity(_Given):
    """What is created: `name`, `entityType`, `observations`."""

    name: Name
    entity_type: Name = Field(alias="entityType")
    observations: Texts = []


class Relation(_Given):
    """In active voice: `from`, `relationType`, `to`."""

    from_: Name = Field(alias="from")
    to: Text
    relation_type: Name = Field(alias="relationType")


class Observations(_Given):
    """What is added to an entity."""

    entity_name: Name = Field(alias="entityName")
    contents: Texts


class Deletion(_Given):
    """Observations of an entity that are ended."""

    entity_name: Name = Field(alias="entityName")
    observations: Texts


Entities = Annotated[list[Entity], Field(max_length=MOST_AT_ONCE, fail_fast=True)]
Relations = Annotated[list[Relation], Field(max_length=MOST_AT_ONCE, fail_fast=True)]
ObservationsOfMany = Annotated[list[Observations], Field(max_length=MOST_AT_ONCE, fail_fast=True)]
Deletions = Annotated[list[Deletion], Field(max_length=MOST_AT_ONCE, fail_fast=True)]


def plain(given: list[Any]) -> list[dict[str, Any]]:
    """As JSON has it."""
    return [one.model_dump(by_alias=True) for one in given]
