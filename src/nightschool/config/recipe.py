"""The recipe: what is wanted of a run, in one schema.

YAML files, `a.b=value` overrides, HTTP bodies, `nightschool config schema` and the reference page are all made
from these models. Every field says what it is and in which unit; whoever owns a setting reads it.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim, CronSimError
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_serializer,
    model_validator,
)

from nightschool.config.rules import RuleName, parse_rule
from nightschool.units import Every, format_seconds, parse_bytes, parse_seconds, parse_share, parse_tokens


def _written(kind: Literal["number", "integer"], *examples: str) -> WithJsonSchema:
    """In JSON, a bare number or a text with its unit."""
    return WithJsonSchema({"anyOf": [{"type": kind}, {"type": "string"}], "examples": list(examples)})


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("is blank; write a text, or leave the key out")
    return text


Tokens = Annotated[int, BeforeValidator(parse_tokens), _written("integer", "2048", "16k tokens")]
Seconds = Annotated[float, BeforeValidator(parse_seconds), _written("number", "90s", "10m", "24h", "7d")]
ByteCount = Annotated[int, BeforeValidator(parse_bytes), _written("integer", "20 MB", "50 GB")]
Share = Annotated[float, BeforeValidator(parse_share), _written("number", "5%", "0.05")]
NotBlank = Annotated[str, AfterValidator(_not_blank)]
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

Method = Literal["full", "lora", "pretrain"]
Format = Literal["auto", "query_retrieved", "messages", "conversations", "alpaca", "prompt_completion", "text"]


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


class DataSource(Section):
    """One source of examples: files (`path`) or what the server kept (`from: conversations`)."""

    path: NotBlank | None = Field(
        None, description="A file, a folder or a glob: JSON, JSONL, Parquet or CSV; .txt is plain text."
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

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    @model_validator(mode="after")
    def _one_source(self) -> DataSource:
        if (self.path is None) == (self.from_ is None):
            raise ValueError("a data source has either `path` or `from: conversations`; write exactly one")
        return self


class HeldOut(Section):
    """The split that is never trained and on which the gate compares losses."""

    share: Share = Field(
        0.05, description="Share of the examples held out, chosen by their digest, so the same every night."
    )
    min_examples: int = Field(100, ge=0, description="With fewer examples than this nothing is held out by share.")
    path: NotBlank | None = Field(None, description="A file of its own in place of a share.")


class Replay(Section):
    """What was accepted before, mixed in again so that it is not forgotten."""

    ratio: float = Field(1.0, ge=0, description="Replayed examples per new example; 0 turns replay off.")
    minimum: int = Field(0, ge=0, description="At least this many replayed examples, if so many were accepted.")


class Train(Section):
    """The optimization itself."""

    learning_rate: float = Field(2e-6, gt=0, description="Peak learning rate.")
    epochs: int = Field(5, ge=1, description="Passes over the data.")
    max_steps: int | None = Field(
        None, ge=1, description="Stop after this many optimizer steps, whatever `epochs` says."
    )
    batch_size: int = Field(
        4, ge=1, description="Examples in a micro-batch; they are laid end to end, without padding."
    )
    tokens_per_batch: Tokens | None = Field(
        None,
        ge=1,
        description="Fill each micro-batch with whole examples up to this many tokens, in place of `batch_size`.",
    )
    accumulation_steps: int = Field(4, ge=1, description="Micro-batches per optimizer step.")
    max_seq_len: Tokens = Field(
        1024,
        ge=8,
        description="Longest example in tokens, question and answer together; the rest is cut, and the plan says how much.",
    )
    max_cut_share: Share = Field(
        0.5, description="The run does not start if more than this share of the tokens that would carry loss is cut."
    )
    weight_decay: float = Field(
        0.01, ge=0, description="Decoupled decay of matrices; norms, biases and embeddings have none."
    )
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's first moment.")
    beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's second moment.")
    epsilon: float = Field(1e-8, gt=0, description="AdamW's epsilon.")
    max_grad_norm: float = Field(
        1.0, ge=0, description="Global gradient norm above which gradients are scaled down; 0 turns clipping off."
    )
    lr_schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="How the learning rate falls after the warm-up."
    )
    warmup_steps: int = Field(0, ge=0, description="Steps over which the learning rate rises linearly.")
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="The schedule ends at this share of the peak.")
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="Compute dtype; `auto` probes the device and takes fp32 where bf16 is slow."
    )
    gradient_checkpointing: bool = Field(
        default=False,
        description="Recompute activations in the backward pass: about a third more time, far fewer bytes.",
    )
    compile: bool = Field(default=False, description="torch.compile; loses on small models on a CPU.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where to train.")
    num_threads: int | None = Field(None, ge=1, description="CPU threads; without it, one per physical core.")
    num_processes: int = Field(
        1,
        ge=1,
        description="Processes on this machine that train together, one a GPU; torchrun sets it for several machines.",
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        0,
        description="What several processes share among them: 0 nothing; 1 and 2 parameters, gradients and moments between "
        "the steps; 3 during them, too, which is slower and takes least.",
    )
    num_workers: int = Field(1, ge=1, description="Processes that turn text into tokens before step 1.")
    seed: int = Field(42, ge=0, description="Seeds weights, order and dropout.")
    log_every: int = Field(1, ge=1, description="Steps between lines of metrics.")
    evaluate_every: Rhythm | None = Field(
        None, description="How often the held-out loss is taken; without it, at the end of each epoch."
    )


class Lora(Section):
    """Low-rank adapters (method: lora)."""

    r: int = Field(16, ge=1, description="Rank.")
    alpha: float = Field(32, gt=0, description="The update is scaled by alpha / r.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before the adapter.")
    target_modules: str | list[str] = Field("all-linear", description="`all-linear`, or names of modules.")


class Shape(Section):
    """The shape of a new model where it differs from its preset's; a field that the architecture lacks is refused."""

    num_hidden_layers: int | None = Field(None, ge=1, description="Layers.")
    hidden_size: int | None = Field(None, ge=1, description="Width.")
    intermediate_size: int | None = Field(None, ge=1, description="Width of the feed-forward part.")
    num_attention_heads: int | None = Field(None, ge=1, description="Heads.")
    num_key_value_heads: int | None = Field(None, ge=1, description="Heads of keys and values, where they are shared.")
    head_dim: int | None = Field(None, ge=1, description="Channels of a head, where they are not width / heads.")
    max_position_embeddings: int | None = Field(None, ge=1, description="Longest context in tokens.")
    tie_word_embeddings: bool | None = Field(None, description="Whether the head is the embedding.")

    def given(self) -> dict[str, int | bool]:
        """The fields that the recipe writes."""
        return self.model_dump(exclude_none=True)


