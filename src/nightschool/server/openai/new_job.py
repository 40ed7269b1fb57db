"""The body of a new job → its data on the disk, its recipe, its row in the queue."""

from __future__ import annotations

import secrets
import shutil
from dataclasses import dataclass
from typing import Any

from nightschool.config.recipe import Recipe
from nightschool.config.training_service import DEFAULTS, JobSettings
from nightschool.errors import NotFound, UsageError
from nightschool.server.errors import Refusal
from nightschool.server.openai.job_schema import CreateJob, DpoHyperparameters, Hyperparameters
from nightschool.server.openai.model_names import SOURCE, name_of_job, registry_name
from nightschool.server.training_service.new_job import recipe_of
from nightschool.server.training_service.parts import TrainingService
from nightschool.store.atomic import publish_directory, remove_folder
from nightschool.store.files import FileStore, StoredFile
from nightschool.store.job_queue import Job, job_folder, new_id
from nightschool.store.names import full_name
from nightschool.store.principal import Principal

_TRAIN, _HELD_OUT = "train.jsonl", "heldout.jsonl"
_DEFAULT_BETA = 0.1
# What OpenAI's cookbook says of `auto`: three epochs, more of few examples and fewer of many.
_EPOCHS, _FEWEST_EXAMPLES, _MOST_EXAMPLES, _MOST_EPOCHS = 3, 100, 25_000, 25
# An epoch has about so many steps, and a step at most so many examples.
_STEPS_PER_EPOCH, _MOST_AUTO_BATCH, _MOST_MICRO_BATCH = 25, 16, 8
# OpenAI keeps the checkpoints of the last three epochs, and each can be asked.
_PUBLISHED_CHECKPOINTS = 3
# What each method can learn from.
_FORMATS = {"supervised": ("messages", "prompt_completion"), "dpo": ("preference",)}


@dataclass(frozen=True)
class Chosen:
    """The hyperparameters of a job, none of them `auto`."""

    n_epochs: int
    batch_size: int
    learning_rate_multiplier: float
    beta: float | None

    def plain(self) -> dict[str, Any]:
        """As clients see them; `beta` only where there is one."""
        return {name: value for name, value in vars(self).items() if value is not None}


def create_job(training: TrainingService, body: CreateJob, principal: Principal) -> Job:
    """Check what was asked for, copy the data and enter the job into the queue.

    Raises:
        Refusal: 400, naming the parameter that is wrong.
    """
    method, hyperparameters = _method(body)
    base = _base(training, body.model, principal)
    files = FileStore(training.home, principal.tenant)
    train = _file(files, body.training_file, "training_file", method)
    held_out = None if body.validation_file is None else _file(files, body.validation_file, "validation_file", method)
    fewest = training.settings.min_training_samples
    if train.num_examples < fewest:
        message = f"The file has {train.num_examples} examples, and this server trains on {fewest} or more. Add some."
        raise Refusal(400, message, "too_few_examples", param="training_file")
    job_id = new_id("ftjob-", 24)
    seed = secrets.randbelow(2**31) if body.seed is None else body.seed
    chosen = choose(hyperparameters, train.num_examples)
    name = full_name(principal.tenant, name_of_job(job_id, body.suffix))
    recipe = _recipe(training, name, base, method, chosen, seed=seed, train=train, held_out=held_out is not None)
    job = Job(
        id=job_id,
        tenant=principal.tenant,
        name=name.rpartition("/")[2],
        recipe=recipe.as_plain(),
        root=str(job_folder(training.home, principal.tenant, job_id)),
        source=SOURCE,
        metadata={
            "model": body.model,
            "training_file": train.id,
            "validation_file": None if held_out is None else held_out.id,
            "suffix": body.suffix,
            "seed": seed,
            "method": method,
            "hyperparameters": chosen.plain(),
            "metadata": body.metadata,
        },
        created_by=principal.key,
    )
    return _submit(training, job, train, held_out)


