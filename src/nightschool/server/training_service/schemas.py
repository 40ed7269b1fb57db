"""What the training service is sent and what it answers, as its users know it (rows 001-19 … 001-29)."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict, field_validator

from nightschool.config.training_service import JobSettings
from nightschool.data.example import AnswerKey, Message, Role
from nightschool.data.sources.formats import role_named
from nightschool.server.bodies import AtLeastOne, Body, Number, bounded, whole
from nightschool.store.names import NAME_PATTERN

MOST_CONVERSATIONS = 100_000
MOST_MESSAGES = 1_000
MOST_TEST_PROMPTS = 100
MOST_ALTERNATIVES = 100
_MOST_KEY_CHARACTERS = 10_000
_MOST_PROMPT_CHARACTERS = 100_000

OrgId = Annotated[
    str,
    Field(
        min_length=1,
        max_length=64,
        pattern=NAME_PATTERN,
        description="The organisation: the tenant whose models and jobs are meant.",
    ),
]
# With the bounds inside: outside of an `Integer | None` they would miss the OpenAPI document.
Alternative = Annotated[str, Field(max_length=_MOST_KEY_CHARACTERS)]
Count = Annotated[int, Field(ge=0, le=1_000_000), BeforeValidator(whole), Strict()]
Speaker = Annotated[Role, BeforeValidator(lambda name: role_named(name) or name)]


class Turn(Body):
    """A message. `human`, `bot` and other spellings of a role are understood."""

    role: Speaker = Field(..., description="system, user, assistant or tool.")
    content: str = Field(..., description="What was said.")

    @property
    def message(self) -> Message:
        return Message(self.role, self.content)


class ConversationIn(Body):
    """A conversation to learn from. Where and when it was had changes nothing."""

    messages: Annotated[list[Turn], bounded(MOST_MESSAGES)] = Field(
        ..., description="In the order in which they were said."
    )
    answer: str | None = Field(
        None,
        max_length=_MOST_KEY_CHARACTERS,
        description="What of its last answer has to be said: the gate judges by it.",
    )
    alternatives: Annotated[list[Alternative], bounded(MOST_ALTERNATIVES)] = Field(
        [], description="Other answers that are as right as its last one."
    )
    platform: str = Field("unknown", max_length=200, description="Where it was had.")
    timestamp: str | None = Field(None, max_length=100, description="When it was had.")

    @property
    def key(self) -> AnswerKey:
        """By what its last answer is judged; blank texts say nothing."""
        key = (self.answer,) if self.answer and self.answer.strip() else ()
        return AnswerKey(key, tuple(one for one in self.alternatives if one.strip()))


class TrainingData(Body, JobSettings):
    """Conversations, and how a job learns from them."""

    # The types of a variable's text are looked for; those of JSON are given.
    model_config = ConfigDict(strict=True)

    org_id: OrgId
    base_model: str | None = Field(
        None, max_length=300, description="One of those that the operator allows; the default base without it."
    )
    conversations: Annotated[list[ConversationIn], bounded(MOST_CONVERSATIONS)] = Field(
        ..., description="What is learned from: the words of the assistant carry loss, and nothing else."
    )

    @field_validator(*JobSettings.model_fields, mode="before")
    @classmethod
    def _whole(cls, value: Any) -> Any:
        return whole(value)

    @property
    def settings(self) -> JobSettings:
        return JobSettings.model_validate(self.model_dump(include=set(JobSettings.model_fields)))


class TrainingStatus(BaseModel):
    """How far a job is. Times are UTC, without an offset."""

    training_id: str
    org_id: str
    status: Literal["queued", "running", "completed", "failed", "cancelled"]
    progress: float = Field(..., ge=0, le=1, description="Share of its steps.")
    started_at: datetime | None
    completed_at: datetime | None
    error: str | None
    metadata: dict[str, Any] | None = Field(
        ...,
        description="What it trains and how; its figures as they come; at its end the version and the gate's verdict.",
    )


class TrainingJobs(BaseModel):
    """The jobs of an organisation, newest first."""

    jobs: list[TrainingStatus]


class Cancelled(BaseModel):
    """The job stops, or has stopped."""

    message: Literal["Training job cancelled"]
    training_id: str


class PreviewedSpan(BaseModel):
    """Neighbouring tokens of one role that all carry loss, or all do not."""

    text: str
    role: str
    trained: bool
    tokens: int


class Preview(BaseModel):
    """What a job would train, before anything is spent."""

    num_conversations: int = Field(..., description="Those that can be learned, each once.")
    num_held_out: int
    repairs: dict[str, int] = Field(..., description="What was mended or left out, and how often.")
    base_model: str
    method: str
    steps_total: int
    tokens: int = Field(..., description="Of one epoch.")
    tokens_trained: int = Field(..., description="Those of them that carry loss.")
    expected_seconds: float
    expected_peak_bytes: int
    findings: list[str]
    loss_masks: list[list[PreviewedSpan]] = Field(..., description="Of the first conversations.")


class ModelPrompt(Body):
    """A prompt to try a model with."""

    instruction: str = Field(..., min_length=1, max_length=_MOST_PROMPT_CHARACTERS, description="What is asked.")
    expected_response: str | None = Field(
        None, max_length=_MOST_PROMPT_CHARACTERS, description="What would be right; it is shown beside the answers."
    )


class EvaluateRequest(Body):
    """Which model, and what it is asked."""

    org_id: OrgId
    model_id: str = Field(
        "latest", min_length=1, max_length=64, description="latest, a training id, or the id of a version."
    )
    test_prompts: Annotated[list[ModelPrompt], bounded(MOST_TEST_PROMPTS, least=0)] | None = Field(
        None, description="What the model, its base and the version before it are asked."
    )


class Evaluated(BaseModel):
    """What a model was found to do, beside its base and the version before it."""

    model_path: str
    metrics: dict[str, Any]


class MessageRequest(Body):
    """A message, and what came before it."""

    message: str = Field(..., min_length=1, description="What is answered.")
    system_prompt: str | None = Field(None, description="What stands before the conversation.")
    history: Annotated[list[Turn], bounded(MOST_MESSAGES, least=0)] | None = Field(
        None, description="What was said before, oldest first."
    )
    temperature: Number | None = Field(None, ge=0, le=2, description="0 always takes the likeliest token.")
    max_tokens: AtLeastOne | None = Field(None, description="Most tokens of the answer.")
    top_p: Number | None = Field(None, gt=0, le=1, description="Sample from the smallest set of this probability.")
    top_k: Count | None = Field(None, description="Sample from this many tokens; 0 from all.")


class ModelDescription(BaseModel):
    """A model of an organisation."""

    org_id: str
    model_path: str = Field(..., description="In the home, such as models/assistant/20261126_021500.")
    metadata: dict[str, Any]
    loaded: bool


class Generated(BaseModel):
    """The answer, and the model that gave it."""

    response: str
    model_info: ModelDescription | None


class Loaded(BaseModel):
    message: Literal["Model loaded successfully"]
    model_info: ModelDescription


class Unloaded(BaseModel):
    message: Literal["Model unloaded successfully"]
    org_id: str


class ListedModel(BaseModel):
    model_id: str
    created_at: float = Field(..., description="Seconds since 1970.")
    metadata: dict[str, Any]


class ListedModels(BaseModel):
    """Every model of an organisation, newest first."""

    org_id: str
    models: list[ListedModel]
    count: int


class Health(BaseModel):
    """Always 200 while the process answers."""

    status: Literal["healthy"]
    cuda_available: bool
    cuda_device_count: int
    loaded_models: int


class Index(BaseModel):
    """What this server is, and where things are."""

    service: str
    version: str
    endpoints: dict[str, str]
