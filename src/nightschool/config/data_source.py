"""Where the examples of a run come from: files, data sets by name, conversations that the server kept."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from nightschool.config.data_sets import PromptStyle, data_sets_named
from nightschool.config.fields import Names, NotBlank, Section, Share

Format = Literal[
    "auto",
    "query_retrieved",
    "messages",
    "conversations",
    "alpaca",
    "prompt_completion",
    "preference",
    "labels",
    "text",
]


PersonalData = Literal["key", "email", "card", "iban", "ip", "phone"]

ANY_NAME = "any"
"""In `where.model`: conversations of whatever served name."""


class ConversationFilter(Section):
    """Which of the kept conversations are studied."""

    rating: Literal["good", "bad", "any"] | None = Field(
        None, description="Keep only answers with this rating; `any` keeps rated and unrated ones."
    )
    corrected: bool | None = Field(
        None, description="true: only answers that a person corrected; false: only uncorrected ones."
    )
    model: str | None = Field(
        None, description="Keep only answers of this served name; without it, of the recipe's own; `any` keeps all."
    )


SOURCE_KINDS = ("path", "dataset", "from")
"""What a data source may be, of which it is one."""

OF_SOME_SOURCES: dict[str, tuple[tuple[str, ...], str]] = {
    "format": (("path", "from"), ", and the rows of a data set are known"),
    "folder": (("dataset",), ", and a path says itself where it is"),
    "prompt_style": (("dataset",), ", and your own rows are put by `prompt`"),
    "prompt": (("path",), ", and a data set has its own"),
    "answer": (("path",), ", and a data set has its own"),
    "held_out": (("path",), ", and a data set has its own"),
    "max_samples": (("path", "dataset"), ""),
    "weight": (("path", "dataset"), ", and what a person said is always studied"),
}
"""Settings that only some sources have a use for, each with what the others have instead."""


class DataSource(Section):
    """One source of examples: files (`path`), data sets by name (`dataset`), or what the server kept (`from: conversations`)."""

    path: NotBlank | None = Field(
        None,
        description="A file, a folder or a glob: JSON, JSONL, Parquet or CSV; .txt is plain text. Or files of a data set of the Hub: "
        "`hf://datasets/OWNER/NAME/*.parquet`.",
    )
    dataset: Names | None = Field(
        None,
        description="Data sets by name, in a list or with commas: `chat`, `code`, `reasoning`, `all`, or single ones such as "
        "`alpaca, gsm8k`.",
    )
    folder: NotBlank | None = Field(
        None,
        description="Where the files of `dataset` lie; without it in `datasets/` of the home, else in the Hub's cache or on the Hub.",
    )
    prompt_style: PromptStyle = Field(
        "plain",
        description="How questions of `dataset` are put: `plain`, as a person would; `headings`: under `### Problem:` and the like.",
    )
    prompt: NotBlank | None = Field(
        None,
        description="The question, made of the fields of a row: `### Task:\\n{instruction}`. What is between [[ and ]] is left out where "
        "a field in it is blank. Goes with `answer`.",
    )
    answer: NotBlank | None = Field(None, description="The answer, made of the fields of a row: `{output}`.")
    held_out: Share | None = Field(
        None,
        description="Share of the rows of `path`, its last ones, that is never trained, in place of held_out.share.",
    )
    max_samples: int | None = Field(
        None,
        ge=1,
        description="At most so many examples of the source, or of each of its data sets, and as many held out.",
    )
    weight: float | None = Field(
        None,
        gt=0,
        description="How much of an epoch is from this source, beside the weights of the others; as many examples are left out as that "
        "takes. All sources have one, or none.",
    )
    format: Format = Field(
        "auto", description="How rows are read; `auto` detects it from the fields and says what it found."
    )
    from_: Literal["conversations"] | None = Field(
        None, alias="from", description="`conversations`: what the server kept by day."
    )
    where: ConversationFilter = Field(
        default_factory=lambda: ConversationFilter(corrected=True),
        description="Which conversations; without it, only corrected ones.",
    )
    since: Literal["always", "last_promoted"] = Field(
        "always", description="`last_promoted`: only what came after the champion was promoted."
    )

    repeat: int = Field(
        1, ge=1, description="Times each new example is studied in an epoch; replayed ones are studied once."
    )

    redact: list[PersonalData] = Field(
        default_factory=list,
        description="Personal data to replace by [EMAIL] and the like before anything else sees it (extra `redact`).",
    )

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    @field_validator("dataset")
    @classmethod
    def _known_data_sets(cls, names: list[str] | None) -> list[str] | None:
        if names is not None:
            data_sets_named(names, trained=True)
        return names

    @model_validator(mode="after")
    def _one_source(self) -> DataSource:
        kinds = (("path", self.path), ("dataset", self.dataset), ("from", self.from_))
        given = [name for name, value in kinds if value is not None]
        if len(given) != 1:
            raise ValueError("a data source has one of `path`, `dataset` and `from: conversations`; write exactly one")
        for name, (belongs_to, why) in OF_SOME_SOURCES.items():
            if given[0] not in belongs_to and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"`{name}` belongs to {' or '.join(f'`{one}`' for one in belongs_to)}{why}; take it out"
                )
        if (self.prompt is None) != (self.answer is None):
            raise ValueError("`prompt` and `answer` make question and answer of a row; write both, or none")
        if self.prompt is not None and self.format != "auto":
            raise ValueError(
                f"`prompt` and `answer` say how a row is read, and so does `format: {self.format}`; write one"
            )
        return self
