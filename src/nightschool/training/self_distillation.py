"""What a run is taught of new facts by the model that it begins with, which reads each fact above its question.

In place of the words of an answer, the distribution is learned that this teacher has at each of them (context distillation, Snell et al. 2022,
arXiv 2209.15189). A small model that reads a fact is sure of little: what the fact changes in its logits counts twice (context-aware decoding,
Shi et al. 2023, arXiv 2305.14739). The teacher is asked once: its likeliest tokens lie in the run's folder and in the home's cache.
Where it does not give the fact even so, the words are learned.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nightschool.data.batches import Batch, Batches
from nightschool.data.chat.render import Rendered, render_prompt, stop_token_ids
from nightschool.data.chat.rendered_data import RenderedData
from nightschool.data.example import Example
from nightschool.data.match import is_correct
from nightschool.data.study.forms import is_studied
from nightschool.data.study.writing import fact_of, with_fact
from nightschool.evaluation.heldout import as_found, on_device
from nightschool.feedback.selection import Selection
from nightschool.feedback.teachers_words import FILE, cache_of
from nightschool.layers.distillation import TopTokens, taught_loss
from nightschool.layers.forward import ForwardPath, document_loss, own_logits, trained_places
from nightschool.models.adapters import fresh_adapter_left_out
from nightschool.models.load import LoadedModel
from nightschool.models.quiet import quiet_libraries
from nightschool.store.home import Home
from nightschool.training.metrics import say
from nightschool.training.rehearsal import KEPT_TOKENS, Rehearsed, digest_of_weights, read, write

_DOCUMENTS_PER_PASS = 8

CONTRAST = 1.0
"""So many times what the fact changes in the logits is added to them. Without it SmolLM2-135M-Instruct gives the first token of a name that it
has just read .1 to .3, and nearly 1 with it (measured on 8 facts)."""


Reading = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""A prompt with a fact, the same without it, and an answer."""


@dataclass(frozen=True)
class Lesson:
    """A document whose answer holds a new fact, and how the teacher is asked for it.

    `document` is its number, its answer begins at `place` of it. `asked_ids` is its prompt, `shown_ids` the same with the fact above the
    question.
    """

    document: int
    place: int
    asked_ids: tuple[int, ...]
    shown_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    example: Example

    @property
    def read(self) -> Reading:
        """What the teacher reads: equal for lessons that are the same."""
        return self.shown_ids, self.asked_ids, self.answer_ids


@dataclass(frozen=True)
class Lessons:
    """All lessons of a run, before the teacher was asked. `rendered` are all of its documents."""

    lessons: tuple[Lesson, ...]
    cache: Path

    @classmethod
    def of(cls, home: Home, loaded: LoadedModel, selection: Selection, rendered: RenderedData) -> Lessons:
        """Of new questions and answers, corrections and their forms; what has no room for its fact, or was cut, is no lesson."""
        facts = {one.digest: fact_of(one) for one in selection.new if is_studied(one)}
        trained = [form for form in selection.forms if not form.kept_aside and form.of in facts]
        # The other way round, another thing is asked for than the key that the example names.
        judged = {
            form.example.digest: replace(form.example, key=(), alternatives=())
            for form in trained
            if form.origin == "reverse"
        }
        facts |= {form.example.digest: facts[form.of] for form in trained}
        lessons = []
        for number, (example, document) in enumerate(zip(rendered.chat_examples, rendered.chats, strict=True)):
            fact = facts.get(example.digest)
            if fact is None or document.cut_tokens or not document.trained_tokens:
                continue
            place, answer_ids = _last_answer(document)
            turns = with_fact(example, fact, example.question or "")
            shown_ids = tuple(render_prompt(loaded.tokenizer, turns))
            if len(shown_ids) + len(answer_ids) <= loaded.context_tokens:
                as_judged = judged.get(example.digest, example)
                asked_ids = tuple(document.input_ids[:place])
                lessons.append(Lesson(number, place, asked_ids, shown_ids, answer_ids, as_judged))
        return cls(tuple(lessons), cache_of(home))

    def taught(self, folder: Path, loaded: LoadedModel, task: Any) -> Teacher | None:
        """What the teacher says, by the run's folder, or an earlier run with the same weights, or asked now; None where it can teach nothing.

        Raises:
            Damaged: If what was kept is broken.
        """
        if not self.lessons:
            say(
                "None of the new examples is a question with an answer of its own, so all words are learned as they stand"
            )
            return None
        path = folder / FILE
        rows = read(path)
        if rows is None:
            readings = list(dict.fromkeys(lesson.read for lesson in self.lessons))
            facts = [loaded.ref, readings, KEPT_TOKENS, CONTRAST]
            kept = self.cache / f"{digest_of_weights(loaded, json.dumps(facts))}.safetensors"
            rows = read(kept)
            if rows is None:
                say(f"Asking {loaded.ref} what it says of {len(readings)} forms with the fact before its eyes")
                write(kept, ask(task.model, task.path, readings))
                rows = read(kept)
            write(path, rows or [])
        teacher = Teacher.of(self.lessons, rows or [], loaded.tokenizer, task.batches)
        say(teacher.text(len(self.lessons)))
        return teacher if teacher.lessons else None