class Pretrain(Section):
    """Learning from token shards (method: pretrain)."""

    max_files: int | None = Field(
        None, ge=1, description="Use this many shards, in the order of their names; all without it."
    )
    group_shards: int = Field(
        16, ge=1, description="Shards that are shuffled among each other; so many are at hand at a time."
    )
    loss_across_documents: bool = Field(
        default=False,
        description="Let a document see the one before it, and its first token carry loss. Faster where documents are short.",
    )
    held_out_tokens: Tokens = Field(
        100_000, ge=0, description="At most about this many tokens are held out, whatever `held_out.share` says."
    )
    sample_tokens: int = Field(
        48, ge=0, description="Tokens of the continuation that is written down with each held-out loss; 0 for none."
    )
    cache_limit: ByteCount = Field(
        50_000_000_000, ge=1, description="Room on disk for shards that are fetched from a bucket: `50 GB`."
    )


class Keep(Section):
    """Which checkpoints stay on disk."""

    last: int = Field(3, ge=1, description="This many newest ones.")
    best: int = Field(1, ge=0, description="This many with the lowest held-out loss.")
    every: Milestone | None = Field(
        None, description="Milestones that stay for ever: the first checkpoint of each `1000 steps` or `5 epochs`."
    )

    @field_validator("every")
    @classmethod
    def _of_training(cls, every: Every | None) -> Every | None:
        if every is not None and every.unit == "seconds":
            raise ValueError(f"`{every}` is a time, and milestones go by steps or epochs; write for example 1000 steps")
        return every


