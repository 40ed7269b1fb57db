"""Bodies and answers of `/v1/fine_tuning`, in the fields that OpenAI's clients know."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, Strict, WithJsonSchema

from nightschool.server.bodies import Body, Integer, Number, bounded, whole
from nightschool.server.openai.schema import Metadata

MOST_INTEGRATIONS = 5
JobStatus = Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]
MethodName = Literal["supervised", "dpo", "reinforcement"]


def _chosen(value: Any) -> Any:
    """`auto` is what is said by saying nothing."""
    return None if value == "auto" else value


def _or_auto(kind: str, **bounds: float) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [{"type": kind, **bounds}, {"const": "auto"}, {"type": "null"}]})


BatchSize = Annotated[
    Annotated[Integer, Field(ge=1, le=256)] | None,
    BeforeValidator(_chosen),
    _or_auto("integer", minimum=1, maximum=256),
]
Epochs = Annotated[
    Annotated[Integer, Field(ge=1, le=50)] | None, BeforeValidator(_chosen), _or_auto("integer", minimum=1, maximum=50)
]
JobSeed = Annotated[int, Field(ge=0, lt=2**31), BeforeValidator(whole), Strict()]
Multiplier = Annotated[
    Annotated[Number, Field(gt=0, le=100)] | None,
    BeforeValidator(_chosen),
    _or_auto("number", exclusiveMinimum=0, maximum=100),
]
Beta = Annotated[
    Annotated[Number, Field(gt=0, le=2)] | None,
    BeforeValidator(_chosen),
    _or_auto("number", exclusiveMinimum=0, maximum=2),
]


class Hyperparameters(Body):
    """How a job trains. `auto` leaves it to the server."""

    n_epochs: Epochs = Field(None, description="Passes over the examples.")
    batch_size: BatchSize = Field(None, description="Examples in an optimizer step.")
    learning_rate_multiplier: Multiplier = Field(
        None, description="Times the learning rate that the operator has set; 1 without it."
    )


class DpoHyperparameters(Hyperparameters):
    """How a job learns from preferences."""

    beta: Beta = Field(None, description="How near the model stays to what it was; 0.1 without it.")


class SupervisedMethod(Body):
    """Learning from examples."""

    hyperparameters: Hyperparameters | None = Field(None, description="How it trains.")


class DpoMethod(Body):
    """Learning from preferences."""

    hyperparameters: DpoHyperparameters | None = Field(None, description="How it trains.")


# Read so that it can be refused by name.
Unsupported = Annotated[dict[str, Any], Field(max_length=64)]


class Method(Body):
    """The method, and its hyperparameters under its own name."""

    type: MethodName = Field(..., description="`supervised` or `dpo`; `reinforcement` is not supported.")
    supervised: SupervisedMethod | None = Field(None, description="With `type: supervised`.")
    dpo: DpoMethod | None = Field(None, description="With `type: dpo`.")
    reinforcement: Unsupported | None = Field(None, description="Not supported.")


class CreateJob(Body):
    """POST /v1/fine_tuning/jobs."""

    model: str = Field(
        ..., min_length=1, max_length=300, description="A base that the operator allows, or a fine-tuned model."
    )
    training_file: str = Field(..., max_length=200, description="The id of an uploaded file.")
    validation_file: str | None = Field(None, max_length=200, description="The id of a file that is never trained.")
    method: Method | None = Field(None, description="How it learns; `supervised` without it.")
    hyperparameters: Hyperparameters | None = Field(None, description="The older place of those of `supervised`.")
    suffix: str | None = Field(None, min_length=1, max_length=64, description="Becomes part of the model's name.")
    seed: JobSeed | None = Field(None, description="Of order and dropout; a random one without it.")
    metadata: Metadata | None = Field(None, description="At most 16 texts by name, to find the job again.")
    integrations: Annotated[list[Unsupported], bounded(MOST_INTEGRATIONS, least=0)] | None = Field(
        None, description="None is supported."
    )


class JobError(BaseModel):
    """Why a job failed."""

    code: str
    message: str
    param: str | None


class UsedHyperparameters(BaseModel):
    """What a job trains with; nothing is `auto` any more."""

    n_epochs: int
    batch_size: int
    learning_rate_multiplier: float
    beta: float | None = None


class FineTuningJob(BaseModel):
    """A job."""

    id: str
    object: Literal["fine_tuning.job"]
    model: str
    created_at: int = Field(..., description="Seconds since 1970.")
    finished_at: int | None
    estimated_finish: int | None
    status: JobStatus
    fine_tuned_model: str | None = Field(..., description="What may stand in `model` of a chat completion.")
    organization_id: str = Field(..., description="The tenant.")
    training_file: str
    validation_file: str | None
    result_files: list[str] = Field(..., description="Of a job that succeeded: the figures of each step as CSV.")
    trained_tokens: int | None = Field(..., description="Tokens that carried loss.")
    hyperparameters: UsedHyperparameters
    method: dict[str, Any]
    seed: int
    integrations: list[dict[str, Any]]
    error: JobError | None
    metadata: dict[str, str] | None


class JobList(BaseModel):
    """Jobs, newest first."""

    object: Literal["list"]
    data: list[FineTuningJob]
    first_id: str | None
    last_id: str | None
    has_more: bool


class JobEvent(BaseModel):
    """Something that happened to a job."""

    id: str
    object: Literal["fine_tuning.job.event"]
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any]


class EventList(BaseModel):
    """Events of a job, newest first."""

    object: Literal["list"]
    data: list[JobEvent]
    first_id: str | None
    last_id: str | None
    has_more: bool


class CheckpointMetrics(BaseModel):
    """The figures of a step; what was not taken there is null."""

    step: int
    train_loss: float | None
    train_mean_token_accuracy: float | None
    valid_loss: float | None
    valid_mean_token_accuracy: float | None
    full_valid_loss: float | None
    full_valid_mean_token_accuracy: float | None


class JobCheckpoint(BaseModel):
    """A checkpoint of a job that can be asked."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"]
    created_at: int
    fine_tuned_model_checkpoint: str = Field(..., description="What may stand in `model` of a chat completion.")
    fine_tuning_job_id: str
    metrics: CheckpointMetrics
    step_number: int


class CheckpointList(BaseModel):
    """Checkpoints of a job, newest first."""

    object: Literal["list"]
    data: list[JobCheckpoint]
    first_id: str | None
    last_id: str | None
    has_more: bool