class Teacher:
    """What the teacher says in the lessons that it can give, by the number of a document in the micro-batches.

    Args:
        lessons: Those that it can give.
    """

    def __init__(self, lessons: Mapping[int, tuple[Lesson, TopTokens]]) -> None:
        self.lessons = lessons

    @classmethod
    def of(cls, lessons: Sequence[Lesson], rows: Sequence[Rehearsed], tokenizer: Any, batches: Batches) -> Teacher:
        """The lessons in which it gives the fact: by the likeliest token at each place of the answer, as the examiner finds."""
        said = {(row.prompt_ids, row.answer_ids): row.teacher for row in rows}
        stops = stop_token_ids(tokenizer)
        numbers = {original: number for number, original in enumerate(batches.kept)}
        can = {}
        for lesson in lessons:
            given = said.get((lesson.shown_ids, lesson.answer_ids))
            if given is None or lesson.document not in numbers:
                continue
            likeliest = [token for token in given.ids[:, 0].tolist() if token not in stops]
            example = lesson.example
            if is_correct(
                str(tokenizer.decode(likeliest, skip_special_tokens=True)), example.answer or "",
                question=example.question or "", key=example.key, alternatives=example.alternatives,
            ):  # fmt: skip
                can[numbers[lesson.document]] = (lesson, given)
        return cls(can)

    def text(self, asked: int) -> str:
        """How many of the lessons it can give, for people."""
        words = asked - len(self.lessons)
        rest = f"; it does not give the fact in {words}, whose words are learned" if words else ""
        return f"{len(self.lessons)} of {asked} forms are learned from what the model says with the fact before its eyes{rest}"

    def loss(
        self, model: nn.Module, path: ForwardPath, batch: Batch, documents: Sequence[int], likeliest: Tensor
    ) -> tuple[Tensor, int]:
        """As `document_loss`, of a micro-batch of these documents: at the answers that are taught, the divergence in place of the loss.

        Where these are, the teacher's likeliest token counts as the right one in `likeliest`.
        """
        places: list[int] = []
        given: list[TopTokens] = []
        for start, (lesson, said) in self._of(batch, documents):
            first = start + lesson.place - 1  # where the first token of the answer is to be predicted
            places += range(first, first + len(lesson.answer_ids))
            given.append(said)
        if not places:
            return document_loss(model, path, batch, likeliest=likeliest)
        device = batch.input_ids.device
        teacher = TopTokens(torch.cat([one.ids for one in given]), torch.cat([one.log_probs for one in given]))
        total, is_likeliest = taught_loss(model, path, batch, torch.tensor(places, device=device), teacher.to(device))
        likeliest += is_likeliest.sum()
        return total, batch.tokens_trained

    def _of(self, batch: Batch, documents: Sequence[int]) -> Iterator[tuple[int, tuple[Lesson, TopTokens]]]:
        """The lessons of a micro-batch, with where in the row their documents begin."""
        for start, document in zip(batch.cu_seqlens.tolist(), documents, strict=False):
            if document in self.lessons:
                yield start, self.lessons[document]


def ask(model: nn.Module, path: ForwardPath, readings: Sequence[Reading]) -> list[Rehearsed]:
    """What the model, as it is now, gives each place of answers when it has read their facts, against what it gives without."""
    rows: list[Rehearsed] = []
    with quiet_libraries(), as_found(model), fresh_adapter_left_out(model), torch.no_grad():
        for start in range(0, len(readings), _DOCUMENTS_PER_PASS):
            some = readings[start : start + _DOCUMENTS_PER_PASS]
            shown_mv = _logits(model, path, [(shown, answer) for shown, _, answer in some])
            asked_mv = _logits(model, path, [(asked, answer) for _, asked, answer in some])
            said = TopTokens.of(shown_mv + CONTRAST * (shown_mv - asked_mv), KEPT_TOKENS).to(torch.device("cpu"))
            sizes = [len(answer) for *_, answer in some]
            parts = zip(torch.split(said.ids, sizes), torch.split(said.log_probs, sizes), strict=True)
            rows += [
                Rehearsed(shown, answer, TopTokens(*part)) for (shown, _, answer), part in zip(some, parts, strict=True)
            ]
    return rows


def _logits(model: nn.Module, path: ForwardPath, read: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> Tensor:
    """Logits [M,V] at the places of answers, after prompts."""
    nothing = TopTokens(torch.empty(0), torch.empty(0))
    documents = [Rehearsed(*one, nothing).document for one in read]
    packed = Batches(documents, batch_size=1, seed=0, documents_per_example=len(documents)).get(0, 0)
    batch = on_device(packed, next(model.parameters()).device)
    return own_logits(model, path, batch, trained_places(batch)).float()


def _last_answer(document: Rendered) -> tuple[int, tuple[int, ...]]:
    """Where the last run of tokens that carry loss begins, and these tokens."""
    end = max(at for at, weight in enumerate(document.weights) if weight > 0) + 1
    place = next(at + 1 for at in range(end - 1, -1, -1) if document.weights[at] == 0)
    return place, tuple(document.input_ids[place:end])
