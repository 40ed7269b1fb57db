"""Methods `full` and `lora`: fine-tuning on examples, of all weights or of an adapter on a frozen base."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nightschool.config.recipe import Recipe
from nightschool.data.batches import Batch, Batches
from nightschool.data.chat.render import Rendered, ensure_template
from nightschool.data.chat.rendered_data import (
    RenderedData,
    refuse_nothing_to_train,
    render_data,
)
from nightschool.data.example import Example
from nightschool.data.study.forms import merged
from nightschool.data.tokenizer import train_bpe
from nightschool.errors import NothingToTrain
from nightschool.evaluation.spot_check import SpotCheck
from nightschool.feedback.contradictions import notes_on
from nightschool.feedback.selection import Selection, sample_of, select_examples
from nightschool.feedback.selection_files import read_selection, write_selection
from nightschool.feedback.written_forms import WrittenForms
from nightschool.memory.adopted import in_memories
from nightschool.models.load import LoadedModel
from nightschool.store.atomic import publish_directory
from nightschool.training.causal_task import CausalTask
from nightschool.training.interpolation import Weights, learning_weights
from nightschool.training.loop import steps_in_epoch
from nightschool.training.methods.finetune_plan import finetune_plan
from nightschool.training.methods.prepared import MethodPlan, PreparedRun, Setup
from nightschool.training.metrics import say
from nightschool.training.planning.asking import Asking, num_checks
from nightschool.training.planning.study_rows import study_notes
from nightschool.training.rehearsal import Rehearsal, RehearsedPrompts, answers_beside
from nightschool.training.self_distillation import Lessons, Teacher
from nightschool.training.spot_check import SpotChecks, SpotCheckSet
from nightschool.training.state import TrainState
from nightschool.training.written_forms import written_for

# What a `new:` model's tokenizer holds at most; few texts give fewer entries.
NEW_VOCAB_SIZE = 2048
HELD_OUT_TOKENS_PER_BATCH = 2048


@dataclass(frozen=True, kw_only=True)
class NumberedBatch(Batch):
    """A micro-batch that knows which one of the run it is, so that what is rehearsed beside it is always the same.

    `documents` are the numbers of its own, in their order.
    """

    number: int
    documents: tuple[int, ...]


class FinetuneTask(CausalTask[Batches]):
    """Examples, packed into micro-batches that are planned for each epoch. The position counts micro-batches.

    Several processes take one micro-batch each; one for which none is left at the end of an epoch takes the step without
    loss. With a `rehearsal`, answers of the model as it was are rehearsed beside each of them; with a `teacher`, it says what is
    learned at the answers that it can give.
    """

    rehearsal: Rehearsal | None = None
    teacher: Teacher | None = None
    spot_checks: SpotChecks | None = None
    beginning: Weights | None = None

    @property
    def stride(self) -> int:
        return self.world.size

    def epoch_length(self, epoch: int) -> int:
        return self.batches.num_batches(epoch)

    def batch(self, epoch: int, place: int) -> Batch:
        mine = place + self.world.rank
        if mine < self.batches.num_batches(epoch):
            batch = self.batches.get(epoch, mine)
            if self.rehearsal is None and self.teacher is None:
                return batch
            number = epoch * self.batches.num_batches(0) + mine
            return NumberedBatch(**vars(batch), number=number, documents=tuple(self.batches.examples_of(epoch, mine)))
        return self.batches.get(epoch, place).without_loss()

    def where(self, epoch: int, place: int) -> str:
        return f"epoch {epoch}, micro-batch {place}"

    def _taught(self, batch: Batch) -> tuple[Tensor, int] | None:
        if self.teacher is None or not isinstance(batch, NumberedBatch):
            return None
        return self.teacher.loss(self.model, self.path, batch, batch.documents, self.likeliest)

    def _learn_beside(self, batch: Batch, units: int, scaled: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        if self.rehearsal is None or not isinstance(batch, NumberedBatch):
            return {}
        # A pass of its own, so that its activations need no room beside those of the micro-batch.
        mean = self.rehearsal.divergence(self.model, self.path, batch, batch.number, self.compute_dtype)
        part = mean * (batch.loss_units / units)
        scaled(part * self.rehearsal.weight).backward()  # type: ignore[no-untyped-call]
        tokens = self.rehearsal.tokens_beside(batch, batch.number)
        return {"rehearsal_divergence": part.detach(), "rehearsed_per_token": part.new_tensor(tokens / units)}

    def heldout_loss(self, batches: Batches) -> tuple[float, int]:
        """Loss in nats per token and tokens of the held-out batches, with dropout off."""
        return self._heldout_loss([partial(batches.get, 0, index) for index in range(batches.num_batches(0))])


@dataclass(frozen=True)
class FinetuneData:
    """What was selected, and what became of it. `whole` is more than `selection` where a plan took a sample."""

    selection: Selection
    whole: Selection
    rendered: RenderedData = field(default_factory=lambda: RenderedData([], [], []))
    held_out: Batches | None = None
    rehearsed: RehearsedPrompts | None = None
    written: WrittenForms | None = None
    checked: SpotCheckSet | None = None
    lessons: Lessons | None = None


@dataclass(frozen=True, kw_only=True)
class Finetune(PreparedRun[FinetuneData]):
    """Fine-tuning of all weights that is ready to start."""

    task: FinetuneTask

    # What a row of data is called, and how many documents it is rendered into where it is no text.
    noun: ClassVar[str] = "examples"
    documents_per_example: ClassVar[int] = 1

    @classmethod
    def read(cls, setup: Setup) -> tuple[FinetuneData, PreTrainedTokenizerBase | None]:
        """The examples, and the tokenizer of a new model.

        Raises:
            DataError: If a source cannot be read.
            Damaged: If the examples are no longer those that were selected.
        """
        whole = _selection(setup)
        selection = whole if setup.sample is None else sample_of(whole, setup.sample, seed=setup.recipe.train.seed)
        is_new = setup.recipe.base.startswith("new:")
        return FinetuneData(selection, whole), _new_tokenizer(selection, setup.folder) if is_new else None

    @classmethod
    def make_task(
        cls, setup: Setup, data: FinetuneData, loaded: LoadedModel, compute_dtype: torch.dtype
    ) -> tuple[FinetuneData, FinetuneTask]:
        """Render the examples and pack them.

        Raises:
            NothingToTrain: If no token would carry loss, or more than `train.max_cut_share` of those that would is cut.
            DataError: If examples cannot be rendered.
        """
        train, tokenizer = setup.recipe.train, loaded.tokenizer
        ensure_template(tokenizer)
        if not data.whole.new and data.whole.contradictions:
            raise NothingToTrain(
                " ".join([*notes_on(data.whole.contradictions), *study_notes(data.whole, setup.recipe.name)])
            )
        data = _with_written(setup, data, loaded)
        rendered = render_data(tokenizer, data.selection.train, train.max_seq_len, train.num_workers)
        refuse_nothing_to_train(rendered.all, train.max_seq_len, train.max_cut_share)
        size: dict[str, int | None] = {"batch_size": train.batch_size, "tokens_per_batch": None}
        if train.tokens_per_batch is not None:
            size = {"batch_size": None, "tokens_per_batch": train.tokens_per_batch}
        batches = cls.pack(rendered.all, **size, seed=train.seed)
        task = cls.new_task(setup.recipe, loaded, batches, compute_dtype=compute_dtype, world=setup.world)
        held_out = cls._held_out(tokenizer, data.selection.held_out, train.max_seq_len)
        rehearsed = None
        if setup.recipe.rehearse.prompts is not None:
            with setup.world.first_goes_first():
                rehearsed = RehearsedPrompts.of(
                    setup.recipe, setup.home, setup.root, setup.folder, data.whole, loaded.tokenizer
                )
        is_checked = train.early_stopping.every is not None
        checked = SpotCheckSet.of(setup.recipe, data.selection, setup.root, tokenizer) if is_checked else None
        is_taught = setup.recipe.study.objective != "sft" and not setup.recipe.base.startswith("new:")
        lessons = Lessons.of(setup.home, loaded, data.selection, rendered) if is_taught else None
        made = replace(
            data, rendered=rendered, held_out=held_out, rehearsed=rehearsed, checked=checked, lessons=lessons
        )
        return made, task

    @classmethod
    def pack(cls, rendered: Iterable[Rendered], **settings: Any) -> Batches:
        """The documents in micro-batches."""
        return Batches(rendered, **settings)

    @classmethod
    def new_task(cls, recipe: Recipe, loaded: LoadedModel, batches: Batches, **settings: Any) -> FinetuneTask:
        """What learns from them."""
        return FinetuneTask(loaded.model, batches, recipe.train, experts=recipe.experts, **settings)

    @classmethod
    def _held_out(cls, tokenizer: Any, examples: Sequence[Example], max_seq_len: int) -> Batches | None:
        """The held-out examples in batches, or None if there is none with an answer that fits."""
        rendered = render_data(tokenizer, examples, max_seq_len, 1).all
        try:
            return cls.pack(rendered, tokens_per_batch=HELD_OUT_TOKENS_PER_BATCH, seed=0)
        except NothingToTrain:
            return None

    @property
    def num_files(self) -> int:
        return self.data.selection.num_files

    @property
    def examples(self) -> Sequence[Example]:
        return self.data.selection.new

    @property
    def evaluate(self) -> Callable[[], tuple[float, int]] | None:
        held_out = self.data.held_out
        return None if held_out is None else partial(self.task.heldout_loss, held_out)

    def figures(self, state: TrainState) -> Callable[[dict[str, Any]], dict[str, Any]]:  # noqa: ARG002
        """The figures of what is held out, in rows that have its loss."""
        return lambda row: self.task.heldout_figures if "heldout_loss" in row else {}

    @property
    def spot_check(self) -> Callable[[int], SpotCheck] | None:
        return self.task.spot_checks

    @property
    def beginning(self) -> Weights | None:
        return self.task.beginning

    @property
    def looks_at_all_answers(self) -> bool:
        """Whether all general prompts are asked, also where the run has room for few of them."""
        return False

    def begin(self, folder: Path) -> None:
        """Ask the model what is rehearsed, or read what it said when the run began, or to another run with the same weights.

        Ask it, too, what it says of new facts that it reads, and what spot checks measure its drift from.
        """
        task = self.task
        if self.data.rehearsed is not None:
            for note in self.data.rehearsed.chosen.notes if task.world.rank == 0 else ():
                say(note)
            with task.world.first_goes_first():
                task.rehearsal = self.data.rehearsed.answered(folder, self.loaded, task, self.room)
        if self.data.lessons is not None:
            with task.world.first_goes_first():
                task.teacher = self.data.lessons.taught(folder, self.loaded, task)
        if self.data.checked is not None:
            task.spot_checks = SpotChecks(self.data.checked, self.loaded, task.compute_dtype, task.world)
            if self.recipe.train.early_stopping.interpolate and task.world.size == 1:
                task.beginning = learning_weights(task.model)

    @property
    def room(self) -> int | None:
        """How many answers can be rehearsed in all steps; None where all of them are looked at."""
        if self.looks_at_all_answers:
            return None
        micro_batches = self.budget.steps_total * self.recipe.train.accumulation_steps
        examples = len(self.data.selection.train) / max(1, self.task.batches.num_batches(0))
        return micro_batches * answers_beside(self.recipe.rehearse.ratio, examples)

    def asking(self) -> Asking | None:
        """Rehearsed answers, where nobody was asked for them yet, and spot checks."""
        data, task = self.data, self.task
        before: list[tuple[str, float]] = []
        if data.rehearsed is not None and (task.rehearsal is None or task.rehearsal.stands_in):
            seconds = data.rehearsed.asking_seconds(self.loaded, task, self.room)
            before.append((f"{data.rehearsed.num_asked(self.room)} general prompts", seconds))
        every = self.recipe.train.early_stopping.every
        if data.checked is None or every is None:
            return Asking(tuple(before)) if before else None
        steps = steps_in_epoch(task.epoch_length(0), self.budget.accumulation_steps, task.stride)
        seconds = data.checked.seconds(self.loaded)
        return Asking(tuple(before), num_checks(every, self.budget.steps_total, steps), seconds)

    def stand_in(self) -> None:
        """Have answers rehearsed that nobody gave, where nobody was asked."""
        if self.data.rehearsed is not None and self.task.rehearsal is None:
            self.task.rehearsal = self.data.rehearsed.stand_in(self.loaded.tokenizer)

    def numerics(self) -> dict[str, Any]:
        study, rehearse = self.recipe.study, self.recipe.rehearse
        objective = {} if study.objective == "sft" else {"study.objective": study.objective}
        rehearsed: dict[str, Any] = {}
        if self.data.rehearsed is not None:
            rehearsed = rehearse.model_dump(mode="json", include={"ratio", "weight", "max_new_tokens", "teacher"})
            rehearsed["prompts"] = ", ".join(rehearse.prompts or ())
        return super().numerics() | objective | {f"rehearse.{key}": value for key, value in rehearsed.items()}

    def plan_rows(self, num_processes: int) -> MethodPlan:  # noqa: ARG002 - the rows count those that are there
        return finetune_plan(self)


def _selection(setup: Setup) -> Selection:
    """The examples that were selected for the run, by whoever began it; for a plan, or where nobody did, select them now."""
    selected = None if setup.folder is None else read_selection(setup.folder)
    if selected is None:
        selected = select_examples(setup.recipe, setup.home, setup.root, in_memories(setup.home, setup.recipe.name))
        if setup.folder is not None:
            shutil.rmtree(
                setup.folder / "tokenizer", ignore_errors=True
            )  # made from an earlier selection that was lost
            write_selection(setup.folder, selected)
    return selected


def _with_written(setup: Setup, data: FinetuneData, loaded: LoadedModel) -> FinetuneData:
    """The data with the forms that the champion writes; a plan has those that rules make in their place."""
    study = setup.recipe.study
    # Random weights can't write.
    if setup.folder is None or study.write not in ("self", "both") or setup.recipe.base.startswith("new:"):
        return data
    with setup.world.first_goes_first():
        written = written_for(setup.recipe, setup.home, setup.folder, loaded, data.selection)
    selection = replace(data.selection, forms=merged(data.selection.forms, written.forms, study.forms))
    return replace(data, selection=selection, whole=selection, written=written)


def _new_tokenizer(selection: Selection, folder: Path | None) -> PreTrainedTokenizerBase:
    """The tokenizer of a `new:` model, learned from its examples, or the one that lies in the run's folder."""
    place = None if folder is None else folder / "tokenizer"
    if place is not None and place.is_dir():
        kept: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(place), local_files_only=True)
        return kept
    texts = [
        text
        for example in [*selection.train, *selection.held_out]
        for text in ([message.content for message in example.messages] or [example.text or ""])
    ]
    tokenizer = train_bpe(texts, NEW_VOCAB_SIZE)
    if place is not None:
        with publish_directory(place) as partial_folder:
            tokenizer.save_pretrained(str(partial_folder))
    return tokenizer