class Upload(Section):
    """Where checkpoints go besides the disk. A text alone is its `url`."""

    url: NotBlank | None = Field(
        None,
        description="`gs://bucket/folder`, `s3://…`, `az://container/…`, `hf://owner/repository` or `file:///folder`; "
        "without it nothing is uploaded.",
    )
    background: bool = Field(
        default=True, description="Upload in a process of its own; otherwise before training goes on."
    )
    archive: Literal["none", "tar.gz"] = Field(
        "none", description="`tar.gz` packs each checkpoint first; that costs CPU time and saves little."
    )
    bandwidth: ByteCount | None = Field(None, description="At most so many bytes per second: `20 MB`.")
    max_pending: ByteCount | None = Field(
        None, description="With more bytes than this waiting to be uploaded, training waits: `50 GB`."
    )
    wait_at_stop: Seconds = Field(
        20.0, ge=0, description="A run that is asked to stop waits this long for its uploads; what is left stays queued."
    )


class Checkpoints(Section):
    """Full training state, resumable."""

    every: Rhythm | None = Field(
        None, description="How often: `500 steps`, `1 epochs`, `10m`; without it, at the end of each epoch."
    )
    keep: Keep = Field(default_factory=Keep, description="Retention.")
    background: bool = Field(
        default=True,
        description="Write in a process of its own while training goes on, from a copy of the state in memory.",
    )
    on_full_disk: Literal["stop", "continue"] = Field(
        "stop", description="What a run does when there is no room for a checkpoint; the one before stays whole."
    )
    upload: Upload = Field(default_factory=Upload, description="Where checkpoints go besides the disk.")

    @field_validator("upload", mode="before")
    @classmethod
    def _an_address(cls, value: Any) -> Any:
        return {"url": value} if value is None or isinstance(value, str) else value


class Gate(Section):
    """The rules that a candidate must pass. A rule of null (or `off`) is not applied."""

    holdout_loss: str | None = Field(
        "<= champion + 0.02", description="Held-out loss in nats per token: `<= champion + 0.02` or `<= 1.5`."
    )
    forgetting: str | None = Field(
        "<= 2%", description="Share of old answers that the champion gives and the candidate lost."
    )
    new_facts: str | None = Field(
        ">= 50%",
        description="Share of the new questions answered, in a wording that was not trained where there is one.",
    )
    pins: Literal["all", "off"] = Field("all", description="`all`: every pinned answer must be kept.")
    sample: int = Field(200, ge=1, description="At most this many new, and as many old, questions are asked.")
    max_new_tokens: int = Field(
        64, ge=1, description="Length of an answer in tokens; expected answers that are longer are not asked."
    )

    @field_validator("holdout_loss", "forgetting", "new_facts")
    @classmethod
    def _a_rule(cls, text: str | None, info: ValidationInfo) -> str | None:
        if text is None or text.strip() == "off":
            return None
        name: RuleName = info.field_name  # type: ignore[assignment]
        return parse_rule(name, text).text