def choose(asked: Hyperparameters | None, num_examples: int) -> Chosen:
    """The hyperparameters that were asked for, and ours for those that were left to us."""
    asked = asked or Hyperparameters()
    batch_size = asked.batch_size or min(_MOST_AUTO_BATCH, max(1, num_examples // _STEPS_PER_EPOCH))
    beta = (asked.beta or _DEFAULT_BETA) if isinstance(asked, DpoHyperparameters) else None
    return Chosen(asked.n_epochs or _epochs(num_examples), batch_size, asked.learning_rate_multiplier or 1.0, beta)


def _epochs(num_examples: int) -> int:
    if num_examples * _EPOCHS < _FEWEST_EXAMPLES:
        return min(_MOST_EPOCHS, _FEWEST_EXAMPLES // num_examples)
    if num_examples * _EPOCHS > _MOST_EXAMPLES:
        return max(1, _MOST_EXAMPLES // num_examples)
    return _EPOCHS


def _method(body: CreateJob) -> tuple[str, Hyperparameters | None]:
    """The method that is asked for, and its hyperparameters, wherever they stand."""
    if body.integrations:
        kind = str(body.integrations[0].get("type"))[:50]
        raise Refusal(
            400,
            f"The integration {kind!r} is not supported: figures stay on this server, as events, as result_files, and for "
            "TensorBoard. Leave integrations out.",
            "unsupported_parameter",
            param="integrations",
        )
    asked = body.method
    if asked is None:
        return "supervised", body.hyperparameters
    if asked.type == "reinforcement":
        raise Refusal(
            400,
            "The method 'reinforcement' is not supported: nothing here grades answers. Use supervised or dpo.",
            "unsupported_value",
            param="method.type",
        )
    others = [name for name in ("supervised", "dpo", "reinforcement") if name != asked.type and getattr(asked, name)]
    if others:
        message = f"method.type is {asked.type!r}, and method.{others[0]} belongs to another. Leave it out."
        raise Refusal(400, message, "invalid_value", param=f"method.{others[0]}")
    own = asked.supervised if asked.type == "supervised" else asked.dpo
    if body.hyperparameters is None:
        empty = Hyperparameters() if asked.type == "supervised" else DpoHyperparameters()
        return asked.type, (own.hyperparameters if own is not None else None) or empty
    if asked.type == "supervised" and (own is None or own.hyperparameters is None):
        return asked.type, body.hyperparameters
    message = (
        f"hyperparameters is the older place of method.supervised.hyperparameters. Write method.{asked.type} alone."
    )
    raise Refusal(400, message, "invalid_value", param="hyperparameters")


def _base(training: TrainingService, model: str, principal: Principal) -> str:
    """What the recipe calls the model to begin from: an allowed base, or a version of the tenant's own."""
    own = registry_name(model, principal.tenant)
    if own != model:
        try:
            return training.registry.resolve(own).ref
        except NotFound:
            message = f"There is no fine-tuned model {model[:200]!r}. List the jobs to see what there is."
            raise Refusal(400, message, "model_not_found", param="model") from None
    try:
        return training.settings.base_for(model)
    except UsageError as error:
        raise Refusal(400, str(error), "model_not_available", param="model") from None


def _file(files: FileStore, file_id: str, param: str, method: str) -> StoredFile:
    """A file that the method can learn from."""
    try:
        file = files.get(file_id)
    except NotFound as error:
        raise Refusal(400, str(error), "file_not_found", param=param) from None
    if file.format not in _FORMATS[method]:
        holds = f"examples in the format {file.format}" if file.format else "the figures of a job"
        message = (
            f"The file {file.id} holds {holds}, and the method {method!r} learns from {' or '.join(_FORMATS[method])}. "
            "Name another file, or another method."
        )
        raise Refusal(400, message, "invalid_file", param=param)
    return file


def _recipe(
    training: TrainingService,
    name: str,
    base: str,
    method: str,
    chosen: Chosen,
    *,
    seed: int,
    train: StoredFile,
    held_out: bool,
) -> Recipe:
    """The recipe of a job: what the operator has set, with what the request asks for; a file is learned as it is.

    Whoever fine-tunes through OpenAI's API gets what was trained; the gate's verdict stands beside it.
    """
    settings = training.settings.job.over(DEFAULTS)
    micro = max(size for size in range(1, _MOST_MICRO_BATCH + 1) if chosen.batch_size % size == 0)
    wanted = JobSettings(
        num_epochs=chosen.n_epochs,
        batch_size=micro,
        gradient_accumulation_steps=chosen.batch_size // micro,
        learning_rate=(settings.learning_rate or 0.0) * chosen.learning_rate_multiplier,
        # Preferences are learned on the base as it is, whatever other jobs do.
        use_4bit=False if method == "dpo" else None,
        use_8bit=False if method == "dpo" else None,
    ).over(settings)
    plain = recipe_of(wanted, name, base, num_train=train.num_examples, held_out=held_out).as_plain()
    plain["data"] = [{"path": _TRAIN, "format": train.format}]
    plain["train"] |= {"seed": seed, "log_every": 1}
    plain["checkpoints"] |= {"every": "1 epochs", "publish": _PUBLISHED_CHECKPOINTS}
    plain["serve"]["promote"] = "always"
    plain["study"] |= {"write": "off"}  # as many steps and tokens as the file has
    if method == "dpo":
        plain |= {"method": "dpo", "dpo": {"beta": chosen.beta}}
    return Recipe.model_validate(plain)


def _submit(training: TrainingService, job: Job, train: StoredFile, held_out: StoredFile | None) -> Job:
    """Copy the data, so that the files may be deleted, and enter the job; without the row, nothing is left of it."""
    folder = job_folder(training.home, job.tenant, job.id)
    with publish_directory(folder) as partial:
        shutil.copyfile(train.path, partial / _TRAIN)
        if held_out is not None:
            shutil.copyfile(held_out.path, partial / _HELD_OUT)
    try:
        return training.queue.submit(job)
    except BaseException:
        remove_folder(folder)
        raise
