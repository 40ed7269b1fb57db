"""A language model that judges answers for the gate, by its address."""

from __future__ import annotations

from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from nightschool.config.fields import NotBlank, Seconds, Section

KEY_VARIABLE = "NIGHTSCHOOL_JUDGE_KEY"
"""The key of the judge's server. It stands in the environment alone, as a recipe is kept with every run."""


class Judge(Section):
    """A model behind any server that speaks OpenAI's chat completions. It is sent questions, expected answers and answers."""

    url: NotBlank | None = Field(
        None,
        description="Where the API of a model begins that judges what was taught in place of the examiner's rules: "
        "`http://127.0.0.1:8001/v1`; null: none. A key for it is read from NIGHTSCHOOL_JUDGE_KEY.",
    )
    model: NotBlank | None = Field(None, description="The name of the model there.")
    timeout: Seconds = Field(60.0, gt=0, description="Seconds that one verdict may take: `60s`.")

    @field_validator("url")
    @classmethod
    def _an_address(cls, url: str | None) -> str | None:
        if url is None:
            return None
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is not an address of a server; write http://127.0.0.1:8001/v1")
        if parts.username is not None or parts.password is not None or parts.query:
            raise ValueError(
                f"an address with a user, a password or a query is kept with every run; use {KEY_VARIABLE}"
            )
        return url.rstrip("/")

    @model_validator(mode="after")
    def _has_a_model(self) -> Judge:
        if self.url is not None and self.model is None:
            raise ValueError("a judge is a model at an address; name it in gate.judge.model")
        return self
