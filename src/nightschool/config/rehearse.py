"""What a model is not to unlearn: whose prompts are rehearsed, and how much of that lies beside what is taught."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field, field_validator

from nightschool.config.data_source import PersonalData
from nightschool.config.fields import Names, Section

ASKED_BY_DAY = "conversations"
"""In `rehearse.prompts`: what users asked by day, where conversations are recorded."""


class Rehearse(Section):
    """What the model is not to unlearn, even if nobody taught it here: its own answers to general prompts.

    They are sampled once and trained with the KL divergence from the distribution that it had, not with their words.
    """

    prompts: Names | None = Field(
        None,
        description="Whose prompts, in a list or with commas, which take turns: `default`: those of nightschool; `conversations`: what "
        "users asked by day, where that is recorded; else a file. off: nothing is rehearsed. What is taught, held out or asked by "
        "the gate is left out.",
    )
    redact: list[PersonalData] = Field(
        default_factory=lambda: list(get_args(PersonalData)),
        description="Personal data to replace by [EMAIL] and the like in prompts of `conversations`, before anything else sees them "
        "(extra `redact`).",
    )
    max_conversations: int = Field(
        500, ge=1, description="At most so many prompts of `conversations`, the newest ones."
    )
    ratio: float = Field(
        0.5, gt=0, le=10, description="Rehearsed answers per example of a micro-batch; one at the least."
    )
    weight: float = Field(1.0, gt=0, description="Of the divergence, in nats a token, beside the loss.")
    max_new_tokens: int = Field(64, ge=1, le=1024, description="Length of an answer in tokens.")

    teacher: Literal["champion", "base"] = Field(
        "champion",
        description="Whose answers. champion: those of the model with which the run begins; base: those of what stands below its adapter, asked once "
        "for all nights, so that what each of them changes does not add up.",
    )

    @field_validator("prompts")
    @classmethod
    def _off_is_none(cls, places: list[str] | None) -> list[str] | None:
        if places is None or places == ["off"]:
            return None
        if not places or "off" in places:
            raise ValueError(
                "names prompts, or is off; write `default`, `conversations`, a file, several of them, or off"
            )
        return list(dict.fromkeys(places))
