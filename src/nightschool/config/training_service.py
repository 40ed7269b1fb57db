"""What an operator decides about the training service, in environment variables that its users know (rows 001-12 … 001-18).

Each setting of a job has one name in two places: `BATCH_SIZE` in the environment and `batch_size` in a request, which
changes its own job and nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from nightschool.errors import UsageError

Base = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=300)]
ModuleName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,100}$")]

# The settings of a job whose variable has another name than their field.
_VARIABLES: Mapping[str, str] = {"num_epochs": "NUM_TRAIN_EPOCHS"}

# What these services set, and what there is instead; a value that is not one of the neutral ones is spoken of at start.
_WITHOUT_A_USE: Mapping[str, str] = {
    "ENV": "the server never reloads its own code, whatever it says",
    "MODEL_CACHE_DIR": "models of the hub lie where HF_HOME says",
    "FINETUNED_MODEL_DIR": "versions lie in the home, which NIGHTSCHOOL_HOME names",
    "CHECKPOINT_DIR": "checkpoints lie with their runs in the home, which NIGHTSCHOOL_HOME names",
    "REDIS_URL": "jobs wait in the database, and nothing else is needed",
}


class JobSettings(BaseModel):
    """How one job trains. None leaves it to whoever comes before: the request, the environment, `DEFAULTS`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    validation_split: float | None = Field(
        None, ge=0, lt=1, description="Share of the conversations that is held out and never trained; 0.1 without it."
    )
    batch_size: int | None = Field(None, ge=1, le=1024, description="Conversations in a micro-batch.")
    gradient_accumulation_steps: int | None = Field(
        None, ge=1, le=1024, description="Micro-batches per optimizer step."
    )
    learning_rate: float | None = Field(None, gt=0, le=1, description="Peak learning rate.")
    num_epochs: int | None = Field(None, ge=1, le=1000, description="Passes over the conversations.")
    max_seq_length: int | None = Field(None, ge=8, le=1_000_000, description="Longest conversation in tokens.")
    warmup_steps: int | None = Field(
        None, ge=0, description="Steps of linear warm-up; without it 100, but at most a tenth of all steps."
    )
    save_steps: int | None = Field(None, ge=1, description="Steps between checkpoints.")
    eval_steps: int | None = Field(
        None, ge=1, description="Steps between looks at the held-out loss; without it, at the end of each epoch."
    )
    logging_steps: int | None = Field(None, ge=1, description="Steps between lines of metrics.")
    gradient_checkpointing: bool | None = Field(
        None, description="Recompute activations in the backward pass: a third more time, far fewer bytes."
    )
    lora_r: int | None = Field(None, ge=1, le=1024, description="Rank of the adapter.")
    lora_alpha: float | None = Field(None, gt=0, description="The adapter's update is scaled by alpha / r.")
    lora_dropout: float | None = Field(None, ge=0, lt=1, description="Dropout before the adapter.")
    lora_target_modules: list[ModuleName] | None = Field(
        None,
        min_length=1,
        max_length=100,
        fail_fast=True,
        description="Names of the modules that get an adapter; without it all linear layers.",
    )
    use_4bit: bool | None = Field(None, description="Keep the frozen base in 4 bits (QLoRA).")
    use_8bit: bool | None = Field(None, description="Keep the frozen base in 8 bits (QLoRA).")
    bnb_4bit_compute_dtype: Literal["float16", "bfloat16", "float32"] | None = Field(
        None, description="What a 4-bit base computes in."
    )
    bnb_4bit_quant_type: Literal["nf4", "fp4"] | None = Field(None, description="How a 4-bit base is rounded.")

    def over(self, below: JobSettings) -> JobSettings:
        """These settings, and those of `below` where these say nothing."""
        return JobSettings.model_validate({**below.model_dump(exclude_none=True), **self.model_dump(exclude_none=True)})


DEFAULTS = JobSettings(
    validation_split=0.1,
    batch_size=4,
    gradient_accumulation_steps=4,
    learning_rate=2e-4,
    num_epochs=3,
    max_seq_length=2048,
    save_steps=500,
    logging_steps=1,
    gradient_checkpointing=True,
    lora_r=16,
    lora_alpha=32,
    lora_dropout=0.05,
)
"""What a job does where neither its request nor the environment says otherwise."""


