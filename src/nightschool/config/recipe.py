"""The recipe: what is wanted of a run, in one schema.

YAML files, `a.b=value` overrides, HTTP bodies, `nightschool config schema` and the reference page are all made
from these models. Every field says what it is and in which unit; whoever owns a setting reads it.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim, CronSimError
from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from nightschool.config.checkpoints import Checkpoints, Keep, Upload
from nightschool.config.data_source import (
    ANY_NAME,
    ConversationFilter,
    DataSource,
    Format,
    PersonalData,
)
from nightschool.config.fields import NotBlank, Seconds, Section, Share
from nightschool.config.judge import Judge
from nightschool.config.memory import Memory
from nightschool.config.rehearse import Rehearse
from nightschool.config.rules import RuleName, parse_rule
from nightschool.config.train import Dpo, Experts, Lora, Pretrain, Quantization, Shape, Train
from nightschool.units import format_seconds

__all__ = [
    "ANY_NAME",
    "Checkpoints",
    "ConversationFilter",
    "DataSource",
    "Dpo",
    "Experts",
    "Format",
    "Gate",
    "HeldOut",
    "Jobs",
    "Judge",
    "Keep",
    "Lora",
    "Memory",
    "Method",
    "PersonalData",
    "Pretrain",
    "Quantization",
    "Recipe",
    "Rehearse",
    "Replay",
    "Schedule",
    "Serve",
    "Shape",
    "Study",
    "Train",
    "Upload",
]

Method = Literal["full", "lora", "qlora", "dpo", "memory", "pretrain"]
ADAPTER_METHODS: frozenset[Method] = frozenset({"lora", "qlora", "dpo"})
"""Those that train an adapter and leave the base as it is."""

ADAPTER_LEARNING_RATE = 2e-5
"""Of adapters where a recipe gives none: their best rates are about ten times those of full fine-tuning (Schulman 2025, LoRA
without regret)."""

MEMORY_LEARNING_RATE = 2e-3
"""Of memory modules where a recipe gives none: they are small, new, and stand beside frozen weights."""

DEFAULTS_OF_METHODS: dict[Method, dict[str, Any]] = {
    "lora": {"train.learning_rate": ADAPTER_LEARNING_RATE},
    "qlora": {"train.learning_rate": ADAPTER_LEARNING_RATE},
    "memory": {"train.learning_rate": MEMORY_LEARNING_RATE},
    "dpo": {"train.learning_rate": ADAPTER_LEARNING_RATE, "gate.preferences": ">= 50%"},
}
"""Where the default of a setting depends on the method."""


class HeldOut(Section):
    """The split that is never trained and on which the gate compares losses."""

    share: Share = Field(
        0.05, description="Share of the examples held out, chosen by their digest, so the same every night."
    )
    min_examples: int = Field(100, ge=0, description="With fewer examples than this nothing is held out by share.")
    path: NotBlank | None = Field(None, description="A file of its own in place of a share.")


class Replay(Section):
    """What was accepted before, and what is to stay known besides, mixed in so that it is not forgotten."""

    ratio: float = Field(1.0, ge=0, description="Replayed examples per new example; 0 turns replay off.")
    minimum: int = Field(0, ge=0, description="At least this many replayed examples, if so many were accepted.")
    path: NotBlank | None = Field(
        None, description="A file of general conversations, all of them replayed every time and none asked as new."
    )


GENERAL_OF_NIGHTSCHOOL = "default"
"""In `gate.general` and `rehearse.prompts`: the prompts that come with nightschool."""


class Study(Section):
    """In how many forms new questions and answers, and corrections, are studied; conversations and texts stay as they are."""

    write: Literal["auto", "rules", "self", "both", "off"] = Field(
        "auto",
        description="Who makes other forms of what is new. auto: rules, of corrections, and of questions with short answers unless there are more "
        "than `facts_per_night`, which is a data set and no news; nothing for a `new:` base; rules: rewordings of English questions, and the fact as a sentence "
        "or asked the other way round where that is sure; self: the champion, with the fact before its eyes, and rules where it writes "
        "too little; both: half of them each; off: only what the data say is trained.",
    )
    write_for: Seconds = Field(600.0, gt=0, description="Seconds that the champion may write, at most: `10m`.")
    forms: int = Field(
        6,
        ge=1,
        le=32,
        description="Forms of each that are trained, itself among them, at most. One more is kept for the gate.",
    )
    facts_per_night: int | None = Field(
        1000,
        ge=1,
        description="Of new questions and answers, and corrections, at most so many are studied in one night if they are studied in "
        "forms and `study.write` is not auto; the others wait, oldest first. null: all.",
    )
    objective: Literal["sft", "distill"] = Field(
        "sft",
        description="What is learned of new questions and answers, and corrections, and of their forms. sft: the words of the answer; distill: "
        "the distribution that the model, as the run begins, has at each of them with the fact before its eyes.",
    )
    contradictions: Literal["ask", "later", "all"] = Field(
        "ask",
        description="Of new short answers to the same question that say different things, ask: none is trained until one is "
        "chosen; later: the one that stands later in the data; all: all. What contradicts a pin is never trained.",
    )


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
    general_lost: str | None = Field(
        "<= 20%", description="Share of the general questions that the champion answers and the candidate lost."
    )
    drift: str | None = Field(
        None, description="Champion's drift, in nats a token of its answers to general prompts: `<= 0.5`."
    )
    preferences: str | None = Field(
        None,
        description="Share of the held-out preference pairs on which the candidate's margin of better over worse answer is "
        "larger than the champion's: `>= 50%`, which is the default of `method: dpo`.",
    )
    pins: Literal["all", "off"] = Field("all", description="`all`: every pinned answer must be kept.")
    general: NotBlank | None = Field(
        GENERAL_OF_NIGHTSCHOOL,
        description="A file of general prompts, which nobody taught; `default`: those of nightschool; off: none.",
    )
    sample: int = Field(200, ge=1, description="At most this many new, and as many old, questions are asked.")
    max_new_tokens: int = Field(
        64, ge=1, description="Length of an answer in tokens; expected answers that are longer are not asked."
    )
    judge: Judge = Field(default_factory=Judge, description="A language model that judges answers.")

    @field_validator("general")
    @classmethod
    def _off_is_none(cls, place: str | None) -> str | None:
        return None if place is not None and place.strip() == "off" else place

    @field_validator("holdout_loss", "forgetting", "new_facts", "general_lost", "drift", "preferences")
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
                f"{cron!r} is not a cron expression ({error}); write five fields, such as '0 3 * * *'"
            ) from None
        return cron

    @field_validator("timezone")
    @classmethod
    def _a_time_zone(cls, timezone: str) -> str:
        try:
            ZoneInfo(timezone)
        except (ZoneInfoNotFoundError, ValueError, OSError):
            raise ValueError(f"{timezone!r} is not a time zone; write a name such as UTC or Europe/Paris") from None
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


class Jobs(Section):
    """How a job of this recipe is done."""

    share_base: bool = Field(
        default=True,
        description="Let the adapter train in one process with those of other jobs of the same base that wait at the same "
        "time (method: lora); the base is in memory once. It learns the same.",
    )


# Settings that only some methods have a use for, each with what the others have instead.
_OF_SOME_METHODS: dict[str, tuple[tuple[Method, ...], str]] = {
    "quantization": (("qlora",), ""),
    "dpo": (("dpo",), ""),
    "memory": (("memory",), ""),
    "experts": (("full", "pretrain", "lora", "qlora"), ""),
    "train.local_blocks": (("full", "pretrain"), ", of which too little learns"),
    "experts.load_balancing_loss_coef": (("full", "pretrain"), ", whose expert routers do not learn"),
    "experts.z_loss_coef": (("full", "pretrain"), ", whose expert routers do not learn"),
    "experts.bias_update_rate": (("full", "pretrain"), ", whose expert routers do not learn"),
    "study.write": (("full", "lora", "qlora"), ""),
    "lora.init": (("lora", "qlora"), ""),
    "train.early_stopping.every": (("full", "lora", "qlora"), ""),
    "train.early_stopping.interpolate": (("lora", "qlora"), ", which trains no adapter"),
    "study.contradictions": (("full", "lora", "qlora"), ""),
    "study.objective": (("full", "lora", "qlora"), ""),
    "rehearse.prompts": (("full", "lora", "qlora"), ""),
    "rehearse.teacher": (("lora", "qlora"), ", which has no adapter above a base"),
    "pretrain": (("pretrain",), ""),
    "tokenizer": (("pretrain",), ", whose base brings its own"),
}


class Recipe(Section):
    """What is wanted of a run. See `nightschool config schema`."""

    name: str = Field(
        "default",
        pattern=r"^([a-z0-9][a-z0-9._-]{0,63}/)?[a-z0-9][a-z0-9._-]{0,63}$",
        description="The name under which versions are published and served; `tenant/name` for a tenant of its own.",
    )
    base: NotBlank = Field(
        ...,
        description="Starting weights: a hub id, ./folder, ./file.gguf, name@version of the registry, or new:<preset>.",
    )
    start: Literal["champion", "base"] = Field(
        "champion",
        description="champion: where the name has one that grew from `base`, begin with it; base: begin with `base` each time.",
    )
    from_checkpoint: NotBlank | None = Field(
        None,
        description="Begin a new run with the weights of a checkpoint of another: a folder, RUN/CHECKPOINT, or RUN for its newest; "
        "base and method are that run's.",
    )
    method: Method = Field(
        "full",
        description="full: all weights; lora: adapters on a frozen base; qlora: on a quantised one; dpo: adapters, from "
        "preference pairs; memory: what lets a frozen base read an explicit memory; pretrain: all weights, from token shards.",
    )
    shape: Shape = Field(default_factory=Shape, description="Where a new: base differs from its preset.")
    tokenizer: NotBlank | None = Field(
        None,
        description="A folder, GGUF file or hub id, for shards without a tokenizer beside them (method: pretrain).",
    )
    data: list[DataSource] = Field(
        default_factory=list, validate_default=True, description="Where the examples come from."
    )
    held_out: HeldOut = Field(default_factory=HeldOut, description="What is never trained.")
    replay: Replay = Field(default_factory=Replay, description="What is trained again.")
    study: Study = Field(default_factory=Study, description="In which forms what is new is trained.")
    rehearse: Rehearse = Field(default_factory=Rehearse, description="What is not to be unlearned.")
    train: Train = Field(default_factory=Train, description="The optimization.")
    lora: Lora = Field(default_factory=Lora, description="The adapters.")
    quantization: Quantization = Field(default_factory=Quantization, description="The base below an adapter.")
    dpo: Dpo = Field(default_factory=Dpo, description="Learning from preference pairs.")
    memory: Memory = Field(default_factory=Memory, description="Reading an explicit memory.")
    experts: Experts = Field(default_factory=Experts, description="The experts of a mixture, and their routers.")
    pretrain: Pretrain = Field(default_factory=Pretrain, description="Learning from token shards.")
    checkpoints: Checkpoints = Field(default_factory=Checkpoints, description="Training state on disk.")
    gate: Gate = Field(default_factory=Gate, description="The rules of promotion.")
    schedule: Schedule = Field(default_factory=Schedule, description="The nights.")
    serve: Serve = Field(default_factory=Serve, description="Promotion and serving.")
    jobs: Jobs = Field(default_factory=Jobs, description="In the queue of jobs.")

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_method(cls, values: Any) -> Any:
        """Fill in what depends on the method. What is stored with a run has it."""
        if not isinstance(values, dict):
            return values
        for key, default in DEFAULTS_OF_METHODS.get(values.get("method"), {}).items():  # type: ignore[arg-type]
            section, name = key.split(".")
            given = values.get(section, {})
            if isinstance(given, dict) and name not in given:
                values = values | {section: given | {name: default}}
        return values

    @field_validator("name")
    @classmethod
    def _a_name_on_disk(cls, name: str) -> str:
        if ".." in name:
            raise ValueError(f"{name!r} holds '..'; a name is a folder on disk: write single dots")
        return name.removeprefix("default/")

    @field_validator("data")
    @classmethod
    def _some_data(cls, data: list[DataSource]) -> list[DataSource]:
        if not data:
            raise ValueError("there is no data; write `data: [{path: train.json}]`")
        weights = [source.weight for source in data if source.from_ is None]
        if any(weights) and not all(weights):
            raise ValueError(
                "some sources have a `weight` and some have none; write one for each, such as 1, or take all out"
            )
        return data

    def begun_with(self, base: str) -> Recipe:
        """The same with other weights to begin with. Those that exist have their shape, which is then no setting."""
        shape = self.shape if base.startswith("new:") else Shape()
        return self.model_copy(update={"base": base, "shape": shape})

    @model_validator(mode="after")
    def _shape_of_something_new(self) -> Recipe:
        if self.shape.given() and not self.base.startswith("new:"):
            raise ValueError(f"`shape` describes a new model, and `base: {self.base}` has its shape; take `shape` out")
        return self

    @model_validator(mode="after")
    def _shards_of_all_weights(self) -> Recipe:
        if self.train.zero_stage and self.method in ADAPTER_METHODS:
            raise ValueError("`train.zero_stage` shares out weights that learn, and an adapter has few; write 0")
        if self.train.zero_stage and self.method == "memory":
            raise ValueError("`train.zero_stage` shares out weights that learn, and memory modules have few; write 0")
        if self.train.zero_stage and self.train.local_blocks > 1:
            raise ValueError("`train.local_blocks` and `train.zero_stage` do not go together; write zero_stage: 0")
        if self.train.zero_stage and self.train.optimizer != "adamw":
            raise ValueError(f"`train.optimizer: {self.train.optimizer}` cannot be shared out; write zero_stage: 0")
        return self

    @model_validator(mode="after")
    def _rehearsed_in_whole_passes(self) -> Recipe:
        if self.rehearse.prompts is not None and (self.train.zero_stage or self.train.local_blocks > 1):
            raise ValueError(
                "`rehearse.prompts` needs the whole model in each process and no `train.local_blocks`; write "
                "train.zero_stage: 0 and train.local_blocks: 1, or rehearse.prompts: off"
            )
        return self

    @model_validator(mode="after")
    def _taught_in_whole_passes(self) -> Recipe:
        objective, train = self.study.objective, self.train
        if objective != "sft" and (train.zero_stage or train.local_blocks > 1):
            raise ValueError(
                f"`study.objective: {objective}` needs the whole model in each process and no `train.local_blocks`; write "
                "train.zero_stage: 0 and train.local_blocks: 1, or study.objective: sft"
            )
        if objective != "sft" and self.method == "full" and self.experts.tier != "device":
            raise ValueError(
                f"`study.objective: {objective}` needs experts that learn in memory; write experts.tier: device, or study.objective: sft"
            )
        return self

    @model_validator(mode="after")
    def _best_is_kept(self) -> Recipe:
        stopping = self.train.early_stopping
        if (stopping.patience is not None or stopping.every is not None) and self.checkpoints.keep.best == 0:
            raise ValueError("`train.early_stopping` publishes the best checkpoint; write checkpoints.keep.best: 1")
        return self

    @model_validator(mode="after")
    def _spot_checks(self) -> Recipe:
        stopping = self.train.early_stopping
        if stopping.every is None:
            return self
        if self.train.zero_stage:
            raise ValueError(
                "`train.early_stopping.every` needs the whole model in each process; write train.zero_stage: 0, or take it out"
            )
        if self.from_checkpoint is not None:
            raise ValueError(
                "`train.early_stopping.every` measures drift from the base, and `from_checkpoint` begins elsewhere; take one of the two "
                "out"
            )
        return self

    @model_validator(mode="after")
    def _null_space(self) -> Recipe:
        if self.lora.init == "null_space" and self.rehearse.prompts is None:
            raise ValueError(
                "`lora.init: null_space` looks at the answers that are rehearsed, and nothing is; write rehearse.prompts: default"
            )
        if self.lora.init == "null_space" and self.from_checkpoint is not None:
            raise ValueError(
                "`from_checkpoint` brings what was learned in other directions than `lora.init: null_space` draws; take one of the "
                "two out"
            )
        return self

    @model_validator(mode="after")
    def _settings_of_their_method(self) -> Recipe:
        for name, (methods, remedy) in _OF_SOME_METHODS.items():
            owner: Section = self
            *sections, field = name.split(".")
            for section in sections:
                owner = getattr(owner, section)
            default = type(owner).model_fields[field].get_default(call_default_factory=True)
            if self.method not in methods and getattr(owner, field) not in (default, "off"):
                *others, last = (f"`method: {method}`" for method in methods)
                theirs = f"{', '.join(others)} or {last}" if others else last
                raise ValueError(
                    f"`{name}` belongs to {theirs}, and this is `method: {self.method}`{remedy}; take it out"
                )
        return self

    def as_plain(self) -> dict[str, Any]:
        """The recipe as plain values under its canonical names, for YAML and JSON."""
        return self.model_dump(mode="json", by_alias=True)