class Schedule(Section):
    """When the model goes to night school."""

    every: Seconds = Field(
        86400.0, gt=0, description="Seconds between the starts of two cycles: `24h`, or `interval_hours: 24`."
    )
    cron: str | None = Field(None, description="A cron expression in place of `every`: `0 3 * * *`.")
    timezone: str = Field("UTC", description="The time zone of `cron`, such as Europe/Paris.")
    missed: Literal["run_once", "skip"] = Field(
        "run_once", description="What happens with cycles that fell due while nobody was there."
    )
    overlap: Literal["skip"] = Field("skip", description="A cycle that falls due while one runs is skipped.")
    min_new_examples: int = Field(
        1, ge=0, description="With fewer new examples than this, the cycle is skipped and says so; 0 always runs."
    )

    @field_validator("cron")
    @classmethod
    def _a_cron_expression(cls, cron: str | None) -> str | None:
        if cron is None:
            return None
        try:
            CronSim(cron, datetime(2000, 1, 1, tzinfo=UTC))
        except CronSimError as error:
            raise ValueError(
                f"{cron!r} is no cron expression ({error}); write five fields, such as '0 3 * * *'"
            ) from None
        return cron

    @field_validator("timezone")
    @classmethod
    def _a_time_zone(cls, timezone: str) -> str:
        try:
            ZoneInfo(timezone)
        except (ZoneInfoNotFoundError, ValueError, OSError):
            raise ValueError(f"{timezone!r} is no time zone; write a name such as UTC or Europe/Paris") from None
        return timezone

    @model_validator(mode="after")
    def _one_rhythm(self) -> Schedule:
        if self.cron is not None and "every" in self.model_fields_set:
            raise ValueError(
                f"`every: {format_seconds(self.every)}` counts from the first cycle, and `cron: {self.cron}` goes by "
                "the clock; write one of the two"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_the_unused_rhythm(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        plain: dict[str, Any] = serialize(self)
        if self.cron is not None:
            del plain["every"]
        return plain


class Serve(Section):
    """What happens with the candidate, and how it is served."""

    promote: Literal["if_gate_passes", "never", "always"] = Field(
        "if_gate_passes", description="When the champion alias moves to the candidate."
    )
    model_check_interval: Seconds = Field(
        3600.0, gt=0, description="Seconds between two looks for a newly promoted version."
    )
    record_conversations: bool = Field(
        default=False, description="Keep conversations and feedback in the home, so that a later night can study them."
    )


class Recipe(Section):
    """What is wanted of a run. See `nightschool config schema`."""

    name: str = Field(
        "default",
        pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$",
        description="The name under which versions are published and served.",
    )
    base: NotBlank = Field(
        ..., description="Starting weights: a hub id, ./folder, name@version of the registry, or new:<preset>."
    )
    method: Method = Field(
        "full",
        description="full: all weights; lora: adapters on a frozen base; pretrain: all weights, from token shards.",
    )
    shape: Shape = Field(default_factory=Shape, description="Where a new: base differs from its preset.")
    tokenizer: NotBlank | None = Field(
        None, description="A folder or hub id, for shards without a tokenizer beside them (method: pretrain)."
    )
    data: list[DataSource] = Field(
        default_factory=list, validate_default=True, description="Where the examples come from."
    )
    held_out: HeldOut = Field(default_factory=HeldOut, description="What is never trained.")
    replay: Replay = Field(default_factory=Replay, description="What is trained again.")
    train: Train = Field(default_factory=Train, description="The optimization.")
    lora: Lora = Field(default_factory=Lora, description="The adapters.")
    pretrain: Pretrain = Field(default_factory=Pretrain, description="Learning from token shards.")
    checkpoints: Checkpoints = Field(default_factory=Checkpoints, description="Training state on disk.")
    gate: Gate = Field(default_factory=Gate, description="The rules of promotion.")
    schedule: Schedule = Field(default_factory=Schedule, description="The nights.")
    serve: Serve = Field(default_factory=Serve, description="Promotion and serving.")

    @field_validator("name")
    @classmethod
    def _a_name_on_disk(cls, name: str) -> str:
        if ".." in name:
            raise ValueError(f"{name!r} holds '..'; a name is a folder on disk: write single dots")
        return name

    @field_validator("data")
    @classmethod
    def _some_data(cls, data: list[DataSource]) -> list[DataSource]:
        if not data:
            raise ValueError("there is no data; write `data: [{path: train.json}]`")
        return data

    @model_validator(mode="after")
    def _shape_of_something_new(self) -> Recipe:
        if self.shape.given() and not self.base.startswith("new:"):
            raise ValueError(f"`shape` describes a new model, and `base: {self.base}` has its shape; take `shape` out")
        return self

    @model_validator(mode="after")
    def _shards_of_all_weights(self) -> Recipe:
        if self.train.zero_stage and self.method == "lora":
            raise ValueError("`train.zero_stage` shares out weights that learn, and an adapter has few; write 0")
        return self

    @model_validator(mode="after")
    def _tokenizer_of_shards(self) -> Recipe:
        if self.tokenizer is not None and self.method != "pretrain":
            raise ValueError(
                f"`tokenizer` belongs to `method: pretrain`; with `method: {self.method}` the base brings its own, so take it out"
            )
        return self

    def as_plain(self) -> dict[str, Any]:
        """The recipe as plain values under its canonical names, for YAML and JSON."""
        return self.model_dump(mode="json", by_alias=True)
