"""Conversations and settings → a job: its data on the disk, its recipe, its row in the queue."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nightschool.config.recipe import Recipe
from nightschool.config.training_service import DEFAULTS, JobSettings
from nightschool.data.example import Example
from nightschool.data.sources.repair import repair_conversations
from nightschool.errors import UsageError
from nightschool.feedback.replay_pool import AcceptedExamples
from nightschool.server.training_service.organisation import name_of, shown_base
from nightschool.server.training_service.parts import TrainingService
from nightschool.server.training_service.schemas import TrainingData
from nightschool.store.atomic import publish_directory, remove_folder, write_bytes
from nightschool.store.job_queue import Job, job_folder, new_id

TRAIN, HELD_OUT = "train.jsonl", "heldout.jsonl"
_MOST_WARMUP_STEPS = 100


@dataclass(frozen=True)
class JobDraft:
    """A job before it is submitted: its data and its recipe."""

    org_id: str
    train: list[Example]
    held_out: list[Example]
    recipe: Recipe
    metadata: dict[str, Any]

    def write_data(self, folder: Path) -> None:
        """Write what is trained and what never is, each conversation on a line."""
        write_bytes(folder / TRAIN, _lines(self.train))
        if self.held_out:
            write_bytes(folder / HELD_OUT, _lines(self.held_out))


def draft_job(training: TrainingService, data: TrainingData, org_id: str) -> JobDraft:
    """Repair the conversations of a request, hold some out, and say how the others are trained.

    Raises:
        UsageError: If the base is not allowed, or too few conversations can be learned.
    """
    settings = data.settings.over(training.settings.job).over(DEFAULTS)
    base = training.settings.base_for(data.base_model)
    conversations = [[turn.message for turn in one.messages] for one in data.conversations]
    repaired = repair_conversations(conversations, "conversations", [one.key for one in data.conversations])
    _refuse_too_few(len(repaired.examples), len(conversations), training.settings.min_training_samples)
    trained = AcceptedExamples(training.home.database).trained(name_of(org_id))
    train, held_out = hold_out(repaired.examples, settings.validation_split or 0.0, trained)
    recipe = recipe_of(settings, name_of(org_id), base, num_train=len(train), held_out=bool(held_out))
    metadata = {
        "base_model": shown_base(base),
        "method": recipe.method,
        "num_conversations": len(repaired.examples),
        "num_held_out": len(held_out),
        "repairs": dict(repaired.repairs),
        "settings": settings.model_dump(mode="json", exclude_none=True),
        "notes": _notes(settings, recipe),
    }
    return JobDraft(org_id, train, held_out, recipe, metadata)


def submit_job(training: TrainingService, draft: JobDraft, *, created_by: str | None) -> Job:
    """Write the data of a job and enter it into the queue; without the row, nothing is left of it.

    Raises:
        QuotaExceeded: If the organisation has as many open jobs, or as many versions, as it may have.
    """
    job_id = new_id()
    folder = job_folder(training.home, draft.org_id, job_id)
    with publish_directory(folder) as partial:
        draft.write_data(partial)
    job = Job(
        id=job_id,
        tenant=draft.org_id,
        name=draft.recipe.name.rpartition("/")[2],
        recipe=draft.recipe.as_plain(),
        root=str(folder),
        source="api",
        metadata=draft.metadata,
        created_by=created_by,
    )
    try:
        return training.queue.submit(job)
    except BaseException:
        remove_folder(folder)
        raise


def hold_out(examples: Sequence[Example], share: float, trained: set[str]) -> tuple[list[Example], list[Example]]:
    """Part what is trained from what is held out: that share of the conversations, chosen by their digests.

    What an accepted version has trained already is never held out: that version knows it by heart, so that no candidate
    could compare. At least one conversation is trained.
    """
    wanted = min(round(share * len(examples)), len(examples) - 1)
    unseen = sorted((example for example in examples if example.digest not in trained), key=lambda one: one.digest)
    chosen = {example.digest for example in unseen[:wanted]}
    train = [example for example in examples if example.digest not in chosen]
    return train, [example for example in examples if example.digest in chosen]


def recipe_of(settings: JobSettings, name: str, base: str, *, num_train: int, held_out: bool) -> Recipe:
    """The recipe of a job; `settings` are whole, and relative paths begin in the job's folder.

    What one conversation says is not asked word for word (`gate.new_facts`): it teaches a manner, not a fact.
    """
    plain: dict[str, Any] = {
        "name": name,
        "base": base,
        **_method(settings),
        "data": [{"path": TRAIN, "format": "messages"}],
        "held_out": {"path": HELD_OUT} if held_out else {"share": 0},
        "train": {
            "learning_rate": settings.learning_rate,
            "epochs": settings.num_epochs,
            "batch_size": settings.batch_size,
            "accumulation_steps": settings.gradient_accumulation_steps,
            "max_seq_len": settings.max_seq_length,
            "warmup_steps": _warmup_steps(settings, num_train),
            "log_every": settings.logging_steps,
            "gradient_checkpointing": settings.gradient_checkpointing,
            "optimizer": "paged_adamw_8bit" if _is_quantised(settings) else "adamw",
            "evaluate_every": None if settings.eval_steps is None else f"{settings.eval_steps} steps",
        },
        "lora": {
            "r": settings.lora_r,
            "alpha": settings.lora_alpha,
            "dropout": settings.lora_dropout,
            "target_modules": settings.lora_target_modules or "all-linear",
        },
        "checkpoints": {"every": f"{settings.save_steps} steps"},
        "gate": {"new_facts": "off"},
    }
    return Recipe.model_validate(plain)


def _method(settings: JobSettings) -> dict[str, Any]:
    """LoRA on the base as it is, or on a quantised one where that was asked for and can be had."""
    if not _is_quantised(settings):
        return {"method": "lora"}
    if not settings.use_4bit:
        return {"method": "qlora", "quantization": {"bits": 8}}
    four = {"bits": 4, "type": settings.bnb_4bit_quant_type or "nf4"}
    return {"method": "qlora", "quantization": {**four, "compute_dtype": settings.bnb_4bit_compute_dtype or "auto"}}


def _is_quantised(settings: JobSettings) -> bool:
    return bool(settings.use_4bit or settings.use_8bit) and _can_quantise()


def _can_quantise() -> bool:
    return importlib.util.find_spec("bitsandbytes") is not None


def _notes(settings: JobSettings, recipe: Recipe) -> list[str]:
    """What was asked for and is done otherwise."""
    notes = []
    if (settings.use_4bit or settings.use_8bit) and recipe.method == "lora":
        notes.append("bitsandbytes is not installed, so the base is not quantised: this is plain LoRA.")
    if settings.use_4bit and settings.use_8bit:
        notes.append("use_4bit and use_8bit are both set, and use_4bit counts.")
    return notes


def _warmup_steps(settings: JobSettings, num_train: int) -> int:
    """As asked for; else a tenth of all steps and at most 100, or a short job would end before it had warmed up."""
    if settings.warmup_steps is not None:
        return settings.warmup_steps
    per_step = (settings.batch_size or 1) * (settings.gradient_accumulation_steps or 1)
    return min(_MOST_WARMUP_STEPS, math.ceil(num_train / per_step) * (settings.num_epochs or 1) // 10)


def _refuse_too_few(usable: int, sent: int, needed: int) -> None:
    if usable < needed:
        raise UsageError(
            f"Not enough training data. Need at least {needed} conversations, and {usable} of the {sent} sent can be "
            "learned: each once, with a question and an answer."
        )


def _row(example: Example) -> dict[str, Any]:
    row: dict[str, Any] = {"messages": [{"role": m.role, "content": m.content} for m in example.messages]}
    if example.key:
        row["answer"] = list(example.key)
    if example.alternatives:
        row["alternatives"] = list(example.alternatives)
    return row


def _lines(examples: Sequence[Example]) -> bytes:
    return b"".join(json.dumps(_row(example), ensure_ascii=False).encode() + b"\n" for example in examples)