class TrainingServiceSettings(BaseModel):
    """What the training service allows, and what it does where a request leaves something out."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    default_base_model: Base | None = Field(
        None, description="The base of jobs that name none: a hub id, a folder, or a name of the registry."
    )
    allowed_base_models: tuple[Base, ...] = Field((), description="Further bases that a request may name.")
    model_aliases: dict[str, Base] = Field(
        default_factory=dict,
        description="Other names of bases, for scripts that name a model of OpenAI: `gpt-4o-mini=Qwen/Qwen3-0.6B`.",
    )
    min_training_samples: int = Field(1, ge=1, description="Fewest conversations that a job is begun with.")
    max_new_tokens: int = Field(500, ge=1, description="Longest answer in tokens, where a request says nothing.")
    temperature: float = Field(0.8, ge=0, le=2, description="Of sampling; 0 always takes the likeliest token.")
    top_p: float = Field(0.9, gt=0, le=1, description="Sample from the smallest set of this probability.")
    top_k: int = Field(50, ge=0, description="Sample from this many likeliest tokens; 0 from all.")
    job: JobSettings = Field(default_factory=JobSettings, description="Defaults of every job.")

    @classmethod
    def of_environment(cls, environ: Mapping[str, str] | None = None) -> TrainingServiceSettings:
        """The settings that environment variables make.

        Raises:
            UsageError: If one has a value that makes no sense; the message names it.
        """
        environ = os.environ if environ is None else environ
        own = {name: _value(environ, name) for name in cls.model_fields if name != "job"}
        job = {name: _value(environ, name) for name in JobSettings.model_fields}
        given = {name: value for name, value in own.items() if value is not None}
        given["job"] = {name: value for name, value in job.items() if value is not None}
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            name = variable_of(str(next(part for part in problem["loc"] if part != "job")))
            raise UsageError(f"{name}={environ[name]}: {problem['msg']}. Correct the variable, or unset it.") from None

    def base_for(self, wanted: str | None) -> str:
        """The base of a job: the one that its request names if it may, else the default.

        Raises:
            UsageError: If it may not, or there is none.
        """
        if wanted is None:
            if self.default_base_model is None:
                raise UsageError(
                    "There is no base model: the request names none, and DEFAULT_BASE_MODEL is not set. Start the server "
                    "with DEFAULT_BASE_MODEL, a hub id, a folder or a name of the registry."
                )
            return _absolute_folder(self.default_base_model)
        wanted = self.model_aliases.get(wanted, wanted)
        own = [*self.model_aliases.values(), *([self.default_base_model] if self.default_base_model else [])]
        allowed = [*self.allowed_base_models, *own]
        if wanted.strip() not in allowed:
            raise UsageError(
                f"The base model {wanted[:200]!r} is not allowed here. "
                f"Allowed are {', '.join(sorted(set(allowed))) or 'none'}; the operator adds others to ALLOWED_BASE_MODELS."
            )
        return _absolute_folder(wanted.strip())


def variable_of(field: str) -> str:
    """The environment variable of a setting: `BATCH_SIZE` of `batch_size`."""
    return _VARIABLES.get(field, field.upper())


def variables_without_a_use(environ: Mapping[str, str] | None = None) -> list[str]:
    """A sentence for each variable that is set and can mean nothing here."""
    environ = os.environ if environ is None else environ
    return [f"{name} has no use here: {why}." for name, why in _WITHOUT_A_USE.items() if environ.get(name)]


def _value(environ: Mapping[str, str], field: str) -> Any:
    """A variable's text, as a list or pairs where it is one; None if it is not set, or empty."""
    text = environ.get(variable_of(field), "").strip()
    if field == "model_aliases" and text:
        pairs = (part.partition("=")[::2] for part in text.split(",") if part.strip())
        return {name.strip(): base.strip() for name, base in pairs}
    if field in ("allowed_base_models", "lora_target_modules"):
        return [part.strip() for part in text.split(",") if part.strip()] or None
    return text or None


def _absolute_folder(base: str) -> str:
    """A folder or file by its whole path: a job runs in a folder of its own."""
    is_path = base.startswith(("./", "../", "/", "~")) or base.lower().endswith(".gguf") or Path(base).is_dir()
    return str(Path(base).expanduser().resolve()) if is_path else base
